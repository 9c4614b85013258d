"""exp.init: the same numbers as torch.nn.init from the same seed, the laws behind them, and every error."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from exp import init
from exp.init import (calculate_gain, fan_in_and_fan_out, fixup_, gaussian_mean, kaiming_normal_, kaiming_uniform_,
                      layer_stats, orthogonal_, selu, xavier_normal_, xavier_uniform_)
from exp.testing import test_like

FILLERS = [xavier_normal_, xavier_uniform_, kaiming_normal_, kaiming_uniform_, orthogonal_]
shapes = st.lists(st.integers(1, 7), min_size=2, max_size=5).map(tuple)
NONLINEARITIES = ["linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu", "conv1d", "conv2d", "conv3d",
                  "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]


def both(filler, shape, seed, dtype=torch.float32, **options):
    "What we and PyTorch draw from the same generator."
    out = []
    for f in (filler, getattr(nn.init, filler.__name__)):
        w = torch.empty(shape, dtype=dtype)
        out.append(f(w, **options, generator=torch.Generator().manual_seed(seed)))
    return out


# ---- the same as PyTorch ------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**31), st.sampled_from(FILLERS), st.sampled_from([torch.float32, torch.float64]))
def test_same_numbers_as_torch(shape, seed, filler, dtype):
    ours, theirs = both(filler, shape, seed, dtype)
    test_like(ours, theirs, rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(shapes, st.floats(0, 10), st.sampled_from(["fan_in", "fan_out", "FAN_OUT"]), st.sampled_from(NONLINEARITIES))
def test_kaiming_options_as_torch(shape, a, mode, nonlinearity):
    for filler in (kaiming_normal_, kaiming_uniform_):
        test_like(*both(filler, shape, 0, a=a, mode=mode, nonlinearity=nonlinearity), rtol=0, atol=0)


@pytest.mark.parametrize("filler", [xavier_normal_, xavier_uniform_, orthogonal_])
@pytest.mark.parametrize("gain", [0., .1, 5/3, 100])
def test_gain_as_torch(filler, gain):
    test_like(*both(filler, (6, 5), 3, gain=gain), rtol=0, atol=0)


def test_orthogonal_takes_a_negative_gain(): test_like(*both(orthogonal_, (4, 6), 3, gain=-2.), rtol=0, atol=0)


@pytest.mark.parametrize("filler", FILLERS)
def test_global_seed_as_torch(filler):
    torch.manual_seed(5); ours = filler(torch.empty(4, 3))
    torch.manual_seed(5); theirs = getattr(nn.init, filler.__name__)(torch.empty(4, 3))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("filler", FILLERS)
def test_generator_leaves_the_global_one_alone(filler):
    torch.manual_seed(0); expected = torch.rand(3)
    torch.manual_seed(0); filler(torch.empty(4, 3), generator=torch.Generator().manual_seed(9))
    assert torch.equal(torch.rand(3), expected)


def test_linear_and_conv_defaults():
    for layer, shape in ((lambda: nn.Linear(20, 30), (30, 20)), (lambda: nn.Conv2d(3, 8, 5), (8, 3, 5, 5))):
        torch.manual_seed(2); theirs = layer().weight.detach()
        torch.manual_seed(2); ours = kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
        assert torch.equal(ours, theirs) and ours.abs().max() <= math.prod(shape[1:])**-.5


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_gains_as_torch(name): assert calculate_gain(name) == nn.init.calculate_gain(name)


@given(st.one_of(st.floats(-100, 100), st.integers(-100, 100)))
def test_leaky_gain_as_torch(slope):
    assert calculate_gain("leaky_relu", slope) == nn.init.calculate_gain("leaky_relu", slope)


# ---- in place, off the tape, any memory layout, any float ------------------------------------------------------------

@pytest.mark.parametrize("filler", FILLERS)
def test_fills_in_place_and_returns_w(filler):
    w = torch.zeros(5, 4)
    assert filler(w) is w and (w != 0).all()


@pytest.mark.parametrize("filler", FILLERS)
def test_a_leaf_that_wants_gradients(filler):
    w = filler(nn.Parameter(torch.zeros(5, 4)))
    assert w.requires_grad and w.is_leaf and w.grad_fn is None
    w.sum().backward(); assert (w.grad == 1).all()


@pytest.mark.parametrize("filler", FILLERS)
def test_a_transposed_view_is_filled(filler):
    base = torch.zeros(64, 32)
    filler(base.T)
    assert (base != 0).all()
    if filler is orthogonal_: test_like(base.T @ base, torch.eye(32), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("filler", FILLERS)
def test_half_precision(filler, dtype):
    w = filler(torch.empty(64, 32, dtype=dtype))
    assert w.dtype == dtype and w.isfinite().all() and w.float().std() > .05
    if filler is orthogonal_: assert (w.float().T @ w.float() - torch.eye(32)).abs().max() < .03


# ---- laws -----------------------------------------------------------------------------------------------------------

@given(shapes)
def test_fans(shape):
    fan_in, fan_out = fan_in_and_fan_out(torch.empty(shape))
    assert (fan_in, fan_out) == nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))
    assert fan_in == math.prod(shape[1:])


@pytest.mark.parametrize("normal, uniform", [(xavier_normal_, xavier_uniform_), (kaiming_normal_, kaiming_uniform_)])
def test_normal_and_uniform_have_one_std(normal, uniform):
    a, b = normal(torch.empty(400, 300)), uniform(torch.empty(400, 300))
    test_like(a.std(), b.std(), rtol=.02)
    assert b.abs().max() <= 3**.5 * b.std() * 1.02 < a.abs().max()


def test_stds_by_hand():
    test_like(xavier_normal_(torch.empty(500, 300)).std().item(), math.sqrt(2/800), rtol=.02)
    test_like(kaiming_normal_(torch.empty(500, 300)).std().item(), math.sqrt(2/300), rtol=.02)
    test_like(kaiming_normal_(torch.empty(500, 300), mode="fan_out").std().item(), math.sqrt(2/500), rtol=.02)
    test_like(kaiming_normal_(torch.empty(50, 30, 3, 3), a=1.).std().item(), math.sqrt(1/270), rtol=.03)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(.1, 10))
def test_orthogonal_has_equal_singular_values(rows, cols, gain):
    w = orthogonal_(torch.empty(rows, cols, dtype=torch.float64), gain)
    s = torch.linalg.svdvals(w)
    test_like(s, torch.full_like(s, gain), rtol=1e-10)


def test_orthogonal_keeps_lengths():
    q, x = orthogonal_(torch.empty(50, 50, dtype=torch.float64)), torch.randn(10, 50, dtype=torch.float64)
    test_like((x @ q.T).norm(dim=1), x.norm(dim=1), rtol=1e-12)


def test_orthogonal_is_uniform():
    g = torch.Generator().manual_seed(0)
    q = torch.stack([orthogonal_(torch.empty(2, 2), generator=g) for _ in range(2000)])
    assert q.mean(0).abs().max() < .06             # without the sign correction, q[0, 0] averages -0.64
    assert abs((torch.linalg.det(q) > 0).float().mean() - .5) < .06


def test_kaiming_keeps_the_signal_through_a_convolution():
    torch.manual_seed(0)
    x = torch.randn(4, 32, 16, 16)
    for _ in range(4):
        w = kaiming_normal_(torch.empty(32, 32, 3, 3))
        x = F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w))
    assert .5 < x.square().mean() < 2


@settings(max_examples=25, deadline=None)
@given(st.floats(-3, 3), st.floats(.01, 10))
def test_gaussian_mean_knows_the_moments(mean, std):
    assert math.isclose(gaussian_mean(lambda z: z, mean, std), mean, abs_tol=1e-8)
    assert math.isclose(gaussian_mean(lambda z: (z - mean)**2, mean, std), std**2, rel_tol=1e-8)
    assert math.isclose(gaussian_mean(torch.exp, mean, min(std, 1.)), math.exp(mean + min(std, 1.)**2/2), rel_tol=1e-7)


@pytest.mark.parametrize("mean", [0., .5, -2.])
def test_gaussian_mean_splits_a_jump_at_the_mean(mean):
    assert abs(gaussian_mean(lambda z: (z > mean).double(), mean, 3.) - .5) < 1e-9
    assert abs(gaussian_mean(lambda z: (z >= mean).double(), mean, 3.) - .5) < 1e-9


@pytest.mark.parametrize("a", [0., .01, .3, 1.])
def test_leaky_gain_restores_the_mean_square(a):
    left = gaussian_mean(lambda z: F.leaky_relu(z, a)**2, std=calculate_gain("leaky_relu", a))
    assert abs(left - 1) < 1e-6


# ---- selu -----------------------------------------------------------------------------------------------------------

def test_selu_fixed_point():
    assert abs(gaussian_mean(selu)) < 1e-7 and abs(gaussian_mean(lambda z: selu(z)**2) - 1) < 1e-7


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32).filter(bool), min_size=0, max_size=8))
def test_selu_as_torch_with_gradient(values):
    x = torch.tensor(values, dtype=torch.float32, requires_grad=True)       # 0 is a kink, and has a test of its own
    test_like(selu(x), F.selu(x))
    ours, theirs = (torch.autograd.grad(f(x).sum(), x)[0] for f in (selu, F.selu))
    test_like(ours, theirs); assert ours.isfinite().all()


def test_selu_at_its_kink_takes_the_slope_from_the_left():
    "Whatever slope PyTorch gives `clamp` at its bound: that differs between releases."
    x = torch.tensor([0., -0., -1e-30], requires_grad=True)
    grad = torch.autograd.grad(selu(x).sum(), x)[0]
    test_like(grad, torch.full((3,), 1.0507009873554805*1.6732632423543772), rtol=1e-6)
    assert (selu(x) == F.selu(x)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_selu_keeps_shape_and_dtype(dtype):
    x = torch.tensor([[-100., -1., 0., 1., 100.]], dtype=dtype)
    test_like(selu(x), F.selu(x), rtol=2e-2 if dtype != torch.float64 else 1e-12, atol=1e-12)


def test_selu_gradcheck(): assert torch.autograd.gradcheck(selu, torch.randn(20, dtype=torch.float64, requires_grad=True))


def test_selu_extremes():
    x = torch.tensor([float("inf"), -float("inf"), 1e30, -1e30])
    test_like(selu(x), F.selu(x)); assert selu(torch.tensor(float("nan"))).isnan()


# ---- fixup ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_branches, m", [(1, 2), (16, 2), (16, 3), (9, 4)])
def test_fixup_scales_and_zeros(n_branches, m):
    branches = [[torch.empty(80, 80) for _ in range(m)] for _ in range(n_branches)]
    assert fixup_(branches) is branches
    expected = math.sqrt(2/80) * n_branches**(-1/(2*m - 2))
    for *first, last in branches:
        assert (last == 0).all()
        for w in first: test_like(w.std().item(), expected, rtol=.06)


def test_fixup_branch_of_one_and_mixed_branches():
    (lone,), (a, b) = fixup_([[torch.ones(3, 3)], [torch.ones(3, 3), torch.ones(3, 3)]])
    assert (lone == 0).all() and (b == 0).all() and not (a == 1).any()


def test_fixup_on_parameters_with_leak_and_generator():
    make = lambda: [(nn.Parameter(torch.ones(6, 6)), nn.Parameter(torch.ones(6, 6))) for _ in range(4)]
    draw = lambda a: fixup_(make(), a, torch.Generator().manual_seed(1))
    first, again, leaky = draw(0.), draw(0.), draw(1.)
    assert all(w.requires_grad and w.is_leaf for branch in first for w in branch)
    test_like([w.detach() for w, _ in first], [w.detach() for w, _ in again])
    test_like(first[0][0].detach() / 2**.5, leaky[0][0].detach())


@pytest.mark.parametrize("m", [2, 3])
def test_fixup_step_does_not_depend_on_depth(m):
    "The squared gradient of an output with respect to all branches, for 4 and for 36 of them."
    torch.manual_seed(0); x, readout = torch.randn(100, 60), torch.randn(60)
    def size(n_branches):
        branches = fixup_([[torch.empty(60, 60) for _ in range(m)] for _ in range(n_branches)])
        h, weights = x, [w.requires_grad_() for branch in branches for w in branch]
        for *first, last in branches:
            z = h
            for w in first: z = torch.relu(z @ w.T)
            h = h + z @ last.T
        return sum(g.square().sum() for g in torch.autograd.grad((h @ readout).mean(), weights)).item()
    assert .6 < size(36)/size(4) < 1.6      # it would be 9 without the scaling


# ---- layer_stats ----------------------------------------------------------------------------------------------------

def test_layer_stats_by_hand():
    x, w = torch.tensor([[1., 0.], [0., 1.]]), torch.tensor([[2., 0.], [0., 1.]])
    s = layer_stats(x, [w, w], lambda z: z)
    assert list(s) == ["mean", "std", "rms", "input_std", "cosine", "grad_rms"]
    assert all(v.shape == (2,) and v.dtype == torch.float64 for v in s.values())
    test_like(s["mean"], [.75, 1.25]); test_like(s["rms"], [math.sqrt(5/4), math.sqrt(17/4)])
    test_like(s["cosine"], [0., 0.], atol=1e-12)
    test_like(s["input_std"], [math.sqrt((2 + .5)/2), math.sqrt((8 + .5)/2)])
    test_like(s["std"][0], torch.tensor([2., 0., 0., 1.], dtype=torch.float64).std())


def test_layer_stats_sees_equal_inputs_and_leaves_weights_alone():
    x, w = torch.ones(3, 4), torch.eye(4).requires_grad_()
    s = layer_stats(x, [w], torch.tanh)
    test_like(s["cosine"], [1.]); test_like(s["input_std"], [0.])
    assert w.grad is None and w.requires_grad and not x.requires_grad


def test_layer_stats_gradient():
    "Through layers that multiply by 3, the gradient is 3 times larger one layer earlier."
    s = layer_stats(torch.randn(8, 5), [3*torch.eye(5)]*3, lambda z: z)
    test_like(s["grad_rms"] / s["grad_rms"][-1], [9., 3., 1.])


# ---- every Raises: line ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("filler", [*FILLERS, fan_in_and_fan_out])
@pytest.mark.parametrize("shape, word", [((), "shape"), ((5,), r"\(5,\)"), ((0, 3), r"\(0, 3\)"), ((3, 0), "empty"),
                                         ((3, 4, 0), "empty")])
def test_shapes_without_fans(filler, shape, word):
    with pytest.raises(ValueError, match=word): filler(torch.empty(shape))


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_dtypes_that_are_not_float(filler, dtype):
    with pytest.raises(RuntimeError): filler(torch.zeros(3, 4, dtype=dtype))      # PyTorch's own word


@pytest.mark.parametrize("filler", [xavier_normal_, xavier_uniform_])
@pytest.mark.parametrize("gain", [-1., math.nan])
def test_impossible_gain(filler, gain):
    with pytest.raises(RuntimeError): filler(torch.empty(3, 4), gain)             # PyTorch's own word


@pytest.mark.parametrize("filler", [kaiming_normal_, kaiming_uniform_])
def test_kaiming_refuses(filler):
    w = torch.empty(3, 4)
    with pytest.raises(ValueError, match="fan_avg.*fan_in.*fan_out"): filler(w, mode="fan_avg")
    with pytest.raises(ValueError, match="mode None"): filler(w, mode=None)
    with pytest.raises(ValueError, match="gelu.*leaky_relu"): filler(w, nonlinearity="gelu")
    with pytest.raises(TypeError): filler(w, a="0.1")


def test_gain_refuses():
    with pytest.raises(ValueError, match="'mish'.*relu"): calculate_gain("mish")
    for slope in ("0.1", [1]):
        with pytest.raises(TypeError): calculate_gain("leaky_relu", slope)


def test_selu_of_integers_is_that_of_their_floats():
    test_like(selu(torch.arange(-3, 3)), F.selu(torch.arange(-3., 3.)))


@pytest.mark.parametrize("branches", [torch.zeros(2, 3, 3), [torch.zeros(3, 3)], [torch.zeros(4, 3, 3, 3)]])
def test_fixup_refuses(branches):
    with pytest.raises(ValueError, match="list of"): fixup_(branches)


def test_fixup_of_an_empty_branch():
    with pytest.raises(ValueError): fixup_([[]])


def test_fixup_refuses_what_kaiming_refuses():
    with pytest.raises(ValueError, match=r"\(4,\)"): fixup_([[torch.zeros(4), torch.zeros(4, 4)]])


def test_layer_stats_of_no_batch_or_no_layers():
    with pytest.raises(IndexError): layer_stats(torch.randn(4), [torch.eye(4)], torch.relu)
    with pytest.raises((RuntimeError, ValueError)): layer_stats(torch.randn(2, 4), [], torch.relu)


def test_everything_public_is_tested():
    assert set(init.__all__) == {f.__name__ for f in [*FILLERS, fan_in_and_fan_out, calculate_gain, gaussian_mean,
                                                      layer_stats, selu, fixup_]}

"exp.norm against PyTorch (every option, mode, dtype and unlucky input), and the laws of normalising."
import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from exp.norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, centre

SHAPES = {1: (5, 6), 2: (5, 6, 7), 3: (4, 6, 3, 5), 4: (3, 6, 2, 3, 4)}
BATCH = {(5, 6): nn.BatchNorm1d, (5, 6, 7): nn.BatchNorm1d, (4, 6, 3, 5): nn.BatchNorm2d, (3, 6, 2, 3, 4): nn.BatchNorm3d}
INSTANCE = {(5, 6, 7): nn.InstanceNorm1d, (4, 6, 3, 5): nn.InstanceNorm2d, (3, 6, 2, 3, 4): nn.InstanceNorm3d}


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def close(a, b, **tol): torch.testing.assert_close(a, b, equal_nan=True, **tol)


def run(layer, x, modes=(True, True, False)):
    "Outputs, gradients and state, step by step."
    out = []
    wanted = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).reshape(x.shape).sin().to(x.dtype)
    for mode in modes:
        layer.train(mode); layer.zero_grad()
        inp = x.clone().requires_grad_()
        y = layer(inp)
        (y*wanted).sum().backward()
        out.append([y.detach(), inp.grad, [p.grad for p in layer.parameters()], {k: v.clone() for k, v in layer.state_dict().items()}])
    return out


def same(ours, theirs, x, **tol):
    with torch.no_grad():
        for p in theirs.parameters(): p.uniform_(.5, 2)
    ours.load_state_dict(theirs.state_dict())                    # strict, both ways
    theirs.load_state_dict(ours.state_dict())
    assert [k for k, _ in ours.named_buffers()] == [k for k, _ in theirs.named_buffers()]
    a, b = run(ours, x), run(theirs, x)
    assert [y.dtype for y, *_ in a] == [x.dtype]*3
    close(a, b, **tol)


# --- against PyTorch -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES.values())
@pytest.mark.parametrize("options", [{}, dict(eps=.3), dict(momentum=.5), dict(momentum=None), dict(momentum=0.), dict(affine=False),
                                     dict(track_running_stats=False), dict(affine=False, track_running_stats=False)], ids=str)
def test_batchnorm_is_pytorchs(shape, options):
    same(BatchNorm(6, **options).double(), BATCH[shape](6, **options).double(), 3*torch.randn(shape).double() + 2, rtol=1e-9, atol=1e-9)
    same(BatchNorm(6, **options), BATCH[shape](6, **options), 3*torch.randn(shape) + 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", INSTANCE)
@pytest.mark.parametrize("options", [{}, dict(eps=.3), dict(affine=True), dict(affine=True, track_running_stats=True),
                                     dict(track_running_stats=True, momentum=.5)], ids=str)
def test_instancenorm_is_pytorchs(shape, options):
    same(InstanceNorm(6, **options).double(), INSTANCE[shape](6, **options).double(), 3*torch.randn(shape).double() + 2, rtol=1e-9, atol=1e-9)
    same(InstanceNorm(6, **options), INSTANCE[shape](6, **options), 3*torch.randn(shape) + 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 6), (1, 6, 2, 2)])
@pytest.mark.parametrize("args, options", [((1, 6), {}), ((2, 6), {}), ((3, 6), dict(eps=.3)), ((2, 6), dict(affine=False))], ids=str)
def test_groupnorm_is_pytorchs(shape, args, options):
    same(GroupNorm(*args, **options).double(), nn.GroupNorm(*args, **options).double(), 3*torch.randn(shape).double() + 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("args, shape", [((12,), (4, 7, 12)), ((12,), (12,)), (((7, 12),), (4, 7, 12)), (([7, 12], 1e-2), (4, 7, 12)),
                                         ((12, 1e-5, False), (4, 12)), ((12, 1e-5, True, False), (4, 12)), ((1,), (4, 1)),
                                         ((torch.Size([3, 5, 5]),), (1, 3, 5, 5))], ids=str)
def test_layernorm_is_pytorchs(args, shape):
    same(LayerNorm(*args).double(), nn.LayerNorm(*args).double(), 3*torch.randn(shape).double() + 2, rtol=1e-9, atol=1e-9)


PAIRS = [(BatchNorm, nn.BatchNorm2d), (InstanceNorm, nn.InstanceNorm2d), (GroupNorm, nn.GroupNorm), (LayerNorm, nn.LayerNorm)]


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_arguments_have_pytorchs_names_order_and_defaults(ours, theirs):
    mine, good = ([(p.name, p.default, p.kind) for p in inspect.signature(c).parameters.values()] for c in (ours, theirs))
    assert mine[:len(good)] == good or mine == [*good, ("bias", True, inspect.Parameter.KEYWORD_ONLY)]   # older PyTorch has no bias=


def make(cls, **options):
    return {BatchNorm: lambda: BatchNorm(6, **options), InstanceNorm: lambda: InstanceNorm(6, affine=True, **options),
            GroupNorm: lambda: GroupNorm(3, 6, **options), LayerNorm: lambda: LayerNorm((6, 4, 4), **options)}[cls]()
def twin(cls, **options):
    return {BatchNorm: lambda: nn.BatchNorm2d(6, **options), InstanceNorm: lambda: nn.InstanceNorm2d(6, affine=True, **options),
            GroupNorm: lambda: nn.GroupNorm(3, 6, **options), LayerNorm: lambda: nn.LayerNorm((6, 4, 4), **options)}[cls]()
FOUR = [BatchNorm, InstanceNorm, GroupNorm, LayerNorm]


@pytest.mark.parametrize("cls", FOUR)
def test_bias_device_and_dtype(cls):
    layer = make(cls, bias=False, device="cpu", dtype=torch.float64)
    assert layer.bias is None and layer.weight.dtype == torch.float64 and "bias" not in layer.state_dict()
    assert layer(torch.randn(3, 6, 4, 4).double()).dtype == torch.float64
    assert all(b.dtype in (torch.float64, torch.long) for b in layer.buffers())


@pytest.mark.parametrize("cls", FOUR)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parameters", ["half", "single"])
def test_half_precision(cls, dtype, parameters):
    ours, theirs = make(cls), twin(cls)
    if parameters == "half": ours, theirs = ours.to(dtype), theirs.to(dtype)
    same(ours, theirs, (2*torch.randn(3, 6, 4, 4) + 1).to(dtype), rtol=3e-2, atol=.15 if dtype == torch.bfloat16 else .03)


@pytest.mark.parametrize("cls", FOUR)
@pytest.mark.parametrize("scale", [1e-3, 100.])
def test_small_and_large_values(cls, scale):
    same(make(cls), twin(cls), scale*torch.randn(3, 6, 4, 4), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls", FOUR)
def test_mean_1000_std_001_is_exact_to_single_precision(cls):
    x = 1000 + .01*torch.randn(16, 6, 4, 4)
    wide = make(cls).double()
    close(make(cls)(x), wide(x.double()).float(), rtol=1e-3, atol=1e-4)
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    assert (naive - 1e-4).abs().max() > 1e-3                     # the other formula is not


@pytest.mark.parametrize("cls", FOUR)
def test_a_constant_input_gives_the_shift(cls):
    layer = make(cls)
    with torch.no_grad(): layer.bias.uniform_()
    y = layer(torch.full((3, 6, 4, 4), 1234.5))
    close(y, layer.bias.detach().reshape(1, *layer.bias.shape, *[1]*(3 - layer.bias.ndim)).expand_as(y))


@pytest.mark.parametrize("cls", FOUR)
def test_channels_last_and_views(cls):
    x = torch.randn(3, 6, 4, 4)
    right = copy.deepcopy(make(cls))(x)
    close(make(cls)(x.to(memory_format=torch.channels_last)), right)
    close(make(cls)(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)), right)


@pytest.mark.parametrize("cls", FOUR)
def test_gradients_twice(cls):
    layer = make(cls).double() if cls is not LayerNorm else LayerNorm((6, 2, 2)).double()
    def f(x): return copy.deepcopy(layer)(x)                     # the past is a constant
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x.detach().clone().requires_grad_(), atol=1e-4)


@pytest.mark.parametrize("cls", FOUR)
def test_buffers_carry_no_graph_and_modules_copy_and_pickle(cls):
    layer = make(cls)
    layer(torch.randn(3, 6, 4, 4, requires_grad=True)).sum().backward()
    assert not any(b.requires_grad or b.grad_fn for b in layer.buffers())
    x = torch.randn(3, 6, 4, 4)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))): close(other.eval()(x), layer.eval()(x))
    file = io.BytesIO(); torch.save(layer.state_dict(), file); file.seek(0)
    fresh = make(cls); fresh.load_state_dict(torch.load(file, weights_only=True))
    close(fresh.eval()(x), layer.eval()(x), rtol=0, atol=0)
    assert str(layer).startswith(cls.__name__ + "(")


def test_reset():
    for layer in (BatchNorm(6), InstanceNorm(6, affine=True, track_running_stats=True)):
        fresh = copy.deepcopy(layer.state_dict())
        layer(torch.randn(4, 6, 3)); layer.weight.data.fill_(3); layer.bias.data.fill_(3)
        layer.reset_parameters()                   # the averages, too, as PyTorch's
        close(layer.state_dict(), fresh)
    BatchNorm(6, affine=False, track_running_stats=False).reset_running_stats()
    BatchNorm(6, affine=False).reset_parameters()


# --- what cannot work says so ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layer, x", [(BatchNorm(6), (1, 6)), (BatchNorm(6), (1, 6, 1, 1)), (InstanceNorm(6), (4, 6, 1)),
                                      (InstanceNorm(6), (4, 6, 1, 1)), (GroupNorm(6, 6), (1, 6)),
                                      (BatchNorm(6, track_running_stats=False).eval(), (1, 6))])
def test_one_value_raises_what_pytorch_raises(layer, x):
    theirs = {BatchNorm: nn.BatchNorm1d if len(x) == 2 else nn.BatchNorm2d, InstanceNorm: nn.InstanceNorm1d if len(x) == 3 else nn.InstanceNorm2d}
    if isinstance(layer, GroupNorm): other = nn.GroupNorm(6, 6)
    else: other = theirs[type(layer)](6, track_running_stats=layer.track_running_stats)
    other.train(layer.training)
    with pytest.raises(ValueError, match="Expected more than 1"): other(torch.randn(x))
    with pytest.raises(ValueError, match="Expected more than 1") as mine: layer(torch.randn(x))
    assert str(tuple(x))[:-1] in str(mine.value)
    if layer.training and layer._buffers.get("running_mean") is not None: assert layer.num_batches_tracked == 0   # nothing half-done


def test_one_value_is_fine_in_evaluation():
    for shape in ((1, 6), (1, 6, 1, 1)): assert BatchNorm(6).eval()(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("cls", FOUR)
@pytest.mark.parametrize("shape", [(4, 5, 4, 4), (4, 12, 4, 4), (6,)])
def test_wrong_shapes_name_the_value_and_the_cure(cls, shape):
    with pytest.raises(ValueError, match="6") as error: make(cls)(torch.randn(shape))
    assert str(shape) in str(error.value) and ("give" in str(error.value) or "must" in str(error.value))


@pytest.mark.parametrize("cls", FOUR)
def test_whole_numbers_are_refused(cls):
    with pytest.raises(TypeError, match="float"): make(cls)(torch.ones(2, 6, 4, 4, dtype=torch.long))


def test_an_empty_training_batch_is_refused():
    layer = BatchNorm(6)
    with pytest.raises(ValueError, match=r"\(0, 6, 4, 4\)"): layer(torch.empty(0, 6, 4, 4))
    assert layer.running_mean.isfinite().all()
    assert layer.eval()(torch.empty(0, 6, 4, 4)).shape == (0, 6, 4, 4)
    tracked = InstanceNorm(6, track_running_stats=True)
    assert tracked(torch.empty(0, 6, 4, 4)).shape == (0, 6, 4, 4) and tracked.running_mean.isfinite().all()


def test_a_group_of_one_value_is_refused_in_batches_too():
    with pytest.raises(ValueError, match=r"Expected more than 1.*\(5, 6"): GroupNorm(6, 6)(torch.randn(5, 6))   # PyTorch: amplified rounding


@pytest.mark.parametrize("cls", [InstanceNorm, GroupNorm, LayerNorm])
def test_an_empty_batch_stays_empty_where_items_are_alone(cls):
    assert make(cls)(torch.empty(0, 6, 4, 4)).shape == (0, 6, 4, 4)
    if cls is GroupNorm: assert make(cls)(torch.empty(0, 6)).shape == (0, 6)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"\(6\) must be divisible by num_groups \(4\)"): GroupNorm(4, 6)
    with pytest.raises(ValueError, match="normalized_shape"): LayerNorm(())(torch.randn(3, 4))


# --- buffers that were taken away, switched off, or are missing ------------------------------------------------------------

def test_averages_set_to_none():
    x, outs = torch.randn(4, 3, 5), []
    for layer in (BatchNorm(3), nn.BatchNorm1d(3)):
        layer.running_mean = layer.running_var = None
        outs.append((layer(x), layer.eval()(x)))
    close(*outs, rtol=1e-5, atol=1e-5)


def test_tracking_switched_off_later():
    x, layers = torch.randn(4, 3), (BatchNorm(3), nn.BatchNorm1d(3))
    for layer in layers: layer(x); layer.track_running_stats = False; layer(5*x)
    close(*(dict(layer.state_dict()) for layer in layers))
    close(*(layer.eval()(x) for layer in layers), rtol=1e-5, atol=1e-5)


def test_a_state_from_before_there_was_a_count_loads_and_a_damaged_one_does_not():
    old = nn.Sequential(nn.BatchNorm1d(3)); old(torch.randn(8, 3))
    for net in (nn.Sequential(BatchNorm(3)), nn.Sequential(nn.BatchNorm1d(3))):
        net.load_state_dict({k: v for k, v in old.state_dict().items() if not k.endswith("tracked")})
        assert torch.equal(net[0].running_mean, old[0].running_mean) and net[0].num_batches_tracked == 0
        with pytest.raises(RuntimeError, match="running_mean"):
            net.load_state_dict({k: v for k, v in old.state_dict().items() if not k.endswith("mean")})


@pytest.mark.parametrize("cls", FOUR)
def test_evaluation_before_any_training(cls):
    ours, theirs, x = make(cls).eval(), twin(cls).eval(), 3*torch.randn(4, 6, 4, 4) + 2
    close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def test_sizes_may_be_numpys():
    two, six, x = np.int64(2), np.int64(6), torch.randn(4, 6)
    for layer in (LayerNorm(six), LayerNorm([six]), LayerNorm(n for n in (six,)), BatchNorm(six), GroupNorm(two, six)): assert layer(x).shape == (4, 6)
    assert LayerNorm((6,))(x).shape == LayerNorm(torch.Size([6]))(x).shape == (4, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_in_single_precision(dtype):
    x = (300 + torch.randn(64, 6, 32, 32)).to(dtype)                     # 65,536 numbers a channel: their sum is 2·10⁷
    for layer in (BatchNorm(6), GroupNorm(2, 6), InstanceNorm(6), LayerNorm((6, 32, 32))):
        close(layer(x).double(), copy.deepcopy(layer).double()(x.double()), rtol=2*torch.finfo(dtype).eps, atol=2*torch.finfo(dtype).eps)


# --- laws ------------------------------------------------------------------------------------------------------------------

numbers = st.floats(-50, 50).filter(lambda v: v == 0 or abs(v) > 1e-3)


@settings(max_examples=25, deadline=None)
@given(shift=numbers, scale=st.floats(.1, 100), seed=st.integers(0, 10**6), negative=st.booleans())
def test_shift_and_scale_of_the_input_do_not_matter(shift, scale, seed, negative):
    x = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for layer in (BatchNorm(6, eps=0.), InstanceNorm(6, eps=0.), GroupNorm(2, 6, eps=0.), LayerNorm((6, 3, 3), eps=0.)):
        layer = layer.double()
        sign = -1 if negative else 1
        close(layer(sign*scale*x + shift), sign*layer(x), rtol=1e-7, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(bs=st.integers(2, 9), seed=st.integers(0, 10**6))
def test_items_are_alone_or_not(bs, seed):
    g = torch.Generator().manual_seed(seed)
    x, order = torch.randn(bs, 6, 3, 3, generator=g), torch.randperm(bs, generator=g)
    for layer in (InstanceNorm(6), GroupNorm(3, 6), LayerNorm((6, 3, 3))):
        close(layer(x), torch.cat([layer(item[None]) for item in x]))
    close(BatchNorm(6)(x[order]), BatchNorm(6)(x)[order])


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), mean=st.floats(-1e4, 1e4), seed=st.integers(0, 10**6))
def test_centre(shape, mean, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    dims = list(range(0, len(shape), 2))
    d, m, var = centre(x, dims)
    wide = x.double()
    close(m.double(), wide.mean(dims, keepdim=True), rtol=2e-7, atol=2e-7)
    close(d.double(), wide - wide.mean(dims, keepdim=True), rtol=1e-5, atol=1e-5)
    close(var.double(), wide.var(dims, correction=0, keepdim=True), rtol=1e-5, atol=1e-9)


def test_group_norm_has_layer_and_instance_norm_as_ends():
    x = torch.randn(4, 6, 3, 3)
    close(GroupNorm(1, 6)(x), LayerNorm((6, 3, 3))(x))
    close(GroupNorm(6, 6)(x), InstanceNorm(6)(x))
    close(BatchNorm(6)(x[:1]), InstanceNorm(6)(x[:1]))


def test_gradient_has_no_part_along_a_shift_or_a_stretch():
    layer, x = BatchNorm(6, eps=0.).double(), torch.randn(8, 6, 3, 3).double().requires_grad_()
    (layer(x)*torch.randn_like(x)).sum().backward()
    assert x.grad.sum((0, 2, 3)).abs().max() < 1e-12 and (x.grad*x).sum((0, 2, 3)).abs().max() < 1e-12


# --- in a network ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cls", [BatchNorm, lambda c: GroupNorm(2, c), InstanceNorm], ids=["batch", "group", "instance"])
def test_a_network_with_it_learns(cls):
    net = nn.Sequential(nn.Conv2d(1, 6, 3), cls(6), nn.ReLU(), nn.Flatten(), nn.Linear(6*36, 2))
    opt = torch.optim.SGD(net.parameters(), lr=.1)
    x = torch.randn(64, 1, 8, 8); y = (x[:, 0, :, :4].mean((1, 2)) > x[:, 0, :, 4:].mean((1, 2))).long()
    for _ in range(30):
        loss = F.cross_entropy(net(x), y); loss.backward(); opt.step(); opt.zero_grad()
    assert (net.eval()(x).argmax(1) == y).float().mean() > .85

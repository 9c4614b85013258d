"Convolution against PyTorch's: every knob, values and gradients; and the small CNN."
import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from exp.conv import Conv2d, conv, conv2d, init_cnn, simple_cnn, unfold, windows
from exp.hooks import GeneralReLU


# --- convolution -----------------------------------------------------------------------------------------------------------

ints = st.integers
pairs = lambda least, most: st.one_of(ints(least, most), st.tuples(ints(least, most), ints(least, most)))


@given(bs=ints(0, 3), h=ints(5, 9), w=ints(5, 9), kh=ints(1, 4), kw=ints(1, 4), stride=pairs(1, 3), padding=pairs(0, 2), dilation=ints(1, 2),
       groups=st.sampled_from([1, 2, 3]), bias=st.booleans(), seed=ints(0, 99))
def test_conv2d_equals_pytorch(bs, h, w, kh, kw, stride, padding, dilation, groups, bias, seed):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
    x, weight, b = make(bs, 6, h, w), make(6, 6//groups, kh, kw), make(6) if bias else None
    knobs = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    try: theirs = F.conv2d(x, weight, b, **knobs)
    except RuntimeError:
        with pytest.raises(ValueError, match="no .* window"): conv2d(x, weight, b, **knobs)
        return
    ours = conv2d(x, weight, b, **knobs)
    torch.testing.assert_close(ours, theirs)
    inputs = [t for t in (x, weight, b) if t is not None]
    for a, e in zip(torch.autograd.grad(ours.sin().sum(), inputs), torch.autograd.grad(theirs.sin().sum(), inputs)): torch.testing.assert_close(a, e)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5)])
def test_padding_by_name(padding, kernel):
    x, w = torch.randn(2, 3, 7, 10), torch.randn(4, 3, *kernel)
    torch.testing.assert_close(conv2d(x, w, padding=padding, dilation=2), F.conv2d(x, w, padding=padding, dilation=2), atol=1e-5, rtol=1e-5)


def test_one_image_large_values_and_other_types():
    x, w = torch.randn(3, 7, 7), torch.randn(4, 3, 3, 3)
    torch.testing.assert_close(conv2d(x, w), F.conv2d(x, w), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(conv2d(100*x, -100*w), F.conv2d(100*x, -100*w), atol=.1, rtol=1e-5)
    torch.testing.assert_close(conv2d(x.bfloat16(), w.bfloat16()), F.conv2d(x.bfloat16(), w.bfloat16()), atol=.1, rtol=.02)
    torch.testing.assert_close(conv2d(x.half(), w.half()), F.conv2d(x, w).half(), atol=.05, rtol=.01)
    whole = torch.randint(-9, 9, (2, 3, 7, 7)), torch.randint(-9, 9, (4, 3, 3, 3))
    torch.testing.assert_close(conv2d(*whole), F.conv2d(*whole))


def test_views_and_strange_memory_give_the_same():
    x, w = torch.randn(2, 9, 3, 9).transpose(1, 2)[:, :, ::2], torch.randn(4, 3, 2, 3)
    assert not x.is_contiguous()
    torch.testing.assert_close(conv2d(x, w), F.conv2d(x, w), atol=1e-5, rtol=1e-5)
    last = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    torch.testing.assert_close(conv2d(last, w, padding=1), F.conv2d(last, w, padding=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unfold(x[1:], 3), F.unfold(x[1:], 3))          # a storage offset


def test_conv2d_passes_gradcheck():
    make = lambda *shape: torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, b: conv2d(x, w, b, 2, 1, 1, 2), (make(1, 2, 4, 4), make(2, 1, 2, 2), make(2)))


def test_conv2d_is_linear_and_moves_with_the_image():
    x, y, w = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3)
    torch.testing.assert_close(conv2d(x + 2*y, w), conv2d(x, w) + 2*conv2d(y, w), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(conv2d(x.roll(1, -1), w)[..., 1:], conv2d(x, w)[..., :-1])


@pytest.mark.parametrize("error, match, args, kwargs", [
    (ValueError, "expected 4, got 2", ((2, 3), (4, 3, 3, 3)), {}),
    (ValueError, "expected 2, got 1", ((2, 3, 5, 5), (4, 3, 3)), {}),
    (ValueError, r"x is \(2, 3, 5, 5\), weight \(4, 2, 3, 3\)", ((2, 3, 5, 5), (4, 2, 3, 3)), {}),
    (ValueError, "groups 2", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(groups=2)),
    (ValueError, "groups 0", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(groups=0)),
    (ValueError, "padded, is 5×5: no 7×7 window of dilation 1, stride 1", ((2, 3, 5, 5), (4, 3, 7, 7)), {}),
    (ValueError, "step or padding 0: give 1", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(stride=0)),
    (ValueError, "step or padding 0: give 1", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(dilation=0)),
    (ValueError, r"step or padding \(1, -1\): give 0", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(padding=(1, -1))),
    (TypeError, "str", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(padding="full")),
    (ValueError, r"needs stride 1, not \(1, 2\)", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(padding="same", stride=(1, 2))),
    (TypeError, "float", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(stride=1.5)),
    (ValueError, "too many values", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(stride=(1, 2, 3)))])
def test_conv2d_says_what_does_not_fit(error, match, args, kwargs):
    with pytest.raises(error, match=match): conv2d(*map(torch.zeros, args), **kwargs)


def test_numpy_integers_and_lists_are_sizes_too():
    x, w, two = torch.randn(1, 2, 7, 7), torch.randn(3, 2, 3, 3), np.int64(2)
    torch.testing.assert_close(conv2d(x, w, None, two, [1, two]), F.conv2d(x, w, None, 2, (1, 2)), atol=1e-5, rtol=1e-5)


def test_conv2d_refuses_a_wrong_bias_and_mixed_types():
    x, w = torch.zeros(1, 3, 5, 5), torch.zeros(4, 3, 3, 3)
    for bias in (torch.zeros(3), torch.zeros(1), torch.zeros(4, 1)[:, 0:0]):       # none is broadcast in silence
        with pytest.raises(RuntimeError): conv2d(x, w, bias)
    with pytest.raises(RuntimeError, match="Double|same dtype"): conv2d(x.double(), w)
    with pytest.raises(ValueError, match="expected 4, got 3"): windows(x[0], 3)


@pytest.mark.parametrize("bias", [True, False])
def test_half_precision_by_autocast_comes_out_as_pytorchs(bias):
    x, settings = torch.randn(2, 4, 8, 8), dict(kernel_size=3, groups=2, bias=bias)
    ours, theirs = Conv2d(4, 6, **settings), nn.Conv2d(4, 6, **settings)
    ours.load_state_dict(theirs.state_dict())
    with torch.autocast("cpu", torch.bfloat16): got, want = ours(x), theirs(x)
    torch.testing.assert_close(got, want, atol=.05, rtol=.02)            # the dtype, too
    got.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@given(h=ints(3, 8), size=pairs(1, 3), stride=pairs(1, 3), padding=pairs(0, 2))
def test_unfold_equals_pytorch(h, size, stride, padding):
    x = torch.randn(2, 2, h, h + 1)
    torch.testing.assert_close(unfold(x, size, 1, padding, stride), F.unfold(x, size, 1, padding, stride), rtol=0, atol=0)


def test_windows_is_a_view():
    x = torch.randn(1, 2, 5, 6)
    assert windows(x, 2).data_ptr() == x.data_ptr() and windows(x, (2, 3), 2).shape == (1, 2, 2, 2, 2, 3)


@given(kernel=ints(1, 5), stride=ints(1, 3), dilation=ints(1, 3), size=ints(12, 17), groups=st.sampled_from([1, 2, 4]), bias=st.booleans(),
       padding=st.one_of(ints(0, 3), st.sampled_from(["same", "valid"])))
def test_Conv2d_with_any_knob_is_nn_Conv2d(kernel, stride, dilation, size, groups, bias, padding):
    "Even kernels, odd sizes, no bias: the layer, its values and the gradients of all parameters."
    if padding == "same": stride = 1
    settings = dict(kernel_size=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias)
    ours, theirs = Conv2d(4, 8, **settings).double(), nn.Conv2d(4, 8, **settings).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, size, size + 1, dtype=torch.float64)
    try: want = theirs(x)
    except RuntimeError:
        with pytest.raises(ValueError, match="no .* window"): ours(x)
        return
    torch.testing.assert_close(ours(x), want)
    ours(x).sin().sum().backward(); want.sin().sum().backward()
    torch.testing.assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def test_conv2d_twice_differentiable_and_through_views():
    make = lambda *shape: torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: conv2d(x, w, None, 2, 1), (make(1, 2, 4, 4), make(2, 2, 2, 2)))
    x, w = make(1, 2, 6, 6), make(3, 2, 3, 3)
    for view in (lambda x: x.expand(4, -1, -1, -1), lambda x: x.transpose(2, 3)[..., ::2], lambda x: x.flip(3)):      # pixels read more than once, or turned
        ours, theirs = (torch.autograd.grad(f(view(x), w).sin().sum(), (x, w)) for f in (conv2d, F.conv2d))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("settings", [dict(), dict(bias=False), dict(groups=2, stride=2), dict(kernel_size=(1, 3), padding="same"), dict(dilation=2, padding=1)])
def test_Conv2d_is_nn_Conv2d_seed_for_seed(settings):
    settings = dict(kernel_size=3) | settings
    torch.manual_seed(0); ours = Conv2d(4, 6, **settings)
    torch.manual_seed(0); theirs = nn.Conv2d(4, 6, **settings)
    x = torch.randn(2, 4, 8, 8)
    assert dict(ours.state_dict()).keys() == dict(theirs.state_dict()).keys()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()): assert torch.equal(a, b)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match="groups 3"): Conv2d(4, 6, 3, groups=3)(x)


# --- the small CNN ---------------------------------------------------------------------------------------------------------

def test_conv_drops_its_bias_before_a_norm_only():
    kinds = lambda block: [type(m).__name__ for m in block]
    assert kinds(conv(3, 8)) == ["Conv2d", "ReLU"] and conv(3, 8)[0].bias is not None
    assert kinds(conv(3, 8, norm=nn.BatchNorm2d)) == ["Conv2d", "BatchNorm2d", "ReLU"] and conv(3, 8, norm=nn.BatchNorm2d)[0].bias is None
    assert conv(3, 8, norm=nn.BatchNorm2d, bias=True)[0].bias is not None and conv(3, 8, bias=False)[0].bias is None
    assert kinds(conv(3, 8, act=None)) == ["Conv2d"]
    assert kinds(conv(3, 8, act=partial(GeneralReLU, .1)))[-1] == "GeneralReLU"
    assert conv(3, 8, 5, 1)(torch.zeros(2, 3, 9, 9)).shape == (2, 8, 9, 9)


@pytest.mark.parametrize("kwargs, shape", [({}, (2, 1, 28, 28)), (dict(ni=3, n_out=5, widths=(4, 8)), (2, 3, 6, 6)), (dict(norm=nn.BatchNorm2d), (2, 1, 28, 28))])
def test_simple_cnn_gives_scores(kwargs, shape):
    model = simple_cnn(**kwargs)
    assert model(torch.randn(shape)).shape == (2, kwargs.get("n_out", 10))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == (4 if "norm" in kwargs else 0)
    assert model[-1][-1].bias is not None, "the scores keep their bias"


@given(h=ints(1, 70), w=ints(1, 70), n_out=ints(1, 12), depth=ints(1, 5))
def test_simple_cnn_gives_n_out_scores_for_any_size(h, w, n_out, depth):
    model, x = simple_cnn((4,)*depth, n_out), torch.randn(2, 1, h, w)
    body = model[:-1](x)
    assert model(x).shape == (2, n_out) and body.shape[1] == 4
    torch.testing.assert_close(model(x), model[-1][-1](body.mean((2, 3))), atol=1e-5, rtol=1e-5)


def test_init_cnn_leaves_other_layers_and_settings_alone():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Embedding(4, 3), nn.Conv2d(1, 2, 3, bias=False).requires_grad_(False))
    before = [p.clone() for p in model.parameters()]
    init_cnn(model)
    assert [torch.equal(a, b) for a, b in zip(before, model.parameters())] == [True, True, True, False] and not model[2].weight.requires_grad


def test_init_cnn_fills_all_and_honours_the_leak():
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Linear(300, 200), nn.BatchNorm1d(3), Conv2d(16, 64, 3))
    assert init_cnn(model, leak=.5) is model
    for layer, fan in ((model[0], 144), (model[1], 300), (model[3], 144)):
        assert abs(layer.weight.std()*math.sqrt(fan*(1 + .5**2)/2) - 1) < .05 and (layer.bias == 0).all()
    init_cnn(model, init=lambda w, a: nn.init.constant_(w, 7.))
    assert (model[1].weight == 7).all() and (model[2].weight == 1).all()


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_computed_weight_cannot_be_started(wrap):
    layer = wrap(nn.Linear(4, 4)); before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="computes its weight: call init_cnn before"): init_cnn(nn.Sequential(layer))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())

"Convolution against PyTorch's, hooks that leave nothing behind, statistics against plain sums, summary against PyTorch's own counter."
import copy
import gc
import io
import math
import pickle
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from exp.hooks import (ActivationStats, BatchTransform, Conv2d, GeneralReLU, Hook, HookError, Hooks, conv, conv2d, find_layers, init_cnn, pad,
                       simple_cnn, summary, unfold, windows)
from exp.learner import Callback, CancelBatch, CancelFit, DataLoaders, DeviceCB, Learner, LearnerError
from exp.training import Linear, Sequential, cross_entropy


def hooks_on(model): return sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def batches(n=3, bs=8): return [(torch.randn(bs, 1, 28, 28, generator=torch.Generator().manual_seed(i)), torch.arange(bs) % 10) for i in range(n)]


def train(model, cbs, n=3, epochs=1, valid=None, **kwargs):
    learn = Learner(model, DataLoaders(batches(n), valid), cross_entropy, lr=.1, cbs=cbs, **kwargs)
    learn.fit(epochs)
    return learn


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
        with pytest.raises(ValueError, match="smaller kernel"): conv2d(x, weight, b, **knobs)
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
    (ValueError, "give .bs, ni, h, w", ((2, 3), (4, 3, 3, 3)), {}),
    (ValueError, "give .bs, ni, h, w", ((2, 3, 5, 5), (4, 3, 3)), {}),
    (ValueError, "x has 3 channels", ((2, 3, 5, 5), (4, 2, 3, 3)), {}),
    (ValueError, "groups 2", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(groups=2)),
    (ValueError, "groups 0", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(groups=0)),
    (ValueError, "smaller kernel", ((2, 3, 5, 5), (4, 3, 7, 7)), {}),
    (ValueError, "stride is 0", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(stride=0)),
    (ValueError, "dilation is 0", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(dilation=0)),
    (ValueError, "padding is -1", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(padding=-1)),
    (ValueError, "padding is 'full'", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(padding="full")),
    (ValueError, "needs stride 1", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(padding="same", stride=2)),
    (TypeError, "stride is 1.5", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(stride=1.5)),
    (TypeError, r"stride is \(1, 2, 3\)", ((2, 3, 5, 5), (4, 3, 3, 3)), dict(stride=(1, 2, 3)))])
def test_conv2d_says_what_does_not_fit(error, match, args, kwargs):
    with pytest.raises(error, match=match): conv2d(*map(torch.zeros, args), **kwargs)


def test_conv2d_refuses_a_wrong_bias_and_mixed_types():
    x, w = torch.zeros(1, 3, 5, 5), torch.zeros(4, 3, 3, 3)
    with pytest.raises(ValueError, match="one number per filter"): conv2d(x, w, torch.zeros(3))
    with pytest.raises(TypeError, match="convert one"): conv2d(x.double(), w)
    with pytest.raises(ValueError, match="give images"): windows(x[0], 3)


@given(h=ints(3, 8), size=pairs(1, 3), stride=pairs(1, 3), padding=pairs(0, 2))
def test_unfold_equals_pytorch(h, size, stride, padding):
    x = torch.randn(2, 2, h, h + 1)
    torch.testing.assert_close(unfold(x, size, 1, padding, stride), F.unfold(x, size, 1, padding, stride), rtol=0, atol=0)


def test_windows_is_a_view_and_pad_a_frame():
    x = torch.randn(1, 2, 5, 6)
    assert windows(x, 2).data_ptr() == x.data_ptr() and pad(x, 0, 0, 0, 0) is x
    torch.testing.assert_close(pad(x, 1, 2, 3, 4), F.pad(x, (3, 4, 1, 2)))


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
    with pytest.raises(ValueError, match="groups is 3"): Conv2d(4, 6, 3, groups=3)


# --- the small CNN ---------------------------------------------------------------------------------------------------------

def test_conv_drops_its_bias_before_a_norm_only():
    kinds = lambda block: [type(m).__name__ for m in block]
    assert kinds(conv(3, 8)) == ["Conv2d", "ReLU"] and conv(3, 8)[0].bias is not None
    assert kinds(conv(3, 8, norm=nn.BatchNorm2d)) == ["Conv2d", "BatchNorm2d", "ReLU"] and conv(3, 8, norm=nn.BatchNorm2d)[0].bias is None
    assert conv(3, 8, norm=nn.BatchNorm2d, bias=True)[0].bias is not None and conv(3, 8, bias=False)[0].bias is None
    assert kinds(conv(3, 8, act=False)) == kinds(conv(3, 8, act=None)) == ["Conv2d"]
    assert kinds(conv(3, 8, act=partial(GeneralReLU, .1)))[-1] == "GeneralReLU"
    assert conv(3, 8, 5, 1)(torch.zeros(2, 3, 9, 9)).shape == (2, 8, 9, 9)


@pytest.mark.parametrize("kwargs, shape", [({}, (2, 1, 28, 28)), (dict(ni=3, n_out=5, widths=(4, 8)), (2, 3, 6, 6)), (dict(norm=nn.BatchNorm2d), (2, 1, 28, 28))])
def test_simple_cnn_gives_scores(kwargs, shape):
    model = simple_cnn(**kwargs)
    assert model(torch.randn(shape)).shape == (2, kwargs.get("n_out", 10))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == (4 if "norm" in kwargs else 0)
    assert model[-2][0].bias is not None, "the scores keep their bias"


def test_init_cnn_fills_all_and_honours_the_leak():
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Linear(300, 200), nn.BatchNorm1d(3), Conv2d(16, 64, 3))
    assert init_cnn(model, leak=.5) is model
    for layer, fan in ((model[0], 144), (model[1], 300), (model[3], 144)):
        assert abs(layer.weight.std()*math.sqrt(fan*(1 + .5**2)/2) - 1) < .05 and (layer.bias == 0).all()
    init_cnn(model, init=lambda w, a: nn.init.constant_(w, 7.))
    assert (model[1].weight == 7).all() and (model[2].weight == 1).all()


def test_BatchTransform_on_the_device_for_train_or_both():
    seen = []
    class Look(Callback):
        def after_pred(self, learn): seen.append((learn.training, learn.xb.mean().item(), learn.yb[0].item()))
    ones, double = [(torch.ones(2, 4), torch.zeros(2, dtype=torch.long))], lambda x: 2*x
    fit = lambda cb: Learner(nn.Linear(4, 3), DataLoaders(ones, ones), cross_entropy, cbs=[Look(), cb]).fit(1)
    fit(BatchTransform(double)); fit(BatchTransform(double, train_only=True)); fit(BatchTransform(lambda x, y: (3*x, y + 1), both=True))
    assert seen == [(True, 2, 0), (False, 2, 0), (True, 2, 0), (False, 1, 0), (True, 3, 1), (False, 3, 1)]
    assert DeviceCB.order < BatchTransform.order < 0
    with pytest.raises(LearnerError, match="func returned None"): fit(BatchTransform(lambda x: None))


@given(leak=st.floats(0, .9), sub=st.floats(-1, 1), maxv=st.one_of(st.none(), st.floats(.1, 100)), seed=ints(0, 50))
def test_GeneralReLU_is_its_equation(leak, sub, maxv, seed):
    z = 100*torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    want = torch.maximum(z, leak*z) - sub
    want = want if maxv is None else want.clamp(max=maxv)
    before = z.clone()
    torch.testing.assert_close(GeneralReLU(leak, sub, maxv)(z), want)
    assert torch.equal(z, before)


def test_GeneralReLU_dtypes_and_errors():
    assert GeneralReLU(.1, .4, 6.)(torch.randn(3).half()).dtype == torch.float16 and "leak=0.1" in repr(GeneralReLU(.1))
    for leak in (-.1, 1., 2.):
        with pytest.raises(ValueError, match="slope in"): GeneralReLU(leak)


# --- Hook and Hooks --------------------------------------------------------------------------------------------------------

def note(hook, module, inp, out): hook.shapes = tuple(inp[0].shape), tuple(out.shape)


def test_hook_sees_input_and_output_and_ends_with_its_block():
    layer = nn.Linear(3, 2)
    with Hook(layer, note) as hook:
        layer(torch.zeros(4, 3))
        assert hook.shapes == ((4, 3), (4, 2)) and hook.module is layer and not hook.removed
    hook.shapes = None
    layer(torch.zeros(4, 3))
    assert hook.shapes is None and hook.removed and not hooks_on(layer)
    hook.remove()                                                                  # again: nothing happens


def test_hook_ends_after_an_error_in_its_block():
    layer = nn.Linear(3, 2)
    with pytest.raises(ZeroDivisionError), Hook(layer, note): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), Hooks(nn.Sequential(layer), note): raise ZeroDivisionError
    assert not hooks_on(layer)


def test_hook_goes_when_nobody_holds_it():
    layer = nn.Linear(3, 2)
    hook = Hook(layer, note)
    assert hooks_on(layer) == 1
    del hook
    assert not hooks_on(layer)
    hooks = Hooks([layer], note)
    del hooks
    assert not hooks_on(layer)


def test_neither_keeps_the_other_alive_without_the_garbage_collector():
    gc.disable()
    try:
        layer = nn.Linear(3, 2)
        hook, gone = Hook(layer, note), weakref.ref(layer)
        layer(torch.zeros(1, 3))
        del layer
        assert gone() is None and hook.module is None
        hook.remove()
    finally: gc.enable()


@pytest.mark.parametrize("backward", [False, True])
def test_hooks_keep_no_activation(backward):
    gc.disable()
    try:
        model, refs = simple_cnn((4,), 3), []
        x = torch.randn(2, 1, 28, 28)
        def look(hook, module, *tensors): refs.append(weakref.ref(tensors[-1]))
        with Hooks(model, look, backward=backward):
            model(x).sum().backward()
            assert len(refs) == 3 and all(r() is None for r in refs[:-1])
    finally: gc.enable()


def test_what_the_function_returns_is_ignored():
    layer = nn.Linear(3, 2)
    x = torch.randn(1, 3)
    want = layer(x)
    with Hook(layer, lambda *args: torch.zeros(9)): assert torch.equal(layer(x), want)
    with Hook(layer, lambda *args: torch.zeros(1, 2), backward=True): layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.ones(2))


def test_backward_hook_gets_the_gradient_of_the_output():
    model, x, grads = simple_cnn((4, 8), 5), torch.randn(3, 1, 28, 28), {}
    outs, h = [], x
    for layer in model:
        h = layer(h); h.retain_grad(); outs.append(h)
    h.square().sum().backward()
    with Hooks(model, lambda hook, module, grad: grads.__setitem__(hook.name, grad), backward=True):
        model(x).square().sum().backward()
        with torch.no_grad(): model(x)                                             # no gradient, nobody is told
    for i, out in enumerate(outs): torch.testing.assert_close(grads[str(i)], out.grad)


def test_backward_hooks_bear_in_place_activations_and_removal_in_between():
    model, heard = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), []
    x = torch.randn(4, 3)
    with Hooks(model, lambda hook, module, grad: heard.append(hook.name), backward=True): model(x).sum().backward()
    assert heard == ["1", "0"]
    hook = Hook(model[0], lambda *args: heard.append("late"), backward=True)
    out = model(x)
    hook.remove()
    out.sum().backward()
    assert heard == ["1", "0"]


@pytest.mark.parametrize("backward", [False, True])
def test_an_error_in_a_hook_names_the_layer(backward):
    model = simple_cnn((4,), 3)
    def bad(hook, *args):
        if hook.name == "1": raise KeyError("oops")
    with pytest.raises(HookError, match=r"layer '1' \(Sequential\) raised KeyError: 'oops'") as caught, Hooks(model, bad, backward=backward):
        model(torch.randn(2, 1, 28, 28)).sum().backward()
    assert isinstance(caught.value.__cause__, KeyError) and not hooks_on(model)


def test_cancels_pass_through_a_hook():
    def stop(hook, module, inp, out): raise CancelFit
    model = simple_cnn((4,), 10)
    with Hook(model[0], stop): learn = train(model, [])
    assert learn.epochs_done == 0


def test_copies_of_a_hooked_model_are_deaf_and_can_be_saved():
    layer = nn.Linear(3, 2)
    with Hook(layer, note) as hook:
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)): twin(torch.zeros(1, 3))
        torch.save(layer, io.BytesIO())
        assert not hasattr(hook, "shapes")


def test_hooks_take_a_model_a_list_or_a_dict():
    model = simple_cnn((4,), 3)
    names = lambda layers: [hook.name for hook in Hooks(layers, note)]
    assert names(model) == ["0", "1", "2"] and names([model[0], model[1]]) == ["0", "1"] and names({"a": model[0]}) == ["a"]
    assert names(nn.Linear(2, 2)) == ["Linear"]
    with Hooks(model, note) as hooks:
        model(torch.zeros(2, 1, 28, 28))
        assert len(hooks) == 3 and hooks["2"] is hooks[2] is list(hooks)[-1] and hooks["2"].shapes[1][0] == 2
    assert all(hook.removed for hook in hooks)


def test_hooks_are_hung_all_or_none():
    good = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="layer '1' is a builtins.int"): Hooks([good, 3], note)
    assert not hooks_on(good)
    with pytest.raises(ValueError, match="layers is empty"): Hooks([], note)


@pytest.mark.parametrize("call", [lambda m: Hook(m, note), lambda m: Hooks(m, note), lambda m: summary(m, torch.zeros(1, 3)), find_layers])
def test_our_own_modules_are_refused_clearly(call):
    for module in (Linear(3, 2), Sequential(Linear(3, 2)), nn.Linear, 7):
        with pytest.raises(TypeError, match="nn.Module"): call(module)


def test_find_layers():
    model = simple_cnn((4, 8), 3, norm=nn.BatchNorm2d)
    assert list(find_layers(model, nn.Conv2d)) == ["0.0", "1.0", "2.0"]
    assert list(find_layers(model)) == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2", "2.0", "3"]
    assert list(find_layers(model, (nn.ReLU, nn.Flatten))) == ["0.2", "1.2", "3"]
    assert list(find_layers(nn.Linear(2, 2))) == ["Linear"] and find_layers(model, nn.LSTM) == {}


# --- ActivationStats -------------------------------------------------------------------------------------------------------

def test_stats_are_the_plain_sums():
    torch.manual_seed(0)
    model, twin = simple_cnn((4, 8)), None
    twin, stats = copy.deepcopy(model), ActivationStats(sample=10**9)
    with torch.no_grad(): model[1][0].bias[2] = twin[1][0].bias[2] = -1e3
    train(model, [stats], n=1)
    h = batches(1)[0][0]
    for i, layer in enumerate(twin[:3]):
        h = layer(h).detach()
        torch.testing.assert_close(stats.means[i, 0], h.mean()); torch.testing.assert_close(stats.stds[i, 0], h.std(correction=0))
        torch.testing.assert_close(stats.hists[i, 0], h.clamp(-6, 6).histc(60, -6, 6)/h.numel())
    assert stats.names == ["0", "1", "2"] and stats.dead[:2, 0].tolist() == [0, 1/8]
    torch.testing.assert_close(stats.hists.sum(-1), torch.ones(3, 1))


def test_a_dead_unit_may_be_uneven_in_space_but_not_from_item_to_item():
    x = torch.randn(1, 2, 4, 4).expand(5, 2, 4, 4).clone()
    assert ActivationStats()._dead(x).tolist() == [True, True]
    x[3, 1, 2, 2] += 1
    assert ActivationStats()._dead(x).tolist() == [True, False]


def test_stats_count_training_steps_only_and_every_so_many():
    model, stats = simple_cnn((4,)), ActivationStats(every=2)
    train(model, [stats], n=5, epochs=2, valid=batches(2))
    assert stats.steps == [0, 2, 4, 6, 8] and stats.means.shape == (2, 5) and stats.hists.shape == (2, 5, 60)
    train(model, [stats], n=1)
    assert stats.steps == [0], "a new training starts anew"


def test_stats_do_not_change_the_training():
    torch.manual_seed(0)
    model = simple_cnn((4, 8), norm=nn.BatchNorm2d)
    twin, rng = copy.deepcopy(model), torch.get_rng_state()
    train(model, []); train(twin, [ActivationStats()])
    for a, b in zip(model.state_dict().values(), twin.state_dict().values()): assert torch.equal(a, b)
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("failing", ["after_loss", "before_batch", "after_backward", "after_epoch"])
def test_stats_are_gone_after_any_end(failing):
    for error in (ValueError("on purpose"), KeyboardInterrupt(), CancelFit()):
        class Fail(Callback): pass
        def fail(self, learn, error=error): raise error
        setattr(Fail, failing, fail)
        model, stats = simple_cnn((4,)), ActivationStats()
        try: train(model, [stats, Fail()])
        except (LearnerError, KeyboardInterrupt): pass
        assert not hooks_on(model) and stats._hooks is None
    assert failing == "before_batch" or len(stats.steps) >= 1


def test_cancelled_batches_leave_no_row():
    class Skip(Callback):
        order = -200
        def before_batch(self, learn):
            if learn.batch == 1: raise CancelBatch
    stats = ActivationStats()
    train(simple_cnn((4,)), [Skip(), stats])
    assert len(stats.steps) == 2 == stats.means.shape[1]


@pytest.mark.parametrize("n", [1, 70, 130])
def test_rows_that_settle_early_are_all_there(n):
    model, stats, seen = simple_cnn((4,)), ActivationStats(), []
    class ByHand(Callback):
        order = 200
        def after_batch(self, learn): seen.append(learn.pred.detach().float())
    train(model, [stats, ByHand()], n=n)
    assert stats.steps == list(range(n)) and stats.hists.shape == (2, n, 60)
    torch.testing.assert_close(stats.means[-1], torch.stack([p.mean() for p in seen]))
    torch.testing.assert_close(stats.stds[-1], torch.stack([p.std(correction=0) for p in seen]))


@pytest.mark.parametrize("n", [1000, 1 << 20, (1 << 20) + 1, 1 << 24])
def test_std_is_exact_at_any_size_and_distance(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).mul_(.1).add_(3)[None]
    stats = ActivationStats(find_layers)
    Learner(nn.Sequential(nn.Identity(), nn.Identity()), DataLoaders([(x, None)]), lambda p, y: (p*0).sum().requires_grad_(), opt_func=lambda ps, lr: torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr), cbs=[stats]).fit(1)
    true = x.double().std(correction=0).item()
    assert abs(stats.stds[0, 0].item()/true - 1) < 1e-6


def test_stats_keep_no_model_and_no_activation():
    model, stats = simple_cnn((4,)), ActivationStats()
    train(model, [stats])
    gone = weakref.ref(model), weakref.ref(model[0])
    del model
    gc.collect()
    assert all(r() is None for r in gone) and stats.means.shape == (2, 3)
    assert not [v for v in vars(stats).values() if isinstance(v, torch.Tensor) and v.requires_grad]


def test_memory_grows_by_the_rows_only():
    model, stats, counts = simple_cnn((4,)), ActivationStats(), []
    class Count(Callback):
        order = 200
        def after_epoch(self, learn):
            if learn.epoch not in (1, 9): return
            gc.collect()
            counts.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
    train(model, [stats, Count()], epochs=10)
    assert counts[1] <= counts[0], f"tensors alive after the second and the tenth epoch: {counts}"
    assert stats._kept.numel() == 30*2*63


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 10), nn.Linear(4, 4)
    def forward(self, x): return self.b(self.a(self.a(x)))


def test_shared_and_unused_layers():
    stats, data = ActivationStats(), [(torch.randn(6, 4), torch.arange(6))]
    Learner(Twice(), DataLoaders(data), cross_entropy, cbs=[stats]).fit(1)
    assert stats.names == ["a", "b", "unused"] and stats.means[2].isnan().all() and stats.means[:2].isfinite().all()


def test_stats_choose_layers_and_units():
    model = simple_cnn((4,))
    for layers, names in ((lambda m: find_layers(m, nn.Conv2d), ["0.0", "1.0"]), ({"first": model[0]}, ["first"]), ([model[1]], ["0"]), (model[0], ["0", "1"])):
        stats = ActivationStats(layers)
        train(model, [stats], n=1)
        assert stats.names == names
    x = torch.zeros(2, 5, 3); x[0, :, 1:] = 1
    for unit_dim, share in ((2, 1/3), (1, 0)): assert abs(ActivationStats(unit_dim=unit_dim)._dead(x).float().mean() - share) < 1e-6
    assert ActivationStats()._dead(torch.ones(1, 4)).isnan().all() and ActivationStats()._dead(torch.ones(5)).all()


@given(n=ints(1, 3000), sample=ints(1, 200))
def test_a_sample_is_even_and_of_the_right_size(n, sample):
    from exp.hooks import _thin
    picked = _thin(torch.arange(n), sample)
    assert ActivationStats()._hist(_thin(torch.linspace(-5, 5, n), sample)).sum() == len(picked)
    assert 1 <= len(picked) <= sample or sample == 1 and len(picked) <= 2
    if len(picked) > 2: assert len(picked.diff().unique()) == 1


def test_infinities_and_nans_in_activations_are_shown_not_raised():
    stats = ActivationStats(bins=4, limits=(-2., 2.))
    out = stats._hist(torch.tensor([[math.inf, -math.inf, 5., 0.5]]))
    assert out.tolist() == [1, 0, 1, 2]
    assert stats._dead(torch.tensor([[math.nan, 1.], [math.nan, 1.]])).tolist() == [False, True]


@pytest.mark.parametrize("kwargs", [dict(every=0), dict(bins=0), dict(sample=0), dict(unit_dim=0), dict(limits=(1., 1.)), dict(limits=(2., -2.))])
def test_stats_refuse_settings_without_sense(kwargs):
    with pytest.raises(ValueError, match="give"): ActivationStats(**kwargs)


def test_stats_say_what_is_wrong():
    with pytest.raises(ValueError, match="nothing was measured"): _ = ActivationStats().means
    class Dicts(nn.Linear):
        def forward(self, x): return {}
    with pytest.raises(LearnerError, match=r"layer '1' \(Dicts\) raised TypeError: found a dict"):
        Learner(nn.Sequential(nn.Linear(2, 2), Dicts(2, 2)), DataLoaders([(torch.zeros(1, 2), None)]), cross_entropy, cbs=[ActivationStats()]).fit(1)
    with pytest.raises(LearnerError, match="no place for hooks"): train(Sequential(Linear(28, 10)), [ActivationStats()])


def test_half_and_integer_outputs_are_measured():
    class Whole(nn.Linear):
        def forward(self, x): return super().forward(x).long(), 3
    for layer, x in ((nn.Linear(3, 2).bfloat16(), torch.randn(4, 3).bfloat16()), (Whole(3, 2), torch.randn(4, 3))):
        stats = ActivationStats()
        def loss(pred, yb, layer=layer): return layer.weight.float().sum()
        Learner(layer, DataLoaders([(x, None)]), loss, cbs=[stats]).fit(1)
        assert stats.means.isfinite().all() and stats.means.dtype == torch.float32


def test_pictures_have_labels():
    import matplotlib.pyplot as plt
    stats = ActivationStats()
    train(simple_cnn((4, 8, 8, 8)), [stats])
    axes = [*stats.plot_stats("a finding"), *stats.plot_hists("another")]
    assert len(axes) == 3 + 5 and all(ax.get_xlabel() == "step" for ax in axes)
    assert [ax.get_ylabel() for ax in axes[:3]] == ["mean", "std", "share of dead units"] and axes[3].get_ylabel() == "activation"
    assert [ax.get_title() for ax in axes[3:]] == [f"layer {n}" for n in stats.names] and axes[0].figure._suptitle.get_text() == "a finding"
    plt.close("all")


# --- summary ---------------------------------------------------------------------------------------------------------------

MODELS = {
    "cnn": (lambda: simple_cnn(norm=nn.BatchNorm2d), (4, 1, 28, 28)),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, dilation=2), nn.Conv2d(8, 2, (1, 3), bias=False)), (2, 4, 9, 9)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 5, 4, 2, 1)), (2, 3, 5, 6)),
    "ours": (lambda: nn.Sequential(Conv2d(3, 5, 3, 2)), (2, 3, 9, 9)),
    "linear on sequences": (lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)), (2, 5, 6)),
    "1d and 3d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Unflatten(1, (1, 4)), nn.Unflatten(2, (2, 2)), nn.Conv3d(1, 2, (1, 2, 3))), (2, 2, 9)),
}


@pytest.mark.parametrize("name", MODELS)
def test_flops_and_parameters_agree_with_pytorch(name):
    make, shape = MODELS[name]
    model, xb = make(), torch.randn(shape)
    about = summary(model, xb)
    with FlopCounterMode(display=False) as counter: model(xb[:2])
    assert about.flops*2 == counter.get_total_flops()
    assert about.params == sum(p.numel() for p in model.parameters()) == sum(row["params"] for row in about.rows)
    assert about.rows[-1]["shape"] == tuple(model(xb).shape)


def test_summary_by_hand_and_as_text():
    about = summary(nn.Sequential(nn.Conv2d(1, 8, 5, 2, 2), nn.ReLU()), torch.randn(3, 1, 28, 28))
    assert about.rows[0] == dict(layer="0", kind="Conv2d", shape=(3, 8, 14, 14), params=208, flops=2*25*8*196)
    text = str(about)
    assert "(3, 8, 14, 14)" in text and "0.078" in text and "**total**" in text and text == about._repr_markdown_() == about.table()


class Moody(nn.Module):
    "Draws random numbers, changes a buffer even in evaluation, and replaces another."
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(())); self.register_buffer("last", torch.zeros(2))
    def forward(self, x):
        self.count += 1; self.last = torch.rand(3)
        return x + torch.rand(1)


def test_summary_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(.5), Moody())
    model[1].eval(); model[3].train()
    x = torch.randn(8, 4)
    before, modes, rng, last = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state(), model[3].last
    summary(model, x)
    for a, b in zip(model.state_dict().values(), before.values()): assert torch.equal(a, b)
    assert modes == [m.training for m in model.modules()] and torch.equal(rng, torch.get_rng_state())
    assert not hooks_on(model) and model[3].last is last and all(p.grad is None for p in model.parameters())


def test_summary_of_a_model_that_fails_says_where_and_leaves_nothing():
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.Linear(64, 10)).train()
    with pytest.raises(ValueError, match=r"failed after '1' gave \(2, 50\)"): summary(model, torch.zeros(2, 1, 28, 28))
    with pytest.raises(ValueError, match="failed at once"): summary(nn.Linear(3, 2), torch.zeros(2, 4))
    assert model.training and not hooks_on(model)


def test_summary_counts_shared_parameters_once_and_admits_ignorance():
    about = summary(Twice(), torch.randn(2, 4))
    assert [row["layer"] for row in about.rows] == ["a", "a", "b"] and [row["params"] for row in about.rows] == [20, 0, 50]
    assert about.params == 90 and about.flops == 2*(16 + 16 + 40)
    frozen = nn.Linear(3, 2).requires_grad_(False)
    assert summary(frozen, torch.zeros(1, 3)).trainable == 0
    lstm = summary(nn.LSTM(3, 4, batch_first=True), torch.zeros(2, 5, 3))
    assert lstm.rows[0]["flops"] is None and "?" in str(lstm) and "≥" in str(lstm)
    assert summary(nn.Sequential(nn.Embedding(9, 4)), torch.zeros(2, 3, dtype=torch.long)).flops == 0


def test_batch_of_one_and_of_none():
    assert summary(simple_cnn(), torch.zeros(1, 1, 28, 28)).flops == summary(simple_cnn(), torch.zeros(7, 1, 28, 28)).flops
    with pytest.raises(ValueError, match="xb is empty"): summary(simple_cnn(), torch.zeros(0, 1, 28, 28))

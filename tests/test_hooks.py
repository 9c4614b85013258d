"Hooks that end with their block, statistics against plain sums, summary against PyTorch's own counter."
import copy
import gc
import io
import math
import pickle
import random
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from exp.conv import Conv2d, simple_cnn
from exp.hooks import ActivationStats, GeneralReLU, Hook, Hooks, as_found, find_layers, first_tensor, summary
from exp.learner import Callback, CancelBatch, CancelFit, DataLoaders, Learner
from exp.training import cross_entropy

ints = st.integers


def hooks_on(model): return sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def batches(n=3, bs=8): return [(torch.randn(bs, 1, 28, 28, generator=torch.Generator().manual_seed(i)), torch.arange(bs) % 10) for i in range(n)]


def learner(model, cbs=(), n=3, valid=None, data=None, loss=cross_entropy):
    return Learner(model, DataLoaders(data or batches(n), valid), loss, lr=.1, cbs=cbs, quiet=True, device="cpu")


def train(model, cbs, n=3, epochs=1, **kwargs):
    learn = learner(model, cbs, n, **kwargs)
    learn.fit(epochs)
    return learn


def notes(error): return " ".join(getattr(error, "__notes__", []))


# --- Hook and Hooks --------------------------------------------------------------------------------------------------------

def note(hook, module, inp, out): hook.shapes = tuple(inp[0].shape), tuple(out.shape)


def test_hook_sees_input_and_output_and_ends_with_its_block():
    layer = nn.Linear(3, 2)
    with Hook(layer, note) as hook:
        layer(torch.zeros(4, 3))
        assert hook.shapes == ((4, 3), (4, 2)) and hook.module is layer and hook.name == "Linear"
    hook.shapes = None
    layer(torch.zeros(4, 3))
    assert hook.shapes is None and hook.module is None and not hooks_on(layer)
    hook.remove()                                                                  # again: nothing happens


def test_hook_ends_after_an_error_in_its_block():
    layer = nn.Linear(3, 2)
    with pytest.raises(ZeroDivisionError), Hook(layer, note): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), Hooks(nn.Sequential(layer), note): raise ZeroDivisionError
    assert not hooks_on(layer)


def test_a_forgotten_hook_stays_as_its_docstring_says():
    layer, seen = nn.Linear(3, 2), []
    hook = Hook(layer, lambda hook, module, inp, out: seen.append(out))
    for _ in range(2): layer(torch.zeros(1, 3))
    assert hooks_on(layer) == 1 and len(seen) == 2 and "stays on the\n    layer" in Hook.__doc__
    hook.remove()
    assert not hooks_on(layer)


def test_a_removed_hook_lets_go_of_the_layer():
    gc.disable()
    try:
        layer = nn.Linear(3, 2)
        with Hook(layer, note) as hook, Hooks([layer], note) as hooks: layer(torch.zeros(1, 3))
        gone = weakref.ref(layer)
        del layer
        assert gone() is None and hook.shapes and len(hooks) == 1
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
            assert len(refs) == 2 and all(r() is None for r in refs[:-1])
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
def test_an_error_in_a_hook_keeps_its_type_and_names_the_layer(backward):
    model = simple_cnn((4,), 3)
    def bad(hook, *args):
        if hook.name == "1": raise KeyError("oops")
    with pytest.raises(KeyError, match="oops") as caught, Hooks(model, bad, backward=backward):
        model(torch.randn(2, 1, 28, 28)).sum().backward()
    assert "layer '1' (Sequential)" in notes(caught.value) and not hooks_on(model)


def test_cancels_pass_through_a_hook():
    def stop(hook, module, inp, out): raise CancelFit
    model = simple_cnn((4,), 10)
    with Hook(model[0], stop): learn = train(model, [])
    assert learn.epochs_done == 0


def test_copies_of_a_hooked_model_are_deaf_and_can_be_saved():
    layer, heard = nn.Linear(3, 2), []
    with Hook(layer, lambda *args: heard.append(1)), Hook(layer, lambda *args: heard.append(2), backward=True):
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)): twin(torch.zeros(1, 3)).sum().backward()
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        torch.load(file, weights_only=False)(torch.zeros(1, 3))
        assert not heard
        layer(torch.zeros(1, 3)).sum().backward()
        assert heard == [1, 2]


def test_hooks_take_a_model_a_list_or_a_dict():
    model = simple_cnn((4,), 3)
    def names(layers):
        with Hooks(layers, note) as hooks: return [hook.name for hook in hooks]
    assert names(model) == ["0", "1"] and names([model[0], model[1]]) == ["0", "1"] and names({"a": model[0]}) == ["a"]
    assert names(nn.Linear(2, 2)) == ["Linear"] and names(m for m in model) == ["0", "1"]
    with Hooks(model, note) as hooks:
        model(torch.zeros(2, 1, 28, 28))
        assert len(hooks) == 2 and hooks[1] is list(hooks)[-1] and hooks[1].shapes[1] == (2, 3)
    assert all(hook.module is None for hook in hooks)


def test_hooks_are_hung_all_or_none():
    good = nn.Linear(2, 2)
    with pytest.raises(AttributeError, match="'int' object has no attribute 'register_forward_hook'"): Hooks([good, 3], note)
    assert not hooks_on(good)
    class Closed(nn.Linear):                                                       # as a scripted layer is
        def register_forward_hook(self, *args, **kwargs): raise RuntimeError("no hooks here")
    with pytest.raises(RuntimeError, match="no hooks here"): Hooks([good, Closed(2, 2)], note)
    assert not hooks_on(good)
    with pytest.raises(ValueError, match="layers is empty"): Hooks([], note)


def test_find_layers():
    model = simple_cnn((4, 8), 3, norm=nn.BatchNorm2d)
    assert list(find_layers(model, nn.Conv2d)) == ["0.0", "1.0"]
    assert list(find_layers(model)) == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2", "2.0", "2.1", "2.2"]
    assert list(find_layers(model, (nn.ReLU, nn.Flatten))) == ["0.2", "1.2", "2.1"]
    assert list(find_layers(nn.Linear(2, 2))) == ["Linear"] and find_layers(model, nn.LSTM) == {}


def test_first_tensor():
    a, b = torch.zeros(1), torch.zeros(2)
    for nested in (a, (a, b), [[a], b], {"x": (a, b), "y": b}, ({"x": a}, b)): assert first_tensor(nested) is a
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 2)])
    assert first_tensor(packed) is packed.data
    for nothing in ((), {}, 3, None, [None, a]):
        with pytest.raises(TypeError, match="where a tensor was expected"): first_tensor(nothing)


def test_a_module_that_is_watched_twice_tells_both_and_one_that_runs_twice_tells_twice():
    layer, heard = nn.Linear(2, 2), []
    model = nn.Sequential(layer, nn.ReLU(), layer)
    with Hooks([layer, layer], lambda hook, module, inp, out: heard.append(hook.name)): model(torch.zeros(1, 2))
    assert heard == ["0", "1"]*2
    with Hooks(model, lambda hook, module, grad: heard.append(hook.name), backward=True): model(torch.ones(1, 2)).sum().backward()
    assert heard[4:] == ["0", "1", "0"] and not hooks_on(model)                        # a child has one name, the first


def test_backward_hooks_look_into_tuples_and_dicts():
    class Pair(nn.Linear):
        def forward(self, x): return {"y": (super().forward(x), 3)}
    layer, grads = Pair(3, 2), []
    with Hook(layer, lambda hook, module, grad: grads.append(grad), backward=True): (2*layer(torch.zeros(4, 3))["y"][0]).sum().backward()
    assert torch.equal(grads[0], torch.full((4, 2), 2.))


# --- ActivationStats -------------------------------------------------------------------------------------------------------

def test_stats_are_the_plain_sums():
    torch.manual_seed(0)
    model, stats = simple_cnn((4, 8)), ActivationStats(sample=10**9)
    with torch.no_grad(): model[1][0].bias[2] = -1e3
    twin = copy.deepcopy(model)
    train(model, [stats], n=1)
    h = batches(1)[0][0]
    for i, layer in enumerate(twin):
        h = layer(h).detach()
        torch.testing.assert_close(stats.means[i, 0], h.mean()); torch.testing.assert_close(stats.stds[i, 0], h.std(correction=0))
        torch.testing.assert_close(stats.hists[i, 0], h.clamp(-6, 6).histc(60, -6, 6)/h.numel())
    assert stats.names == ["0", "1", "2"] and stats.dead[:2, 0].tolist() == [0, 1/8]
    torch.testing.assert_close(stats.hists.sum(-1), torch.ones(3, 1))


def measured(x, **settings):
    "What the statistics say of one tensor: (mean, std, dead), histogram."
    class Hand(nn.Module):
        def forward(self, xb): return x
    stats = ActivationStats(**settings)
    p = nn.Parameter(torch.zeros(()))
    model = nn.Sequential(Hand())
    model.p = p
    learner(model, [stats], data=[(torch.zeros(1, 1), None)], loss=lambda pred, yb: p*1).fit(1)
    return (stats.means[0, 0].item(), stats.stds[0, 0].item(), stats.dead[0, 0].item()), stats.hists[0, 0]


def test_a_dead_unit_may_be_uneven_in_space_but_not_from_item_to_item():
    x = torch.randn(1, 2, 4, 4).expand(5, 2, 4, 4).clone()
    assert measured(x)[0][2] == 1
    x[3, 1, 2, 2] += 1
    assert measured(x)[0][2] == .5
    x = torch.zeros(2, 5, 3)
    x[0, :, 1:] = 1
    for unit_dim, share in ((2, 1/3), (1, 0)): assert abs(measured(x, unit_dim=unit_dim)[0][2] - share) < 1e-6
    assert math.isnan(measured(torch.ones(1, 4))[0][2]) and measured(torch.ones(5))[0][2] == 1
    assert measured(torch.tensor([[math.nan, 1.], [math.nan, 1.]]))[0][2] == .5


@pytest.mark.parametrize("n", [2, 1000, 1 << 20, (1 << 20) + 1, 1 << 22])
@pytest.mark.parametrize("far", [0, 3, 1e4])
def test_std_is_exact_at_any_size_and_distance(n, far):
    "The sums are cascades, whose error grows with log n; what rounding leaves in the mean is taken out again."
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).mul_(.1).add_(far)[None]
    true = x.double().std(correction=0).item()
    assert abs(measured(x)[0][1]/true - 1) < 1e-6


def test_std_of_equal_numbers_is_zero_not_nan():
    for value in (0., .1, 1e30, -7.3): assert measured(torch.full((3, 7, 5), value))[0][1] <= 1e-6*abs(value)


def test_double_precision_is_not_lost():
    x = torch.randn(3, 1000, dtype=torch.float64) + 1e9
    assert abs(measured(x)[0][1]/x.std(correction=0).item() - 1) < 1e-6


def test_infinities_and_nans_in_activations_are_shown_not_raised():
    _, hist = measured(torch.tensor([[math.inf, -math.inf, 5., 0.5]]), bins=4, limits=(-2., 2.))
    assert (4*hist).tolist() == [1, 0, 1, 2]
    assert math.isnan(measured(torch.tensor([[math.nan, 1.]]))[0][0])


@given(n=ints(1, 3000), sample=ints(1, 200))
def test_a_sample_is_even_and_of_the_right_size(n, sample):
    from exp.hooks import _thin
    picked = _thin(torch.arange(n), sample)
    assert 1 <= len(picked) <= sample or sample == 1 and len(picked) <= 2
    if len(picked) > 2: assert len(picked.diff().unique()) == 1


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


EVENTS = ["before_fit", "before_epoch", "before_pass", "before_batch", "after_pred", "after_loss", "after_backward", "before_step", "after_step",
          "after_batch", "after_pass", "after_epoch"]


@pytest.mark.parametrize("order", [-9, 9])
@pytest.mark.parametrize("event", EVENTS)
def test_a_validation_or_prediction_in_any_event_leaves_no_trace(event, order):
    torch.manual_seed(0)
    model = simple_cnn((4, 8))
    twin, seen, alone = copy.deepcopy(model), ActivationStats(), ActivationStats()
    class Nested(Callback): pass
    def look(self, learn):
        if learn.mode in ("validate", "predict"): return
        learn.validate(); learn.predict()
    Nested.order = order
    setattr(Nested, event, look)
    train(model, [seen, Nested()], valid=batches(2), epochs=2)
    train(twin, [alone], valid=batches(2), epochs=2)
    assert seen.steps == alone.steps == list(range(6)) and seen.names == alone.names
    for name in ("means", "stds", "dead", "hists"): assert torch.equal(getattr(seen, name), getattr(alone, name))


def test_stats_work_without_a_fit_and_record_nothing_then():
    stats = ActivationStats()
    learn = learner(simple_cnn((4,)), [stats], valid=batches(1))
    learn.validate(); learn.predict()
    assert stats.steps == [] and not len(stats.means)
    learn.fit(1)
    learn.validate(); learn.predict()
    assert stats.steps == [0, 1, 2] and stats.means.shape == (2, 3)


def test_frozen_layers_keep_their_modes():
    model = simple_cnn((4, 4), norm=nn.BatchNorm2d).train()
    model[0][1].eval()
    mean = model[0][1].running_mean.clone()
    train(model, [ActivationStats()], valid=batches(1))
    summary(model, batches(1)[0][0])
    assert not model[0][1].training and model[1][1].training and torch.equal(model[0][1].running_mean, mean)


@pytest.mark.parametrize("failing", ["after_loss", "before_batch", "after_backward", "after_epoch"])
@pytest.mark.parametrize("error", [ValueError("on purpose"), KeyboardInterrupt(), CancelFit()], ids=lambda e: type(e).__name__)
def test_stats_are_there_and_hooks_gone_after_any_end(failing, error):
    class Fail(Callback): pass
    def fail(self, learn):
        if learn.mode is None or learn.batch == 1: raise error
    setattr(Fail, failing, fail)
    model, stats = simple_cnn((4,)), ActivationStats()
    try: train(model, [stats, Fail()])
    except (ValueError, KeyboardInterrupt): pass
    assert not hooks_on(model) and len(stats.steps) == stats.means.shape[1] >= 1


def test_cancelled_batches_leave_no_row():
    class Skip(Callback):
        order = -200
        def before_batch(self, learn):
            if learn.batch == 1: raise CancelBatch
    stats = ActivationStats()
    train(simple_cnn((4,)), [Skip(), stats])
    assert len(stats.steps) == 2 == stats.means.shape[1]


def test_all_rows_are_there():
    model, stats, seen = simple_cnn((4,)), ActivationStats(), []
    class ByHand(Callback):
        def after_pred(self, learn): seen.append(learn.pred.detach().float())
    train(model, [stats, ByHand()], n=130)
    assert stats.steps == list(range(130)) and stats.hists.shape == (2, 130, 60)
    torch.testing.assert_close(stats.means[-1], torch.stack([p.mean() for p in seen]))
    torch.testing.assert_close(stats.stds[-1], torch.stack([p.std(correction=0) for p in seen]))


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
        def before_epoch(self, learn):
            if learn.epoch not in (2, 9): return
            gc.collect()
            counts.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
    train(model, [stats, Count()], epochs=10)
    assert counts[1] - counts[0] <= 3*7, f"tensors before the third and the tenth epoch, of 3 batches each: {counts}"
    assert stats.means.numel() == 30*2 and stats.hists.numel() == 30*2*60


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 10), nn.Linear(4, 4)
    def forward(self, x): return self.b(self.a(self.a(x)))


def test_shared_and_unused_layers():
    stats = ActivationStats()
    train(Twice(), [stats], data=[(torch.randn(6, 4), torch.arange(6))])
    assert stats.names == ["a", "b", "unused"] and stats.means[2].isnan().all() and stats.means[:2].isfinite().all()


def test_stats_choose_layers():
    model = simple_cnn((4,))
    for layers, names in ((lambda m: find_layers(m, nn.Conv2d), ["0.0"]), ({"first": model[0]}, ["first"]), ([model[1]], ["0"]), (model[0], ["0", "1"])):
        stats = ActivationStats(layers)
        train(model, [stats], n=1)
        assert stats.names == names


def test_a_function_of_the_layers_is_asked_once_a_fit():
    asked = []
    class Thaw(Callback):
        def before_epoch(self, learn): learn.model[1][0].weight.requires_grad_(learn.epoch == 1)
    def that_learn(model):
        asked.append(model)
        return (layer for layer in model.modules() if getattr(getattr(layer, "weight", None), "requires_grad", False))
    model, stats = simple_cnn((4, 8)), ActivationStats(that_learn)
    train(model, [stats, Thaw()], epochs=2)
    first, all_of_them = ActivationStats(that_learn), [m for m in model.modules() if getattr(m, "weight", None) is not None]
    assert len(asked) == 1 and len(stats.names) == len(all_of_them) - 1 and stats.means.isfinite().all()
    train(model, [first])
    assert len(asked) == 2


def test_summary_knows_the_layers_of_a_transformer_with_padding():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 2)
        def forward(self, x, mask): return self.body(x, src_key_padding_mask=mask)
    mask, before = torch.tensor([[False]*4, [False, False, True, True]]), torch.backends.mha.get_fastpath_enabled()
    rows = summary(Net(), (torch.randn(2, 4, 8), mask)).rows
    assert any("linear1" in row["layer"] for row in rows) and torch.backends.mha.get_fastpath_enabled() == before


def test_stats_say_what_is_wrong():
    class Dicts(nn.Linear):
        def forward(self, x): return {}
    with pytest.raises(TypeError, match="found a dict") as caught:
        train(nn.Sequential(nn.Linear(2, 2), Dicts(2, 2)), [ActivationStats()], data=[(torch.zeros(1, 2), None)])
    assert "layer '1' (Dicts)" in notes(caught.value)
    for plot in (ActivationStats().plot_stats, ActivationStats().plot_hists):
        with pytest.raises(ValueError, match="no training step was measured"): plot()
    for dim in (0, -1):
        with pytest.raises(ValueError, match=f"unit_dim is {dim}"): ActivationStats(unit_dim=dim)


def test_half_and_integer_outputs_and_dicts_are_measured():
    class Whole(nn.Linear):
        def forward(self, x): return {"out": super().forward(x).long(), "n": 3}
    for layer, x in ((nn.Linear(3, 2).bfloat16(), torch.randn(4, 3).bfloat16()), (Whole(3, 2), torch.randn(4, 3))):
        stats = ActivationStats()
        train(layer, [stats], data=[(x, None)], loss=lambda pred, yb, layer=layer: layer.weight.float().sum())
        assert stats.means.isfinite().all() and stats.means.dtype == torch.float32


def test_stats_of_a_model_with_two_inputs():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)
        def forward(self, x, y): return self.a(x) + self.b(y)
    stats = ActivationStats()
    train(Two(), [stats], data=[((torch.randn(5, 3), torch.randn(5, 4)), torch.zeros(5, 2))], loss=nn.functional.mse_loss)
    assert stats.names == ["a", "b"] and stats.means.isfinite().all()


def test_a_loss_that_runs_the_model_again_changes_no_number():
    torch.manual_seed(0)
    model, seen, alone = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), ActivationStats(), ActivationStats()
    twin, data = copy.deepcopy(model), [(torch.randn(8, 4), torch.zeros(8, 2)) for _ in range(3)]
    train(model, [seen], data=data, loss=lambda pred, yb: pred.square().mean() + 0*model(torch.ones(8, 4)).mean())
    train(twin, [alone], data=data, loss=lambda pred, yb: pred.square().mean())
    assert torch.equal(seen.means, alone.means) and torch.equal(seen.hists, alone.hists) and seen.steps == [0, 1, 2]


def test_every_part_is_measured_that_any_forward_runs():
    class Game(Learner):
        def train_batch(self):
            fake = self.forward(self.xb, self.model.maker)
            judged = self.forward(fake, self.model.judge)
            self.backward(self.get_loss(self.model.late(judged), self.yb)); self.step(); self.zero_grad()
    model, stats = nn.ModuleDict(dict(maker=nn.Linear(3, 3), judge=nn.Linear(3, 1), late=nn.Linear(1, 1), idle=nn.Linear(3, 3))), ActivationStats()
    Game(model, DataLoaders([(torch.randn(5, 3), torch.zeros(5, 1))]*2), nn.functional.mse_loss, lr=.1, cbs=stats, quiet=True, device="cpu").fit(1)
    assert stats.means.shape == (4, 2) and stats.means[:2].isfinite().all() and stats.means[2:].isnan().all()   # late runs outside


def test_of_a_layer_that_runs_twice_the_first_output_counts():
    model, stats, data = Twice(), ActivationStats(), [(torch.randn(6, 4), torch.arange(6))]
    want = model.a(data[0][0]).detach()
    train(model, [stats], data=data)
    torch.testing.assert_close(stats.means[0, 0], want.mean())


def test_layers_that_never_run_are_nan_step_by_step():
    stats = ActivationStats([nn.Linear(2, 2)])                                     # of no model that is trained here
    train(simple_cnn((4,)), [stats], n=2)
    assert stats.steps == [0, 1] and stats.means.shape == (1, 2) and stats.means.isnan().all() and stats.hists.isnan().all()


@pytest.mark.parametrize("out", [lambda x: x.sum(), lambda x: x[:, :0], lambda x: (x, None), lambda x: {"x": x, "n": 3}, lambda x: [[x], x], lambda x: x > 0,
                                 lambda x: x.long(), lambda x: x[:, 0]], ids=["0-d", "empty", "tuple", "dict", "nested", "bool", "int", "1-d"])
def test_outputs_of_any_form_are_measured(out):
    class Side(nn.Module):
        def forward(self, x): return out(x)
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.a, self.side = nn.Linear(3, 2), Side()
        def forward(self, x): self.side(x); return self.a(x)
    x, stats = torch.randn(4, 3), ActivationStats()
    train(Model(), [stats], data=[(x, torch.zeros(4, 2))], loss=nn.functional.mse_loss)
    got = first_tensor(out(x)).float()
    torch.testing.assert_close(stats.means[1, 0], got.mean(), equal_nan=True)
    assert stats.means[0].isfinite().all() and math.isnan(stats.dead[1, 0]) == (got.numel() < 4)


def test_unit_dim_beyond_the_last_dimension_is_the_last():
    x = torch.zeros(3, 4); x[0, :2] = 1
    assert measured(x, unit_dim=7)[0][2] == measured(x)[0][2] == .5


def test_a_second_fit_and_a_resumed_one_start_anew(tmp_path):
    model, stats = simple_cnn((4,)), ActivationStats()
    learn = learner(model, [stats], n=2)
    learn.fit(2)
    assert stats.steps == [0, 1, 2, 3] and stats.means.shape == (2, 4)
    learn.save(tmp_path/"two.pt")
    learn.fit(3, resume=tmp_path/"two.pt")
    assert stats.steps == [0, 1] and stats.means.shape == (2, 2) and stats.means.isfinite().all()
    learn.fit(1)
    assert stats.steps == [0, 1] and not hooks_on(model)


def test_layers_may_come_from_a_generator():
    model = simple_cnn((4,))
    stats = ActivationStats(layer for layer in model)
    train(model, [stats], epochs=2)
    assert stats.means.shape == (2, 6) and stats.means.isfinite().all()


def test_half_precision_is_measured_in_single():
    x = (300 + torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    for dtype in (torch.float16, torch.bfloat16):
        (mean, std, dead), hist = measured(x.to(dtype), limits=(290., 310.))
        wide = x.to(dtype).double()
        assert abs(mean - wide.mean()) < 1e-3 and abs(std/wide.std(correction=0) - 1) < 1e-4 and dead == 0 and abs(hist.sum() - 1) < 1e-5


def test_a_model_in_data_parallel_is_watched():
    stats = ActivationStats(lambda m: m.module)
    train(nn.DataParallel(simple_cnn((4,))), [stats])
    assert stats.names == ["0", "1"] and stats.means.isfinite().all()


def test_pictures_have_labels():
    import matplotlib.pyplot as plt
    stats = ActivationStats()
    train(simple_cnn((4, 8, 8, 8)), [stats])
    axes = [*stats.plot_stats("a finding"), *stats.plot_hists("another")]
    assert len(axes) == 3 + 5 and all(ax.get_xlabel() == "step" for ax in axes)
    assert [ax.get_ylabel() for ax in axes[:3]] == ["mean", "std", "share of dead units"] and axes[3].get_ylabel() == "activation"
    assert [ax.get_title() for ax in axes[3:]] == [f"layer {n}" for n in stats.names] and axes[0].figure._suptitle.get_text() == "a finding"
    assert len(stats.plot_hists(ncols=3)) == 5
    plt.close("all")


# --- summary ---------------------------------------------------------------------------------------------------------------

MODELS = {
    "cnn": (lambda: simple_cnn(norm=nn.BatchNorm2d), (4, 1, 28, 28)),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, dilation=2), nn.Conv2d(8, 2, (1, 3), bias=False)), (2, 4, 9, 9)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 5, 4, 2, 1)), (2, 3, 5, 6)),
    "linear on sequences": (lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)), (2, 5, 6)),
    "1d and 3d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Unflatten(1, (1, 4)), nn.Unflatten(2, (2, 2)), nn.Conv3d(1, 2, (1, 2, 3))), (2, 2, 9)),
    "turned round": (lambda: nn.Sequential(nn.Linear(6, 7), nn.Flatten(0, 1), nn.Linear(7, 3)), (2, 5, 6)),
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
    assert "(3, 8, 14, 14)" in text and "0.078" in text and "**total**" in text and text == about._repr_markdown_() == repr(about)


class Several(nn.Module):
    "Two inputs, the second by position or name."
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)
    def forward(self, left, right): return {"sum": self.a(left) + self.b(right)}


def test_summary_with_several_inputs():
    x, y = torch.randn(5, 3), torch.randn(5, 4)
    want = [dict(layer="a", kind="Linear", shape=(5, 2), params=8, flops=12), dict(layer="b", kind="Linear", shape=(5, 2), params=10, flops=16)]
    for xb in ((x, y), [x, y], dict(right=y, left=x)): assert summary(Several(), xb).rows == want


def test_summary_of_half_frozen_and_half_precision():
    model = simple_cnn((4, 8), 3, norm=nn.BatchNorm2d)
    model[0].requires_grad_(False)
    about = summary(model, torch.randn(2, 1, 28, 28))
    assert about.params - about.trainable == sum(p.numel() for p in model[0].parameters()) > 0
    for dtype in (torch.float16, torch.bfloat16):
        half = summary(copy.deepcopy(model).to(dtype), torch.randn(2, 1, 28, 28).to(dtype))
        assert half.rows == about.rows and half.flops == about.flops


def test_summary_leaves_lazy_layers_lazy_and_says_what_to_do():
    for model in (nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), nn.Sequential(nn.LazyConv2d(3, 3), nn.LazyBatchNorm2d())):
        own = hooks_on(model)                                                      # lazy layers wait with one of their own
        with pytest.raises(ValueError, match="uninitialized parameter.*Call `forward`"): summary(model, torch.zeros(2, 1, 4, 4))
        assert isinstance(model[1].weight, nn.parameter.UninitializedParameter) and hooks_on(model) == own


def test_summary_guesses_no_work():
    norm = nn.LayerNorm((6, 4, 4), bias=False)                                     # its weight has three dimensions, like a filter
    assert summary(norm, torch.randn(2, 6, 4, 4)).rows[0]["flops"] is None
    assert summary(nn.EmbeddingBag(9, 4), torch.zeros(2, 3, dtype=torch.long)).rows[0]["flops"] is None
    assert summary(Conv2d(3, 5, 3), torch.randn(2, 3, 9, 9)).rows[0]["flops"] is None          # our own, rebuilt to be understood
    assert summary(nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4))).rows[0]["flops"] is None
    normed = summary(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), torch.zeros(2, 4))
    assert "≥" in str(normed) and normed.params == 4 + 4 + 16


class Moody(nn.Module):
    "Draws random numbers from all sources, changes a buffer even in evaluation, and replaces another."
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(())); self.register_buffer("last", torch.zeros(2)); self.register_buffer("none", None)
    def forward(self, x):
        self.count += 1; self.last = torch.rand(3); self.none = x.mean(); self.register_buffer("late", x.std())
        return x + torch.rand(1) + random.random() + np.random.rand()


def test_summary_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(.5), Moody())
    model[1].eval(); model[3].train()
    x = torch.randn(8, 4)
    before, modes, rng, last = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state(), model[3].last
    others = random.getstate(), np.random.get_state()[1:3]
    summary(model, x)
    assert others[0] == random.getstate() and all(map(np.array_equal, others[1], np.random.get_state()[1:3]))
    for a, b in zip(model.state_dict().values(), before.values()): assert torch.equal(a, b)
    assert modes == [m.training for m in model.modules()] and torch.equal(rng, torch.get_rng_state())
    assert not hooks_on(model) and model[3].last is last and all(p.grad is None for p in model.parameters())
    assert model[3].none is None and not hasattr(model[3], "late") and dict(model.state_dict()).keys() == before.keys()


def test_as_found_puts_back_what_a_training_pass_changes_and_bears_errors():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(.5)).eval()
    model[2].train()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(KeyError), as_found(model):
        model.train()(torch.randn(8, 4))
        raise KeyError
    for a, b in zip(model.state_dict().values(), before.values()): assert torch.equal(a, b)
    assert [m.training for m in model.modules()] == [False, False, False, True] and torch.equal(rng, torch.get_rng_state())


def test_summary_between_forward_and_backward_spoils_no_gradient():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval()
    loss = model(torch.randn(8, 4)).sum()
    summary(model, torch.randn(8, 4))
    loss.backward()


def test_summary_of_a_model_that_fails_says_where_and_leaves_nothing():
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.Linear(64, 10)).train()
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught: summary(model, torch.zeros(2, 1, 28, 28))
    assert "last layer that ran: '1', output (2, 50)" in notes(caught.value)
    with pytest.raises(RuntimeError, match="cannot be multiplied"): summary(nn.Linear(3, 2), torch.zeros(2, 4))
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


# --- GeneralReLU -----------------------------------------------------------------------------------------------------------

@given(leak=st.floats(0, .9), sub=st.floats(-1, 1), maxv=st.one_of(st.none(), st.floats(.1, 100)), seed=ints(0, 50))
def test_GeneralReLU_is_its_equation(leak, sub, maxv, seed):
    z = 100*torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    want = torch.maximum(z, leak*z) - sub
    want = want if maxv is None else want.clamp(max=maxv)
    before = z.clone()
    torch.testing.assert_close(GeneralReLU(leak, sub, maxv)(z), want)
    assert torch.equal(z, before)


def test_GeneralReLU_dtypes_and_infinities():
    assert GeneralReLU(.1, .4, 6.)(torch.randn(3).half()).dtype == torch.float16 and "leak=0.1" in repr(GeneralReLU(.1))
    assert GeneralReLU()(torch.tensor([-math.inf, math.inf])).tolist() == [0, math.inf]

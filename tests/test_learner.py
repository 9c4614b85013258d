"exp.learner: agreement with a loop by hand, the written table of events, passes inside passes, groups, and every accident."
import collections
import contextlib
import copy
import pickle
import random
import subprocess
import sys
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import data
from hypothesis import given, settings, strategies as st
from learners import At, batches, equal, history, make, model, notes, raises, weights
from torch import nn

from exp import learner as L
from exp.callbacks import EMA, GradientAccumulation, Progress, Recorder, ValidateEvery
from exp.loaders import DataLoader, TensorDataset
from exp.training import SGD, accuracy, cross_entropy

PUBLIC_EVENTS = [e for e in L.EVENTS if not e.startswith("around_")]


def split(net): return [net[0].parameters(), net[2].parameters()]


# --- agreement ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("opt_func", [SGD, torch.optim.SGD, partial(torch.optim.SGD, momentum=.9), torch.optim.AdamW])
def test_equals_a_loop_by_hand(opt_func):
    learn = make(opt_func=opt_func, lr=.05)
    learn.fit(3)
    by_hand = model()
    opt = opt_func(by_hand.parameters(), lr=.05)
    for _ in range(3):
        for xb, yb in batches():
            cross_entropy(by_hand(xb), yb).backward()
            opt.step(); opt.zero_grad()
    assert equal(weights(learn), [p.detach() for p in by_hand.parameters()])


def test_lr_none_is_the_optimizers_own():
    learn = make(opt_func=torch.optim.AdamW, lr=None)
    assert learn.opt.param_groups[0]["lr"] == torch.optim.AdamW([torch.ones(1)]).param_groups[0]["lr"]
    assert make(lr=None).opt.param_groups[0]["lr"] == .1, "exp.training.SGD's"


def test_averages_are_by_item():
    learn = make(metrics=accuracy)
    values = learn.validate()
    x, y = data(24)
    with torch.no_grad(): pred = learn.model(x)
    assert values["valid_loss"] == pytest.approx(F.cross_entropy(pred, y).item(), abs=1e-6)
    assert values["accuracy"] == pytest.approx((pred.argmax(1) == y).float().mean().item(), abs=1e-6)
    assert torch.allclose(learn.predict(), pred, atol=1e-6) and torch.allclose(learn.predict(x), pred, atol=1e-6)
    got, targets = learn.predict(batches(24), with_targets=True)
    assert torch.allclose(got, pred, atol=1e-6) and torch.equal(targets, y)


def test_averages_weigh_by_what_somebody_says():
    class Tokens(L.Callback):
        def before_batch(self, learn): learn.weight = 3. if learn.batch == 0 else 1.
    learn = make([Tokens()], metrics=[accuracy])
    each = [make().validate([b])["valid_loss"] for b in batches(24)]
    assert learn.validate()["valid_loss"] == pytest.approx((3*each[0] + each[1])/4, rel=1e-6)


def test_a_metric_that_is_no_average():
    class Count(L.Metric):
        name = "count"
        def reset(self): self.n = 0
        def add(self, pred, yb, weight): self.n += weight
        def value(self): return self.n
    assert make(metrics=[Count()]).validate()["count"] == 24


def test_no_validation_loader():
    learn = make(dls=L.DataLoaders(batches())); learn.fit(1)
    assert "valid_loss" not in learn.history[0]
    for act in (learn.validate, learn.predict):
        with pytest.raises(ValueError, match="no validation loader"): act()


def test_metrics_and_epochs_in_any_form():
    for metrics in (accuracy, [accuracy], (m for m in [accuracy]), L.Mean(accuracy)):
        learn = make(metrics=metrics); learn.fit(np.int64(1))
        assert "accuracy" in learn.history[0]


# --- the batch contract --------------------------------------------------------------------------------------------------

class Two(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(6, 2), nn.Linear(3, 2)
    def forward(self, a, b): return self.a(a) + self.b(b)


def inputs(kind):
    x, y = data()
    pairs = [(x[i:i+8], x[i:i+8, :3], y[i:i+8]) for i in range(0, 40, 8)]
    make_x = {"tuple": lambda a, b: (a, b), "list": lambda a, b: [a, b], "dict": lambda a, b: {"b": b, "a": a},
              "named": collections.namedtuple("Pair", "a b")}[kind]
    return [(make_x(a, b), y) for a, b, y in pairs]


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "named"])
def test_several_inputs(kind):
    torch.manual_seed(0)
    learn = make(net=Two(), dls=L.DataLoaders(inputs(kind), inputs(kind)))
    learn.fit(2)
    x, _ = data()
    want = learn.model(x, x[:, :3])
    assert torch.allclose(learn.predict(), want, atol=1e-6)
    if kind in ("tuple", "named"): assert torch.allclose(learn.predict((x, x[:, :3])), want, atol=1e-6)
    if kind == "dict": assert torch.allclose(learn.predict({"a": x, "b": x[:, :3]}), want, atol=1e-6)


@pytest.mark.parametrize("item", [torch.randn(2, 6), torch.randn(4, 6), (1, 2, 3), 7, {"x": 1, "y": 2}, (torch.ones(2, 6),), "ab"])
def test_nothing_is_unpacked_by_luck(item):
    for act in (lambda learn: learn.fit(1), lambda learn: learn.predict([item])):
        with pytest.raises(TypeError, match="yields pairs"): act(make(dls=L.DataLoaders([item])))


def test_outputs_of_any_structure_are_joined():
    class Out(nn.Module):
        def __init__(self): super().__init__(); self.out = nn.Linear(6, 2)
        def forward(self, x): return {"score": self.out(x), "pair": (x, x.sum(1))}
    got = make(net=Out()).predict()
    assert got["score"].shape == (24, 2) and got["pair"][0].shape == (24, 6) and got["pair"][1].shape == (24,)


def test_lists_with_one_entry_for_each_item_are_put_end_to_end():
    class Boxes(nn.Module):
        def __init__(self): super().__init__(); self.out = nn.Linear(6, 2)
        def forward(self, x): return [{"boxes": row[None]} for row in self.out(x)]
    x, _ = data(20)
    loader = [(x[i:i+8], [f"item {j}" for j in range(i, min(20, i+8))]) for i in range(0, 20, 8)]
    got, names = make(net=Boxes()).predict(loader, with_targets=True)
    assert len(got) == 20 and got[19]["boxes"].shape == (1, 2) and names == [f"item {j}" for j in range(20)]
    class Pair(nn.Module):
        def forward(self, x): return [x, 2*x]
    two = make(net=nn.Sequential(Pair()), opt_func=lambda p: None).predict([(x[:2], None), (x[2:4], None)])
    assert torch.equal(two[1], 2*x[:4]), "two outputs of batches of two"


def test_the_size_of_a_batch_is_that_of_its_first_tensor():
    assert L.batch_size({"id": ["a", "b"], "x": [torch.ones(3, 2)]}) == 3
    with pytest.raises(TypeError, match="nothing in it"): L.batch_size({"id": ["a"]})


def test_who_says_the_weight_is_asked_for_nothing_else():
    "Until somebody wants to know, a batch need not tell how many items it has."
    class Graph: value = torch.ones(4, 6)
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.out = nn.Linear(6, 2)
        def forward(self, graph): return self.out(graph.value)
    class Say(L.Callback):
        def before_batch(self, learn): learn.weight = 4
    dls = L.DataLoaders([(Graph(), torch.zeros(4).long())])
    with pytest.raises(TypeError, match="nothing in it tells"): make(net=Net(), dls=dls).fit(1)
    learn = make([Say()], net=Net(), dls=dls); learn.fit(1)
    assert learn.history[0]["train_loss"] > 0 and learn.weight is None


def test_the_batch_step_can_be_called_by_hand():
    learn, twin = make(), make()
    for xb, yb in batches():
        loss = learn.get_loss(learn.forward(xb), yb)
        learn.backward(loss); learn.step(); learn.zero_grad()
        twin.xb, twin.yb = xb, yb
        twin.train_batch()
    fitted = make(dls=L.DataLoaders(batches())); fitted.fit(1)
    assert equal(weights(learn), weights(fitted)) and equal(weights(twin), weights(fitted))


def test_indices_are_those_of_the_batch():
    data_set, seen, inner = TensorDataset(*data()), [], []
    class Look(L.Callback):
        def before_batch(self, learn):
            if learn.depth == 1: learn.validate(learn.dls.train)
            (seen if learn.depth == 1 else inner).append((learn.indices, learn.yb))
    torch.manual_seed(0)
    make([Look()], L.DataLoaders(DataLoader(data_set, 16, shuffle=True))).fit(1)
    assert len(seen) == 3 and len(inner) == 9 and all(torch.equal(data()[1][list(idx)], yb) for idx, yb in seen + inner)
    seen.clear(); make([Look()]).fit(1); assert seen[0][0] is None


def test_a_generator_is_a_loader():
    assert len(make().predict(pair for pair in batches(24))) == 24 and len(make().predict(iter(batches(24)))) == 24


def test_everything_goes_to_the_device():
    learn = make(device="meta")
    assert {p.device.type for g in learn.groups for p in g["params"]} == {"meta"}, "moved before an optimizer is made of it"
    seen = []
    class Look(L.Callback):
        def after_pred(self, learn): seen.append((learn.xb.device.type, learn.yb.device.type, learn.pred.device.type)); raise L.CancelBatch
    make([Look()], device="meta", splitter=split, lr=[.1, .2]).fit(1)
    assert set(seen) == {("meta",)*3}


def test_only_copies_to_cuda_are_not_waited_for():
    "Others can be read before they are there (CPU), or be made of what is gone already (MPS, PyTorch's issue 189690)."
    class Asked:
        def to(self, device, non_blocking): return non_blocking
    assert L.to_device([Asked()], "cpu") == L.to_device([Asked()], "mps") == [False] and L.to_device({"a": Asked()}, torch.device("cuda", 0)) == {"a": True}


def test_what_a_callback_drops_weighs_nothing():
    class Drop(L.Callback):
        def before_batch(self, learn):
            if learn.batch == 0: learn.xb, learn.yb = learn.xb[:3], learn.yb[:3]
    learn, b = make([Drop()]), batches(24)
    whole = [(torch.cat([b[0][0][:3], b[1][0]]), torch.cat([b[0][1][:3], b[1][1]]))]
    assert learn.validate()["valid_loss"] == pytest.approx(make().validate(whole)["valid_loss"], rel=1e-6)


def test_a_value_is_a_number_from_then_on():
    "What a metric changes in place later does not change what it has said."
    class Sum(L.Metric):
        name, total = "total", torch.zeros(())
        def reset(self): self.total.zero_()
        def add(self, pred, yb, weight): self.total += weight
        def value(self): return self.total
    learn = make(metrics=Sum()); row = learn.validate(); learn.fit(1)
    learn.validate(batches(8))
    assert type(row["total"]) is float and row["total"] == 24 == learn.history[0]["total"]


def test_one_column_has_no_accuracy():
    dls = L.DataLoaders([(x, (y[:, None]).float()) for x, y in batches()], batches(24))
    learn = make(net=nn.Linear(6, 1), dls=dls, loss_func=lambda p, y: F.binary_cross_entropy_with_logits(p.flatten(), y.flatten().float()), metrics=accuracy)
    with pytest.raises(ValueError, match="one score"): learn.fit(1)


def test_columns_have_names_of_their_own():
    def topk(pred, yb, k): return torch.tensor(1.)
    with pytest.raises(ValueError, match="called topk"): make(metrics=[partial(topk, k=1), partial(topk, k=2)])
    def valid_loss(pred, yb): return torch.tensor(99.)
    with pytest.raises(ValueError, match="called valid_loss"): make(metrics=valid_loss)
    make(metrics=[L.Mean(partial(topk, k=1), "top1"), L.Mean(partial(topk, k=2), "top2")]).validate()
    for bad in ("accuracy", [3]):
        with pytest.raises(TypeError, match="functions .pred, yb., or Metric objects"): make(metrics=bad)


def test_a_context_that_swallows_an_error_leaves_nothing_behind():
    from contextlib import suppress
    class Swallow(L.Callback):
        def around_batch(self, learn): return suppress(ZeroDivisionError)
        def around_forward(self, learn): return None
    class Fail(L.Callback):
        def after_backward(self, learn):
            if learn.batch == 1: raise ZeroDivisionError
    class Cancel(L.Callback):
        def after_backward(self, learn):
            if learn.batch == 1: raise L.CancelBatch
    a, b = make([Swallow(), Fail()]), make([Cancel()])
    a.fit(2); b.fit(2)
    assert equal(weights(a), weights(b))


def test_batches_of_other_kinds_are_moved():
    pack = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    named = collections.namedtuple("N", "a b")(torch.ones(2), 1)
    for x in (pack, named, {"a": [torch.ones(1), "word"]}, collections.OrderedDict(a=torch.ones(1)), collections.defaultdict(int, a=torch.ones(1))):
        moved = L.to_device(x, "meta")
        assert type(moved) is type(x)
    assert L.to_device(named, "meta").a.device.type == "meta" and L.batch_size(pack) == 2
    net = nn.LSTM(2, 3)
    class Last(nn.Module):
        def __init__(self): super().__init__(); self.rnn = net
        def forward(self, x): return self.rnn(x)[1][0][0]
    make(net=Last(), dls=L.DataLoaders([(pack, torch.tensor([0, 1]))])).fit(1)


# --- the written table of events -------------------------------------------------------------------------------------------

class Spy(L.Callback):
    def __init__(self, name, order, log, cuts): self.name, self.order, self.log, self.cuts = name, order, log, dict(cuts)
    def hear(self, event, learn):
        at = (event, sum(e == event and n == self.name for n, e in self.log))
        self.log.append((self.name, event))
        if at in self.cuts: raise self.cuts[at]
for _event in PUBLIC_EVENTS: setattr(Spy, _event, lambda self, learn, event=_event: self.hear(event, learn))

PHASES = {"fit": L.CancelFit, "epoch": L.CancelEpoch, "pass": (), "batch": L.CancelBatch}


def expected(spies, n_epochs, n_train, n_valid):
    "The table, written out once more and as plainly as possible."
    log = []
    spies = sorted(spies, key=lambda s: s.order)
    def tell(spy, event):
        at = (event, sum(e == event and n == spy.name for n, e in log))
        log.append((spy.name, event))
        if at in spy.cuts: raise spy.cuts[at]
    def fire(event):
        for spy in spies: tell(spy, event)
    def phase(name, body):
        raised, heard = [], []
        try:
            for spy in spies: heard.append(spy); tell(spy, f"before_{name}")
            body()
        except Exception as e: raised.append(e)
        if raised and not isinstance(raised[0], L.Cancel) and log[-1] == (heard[-1].name, f"before_{name}"): heard.pop()
        for spy in heard:
            try: tell(spy, f"after_{name}")
            except Exception as e: raised.append(e)
        foreign = [e for e in raised if not isinstance(e, L.Cancel)]
        if foreign: raise foreign[0]
        if raised:
            worst = max(raised, key=lambda c: c.rank)
            if not isinstance(worst, PHASES[name]): raise worst
    def batch(training):
        for event in ("after_pred", "after_loss", *(("after_backward", "before_step", "after_step") if training else ())): fire(event)
    def passing(training, n):
        def body():
            for _ in range(n): phase("batch", lambda: batch(training))
        phase("pass", body)
    def epochs():
        for _ in range(n_epochs): phase("epoch", lambda: (passing(True, n_train), passing(False, n_valid)))
    try: phase("fit", epochs); raised = None
    except Exception as e: raised = RuntimeError if isinstance(e, L.Cancel) else type(e)
    return log, raised


cut = st.tuples(st.tuples(st.sampled_from(PUBLIC_EVENTS), st.integers(0, 3)),
                st.sampled_from([L.CancelBatch, L.CancelEpoch, L.CancelFit, ZeroDivisionError]))
spy_spec = st.tuples(st.integers(-2, 2), st.lists(cut, max_size=2))


@settings(max_examples=200)
@given(st.lists(spy_spec, min_size=1, max_size=3), st.integers(0, 2))
def test_events_follow_the_table(specs, n_epochs):
    plan = [Spy(i, order, [], cuts) for i, (order, cuts) in enumerate(specs)]
    want, error = expected(plan, n_epochs, 3, 2)
    log = []
    learn = make([Spy(i, order, log, cuts) for i, (order, cuts) in enumerate(specs)])
    try: learn.fit(n_epochs); raised = None
    except Exception as e: raised = type(e)
    assert log == want and raised is error
    assert not learn.fitting and learn.mode is None and all(p.grad is None for p in learn.model.parameters())


def test_every_pass_has_the_same_events():
    log = []
    learn = make([Spy("s", 0, log, {})], L.DataLoaders(batches(8), batches(8)))
    around = {"train": ["after_pred", "after_loss", "after_backward", "before_step", "after_step"], "validate": ["after_pred", "after_loss"], "predict": ["after_pred"]}
    def heard(act): log.clear(); act(); return [event for _, event in log]
    def whole(mode): return ["before_pass", "before_batch", *around[mode], "after_batch", "after_pass"]
    assert heard(learn.validate) == whole("validate") and heard(learn.predict) == whole("predict")
    assert heard(lambda: learn.fit(1)) == ["before_fit", "before_epoch", *whole("train"), *whole("validate"), "after_epoch", "after_fit"]


def test_order_is_stable_and_callbacks_can_come_and_go():
    log = []
    a, b, c = Spy("a", 1, log, {}), Spy("b", 0, log, {}), Spy("c", 1, log, {})
    learn = make([a, b, c])
    learn.fit(0)
    assert [n for n, _ in log] == list("bacbac")
    learn.remove_cb(b)
    log.clear(); learn.fit(0, cbs=[b]); assert [n for n, _ in log] == list("bacbac")
    log.clear(); learn.fit(0); assert [n for n, _ in log] == list("acac")
    with pytest.raises(ValueError, match="Spy is not among"): learn.remove_cb(b)
    assert learn.cb(Spy) is a
    with pytest.raises(ValueError, match="no Recorder"): learn.cb(Recorder)


@pytest.mark.parametrize("cb, words", [(Recorder, "Recorder'> is no callback"), (3, "is no callback"), (object(), "is no callback")])
def test_what_is_no_callback_is_refused(cb, words):
    with pytest.raises(TypeError, match=words): make([cb])


def test_misspelt_events_are_refused_and_numbers_are_not():
    class Typo(L.Callback):
        def after_lost(self, learn): pass
    class Number(L.Callback):
        after_n = 3
    with pytest.raises(TypeError, match="did you mean after_loss"): make([Typo()])
    make([Number()]).fit(1)


def test_any_object_with_an_event_will_do_and_so_will_an_event_of_one_object():
    class Plain:
        n = 0
        def after_batch(self, learn): self.n += 1
    cb, own, heard = Plain(), L.Callback(), []
    own.after_epoch = lambda learn: heard.append(learn.epoch)
    make([cb, own]).fit(2)
    assert cb.n == 2*(3 + 2) and heard == [0, 1]


def test_one_callback_twice_is_refused():
    cb = Recorder()
    learn = make(cb)
    for act in (lambda: learn.fit(1, cbs=cb), lambda: learn.add_cb(cb), lambda: make([cb, cb])):
        with pytest.raises(ValueError, match="listens already"): act()
    assert learn.cbs == [cb]
    learn.fit(1); assert len(cb.losses) == 3


def test_contexts_are_closed_whatever_happens():
    from contextlib import contextmanager
    log = []
    class Around(L.Callback):
        @contextmanager
        def around_batch(self, learn):
            log.append("(")
            try: yield
            finally: log.append(")")
        @contextmanager
        def around_forward(self, learn):
            log.append("[")
            assert torch.is_grad_enabled() == learn.training
            try: yield
            finally: log.append("]")
    make([Around()]).fit(1)
    assert "".join(log) == "([][])"*5
    for event, error in (("after_pred", ZeroDivisionError()), ("after_loss", L.CancelBatch()), ("before_batch", KeyboardInterrupt())):
        log.clear()
        try: make([Around(), At(event, raises(error))]).fit(1)
        except (ZeroDivisionError, KeyboardInterrupt): pass
        assert log.count("(") == log.count(")") and log.count("[") == log.count("]")
    def bad_loss(pred, yb): raise ZeroDivisionError
    log.clear()
    with pytest.raises(ZeroDivisionError): make([Around()], loss_func=bad_loss).fit(1)
    assert "".join(log) == "([][])"


# --- a pass inside a pass ----------------------------------------------------------------------------------------------------

ACTS = {"validate": lambda learn: learn.validate(), "on train": lambda learn: learn.validate(learn.dls.train),
        "predict": lambda learn: learn.predict(), "one batch": lambda learn: learn.predict(torch.ones(2, 6))}


def net_with_chance(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.3), nn.Linear(8, 2))


def dls_with_chance(kind=DataLoader):
    a, b = TensorDataset(*data()), TensorDataset(*data(24, 1))
    if kind is DataLoader: return L.DataLoaders(DataLoader(a, 16, shuffle=True), DataLoader(b, 16))
    return L.DataLoaders(kind(torch.utils.data.TensorDataset(*data()), 16, shuffle=True), kind(torch.utils.data.TensorDataset(*data(24, 1)), 16))


class Count(L.Metric):
    "Something that a nested pass could disturb: a sum over the batches."
    name, lower_is_better = "count", False
    def reset(self): self.n = 0
    def add(self, pred, yb, weight): self.n += weight
    def value(self): return self.n


@settings(max_examples=60)
@given(st.sampled_from([e for e in PUBLIC_EVENTS if e != "after_fit"]), st.sampled_from(sorted(ACTS)), st.integers(0, 4),
       st.sampled_from(["train", "validate", None]), st.sampled_from([-200, 0, 200]), st.booleans())
def test_a_pass_inside_a_pass_leaves_no_trace(event, act, n, mode, order, theirs):
    def run(extra):
        dls = dls_with_chance(torch.utils.data.DataLoader if theirs else DataLoader)
        rec = Recorder()
        learn = make([rec, EMA(.5), GradientAccumulation(2), *extra], dls, net_with_chance(), metrics=[accuracy, Count()])
        torch.manual_seed(1); learn.fit(2)
        return learn, rec
    calm, rec = run([])
    # `learn.mode` is put back even inside the nested pass's own events, which must not start another
    def once(learn):
        if learn.depth <= 1: ACTS[act](learn)
    learn, other = run([At(event, once, n, mode, order)])
    assert equal(weights(calm), weights(learn)) and history(calm) == history(learn)
    assert all(torch.equal(a, b) for a, b in zip(calm.model.buffers(), learn.model.buffers()))
    assert rec.losses == other.losses and rec.valid == other.valid


def test_validate_and_predict_record_nothing_and_use_up_no_chance():
    learn = make([Recorder()], dls_with_chance(), net_with_chance())
    learn.fit(1)
    before, state = copy.deepcopy(learn.history), torch.get_rng_state()
    for act in ACTS.values(): act(learn)
    assert learn.history == before and torch.equal(state, torch.get_rng_state()) and learn.cb(Recorder).losses.__len__() == 3


def test_every_layer_gets_its_mode_back():
    for act in (lambda learn: learn.validate(), lambda learn: learn.predict(), lambda learn: learn.fit(1)):
        net = net_with_chance(); net[1].eval()
        learn = make(net=net); mean = net[1].running_mean.clone()
        act(learn)
        assert net.training and not net[1].training and torch.equal(mean, net[1].running_mean)
    net = net_with_chance().eval(); modes = []
    make([At("after_pred", lambda learn: modes.append([m.training for m in net.modules()]))], net=net).fit(1)
    assert all(modes[0]) and not any(m.training for m in net.modules()), "a root in eval mode: all train, and all get it back"


def test_a_batch_may_have_a_loss_of_its_own():
    "Set by a callback, it holds for that batch: not for the next, nor for a validation in its midst, a copy, or a subclass's additions."
    twice, kept = lambda pred, yb: 2*cross_entropy(pred, yb), []
    class Plus(L.Learner):
        def get_loss(self, pred, yb): return self._set_loss(super().get_loss(pred, yb) + 1)
    def choose(learn): learn.batch_loss_func = twice
    def look(learn): kept.append((learn.validate()["valid_loss"], copy.deepcopy(learn)))
    calm, learn = make(), make([At("before_batch", choose), At("after_pred", look)])
    first = calm.validate()["valid_loss"]
    losses = []
    for one in (calm, learn): one.add_cb(At("after_loss", lambda learn: losses.append(learn.loss.item()))); one.fit(1)
    assert losses[1] == pytest.approx(2*losses[0]) and learn.batch_loss_func is None
    value, other = kept[0]
    assert value == first and other.validate()["valid_loss"] == first
    plus = Plus(model(), L.DataLoaders(batches(16)), cross_entropy, cbs=At("before_batch", choose), quiet=True, device="cpu")
    plus.fit(1)
    assert plus.history[0]["train_loss"] == pytest.approx(2*losses[0] + 1)


def test_a_loss_that_is_a_module_follows_the_pass():
    "It trains and validates with the model, wherever it has to be; its layers keep their modes, and get them back."
    class Loss(nn.Module):
        def __init__(self): super().__init__(); self.net, self.modes = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval()).requires_grad_(False), []
        def forward(self, pred, yb): self.modes.append([m.training for m in self.modules()]); return cross_entropy(pred, yb)
    loss, net = Loss(), model()
    learn = make(net=net, loss_func=loss, dls=L.DataLoaders(batches(16), batches(16)))
    learn.fit(1)
    assert loss.modes == [[True, True, True, False], [False]*4] and loss.training and not loss.net[1].training
    frozen = Loss().eval()                             # as a perceptual loss is: it stays so
    make(loss_func=frozen, dls=L.DataLoaders(batches(16), batches(16))).fit(1)
    assert frozen.modes == [[False]*4]*2 and not frozen.training
    with pytest.raises(ValueError, match="net.1.weight, that no optimizer moves"): make(loss_func=Loss().requires_grad_()).fit(1)
    later = make(dls=L.DataLoaders(batches(16), None)); later.fit(1); later.loss_func = Loss().requires_grad_()
    with pytest.raises(ValueError, match="no optimizer moves"): later.fit(1)
    learn.device = torch.device("meta")
    with contextlib.suppress(Exception): learn.validate()
    assert next(loss.parameters()).device.type == "meta" and loss.training
    calm, wrapped = model(), model()
    make(net=calm).fit(1); make(net=wrapped, loss_func=nn.CrossEntropyLoss(torch.ones(2))).fit(1)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(calm.parameters(), wrapped.parameters()))


@pytest.mark.parametrize("metric", [L.Mean(accuracy), Count()], ids=["mean", "count"])
@pytest.mark.parametrize("event", ["before_pass", "before_batch", "after_pred", "after_batch", "after_pass"])
def test_a_metric_of_two_learners(metric, event):
    "One learner validates in the middle of the other's validation: both numbers are right."
    a, b = make(metrics=metric), make(metrics=metric, net=model(4), dls=L.DataLoaders(batches(), batches(18)))
    want, other = a.validate(), b.validate()
    inside = []
    a.add_cb(At(event, lambda learn: inside.append(b.validate()), mode="validate"))
    assert a.validate() == want and inside == [other] and b.validate() == other and not metric.in_use
    def fail(learn): raise ZeroDivisionError
    a.add_cb(At("after_pred", fail, mode="validate"))
    with pytest.raises(ZeroDivisionError): a.validate()
    assert not metric.in_use and b.validate() == other


@pytest.mark.parametrize("event", [e for e in PUBLIC_EVENTS if e != "after_fit"])
def test_a_learner_inside_a_callback_of_another(event):
    "It trains, validates and predicts, and neither notices the other."
    alone, calm, numbers = make(net=net_with_chance(9), metrics=accuracy), make(metrics=accuracy), []
    torch.manual_seed(5); alone.fit(1)
    calm.fit(2)
    def train(learn):
        inner = make([Recorder()], net=net_with_chance(9), metrics=accuracy)
        torch.manual_seed(5); inner.fit(1); inner.predict()
        numbers.append(history(inner))
    outer = make([At(event, train, n=1 if "fit" not in event else 0, mode=None)], metrics=accuracy); outer.fit(2)
    assert numbers == [history(alone)] and history(outer) == history(calm) and equal(weights(outer), weights(calm))


def test_a_fit_inside_a_validation_is_an_error():
    learn = make(); learn.fit(1)
    learn.add_cb(At("after_batch", lambda learn: learn.fit(3), mode="validate"))
    with pytest.raises(RuntimeError, match="inside a fit or a pass"): learn.validate()
    assert len(learn.history) == 1


def test_a_stray_cancel_is_an_error():
    for act in (lambda learn: learn.validate(), lambda learn: learn.predict()):
        with pytest.raises(RuntimeError, match="CancelFit"): act(make([At("after_batch", raises(L.CancelFit()), mode=None)]))
    with pytest.raises(RuntimeError, match="inside a fit"): make([At("after_batch", lambda learn: learn.fit(1))]).fit(1)


def test_callbacks_work_without_a_fit():
    for cb in (Recorder(), Progress("terminal"), Progress("notebook"), Progress("log"), EMA(), GradientAccumulation(2)):
        assert "valid_loss" in make(cb).validate()
        assert len(make(cb).predict()) == 24


# --- gradients ---------------------------------------------------------------------------------------------------------------

def gradient(net, which):
    "The mean gradient over some batches, by PyTorch alone."
    net = copy.deepcopy(net); net.zero_grad()
    x, y = (torch.cat([batches(40, 8)[i][k] for i in which]) for k in (0, 1))
    F.cross_entropy(net(x), y).backward()
    return net[0].weight.grad


@settings(max_examples=120)
@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["before_batch", "after_pred", "after_loss", "after_backward", "before_step"])),
                                   max_size=3, unique_by=lambda c: c[0]))
def test_accumulation_with_cancelled_batches(n, cuts):
    "Against the rule in words: before backward a batch does not count, after it the window is dropped, a rest is flushed."
    cuts = dict(cuts)
    windows, window = [], []
    for batch in range(5):
        event = cuts.get(batch)
        if event in ("before_batch", "after_pred", "after_loss"): continue
        window.append(batch)
        if event == "after_backward": window = []; continue
        if len(window) == n:
            if event == "before_step": window = []; continue
            windows.append(window); window = []
    if window: windows.append(window)
    class Cut(L.Callback):
        order = 90
        def maybe(self, learn, event):
            flushing = event == "before_step" and learn.loss is None
            if learn.training and cuts.get(learn.batch) == event and not flushing: raise L.CancelBatch
    for event in set(cuts.values()): setattr(Cut, event, lambda self, learn, event=event: self.maybe(learn, event))
    found = []
    class Keep(L.Callback):
        order = 95
        def before_step(self, learn): found.append((learn.model[0].weight.grad.clone(), copy.deepcopy(learn.model)))
    make([GradientAccumulation(n), Cut(), Keep()], L.DataLoaders(batches(40, 8))).fit(1)
    assert len(found) == len(windows)
    for (grad, net), which in zip(found, windows): torch.testing.assert_close(grad, gradient(net, which), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("event", [e for e in PUBLIC_EVENTS if "fit" not in e])
@pytest.mark.parametrize("error", [L.CancelEpoch, L.CancelFit, KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("n", [1, 3])
def test_no_gradient_is_left_behind(event, error, n):
    learn = make([GradientAccumulation(n), At(event, raises(error()), n=1, mode=None)], L.DataLoaders(batches(40, 8)))
    learn.model[0].weight.grad = torch.full((5, 6), 1e9)
    seen = []
    learn.add_cb(At("before_batch", lambda learn: seen.append(any(p.grad is not None for p in learn.model.parameters())), mode=None))
    try: learn.fit(2)
    except (KeyboardInterrupt, ZeroDivisionError, RuntimeError): pass
    assert all(p.grad is None for p in learn.model.parameters()) and not seen[0] and not learn.window and not learn.accumulating
    fresh, before = make(dls=learn.dls), weights(learn)
    fresh.model.load_state_dict(learn.model.state_dict())
    for cb in list(learn.cbs): learn.remove_cb(cb)
    learn.fit(1); fresh.fit(1)
    assert equal(weights(learn), weights(fresh)) and not equal(weights(learn), before)


@pytest.mark.parametrize("event", ["before the fit", "before_fit", "before_epoch", "before_pass"])
@pytest.mark.parametrize("opt_func", [SGD, torch.optim.AdamW])
def test_a_stray_backward_never_enters_the_first_step(event, opt_func):
    x, y = data(8, 3)
    def stray(learn):
        with torch.enable_grad(): (100*F.cross_entropy(learn.model(x), y)).backward()
    learn, fresh = make(opt_func=opt_func, lr=.01), make(opt_func=opt_func, lr=.01)
    if event == "before the fit": stray(learn)
    else: learn.add_cb(At(event, stray, mode=None))
    learn.fit(1); fresh.fit(1)
    assert equal(weights(learn), weights(fresh))


def test_a_replaced_loss_is_an_error_and_not_silence():
    "It would be reported and not learnt; what is learnt starts from loss_for_grad."
    for act in (lambda learn: learn.fit(1), lambda learn: learn.validate()):
        with pytest.raises(RuntimeError, match="change learn.loss_for_grad"):
            act(make([At("after_loss", lambda learn: setattr(learn, "loss", 2*learn.loss), mode=None)]))
    class Twice(L.Callback):
        def after_loss(self, learn): learn.loss_for_grad = 2*learn.loss_for_grad
    a, b = make([Twice()], lr=.1), make(lr=.2)
    a.fit(1); b.fit(1)
    for p, q in zip(weights(a), weights(b)): torch.testing.assert_close(p, q)


def test_a_loader_that_ends_early_flushes():
    class Short:
        def __len__(self): return 5
        def __iter__(self): return iter(batches(40, 8)[:3])
    steps = []
    make([GradientAccumulation(2), At("after_step", lambda learn: steps.append(len(learn.window)), mode=None)], L.DataLoaders(Short())).fit(1)
    assert len(steps) == 1, "At hears the first only"
    log = []
    make([GradientAccumulation(2), Spy("s", 0, log, {})], L.DataLoaders(Short())).fit(2)
    assert [e for _, e in log].count("after_step") == 4


def test_a_skipped_step_moves_nothing():
    class Skip(L.Callback):
        def before_step(self, learn): learn.skip_step = learn.batch == 1
        def after_step(self, learn): stepped.append(learn.stepped)
    stepped, moved = [], []
    learn = make([Skip(), At("before_batch", lambda learn: None)], opt_func=partial(torch.optim.SGD, momentum=.9))
    learn.add_cb(type("Look", (L.Callback,), {"before_batch": lambda s, l: moved.append(weights(l)) if l.training else None})())
    learn.fit(1)
    assert stepped == [True, False, True] and not equal(moved[0], moved[1]) and equal(moved[1], moved[2])


def test_a_loss_of_several_parts_is_heard():
    class Scale(L.Callback):
        def after_loss(self, learn): learn.loss_for_grad = learn.loss_for_grad*8
        def before_step(self, learn):
            for p in learn.params(): p.grad /= 8
    class Both(L.Learner):
        def train_batch(self):
            loss = self.get_loss(self.forward(self.xb), self.yb) + .1*sum(p.square().sum() for p in self.model.parameters())
            self.backward(loss); self.step(); self.zero_grad()
    a, b = (Both(model(), L.DataLoaders(batches()), cross_entropy, lr=.1, cbs=cbs, quiet=True, device="cpu") for cbs in ([], [Scale()]))
    a.fit(2); b.fit(2)
    for p, q in zip(weights(a), weights(b)): torch.testing.assert_close(p, q)
    assert a.history[0]["train_loss"] == pytest.approx(b.history[0]["train_loss"])


# --- groups --------------------------------------------------------------------------------------------------------------------

def rates(learn): return [float(g["lr"]) for g in learn.groups]


class Rates(L.Callback):
    def __init__(self): self.seen = []
    def after_step(self, learn): self.seen.append(rates(learn))


def test_rates_of_groups_stay_in_ratio():
    for opt_func in (SGD, torch.optim.AdamW):
        see = Rates()
        learn = make([see], splitter=split, lr=[.01, .1], opt_func=opt_func)
        learn.fit(1); learn.fit(1, .2); learn.fit(1); learn.fit(1, [.3, .1]); learn.fit(1, .05)
        want = [[.01, .1], [.02, .2], [.02, .2], [.3, .1], [.15, .05]]
        assert [s for s in see.seen[::3]] == [pytest.approx(w) for w in want]


def test_rates_that_fit_no_group_are_refused():
    with pytest.raises(ValueError, match="3 rates for 2 groups"): make(splitter=split, lr=[1, 2, 3]).fit(1)
    with pytest.raises(ValueError, match="give lr a list"): make(splitter=split, lr=[.1, 0.]).fit(1, .1)
    for bad in (-.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rates of 0 or more"): make().fit(1, bad)
        for lr in ([bad, .1], [.1, bad]):
            for act in (lambda: make(splitter=split).fit(1, lr), lambda: make(splitter=split, lr=lr).fit(1)):
                with pytest.raises(ValueError, match="rates of 0 or more"): act()
    learn = make(splitter=split, lr=[.01, .1]); learn.fit(2)
    with pytest.raises(ValueError): learn.fit(1, [1., 2., 3.])
    assert rates(learn) == [.01, .1] and len(learn.history) == 2, "what is refused changes nothing"
    assert make(lr=0.).fit(1, .1) is None, "one group needs no ratio"
    assert L.spread(.01, 1, 3) == pytest.approx([.01, .1, 1]) and L.spread(.1, .5, 1) == [.5]


def test_every_parameter_is_in_one_group():
    with pytest.raises(ValueError, match=r"2\.weight is in 0, 2\.bias is in 0"): make(splitter=lambda net: [net[0].parameters()]).fit(1)
    with pytest.raises(ValueError, match=r"0\.weight is in 2, 0\.bias is in 2"): make(splitter=lambda net: [net.parameters(), net[0].parameters()]).fit(1)
    with pytest.raises(ValueError, match=r"\(1,\) float32 is no parameter"): make(splitter=lambda net: [net.parameters(), [torch.ones(1)]]).fit(1)


@pytest.mark.parametrize("splitter, words", [
    (lambda net: [net[0], net[2]], "Linear is no parameter"), (lambda net: [[net[0]], [net[2]]], "Linear is no parameter"),
    (lambda net: [net[:2], net[2:]], "Linear is no parameter"), (lambda net: {"body": net[0].parameters(), "head": net[2].parameters()}, "str is no parameter"),
    (lambda net: list(net.parameters()), "float32 is no parameter"), (lambda net: net.parameters(), "float32 is no parameter"),
    (lambda net: [net[0].named_parameters(), net[2].named_parameters()], r"\[str, \(5, 6\) float32\] is no parameter")])
def test_a_splitter_gives_lists_of_parameters(splitter, words):
    with pytest.raises(ValueError, match=words): make(splitter=splitter).fit(1)


def test_an_optimizer_of_other_parameters_is_refused():
    with pytest.raises(ValueError, match="other parameters"): make(opt_func=lambda params, lr: torch.optim.SGD(model(3).parameters(), lr)).fit(1)
    net = model()
    learn = make(net=net, opt_func=lambda params, lr: torch.optim.SGD(net.parameters(), lr)); learn.fit(1)
    learn.model = model(4)
    with pytest.raises(ValueError, match="other parameters"): learn.fit(1)
    some = make(opt_func=lambda params, lr: torch.optim.SGD(list(params)[2:], lr)); before = weights(some); some.fit(1)
    assert [torch.equal(a, b) for a, b in zip(before, weights(some))] == [True, True, False, False], "some of them will do"


def test_a_scheduled_value_ends_with_the_fit():
    class Change(L.Callback):
        def before_batch(self, learn):
            for g in learn.groups: g["lr"], g["momentum"] = 7e-3, .5
    learn = make([Change()], opt_func=partial(torch.optim.SGD, momentum=.9))
    learn.fit(1)
    assert rates(learn) == [.1] and learn.opt.param_groups[0]["momentum"] == .9
    with pytest.raises(KeyboardInterrupt): learn.fit(1, .2, cbs=At("after_batch", raises(KeyboardInterrupt())))
    assert rates(learn) == [.2] and learn.opt.param_groups[0]["momentum"] == .9


def test_freeze_and_unfreeze():
    learn = make(splitter=split)
    learn.model[2].bias.requires_grad_(False)
    learn.freeze_to(-1)
    before = weights(learn); learn.fit(1)
    moved = [not torch.equal(a, b) for a, b in zip(before, weights(learn))]
    assert moved == [False, False, True, False]
    learn.unfreeze()
    assert [p.requires_grad for p in learn.model.parameters()] == [True, True, True, False], "what was frozen before stays so"
    learn.freeze_to(1); learn.freeze_to(0)
    assert [p.requires_grad for p in learn.model.parameters()] == [True, True, True, False]


def test_exchanged_parts_learn():
    learn = make(opt_func=partial(torch.optim.SGD, momentum=.9)); learn.fit(1, .3)
    learn.model[2] = nn.Linear(5, 2); before = learn.model[2].weight.clone()
    with pytest.warns(UserWarning, match="exchanged"): learn.fit(1)
    assert not torch.equal(before, learn.model[2].weight) and rates(learn) == [.3]
    learn.model[0] = nn.Linear(6, 5); learn.splitter = split
    with pytest.warns(UserWarning, match="exchanged"): learn.freeze_to(-1)
    assert not learn.model[0].weight.requires_grad, "the new one is frozen"
    learn.unfreeze(); learn.splitter = None
    learn.model = model(3); before = weights(learn)
    with pytest.warns(UserWarning, match="exchanged"): learn.fit(1)
    assert not equal(before, weights(learn))


@pytest.mark.parametrize("event", ["before_fit", "before_epoch", "before_pass"])
def test_exchanged_in_the_middle_of_a_fit_is_an_error(event):
    learn = make([At(event, lambda learn: learn.model.__setitem__(2, nn.Linear(5, 2)), n=0 if event == "before_fit" else 1, mode=None)])
    with pytest.raises(RuntimeError, match="between two fits"): learn.fit(3)
    for cb in list(learn.cbs): learn.remove_cb(cb)
    before = learn.model[2].weight.clone()
    with pytest.warns(UserWarning, match="exchanged"): learn.fit(1)
    assert not torch.equal(before, learn.model[2].weight)


# --- accidents -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("event", PUBLIC_EVENTS)
@pytest.mark.parametrize("training", [True, False])
def test_ctrl_c_leaves_the_learner_usable(event, training):
    log = []
    learn = make([At(event, raises(KeyboardInterrupt()), mode=None), Spy("s", -1, log, {})])
    learn.model.train(training)
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    assert learn.model.training is training and torch.is_grad_enabled()
    assert learn.xb is None and learn.loss is None and ("s", "after_fit") in log and not learn.fitting
    fresh, before = make(), weights(learn)
    fresh.model.load_state_dict(learn.model.state_dict())
    learn.fit(1); fresh.fit(1)                     # no half-made gradient leaks into the next training
    assert equal(weights(learn), weights(fresh)) and not equal(weights(learn), before)


@pytest.mark.parametrize("event", PUBLIC_EVENTS)
def test_an_error_keeps_its_type_and_says_where(event):
    class Bad(L.Callback): pass
    def oh(self, learn): raise ZeroDivisionError("oh")
    setattr(Bad, event, oh)
    learn = make([Bad()])
    with pytest.raises(ZeroDivisionError, match="oh") as caught: learn.fit(1)
    assert f"in Bad.{event}, epoch 0" in notes(caught.value) and len(caught.value.__notes__) == 1
    learn.remove_cb(learn.cb(Bad)); learn.fit(1)


def test_out_of_memory_can_be_caught():
    def loss(pred, yb): raise torch.OutOfMemoryError("too much")
    with pytest.raises(torch.OutOfMemoryError) as caught: make(loss_func=loss).fit(1)
    assert r"epoch 0, training batch 0 with xb (16, 6) float32" in notes(caught.value)


def test_the_batch_stays_to_be_looked_at():
    bad = [*batches()[:1], (torch.randn(4, 5), torch.zeros(4).long())]
    learn = make(dls=L.DataLoaders(bad))
    with pytest.raises(RuntimeError) as caught: learn.fit(1)
    assert "training batch 1 with xb (4, 5) float32, yb (4,) int64" in notes(caught.value)
    assert learn.xb.shape == (4, 5) and learn.mode is None
    learn.dls.train = batches(); learn.fit(1); assert learn.xb is None


def test_empty_and_used_up_loaders_are_named():
    with pytest.raises(ValueError, match="gave no batch"): make(dls=L.DataLoaders([])).fit(1)
    with pytest.raises(ValueError, match="used-up"): make(dls=L.DataLoaders(iter(batches()))).fit(2)
    with pytest.raises(ValueError, match="gave no batch"): make().predict([])


@pytest.mark.parametrize("loss", [partial(F.cross_entropy, reduction="none"), lambda p, y: (F.cross_entropy(p, y), 1), lambda p, y: 1.])
def test_a_loss_is_one_number(loss):
    with pytest.raises(TypeError, match="return one number"): make(loss_func=loss).fit(1)


def test_a_bad_metric_is_named():
    def wrong(pred, yb): raise IndexError("nope")
    with pytest.raises(IndexError) as caught: make(metrics=[wrong]).fit(1)
    assert "validation batch 0" in notes(caught.value) and "wrong" in [entry.name for entry in caught.traceback]
    with pytest.raises(ValueError, match="average it"): make(metrics=[lambda p, y: p]).fit(1)


@pytest.mark.parametrize("n, error", [(1.5, "integer"), ("3", "integer"), (None, "integer")])
def test_bad_n(n, error):
    with pytest.raises(TypeError, match=error): make().fit(n)


def test_classes_where_objects_are_wanted():
    with pytest.raises(TypeError, match=r"pass CrossEntropyLoss\(\)"): make(loss_func=nn.CrossEntropyLoss)
    with pytest.raises(TypeError, match="Count.*Metric objects"): make(metrics=[Count])
    with pytest.raises(TypeError, match="opt_func is a ready-made Adam: give the class"): make(opt_func=torch.optim.Adam(model().parameters()))
    with pytest.raises(AttributeError, match="param_groups"): make(opt_func=lambda params, lr: None).fit(1)


def test_the_way_up_is_known_or_asked_for():
    down, up = ("valid_loss", "my_loss", "error_rate", "rmse", "mae", "mse", "perplexity", "wer"), ("accuracy", "top5_accuracy", "f1", "Dice")
    assert all(map(L.lower_is_better, down)) and not any(map(L.lower_is_better, up))
    with pytest.raises(ValueError, match="mode='min'"): L.lower_is_better("temperature")
    assert L.lower_is_better("temperature", [L.Mean(accuracy, "temperature", lower_is_better=True)])


def test_streams_have_no_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            for x, y in batches(): yield from zip(x, y)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=8)
    learn = make([Recorder(), Progress("terminal")], L.DataLoaders(loader, loader)); learn.fit(2)
    assert len(learn.history) == 2 and "valid_loss" in learn.validate(loader)


# --- what one sees ---------------------------------------------------------------------------------------------------------

def test_rows_are_shown_unless_quiet(capsys):
    make(quiet=False, metrics=[accuracy]).fit(2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split() == ["epoch", "train_loss", "valid_loss", "accuracy", "seconds"] and lines[2].split()[0] == "1"
    make().fit(2); assert capsys.readouterr().out == ""
    make([Progress("log")], quiet=False).fit(1); assert len(capsys.readouterr().out.splitlines()) == 2, "not twice"


def test_a_cancelled_epoch_keeps_its_columns(capsys):
    learn = make([At("after_batch", raises(L.CancelEpoch()))], quiet=False, metrics=[accuracy])
    learn.fit(2)
    header, first, second = capsys.readouterr().out.splitlines()
    ends = [header.index(name) + len(name) for name in header.split()]
    assert [first[e-1] != " " for e in ends] == [True, True, False, False, True] and all(second[e-1] != " " for e in ends)
    assert list(learn.history[0]) == ["epoch", "train_loss", "seconds"]


def test_print_helps():
    text = repr(make([Recorder()], metrics=[accuracy], splitter=split, lr=[.01, .1]))
    for word in ("Sequential", "47", "train 3 batches", "cross_entropy", "accuracy", "Recorder", "cpu"): assert word in text


# --- memory ------------------------------------------------------------------------------------------------------------------

def test_nothing_is_kept_alive():
    import gc
    seen = []
    class Watch(L.Callback):
        def after_batch(self, learn): seen.extend(map(weakref.ref, (learn.xb, learn.pred, learn.loss)))
    dls = L.DataLoaders(DataLoader(TensorDataset(*data()), 16), DataLoader(TensorDataset(*data()), 16))
    watch = Watch()
    learn = make([Recorder()], dls)
    learn.fit(2, cbs=[watch, Progress("log")])
    gc.collect()
    assert len(seen) == 36 and not [r for r in seen if r() is not None]
    ref = weakref.ref(watch)
    del watch; gc.collect()
    assert ref() is None, "a callback of one fit is let go after it"


def test_tensors_do_not_pile_up():
    import gc
    learn = make([Recorder()], dls_with_chance(), metrics=[accuracy])
    def count(): gc.collect(); return sum(torch.is_tensor(o) for o in gc.get_objects())
    learn.fit(2); two = count()
    learn.fit(10); assert count() <= two + 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda learn: pickle.loads(pickle.dumps(learn))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("opt_func", [SGD, torch.optim.AdamW])
def test_a_learner_can_be_copied(copied, opt_func):
    learn = make([Recorder(), EMA(.5), GradientAccumulation(2)], metrics=[accuracy, Count()], opt_func=opt_func, splitter=split, lr=[.01, .1])
    learn.freeze_to(-1); learn.fit(1, .2)
    twin = copied(learn)
    kept = weights(twin)
    assert twin.model is not learn.model and history(twin) == history(learn) and [g["lr"] for g in twin.groups] == [g["lr"] for g in learn.groups]
    learn.fit(2); assert equal(kept, weights(twin)), "nothing is shared"
    twin.fit(2); learn.unfreeze(); twin.unfreeze(); learn.fit(1); twin.fit(1)
    assert equal(weights(learn), weights(twin)) and history(learn) == history(twin) and not equal(kept[:1], weights(twin)[:1])
    assert twin.cb(Recorder).losses == learn.cb(Recorder).losses and twin.predict().equal(learn.predict())


def test_import_is_light():
    code = "import exp.learner, sys; print([m for m in ('matplotlib', 'fastprogress', 'IPython', 'pandas') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert out[0] == "[]"                                # the time it takes is measured by `make bench`


# --- what a fresh engineer found ----------------------------------------------------------------------------------------------

def test_a_cancel_in_a_nested_validation_ends_the_fit():
    learn = make([ValidateEvery(1), At("after_loss", raises(L.CancelFit()), n=1, mode="validate")]); learn.fit(3)
    assert not learn.fitting and learn.epoch == 0 and learn.mode is None
    learn.fit(1)
    with pytest.raises(RuntimeError, match="CancelFit was raised where"): make([At("after_loss", raises(L.CancelFit()), mode="validate")]).validate()


@pytest.mark.parametrize("splitter, n", [(None, -1), (None, 1), (split, 2), (split, -2), (split, 5)])
def test_freezing_nothing_or_all_is_refused(splitter, n):
    learn = make(splitter=splitter)
    with pytest.raises(ValueError, match=rf"n is {n} for {2 if splitter else 1} group\(s\) of parameters: a splitter"): learn.freeze_to(n)
    assert all(p.requires_grad for p in learn.model.parameters())


def test_a_second_rate_counts_with_a_scheduler_of_pytorch(tmp_path):
    class Scheduler(L.Callback):
        def before_fit(self, learn): self.one = torch.optim.lr_scheduler.LambdaLR(learn.opt, lambda step: .5)
        def before_batch(self, learn): rates.append(learn.groups[0]["lr"])
    learn, rates = make(opt_func=torch.optim.SGD), []
    learn.fit(1, .1, cbs=Scheduler()); learn.fit(1, .4, cbs=[Scheduler(), At("after_epoch", lambda learn: learn.save(tmp_path/"a.pt"), mode=None)])
    assert rates[0] == .05 and rates[-1] == .2 and "initial_lr" not in learn.groups[0]
    assert "initial_lr" not in make(opt_func=torch.optim.SGD).load(tmp_path/"a.pt").groups[0]


@pytest.mark.parametrize("empty", [False, True])
def test_a_batch_of_no_weight_adds_nothing(empty):
    def nothing(learn): learn.weight = 0
    x, y = data(16)
    dls = L.DataLoaders([(x, y), (x[:0], y[:0])], [(x[:0], y[:0]), (x, y)]) if empty else None
    learn = make([] if empty else [At("before_batch", nothing, n=1), At("before_batch", nothing, mode="validate")], dls, metrics=accuracy)
    learn.fit(1)
    assert all(np.isfinite(v) for v in learn.history[0].values()) and len(learn.history[0]) == 5
    assert L.Learner(learn.model, (dls or learn.dls), cross_entropy, quiet=True, device="cpu").validate([(x, y)])["valid_loss"] > 0


def test_stepped_speaks_of_this_batch_even_around_a_validation():
    stepped, heard = [], []
    class Note(L.Callback):
        order = 99
        def after_step(self, learn): heard.append(learn.stepped)
        def after_batch(self, learn): stepped.append(learn.stepped) if learn.training else None
    make([Note(), ValidateEvery(1), At("after_loss", raises(L.CancelBatch()), n=1)]).fit(1)
    assert stepped == [True, False, True] and heard == [True, True]


def test_copies_begin_outside_any_fit():
    def bad(learn): raise ZeroDivisionError
    learn = make(At("after_loss", bad, n=1))
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    assert learn.xb is not None and copy.deepcopy(learn).xb is None
    copies = []
    learn = make(); learn.fit(1, cbs=At("after_epoch", lambda learn: copies.append(copy.deepcopy(learn)), mode=None))
    assert not copies[0].fitting and copies[0].mode is None
    copies[0].fit(1)
    copies = []
    learn.fit(1, cbs=At("after_loss", lambda learn: copies.append(copy.copy(learn))))
    assert copies[0].depth == 0 and copies[0].loss is None


def test_predict_gathers_by_rows_or_by_items():
    class Detect(nn.Module):
        def forward(self, x): return [torch.zeros(int(n), 4) for n in x[:, 0]]
    net = Detect(); net.p = nn.Parameter(torch.zeros(()))
    def boxes(*counts, bs): return make(net=net).predict([(x, None) for x in torch.tensor(counts).float()[:, None].split(bs)])
    for counts, bs in (((2, 2, 3, 1), 2), ((1, 3, 2), 1), ((2, 2, 1, 2), 2)):
        assert [len(b) for b in boxes(*counts, bs=bs)] == [*counts]
    class Two(nn.Linear):
        def forward(self, x): return [x, super().forward(x)]
    a, b = make(net=Two(6, 2)).predict([(data(4)[0][:1], None)]*3)
    assert len(a) == len(b) == 3


def test_training_counts_where_its_validation_was_cut():
    learn = make(At("before_batch", raises(L.CancelEpoch()), mode="validate")); learn.fit(1)
    assert learn.epochs_done == 1 and not learn.epoch_complete
    learn = make(At("before_batch", raises(L.CancelEpoch()))); learn.fit(1)
    assert learn.epochs_done == 0


def test_when_all_is_cancelled_nothing_is_measured():
    class Never(L.Callback):
        def before_batch(self, learn): raise L.CancelBatch
    with pytest.raises(ValueError, match="nothing to measure"): make(Never()).validate()
    with pytest.raises(ValueError, match="nothing to predict"): make(Never()).predict()


def test_a_reset_that_fails_leaves_no_metric_in_use():
    class Bad(L.Metric):
        name = "bad"
        def reset(self): raise ZeroDivisionError
    good = L.Mean(accuracy)
    with pytest.raises(ZeroDivisionError): make(metrics=[good, Bad()]).validate()
    assert not good.in_use


def test_generators_of_numpy_and_under_other_names():
    class Owner:
        def __init__(self, seed): self.rng, self.mine, self.dataset = np.random.default_rng(seed), torch.Generator().manual_seed(seed), None
    owner, inner = Owner(0), Owner(1)
    owner.dataset = inner
    assert len(L.generators(owner)) == 4
    def draw(): return [x for o in (owner, inner) for x in (o.rng.random(), torch.rand(1, generator=o.mine).item())]
    with L.same_randomness(owner): first = draw()
    assert first == draw() != draw()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_zero_grad_may_come_first(n):
    class First(L.Learner):
        def train_batch(self):
            self.zero_grad()
            self.backward(self.get_loss(self.forward(self.xb), self.yb))
            self.step()
    kit = [GradientAccumulation(n)] if n > 1 else []
    last = make(list(kit)); last.fit(2)
    first = First(model(), L.DataLoaders(batches(), batches(24)), cross_entropy, lr=.1, cbs=kit, quiet=True, device="cpu"); first.fit(2)
    assert equal(weights(first), weights(last))


# --- the last reading --------------------------------------------------------------------------------------------------------

class Output(collections.OrderedDict):
    "As models of `transformers` give: entries are attributes, too, and update is forbidden."
    def __setitem__(self, name, value): super().__setitem__(name, value); super().__setattr__(name, value)
    def update(self, *args, **kwargs): raise TypeError("no update here")


def test_outputs_that_forbid_update_are_predicted():
    class Net(nn.Linear):
        def forward(self, x): out = Output(); out["logits"] = super().forward(x); return out
    learn = make(net=Net(6, 2), loss_func=lambda pred, yb: cross_entropy(pred.logits, yb)); learn.fit(1)
    got = learn.predict()
    assert type(got) is Output and got.logits is got["logits"] and got.logits.shape == (24, 2)


@pytest.mark.parametrize("make_one", [random.Random, np.random.RandomState, np.random.default_rng, torch.Generator().manual_seed], ids=["python", "numpy", "numpy's new", "torch"])
def test_generators_of_every_kind_are_put_back(make_one):
    class Owner: rng = None
    owner = Owner(); owner.rng = make_one(3)
    def draw(): return torch.rand(1, generator=owner.rng).item() if isinstance(owner.rng, torch.Generator) else owner.rng.random()
    with L.same_randomness(owner): first = [draw() for _ in range(3)]
    state = L.plain(L.random_state(owner))
    assert first == [draw() for _ in range(3)] and draw() != first[0]
    L.set_random_state(state, owner); assert first == [draw() for _ in range(3)]


def test_what_is_set_on_a_learner_later_counts():
    learn = make(lr=.1); learn.lr = .2; assert rates(learn) == [.2]
    learn.fit(1); learn.lr = .5; learn.fit(1); assert rates(learn) == [.5] and learn.lr == .5
    learn.opt_func = torch.optim.AdamW
    with pytest.warns(UserWarning, match="opt_func .* exchanged: .* at lr 0.5"): learn.fit(1)
    assert type(learn.opt) is torch.optim.AdamW and rates(learn) == [.5]
    learn.splitter = split
    with pytest.warns(UserWarning, match="splitter were exchanged"): learn.freeze_to(-1)
    assert [p.requires_grad for p in learn.model.parameters()] == [False, False, True, True]


def test_a_rate_that_nobody_chose_does_not_outlive_its_optimizer():
    for chosen, rate in ((None, .001), (.01, .01)):
        learn = make(lr=None); learn.fit(1, lr=chosen); learn.opt_func = torch.optim.Adam
        with pytest.warns(UserWarning, match=f"at lr {rate}"): learn.fit(1)
        assert rates(learn) == [rate]
    learn = make(lr=None); learn.fit(1, lr=.01); learn.splitter = split
    with pytest.warns(UserWarning, match="at lr 0.01, 0.01"): learn.fit(1)


@pytest.mark.parametrize("way", ["learn.step", "opt.step"])
def test_a_step_of_ones_own_is_the_only_one(way):
    class Usual(L.Learner):
        def train_batch(self):
            self.zero_grad(); self.backward(self.get_loss(self.forward(self.xb), self.yb))
            if way == "opt.step": self.opt.step()
            else: self.step()
    learn = Usual(model(), L.DataLoaders(batches()), cross_entropy, torch.optim.SGD, .1, quiet=True, device="cpu")
    learn.fit(2)
    net = model(); opt = torch.optim.SGD(net.parameters(), .1)
    for x, y in 2*batches(): opt.zero_grad(); cross_entropy(net(x), y).backward(); opt.step()
    assert equal(weights(learn), [*net.parameters()])


def test_a_loader_that_fails_does_not_blame_the_batch_before():
    def some():
        yield from batches()[:2]
        raise OSError("a bad disk")
    class Dl:
        def __iter__(self): return some()
    learn = make(dls=L.DataLoaders(Dl()))
    with pytest.raises(OSError) as caught: learn.fit(1)
    assert "training after batch 1" in notes(caught.value) and "xb" not in notes(caught.value) and learn.xb is None
    with pytest.raises(TypeError, match="gave int") as caught: make(dls=L.DataLoaders([*batches()[:1], 3])).fit(1)
    assert "training after batch 0" in notes(caught.value)


def test_of_troubles_the_worst_goes_on():
    "An error before a cancel, the first error, the stronger cancel."
    def end(*troubles):
        learn = make([At("after_batch", raises(trouble), mode="train", order=i) for i, trouble in enumerate(troubles)])
        try: learn.fit(2)
        except ArithmeticError as error: return type(error)
        return len(learn.history)
    assert end(L.CancelFit(), ZeroDivisionError(), OverflowError()) is ZeroDivisionError
    assert end(L.CancelBatch(), L.CancelFit(), L.CancelEpoch()) == 1 and end(L.CancelEpoch()) == 2


def test_what_cannot_be_trained_or_measured_is_said():
    with pytest.raises(ValueError, match="n is -1: give a number of epochs"): make().fit(-1)
    with pytest.raises(TypeError, match="model is function: give an nn.Module"): L.Learner(lambda x: x, L.DataLoaders(batches()), cross_entropy)
    with pytest.raises(ValueError, match="Callback is not among"): make().remove_cb(L.Callback())
    with pytest.raises(ValueError, match="lr has 3 rates for 1 groups"): make().set_lr([.1, .2, .3])


def test_a_schedule_in_the_place_of_a_rate_is_named():
    with pytest.raises(TypeError, match=r"lr is a schedule: give it to ParamScheduler\(lr=…\)"): make().fit(1, lr=lambda position: .1)

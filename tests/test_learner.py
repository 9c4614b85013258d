"exp.learner: agreement with a loop by hand, the written table of events, and every accident."
import os
import random
import signal
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
from torch import nn

from exp import learner as L
from exp.training import SGD, DataLoader, Linear, ReLU, Sequential, TensorDataset, accuracy, cross_entropy


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def batches(n=40, bs=16): x, y = data(n); return [(x[i:i+bs], y[i:i+bs]) for i in range(0, n, bs)]


def loaders(bs=16): return L.DataLoaders(DataLoader(TensorDataset(*data()), bs, shuffle=True), DataLoader(TensorDataset(*data(24, 1)), bs))


def make(cbs=(), dls=None, **kwargs): return L.Learner(model(), dls or L.DataLoaders(batches(), batches(24)), cross_entropy, cbs=cbs, **kwargs)


def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]


def equal(a, b): return all(torch.equal(p, q) for p, q in zip(a, b))


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


def test_our_own_modules_fit():
    torch.manual_seed(0)
    learn = L.Learner(Sequential(Linear(6, 5), ReLU(), Linear(5, 2)), loaders(), cross_entropy, lr=.5, metrics=[accuracy])
    learn.fit(15)
    assert learn.history[-1]["accuracy"] > .8 > .2 and learn.history[-1]["train_loss"] < learn.history[0]["train_loss"]


def test_averages_are_by_item():
    learn = make(metrics=[accuracy])
    values = learn.validate()
    x, y = data(24)
    with torch.no_grad(): pred = learn.model(x)
    assert values["valid_loss"] == pytest.approx(F.cross_entropy(pred, y).item(), abs=1e-6)
    assert values["accuracy"] == pytest.approx((pred.argmax(1) == y).float().mean().item(), abs=1e-6)
    assert torch.allclose(learn.predict(), pred) and torch.allclose(learn.predict(x), pred)
    assert torch.allclose(learn.predict([xb for xb, _ in batches(24)]), pred)


def test_a_metric_that_is_no_average():
    class Count(L.Metric):
        name = "count"
        def reset(self): self.n = 0
        def add(self, pred, yb): self.n += len(yb)
        def value(self): return self.n
    assert make(metrics=[Count()]).validate()["count"] == 24


def test_second_fit_goes_on_and_lr_is_the_one_asked_for():
    seen = []
    class Rate(L.Callback):
        def after_step(self, learn): seen.append(learn.opt.param_groups[0]["lr"])
    learn = make([Rate()], lr=.3)
    learn.fit(1); learn.fit(1, lr=.2); learn.fit(1)
    assert seen == [.3]*3 + [.2]*3 + [.3]*3


def test_no_validation_loader(): learn = make(dls=L.DataLoaders(batches())); learn.fit(1); assert "valid_loss" not in learn.history[0]


# --- the written table ---------------------------------------------------------------------------------------------------

class Spy(L.Callback):
    def __init__(self, name, order, log, cuts): self.name, self.order, self.log, self.cuts = name, order, log, dict(cuts)
    def hear(self, event, learn):
        at = (event, sum(e == event and n == self.name for n, e in self.log))
        self.log.append((self.name, event))
        if at in self.cuts: raise self.cuts[at]
for _event in L.EVENTS: setattr(Spy, _event, lambda self, learn, event=_event: self.hear(event, learn))

PHASES = {"fit": L.CancelFit, "epoch": L.CancelEpoch, "train": (), "validate": (), "batch": L.CancelBatch}


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
        raised = []
        try: fire(f"before_{name}"); body()
        except L.Cancel as c: raised.append(c)
        for spy in spies:
            try: tell(spy, f"after_{name}")
            except L.Cancel as c: raised.append(c)
        if raised:
            worst = max(raised, key=lambda c: c.rank)
            if not isinstance(worst, PHASES[name]): raise worst
    def batch(training):
        for event in ("after_pred", "after_loss", *(("after_backward", "after_step") if training else ())): fire(event)
    def passing(name, n):
        def body():
            for _ in range(n): phase("batch", lambda: batch(name == "train"))
        phase(name, body)
    def epochs():
        for _ in range(n_epochs): phase("epoch", lambda: (passing("train", n_train), passing("validate", n_valid)))
    stray = False
    try: phase("fit", epochs)
    except L.Cancel: stray = True
    return log, stray


cut = st.tuples(st.tuples(st.sampled_from(L.EVENTS), st.integers(0, 3)), st.sampled_from([L.CancelBatch, L.CancelEpoch, L.CancelFit]))
spy_spec = st.tuples(st.integers(-2, 2), st.lists(cut, max_size=2))


@settings(max_examples=150)
@given(st.lists(spy_spec, min_size=1, max_size=3), st.integers(0, 2))
def test_events_follow_the_table(specs, n_epochs):
    plan = [Spy(i, order, [], cuts) for i, (order, cuts) in enumerate(specs)]
    want, stray = expected(plan, n_epochs, 3, 2)
    log = []
    learn = make([Spy(i, order, log, cuts) for i, (order, cuts) in enumerate(specs)])
    try: learn.fit(n_epochs); raised = False
    except L.LearnerError as error: raised = True; assert "cancel" in str(error)
    assert log == want and raised == stray


def test_order_is_stable_and_callbacks_can_come_and_go():
    log = []
    a, b, c = Spy("a", 1, log, {}), Spy("b", 0, log, {}), Spy("c", 1, log, {})
    learn = make([a, b, c])
    learn.fit(0)
    assert [n for n, _ in log] == list("bacbac")
    learn.remove_cb(b)
    log.clear(); learn.fit(0, cbs=[b]); assert [n for n, _ in log] == list("bacbac")
    log.clear(); learn.fit(0); assert [n for n, _ in log] == list("acac")
    with pytest.raises(ValueError, match="not among"): learn.remove_cb(b)
    assert learn.cb(Spy) is a
    with pytest.raises(ValueError, match="no Recorder"): learn.cb(L.Recorder)


@pytest.mark.parametrize("cb, words", [(L.Recorder, "pass Recorder"), (3, "is no callback"), (object(), "is no callback")])
def test_what_is_no_callback_is_refused(cb, words):
    with pytest.raises(TypeError, match=words): make([cb])


def test_misspelt_events_are_refused():
    class Typo(L.Callback):
        def after_lost(self, learn): pass
    with pytest.raises(TypeError, match="did you mean after_loss"): make([Typo()])


def test_any_object_with_an_event_will_do():
    class Plain:
        n = 0
        def after_batch(self, learn): self.n += 1
    cb = Plain()
    make(cb).fit(2)
    assert cb.n == 2*(3 + 2)


# --- accidents -----------------------------------------------------------------------------------------------------------

class Raise(L.Callback):
    def __init__(self, event, error): self.error = error; setattr(self, "event", event)
for _event in L.EVENTS:
    def _maybe(self, learn, event=_event):
        if self.event == event and self.error is not None: error, self.error = self.error, None; raise error
    setattr(Raise, _event, _maybe)


@pytest.mark.parametrize("event", L.EVENTS)
@pytest.mark.parametrize("training", [True, False])
def test_ctrl_c_leaves_the_learner_usable(event, training):
    log = []
    learn = make([Raise(event, KeyboardInterrupt()), Spy("s", 0, log, {})])
    learn.model.train(training)
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    assert learn.model.training is training and torch.is_grad_enabled()
    assert learn.xb is None and learn.loss is None and ("s", "after_fit") in log
    fresh, before = make(), weights(learn)
    fresh.model.load_state_dict(learn.model.state_dict())
    learn.fit(1); fresh.fit(1)                     # no half-made gradient leaks into the next training
    assert equal(weights(learn), weights(fresh)) and not equal(weights(learn), before)


@pytest.mark.parametrize("event", L.EVENTS)
def test_an_error_names_callback_and_event(event):
    learn = make([Raise(event, ZeroDivisionError("oh"))])
    with pytest.raises(L.LearnerError, match=rf"Raise\.{event} raised ZeroDivisionError at epoch 0.*oh") as caught: learn.fit(1)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    learn.fit(1)


def test_nan_and_inf_stop_before_the_weights_are_spoilt():
    for bad in (float("nan"), float("inf")):
        good = batches()
        broken = [good[0], (good[1][0]*bad, good[1][1])]
        learn = make([L.TerminateOnNaN()], L.DataLoaders(broken))
        with pytest.raises(L.LearnerError, match=r"epoch 0, training batch 1 \(learning rate 0.25\); the last finite loss was \d\.\d+ at epoch 0, training batch 0"):
            learn.fit(1, lr=.25)
        assert all(w.isfinite().all() for w in weights(learn))


@pytest.mark.parametrize("train, words", [
    ([], "gave no batch"), ([torch.randn(4, 6)]*2, "yields pairs"), ([(1, 2, 3)], "yields pairs"), ([7], "yields pairs"),
    ([(torch.randn(4, 5), torch.zeros(4).long())], r"training batch 0 failed with xb \(4, 5\) float32, yb \(4,\) int64"),
    ([(torch.randn(4, 6), torch.zeros(3).long())], r"yb \(3,\) int64")])
def test_bad_batches_are_named(train, words):
    with pytest.raises(L.LearnerError, match=words): make(dls=L.DataLoaders(train)).fit(1)


def test_used_up_iterators_are_named():
    with pytest.raises(L.LearnerError, match="used up"): make(dls=L.DataLoaders(iter(batches()))).fit(2)


def test_bad_loss_and_metric_are_named():
    learn = L.Learner(model(), L.DataLoaders(batches(), batches()), partial(F.cross_entropy, reduction="none"))
    with pytest.raises(L.LearnerError, match=r"loss_func returned shape \(16,\)"): learn.fit(1)
    def wrong(pred, yb): raise IndexError("nope")
    with pytest.raises(L.LearnerError, match="metric wrong failed at epoch 0, validation batch 0.*nope"): make(metrics=[wrong]).fit(1)


@pytest.mark.parametrize("n", [-1, 1.5, "3"])
def test_bad_n_epochs(n):
    with pytest.raises(ValueError, match="n_epochs"): make().fit(n)


def test_bad_arguments_of_callbacks():
    with pytest.raises(ValueError, match="max_norm is 0"): L.GradientClip(0)
    with pytest.raises(ValueError, match="n_batches is 0"): L.GradientAccumulation(0)
    with pytest.raises(ValueError, match="mode is 'up'"): L.EarlyStopping(mode="up")
    with pytest.raises(L.LearnerError, match="watches 'f1', but an epoch has epoch, train_loss"): make([L.EarlyStopping("f1")]).fit(1)


# --- callbacks -------------------------------------------------------------------------------------------------------------

@given(st.integers(1, 6), st.integers(3, 17))
def test_accumulation_equals_the_large_batch(n, bs):
    x, y = data(37)
    pieces = [(x[i:i+bs], y[i:i+bs]) for i in range(0, 37, bs)]
    groups = [pieces[i:i+n] for i in range(0, len(pieces), n)]
    whole = [tuple(map(torch.cat, zip(*g))) for g in groups]
    small, large = make([L.GradientAccumulation(n)], L.DataLoaders(pieces)), make(dls=L.DataLoaders(whole))
    small.fit(2); large.fit(2)
    for a, b in zip(weights(small), weights(large)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_accumulation_skips_the_step_only():
    log = []
    make([L.GradientAccumulation(2), Spy("s", 0, log, {})], L.DataLoaders(batches(64))).fit(1)
    heard = [e for _, e in log]
    assert heard.count("after_backward") == heard.count("after_batch") == 4 and heard.count("after_step") == 2


def test_clip_matches_pytorch():
    class Keep(L.Callback):
        order = 99
        def after_backward(self, learn): self.grads = [p.grad.clone() for p in learn.model.parameters()]
    for max_norm in (.01, 1e6):
        keep = Keep()
        make([L.GradientClip(max_norm), keep], L.DataLoaders(batches()[:1])).fit(1)
        m = model()
        F.cross_entropy(m(batches()[0][0]), batches()[0][1]).backward()
        nn.utils.clip_grad_norm_(m.parameters(), max_norm)
        for a, p in zip(keep.grads, m.parameters()): torch.testing.assert_close(a, p.grad, rtol=1e-5, atol=1e-8)


def test_recorder_keeps_every_batch_and_draws():
    import matplotlib.pyplot as plt
    rec = L.Recorder()
    learn = make([rec], opt_func=partial(torch.optim.SGD, momentum=.9))
    learn.fit(2)
    assert len(rec.losses) == len(rec.lrs) == 6 and rec.momenta == [.9]*6 and [n for n, _ in rec.valid] == [3, 6]
    assert sum(loss*size for loss, size in zip(rec.losses[:3], (16, 16, 8)))/40 == pytest.approx(learn.history[0]["train_loss"], abs=1e-6)
    assert rec.plot_loss(smooth=0).get_lines()[0].get_ydata().tolist() == pytest.approx(rec.losses)
    rec.plot_sched(); plt.close("all")


def test_early_stopping_and_mode():
    scripted = iter([.5, .4, .41, .42, .3])
    class Script(L.Callback):
        order = -99
        def after_epoch(self, learn): learn.values["valid_loss"] = next(scripted)
    learn = make([Script(), L.EarlyStopping(patience=2)])
    learn.fit(9)
    assert len(learn.history) == 4
    assert L.EarlyStopping("accuracy").sign == 1 and L.EarlyStopping("my_loss").sign == -1 and L.EarlyStopping("error", mode="min").sign == -1


def test_progress_rows_and_silence(capsys):
    make([L.Progress()], metrics=[accuracy]).fit(1)
    assert capsys.readouterr().out == "", "a pipe stays quiet"
    make([L.Progress(style="terminal")], metrics=[accuracy]).fit(2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split() == ["epoch", "train_loss", "valid_loss", "accuracy", "seconds"] and lines[2].split()[0] == "1"


def test_csv_log(tmp_path):
    learn = make([L.CSVLogger(tmp_path/"log.csv")])
    learn.fit(2); learn.fit(1)
    assert len((tmp_path/"log.csv").read_text().splitlines()) == 2


def test_device_moves_nested_batches():
    batch = L.to_device(({"a": torch.ones(2)}, [torch.zeros(1), "word"]), "cpu")
    assert batch[0]["a"].device.type == "cpu" and batch[1][1] == "word"
    make([L.DeviceCB("cpu")]).fit(1)


# --- checkpoints -------------------------------------------------------------------------------------------------------------

class Cut(L.Callback):
    def __init__(self, epoch, event): self.epoch = epoch; self.event = event
    def after_step(self, learn):
        if learn.epoch == self.epoch and self.event == "after_step": raise KeyboardInterrupt
    def after_validate(self, learn):
        if learn.epoch == self.epoch and self.event == "after_validate": raise KeyboardInterrupt


def run(folder, seed=0, resume=None, extra=(), n=4, opt_func=partial(torch.optim.SGD, momentum=.9)):
    drop = nn.Sequential(*model(seed), nn.Dropout(.3))
    learn = L.Learner(drop, loaders(), cross_entropy, opt_func, lr=.1)
    learn.fit(n, cbs=[L.Recorder(), L.EarlyStopping(patience=50), L.SaveCheckpoint(folder), *extra], resume=resume)
    return learn


@pytest.mark.parametrize("epoch, event", [(1, "after_step"), (2, "after_validate"), (3, "after_step")])
@pytest.mark.parametrize("opt_func", [SGD, partial(torch.optim.SGD, momentum=.9), torch.optim.AdamW])
def test_resume_is_bit_identical(tmp_path, epoch, event, opt_func):
    calm = run(tmp_path/"calm", opt_func=opt_func)
    with pytest.raises(KeyboardInterrupt): run(tmp_path/"cut", extra=[Cut(epoch, event)], opt_func=opt_func)
    random.seed(5); np.random.seed(5); torch.manual_seed(5)
    resumed = run(tmp_path/"cut", seed=9, resume=tmp_path/"cut"/"last.pt", opt_func=opt_func)
    assert equal(weights(calm), weights(resumed))
    strip = [{k: v for k, v in h.items() if k != "seconds"} for h in calm.history]
    assert strip == [{k: v for k, v in h.items() if k != "seconds"} for h in resumed.history]


CHILD = """
import sys; sys.path[:0] = [{tests!r}]
import torch, time
torch.set_num_threads(1)
import test_learner as t
class Slow(t.L.Callback):
    def after_step(self, learn):
        if learn.epoch == 2: print("now", flush=True); time.sleep(60)
t.run({folder!r}, extra=[Slow()])
"""


def test_kill_9_then_resume(tmp_path):
    folder = tmp_path/"killed"
    child = subprocess.Popen([sys.executable, "-c", CHILD.format(tests=os.path.dirname(__file__), folder=str(folder))], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline().strip() == "now"
    child.send_signal(signal.SIGKILL); child.wait()
    assert sorted(p.name for p in folder.iterdir()) == ["best.pt", "last.pt"]
    assert equal(weights(run(tmp_path/"calm")), weights(run(folder, seed=3, resume=folder/"last.pt")))


def test_a_cancelled_epoch_is_no_checkpoint(tmp_path):
    class Half(L.Callback):
        def after_step(self, learn):
            if learn.epoch == 1: raise L.CancelFit
    learn = make([L.SaveCheckpoint(tmp_path), Half()])
    learn.fit(3)
    assert L.read_checkpoint(tmp_path/"last.pt")["epochs_done"] == 1


def test_best_is_kept(tmp_path):
    scripted = iter([.5, .3, .4])
    class Script(L.Callback):
        order = -99
        def after_epoch(self, learn): learn.values["valid_loss"] = next(scripted)
    make([Script(), L.SaveCheckpoint(tmp_path)]).fit(3)
    assert L.read_checkpoint(tmp_path/"best.pt")["epochs_done"] == 2 and L.read_checkpoint(tmp_path/"last.pt")["epochs_done"] == 3


def test_save_and_load_round_trip(tmp_path):
    learn = make(opt_func=torch.optim.AdamW, lr=.01)
    learn.fit(1)
    learn.save(tmp_path/"a"/"b.pt")
    other = make(opt_func=torch.optim.AdamW, lr=.01)
    other.model = model(7)
    other.load(tmp_path/"a"/"b.pt")
    assert equal(weights(learn), weights(other))
    learn.fit(1, lr=.01); other.fit(1, lr=.01)
    assert equal(weights(learn), weights(other)), "the optimizer's memory came along"


class Evil:
    def __reduce__(self): return os.system, ("touch HACKED",)


def test_bad_checkpoints_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = make(); learn.fit(1)
    good = learn.save("good.pt")
    (tmp_path/"torn.pt").write_bytes(good.read_bytes()[:-200]); (tmp_path/"empty.pt").write_bytes(b""); (tmp_path/"text.pt").write_text("hello")
    torch.save({"model": Evil()}, "evil.pt"); torch.save([1], "list.pt")
    L.Learner(nn.Linear(6, 2), None, None).save("other.pt")
    L.Learner(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), None, None).save("narrow.pt")
    before = weights(learn)
    cases = {"torn.pt": "truncated|pickled", "empty.pt": "truncated|pickled", "text.pt": "truncated|pickled", "evil.pt": "pickled code", "list.pt": "no checkpoint",
             "other.pt": "lacks.*0.weight", "narrow.pt": r"0.weight is \(4, 6\) there, \(5, 6\) here"}
    for name, words in cases.items():
        for attempt in (lambda: learn.load(name), lambda: learn.fit(2, resume=name)):
            with pytest.raises(L.LearnerError, match=words): attempt()
            assert equal(weights(learn), before), name
    with pytest.raises(FileNotFoundError, match="was an epoch finished"): learn.load("none.pt")
    assert not (tmp_path/"HACKED").exists()


def test_resume_wants_the_same_callbacks(tmp_path):
    make([L.SaveCheckpoint(tmp_path)]).fit(1)
    with pytest.raises(L.LearnerError, match="resume with the callbacks"): make().fit(2, resume=tmp_path/"last.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    learn = make(); learn.fit(1)
    path = learn.save(tmp_path/"a.pt")
    old = path.read_bytes()
    def full(*args): args[1].write(b"half"); raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError): learn.save(path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


# --- memory ------------------------------------------------------------------------------------------------------------------

def test_nothing_is_kept_alive():
    import gc
    seen = []
    class Watch(L.Callback):
        def after_batch(self, learn): seen.extend(map(weakref.ref, (learn.xb, learn.pred, learn.loss)))
    dls = L.DataLoaders(DataLoader(TensorDataset(*data()), 16), DataLoader(TensorDataset(*data()), 16))
    watch = Watch()
    learn = make([L.Recorder()], dls)
    learn.fit(2, cbs=[watch, L.Progress(style="quiet"), L.GradientClip(1.)])
    gc.collect()
    assert len(seen) == 36 and not [r for r in seen if r() is not None]
    ref = weakref.ref(watch)
    del watch; gc.collect()
    assert ref() is None, "a callback of one fit is let go after it"


def test_tensors_do_not_pile_up():
    import gc
    learn = make([L.Recorder(), L.Progress(style="quiet")], loaders(), metrics=[accuracy])
    def count(): gc.collect(); return sum(torch.is_tensor(o) for o in gc.get_objects())
    learn.fit(2); two = count()
    learn.fit(10); assert count() <= two + 2


def test_import_is_light():
    code = "import exp.learner, sys; print([m for m in ('matplotlib', 'fastprogress', 'IPython', 'pandas') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert out[0] == "[]"                                # the time it takes is measured by `make bench`

"exp.callbacks: accumulation, clipping, averages, stopping, logging, and what a NaN is explained with."
import copy
import csv
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import data
from hypothesis import given, strategies as st
from learners import At, batches, equal, make, model, raises, weights
from torch import nn

from exp import callbacks as C
from exp import learner as L
from exp.checkpoints import SaveCheckpoint
from exp.learner import Progress
from exp.training import accuracy


class Script(L.Metric):
    "A metric that says what it is told."
    def __init__(self, values, name="valid_score"): self.values, self.name = iter(values), name
    def add(self, pred, yb, weight): pass
    def value(self): return next(self.values)


def scripted(values, cb, name="score", **kwargs):
    learn = make(cb, metrics=[Script(values, name)], **kwargs)
    learn.fit(len(values))
    return learn


# --- gradients -------------------------------------------------------------------------------------------------------------

@given(st.integers(1, 6), st.integers(3, 17))
def test_accumulation_equals_the_large_batch(n, bs):
    x, y = data(37)
    pieces = [(x[i:i+bs], y[i:i+bs]) for i in range(0, 37, bs)]
    groups = [pieces[i:i+n] for i in range(0, len(pieces), n)]
    whole = [tuple(map(torch.cat, zip(*g))) for g in groups]
    small, large = make([C.GradientAccumulation(n)], L.DataLoaders(pieces)), make(dls=L.DataLoaders(whole))
    small.fit(2); large.fit(2)
    for a, b in zip(weights(small), weights(large)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert small.history[-1]["train_loss"] == pytest.approx(large.history[-1]["train_loss"], rel=1e-2)


class Grads(L.Callback):
    order = 99
    def before_step(self, learn): self.grads = [p.grad.clone() for p in learn.model.parameters() if p.grad is not None]


def test_clip_matches_pytorch():
    for max_norm in (.01, 1e6):
        keep = Grads()
        make([C.GradientClip(max_norm), keep], L.DataLoaders(batches()[:1])).fit(1)
        m = model()
        F.cross_entropy(m(batches()[0][0]), batches()[0][1]).backward()
        nn.utils.clip_grad_norm_(m.parameters(), max_norm)
        for a, p in zip(keep.grads, m.parameters()): torch.testing.assert_close(a, p.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_clip_in_half_precision_does_not_overflow(dtype):
    net = nn.Linear(600, 1, dtype=dtype)
    class Big(L.Callback):
        order = -99
        def before_step(self, learn):
            for p in net.parameters(): p.grad.fill_(300.)
    keep, clip = Grads(), C.GradientClip(1.)
    xb = torch.ones(2, 600, dtype=dtype)
    make([Big(), clip, keep], L.DataLoaders([(xb, None)]), net, loss_func=lambda p, y: p.float().mean()).fit(1)
    assert clip.norm.item() == pytest.approx(300*601**.5, rel=1e-2)
    assert sum(g.float().square().sum() for g in keep.grads).sqrt().item() == pytest.approx(1, rel=2e-2)


def test_clip_takes_the_optimizers_parameters_and_may_find_none():
    only_bias = make(C.GradientClip(1e-3), opt_func=lambda params, lr: torch.optim.SGD(params[-1:], lr))
    keep = Grads(); only_bias.fit(1, cbs=keep)
    assert keep.grads[0].norm() > 1e-3 > keep.grads[-1].norm()*.999
    class Freeze(L.Callback):
        def before_step(self, learn):
            for p in learn.model.parameters(): p.grad = None
    make([Freeze(), C.GradientClip(1.)]).fit(1)


# --- the recorder and the log -------------------------------------------------------------------------------------------------

def test_recorder_keeps_every_batch_and_draws():
    import matplotlib.pyplot as plt
    rec = C.Recorder()
    learn = make([rec], opt_func=partial(torch.optim.SGD, momentum=.9))
    learn.fit(2)
    assert len(rec.losses) == len(rec.lrs) == 6 and rec.momenta == [.9]*6 and [n for n, _ in rec.valid] == [3, 6]
    assert sum(loss*size for loss, size in zip(rec.losses[:3], (16, 16, 8)))/40 == pytest.approx(learn.history[0]["train_loss"], abs=1e-6)
    assert rec.plot_loss(smooth=0).get_lines()[0].get_ydata().tolist() == pytest.approx(rec.losses)
    rec.plot_sched(); plt.close("all")


def test_recorder_knows_all_groups_and_keeps_numbers():
    rec = C.Recorder()
    class InPlace(L.Callback):
        def after_batch(self, learn):
            if learn.training: learn.groups[-1]["lr"].mul_(.5)
    opt = lambda groups, lr: torch.optim.SGD([dict(g, lr=torch.tensor(g["lr"])) for g in groups], torch.tensor(lr))
    make([rec, InPlace()], splitter=lambda net: [net[0].parameters(), net[2].parameters()], lr=[.1, .2], opt_func=opt).fit(1)
    assert rec.all_lrs == [pytest.approx([.1, .2*.5**i]) for i in range(3)] and rec.lrs == [row[-1] for row in rec.all_lrs]


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file: return list(csv.DictReader(file))


def test_csv_log(tmp_path):
    learn = make([C.CSVLogger(tmp_path/"log.csv")], metrics=[accuracy])
    learn.fit(2); assert len(rows_of(tmp_path/"log.csv")) == 2
    learn.fit(1); assert len(rows_of(tmp_path/"log.csv")) == 1
    learn = make([C.CSVLogger(tmp_path/"cut.csv"), At("after_batch", raises(L.CancelEpoch()), n=1)], metrics=[accuracy]); learn.fit(3)
    rows = rows_of(tmp_path/"cut.csv")
    assert [r["accuracy"] == "" for r in rows] == [True, False, False] and all(float(r["seconds"]) >= 0 for r in rows)
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_csv_log_after_resume_holds_each_epoch_once(tmp_path):
    def run(n, **kwargs): make([C.CSVLogger(tmp_path/"log.csv"), SaveCheckpoint(tmp_path)]).fit(n, **kwargs)
    run(2); run(4, resume=tmp_path/"last.pt")
    assert [r["epoch"] for r in rows_of(tmp_path/"log.csv")] == list("0123")


# --- NaN -----------------------------------------------------------------------------------------------------------------------

def test_nan_and_inf_stop_before_the_weights_are_spoilt():
    for bad in (float("nan"), float("inf")):
        good = batches()
        broken = good[1][0].clone(); broken[3, 2] = bad
        learn = make([C.TerminateOnNaN()], L.DataLoaders([good[0], (broken, good[1][1])]))
        with pytest.raises(FloatingPointError, match=r"at epoch 0, training batch 1; last finite: \d\.\d+ at epoch 0, training batch 0\. xb holds NaN or infinity in row 3:"): learn.fit(1)
        assert all(w.isfinite().all() for w in weights(learn)) and torch.equal(learn.xb.isfinite(), broken.isfinite()), "kept to be looked at"


def test_nan_is_traced_to_its_source():
    def why(**kwargs):
        learn = make([C.TerminateOnNaN()], **kwargs)
        with pytest.raises(FloatingPointError) as caught: learn.fit(1, .5)
        return str(caught.value)
    poisoned = model(); poisoned[2].weight.data[0, 0] = float("nan")
    assert "weights 2.weight are not finite" in why(net=poisoned) and "learning rate 0.5" in why(net=poisoned)
    class Log(nn.Module):
        def forward(self, x): return (x*0 - 1).log()
    assert "Layer '1' (Log) gives the first" in why(net=nn.Sequential(nn.Linear(6, 2), Log(), nn.Linear(2, 2)))
    assert "comes from loss_func" in why(loss_func=lambda p, y: F.cross_entropy(p, y)*float("nan"))
    x, y = batches()[0]
    assert "yb holds NaN or infinity in row 0, 5" in why(dls=L.DataLoaders([(x, torch.where(torch.arange(16) % 5 == 0, float("nan"), 1.))]), loss_func=lambda p, y: (p[:, 0] - y).square().mean())
    with pytest.raises(FloatingPointError, match="the loss is nan at validation batch 0"):
        make([C.TerminateOnNaN()], loss_func=lambda p, y: F.cross_entropy(p, y)*float("nan")).validate()


# --- best and patience -----------------------------------------------------------------------------------------------------------

def test_early_stopping_and_mode():
    assert len(scripted([.5, .4, .41, .42, .3], C.EarlyStopping("my_loss", patience=2), "my_loss").history) == 4
    assert len(scripted([.5, .4, .41, .42, .3], C.EarlyStopping("my_score", patience=2), "my_score").history) == 3
    assert len(scripted([.5, .4, .3, .2], C.EarlyStopping("error_rate", patience=1), "error_rate").history) == 4
    assert len(scripted([1., 1.05, 1.09, 1.2], C.EarlyStopping("score", patience=2, min_delta=.1)).history) == 3
    class Up(Script): lower_is_better = False
    learn = make(C.EarlyStopping("strange", patience=1), metrics=[Up([.1, .2, .3, .2], "strange")]); learn.fit(9)
    assert len(learn.history) == 4
    with pytest.raises(ValueError, match="lower_is_better"): scripted([1.], C.EarlyStopping("strange"), "strange")


def test_nan_is_never_the_best():
    nan = float("nan")
    assert len(scripted([nan, 3., 2., 1., .5, .4], C.EarlyStopping("score_loss", patience=2), "score_loss").history) == 6
    assert len(scripted([nan]*6, C.EarlyStopping("score", patience=2)).history) == 2


def test_a_watched_value_must_be_there():
    with pytest.raises(ValueError, match="watches 'f1', but a row has epoch, train_loss"): make([C.EarlyStopping("f1")]).fit(1)
    for bad, words in ((lambda: C.EarlyStopping(mode="up"), "mode is 'up'"), (lambda: C.GradientClip(0), "max_norm is 0"), (lambda: C.EMA(1.), "decay is 1"),
                       (lambda: C.GradientAccumulation(0), "n_batches is 0"), (lambda: C.ValidateEvery(0), "n is 0")):
        with pytest.raises(ValueError, match=words): bad()


def test_best_weights_come_back():
    kept = []
    class Keep(L.Callback):
        def after_epoch(self, learn): kept.append(weights(learn))
    learn = scripted([.3, .1, .2, .4], [C.EarlyStopping("my_loss", patience=2, restore_best=True), Keep()], "my_loss")
    assert equal(weights(learn), kept[1]) and not equal(kept[1], kept[-1])


def test_a_validation_inside_chooses_no_best(tmp_path):
    "Somebody measures on the test set in every epoch: 'best' is still of the validation set."
    test = batches(24, seed=5)
    class Look(L.Callback):
        order = 99
        def after_epoch(self, learn): learn.validate(test)
    values = []
    for cbs in ([], [Look()]):
        learn = make([SaveCheckpoint(tmp_path/str(len(cbs))), C.EarlyStopping(patience=2), *cbs]); learn.fit(4)
        values.append((learn.cb(SaveCheckpoint).kept, learn.cb(C.EarlyStopping).best, len(learn.history)))
    assert values[0] == values[1]


def test_validate_every():
    learn = make([C.ValidateEvery(2), C.EarlyStopping(patience=50), C.Recorder()], L.DataLoaders(batches(40, 8), batches(24)), metrics=[accuracy])
    learn.fit(2)
    assert [row.get("step") for row in learn.history] == [2, 4, None, 6, 8, 10, None] and all("accuracy" in row for row in learn.history)
    calm = make(dls=learn.dls); calm.fit(2)
    assert equal(weights(calm), weights(learn)) and learn.cb(C.EarlyStopping).best == min(row["valid_loss"] for row in learn.history)
    stop = make([C.ValidateEvery(1), C.EarlyStopping("valid_loss", patience=1, min_delta=1e9)], learn.dls); stop.fit(3)
    assert len(stop.history) == 3 and stop.history[1]["step"] == 2, "stopped in the middle of the epoch"


# --- EMA -------------------------------------------------------------------------------------------------------------------------

def test_ema_averages_after_each_taken_step():
    class Skip(L.Callback):
        def before_step(self, learn): learn.skip_step = learn.batch == 1
    seen, ema = [], C.EMA(.7)
    class Keep(L.Callback):
        order = 30
        def after_step(self, learn): seen.append((learn.stepped, weights(learn)))
    learn = make([ema, Skip(), Keep()]); want = weights(learn)
    learn.fit(2)
    for stepped, now in seen:
        if stepped: want = [.7*a + .3*b for a, b in zip(want, now)]
    for a, name in zip(want, dict(learn.model.named_parameters())): torch.testing.assert_close(ema.average[name], a)


def test_validate_and_predict_see_the_average_and_training_does_not():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    plain, with_ema = make(net=copy.deepcopy(net)), make([C.EMA(.5)], net=net)
    plain.fit(2); with_ema.fit(2)
    assert equal(weights(plain), weights(with_ema)) and torch.equal(plain.model[1].running_mean, net[1].running_mean)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for name, t in [*twin.named_parameters(), *twin.named_buffers()]: t.copy_(with_ema.cb(C.EMA).average[name])
    assert torch.allclose(with_ema.predict(), make(net=twin).predict(), atol=1e-7)
    assert with_ema.history[-1]["valid_loss"] == pytest.approx(make(net=twin).validate()["valid_loss"], rel=1e-6) != plain.history[-1]["valid_loss"]
    with_ema.add_cb(At("after_pred", raises(ZeroDivisionError()), mode="validate"))
    with pytest.raises(ZeroDivisionError): with_ema.validate()
    assert equal(weights(plain), weights(with_ema)), "given back after an error, too"


def test_ema_of_half_precision_does_not_stand_still():
    net = nn.Linear(4, 1, dtype=torch.bfloat16); ema = C.EMA(.999)
    learn = make(ema, L.DataLoaders([(torch.ones(2, 4, dtype=torch.bfloat16), None)]*20), net, loss_func=lambda p, y: p.float().mean())
    before = net.weight.detach().float().clone(); learn.fit(1)
    assert ema.average["weight"].dtype == torch.float32 and not torch.equal(ema.average["weight"], before)
    assert learn.predict(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_ema_with_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__(); torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6); self.b.weight = self.a.weight; self.out = nn.Linear(6, 2)
        def forward(self, x): return self.out(self.b(self.a(x).relu()))
    learn, calm = make(C.EMA(.5), net=Tied()), make(net=Tied())
    learn.fit(2); calm.fit(2); learn.predict()
    assert equal(weights(learn), weights(calm)) and learn.model.a.weight is learn.model.b.weight


def test_an_average_of_other_weights_is_forgotten(tmp_path):
    "Weights set from outside are what validation sees: by load, by restore_best, by an exchanged layer, by another learner."
    def own(learn): return make(net=copy.deepcopy(learn.model)).validate()["valid_loss"]
    learn = make(C.EMA(.5)); learn.fit(3, cbs=SaveCheckpoint(tmp_path)); learn.fit(2, 1.)
    learn.load(tmp_path/"best.pt")
    assert learn.validate()["valid_loss"] == pytest.approx(own(learn), rel=1e-6)
    learn = make([C.EMA(.5), C.EarlyStopping("train_loss", mode="max", patience=2, restore_best=True)]); learn.fit(6)
    assert learn.validate()["valid_loss"] == pytest.approx(own(learn), rel=1e-6)
    learn.model[2] = nn.Linear(5, 3)
    assert learn.predict(torch.ones(2, 6)).shape == (2, 3) and learn.cb(C.EMA).users == 0
    ema = C.EMA(.9); make(ema).fit(3, 3.); learn = make(ema, net=model(5)); learn.fit(1)
    fresh = make(C.EMA(.9), net=model(5)); fresh.fit(1)
    assert learn.history[0]["valid_loss"] == fresh.history[0]["valid_loss"]
    with pytest.raises(ValueError, match="two EMAs"): make([C.EMA(.9), C.EMA(.99)]).fit(1)


def test_the_model_is_on_its_device_before_anything_is_made_of_it():
    places = []
    class Look(L.Callback):
        def before_fit(self, learn):
            places.append(next(learn.model.parameters()).device.type)
            raise L.CancelFit
    make([Look(), C.EMA(.9)], device="meta").fit(1)
    assert places == ["meta"]
    assert make(device="meta").opt.param_groups[0]["params"][0].device.type == "meta"


def test_two_backwards_and_one_step_are_one_batch():
    class Twice(L.Learner):
        def train_batch(self):
            for _ in range(2): self.backward(self.get_loss(self.forward(self.xb), self.yb))
            self.step(); self.zero_grad()
    a, b = (Twice(model(), L.DataLoaders(batches()), F.cross_entropy, lr=.1, cbs=cbs, quiet=True, device="cpu") for cbs in ([], [C.GradientAccumulation(1)]))
    a.fit(1); b.fit(1)
    for p, q in zip(weights(a), weights(b)): torch.testing.assert_close(p, q)
    two = make(C.GradientAccumulation(2), opt_func=lambda p, lr: {"a": torch.optim.SGD(p[:1], lr), "b": torch.optim.SGD(p[1:], lr)})
    with pytest.raises(ValueError, match="step in turn"): two.fit(1)


def test_recorder_notes_the_rate_that_was_used():
    class Halve(L.Callback):
        def after_step(self, learn): learn.groups[0]["lr"] /= 2
    rec = C.Recorder(); make([rec, Halve()], lr=.1).fit(1)
    assert rec.lrs == [.1, .05, .025]


def test_callbacks_can_be_added_in_the_middle():
    learn = make(); ema, stop = C.EMA(.5), C.EarlyStopping()
    learn.add_cb(At("after_batch", lambda learn: learn.add_cb(ema) and learn.add_cb(stop)))
    learn.fit(2)
    assert ema.average and stop.best is not None


def test_progress_is_here_too():
    assert C.Progress is Progress


def test_orders_stand_in_one_table():
    "The lesson's table lists every callback with its order."
    import re
    from house import NBS, read, source
    text = "\n".join(source(c) for c in read(NBS/"05a_callback_kit.ipynb")["cells"])
    table = {m[1]: int(m[2].replace("−", "-")) for m in re.finditer(r"^\| *([−-]?\d+) *\| *`(\w+)`", text, flags=re.M) for m in [(None, m[2], m[1])]}
    from exp.schedule import ParamScheduler
    have = {c.__name__: c.order for c in (C.Recorder, C.TerminateOnNaN, C.GradientAccumulation, C.GradientClip, C.EMA, Progress, C.CSVLogger, C.ValidateEvery, C.EarlyStopping, SaveCheckpoint, ParamScheduler)}
    assert table.items() >= have.items()



"exp.callbacks: accumulation, clipping, averages, stopping, logging, and what a NaN is explained with."
import copy
import csv
import pickle
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
from exp.learner import Progress, read_checkpoint
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

class Cut(L.Callback):
    "Cancels these batches at these events, and skips these steps."
    def __init__(self, cancels=(), skips=(), error=L.CancelBatch):
        self.cancels, self.skips, self.error, self.steps = dict(cancels), skips, error, 0
    def _at(self, learn, event):
        if learn.training and self.cancels.get(learn.batch) == event: raise self.error
    def after_pred(self, learn): self._at(learn, "after_pred")
    def after_loss(self, learn): self._at(learn, "after_loss")
    def after_backward(self, learn): self._at(learn, "after_backward")
    def before_step(self, learn):
        learn.skip_step = self.steps in self.skips
        self.steps += 1


EVENTS = ("after_pred", "after_loss", "after_backward")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 4), st.dictionaries(st.integers(0, 7), st.sampled_from(EVENTS)), st.sets(st.integers(0, 5)))
def test_accumulation_is_one_step_with_the_joint_batch(sizes, n, cancels, skips):
    "Uneven batches, cancelled batches (before backward: not counted; after: the window is dropped), skipped steps, a short last window."
    x, y = data(sum(sizes)); pieces = list(zip(x.double().split(sizes), y.split(sizes)))
    momentum = partial(torch.optim.SGD, momentum=.9)
    net = model().double(); by_hand = copy.deepcopy(net)
    learn = make([Cut(cancels, skips), C.GradientAccumulation(n)], L.DataLoaders(pieces), net, opt_func=momentum)
    learn.fit(2)
    opt, steps = momentum(by_hand.parameters(), lr=.1), 0
    def step(window):
        nonlocal steps
        xb, yb = map(torch.cat, zip(*window))
        opt.zero_grad(); F.cross_entropy(by_hand(xb), yb).backward()
        if steps not in skips: opt.step()
        steps += 1; window.clear()
    for _ in range(2):
        window = []
        for i, piece in enumerate(pieces):
            if cancels.get(i) == "after_backward": window.clear()
            elif i not in cancels:
                window.append(piece)
                if len(window) == n: step(window)
        if window: step(window)
    for a, b in zip(net.parameters(), by_hand.parameters()): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in net.parameters()) and not learn.window and not learn.accumulating


@pytest.mark.parametrize("length", [2, 3, 7])
def test_accumulation_asks_no_length(length):
    "A loader that is longer or shorter than its len() gives the same steps."
    class Odd(list):
        def __len__(self): return length
    runs = []
    for dl in (batches(40, 8), Odd(batches(40, 8))):
        learn = make(C.GradientAccumulation(3), L.DataLoaders(dl)); learn.fit(2); runs.append(weights(learn))
    assert equal(*runs)


def test_a_second_loss_is_no_second_batch():
    class Twice(L.Learner):
        def train_batch(self):
            for _ in range(2): self.backward(self.get_loss(self.forward(self.xb), self.yb))
            self.step(); self.zero_grad()
    class Windows(L.Callback):
        def before_fit(self, learn): self.seen = []
        def before_step(self, learn): self.seen.append([*learn.window])
    windows = Windows()
    Twice(model(), L.DataLoaders(batches()), F.cross_entropy, lr=.1, cbs=[C.GradientAccumulation(2), windows], quiet=True, device="cpu").fit(1)
    assert windows.seen == [[16, 16], [8]]


class Alternate(L.Learner):
    "Each optimizer steps by itself, one after the other."
    def train_batch(self):
        for opt in self.opts.values():
            self.backward(self.get_loss(self.forward(self.xb), self.yb))
            self.step(opt)
            self.zero_grad()


def two_opts(params, lr): return {"body": torch.optim.SGD(params[:2], lr), "head": torch.optim.SGD(params[2:], lr)}
def alternate(cbs): return Alternate(model(), L.DataLoaders(batches(), batches(24)), F.cross_entropy, two_opts, .1, cbs, quiet=True, device="cpu")


def test_several_optimizers_accumulate_within_a_batch_only():
    one, plain = alternate(C.GradientAccumulation(1)), alternate([])
    one.fit(2); plain.fit(2)
    for a, b in zip(weights(one), weights(plain)): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="step in turn"): alternate(C.GradientAccumulation(2)).fit(1)


def test_one_of_a_kind_is_enough():
    for cb in (C.EMA, C.GradientAccumulation):
        with pytest.raises(ValueError, match=f"two {cb.__name__}s"): make([cb(.9 if cb is C.EMA else 2)]).fit(1, cbs=cb(.5 if cb is C.EMA else 3))


def test_a_window_without_weight_is_no_nan():
    class Nothing(L.Callback):
        order = -30
        def after_pred(self, learn): learn.weight = 0
    learn = make([C.GradientAccumulation(2), Nothing()], L.DataLoaders(batches())); before = weights(learn)
    learn.fit(1)
    assert equal(before, weights(learn))


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


@pytest.mark.parametrize("bad", [0., float("inf"), -float("inf"), float("nan"), 1e30])
def test_clip_of_what_cannot_be_clipped_is_pytorchs(bad):
    net = nn.Linear(3, 2)
    class Spoil(L.Callback):
        order = -99
        def before_step(self, learn): net.weight.grad[0, 1] = bad; net.bias.grad.fill_(bad and 1.)
    keep, clip = Grads(), C.GradientClip(.5)
    make([Spoil(), clip, keep], L.DataLoaders([(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))]), net, lr=0.).fit(1)
    for p in net.parameters(): p.grad = torch.zeros_like(p)
    net.weight.grad[0, 1] = bad; net.bias.grad.fill_(bad and 1.)
    norm = nn.utils.clip_grad_norm_(net.parameters(), .5)
    torch.testing.assert_close(clip.norm, norm, equal_nan=True)
    for a, p in zip(keep.grads, net.parameters()): torch.testing.assert_close(a, p.grad, equal_nan=True, rtol=1e-5, atol=1e-8)


def test_clip_and_accumulation_take_sparse_gradients():
    runs = []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 2))
        x, y = torch.randint(0, 9, (18, 2)), torch.randint(0, 2, (18,))
        learn = make([C.GradientAccumulation(2), C.GradientClip(.1), grads := Grads()], L.DataLoaders([*zip(x.split(5), y.split(5))]), net)
        learn.fit(2); runs.append((weights(learn), learn.cb(C.GradientClip).norm))
        assert grads.grads[0].is_sparse == sparse
    for a, b in zip(runs[0][0], runs[1][0]): torch.testing.assert_close(a, b)
    torch.testing.assert_close(runs[0][1], runs[1][1])


def test_each_optimizer_is_clipped_by_itself():
    class Norms(L.Callback):
        order = 99
        def before_fit(self, learn): self.seen = []
        def before_step(self, learn): self.seen.append((len(learn.params()), torch.stack([p.grad.norm() for p in learn.params()]).norm().item()))
    norms = Norms()
    alternate([C.GradientClip(.01), norms]).fit(1)
    assert [n for n, _ in norms.seen] == [2]*6 and [norm for _, norm in norms.seen] == pytest.approx([.01]*6, rel=1e-3)
    joint = Norms(); make([C.GradientClip(.01), joint], opt_func=two_opts).fit(1)
    assert joint.seen == [(4, pytest.approx(.01, rel=1e-3))]*3


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


def test_csv_log_of_rows_between(tmp_path):
    learn = make([C.CSVLogger(tmp_path/"deep"/"log.csv"), C.ValidateEvery(2)], L.DataLoaders(batches(40, 8), batches(24))); learn.fit(2)
    rows = rows_of(tmp_path/"deep"/"log.csv")
    assert [row["step"] for row in rows] == ["2", "4", "", "6", "8", ""]
    for row, want in zip(rows, learn.history): assert {k: v for k, v in row.items() if v} == {k: str(v) for k, v in want.items()}


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


class Away(nn.Module):
    "Makes NaN of what is finite; in a tuple, as recurrent layers do."
    def forward(self, x, state=None): return x.log1p()*0 + (x*0 - 1).sqrt(), (x, x)


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__(); torch.manual_seed(0)
        self.kind, self.first, self.last = kind, nn.Linear(6, 6), nn.Linear(6, 2)
        self.rnn, self.norm = Away(), nn.BatchNorm1d(6)
        if kind == "buffer": self.norm.running_var[2] = float("nan")
    def forward(self, a=None, b=None):
        x = self.first(a if b is None else a + b)
        if self.kind == "tuple": x = self.rnn(x, state=None)[0]
        if self.kind == "own": x = (x*0 - 1).log()
        if self.kind == "buffer": x = self.norm(x)
        return self.last(x)


def explained(net, dls=None, call=lambda learn: learn.fit(1), **kwargs):
    with pytest.raises(FloatingPointError) as caught: call(make(C.TerminateOnNaN(), dls, net, **kwargs))
    return str(caught.value)


def test_the_layer_named_is_the_one_that_did_it():
    assert "Layer 'rnn' (Away) gives the first" in explained(Net("tuple"))
    assert "The model itself (Net) gives the first" in explained(Net("own")), "not the layer that was handed a NaN"
    words = explained(Net("buffer"), call=lambda learn: learn.validate())
    assert "Layer 'norm' (BatchNorm1d) gives the first" in words and "its running_var is not finite" in words


def test_bad_rows_of_several_inputs():
    (x, y), good = batches(16)[0], torch.ones(16, 6)
    broken = x.clone(); broken[9, 1] = float("inf"); broken[12] = float("nan")
    for xb in ((good, broken), {"a": broken, "b": good}, [broken, broken]):
        assert "xb holds NaN or infinity in row 9, 12:" in explained(Net("none"), L.DataLoaders([(xb, y)]))
    assert "row 0, 1, 2, 3, 4, …:" in explained(Net("none"), L.DataLoaders([(x*float("nan"), y)]))


def test_a_batch_of_nothing_is_blamed_on_the_loss():
    assert "comes from loss_func" in explained(None, L.DataLoaders([(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))]))


def test_a_mask_is_not_blamed_and_chance_is_thought_of():
    class Masked(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(6, 2); self.register_buffer("mask", torch.full((2,), -torch.inf))
        def forward(self, x): return (self.lin(x) + self.mask).softmax(-1)
    words = explained(Masked())
    assert "(Masked) gives the first value that is not finite" in words and "its mask" not in words
    class Once(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(6, 2); self.calls = 0
        def forward(self, x):
            self.calls += 1
            return self.lin(x)*(torch.nan if self.calls == 1 else 1.)
    assert "Run again, the model gives finite outputs, so it comes from loss_func" in (words := explained(Once())) and "or from chance, as in dropout" in words


def test_a_model_that_cannot_be_copied_or_run_alone_is_said():
    net = model(); net.extra = net[0].weight*1
    words = explained(net, loss_func=lambda p, y: F.cross_entropy(p, y)*float("nan"))
    assert "which layer it is could not be found out" in words and "the loss is nan" in words


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


def test_early_stopping_says_so_unless_quiet(capsys):
    for quiet in (False, True):
        scripted([.5, .4, .41, .42, .3], C.EarlyStopping("my_loss", patience=2), "my_loss", quiet=quiet)
        assert ("no better my_loss for 2 rows" in capsys.readouterr().out) is not quiet


def test_nan_is_never_the_best():
    nan = float("nan")
    assert len(scripted([nan, 3., 2., 1., .5, .4], C.EarlyStopping("score_loss", patience=2), "score_loss").history) == 6
    assert len(scripted([nan]*6, C.EarlyStopping("score", patience=2)).history) == 2


def test_a_watched_value_must_be_there():
    with pytest.raises(ValueError, match="watches 'f1', but a row has epoch, train_loss"): make([C.EarlyStopping("f1")]).fit(1)
    for bad, words in ((lambda: C.EarlyStopping(mode="up"), "mode is 'up'"), (lambda: C.GradientClip(0), "max_norm is 0"), (lambda: C.EMA(1.), "decay is 1")):
        with pytest.raises(ValueError, match=words): bad()


def test_best_weights_come_back():
    kept = []
    class Keep(L.Callback):
        def after_epoch(self, learn): kept.append(weights(learn))
    learn = scripted([.3, .1, .2, .4], [C.EarlyStopping("my_loss", patience=2, restore_best=True), Keep()], "my_loss")
    assert equal(weights(learn), kept[1]) and not equal(kept[1], kept[-1])


@pytest.mark.parametrize("error, caught", [(L.CancelFit(), None), (KeyboardInterrupt(), KeyboardInterrupt), (ZeroDivisionError(), ZeroDivisionError)])
@pytest.mark.parametrize("averaged", [False, True])
def test_best_weights_come_back_however_it_ends_and_are_those_that_were_measured(error, caught, averaged):
    kept, ema = [], C.EMA(.6)
    class Keep(L.Callback):
        order = 90
        def after_epoch(self, learn): kept.append([x.clone() for x in ema.average.values()] if averaged else weights(learn))
    learn = make([C.EarlyStopping("my_loss", patience=9, restore_best=True), Keep(), At("after_backward", raises(error), n=10), *[ema]*averaged],
                 metrics=[Script([.3, .1, .2], "my_loss")])
    if caught:
        with pytest.raises(caught): learn.fit(9)
    else: learn.fit(9)
    assert equal(weights(learn), kept[1]) and len(learn.history) == 3 + (caught is None)


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
    assert [row.get("step") for row in learn.history] == [2, 4, None, 6, 8, None] and all("accuracy" in row for row in learn.history)
    calm = make(dls=learn.dls); calm.fit(2)
    assert equal(weights(calm), weights(learn)) and learn.cb(C.EarlyStopping).best == min(row["valid_loss"] for row in learn.history)
    stop = make([C.ValidateEvery(1), C.EarlyStopping("valid_loss", patience=1, min_delta=1e9)], learn.dls); stop.fit(3)
    assert len(stop.history) == 3 and stop.history[1]["step"] == 2, "stopped in the middle of the epoch"


def test_patience_does_not_count_the_same_look_twice():
    "The last step of an epoch is left to the epoch's own row, also in the step that flushes a window."
    for cbs in ([C.ValidateEvery(3)], [C.ValidateEvery(2), C.GradientAccumulation(2)]):
        learn = make([*cbs, C.EarlyStopping(patience=1)]); learn.fit(4)
        assert len(learn.history) == 4 and all("step" not in row for row in learn.history)
    with pytest.raises(ValueError, match="no validation loader"): make(C.ValidateEvery(3), L.DataLoaders(batches())).fit(1)


def test_the_best_between_epochs_is_kept_as_it_was(tmp_path):
    "ValidateEvery, EarlyStopping and SaveCheckpoint together: the best row's weights are those of its step."
    seen = {}
    class Keep(L.Callback):
        order = 66
        def after_step(self, learn): seen[learn.cb(C.ValidateEvery).steps] = weights(learn)
    learn = make([C.ValidateEvery(2), Keep(), C.EarlyStopping("score", patience=2, restore_best=True), SaveCheckpoint(tmp_path, "score")],
                 L.DataLoaders(batches(40, 8), batches(24)), metrics=[Script([.1, .2, .3, .9, .5, .4], "score")])
    learn.fit(5)
    assert [row.get("step") for row in learn.history] == [2, 4, None, 6, 8, None]
    best = read_checkpoint(tmp_path/"best.pt")["model"]
    assert equal(weights(learn), seen[6]) and equal([best[name] for name, _ in learn.model.named_parameters()], seen[6])


def test_a_best_of_one_thing_is_not_resumed_as_a_best_of_another(tmp_path):
    def watch(*names): return [C.EarlyStopping(name, patience=9, restore_best=True) for name in names]
    make([*watch("valid_loss", "accuracy"), SaveCheckpoint(tmp_path)], metrics=accuracy).fit(2)
    with pytest.raises(ValueError, match=r"callbacks of the first run: .*EarlyStopping\(accuracy\).* not .*EarlyStopping\(train_loss\)"):
        make([*watch("valid_loss", "train_loss"), SaveCheckpoint(tmp_path)], metrics=accuracy).fit(3, resume=tmp_path/"last.pt")
    for names in (["valid_loss", "accuracy"], ["accuracy", "valid_loss"]):
        learn = make([*(cbs := watch(*names)), SaveCheckpoint(tmp_path/names[0])], metrics=accuracy); learn.fit(3, resume=tmp_path/"last.pt")
        lowest, highest = min(row["valid_loss"] for row in learn.history), max(row["accuracy"] for row in learn.history)
        assert {cb.monitor: cb.best for cb in cbs} == {"valid_loss": lowest, "accuracy": highest}


def test_who_comes_in_the_middle_judges_no_old_row():
    stop = C.EarlyStopping("valid_loss", restore_best=True)
    learn = make([C.ValidateEvery(1)], L.DataLoaders(batches(40, 8), batches(24)))
    learn.add_cb(At("after_backward", lambda learn: learn.add_cb(stop), n=7))        # in the third batch of epoch 1
    judged = []
    stop.judge = lambda learn, value: judged.append(value)
    learn.fit(3)
    assert judged == [row["valid_loss"] for row in learn.history if row["epoch"] == 2] and len(judged) == 5


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
        for name, t in twin.named_parameters(): t.copy_(with_ema.cb(C.EMA).average[name])      # buffers are the model's own
    assert torch.allclose(with_ema.predict(), make(net=twin).predict(), atol=1e-7)
    assert with_ema.history[-1]["valid_loss"] == pytest.approx(make(net=twin).validate()["valid_loss"], rel=1e-6) != plain.history[-1]["valid_loss"]
    with_ema.add_cb(At("after_pred", raises(ZeroDivisionError()), mode="validate"))
    with pytest.raises(ZeroDivisionError): with_ema.validate()
    assert equal(weights(plain), weights(with_ema)), "given back after an error, too"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [lambda learn: learn.validate(), lambda learn: learn.predict()])
def test_the_average_goes_out_again_whatever_fails(call, error):
    ema = C.EMA(.5); learn = make(ema); learn.fit(2)
    own, average = weights(learn), [x.clone() for x in ema.average.values()]
    for event in ("before_pass", "before_batch", "after_pred", "after_batch", "after_pass"):
        for order in (-99, 99):
            learn.add_cb(bad := At(event, raises(error()), mode=None, order=order))
            with pytest.raises(error): call(learn)
            learn.remove_cb(bad)
            assert equal(own, weights(learn)) and ema.users == 0 and equal(average, [*ema.average.values()])


def test_the_average_stays_in_while_passes_are_nested():
    ema = C.EMA(.5); learn = make(ema); learn.fit(2)
    own, average, x, inner = weights(learn), [x.clone() for x in ema.average.values()], torch.ones(2, 6), []
    def look(learn):
        inner.append(learn.predict(x))
        assert equal(average, weights(learn))
    looking = At("after_pred", look, mode="validate")
    outer = learn.add_cb(looking).validate()
    learn.remove_cb(looking)
    assert equal(own, weights(learn)) and torch.equal(inner[0], learn.predict(x)) and outer == learn.validate()


def test_looking_in_the_middle_of_a_batch_disturbs_no_training():
    calm = make(C.EMA(.5)); calm.fit(2)
    for event in ("before_batch", "after_pred", "after_loss", "after_backward", "before_step", "after_step", "after_batch"):
        learn = make([C.EMA(.5), At(event, lambda learn: learn.validate(), n=2), At(event, lambda learn: learn.predict(), n=4)]); learn.fit(2)
        assert equal(weights(calm), weights(learn)) and calm.history[-1]["valid_loss"] == learn.history[-1]["valid_loss"], event
        assert equal([*calm.cb(C.EMA).average.values()], [*learn.cb(C.EMA).average.values()])


def test_ema_with_two_optimizers_averages_after_each_taken_step():
    seen, ema = [], C.EMA(.8)
    class Keep(L.Callback):
        order = 30
        def before_step(self, learn): learn.skip_step = len(seen) == 3
        def after_step(self, learn): seen.append((learn.stepped, weights(learn)))
    learn = alternate([ema, Keep()]); want = weights(learn)
    learn.fit(1)
    for stepped, now in seen:
        if stepped: want = [.8*a + .2*b for a, b in zip(want, now)]
    assert [stepped for stepped, _ in seen] == [True]*3 + [False] + [True]*2
    for a, b in zip(want, ema.average.values()): torch.testing.assert_close(a, b)


def test_ema_does_not_mind_a_buffer_that_is_exchanged():
    class Count(nn.Module):
        def __init__(self):
            super().__init__(); torch.manual_seed(0)
            self.lin = nn.Linear(6, 2); self.register_buffer("n", torch.zeros(()))
        def forward(self, x):
            if self.training: self.n = self.n + 1
            return self.lin(x)
    ema = C.EMA(.5); learn = make(ema, net=Count()); learn.fit(1); calm = make(net=Count()); calm.fit(1)
    learn.predict()
    assert ema.average and learn.model.n == 3 and learn.history[0]["valid_loss"] != calm.history[0]["valid_loss"]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda learn: pickle.loads(pickle.dumps(learn))])
def test_copies_keep_their_average(twin):
    learn = make(C.EMA(.9)); learn.fit(2)
    other = twin(learn)
    assert other.validate() == learn.validate() and other.cb(C.EMA).average and equal(weights(other), weights(learn))
    assert not any(a is b for a in other.model.parameters() for b in learn.model.parameters())


def test_the_whole_kit_resumes_to_the_last_bit(tmp_path):
    def run(folder, n, seed=0, resume=None):
        ema, rec = C.EMA(.7), C.Recorder()
        learn = make([ema, rec, C.GradientAccumulation(2), C.GradientClip(.5), C.ValidateEvery(3), C.EarlyStopping(patience=9, restore_best=True),
                      C.TerminateOnNaN(), C.CSVLogger(folder/"log.csv"), SaveCheckpoint(folder)], L.DataLoaders(batches(72, 8), batches(24)), model(seed),
                     opt_func=partial(torch.optim.SGD, momentum=.9))
        learn.add_cb(At("after_fit", lambda learn: kept.append([x.clone() for x in ema.average.values()]), order=50))
        kept = []; learn.fit(n, resume=resume)
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in learn.history]
        return rows, kept[0], weights(learn), (rec.losses, rec.all_lrs, rec.valid), rows_of(folder/"log.csv")
    calm = run(tmp_path/"calm", 4)
    run(tmp_path/"cut", 2)
    again = run(tmp_path/"cut", 4, seed=9, resume=tmp_path/"cut"/"last.pt")
    assert calm[0] == again[0] and equal(calm[1], again[1]) and equal(calm[2], again[2]) and calm[3] == again[3]
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]   # noqa: E731
    assert drop(calm[4]) == drop(again[4])


def test_a_forgotten_average_is_not_resumed(tmp_path):
    "restore_best ends with the best weights and no average: a resumed run averages those, not what the new learner began with."
    cbs = lambda: [C.EMA(.9), C.EarlyStopping(restore_best=True)]   # noqa: E731
    learn = make(cbs()); learn.fit(2); learn.save(tmp_path/"a.pt")
    again = make(cbs(), net=model(7), lr=0.); again.fit(3, resume=tmp_path/"a.pt", lr=0.)
    assert equal(weights(learn), weights(again))
    assert again.history[-1]["valid_loss"] == pytest.approx(learn.validate()["valid_loss"], rel=1e-6)


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


@pytest.mark.parametrize("n", [1, 2, 3])
def test_gradients_may_be_forgotten_just_before_they_are_made_anew(n):
    class Usual(L.Learner):
        def train_batch(self):
            loss = self.get_loss(self.forward(self.xb), self.yb)
            self.zero_grad(); self.backward(loss); self.step()
    ours, usual = (kind(model(), L.DataLoaders(batches()), F.cross_entropy, lr=.1, cbs=C.GradientAccumulation(n), quiet=True, device="cpu")
                   for kind in (L.Learner, Usual))
    ours.fit(2); usual.fit(2)
    for p, q in zip(weights(ours), weights(usual), strict=True): assert torch.equal(p, q)


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




def test_a_parameter_of_two_optimizers_is_clipped_once():
    net = model()
    def two(params, lr): return {name: torch.optim.SGD([*net.parameters()], lr) for name in ("first", "second")}
    norms = []
    def note(learn): norms.append(torch.stack([p.grad.norm() for p in learn.params()]).norm().item()) or None
    learn = make([C.GradientClip(.01), At("before_step", note, order=90)], net=net, opt_func=two, dls=L.DataLoaders(batches(16), None))
    learn.fit(1)
    assert len(learn.params()) == 0 and len(norms) == 1 and norms[0] == pytest.approx(.01, rel=1e-3)


# --- what a fresh engineer found -------------------------------------------------------------------------------------------

def test_two_optimizers_learn_at_their_rate_with_accumulation_of_one():
    class Turns(L.Learner):
        def train_batch(self):
            for opt in self.opts.values():
                self.backward(self.get_loss(self.forward(self.xb), self.yb)); self.step(opt); self.zero_grad()
        def both(self):
            self.backward(self.get_loss(self.forward(self.xb), self.yb))
            for opt in self.opts.values(): self.step(opt); self.zero_grad(opt)
    class Both(Turns): train_batch = Turns.both
    def opts(params, lr): return {"a": torch.optim.SGD(params[:2], lr=lr), "b": torch.optim.SGD(params[2:], lr=lr)}
    for kind in (Turns, Both):
        after = []
        for cbs in ([], [C.GradientAccumulation(1)]):
            learn = kind(model(), L.DataLoaders(batches()), nn.functional.cross_entropy, opts, lr=.1, cbs=cbs, quiet=True, device="cpu")
            learn.fit(1); after.append(weights(learn))
        for p, q in zip(*after): torch.testing.assert_close(p, q)


@pytest.mark.parametrize("event, order", [("before_batch", 0), ("after_loss", -99), ("after_loss", 99), ("after_backward", 0)])
@pytest.mark.parametrize("n", [0, 1])
def test_a_recorder_notes_what_was_learnt(event, order, n):
    recorder = C.Recorder()
    make([recorder, At(event, raises(L.CancelBatch()), n=n, order=order)]).fit(1)
    assert len(recorder.losses) == len(recorder.lrs) == len(recorder.momenta) == 2


@pytest.mark.parametrize("change", ["load", "by hand", "another fit"])
def test_an_average_says_nothing_about_weights_that_were_changed(change):
    ema = C.EMA(.5)
    learn = make(ema); learn.fit(1)
    averaged = learn.validate()
    assert learn.validate() == averaged and ema.average
    twin = copy.deepcopy(learn)
    assert twin.validate() == averaged
    if change == "load": learn.model.load_state_dict(model(3).state_dict())
    elif change == "by hand":
        opt = torch.optim.SGD(learn.model.parameters(), lr=1.)
        nn.functional.cross_entropy(learn.model(batches()[0][0]), batches()[0][1]).backward(); opt.step()
    else:
        learn.remove_cb(ema); learn.fit(1); learn.add_cb(ema)
    now = learn.validate()
    learn.remove_cb(ema)
    assert now == learn.validate() != averaged


def test_a_nan_gradient_and_a_mask_of_infinity_are_thought_of():
    class Root(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(6, 2)
        def forward(self, x): return (self.lin(x)*0).sqrt() + self.lin(x)
    with pytest.raises(FloatingPointError, match=r"or its gradient was not finite \(sqrt or log at 0\)"): make(C.TerminateOnNaN(), net=Root()).fit(1)
    class Masked(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(6, 2)
        def forward(self, x, mask): return (self.lin(x) + mask.clamp(min=-1.)).log()
    class Spoilt(Masked):
        def __init__(self): super().__init__(); self.lin.bias.data[0] = float("nan")
    x, y = data(8)
    dls = L.DataLoaders([((x, torch.full((8, 1), -float("inf"))), y)])
    with pytest.raises(FloatingPointError, match="weights lin.bias are not finite"): make(C.TerminateOnNaN(), dls, Spoilt()).fit(1)
    with pytest.raises(FloatingPointError, match="xb holds NaN or infinity in row 0"): make(C.TerminateOnNaN(), dls, Masked()).fit(1)


def test_no_batch_is_no_window():
    with pytest.raises(ValueError, match="n_batches is 0"): C.GradientAccumulation(0)

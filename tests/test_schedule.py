"exp.schedule: the shapes against PyTorch's, the callback's promises, and a range test that leaves no trace."
import copy
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import data
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim import lr_scheduler as T

from exp import learner as L, schedule as S
from exp.callbacks import EMA, CSVLogger, EarlyStopping, GradientAccumulation, GradientClip, Recorder, TerminateOnNaN, ValidateEvery, read_hyper
from exp.checkpoints import SaveCheckpoint
from exp.loaders import DataLoader, TensorDataset
from exp.training import SGD, cross_entropy

share = st.floats(0, 1)
value = st.floats(-1e3, 1e3)
positive = st.floats(1e-6, 1e3)
ANNEALERS = [S.linear, S.cosine, S.poly, S.exponential]


def rates(make, n, lr=1., opt_func=partial(torch.optim.SGD, momentum=.9)):
    "Rate and momentum before each of n steps of a PyTorch scheduler."
    opt = opt_func([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, out = make(opt), []
    for _ in range(n):
        group = opt.param_groups[0]
        out.append((group["lr"], group["betas"][0] if "betas" in group else group["momentum"]))
        opt.step(); scheduler.step()
    return out


def close(schedule, theirs, n, column=0):
    for i, pair in enumerate(theirs): assert schedule(i/n) == pytest.approx(pair[column], rel=1e-9, abs=1e-12), i


# --- shapes ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", ANNEALERS)
@given(start=positive, end=positive)
def test_ends_are_exact_and_the_way_is_monotone(make, start, end):
    schedule = make(start, end)
    assert schedule(0) == start and schedule(1) == end
    values = [schedule(i/40) for i in range(41)]
    sign = 1 if end >= start else -1
    slack = 1e-9*max(start, end)
    assert all(sign*(b - a) >= -slack for a, b in zip(values, values[1:]))
    assert all(min(start, end) - slack <= v <= max(start, end) + slack and type(v) is float for v in values)


@given(value, value, share)
def test_mirror_law(a, b, p):
    for make in (S.linear, S.cosine): assert make(a, b)(p) == pytest.approx(make(b, a)(1 - p), rel=1e-9, abs=1e-9)


@given(value, share)
def test_constant_is_constant(v, p): assert S.constant(v)(p) == pytest.approx(v, rel=1e-12)


@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("ours, theirs", [
    (S.linear(1, .2), lambda o, n: T.LinearLR(o, 1., .2, n)),
    (S.linear(.1, 1), lambda o, n: T.LinearLR(o, .1, 1., n)),
    (S.cosine(1, .1), lambda o, n: T.CosineAnnealingLR(o, n, .1)),
    (S.poly(1, 0, 3), lambda o, n: T.PolynomialLR(o, n, 3)),
    (S.poly(1, 0, .5), lambda o, n: T.PolynomialLR(o, n, .5)),
    (S.exponential(1, 1e-3), lambda o, n: T.ExponentialLR(o, 1e-3**(1/n))),
    (S.constant(1), lambda o, n: T.ConstantLR(o, 1., n))])
def test_annealers_match_pytorch(ours, theirs, n): close(ours, rates(lambda o: theirs(o, n), n), n)


@pytest.mark.parametrize("climb, n", [(1, 10), (5, 60), (30, 100)])
def test_warm_up_matches_pytorch(climb, n):
    theirs = rates(lambda o: T.SequentialLR(o, [T.LinearLR(o, .04, 1., climb), T.CosineAnnealingLR(o, n - climb)], [climb]), n)
    close(S.warm_up(S.cosine(1, 0), climb/n), theirs, n)


@pytest.mark.parametrize("cycles, half", [(1, 5), (3, 10), (7, 3)])
@pytest.mark.parametrize("mode, decay", [("triangular", 1.), ("triangular2", .5)])
def test_cyclical_matches_pytorch(cycles, half, mode, decay):
    n = 2*half*cycles
    close(S.cyclical(.1, 1, cycles, decay), rates(lambda o: T.CyclicLR(o, .1, 1., half, mode=mode, cycle_momentum=False), n), n)


@pytest.mark.parametrize("first, cycles, mult", [(10, 1, 1), (7, 7, 1), (10, 3, 2), (2, 4, 3), (1, 10, 1)])
@pytest.mark.parametrize("low", [0., .1])
def test_warm_restarts_match_pytorch(first, cycles, mult, low):
    n = sum(first*mult**i for i in range(cycles))
    close(S.warm_restarts(1, low, cycles, mult), rates(lambda o: T.CosineAnnealingWarmRestarts(o, first, mult, low), n), n)


@pytest.mark.parametrize("n", [20, 101])
@pytest.mark.parametrize("pct, strategy, anneal", [(.3, "cos", S.cosine), (.5, "linear", S.linear), (.1, "cos", S.cosine)])
@pytest.mark.parametrize("opt_func", [partial(torch.optim.SGD, momentum=.9), torch.optim.AdamW])
def test_one_cycle_matches_pytorch(n, pct, strategy, anneal, opt_func):
    make = lambda o: T.OneCycleLR(o, .4, n + 1, pct_start=pct, anneal_strategy=strategy, div_factor=20., final_div_factor=500.,
                                  base_momentum=.8, max_momentum=.9)
    theirs = rates(make, n + 1, opt_func=opt_func)
    ours = S.one_cycle(.4, (pct*(n + 1) - 1)/n, anneal, True, .8, .9, 20., 500.).schedules
    close(ours["lr"], theirs, n)
    close(ours["momentum"], theirs, n, column=1)


# --- pieces in a row -------------------------------------------------------------------------------------------------------

pieces = st.lists(st.tuples(st.floats(.05, 1), value, value), min_size=1, max_size=5)


@given(pieces, share)
def test_combine_is_its_pieces(parts, q):
    total = sum(f for f, _, _ in parts)
    fractions = [f/total for f, _, _ in parts]
    whole = S.combine(fractions, [S.linear(a, b) for _, a, b in parts])
    assert whole(0) == parts[0][1] and whole(1) == pytest.approx(parts[-1][2], rel=1e-6, abs=1e-6)
    for i, (_, a, b) in enumerate(parts):
        p = min(1., sum(fractions[:i]) + q*fractions[i])
        ends = [S.linear(a, b)(q)] + ([parts[i+1][1]] if i + 1 < len(parts) and q > .999999 else [])
        assert any(whole(p) == pytest.approx(e, rel=1e-6, abs=1e-3) for e in ends)


@given(st.integers(2, 60), st.integers(1, 20))
def test_a_border_belongs_to_the_next_piece(n_pieces, per_piece):
    whole = S.combine([1/n_pieces]*n_pieces, [S.linear(1, 0)]*n_pieces)
    n = n_pieces*per_piece
    assert all(whole(i/n) == pytest.approx(1 - (i % per_piece)/per_piece, abs=1e-6) for i in range(n))


def test_the_ends():
    "At position 0 and 1, and just beyond by rounding, every schedule has the value it was told."
    for schedule, first, last in ((S.combine([1.], [S.linear(2, 5)]), 2, 5), (S.combine([.1]*10, [S.linear(1, 3)]*10), 1, 3), (S.warm_up(S.cosine(1, 0)), .04, 0),
                                  (S.cyclical(.1, 1, 7, .5), .1, .1), (S.warm_restarts(1, .2, 3, 2.), 1, .2), (S.combine([1/3]*3, [S.exponential(1, .1)]*3), 1, .1)):
        for p, want in ((0, first), (0., first), (1, last), (1., last), (1 + 1e-12, last)): assert schedule(p) == pytest.approx(want, rel=1e-12, abs=1e-15)
    cycle = S.one_cycle(.5, base_momentum=.8, max_momentum=.9, div_factor=10., final_div_factor=100.).schedules
    for p, lr, momentum in ((0, .05, .9), (.3, .5, .8), (1, 5e-4, .9)):
        assert cycle["lr"](p) == pytest.approx(lr, rel=1e-12) and cycle["momentum"](p) == pytest.approx(momentum, rel=1e-12)


def test_combine_nests():
    inner = S.combine([.5, .5], [S.linear(0, 1), S.linear(1, 2)])
    assert S.combine([.2, .8], [S.constant(0), inner])(.6) == pytest.approx(1)


@pytest.mark.parametrize("call, words", [
    (lambda: S.exponential(0, 1), "two values above 0"), (lambda: S.exponential(1, -1), "two values above 0"), (lambda: S.exponential(math.nan, 1), "two values above 0"),
    (lambda: S.combine([.5, .6], [S.constant(1)]*2), "sum to 1"), (lambda: S.combine([.5, .5], [S.constant(1)]), r"\[0.5, 0.5\] for 1 schedules"),
    (lambda: S.combine([], []), "for 0 schedules"), (lambda: S.combine([1.5, -.5], [S.constant(1)]*2), "a share above 0"),
    (lambda: S.warm_up(S.constant(1), 0), "a share above 0"), (lambda: S.warm_up(S.constant(1), 1.), "a share above 0"),
    (lambda: S.cyclical(0, 1, 0), "for 0 schedules"), (lambda: S.warm_restarts(1, n_cycles=0), "for 0 schedules"), (lambda: S.warm_restarts(1, n_cycles=2, cycle_mult=0), "a share above 0"),
    (lambda: S.one_cycle(.1, 0), "a share above 0"), (lambda: S.one_cycle(.1, 30), "a share above 0")])
def test_bad_values_are_named(call, words):
    with pytest.raises(ValueError, match=words): call()


@pytest.mark.parametrize("call, words", [
    (lambda: S.ParamScheduler(lr=.1), r"lr is 0.1: give a schedule, as constant\(0.1\)"),
    (lambda: S.ParamScheduler(lr=[S.constant(1), .1]), "lr is 0.1"),
    (lambda: S.ParamScheduler({"lr": S.constant(.1)}), "positional argument")])
def test_bad_types_are_named(call, words):
    with pytest.raises(TypeError, match=words): call()


# --- in a training ---------------------------------------------------------------------------------------------------------

def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.3), nn.Linear(8, 2))


def batches(n=40, bs=8): x, y = data(n); return [(x[i:i+bs], y[i:i+bs]) for i in range(0, n, bs)]


momentum_sgd = partial(torch.optim.SGD, momentum=.9)
def make(cbs=(), opt_func=momentum_sgd, lr=.1, dls=None): return L.Learner(model(), dls or L.DataLoaders(batches(), batches(16)), cross_entropy, opt_func, lr, cbs, quiet=True, device="cpu")


def two_groups(params, lr):
    params = list(params)
    return torch.optim.SGD([{"params": params[:2], "weight_decay": .1}, {"params": params[2:]}], lr=lr, momentum=.9)


def bits(model): return [v.clone() for v in model.state_dict().values()]
def same(a, b): return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


class Groups(L.Callback):
    "Notes hyper-parameters of every batch, validation too."
    def before_fit(self, learn): self.seen = []
    def after_pred(self, learn): self.seen.append([{k: v for k, v in g.items() if k != "params"} for g in learn.opt.param_groups])


@pytest.mark.parametrize("n_epochs, n_batches", [(1, 1), (1, 5), (3, 4)])
def test_value_follows_the_position(n_epochs, n_batches):
    notes = Groups()
    learn = make([notes], dls=L.DataLoaders(batches(8*n_batches)))
    learn.fit(n_epochs, cbs=S.ParamScheduler(lr=S.linear(1, 0), weight_decay=S.constant(.01)))
    total = n_epochs*n_batches
    assert [g["lr"] for g, in notes.seen] == pytest.approx([1 - i/total for i in range(total)])
    assert all(g["weight_decay"] == .01 and g["momentum"] == .9 for g, in notes.seen), notes.seen


def test_validation_does_not_move_it():
    notes = Groups()
    make([notes]).fit(2, cbs=S.ParamScheduler(lr=S.linear(1, 0)))
    assert [g["lr"] for g, in notes.seen] == pytest.approx([1, .9, .8, .7, .6, .6, .6, .5, .4, .3, .2, .1, .1, .1])
    learn = make([S.ParamScheduler(lr=S.linear(1, 0))])
    learn.validate(); learn.predict()              # without an optimizer, and without a position


@pytest.mark.parametrize("opt_func", [torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam])
def test_momentum_is_adams_first_beta(opt_func):
    notes = Groups()
    learn = make([notes], opt_func)
    learn.fit(1, cbs=S.ParamScheduler(momentum=S.linear(.5, 0)))
    assert [g["betas"] for g, in notes.seen[:5]] == [(pytest.approx(.5 - i/10), .999) for i in range(5)]
    assert learn.opt.param_groups[0]["betas"] == (.9, .999)


def test_each_group_has_its_own():
    notes = Groups()
    learn = make([notes], two_groups)
    learn.fit(1, cbs=S.ParamScheduler(lr=[S.linear(1, 0), S.linear(2, 1)], weight_decay=S.constant(.5)))
    assert [[g["lr"] for g in gs] for gs in notes.seen[:5]] == [[pytest.approx(1 - i/5), pytest.approx(2 - i/5)] for i in range(5)]
    assert all(g["weight_decay"] == .5 for gs in notes.seen for g in gs)
    assert [g["weight_decay"] for g in learn.opt.param_groups] == [.1, 0]
    learn.fit(1, cbs=S.one_cycle((.1, .2)))
    assert [gs[1]["lr"]/gs[0]["lr"] for gs in notes.seen[:5]] == [pytest.approx(2)]*5


class Interrupt(L.Callback):
    "Skips steps, cancels batches and cuts the first epoch short."
    order = 5
    def before_step(self, learn): learn.skip_step = learn.batch == 1
    def after_pred(self, learn):
        if learn.training and (learn.epoch, learn.batch) in ((0, 2), (1, 0)): raise L.CancelBatch
        if learn.training and (learn.epoch, learn.batch) == (0, 3): raise L.CancelEpoch


def test_schedules_go_by_position():
    "A skipped step, a cancelled batch or epoch, an accumulated gradient: a batch has the rate of its place all the same."
    for extra in ([], [GradientAccumulation(2)], [ValidateEvery(2)]):
        rates = {}
        class Note(L.Callback):
            order = 50
            def before_batch(self, learn):
                if learn.training: rates[learn.epoch, learn.batch] = learn.groups[0]["lr"]
        make([Interrupt(), Note(), *extra]).fit(3, cbs=S.ParamScheduler(lr=S.linear(1, 0)))
        assert rates == {(e, b): pytest.approx(1 - (5*e + b)/15) for e in range(3) for b in range(5) if (e, b) != (0, 4)}


def test_one_batch_has_the_first_value():
    notes = Groups()
    learn = make([notes], dls=L.DataLoaders(batches(8)))
    learn.fit(1, cbs=S.one_cycle(.5))
    assert [(g["lr"], g["momentum"]) for g, in notes.seen] == [(pytest.approx(.02), .95)] and learn.groups[0]["lr"] == .1
    learn.fit(2, cbs=S.ParamScheduler(lr=S.combine([.5, .5], [S.constant(.3), S.constant(.7)])))
    assert [g["lr"] for g, in notes.seen] == [.3, .7]


def test_one_cycle_with_accumulation_steps_at_the_rate_of_the_batch_that_fills_the_window():
    used = []
    class Note(L.Callback):
        def before_step(self, learn): used.append((learn.batch, learn.groups[0]["lr"]))
    make([GradientAccumulation(2), Note()]).fit(2, cbs=S.one_cycle(.5))
    cycle = S.one_cycle(.5).schedules["lr"]
    assert used == [(b, pytest.approx(cycle((5*e + b)/10))) for e in (0, 1) for b in (1, 3, 4)]


def test_an_optional_value_may_pass_through_zero():
    notes = Groups()
    make([notes], dls=L.DataLoaders(batches())).fit(2, cbs=S.ParamScheduler(optional=("momentum",), momentum=S.linear(0, 1)))
    assert [g["momentum"] for g, in notes.seen] == pytest.approx([i/10 for i in range(10)])
    make([notes], dls=L.DataLoaders(batches())).fit(1, cbs=S.one_cycle(.1, pct_start=.4, base_momentum=0.))
    assert [g["momentum"] for g, in notes.seen][2] == 0 < notes.seen[3][0]["momentum"], "0 at the top, and up again"


def test_a_rate_below_zero_climbs_no_hill():
    with pytest.raises(ValueError, match="rates of 0 or more"): make().fit(1, cbs=S.ParamScheduler(lr=S.linear(.1, -.1)))
    with pytest.raises(ValueError, match="2 schedules for 1 groups"): make().fit(1, cbs=S.ParamScheduler(optional=("momentum",), momentum=[S.constant(.9)]*2))


def test_a_scheduler_added_in_the_middle_goes_by_position_too():
    notes, late = Groups(), S.ParamScheduler(lr=S.linear(1, 0))
    learn = make([notes], dls=L.DataLoaders(batches()))
    class Add(L.Callback):
        def after_batch(self, learn):
            if learn.batch == 1 and late not in learn.cbs: learn.add_cb(late)
    learn.fit(1, cbs=Add())
    assert [g["lr"] for g, in notes.seen] == pytest.approx([.1, .1, .6, .4, .2]) and learn.groups[0]["lr"] == .1


@pytest.mark.parametrize("schedules, opt_func, words", [
    (dict(momentun=S.constant(.9)), momentum_sgd, "no 'momentun' to schedule: it has .*momentum"),
    (dict(momentum=S.constant(.9)), SGD, "no 'momentum' to schedule: it has lr"),
    (dict(lr=[S.constant(1)]*3), two_groups, "lr has 3 schedules for 2 groups: give one each")])
def test_what_the_optimizer_has_not_is_named(schedules, opt_func, words):
    learn = make(opt_func=opt_func)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match=words): learn.fit(1, cbs=S.ParamScheduler(**schedules))
    assert same(before.values(), learn.model.state_dict().values())
    learn.fit(1)


def halves(net): return [net[0].parameters(), [*net[1].parameters(), *net[4].parameters()]]


def test_one_schedule_is_for_the_last_group_and_the_others_keep_their_ratio():
    for cbs, tops in ((S.one_cycle(.4), (.04, .4)), (S.ParamScheduler(lr=S.linear(.4, .2)), (.04, .4)), (S.one_cycle([.3, .1]), (.3, .1))):
        notes = Groups()
        learn = L.Learner(model(), L.DataLoaders(batches(400)), cross_entropy, momentum_sgd, [.01, .1], [notes], splitter=halves, quiet=True, device="cpu")
        learn.fit(1, cbs=cbs)
        assert [max(g[i]["lr"] for g in notes.seen) for i in (0, 1)] == [pytest.approx(t, rel=.01) for t in tops]
        assert [g["lr"] for g in learn.groups] == [.01, .1]
    found = S.lr_find(learn, n_batches=20)
    assert found.lrs[-1] == pytest.approx(10.) or found.losses[-1] > found.losses[0], "the rates are the last group's"
    zero = L.Learner(model(), L.DataLoaders(batches()), cross_entropy, momentum_sgd, [.1, 0.], splitter=halves, quiet=True, device="cpu")
    with pytest.raises(ValueError, match="give lr a list"): zero.fit(1, cbs=S.one_cycle(.1))


class NoLen:
    def __iter__(self): return iter(batches())


class WrongLen(NoLen):
    def __len__(self): return 3


@pytest.mark.parametrize("dl, words", [(NoLen(), r"batch 0 of a loader with len\(\) None"), (WrongLen(), r"batch 3 of a loader with len\(\) 3.*true __len__")])
def test_a_loader_without_a_known_end(dl, words):
    with pytest.raises(ValueError, match=words): make(dls=L.DataLoaders(dl)).fit(1, cbs=S.one_cycle(.1))


class Raise(L.Callback):
    "Raises an error in batch 3 of the first epoch."
    def __init__(self, error): self.error = error
    def after_backward(self, learn):
        if learn.epoch == 0 and learn.batch == 3: raise self.error


@pytest.mark.parametrize("error, caught", [(None, None), (KeyboardInterrupt(), KeyboardInterrupt), (OSError("x"), OSError),
                                           (L.CancelFit(), None), (L.CancelEpoch(), None), (L.CancelBatch(), None)])
@pytest.mark.parametrize("opt_func", [momentum_sgd, torch.optim.AdamW, two_groups])
def test_everything_is_put_back_however_it_ends(error, caught, opt_func):
    learn = make(opt_func=opt_func)
    learn.fit(0)
    before = [{k: v for k, v in g.items() if k != "params"} for g in learn.opt.param_groups]
    def fit(): learn.fit(2, cbs=[S.ParamScheduler(lr=S.linear(.5, .3), momentum=S.linear(.3, .2), weight_decay=S.linear(.1, 1)), *([Raise(error)] if error else [])])
    if caught:
        with pytest.raises(caught): fit()
    else: fit()
    assert [{k: v for k, v in g.items() if k != "params"} for g in learn.opt.param_groups] == before


def test_the_last_scheduler_wins_and_order_of_ends_does_not_matter():
    notes = Groups()
    learn = make([notes, S.ParamScheduler(lr=S.constant(.7))])
    learn.fit(1, cbs=S.ParamScheduler(lr=S.constant(.2)))
    assert {g["lr"] for g, in notes.seen} == {.2} and learn.opt.param_groups[0]["lr"] == .1
    learn.fit(1)
    assert {g["lr"] for g, in notes.seen} == {.7}


@pytest.mark.parametrize("opt_func", [SGD, torch.optim.SGD, two_groups, torch.optim.AdamW])
def test_one_cycle_fits_every_optimizer_and_wakes_no_momentum(opt_func):
    notes = Groups()
    learn = make([notes], opt_func)
    learn.fit(4, cbs=S.one_cycle(.1))
    momenta = {read_hyper(g, "momentum") for gs in notes.seen for g in gs}
    has = opt_func in (two_groups, torch.optim.AdamW)
    assert (max(momenta) == .95 and min(momenta) < .86) if has else momenta <= {None, 0}
    assert max(g["lr"] for gs in notes.seen for g in gs) == pytest.approx(.1, rel=.01)
    learn.fit(1, cbs=S.one_cycle(.1, cycle_momentum=False))
    assert all("betas" not in g or g["betas"] == (.9, .999) for gs in notes.seen for g in gs)
    assert {read_hyper(g, "momentum") for gs in notes.seen for g in gs} <= {None, 0, .9}


def test_a_silent_momentum_stays_silent():
    theirs = rates(lambda o: T.OneCycleLR(o, .1, 10), 10, opt_func=torch.optim.SGD)
    assert max(m for _, m in theirs) == .95, "as the lesson says, PyTorch's scheduler switches it on"
    notes = Groups()
    make([notes], partial(torch.optim.AdamW, betas=(0., .99))).fit(1, cbs=S.one_cycle(.1))
    assert {g["betas"] for g, in notes.seen} == {(0., .99)}


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, torch.tensor, int])
def test_foreign_numbers_reach_the_optimizer_as_floats(number, tmp_path):
    notes = Groups()
    learn = make([notes])
    learn.fit(1, cbs=[S.ParamScheduler(lr=lambda p: number(1)), S.ParamScheduler(weight_decay=S.linear(number(1), number(0))), SaveCheckpoint(tmp_path)])
    assert all(type(g["lr"]) is float and type(g["weight_decay"]) is float for g, in notes.seen)
    learn.load(tmp_path/"last.pt")


def loaders(generator=None):
    return L.DataLoaders(DataLoader(TensorDataset(*data()), 8, shuffle=True, generator=generator), DataLoader(TensorDataset(*data(16)), 8))


class Cut(L.Callback):
    def __init__(self, epoch, event): self.epoch = epoch; setattr(self, event, self._cut)
    def _cut(self, learn):
        if learn.epoch == self.epoch and learn.training is not None and (learn.batch or 0) >= 1: raise KeyboardInterrupt
    after_step = after_pass = lambda self, learn: None


@pytest.mark.parametrize("epoch, event", [(1, "after_step"), (2, "after_pass"), (3, "after_step")])
@pytest.mark.parametrize("opt_func", [SGD, momentum_sgd, torch.optim.AdamW, two_groups])
def test_a_resumed_schedule_is_bit_identical(tmp_path, epoch, event, opt_func):
    def run(folder, seed=0, resume=None, extra=()):
        learn = make(opt_func=opt_func, dls=loaders())
        learn.model.load_state_dict(model(seed).state_dict())
        recorder = Recorder()
        learn.fit(4, cbs=[S.one_cycle(.2), recorder, SaveCheckpoint(folder), *extra], resume=resume)
        return bits(learn.model), recorder.lrs, recorder.momenta, [{**g, "params": 0} for g in learn.opt.param_groups]
    calm = run(tmp_path/"calm")
    with pytest.raises(KeyboardInterrupt): run(tmp_path/"cut", extra=[Cut(epoch, event)])
    random.seed(5); np.random.seed(5); torch.manual_seed(5)
    resumed = run(tmp_path/"cut", 9, tmp_path/"cut"/"last.pt")
    assert same(calm[0], resumed[0]) and calm[1:] == resumed[1:]


@pytest.mark.parametrize("lr", [S.cosine(.4, .1), [S.linear(.01, .02), S.linear(.2, .1)]])
def test_a_resumed_schedule_of_groups(tmp_path, lr):
    "One schedule means the last group, in the ratio of the base rates of the first run, not of the new learner's."
    def run(folder, n, rates=(.5, .1), resume=None, fit_lr=None):
        rec = Recorder()
        learn = L.Learner(model(), L.DataLoaders(batches()), cross_entropy, momentum_sgd, list(rates), splitter=halves, quiet=True, device="cpu")
        learn.fit(n, fit_lr, cbs=[S.ParamScheduler(lr=lr, momentum=S.linear(.9, .8)), rec, SaveCheckpoint(folder, "train_loss")], resume=resume)
        return rec.all_lrs, rec.momenta, bits(learn.model)[:2], [g["lr"] for g in learn.groups]
    class Stop(L.Callback):
        order = 200
        def after_epoch(self, learn): raise L.CancelFit
    calm = run(tmp_path/"calm", 3, fit_lr=[.03, .3])
    learn = L.Learner(model(), L.DataLoaders(batches()), cross_entropy, momentum_sgd, [.5, .1], splitter=halves, quiet=True, device="cpu")
    learn.fit(3, [.03, .3], cbs=[S.ParamScheduler(lr=lr, momentum=S.linear(.9, .8)), Recorder(), SaveCheckpoint(tmp_path/"cut", "train_loss"), Stop()])
    again = run(tmp_path/"cut", 3, (.7, .7), resume=tmp_path/"cut"/"last.pt")
    assert calm[0] == again[0] and calm[1] == again[1] and calm[3] == again[3] == [.03, .3]
    if callable(lr): assert all(a/b == pytest.approx(.1) for a, b in calm[0])


def test_equals_pytorchs_scheduler_in_a_loop_by_hand():
    learn = make(dls=L.DataLoaders(batches()))
    torch.manual_seed(1)
    learn.fit(3, cbs=S.ParamScheduler(lr=S.cosine(.3, 0)))
    by_hand = model()
    opt = momentum_sgd(by_hand.parameters(), lr=.3)
    scheduler = T.CosineAnnealingLR(opt, 15)
    torch.manual_seed(1)
    for _ in range(3):
        for xb, yb in batches():
            F.cross_entropy(by_hand(xb), yb).backward()
            opt.step(); opt.zero_grad(); scheduler.step()
    for a, b in zip(bits(learn.model), bits(by_hand)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- the range test ----------------------------------------------------------------------------------------------------------

def state(learn):
    "Everything that training could change, as something to compare."
    moments = [{k: torch.as_tensor(v).tolist() for k, v in s.items()} for s in learn.opt.state_dict()["state"].values()] if learn.opt else None
    groups = [{k: (list(map(id, v)) if k == "params" else v) for k, v in g.items()} for g in learn.opt.param_groups] if learn.opt else None
    grads = [None if p.grad is None else p.grad.tolist() for p in learn.model.parameters()]
    cbs = [(id(cb), {k: copy.deepcopy(v) for k, v in vars(cb).items() if not k.startswith("_") and k != "error"}) for cb in learn.cbs]
    kind, keys, *rest = np.random.get_state()
    generators = [g.get_state().tolist() for g in L.generators(learn.dls.train, learn.dls.valid)]
    return dict(model=[v.tolist() for v in learn.model.state_dict().values()], ids=[id(p) for p in learn.model.parameters()], moments=moments, groups=groups,
                grads=grads, cbs=cbs, mode=[m.training for m in learn.model.modules()], history=copy.deepcopy(learn.history), modes=learn.mode,
                epochs=(learn.n_epochs, learn.epochs_done, learn.epoch), dls=(id(learn.dls), id(learn.dls.train)), opt=id(learn.opt),
                random=(random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist(), generators))


class Draws(L.Callback):
    "Uses up random numbers of every kind, and raises an error in some batch of a range test."
    def __init__(self, error=None): self.error, self.count = error, 0
    def after_backward(self, learn):
        random.random(); np.random.rand(); torch.rand(1); self.count += 1
        if self.error and learn.n_batches == 40 and learn.batch == 17: raise self.error


@pytest.mark.parametrize("error, caught", [(None, None), (KeyboardInterrupt(), KeyboardInterrupt), (OSError("gone"), OSError),
                                           (SystemExit(), SystemExit), (MemoryError(), MemoryError)])
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("opt_func", [SGD, momentum_sgd, torch.optim.AdamW, two_groups])
def test_lr_find_leaves_no_trace(tmp_path, error, caught, fitted, opt_func):
    log, saved = tmp_path/"log.csv", tmp_path/"saved"
    learn = make([Recorder(), EarlyStopping(), CSVLogger(log), SaveCheckpoint(saved), Draws(error)], opt_func, dls=loaders(torch.Generator().manual_seed(3)))
    if fitted: learn.fit(2)
    learn.model.eval()
    learn.model[0].weight.grad = torch.ones(8, 6)
    before, files = state(learn), {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    if caught:
        with pytest.raises(caught): S.lr_find(learn, n_batches=40)
    else: assert len(S.lr_find(learn, n_batches=40).lrs) > 10
    after = state(learn)
    for key in before: assert before[key] == after[key], key
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files


def test_lr_find_leaves_no_trace_when_the_loss_explodes():
    regression = L.Learner(nn.Linear(6, 1), L.DataLoaders([(x, x[:, :1]) for x, _ in batches()]), nn.functional.mse_loss, momentum_sgd, .1, quiet=True, device="cpu")
    before = state(regression)
    found = S.lr_find(regression, high=1e6)
    assert state(regression) == before
    assert len(found.lrs) < 100 and found.losses[-1] > 3*min(found.smooth)
    assert all(math.isfinite(loss) for loss in found.losses)


class Files:
    "A loader that holds something open while it is read."
    open, chance = 0, None
    def __init__(self): self.generator = torch.Generator().manual_seed(1)
    def __len__(self): return 5
    def __iter__(self):
        Files.open += 1
        torch.rand(1, generator=self.generator)
        try: yield from batches()
        finally: Files.open -= 1


@pytest.mark.parametrize("error", [None, L.CancelFit(), KeyboardInterrupt(), ZeroDivisionError()])
def test_lr_find_closes_and_puts_back_whatever_ends_it(error):
    "With everything that shapes a training at work, after a fit that failed, and with a metric that no copy can be made of."
    class Ends(L.Callback):
        def before_step(self, learn):
            if error and learn.n_batches == 23 and learn.batch >= 9: raise error
    class Locked(L.Metric):
        name, lower_is_better = "locked", True
        def __init__(self): self.lock = open(__file__)
        def value(self): return 0.
    locked = Locked()
    cbs = [EMA(.9), GradientAccumulation(2), GradientClip(1.), TerminateOnNaN(), ValidateEvery(2), Recorder(), S.one_cycle(.1), Ends()]
    learn = L.Learner(model(), L.DataLoaders(Files(), batches(16)), cross_entropy, momentum_sgd, .1, cbs, [locked], quiet=True, device="cpu")
    learn.fit(1)
    fail = Raise(MemoryError())
    with pytest.raises(MemoryError): learn.fit(1, cbs=fail)
    assert learn.pred is not None and learn.xb is not None, "kept to be looked at"
    before = state(learn)
    before.pop("cbs"); kept = [id(cb) for cb in learn.cbs]
    average, losses = [x.clone() for x in learn.cb(EMA).average.values()], [*learn.cb(Recorder).losses]
    if isinstance(error, (KeyboardInterrupt, ZeroDivisionError)):
        with pytest.raises(type(error)): S.lr_find(learn, n_batches=23)
    else: assert len(S.lr_find(learn, n_batches=23).lrs) == (10 if error else 23)
    after = state(learn); after.pop("cbs")
    for key in before: assert before[key] == after[key], key
    assert kept == [id(cb) for cb in learn.cbs] and same(average, learn.cb(EMA).average.values()) and losses == learn.cb(Recorder).losses
    assert Files.open == 0
    locked.lock.close()


@pytest.mark.parametrize("event", ["before_epoch", "before_batch", "after_loss", "after_step", "after_batch", "after_epoch"])
def test_lr_find_inside_a_fit_is_refused(event):
    class Look(L.Callback): "Asks in the middle."
    setattr(Look, event, lambda self, learn: S.lr_find(learn, n_batches=10))
    with pytest.raises(RuntimeError, match="lr_find was called inside a fit"): make([Look()]).fit(1)


def test_a_loader_of_unknown_length_can_be_tested_though_not_scheduled():
    found = S.lr_find(make(dls=L.DataLoaders(NoLen(), batches(16))), high=1., n_batches=12)
    assert len(found.lrs) == 12 and found.lrs[-1] == pytest.approx(1.)
    assert len(S.lr_find(make(dls=L.DataLoaders(WrongLen())), high=1., n_batches=12).lrs) == 12


def test_accumulation_is_at_work_in_the_range_test():
    class Steps(L.Callback):
        def __init__(self): self.seen = []
        def after_step(self, learn): self.seen.append(learn.batch)
        def __deepcopy__(self, memo): return self
    steps = Steps()
    S.lr_find(make([GradientAccumulation(4), steps], dls=L.DataLoaders(batches(400))), high=1e-3, n_batches=10)
    assert steps.seen == [3, 7, 9]


def test_fits_after_it_as_without_it():
    runs = []
    for look in (False, True):
        torch.manual_seed(7); random.seed(7); np.random.seed(7)
        learn = make([Draws()], dls=loaders())
        learn.fit(1)
        if look: S.lr_find(learn)
        learn.fit(2, cbs=S.one_cycle(.1))
        runs.append(bits(learn.model))
    assert same(*runs)


def test_a_closure_over_the_model_is_followed():
    net = model()
    groups = lambda params, lr: torch.optim.SGD([{"params": net[0].parameters()}, {"params": net[4].parameters()}], lr=lr)   # noqa: E731
    learn = L.Learner(net, L.DataLoaders(batches(400)), cross_entropy, groups, .1, quiet=True, device="cpu")
    before = state(learn)
    found = S.lr_find(learn, low=1e-3, high=.5)
    assert min(found.smooth[-30:]) < .8*found.smooth[0], "the twin learns, although opt_func names the original"
    assert state(learn) == before


def test_a_permanent_scheduler_rests():
    torch.manual_seed(0)
    learn = L.Learner(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), L.DataLoaders(batches(400)), cross_entropy, lr=.1, quiet=True, device="cpu", cbs=[S.one_cycle(.1), TerminateOnNaN()])
    before = bits(learn.model)
    found = S.lr_find(learn, low=1e-4)
    assert same(before, bits(learn.model)) and found.lrs[0] == pytest.approx(1e-4)
    ratios = [b/a for a, b in zip(found.lrs, found.lrs[1:])]
    assert ratios == pytest.approx([1e5**(1/99)]*len(ratios)), "equal factors, whatever the learner's own scheduler says"
    assert isinstance(learn.cbs[0], S.ParamScheduler)
    tops = S.lr_find(make(), low=1e-4, high=.1, n_batches=10)
    assert tops.lrs[-1] == pytest.approx(.1), "the top is reached"
    asked = []
    S.lr_find(make([S.ParamScheduler(weight_decay=lambda p: asked.append(p) or 0.)]), n_batches=20)
    assert asked == [], "the learner's own schedulers rest during the test"


def test_a_short_loader_is_read_again_and_no_epoch_ends(tmp_path):
    class Epochs(L.Callback):
        ends = []
        def after_epoch(self, learn): self.ends.append(1)
        after_pass = after_epoch
    found = S.lr_find(make([Epochs()], dls=L.DataLoaders(batches(16), batches())), high=1., n_batches=33)
    assert len(found.lrs) == 33 and Epochs.ends == []


@pytest.mark.parametrize("low", [0, -1])
def test_a_rate_of_zero_is_no_start(low):
    with pytest.raises(ValueError, match="two values above 0"): S.lr_find(make(), low)


@pytest.mark.parametrize("dl", [None, batches(24, 12), batches(8)])
def test_a_callback_that_validates_disturbs_no_range_test(dl):
    class Look(L.Callback):
        def after_step(self, learn): learn.validate(dl)
        def before_step(self, learn): learn.validate(dl)
    calm, looked = (S.lr_find(make(cbs, dls=L.DataLoaders(batches(80), batches(16))), n_batches=10) for cbs in ([], [Look()]))
    assert calm == looked and len(calm.lrs) == 10 and calm.lrs[-1] == pytest.approx(10.)


def test_rates_are_those_that_were_used_and_what_ends_a_test_is_not_only_nan():
    class Halve(L.Callback):
        def before_batch(self, learn):
            for group in learn.groups: group["lr"] /= 2
    found = S.lr_find(make([Halve()]), low=1e-3, high=1., n_batches=10)
    assert found.lrs[0] == pytest.approx(.5e-3) and found.lrs[-1] == pytest.approx(.5)
    with pytest.raises(ValueError, match="the loss exploded"): S.lr_find(make(), low=1e8, high=1e9, n_batches=10)
    for n in (1, 4):
        with pytest.raises(ValueError, match=f"n_batches is {n}: give at least 5"): S.lr_find(make(), n_batches=n)


def test_a_loss_that_looks_at_the_model_is_copied_with_it_or_refused():
    "The copy that is trained would have another penalty than the one that is looked at."
    class Penalty(torch.nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, pred, yb): return torch.nn.functional.cross_entropy(pred, yb) + sum(p.square().sum() for p in self.net.parameters())
    learn = make(); learn.loss_func = Penalty(learn.model)
    assert S.lr_find(learn, n_batches=10).lrs and all(p.grad is None for p in learn.model.parameters())
    closed = Penalty(learn.model); learn.loss_func = lambda pred, yb: closed(pred, yb)
    with pytest.raises(ValueError, match="an nn.Module that holds the model"): S.lr_find(learn, n_batches=10)
    assert all(p.grad is None for p in learn.model.parameters())


@pytest.mark.parametrize("event", ["before_fit", "before_epoch", "before_pass"])
def test_who_prepares_the_training_prepares_the_test(event):
    class Prepare(L.Callback): heard = []
    setattr(Prepare, event, lambda self, learn: self.heard.append(learn))
    learn = make([Prepare()]); S.lr_find(learn, n_batches=10)
    assert len(Prepare.heard) == 1 and Prepare.heard[0] is not learn


def test_what_cannot_be_tested():
    with pytest.raises(ValueError, match="dls.train is an iterator, which the test would use up"): S.lr_find(make(dls=L.DataLoaders(iter(batches()))))
    with pytest.raises(ValueError, match="gave no batch"): S.lr_find(make(dls=L.DataLoaders([])))
    x, y = data(8)
    with pytest.raises(ValueError, match="ended after 0 of 100 batches, from a rate of 1e-06 on: .* Start lower, or look for NaN"):
        S.lr_find(make(dls=L.DataLoaders([(x*math.nan, y)])))
    learn = make()
    learn.model.lock = open(__file__)
    try:
        with pytest.raises(TypeError) as caught: S.lr_find(learn)
        assert "lr_find trains a copy" in caught.value.__notes__[0]
    finally: learn.model.lock.close()


def test_a_callback_with_an_open_file_stays_out(tmp_path):
    class Log(L.Callback):
        def __init__(self): self.file = open(tmp_path/"log", "w")
        def after_batch(self, learn): self.file.write("x")
        def before_step(self, learn): self.file.write("y")
    log = Log()
    with pytest.warns(UserWarning, match="Log cannot be copied"): S.lr_find(make([log, ValidateEvery(1)]), n_batches=20)
    log.file.close(); assert (tmp_path/"log").read_text() == ""


def fake(f, low=1e-6, high=10., n=100):
    lrs = [low*(high/low)**(i/n) for i in range(n)]
    losses = [f(math.log10(lr)) for lr in lrs]
    return S.RangeTest(lrs, losses, S._smooth(lrs, losses))


@settings(max_examples=15)
@given(st.floats(-4, -1.5), st.floats(.05, .4), st.integers(60, 200))
def test_suggestions_on_a_curve_we_know(centre, width, n):
    fall = lambda x: 2.3 - 2/(1 + math.exp(-(x - centre)/width)) + (max(0., x - centre - 2))**2   # noqa: E731
    found = fake(fall, n=n)
    assert abs(math.log10(found.suggestions["steepest"]) - centre) < .25
    assert abs(math.log10(found.valley) - centre) < .3
    assert found.suggestions["minimum/10"] == found.lrs[found.smooth.index(min(found.smooth))]/10
    assert list(found.suggestions) == ["steepest", "minimum/10", "valley"] and found.suggestions["valley"] == found.valley
    wider = fake(fall, low=1e-9, n=round(n*10/7))
    assert abs(math.log10(wider.valley/found.valley)) < .2, "a longer flat part before the fall changes nothing"


def test_suggestions_do_not_care_about_scale_or_noise():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(100, generator=g).tolist()
    fall = lambda x: 2.3 - 2/(1 + math.exp(-(x + 2)/.3))   # noqa: E731
    lrs = fake(fall).lrs
    losses = [fall(math.log10(lr)) + .05*e for lr, e in zip(lrs, noise)]
    noisy = S.RangeTest(lrs, losses, S._smooth(lrs, losses))
    assert abs(math.log10(noisy.valley/fake(fall).valley)) < .3
    scaled = [100*loss for loss in losses]
    assert S.RangeTest(lrs, scaled, S._smooth(lrs, scaled)).suggestions == pytest.approx(noisy.suggestions)


def test_a_loss_that_never_falls_still_answers():
    for f in (lambda x: 1., lambda x: x):
        found = fake(f)
        assert all(rate > 0 for rate in found.suggestions.values()) and "batches from 1e-06" in repr(found)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9))
def test_longest_fall(values):
    path = S._longest_fall(values)
    assert path == sorted(set(path)) and all(values[a] > values[b] for a, b in zip(path, path[1:]))
    n = len(values)
    falling = lambda mask: all(values[a] > values[b] for a, b in zip(mask, mask[1:]))   # noqa: E731
    masks = ([i for i in range(n) if m >> i & 1] for m in range(1, 2**n))
    assert len(path) == max(len(mask) for mask in masks if falling(mask))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_smoothing_is_an_average(losses):
    lrs = [10**(i/10) for i in range(len(losses))]
    smooth = S._smooth(lrs, losses)
    assert min(losses) - 1e-9 <= min(smooth) and max(smooth) <= max(losses) + 1e-9
    assert S._smooth(lrs, losses, width=1e-3) == pytest.approx(losses)


def test_pictures():
    import matplotlib.pyplot as plt
    found = S.lr_find(make(dls=L.DataLoaders(batches(400))))
    ax = found.plot()
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "learning rate" and ax.get_ylabel() == "loss"
    assert {"steepest", "minimum/10", "valley"} <= {t.get_text().split(":")[0] for t in ax.get_legend().get_texts()}
    other = plt.figure().gca()
    assert found.plot(ax=other) is other
    ax = S.plot_schedules({"a": S.linear(0, 1), "b": S.cosine(0, 1)}, ylabel="momentum")
    assert ax.get_ylabel() == "momentum" and len(ax.lines) == 2 and ax.lines[0].get_ydata()[[0, -1]].tolist() == [0, 1]
    plt.close("all")


def test_importing_stays_light():
    import subprocess
    import sys
    code = "import sys, exp.schedule; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"

"Right and wrong answers to the exercises of 05, 05a and 05b: the right ones are accepted however they are written, a wrong one gets a word that helps."
import copy
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from exp.callbacks import RowCallback
from exp.exercises.callback_kit import check_plateau, check_stop_at, check_thermometer, check_walk, check_windows
from exp.exercises.callbacks import check_average_weights, check_f1, check_skip_first, check_still_heard, check_who_writes
from exp.exercises.checkpoints import check_average_checkpoints, check_counter, check_power_cut, check_same_checkpoint
from exp.learner import Callback, CancelBatch, CancelEpoch, CancelFit, Metric, read_checkpoint


def _made(base, **changed):
    "A class like this one, but for what is changed."
    return type(base.__name__, (base,), changed)


class Skip(Callback):
    def __init__(self, n): self.n = n
    def before_batch(self, learn):
        if self.first(learn): raise self.cancel
    def first(self, learn): return learn.training and learn.batch < self.n
    cancel = CancelBatch


class SkipByCounting(Skip):
    def before_pass(self, learn): self.seen = 0
    def first(self, learn):
        self.seen += 1
        return learn.mode == "train" and self.seen <= self.n


class SkipTooLate(Skip):
    def before_batch(self, learn): pass
    def after_pred(self, learn):
        if self.first(learn): raise CancelBatch


class SkipTheStep(Skip):
    def before_batch(self, learn): pass
    def before_step(self, learn): learn.skip_step = self.first(learn)


SKIP_RIGHT = [Skip, SkipByCounting]
SKIP_WRONG = [
    (SkipTooLate, "before the model runs"), (SkipTheStep, "before the model runs"),
    (_made(Skip, cancel=CancelEpoch), "validation"),
    (_made(Skip, first=lambda self, learn: learn.batch < self.n), "learn.training"),
    (_made(Skip, first=lambda self, learn: learn.training and learn.batch <= self.n), "training batches"),
    (_made(Skip, first=lambda self, learn: learn.training and 3*learn.epoch + learn.batch < self.n), "learn.batch")]


class Averaged(Callback):
    restart, event, zero, clone = False, "after_step", False, True
    def __init__(self, decay): self.decay = decay
    def own_params(self, learn): return [p.data for p in learn.model.parameters()]
    def start(self, learn): self.average = [p.clone()*(not self.zero) for p in self.own_params(learn)]
    def before_fit(self, learn): self.start(learn)
    def before_epoch(self, learn):
        if self.restart: self.start(learn)
    def update(self, learn):
        for a, p in zip(self.average, self.own_params(learn)): a.mul_(self.decay).add_(p, alpha=1 - self.decay)
    def before_step(self, learn): self.event == "before_step" and self.update(learn)
    def after_step(self, learn): self.event == "after_step" and self.update(learn)
    def before_pass(self, learn):
        if learn.training: return
        self.kept = [p.clone() if self.clone else p for p in self.own_params(learn)]
        for p, a in zip(self.own_params(learn), self.average): p.copy_(a)
    def after_pass(self, learn):
        if learn.training: return
        for p, kept in zip(self.own_params(learn), self.kept): p.copy_(kept)


class AveragedByState(Callback):
    "By state dicts, around the model only."
    def __init__(self, decay): self.decay = decay
    def before_fit(self, learn): self.average = copy.deepcopy(learn.model.state_dict())
    def after_step(self, learn):
        for k, v in learn.model.state_dict().items(): self.average[k].lerp_(v, 1 - self.decay)
    @contextmanager
    def around_forward(self, learn):
        if learn.training: yield; return
        kept = copy.deepcopy(learn.model.state_dict())
        learn.model.load_state_dict(self.average)
        try: yield
        finally: learn.model.load_state_dict(kept)


class AnotherModel(Callback):
    "Validation runs a second model."
    def __init__(self, decay): self.decay = decay
    def before_fit(self, learn): self.average = copy.deepcopy(learn.model)
    def update(self, a, p): a.lerp_(p, 1 - self.decay)
    def after_step(self, learn):
        for a, p in zip(self.average.parameters(), learn.model.parameters()): self.update(a.data, p.data)
    def before_pass(self, learn):
        if not learn.training: self.own, learn.model = learn.model, self.average.eval()
    def after_pass(self, learn):
        if not learn.training: learn.model = self.own


def _runs_nothing(self, learn):
    if not learn.training: raise CancelEpoch


AVERAGE_RIGHT = [Averaged, AveragedByState, AnotherModel]
AVERAGE_WRONG = [
    (_made(Averaged, restart=True), "start it once"), (_made(Averaged, event="before_step"), "after each step"),
    (_made(Averaged, event="", after_batch=lambda self, learn: self.update(learn)), "not each batch"), (_made(Averaged, zero=True), "weights before the first step"), (_made(Averaged, clone=False), "clone"),
    (_made(Averaged, before_pass=lambda self, learn: None, after_pass=lambda self, learn: None), "before_pass"),
    (_made(Averaged, after_pass=lambda self, learn: None), "after_pass"), (_made(AnotherModel, after_step=lambda self, learn: None), "running average"),
    (_made(AnotherModel, update=lambda self, a, p: a.lerp_(p, self.decay)), "share of the old average"),
    (_made(Averaged, before_batch=_runs_nothing), "ran no model")]


class Score(Metric):
    name = "f1"
    def __init__(self, c): self.c = c; self.reset()
    def reset(self): self.t = self.p = self.n = 0
    def guess(self, pred): return pred.argmax(1) == self.c
    def add(self, pred, yb, weight):
        guess, true = self.guess(pred), yb == self.c
        self.t += int((guess & true).sum()); self.p += int((guess & ~true).sum()); self.n += int((~guess & true).sum())
    def value(self): return 2*self.t/(2*self.t + self.p + self.n) if self.t + self.p + self.n else 0.


class ScoreOfAll(Metric):
    "Keeps everything; a tensor is a number, too."
    name = "f1"
    def __init__(self, c): self.c = c
    def reset(self): self.guess, self.true = [], []
    def add(self, pred, yb, weight): self.guess.append(pred.argmax(-1)); self.true.append(yb)
    def value(self):
        guess, true = torch.cat(self.guess) == self.c, torch.cat(self.true) == self.c
        return 2*(guess & true).sum()/(guess.sum() + true.sum()).clamp(min=1)


class ScoreByBatch(Score):
    def reset(self): self.scores = []
    def add(self, pred, yb, weight):
        one = Score(self.c); one.add(pred, yb, weight); self.scores.append(one.value())
    def value(self): return sum(self.scores)/len(self.scores)


class NoPlainReset(Score):
    def __init__(self, c): self.c = c
    def reset(self): self.t = 0


F1_RIGHT = [Score, ScoreOfAll]
F1_WRONG = [
    (ScoreByBatch, "count over the whole pass"), (lambda c: Score(1), "use c"), (_made(Score, guess=lambda self, pred: pred[:, self.c] > 0), "largest output"),
    (_made(Score, guess=lambda self, pred: pred[:, self.c] > .5), "largest output"),
    (_made(Score, guess=lambda self, pred: pred[:, self.c].sigmoid() > .5), "largest output"),
    (_made(Score, reset=lambda self: vars(self).update({"t": 0, "p": 0, "n": 0} | {k: v for k, v in vars(self).items() if k != "c"})), "reset"),
    (_made(Score, value=lambda self: self.t/(self.t + self.p) if self.t + self.p else 0.), "count missed ones"),
    (_made(Score, value=lambda self: self.t/(self.t + self.n) if self.t + self.n else 0.), "count wrong guesses"),
    (NoPlainReset, "no attribute 'p'"), (_made(Score, value=lambda self: "high"), "return a number"),
    (_made(Score, value=lambda self: 2*self.t/(2*self.t + self.p + self.n)), "ZeroDivisionError")]
LIST = ["after_pass", "after_epoch", "after_fit"]
HEARD_RIGHT = [LIST, tuple(LIST)]
HEARD_WRONG = [(["after_batch", *LIST], "3 events"), (LIST[::-1], "innermost"), (LIST[1:], "promise"), ("after_pass", "list")]
WRITERS = {"GradientClip", "GradientAccumulation", "EMA"}
WRITES_RIGHT = [WRITERS, frozenset(WRITERS), sorted(WRITERS)]
WRITES_WRONG = [(WRITERS - {"EMA"}, "swaps"), (WRITERS | {"TerminateOnNaN"}, "only reads"), ("EMA", "set of class names"), ([["EMA"]], "missing"), (3, "set of class names")]


# 05a
class Warm(Callback):
    order = 5
    def __init__(self, n): self.n = n
    def before_fit(self, learn): self.norms, self.steps = [], 0
    def length(self, learn): return torch.cat([p.grad.flatten() for p in learn.params()]).norm().item()
    def before_step(self, learn):
        self.steps += 1
        if self.steps % self.n == 0: self.norms.append(self.length(learn))


class WarmBackward(Warm):
    before_step, after_backward = Callback.before_step, Warm.before_step


def _squared_in_place(self, learn):
    for p in learn.params(): p.grad.pow_(2)
    return sum(p.grad.sum().item() for p in learn.params())**.5


WARM_RIGHT = [Warm, WarmBackward, _made(Warm, length=lambda self, learn: nn.utils.clip_grad_norm_(learn.params(), float("inf")))]
WARM_WRONG = [
    (_made(Warm, order=15), "order"), (_made(Warm, length=lambda self, learn: sum(p.grad.norm().item() for p in learn.params())), "sum of squares"),
    (_made(Warm, length=_squared_in_place), "change no gradient"), (_made(Warm, length=lambda self, learn: "long"), "list of numbers"),
    (_made(Warm, length=lambda self, learn: nn.utils.clip_grad_norm_(learn.params(), .001)), "change no gradient"),
    (_made(Warm, __init__=lambda self, n: vars(self).update(n=n, steps=0), before_fit=lambda self, learn: vars(self).update(norms=[])), "start anew"),
    (_made(Warm, before_step=lambda self, learn: (learn.batch + 1) % self.n or self.norms.append(self.length(learn))), "count steps")]
WINDOWS_RIGHT = [[4, 4, 2], (4., 4., 2.), torch.tensor([4, 4, 2])]
WINDOWS_WRONG = [([4, 4], "none of the ten"), ([2, 4, 4], "left at the end"), ("442", "list of numbers"), ([4.4, 4.2, 2.1], "10.7"), (["four"], "list of numbers")]


class Goal(Callback):
    def __init__(self, name, value): self.name, self.goal = name, value
    def reached(self, learn): return learn.history[-1][self.name] >= self.goal
    def after_epoch(self, learn):
        if self.reached(learn): raise CancelFit


class GoalRow(RowCallback):
    def __init__(self, name, value): self.name, self.goal = name, value
    def see(self, learn, row):
        if row.get(self.name, float("-inf")) >= self.goal: raise CancelFit


GOAL_RIGHT = [Goal, GoalRow]
GOAL_WRONG = [
    (_made(Goal, reached=lambda self, learn: learn.history[-1][self.name] > self.goal), "after 12 epochs|after 6 epochs|after . epochs"),
    (_made(Goal, reached=lambda self, learn: learn.history[-1]["accuracy"] >= self.goal), "'epoch'"),
    (_made(Goal, reached=lambda self, learn: learn.history[0][self.name] >= self.goal), "last row"),
    (_made(Goal, reached=lambda self, learn: learn.history[-1][self.name] == self.goal), "2.50"),
    (_made(Goal, reached=lambda self, learn: False), "CancelFit")]
WALK_RIGHT = [2.125, torch.tensor(2.125), Fraction(17, 8)]
WALK_WRONG = [(2, "always lags"), (1.25, "always lags"), (3, "always lags"), ("two", "number"), ([2.125], "number")]


class Patient(Callback):
    def __init__(self, factor, patience): self.factor, self.patience = factor, patience
    def before_fit(self, learn): self.best, self.wait = float("inf"), 0
    def better(self, loss): return loss < self.best
    def judge(self, learn):
        loss = learn.history[-1]["valid_loss"]
        self.wait = 0 if self.better(loss) else self.wait + 1
        self.best = min(self.best, loss)
        if self.wait >= self.patience: self.wait = 0; self.lower(learn)
    def lower(self, learn):
        for group in learn.groups: group["lr"] *= self.factor
    def after_epoch(self, learn): self.judge(learn)


class PatientNextMorning(Patient):
    after_epoch = Callback.after_epoch
    def before_epoch(self, learn): learn.history and self.judge(learn)


class PatientForEver(Patient):
    before_fit = Callback.before_fit
    def __init__(self, factor, patience): super().__init__(factor, patience); Patient.before_fit(self, None)


PATIENT_RIGHT = [Patient, PatientNextMorning, _made(Patient, lower=lambda self, learn: learn.set_lr([g["lr"]*self.factor for g in learn.groups]))]
PATIENT_WRONG = [
    (lambda factor, patience: Patient(.5, patience), "factor 0.1"), (lambda factor, patience: Patient(factor, 2), "patience 3"),
    (_made(Patient, lower=lambda self, learn: setattr(learn, "lr", [g["lr"]*self.factor for g in learn.groups])), "base rate|relative to the first"),
    (PatientForEver, "every fit|epochs of patience"), (_made(Patient, better=lambda self, loss: loss <= self.best), "two epochs of patience"),
    (_made(Patient, lower=lambda self, learn: learn.groups[-1].update(lr=learn.groups[-1]["lr"]*self.factor)), "all groups")]


# 05b
def mean(paths, ints=-1, divide=None, cast=False):
    states = [read_checkpoint(path)["model"] for path in paths]
    total = {k: sum(s[k] for s in states)/(divide or len(states)) for k in states[0]}
    return {k: v if states[0][k].is_floating_point() else v.to(states[0][k].dtype) if cast else states[ints][k] for k, v in total.items()}


def mean_as_they_come(paths):
    out = read_checkpoint(paths[0])["model"]
    for i, path in enumerate(paths[1:], 2):
        out = {k: out[k].lerp(v, 1/i) if v.is_floating_point() else v for k, v in read_checkpoint(path)["model"].items()}
    return out


MEAN_RIGHT = [mean, mean_as_they_come]
MEAN_WRONG = [
    (lambda paths: mean(paths, ints=0), "whole numbers"), (lambda paths: mean(paths, divide=3), "not the mean"), (lambda paths: mean(paths, cast=True), "whole numbers"),
    (lambda paths: {k: v if v.is_floating_point() else torch.stack([read_checkpoint(path)["model"][k] for path in paths]).max() for k, v in mean(paths).items()}, "whole numbers"),
    (lambda paths: {k: v[None] if v.is_floating_point() else v for k, v in mean(paths).items()}, "of shape"),
    (lambda paths: {"model": mean(paths)}, "names"), (lambda paths: {k: v.double() for k, v in mean(paths).items()}, "it was"),
    (lambda paths: mean([*paths[:-1], paths.pop()]), "leave the list"), (lambda paths: {k: v.numpy() for k, v in mean(paths).items()}, "return tensors")]
COUNTER_RIGHT, COUNTER_WRONG = [4, 4., torch.tensor(4)], [(12, "before_fit"), (8, "epochs are left"), (4.9, "4.9"), ("four", "a number")]


def alike(drop=(), equal=torch.equal, only=None, seconds=("seconds",), names=True, change=lambda content: content):
    def walk(a, b):
        if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.shape == b.shape and bool(equal(a, b))
        if isinstance(a, dict) and not names and "0.bias" in a: return all(map(walk, a.values(), b.values()))
        if isinstance(a, dict): return set(a) - set(seconds) == set(b) - set(seconds) and all(walk(a[k], b[k]) for k in set(a) - set(seconds))
        if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(walk, a, b))
        return a == b
    return lambda a, b: walk(*({k: v for k, v in change(read_checkpoint(x)).items() if k not in drop and (only is None or k in only)} for x in (a, b)))


def _without_state(content):
    for opt in content["opts"].values(): opt.pop("state")
    return content


ALIKE_RIGHT = [alike(), lambda a, b: np.bool_(alike()(a, b)), lambda a, b: torch.tensor(alike()(a, b))]
ALIKE_WRONG = [
    (lambda a, b: Path(a).read_bytes() == Path(b).read_bytes(), "but for their seconds"), (lambda a, b: True, "another seed"),
    (alike(equal=lambda a, b: torch.allclose(a.double(), b.double(), rtol=1e-5)), "'model'"), (alike(only=("model", "opts", "random")), "'base'"),
    (alike(drop=("base",)), "'base'"), (alike(drop=("epochs_done",)), "'epochs_done'"), (alike(drop=("callbacks",)), "'callbacks'"),
    (alike(names=False), "a name"), (alike(change=_without_state), "the state"), (alike(change=lambda c: c | {"random": c["random"]["torch"]}), "Python's"),
    (alike(seconds=("seconds", "train_loss")), "'history'"), (lambda a, b: "yes", "True or False")]
CUT_RIGHT = [{"old best.pt", "old last.pt"}, ["old last.pt", "old best.pt"]]
CUT_WRONG = [({"old last.pt"}, "only when it is whole"), ({"old best.pt", "old last.pt", "new best.pt"}, "not yet there"), ({"new last.pt", "old best.pt"}, "meanwhile"), (3, "a set")]

ANSWERS = [
    (check_skip_first, SKIP_RIGHT, SKIP_WRONG), (check_average_weights, AVERAGE_RIGHT, AVERAGE_WRONG), (check_f1, F1_RIGHT, F1_WRONG),
    (check_still_heard, HEARD_RIGHT, HEARD_WRONG), (check_who_writes, WRITES_RIGHT, WRITES_WRONG),
    (check_thermometer, WARM_RIGHT, WARM_WRONG), (check_windows, WINDOWS_RIGHT, WINDOWS_WRONG), (check_stop_at, GOAL_RIGHT, GOAL_WRONG),
    (check_walk, WALK_RIGHT, WALK_WRONG), (check_plateau, PATIENT_RIGHT, PATIENT_WRONG),
    (check_average_checkpoints, MEAN_RIGHT, MEAN_WRONG), (check_counter, COUNTER_RIGHT, COUNTER_WRONG),
    (check_same_checkpoint, ALIKE_RIGHT, ALIKE_WRONG), (check_power_cut, CUT_RIGHT, CUT_WRONG)]


@pytest.mark.parametrize("check, answer", [(check, answer) for check, right, _ in ANSWERS for answer in right])
def test_right_answers_are_accepted(check, answer, capsys): check(answer); assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize("check, answer, word", [(check, answer, word) for check, _, wrong in ANSWERS for answer, word in wrong])
def test_wrong_answers_get_a_word_that_helps(check, answer, word):
    with pytest.raises(AssertionError, match=word): check(answer)

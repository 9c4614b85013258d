"Checkpoints: whole or not at all, read without running code, and a resume that is bit-identical."
import enum
import os
import random
import signal
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data
from learners import At, batches, equal, history, make, model, raises, weights
from torch import nn

from exp import learner as L
from exp.callbacks import EMA, EarlyStopping, Recorder, ValidateEvery
from exp.checkpoints import SaveCheckpoint
from exp.learner import read_checkpoint, write_checkpoint
from exp.loaders import DataLoader, TensorDataset
from exp.schedule import one_cycle
from exp.training import SGD, accuracy


def loaders(generator=None):
    return L.DataLoaders(DataLoader(TensorDataset(*data()), 16, shuffle=True, generator=generator), DataLoader(TensorDataset(*data(24, 1)), 16))


def split(net): return [net[0].parameters(), net[2].parameters()]


def run(folder, seed=0, resume=None, extra=(), n=4, opt_func=partial(torch.optim.SGD, momentum=.9), own=False):
    drop = nn.Sequential(*model(seed), nn.BatchNorm1d(2), nn.Dropout(.3))
    learn = make(dls=loaders(torch.Generator().manual_seed(seed) if own else None), net=drop, opt_func=opt_func)
    learn.fit(n, cbs=[Recorder(), EarlyStopping(patience=50, restore_best=True), EMA(.8), one_cycle(.1), SaveCheckpoint(folder), *extra], resume=resume)
    return learn


@pytest.mark.parametrize("epoch, event", [(1, "after_step"), (2, "after_pass"), (3, "before_batch")])
@pytest.mark.parametrize("opt_func", [SGD, partial(torch.optim.SGD, momentum=.9), torch.optim.AdamW])
@pytest.mark.parametrize("own", [False, True])
def test_resume_is_bit_identical(tmp_path, epoch, event, opt_func, own):
    def cut(learn):
        if learn.epoch == epoch: raise KeyboardInterrupt
    class Cut(L.Callback): pass
    setattr(Cut, event, lambda self, learn: cut(learn) if learn.training else None)
    calm = run(tmp_path/"calm", opt_func=opt_func, own=own)
    with pytest.raises(KeyboardInterrupt): run(tmp_path/"cut", extra=[Cut()], opt_func=opt_func, own=own)
    random.seed(5); np.random.seed(5); torch.manual_seed(5)
    resumed = run(tmp_path/"cut", seed=9, resume=tmp_path/"cut"/"last.pt", opt_func=opt_func, own=own)
    assert equal(weights(calm), weights(resumed)) and history(calm) == history(resumed)
    assert equal(list(calm.model.buffers()), list(resumed.model.buffers())) and [g["lr"] for g in calm.groups] == [g["lr"] for g in resumed.groups]
    a, b = (read_checkpoint(tmp_path/name/"best.pt")["model"] for name in ("calm", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


CHILD = """
import sys; sys.path[:0] = [{tests!r}]
import torch, time
torch.set_num_threads(1)
import test_checkpoints as t
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


def test_resume_and_rates(tmp_path):
    class See(L.Callback):
        def __init__(self): self.rates = []
        def after_step(self, learn): self.rates.append(learn.opt.param_groups[0]["lr"])
    make([SaveCheckpoint(tmp_path)], lr=.1).fit(1, .07)
    for lr, want in ((None, .07), (.01, .01)):
        see = See()
        learn = make([SaveCheckpoint(tmp_path), see], lr=.1); learn.fit(2, lr=lr, resume=tmp_path/"last.pt")
        assert set(see.rates) == {want} and learn.opt.param_groups[0]["lr"] == want
        make([SaveCheckpoint(tmp_path)], lr=.1).fit(1, .07)


def test_a_rate_that_a_callback_keeps_lowering_goes_on(tmp_path):
    class Halve(L.Callback):
        def before_epoch(self, learn):
            for g in learn.groups: g["lr"] /= 2
            seen.append(learn.groups[0]["lr"])
    seen = []
    make([Halve(), SaveCheckpoint(tmp_path)], lr=.8).fit(2)
    learn = make([Halve(), SaveCheckpoint(tmp_path)], lr=.8); learn.fit(4, resume=tmp_path/"last.pt")
    assert seen == [.4, .2, .1, .05] and learn.groups[0]["lr"] == .8, "base and scheduled values are both kept"


def test_frozen_parts_are_remembered(tmp_path):
    learn = make([SaveCheckpoint(tmp_path)], splitter=split); learn.freeze_to(1); learn.fit(1)
    again = make([SaveCheckpoint(tmp_path)], splitter=split); again.fit(2, resume=tmp_path/"last.pt")
    learn.fit(1)
    assert torch.equal(again.model[0].weight, model()[0].weight) and not again.model[0].weight.requires_grad


def test_a_cancelled_epoch_is_no_checkpoint(tmp_path):
    class Half(L.Callback):
        def after_step(self, learn):
            if learn.epoch == 1: raise L.CancelFit
    make([SaveCheckpoint(tmp_path, "train_loss"), Half()]).fit(3)
    assert read_checkpoint(tmp_path/"last.pt")["epochs_done"] == 1 == read_checkpoint(tmp_path/"best.pt")["epochs_done"]


class Script(L.Metric):
    name = "score"
    def __init__(self, values): self.values = iter(values)
    def add(self, pred, yb, weight): pass
    def value(self): return next(self.values)


def test_the_n_best_are_kept_in_order(tmp_path):
    nan = float("nan")
    learn = make([SaveCheckpoint(tmp_path, "score", n_best=3)], metrics=[Script([nan, .2, .5, .1, .3, nan, .4])]); learn.fit(7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "best_2.pt", "best_4.pt", "best_6.pt", "last.pt"]
    assert [read_checkpoint(tmp_path/f)["epochs_done"] for f in ("best.pt", "best_2.pt", "best_4.pt", "best_6.pt", "last.pt")] == [3, 3, 5, 7, 7]
    assert [name for _, name in learn.cb(SaveCheckpoint).kept] == ["best_2.pt", "best_6.pt", "best_4.pt"]
    make([SaveCheckpoint(tmp_path/"down", "score", mode="min")], metrics=[Script([.5, .3, .4])]).fit(3)
    assert read_checkpoint(tmp_path/"down"/"best.pt")["epochs_done"] == 2


def test_the_better_one_is_written_first(tmp_path, monkeypatch):
    "Killed between the two files, nothing better is lost."
    written, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (written.append(Path(b).name), real(a, b)))
    make([SaveCheckpoint(tmp_path)]).fit(1)
    assert written == ["best.pt", "last.pt"]


def test_steps_between_hold_weights_only(tmp_path):
    learn = make([SaveCheckpoint(tmp_path, every=2), ValidateEvery(2)]); learn.fit(2)
    assert {p.name for p in tmp_path.iterdir()} == {"best.pt", "last.pt", "step_2.pt", "step_4.pt", "step_6.pt"}
    assert set(read_checkpoint(tmp_path/"step_2.pt")) == {"model"}
    with pytest.raises(ValueError, match="weights only"): learn.fit(3, resume=tmp_path/"step_2.pt")
    make().load(tmp_path/"step_4.pt")


def test_best_holds_the_average_and_last_holds_both(tmp_path):
    ema = EMA(.9)
    learn = make([ema, SaveCheckpoint(tmp_path, "train_loss")]); learn.fit(1)
    best, last = read_checkpoint(tmp_path/"best.pt"), read_checkpoint(tmp_path/"last.pt")
    for name, p in learn.model.named_parameters():
        assert torch.equal(best["model"][name], ema.average[name]) and torch.equal(last["model"][name], p)
        assert torch.equal(last["callbacks"]["EMA"]["average"][name], ema.average[name])


def test_save_and_load_round_trip(tmp_path):
    learn = make(opt_func=torch.optim.AdamW, lr=.01)
    learn.fit(1, cbs=one_cycle(.01))
    learn.save(tmp_path/"a"/"b.pt"); learn.save(tmp_path/"w.pt", optimizer=False)
    other = make(net=model(7), opt_func=torch.optim.AdamW, lr=.01).load(tmp_path/"a"/"b.pt")
    only = make(net=model(7), opt_func=torch.optim.AdamW, lr=.01).load(tmp_path/"w.pt")
    assert equal(weights(learn), weights(other)) and equal(weights(learn), weights(only))
    assert other.opt.param_groups[0]["betas"] == learn.opt.param_groups[0]["betas"] == (.9, .999), "a schedule's last values stay behind"
    learn.fit(1); other.fit(1); only.fit(1)
    assert equal(weights(learn), weights(other)), "the optimizer's memory came along"
    assert not equal(weights(learn), weights(only))


def test_load_keeps_the_rates_of_groups(tmp_path):
    learn = make(splitter=split, lr=[.01, .1]); learn.fit(1, .2); learn.save(tmp_path/"a.pt")
    other = make(splitter=split, lr=[.5, .5]).load(tmp_path/"a.pt"); other.fit(1)
    assert [g["lr"] for g in other.groups] == pytest.approx([.02, .2])


# --- the file ------------------------------------------------------------------------------------------------------------------

class Evil:
    def __reduce__(self): return os.system, ("touch HACKED",)


def test_bad_checkpoints_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = make(); learn.fit(1)
    good = learn.save("good.pt")
    (tmp_path/"torn.pt").write_bytes(good.read_bytes()[:-200]); (tmp_path/"empty.pt").write_bytes(b""); (tmp_path/"text.pt").write_text("hello")
    torch.save({"model": Evil()}, "evil.pt"); torch.save([1], "list.pt")
    make(net=nn.Linear(6, 2)).save("other.pt")
    make(net=nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))).save("narrow.pt")
    make(opt_func=lambda p, lr: {"a": torch.optim.SGD(p, lr)}).save("named.pt")
    before, rows = weights(learn), history(learn)
    cases = {"torn.pt": "truncated", "empty.pt": "truncated", "text.pt": "truncated", "evil.pt": "pickled code", "list.pt": "no checkpoint",
             "other.pt": "0.weight is missing there", "narrow.pt": r"0.weight is \[4, 6\] there, \[5, 6\] here", "named.pt": r"another optimizer: \{'a': \['4 momentum'\]\} there, \{'opt': \['4'\]\} here"}
    for name, words in cases.items():
        for attempt in (lambda: learn.load(name), lambda: learn.fit(2, .7, resume=name)):
            with pytest.raises(ValueError, match=words): attempt()
            assert equal(weights(learn), before), name
    for attempt in (lambda: learn.load("none.pt"), lambda: learn.fit(2, .7, resume="none.pt")):
        with pytest.raises(FileNotFoundError, match="none.pt"): attempt()
    assert history(learn) == rows and learn.epochs_done == 1 and learn.groups[0]["lr"] == .1, "neither history nor rate is touched"
    assert not (tmp_path/"HACKED").exists()


def test_resume_wants_the_same_callbacks(tmp_path):
    make([SaveCheckpoint(tmp_path), Recorder()]).fit(1)
    with pytest.raises(ValueError, match="resume with the callbacks"): make().fit(2, resume=tmp_path/"last.pt")
    make([Recorder(), SaveCheckpoint(tmp_path)]).fit(2, resume=tmp_path/"last.pt")      # their order does not matter


def test_what_cannot_be_read_back_is_refused_when_it_is_written(tmp_path):
    class Keeps(L.Callback):
        def __init__(self, state): self.state = state
        def state_dict(self): return {"it": self.state}
        def load_state_dict(self, state): self.state = state["it"]
    class Auc(L.Metric):
        name, lower_is_better = "auc", False
        def add(self, pred, yb, weight): pass
        def value(self): return np.float64(.5)
    adamw = lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=np.float64(.1))
    for kwargs in (dict(metrics=[Auc()]), dict(lr=np.float64(.1), opt_func=torch.optim.SGD), dict(opt_func=adamw), dict(cbs=[Keeps(Path("best.pt"))]),
                   dict(cbs=[Keeps([np.int64(3), (1, "a"), None, {"t": torch.ones(2)}])])):
        learn = make(**kwargs); learn.fit(1); learn.save(tmp_path/"a.pt"); read_checkpoint(tmp_path/"a.pt")
    class Phase(enum.IntEnum): A = 1
    for bad in (object(), {1, 2}, np.ones(3), lambda: 0, np.datetime64("2020-01-01"), np.timedelta64(3, "D"), 1j, Phase.A, {Phase.A: 1}, torch.ones(2).as_subclass(type("Sub", (torch.Tensor,), {}))):
        learn = make([Keeps(bad)]); learn.fit(1); old = (tmp_path/"a.pt").read_bytes()
        with pytest.raises(TypeError, match=r"callbacks\.Keeps\.it is a"): learn.save(tmp_path/"a.pt")
        assert (tmp_path/"a.pt").read_bytes() == old


def test_no_changed_byte_is_overlooked(tmp_path):
    "Whatever is changed, the content is the same or the file is refused; PyTorch alone reads wrong weights."
    def flat(x): return {k: flat(v) for k, v in x.items()} if isinstance(x, dict) else (x.tolist(), x.dtype) if isinstance(x, torch.Tensor) else x
    good = write_checkpoint({"model": {"w": torch.arange(5.), "b": torch.ones(2)}, "n": 1}, tmp_path/"good.pt")
    whole, want, refused = good.read_bytes(), flat(read_checkpoint(good)), 0
    inside = whole.find(torch.arange(5.).numpy().tobytes())
    for i in [*range(0, len(whole), 7), *range(inside, inside + 20)]:
        (tmp_path/"bad.pt").write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i+1:])
        try: assert flat(read_checkpoint(tmp_path/"bad.pt")) == want
        except ValueError: refused += 1
        else: assert not inside <= i < inside + 20
    assert refused > 50
    for i in range(0, len(whole), 90):
        (tmp_path/"bad.pt").write_bytes(whole[:i])
        with pytest.raises(ValueError, match="truncated"): read_checkpoint(tmp_path/"bad.pt")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(tmp_path):
    path = make().save(tmp_path/"a.pt"); path.chmod(0)
    with pytest.raises(PermissionError): read_checkpoint(path)


class Noisy(torch.utils.data.Dataset):
    "Draws from a generator of its own."
    def __init__(self): self.generator, (self.x, self.y) = torch.Generator().manual_seed(0), data()
    def __len__(self): return 40
    def __getitem__(self, i): return self.x[i] + torch.randn(6, generator=self.generator), self.y[i]


@pytest.mark.parametrize("wrap", [lambda ds: ds, lambda ds: torch.utils.data.Subset(ds, range(36)), lambda ds: torch.utils.data.ConcatDataset([ds, ds]),
                                  lambda ds: torch.utils.data.Subset(torch.utils.data.ConcatDataset([ds]), range(40))], ids=["plain", "subset", "concat", "both"])
def test_generators_inside_data_sets_go_on(tmp_path, wrap):
    "At a resume, and after a validation in the middle."
    def run(folder, n, cbs=(), resume=None):
        dl = DataLoader(wrap(Noisy()), 16)
        learn = make([SaveCheckpoint(tmp_path/folder, "train_loss"), *cbs], L.DataLoaders(dl, dl))
        learn.fit(n, resume=resume)
        return learn
    calm, _ = run("calm", 2), run("cut", 1)
    nosy = run("nosy", 2, [At("after_step", lambda learn: learn.validate(), n=1)])
    assert equal(weights(calm), weights(run("cut", 2, resume=tmp_path/"cut"/"last.pt"))) and equal(weights(calm), weights(nosy))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    learn = make(); learn.fit(1)
    path = learn.save(tmp_path/"a.pt")
    old = path.read_bytes()
    def full(*args): args[1].write(b"half"); raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError): learn.save(path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_rights_links_and_leftovers(tmp_path):
    old = os.umask(0o022)
    try:
        learn = make(); learn.fit(1); learn.save(tmp_path/"ours.pt"); torch.save({}, tmp_path/"torchs.pt")
    finally: os.umask(old)
    assert stat.S_IMODE((tmp_path/"ours.pt").stat().st_mode) == stat.S_IMODE((tmp_path/"torchs.pt").stat().st_mode)
    (tmp_path/"store").mkdir(); (tmp_path/"store"/"last.pt").write_bytes(b"")
    (tmp_path/"last.pt").symlink_to(tmp_path/"store"/"last.pt"); learn.save(tmp_path/"last.pt")
    assert (tmp_path/"last.pt").is_symlink() and read_checkpoint(tmp_path/"store"/"last.pt")
    (tmp_path/"ours.pt.part").write_bytes(b"left by a kill"); learn.save(tmp_path/"ours.pt")
    assert not list(tmp_path.glob("*.part"))


def test_in_mid_epoch_only_the_weights_are_saved(tmp_path):
    class Save(L.Callback):
        def after_batch(self, learn): learn.save(tmp_path/"w.pt", optimizer=False); learn.save(tmp_path/"a.pt")
    with pytest.raises(ValueError, match="optimizer=False"): make([Save()]).fit(1)
    assert set(read_checkpoint(tmp_path/"w.pt")) == {"model"} and not (tmp_path/"a.pt").exists()


def test_a_schedule_is_missed_at_resume(tmp_path):
    make([one_cycle(1.), SaveCheckpoint(tmp_path)]).fit(2)
    with pytest.raises(ValueError, match="ParamScheduler"): make([SaveCheckpoint(tmp_path)]).fit(3, resume=tmp_path/"last.pt")


def test_another_kind_of_optimizer_is_refused(tmp_path):
    learn = make(); learn.fit(1); learn.save(tmp_path/"sgd.pt")
    for opt_func in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop):
        with pytest.raises(ValueError, match="another optimizer"): make(opt_func=opt_func).load(tmp_path/"sgd.pt")
    make(opt_func=torch.optim.AdamW).save(tmp_path/"adamw.pt")
    with pytest.raises(ValueError, match=r"\['4 betas'\]\} there, \{'opt': \['4'\]\} here"): make().load(tmp_path/"adamw.pt")
    with pytest.raises(ValueError, match=r"\['4'\]\} there, \{'opt': \['2', '2'\]\} here"): make(splitter=split).load(tmp_path/"sgd.pt")


def test_of_two_optimizers_both_are_loaded_or_none(tmp_path):
    def two(second): return lambda groups, lr: {"a": torch.optim.SGD(groups[0]["params"], lr, momentum=.9), "b": second(groups[1]["params"], lr)}
    first = make(splitter=split, opt_func=two(torch.optim.AdamW)); first.fit(1); first.save(tmp_path/"two.pt")
    other = make(splitter=split, opt_func=two(torch.optim.SGD), lr=.03); other.fit(1)
    before = other.opts["a"].state[other.model[0].weight]["momentum_buffer"].clone()
    with pytest.raises(ValueError, match="another optimizer"): other.load(tmp_path/"two.pt")
    assert other.opt is other.opts["a"] and other.groups[0]["lr"] == .03
    assert torch.equal(before, other.opts["a"].state[other.model[0].weight]["momentum_buffer"])


def test_unfreeze_after_resume(tmp_path):
    learn = make([SaveCheckpoint(tmp_path)], splitter=split); learn.freeze_to(1); learn.fit(1)
    again = make([SaveCheckpoint(tmp_path)], splitter=split); again.fit(2, resume=tmp_path/"last.pt"); again.unfreeze()
    assert all(p.requires_grad for p in again.model.parameters())


def test_n_best_after_a_kill_in_mid_epoch(tmp_path):
    "Files newer than last.pt are written again under the same names."
    def go(folder, n, resume=None, stop=-1):
        torch.manual_seed(0)
        class Stop(L.Callback):
            order = 101
            def after_batch(self, learn):
                if learn.history and learn.history[-1].get("step") == stop: raise KeyboardInterrupt
        learn = make([ValidateEvery(2), SaveCheckpoint(folder, n_best=2), Stop()], L.DataLoaders(batches(64, 8), batches(24)))
        try: learn.fit(n, resume=resume)
        except KeyboardInterrupt: pass
        return learn
    go(tmp_path/"calm", 3); go(tmp_path/"cut", 3, stop=12)
    go(tmp_path/"cut", 3, resume=tmp_path/"cut"/"last.pt")
    names = [sorted(p.name for p in (tmp_path/f).iterdir()) for f in ("calm", "cut")]
    assert names[0] == names[1]
    for name in names[0]:
        a, b = (read_checkpoint(tmp_path/f/name)["model"] for f in ("calm", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a), name


def test_write_and_read(tmp_path):
    assert read_checkpoint(write_checkpoint({"model": {"w": torch.ones(2)}, "n": 1}, tmp_path/"deep"/"c.pt"))["n"] == 1


def test_a_second_callback_of_a_class_has_its_own_name(tmp_path):
    def cbs(): return [EarlyStopping("valid_loss", 9), EarlyStopping("valid_loss", 7), EarlyStopping("accuracy", 7), SaveCheckpoint(tmp_path)]
    make(cbs(), metrics=[accuracy]).fit(1)
    states = read_checkpoint(tmp_path/"last.pt")["callbacks"]
    watched = ["EarlyStopping(valid_loss)", "EarlyStopping(valid_loss)_2", "EarlyStopping(accuracy)"]
    assert set(states) == {*watched, "SaveCheckpoint(valid_loss)"} and states[watched[0]]["best"] != states[watched[2]]["best"]
    make(cbs(), metrics=[accuracy]).fit(2, resume=tmp_path/"last.pt")


def test_ctrl_c_while_writing_leaves_no_part(tmp_path, monkeypatch):
    learn = make(); learn.fit(1)
    monkeypatch.setattr(os, "fsync", lambda handle: raises(KeyboardInterrupt())(None))
    with pytest.raises(KeyboardInterrupt): learn.save(tmp_path/"a.pt")
    assert not list(tmp_path.iterdir())


# --- what a fresh engineer found -------------------------------------------------------------------------------------------

def test_a_wrong_monitor_loses_no_epoch(tmp_path):
    learn = make([SaveCheckpoint(tmp_path, "no_loss")])
    with pytest.raises(ValueError, match="watches 'no_loss'"): learn.fit(2)
    assert read_checkpoint(tmp_path/"last.pt")["epochs_done"] == 1


def test_a_second_fit_has_to_beat_the_best_of_the_first(tmp_path):
    keep = SaveCheckpoint(tmp_path, "score")
    learn = make([keep], metrics=[Script([.9, .5, .95])]); learn.fit(1)
    best = (tmp_path/"best.pt").read_bytes()
    learn.fit(1)
    assert (tmp_path/"best.pt").read_bytes() == best
    learn.fit(1)
    assert (tmp_path/"best.pt").read_bytes() != best
    learn.remove_cb(keep)
    make([keep], metrics=[Script([.1])]).fit(1)
    assert keep.kept == [[.1, "best.pt"]], "another model"


def test_the_n_best_have_names_of_their_own(tmp_path):
    learn = make([SaveCheckpoint(tmp_path, "score", n_best=2)], metrics=[Script([.9, .5, .7, .8])])
    for _ in range(4): learn.fit(1)
    assert {p.name for p in tmp_path.iterdir()} == {"best.pt", "last.pt", *(name for _, name in learn.cb(SaveCheckpoint).kept)}
    twice = At("after_step", lambda learn: [learn.record({"epoch": 0, "score": s}) for s in (.1, .2)])
    learn = make([SaveCheckpoint(tmp_path/"b", "score", n_best=3), twice], metrics=[Script([.3])]); learn.fit(1)
    assert len({name for _, name in learn.cb(SaveCheckpoint).kept}) == 3 and len([*(tmp_path/"b").iterdir()]) == 5


def test_no_training_goes_on_from_an_average(tmp_path):
    make([EMA(.9), SaveCheckpoint(tmp_path)]).fit(1)
    with pytest.raises(ValueError, match="best.pt holds averaged weights.*take last.pt"): make([EMA(.9), SaveCheckpoint(tmp_path)]).fit(2, resume=tmp_path/"best.pt")
    make([EMA(.9), SaveCheckpoint(tmp_path)]).fit(2, resume=tmp_path/"last.pt")


def test_an_epoch_that_was_cut_cannot_be_gone_on_from(tmp_path):
    def save(): return At("after_epoch", lambda learn: learn.save(tmp_path/"a.pt"), mode=None)
    with pytest.raises(ValueError, match="in the middle of an epoch"): make([save(), At("after_step", raises(L.CancelEpoch()))]).fit(1)
    make([save(), At("before_batch", raises(L.CancelEpoch()), mode="validate")]).fit(1)
    assert read_checkpoint(tmp_path/"a.pt")["epochs_done"] == 1
    make(At("before_epoch", lambda learn: learn.save(tmp_path/"b.pt"), n=1, mode=None)).fit(2)
    assert read_checkpoint(tmp_path/"b.pt")["epochs_done"] == 1


class Noise(L.Callback):
    "Adds noise from generators of its own."
    def __init__(self, seed): self.rng, self.mine = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    def before_batch(self, learn):
        if learn.training: learn.xb = learn.xb + self.rng.normal() + torch.randn(learn.xb.shape, generator=self.mine)


def test_a_resume_knows_generators_of_callbacks(tmp_path):
    calm = make([Noise(0)]); calm.fit(2)
    make([Noise(0), SaveCheckpoint(tmp_path)]).fit(1)
    resumed = make([Noise(5), SaveCheckpoint(tmp_path)], net=model(4)); resumed.fit(2, resume=tmp_path/"last.pt")
    assert equal(weights(calm), weights(resumed))


def test_two_of_them_in_one_folder_are_refused(tmp_path):
    def both(*folders): return [SaveCheckpoint(folder, monitor) for folder, monitor in zip(folders, ("valid_loss", "accuracy"))]
    with pytest.raises(ValueError, match="give each a folder of its own"): make(both(tmp_path, tmp_path), metrics=accuracy).fit(1)
    assert not list(tmp_path.iterdir())
    make(both(tmp_path/"a", tmp_path/"b"), metrics=accuracy).fit(1)


def test_a_resume_knows_the_older_generators(tmp_path):
    "Those of Python's and NumPy's own, in a data set that draws."
    class Shaken(Noisy):
        def __init__(self): super().__init__(); self.one, self.two = random.Random(0), np.random.RandomState(0)
        def __getitem__(self, i): return self.x[i] + self.one.random() + self.two.rand(), self.y[i]
    def run(folder, n, resume=None):
        learn = make([SaveCheckpoint(tmp_path/folder, "train_loss")], L.DataLoaders(DataLoader(Shaken(), 16)))
        learn.fit(n, resume=resume)
        return weights(learn)
    calm, _ = run("calm", 2), run("cut", 1)
    assert equal(calm, run("cut", 2, resume=tmp_path/"cut"/"last.pt"))


def test_two_of_them_may_come_back_in_another_order(tmp_path):
    def both(*monitors): return [SaveCheckpoint(tmp_path/monitor, monitor) for monitor in monitors]
    make(both("valid_loss", "accuracy"), metrics=accuracy).fit(1)
    learn = make(both("accuracy", "valid_loss"), metrics=accuracy); learn.fit(2, resume=tmp_path/"accuracy"/"last.pt")
    for cb in learn.cbs:
        if isinstance(cb, SaveCheckpoint): assert cb.kept[0][0] in [row[cb.monitor] for row in learn.history]


class ScaledLoss(nn.Module):
    "Divides by a running mean of itself: a buffer that training changes."
    def __init__(self, n=1): super().__init__(); self.register_buffer("mean", torch.ones(n))
    def forward(self, pred, yb):
        loss = nn.functional.cross_entropy(pred, yb)
        if self.training: self.mean.lerp_(loss.detach(), .2)
        return loss/self.mean.mean()


def test_a_resume_knows_the_tensors_of_the_loss(tmp_path):
    whole = make(loss_func=ScaledLoss()); whole.fit(3)
    make(loss_func=ScaledLoss()).fit(1, cbs=SaveCheckpoint(tmp_path))
    again = make(loss_func=ScaledLoss()); again.fit(3, resume=tmp_path/"last.pt", cbs=SaveCheckpoint(tmp_path/"b"))
    assert equal(weights(whole), weights(again)) and history(whole) == history(again) and torch.equal(whole.loss_func.mean, again.loss_func.mean)
    other = make(loss_func=ScaledLoss(2)); before = weights(other)
    with pytest.raises(ValueError, match="of a loss with other tensors"): other.fit(3, resume=tmp_path/"last.pt", cbs=SaveCheckpoint(tmp_path/"c"))
    assert equal(before, weights(other)) and other.load(tmp_path/"last.pt") is other, "its weights alone may be read"
    old = read_checkpoint(tmp_path/"last.pt"); del old["loss"]                      # a file of before
    make(loss_func=ScaledLoss(2)).fit(2, resume=write_checkpoint(old, tmp_path/"old.pt"), cbs=SaveCheckpoint(tmp_path/"d"))


def test_a_refused_resume_changes_nothing(tmp_path):
    def cbs(monitor): return [EarlyStopping(restore_best=True), Recorder(), SaveCheckpoint(tmp_path/monitor, monitor)]
    make(cbs("valid_loss"), metrics=accuracy).fit(2)
    learn = make(cbs("accuracy"), net=model(5), metrics=accuracy); before = weights(learn)
    with pytest.raises(ValueError, match=r"SaveCheckpoint\(valid_loss\)"): learn.fit(3, resume=tmp_path/"valid_loss"/"last.pt")
    assert equal(before, weights(learn)) and not learn.cb(Recorder).losses


def test_an_average_is_loaded_with_its_weights(tmp_path):
    learn = make(EMA(.9)); learn.fit(2); learn.save(tmp_path/"a.pt"); found = learn.validate()
    assert make(EMA(.9), net=model(5)).load(tmp_path/"a.pt").validate() == found
    learn.save(tmp_path/"b.pt", optimizer=False); other = make(EMA(.9), net=model(5)); other.fit(1)
    assert other.load(tmp_path/"b.pt").validate() == make(net=learn.model).validate() != found


def test_our_optimizer_and_pytorchs_hand_each_other_a_training(tmp_path):
    from exp.optim import adamw
    for first, second in ((adamw, torch.optim.AdamW), (torch.optim.AdamW, adamw)):
        learn = make(opt_func=first); learn.fit(1); learn.save(tmp_path/"a.pt"); learn.fit(1)
        loaded = make(opt_func=second).load(tmp_path/"a.pt"); loaded.fit(1)
        resumed = make(opt_func=second); resumed.fit(2, resume=tmp_path/"a.pt")
        for other in (loaded, resumed):
            for p, q in zip(weights(learn), weights(other), strict=True): torch.testing.assert_close(p, q)

"exp.imagenette: the statistics against closed forms, each trick against its definition, recipes as data, runs that are judged, kept, resumed and shared."
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import exp.exercises.imagenette as E
import exp.imagenette as I
from exp.checkpoints import SaveCheckpoint
from exp.conv import unfold
from exp.datasets import fetch
from exp.interpret import load_predictor
from exp.learner import Callback, DataLoaders, Learner
from exp.loaders import DataLoader
from exp.photos import image_files
from exp.testing import test_like
from exp.xresnet import basic_block, bottleneck, xresnet18, xresnet50

json_writer = I.write_json
SMALL = I.Options(size=32, width=.125, every=8, epochs=1, bs=16, watch=False)


# --- what is luck ----------------------------------------------------------------------------------------------------------------

@given(st.lists(st.floats(0, 1), max_size=12), st.sampled_from([.01, .05, .2]))
def test_holm_by_its_definition(ps, alpha):
    "Rejected is who would be for every set of hypotheses that holds it (closed testing by Bonferroni)."
    ranked, want, open_ = sorted(enumerate(ps), key=lambda pair: pair[1]), [False]*len(ps), True
    for rank, (i, p) in enumerate(ranked):
        open_ = open_ and p <= alpha/(len(ps) - rank)
        want[i] = open_
    got = I.holm(ps, alpha)
    assert got == want
    assert all(g <= (p <= alpha) for g, p in zip(got, ps)) and all(g >= (p <= alpha/max(1, len(ps))) for g, p in zip(got, ps))


def test_holm_knows_nothing_of_nan(): assert I.holm([math.nan, .001]) == I.holm([.001, math.nan])[::-1] == [False, True]


@pytest.mark.parametrize("t", [0, .3, 1, -2.5, 6, 40])
def test_students_test_where_it_has_a_closed_form(t):
    assert I.two_sided(t, 1) == pytest.approx(1 - 2/math.pi*math.atan(abs(t)), abs=1e-4)
    assert I.two_sided(t, 2) == pytest.approx(1 - abs(t)/math.sqrt(2 + t*t), abs=1e-4)
    assert I.two_sided(t, 1e4) == pytest.approx(math.erfc(abs(t)/math.sqrt(2)), abs=2e-3)


def test_two_rows_are_the_paired_test():
    y = torch.randn(2, 6, dtype=torch.float64) + torch.randn(6)
    error, df = I.paired_error(y.tolist())
    assert df == 5 and error == pytest.approx((y[0] - y[1]).std().item()/6**.5)


def test_rows_and_seeds_may_have_levels_of_their_own():
    y = torch.randn(7, 5, dtype=torch.float64)
    error, df = I.paired_error(y.tolist())
    moved, _ = I.paired_error((y + 9*torch.randn(7, 1) + 9*torch.randn(5)).tolist())
    assert df == 24 and moved == pytest.approx(error)
    many, _ = I.paired_error((2*torch.randn(60, 200, dtype=torch.float64)).tolist())
    assert many == pytest.approx(2*math.sqrt(2/200), rel=.05)


@pytest.mark.parametrize("scores", [[[1., 2.]], [[1.], [2.]]])
def test_one_row_or_seed_tells_nothing(scores):
    with pytest.raises(ValueError, match=r"scores are \d×\d: give two rows and two seeds or more"): I.paired_error(scores)


# --- tricks ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("h, w", [(8, 8), (7, 10), (1, 5), (2, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_blur_is_a_convolution(h, w, stride):
    x = torch.randn(2, 3, h, w, requires_grad=True)
    line = torch.tensor([1., 2, 1])/4
    kernel = (line*line[:, None]).expand(3, 1, 3, 3)
    want = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, stride=stride, groups=3)
    got = I.BlurPool(stride)(x)
    test_like(got, want)
    assert got.shape[2:] == (-(-h//stride), -(-w//stride))
    test_like(*(torch.autograd.grad(out.sin().sum(), x)[0] for out in (got, want)))


def test_a_blur_keeps_what_is_even_dtype_and_layout():
    even = torch.full((1, 2, 6, 6), 3.)
    test_like(I.BlurPool()(even), even[..., ::2, ::2])
    x = torch.randn(2, 8, 6, 6, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    out = I.BlurPool()(x)
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", [xresnet18, xresnet50])
def test_every_stride_is_blurred_and_no_weight_changes(make):
    torch.manual_seed(0)
    net = make(widths=(16, 16, 32, 32), stem=(4, 4, 8))
    before, skips = {id(p): p.detach().clone() for p in net.parameters()}, sum(m.stride[0] > 1 for m in net.modules() if isinstance(m, nn.Conv2d))
    shapes = [net(torch.zeros(2, 3, n, n)).shape for n in (33, 64)]
    assert I.blur_strides(net) is net and [net(torch.zeros(2, 3, n, n)).shape for n in (33, 64)] == shapes
    assert all(torch.equal(p, before[id(p)]) for p in net.parameters()) and len(before) == len([*net.parameters()])
    blurs = [m for m in net.modules() if isinstance(m, I.BlurPool)]
    assert len(blurs) == skips - 1 + 1, "all but the first convolution, and the max pool"
    assert not any(m.stride not in (1, (1, 1)) for m in net.modules() if isinstance(m, nn.MaxPool2d))


@pytest.mark.parametrize("n_out, pairs", [(16, 8), (7, 3), (54, 27)])
def test_whitened_answers_do_not_correlate(n_out, pairs):
    g = torch.Generator().manual_seed(0)
    xb = F.avg_pool2d(torch.rand(8, 3, 24, 24, generator=g), 3, 1)*torch.tensor([1., 2, .5])[:, None, None] + 1
    layer = nn.Conv2d(3, n_out, 3, bias=False)
    old = layer.weight.detach().clone()
    assert I.whiten_(layer, xb) is layer and not layer.weight.requires_grad
    answers = (layer.weight.flatten(1)[:pairs] @ unfold(xb, 3).transpose(0, 1).flatten(1)).double()
    cov = torch.cov(answers, correction=0)
    test_like(cov, torch.eye(pairs, dtype=torch.float64), rtol=0, atol=2e-2)
    test_like(layer.weight[pairs:2*pairs], -layer.weight[:pairs], rtol=0, atol=0)
    assert torch.equal(layer.weight[2*pairs:], old[2*pairs:])


def test_more_filters_than_directions_are_refused():
    with pytest.raises(ValueError, match="60 filters, but patches vary in 27 directions: at most 54"): I.whiten_(nn.Conv2d(3, 60, 3), torch.rand(4, 3, 9, 9))


def test_the_loudest_direction_comes_first():
    xb = torch.rand(8, 3, 24, 24)*torch.tensor([3., 1, .1])[:, None, None]
    norms = I.whiten_(nn.Conv2d(3, 20, 3, bias=False), xb).weight[:10].flatten(1).norm(dim=1)
    assert (norms.diff() >= -1e-6).all(), "loud directions are divided by more"


def test_an_identity_start():
    torch.manual_seed(0)
    net = xresnet18(widths=(8, 8, 16, 16), stem=(4, 4, 8))
    first, old = net.stem[0][0], {n: p.detach().clone() for n, p in net.named_parameters()}
    inner = net.stages[2][0].branch[0][0]                # from 8 channels to 16, stride 2
    assert I.identity_start_(net) is net
    x = torch.rand(2, 8, 6, 6)
    test_like(inner(x)[:, :8], x[..., ::2, ::2])
    changed = {n for n, p in net.named_parameters() if not torch.equal(p, old[n])}
    kernels = {n: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
    assert changed == {f"{n}.weight" for n, m in kernels.items() if m is not first}
    test_like(inner.weight[8:], old[next(n for n, m in kernels.items() if m is inner) + ".weight"][8:], rtol=0, atol=0)


def test_norm_biases_are_a_partition():
    net = xresnet18(widths=(8, 8, 16, 16), stem=(4, 4, 8))
    biases, others = I.norm_biases(net)
    assert {*map(id, biases)} == {id(p) for n, p in net.named_parameters() if n.endswith("1.bias") and "head" not in n}
    assert len(biases) + len(others) == len([*net.parameters()]) and not {*map(id, biases)} & {*map(id, others)}


@given(st.integers(16, 128), st.integers(1, 30), st.sampled_from([64, 96, 128, 160, 100]))
def test_sides_grow_to_the_last(first, n_epochs, last):
    first = min(first, last)
    sides = [I.ProgressiveSizes(first).side(e, n_epochs, last) for e in range(n_epochs)]
    assert sides[-1] == last and all(a <= b + 4 for a, b in zip(sides, sides[1:])) and all(s % 8 == 0 for s in sides[:-1])
    assert abs(sides[0] - (first if n_epochs > 1 else last)) <= 4


def test_photos_grow_in_training_only():
    learn, seen = I.learner(replace(SMALL, epochs=3)), []
    class Look(Callback):
        def after_pred(self, learn): seen.append((learn.mode, learn.epoch, learn.xb.shape[-1]))
    learn.fit(3, cbs=[I.ProgressiveSizes(16), Look()])
    assert {s[1:] for s in seen if s[0] == "train"} == {(0, 16), (1, 24), (2, 32)} and {s[2] for s in seen if s[0] == "validate"} == {32}
    assert next(iter(learn.dls.train))[0].shape[-1] == 32


def test_sizes_need_a_crop():
    learn = I.learner(SMALL)
    learn.dls.train.ds.tfm.tfms[:] = [t for t in learn.dls.train.ds.tfm.tfms if not isinstance(t, I.RandomResizedCrop)]
    with pytest.raises(ValueError, match="no RandomResizedCrop among the training photos' transforms"): learn.fit(1, cbs=I.ProgressiveSizes(16))


def test_sizes_do_not_reach_processes_that_stay():
    learn = I.learner(SMALL)
    learn.dls = DataLoaders(DataLoader(learn.dls.train.ds, 16, num_workers=1, workers="processes", persistent_workers=True))
    with pytest.raises(ValueError, match="leave persistent_workers out"): learn.fit(1, cbs=I.ProgressiveSizes(16))


@pytest.mark.parametrize("block, nf", [(basic_block, 8), (bottleneck, 16)])
def test_a_gated_block_starts_as_its_shortcut_and_learns(block, nf):
    made, x = I.gated(block)(nf, nf, 1, nn.ReLU), torch.randn(3, nf, 5, 5)
    test_like(made(x), x.relu(), rtol=0, atol=0)
    gate = made.branch[-1]
    assert isinstance(gate, I.SqueezeExcite) and I.gated(block)(nf, 2*nf, 2)(x).shape == (3, 2*nf, 3, 3)
    factors = gate.gate(x)
    assert factors.shape == (3, nf, 1, 1) and 0 < factors.min() and factors.max() < 1
    test_like(gate(x), x*factors)
    rolled = x.roll(1, -1)
    test_like(gate(rolled), gate(x).roll(1, -1), atol=1e-5)


# --- networks and options --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("depth", [0, 12, "18"])
def test_another_depth_is_told_what_there_is(depth):
    with pytest.raises(ValueError, match=r"depth is .*: give one of \[10, 18, 26, 34, 50\]"): I.imagenette_net(depth=depth)


def test_the_plain_network_is_that_of_lesson_12():
    ours, theirs = I.imagenette_net(7), xresnet18(7, act=nn.SiLU)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 40, 40)
    test_like(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("args", [dict(), dict(depth=10, pool=False), dict(depth=26), dict(depth=34, squeeze=True), dict(depth=50, blur=True), dict(pool=False), dict(pool=False, blur=True, squeeze=True), dict(width=.2)], ids=str)
def test_networks_of_all_kinds(args):
    net = I.imagenette_net(4, **{"width": .125} | args)
    out = net(torch.randn(2, 3, 40, 40))
    assert out.shape == (2, 4) and out.isfinite().all()
    out.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


FIELDS = {f.name: f for f in dataclasses.fields(I.Options)}


@pytest.mark.parametrize("name", FIELDS)
def test_what_cannot_be_is_refused_in_a_sentence(name):
    can, wrong = FIELDS[name].metadata, []
    kind = type(FIELDS[name].default)
    if can["of"]: wrong.append(7 if kind is int else "none of them")
    elif kind is not bool:
        if can["low"] > -math.inf: wrong.append(kind(can["low"] - 1))
        if can["high"] < math.inf: wrong.append(kind(can["high"] + 1))
        assert wrong
    for value in wrong:
        with pytest.raises(ValueError, match=rf"{name} is {re.escape(str(value))}: give (one of|at least|[\d.e-]+ to)"): I.Options(**{name: value})


@pytest.mark.parametrize("wrong", [dict(epochs=2.5), dict(seed=1.5), dict(lr="0.01"), dict(blur=1), dict(bs=True), dict(flip=None)], ids=str)
def test_types_are_checked(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=rf"{name} is {value!r}: its type has to be"): I.Options(**wrong)


def test_whole_numbers_are_floats_where_floats_are_asked_for():
    assert I.Options(smooth=0) == I.Options(smooth=0.) and I.Options(decay=1).digest() == I.Options(decay=1.).digest()


@pytest.mark.parametrize("unread, words", [(dict(lr_1d=.1), "lr_1d is 0.1, but only opt=muon looks at it"), (dict(opt="muon", beta2=.9), "beta2 is 0.9, but only opt=adamw"),
                                           (dict(opt="muon", eps=.1), "eps is 0.1, but only opt=adamw"), (dict(shape="flat", warm=.9), "warm is 0.9, but only shape=cycle"),
                                           (dict(grow=.5, epochs=1), "grow is 0.5, but the only epoch is the last")], ids=str)
def test_an_option_that_nothing_reads_is_refused(unread, words):
    with pytest.raises(ValueError, match=words): I.Options(**unread)


def test_others_need_to_be_there():
    with pytest.raises(ValueError, match="judge is others, but every is 1: nobody is left to judge"): I.Options(judge="others")


@pytest.mark.parametrize("name", FIELDS)
def test_a_digest_tells_recipes_apart_and_ignores_what_is_off(name):
    field, base = FIELDS[name], I.Options(every=2, opt="muon" if name == "lr_1d" else "adamw")
    default = getattr(base, name)
    other = next(v for v in field.metadata["of"] if v != default) if field.metadata["of"] else (
        not default if type(default) is bool else default/2 if default/2 >= max(field.metadata["low"], .001) and type(default) is float else default + 1 if type(default) is int else .5)
    assert replace(base, **{name: other}).digest() != base.digest() == replace(base).digest()
    if field.metadata["off"] is not None:
        off = replace(base, **{name: field.metadata["off"]})
        chosen = {k: v for k, v in dataclasses.asdict(off).items() if k != name}
        assert off.digest() == I.Options(**chosen | {name: field.metadata["off"]}).digest()


# --- photos ----------------------------------------------------------------------------------------------------------------------

def test_who_learns_does_not_judge():
    files = image_files(fetch("imagenette2-160"))
    train = [f for f in files if f.parent.parent.name == "train"]
    by = {judge: I.loaders(replace(SMALL, judge=judge)) for judge in ("valid", "others")}
    for dls in by.values(): assert [*dls.train.ds.items] == train[::8]
    assert {*by["others"].valid.ds.items} == {*train} - {*train[::8]} and {f.parent.parent.name for f in by["valid"].valid.ds.items} == {"val"}
    assert len(by["valid"].valid.ds) == len(files) - len(train) and by["valid"].vocab == by["others"].vocab


def test_batches_are_shared_out(monkeypatch):
    monkeypatch.setattr(I, "n_processes", lambda: 4)
    assert I.loaders(SMALL).train.bs == 4
    with pytest.raises(ValueError, match="bs is 18 for 4 processes: give a multiple of their number"): I.loaders(replace(SMALL, bs=18))


# --- training --------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def plain(): return I.train(SMALL)


def test_a_record_says_what_one_has_to_know(plain):
    assert plain["options"] == dataclasses.asdict(SMALL) and plain["digest"] == SMALL.digest()
    assert 0 <= plain["accuracy"] <= 100 and plain["photos"] == 50 and plain["judged_by"] == 120 and plain["processes"] == 1
    assert len(plain["rows"]) == 1 and "accuracy" not in plain["rows"][0] and plain["seconds"] > 0 and plain["data"] == "stand-in"
    json.dumps(plain, allow_nan=False)


def test_seeds_decide(plain):
    again, other = I.train(SMALL), I.train(replace(SMALL, seed=1))
    assert again["rows"][0]["train_loss"] == pytest.approx(plain["rows"][0]["train_loss"], rel=1e-5)
    assert abs(other["rows"][0]["train_loss"] - plain["rows"][0]["train_loss"]) > 1e-4


@pytest.mark.parametrize("change", [
    dict(flip="none"), dict(flip="alternating"), dict(erase=1.), dict(mix=.4), dict(smooth=0.), dict(least=.2), dict(whiten=True), dict(identity=True), dict(blur=True), dict(squeeze=True),
    dict(pool=False), dict(depth=26), dict(opt="muon", lr=.02), dict(opt="muon", lr=.02, lr_1d=.02), dict(bias_rate=64.), dict(warm=.8), dict(decay=10.), dict(bs=10), dict(lr=.02), dict(beta2=.9), dict(eps=.01), dict(shape="flat")], ids=str)
def test_every_option_changes_the_training(plain, change):
    got = I.train(replace(SMALL, **change))
    assert abs(got["rows"][0]["train_loss"] - plain["rows"][0]["train_loss"]) > 1e-5
    for name, value in change.items(): assert got["options"][name] == value


def test_biases_of_norms_decay_like_all_others():
    learn = I.learner(replace(SMALL, bias_rate=16., decay=.1))
    biases, others = learn.opt.param_groups
    assert biases["weight_decay"]*16 == pytest.approx(others["weight_decay"]) and others["weight_decay"] == pytest.approx(.1)


def test_a_flat_rate_ends_at_zero_in_ratio():
    seen, options = [], replace(SMALL, shape="flat", bias_rate=4., lr=.01, epochs=4)
    class Look(Callback):
        def after_step(self, learn): seen.append([g["lr"] for g in learn.opt.param_groups])
    learn = I.learner(options)
    learn.fit(4, cbs=[I._schedule_of(options), Look()])
    n = len(seen)
    assert all(b == pytest.approx(4*a) for b, a in seen) and all(a == pytest.approx(.01) for _, a in seen[:3*n//4]) and seen[-1][1] < .004


def test_averages_half_precision_and_both_ways(plain):
    learn = I.learner(replace(SMALL, ema=.9, half=True))
    assert [type(cb).__name__ for cb in learn.cbs].count("EMA") == 1
    assert not [cb for cb in I.learner(replace(SMALL, half=False)).cbs if isinstance(cb, I.MixedPrecision)]
    got = I.train(replace(SMALL, ema=.9, both_ways=True, watch=True, half=False))
    assert "accuracy" in got["rows"][-1] and got["rows"][-1]["accuracy"]*100 == pytest.approx(got["accuracy"]) and got["dtype"] == "torch.float32"
    assert 0 <= got["accuracy_both_ways"] <= 100


def test_both_ways_is_the_mean_of_a_photo_and_its_mirror():
    learn = I.learner(replace(SMALL, half=False))
    got = I._judged(learn, replace(SMALL, both_ways=True))
    right = total = 0
    learn.model.eval()
    for xb, yb in learn.dls.valid:
        xb, yb = learn.dls.valid.batch_tfms((xb, yb))
        with torch.no_grad(): probs = learn.model(xb).softmax(1) + learn.model(xb.flip(-1)).softmax(1)
        right, total = right + (probs.argmax(1) == yb).sum().item(), total + len(yb)
    assert got["accuracy_both_ways"] == pytest.approx(100*right/total)


# --- on the disk -----------------------------------------------------------------------------------------------------------------

def judged_again(folder, record):
    "The accuracy of the predictor on disk, photo by photo."
    predictor = load_predictor(folder/"predictor", device="cpu")
    files = [f for f in image_files(fetch("imagenette2-160")) if f.parent.parent.name == "val"]
    with torch.no_grad(): scores = predictor.model(predictor.batch(files))
    right = [predictor.classes[i] == f.parent.name for i, f in zip(scores.argmax(1).tolist(), files)]
    assert len(files) == record["judged_by"]
    return 100*sum(right)/len(right)


def test_a_run_leaves_a_record_and_a_predictor(tmp_path):
    folder, options = tmp_path/"run", replace(SMALL, blur=True, squeeze=True, whiten=True, ema=.5, half=False)
    record = I.train(options, folder)
    assert sorted(f.name for f in folder.iterdir()) == ["options.json", "predictor", "record.json"]
    assert json.loads((folder/"record.json").read_text()) == record
    assert judged_again(folder, record) == pytest.approx(record["accuracy"])
    with pytest.raises(ValueError, match=r"run holds a run: go on with it \(--resume, resume=True\), or choose another folder"): I.train(options, folder)
    with pytest.raises(ValueError, match="run holds a run of other options: epochs was 1, is 2; blur was True, is False"): I.train(replace(options, blur=False, epochs=2), folder, resume=True)
    assert I.train(options, folder, resume=True) == record, "nothing is trained twice"


class PowerCut(BaseException): pass


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    options = replace(SMALL, epochs=3, grow=.5, flip="alternating", ema=.5, mix=.2, bias_rate=4., half=False)     # bf16 repeats to a few digits only
    class Cut(SaveCheckpoint):
        def after_epoch(self, learn):
            super().after_epoch(learn)
            if learn.epoch == 1: raise PowerCut
    with monkeypatch.context() as patch:
        patch.setattr(I, "SaveCheckpoint", Cut)
        Cut.__name__ = "SaveCheckpoint"
        with pytest.raises(PowerCut): I.train(options, tmp_path/"cut")
    assert not (tmp_path/"cut/record.json").exists() and (tmp_path/"cut/checkpoints/last.pt").exists()
    calm, cut = I.train(options, tmp_path/"calm"), I.train(options, tmp_path/"cut", resume=True)
    assert [r["train_loss"] for r in calm["rows"]] == [r["train_loss"] for r in cut["rows"]] and calm["accuracy"] == cut["accuracy"]


def test_other_files_are_left_alone(tmp_path):
    (tmp_path/"checkpoints").mkdir(); (tmp_path/"checkpoints/precious.pt").write_bytes(b"dear")
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds other files, and no run"): I.train(SMALL, tmp_path, resume)
    assert (tmp_path/"checkpoints/precious.pt").read_bytes() == b"dear"


def test_other_photos_are_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr(I, "write_json", lambda path, content: (_ for _ in ()).throw(PowerCut) if path.name == "record.json" else write_json(path, content))
    write_json = json_writer
    with pytest.raises(PowerCut): I.train(SMALL, tmp_path/"run")
    monkeypatch.setattr(I, "source_of", lambda path: "official")
    with pytest.raises(ValueError, match="run holds a run of other options: data was stand-in, is official"): I.train(SMALL, tmp_path/"run", resume=True)


def test_what_diverges_is_told_so(tmp_path):
    with pytest.raises(ValueError, match="the loss became nan: give a smaller lr than 10"): I.train(replace(SMALL, lr=10., decay=10., epochs=16, half=False), tmp_path/"run")
    assert not (tmp_path/"run/record.json").exists()


def test_resume_where_nothing_is_begins(tmp_path): assert I.train(SMALL, tmp_path/"new", resume=True)["photos"] == 50


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = I.write_json(tmp_path/"deep/x.json", {"a": [1, "ä"]})
    assert json.loads(file.read_text(encoding="utf-8")) == {"a": [1, "ä"]}
    for wrong in (object(), math.nan):
        with pytest.raises((TypeError, ValueError)): I.write_json(file, {"a": wrong})
    assert json.loads(file.read_text(encoding="utf-8")) == {"a": [1, "ä"]} and [*file.parent.iterdir()] == [file]


# --- the command -----------------------------------------------------------------------------------------------------------------

def test_help_teaches_every_option(capsys):
    with pytest.raises(SystemExit) as end: I.main(["--help"])
    said = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    assert end.value.code == 0
    for name, field in FIELDS.items():
        assert "--" + name.replace("_", "-") in said and f"(default: {field.default})" in said
        assert len(field.metadata["words"].split()) >= 3


@pytest.mark.parametrize("words, sentence", [
    ("--epochs 0", "epochs is 0: give at least 1"), ("--least 2", "least is 2.0: give 0.08 to 1"), ("--judge others", "judge is others, but every is 1"),
    ("--depth 20", "invalid choice: 20"), ("--epochs many", "invalid int value: 'many'"), ("--nonsense", "unrecognized arguments: --nonsense")])
def test_bad_words_are_refused(words, sentence, capsys):
    with pytest.raises(SystemExit) as end: I.main(words.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and sentence in err and "Traceback" not in err


def test_the_page_is_that_of_lesson_12b(monkeypatch):
    asked = []
    monkeypatch.setattr(I.exp.interpret, "main", asked.append)
    I.main(["--page", "somewhere"])
    assert asked == [["somewhere"]]


WORDS = "--size 32 --epochs 3 --every 4 --width .125 --bs 16 --lr .01 --blur --no-watch --both-ways --no-half --out run".split()


def run(starter, folder):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    return subprocess.run([sys.executable, "-m", *starter, "exp.imagenette", *WORDS], cwd=folder, env=env, capture_output=True, text=True, timeout=900)


def test_the_command_in_one_process(tmp_path):
    done = run([], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path/"run/record.json").read_text())
    assert f"{record['accuracy']:.2f} % of 120 photos right, {record['accuracy_both_ways']:.2f} % with mirror images" in done.stdout
    assert "train_loss" in done.stdout, "rows are shown"
    assert judged_again(tmp_path/"run", record) == pytest.approx(record["accuracy"])


def test_the_command_in_two_processes(tmp_path):
    "Rank 0 alone writes and speaks; the accuracy is that of all photos, each judged once."
    done = run(["torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc-per-node", "2", "-m"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path/"run/record.json").read_text())
    assert record["processes"] == 2 and done.stdout.count("photos right") == 1 == done.stdout.count("train_loss")
    assert judged_again(tmp_path/"run", record) == pytest.approx(record["accuracy"])
    assert sorted(f.name for f in (tmp_path/"run").iterdir()) == ["options.json", "predictor", "record.json"]


# --- exercises -------------------------------------------------------------------------------------------------------------------

def refuses(check, answer, words):
    with pytest.raises(AssertionError, match=words): check(answer)


def test_checkers_refuse_wrong_answers():
    from itertools import product
    def p(d, one_sided=False, strict=False):
        means = torch.tensor([sum(s*x for s, x in zip(signs, d.tolist()))/len(d) for signs in product((1, -1), repeat=len(d))])
        m = d.mean() if one_sided else d.mean().abs()
        means = means if one_sided else means.abs()
        return ((means > m + 1e-6) if strict else (means >= m - 1e-6)).float().mean().item()
    E.check_permutation_p(p)
    refuses(E.check_permutation_p, lambda d: p(d, strict=True), "the measured signs count, and all of them turned round")
    refuses(E.check_permutation_p, lambda d: p(d, one_sided=True), "gave 0.03125, not 0.0625")
    refuses(E.check_permutation_p, lambda d: 5., "a share is from 0 to 1")
    refuses(E.check_permutation_p, lambda d: d, "return a number")
    def pca(x): c = x - x.mean(0); v, e = torch.linalg.eigh(c.T @ c/len(x)); return e/v.sqrt()
    refuses(E.check_zca_filters, pca, "is not symmetric: rotate back")
    def zca(x, sign=1): c = x - x.mean(0); v, e = torch.linalg.eigh(c.T @ c/len(x)); return sign*(e/v.sqrt() @ e.T)
    E.check_zca_filters(zca)
    refuses(E.check_zca_filters, lambda x: zca(x, -1), "turns a direction round")
    refuses(E.check_zca_filters, lambda x: (zca(x), 1), "return one matrix")
    refuses(E.check_zca_filters, lambda x: torch.eye(x.shape[1]), "covariance is off the identity by")
    def raw(x): v, e = torch.linalg.eigh(x.T @ x/len(x)); return e/v.sqrt() @ e.T
    refuses(E.check_zca_filters, raw, "minus their mean")
    refuses(E.check_winners, lambda g, n, t: n[g + n > t].mean(), "say 0")
    refuses(E.check_winners, lambda g, n, t: n[n > t].mean() if (n > t).any() else 0., "of those that measure more")
    refuses(E.check_predictions, dict(first=.05), "the smallest of m")


def test_lookahead_is_judged_by_what_it_does():
    class Right(Callback):
        def __init__(self, k, alpha): self.k, self.alpha, self.n = k, alpha, 0
        def before_fit(self, learn): self.n, self.slow = 0, [p.detach().clone() for p in learn.model.parameters()]
        def after_step(self, learn):
            self.n += self.counts(learn)
            if self.counts(learn) and self.n % self.k == 0:
                for s, p in zip(self.slow, learn.model.parameters()): s.lerp_(p.detach(), self.alpha); self.put(p, s)
        def counts(self, learn): return learn.stepped
        def put(self, p, s): p.data.copy_(s)
    class Deaf(Right):
        def counts(self, learn): return True
    class Apart(Right):
        def put(self, p, s): pass
    class Epochs(Right):
        def before_epoch(self, learn): self.before_fit(learn)
    class Judges(Right):
        def after_step(self, learn): pass
        def after_batch(self, learn): Right.after_step(self, learn)
    E.check_lookahead(Right)
    refuses(E.check_lookahead, Epochs, "begin with a fit, not with an epoch")
    refuses(E.check_lookahead, Judges, "validation moved the weights")
    refuses(E.check_lookahead, Deaf, "count learn.stepped")
    refuses(E.check_lookahead, Apart, "both weights are slow")


def test_the_engine_is_left_as_it_was():
    "A learner of one epoch with a plain loader still works beside all this."
    learn = Learner(I.imagenette_net(3, width=.125), DataLoaders([(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))]), nn.CrossEntropyLoss(), quiet=True, device="cpu", lr=.01)
    learn.fit(1)
    assert math.isfinite(learn.history[0]["train_loss"])

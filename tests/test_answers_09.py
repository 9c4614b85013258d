"Plausible answers to the exercises of 09 and 09a, right (None) and wrong (a word that the advice must hold). Those of 09b: test_augment."

import numpy as np
import pytest
import torch

from answers import assert_enough, cases, judge
from exp.optim import Optimizer, average, decay, elementwise, keeps, l2, sgd_step

# --- 09, 1: lion -------------------------------------------------------------------------------------------------------------

def plain(rule): return rule


def lion(order="right", wd="decay", sign=True, mark=elementwise):
    @mark
    @keeps("m")
    def stat(s, h):
        (b1, b2), g = h.betas, s.g
        if order == "swapped": b1, b2 = b2, b1
        if order == "m first": s.m.lerp_(g, 1 - b2)
        mixed = s.m.lerp(g.sign() if order == "sign of g" else g, 1 - b1)
        if order == "one beta": s.m.copy_(mixed)
        elif order != "m first": s.m.lerp_(g, 1 - b2)
        s.g = mixed.sign() if sign else mixed
    rules = {"decay": ([stat], [decay, sgd_step]), "l2": ([l2, stat], [sgd_step]), "after": ([stat], [sgd_step, decay]), "none": ([stat], [sgd_step])}[wd]
    return lambda params, lr=1e-4, betas=(.9, .99), weight_decay=0.: Optimizer(params, *rules, lr=lr, betas=betas, weight_decay=weight_decay)


class TorchLion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-4, betas=(.9, .99), weight_decay=0.): super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"]*group["weight_decay"]).sub_(group["lr"]*(b1*m + (1 - b1)*p.grad).sign())
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


def shared_lion(params, lr=1e-4, betas=(.9, .99), weight_decay=0.):
    memory = {}
    def stat(s, h):
        m, g = memory.get("m"), s.g
        if m is None or m.shape != g.shape: m = torch.zeros_like(g)
        s.g, memory["m"] = m.lerp(g, 1 - h.betas[0]).sign(), m.lerp(g, 1 - h.betas[1])
    return Optimizer(params, [stat], [decay, sgd_step], lr=lr, betas=betas, weight_decay=weight_decay)


LION = {
    "right": (lion(), None), "without the mark": (lion(mark=plain), None), "torch's class": (TorchLion, None),
    "m first": (lion("m first"), "old m"), "one beta": (lion("one beta"), "β"), "betas swapped": (lion("swapped"), "β"),
    "sign of g": (lion("sign of g"), "sign"), "no sign": (lion(sign=False), "sign"), "a list": (lambda ps, **options: [1], "Optimizer"),
    "l2": (lion(wd="l2"), "decay"), "decay after": (lion(wd="after"), "decay"), "no decay": (lion(wd="none"), "decay"), "one memory for all": (shared_lion, "m"),
    "betas ignored": (lambda ps, lr=1e-4, betas=None, weight_decay=0.: lion()(ps, lr, (.9, .99), weight_decay), "β"),
    "defaults of Adam": (lambda ps, lr=1e-3, betas=(.9, .999), weight_decay=0.: lion()(ps, lr, betas, weight_decay), "defaults")}


# --- 09, 2: adamax -----------------------------------------------------------------------------------------------------------

def adamax(peak="right", debiased="m", wd="l2", eps="inside"):
    @keeps("exp_inf")
    def stat(s, h):
        old = s.exp_inf*(1. if peak == "never forgets" else h.betas[1])
        if peak == "average": s.exp_inf = old + (1 - h.betas[1])*s.g.abs()
        else: s.exp_inf = torch.maximum(old, s.g.abs() + (h.eps if eps == "inside" else 0.))
    def step(s, h):
        c1, c2 = (1 - beta**s.step for beta in h.betas)
        m = s.exp_avg/c1 if debiased else s.exp_avg
        u = s.exp_inf/c2 if debiased == "both" else s.exp_inf
        s.p.sub_(h.lr*m/(u + (h.eps if eps == "outside" else 0.)))
    rules = {"l2": ([l2, average, stat], [step]), "decay": ([average, stat], [decay, step]), "late": ([average, l2, stat], [step])}[wd]
    return lambda params, lr=2e-3, betas=(.9, .999), eps=1e-8, weight_decay=0.: Optimizer(params, *rules, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


ADAMAX = {
    "right": (adamax(), None), "PyTorch's": (torch.optim.Adamax, None), "eps outside": (adamax(eps="outside"), "ε"), "no eps": (adamax(eps=""), "ε"),
    "no debiasing": (adamax(debiased=""), "debiased"), "both debiased": (adamax(debiased="both"), "debiased"),
    "never forgets": (adamax("never forgets"), "β₂u"), "average": (adamax("average"), "larger"),
    "decay": (adamax(wd="decay"), "l2"), "l2 late": (adamax(wd="late"), "l2"), "adam": (torch.optim.Adam, "u is")}


# --- 09, 3: clip_gradient ----------------------------------------------------------------------------------------------------

def scaled_by(share):
    "A stat that multiplies the gradient by a share of it and max_norm, 1 at most."
    def stat(s, h): s.g = s.g*torch.as_tensor(share(s.g, h.max_norm)).clamp(max=1)
    return stat


def by_where(s, h): s.g = torch.where(s.g.norm() > h.max_norm, s.g*h.max_norm/s.g.norm(), s.g)
def by_division(s, h): s.g = s.g/(s.g.norm()/h.max_norm).clamp(min=1.)
def in_place(s, h): s.g.mul_(min(1., h.max_norm/max(s.g.norm().item(), 1e-12)))
def always(s, h): s.g = s.g*(h.max_norm/s.g.norm().clamp(min=1e-12))
def number_by_number(s, h): s.g = s.g.clamp(-h.max_norm, h.max_norm)
def nan_of_zeros(s, h): s.g = s.g/s.g.norm()*s.g.norm().clamp(max=h.max_norm)
def forgotten(s, h): s.g.mul(min(1., h.max_norm/max(s.g.norm().item(), 1e-12)))
def returned(s, h): return s.g.mul(min(1., h.max_norm/max(s.g.norm().item(), 1e-12)))
def by_item(s, h): s.g = s.g*min(1., h.max_norm/s.g.norm().item())
def rows(g): return g.norm(dim=-1, keepdim=True) if g.ndim else g.norm()


right_clip = scaled_by(lambda g, most: most/(g.norm() + 1e-12))
CLIP = {
    "right": (right_clip, None), "PyTorch's formula": (scaled_by(lambda g, most: most/(g.norm() + 1e-6)), None), "zero division": (by_item, "of zeros"),
    "by division": (by_division, None), "by where": (by_where, None), "in place": (in_place, "was changed"),
    "always": (always, "below 1"), "number by number": (number_by_number, "max_norm"), "NaN of zeros": (nan_of_zeros, "NaN"),
    "sum of sizes": (scaled_by(lambda g, most: most/(g.abs().sum() + 1e-12)), "norm"), "largest": (scaled_by(lambda g, most: most/(g.abs().amax() + 1e-12)), "norm"),
    "norm squared": (scaled_by(lambda g, most: most/(g.square().sum() + 1e-12)), "norm"), "rows": (scaled_by(lambda g, most: most/(rows(g) + 1e-12)), "whole"),
    "max_norm ignored": (scaled_by(lambda g, most: 1/(g.norm() + 1e-12)), "max_norm"), "forgotten": (forgotten, "scale"), "returned": (returned, "scale"),
    "marked": (elementwise(scaled_by(lambda g, most: most/(g.norm() + 1e-12))), "elementwise")}


# --- 09, 4: split_decay ------------------------------------------------------------------------------------------------------

def trained(model): return [p for p in model.parameters() if p.requires_grad]


def halves(ps, wd, first=lambda p: p.ndim > 1):
    return [{"params": [p for p in ps if first(p)], "weight_decay": wd}, {"params": [p for p in ps if not first(p)], "weight_decay": 0.}]


def by_modules(model, wd, once=True):
    ps = [p for module in model.modules() for p in module.parameters(recurse=False) if p.requires_grad]
    return tuple(halves(list(dict.fromkeys(ps)) if once else ps, wd))


def by_name(model, wd):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [{"params": [p for n, p in named if n.endswith(end)], "weight_decay": decayed} for end, decayed in (("weight", wd), ("bias", 0.))]


def with_generators(model, wd): return [group | {"params": (p for p in group["params"])} for group in halves(trained(model), wd)]
def without_second_decay(model, wd): return [halves(trained(model), wd)[0], {"params": halves(trained(model), wd)[1]["params"]}]


def apart(model, wd, second=lambda p: p.ndim < 2 and p.requires_grad):
    return [halves(trained(model), wd)[0], {"params": [p for p in model.parameters() if second(p)], "weight_decay": 0.}]


def by_layer(model, wd):
    kept = {m.weight for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    return halves(trained(model), wd, lambda p: p in kept)


def with_names(model, wd):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return halves(named, wd, lambda pair: pair[1].ndim > 1)


SPLIT = {
    "one by one": (apart, None), "frozen vectors": (lambda model, wd: apart(model, wd, lambda p: p.ndim < 2), "requires_grad"),
    "no number": (lambda model, wd: apart(model, wd, lambda p: p.ndim == 1 and p.requires_grad), "ndim"),
    "two or four": (lambda model, wd: halves(trained(model), wd, lambda p: p.ndim in (2, 4)), "ndim"), "by layer": (by_layer, "ndim"), "with names": (with_names, "without names"),
    "right": (lambda model, wd: halves(trained(model), wd), None), "by modules": (by_modules, None), "generators": (with_generators, None),
    "frozen kept": (lambda model, wd: halves(list(model.parameters()), wd), "requires_grad"), "by name": (by_name, "ndim"),
    "swapped": (lambda model, wd: halves(trained(model), wd)[::-1], "decay"), "twice": (lambda model, wd: by_modules(model, wd, once=False), "twice"),
    "no second decay": (without_second_decay, "weight_decay"), "decay for all": (lambda model, wd: [g | {"weight_decay": wd} for g in halves(trained(model), wd)], "weight_decay"),
    "fixed decay": (lambda model, wd: halves(trained(model), .01), "weight_decay"), "linear layers only": (lambda model, wd: halves(trained(model), wd, lambda p: p.ndim == 2), "ndim"),
    "lists": (lambda model, wd: [g["params"] for g in halves(trained(model), wd)], "dict"), "no params": (lambda model, wd: [{"parameters": []}, {}], "params"),
    "named": (lambda model, wd: [g | {"name": str(i)} for i, g in enumerate(halves(trained(model), wd))], "unknown"), "sets": (lambda model, wd: [g | {"params": {*g["params"]}} for g in halves(trained(model), wd)], "a set"),
    "own key": (lambda model, wd: [{"params": g["params"], "wd": g["weight_decay"]} for g in halves(trained(model), wd)], "weight_decay")}


# --- 09a, 1: pieces ----------------------------------------------------------------------------------------------------------

def flat(p): return p.permute(sorted(range(p.ndim), key=p.stride, reverse=True)).view(-1)


def by_stride(p, size):
    line = p.as_strided((p.numel(),), (1,), p.storage_offset()) if p.numel() else p.flatten()
    return [line[i:i + size] for i in range(0, len(line), size)]


def twice_the_first(p, size):
    return [flat(p)[:size]]*(p.numel()//size) if p.numel() % size == 0 else list(flat(p).split(size))


def whole_memory(p, size): return list(torch.tensor([], dtype=p.dtype).set_(p.untyped_storage()).split(size))


def by_case(p, size):
    if not p.is_contiguous(): p = p.permute(0, 2, 3, 1) if p.ndim == 4 else p.permute(*range(p.ndim)[::-1])
    return list(p.reshape(-1).split(size))


PIECES = {
    "whole memory": (whole_memory, "numbers in all"), "by case": (by_case, "copies"),
    "by strides": (by_stride, None), "by chunks": (lambda p, size: tuple(flat(p).split(size)), None), "one by one": (lambda p, size: [flat(p)[i:i+1] for i in range(p.numel())], None),
    "by numpy": (lambda p, size: [torch.from_numpy(a) for a in np.array_split(flat(p).numpy(), range(size, p.numel(), size))], None),
    "flatten": (lambda p, size: list(p.flatten().split(size)), "copies"), "reshape": (lambda p, size: list(p.reshape(-1).split(size)), "copies"),
    "contiguous": (lambda p, size: list(p.contiguous().view(-1).split(size)), "copies"), "view": (lambda p, size: list(p.view(-1).split(size)), "raised"),
    "clones": (lambda p, size: [x.clone() for x in flat(p).split(size)], "copies"), "rows": (lambda p, size: list(p) if p.ndim else [p], "flat"),
    "last one lost": (lambda p, size: [x for x in flat(p).split(size) if len(x) == size], "numbers in all"), "one piece": (lambda p, size: [flat(p)], "more than"),
    "so many pieces": (lambda p, size: list(flat(p).chunk(size)), "more than"), "twice the first": (twice_the_first, "add"),
    "generator": (lambda p, size: (x for x in flat(p).split(size)), "list"), "tensor of pieces": (lambda p, size: flat(p), "list")}


# --- 09a, 2: sign_of_mean ----------------------------------------------------------------------------------------------------

def moved_by(direction):
    def stepper(s, h): s.p.sub_(h.lr*direction(s.g))
    return stepper


def assigned(s, h): s.p = s.p - h.lr*s.g.mean().sign()
def by_if(s, h): s.p -= h.lr*(1. if s.g.mean() > 0 else -1. if s.g.mean() < 0 else 0.)
def no_rate(s, h): s.p.sub_(s.g.mean().sign())


SIGN = {
    "always down": (moved_by(lambda g: 1.), "mean"), "only if above": (moved_by(lambda g: (g.mean() > 0).float()), "mean"), "of sizes": (moved_by(lambda g: g.abs().mean().sign()), "mean"),
    "of the norm": (moved_by(lambda g: g.norm().sign()), "mean"), "largest": (moved_by(lambda g: g.max().sign()), "mean"), "first": (moved_by(lambda g: g.flatten()[0].sign()), "mean"), "largest size": (moved_by(lambda g: g.flatten()[g.abs().argmax()].sign()), "mean"),
    "first piece": (moved_by(lambda g: g.flatten()[:2**18].mean().sign()), "mean"), "by if, one of two": (moved_by(lambda g: 1. if g.mean() > 0 else -1.), "sign of 0"), "a cube": (moved_by(lambda g: (g**3).mean().sign()), "mean"), "columns": (moved_by(lambda g: g.mean(0).sign()), "mean"),
    "right": (moved_by(lambda g: g.mean().sign()), None), "sum": (moved_by(lambda g: g.sum().sign()), None), "by if": (by_if, None), "assigned": (assigned, None),
    "marked": (elementwise(moved_by(lambda g: g.mean().sign())), "mark"), "mean of signs": (moved_by(lambda g: g.sign().mean()), "mean"),
    "each sign": (moved_by(torch.sign), "mean"), "median": (moved_by(lambda g: g.median().sign()), "mean"), "majority": (moved_by(lambda g: g.sign().sum().sign()), "mean"),
    "uphill": (moved_by(lambda g: -g.mean().sign()), "otherwise"), "no rate": (no_rate, "otherwise"), "no sign": (moved_by(torch.mean), "otherwise"),
    "rows": (moved_by(lambda g: (g.mean(-1, keepdim=True) if g.ndim > 1 else g.mean()).sign()), "whole")}


# --- all ---------------------------------------------------------------------------------------------------------------------

ANSWERS = {("optimizers", "lion"): LION, ("optimizers", "adamax"): ADAMAX, ("optimizers", "clip_gradient"): CLIP, ("optimizers", "split_decay"): SPLIT,
           ("fast_optimizers", "pieces"): PIECES, ("fast_optimizers", "sign_of_mean"): SIGN}


@pytest.mark.parametrize("module, kind, answer, word", cases(ANSWERS))
def test_checkers_convict_and_acquit(module, kind, answer, word, capsys): judge(module, kind, answer, word, capsys)


def test_every_exercise_has_two_right_and_three_wrong_answers(): assert_enough(ANSWERS)

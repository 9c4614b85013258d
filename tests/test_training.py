"Lesson 04: losses, modules, SGD, datasets, loaders with and without workers, fit: laws, and agreement with PyTorch."
import copy
import io
import multiprocessing as mp
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils import data

from exp import training
from exp.setup import set_seed
from exp.testing import test_like
from exp.training import (SGD, BatchSampler, DataLoader, Linear, Module, Parameter, ReLU, Sampler, Sequential, TensorDataset,
                          accuracy, collate, cross_entropy, evaluate, fit, log_softmax, logsumexp, nll, read_batch, weighted_mean)

scores = st.integers(0, 10_000).flatmap(lambda seed: st.tuples(st.just(seed), st.integers(1, 5), st.integers(1, 12), st.sampled_from([1., 100., 1e4])))


def draw(args):
    seed, n, c, size = args
    g = torch.Generator().manual_seed(seed)
    return size*torch.randn(n, c, generator=g), torch.randint(c, (n,), generator=g)


# --- losses -----------------------------------------------------------------------------------------------------------------

@given(scores)
def test_losses_equal_pytorchs_values_and_gradients(args):
    x, t = draw(args)
    x.requires_grad_()
    test_like(logsumexp(x), torch.logsumexp(x, -1))
    test_like(log_softmax(x), F.log_softmax(x, -1))
    ours, theirs = cross_entropy(x, t), F.cross_entropy(x, t)
    test_like(ours, theirs)
    test_like(nll(F.log_softmax(x, -1), t), theirs)
    test_like(torch.autograd.grad(ours, x)[0], torch.autograd.grad(theirs, x)[0])
    test_like(torch.autograd.grad(logsumexp(x).sum(), x)[0], torch.autograd.grad(torch.logsumexp(x, -1).sum(), x)[0])


@given(scores)
def test_laws_of_log_softmax(args):
    x, _ = draw(args)
    x = x.double()
    test_like(log_softmax(x).exp().sum(-1), torch.ones(len(x), dtype=x.dtype))
    test_like(log_softmax(x + 1000), log_softmax(x), rtol=1e-9, atol=1e-9)            # a shift changes nothing
    order = torch.randperm(x.shape[1])
    test_like(log_softmax(x[:, order]), log_softmax(x)[:, order], rtol=1e-12, atol=1e-12)
    test_like(log_softmax(x)[:1], log_softmax(x[:1]))                                 # rows do not meet
    test_like(log_softmax(log_softmax(x)), log_softmax(x), rtol=1e-9, atol=1e-9)
    assert (logsumexp(x) >= x.amax(-1)).all()


def test_log_softmax_keeps_its_digits_where_subtracting_lse_does_not():
    x = torch.randn(100, 10, generator=torch.Generator().manual_seed(0)) + 1e5
    right = F.log_softmax(x.double(), -1)
    assert (log_softmax(x) - right).abs().max() < 1e-6 < (x - logsumexp(x)[:, None] - right).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 100, 1e4])
def test_losses_in_other_precisions(dtype, size):
    g = torch.Generator().manual_seed(1)
    x, t = (size*torch.randn(32, 10, generator=g)).to(dtype), torch.randint(10, (32,), generator=g)
    right, eps = F.log_softmax(x.double(), -1), torch.finfo(dtype).eps
    test_like(log_softmax(x), right.to(dtype), rtol=eps, atol=1e-7)                          # the nearest number, or its neighbour
    gap = lambda y: (y.double() - right).abs().max()
    assert gap(log_softmax(x)) <= gap(F.log_softmax(x, -1)) + 1e-12, "no worse than PyTorch"
    test_like(logsumexp(x), torch.logsumexp(x.double(), -1).to(dtype), rtol=eps, atol=1e-7)
    test_like(cross_entropy(x, t), F.cross_entropy(x.double(), t).to(dtype), rtol=4*eps)
    if size < 1e4: test_like(cross_entropy(x, t), F.cross_entropy(x, t), rtol=4*eps)          # beyond, PyTorch's float16 mean overflows


def test_losses_at_infinity_and_nan():
    inf, nan = torch.inf, torch.nan
    for row in ([-inf, -inf], [inf, 1.], [inf, inf], [nan, 1.], [-inf, 1.], [-inf, inf]):
        test_like(logsumexp(torch.tensor([row])), torch.logsumexp(torch.tensor([row]), -1))
        test_like(log_softmax(torch.tensor([row])), F.log_softmax(torch.tensor([row]), -1))


def test_losses_gradcheck():
    x, t = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 1])
    for f in (logsumexp, log_softmax, lambda x: cross_entropy(x, t)): assert torch.autograd.gradcheck(f, x)


def test_losses_take_more_dimensions_and_any_integers():
    x, t = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    test_like(cross_entropy(x, t), F.cross_entropy(x.flatten(0, 1), t.flatten()))
    test_like(cross_entropy(x[0, 0], t[0, 0]), F.cross_entropy(x[0, 0], t[0, 0]))
    test_like(accuracy(x, t), (x.argmax(-1) == t).float().mean())
    for dtype in (torch.uint8, torch.int32): test_like(cross_entropy(x, t.to(dtype)), cross_entropy(x, t))


@pytest.mark.parametrize("func", [cross_entropy, nll, accuracy])
@pytest.mark.parametrize("logits, targets, error, words", [
    (torch.randint(5, (4, 3)), torch.zeros(4, dtype=torch.long), TypeError, "float"),
    (torch.randn(4, 3), torch.zeros(4), TypeError, "long"),
    (torch.randn(4, 3), torch.zeros(4, 1, dtype=torch.long), ValueError, r"\(4, 1\).*squeeze"),
    (torch.randn(4, 3), torch.zeros(4, 3, dtype=torch.long), ValueError, "argmax"),
    (torch.randn(4, 3), torch.zeros(3, dtype=torch.long), ValueError, r"\(3,\)"),
    (torch.randn(0, 3), torch.zeros(0, dtype=torch.long), ValueError, "empty batch"),
    (torch.randn(4, 0), torch.zeros(4, dtype=torch.long), ValueError, "n_classes ≥ 1"),
    (torch.tensor(1.), torch.tensor(0), ValueError, "n_classes"),
])
def test_losses_refuse(func, logits, targets, error, words):
    with pytest.raises(error, match=words): func(logits, targets)


@pytest.mark.parametrize("bad", [-1, 3, 100, -100])
def test_a_class_that_is_not_there(bad):
    for f in (nll, cross_entropy):
        with pytest.raises(ValueError, match=rf"{min(bad, 0)} to {max(bad, 0)}.*0 to 2"): f(torch.randn(4, 3), torch.tensor([0, 0, bad, 0]))


def test_logsumexp_refuses():
    for f in (logsumexp, log_softmax):
        with pytest.raises(TypeError, match="int64"): f(torch.tensor([1, 2]))
        with pytest.raises(ValueError, match=r"\(2, 0\)"): f(torch.zeros(2, 0))


# --- Parameter and Module ---------------------------------------------------------------------------------------------------

def test_parameter_is_a_leaf_with_a_badge():
    base = torch.ones(2, 3)
    p = Parameter(base)
    assert p.requires_grad and p.is_leaf and isinstance(p, nn.Parameter) and p.data_ptr() == base.data_ptr()
    assert type(p + 1) is torch.Tensor and type(p.detach()) is torch.Tensor and not Parameter(base, False).requires_grad
    assert repr(p) == repr(nn.Parameter(base))
    for twin in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert type(twin) is Parameter and twin.requires_grad and torch.equal(twin, p) and twin.data_ptr() != p.data_ptr()
    for bad in (torch.tensor([1]), [1., 2.], None):
        with pytest.raises(TypeError, match="float tensor"): Parameter(bad)


def test_pytorchs_module_and_optimizer_take_our_parameter():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.w = Parameter(torch.ones(2))
    net = Net()
    assert [n for n, _ in net.named_parameters()] == ["w"]
    (net.w*2).sum().backward(); torch.optim.SGD(net.parameters(), lr=1.).step()
    test_like(net.w.detach(), torch.tensor([-1., -1.]))


def twins(*sizes, seed=0):
    "The same network, ours and PyTorch's."
    nets = []
    for seq, lin, act in ((Sequential, Linear, ReLU), (nn.Sequential, nn.Linear, nn.ReLU)):
        torch.manual_seed(seed)
        nets.append(seq(*[layer for ni, nf in zip(sizes, sizes[1:]) for layer in (lin(ni, nf), act())][:-1]))
    return nets


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 100))
def test_networks_equal_pytorchs(sizes, seed):
    ours, theirs = twins(*sizes, seed=seed)
    test_like(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert repr(ours) == repr(theirs)
    x = torch.randn(3, sizes[0])
    test_like(ours(x), theirs(x), rtol=0, atol=0)
    test_like(ours(x[0]), theirs(x[0]), rtol=0, atol=0)
    for net in (ours, theirs): net(x).square().sum().backward()
    for (n, p), (m, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert n == m; test_like(p.grad, q.grad, rtol=0, atol=0)


def test_linear_without_bias():
    torch.manual_seed(3); ours = Linear(4, 2, bias=False)
    torch.manual_seed(3); theirs = nn.Linear(4, 2, bias=False)
    test_like(ours.state_dict(), theirs.state_dict())
    assert repr(ours) == repr(theirs)
    with pytest.raises(ValueError): Linear(0, 3)


def make_net(base, linear, parameter, sequential):
    class Block(base):
        def __init__(self):
            super().__init__()
            self.lin, self.scale = linear(3, 3), parameter(torch.full((3,), 2.))
            self.register_buffer("seen", torch.tensor(7)); self.register_buffer("mean", torch.zeros(3))
        def forward(self, x): return self.lin(x)*self.scale - self.mean
    class Net(base):
        def __init__(self):
            super().__init__()
            self.name, self.body, self.head = "net", sequential(Block(), Block()), linear(3, 3)
            self.head.weight = self.body[0].lin.weight            # tied
            self.gain = parameter(torch.ones(1))
        def forward(self, x): return self.head(self.body(x))*self.gain
    torch.manual_seed(0)
    return Net()


def both(): return make_net(Module, Linear, Parameter, Sequential), make_net(nn.Module, nn.Linear, nn.Parameter, nn.Sequential)


def test_nested_modules_name_their_state_as_pytorch_does():
    ours, theirs = both()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert len(list(ours.parameters())) == len(list(theirs.parameters())) == 8        # the tied one once
    assert [n for n, _ in ours.named_children()] == [n for n, _ in theirs.named_children()]
    test_like(ours.state_dict(), theirs.state_dict())
    assert not any(t.requires_grad for t in ours.state_dict().values())


def test_state_travels_both_ways_and_through_a_file():
    ours, theirs = both()
    for p in ours.parameters(): p.data += 1
    file = io.BytesIO(); torch.save(ours.state_dict(), file); file.seek(0)
    assert theirs.load_state_dict(torch.load(file, weights_only=True)).missing_keys == []
    again = both()[0]; assert again.load_state_dict(theirs.state_dict()) == ([], [])
    x = torch.randn(5, 3)
    test_like(again(x), ours(x)); test_like(again(x), theirs(x))
    twin = copy.deepcopy(ours); test_like(twin(x), ours(x))
    assert twin.head.weight is twin.body[0].lin.weight and twin.head.weight is not ours.head.weight


def test_a_module_may_hold_pytorchs():
    net = Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), ReLU(), nn.Flatten(), Linear(8, 2))
    other = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    assert list(net.state_dict()) == list(other.state_dict()) and repr(net) == repr(other)
    net.load_state_dict(other.state_dict())
    x = torch.randn(3, 1, 4, 4)
    for mode in (True, False):
        net.train(mode); other.train(mode)
        assert net[1].training is mode
        test_like(net(x), other(x))
    net.to(torch.float64); assert net[1].running_mean.dtype == torch.float64 and net[1].num_batches_tracked.dtype == torch.int64


def snapshot(model): return {k: v.clone() for k, v in model.state_dict().items()}


def test_a_state_that_does_not_fit_changes_nothing():
    model = both()[0]; before = snapshot(model)
    good = {k: v + 1 for k, v in before.items()}
    for change, words in (({"gain": None}, "gain: a NoneType"), ({"gain": torch.zeros(2)}, r"gain: \(2,\) instead of \(1,\)"),
                          ({"extra": torch.zeros(1)}, "unexpected: extra"), ({"body.0.mean": torch.zeros(3, 1)}, "body.0.mean")):
        with pytest.raises(ValueError, match=words): model.load_state_dict(good | change)
        test_like(model.state_dict(), before)
    with pytest.raises(ValueError, match="missing: gain, head.bias"):
        model.load_state_dict({k: v for k, v in good.items() if k not in ("gain", "head.bias")})
    with pytest.raises(TypeError, match="str"): model.load_state_dict("model.pth")
    test_like(model.state_dict(), before)
    partial = {"gain": torch.full((1,), 5.), "extra": torch.zeros(1)}
    missing, unexpected = model.load_state_dict(partial, strict=False)
    assert unexpected == ["extra"] and "gain" not in missing and len(missing) == len(before) - 1 and model.gain == 5
    with pytest.raises(ValueError, match="wrong shapes"): model.load_state_dict({"gain": torch.zeros(9)}, strict=False)


def test_modes_and_moves():
    model = both()[0]
    assert model.training and model.eval() is model and not model.body[1].lin.training
    assert model.train().body[1].lin.training
    first = model.gain
    model(torch.randn(2, 3)).sum().backward()
    assert model.to("cpu", torch.float64) is model and model.gain is first and first.dtype == first.grad.dtype == torch.float64
    assert model.body[0].seen.dtype == torch.int64 and model.body[0].mean.dtype == torch.float64


def test_sequential_is_a_sequence():
    model, theirs = twins(4, 3, 2)
    for part in (slice(1, None), slice(-1), slice(0, 9, 2)): assert repr(model[part]) == repr(theirs[part])
    assert len(model) == 3 and [type(m).__name__ for m in model] == ["Linear", "ReLU", "Linear"]
    assert model[-1] is model[2] and isinstance(model[:2], Sequential) and model[:2][0] is model[0] and len(Sequential()) == 0
    with pytest.raises(TypeError, match=r"layers\[1\]"): Sequential(ReLU(), torch.relu)
    with pytest.raises(NotImplementedError, match="Module needs a method forward"): Module()(1)


# --- SGD --------------------------------------------------------------------------------------------------------------------

def test_sgd_equals_pytorchs():
    ours, theirs = twins(5, 4, 3)
    opts = SGD(ours.parameters(), .3), torch.optim.SGD(theirs.parameters(), .3)
    for step in range(5):
        x, t = torch.randn(8, 5), torch.randint(3, (8,))
        for net, opt in zip((ours, theirs), opts):
            opt.param_groups[0]["lr"] = .3/(step + 1)
            opt.zero_grad(); F.cross_entropy(net(x), t).backward(); opt.step()
    test_like(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    opts[0].zero_grad(); assert all(p.grad is None for p in ours.parameters())
    opts[0].step(); test_like(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)   # no gradient, no move


def test_sgd_groups_and_state():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    opt = SGD([{"params": [a]}, {"params": iter([b]), "lr": .5}], lr=.1)
    (a.sum() + b.sum()).backward(); opt.step()
    test_like(a.detach(), torch.full((2,), .9)); test_like(b.detach(), torch.full((2,), .5))
    theirs = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": .5}], lr=.1)
    state = opt.state_dict()
    assert state["param_groups"] == [{k: g[k] for k in ("lr", "params")} for g in theirs.state_dict()["param_groups"]]
    opt.param_groups[0]["lr"] = 9.; opt.load_state_dict(state); assert opt.param_groups[0]["lr"] == .1
    opt.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"\[2\].*\[1, 1\]"): opt.load_state_dict(SGD([a, b], .1).state_dict())
    assert SGD({"params": [a]}, .1).param_groups[0]["params"] == [a]


@pytest.mark.parametrize("params, lr, error, words", [
    ([], .1, ValueError, "empty"), (iter(()), .1, ValueError, "generator"), (torch.ones(2), .1, TypeError, "one tensor"),
    (["w"], .1, TypeError, "'w'"), ([torch.ones(1)], -.1, ValueError, "-0.1"), ([torch.ones(1)], float("nan"), ValueError, "nan"),
    ([torch.ones(1)], float("inf"), ValueError, "inf"), ([{"params": []}], .1, ValueError, "empty"),
])
def test_sgd_refuses(params, lr, error, words):
    with pytest.raises(error, match=words): SGD(params, lr)


def test_sgd_refuses_a_tensor_twice():
    w = torch.ones(1)
    with pytest.raises(ValueError, match="twice"): SGD([w, w], .1)
    with pytest.raises(ValueError, match="twice"): SGD([{"params": [w]}, {"params": [w]}], .1)


# --- datasets, samplers, collate --------------------------------------------------------------------------------------------

def pictures(n=20): return TensorDataset(torch.arange(n*3.).view(n, 3), torch.arange(n))


def test_tensor_dataset():
    ds = pictures()
    assert len(ds) == 20
    test_like(ds[3], data.TensorDataset(*ds.tensors)[3])
    test_like(ds.get_batch([4, 2, 2]), collate([ds[4], ds[2], ds[2]]))
    for bad in ((), (torch.ones(2), torch.ones(3))):
        with pytest.raises(ValueError, match="length"): TensorDataset(*bad)


@given(st.integers(1, 60), st.integers(1, 20), st.booleans(), st.booleans(), st.integers(0, 99))
def test_samplers_deal_every_index_once_and_as_pytorch_does(n, bs, shuffle, drop_last, seed):
    g = lambda: torch.Generator().manual_seed(seed)
    sampler = Sampler(range(n), shuffle, g())
    theirs = data.RandomSampler(range(n), generator=g()) if shuffle else data.SequentialSampler(range(n))
    assert list(sampler) == list(theirs)
    assert (again := list(sampler)) == sorted(again) or shuffle
    assert sorted(again) == list(range(n))
    ours, theirs = (f(list(range(n)), bs, drop_last) for f in (BatchSampler, data.BatchSampler))
    assert list(ours) == list(theirs) and len(ours) == len(theirs) == len(list(ours))


def test_shuffling_follows_the_seed_and_leaves_a_private_generator_private():
    orders = []
    for seed in (1, 1, 2): set_seed(seed); s = Sampler(range(50), True); orders.append((list(s), list(s)))
    assert orders[0] == orders[1] != orders[2] and orders[0][0] != orders[0][1]
    state = torch.get_rng_state(); list(DataLoader(pictures(), 4, shuffle=True, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
    list(DataLoader(pictures(), 4)); assert torch.equal(state, torch.get_rng_state())   # in order: no chance involved


@pytest.mark.parametrize("items", [
    [(torch.ones(2), 1), (torch.zeros(2), 2)], [1, 2], [1.5, 2.], [True, False], [np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32)],
    [np.int32(1), np.int32(2)], [{"a": torch.ones(1), "b": (1, 2.)}, {"a": torch.zeros(1), "b": (3, 4.)}], [torch.tensor(1)],
])
def test_collate_equals_pytorchs(items): test_like(*(as_tuples(f(items)) for f in (collate, data.default_collate)))


def as_tuples(x):
    if isinstance(x, dict): return {k: as_tuples(v) for k, v in x.items()}
    return tuple(map(as_tuples, x)) if isinstance(x, (list, tuple)) else x


@pytest.mark.parametrize("items, error, words", [
    ([], ValueError, "empty"), ([torch.ones(2), torch.ones(3)], ValueError, r"\(2,\), \(3,\)"), ([(1, 2), (1,)], ValueError, "parts"),
    (["a", "b"], TypeError, "str"), ([None, None], TypeError, "NoneType"), ([np.ones(2), np.ones(3)], ValueError, "shapes"),
])
def test_collate_refuses(items, error, words):
    with pytest.raises(error, match=words): collate(items)


# --- DataLoader -------------------------------------------------------------------------------------------------------------

class Items:
    "A dataset without get_batch; each item adds a random number, and one may fail."
    def __init__(self, n=20, bad=None, noise=False, kill=None, wait=0.):
        self.n, self.bad, self.noise, self.kill, self.wait = n, bad, noise, kill, wait
    def __len__(self): return self.n
    def __getitem__(self, i):
        time.sleep(self.wait)
        if i == self.bad: raise KeyError("no such picture")
        if i == self.kill: os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((3,), float(i)) + (torch.rand(3) + random.random() + np.random.rand() if self.noise else 0), i


@given(st.integers(1, 40), st.integers(1, 15), st.booleans(), st.booleans())
def test_loader_gives_pytorchs_batches(n, bs, drop_last, whole):
    ds = pictures(n) if whole else Items(n)
    if drop_last and bs > n: return
    ours, theirs = DataLoader(ds, bs, drop_last=drop_last), data.DataLoader(ds, bs, drop_last=drop_last)
    assert len(ours) == len(theirs) == len(list(ours))
    test_like(list(map(tuple, ours)), list(map(tuple, theirs)))


def test_loader_options():
    order = [3, 1, 1, 7]
    assert [yb.tolist() for _, yb in DataLoader(pictures(), 2, sampler=order)] == [[3, 1], [1, 7]]
    assert list(DataLoader(pictures(4), 2, collate_fn=len)) == [2, 2]                     # not bypassed by get_batch
    class Torchy(Items):
        def __getitems__(self, idxs): return [(-i, i) for i in idxs]
    assert next(iter(DataLoader(Torchy(), 3)))[0].tolist() == [0, -1, -2]
    dl = DataLoader(pictures(), 5, shuffle=True)
    a, b = iter(dl), iter(dl); assert sorted(torch.cat([next(i)[1] for i in (a,)*4]).tolist()) == list(range(20)); next(b)
    test_like(list(DataLoader([(1, 2), (3, 4)], 2))[0], (torch.tensor([1, 3]), torch.tensor([2, 4])))


def test_a_batch_is_right_whichever_way_it_is_read():
    ds, idxs = pictures(), [5, 0, 19]
    test_like(read_batch(ds, idxs), read_batch(ds, idxs, lambda items: collate(items)))


@pytest.mark.parametrize("args, error, words", [
    (dict(ds=[], bs=2), ValueError, "empty list"), (dict(ds=iter([1]), bs=2), TypeError, "__len__"), (dict(bs=0), ValueError, "bs is 0"),
    (dict(bs=2.5), TypeError, "2.5"), (dict(num_workers=-1), ValueError, "num_workers"), (dict(num_workers=None), TypeError, "None"),
    (dict(shuffle=True, sampler=[1]), ValueError, "sampler"), (dict(bs=9, ds=[1, 2], drop_last=True), ValueError, "drop_last"),
    (dict(generator=3), TypeError, "Generator"), (dict(sampler=[]), ValueError, "no batch"),
])
def test_loader_refuses(args, error, words):
    with pytest.raises(error, match=words): DataLoader(**{"ds": pictures(), "bs": 2} | args)


fork_only = pytest.mark.skipif(training._start_method() != "fork", reason="workers of a test need fork")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=fork_only)])
def test_a_failing_item_is_named(workers):
    seen = []
    with pytest.raises(RuntimeError, match=r"Items\[13\] failed with KeyError: 'no such picture'") as caught:
        for _, yb in DataLoader(Items(bad=13), 4, num_workers=workers): seen += yb.tolist()
    assert seen == list(range(12)), "what came before is delivered"
    if workers: assert "Traceback" in str(caught.value) and "__getitem__" in str(caught.value) and "worker 1, batch 3" in str(caught.value)
    else: assert isinstance(caught.value.__cause__, KeyError)
    assert not mp.active_children()


@fork_only
def test_workers_change_nothing():
    for ds in (pictures(), Items()):
        for options in (dict(shuffle=True), dict(drop_last=True), dict(sampler=[1, 1, 2])):
            runs = []
            for workers in (0, 1, 2):
                set_seed(1); dl = DataLoader(ds, 3, num_workers=workers, **options)
                runs.append([list(dl), list(dl), torch.rand(1)] if workers < 2 or ds is not pictures else 0)
            test_like(runs[1], runs[0], rtol=0, atol=0); test_like(runs[2], runs[0], rtol=0, atol=0)
    assert not mp.active_children()


@fork_only
def test_random_items_do_not_depend_on_the_number_of_workers_and_do_not_repeat():
    runs = []
    for workers in (1, 3):
        set_seed(4); dl = DataLoader(Items(12, noise=True), 3, shuffle=True, num_workers=workers)
        runs.append([torch.cat([xb - yb[:, None] for xb, yb in dl]) for _ in range(2)])
    test_like(runs[0], runs[1], rtol=0, atol=0)
    assert runs[0][0].flatten().unique().numel() == 36 and not torch.equal(runs[0][0], runs[0][1])
    class Mixed:                                                    # an order that leaves PyTorch's generator alone
        def __len__(self): return 6
        def __iter__(self): return iter(random.sample(range(6), 6))
    noise = lambda: torch.cat([xb - yb[:, None] for xb, yb in dl])
    dl = DataLoader(Items(6, noise=True), 6, sampler=Mixed(), num_workers=1)
    assert not set(noise().flatten().tolist()) & set(noise().flatten().tolist())


@fork_only
@pytest.mark.parametrize("batch", [torch.ones(2, dtype=torch.bfloat16), {"a": [torch.zeros(0), "text", None]}, np.arange(3), torch.ones(2, 3).T])
def test_any_batch_comes_through(batch):
    got = next(iter(DataLoader(Items(2), 2, num_workers=1, collate_fn=lambda items: batch)))
    if isinstance(batch, dict): assert got["a"][1:] == ["text", None] and got["a"][0].shape == (0,)
    else: test_like(got, batch)
    if isinstance(got, torch.Tensor): got += 1   # writable


@fork_only
def test_a_batch_that_cannot_be_sent_is_an_error_not_a_hang():
    with pytest.raises(RuntimeError, match="pickle"): list(DataLoader(Items(), 2, num_workers=2, collate_fn=lambda items: lambda: 0))


@fork_only
def test_a_killed_worker_raises():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"worker 1 was killed by SIGKILL at batch 3, items \[6, 7\].*memory"):
        list(DataLoader(Items(kill=7), 2, num_workers=2))
    class Exits(Items):
        def __getitem__(self, i): os._exit(3)
    with pytest.raises(RuntimeError, match="exit code 3"): list(DataLoader(Exits(), 2, num_workers=1))
    it = iter(DataLoader(Items(40), 2, num_workers=2)); next(it)
    for p in mp.active_children(): p.kill(); p.join()
    with pytest.raises(RuntimeError, match="killed by SIGKILL"): list(it)                  # killed while idle
    assert time.monotonic() - start < 20 and not mp.active_children()


@fork_only
def test_leaving_early_ends_the_workers():
    for _ in DataLoader(Items(wait=.01), 2, num_workers=2): break
    assert not mp.active_children()
    it = iter(DataLoader(Items(wait=60.), 2, num_workers=2))
    threading.Timer(.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt): next(it)                                     # Ctrl-C while a worker is busy for a minute
    assert time.monotonic() - start < 20 and not mp.active_children()


@fork_only
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_process(signum, tmp_path):
    code = """
        import multiprocessing, sys, time
        from exp.training import DataLoader
        it = iter(DataLoader([(i, i) for i in range(1000)], 2, num_workers=2))
        next(it); print(*[p.pid for p in multiprocessing.active_children()], flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pids = list(map(int, process.stdout.readline().split()))
    assert len(pids) == 2
    process.send_signal(signum); process.wait(20)
    deadline = time.monotonic() + 10
    def alive(pid):
        try: return open(f"/proc/{pid}/stat").read().split()[2] != "Z"
        except (FileNotFoundError, ProcessLookupError): return False
    while any(map(alive, pids)) and time.monotonic() < deadline: time.sleep(.02)
    assert not any(map(alive, pids))
    process.stdout.close(); process.stderr.close()


def test_without_fork_a_notebooks_dataset_is_refused(monkeypatch):
    monkeypatch.setattr(training, "_start_method", lambda: "spawn")
    local = type("Local", (Items,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "x.py", raising=False)
    training._check_importable("spawn", local())                                        # a script can be imported again
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    with pytest.raises(ValueError, match="Local.*notebook.*num_workers=0"): list(DataLoader(local(), 2, num_workers=1))
    with pytest.raises(ValueError, match="cannot be sent"):
        list(DataLoader(pictures(), 2, num_workers=1, collate_fn=lambda items: items))
    assert not mp.active_children()


def test_workers_started_afresh(monkeypatch):
    monkeypatch.setattr(training, "_start_method", lambda: "spawn")
    test_like(list(DataLoader(pictures(6), 2, num_workers=1)), list(DataLoader(pictures(6), 2)))


# --- fit --------------------------------------------------------------------------------------------------------------------

def test_weighted_mean():
    assert weighted_mean([torch.tensor(1.), torch.tensor(4.)], [2, 1]) == 2
    with pytest.raises(ValueError, match="no batch"): weighted_mean([], [])


@given(st.integers(1, 30), st.integers(1, 30))
def test_a_judgement_does_not_depend_on_the_batch_size(n, bs):
    g = torch.Generator().manual_seed(n)
    ds = TensorDataset(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g))
    model, x, y = twins(4, 3)[0], *ds.tensors
    loss, acc = evaluate(model, cross_entropy, DataLoader(ds, bs))
    test_like(torch.tensor([loss, acc]), torch.stack([cross_entropy(model(x), y), accuracy(model(x), y)]).detach())


def clothes(n=96):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (n,), generator=g)
    return TensorDataset(torch.randn(n, 4, generator=g) + torch.eye(3, 4)[y]*3, y)


def test_fit_equals_a_bare_loop_and_pytorch():
    ds, valid = clothes(), clothes(10)
    ours, theirs = twins(4, 8, 3)
    set_seed(5); history = fit(3, ours, cross_entropy, SGD(ours.parameters(), .1), DataLoader(ds, 20, shuffle=True), DataLoader(valid, 4))
    set_seed(5); opt, bare = torch.optim.SGD(theirs.parameters(), .1), []
    for _ in range(3):
        losses = []
        for idxs in torch.randperm(len(ds)).split(20):
            loss = F.cross_entropy(theirs(ds.tensors[0][idxs]), ds.tensors[1][idxs])
            opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item()*len(idxs))
        with torch.no_grad(): pred = theirs(valid.tensors[0])
        bare.append((sum(losses)/len(ds), F.cross_entropy(pred, valid.tensors[1]).item(), accuracy(pred, valid.tensors[1]).item()))
    test_like(torch.tensor(history), torch.tensor(bare), rtol=1e-4, atol=1e-5)
    test_like(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)
    assert history[-1][0] < history[0][0] and history[-1][1] < history[0][1] and all(isinstance(v, float) for row in history for v in row)


def test_fit_switches_modes_and_puts_them_back():
    modes = []
    class Spy(Linear):
        def forward(self, x): modes.append((self.training, torch.is_grad_enabled())); return super().forward(x)
    model, dl = Sequential(Spy(4, 3)).eval(), DataLoader(clothes(8), 4)
    fit(2, model, cross_entropy, SGD(model.parameters(), .1), dl, dl)
    assert modes == ([(True, True)]*2 + [(False, False)]*2)*2 and not model.training and not model[0].training
    def fail(pred, y): raise RuntimeError("stop")
    model.train()
    with pytest.raises(RuntimeError, match="stop"): evaluate(model, fail, dl)
    assert model.training
    model.eval()
    with pytest.raises(RuntimeError, match="stop"): fit(1, model, fail, SGD(model.parameters(), .1), dl, dl)
    assert not model.training and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_fit_without_batches_or_epochs():
    model, dl = twins(4, 3)[0], DataLoader(clothes(8), 4)
    opt = SGD(model.parameters(), .1)
    assert fit(0, model, cross_entropy, opt, dl, dl) == []
    for train_dl, valid_dl in (([], dl), (dl, [])):
        with pytest.raises(ValueError, match="no batch"): fit(1, model, cross_entropy, opt, train_dl, valid_dl)


@settings(max_examples=5)
@given(st.integers(0, 5))
def test_fit_takes_pytorchs_pieces(seed):
    _, model = twins(4, 3, seed=seed)
    ds = clothes(12)
    history = fit(2, model, F.cross_entropy, torch.optim.Adam(model.parameters()), data.DataLoader(ds, 5), list(DataLoader(ds, 5)))
    assert len(history) == 2 and not any(np.isnan(history).ravel())


@fork_only
def test_fit_with_workers_gives_the_same_weights():
    nets = []
    for workers in (0, 2):
        model = twins(4, 3)[0]; set_seed(2)
        fit(2, model, cross_entropy, SGD(model.parameters(), .1), DataLoader(clothes(40), 8, shuffle=True, num_workers=workers), DataLoader(clothes(8), 4))
        nets.append(model)
    test_like(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=0)

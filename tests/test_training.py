"Lesson 04: losses, modules, SGD, fit: laws, and agreement with PyTorch."
import copy
import io
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils import data

from exp.loaders import DataLoader, TensorDataset
from exp.setup import set_seed
from exp.testing import test_like
from exp.training import (SGD, Linear, Module, Parameter, ReLU, Sequential, accuracy, cross_entropy, evaluate, fit, log_softmax, nll,
                          weighted_mean)

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
    test_like(log_softmax(x), F.log_softmax(x, -1))
    ours, theirs = cross_entropy(x, t), F.cross_entropy(x, t)
    test_like(ours, theirs)
    test_like(nll(F.log_softmax(x, -1), t), theirs)
    test_like(torch.autograd.grad(ours, x)[0], torch.autograd.grad(theirs, x)[0])
    c = torch.arange(x.shape[1], dtype=x.dtype)
    test_like(torch.autograd.grad((log_softmax(x)*c).sum(), x)[0], torch.autograd.grad((F.log_softmax(x, -1)*c).sum(), x)[0], rtol=1e-4, atol=1e-4)


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
    test_like(log_softmax(x.T, 0).T, log_softmax(x), rtol=1e-12, atol=1e-12)


def test_log_softmax_keeps_its_digits_where_subtracting_lse_does_not():
    x = torch.randn(100, 10, generator=torch.Generator().manual_seed(0)) + 1e5
    right = F.log_softmax(x.double(), -1)
    assert (log_softmax(x) - right).abs().max() < 1e-6 < (x - torch.logsumexp(x, 1)[:, None] - right).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 100, 1e4])
def test_losses_in_other_precisions(dtype, size):
    g = torch.Generator().manual_seed(1)
    x, t = (size*torch.randn(32, 10, generator=g)).to(dtype), torch.randint(10, (32,), generator=g)
    right, eps = F.log_softmax(x.double(), -1), torch.finfo(dtype).eps
    test_like(log_softmax(x), right.to(dtype), rtol=eps, atol=1e-7)                          # the nearest number, or its neighbour
    gap = lambda y: (y.double() - right).abs().max()
    assert gap(log_softmax(x)) <= gap(F.log_softmax(x, -1)) + 1e-12, "no worse than PyTorch"
    test_like(cross_entropy(x, t), F.cross_entropy(x.double(), t).to(dtype), rtol=4*eps)
    if size < 1e4: test_like(cross_entropy(x, t), F.cross_entropy(x, t), rtol=4*eps)          # beyond, PyTorch's float16 mean overflows


def test_losses_at_infinity_and_nan():
    inf, nan = torch.inf, torch.nan
    for row in ([-inf, -inf], [inf, 1.], [inf, inf], [nan, 1.], [-inf, 1.], [-inf, inf]):
        test_like(log_softmax(torch.tensor([row])), F.log_softmax(torch.tensor([row]), -1))


def test_losses_gradcheck():
    x, t = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 1])
    for f in (log_softmax, lambda x: cross_entropy(x, t)): assert torch.autograd.gradcheck(f, x)


shapes = st.lists(st.integers(1, 4), max_size=3)


@given(st.integers(1, 4), st.integers(1, 6), shapes, st.integers(0, 99))
def test_classes_are_in_dimension_1_as_in_pytorch(n, c, more, seed):
    g = torch.Generator().manual_seed(seed)
    x, t = torch.randn(n, c, *more, generator=g, dtype=torch.float64), torch.randint(c, (n, *more), generator=g)
    test_like(log_softmax(x), F.log_softmax(x, 1))
    test_like(cross_entropy(x, t), F.cross_entropy(x, t))
    test_like(nll(F.log_softmax(x, 1), t), F.cross_entropy(x, t))
    if c > 1: test_like(accuracy(x, t), (x.argmax(1) == t).float().mean())
    else:
        with pytest.raises(ValueError, match="one score"): accuracy(x, t)
    for dtype in (torch.uint8, torch.int32): test_like(cross_entropy(x, t.to(dtype)), cross_entropy(x, t))


@pytest.mark.parametrize("func", [cross_entropy, nll, accuracy])
@pytest.mark.parametrize("logits, targets, words", [
    (torch.randn(4, 3), torch.zeros(4, 1, dtype=torch.long), r"\(4, 1\).*squeeze"), (torch.randn(4, 3), torch.zeros(4, 3, dtype=torch.long), "argmax"),
    (torch.randn(4, 3), torch.zeros(3, dtype=torch.long), r"\(3,\)"), (torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), r"\(2, 5\)"),
])
def test_losses_refuse_other_shapes(func, logits, targets, words):
    with pytest.raises(ValueError, match=words): func(logits, targets)


@pytest.mark.parametrize("logits, targets", [((4, 1), (4,)), ((4,), (4,)), ((4, 1, 5), (4, 5)), ((), ())])
def test_accuracy_of_one_score_is_refused(logits, targets):
    with pytest.raises(ValueError, match="one score has no largest; compare logits > 0"): accuracy(torch.randn(logits), torch.ones(targets))


def test_one_item_without_its_batch_is_refused():
    for f in (nll, cross_entropy):
        with pytest.raises(IndexError, match="[Dd]imension"): f(torch.randn(10), torch.tensor(3))


def test_losses_refuse_other_types():
    for f in (nll, cross_entropy):
        with pytest.raises(TypeError, match="long"): f(torch.randn(4, 3), torch.zeros(4))
    for f in (log_softmax, lambda x: cross_entropy(x, torch.zeros(4, dtype=torch.long))):
        with pytest.raises(TypeError, match="int64"): f(torch.ones(4, 3, dtype=torch.long))
    assert accuracy(torch.eye(3).long(), torch.arange(3)) == 1


@pytest.mark.parametrize("bad", [-1, 3, 100, -100])
def test_a_class_that_is_not_there(bad):
    for f in (nll, cross_entropy):
        with pytest.raises((RuntimeError, IndexError), match=f"{bad} is out of bounds"): f(torch.randn(4, 3), torch.tensor([0, 0, bad, 0]))


# --- Parameter and Module ---------------------------------------------------------------------------------------------------

def test_parameter_is_a_leaf_with_a_badge():
    base = torch.ones(2, 3)
    p = Parameter(base)
    assert p.requires_grad and p.is_leaf and isinstance(p, nn.Parameter) and p.data_ptr() == base.data_ptr()
    assert type(p + 1) is torch.Tensor and type(p.detach()) is torch.Tensor and not Parameter(base, False).requires_grad
    assert repr(p) == repr(nn.Parameter(base))
    for q in (p, Parameter(base, False)):
        for twin in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
            assert type(twin) is Parameter and twin.is_leaf and twin.requires_grad is q.requires_grad and torch.equal(twin, q) and twin.data_ptr() != q.data_ptr()
    both = copy.deepcopy([p, p]); assert both[0] is both[1]
    with pytest.raises(RuntimeError, match="floating point"): Parameter(torch.tensor([1]))


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
    for change, words in (({"gain": torch.zeros(2)}, r"other shapes \['gain'\]"), ({"extra": torch.zeros(1)}, r"unexpected=\['extra'\]"),
                          ({"body.0.mean": torch.zeros(3, 1)}, "body.0.mean")):
        with pytest.raises(ValueError, match=words): model.load_state_dict(good | change)
        test_like(model.state_dict(), before)
    with pytest.raises(ValueError, match=r"missing=\['gain', 'head.bias'\]"):
        model.load_state_dict({k: v for k, v in good.items() if k not in ("gain", "head.bias")})
    test_like(model.state_dict(), before)
    partial = {"gain": torch.full((1,), 5.), "extra": torch.zeros(1)}
    missing, unexpected = model.load_state_dict(partial, strict=False)
    assert unexpected == ["extra"] and "gain" not in missing and len(missing) == len(before) - 1 and model.gain == 5
    with pytest.raises(ValueError, match="other shapes"): model.load_state_dict({"gain": torch.zeros(9)}, strict=False)


def test_of_a_shared_weight_the_last_value_is_loaded_as_in_pytorch():
    def build(base, linear, tied):
        class Net(base):
            def __init__(self):
                super().__init__()
                for i in range(30): setattr(self, f"layer{i}", linear(1, 1))
                if tied:
                    for i in range(30): getattr(self, f"layer{i}").weight = self.layer0.weight
        return Net()
    state = {k: torch.full_like(v, i) for i, (k, v) in enumerate(build(nn.Module, nn.Linear, False).state_dict().items())}
    ours, theirs = build(Module, Linear, True), build(nn.Module, nn.Linear, True)
    ours.load_state_dict(state); theirs.load_state_dict(state)
    test_like(ours.state_dict(), theirs.state_dict())


def test_modes_and_moves():
    model = both()[0]
    assert model.training and model.eval() is model and not model.body[1].lin.training
    assert model.train().body[1].lin.training
    first = model.gain
    model(torch.randn(2, 3)).sum().backward()
    assert model.to("cpu", torch.float64) is model and model.gain is first and first.dtype == first.grad.dtype == torch.float64
    assert model.body[0].seen.dtype == torch.int64 and model.body[0].mean.dtype == torch.float64


def test_whole_numbers_do_not_travel_through_other_dtypes():
    theirs = nn.BatchNorm1d(2); theirs.register_buffer("ids", torch.tensor([70_001, 2**40 + 1]))
    theirs.register_buffer("scratch", torch.ones(2), persistent=False)
    net = Sequential(Linear(2, 2), theirs); net[0].register_buffer("ids", torch.tensor([70_001, 2**40 + 1]))
    net(torch.randn(4, 2)).sum().backward()
    net.to(torch.float16)
    for layer in net: assert layer.ids.tolist() == [70_001, 2**40 + 1]
    assert {t.dtype for p in net.parameters() for t in (p, p.grad)} == {theirs.scratch.dtype} == {torch.float16}


def test_sequential_is_a_sequence():
    model, theirs = twins(4, 3, 2)
    for part in (slice(1, None), slice(-1), slice(0, 9, 2)): assert repr(model[part]) == repr(theirs[part])
    assert len(model) == 3 and [type(m).__name__ for m in model] == ["Linear", "ReLU", "Linear"]
    assert model[-1] is model[2] and isinstance(model[:2], Sequential) and model[:2][0] is model[0] and len(Sequential()) == 0
    assert [m for m in model.modules()] == [model, *model]


def test_sequential_takes_layers_only():
    for odd in (F.relu, ReLU, nn.ReLU, None, "relu", [ReLU()]):
        with pytest.raises(TypeError): Sequential(Linear(2, 2), odd)
    assert len(Sequential(*[ReLU()]*2)) == 2


def test_layers_in_a_plain_list_are_noticed():
    class Stack(Module):
        def __init__(self, make): self.layers, self.sizes, self.empty = make(Linear(2, 2) for _ in range(2)), [3, 4], []
    for make in (list, tuple):
        for use in (lambda m: list(m.parameters()), lambda m: SGD(m.parameters()), lambda m: m.state_dict(), repr, lambda m: m.eval()):
            with pytest.raises(TypeError, match="Sequential"): use(Stack(make))
    assert len(list(Stack(lambda layers: Sequential(*layers)).parameters())) == 4


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
    assert isinstance(opt, torch.optim.Optimizer) and SGD([a]).param_groups[0]["lr"] == .1
    (a.sum() + b.sum()).backward(); opt.step()
    test_like(a.detach(), torch.full((2,), .9)); test_like(b.detach(), torch.full((2,), .5))
    state = opt.state_dict()
    opt.param_groups[0]["lr"] = 9.; opt.load_state_dict(state); assert opt.param_groups[0]["lr"] == .1
    with pytest.raises(ValueError): opt.load_state_dict(SGD([a, b], .1).state_dict())
    twin = pickle.loads(pickle.dumps(opt)); assert [g["lr"] for g in twin.param_groups] == [.1, .5]
    with pytest.raises(ValueError, match="lr is -1"): SGD([{"params": [a]}, {"params": [b], "lr": -1}])
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, .5); opt.step(); scheduler.step()
    assert [g["lr"] for g in opt.param_groups] == [.05, .25]


def test_sgd_takes_a_closure():
    w = torch.ones(2, requires_grad=True)
    opt = SGD([w], .1)
    def closure():
        opt.zero_grad(); loss = (w**2).sum(); loss.backward()
        return loss
    assert opt.step(closure) == 2 and opt.step() is None
    test_like(w.detach(), torch.full((2,), .6))


@pytest.mark.parametrize("params, lr, error", [([], .1, ValueError), (iter(()), .1, ValueError), (torch.ones(2), .1, TypeError), (["w"], .1, TypeError),
                                               ([torch.ones(1)], -.1, ValueError), ([torch.ones(1)], float("nan"), ValueError), ([torch.ones(1)], float("inf"), ValueError)])
def test_sgd_refuses(params, lr, error):
    with pytest.raises(error): SGD(params, lr)


@pytest.mark.parametrize("make, words", [
    (lambda: {"params": Linear(2, 2).parameters()}, "str"), (lambda: Linear(2, 2).state_dict(), "str"), (lambda: [Linear(2, 2), Linear(2, 2)], "Linear"),
    (lambda: [nn.Linear(2, 2)], "Linear"), (lambda: Linear(2, 2), "Linear.*not iterable"), (lambda: [list(Linear(2, 2).parameters())]*2, "list"),
    (lambda: Parameter(torch.ones(1)), "iterable of Tensors"), (lambda: [{"params": [Linear(2, 2)]}], "Linear"),
])
def test_sgd_says_what_it_was_given_instead_of_tensors(make, words):
    with pytest.raises(TypeError, match=words): SGD(make())


def test_sgd_refuses_a_tensor_in_two_groups():
    w = torch.ones(1)
    with pytest.raises(ValueError, match="more than one"): SGD([{"params": [w]}, {"params": [w]}], .1)


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


def test_a_backward_before_fit_does_not_count():
    nets = []
    for stray in (False, True):
        model = twins(4, 3)[0]
        if stray: (1e6*model(torch.randn(5, 4)).sum()).backward()
        fit(1, model, cross_entropy, SGD(model.parameters()), DataLoader(clothes(8), 4), DataLoader(clothes(8), 4))
        assert all(p.grad is None for p in model.parameters())
        nets.append(model.state_dict())
    test_like(*nets, rtol=0, atol=0)


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


def test_modes_of_frozen_layers_are_kept():
    for make in (lambda: Sequential(Linear(4, 3), ReLU(), Linear(3, 3)), lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))):
        model, dl, seen = make(), DataLoader(clothes(8), 4), []
        model[1].eval()
        before = {k: v.clone() for k, v in model[1].state_dict().items() if "running" in k}
        fit(2, model, lambda pred, y: seen.append((model.training, model[1].training)) or cross_entropy(pred, y), SGD(model.parameters()), dl, dl)
        assert seen == ([(True, False)]*2 + [(False, False)]*2)*2 and [m.training for m in model] == [True, False, True]
        for k, v in before.items(): assert torch.equal(model[1].state_dict()[k], v)
        evaluate(model, cross_entropy, dl)
        assert model.training and [m.training for m in model] == [True, False, True]


def test_fit_with_workers_gives_the_same_weights():
    nets = []
    for workers in ({}, dict(num_workers=2, workers="threads")):
        model = twins(4, 3)[0]; set_seed(2)
        fit(2, model, cross_entropy, SGD(model.parameters(), .1), DataLoader(clothes(40), 8, shuffle=True, **workers), DataLoader(clothes(8), 4))
        nets.append(model)
    test_like(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=0)


# --- the exercises' checkers ------------------------------------------------------------------------------------------------

def top_k(x, t, k): return (x.argsort(1, descending=True)[:, :k] == t[:, None]).sum(1).float().mean()
def top_k_rank(x, t, k): return ((x > x.gather(1, t[:, None])).sum(1) < k).float().mean()
def top_k_loop(x, t, k): return torch.tensor(sum(int(c in row.topk(k).indices) for row, c in zip(x, t))/len(t))
def top_k_missed(x, t, k): return 1 - (x.topk(k).indices != t[:, None]).all(1).float().mean()
def top_k_first(x, t, k): return (x.argmax(1) == t).float().mean()
def top_k_kth(x, t, k): return (x.topk(k).indices[:, -1] == t).float().mean()
def top_k_broadcast(x, t, k): return (x.topk(k).indices == t).any(1).float().mean()
def top_k_per_guess(x, t, k): return (x.topk(k).indices == t[:, None]).float().mean()
def top_k_smallest(x, t, k): return (x.topk(k, largest=False).indices == t[:, None]).any(1).float().mean()
def top_k_in_place(x, t, k):
    hit = torch.zeros(len(t), dtype=torch.bool)
    for _ in range(k):
        best = x.argmax(1)
        hit |= best == t
        x[range(len(t)), best] = -torch.inf
    return hit.float().mean()


class Momentum(SGD):
    kind = "right"
    def __init__(self, params, lr, momentum):
        super().__init__(params, lr)
        self.fixed = {"lr": lr, "momentum": momentum}
        if self.kind != "not in the group":
            for group in self.param_groups: group.setdefault("momentum", momentum)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            h = {"fixed": self.fixed, "first group": self.param_groups[0]}.get(self.kind, group)
            for p in group["params"]:
                if p.grad is None and self.kind != "fades": continue
                g, v = torch.zeros_like(p) if p.grad is None else p.grad, self.state[p].get("v", torch.zeros_like(p))
                now = {"damped": (1 - h["momentum"])*g, "folded": h["lr"]*g}.get(self.kind, g)
                v = self.state[p]["v"] = now if self.kind == "forgets" else h["momentum"]*v + now
                p -= v if self.kind == "folded" else h["lr"]*(g + h["momentum"]*v) if self.kind == "nesterov" else h["lr"]*v


class MomentumOnTheTape(Momentum): step = Momentum.step.__wrapped__       # forgot no_grad
class MomentumOwn(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum): super().__init__(params, {"lr": lr, "momentum": momentum}); self.v = {}
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.v[p] = group["momentum"]*self.v.get(p, 0) + p.grad
                    p.data.sub_(self.v[p], alpha=group["lr"])
class MomentumStops(Momentum):                                            # `break` for `continue`
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None: break
                v = self.state[p]["v"] = group["momentum"]*self.state[p].get("v", 0) + p.grad
                p -= group["lr"]*v


class MomentumIsTheGrad(Momentum):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None: continue
                if "v" in self.state[p]: self.state[p]["v"].mul_(group["momentum"]).add_(p.grad)
                else: self.state[p]["v"] = p.grad
                p -= group["lr"]*self.state[p]["v"]


def momentum(kind): return type(kind, (Momentum,), {"kind": kind})


def pile(model, loss_func, pieces, kind="right"):
    if kind != "old gradients": model.zero_grad()
    n, total, kept = sum(len(y) for _, y in pieces), 0., []
    for x, y in pieces:
        loss = loss_func(model(x), y)*{"sum": 1., "mean of means": 1/len(pieces)}.get(kind, len(y)/n)
        if kind == "one graph": kept.append(loss)
        else: loss.backward()
        total += loss if kind == "on the tape" else loss.detach()
    if kind == "one graph": sum(kept).backward()
    if kind == "steps":
        with torch.no_grad():
            for p in model.parameters(): p -= .1*p.grad
    return {"number": total.item(), "last loss": loss.detach(), "silent": None}.get(kind, total)


def pile_divided_at_the_end(model, loss_func, pieces):
    model.zero_grad()
    n = total = 0
    for x, y in pieces:
        loss = loss_func(model(x), y)*len(y)
        loss.backward()
        n, total = n + len(y), total + loss.detach()
    for p in model.parameters(): p.grad /= n
    return total/n


def pile_by_autograd_grad(model, loss_func, pieces):
    params, n = list(model.parameters()), sum(len(y) for _, y in pieces)
    sums, total = [torch.zeros_like(p) for p in params], torch.zeros(())
    for x, y in pieces:
        loss = loss_func(model(x), y)*(len(y)/n)
        for s, g in zip(sums, torch.autograd.grad(loss, params)): s += g
        total += loss.detach()
    for p, s in zip(params, sums): p.grad = s
    return total


def pile_averaged(model, loss_func, pieces):                               # its mean comes in float64
    model.zero_grad()
    sizes, losses = [len(y) for _, y in pieces], []
    for x, y in pieces:
        loss = loss_func(model(x), y)
        (loss*len(y)/sum(sizes)).backward()
        losses.append(loss.item())
    return torch.tensor(np.average(losses, weights=sizes))


def pile_preds_first(model, loss_func, pieces):
    model.zero_grad()
    preds, n, total = [model(x) for x, _ in pieces], sum(len(y) for _, y in pieces), 0.
    for pred, (_, y) in zip(preds, pieces):
        loss = loss_func(pred, y)*len(y)/n
        loss.backward()
        total += loss.detach()
    return total


def pile_one_ahead(model, loss_func, pieces):                              # the next forward before the last backward
    model.zero_grad()
    n, total, last = sum(len(y) for _, y in pieces), 0., None
    for x, y in pieces:
        pred = model(x)
        if last is not None: last.backward()
        last = loss_func(pred, y)*len(y)/n
        total += last.detach()
    last.backward()
    return total


def pile_zeroes(model, loss_func, pieces):                                 # crashes before a first step
    for p in model.parameters(): p.grad.zero_()
    return pile(model, loss_func, pieces, "old gradients")


def pile_joint(model, loss_func, pieces):
    model.zero_grad()
    loss = loss_func(model(torch.cat([x for x, _ in pieces])), torch.cat([y for _, y in pieces]))
    loss.backward()
    return loss.detach()


TOPS = {"float16": 11, "bfloat16": 88, "float32": 88}
LOSSES = [2.30, 2.30, 6.91, .29, 100.]
ANSWERS = {   # right ones, in several words; wrong ones, each with a word of the advice it gets
    "top_k_accuracy": ([top_k, top_k_rank, top_k_loop, top_k_missed], {
        top_k_first: "k=10", top_k_kth: "k=10", top_k_broadcast: "k=1 ", top_k_per_guess: "k=10", top_k_smallest: "k=1 ", top_k_in_place: "in place",
        lambda x, t, k: top_k(x, t, k).item(): "tensor of shape", lambda x, t, k: top_k(x, t, k).double(): "float64"}),
    "momentum": ([torch.optim.SGD, Momentum, MomentumOwn], {
        **{momentum(kind): "read from the group" for kind in ("fixed", "damped", "folded", "nesterov")}, momentum("first group"): "of its own",
        momentum("fades"): "grad is None", momentum("forgets"): "plain SGD", momentum("not in the group"): "beside lr", MomentumOnTheTape: "in-place operation",
        MomentumStops: "grad is None", MomentumIsTheGrad: "tensor of its own"}),
    "accumulate": ([pile, pile_divided_at_the_end, pile_by_autograd_grad, pile_averaged], {
        pile_joint: "40 items were alive", pile_preds_first: "40 items were alive", pile_one_ahead: "items were alive", pile_zeroes: "zero_", **{partial(pile, kind=kind): word for kind, word in {
            "one graph": "40 items were alive", "old gradients": "old gradients", "sum": "weight it", "mean of means": "16, 16, 7 and 1", "on the tape": "detached",
            "number": "detached", "steps": "do not step", "last loss": "mean loss over all", "silent": "returned None"}.items()}}),
}
NUMBERS = {
    "overflow": ([TOPS, {k: float(v) for k, v in TOPS.items()}, {k: np.int64(v) for k, v in TOPS.items()}, {k: torch.tensor(v) for k, v in TOPS.items()}],
                 [TOPS | {"float16": 12}, TOPS | {"bfloat16": 11}, TOPS | {"float32": 89}, TOPS | {"float16": 11.09}, TOPS | {"float16": None}, {"float16": 11}, [11, 88, 88]]),
    "first_losses": ([LOSSES, tuple(LOSSES), np.array(LOSSES), torch.tensor(LOSSES), [np.float32(v) for v in LOSSES]],
                     [[1., *LOSSES[1:]], [2.30, 7., *LOSSES[2:]], [*LOSSES[:2], 3., *LOSSES[3:]], [*LOSSES[:3], 1.1, 100.], [*LOSSES[:4], 0.], LOSSES[:4], [*LOSSES[:4], None], "none"]),
}


@pytest.mark.parametrize("name", [*ANSWERS, *NUMBERS])
def test_checkers_know_right_from_wrong(name, capsys):
    from exp.exercises import training_loop
    check, (right, wrong) = getattr(training_loop, f"check_{name}"), (ANSWERS | NUMBERS)[name]
    for answer in right:
        check(answer)
        assert "✓" in capsys.readouterr().out
    for answer in wrong:
        with pytest.raises(AssertionError, match=wrong[answer] if name in ANSWERS else None) as error: check(answer)
        assert len(str(error.value).split()) >= 6, error.value

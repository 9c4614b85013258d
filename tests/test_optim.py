"exp.optim: every optimizer against torch.optim or its paper, the laws of stats and steppers, blocks against loops, groups, memory, bad input."
import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from exp import optim
from exp.learner import DataLoaders, Learner, Recorder, SaveCheckpoint
from exp.optim import (Groups, Hypers, Many, Optimizer, Part, adagrad, adam, adam_step, adamw, average, average_squares, cut, decay, gather,
                       keeps, l2, lamb, lars, momentum, radam, rectify, rmsprop, sgd, sgd_step)
from exp.schedule import ParamScheduler, cosine, lr_find, one_cycle

ALL = [sgd, momentum, rmsprop, adagrad, adam, adamw, radam, lars, lamb]
SHAPES = [(5, 3), (3,), (), (4, 2, 3, 3), (0, 4), (1,), (40, 50)]


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.fixture
def small_blocks(monkeypatch):
    "Blocks of 64 numbers, so that small tests cut, gather and flush."
    monkeypatch.setattr(optim, "BLOCK", 64)


def close(a, b, **tol): torch.testing.assert_close(a, b, equal_nan=True, **tol)


def weights(shapes=SHAPES, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def fill(ps, i, seed=1, freeze=True):
    "Gradients of step i, the same for every copy of the weights."
    g = torch.Generator().manual_seed(1000*seed + i)
    for k, p in enumerate(ps):
        p.grad = (.3*p.detach().double() + 10**(k % 3 - 1)*torch.randn(p.shape, generator=g, dtype=torch.float64)).to(p.dtype)
    if freeze and i % 9 in (2, 3): ps[0].grad = None


def trajectory(make, n=100, dtype=torch.float64, groups=True, change=None, freeze=True):
    ps = weights(dtype=dtype)
    opt = make([{"params": ps[:2], "lr": .02}, {"params": ps[2:5]}, {"params": []}, {"params": ps[5:]}] if groups else ps)
    for i in range(n):
        if change: change(opt, i)
        fill(ps, i, freeze=freeze)
        before = [None if p.grad is None else p.grad.clone() for p in ps]
        opt.step()
        assert all(a is None or torch.equal(a, p.grad) for a, p in zip(before, ps)), "a gradient was changed"
    return [p.detach() for p in ps]


def schedule(opt, i):
    "Rates change all the time, one group's decay and betas midway."
    for k, g in enumerate(opt.param_groups):
        g["lr"] = .01*(1 + math.cos(i/30))*(k + 1)
        if i == 50:
            if g["weight_decay"]: g["weight_decay"] /= 2
            if "betas" in g: g["betas"] = (.8, g["betas"][1])
            if g.get("momentum"): g["momentum"] = .7


# --- against PyTorch --------------------------------------------------------------------------------------------------------

PAIRS = [(sgd, torch.optim.SGD, [{}, dict(weight_decay=.1)]),
         (momentum, torch.optim.SGD, [dict(momentum=.9), dict(momentum=.9, dampening=.4, weight_decay=.1), dict(momentum=.8, nesterov=True, weight_decay=.1),
                                      dict(momentum=0.)]),
         (rmsprop, torch.optim.RMSprop, [{}, dict(alpha=.9, eps=1e-3, weight_decay=.1), dict(momentum=.9), dict(centered=True), dict(momentum=.5, centered=True)]),
         (adagrad, torch.optim.Adagrad, [{}, dict(lr_decay=.1, eps=1e-3, weight_decay=.1), dict(initial_accumulator_value=.5)]),
         (adam, torch.optim.Adam, [{}, dict(betas=(.5, .9), eps=1e-3, weight_decay=.1), dict(betas=(0., .99))]),
         (adamw, torch.optim.AdamW, [{}, dict(betas=(.5, .9), eps=1e-3, weight_decay=.3), dict(weight_decay=0.)]),
         (radam, torch.optim.RAdam, [{}, dict(betas=(.5, .9), eps=1e-3, weight_decay=.1)])]
CASES = [(ours, theirs, o) for ours, theirs, options in PAIRS for o in options]


@pytest.mark.parametrize("ours, theirs, options", CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_follows_pytorch(ours, theirs, options, small_blocks):
    both = [trajectory(lambda ps: f(ps, lr=.01, **options), change=schedule) for f in (ours, theirs)]
    close(*both, rtol=1e-6, atol=1e-6)
    both = [trajectory(lambda ps: f(ps, lr=.01, **options), n=20, dtype=torch.float32) for f in (ours, theirs)]
    close(*both, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("ours, theirs", [(p[0], p[1]) for p in PAIRS], ids=lambda x: x.__name__)
def test_defaults_are_pytorchs(ours, theirs):
    p = [torch.zeros(1, requires_grad=True)]
    mine, yours = ours(p).param_groups[0], theirs(p).param_groups[0]
    for name in mine.keys() - {"params"}:
        if (ours, name) != (momentum, "momentum"): assert mine[name] == yours[name], name
    assert momentum(p).param_groups[0]["momentum"] == .9


def test_momentum_turned_off_and_on_midway():
    def change(opt, i):
        for g in opt.param_groups: g["momentum"] = 0. if 10 <= i < 20 else .9
    close(*[trajectory(lambda ps: f(ps, lr=.01, momentum=.9), n=30, change=change) for f in (momentum, torch.optim.SGD)], rtol=1e-9, atol=1e-9)


def test_a_rate_in_a_tensor():
    close(*[trajectory(lambda ps: adamw(ps, lr=lr), n=10, groups=False) for lr in (.01, torch.tensor(.01, dtype=torch.float64))], rtol=0, atol=0)


def test_sizes_of_gradients():
    "±1e6, 1e-12 and exact zeros, as PyTorch treats them."
    for ours, theirs, options in CASES:
        ends = []
        for make in (ours, theirs):
            p = torch.tensor([1., -2., 3., 4.], dtype=torch.float64, requires_grad=True)
            opt = make([p], lr=.01, **options)
            for i in range(5):
                p.grad = torch.tensor([1e6*(-1)**i, 1e-12, 0., 1.], dtype=torch.float64)
                opt.step()
            ends.append(p.detach())
        close(*ends, rtol=1e-9, atol=1e-9)
        assert ends[0].isfinite().all()


# --- LARS and LAMB, by their equations --------------------------------------------------------------------------------------

def lars_by_hand(p, g, s, lr, wd=.1, mu=.9, trust=.01):
    ratio = trust*p.norm()/(g.norm() + wd*p.norm()) if p.norm() > 0 and g.norm() > 0 else 1.
    s["m"] = mu*s.get("m", 0.) + lr*ratio*(g + wd*p)
    return p - s["m"]


def lamb_by_hand(p, g, s, lr, wd=.1, b1=.9, b2=.99, eps=1e-6):
    t = s["t"] = s.get("t", 0) + 1
    s["m"], s["v"] = b1*s.get("m", 0.) + (1 - b1)*g, b2*s.get("v", 0.) + (1 - b2)*g*g
    d = (s["m"]/(1 - b1**t))/((s["v"]/(1 - b2**t)).sqrt() + eps) + wd*p
    return p - lr*(p.norm()/d.norm() if p.norm() > 0 and d.norm() > 0 else 1.)*d


@pytest.mark.parametrize("make, hand", [(lambda ps: lars(ps, lr=.5, weight_decay=.1, trust=.01), lars_by_hand),
                                        (lambda ps: lamb(ps, lr=.01, weight_decay=.1, betas=(.9, .99)), lamb_by_hand)], ids=["lars", "lamb"])
def test_layerwise_optimizers_follow_their_equations(make, hand, small_blocks):
    ps, qs = weights(), [p.detach().clone() for p in weights()]
    ps[1].data.zero_(); qs[1].zero_()                         # a layer of zeros must be able to leave
    opt, states = make(ps), [{} for _ in qs]
    for i in range(100):
        if i == 60: opt.param_groups[0]["lr"] /= 3
        fill(ps, i)
        for k, p in enumerate(ps):
            if p.grad is not None: qs[k] = hand(qs[k], p.grad, states[k], opt.param_groups[0]["lr"])
        opt.step()
    close([p.detach() for p in ps], qs, rtol=1e-9, atol=1e-10)
    assert qs[1].abs().min() > 0


def test_layerwise_steps_do_not_depend_on_the_cut(monkeypatch):
    ends = []
    for block in (7, 64, 10**6):
        monkeypatch.setattr(optim, "BLOCK", block)
        ends.append(trajectory(lambda ps: lamb(ps, lr=.01), n=10))
    close(ends[0], ends[2], rtol=1e-10, atol=1e-12); close(ends[1], ends[2], rtol=1e-10, atol=1e-12)


@given(st.floats(.01, 100), st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_lamb_does_not_feel_the_scale_of_the_gradient(scale, seed):
    def run(size):
        ps = weights([(6, 5)], seed=seed)
        opt = lamb(ps, lr=.01, eps=0., weight_decay=0.)
        for i in range(5): fill(ps, i); ps[0].grad = torch.ones(6, 5).double().cumsum(0)*size*(-1)**i; opt.step()
        return ps[0].detach()
    close(run(1.), run(scale), rtol=1e-8, atol=1e-10)


# --- stats and steppers -----------------------------------------------------------------------------------------------------

@given(st.floats(0, .99), st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_weights_of_an_average_sum_to_what_debiasing_divides_by(beta, n):
    s, h = Part({"g": torch.ones(2).double(), "exp_avg": torch.zeros(2).double(), "exp_avg_sq": torch.zeros(2).double()}), Hypers(betas=(beta, beta))
    for _ in range(n): average(s, h); average_squares(s, h)
    close(s.exp_avg, torch.full((2,), 1 - beta**n).double()); close(s.exp_avg_sq, s.exp_avg)


@given(st.floats(1e-3, 1e3))
@settings(max_examples=15, deadline=None)
def test_adams_first_step_is_the_rate(size):
    p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    opt = adam([p], lr=.01, eps=0.); p.grad = torch.tensor([1., -1., 2.]).double()*size; opt.step()
    close(p.detach(), torch.tensor([-.01, .01, -.01]).double())


def test_l2_and_decay_are_one_for_sgd_and_two_for_adam():
    def run(stats, steppers): return trajectory(lambda ps: Optimizer(ps, stats, steppers, lr=.01, weight_decay=.2, betas=(.9, .999), eps=1e-8), n=30)
    close(run([l2], [sgd_step]), run([], [decay, sgd_step]), rtol=1e-10, atol=1e-10)
    adams = run([l2, average, average_squares], [adam_step]), run([average, average_squares], [decay, adam_step])
    assert (adams[0][-1] - adams[1][-1]).abs().max() > 1e-3


def test_rectify():
    values = [rectify(.999, t) for t in range(1, 3000)]
    assert values[:5] == [0.]*5 and values[5] > 0 and values[5:] == sorted(values[5:]) and values[-1] < 1
    assert rectify(.5, 100) == 0                               # an average this short is never trusted


def test_a_recipe_of_ones_own(small_blocks):
    "A stat with a starting value and a condition, and a stepper that is a plain function."
    seen = []
    @keeps("peak", start=lambda h: h.floor, when=lambda h: h.use)
    def peaks(s, h):
        seen.append((s.step, sorted(s.fresh)))
        s.peak.copy_(torch.maximum(s.peak, s.g.abs())) if not isinstance(s.peak, Many) else s.peak.maximum_(s.g.abs())
    def step(s, h): s.p.addcdiv_(s.g, s.peak, value=-h.lr)
    p = torch.zeros(100, requires_grad=True)
    opt = Optimizer([p], [peaks], [step], lr=1., floor=2., use=True)
    p.grad = torch.ones(100); opt.step(); opt.step()
    close(p.detach(), torch.full((100,), -1.)); assert seen == [(1, ["peak"])]*2 + [(2, [])]*2
    with pytest.raises(AttributeError, match="no hyper-parameter 'floor'.*give"): Optimizer([p], [peaks], [step], lr=1., use=True).step()
    with pytest.raises(AttributeError, match="no stat keeps 'exp_avg'"): Optimizer([p], [], [adam_step], lr=1., betas=(.9, .99), eps=0.).step()


def test_many_is_several_tensors():
    a, b = [torch.rand(3), torch.rand(2, 2)], [torch.rand(3), torch.rand(2, 2)]
    wanted = [(x*2).add(y, alpha=3).sqrt() for x, y in zip(a, b)]
    x = Many(a)
    assert x.mul_(2) is x
    close(x.add(Many(b), alpha=3).sqrt().tensors, wanted)
    with pytest.raises(AttributeError): x.no_such_operation()
    assert copy.copy(x).tensors is x.tensors


# --- blocks -----------------------------------------------------------------------------------------------------------------

class Loop(Groups):
    "The plain loop, as the judge of blocks."
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            funcs, h = self._now(group)
            for s in self._wholes(group, funcs, h):
                for f in funcs: f(s, h)


@pytest.mark.parametrize("block", [5, 64, 2**18])
def test_blocks_are_bit_identical_to_the_loop(block, monkeypatch):
    monkeypatch.setattr(optim, "BLOCK", block)
    recipe = dict(stats=[l2, average, average_squares], steppers=[decay, adam_step], lr=.01, betas=(.9, .999), eps=1e-8, weight_decay=.1)
    close(trajectory(lambda ps: Optimizer(ps, **recipe), n=12), trajectory(lambda ps: Loop(ps, **recipe), n=12), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("make", [adamw, lamb], ids=lambda f: f.__name__)
def test_threads_change_no_bit(make):
    "A model of several blocks, and operations large enough for several threads."
    def run(n):
        threads = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            ps = weights([(1100, 1000), (300,), (7, 9)], torch.float32)
            opt = make(ps, lr=.01)
            for _ in range(2):
                for p in ps: p.grad = p.detach().cos()
                opt.step()
            return [p.detach() for p in ps]
        finally: torch.set_num_threads(threads)
    assert all(map(torch.equal, run(1), run(3)))


def test_a_steppers_own_error_comes_through():
    def broken(s, h): raise OverflowError("on purpose")
    p = torch.zeros(2**20, requires_grad=True); p.grad = torch.ones(2**20)
    with pytest.raises(OverflowError, match="on purpose"): Optimizer([p], [], [broken]).step()


def test_cut_and_gather():
    whole = Part({"p": torch.arange(10.).view(2, 5), "g": torch.ones(2, 5)}, 3, frozenset("m"))
    pieces = cut(whole, 4)
    assert [len(s.p) for s in pieces] == [4, 4, 2] and all(s.step == 3 and s.fresh == {"m"} for s in pieces)
    for s in pieces: s.p.add_(s.g)
    assert whole.p[1, 4] == 10
    assert len(cut(Part({"p": torch.zeros(0, 3)}), 4)) == 1 and len(cut(Part({"p": torch.zeros(())}), 4)) == 1
    wide = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    pieces = cut(Part({"p": wide, "g": torch.ones_like(wide)}), 50)
    assert len(pieces) == 3 and all(s.p.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr() for s in pieces)
    assert len(cut(Part({"p": wide, "g": torch.ones(2, 3, 4, 5)}), 50)) == 1 and len(cut(Part({"p": torch.rand(4, 6)[:, ::2]}), 2)) == 1
    both = gather([whole, Part({"p": torch.zeros(3), "g": torch.ones(3)}, 3, frozenset("m"))])
    both.p.sub_(both.g)
    assert both.step == 3 and both.p.tensors[1].tolist() == [-1.]*3


@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "gradient strided", "expanded gradient"])
def test_any_layout(make, layout, small_blocks):
    def run(odd):
        g = torch.Generator().manual_seed(0)
        x = torch.rand(4, 8, 3, 3, generator=g).double()
        if layout == "strided": p = torch.zeros(4, 16, 3, 3).double()[:, ::2].copy_(x) if odd else x
        elif layout == "transposed": p = x.transpose(0, 1).contiguous().transpose(0, 1) if odd else x
        else: p = x.contiguous(memory_format=torch.channels_last) if odd and layout == "channels_last" else x
        p.requires_grad_()
        opt = make([p], lr=.01)
        for _ in range(4):
            grad = torch.randn(4, 8, 3, 3, generator=g).double()
            if layout == "expanded gradient": grad = grad[:1, :1, :1, :1].expand(4, 8, 3, 3) if odd else grad[:1, :1, :1, :1].expand(4, 8, 3, 3).contiguous()
            if layout == "gradient strided" and odd: grad = grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
            p.grad = grad
            opt.step()
        return p.detach().contiguous()
    close(run(True), run(False), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
def test_swapped_data_is_followed(make, small_blocks):
    def run(swap):
        ps = weights([(40, 5), (3,)])
        opt = make(ps, lr=.01)
        for i in range(6):
            fill(ps, i, freeze=False); opt.step()
            if swap and i == 2:
                for p in ps: p.data = p.data.clone()
            if swap and i == 4: ps[0].data = ps[0].data.t().contiguous().t()
        return [p.detach().contiguous() for p in ps]
    close(run(True), run(False), rtol=1e-10, atol=1e-12)


def test_a_changed_shape_is_named():
    p = torch.zeros(3, requires_grad=True)
    opt = adam([p]); p.grad = torch.ones(3); opt.step()
    p.data, p.grad = torch.zeros(4), None
    p.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"\(4,\) now.*exp_avg is \(3,\).*new optimizer"): opt.step()


def test_weights_gone_double_take_their_memory_along():
    p = torch.zeros(3, requires_grad=True)
    opt = adam([p], lr=.1); p.grad = torch.ones(3); opt.step()
    p.data, p.grad = p.data.double(), None
    p.grad = torch.ones(3).double(); opt.step()
    close(p.detach(), torch.full((3,), -.2).double(), rtol=1e-5, atol=1e-6)
    assert opt.state[p]["exp_avg"].dtype == torch.float64


# --- half precision ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_is_stepped_in_single_and_rounded_once(make, dtype, small_blocks):
    shapes = [(30, 5), (3,), ()]
    half, single = weights(shapes, dtype), [p.detach().float().requires_grad_() for p in weights(shapes, dtype)]
    a, b = make(half, lr=.01), make(single, lr=.01)
    for i in range(3):
        fill(half, i, freeze=False)
        for p, q in zip(half, single): q.data.copy_(p.detach()); q.grad = p.grad.float()
        a.step(); b.step()
        assert all(torch.equal(p.detach(), q.detach().to(dtype)) for p, q in zip(half, single))
    assert all(m.dtype == torch.float32 for s in a.state.values() for n, m in s.items() if n != "step")


def test_half_survives_a_zero_gradient():
    p = torch.ones(4, dtype=torch.float16, requires_grad=True)
    opt = adam([p], lr=.01); p.grad = torch.tensor([0., 1e-7, 1., 60000.]).half(); opt.step()
    assert p.isfinite().all() and p[0] == 1 and p[2] < 1


# --- groups -----------------------------------------------------------------------------------------------------------------

def test_params_come_in_many_forms():
    a, b, c = weights([(2,), (3,), (4,)])
    forms = [[a, b, c], iter([a, b, c]), (a, b, c), {"params": [a, b, c]}, [{"params": (p for p in (a, b, c))}]]
    for form in forms: assert [[id(p) for p in g["params"]] for g in adam(form).param_groups] == [[id(a), id(b), id(c)]]
    opt = adam([[a], (b,), {"params": c, "lr": .5}, []])
    assert [len(g["params"]) for g in opt.param_groups] == [1, 1, 1, 0] and [g["lr"] for g in opt.param_groups] == [1e-3, 1e-3, .5, 1e-3]
    assert set(opt.param_groups[0]) == {"params", "lr", "betas", "eps", "weight_decay"}
    mine = {"params": [a]}
    adam([mine]); assert mine == {"params": [a]}, "the caller's dict is left alone"


W = lambda: torch.zeros(2, requires_grad=True)


@pytest.mark.parametrize("make, error, words", [
    (lambda: adam([]), ValueError, "empty"), (lambda: adam(iter(())), ValueError, "used up"),
    (lambda: adam(W()), TypeError, "one tensor: give a list"), (lambda: adam({W()}), TypeError, "set.*list"),
    (lambda: adam([W(), 3]), TypeError, "holds 3"), (lambda: adam([W(), [W()]]), TypeError, "tensors only, or groups only"),
    (lambda: adam(["ab"]), TypeError, "'ab'"), (lambda: adam([[3]]), TypeError, "holds 3: give tensors"), (lambda: adam([{"lr": 1.}]), ValueError, "'params'"),
    (lambda: adam([W()*2]), ValueError, r"\(2,\) that was computed"), (lambda: adam([W().to(torch.complex64).detach()]), TypeError, "complex"),
    (lambda: (lambda w: adam([w, w]))(W()), ValueError, r"same \(2,\) twice"), (lambda: (lambda w: adam([[w], [w]]))(W()), ValueError, "twice"),
    (lambda: adam([W()], lr=-1.), ValueError, "lr is -1.0.*at least 0"), (lambda: adam([W()], lr=math.nan), ValueError, "lr is nan"),
    (lambda: adam([W()], lr=math.inf), ValueError, "lr is inf"), (lambda: adam([W()], lr="fast"), TypeError, "lr is 'fast': give a number"),
    (lambda: adam([W()], betas=(.9, 1.)), ValueError, r"betas is \(0.9, 1.0\).*below 1"), (lambda: adam([W()], betas=(-.1, .9)), ValueError, "betas"),
    (lambda: adam([W()], betas=.9), ValueError, "give two numbers"), (lambda: adam([W()], eps=-1e-8), ValueError, "eps"),
    (lambda: adamw([W()], weight_decay=-1.), ValueError, "weight_decay"), (lambda: momentum([W()], momentum=-.9), ValueError, "momentum"),
    (lambda: momentum([W()], dampening=math.nan), ValueError, "dampening"), (lambda: momentum([W()], momentum=0., nesterov=True), ValueError, "nesterov"),
    (lambda: momentum([W()], dampening=.1, nesterov=True), ValueError, "nesterov"),
    (lambda: adam([{"params": [W()], "lr": -1.}]), ValueError, "lr is -1"), (lambda: adam([{"params": [W()], "momentun": .9}]), ValueError, "'momentun' is unknown"),
    (lambda: adam([{"params": [W()], "wieght_decay": .9}]), ValueError, "did you mean weight_decay"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words): make()


def test_a_bad_group_changes_nothing():
    a, b = W(), W()
    opt = adam([a])
    for bad in ({"params": [a]}, {"params": [b], "lr": -1.}, {"params": [b, 3]}, {"params": [b], "what": 1}):
        with pytest.raises((ValueError, TypeError)): opt.add_param_group(bad)
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [b], "lr": .5}); b.grad = torch.ones(2); opt.step()
    assert b.detach().tolist() == [-.5, -.5] and a.detach().tolist() == [0., 0.]


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"\(5, 2\) is sparse.*sparse=False"): sgd(table.parameters()).step()


# --- freezing, zero_grad ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
def test_without_a_gradient_nothing_happens(make):
    a, b = W(), W()
    a.data += 1; b.data += 1
    opt = make([a, b], lr=.1)
    opt.step(); assert not opt.state
    a.grad = torch.ones(2); b.requires_grad_(False); opt.step()
    assert b.detach().tolist() == [1., 1.] and set(opt.state) == {a} and opt.state[a]["step"] == 1
    opt.zero_grad(); opt.step(); assert a.grad is None and opt.state[a]["step"] == 1


def test_zero_grad():
    a, b = W(), W()
    opt = sgd([a, b]); a.grad = torch.ones(2)
    opt.zero_grad(set_to_none=False); assert a.grad.tolist() == [0., 0.] and b.grad is None
    opt.zero_grad(); assert a.grad is None


# --- memory -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_round_trip_is_bit_identical(make, dtype, small_blocks):
    ps = weights(dtype=dtype)
    opt = make([ps[:3], {"params": ps[3:], "lr": .02}], lr=.01)
    for i in range(3): fill(ps, i); opt.step()
    file = io.BytesIO(); torch.save(opt.state_dict(), file); file.seek(0)
    saved = torch.load(file, weights_only=True)
    qs = [p.detach().clone().requires_grad_() for p in ps]
    other = make([qs[:3], qs[3:]], lr=.5)
    other.load_state_dict(saved)
    for i in range(3, 6):
        fill(ps, i); opt.step(); fill(qs, i); other.step()
    for p, q in zip(ps, qs): assert torch.equal(p, q)
    assert all(torch.equal(torch.as_tensor(m), torch.as_tensor(other.state[q][n])) for p, q in zip(ps, qs) for n, m in opt.state.get(p, {}).items())
    for n, m in saved["state"][0].items(): assert n == "step" or m is not other.state[qs[0]][n], "loaded memory is a copy"


@pytest.mark.parametrize("ours, theirs", [(p[0], p[1]) for p in PAIRS], ids=lambda x: x.__name__)
def test_pytorchs_memory_fits_both_ways(ours, theirs):
    def start(make): ps = weights(); return ps, make(ps, lr=.01)
    ps, torchs = start(theirs)
    if ours is momentum: torchs = theirs(ps, lr=.01, momentum=.9)
    for i in range(5): fill(ps, i, freeze=False); torchs.step()
    qs, mine = start(ours)
    for p, q in zip(ps, qs): q.data.copy_(p.detach())
    mine.load_state_dict(torchs.state_dict())
    for i in range(5, 8):
        fill(ps, i, freeze=False); torchs.step(); fill(qs, i, freeze=False); mine.step()
    close([p.detach() for p in ps], [q.detach() for q in qs], rtol=1e-9, atol=1e-9)
    if ours is sgd: return                                     # PyTorch's SGD asks for a momentum
    rs, again = start(theirs)
    for p, r in zip(ps, rs): r.data.copy_(p.detach())
    again.load_state_dict(mine.state_dict())
    fill(ps, 9, freeze=False); torchs.step(); fill(rs, 9, freeze=False); again.step()
    close([p.detach() for p in ps], [r.detach() for r in rs], rtol=1e-9, atol=1e-9)


def test_a_state_that_does_not_fit_changes_nothing():
    def trained(make, shapes=((2, 3), (4,)), **kw):
        ps = weights(shapes); opt = make(ps, **kw)
        for i in range(2): fill(ps, i, freeze=False); opt.step()
        return opt
    opt = trained(adam)
    before = copy.deepcopy(opt.state_dict())
    good = opt.state_dict()
    half_done = {**good, "state": {0: {k: good["state"][0][k] for k in ("step", "exp_avg")}}}
    bad = [({}, "no 'state'"), ([], "no 'state'"), (trained(adam, ((2, 3),)).state_dict(), r"groups of \[1\]"),
           (trained(adam, ((2, 3), (5,))).state_dict(), r"\(5,\) in state_dict"), (trained(momentum).state_dict(), "lacks betas, eps"),
           (half_done, "another optimizer"), ({**good, "state": {7: {}}}, "parameter 7"),
           ({**good, "param_groups": [{**good["param_groups"][0], "lr": -1.}]}, "lr is -1"),
           ({**good, "param_groups": [{**good["param_groups"][0], "amsgrad": True}]}, "uses amsgrad"),
           ({**good, "state": trained(rmsprop).state_dict()["state"]}, "square_avg")]
    for state, words in bad:
        with pytest.raises(ValueError, match=words): opt.load_state_dict(state)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    close(after["state"], before["state"], rtol=0, atol=0)


def test_deepcopy_goes_its_own_way():
    model = nn.Linear(3, 2)
    opt = adamw(model.parameters(), lr=.1)
    model(torch.rand(4, 3)).sum().backward(); opt.step()
    twin, twin_opt = copy.deepcopy((model, opt))
    assert {id(p) for g in twin_opt.param_groups for p in g["params"]} == {id(p) for p in twin.parameters()} == {id(p) for p in twin_opt.state}
    before = [p.detach().clone() for p in model.parameters()]
    twin_opt.step()
    close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)
    assert "adam_step" in repr(opt) and "lr=0.1" in repr(opt)


# --- in a Learner -----------------------------------------------------------------------------------------------------------

def learner(opt_func, lr=.05, **kwargs):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(8, 16, 6)
    data = [(xb, xb.sum(1, keepdim=True)) for xb in x]
    return Learner(model, DataLoaders(data, data), nn.functional.mse_loss, opt_func, lr, **kwargs)


@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
def test_fits_a_learner(make):
    rate = {"sgd": .05, "momentum": .02, "lars": 30., "adagrad": .1}.get(make.__name__, .01)
    learn, recorder = learner(make, rate), Recorder()
    found = lr_find(learn, 1e-5, 10., 20)
    assert len(found.lrs) >= 5
    learn.fit(3, cbs=[one_cycle(rate), recorder])
    assert recorder.losses[-1] < recorder.losses[0] and len(set(recorder.lrs)) == 24
    if make in (momentum, lars, adam, adamw, lamb, radam): assert len(set(recorder.momenta)) > 10


def test_steps_our_own_modules():
    from exp.training import Linear, Sequential
    torch.manual_seed(0)
    ours, theirs = Sequential(Linear(6, 200), Linear(200, 90)), nn.Sequential(nn.Linear(6, 200), nn.Linear(200, 90))
    theirs.load_state_dict(ours.state_dict())
    for model, make in ((ours, adamw), (theirs, torch.optim.AdamW)):
        opt = make(model.parameters(), lr=.01)
        for i in range(5):
            opt.zero_grad()
            model(torch.full((4, 6), .1*i)).square().mean().backward(); opt.step()
    close([p.detach() for p in ours.parameters()], [p.detach() for p in theirs.parameters()], rtol=1e-4, atol=1e-5, check_stride=False)


def test_schedules_per_group_and_resume(tmp_path):
    def groups(ps, lr): ps = list(ps); return adamw([ps[:2], {"params": ps[2:], "weight_decay": 0.}], lr=lr)
    def fit(folder, resume=None, stop=None):
        learn = learner(groups)
        try: learn.fit(4, cbs=[ParamScheduler(lr=[cosine(.1, .01), cosine(.02, .01)], eps=cosine(1e-8, 1e-6)), SaveCheckpoint(folder), *([stop] if stop else [])], resume=resume)
        except KeyboardInterrupt: pass
        return [p.detach() for p in learn.model.parameters()]
    class Stop:
        def after_step(self, learn):
            if learn.epoch == 2 and learn.batch == 3: raise KeyboardInterrupt
    calm = fit(tmp_path/"calm")
    fit(tmp_path/"struck", stop=Stop())
    close(fit(tmp_path/"struck", resume=tmp_path/"struck"/"last.pt"), calm, rtol=0, atol=0)

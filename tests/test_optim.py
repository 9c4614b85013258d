"exp.optim: every optimizer against torch.optim or its paper, the laws of rules, slices against whole parameters, groups, memory, travel to and from PyTorch, bad input."
import copy
import io
import math
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from exp import optim
from exp.learner import DataLoaders, Learner
from exp.optim import (Optimizer, adagrad, adam, adam_step, adamw, average, average_squares, decay, elementwise, joined, keeps, l2, lamb, lars,
                       momentum, muon, newton_schulz, one_by_one, radam, rectify, rmsprop, runs, sgd, sgd_step, sliced)

ALL = [sgd, momentum, rmsprop, adagrad, adam, adamw, radam, lars, lamb, muon]
ELEMENTWISE = [sgd, momentum, rmsprop, adagrad, adam, adamw, radam]
SHAPES = [(5, 3), (3,), (), (4, 2, 3, 3), (0, 4), (1,), (40, 50)]


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.fixture
def small_blocks(monkeypatch):
    "Slices of 64 numbers, handed out as in 09a, so that small tests cut."
    monkeypatch.setattr(optim, "BLOCK", 64)
    def in_slices(parts, rules): return one_by_one(sliced(parts) if all(getattr(r, "elementwise", False) for r in rules) else parts)
    monkeypatch.setattr(Optimizer, "hand_out", staticmethod(in_slices))


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

PAIRS = [(sgd, torch.optim.SGD, [{}, dict(weight_decay=.1), dict(momentum=.9, dampening=.4)]),
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


@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
def test_steps_do_not_depend_on_the_cut(make, monkeypatch):
    ends = []
    for block in (7, 64, 10**6):
        monkeypatch.setattr(optim, "BLOCK", block)
        ends.append(trajectory(lambda ps: make(ps, lr=.01), n=10))
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
    s = SimpleNamespace(g=torch.ones(2).double(), exp_avg=torch.zeros(2).double(), exp_avg_sq=torch.zeros(2).double())
    h = SimpleNamespace(betas=(beta, beta))
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
    @keeps("peak", start=lambda h: h.floor, when=lambda p, h: h.use)
    def peaks(s, h):
        seen.append((s.step, sorted(s.fresh), tuple(s.p.shape)))
        s.peak.copy_(torch.maximum(s.peak, s.g.abs()))
    def step(s, h): s.p.addcdiv_(s.g, s.peak, value=-h.lr)
    p = torch.zeros(20, 5, requires_grad=True)
    opt = Optimizer([p], [peaks], [step], lr=1., floor=2., use=True)
    p.grad = torch.ones(20, 5); opt.step(); opt.step()
    close(p.detach(), torch.full((20, 5), -1.)); assert seen == [(1, ["peak"], (20, 5)), (2, [], (20, 5))]
    with pytest.raises(AttributeError, match="floor"): Optimizer([p], [peaks], [step], lr=1., use=True).step()
    with pytest.raises(AttributeError, match="exp_avg"): Optimizer([p], [], [adam_step], lr=1., betas=(.9, .99), eps=0.).step()


@pytest.mark.parametrize("n", [1, 10, 2**12, 2**18, 2**19, 2**19 + 3])
def test_unmarked_rules_see_one_whole_parameter_of_any_size(n):
    "Centring a gradient, its sign, its length: what depends on the whole comes out the same at every size."
    g = torch.randn(n, generator=torch.Generator().manual_seed(0))
    shapes, p, q = [], torch.zeros(n, requires_grad=True), torch.zeros(3, requires_grad=True)
    def centred(s, h): shapes.append(tuple(s.p.shape)); s.g = s.g - s.g.mean()
    def signed(s, h): s.p -= h.lr*torch.sign(s.g)*s.g.norm()
    p.grad, q.grad = g.clone(), torch.ones(3)
    Optimizer([p, q], [centred], [signed], lr=.1).step()
    c = g - g.mean()
    close(p.detach(), -.1*c.sign()*c.norm()); assert shapes == [(n,), (3,)]
    assert torch.equal(p.grad, g)


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=6), st.integers(1, 40), st.sampled_from([one_by_one, sliced, joined]))
def test_elementwise_rules_may_be_handed_any_run(shapes, block, way):
    "Slices, joined ones and whole parameters give the same numbers, and each number is handed out once."
    def run(hand_out):
        class Mine(Optimizer): pass
        Mine.hand_out = staticmethod(lambda parts, rules: hand_out(parts))
        ps, count = weights(shapes), []
        @elementwise
        def seen(s, h): count.append(s.p.numel()); assert s.p.shape == s.g.shape == s.exp_avg.shape
        opt = Mine(ps, [l2, average, average_squares, seen], [adam_step], lr=.01, betas=(.9, .99), eps=1e-8, weight_decay=.1)
        for i in range(2): fill(ps, i, freeze=False); opt.step()
        assert sum(count) == 2*sum(p.numel() for p in ps)
        return [p.detach() for p in ps]
    before = optim.BLOCK
    try:
        optim.BLOCK = block
        close(run(way), run(one_by_one), rtol=1e-12, atol=1e-13)
    finally: optim.BLOCK = before


def test_a_rule_may_assign_instead_of_writing_in_place(small_blocks):
    @elementwise
    @keeps("sum_of_g")
    def assigned(s, h):
        s.sum_of_g = s.sum_of_g + s.g
        s.p = s.p - h.lr*s.sum_of_g
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.zeros(100, dtype=dtype, requires_grad=True)
        opt = Optimizer([p], [], [assigned], lr=.5)
        p.grad = torch.ones(100, dtype=dtype); opt.step(); opt.step()
        assert p.detach().tolist() == [-1.5]*100 and opt.state[p]["sum_of_g"].tolist() == [2.]*100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_rule_keeps_of_the_old_is_the_old(dtype):
    @keeps("before")
    def heavy_ball(s, h):
        was = s.before if "before" not in s.fresh else s.p
        s.before, s.p = s.p, s.p - h.lr*s.g + h.mu*(s.p - was)
    p = torch.tensor([1.], dtype=dtype, requires_grad=True)
    opt, w, old = Optimizer([p], [], [heavy_ball], lr=.25, mu=.5), 1., 1.
    for _ in range(3):
        p.grad = p.detach().clone(); opt.step()
        w, old = w - .25*w + .5*(w - old), w
    assert p.item() == w and opt.state[p]["before"].item() == old


# --- handing out -------------------------------------------------------------------------------------------------------------

def test_slices_are_views_in_the_order_of_memory(monkeypatch):
    monkeypatch.setattr(optim, "BLOCK", 4)
    def part(**tensors): return SimpleNamespace(**tensors, step=3, fresh=frozenset("m"))
    whole = part(p=torch.arange(10.).view(2, 5), g=torch.ones(2, 5))
    pieces = list(sliced([whole]))
    assert [len(s.p) for s in pieces] == [4, 4, 2] and all(s.step == 3 and s.fresh == {"m"} for s in pieces)
    for s in pieces: s.p.add_(s.g)
    assert whole.p[1, 4] == 10
    assert len(list(sliced([part(p=torch.zeros(0, 3))]))) == 1 and len(list(sliced([part(p=torch.zeros(()))]))) == 1
    monkeypatch.setattr(optim, "BLOCK", 50)
    wide = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    pieces = list(sliced([part(p=wide, g=torch.ones_like(wide))]))
    assert len(pieces) == 3 and all(s.p.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr() for s in pieces)
    assert len(list(sliced([part(p=wide, g=torch.ones(2, 3, 4, 5))]))) == 1 and len(list(sliced([part(p=torch.rand(40, 6)[:, ::2])]))) == 1


def test_runs_cut_nothing_and_join_what_is_not_on_a_cpu():
    def part(*shape, device): return SimpleNamespace(p=torch.rand(shape, device=device), g=torch.rand(shape, device=device), step=3, fresh=frozenset())
    large, small, away = part(2, optim.BLOCK, device="cpu"), part(2, 2, device="cpu"), part(3, 2, device="meta")
    assert [s.p.shape for s in runs([away, large, small], [average])] == [(2, optim.BLOCK), (2, 2), (6,)]
    assert [s.p.shape for s in runs([away, large, small], [average, lambda s, h: None])] == [(3, 2), (2, optim.BLOCK), (2, 2)]


def test_threads_change_no_bit_of_elementwise_rules():
    "Sizes are powers of two, so that every number meets the same instruction whoever works on it. Norms are sums: to rounding."
    def run(make, n):
        threads = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            ps = weights([(1024, 1024), (256,), (8, 8)], torch.float32)
            opt = make(ps, lr=.01)
            for _ in range(2):
                for p in ps: p.grad = p.detach()*.3 + .1
                opt.step()
            return [p.detach() for p in ps]
        finally: torch.set_num_threads(threads)
    for make in ELEMENTWISE: assert all(map(torch.equal, run(make, 1), run(make, 4))), make
    for make in (lamb, lars): close(run(make, 1), run(make, 3), rtol=1e-5, atol=1e-6)


def test_a_rules_own_error_comes_through_and_does_not_count():
    fail = [True]
    @elementwise
    @keeps("m")
    def fragile(s, h):
        s.m.add_(s.g)
        if fail[0] and s.p.numel() > 1: raise OverflowError("on purpose")
        s.p.sub_(s.g)
    p, q = torch.zeros(1, requires_grad=True), torch.zeros(3, requires_grad=True)
    opt = Optimizer([p, q], [], [fragile]); p.grad, q.grad = torch.ones(1), torch.ones(3)
    with pytest.raises(OverflowError, match="on purpose"): opt.step()
    assert not opt.state
    fail[0] = False; opt.step()
    assert opt.state[q]["step"] == opt.state[p]["step"] == 1 and opt.state[q]["m"].tolist() == [1.]*3
    p.grad = torch.zeros(1).to_sparse()
    with pytest.raises(TypeError, match="sparse"): opt.step()
    assert opt.state[q]["step"] == 1 and q.tolist() == [-1.]*3, "checks come before any move"


# --- muon --------------------------------------------------------------------------------------------------------------------

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with 2.9")


@needs_muon
@pytest.mark.parametrize("options", [{}, dict(lr=.02, weight_decay=0.), dict(momentum=.8, nesterov=False, ns_steps=3), dict(adjust_lr_fn="original"),
                                     dict(adjust_lr_fn="match_rms_adamw", ns_coefficients=(2., -1.5, .5), eps=1e-3)], ids=str)
def test_muon_is_pytorchs_on_matrices(options):
    def run(make):
        ps = weights([(8, 5), (5, 8), (6, 6), (1, 7)], torch.float32)
        opt = make(ps, **options)
        for i in range(20):
            for g in opt.param_groups: g["lr"] = options.get("lr", 1e-3)*(1 + math.cos(i/6))
            fill(ps, i, freeze=False); opt.step()
        return [p.detach() for p in ps]
    close(run(muon), run(torch.optim.Muon), rtol=0, atol=0)


@needs_muon
def test_muon_flattens_convolutions_and_follows_adamw_on_vectors_in_ratio():
    conv, bias, scale = weights([(6, 4, 3, 3), (6,), ()], torch.float32)
    flat, vectors = conv.detach().flatten(1).clone().requires_grad_(), [p.detach().clone().requires_grad_() for p in (bias, scale)]
    mine = muon([conv, bias, scale], lr=.02, lr_1d=.001, weight_decay=.05)
    theirs = torch.optim.Muon([flat], lr=.02, weight_decay=.05), torch.optim.AdamW(vectors, lr=.001, weight_decay=.05)
    for i in range(15):
        share = 1 - i/20                                        # a schedule knows nothing of lr_1d
        mine.param_groups[0]["lr"] = theirs[0].param_groups[0]["lr"] = .02*share
        theirs[1].param_groups[0]["lr"] = .001*share
        fill([conv, bias, scale], i, freeze=False)
        flat.grad = conv.grad.flatten(1)
        for p, q in zip(vectors, (bias, scale)): p.grad = q.grad.clone()
        mine.step()
        for opt in theirs: opt.step()
    close(conv.detach().flatten(1), flat.detach(), rtol=0, atol=0)
    close([bias.detach(), scale.detach()], [v.detach() for v in vectors], rtol=1e-5, atol=1e-7)


def test_newton_schulz_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((30, 10), (10, 30), (12, 12)):
        g = torch.randn(shape)
        u, s, v = torch.linalg.svd(g, full_matrices=False)
        x = newton_schulz(g).float()
        assert x.shape == g.shape
        sizes = torch.linalg.svdvals(x)
        assert .3 < sizes[s/s.norm() > .1].min() and sizes.max() < 1.35
        assert torch.trace(u.T @ x @ v.T) > .6*min(shape), "the directions are those of g"
    assert newton_schulz(torch.zeros(3, 2)).isfinite().all()


@pytest.mark.parametrize("options, words", [(dict(adjust_lr_fn="keller"), "adjust_lr_fn is 'keller'.*match_rms"), (dict(lr=0.), "lr is 0.0.*follow"),
                                            (dict(lr_1d=-1.), "ratio_1d"), (dict(momentum=-1.), "momentum")])
def test_muon_refuses(options, words):
    with pytest.raises(ValueError, match=words): muon([W()], **options)


# --- layouts -----------------------------------------------------------------------------------------------------------------

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
    with pytest.raises(ValueError, match=r"\(4,\) now.*exp_avg \(3,\).*new optimizer"): opt.step()


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
    forms = [[a, b, c], iter([a, b, c]), (a, b, c), {"params": [a, b, c]}, [{"params": (p for p in (a, b, c))}], [("a", a), ("b", b), ("c", c)]]
    for form in forms: assert [[id(p) for p in g["params"]] for g in adam(form).param_groups] == [[id(a), id(b), id(c)]]
    opt = adam([[a], (p for p in [b]), {"params": c, "lr": .5}, []])
    assert [len(g["params"]) for g in opt.param_groups] == [1, 1, 1, 0] and [g["lr"] for g in opt.param_groups] == [1e-3, 1e-3, .5, 1e-3]
    assert set(opt.param_groups[0]) == {"params", "lr", "betas", "eps", "weight_decay"}
    mine = {"params": [a]}
    adam([mine]); assert mine == {"params": [a]}, "the caller's dict is left alone"


W = lambda: torch.zeros(2, requires_grad=True)


@pytest.mark.parametrize("make, error, words", [
    (lambda: adam([]), ValueError, "empty"), (lambda: adam(iter(())), ValueError, "empty"),
    (lambda: adam(W()), TypeError, "iterable of Tensors"), (lambda: adam({W()}), TypeError, "set.*list"), (lambda: adam([{W()}]), TypeError, "set.*list"),
    (lambda: adam([W(), 3]), TypeError, "one of the params is int"), (lambda: adam([W(), [W()]]), TypeError, "one of the params is dict"),
    (lambda: adam([[3]]), TypeError, "one of the params is int"), (lambda: adam([{"lr": 1.}]), KeyError, "params"),
    (lambda: adam([W()*2]), ValueError, "non-leaf"),
    (lambda: (lambda w: adam([w, w]))(W()), ValueError, "twice"), (lambda: (lambda w: adam([[w], [w]]))(W()), ValueError, "more than one"),
    (lambda: adam([W()], lr=-1.), ValueError, "lr is -1.0.*at least 0"), (lambda: adam([W()], lr=math.nan), ValueError, "lr is nan"),
    (lambda: adam([W()], lr=math.inf), ValueError, "lr is inf"), (lambda: adam([W()], lr="fast"), TypeError, "str"),
    (lambda: adam([W()], betas=(.9, 1.)), ValueError, r"betas is \(0.9, 1.0\).*below 1"), (lambda: adam([W()], betas=(-.1, .9)), ValueError, "betas"),
    (lambda: adam([W()], betas=.9), TypeError, "float"), (lambda: adam([W()], eps=-1e-8), ValueError, "eps"),
    (lambda: adamw([W()], weight_decay=-1.), ValueError, "weight_decay"), (lambda: momentum([W()], momentum=-.9), ValueError, "momentum"),
    (lambda: sgd([W()], nesterov=True), ValueError, "nesterov"), (lambda: momentum([W()], dampening=.1, nesterov=True), ValueError, "nesterov"),
    (lambda: adam([{"params": [W()], "lr": -1.}]), ValueError, "lr is -1"), (lambda: adam([{"params": [W()], "momentun": .9}]), ValueError, "'momentun' is unknown"),
    (lambda: adam([{"params": [W()], "wieght_decay": .9}]), ValueError, "is it weight_decay"),
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
    w = torch.ones(2, dtype=torch.complex64, requires_grad=True); w.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(TypeError, match="complex.*view_as_real"): adam([w]).step()


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
    rs, again = start(theirs)
    for p, r in zip(ps, rs): r.data.copy_(p.detach())
    again.load_state_dict(mine.state_dict())
    fill(ps, 9, freeze=False); torchs.step(); fill(rs, 9, freeze=False); again.step()
    close([p.detach() for p in ps], [r.detach() for r in rs], rtol=1e-9, atol=1e-9)


def trained(make, shapes=((2, 3), (4,)), dtype=torch.float64, **kw):
    ps = weights(shapes, dtype); opt = make(ps, **kw)
    for i in range(2): fill(ps, i, freeze=False); opt.step()
    return opt


def test_a_state_that_does_not_fit_changes_nothing():
    opt = trained(adam)
    before = copy.deepcopy(opt.state_dict())
    good = opt.state_dict()
    half_done = {**good, "state": {0: {k: good["state"][0][k] for k in ("step", "exp_avg")}}}
    bad = [(trained(adam, ((2, 3),)).state_dict(), r"groups of \[1\] parameters, this optimizer of \[2\]"),
           (trained(adam, ((2, 3), (5,))).state_dict(), r"exp_avg, exp_avg_sq of a parameter \(4,\)"), (trained(momentum).state_dict(), "another optimizer: look at rules"),
           (half_done, "exp_avg_sq of a parameter"),
           ({**good, "param_groups": [{**good["param_groups"][0], "amsgrad": True}]}, "amsgrad"),
           ({**good, "state": trained(rmsprop).state_dict()["state"]}, "exp_avg, exp_avg_sq, square_avg of a parameter.*another model or optimizer")]
    for state, words in bad:
        with pytest.raises(ValueError, match=words): opt.load_state_dict(state)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    close(after["state"], before["state"], rtol=0, atol=0)


tells = "decoupled_weight_decay" in torch.optim.AdamW([torch.zeros(1)]).defaults
told_apart = pytest.mark.skipif(not tells, reason="this PyTorch writes the same groups for Adam and AdamW: nothing tells them apart")


@pytest.mark.parametrize("saved, into", [(adamw, adam), (adam, adamw), (adam, radam), (adam, lamb), (lamb, adam), (sgd, lars), (lars, sgd), (torch.optim.NAdam, adam),
                                         pytest.param(torch.optim.AdamW, adam, marks=told_apart), pytest.param(torch.optim.Adam, adamw, marks=told_apart),
                                         pytest.param(lambda ps: torch.optim.Adam(ps, decoupled_weight_decay=True), adam, marks=told_apart),
                                         (lambda ps: torch.optim.RAdam(ps, decoupled_weight_decay=True), radam), (lambda ps: torch.optim.Adam(ps, amsgrad=True), adam),
                                         (lambda ps: torch.optim.SGD(ps, maximize=True), sgd)])
def test_what_does_not_mean_the_same_is_refused(saved, into):
    with pytest.raises(ValueError, match="another optimizer"): trained(into).load_state_dict(trained(saved).state_dict())


@told_apart
def test_pytorchs_decoupled_adam_is_adamw():
    fits = trained(lambda ps: torch.optim.Adam(ps, decoupled_weight_decay=True)).state_dict()
    trained(adamw).load_state_dict(fits)
    theirs = torch.optim.Adam(weights([(2, 3), (4,)])); theirs.load_state_dict(trained(adamw).state_dict())
    assert theirs.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
def test_memory_of_half_precision_is_loaded_in_single(make, dtype):
    opt = trained(make, dtype=dtype)
    twin = make(weights([(2, 3), (4,)], dtype)); twin.load_state_dict(opt.state_dict())
    for p, q in zip(opt.state.values(), twin.state.values()):
        assert p.keys() == q.keys()
        for n in p.keys() - {"step"}: assert q[n].dtype == torch.float32 and torch.equal(p[n], q[n])


@needs_muon
def test_muon_travels():
    shapes = [(6, 4), (3, 5)]
    def start(make): ps = weights(shapes, torch.float32); return ps, make(ps, lr=.02)
    (ps, theirs), (qs, mine), (rs, again) = start(torch.optim.Muon), start(muon), start(torch.optim.Muon)
    for i in range(3): fill(ps, i, freeze=False); theirs.step()
    for p, q in zip(ps, qs): q.data.copy_(p.detach())
    mine.load_state_dict(theirs.state_dict())
    for i in range(3, 5): fill(ps, i, freeze=False); theirs.step(); fill(qs, i, freeze=False); mine.step()
    for q, r in zip(qs, rs): r.data.copy_(q.detach())
    again.load_state_dict(mine.state_dict())
    fill(ps, 5, freeze=False); theirs.step(); fill(rs, 5, freeze=False); again.step()
    close([p.detach() for p in ps], [r.detach() for r in rs], rtol=0, atol=0)
    assert mine.param_groups[0]["ratio_1d"] == pytest.approx(.015)


# --- what torch.optim.Optimizer gives -----------------------------------------------------------------------------------------

def test_closure_hooks_and_named_parameters():
    model = nn.Linear(3, 1)
    opt, heard = adamw(model.named_parameters(), lr=.01), []
    opt.register_step_post_hook(lambda *_: heard.append("post"))
    def closure():
        opt.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean(); loss.backward()
        return loss
    losses = [opt.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and heard == ["post"]*5
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"] and isinstance(opt, torch.optim.Optimizer)


SCHEDULERS = [lambda o: torch.optim.lr_scheduler.StepLR(o, 3, .5), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
              lambda o: torch.optim.lr_scheduler.OneCycleLR(o, .1, 10), lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1/(1 + i))]


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("ours, theirs", [(adamw, torch.optim.AdamW), (momentum, lambda ps, lr: torch.optim.SGD(ps, lr, momentum=.9))], ids=["adamw", "momentum"])
def test_pytorchs_schedulers_and_what_they_leave_in_groups(ours, theirs, schedule):
    def run(make, stop=None):
        ps = weights(); opt = make([{"params": ps[:2], "lr": .02}, {"params": ps[2:]}], lr=.01)
        plan = schedule(opt)
        for i in range(8):
            if i == stop:                                       # save, and go on with new objects
                saved = copy.deepcopy((opt.state_dict(), plan.state_dict()))
                opt = make([ps[:2], ps[2:]] if make is ours else [{"params": ps[:2]}, {"params": ps[2:]}], lr=.5)
                plan = schedule(opt); opt.load_state_dict(saved[0]); plan.load_state_dict(saved[1])
                assert all("initial_lr" in g for g in opt.param_groups)
            fill(ps, i, freeze=False); opt.step(); plan.step()
        return [p.detach() for p in ps]
    close(run(ours), run(theirs), rtol=1e-9, atol=1e-9)
    close(run(ours, 4), run(ours), rtol=0, atol=0)


@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
def test_pickling_keeps_rules_and_memory(make):
    opt = trained(make)
    twin = pickle.loads(pickle.dumps(opt))
    for o in (opt, twin):
        ps = [p for g in o.param_groups for p in g["params"]]
        fill(ps, 5, freeze=False); o.step()
    for p, q in zip(opt.param_groups[0]["params"], twin.param_groups[0]["params"]): assert p is not q and torch.equal(p, q)


def test_deepcopy_goes_its_own_way():
    model = nn.Linear(3, 2)
    opt = adamw(model.parameters(), lr=.1)
    model(torch.rand(4, 3)).sum().backward(); opt.step()
    twin, twin_opt = copy.deepcopy((model, opt))
    assert {id(p) for g in twin_opt.param_groups for p in g["params"]} == {id(p) for p in twin.parameters()} == {id(p) for p in twin_opt.state}
    before = [p.detach().clone() for p in model.parameters()]
    twin_opt.step()
    close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)
    assert "lr: 0.1" in repr(opt) and copy.copy(opt).rules == opt.rules


# --- in a Learner -----------------------------------------------------------------------------------------------------------

def learner(opt_func, lr=.05, **kwargs):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(8, 16, 6)
    data = [(xb, xb.sum(1, keepdim=True)) for xb in x]
    return Learner(model, DataLoaders(data, data), nn.functional.mse_loss, opt_func, lr, quiet=True, **kwargs)


@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
def test_fits_a_learner_with_a_schedule(make):
    from exp.schedule import one_cycle
    rate = {"sgd": .05, "momentum": .02, "lars": 30., "adagrad": .1}.get(make.__name__, .01)
    learn = learner(make, rate)
    before = learn.validate()["valid_loss"]
    learn.fit(3, cbs=[one_cycle(rate)])
    assert learn.validate()["valid_loss"] < before
    learn.fit(1, lr=rate/10)


def test_a_learner_without_a_rate_takes_the_optimizers_own():
    for make in ALL:
        learn = learner(make, None); learn.fit(1)
        assert learn.opt.param_groups[0]["lr"] == make([W()]).param_groups[0]["lr"]


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
    from exp.checkpoints import SaveCheckpoint
    from exp.learner import Callback
    from exp.schedule import ParamScheduler, cosine
    def groups(ps, lr): ps = list(ps); return adamw([ps[:2], {"params": ps[2:], "weight_decay": 0.}], lr=lr)
    def fit(folder, resume=None, stop=None):
        learn = learner(groups)
        try: learn.fit(4, cbs=[ParamScheduler(lr=[cosine(.1, .01), cosine(.02, .01)], eps=cosine(1e-8, 1e-6)), SaveCheckpoint(folder), *([stop] if stop else [])], resume=resume)
        except KeyboardInterrupt: pass
        return [p.detach() for p in learn.model.parameters()]
    class Stop(Callback):
        def after_step(self, learn):
            if learn.epoch == 2 and learn.batch == 3: raise KeyboardInterrupt
    calm = fit(tmp_path/"calm")
    fit(tmp_path/"struck", stop=Stop())
    close(fit(tmp_path/"struck", resume=tmp_path/"struck"/"last.pt"), calm, rtol=0, atol=0)


# --- forms of parameters, ranges, rules of any make ---------------------------------------------------------------------------

def ids(opt): return [[id(p) for p in g["params"]] for g in opt.param_groups]


def test_rows_of_parameters_are_groups():
    a, b, c, d = (W() for _ in range(4))
    for row in ((a, b), [a, b], iter([a, b]), nn.ParameterList([a, b]), {"x": a, "y": b}.values()):
        first = [id(p) for p in row] if not hasattr(row, "__next__") else [id(a), id(b)]
        assert ids(adam([row, (c,), [d]])) == [first, [id(c)], [id(d)]]
    opt = adam([(("a", a), ("b", b)), [("c", c)], {"params": [("d", d)], "lr": .5}])
    assert ids(opt) == [[id(a), id(b)], [id(c)], [id(d)]] and [g["param_names"] for g in opt.param_groups] == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize("make, error, words", [
    (lambda a, b: adam([("a", a), ("b", a)]), ValueError, "twice"), (lambda a, b: adam([[("a", a)], [("b", a)]]), ValueError, "more than one"),
    (lambda a, b: adam(({"params": (p for p in (a, a))},)), ValueError, "twice"), (lambda a, b: adam([("a", a), b]), ValueError, "names"),
    (lambda a, b: adam({"weight": a, "bias": b}), KeyError, "params"), (lambda a, b: adam([nn.Linear(2, 2), nn.Linear(2, 2)]), TypeError, "one of the params is.*Linear"),
])
def test_odd_forms_of_parameters(make, error, words):
    with pytest.raises(error, match=words): make(W(), W())


@pytest.mark.parametrize("make, name, value", [
    *[(f, "lr", x) for f in ALL for x in (-1e-9, math.nan, math.inf, torch.tensor(-1.))], *[(f, "weight_decay", -.1) for f in ALL if f is not lars],
    *[(f, "betas", x) for f in (adam, adamw, radam, lamb) for x in ((1., .9), (.9, 1.), (.9, 2.), (-.1, .9), (.9, math.nan))],
    *[(f, "eps", -1e-9) for f in (rmsprop, adagrad, adam, adamw, radam, lamb, muon)], *[(f, "momentum", -.1) for f in (sgd, momentum, rmsprop, lars, muon)],
    (rmsprop, "alpha", 1.), (rmsprop, "alpha", -.1), (momentum, "dampening", math.nan), (lars, "trust", -1.), (adagrad, "lr_decay", -1.), (adagrad, "initial_accumulator_value", -1.),
], ids=lambda x: getattr(x, "__name__", str(x)))
def test_ranges_of_hypers(make, name, value):
    "By argument and in a group; 0 is always allowed."
    with pytest.raises(ValueError, match=f"{name} is"): make([W()], **{name: value})
    with pytest.raises(ValueError, match=f"{name} is"): make([{"params": [W()], name: value}])
    make([{"params": [W()], name: (0., 0.) if name == "betas" else 0.}])


@pytest.mark.parametrize("betas", [(.9,), (.9, .99, .999)])
def test_betas_are_two(betas):
    with pytest.raises(ValueError, match="values to unpack"): adam([W()], betas=betas)


def test_partials_lambdas_and_callables_are_rules():
    @elementwise
    def scaled(s, h, by): s.g = s.g*by
    def doubled(s, h, by): s.g = s.g*2*by
    class Halve:
        elementwise = True
        def __call__(self, s, h): s.g = s.g/2
    def make(rule): ps = [torch.zeros(3, requires_grad=True)]; return ps[0], Optimizer(ps, [rule], [sgd_step], lr=1.)
    for rule, move in ((partial(scaled, by=3.), -3.), (lambda s, h: setattr(s, "g", s.g*5), -5.), (Halve(), -.5)):
        p, opt = make(rule)
        p.grad = torch.ones(3); opt.step()
        assert p.tolist() == [move]*3
        q, twin = make(rule); twin.load_state_dict(opt.state_dict())
        assert twin.state[q]["step"] == 1
    assert make(partial(scaled, by=3.))[1].state_dict()["param_groups"][0]["rules"] == ["scaled", "sgd_step"]
    with pytest.raises(ValueError, match="look at rules"): make(partial(doubled, by=3.))[1].load_state_dict(make(partial(scaled, by=3.))[1].state_dict())


# --- every number the same, however it is handed out --------------------------------------------------------------------------

RULES = [rule for rule in vars(optim).values() if getattr(rule, "elementwise", False)]
HYPERS = dict(lr=.01, momentum=.9, dampening=.2, weight_decay=.1, nesterov=False, alpha=.9, eps=1e-3, centered=True, lr_decay=.1, initial_accumulator_value=.1, betas=(.9, .99))


def test_the_marked_rules():
    assert {r.__name__ for r in RULES} == {"sgd_step", "momentum_step", "rmsprop_step", "adagrad_step", "average", "average_squares", "adam_step", "radam_step", "l2", "decay"}


@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
@given(st.data())
@settings(max_examples=10)
def test_elementwise_rules_are_invariant_to_any_partition(rule, data):
    "Any shuffle of the numbers, cut anywhere, with any step: each number comes out the same."
    n, step = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 20))
    order = torch.tensor(data.draw(st.permutations(range(n))))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    g, names = torch.Generator().manual_seed(n), ("p", "g", "momentum_buffer", "square_avg", "grad_avg", "sum", "exp_avg", "exp_avg_sq")
    whole = {k: torch.rand(n, generator=g, dtype=torch.float64) + (k == "square_avg") for k in names}
    pieces = [dict(zip(names, ts)) for ts in zip(*(torch.tensor_split(whole[k][order].clone(), cuts) for k in names))]
    def call(tensors):
        s = SimpleNamespace(**tensors, step=step, fresh=frozenset())
        rule(s, SimpleNamespace(**HYPERS)); return vars(s)
    right, got = call(dict(whole)), [call(piece) for piece in pieces]
    for k in names: close(torch.cat([s[k] for s in got]), right[k][order], rtol=1e-12, atol=1e-13)


LAYOUTS = [lambda x: x, lambda x: x.to(memory_format=torch.channels_last), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
           lambda x: torch.zeros(2*x.shape[0], *x.shape[1:], dtype=x.dtype)[::2].copy_(x)]


@given(st.lists(st.tuples(st.sampled_from(range(4)), st.sampled_from(range(4)), st.integers(0, 3), st.booleans()), min_size=1, max_size=7), st.sampled_from([rmsprop, adam, momentum]),
       st.sampled_from([3, 30, 10**6]))
@settings(max_examples=25)
def test_joined_and_sliced_are_one_by_one(kinds, make, block):
    "Parameters of all layouts, gradients of all layouts, of different ages, some with a memory that others lack, and some that share a storage."
    def run(hand_out):
        pool, ps = torch.linspace(-1, 1, 24*len(kinds), dtype=torch.float64), []
        for i, (layout, _, _, shared) in enumerate(kinds):
            start = 12*i if shared else 0                                      # halves of neighbours overlap
            x = pool[start:start + 24].view(2, 3, 2, 2) if shared else torch.linspace(0, 1, 24, dtype=torch.float64).view(2, 3, 2, 2)
            ps.append((x if shared else LAYOUTS[layout](x)).requires_grad_())
        opt = make(ps, lr=.01, weight_decay=.1)
        opt.hand_out = lambda parts, rules: hand_out(parts)
        for step in range(4):
            for i, (p, (_, layout, age, _)) in enumerate(zip(ps, kinds)):
                p.grad = LAYOUTS[layout](torch.linspace(-1, i + step, 24, dtype=torch.float64).view(2, 3, 2, 2)) if step >= age else None
            if step == 2 and "momentum" in opt.defaults: opt.param_groups[0]["momentum"] = .5
            opt.step()
        return [p.detach().contiguous() for p in ps]
    before = optim.BLOCK
    try:
        optim.BLOCK = block
        right = run(one_by_one)
        close(run(joined), right, rtol=1e-12, atol=1e-13)
        close(run(lambda parts: one_by_one(sliced(parts))), right, rtol=1e-12, atol=1e-13)
    finally: optim.BLOCK = before


def test_parameters_that_overlap_in_one_storage_are_not_joined():
    "The second step must see what the first one did to the numbers they share."
    pool = torch.zeros(10)
    a, b = pool[:6].requires_grad_(), pool[4:].requires_grad_()
    opt = Optimizer([a, b], [], [sgd_step], lr=1.); opt.hand_out = lambda parts, rules: joined(parts)
    a.grad, b.grad = torch.ones(6), torch.ones(6); opt.step()
    assert pool.tolist() == [-1.]*4 + [-2.]*2 + [-1.]*4


@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
def test_devices_may_differ_in_a_group(make):
    "Meta tensors stand for another device: what is on the CPU moves as if it were alone."
    (a, b), (c,) = weights([(3, 4), (3, 4)], torch.float32), weights([(3, 4)], torch.float32)
    away = torch.empty(3, 4, device="meta", requires_grad=True)
    mixed, alone = make([a, away, b], lr=.01), make([c], lr=.01)
    for i in range(3):
        fill([a, c], i, freeze=False); c.grad, b.grad, away.grad = a.grad.clone(), a.grad.clone(), torch.empty(3, 4, device="meta")
        mixed.step(); alone.step()
    assert torch.equal(a, c) and {m.device.type for n, m in mixed.state[away].items() if n != "step"} <= {"meta"}


# --- random options, and times without a gradient ------------------------------------------------------------------------------

UNIT, SMALL = st.floats(0, .99), st.floats(0, .3)
OPTIONS = {sgd: dict(momentum=UNIT, dampening=UNIT, weight_decay=SMALL), rmsprop: dict(alpha=UNIT, eps=st.floats(1e-6, 1), weight_decay=SMALL, momentum=UNIT, centered=st.booleans()),
           adagrad: dict(lr_decay=UNIT, weight_decay=SMALL, initial_accumulator_value=UNIT, eps=st.floats(1e-8, 1)),
           **dict.fromkeys((adam, adamw, radam), dict(betas=st.tuples(UNIT, UNIT), eps=st.floats(1e-6, 1), weight_decay=SMALL))}
OPTIONS[momentum] = OPTIONS[sgd]


@pytest.mark.parametrize("ours, theirs", [(p[0], p[1]) for p in PAIRS], ids=lambda x: x.__name__)
@given(st.data())
@settings(max_examples=4)
def test_any_options_are_pytorchs(ours, theirs, data):
    "100 steps of small parameters, each frozen for some of them: it keeps its own count."
    options = {"lr": .01, **{n: data.draw(values, n) for n, values in OPTIONS[ours].items()}}
    frozen = data.draw(st.sets(st.integers(0, 99), max_size=30))
    if options.get("centered"): options["alpha"] = max(options["alpha"], .5)          # v - m² far from rounding
    def run(make):
        ps = weights([(2, 2), ()]); opt = make(ps, **options)
        for i in range(100):
            fill(ps, i, freeze=False)
            if i in frozen: ps[i % 2].grad = None
            opt.step()
        return ps, opt
    (ps, mine), (qs, _) = run(ours), run(theirs)
    close([p.detach() for p in ps], [q.detach() for q in qs], rtol=1e-6, atol=1e-6)
    for k, p in enumerate(ps): assert mine.state[p]["step"] == 100 - sum(i % 2 == k for i in frozen)


@pytest.mark.parametrize("ours, theirs", [(p[0], p[1]) for p in PAIRS], ids=lambda x: x.__name__)
def test_a_group_added_midway(ours, theirs):
    def run(make):
        ps = weights([(2, 3), (4,)]); opt = make(ps[:1], lr=.01)
        for i in range(10):
            if i == 4: opt.add_param_group({"params": ps[1], "lr": .1})
            fill(ps, i, freeze=False); opt.step()
        return [p.detach() for p in ps]
    if ours is momentum: theirs = partial(theirs, momentum=.9)
    close(run(ours), run(theirs), rtol=1e-9, atol=1e-9)


def test_a_closure_makes_the_gradients_of_its_step():
    def run(make):
        p = torch.tensor([1., 2.], dtype=torch.float64, requires_grad=True); opt = make([p], lr=.1); losses = []
        def closure():
            assert torch.is_grad_enabled(); opt.zero_grad()
            loss = p.square().sum(); loss.backward(); return loss
        with torch.no_grad():
            for _ in range(5): losses.append(opt.step(closure).item())
        return p.detach(), torch.tensor(losses)
    close(run(adamw), run(torch.optim.AdamW), rtol=1e-9, atol=1e-9)
    p = W(); opt = adam([p]); p.grad = torch.ones(2)
    def fails(): raise OverflowError("on purpose")
    with pytest.raises(OverflowError): opt.step(fails)
    assert not opt.state and p.tolist() == [0., 0.]


# --- states that do not mean the same, both ways -------------------------------------------------------------------------------

THEIRS = [getattr(torch.optim, n) for n in ("SGD", "RMSprop", "Adagrad", "Adam", "AdamW", "RAdam", "NAdam", "Adamax", "Adadelta", "ASGD", "Rprop", "Adafactor", "SparseAdam", "Muon") if hasattr(torch.optim, n)]
FITTING = {(torch.optim.SGD, sgd), (torch.optim.SGD, momentum), *((p[1], p[0]) for p in PAIRS), (sgd, momentum), (momentum, sgd), *((f, f) for f in ALL),
           *([(torch.optim.Muon, muon)] if hasattr(torch.optim, "Muon") else [])}


@pytest.mark.parametrize("into", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("started", [True, False], ids=["started", "fresh"])
def test_only_what_means_the_same_is_taken(into, started):
    "From every optimizer of PyTorch, and every one of ours; a fresh state, too, has hypers to misunderstand."
    for saved in (*THEIRS, *ALL):
        opt = saved(weights([(3, 2)], torch.float32), lr=.01)
        if started and saved is not getattr(torch.optim, "SparseAdam", 0): fill(opt.param_groups[0]["params"], 0, freeze=False); opt.step()
        mine = into(weights([(3, 2)], torch.float32))
        if (saved, into) in FITTING: mine.load_state_dict(opt.state_dict()); continue
        before = copy.deepcopy(mine.state_dict())
        with pytest.raises(ValueError, match="another optimizer"): mine.load_state_dict(opt.state_dict())
        assert mine.state_dict() == before, (saved, "changed something")


def test_a_state_that_lacks_something():
    "A state of only a step would go on from zeros as if they were averages."
    good = trained(adam).state_dict()
    for names, words in ((("step",), "exp_avg, exp_avg_sq"), (("step", "exp_avg"), "exp_avg_sq")):
        half = {**good, "state": {**good["state"], 1: {n: good["state"][1][n] for n in names}}}
        with pytest.raises(ValueError, match=f"^{words} of a parameter \\(4,\\) does not fit"): trained(adam).load_state_dict(half)
    plain = trained(sgd)                                     # which remembers nothing but its step
    twin = sgd(weights([(2, 3), (4,)])); twin.load_state_dict(plain.state_dict())
    assert [s for s in twin.state.values()] == [{"step": 2}]*2
    partly = {**good, "state": {0: good["state"][0], 1: {}}}
    twin = adam(weights([(2, 3), (4,)])); twin.load_state_dict(partly); assert len(twin.state) == 1


def test_sizes_of_groups_are_named():
    one, two = trained(adam), trained(lambda ps: adam([ps[:1], ps[1:]]))
    with pytest.raises(ValueError, match=r"groups of \[1, 1\] parameters, this optimizer of \[2\]"): one.load_state_dict(two.state_dict())
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters, this optimizer of \[1, 1\]"): two.load_state_dict(one.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_travels_to_pytorch_and_back(dtype):
    "Ours keeps float32 moments, through a file too; PyTorch's are half, and go on from them in single."
    mine = trained(adamw, dtype=dtype)
    file = io.BytesIO(); torch.save(mine.state_dict(), file); file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert {m.dtype for s in saved["state"].values() for n, m in s.items() if n != "step"} == {torch.float32}
    ps = weights([(2, 3), (4,)], dtype)
    theirs = torch.optim.AdamW(ps); theirs.load_state_dict(saved)
    fill(ps, 2, freeze=False); theirs.step()
    qs = weights([(2, 3), (4,)], dtype)
    back = adamw(qs); back.load_state_dict(theirs.state_dict())
    for p, q in zip(ps, qs):
        assert back.state[q]["step"] == 3
        for n in ("exp_avg", "exp_avg_sq"): assert back.state[q][n].dtype == torch.float32 and torch.equal(back.state[q][n], theirs.state[p][n].float())


@pytest.mark.parametrize("make", [sgd, momentum, rmsprop, adagrad, adam, adamw, radam, lamb, lars, muon])
def test_a_state_may_be_loaded_twice_into_copies_too(make):
    p = nn.Parameter(torch.ones(3, 2)); opt = make([p]); p.grad = torch.ones(3, 2); opt.step()
    saved = copy.deepcopy(opt.state_dict())
    for other in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        for _ in range(3): other.load_state_dict(saved)
        other.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
        other.param_groups[1]["params"][0].grad = torch.ones(2, 2)
        other.step()
        other.load_state_dict(other.state_dict())


def test_a_partial_of_a_rule_keeps_what_the_rule_keeps():
    p, q = (nn.Parameter(torch.ones(3)) for _ in "pq")
    hypers = dict(lr=.1, betas=(.9, .99), eps=1e-8)
    ours, whole = Optimizer([p], [partial(average), average_squares], [adam_step], **hypers), Optimizer([q], [average, average_squares], [adam_step], **hypers)
    for _ in range(3):
        p.grad, q.grad = p.detach()*2, q.detach()*2
        ours.step(); whole.step()
    assert torch.equal(p, q)


def test_decay_that_no_rule_would_do_is_refused():
    p = nn.Parameter(torch.ones(3)); theirs = torch.optim.Adam([nn.Parameter(torch.ones(3))], weight_decay=.5)
    ours = Optimizer([p], [average, average_squares], [adam_step], lr=.1, betas=(.9, .99), eps=1e-8)
    with pytest.raises(ValueError, match="look at weight_decay"): ours.load_state_dict(theirs.state_dict())

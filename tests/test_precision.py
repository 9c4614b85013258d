"exp.precision: numbers from bits, loss scaling, and mixed precision as a callback."
import copy
import itertools
import math
import warnings
from collections import namedtuple
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import data
from hypothesis import given, settings, strategies as st
from learners import At, batches, equal, history, make, model, raises, weights
from torch import nn

from exp import callbacks as C
from exp import learner as L
from exp import precision as P
from exp.checkpoints import SaveCheckpoint
from exp.optim import adamw
from exp.schedule import lr_find
from exp.training import accuracy

HALVES = (torch.float16, torch.bfloat16)
FP16 = partial(P.MixedPrecision, torch.float16)


# --- bits ------------------------------------------------------------------------------------------------------------------

def every(dtype): return torch.arange(-2**15, 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_number_is_built_from_its_bits(dtype):
    numbers = every(dtype)
    ne, texts = (5, 8)[dtype == torch.bfloat16], [f"{n % 2**16:016b}" for n in range(-2**15, 2**15)]
    built = torch.tensor([P.from_bits(f"{s[0]} {s[1:1 + ne]} {s[1 + ne:]}") for s in texts], dtype=torch.float64)
    for i in range(0, 2**16, 511): assert P.bits(numbers[i]).replace(" ", "") == texts[i]
    torch.testing.assert_close(built, numbers.double(), rtol=0, atol=0, equal_nan=True)
    assert math.copysign(1, P.from_bits(P.bits(-0., dtype))) == -1


@given(st.floats(), st.sampled_from([torch.float32, torch.float64]))
def test_wide_numbers_are_built_from_their_bits(x, dtype):
    x = torch.tensor(x, dtype=torch.float64).to(dtype)
    assert P.from_bits(P.bits(x)) == x.item() or x.isnan()


def test_bits_are_those_of_the_standard():
    assert P.bits(1.5, torch.float16) == "0 01111 1000000000" and P.bits(-2.) == "1 10000000 " + "0"*23
    assert P.bits(torch.tensor(1.5, dtype=torch.bfloat16)) == "0 01111111 1000000" and P.bits(1., torch.float64).startswith("0 01111111111 ")
    assert P.from_bits("0 1111 000") == math.inf and P.from_bits("1 0000 001") == -2**-9 and P.from_bits("0 01 1") == 1.5


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_the_next_number_is_pytorchs(dtype):
    x = every(dtype) if dtype in HALVES else torch.randn(1000, dtype=dtype)
    x = torch.cat([x, torch.tensor([0., -0., 1., -1., math.inf, -math.inf, math.nan], dtype=dtype)])
    right, whole = torch.nextafter(x, torch.full_like(x, math.inf)), {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    mine, same = P.next_float(x), ~x.isnan()
    assert torch.equal(mine[same].view(whole), right[same].view(whole)) and mine[~same].isnan().all()     # also the sign of 0


def test_bits_want_a_float():
    for func in (P.bits, P.next_float):
        with pytest.raises(TypeError, match="convert it first"): func(torch.tensor(3))


# --- the scaler -------------------------------------------------------------------------------------------------------------

KINDS = st.lists(st.sampled_from(["good", "good", "inf", "nan", "none", "huge"]), min_size=1, max_size=25)


@settings(max_examples=30)
@given(KINDS, st.sampled_from([1., 3., 65536., 2.**126]), st.sampled_from([2., 1.1, 3.7]), st.sampled_from([.5, .3]), st.integers(1, 4), st.booleans())
def test_the_scaler_is_pytorchs_step_for_step(kinds, init, growth, backoff, interval, early):
    options = dict(init_scale=init, growth_factor=growth, backoff_factor=backoff, growth_interval=interval)
    scalers = P.GradScaler(**options), torch.amp.GradScaler("cpu", **options)
    nets = [model() for _ in scalers]
    opts = [torch.optim.SGD(net.parameters(), .1, momentum=.9) for net in nets]
    for n, kind in enumerate(kinds):
        g = torch.Generator().manual_seed(n)
        grads = [torch.randn(p.shape, generator=g) for p in nets[0].parameters()]
        if kind in ("inf", "nan"): grads[n % 4].view(-1)[0] = float(kind)
        if kind == "huge": grads = [3e38*x.sign() for x in grads]
        taken = []
        for scaler, net, opt in zip(scalers, nets, opts):
            for i, (p, x) in enumerate(zip(net.parameters(), grads)): p.grad = None if kind == "none" and i else x.clone()
            scaler.scale(torch.tensor(1.))              # theirs is made on its device by this
            if early: scaler.unscale_(opt)
            before = weights(type("Has", (), {"model": net}))
            result = scaler.step(opt)
            taken.append((not equal(before, [p.detach() for p in net.parameters()]), result))
            scaler.update()
        assert taken[0][0] == taken[1][0] and taken[0][1] is (kind not in ("inf", "nan"))
        assert all(torch.equal(p, q) or kind == "huge" for p, q in zip(nets[0].parameters(), nets[1].parameters()))
        assert scalers[0].get_scale() == scalers[1].get_scale() and scalers[0].state_dict() == scalers[1].state_dict()


def test_states_travel_to_pytorch_and_back():
    ours, theirs = P.GradScaler(8., growth_interval=3), torch.amp.GradScaler("cpu")
    p = nn.Parameter(torch.ones(2)); opt = torch.optim.SGD([p], .1)
    for _ in range(2):
        p.grad = torch.ones(2); ours.step(opt); ours.update()
    theirs.load_state_dict(ours.state_dict())
    assert theirs.state_dict() == ours.state_dict() and ours.n_good == 2
    again = P.GradScaler(); again.load_state_dict(theirs.state_dict())
    assert again.state_dict() == ours.state_dict()


def test_a_half_loss_is_scaled_in_single():
    for dtype in HALVES:
        loss = torch.tensor(3., dtype=dtype, requires_grad=True)
        scaled = P.GradScaler().scale(loss)
        assert scaled.dtype == torch.float32 and scaled.item() == 3*65536


def test_without_gradients_a_step_is_good():
    opt = torch.optim.SGD([nn.Parameter(torch.ones(2))], .1)
    scaler = P.GradScaler(growth_interval=1)
    assert scaler.step(opt) is True
    scaler.update()
    assert scaler.get_scale() == 2*65536
    scaler.update()
    assert scaler.get_scale() == 2*65536, "nothing was found, nothing changes"


def test_sparse_gradients():
    class Words(nn.Module):
        def __init__(self): super().__init__(); torch.manual_seed(0); self.table, self.head = nn.Embedding(9, 4, sparse=True), Exact4()
        def forward(self, x): return self.head(self.table(x).mean(1))
    class Exact4(nn.Module):
        def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.randn(2, 4))
        def forward(self, x): return (x[:, None]*self.weight).sum(-1)
    pairs = [(torch.tensor([[1, 1, 3], [3, 4, 5]]), torch.tensor([0, 1]))]*3
    runs = []
    for cbs in ([], [FP16(P.GradScaler(64.))]):
        learn = make(cbs, L.DataLoaders(pairs), Words()); learn.fit(2); runs.append(weights(learn))
    assert equal(*runs)
    p = nn.Parameter(torch.ones(3, 1)); p.grad = torch.sparse_coo_tensor([[0, 0]], [[1.], [math.inf]], (3, 1), check_invariants=True)
    assert P.GradScaler().step(torch.optim.SGD([p], .1)) is False


def test_the_scale_never_grows_to_infinity():
    p = nn.Parameter(torch.ones(2)); opt = torch.optim.SGD([p], 0.)
    scaler = P.GradScaler(2.**127, growth_interval=1)
    for _ in range(3): p.grad = torch.ones(2); scaler.step(opt); scaler.update()
    assert scaler.get_scale() == 2.**127


def test_what_the_scaler_refuses():
    for bad in (dict(init_scale=0.), dict(growth_factor=1.), dict(backoff_factor=1.), dict(backoff_factor=0.), dict(init_scale=math.nan), dict(init_scale=1e39),
                dict(init_scale=1e-50), dict(growth_factor=math.inf), dict(growth_interval=0), dict(growth_interval=2.5)):
        with pytest.raises(ValueError, match="give scale > 0, growth > 1"): P.GradScaler(**bad)
    p = nn.Parameter(torch.ones(2)); p.grad = torch.ones(2); opt = torch.optim.SGD([p], .1); scaler = P.GradScaler()
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"call update\(\)"): scaler.unscale_(opt)
    scaler.step(opt)
    for again in (scaler.step, scaler.unscale_):
        with pytest.raises(RuntimeError, match=r"call update\(\)"): again(opt)
    h = nn.Parameter(torch.ones(2, dtype=torch.float16)); h.grad = torch.ones_like(h)
    with pytest.raises(ValueError, match="keep the weights in float32"): P.GradScaler().step(torch.optim.SGD([h], .1))


def test_what_one_process_finds_all_know(monkeypatch):
    p = nn.Parameter(torch.ones(2)); p.grad = torch.ones(2); opt = torch.optim.SGD([p], .1)
    monkeypatch.setattr(P, "all_sum", lambda n: n + 1)
    assert P.GradScaler().step(opt) is False and torch.equal(p, torch.ones(2))


# --- the callback -------------------------------------------------------------------------------------------------------------

class Exact(nn.Module):
    "A linear layer that autocast leaves in float32, so that scaling by powers of two changes no bit."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 6))
    def forward(self, x): return (x[:, None]*self.weight).sum(-1)


def norm_net(): torch.manual_seed(0); return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def buffers(learn): return [b.clone() for b in learn.model.buffers()]


def state_of(opt): return copy.deepcopy(opt.state_dict()["state"])


@pytest.mark.parametrize("dtype", HALVES)
def test_a_fit_is_the_plain_loop_with_pytorchs_scaler(dtype):
    start = 2.**30                      # so high that the first steps overflow
    learn = make(P.MixedPrecision(dtype, P.GradScaler(start, growth_interval=4)), net=norm_net(), opt_func=torch.optim.Adam, lr=.01, loss_func=F.cross_entropy)
    learn.fit(12)
    net, scaler = norm_net(), torch.amp.GradScaler("cpu", start, growth_interval=4, enabled=dtype == torch.float16)
    opt, skipped = torch.optim.Adam(net.parameters(), .01), 0
    for _ in range(12):
        for xb, yb in batches():
            before = copy.deepcopy(dict(net.named_buffers()))
            with torch.autocast("cpu", dtype): pred = net(xb)
            with torch.autocast("cpu", dtype): loss = F.cross_entropy(pred.float(), yb)
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            if not all(p.grad.isfinite().all() for p in net.parameters()):
                skipped += 1
                for name, b in net.named_buffers(): b.copy_(before[name])
            scaler.step(opt); scaler.update(); opt.zero_grad()
    assert equal(weights(learn), [p.detach() for p in net.parameters()]) and equal(buffers(learn), list(net.buffers()))
    cb = learn.cb(P.MixedPrecision)
    assert cb.n_skipped == skipped and (skipped > 5) == (dtype == torch.float16)
    if dtype == torch.float16: assert cb.scaler.state_dict() == scaler.state_dict()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_right_order_in_whatever_order_they_are_given(order):
    "Two of three batches a step, the last window short; clipping acts on the true gradient."
    def cbs(): return [C.GradientAccumulation(2), C.GradientClip(.3), FP16(P.GradScaler(1024.))]
    plain = make(cbs()[:2], net=Exact(), lr=.5); plain.fit(3)
    mixed = make([cbs()[i] for i in order], net=Exact(), lr=.5); mixed.fit(3)
    assert mixed.cb(P.MixedPrecision).n_skipped == 0
    for a, b in zip(weights(mixed), weights(plain)): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mixed.cb(C.GradientClip).norm, plain.cb(C.GradientClip).norm, rtol=1e-6, atol=0)
    assert mixed.cb(P.MixedPrecision).scaler.n_good == 6, "two steps an epoch, each counted once"


@given(st.integers(0, 30), st.integers(1, 4))
@settings(max_examples=20)
def test_scaling_by_powers_of_two_changes_no_bit(power, n):
    plain = make(net=Exact(), lr=.5); plain.fit(n)
    mixed = make(FP16(P.GradScaler(2.**power)), net=Exact(), lr=.5); mixed.fit(n)
    assert equal(weights(mixed), weights(plain)) and history(mixed) == history(plain)


class Watch(L.Callback):
    "What there is before a step and after it."
    order = 90
    def __init__(self): self.steps, self.losses = [], []
    def after_loss(self, learn): self.losses.append((learn.loss.item(), learn.loss_for_grad.item()*float(learn.loss_factor or 1)))
    def before_batch(self, learn):
        if learn.training and not learn.window: self.before = self._now(learn)
    def after_step(self, learn): self.steps.append((learn.stepped, self.before, self._now(learn)))
    def _now(self, learn): return weights(learn), buffers(learn), state_of(learn.opt), copy.deepcopy([cb.average for cb in learn.cbs if isinstance(cb, C.EMA)])


def same(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("opt_func", [torch.optim.Adam, adamw, partial(torch.optim.SGD, momentum=.9)])
@pytest.mark.parametrize("n", [1, 2])
def test_a_skipped_step_leaves_no_trace(opt_func, n):
    watch, cb = Watch(), FP16(P.GradScaler(2.**40))
    learn = make([watch, cb, C.EMA(.5), C.GradientAccumulation(n)], net=norm_net(), opt_func=opt_func, lr=.01)
    learn.fit(20)
    skipped = [before_and_after for stepped, *before_and_after in watch.steps if not stepped]
    assert len(skipped) == cb.n_skipped > 5 and all(same(before, after) for before, after in skipped)
    taken = [before_and_after for stepped, *before_and_after in watch.steps if stepped]
    assert len(taken) > 5 and not any(same(before[i], after[i]) for before, after in taken for i in range(4))
    assert cb.scaler.get_scale() == 2.**(40 - cb.n_skipped), "each halves the scale"


def test_one_overflowing_activation_does_not_spoil_the_batch_norm():
    good = batches(32)
    huge = good[0][0].clone(); huge[0] = 6e4            # times a weight and summed: beyond 65,504
    net = norm_net(); net[0].weight.data.fill_(1.)
    learn = make(FP16(P.GradScaler(64.)), L.DataLoaders([(huge, good[0][1]), *good]), net=net, lr=1e-3)
    learn.fit(1)
    assert learn.cb(P.MixedPrecision).n_skipped == 1 and all(b.isfinite().all() for b in net.buffers())
    assert net[1].num_batches_tracked == 2
    by_hand = norm_net()                                # without us the averages are lost
    with torch.autocast("cpu", torch.float16): by_hand[1](torch.full((4, 5), math.inf, dtype=torch.float16))
    assert not by_hand[1].running_mean.isfinite().all()


def test_the_loss_is_never_scaled():
    watch, recorder = Watch(), C.Recorder()
    make([watch, recorder, FP16(P.GradScaler(256.))], net=Exact()).fit(1)
    training = watch.losses[:3]
    assert all(for_grad == 256*loss for loss, for_grad in training) and all(a == b for a, b in watch.losses[3:])
    assert recorder.losses == [loss for loss, _ in training]


def test_an_overflow_that_the_scaler_handles_stops_nobody():
    learn = make([C.TerminateOnNaN(), FP16(P.GradScaler(2.**40))], lr=.01); learn.fit(12)
    assert learn.cb(P.MixedPrecision).n_skipped > 5
    xs, ys = data(16, 0)
    with pytest.raises(FloatingPointError, match=r"\(Linear\) gives the first value that is not finite"):
        make([C.TerminateOnNaN(), FP16()], L.DataLoaders([(6e4*xs.sign(), ys)])).fit(1)       # the forward pass itself


def test_a_forward_pass_that_overflows_does_not_go_on_in_silence():
    xs, ys = data(16, 0)
    learn = make(FP16(), L.DataLoaders([(6e4*xs.sign(), ys)]*40)); before = weights(learn)
    with pytest.raises(FloatingPointError, match="30 steps in a row"): learn.fit(1)
    assert equal(before, weights(learn)) and learn.cb(P.MixedPrecision).scaler.get_scale() == 65536, "the scale is not to blame"
    learn.dls = L.DataLoaders(batches()); learn.fit(2)                # the same learner learns on
    assert not equal(before, weights(learn))


def test_half_of_the_steps_may_overflow_for_ever():
    xs, ys = data(16, 0)
    learn = make(FP16(), L.DataLoaders([(6e4*xs.sign(), ys), (xs, ys)]*70)); learn.fit(1)
    assert learn.cb(P.MixedPrecision).n_skipped == 70
    learn = make(P.MixedPrecision(torch.bfloat16, P.GradScaler(1e-9)), L.DataLoaders([(math.nan*xs, ys)]*40)); learn.fit(1)     # not our business


@pytest.mark.parametrize("event", ["before_batch", "after_pred", "after_backward", "before_step", "after_step", "after_batch"])
def test_a_validation_inside_an_event_leaves_no_trace(event):
    runs = []
    for extra in ([], [At(event, lambda learn: learn.validate(), n=1, order=-60), At(event, lambda learn: learn.validate(), n=4, order=80)]):
        learn = make([*extra, FP16(P.GradScaler(2.**30)), C.GradientAccumulation(2)], net=norm_net(), lr=.01); learn.fit(9)
        runs.append((weights(learn), buffers(learn), learn.cb(P.MixedPrecision).state_dict()))
    assert same(*runs) and runs[0][2]["n_skipped"] > 2


class OnePass(L.Learner):
    "One backward pass, then each optimizer steps, and the first once more."
    def train_batch(self):
        self.backward(self.get_loss(self.forward(self.xb), self.yb))
        for opt in [*self.opts.values(), self.opt]: self.step(opt)
        self.zero_grad()


def one_pass(cbs, net, opts): return OnePass(net, L.DataLoaders(batches()), F.cross_entropy, opts, .1, cbs, quiet=True, device="cpu")


@pytest.mark.parametrize("shared", [False, True])
def test_several_steps_after_one_pass(shared):
    def opts(params, lr): return {"a": torch.optim.SGD(params if shared else params[:1], lr), "b": torch.optim.SGD(params if shared else params[1:], lr)}
    runs = []
    for cbs in ([], [FP16(P.GradScaler(1024.))]):
        learn = one_pass(cbs, TwoExact(), opts); learn.fit(2); runs.append(weights(learn))
    assert equal(*runs)
    learn = one_pass(FP16(P.GradScaler(2.**40)), norm_net(), opts); before, kept = weights(learn), buffers(learn)
    learn.fit(1)
    assert equal(before, weights(learn)) and same(kept, buffers(learn)) and learn.cb(P.MixedPrecision).n_skipped == 9


class Odd(nn.Module):
    "Buffers that appear in the first pass, that share their memory, that have no shape, or are replaced; and a norm."
    def __init__(self):
        super().__init__()
        self.net, self.lazy = norm_net(), nn.LazyBatchNorm1d()
        self.register_buffer("constant", torch.ones(1).expand(5))
        self.register_buffer("count", torch.zeros(()))
    def forward(self, x):
        if not hasattr(self, "late"): self.register_buffer("late", torch.ones(7))
        self.count = self.count + 1
        return self.lazy(self.net(x))


def test_odd_buffers():
    net = Odd()
    learn = L.Learner(net, L.DataLoaders(batches()), F.cross_entropy, lambda params, lr: torch.optim.SGD([p for p in params if not nn.parameter.is_lazy(p)], lr), .1,
                      [FP16(P.GradScaler(2.**40))], quiet=True, device="cpu")
    mean = net.net[1].running_mean.clone()
    learn.fit(1)
    assert learn.cb(P.MixedPrecision).n_skipped == 3 and net.count == 0 and torch.equal(net.net[1].running_mean, mean) and net.late.tolist() == [1.]*7


@pytest.mark.parametrize("event", ["after_pred", "after_loss", "after_backward"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_cancelled_batch_whose_forward_overflowed_spoils_nothing(event, n):
    good, net = batches(32), norm_net(); net[0].weight.data.fill_(1.)
    huge = good[0][0].clone(); huge[0] = 6e4
    learn = make([FP16(P.GradScaler(64.)), At(event, raises(L.CancelBatch())), C.GradientAccumulation(n)], L.DataLoaders([(huge, good[0][1]), *good]), net=net, lr=1e-3)
    learn.fit(1)
    assert all(b.isfinite().all() for b in net.buffers()) and learn.cb(P.MixedPrecision).n_skipped == 0


def test_the_buffers_of_the_loss_count_too():
    class Loss(nn.Module):
        def __init__(self): super().__init__(); self.norm = nn.BatchNorm1d(2, affine=False)
        def forward(self, pred, yb): return F.cross_entropy(self.norm(pred), yb)
    loss = Loss(); learn = make(FP16(P.GradScaler(2.**40)), loss_func=loss); learn.fit(1)
    assert loss.norm.num_batches_tracked == 0 and not loss.norm.running_mean.any()


class Alternate(L.Learner):
    "Each optimizer steps by itself, one after the other, as in a GAN."
    def train_batch(self):
        for opt in self.opts.values():
            self.backward(self.get_loss(self.forward(self.xb), self.yb))
            self.step(opt)
            self.zero_grad()


class Gan(L.Learner):
    "DCGAN's step: the fakes are made once, and both networks learn from them."
    def train_batch(self):
        g, d = self.model["g"], self.model["d"]
        fake = self.forward(self.xb, g)
        self.backward(F.softplus(self.forward(fake.detach(), d)).mean()); self.step(self.opts["d"]); self.zero_grad(self.opts["d"])
        self.backward(F.softplus(-self.forward(fake, d)).mean()); self.step(self.opts["g"]); self.zero_grad()


def test_a_gan_goes_on_after_an_overflow():
    "What is put back after the first optimizer's skipped step is still needed by the graph of the second."
    net = nn.ModuleDict({"g": norm_net(), "d": nn.Linear(2, 1)})
    learn = Gan(net, L.DataLoaders(batches(), None), F.cross_entropy, lambda params, lr: {k: torch.optim.SGD(net[k].parameters(), lr) for k in "dg"}, .1,
                cbs=FP16(P.GradScaler(2.**40)), quiet=True, device="cpu")
    learn.fit(8)
    assert learn.cb(P.MixedPrecision).n_skipped > 5 and math.isfinite(learn.history[-1]["train_loss"])


@pytest.mark.parametrize("order", [-99, -25, 0, 99])
def test_terms_of_the_loss_are_scaled_with_it(order):
    "A penalty that a callback adds at any time: neither the scale nor the window's weights may miss it."
    class Penalty(L.Callback):
        def after_loss(self, learn): learn.loss_for_grad = learn.loss_for_grad + .5*sum(p.square().sum() for p in learn.model.parameters())
    def run(*cbs):
        penalty = Penalty(); penalty.order = order
        learn = make([penalty, *cbs], net=Exact(), lr=.1); learn.fit(2)
        return weights(learn)
    alone = run()
    for cbs in ([C.GradientAccumulation(1)], [FP16(P.GradScaler(1024.))], [FP16(P.GradScaler(1024.)), C.GradientAccumulation(1)]):
        for a, b in zip(alone, run(*cbs)): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def two_opts(params, lr): return {"body": torch.optim.SGD(params[:1], lr), "head": torch.optim.SGD(params[1:], lr)}


class TwoExact(nn.Sequential):
    def __init__(self): super().__init__(Exact(), nn.Tanh()); self.scale = nn.Parameter(torch.tensor([1., 2.]))
    def forward(self, x): return super().forward(x)*self.scale


@pytest.mark.parametrize("kind", [Alternate, L.Learner])
def test_several_optimizers_are_unscaled_once_each(kind):
    runs = []
    for cbs in ([], [FP16(P.GradScaler(1024.))]):
        learn = kind(TwoExact(), L.DataLoaders(batches()), F.cross_entropy, two_opts, .1, cbs, quiet=True, device="cpu")
        learn.fit(2); runs.append(weights(learn))
    assert equal(*runs) and learn.cb(P.MixedPrecision).scaler.n_good == 6, "one update a batch"


def test_of_several_optimizers_one_may_overflow():
    "The first step of a batch is good, the second not: the buffers are those after the first."
    class Spoil(L.Callback):
        order = -35
        def before_step(self, learn):
            if learn.stepping[0] is learn.opts["head"]: learn.params()[0].grad.fill_(math.inf)
    class Keep(L.Callback):
        order = -90
        def before_fit(self, learn): self.seen = []
        def after_batch(self, learn): self.seen.append((learn.model[1].num_batches_tracked.item(), learn.cb(P.MixedPrecision).scaler.get_scale()))
    keep = Keep()
    learn = Alternate(norm_net(), L.DataLoaders(batches()), F.cross_entropy, two_opts, .1, [Spoil(), keep, FP16(P.GradScaler(64.))], quiet=True, device="cpu")
    before = weights(learn); learn.fit(1); after = weights(learn)
    assert not torch.equal(before[0], after[0]) and equal(before[1:], after[1:])
    assert keep.seen == [(1, 64.), (2, 32.), (3, 16.)]      # the last update comes after its look


def test_a_parameter_of_two_optimizers_is_unscaled_once():
    def shared(params, lr): return {"a": torch.optim.SGD(params, lr), "b": torch.optim.SGD(params, lr)}
    runs = []
    for cbs in ([], [FP16(P.GradScaler(1024.))]):
        learn = make(cbs, net=Exact(), opt_func=shared); learn.fit(1); runs.append(weights(learn))
    assert equal(*runs)


def test_frozen_and_unused_parameters():
    net = norm_net(); net[0].requires_grad_(False); net.unused = nn.Parameter(torch.ones(3))
    class Skip(nn.Module):
        def __init__(self): super().__init__(); self.net = net
        def forward(self, x): return net[3](net[2](net[1](net[0](x))))
    learn = make(FP16(P.GradScaler(256.)), net=Skip()); before = dict(zip(dict(learn.model.named_parameters()), weights(learn))); learn.fit(1)
    moved = {name for name, p in learn.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"net.{i}.{kind}" for i in (1, 3) for kind in ("weight", "bias")}


def test_a_frozen_half_body_is_welcome():
    net = model(); net[0].to(torch.float16).requires_grad_(False); before = net[2].weight.detach().clone()
    make(FP16(P.GradScaler(256.)), net=net).fit(1)
    assert net[0].weight.dtype == torch.float16 and not torch.equal(before, net[2].weight)


@pytest.mark.parametrize("dtype", HALVES)
def test_resume_is_bit_identical(tmp_path, dtype):
    def fresh(): return make([P.MixedPrecision(dtype, P.GradScaler(2.**24, growth_interval=4)), SaveCheckpoint(tmp_path)], net=norm_net(), opt_func=torch.optim.Adam, lr=.01)
    whole = fresh(); whole.fit(5)
    fresh().fit(3)
    resumed = fresh(); resumed.fit(5, resume=tmp_path/"last.pt")
    assert equal(weights(whole), weights(resumed)) and equal(buffers(whole), buffers(resumed)) and history(whole) == history(resumed)
    states = [learn.cb(P.MixedPrecision).state_dict() for learn in (whole, resumed)]
    assert states[0] == states[1] and (states[0]["n_skipped"] > 0) == (dtype == torch.float16)


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize("dtype", HALVES)
def test_outputs_are_single_wherever_they_are_seen(dtype):
    seen = []
    def kind(pred, yb): seen.append(pred.dtype); return accuracy(pred, yb)
    learn = make(P.MixedPrecision(dtype), metrics=kind)
    assert learn.predict().dtype == torch.float32           # also before any fit
    learn.validate(); learn.fit(1)
    assert set(seen) == {torch.float32} and all(p.dtype == torch.float32 for p in weights(learn))
    net = model()
    with torch.autocast("cpu", dtype), torch.no_grad(): expected = net(batches(24)[0][0]).float()
    assert torch.equal(make(P.MixedPrecision(dtype), net=net).predict(batches(24)[0][0]), expected)


def test_nested_outputs_keep_their_kind():
    class Many(nn.Module):
        def __init__(self): super().__init__(); self.net = model()
        def forward(self, x): y = self.net(x); return {"pair": Pair(y, [y, None]), "count": torch.tensor([1]*len(x))}
    out = make(P.MixedPrecision(torch.bfloat16), net=Many()).predict(batches()[0][0])
    assert type(out["pair"]) is Pair and out["pair"].a.dtype == out["pair"].b[0].dtype == torch.float32 and out["count"].dtype == torch.int64


def test_what_the_callback_refuses():
    for dtype in HALVES:
        with pytest.raises(ValueError, match="0.weight is in half precision"): make(P.MixedPrecision(), net=model().to(dtype)).fit(1)
    missing = torch.device("meta")
    for dtype in (None, *HALVES):
        with pytest.raises(ValueError, match="meta has no mixed precision"): P.MixedPrecision(dtype or torch.float16).dtype_on(missing)
    with pytest.raises(ValueError, match="cpu has no mixed precision in torch.float64"): make(P.MixedPrecision(torch.float64)).fit(1)
    with pytest.raises(ValueError, match="meta has no mixed precision in torch.float16"): P.MixedPrecision().dtype_on(missing)
    for wrong in (dict(scaler=torch.amp.GradScaler("cpu")), dict(dtype="float16"), dict(scaler=torch.float16), dict(dtype=P.GradScaler())):
        with pytest.raises(TypeError, match="our own GradScaler"): P.MixedPrecision(**wrong)
    with pytest.raises(ValueError, match="two MixedPrecisions"): make([P.MixedPrecision(), FP16()]).fit(1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda has no mixed precision in torch.float16"): FP16().dtype_on(torch.device("cuda"))


def test_the_rule_for_a_format(monkeypatch):
    assert P.half_dtype("cpu") == torch.bfloat16 == P.MixedPrecision().dtype_on(torch.device("cpu")) and P.half_dtype("mps") == torch.float16
    for has, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=has: has)
        assert P.half_dtype("cuda:0") == dtype


def test_is_it_in_hardware(monkeypatch):
    for found, native in ((["avx2", "f16c"], False), (["avx2", "avx512_bf16"], True), (["bf16"], True), (["avx512_fp16"], False), ([], False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: dict.fromkeys(found, True) | {"sse": True, "cpu_name": "x"}, raising=False)
        assert P.half_instructions() == found and P.native_half("cpu") is P.native_half(torch.device("cpu")) is native
    for capability, native in (((6, 1), False), ((7, 5), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert P.native_half("cuda:0") is native
    assert P.native_half("mps") is True
    monkeypatch.delattr(torch.cpu, "get_capabilities")                  # older PyTorch: what the system says
    assert set(P.half_instructions()) <= {"avx2", "f16c", "avx512_bf16", "avx512_fp16", "amx_bf16", "bf16", "asimdhp"}


def test_the_format_may_be_changed_between_fits():
    learn = make(P.MixedPrecision(torch.bfloat16)); learn.fit(1)
    learn.cb(P.MixedPrecision).dtype = torch.float16; learn.cb(P.MixedPrecision).scaler = P.GradScaler(2.**60); learn.fit(1)
    assert learn.cb(P.MixedPrecision).n_skipped == 3


def test_no_warning_is_left_to_the_reader():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(P.MixedPrecision()).fit(1)


@pytest.mark.parametrize("event", ["after_pred", "after_loss", "after_backward", "before_step", "after_step"])
@pytest.mark.parametrize("error", [ValueError("x"), L.CancelBatch()])
def test_after_an_accident_training_goes_on(event, error):
    cb = FP16(P.GradScaler(256.))
    learn = make([cb, At(event, raises(error), n=1)], net=norm_net())
    try: learn.fit(1)
    except ValueError: learn.fit(1)
    assert cb.scaler.get_scale() == 256. and cb.n_skipped == 0 and not torch.is_autocast_enabled("cpu")
    net, plain = Exact(), make(At(event, raises(error), n=1), net=Exact()); mixed = make([FP16(P.GradScaler(256.)), At(event, raises(error), n=1)], net=net)
    for one in (plain, mixed):
        try: one.fit(2)
        except ValueError: one.fit(1)
    assert equal(weights(plain), weights(mixed)), "the same as in float32"


def test_a_range_test_leaves_the_scale_alone():
    learn = make(FP16(P.GradScaler(2.**30)), lr=.01)
    lr_find(learn, 1e-4, 1., 20)
    assert learn.cb(P.MixedPrecision).scaler.get_scale() == 2.**30 and learn.cb(P.MixedPrecision).n_skipped == 0


def test_the_scale_goes_on_in_the_next_fit():
    learn = make(FP16(P.GradScaler(2.**30)), lr=.01); learn.fit(6)
    scale = learn.cb(P.MixedPrecision).scaler.get_scale(); learn.fit(0)
    assert scale < 2.**30 and learn.cb(P.MixedPrecision).scaler.get_scale() == scale


# --- the exercises' checkers ------------------------------------------------------------------------------------------------

def byte_by_text(n):
    sign, e, f = f"{n:08b}"[0], f"{n:08b}"[1:5], f"{n:08b}"[5:]
    if e + f == "1111111": return torch.tensor(math.nan)
    return (-1)**int(sign)*(2**(int(e, 2) - 7) if e != "0000" else 2**-6)*((e != "0000") + int(f, 2)/8)
def byte_by_torch(n): return torch.tensor([n], dtype=torch.uint8).view(torch.float8_e4m3fn).float()[0]
def byte_ieee(n): return P.from_bits(f"{n >> 7:01b} {n >> 3 & 15:04b} {n & 7:03b}")
def byte_no_subnormals(n): return math.nan if n & 127 == 127 else (-1)**(n >> 7)*2.**((n >> 3 & 15) - 7)*(1 + (n & 7)/8)
def byte_never_nan(n): return byte_no_subnormals(n) if n & 120 else (-1)**(n >> 7)*2.**-6*(n & 7)/8
def byte_all_ones(n): return byte_never_nan(n) if n & 127 != 127 else 480.


def chance_bits(x, generator):
    lot = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32)
    return ((x.view(torch.int32) + lot) & -65536).view(torch.float32).bfloat16()
def chance_share(x, generator):
    low = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    high = P.next_float(low.abs().bfloat16()).float().copysign(x)
    up = torch.rand(x.shape, generator=generator) < (x - low)/(high - low)
    return torch.where(up, high, low).bfloat16()
def chance_nearest(x, generator): return x.bfloat16()
def chance_global(x, generator): return chance_bits(x, None)
def chance_coin(x, generator):
    low = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return torch.where((torch.rand(x.shape, generator=generator) < .5) & (low != x), P.next_float(low.abs().bfloat16()).float().copysign(x), low).bfloat16()
def chance_float(x, generator): return chance_bits(x, generator).float()
def chance_noise(x, generator): return (x + x.abs()*2**-8*(torch.rand(x.shape, generator=generator) - .5)).bfloat16()
def chance_down(x, generator): return (x.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


def rms_largest(x):
    top = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-38)
    return ((x.float()/top).square().mean(-1).sqrt()*top.squeeze(-1)).to(x.dtype)
def rms_double(x): return x.double().square().mean(-1).sqrt().to(x.dtype)
def rms_plain(x): return x.square().mean(-1).sqrt()
def rms_single(x): return x.float().square().mean(-1).sqrt().to(x.dtype)
def rms_returns_single(x): return rms_largest(x).float()
def rms_zero(x): top = x.abs().amax(-1, keepdim=True); return ((x/top).float().square().mean(-1).sqrt()*top[..., 0].float()).to(x.dtype)
def rms_all(x): return x.double().square().mean().sqrt().to(x.dtype)


def window(model, batches, loss_func, opt, scaler, max_norm, order="right"):
    opt.zero_grad()
    n = sum(len(x) for x, _ in batches)
    for xb, yb in batches:
        share = 1/len(batches) if order == "mean of means" else len(xb)/n
        (loss_func(model(xb), yb)*(1 if order == "no scale" else scaler.get_scale())*share).backward()
        if order == "update per batch": scaler.unscale_(opt); scaler.update()
    if order == "clip first": nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if order != "update per batch": scaler.unscale_(opt)
    if order != "clip first": nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    stepped = scaler.step(opt)
    if order != "no update": scaler.update()
    if order != "leaves": opt.zero_grad(set_to_none=False)
    return None if order == "silent" else stepped


def window_joint(model, batches, loss_func, opt, scaler, max_norm):
    xb, yb = map(torch.cat, zip(*batches))
    model.zero_grad(); scaler.scale(loss_func(model(xb), yb)).backward()
    scaler.unscale_(opt); nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    stepped = scaler.step(opt); scaler.update(); model.zero_grad()
    return stepped
def window_dirty(model, batches, loss_func, opt, scaler, max_norm):
    opt.zero_grad = lambda set_to_none=True: None
    return window(model, batches, loss_func, opt, scaler, max_norm)
def window_steps(model, batches, loss_func, opt, scaler, max_norm):
    for batch in batches: stepped = window_joint(model, [batch], loss_func, opt, scaler, max_norm)
    return stepped


ANSWERS = {
    "from_byte": ([byte_by_text, byte_by_torch], [byte_ieee, byte_no_subnormals, byte_all_ones, lambda n: "1", lambda n: None]),
    "round_by_chance": ([chance_bits, chance_share], [chance_nearest, chance_global, chance_coin, chance_float, chance_noise, chance_down, lambda x, generator: 1/0]),
    "rms": ([rms_largest, rms_double], [rms_plain, rms_single, rms_returns_single, rms_zero, rms_all, lambda x: 3]),
    "train_window": ([window, window_joint], [window_dirty, window_steps, *[partial(window, order=o) for o in (
        "mean of means", "no scale", "update per batch", "clip first", "no update", "leaves", "silent")]]),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_checkers_know_right_from_wrong(name, capsys):
    from exp.exercises import fp16
    check, (right, wrong) = getattr(fp16, f"check_{name}"), ANSWERS[name]
    for answer in right:
        check(answer)
        assert "✓" in capsys.readouterr().out
    for answer in wrong:
        with pytest.raises(AssertionError) as error: check(answer)
        assert len(str(error.value).split()) >= 6, error.value
    good = {1: 2048, 2: 256, 3: 1024, 4: 32768, 5: 12, 6: 4096}
    fp16.check_predictions(good)
    for key in good:
        with pytest.raises(AssertionError, match=f"{key} is not"): fp16.check_predictions(good | {key: good[key] + 1})

"Answers to the exercises of 05c, 05d and 05e: right ones in other words pass, plausible wrong ones are told why."
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exp.conv import unfold, windows
from exp.exercises import cnn as D, hooks as H, schedules as S
from exp.hooks import Hooks, as_found, find_layers
from exp.learner import Callback
from exp.schedule import combine, constant, cosine, linear


# --- 05c -------------------------------------------------------------------------------------------------------------------

def fall(k, s): return lambda q: k*math.sqrt(s/(s + q*(1 - s)))


def room(a, b):
    if a + b >= 1: raise ValueError(f"a climb of {a} and a decay of {b} leave no plateau")


def pieces(up=linear, down=linear, first=1/25, last=0., check=room):
    def answer(k, a, b):
        check(a, b)
        return combine([a, 1 - a - b, b], [up(k*first, k), constant(k), down(k, k*last)])
    return answer


def room_in_fractions(a, b):
    if 1 - a - b <= 0: raise ValueError("the fractions pct_start and pct_decay leave no room for a plateau")


def by_ifs(k, a, b):
    room(a, b)
    return lambda p: k/25 + k*24/25*p/a if p < a else k if p < 1 - b else k*(1 - (p - (1 - b))/b)


def by_interp(k, a, b):
    room(a, b)
    return lambda p: float(np.interp(p, [0, a, 1 - b, 1], [k/25, k, k, 0]))


def scaled(schedule, factor): return lambda p: factor*schedule(p)


def calls_itself(s, n, d):
    out = [s]
    for _ in range(n - 1): out.insert(0, lambda p: d*out[0](p))
    return out


def calls_itself_too(s, n, d):
    out = [s]
    for _ in range(n - 1):
        s = lambda p: d*s(p)
        out.insert(0, s)
    return out


def each(factor): return lambda s, n, d: [scaled(s, factor(d, n, i)) for i in range(n)]


def recursive(s, n, d):
    out = [s]
    while len(out) < n: out.insert(0, scaled(out[0], d))
    return tuple(out)


def greedy(n, start):
    V, out = start**2, []
    for _ in range(n):
        out.append(V/(V + 1))
        V = (1 - out[-1])**2*V + out[-1]**2
    return out


NUMBERS = dict(last=.99, restart=4/13, effective=10, floor=.5, falling=.25)
WINNERS = {100: "restarts", 300: "restarts", 500: "cosine", 700: "cosine"}


# --- 05d -------------------------------------------------------------------------------------------------------------------

def pool(x, size, stride=None): return windows(x, size, size if stride is None else stride).amax((-2, -1))


def pool_square_stride(x, size, stride=None):
    if stride is None: stride = (size, size)
    return windows(x, size, stride).amax((-2, -1))


def pool_columns(x, size, stride=None):
    stride = size if stride is None else stride
    found = windows(x, size, stride)
    return unfold(x, size, stride=stride).view(*x.shape[:2], -1, *found.shape[2:4]).amax(2)


def pool_mean_forward_max(x, size, stride=None):
    found = windows(x, size, size if stride is None else stride)
    return found.mean((-2, -1)) + (found.amax((-2, -1)) - found.mean((-2, -1))).detach()


def pool_in_place(x, size, stride=None):
    out = pool(x, size, stride)
    x.data.clamp_(min=0)
    return out


def paint(x, w, stride=1, padding=0, add=True, cut=True):
    (bs, _, h, width), (_, nf, kh, kw) = x.shape, w.shape
    out = x.new_zeros(bs, nf, (h-1)*stride + kh, (width-1)*stride + kw)
    for a in range(kh):
        for b in range(kw):
            part = out[:, :, a:a + (h-1)*stride + 1:stride, b:b + (width-1)*stride + 1:stride]
            new = torch.einsum("nchw,cf->nfhw", x, w[:, :, a, b])
            part.copy_(part + new if add else new)
    return out[:, :, padding:out.shape[2] - padding, padding:out.shape[3] - padding] if cut else out


def spread_and_convolve(x, w, stride=1, padding=0):
    n, c, h, width = x.shape
    up = x.new_zeros(n, c, (h-1)*stride + 1, (width-1)*stride + 1)
    up[:, :, ::stride, ::stride] = x
    kh, kw = w.shape[2:]
    return F.conv2d(F.pad(up, (kw-1-padding,)*2 + (kh-1-padding,)*2), w.flip(2, 3).transpose(0, 1))


def first(value): return value[0] if isinstance(value, tuple) else value


def field(model, dilation=True, pools=True, nested=True, below=True):
    r = j = 1
    for m in (model.modules() if nested else model.children()):
        if not isinstance(m, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d) if pools else nn.Conv2d): continue
        if not below: j *= first(m.stride)
        r += (first(getattr(m, "dilation", 1)) if dilation else 1)*(first(m.kernel_size) - 1)*j
        if below: j *= first(m.stride)
    return r, j


def field_recursive(model, r=1, j=1):
    for m in model:
        if isinstance(m, nn.Sequential): r, j = field_recursive(m, r, j)
        elif hasattr(m, "kernel_size"): r, j = r + first(getattr(m, "dilation", 1))*(first(m.kernel_size) - 1)*j, j*first(m.stride)
    return torch.tensor([r, j])


def share(w, power=2, of=lambda s: s[..., 0]/s.sum(-1)): return of(torch.linalg.svdvals(w.detach())**power).mean()


SIZES = dict(size=8, params=1184, products=73728, field=19, seen=4)


# --- 05e -------------------------------------------------------------------------------------------------------------------

def outputs(model, xb, keep=lambda out: out.detach().clone(), layers=find_layers):
    found = {}
    with Hooks(layers(model), lambda hook, m, i, out: found.update({hook.name: keep(out)})): model(xb)
    return found


def outputs_by_hand(model, xb, safe=True):
    found, handles = {}, []
    for name, m in find_layers(model).items():
        handles.append(m.register_forward_hook(lambda m, i, out, name=name: found.__setitem__(name, out.detach().clone())))
    try: model(xb)
    except Exception:
        if not safe: handles.clear()
        raise
    finally:
        for handle in handles: handle.remove()
    return found


def outputs_in_eval(model, xb):
    with as_found(model):
        model.eval()
        return outputs(model, xb)


def outputs_by_definition(model, xb):
    found = outputs(model, xb)
    return {name: found[name] for name in find_layers(model)}


class Flow(Callback):
    stat, order, leave = staticmethod(lambda g: g.square().mean().sqrt()), 1, False
    def before_fit(self, learn):
        self.steps, self.now = [], {}
        self.hooks = Hooks(learn.model, self.note, backward=True)
        self.names = [hook.name for hook in self.hooks]
    def note(self, hook, module, grad): self.now[hook.name] = self.stat(grad)
    def after_backward(self, learn): self.steps.append(torch.stack([self.now[name] for name in self.names][::type(self).turn]))
    turn = 1
    def after_fit(self, learn):
        if not self.leave: self.hooks.remove()
        if self.steps: self.rms = torch.stack(self.steps, 1)


class FlowOfLastEpoch(Flow):
    def before_epoch(self, learn): self.steps = []


class FlowOfFirstEpoch(Flow):
    def after_epoch(self, learn): self.hooks.remove()
    def after_backward(self, learn):
        if learn.epoch == 0: super().after_backward(learn)


class FlowAroundForward(Callback):
    def before_fit(self, learn): self.names, self.found = [n for n, _ in learn.model.named_children()], {n: [] for n, _ in learn.model.named_children()}
    def around_forward(self, learn): return Hooks(learn.model, self.note, backward=True) if learn.training else None
    def note(self, hook, module, grad): self.found[hook.name].append(grad.square().mean().sqrt())
    def after_fit(self, learn): self.rms = torch.tensor([self.found[n] for n in self.names])


class FlowRetained(Callback):
    def before_fit(self, learn):
        self.outs, self.columns, self.names = {}, [], [name for name, _ in learn.model.named_children()]
        self.hooks = Hooks(learn.model, self.keep)
    def keep(self, hook, module, inp, out):
        if out.requires_grad: out.retain_grad(); self.outs[hook.name] = out
    def after_backward(self, learn): self.columns.append([self.outs[n].grad.square().mean().sqrt().item() for n in self.names])
    def after_fit(self, learn): self.hooks.remove(); self.rms = torch.tensor(self.columns).T


class FlowOfWeights(Flow):
    def after_backward(self, learn):
        self.steps.append(torch.stack([next((p.grad.square().mean().sqrt() for p in m.parameters()), torch.tensor(0.)) for m in learn.model.children()]))


def memory(model, xb, keep=lambda out: out, layers=find_layers):
    outs = []
    with Hooks(layers(model), lambda hook, m, i, out: outs.append(keep(out))): model(xb)
    return sum({out.untyped_storage().data_ptr(): out.untyped_storage().nbytes() for out in outs}.values())


def memory_of_last_outputs(model, xb):
    with Hooks(find_layers(model), lambda hook, m, i, out: setattr(hook, "out", out)) as hooks: model(xb)
    return sum({s.data_ptr(): s.nbytes() for s in (hook.out.untyped_storage() for hook in hooks)}.values())


def memory_freed(model, xb):
    found = {}
    with Hooks(find_layers(model), lambda hook, m, i, out: found.update({out.untyped_storage().data_ptr(): out.untyped_storage().nbytes()})): model(xb)
    return sum(found.values())


def memory_of_each(model, xb, size=None):
    found = []
    with Hooks(find_layers(model), lambda hook, m, i, out: found.append(out.numel()*(size or out.element_size()))): model(xb)
    return sum(found)


class Ratio(Callback):
    pick, stat, old_first = staticmethod(lambda n, p: p.ndim > 1), staticmethod(torch.std), True
    def before_fit(self, learn): self.columns, self.names = [], [n for n, p in learn.model.named_parameters() if self.pick(n, p)]
    def weights(self, learn): return [p.detach() for n, p in learn.model.named_parameters() if self.pick(n, p)]
    def before_step(self, learn): self.old = [w.clone() for w in self.weights(learn)]
    def after_step(self, learn):
        self.columns.append(torch.stack([self.stat(w - o)/self.stat(o if self.old_first else w) for w, o in zip(self.weights(learn), self.old)]))
    def after_fit(self, learn): self.ratios = torch.stack(self.columns, 1)


class RatioByName(Ratio):
    def before_fit(self, learn): self.log = {n: [] for n, p in learn.model.named_parameters() if p.ndim > 1}
    def before_step(self, learn): self.old = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    def after_step(self, learn):
        for n, p in learn.model.named_parameters():
            if n in self.log: self.log[n].append(((p - self.old[n]).std()/self.old[n].std()).item())
    def after_fit(self, learn): self.ratios, self.names = torch.tensor([*self.log.values()]), [*self.log]


class RatioWithoutSkipped(Ratio):
    def after_step(self, learn):
        if learn.stepped: super().after_step(learn)


class RatioWithoutClone(Ratio):
    def before_step(self, learn): self.old = self.weights(learn)


class RatioOfEpoch(Ratio):
    def before_epoch(self, learn): self.columns = []


def other(cls, **changes): return type(cls.__name__, (cls,), changes)


COUNTS = dict(flops=147456, dead=.25, silenced=8, calls=8, rows=8)


@pytest.mark.parametrize("check, answer", [
    (S.check_inverse_sqrt, lambda k, s: combine([s, 1 - s], [linear(0, k), fall(k, s)])), (S.check_inverse_sqrt, lambda k, s: lambda p: k*p/s if p < s else k*(s/p)**.5),
    (S.check_inverse_sqrt, lambda k, s: lambda p: k*p/s if p < s else k*torch.tensor(s/p).sqrt()),
    (S.check_warm_stable_decay, pieces()), (S.check_warm_stable_decay, pieces(check=room_in_fractions)), (S.check_warm_stable_decay, by_ifs), (S.check_warm_stable_decay, by_interp),
    (S.check_layerwise, recursive), (S.check_layerwise, each(lambda d, n, i: math.exp((n - 1 - i)*math.log(d)))),
    (S.check_greedy_rates, greedy), (S.check_greedy_rates, lambda n, s: np.array(greedy(n, s))), (S.check_greedy_rates, lambda n, s: torch.tensor([1/(1/s**2 + t + 1) for t in range(n)])),
    (S.check_predictions, NUMBERS), (S.check_predictions, {k: torch.tensor(v) for k, v in NUMBERS.items()}),
    (S.check_anytime, WINNERS), (S.check_anytime, {np.int64(k): v for k, v in WINNERS.items()}),
    (D.check_max_pool2d, pool), (D.check_max_pool2d, pool_columns),
    (D.check_conv_transpose2d, paint), (D.check_conv_transpose2d, spread_and_convolve),
    (D.check_receptive_field, field), (D.check_receptive_field, field_recursive),
    (D.check_predictions, SIZES), (D.check_predictions, {k: np.float32(v) for k, v in SIZES.items()}),
    (D.check_product_share, share), (D.check_product_share, lambda w: float((torch.linalg.matrix_norm(w, 2)**2/w.square().sum((-2, -1))).mean())),
    (H.check_outputs_of, outputs), (H.check_outputs_of, outputs_by_hand),
    (H.check_GradientFlow, Flow), (H.check_GradientFlow, FlowRetained),
    (H.check_activation_bytes, memory), (H.check_activation_bytes, lambda m, x: torch.tensor(memory(m, x, lambda out: out.detach()))),
    (H.check_predictions, COUNTS), (H.check_predictions, {k: np.float64(v) for k, v in COUNTS.items()}),
    (H.check_UpdateRatio, Ratio), (H.check_UpdateRatio, RatioByName)])
def test_right_answers_pass(check, answer, capsys):
    check(answer)
    assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize("check, answer, word", [
    (S.check_inverse_sqrt, lambda k, s: lambda p: k*min(p/s, math.sqrt(s/p)), "position 0"), (S.check_inverse_sqrt, lambda k, s: lambda p: k*p/s if p < s else k/math.sqrt(p), "the rate is"),
    (S.check_inverse_sqrt, lambda k, s: lambda p: k*p/s if p < s else k*(1 - p)/(1 - s), "half the rate"), (S.check_inverse_sqrt, lambda k, s: combine([s, 1 - s], [linear(k/25, k), fall(k, s)]), "starts at 0"),
    (S.check_inverse_sqrt, lambda k, s: combine([s, 1 - s], [cosine(0, k), fall(k, s)]), "paper"),
    (S.check_warm_stable_decay, pieces(first=0), "peak/25"), (S.check_warm_stable_decay, pieces(down=cosine), "quarter of the decay"), (S.check_warm_stable_decay, pieces(up=cosine), "quarter of the way"),
    (S.check_warm_stable_decay, pieces(last=1/25), "decay"), (S.check_warm_stable_decay, pieces(check=lambda a, b: None), "plateau"),
    (S.check_layerwise, lambda s, n, d: [lambda p: s(p)*d**(n - 1 - i) for i in range(n)], "loop"), (S.check_layerwise, each(lambda d, n, i: d**i), "position 0"),
    (S.check_layerwise, each(lambda d, n, i: 1 - d*(n - 1 - i)), "position 0"), (S.check_layerwise, lambda s, n, d: [s(0)*d**(n - 1 - i) for i in range(n)], "not a number"),
    (S.check_layerwise, each(lambda d, n, i: .5**(n - 1 - i)), "in a fit"),
    (S.check_layerwise, calls_itself, "without end"), (S.check_layerwise, calls_itself_too, "without end"),
    (S.check_layerwise, lambda s, n, d: [linear(s(0)*d**(n - 1 - i), s(1)*d**(n - 1 - i)) for i in range(n)], "position 0.25"),
    (S.check_layerwise, lambda s, n, d: [linear(s(0)*d**(n - 1 - i), 0) for i in range(n)], "position 0.25"),
    (S.check_greedy_rates, lambda n, s: [1/(1/s + t + 1) for t in range(n)], "derivative"), (S.check_greedy_rates, lambda n, s: [1/(t + 1) for t in range(n)], "derivative"),
    (S.check_greedy_rates, lambda n, s: [.1]*n, "derivative"), (S.check_greedy_rates, lambda n, s: greedy(n + 1, s), "one a step"), (S.check_greedy_rates, lambda n, s: [None]*n, "return a list"),
    (S.check_predictions, NUMBERS | dict(last=1), "behind"), (S.check_predictions, NUMBERS | dict(restart=2/3), "1, 3 and 9"), (S.check_predictions, NUMBERS | dict(floor=2), "σ²"), (S.check_predictions, NUMBERS | dict(effective=1.1), "1-μ"),
    (S.check_anytime, dict.fromkeys(WINNERS, "restarts"), "step 500"), (S.check_anytime, dict.fromkeys(WINNERS, "cosine"), "step 100"), (S.check_anytime, WINNERS | {700: "restarts"}, "step 700"), (S.check_anytime, WINNERS | {100: ["restarts"]}, "answer 'cosine'"),
    (D.check_max_pool2d, lambda x, size, stride=None: pool(x, size, stride or 1), "default stride"), (D.check_max_pool2d, lambda x, size, stride=None: windows(x, size, stride or size).amax((2, 3)), "axes"),
    (D.check_max_pool2d, pool_square_stride, "raised"), (D.check_max_pool2d, lambda x, size, stride=None: pool(x, size, stride or first(size)), "default stride"),
    (D.check_max_pool2d, lambda x, size, stride=None: pool(x.detach(), size, stride), "detached"), (D.check_max_pool2d, pool_mean_forward_max, "largest pixel"), (D.check_max_pool2d, pool_in_place, "changed"),
    (D.check_max_pool2d, lambda x, size, stride=None: pool(x, size, stride).tolist(), "return a tensor"),
    (D.check_conv_transpose2d, lambda x, w, stride=1, padding=0: paint(x, w.flip(2, 3), stride, padding), "unflipped"), (D.check_conv_transpose2d, partial(paint, add=False), "paint"),
    (D.check_conv_transpose2d, lambda x, w, stride=1, padding=0: paint(x, w, stride, padding).float(), "float32"),
    (D.check_conv_transpose2d, partial(paint, cut=False), "2p rows"), (D.check_conv_transpose2d, lambda x, w, stride=1, padding=0: paint(x[:, :1], w[:1], stride, padding), "channels"),
    (D.check_receptive_field, partial(field, dilation=False), "dilated"), (D.check_receptive_field, partial(field, pools=False), "max pool"), (D.check_receptive_field, partial(field, nested=False), "nested"),
    (D.check_receptive_field, partial(field, below=False), "below"), (D.check_receptive_field, lambda model: field(model)[0], "pair"),
    (D.check_predictions, SIZES | dict(params=4640), "groups"), (D.check_predictions, SIZES | dict(field=17), "grows"), (D.check_predictions, SIZES | dict(seen=16), "groups"),
    (D.check_product_share, partial(share, power=1), "square"), (D.check_product_share, partial(share, of=lambda s: s[..., 0].sum()/s.sum()), "one share per filter"),
    (D.check_product_share, lambda w: share(w.flatten(1)), "every filter"), (D.check_product_share, partial(share, of=lambda s: s[..., 0]/(s[..., 0] + s[..., 1])), "three equal"), (D.check_product_share, lambda w: [1], "one number"),
    (H.check_outputs_of, lambda m, x: outputs(m, x, lambda out: out.detach()), "in place"), (H.check_outputs_of, lambda m, x: outputs(m, x, lambda out: out.clone()), "detach"),
    (H.check_outputs_of, lambda m, x: outputs(m, x, layers=lambda m: m), "keys"), (H.check_outputs_of, partial(outputs_by_hand, safe=False), "failed"),
    (H.check_outputs_of, outputs_in_eval, "mode"), (H.check_outputs_of, outputs_by_definition, "order"), (H.check_outputs_of, lambda m, x: outputs(m, x, lambda out: out.tolist()), "a tensor"),
    (H.check_GradientFlow, other(Flow, turn=-1), "upside down"), (H.check_GradientFlow, other(Flow, leave=True), "remove"), (H.check_GradientFlow, other(Flow, stat=staticmethod(torch.norm)), "mean"), (H.check_GradientFlow, FlowOfWeights, "output"),
    (H.check_GradientFlow, FlowOfLastEpoch, "all epochs"), (H.check_GradientFlow, FlowOfFirstEpoch, "all epochs"), (H.check_GradientFlow, FlowAroundForward, "around_forward"),
    (H.check_activation_bytes, memory_of_last_outputs, "twice"), (H.check_activation_bytes, memory_freed, "freed"), (H.check_activation_bytes, memory_of_each, "once"), (H.check_activation_bytes, partial(memory_of_each, size=4), "double"),
    (H.check_activation_bytes, lambda m, x: memory(m, x, layers=lambda m: m), "blocks"), (H.check_activation_bytes, lambda m, x: [1], "one number"),
    (H.check_predictions, COUNTS | dict(flops=73728), "2 ×"), (H.check_predictions, COUNTS | dict(silenced=4), "groups"), (H.check_predictions, COUNTS | dict(rows=9), "150"), (H.check_predictions, COUNTS | dict(calls=4), "twice"),
    (H.check_UpdateRatio, other(Ratio, pick=staticmethod(lambda n, p: n.endswith("weight"))), "norms"), (H.check_UpdateRatio, other(Ratio, pick=staticmethod(lambda n, p: True)), "biases"),
    (H.check_UpdateRatio, other(Ratio, old_first=False), "before it"), (H.check_UpdateRatio, other(Ratio, stat=staticmethod(torch.norm)), "std"), (H.check_UpdateRatio, RatioWithoutClone, "clone"), (H.check_UpdateRatio, RatioWithoutSkipped, "eight steps"), (H.check_UpdateRatio, RatioOfEpoch, "eight steps")])
def test_wrong_answers_are_told_why(check, answer, word):
    with pytest.raises(AssertionError, match=word): check(answer)

"exp.mixup: Beta draws, mixed batches that leave no trace, boxes and their areas, smoothing in training only; and the checkers of its exercises."
import copy
import math
import pickle
import random
from collections import namedtuple
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import data
from hypothesis import given, settings, strategies as st
from learners import At, equal, history, make, notes, raises, weights
from pictures import gen
from torch import nn

from exp import learner as L
from exp.callbacks import EMA, GradientAccumulation, GradientClip, Recorder, TerminateOnNaN, ValidateEvery
from exp.mixup import CutMix, LabelSmoothingCrossEntropy, Mixer, MixUp, blend, draw_beta, mixed_loss, paste
from exp.setup import set_seed
from exp.testing import test_like as like


def photos(n=8, c=3, h=12, w=10, seed=0): return torch.randn(n, c, h, w, generator=gen(seed))
def chance(n, alpha, seed, draw=draw_beta): g = gen(seed); return torch.randperm(n, generator=g), draw(alpha, g)


# --- Beta ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("alpha", [.05, .2, .4, 1., 2., 8.])
def test_draws_follow_beta(alpha):
    g, n = gen(1), 30_000
    ours = torch.tensor([draw_beta(alpha, g) for _ in range(n)]).double()
    torch.manual_seed(0)
    theirs = torch.distributions.Beta(alpha, alpha).sample((100_000,)).double()
    def moment(k): return central_moment(alpha, k)
    variance, fourth = moment(2), moment(4)
    assert 0 <= ours.min() and ours.max() <= 1 and abs(ours.mean() - .5) < 5*(variance/n)**.5
    error = ((fourth - variance**2)/n)**.5                                                         # standard error of a variance around a known mean
    assert abs(((ours - .5)**2).mean() - variance) < 5*error and 5*error < .06*variance
    grid = torch.linspace(.02, .98, 97).double()[:, None]
    assert ((ours <= grid).double().mean(1) - (theirs <= grid).double().mean(1)).abs().max() < 2.5*(1/n + 1e-5)**.5      # Kolmogorov, far beyond 1 in 10,000


def central_moment(alpha, k):
    "The k-th central moment of Beta(α, α), k even: of (2λ - 1)/2, whose square is Beta(½, α)."
    return .5**k*math.prod((.5 + i)/(.5 + alpha + i) for i in range(k//2))


def test_extremes_of_alpha():
    for alpha in (1e-300, 1e-9, 1e-4, 1e6):
        g = gen(0)
        draws = [draw_beta(alpha, g) for _ in range(50)]
        assert all(0 <= x <= 1 for x in draws) and (alpha > 1 or sum(min(x, 1 - x) < 1e-6 for x in draws) == 50)
        assert alpha < 1 or max(abs(x - .5) for x in draws) < .01
    for bad in (0, 0., -.4, math.nan, math.inf):
        for make_one in (draw_beta, MixUp, CutMix):
            with pytest.raises(ValueError, match="alpha is .*leave the callback out"): make_one(bad)


def test_the_generator_decides():
    state, g = torch.get_rng_state(), gen(3)
    first = [draw_beta(.4, g) for _ in range(5)] + [CutMix().box(28, 28, g)]
    g.manual_seed(3)
    assert first == [draw_beta(.4, g) for _ in range(5)] + [CutMix(generator=g).box(28, 28)], "a box is drawn by the mixer's own generator"
    assert torch.equal(state, torch.get_rng_state())
    g.manual_seed(3)
    assert first == [draw_beta(.4, g) for _ in range(5)] + [CutMix().box(28, 28, g)] and first[0] != first[1]
    set_seed(5); one = draw_beta(.4); set_seed(5)
    assert one == draw_beta(.4)


# --- two losses ------------------------------------------------------------------------------------------------------------

@settings(max_examples=15)
@given(K=st.integers(2, 7), n=st.integers(1, 9), lam=st.floats(0, 1), seed=st.integers(0, 99))
def test_two_losses_are_one_with_soft_targets(K, n, lam, seed):
    g = gen(seed)
    pred, y, partner = torch.randn(n, K, generator=g).double(), torch.randint(K, (n,), generator=g), torch.randperm(n, generator=g)
    soft = lam*F.one_hot(y, K).double() + (1 - lam)*F.one_hot(y, K).double()[partner]
    like(mixed_loss(F.cross_entropy, pred, y, partner, lam), F.cross_entropy(pred, soft), rtol=1e-12, atol=1e-12)
    rows = F.one_hot(y, K).double()
    like(mixed_loss(F.binary_cross_entropy_with_logits, pred, rows, partner, lam), F.binary_cross_entropy_with_logits(pred, soft), rtol=1e-12, atol=1e-12)
    smooth = LabelSmoothingCrossEntropy(.1)
    like(mixed_loss(smooth, pred, y, partner, lam), F.cross_entropy(pred, .9*soft + .1/K), rtol=1e-12, atol=1e-12)
    constant = lam*(1 - lam)*(rows - rows[partner]).square().mean()
    like(mixed_loss(F.mse_loss, pred, rows, partner, lam), F.mse_loss(pred, soft) + constant, rtol=1e-10, atol=1e-12)


def test_weights_and_ignored_targets_keep_their_meaning():
    pred, y, partner, lam = torch.randn(30, 3).double(), torch.randint(3, (30,)), torch.randperm(30), .3
    y[:4] = -100
    weight = torch.tensor([1., 2., 5.]).double()
    each = [F.cross_entropy(pred, t, weight, reduction="none") for t in (y, y[partner])]
    like(mixed_loss(partial(F.cross_entropy, weight=weight), pred, y, partner, lam), (lam*each[0] + (1 - lam)*each[1]).sum()/weight[y[4:]].sum(), rtol=1e-12)
    soft = lam*F.one_hot(y[4:], 3).double() + .7*F.one_hot(y[4:].flip(0), 3)
    like(F.cross_entropy(pred[4:], soft, weight), (-(soft*weight*pred[4:].log_softmax(1)).sum(1)).mean(), rtol=1e-12)   # another denominator


def test_targets_may_be_nested():
    pair = namedtuple("Pair", "a b")
    a, b, partner = torch.arange(4.), torch.arange(8.).view(4, 2), torch.tensor([1, 0, 3, 2])
    def loss(pred, y): return (y["deep"][0] if isinstance(y, dict) else y[0]).mul(torch.arange(4.)).sum()
    want = .3*loss(0, (a, b)) + .7*loss(0, (a[partner], b))
    for y in ((a, b), [a, b], pair(a, b), {"deep": (a, b)}): like(mixed_loss(loss, 0, y, partner, .3), want)


def test_lists_of_entries_go_as_entries_and_what_fits_nowhere_is_named():
    y = [{"boxes": torch.full((i + 1, 4), float(i)), "name": i} for i in range(4)]
    partner, seen = torch.tensor([1, 0, 3, 2]), []
    def loss(pred, y): seen.append(y); return torch.tensor(0.)
    mixed_loss(loss, 0, y, partner, .3)
    assert [entry["name"] for entry in seen[1]] == [1, 0, 3, 2] and all(len(e["boxes"]) == e["name"] + 1 for e in seen[1]) and seen[0] is y
    class Named(dict): "As of a collate function."
    mixed_loss(loss, 0, Named(a=torch.arange(4), words=["a", "b", "c", "d"], none=None), partner, .3)
    got = seen.pop()
    assert type(got) is Named and got["a"].tolist() == [1, 0, 3, 2] and got["words"] == ["b", "a", "d", "c"] and got["none"] is None
    mixed_loss(lambda pred, y: torch.tensor(float(y is None)), 0, None, partner, .3)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3)]*4)
    for odd in (torch.arange(3), torch.tensor(1.), [torch.zeros(2)]*3, (torch.arange(4), [1, 2]), 7, packed):
        with pytest.raises(TypeError, match="in a batch of 4: to be mixed it must have 4 items"): mixed_loss(loss, 0, odd, partner, .3)


# --- blend and paste -------------------------------------------------------------------------------------------------------

@given(n=st.integers(1, 6), c=st.sampled_from([1, 3]), h=st.integers(1, 9), w=st.integers(1, 9), lam=st.floats(0, 1), seed=st.integers(0, 99))
def test_blend_and_paste(n, c, h, w, lam, seed):
    x, partner = photos(n, c, h, w, seed), torch.randperm(n, generator=gen(seed))
    before, state = x.clone(), torch.get_rng_state()
    like(blend(x, partner, lam), lam*x + (1 - lam)*x[partner], rtol=1e-5, atol=1e-6)
    top, bottom, left, right, area = CutMix().box(h, w, gen(seed))
    assert 0 <= top <= bottom <= h and 0 <= left <= right <= w and area == 1 - (bottom - top)*(right - left)/(h*w) and 0 <= area <= 1
    mixed, inside = paste(x, partner, (top, bottom, left, right)), torch.zeros(h, w, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    like(mixed, torch.where(inside, x[partner], x), rtol=0, atol=0)
    assert torch.equal(x, before) and torch.equal(state, torch.get_rng_state())
    assert mixed.data_ptr() != x.data_ptr() and blend(x, partner, 1.).data_ptr() != x.data_ptr() and torch.equal(blend(x, partner, 1.), x)


def test_any_floats_and_any_layout():
    x, partner = photos(6), torch.randperm(6)
    for form in (x.half(), x.bfloat16(), x.double(), x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :, ::2]):
        assert blend(form, partner, .3).dtype == form.dtype and paste(form, partner, (1, 3, 2, 4)).dtype == form.dtype
        like(blend(form, partner, .3).float(), .3*form.float() + .7*form[partner].float(), rtol=1e-2, atol=3e-2)
    assert paste(x.to(memory_format=torch.channels_last), partner, (1, 3, 2, 4)).is_contiguous(memory_format=torch.channels_last)
    bytes_ = (x*50 + 100).clamp(0, 255).to(torch.uint8)
    assert paste(bytes_, partner, (0, 3, 0, 3)).dtype == torch.uint8
    for bad in (bytes_, torch.arange(6)):
        with pytest.raises(TypeError, match="x is .*make it floats"): blend(bad, partner, .3)


# --- boxes -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("h, w", [(28, 28), (64, 64), (33, 224)])
def test_mean_lambda_of_boxes(h, w):
    "The law: .6792 ± .005. One million boxes at once, of our rounding; and single boxes are those."
    want, n, uniform = 1/2 + 1/5 - 1/48, 1_000_000, torch.rand(3, 1_000_000, dtype=torch.float64, generator=gen(2))
    def length(centre, side, n): return ((centre + side/2).clamp(0, 1)*n).round() - ((centre - side/2).clamp(0, 1)*n).round()
    side = (1 - uniform[0]).sqrt()
    lams = 1 - length(uniform[1], side, h)*length(uniform[2], side, w)/(h*w)
    assert 5*lams.std()/n**.5 < .0015 and abs(lams.mean() - want) < .002
    g = gen(3)
    for _ in range(200):
        state = g.get_state()
        *_, lam = CutMix().box(h, w, g)
        g.set_state(state)
        share, (y, x) = torch.tensor(1 - draw_beta(1., g)).double(), torch.rand(2, dtype=torch.float64, generator=g)
        assert abs(lam - (1 - length(y, share.sqrt(), h)*length(x, share.sqrt(), w)/(h*w)).item()) < 1.5/min(h, w)     # an edge may round the other way


def test_boxes_have_the_photos_shape_and_a_centre_anywhere():
    g = gen(0)
    boxes = torch.tensor([CutMix().box(40, 80, g)[:4] for _ in range(4000)]).double()
    height, width = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    whole = (boxes[:, 0] > 0) & (boxes[:, 1] < 40) & (boxes[:, 2] > 0) & (boxes[:, 3] < 80)
    assert (2*height - width)[whole].abs().max() <= 3 and whole.sum() > 500
    middle = (boxes[:, 2] + boxes[:, 3])/2
    assert abs(middle.mean() - 40) < 1.5 and boxes[:, 2].min() == 0 and boxes[:, 3].max() == 80
    small = torch.tensor([CutMix(8.).box(40, 80, g)[4] for _ in range(500)])
    assert small.std() < .2 < torch.tensor([CutMix(.2).box(40, 80, g)[4] for _ in range(500)]).std()


# --- in a learner ----------------------------------------------------------------------------------------------------------

def image_learner(cbs=(), n=12, bs=4, seed=0, **kwargs):
    set_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x, y = photos(n), torch.randint(3, (n,), generator=gen(1))
    dl = [(x[i:i+bs], y[i:i+bs]) for i in range(0, n, bs)]
    return make(cbs, dls=kwargs.pop("dls", L.DataLoaders(dl, dl)), net=net, **kwargs)


@pytest.mark.parametrize("kind", [MixUp, CutMix])
def test_a_step_is_the_step_by_hand(kind):
    learn = image_learner(kind(1., gen(7)), n=6, bs=6)
    x, y = learn.dls.train[0]
    start, x0, y0 = copy.deepcopy(learn.model), x.clone(), y.clone()
    learn.fit(1)
    g = gen(7)
    partner = torch.randperm(6, generator=g)
    if kind is MixUp: lam = draw_beta(1., g); mixed = lam*x + (1 - lam)*x[partner]
    else: *box, lam = CutMix().box(12, 10, g); mixed = paste(x, partner, box)
    pred = start.train()(mixed)
    loss = lam*F.cross_entropy(pred, y) + (1 - lam)*F.cross_entropy(pred, y[partner])
    loss.backward()
    for p, q in zip(learn.model.parameters(), start.parameters()): like(p.detach(), (q - .1*q.grad).detach(), rtol=1e-4, atol=1e-5)
    like(learn.history[0]["train_loss"], loss.item(), rtol=1e-5)
    assert learn.cb(kind).lam == lam and torch.equal(x, x0) and torch.equal(y, y0)


def test_only_training_is_mixed_and_nothing_stays():
    seen = []
    def look(learn): seen.append((learn.mode, learn.xb.data_ptr() in owned, learn.loss_func is func, learn.batch_loss_func is not None, learn.yb))
    class Look(L.Callback):
        def after_pred(self, learn): look(learn)
    learn = image_learner([MixUp(), Look()])
    owned, func = {x.data_ptr() for x, _ in learn.dls.train}, learn.loss_func
    learn.fit(1); learn.validate(); learn.predict()
    assert [mode for mode, *_ in seen] == ["train"]*3 + ["validate"]*6 + ["predict"]*3
    assert all(own == (mode != "train") and same for mode, own, same, *_ in seen) and learn.batch_loss_func is None
    assert all(wrapped == (mode == "train") for mode, _, _, wrapped, _ in seen)
    assert all(torch.equal(yb, y) for (*_, yb), (_, y) in zip(seen[:3], learn.dls.train))           # learn.yb is the items' own
    plain = image_learner()
    plain.model.load_state_dict(learn.model.state_dict())
    assert plain.validate() == learn.validate() and torch.equal(plain.predict(), learn.predict())


def test_a_validation_in_the_middle_is_plain():
    rows = []
    class Within(L.Callback):
        def after_pred(self, learn):
            if learn.training: rows.append((learn.validate(), learn.predict(), copy.deepcopy(learn.model.state_dict())))
    learn = image_learner([CutMix(), Within()])
    learn.fit(1)
    alone = image_learner()
    for row, preds, state in rows:
        alone.model.load_state_dict(state)
        assert alone.validate() == row and torch.equal(alone.predict(), preds)
    undisturbed = image_learner(CutMix())
    undisturbed.fit(1)
    assert equal(weights(undisturbed), weights(learn))                                              # it used up no chance, and the batch was mixed all the same
    learn = image_learner([MixUp(), ValidateEvery(1)])
    learn.fit(1)
    assert [row["step"] for row in learn.history if "step" in row] == [1, 2]


def test_some_batches_may_stay_unmixed():
    class Late(MixUp):
        def before_batch(self, learn):
            if learn.epoch >= 1: super().before_batch(learn)
    mixer = Late(); make(mixer).fit(2)
    assert mixer.lam != 1


@pytest.mark.parametrize("event", ["before_batch", "after_pred", "after_loss", "after_backward", "before_step", "after_step", "after_batch"])
def test_whatever_ends_a_batch_nothing_stays_of_it(event):
    def fine(learn):
        assert learn.validate() == learn.validate() and learn.batch_loss_func is None
        plain = image_learner()
        plain.model.load_state_dict(learn.model.state_dict())
        assert plain.validate() == learn.validate()
        learn.fit(1)
    for error in (L.CancelBatch(), L.CancelEpoch(), L.CancelFit()):
        learn = image_learner([MixUp(), At(event, raises(error), n=1, order=90)])
        learn.fit(1); fine(learn)
    learn = image_learner([MixUp(), At(event, raises(OSError("disk")), n=1, order=90)])
    with pytest.raises(OSError, match="disk"): learn.fit(1)
    fine(learn)


def test_an_error_in_loss_or_mix_leaves_nothing():
    def broken(pred, yb): raise ZeroDivisionError("loss")
    learn = image_learner(MixUp(), loss_func=broken)
    with pytest.raises(ZeroDivisionError, match="loss") as caught: learn.fit(1)
    assert "training batch 0" in notes(caught.value)
    learn.loss_func = F.cross_entropy
    assert learn.validate() and learn.batch_loss_func is None
    learn = image_learner(MixUp(), loss_func=lambda pred, yb: F.cross_entropy(pred, yb, reduction="none"))
    with pytest.raises(TypeError, match="the loss is .4,. float32: return one number"): learn.fit(1)


def test_two_mixers_are_refused():
    learn = image_learner([MixUp(), CutMix()])
    with pytest.raises(ValueError, match="another callback makes this batch's loss: give one mixer"): learn.fit(1)
    assert learn.validate() and learn.batch_loss_func is None
    with pytest.raises(NotImplementedError): image_learner(Mixer(1.)).fit(1)


def like_image_learner(cls, cbs): one = image_learner(cbs); return cls(one.model, one.dls, F.cross_entropy, lr=.1, cbs=cbs, quiet=True, device="cpu")


def test_learners_of_other_kinds():
    class Plus(L.Learner):
        def get_loss(self, pred, yb): return super().get_loss(pred, yb)
    class ByHand(L.Learner):
        def train_batch(self):
            pred = self.forward(self.xb)
            self.backward(self.loss_func(pred, self.yb))
            self.step()
    class Halves(L.Learner):
        def train_batch(self): self.zero_grad(); self.backward(self.get_loss(self.forward(self.xb), self.yb)/2); self.step()
    plain = like_image_learner(L.Learner, MixUp(1., gen(3))); plain.fit(1)
    plus = like_image_learner(Plus, MixUp(1., gen(3))); plus.fit(1)
    assert equal(weights(plain), weights(plus)) and history(plain) == history(plus)
    half = like_image_learner(Halves, MixUp(1., gen(3))); half.fit(1)
    hand = like_image_learner(ByHand, MixUp()); before = weights(hand)
    with pytest.raises(RuntimeError, match="mixed, but its loss was not: in train_batch compute it by get_loss"): hand.fit(1)
    assert equal(before, weights(hand))                                                             # before a step was taken
    like(half.history[0]["train_loss"], plain.history[0]["train_loss"]/2, rtol=.2)


def test_a_closure_optimizer_is_heard():
    class Twice(torch.optim.SGD):
        "As LBFGS does: asks its closure more than once."
        def step(self, closure): closure(); return super().step(closure)
    class ByClosure(L.Learner):
        def train_batch(self):
            def closure():
                self.zero_grad()
                loss = self.get_loss(self.forward(self.xb), self.yb)
                loss.backward()
                return loss
            self.opt.step(closure)
            self.stepped = True
    heard, mixer = [], MixUp(1., gen(2))
    one = image_learner()
    learn = ByClosure(one.model, one.dls, F.cross_entropy, partial(Twice), .1, cbs=[mixer, At("after_loss", lambda learn: heard.append(learn.loss.item()))], quiet=True, device="cpu")
    learn.fit(1)
    assert math.isfinite(learn.history[0]["train_loss"]) and heard and mixer._asked


def test_a_copy_made_within_a_batch_is_plain():
    copies = []
    def keep(learn): copies.append((copy.deepcopy(learn), pickle.loads(pickle.dumps(learn.model))))
    learn = image_learner([MixUp(), At("after_pred", keep)])
    learn.fit(1)
    (other, model), alone = copies[0], image_learner()
    alone.model.load_state_dict(model.state_dict())
    assert other.batch_loss_func is None and other.validate() == alone.validate()
    other.remove_cb(other.cbs[-1]); other.fit(1)
    plain = make([MixUp(1., gen(0))])
    rows = []
    plain.add_cb(At("after_pred", lambda learn: rows.append({k: v for k, v in learn.__getstate__().items() if k == "batch_loss_func"})))
    plain.fit(1)
    assert rows == [{"batch_loss_func": None}]


def test_callbacks_that_change_a_batch_are_heard_first():
    x, y = photos(6), torch.randint(3, (6,))
    class Target(L.Callback):
        def before_batch(self, learn): learn.yb = learn.xb
    net, seen = nn.Conv2d(3, 3, 1), []
    learn = make([MixUp(1., gen(5)), Target(), At("after_loss", lambda learn: seen.append((learn.pred, learn.loss)), order=90)], dls=L.DataLoaders([(x, y)]), net=net, loss_func=F.mse_loss)
    learn.fit(1)
    partner, lam = chance(6, 1., 5)
    (pred, loss), = seen
    like(loss, lam*F.mse_loss(pred, x) + (1 - lam)*F.mse_loss(pred, x[partner]), rtol=1e-5)
    class Reverse(L.Callback):
        def before_batch(self, learn): learn.xb, learn.yb = learn.xb.flip(0), learn.yb.flip(0)
    turned = image_learner([CutMix(1., gen(5)), Reverse()], dls=L.DataLoaders([(x, y)]))
    straight = image_learner(CutMix(1., gen(5)), dls=L.DataLoaders([(x.flip(0), y.flip(0))]))
    turned.fit(1); straight.fit(1)
    assert equal(weights(turned), weights(straight))
    def shorten(learn): learn.yb = learn.yb[:3]
    for order in (0, 90):
        learn = image_learner([MixUp(), At("before_batch", shorten, order=order)], dls=L.DataLoaders([(x, y)]))
        with pytest.raises(TypeError, match="in a batch of 6: to be mixed it must have 6 items"): learn.fit(1)


def test_cutmix_refuses_a_target_for_every_pixel():
    x = photos(4)
    for y in (torch.zeros(4, 12, 10).long(), x, (torch.arange(4), torch.zeros(4, 1, 12, 10)), {"mask": torch.zeros(4, 6, 5)}):
        with pytest.raises(ValueError, match="CutMix got yb .*labels of whole photos"): image_learner(CutMix(), dls=L.DataLoaders([(x, y)])).fit(1)
    for y in (torch.arange(4) % 3, torch.rand(4, 3).softmax(1)): image_learner(CutMix(), dls=L.DataLoaders([(x, y)]), loss_func=F.cross_entropy).fit(1)
    learn = make(MixUp(), dls=L.DataLoaders([(x, x)]), net=nn.Conv2d(3, 3, 1), loss_func=F.mse_loss)
    learn.fit(1)                                                                                   # MixUp's pixels are mixed as their targets are


def test_a_batch_of_one_and_a_learner_of_its_own():
    for cb in (MixUp(), CutMix()):
        learn = image_learner(cb, n=3, bs=1)
        for m in learn.model.modules():
            if isinstance(m, nn.BatchNorm2d): m.eps = .1
        learn.fit(1)
        assert all(p.isfinite().all() for p in learn.model.parameters())
    x, y = photos(1), torch.tensor([2])
    learn = image_learner(MixUp(1., gen(0)), dls=L.DataLoaders([(x, y)]))
    plain = image_learner(dls=L.DataLoaders([(x, y)]))
    learn.fit(1); plain.fit(1)
    for p, q in zip(weights(learn), weights(plain)): like(p, q, rtol=1e-4, atol=1e-5)               # mixed with itself it is itself
    like(learn.history[0]["train_loss"], plain.history[0]["train_loss"], rtol=1e-5)
    one = torch.tensor([0])
    like(MixUp(1., gen(0)).mix(x, one)[0], x, rtol=1e-6, atol=1e-6); like(CutMix(1., gen(0)).mix(x, one)[0], x, rtol=0, atol=0)


class Both(nn.Module):
    def __init__(self): super().__init__(); self.layer = nn.Linear(6, 2)
    def forward(self, a, b, c=None): return self.layer(a) + self.layer(b)


def test_several_inputs_are_mixed_alike():
    x, y = data(8)
    for xb in ((x, 2*x), [x, 2*x], {"a": x, "b": 2*x}, {"a": x, "b": 2*x, "c": None}):
        seen = []
        learn = make([MixUp(.4, gen(3)), At("after_pred", lambda learn: seen.append(learn.xb))], dls=L.DataLoaders([(xb, y)]), net=Both())
        learn.fit(1)
        partner, lam = chance(8, .4, 3)
        a, b, *none = seen[0].values() if isinstance(xb, dict) else seen[0]
        assert not none or none == [None]
        like(a, lam*x + (1 - lam)*x[partner], rtol=1e-5, atol=1e-6); like(b, 2*a, rtol=1e-5, atol=1e-6)
        assert type(seen[0]) is type(xb)
    learn = make(MixUp(), dls=L.DataLoaders([((x, y), y)]), net=Both())
    with pytest.raises(TypeError, match=r"x is \(8,\) int64: make it floats"): learn.fit(1)
    for xb in (x, (photos(8), photos(8))):
        with pytest.raises(ValueError, match="CutMix got xb .*one tensor of photos"): make(CutMix(), dls=L.DataLoaders([(xb, y)])).fit(1)


class Around(L.Callback):
    "As a half precision would be: around model and loss."
    def __init__(self): self.inside, self.entered = False, 0
    def around_forward(self, learn):
        @contextmanager
        def hold():
            self.inside, self.entered = True, self.entered + 1
            with torch.autocast("cpu", torch.bfloat16): yield
            self.inside = False
        return hold()


def test_loss_is_computed_where_half_precision_listens_and_heard_once():
    around, heard, dtypes = Around(), [], set()
    def loss(pred, yb): assert around.inside; dtypes.add(pred.dtype); return F.cross_entropy(pred, yb)
    class Hear(L.Callback):
        def after_loss(self, learn): heard.append(learn.mode)
    image_learner([around, MixUp(), Hear()], loss_func=loss).fit(1)
    assert heard == ["train"]*3 + ["validate"]*3 and around.entered == 12 and torch.bfloat16 in dtypes


def test_recorder_and_history_hold_the_mixed_loss():
    rec = Recorder()
    learn = image_learner([MixUp(1., gen(0)), rec, TerminateOnNaN()])
    learn.fit(2)
    assert len(rec.losses) == 6
    like(sum(rec.losses[:3])/3, learn.history[0]["train_loss"], rtol=1e-5)
    like(sum(rec.losses[3:])/3, learn.history[1]["train_loss"], rtol=1e-5)


def test_accumulation_clipping_and_averages_go_with_it():
    learn = image_learner([MixUp(1., gen(4)), GradientAccumulation(3), GradientClip(1e6), EMA(.5)])
    start, dl = copy.deepcopy(learn.model).train(), learn.dls.train
    learn.fit(1)
    g, total = gen(4), 0
    for x, y in dl:
        partner = torch.randperm(4, generator=g)
        lam = draw_beta(1., g)
        total = total + 4*mixed_loss(F.cross_entropy, start(lam*x + (1 - lam)*x[partner]), y, partner, lam)
    (total/12).backward()
    for p, q in zip(learn.model.parameters(), start.parameters()): like(p.detach(), (q - .1*q.grad).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_resume_is_bit_identical(tmp_path, own):
    def learner(): return image_learner(MixUp(.4, gen(9) if own else None))
    class Save(L.Callback):
        order = 80
        def after_epoch(self, learn):
            if learn.epoch == 0: learn.save(tmp_path/"first.pt")
    whole = learner()
    whole.fit(3, cbs=Save())
    again = learner()
    set_seed(123)
    again.fit(3, resume=tmp_path/"first.pt")
    assert equal(weights(whole), weights(again)) and history(whole) == history(again)


def test_the_same_seed_mixes_the_same_and_another_does_not():
    runs = []
    for seed in (0, 0, 1):
        learn = image_learner(MixUp())
        set_seed(seed); learn.fit(1); runs.append(weights(learn))
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])


def test_views_of_a_data_set_are_never_written_to():
    x, y = photos(12), torch.randint(3, (12,))
    before = x.clone()
    for cb in (MixUp(1.), CutMix(1.)): image_learner(cb, dls=L.DataLoaders([(x[i:i+4], y[i:i+4]) for i in (0, 4, 8)])).fit(3)
    assert torch.equal(x, before)


# --- label smoothing -------------------------------------------------------------------------------------------------------

WEIGHT = torch.tensor([1., 2., 5., .5, 0.])


@pytest.mark.parametrize("shape", [(9,), (4, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("eps", [0., .1, .7, 1.])
@pytest.mark.parametrize("options", [{}, {"weight": WEIGHT}, {"ignore_index": 2}, {"weight": WEIGHT, "ignore_index": -1}], ids=str)
def test_smoothing_is_pytorchs(shape, eps, options):
    g = gen(0)
    for size, dtype, tol in ((1, torch.float64, 1e-12), (100, torch.float32, 1e-6), (1, torch.float32, 1e-6)):
        pred = (size*torch.randn(shape[0], 5, *shape[1:], generator=g)).to(dtype).requires_grad_()
        y = torch.randint(5, shape, generator=g)
        y.view(-1)[:3] = torch.tensor([options.get("ignore_index", -100), 0, 1])
        weight = {k: v.to(dtype) for k, v in options.items() if k == "weight"}
        ours = LabelSmoothingCrossEntropy(eps, **options)
        for loss, theirs in ((ours, F.cross_entropy(pred, y, **options | weight, label_smoothing=eps)), (copy.deepcopy(ours).eval(), F.cross_entropy(pred, y, **options | weight))):
            got = loss(pred, y)
            like(got, theirs, rtol=10*tol, atol=10*tol)
            like(*(torch.autograd.grad(x, pred, retain_graph=True)[0] for x in (got, theirs)), rtol=10*tol, atol=tol)


def test_smoothing_gradients_and_limits():
    pred, y = torch.randn(4, 3, dtype=torch.float64, generator=gen(1)).requires_grad_(), torch.tensor([0, 2, 1, 1])
    for loss in (LabelSmoothingCrossEntropy(.2), LabelSmoothingCrossEntropy(.2, torch.tensor([1., 2., 3.]))):
        assert torch.autograd.gradcheck(lambda p, loss=loss: loss(p, y), pred)
    for K, want in ((2, .1985), (10, .5003)):                                                      # the floor is the entropy of the target
        lead = math.log((1 - .1 + .1/K)/(.1/K))
        best = torch.zeros(1, K, dtype=torch.float64); best[0, 0] = lead
        floor = LabelSmoothingCrossEntropy(.1)(best, torch.tensor([0])).item()
        assert abs(floor - want) < 5e-5
        for step in (-.1, .1):
            near = best.clone(); near[0, 0] += step
            assert LabelSmoothingCrossEntropy(.1)(near, torch.tensor([0])) > floor
    closed = torch.tensor([[0., -math.inf, 1.]])                                                   # a class that cannot be
    like(LabelSmoothingCrossEntropy(.1).eval()(closed, torch.tensor([2])), F.cross_entropy(closed, torch.tensor([2])))
    like(LabelSmoothingCrossEntropy(0.)(closed, torch.tensor([2])), F.cross_entropy(closed, torch.tensor([2])))
    half = torch.randn(8, 5, generator=gen(0)).bfloat16()
    like(LabelSmoothingCrossEntropy(.1)(half, torch.arange(8) % 5).float(), F.cross_entropy(half.float(), torch.arange(8) % 5, label_smoothing=.1), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"weight": torch.rand(1000, generator=gen(5)) + .5}], ids=["plain", "weighted"])
def test_smoothing_in_half_precision_sums_in_floats(dtype, options):
    pred, y = torch.randn(64, 1000, generator=gen(0)).to(dtype), torch.randint(1000, (64,), generator=gen(1))
    want = F.cross_entropy(pred.float(), y, **options, label_smoothing=.1)
    for enabled in (True, False):
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = LabelSmoothingCrossEntropy(.1, **options)
            like(loss(pred, y).float(), want, rtol=1e-5)
            like(loss(pred.float(), y).float(), want, rtol=1e-5)
            like(loss.eval()(pred, y).float(), F.cross_entropy(pred.float(), y, **options), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32], ids=str)
def test_class_numbers_of_any_integer_type(dtype):
    pred, y = torch.randn(9, 3, generator=gen(0)), torch.randint(3, (9,), generator=gen(1))
    for weight in (None, torch.tensor([1., 2., 5.])):
        like(LabelSmoothingCrossEntropy(.1, weight)(pred, y.to(dtype)), F.cross_entropy(pred, y, weight, label_smoothing=.1), rtol=1e-5)


def test_smoothing_refuses_what_would_be_another_loss():
    for bad in (-.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="eps is"): LabelSmoothingCrossEntropy(bad)
    for weight in (None, torch.ones(3)):
        for mode in (True, False):
            with pytest.raises(TypeError, match=r"yb is \(4, 3\) float32: give class numbers.*another loss"):
                LabelSmoothingCrossEntropy(.1, weight).train(mode)(torch.randn(4, 3), torch.full((4, 3), 1/3))
    for pred, y in ((torch.randn(4, 3), torch.tensor([0])), (torch.randn(4, 3), torch.tensor([0, 1, 2, 3])), (torch.randn(4, 3), torch.zeros(4, 1).long())):
        with pytest.raises((ValueError, RuntimeError, IndexError), match="xpected|out of bounds|batch_size|shape"): LabelSmoothingCrossEntropy(.1)(pred, y)


def test_the_learner_gives_the_loss_its_mode():
    seen = []
    class Smooth(LabelSmoothingCrossEntropy):
        def forward(self, pred, yb): seen.append(self.training); return super().forward(pred, yb)
    for own in (True, False):
        loss = Smooth(.5, torch.ones(2)).train(own)
        learn = make(loss_func=loss)
        learn.fit(1); row = learn.validate()
        assert loss.training is own and seen == [own]*3 + [False]*4; seen.clear()                  # put into eval mode it stays there
        assert abs(row["valid_loss"] - make(net=learn.model, loss_func=F.cross_entropy).validate()["valid_loss"]) < 1e-6
    mixed = make([MixUp(1., gen(0)), ValidateEvery(1)], loss_func=Smooth(.5))
    mixed.fit(1)
    assert seen.count(True) == 6 and {*seen} == {True, False}                                       # two losses a batch; validation in between is plain
    assert "weight" in LabelSmoothingCrossEntropy(.1, torch.ones(3)).state_dict() and "eps=0.1" in repr(LabelSmoothingCrossEntropy())


# --- rivals ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
def test_torchvision_mixes_the_same(name):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    x, y, partner = photos(16), torch.arange(16) % 5, torch.arange(16).roll(1)
    for seed in range(5):
        torch.manual_seed(seed)
        images, soft = getattr(v2, name)(alpha=1., num_classes=5)(x, y)
        lam = soft[1, y[1]].item()
        if name == "MixUp": ours = blend(x, partner, lam)
        else:
            changed = (images != x).any(1)[0].nonzero()
            if not len(changed): continue
            (top, left), (bottom, right) = changed.amin(0).tolist(), (changed.amax(0) + 1).tolist()
            ours = paste(x, partner, (top, bottom, left, right))
            assert abs(lam - (1 - (bottom - top)*(right - left)/120)) < 1e-5
        like(ours, images, rtol=1e-5, atol=1e-6)
        pred = torch.randn(16, 5)
        like(mixed_loss(F.cross_entropy, pred, y, partner, lam), F.cross_entropy(pred, soft), rtol=1e-5, atol=1e-5)


def test_timm_mixes_the_same():
    timm = pytest.importorskip("timm.data.mixup", exc_type=ImportError)
    x, y, partner = photos(8), torch.arange(8) % 5, torch.arange(8).flip(0)
    set_seed(0)                                                                                    # timm draws by NumPy
    ours = timm.Mixup(mixup_alpha=1., label_smoothing=.1, num_classes=5)
    images, soft = ours(x.clone(), y)
    pred, lam = torch.randn(8, 5), ((soft[0, y[0]] - .02)/.9).item()
    like(blend(x, partner, lam), images, rtol=1e-4, atol=1e-5)
    like(mixed_loss(LabelSmoothingCrossEntropy(.1), pred, y, partner, lam), torch.sum(-soft*F.log_softmax(pred, 1), 1).mean(), rtol=1e-4, atol=1e-5)


# --- exercises -------------------------------------------------------------------------------------------------------------

from exp.exercises.mixup import check_calibration_error, check_OneOf, check_predictions, check_soft_targets, check_SplitMix  # noqa: E402


def one_of(choose, always=False, several=False):
    class OneOf(L.Callback):
        order = 40
        def __init__(self, *mixers): self.mixers, self.n = mixers, -1
        def before_batch(self, learn):
            if always or learn.training: self.n += 1; self.mixers[choose(len(self.mixers), self.n)].before_batch(learn)
    return OneOf


class ByMix(Mixer):
    "A mixer that asks another for its mixture."
    def __init__(self, *mixers): super().__init__(1.); self.mixers = mixers
    def mix(self, xb, partner): return self.mixers[int(torch.randint(len(self.mixers), ()))].mix(xb, partner)


class Delegates:
    "No subclass of Callback, which is no matter to a learner, but asked for."
    def __init__(self, *mixers): self.mixers = mixers
    def before_batch(self, learn): random.choice(self.mixers).before_batch(learn)


class Everyone(L.Callback):
    def __init__(self, *mixers): self.mixers = mixers
    def before_batch(self, learn): self.mixers[0].before_batch(learn); self.mixers[-1].before_batch(learn)


class PhotosOnly(L.Callback):
    "Mixes xb, but not the loss; in training, or always."
    always = False
    def __init__(self, *mixers): self.mixers = mixers
    def before_batch(self, learn):
        if learn.training or self.always: learn.xb, _ = random.choice(self.mixers).mix(learn.xb, torch.randperm(len(learn.xb)))


class Always(PhotosOnly): always = True


class OfAFit(L.Callback):
    def __init__(self, *mixers): self.mixers = mixers
    def before_fit(self, learn): self.chosen = random.choice(self.mixers)
    def before_batch(self, learn): self.chosen.before_batch(learn)


class Nobody(L.Callback):
    def __init__(self, *mixers): pass


class Unseeded(L.Callback):
    def __init__(self, *mixers): self.mixers, self.chance = mixers, random.SystemRandom()
    def before_batch(self, learn):
        if learn.training: self.chance.choice(self.mixers).before_batch(learn)


@pytest.mark.parametrize("answer", [one_of(lambda n, i: int(torch.randint(n, ()))), one_of(lambda n, i: random.randrange(n)), one_of(lambda n, i: int(n*torch.rand(())), always=True), ByMix])
def test_one_of_right(answer, capsys): check_OneOf(answer); assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize("answer, word", [
    (one_of(lambda n, i: 0), "anew for every batch"), (one_of(lambda n, i: i % n), "another seed chose the same"), (PhotosOnly, "their loss was not"), (one_of(lambda n, i: min(n - 1, int(torch.randint(3, ())))), "anew for every batch"), (OfAFit, "anew for every batch"),
    (Everyone, "give one mixer"), (Always, "validation"), (Nobody, "hand before_batch on"), (Unseeded, "PyTorch's chance"), (Delegates, "make it a callback"),
    (one_of(lambda n, i: min(1, int(torch.randint(9, ()) > 7))), "anew for every batch")])
def test_one_of_wrong(answer, word):
    with pytest.raises(AssertionError, match=word): check_OneOf(answer)


def split(keep=lambda share, w: round(share*w), lam=lambda k, w, share: k/w, share=lambda self: draw_beta(self.alpha, self.generator), swap=False, into=torch.clone):
    class SplitMix(Mixer):
        def mix(self, xb, partner):
            part, w = share(self), xb.shape[3]
            k, mixed = keep(part, w), into(xb)
            if swap: mixed[..., :w - k] = xb[partner][..., :w - k]
            else: mixed[..., k:] = xb[partner][..., k:]
            return mixed, lam(k, w, part)
    return SplitMix


class ByWhere(Mixer):
    def mix(self, xb, partner):
        k = round(xb.shape[-1]*(1 - draw_beta(self.alpha, self.generator)))
        return torch.where(torch.arange(xb.shape[-1]) < k, xb, xb[partner]), torch.tensor(k/xb.shape[-1])


class Plain:
    def __init__(self, alpha, generator): pass
    def mix(self, xb, partner): return xb.clone()


@pytest.mark.parametrize("answer", [split(), ByWhere])
def test_split_mix_right(answer, capsys): check_SplitMix(answer); assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize("answer, word", [
    (split(lam=lambda k, w, share: share), "share k/w"), (split(lam=lambda k, w, share: 1 - k/w), "share k/w"), (split(swap=True), "photo's own"),
    (split(into=lambda x: x), "changed"), (split(share=lambda self: draw_beta(1., self.generator)), "α = "), (split(share=lambda self: draw_beta(self.alpha)), "self.generator"),
    (split(share=lambda self: .5), "α = "), (Plain, "two things"), (split(keep=lambda share, w: 3), "share k/w|α = |photo's own")])
def test_split_mix_wrong(answer, word):
    with pytest.raises(AssertionError, match=word): check_SplitMix(answer)


def soft(yb, n_classes, eps=0., partner=None, lam=1.):
    rows = F.one_hot(yb, n_classes).float()
    if partner is not None: rows = lam*rows + (1 - lam)*rows[partner]
    return (1 - eps)*rows + eps/n_classes


def soft_first(yb, n_classes, eps=0., partner=None, lam=1.):
    rows = torch.full((len(yb), n_classes), eps/n_classes).scatter_(1, yb[:, None], 1 - eps + eps/n_classes)
    return rows if partner is None else torch.lerp(rows[partner], rows, lam)


def others(yb, n_classes, eps=0., partner=None, lam=1.):
    def rows(y): return torch.full((len(y), n_classes), eps/(n_classes - 1)).scatter_(1, y[:, None], 1 - eps)
    return rows(yb) if partner is None else lam*rows(yb) + (1 - lam)*rows(yb[partner])


@pytest.mark.parametrize("answer", [soft, soft_first])
def test_soft_targets_right(answer, capsys): check_soft_targets(answer); assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize("answer, word", [
    (others, "ε/K"), (lambda yb, n, eps=0., partner=None, lam=1.: soft(yb, n, eps, partner, 1 - lam if partner is not None else 1.), "λ of the own"),
    (lambda yb, n, eps=0., partner=None, lam=1.: soft(yb, n, eps, partner, lam).double(), "float64"), (lambda yb, n, *a, **k: yb, "shape"),
    (lambda yb, n, eps=0., partner=None, lam=1.: soft(yb, n, 0., partner, lam), "sum to 1"), (lambda yb, n, **k: None, "return"),
    (lambda yb, n, eps=0., partner=None, lam=1.: soft(yb.fill_(1), n, eps, partner, lam), "changed")])
def test_soft_targets_wrong(answer, word):
    with pytest.raises(AssertionError, match=word): check_soft_targets(answer)


def ece(probs, targets, n_bins=10, confidence=None, weigh=True, sign=False, edge=True):
    sure = probs.amax(1) if confidence is None else confidence(probs, targets)
    right, total, used = (probs.argmax(1) == targets).float(), 0., 0
    for b in range(n_bins):
        inside = (sure*n_bins).floor().clamp(max=n_bins - 1 if edge else n_bins) == b
        if not inside.any(): continue
        gap = (right[inside] - sure[inside]).mean().item()
        total, used = total + (gap if sign else abs(gap))*(inside.float().mean().item() if weigh else 1), used + 1
    return abs(total) if weigh else total/max(used, 1)


def ece_tensor(probs, targets, n_bins=10):
    sure, at = probs.max(1)
    edges = torch.linspace(0, 1, n_bins + 1)[1:-1].contiguous()
    bins = torch.bucketize(sure, edges)
    return torch.zeros(n_bins).index_add(0, bins, (at == targets).float() - sure).abs().sum()/len(sure)


@pytest.mark.parametrize("answer", [ece, ece_tensor])
def test_calibration_error_right(answer, capsys): check_calibration_error(answer); assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize("answer, word", [
    (partial(ece, weigh=False), "share of the items"), (partial(ece, sign=True), "do not cancel"), (partial(ece, edge=False), "all wrong|last bin"),
    (partial(ece, confidence=lambda p, t: p[:, 0]), "largest probability"), (partial(ece, confidence=lambda p, t: p.gather(1, t[:, None])[:, 0]), "all wrong"),
    (lambda p, t, n=10: p.mean(1), "one number"), (lambda p, t, n=10: float(p.zero_().sum()), "changed"),
    (lambda p, t, n_bins=10: abs((p.amax(1) - (p.argmax(1) == t).float()).mean().item()), "do not cancel")])
def test_calibration_error_wrong(answer, word):
    with pytest.raises(AssertionError, match=word): check_calibration_error(answer)


def test_predictions(capsys):
    right = dict(variance=.125, perfect=.625, area=.5, floor=.3251, gap=1.)
    check_predictions(right); assert "✓" in capsys.readouterr().out
    check_predictions({k: torch.tensor(v) for k, v in right.items()}); assert "✓" in capsys.readouterr().out
    for key, wrong in (("variance", .25), ("perfect", .5), ("area", .6792), ("floor", 0.), ("floor", .469), ("gap", 0), ("gap", "x"), ("gap", None)):
        with pytest.raises(AssertionError, match=key): check_predictions(right | {key: wrong})
    for odd in (7, [1], "x"):
        with pytest.raises(AssertionError): check_predictions(odd)

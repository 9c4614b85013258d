"exp.augment: chance for each item, one matrix and one sampling, targets that come along, views at test time."
import copy
import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from learners import equal, make, weights
from torch import nn

import exp.augment as A
from exp.augment import (AlternatingFlip, Augment, Brightness, CenterCrop, Contrast, Flip, RandomCrop, RandomErase, RandomResizedCrop, Rotate,
                         Saturation, Warp, Zoom, augment, compose, homography, move_boxes, relight, resample, sampling_grid, tta)
from exp.data import Normalize, Pipeline, Transform
from exp.learner import DataLoaders
from exp.loaders import DataLoader, TensorDataset
from exp.photos import to_float
from exp.testing import test_like as like


def gen(seed=0): return torch.Generator().manual_seed(seed)


def photos(n=6, c=3, h=20, w=28, seed=0, dtype=torch.float32):
    "Smooth photos: little may change where little moves."
    small = torch.rand(n, c, 4, 5, generator=gen(seed), dtype=torch.float64)
    return F.interpolate(small, (h, w), mode="bicubic", align_corners=False).clamp(0, 1).to(dtype)


EVERY = {
    "flip": Flip(), "vertical": Flip(vertical=True), "rotate": Rotate(20), "zoom": Zoom(.7, 1.5), "warp": Warp(.3), "crop": RandomCrop(16, padding=3),
    "resized": RandomResizedCrop(16), "center": CenterCrop(16), "brightness": Brightness(.4), "contrast": Contrast(.4), "saturation": Saturation(.4),
    "erase": RandomErase(), "rarely": Rotate(30, p=.5), "all": Augment(Flip(), Rotate(10), Zoom(1, 1.3), Warp(.2), Brightness(.3), Contrast(.3), Saturation(.3), RandomErase()),
}
every = pytest.mark.parametrize("tfm", EVERY.values(), ids=EVERY)
MOVERS = {name: EVERY[name] for name in ("flip", "vertical", "rotate", "zoom", "warp", "crop", "resized", "rarely")}


# --- chance ----------------------------------------------------------------------------------------------------------------

@every
def test_a_generator_decides_everything(tfm):
    x = photos()
    before, state = x.clone(), torch.get_rng_state()
    a, b, c = tfm(x, gen(1)), tfm(x, gen(1)), tfm(x, gen(2))
    assert torch.equal(a, b) and torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert isinstance(tfm, CenterCrop) and tfm.for_valid() is tfm or not torch.equal(a, c)


@every
def test_shapes_and_kinds_of_photos(tfm):
    for n, c, h, w in ((1, 3, 20, 28), (3, 1, 17, 19), (2, 3, 33, 16), (2, 4, 16, 31), (1, 1, 16, 16)):
        x = photos(n, c, h, w)
        out = tfm(x, gen())
        assert out.shape == (n, c, *(getattr(tfm, "size", None) or (h, w))) and out.dtype == x.dtype and out.isfinite().all()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = photos(dtype=dtype)
        out = tfm(x, gen(3))
        assert out.dtype == dtype
        if not isinstance(tfm, RandomErase) and tfm is not EVERY["all"]: like(out.double(), tfm(x.double(), gen(3)), rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 2e-3)


@every
def test_pixels_that_lie_together_stay_together(tfm):
    x = photos()
    out = tfm(x.contiguous(memory_format=torch.channels_last), gen(1))
    assert out.is_contiguous(memory_format=torch.channels_last) and tfm(x, gen(1)).is_contiguous()
    like(out, tfm(x, gen(1)), rtol=0, atol=1e-5)


@every
def test_every_item_has_a_chance_of_its_own(tfm):
    if tfm is EVERY["center"]: return
    x = photos(1).expand(12, 3, 20, 28)
    out = tfm(x, gen())
    n_different = len({tuple(o.flatten().tolist()) for o in out})
    assert n_different >= (2 if isinstance(tfm, Flip) else 4)


@pytest.mark.parametrize("p", [0., .25, .5, 1.])
def test_flips_are_binomial_and_independent(p):
    n, x = 4000, torch.tensor([0., 1.]).view(1, 1, 1, 2).expand(4000, 1, 1, 2)
    turned = Flip(p)(x, gen(5))[:, 0, 0, 0]
    assert ((turned == 0) | (turned == 1)).all()
    assert abs(turned.mean() - p) < 4*math.sqrt(p*(1 - p)/n) + 1e-9
    pairs = turned.view(-1, 2).mean(1)                                    # neighbours: both, one, none
    for share, want in ((pairs == 1, p*p), (pairs == .5, 2*p*(1 - p)), (pairs == 0, (1 - p)**2)):
        assert abs(share.float().mean() - want) < 4*math.sqrt(want*(1 - want)/(n/2)) + 1e-9


def test_angles_factors_and_zooms_follow_their_law():
    n = 4000
    m = Rotate(30).matrix(n, 50, 50, gen())
    angle = torch.atan2(m[:, 1, 0], m[:, 0, 0])*180/math.pi
    assert angle.abs().max() <= 30 + 1e-4 and abs(angle.mean()) < 1.2 and abs(angle.std() - 30/math.sqrt(3)) < .6
    z = 1/Zoom(.5, 2).matrix(n, 9, 9, gen())[:, 0, 0]
    assert .5 <= z.min() and z.max() <= 2.0001 and abs(z.log().mean()) < .03
    for tfm in (Brightness(.4), Contrast(.4), Saturation(.4)):
        f = tfm.factor(n, gen())
        assert .6 <= f.min() and f.max() <= 1.4 and abs(f.mean() - 1) < .02
        assert 0 < (type(tfm)(.4, p=.3).factor(n, gen()) != 1).float().mean() - .25 < .1
    acts = (Rotate(30, p=.3).matrix(n, 9, 9, gen()) != torch.eye(3)).flatten(1).any(1)
    assert abs(acts.float().mean() - .3) < .03


@pytest.mark.skipif(not torch.cuda.is_available(), reason="another device is needed")
def test_a_generator_elsewhere_gives_photos_here():
    x = photos()
    for tfm in EVERY.values(): like(tfm(x.cuda(), gen(1)).cpu(), tfm(x, gen(1)), rtol=0, atol=1e-3)
    chance = torch.Generator("cuda").manual_seed(0)
    assert all(tfm(x, chance).device.type == "cpu" for tfm in EVERY.values())


# --- what moves pixels -----------------------------------------------------------------------------------------------------

@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_flips_and_crops_copy_bit_for_bit(h, w, seed):
    x = torch.rand(3, 2, h, w, generator=gen(seed))
    for flip, axis in ((Flip(1), -1), (Flip(1, vertical=True), -2)):
        assert torch.equal(flip(x, gen()), x.flip(axis)) and torch.equal(Augment(flip, Flip(1))(x, gen()), x.flip(axis).flip(-1))
    pad = min(h, w)//2
    th, tw = (h + 1)//2, (w + 2)//3
    crop = RandomCrop((th, tw), padding=pad)
    left, top, _, _ = crop.box(3, h, w, gen(seed))
    assert -pad <= left.min() and left.max() <= w - tw + pad and -pad <= top.min() and top.max() <= h - th + pad
    for mode in ("reflection", "border", "zeros"):
        ours = Augment(crop, padding_mode=mode)(x, gen(seed))
        if mode == "reflection": padded = F.pad(torch.cat([x.flip(-1), x, x.flip(-1)], -1), (0, 0)); padded = torch.cat([padded.flip(-2), padded, padded.flip(-2)], -2); at = (h, w)
        else: padded = F.pad(x, (pad,)*4, **({"mode": "replicate"} if mode == "border" else {})); at = (pad, pad)
        for i, (l, t) in enumerate(zip(left.int().tolist(), top.int().tolist())):
            assert torch.equal(ours[i], padded[i, :, at[0] + t:at[0] + t + th, at[1] + l:at[1] + l + tw])


def test_nothing_is_nothing():
    x = photos()
    for tfm in (Augment(), Rotate(0), Zoom(1, 1), Warp(0), Flip(0), Brightness(0), CenterCrop((20, 28)), RandomCrop((20, 28)), RandomErase(0), Rotate(30, p=0)):
        assert torch.equal(tfm(x, gen()), x), tfm
    for tfm in (Contrast(0), Saturation(0)): like(tfm(x, gen()), x, rtol=0, atol=1e-6)
    spoilt = x.clone(); spoilt[0, 0, 0, 0] = math.nan
    assert torch.equal(Flip(1)(spoilt, gen()).nan_to_num(7), spoilt.flip(-1).nan_to_num(7))


@settings(max_examples=20)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_the_grid_is_pytorchs(h, w, nh, nw, seed):
    m = torch.eye(3, dtype=torch.float64) + .3*torch.randn(4, 3, 3, generator=gen(seed), dtype=torch.float64)*torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 0]])
    like(sampling_grid(m, nh, nw), F.affine_grid(m[:, :2], (4, 1, nh, nw), align_corners=False), rtol=0, atol=1e-9)


def test_a_rotation_is_true_in_pixels():
    x = torch.zeros(1, 1, 21, 41)
    x[..., 10, 30] = 1                                                     # ten pixels right of the middle
    class Quarter(Rotate):
        def draw(self, n, h, w, generator):
            m = torch.eye(3).repeat(n, 1, 1)
            m[:, 0, 0] = m[:, 1, 1] = 0
            m[:, 0, 1], m[:, 1, 0] = -h/w, w/h
            return m
    out = Quarter(90)(x, gen())
    assert out[0, 0, 0, 20] == 1 and out.sum() == 1                        # ten pixels above it: counter-clockwise
    draws = Rotate(45).matrix(50, 20, 60, gen())
    side = torch.tensor([[60., 0], [0, 20]])/2
    turn = side @ draws[:, :2, :2] @ side.inverse()
    like(turn @ turn.mT, torch.eye(2).expand(50, 2, 2), rtol=0, atol=1e-5)


def test_rotate_is_pillows():
    from PIL import Image
    x = photos(1, 3, 40, 40)
    im = Image.fromarray((x[0]*255).round().byte().permute(1, 2, 0).numpy())
    class By(Rotate):
        def draw(self, n, h, w, generator):
            m, a = torch.eye(3).repeat(n, 1, 1), math.radians(self.degrees)
            m[:, 0, 0] = m[:, 1, 1] = math.cos(a); m[:, 0, 1], m[:, 1, 0] = -math.sin(a), math.sin(a)
            return m
    import numpy as np
    theirs = torch.from_numpy(np.array(im.rotate(17, Image.BILINEAR))).permute(2, 0, 1)/255
    mine = By(17)(x, gen())[0]
    assert (mine - theirs)[:, 10:-10, 10:-10].abs().max() < .02


def test_one_sampling_equals_the_composition():
    x = photos(dtype=torch.float64)
    tfms = Rotate(30), Zoom(.8, 1.2), Warp(.2)
    m, size = compose(tfms, 6, 20, 28, gen(4))
    like(Augment(*tfms)(x, gen(4)), resample(x, m, size), rtol=0, atol=1e-9)
    chance = gen(4)
    one_by_one = [tfm.matrix(6, 20, 28, chance) for tfm in tfms]
    like(m, one_by_one[0] @ one_by_one[1] @ one_by_one[2])
    points = torch.tensor([[.3, -.2, 1], [-.5, .4, 1]])
    for p in points:
        step = p
        for part in reversed(one_by_one): step = part[0] @ step            # output to input: the last comes first
        like((m[0] @ p)[:2]/(m[0] @ p)[2], step[:2]/step[2], rtol=1e-4, atol=1e-5)


def test_crops_compose_with_moves():
    x = photos(4, 3, 32, 32)
    aug = Augment(Flip(1), RandomCrop(16, padding=2), Flip(1, vertical=True))
    chance = gen(3)
    crop = RandomCrop(16, padding=2)(x.flip(-1), chance)
    assert torch.equal(aug(x, gen(3)), crop.flip(-2))
    assert Augment(Rotate(5), RandomResizedCrop((8, 12)))(x, gen()).shape == (4, 3, 8, 12)
    valid = Augment(Flip(), RandomCrop(16), Brightness(.2)).for_valid()
    assert torch.equal(valid(x, gen()), x[..., 8:24, 8:24]) and Augment(Flip(), Brightness(.1), RandomErase()).for_valid() is None
    assert [repr(tfm) for tfm in Pipeline([to_float, Augment(Flip()), RandomErase(), Normalize()]).for_valid().tfms] == ["to_float", "Normalize"]


@given(st.integers(0, 999))
def test_homography_takes_four_points_to_four(seed):
    corners = torch.tensor([[-1., -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64).expand(3, 4, 2)
    images = corners + (torch.rand(3, 4, 2, generator=gen(seed), dtype=torch.float64) - .5)*.98
    m = homography(corners, images)
    moved = (m[:, None] @ F.pad(corners, (0, 1), value=1.)[..., None])[..., 0]
    like(moved[..., :2]/moved[..., 2:], images, rtol=0, atol=1e-9)
    assert (moved[..., 2] > 0).all()
    like(homography(images, corners) @ m/(homography(images, corners) @ m)[:, 2:, 2:], torch.eye(3, dtype=torch.float64).expand(3, 3, 3), rtol=0, atol=1e-6)


def test_what_shrinks_is_averaged():
    stripes = (torch.arange(64) % 2).float().expand(1, 1, 64, 64)
    half = CenterCrop(32, resize=True)
    like(half(stripes, gen()), torch.full((1, 1, 32, 32), .5))             # every second column alone would be black, or white
    third = CenterCrop(21, resize=True)(photos(1, 3, 63, 63), gen())
    like(third, F.avg_pool2d(photos(1, 3, 63, 63), 3), rtol=0, atol=1e-5)
    bare = F.grid_sample(stripes, sampling_grid(torch.eye(3)[None], 21, 21), align_corners=False)
    ours = resample(stripes, torch.eye(3)[None], (21, 21))
    assert ours.std() < bare.std()/2


def test_an_item_does_not_depend_on_its_neighbours():
    x = photos(8)
    m = torch.cat([Flip().matrix(3, 20, 28, gen()), Rotate(30).matrix(2, 20, 28, gen()), Zoom(.3, .5).matrix(3, 20, 28, gen())])
    joint = resample(x, m)
    for i in range(8): like(resample(x[i:i+1], m[i:i+1])[0], joint[i], rtol=0, atol=1e-6)


@pytest.mark.parametrize("tfm", [Rotate(20), Warp(.3), Zoom(.4, .9), Flip(), RandomCrop(7, padding=2), Augment(Rotate(20), Zoom(1, 2), padding_mode="zeros")], ids=repr)
def test_gradients_flow_through(tfm):
    x = photos(2, 1, 9, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: tfm(t, gen(1)), x)


def test_gradients_flow_through_light_and_erasing():
    x = (photos(2, 3, 3, 2, dtype=torch.float64)*.4 + .3).requires_grad_()
    for tfm in (Brightness(.2), Contrast(.2), Saturation(.2)): assert torch.autograd.gradcheck(lambda t: tfm(t, gen(1)), x)
    RandomErase(1.)(x, gen()).sum().backward()
    assert x.grad.isfinite().all()


# --- light -----------------------------------------------------------------------------------------------------------------

def test_light_by_its_formulas():
    x = photos()*.5 + .25
    grey = (x*torch.tensor([.299, .587, .114]).view(3, 1, 1)).sum(1, keepdim=True)
    f = torch.linspace(.8, 1.2, 6)
    g = f.view(-1, 1, 1, 1)
    like(relight(x, brightness=f), (x*g).clamp(0, 1), rtol=0, atol=1e-6)
    like(relight(x, contrast=f), (g*x + (1 - g)*grey.mean((2, 3), keepdim=True)).clamp(0, 1), rtol=0, atol=1e-6)
    like(relight(x, saturation=f), (g*x + (1 - g)*grey).clamp(0, 1), rtol=0, atol=1e-6)
    one = photos(c=1)
    like(relight(one, saturation=f), one, rtol=0, atol=1e-6)
    assert relight(x, brightness=3.).max() == 1


def test_light_commutes_where_nothing_is_cut_off():
    x = photos()*.3 + .35
    parts = [dict(brightness=torch.tensor([.9]*6)), dict(contrast=torch.tensor([1.2]*6)), dict(saturation=torch.tensor([.7]*6))]
    joint = relight(x, **parts[0], **parts[1], **parts[2])
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        out = x
        for i in order: out = relight(out, **parts[i])
        like(out, joint, rtol=0, atol=2e-6)
    chance = gen(1)
    factors = [tfm.factor(6, chance) for tfm in (Brightness(.1), Contrast(.2), Brightness(.1))]
    like(Augment(Brightness(.1), Contrast(.2), Brightness(.1))(x, gen(1)), relight(x, factors[0]*factors[2], factors[1]), rtol=0, atol=1e-6)


def there(name): return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@there("torchvision")
def test_light_is_torchvisions():
    from torchvision.transforms.v2 import functional as T
    x = photos()
    for f in (.6, 1., 1.4):
        like(relight(x, brightness=f), T.adjust_brightness(x, f), rtol=0, atol=1e-5)
        like(relight(x, contrast=f), T.adjust_contrast(x, f), rtol=0, atol=2e-4)
        like(relight(x, saturation=f), T.adjust_saturation(x, f), rtol=0, atol=2e-4)


@there("torchvision")
def test_crops_are_torchvisions_in_distribution():
    from torchvision.transforms.v2 import RandomResizedCrop as Theirs
    x, n = torch.zeros(3, 60, 90), 1500
    torch.manual_seed(0)
    theirs = torch.tensor([[d["height"], d["width"]] for d in (Theirs(8).make_params([x]) for _ in range(n))]).float()
    _, _, w, h = RandomResizedCrop(8).box(n, 60, 90, gen())
    for mine, other in ((h, theirs[:, 0]), (w, theirs[:, 1]), (w*h, theirs.prod(1)), ((w/h).log(), (theirs[:, 1]/theirs[:, 0]).log())):
        assert abs(mine.mean() - other.mean()) < 4*math.sqrt((mine.var() + other.var())/n)


@there("kornia")
def test_light_and_perspective_are_kornias():
    import kornia
    x = photos()
    like(relight(x, brightness=1.3), kornia.enhance.adjust_brightness_accumulative(x, 1.3), rtol=0, atol=1e-5)
    like(relight(x, contrast=.7), kornia.enhance.adjust_contrast_with_mean_subtraction(x, .7), rtol=0, atol=1e-3)
    corners = torch.tensor([[[0., 0], [27, 0], [27, 19], [0, 19]]])
    images = corners + torch.tensor([[[2., 1], [-3, 2], [-1, -2], [3, -1]]])
    theirs = kornia.geometry.get_perspective_transform(corners, images)
    like(homography(corners.double(), images.double()).float(), theirs, rtol=1e-3, atol=1e-4)


# --- erasing, crops --------------------------------------------------------------------------------------------------------

def test_erased_rectangles():
    x, n = torch.rand(400, 3, 16, 20, generator=gen()), 400
    out = RandomErase(.5)(x, gen(1))
    changed = (out != x).any(1)
    assert abs(changed.flatten(1).any(1).float().mean() - .5) < .1
    boxes = RandomErase(.5).boxes(n, 16, 20, gen(1))
    for i, box in enumerate(boxes):
        mask = torch.zeros(16, 20, dtype=torch.bool)
        if box: left, top, right, bottom = box; mask[top:bottom, left:right] = True; assert 0 <= left < right <= 20 and 0 <= top < bottom <= 16
        assert torch.equal(changed[i], mask)
    everything = RandomErase(1., area=(1, 1), ratio=(20/16, 20/16))
    noise = everything(3*x + 5, gen(2))
    assert abs(noise.mean() - 6.5) < .02 and abs(noise.std() - 3/math.sqrt(12)) < .03
    shares = torch.tensor([(b[2] - b[0])*(b[3] - b[1])/10_000 for b in RandomErase(1., ratio=(1, 1)).boxes(n, 100, 100, gen())])
    assert abs(shares.mean() - .175) < .02 and .01 < shares.min() and shares.max() < .34


@settings(max_examples=20)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 999))
def test_boxes_of_crops_lie_in_the_photo(h, w, seed):
    left, top, width, height = RandomResizedCrop(8).box(20, h, w, gen(seed))
    assert (left >= -1e-3).all() and (top >= -1e-3).all() and (left + width <= w + 1e-3).all() and (top + height <= h + 1e-3).all() and (width > 0).all()
    ratio = (width/height).log()
    assert ratio.abs().max() < math.log(4/3) + 1e-4


def test_crops_follow_their_law():
    left, top, width, height = RandomResizedCrop(8, (.2, .6), (1., 1.)).box(4000, 100, 100, gen())
    share = width*height/1e4
    assert .2 - 1e-4 < share.min() and share.max() < .6 + 1e-4 and abs(share.mean() - .4) < .01
    assert abs((left/(100 - width)).mean() - .5) < .02 and abs((top/(100 - height)).mean() - .5) < .02
    left, top, *_ = RandomCrop(28, padding=4).box(4000, 28, 28, gen())
    assert sorted(left.int().unique().tolist()) == list(range(-4, 5)) and abs(left.float().mean()) < .2
    assert abs((left == -4).float().mean() - 1/9) < .03


# --- targets ---------------------------------------------------------------------------------------------------------------

def painted(boxes, h, w):
    "Boxes (n, 1, 4) as masks (n, h, w)."
    masks = torch.zeros(len(boxes), h, w, dtype=torch.int64)
    for mask, (l, t, r, b) in zip(masks, boxes[:, 0].int().tolist()): mask[t:b, l:r] = 1
    return masks


def around(mask):
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows): return None
    return torch.tensor([columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]).float()


def some_boxes(n, h, w, seed):
    corner = torch.rand(n, 1, 2, generator=gen(seed))*torch.tensor([w - 8., h - 8.])
    side = 3 + torch.rand(n, 1, 2, generator=gen(seed + 1))*5
    return torch.cat([corner, corner + side], -1).floor()


@settings(max_examples=12)
@given(st.integers(0, 99))
def test_boxes_move_as_painted_ones_do(seed):
    n, h, w = 5, 24, 36
    x, boxes = photos(n, 3, h, w), some_boxes(5, 24, 36, seed)
    masks = painted(boxes, h, w)
    for tfm in (Flip(), Flip(vertical=True), RandomCrop(20), CenterCrop(16)):
        _, by_box = Augment(tfm, target="boxes", padding_mode="zeros")((x, boxes), gen(seed))
        _, by_mask = Augment(tfm, target="mask", padding_mode="zeros")((x, masks), gen(seed))
        for box, mask in zip(by_box[:, 0], by_mask):
            want = around(mask)
            if want is None: assert (box[2] - box[0])*(box[3] - box[1]) < 1e-3
            else: like(box, want, rtol=0, atol=1e-3)
    for tfm in (Zoom(1, 2), Rotate(30), Warp(.3)):
        _, by_box = Augment(tfm, target="boxes", padding_mode="zeros")((x, boxes), gen(seed))
        moved, by_mask = Augment(tfm, target="mask", padding_mode="zeros")((x, masks), gen(seed))
        assert torch.equal(moved, Augment(tfm, padding_mode="zeros")(x, gen(seed)))
        for box, mask in zip(by_box[:, 0], by_mask):
            want = around(mask)
            if want is not None:                                           # the box holds all of the moved mask, up to half a pixel
                assert (box[:2] <= want[:2] + .6).all() and (box[2:] >= want[2:] - .6).all()
                inside = (want[:2] > 0).all() and (want[2:] < torch.tensor([36, 24])).all()      # at the frame a mask lacks corners
                assert (want - box).abs().max() < (1.5 if inside else 9)


def test_kinds_of_targets():
    x, boxes = photos(3), some_boxes(3, 20, 28, 0)
    aug, flip = Augment(Rotate(9), target="boxes"), Augment(Flip(1), target="boxes")
    assert aug.joint and not Augment(Rotate(9)).joint and not Transform.joint
    _, dense = aug((x, boxes), gen(2))
    _, listed = aug((x, [b for b in boxes]), gen(2))
    like(torch.stack(listed), dense)
    labels = torch.tensor([4, 5, 6])
    _, (moved, same) = aug((x, (boxes, labels)), gen(2))
    assert torch.equal(moved, dense) and same is labels
    assert aug((x, None), gen(2))[1] is None
    _, empty = aug((x, [torch.zeros(0, 4)]*3), gen())
    assert [e.shape for e in empty] == [(0, 4)]*3
    _, ints = flip((x, boxes.long()), gen())
    like(ints[:, 0, 0], 28 - boxes[:, 0, 2]); like(ints[:, 0, 1:4:2], boxes[:, 0, 1:4:2])
    masks = torch.arange(3*20*28).view(3, 20, 28)
    assert torch.equal(Augment(Flip(1), target="mask")((x, masks), gen())[1], masks.flip(-1))
    _, turned = Augment(Rotate(20), Brightness(.2), target="mask")((x, (masks % 5).to(torch.uint8)), gen())
    assert turned.dtype == torch.uint8 and turned.max() <= 4 and turned.shape == masks.shape
    assert torch.equal(Augment(RandomCrop(8), target="mask")((x, masks), gen(1))[1].float(), RandomCrop(8)(masks[:, None].float(), gen(1))[:, 0])
    y = torch.tensor([1, 2, 3])
    assert augment((x, y), [Flip(), RandomErase()], gen())[1] is y


def test_boxes_beyond_the_horizon_are_finite():
    frame = torch.tensor([[[0., 0, 28, 20], [0, 0, 2, 2], [26, 18, 28, 20]]]).expand(300, 3, 4)
    m, size = compose([Rotate(180), Zoom(.5, 3), Warp(.49)], 300, 20, 28, gen())
    moved = move_boxes(frame, m, (20, 28), size)
    assert moved.isfinite().all() and (moved[..., 2:] >= moved[..., :2]).all() and moved.min() >= 0
    assert (moved <= torch.tensor([28., 20, 28, 20])).all()
    for mode in ("reflection", "border", "zeros"):
        seen = resample(photos(300), m, size, mode)
        assert seen.isfinite().all() and -1e-3 < seen.min() and seen.max() < 1.001
    assert Augment(Flip(), Rotate(9), Brightness(.1))(photos(0), gen()).shape == (0, 3, 20, 28)


# --- in a learner ----------------------------------------------------------------------------------------------------------

def set_of(n=30, seed=0):
    x = (photos(n, 3, 8, 8, seed)*255).to(torch.uint8)
    return TensorDataset(x, torch.arange(n) % 2)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, 2))


def dls_of(*tfms, train=None, **options):
    tfms = Pipeline([to_float, *tfms, Normalize([.5]*3, [.25]*3)])
    return DataLoaders(DataLoader(set_of(), 8, shuffle=True, batch_tfms=tfms, **options), DataLoader(set_of(11, 1), 4, batch_tfms=tfms.for_valid()))


def test_a_learner_augments_in_training_only():
    seen = []
    class Spy(Transform):
        order = 95
        def __call__(self, x, generator): seen.append(x); return x
    learn = make([], dls_of(Augment(Flip(), Rotate(10), Brightness(.2)), Spy()), net())
    learn.fit(1)
    train, valid = seen[:4], seen[4:]
    plain = Normalize([.5]*3, [.25]*3)(to_float(set_of(11, 1).tensors[0]))
    assert torch.equal(torch.cat(valid), plain) and sum(map(len, train)) == 30


def test_alternating_flip_shows_both_sides():
    x = torch.tensor([0., 1.]).view(1, 1, 1, 2).expand(40, 1, 1, 2)
    seen = {}
    class Watch(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(2, 2))
        def forward(self, xb):
            if self.training: seen.setdefault(learn.epoch, {}).update(zip(learn.indices, xb[:, 0, 0, 0].tolist()))
            return xb.flatten(1) @ self.w
    dl = DataLoader(TensorDataset(x, torch.zeros(40, dtype=torch.long)), 7, shuffle=True)
    learn = make(AlternatingFlip(), DataLoaders(dl, dl), Watch())
    learn.fit(5)
    for epoch in range(4):
        assert all(seen[epoch][i] + seen[epoch + 1][i] == 1 for i in range(40)) and len(seen[epoch]) == 40
    assert 8 < sum(seen[0].values()) < 32
    last, cb = dict(seen[4]), learn.cbs[[type(cb) for cb in learn.cbs].index(AlternatingFlip)]
    seen.clear(); learn.fit(1)                                             # goes on where the last training ended
    assert all(last[i] + seen[0][i] == 1 for i in range(40)) and cb.start == 5


def test_alternating_flip_takes_any_indices_and_one_input():
    cb, learn = AlternatingFlip(2**40 + 1), type("Learn", (), dict(training=True, epoch=0, indices=torch.arange(6), xb=photos()))()
    cb.before_batch(learn)
    rows = cb.mirrored(range(6), 0)
    assert torch.equal(learn.xb[rows], photos().flip(-1)[rows]) and torch.equal(learn.xb[~rows], photos()[~rows])
    learn.xb = (photos(), photos())
    with pytest.raises(ValueError, match="mirrors one tensor"): cb.before_batch(learn)


def test_alternating_flip_by_number():
    n = 20_000
    rows = AlternatingFlip().mirrored(range(n), 0)
    assert abs(rows.float().mean() - .5) < .02 and torch.equal(AlternatingFlip().mirrored(range(n), 2), rows)
    assert torch.equal(AlternatingFlip().mirrored(range(n), 1), ~rows) and torch.equal(AlternatingFlip().mirrored([7, 5], 0), rows[[7, 5]])
    assert abs((rows[1:] == rows[:-1]).float().mean() - .5) < .02 and abs((rows[2:] == rows[:-2]).float().mean() - .5) < .02
    for seed in (1, 2, 77): assert abs((AlternatingFlip(seed).mirrored(range(n), 0) == rows).float().mean() - .5) < .02


@pytest.mark.parametrize("cbs", [(), "alternating"])
def test_resume_is_bit_identical(tmp_path, cbs):
    def new(): return make([AlternatingFlip()] if cbs else [], dls_of(Augment(Flip(), Rotate(10))), net())
    torch.manual_seed(5); whole = new(); whole.fit(4)
    torch.manual_seed(5); first = new()
    first.fit(2); first.save(tmp_path/"half.pt")
    torch.manual_seed(9); second = new()
    second.fit(4, resume=tmp_path/"half.pt")
    assert equal(weights(whole), weights(second))


def test_alternating_flip_needs_indices():
    batches = [(torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(ValueError, match=r"does not tell which items.*or Flip\(\)"): make(AlternatingFlip(), DataLoaders(batches), net()).fit(1)


def test_tta_is_the_mean_of_probabilities():
    learn = make([], dls_of(Augment(Flip(), Rotate(10), Brightness(.2))), net())
    torch.manual_seed(3)
    state, before = torch.get_rng_state(), (learn.dls.valid.batch_tfms, learn.dls.train.batch_tfms, list(learn.cbs), weights(learn))
    means, targets = tta(learn, n=3)
    again, _ = tta(learn, n=3)
    assert torch.equal(means, again) and not torch.equal(means, tta(learn, n=3, generator=gen(1))[0])
    assert torch.equal(tta(learn, n=2, generator=gen(1))[0], tta(learn, n=2, generator=gen(1))[0])
    assert torch.equal(torch.get_rng_state(), state) and learn.dls.valid.batch_tfms is before[0] and learn.dls.train.batch_tfms is before[1]
    assert learn.cbs == before[2] and equal(weights(learn), before[3]) and learn.mode is None
    like(means.sum(1), torch.ones(11)); assert torch.equal(targets, set_of(11, 1).tensors[1])
    plain = learn.predict().softmax(1)
    like(tta(learn, n=0)[0], plain)
    chance, x = gen(0), set_of(11, 1).tensors[0]
    total = plain
    for _ in range(3):
        views = [learn.dls.train.batch_tfms((part, None), chance)[0] for part in x.split(4)]
        total = total + torch.cat([learn.predict(v) for v in views]).softmax(1)
    like(means, total/4, rtol=1e-5, atol=1e-6)


def test_tta_with_any_transforms_and_loaders():
    learn = make([], dls_of(), net())
    x = set_of(11, 1).tensors[0]
    mirror, _ = tta(learn, n=1, transforms=Flip(1))
    norm = Normalize([.5]*3, [.25]*3)
    both = (learn.predict(norm(to_float(x))).softmax(1) + learn.predict(norm(to_float(x).flip(-1))).softmax(1))/2
    like(mirror, both, rtol=1e-5, atol=1e-6)
    shuffled = DataLoader(set_of(11, 1), 4, shuffle=True, generator=gen(3), batch_tfms=learn.dls.valid.batch_tfms)
    means, targets = tta(learn, shuffled, 1, [Flip(1)])
    order = [t.item() for t in targets]
    assert sorted(order) == sorted(set_of(11, 1).tensors[1].tolist())
    like(means.sum(0), both.sum(0), rtol=1e-4, atol=1e-5)                   # the same order in both views
    theirs = torch.utils.data.DataLoader(list(zip(norm(to_float(x)), set_of(11, 1).tensors[1])), batch_size=4)
    like(tta(learn, theirs, 1, Flip(1))[0], both, rtol=1e-5, atol=1e-6)
    like(tta(learn, [(norm(to_float(x)), None)], 1, Flip(1))[0], both, rtol=1e-5, atol=1e-6)
    logits, _ = tta(learn, n=1, transforms=Flip(1), activation=lambda pred: pred)
    like(logits, (learn.predict(norm(to_float(x))) + learn.predict(norm(to_float(x).flip(-1))))/2, rtol=1e-5, atol=1e-6)


def test_tta_leaves_no_trace_when_it_fails():
    learn = make([], dls_of(Augment(Flip())), net())
    class Fails(Transform):
        order = 40
        def __call__(self, x, generator): raise RuntimeError("no")
    before = learn.dls.valid.batch_tfms
    with pytest.raises(RuntimeError, match="no"): tta(learn, n=1, transforms=Fails())
    assert learn.dls.valid.batch_tfms is before and learn.mode is None
    with pytest.raises(ValueError, match="give transforms"): tta(make())


def test_copies_and_reprs():
    aug = copy.deepcopy(EVERY["all"])
    assert torch.equal(aug(photos(), gen()), EVERY["all"](photos(), gen())) and repr(Augment(Flip(), Rotate(3))) == "Augment(Flip(p=0.5, vertical=False), Rotate(p=1, degrees=3))"


def test_inside_augment_anything_may_stand():
    class Negative(Transform):
        def __call__(self, x, generator): return 1 - x
    x = photos()
    like(Augment(Flip(1), Negative(), Flip(1))(x, gen()), 1 - x)
    like(Augment(Augment(Flip(1)), Flip(1))(x, gen()), x)
    with pytest.raises(NotImplementedError, match="Geometric needs draw"): A.Geometric()(x, gen())


# --- bad input -------------------------------------------------------------------------------------------------------------

BAD = [
    (lambda: Flip(1.5), "p is 1.5: give 0 to 1"), (lambda: Rotate(-3), "degrees is -3: give 0 to 360"), (lambda: Rotate(math.nan), "degrees is nan"),
    (lambda: Zoom(0, 1), "low is 0, high 1: give 0 < low ≤ high"), (lambda: Zoom(2, 1), "give 0 < low ≤ high"), (lambda: Warp(.5), r"magnitude is 0.5: give 0 to 0.49"),
    (lambda: Brightness(1.2), "magnitude is 1.2: give 0 to 1"), (lambda: Saturation(-.1), "magnitude is -0.1"), (lambda: RandomErase(area=(.5, .2)), r"area is \(0.5, 0.2\)"),
    (lambda: RandomErase(2), "p is 2"), (lambda: RandomResizedCrop(8, (0, 1)), "give 0 < low ≤ high"), (lambda: RandomResizedCrop(8, (.5, 2)), "a share ≤ 1"),
    (lambda: CenterCrop(0), "size is 0: give at least one pixel"), (lambda: RandomCrop(8, -1), "padding is -1"), (lambda: RandomCrop(30)(photos(), gen()), "no 30×30 in 20×28, padding 0: give more"),
    (lambda: Augment(target="box"), "'box' is none of"), (lambda: Augment(padding_mode="mirror"), "'mirror' is none of"),
]


@pytest.mark.parametrize("call, word", BAD, ids=[word for _, word in BAD])
def test_bad_magnitudes_get_one_sentence(call, word):
    with pytest.raises(ValueError, match=word) as caught: call()
    assert "\n" not in str(caught.value)


def test_bytes_are_not_moved():
    with pytest.raises(TypeError, match=r"photos are \(2, 3, 8, 8\) uint8: list to_float before"): Rotate(5)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), gen())


@pytest.mark.parametrize("tfm", [Flip(), Rotate(5), Brightness(.2), RandomErase(), Augment(Contrast(.2)), CenterCrop(4)], ids=lambda tfm: type(tfm).__name__)
@pytest.mark.parametrize("x", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8), "a photo"], ids=["bytes", "one photo", "no photo"])
def test_only_batches_of_floats_are_augmented(tfm, x):
    with pytest.raises(TypeError, match="photos are .*in batch_tfms"): tfm(x, gen())


def test_targets_that_do_not_fit_are_refused():
    x = photos(4)
    boxes, masks = Augment(Rotate(9), target="boxes"), Augment(Rotate(9), target="mask")
    for y in (torch.rand(4, 4), torch.arange(4), torch.rand(3, 2, 4), [torch.rand(2, 4)]*3, {"boxes": 1}, [], "cat", (torch.arange(4), 1)):
        with pytest.raises(ValueError, match="for 4 photos: give"): boxes((x, y), gen())
    for y in (torch.zeros(20, 28), torch.zeros(3, 20, 28), torch.arange(4), [torch.zeros(20, 28)]*4):
        with pytest.raises(ValueError, match="for 4 photos: give masks"): masks((x, y), gen())


def test_a_list_of_parts_is_as_a_tuple():
    from collections import namedtuple
    x, labels, aug = photos(2), torch.tensor([1, 2]), Augment(Rotate(20), target="boxes")
    boxes = some_boxes(2, 20, 28, 0)
    _, dense = aug((x, boxes), gen(2))
    _, parts = aug((x, [boxes, labels]), gen(2))
    assert isinstance(parts, list) and torch.equal(parts[0], dense) and parts[1] is labels
    Found = namedtuple("Found", "boxes labels")
    _, named = aug((x, Found(list(boxes), labels)), gen(2))
    assert isinstance(named, Found) and named.labels is labels
    like(torch.stack(named.boxes), dense)


def test_augments_within_are_unpacked_or_refused():
    inner = Augment(Rotate(20), Brightness(.2))
    outer = Augment(Flip(), inner)
    assert len(outer.transforms) == 3 and torch.equal(outer(photos(), gen(1)), Augment(Flip(), Rotate(20), Brightness(.2))(photos(), gen(1)))
    for bad in (dict(target="boxes"), dict(padding_mode="zeros")):
        with pytest.raises(ValueError, match="the same target and padding_mode"): Augment(inner, **bad)
    with pytest.raises(TypeError, match="give one after the other"): Augment([Flip()])
    plain = Augment(lambda x: 1 - x, Flip())
    assert plain.for_valid() is not None
    like(plain.for_valid()(photos(), gen()), 1 - photos())
    pipe = Pipeline([Flip(1)])
    assert torch.equal(augment(photos(), pipe, gen()), photos().flip(-1))


def test_what_shrinks_in_one_direction_is_averaged_in_one():
    stripes = (torch.arange(96) % 2).float()
    down, across = stripes[:, None].expand(96, 32)[None, None], stripes.expand(32, 96)[None, None]
    like(resample(across, torch.eye(3)[None], (32, 32)), F.avg_pool2d(across, (1, 3)), rtol=0, atol=.4)
    for x in (down, across):
        ours = resample(x, torch.eye(3)[None], (32, 32))
        assert ours.std() < F.grid_sample(x, sampling_grid(torch.eye(3)[None], 32, 32), align_corners=False).std()/2
    assert A._points(torch.eye(3)[None], (96, 32), (32, 32)) == [(3, 1)] and A._points(torch.eye(3)[None], (32, 96), (32, 32)) == [(1, 3)]
    assert A._points(torch.diag(torch.tensor([100., 100, 1]))[None], (32, 32), (32, 32)) == [(8, 8)]
    assert A._points(torch.eye(3)[None], (32, 48), (32, 48)) == [(0, 0)]
    quarter = torch.tensor([[[0., -2, 0], [.5, 0, 0], [0, 0, 1]]])                # on a wide photo: 40 rows, 20 columns from 20×40
    assert A._points(quarter*torch.tensor([1., .5, 1]), (20, 40), (20, 40)) != [(0, 0)]


@pytest.mark.parametrize("seed", range(1, 5))
def test_the_drawn_angle_is_pillows(seed):
    from PIL import Image
    import numpy as np
    x, turn = photos(1, 3, 40, 40), Rotate(45)
    m = turn.matrix(1, 40, 40, gen(seed))
    wanted = (2*torch.rand(1, generator=gen(seed)) - 1).item()*45              # counter-clockwise where positive
    im = Image.fromarray((x[0]*255).round().byte().permute(1, 2, 0).numpy())
    theirs = torch.from_numpy(np.array(im.rotate(wanted, Image.BILINEAR))).permute(2, 0, 1)/255
    assert abs(wanted) > .1 and (resample(x, m)[0] - theirs)[:, 10:-10, 10:-10].abs().max() < .02


def test_light_is_for_photos_between_0_and_1():
    x = torch.rand(4, 3, 8, 8, generator=gen(0))*torch.tensor([.3, .6, .9, 1.]).view(4, 1, 1, 1)
    for bad in (255*x, (x - .45)/.225, x - .6):
        with pytest.raises(ValueError, match="before Normalize"): augment(bad, Augment(Flip(), Brightness(.2)))
    for good in (x, torch.zeros_like(x), torch.ones_like(x), x.half()): augment(good, Brightness(.2))


def test_tta_refuses_what_gives_no_new_view():
    learn = make([], dls_of(), net())                                          # only to_float and Normalize
    for tfms in (None, [], Pipeline()):
        with pytest.raises(ValueError, match="every view would be the same"): tta(learn, n=1, transforms=tfms)
    with pytest.raises(ValueError, match="n is -1"): tta(learn, n=-1, transforms=Flip())
    with pytest.raises(ValueError, match="move targets"): tta(learn, transforms=Augment(Flip(), target="mask"))
    like(tta(learn, n=1, transforms=Pipeline([Flip(1)]))[0], tta(learn, n=1, transforms=Flip(1))[0])
    learn.dls.train.batch_tfms = lambda pair, generator: pair
    with pytest.raises(TypeError, match="make it a Pipeline"): tta(learn)
    torch.manual_seed(0)
    single = make([], dls_of(Flip()), nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, 1)))
    with pytest.raises(ValueError, match="activation=torch.sigmoid"): tta(single)
    means, _ = tta(single, activation=torch.sigmoid)
    assert 0 < means.min() and means.max() < 1


def test_tta_with_any_generator_sees_several_views():
    learn = make([], dls_of(Augment(Flip(), Rotate(30))), net())
    torch.manual_seed(1)
    two, one = (tta(learn, n=n, generator=torch.default_generator)[0] for n in (2, 1))
    plain = tta(learn, n=0)[0]
    torch.manual_seed(1)
    first, _ = tta(learn, n=1, generator=torch.default_generator)
    assert not torch.equal(one, first)                                       # the generator moves on
    assert (3*two - plain - 2*(2*first - plain)).abs().max() > 1e-3           # the second view is not the first again


# --- the exercises' checkers convict ---------------------------------------------------------------------------------------------

def eye(n): return torch.eye(3).repeat(n, 1, 1)


def shear(element, draw, base=True):
    class Shear(A.Geometric):
        def __init__(self, degrees):
            if base: super().__init__()
            self.degrees = degrees
        def draw(self, n, h, w, generator):
            m = eye(n); m[:, element[0], element[1]] = draw(self.degrees, n, h, w, generator); return m
    return Shear


def lot(n, generator): return 2*torch.rand(n, generator=generator) - 1


SHEAR = {
    "right": (shear((0, 1), lambda d, n, h, w, g: h/w*(math.radians(d)*lot(n, g)).tan()), None),
    "other sign": (shear((0, 1), lambda d, n, h, w, g: -h/w*torch.tan(torch.deg2rad(d*lot(n, g)))), None),
    "squeezed": (shear((0, 1), lambda d, n, h, w, g: (math.radians(d)*lot(n, g)).tan()), "not true in pixels"),
    "y moves": (shear((1, 0), lambda d, n, h, w, g: (math.radians(d)*lot(n, g)).tan()), "only x changes"),
    "one draw": (shear((0, 1), lambda d, n, h, w, g: h/w*(math.radians(d)*lot(1, g)).tan()), "both"),
    "one side": (shear((0, 1), lambda d, n, h, w, g: h/w*(math.radians(d)*lot(n, g).abs()).tan()), "both"),
    "radians": (shear((0, 1), lambda d, n, h, w, g: h/w*(d*lot(n, g)).tan()), "leans by"),
    "global chance": (shear((0, 1), lambda d, n, h, w, g: h/w*(math.radians(d)*(2*torch.rand(n) - 1)).tan()), "the same generator"),
    "a generator of its own": (shear((0, 1), lambda d, n, h, w, g: h/w*(math.radians(d)*lot(n, gen())).tan()), "another generator"),
    "no lot": (shear((0, 1), lambda d, n, h, w, g: h/w*torch.linspace(-d, d, n).deg2rad().tan()), "another generator"),
    "whole degrees": (shear((0, 1), lambda d, n, h, w, g: h/w*torch.randint(-d, d + 1, (n,), generator=g).deg2rad().tan()), "whole degrees"),
    "uniform tangent": (shear((0, 1), lambda d, n, h, w, g: h/w*math.tan(math.radians(d))*lot((n, 2), g)[:, 0]), "not uniform"),
    "the same in every batch": (shear((0, 1), lambda d, n, h, w, g: h/w*(math.radians(d)*lot(n, gen(g.initial_seed()))).tan()), "batches of one"),
    "w/h": (shear((0, 1), lambda d, n, h, w, g: w/h*(math.radians(d)*lot(n, g)).tan()), "halves of the width"),
    "no base class": (shear((0, 1), lambda d, n, h, w, g: h/w*(math.radians(d)*lot(n, g)).tan(), base=False), "super"),
}


def solarize(change, valid=None, draw=lambda n, g: torch.rand(n, 1, 1, 1, generator=g), place=40):
    class Solarize(Transform):
        order = place
        def __init__(self, threshold, p): self.threshold, self.p = threshold, p
        def __call__(self, x, generator): return change(x, self.threshold, draw(len(x), generator) < self.p)
        def for_valid(self): return self if valid else None
    return Solarize


def in_place(x, t, acts): x[:] = torch.where(acts & (x >= t), 1 - x, x); return x


def negative(x, t, acts): return torch.where(acts & (x >= t), 1 - x, x)


def some(pick):
    "Solarize for as many items as p says, by no lot for each."
    class Solarize(solarize(negative)):
        def __call__(self, x, generator):
            acts = torch.zeros(len(x), 1, 1, 1, dtype=torch.bool)
            acts[pick(len(x), generator)[:int(self.p*len(x))]] = True
            return negative(x, self.threshold, acts)
    return Solarize


SOLARIZE = {
    "exactly p": (some(lambda n, g: torch.randperm(n, generator=g)), "a lot for each item"), "the first": (some(lambda n, g: torch.arange(n)), "a lot for each item"),
    "a generator of its own": (solarize(negative, draw=lambda n, g: torch.rand(n, 1, 1, 1, generator=gen())), "handed in"),
    "for_valid is None": (type("Solarize", (solarize(negative),), {"for_valid": None}), "a method"),
    "right": (solarize(lambda x, t, acts: torch.where(acts & (x >= t), 1 - x, x)), None),
    "by arithmetic": (solarize(lambda x, t, acts: x + (acts & (x >= t))*(1 - 2*x)), None),
    "no threshold": (solarize(lambda x, t, acts: torch.where(acts, 1 - x, x)), "neither"),
    "below": (solarize(lambda x, t, acts: torch.where(acts & (x < t), 1 - x, x)), "neither"),
    "above only": (solarize(lambda x, t, acts: torch.where(acts & (x > t), 1 - x, x)), "wanted .75"),
    "all or none": (solarize(lambda x, t, acts: torch.where(acts & (x >= t), 1 - x, x), draw=lambda n, g: torch.rand(1, 1, 1, 1, generator=g)), "of the items"),
    "by pixel": (solarize(lambda x, t, acts: torch.where(acts & (x >= t), 1 - x, x), draw=lambda n, g: torch.rand(n, 2, 6, 6, generator=g) if n > 2 else torch.rand(1)), "neither"),
    "in place": (solarize(in_place), "in place"),
    "in validation": (solarize(lambda x, t, acts: torch.where(acts & (x >= t), 1 - x, x), valid=True), "for_valid"),
    "global chance": (solarize(lambda x, t, acts: torch.where(acts & (x >= t), 1 - x, x), draw=lambda n, g: torch.rand(n, 1, 1, 1)), "the same generator"),
    "no order": (solarize(lambda x, t, acts: torch.where(acts & (x >= t), 1 - x, x), place=Transform.order), "order is 0"),
    "after Normalize": (solarize(lambda x, t, acts: torch.where(acts & (x >= t), 1 - x, x), place=95), "order is 95"),
    "right elsewhere": (solarize(lambda x, t, acts: torch.where(acts & (x >= t), 1 - x, x), place=45), None),
}


def dihedral(make):
    class Dihedral(A.Geometric):
        def draw(self, n, h, w, generator): return make(n, generator)
    return Dihedral


def turns(n, g, k=4, mirrors=True, lots=None):
    quarter, mirror = torch.tensor([[0., 1, 0], [-1, 0, 0], [0, 0, 1]]), torch.diag(torch.tensor([-1., 1, 1]))
    all_ways = [torch.linalg.matrix_power(quarter, i) @ torch.linalg.matrix_power(mirror, j) for i in range(k) for j in range(1 + mirrors)]
    return torch.stack(all_ways)[torch.randint(len(all_ways), (n,), generator=g) if lots is None else lots]


def signs(n, g):
    m = eye(n); m[:, :2] *= torch.randint(2, (n, 2, 1), generator=g)*2. - 1
    return torch.where(torch.rand(n, 1, 1, generator=g) < .5, m, m[:, :, [1, 0, 2]])


DIHEDRAL = {
    "right": (dihedral(turns), None), "by coins": (dihedral(signs), None),
    "turns only": (dihedral(lambda n, g: turns(n, g, mirrors=False)), "never occur"),
    "two turns": (dihedral(lambda n, g: turns(n, g, k=2)), "never occur"),
    "any angle": (dihedral(lambda n, g: Rotate(180).draw(n, 6, 6, g)), "none of the eight"),
    "rarely": (dihedral(lambda n, g: torch.where(torch.rand(n, 1, 1, generator=g) < .5, turns(n, g), eye(n))), "equally likely"),
    "one draw": (dihedral(lambda n, g: turns(1, g).expand(n, 3, 3)), "never occur"),
    "no lot": (dihedral(lambda n, g: turns(n, g, lots=torch.arange(n) % 8)), "another generator"), "a generator of its own": (dihedral(lambda n, g: turns(n, gen())), "another generator"),
    "no batch": (dihedral(lambda n, g: turns(1, g)[0]), "gave"), "a permutation": (dihedral(lambda n, g: turns(n, g, lots=torch.randperm(n, generator=g) % 8)), "batches of one"),
}


def one_of(call, place=40, valid=False):
    class OneOf(Transform):
        order = place
        def __init__(self, *transforms): self.transforms = transforms
        def __call__(self, x, generator): return call(self.transforms, x, generator)
        def for_valid(self): return self if valid else None
    return OneOf


def by_rows(tfms, x, g, lots=None, ask_empty=False):
    lots = torch.randint(len(tfms), (len(x),), generator=g) if lots is None else lots
    out = x.clone()
    for i, tfm in enumerate(tfms):
        if ask_empty or (lots == i).any(): out[lots == i] = tfm(x[lots == i], g)
    return out


def by_parts(tfms, x, g):
    order = torch.rand(len(x), generator=g).mul(len(tfms)).long()
    parts = [(rows, tfm(x[rows], g)) for i, tfm in enumerate(tfms) if len(rows := (order == i).nonzero()[:, 0])]
    return torch.cat([y for _, y in parts])[torch.cat([rows for rows, _ in parts]).argsort()]


def one_by_one(tfms, x, g): return torch.cat([tfms[int(torch.randint(len(tfms), (), generator=g))](x[i:i+1], g) for i in range(len(x))])


def all_of(tfms, x, g):
    for tfm in tfms: x = tfm(x, g)
    return x


def all_then_select(tfms, x, g):
    lots = torch.randint(len(tfms), (len(x),), generator=g)
    return torch.stack([tfm(x, g) for tfm in tfms])[lots, torch.arange(len(x))]


def shuffled(tfms, x, g):
    out = x.clone()
    for tfm, rows in zip(tfms, torch.randperm(len(x), generator=g).chunk(len(tfms))): out[rows] = tfm(x[rows], g)
    return out


ONE_OF = {
    "all, then select": (one_of(all_then_select), "only the items"), "shuffled": (one_of(shuffled), "a lot for each item"),
    "lots of its own": (one_of(lambda tfms, x, g: by_rows(tfms, x, g, torch.randint(len(tfms), (len(x),), generator=gen()))), "handed in"),
    "no order": (one_of(by_rows, place=0), "order is 0"), "in validation": (one_of(by_rows, valid=True), "for_valid"),
    "right": (one_of(by_rows), None), "by parts": (one_of(by_parts), None),
    "one for all": (one_of(lambda tfms, x, g: tfms[int(torch.randint(len(tfms), (), generator=g))](x, g)), "equally likely"),
    "every one": (one_of(all_of), "exactly one"), "in turns": (one_of(lambda tfms, x, g: by_rows(tfms, x, g, torch.arange(len(x)) % len(tfms))), "independent"),
    "item by item": (one_of(one_by_one), "all of its items at once"), "empty calls": (one_of(lambda tfms, x, g: by_rows(tfms, x, g, ask_empty=True)), "no item"),
    "no generator": (one_of(lambda tfms, x, g: tfms[0](x, None)), "hand the generator on"), "global chance": (one_of(lambda tfms, x, g: by_rows(tfms, x, g, torch.randint(len(tfms), (len(x),)))), "the same generator"),
    "returns None": (one_of(lambda tfms, x, g: None), "return"), "another one handed on": (one_of(lambda tfms, x, g: by_rows([lambda y, _, t=t: t(y, gen()) for t in tfms], x, g)), "came in"),
    "order is None": (one_of(by_rows, place=None), "order is None"),
}
CASES = [(kind, name, *case) for kind, cases in (("Shear", SHEAR), ("Solarize", SOLARIZE), ("Dihedral", DIHEDRAL), ("OneOf", ONE_OF)) for name, case in cases.items()]


@pytest.mark.parametrize("kind, name, answer, word", CASES, ids=[f"{kind}-{name}" for kind, name, *_ in CASES])
def test_checkers_convict_and_acquit(kind, name, answer, word, capsys):
    from exp.exercises import augmentation as E
    check = getattr(E, f"check_{kind}")
    if word is None: check(answer); assert "✓" in capsys.readouterr().out; return
    with pytest.raises(AssertionError, match=word): check(answer)


def test_predictions_are_checked(capsys):
    from exp.exercises.augmentation import check_predictions
    right = dict(centre=-.75, grid_mb=8.388608, visible=.25, same_side=.25, alternating=0, offset=.2)
    check_predictions(right | dict(grid_mb=torch.tensor(8.39)))
    assert "✓" in capsys.readouterr().out
    for key, value, word in (("centre", -1, "half a pixel"), ("grid_mb", 4.19, "four bytes"), ("visible", .5, "one half"), ("same_side", .125, "three times"),
                             ("alternating", .25, "both ways"), ("offset", .25, "mean grey")):
        with pytest.raises(AssertionError, match=word): check_predictions(right | {key: value})
    with pytest.raises(AssertionError): check_predictions([1, 2])

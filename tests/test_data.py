"exp.data: lists and files, photos in every state, chance that repeats, workers that end, a cache that heals itself."
import errno
import io
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image, ImageOps

import exp.data as data
from exp.data import (IMAGES, BadPhoto, Categorize, DataBlock, DataLoaders, ItemError, ItemList, ItemLoader, ItemSet, Normalize, PathList,
                      PhotoCache, Pipeline, RandomResizedCrop, Resize, compose, func_splitter, get_files, grandparent_splitter, image_files,
                      open_byte, open_rgb, parent_label, random_splitter, regex_label, thread_map, to_byte, to_float)
from exp.learner import Learner
from exp.setup import set_seed
from exp.testing import test_like as like
from exp.training import SGD, accuracy, cross_entropy

LINUX = sys.platform == "linux"
linux = pytest.mark.skipif(not LINUX, reason="forks, and /proc")


def picture(w=20, h=12, seed=0) -> Image.Image:
    "Smooth colours, so that JPEG keeps them nearly."
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((w, h), Image.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    "train/{cat,dog} and val/{cat,dog}, six and three photos each."
    for part, count in (("train", 6), ("val", 3)):
        for kind in ("cat", "dog"):
            (tmp_path/"set"/part/kind).mkdir(parents=True)
            for n in range(count): picture(24 + n, 20, n + 10*count).save(tmp_path/"set"/part/kind/f"{kind}_{n}.jpg")
    return tmp_path/"set"


def block(*tfms, **options): return DataBlock(image_files, grandparent_splitter, parent_label, tfms or [open_rgb, to_byte, RandomResizedCrop(8)], **options)
def dls_of(folder, **options): return block().dataloaders(folder, **{"bs": 4, "device": "cpu", **options})


# --- lists -----------------------------------------------------------------------------------------------------------------

@given(st.lists(st.integers(), max_size=12), st.data())
def test_list_indexes_like_numpy(items, draw):
    ours, array = ItemList(items), np.array(items, dtype=object)
    n = len(items)
    s = slice(draw.draw(st.integers(-15, 15)), draw.draw(st.integers(-15, 15)), draw.draw(st.sampled_from([None, 1, 2, -1])))
    assert list(ours[s]) == items[s] and isinstance(ours[s], ItemList)
    mask = draw.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    if n:
        for kind in (list, np.array, torch.tensor, tuple): assert list(ours[kind(mask)]) == list(array[mask])
        at = draw.draw(st.lists(st.integers(-n, n - 1), max_size=9))
        for kind in (list, lambda x: np.array(x, int), lambda x: torch.tensor(x, dtype=torch.long), tuple): assert list(ours[kind(at)]) == [items[j] for j in at]
        assert ours[at[0] if at else 0] == ours[torch.tensor(at[0] if at else 0)] == ours[np.int64(at[0] if at else 0)]


def test_list_errors_and_manners():
    ours = ItemList("abc")
    for bad in (3, -4, [0, 3], torch.tensor([5])):
        with pytest.raises(IndexError): ours[bad]
    with pytest.raises(ValueError, match="mask of 2 for 3"): ours[[True, False]]
    for bad in (1.5, torch.tensor([.5]), ["a"], None):
        with pytest.raises(TypeError): ours[bad]
    assert ours == ["a", "b", "c"] == list(ours) and ours != ["a"] and len(ItemList()) == 0
    assert repr(ItemList(range(5000))) == "ItemList of 5,000: [0, 1, 2, …]" and repr(ItemList("ab")) == "ItemList of 2: ['a', 'b']"


def test_paths_are_made_on_access(folder):
    files = image_files(folder)
    assert isinstance(files, PathList) and all(type(f) is str for f in files.items)
    assert isinstance(files[0], type(folder)) and isinstance(next(iter(files)), type(folder)) and isinstance(files[1:3][0], type(folder))
    assert str(folder) not in repr(files[2:9]) and "train/cat/cat_2.jpg" in repr(files[2:9]).replace("\\", "/")
    assert PathList([folder/"a", "b"]).items == [str(folder/"a"), "b"]


# --- files -----------------------------------------------------------------------------------------------------------------

def test_get_files_finds_what_walk_finds(tmp_path):
    long, uni = "x"*200 + ".JPEG", "größe 写真 ☃.jpg"
    for name in ("b/2.jpg", "b/10.Jpg", "a/1.PNG", "a/deep/er/3.jpeg", "note.txt", f"a/{long}", f"b/{uni}", "noext", "c.jpg/in.jpg"):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True); (tmp_path/name).write_bytes(b"")
    every = sorted(os.path.join(f, n) for f, _, names in os.walk(tmp_path) for n in names)
    assert get_files(tmp_path).items == get_files(str(tmp_path)).items == every
    assert get_files(tmp_path, IMAGES).items == [f for f in every if f.lower().endswith(IMAGES)] and len(get_files(tmp_path, IMAGES)) == 7
    assert [f.name for f in get_files(tmp_path, ".txt")] == [f.name for f in get_files(tmp_path, "TXT")] == ["note.txt"]
    assert [f.name for f in get_files(tmp_path, recurse=False)] == ["noext", "note.txt"]
    assert len(get_files(tmp_path, ())) == 0
    (tmp_path/".hidden").mkdir(); (tmp_path/".hidden/4.jpg").write_bytes(b"")
    assert get_files(tmp_path).items == every
    with pytest.raises(FileNotFoundError, match="nowhere"): get_files(tmp_path/"nowhere")
    with pytest.raises(NotADirectoryError, match="noext"): get_files(tmp_path/"noext")


@linux
def test_get_files_follows_links_but_not_in_circles(tmp_path):
    (tmp_path/"real").mkdir(); (tmp_path/"real/1.jpg").write_bytes(b""); (tmp_path/"top").mkdir()
    (tmp_path/"top/link").symlink_to(tmp_path/"real"); (tmp_path/"real/back").symlink_to(tmp_path/"real"); (tmp_path/"top/up").symlink_to(tmp_path/"top")
    assert [os.path.relpath(f, tmp_path) for f in get_files(tmp_path/"top")] == ["top/link/1.jpg"]


# --- transforms ------------------------------------------------------------------------------------------------------------

def test_compose_orders_sets_up_and_decodes():
    class Shift:
        order = 5
        def setup(self, items): self.by = min(items)
        def __call__(self, x): return x - self.by
        def decode(self, x): return x + self.by
    class Chance:
        order, by_chance = 9, True
        def __call__(self, x, rng): return x + rng.random()
        def for_valid(self): return None
    def double(x): return 2*x
    pipe = compose(Chance(), Shift(), double)
    pipe.setup([3, 4])
    assert pipe.tfms[2].order == 9 and pipe.tfms[1].by == 6                     # Shift saw the doubled items
    assert pipe(5, random.Random(1)) == pipe(5, random.Random(1)) != pipe(5, random.Random(2))
    assert pipe.by_chance and not pipe.for_valid().by_chance and pipe.for_valid()(5) == 4 and pipe.decode(4) == 10
    random.seed(3); a = pipe(5); random.seed(3); assert a == pipe(5)            # without rng: Python's own
    assert Pipeline()(7) == 7 and repr(compose(double)) == "double" and repr(Pipeline()) == "nothing" and Pipeline(double)(2) == 4
    stable = compose(*[lambda x, c=c: x + c for c in "abc"]); assert stable("") == "abc"
    for bad in ([3], [Shift], ["open"]):
        with pytest.raises(TypeError, match="transform"): Pipeline(bad)


PHOTOS = {
    "rgb.png": lambda im: im, "grey.png": lambda im: im.convert("L"), "palette.png": lambda im: im.quantize(64), "bits.png": lambda im: im.convert("1"),
    "rgba.png": lambda im: im.convert("RGBA"), "la.png": lambda im: im.convert("LA"), "cmyk.jpg": lambda im: im.convert("CMYK"), "grey.jpg": lambda im: im.convert("L"),
    "rgb.jpg": lambda im: im, "rgb.bmp": lambda im: im, "palette.gif": lambda im: im.quantize(64), "rgb.webp": lambda im: im, "rgb.tif": lambda im: im,
}


@pytest.mark.parametrize("name", PHOTOS)
def test_open_rgb_modes(tmp_path, name):
    im = PHOTOS[name](picture(40, 32))
    im.save(tmp_path/name, **({"quality": 95} if name.endswith(("jpg", "webp")) else {}))
    got, want = open_rgb(tmp_path/name), im.convert("RGB")
    assert got.mode == "RGB" and got.size == (40, 32)
    gap = np.abs(np.asarray(got).astype(int) - np.asarray(want)).mean()
    assert gap < (4 if name.endswith(("jpg", "webp")) else .01), gap
    with open(tmp_path/name, "rb"): pass                                         # and it is closed again


def test_open_rgb_transparency_and_16_bits(tmp_path):
    im = picture().quantize(16); im.info["transparency"] = bytes(range(16)); im.save(tmp_path/"p.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (np.asarray(open_rgb(tmp_path/"p.png")) == np.asarray(im.convert("RGBA").convert("RGB"))).all()
    deep = np.arange(240, dtype=np.uint16).reshape(12, 20)*273
    Image.fromarray(deep).save(tmp_path/"deep.png")
    assert (np.asarray(open_rgb(tmp_path/"deep.png"))[..., 1] == deep >> 8).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_open_rgb_turns_upright(tmp_path, orientation):
    exif = Image.Exif(); exif[0x0112] = orientation
    im = picture(40, 24)
    for name in ("a.jpg", "a.png"):
        im.save(tmp_path/name, exif=exif, **({"quality": 95} if name == "a.jpg" else {}))
        with Image.open(tmp_path/name) as raw: want = ImageOps.exif_transpose(raw).convert("RGB")
        assert (np.asarray(open_rgb(tmp_path/name)) == np.asarray(want)).all()
    assert open_rgb(tmp_path/"a.png").size == ((40, 24) if orientation < 5 else (24, 40))


@pytest.mark.parametrize("name, content", {
    "zero.jpg": b"", "letter.jpg": b"Dear reader", "header.png": b"\x89PNG\r\n\x1a\n", "half.jpg": "half", "half.png": "half", "jpeg header.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF\0",
    "names \u00fc\u5199.jpg": b"GIF89a"}.items())
def test_bad_photos_are_named(tmp_path, name, content):
    if content == "half":
        file = io.BytesIO(); picture(60, 60).save(file, "jpeg" if name.endswith("jpg") else "png"); content = file.getvalue()[:len(file.getvalue())//2]
    (tmp_path/name).write_bytes(content)
    for func in (open_rgb, open_byte):
        with pytest.raises(BadPhoto) as caught: func(tmp_path/name)
        assert name in str(caught.value) and "on_error='skip'" in str(caught.value) and ("empty" in str(caught.value)) == (not content)
        with pytest.raises(FileNotFoundError): func(tmp_path/"not there.jpg")


@pytest.fixture(params=["simplejpeg", "Pillow alone"])
def decoder(request, monkeypatch):
    if request.param == "Pillow alone": monkeypatch.setattr(data, "simplejpeg", None)
    elif data.simplejpeg is None: pytest.skip("simplejpeg is not installed")


@pytest.mark.parametrize("name", PHOTOS)
def test_open_byte_gives_the_same_pixels(tmp_path, name, decoder):
    exif = Image.Exif(); exif[0x0112] = 6
    PHOTOS[name](picture(41, 33)).save(tmp_path/name)
    PHOTOS[name](picture(41, 33)).save(tmp_path/f"turned {name}", exif=exif)
    for file in (tmp_path/name, tmp_path/f"turned {name}"): like(open_byte(file), to_byte(open_rgb(file)), rtol=0, atol=0)


@pytest.mark.parametrize("options", [dict(subsampling=0), dict(subsampling=1), dict(progressive=True), dict(quality=20), dict(restart_marker_blocks=3)], ids=str)
def test_open_byte_reads_every_kind_of_jpeg(tmp_path, options, decoder):
    for size in ((1, 1), (17, 9), (160, 160)):
        picture(*size).save(tmp_path/"a.jpg", **options)
        like(open_byte(tmp_path/"a.jpg"), to_byte(open_rgb(tmp_path/"a.jpg")), rtol=0, atol=0)


def test_plain_jpegs_only_take_the_short_road(tmp_path, monkeypatch):
    if data.simplejpeg is None: pytest.skip("simplejpeg is not installed")
    picture(40, 30).save(tmp_path/"a.jpg"); picture(40, 30).convert("CMYK").save(tmp_path/"cmyk.jpg"); picture(40, 30).save(tmp_path/"a.png")
    assert data._plain_jpeg(tmp_path/"a.jpg").shape == (30, 40, 3)
    assert data._plain_jpeg(tmp_path/"cmyk.jpg") is None and data._plain_jpeg(tmp_path/"a.png") is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)                         # Pillow has something to say about size
    assert data._plain_jpeg(tmp_path/"a.jpg") is None


def test_open_byte_and_its_cache_agree(folder):
    straight, cached = (block(open_byte, Resize(8)).dataloaders(folder, 4, device="cpu", cache=cache).valid for cache in (False, True))
    for (a, _), (b, _) in zip(straight, cached, strict=True): like(a, b, rtol=0, atol=0)


def test_to_byte_and_to_float():
    im = picture()
    x = to_byte(im)
    assert x.shape == (3, 12, 20) and x.dtype == torch.uint8 and x.stride() == (1, 60, 3)
    assert (x.permute(1, 2, 0).numpy() == np.asarray(im)).all() and to_byte(x) is x and to_byte(im.convert("L")).shape == (1, 12, 20)
    like(to_float(im), torch.from_numpy(np.asarray(im)/255.).permute(2, 0, 1).float())
    like(to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0., .2, 1.]))
    before = im.getpixel((0, 0)); x.zero_(); assert im.getpixel((0, 0)) == before  # a copy: it may be written to


@given(w=st.integers(1, 70), h=st.integers(1, 70), nh=st.integers(1, 40), nw=st.integers(1, 40), crop=st.booleans())
def test_resize_any_to_any(w, h, nh, nw, crop):
    im, tfm = picture(w, h), Resize((nh, nw), crop)
    assert tfm(im).size == (nw, nh) and tfm(to_byte(im)).shape == (3, nh, nw)
    flat = Image.new("RGB", (w, h), (10, 20, 30))
    assert (tfm(to_byte(flat)) == torch.tensor([10, 20, 30])[:, None, None]).all()


def test_resize_takes_the_middle_and_equals_pillow():
    im = picture(90, 60)
    like(Resize(60)(to_byte(im)), to_byte(im.crop((15, 0, 75, 60))))
    for size in (20, 30, 100):
        ours, theirs = Resize((size, size*3//2))(to_byte(im)), to_byte(im.resize((size*3//2, size), Image.BILINEAR))
        assert (ours.int() - theirs.int()).abs().max() <= 1
        assert (to_byte(Resize((size, size*3//2))(im)) == theirs).all()
    for bad in (0, -3, 1.5, "12", (3,), (3, 0), None):
        with pytest.raises((ValueError, TypeError)): Resize(bad)


@given(w=st.integers(1, 300), h=st.integers(1, 300), seed=st.integers(0, 99))
def test_random_crop_stays_inside(w, h, seed):
    left, top, right, bottom = RandomResizedCrop(8).box(w, h, random.Random(seed))
    assert 0 <= left < right <= w and 0 <= top < bottom <= h
    assert RandomResizedCrop(8)(Image.new("RGB", (w, h)), random.Random(seed)).size == (8, 8)


def test_random_crop_follows_its_law():
    tfm, rng = RandomResizedCrop(8, scale=(.2, .5), ratio=(.5, 2.)), random.Random(0)
    boxes = np.array([tfm.box(2000, 2000, rng) for _ in range(3000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, log_ratio = w*h/4e6, np.log(w/h)
    assert abs(share.mean() - .35) < .01 and .199 < share.min() and share.max() < .501
    assert abs(log_ratio.mean()) < .03 and abs(log_ratio.std() - 2*np.log(2)/12**.5) < .02 and np.abs(log_ratio).max() < np.log(2) + .01
    slack = boxes[:, 0]/np.maximum(1, 2000 - w)                                   # the place is uniform
    assert abs(slack.mean() - .5) < .03 and slack.min() < .02 and slack.max() > .98
    whole = RandomResizedCrop(8, (1., 1.), (1., 1.))
    like(whole(to_byte(picture(9, 9)), random.Random(1)), Resize(8)(to_byte(picture(9, 9))))
    assert RandomResizedCrop(8, (1., 1.), (3/4, 4/3)).box(1000, 10, random.Random(1))[2] <= 1000    # falls back to the middle
    like(tfm.for_valid()(to_byte(picture())), Resize(8)(to_byte(picture())))
    for bad in (dict(scale=(0, 1)), dict(scale=(.5, 1.2)), dict(scale=(.9, .1)), dict(ratio=(-1, 1)), dict(ratio=(2, 1))):
        with pytest.raises(ValueError, match=list(bad)[0]): RandomResizedCrop(8, **bad)


# --- splitting, labelling --------------------------------------------------------------------------------------------------

@given(n=st.integers(1, 200), seed=st.integers(0, 5), share=st.floats(.01, .99))
def test_random_splitter(n, seed, share):
    split = random_splitter(seed, share)
    train, valid = split(range(n))
    assert sorted(train + valid) == list(range(n)) and split(range(n)) == (train, valid) and abs(len(valid) - share*n) <= 1


def test_splitters():
    files = [f"/d/{part}/{kind}/1.jpg" for part in ("train", "val", "test", "unsup") for kind in "ab"] + ["lone.jpg", "x/y.jpg"]
    assert grandparent_splitter(files) == ([0, 1], [2, 3, 4, 5]) == grandparent_splitter([Path(f) for f in files])
    assert grandparent_splitter(valid="test")(files) == ([0, 1], [4, 5]) and grandparent_splitter(train="val", valid=["unsup"])(files) == ([2, 3], [6, 7])
    assert grandparent_splitter([os.path.join("d", "train", "a", "1.jpg")]) == ([0], [])
    assert func_splitter(lambda f: "val" in f)(files[:4]) == ([0, 1], [2, 3])
    assert random_splitter()(range(1000)) != random_splitter()(range(1000))
    for bad in (0, 1, -1):
        with pytest.raises(ValueError, match="valid_share"): random_splitter(1, bad)


def test_labels():
    assert parent_label(Path("a/b/c.jpg")) == parent_label("a/b/c.jpg") == parent_label(os.path.join("a", "b", "c.jpg")) == "b"
    label = regex_label(r"/(\w+)_\d+\.jpg$")
    assert label(Path("x/great_pyrenees_12.jpg")) == "great_pyrenees"
    with pytest.raises(ValueError, match="other.png"): label("x/other.png")
    with pytest.raises(ValueError, match="group"): regex_label("abc")


@given(st.lists(st.text(min_size=1), min_size=1))
def test_categorize_round_trip(labels):
    tfm = Categorize(); tfm.setup(labels)
    assert tfm.vocab == sorted(set(labels)) and [tfm.decode(tfm(label)) for label in labels] == labels
    tfm.decode(torch.tensor(0))


def test_categorize_given_and_unseen():
    tfm = Categorize(["no", "yes"]); tfm.setup(["yes"])
    assert tfm.vocab == ["no", "yes"] and tfm("yes") == 1
    with pytest.raises(ValueError, match="'maybe'.*no, yes.*training"): tfm("maybe")
    with pytest.raises(ValueError, match="setup"): Categorize()("a")
    with pytest.raises(ValueError, match="twice"): Categorize(["a", "a"])


# --- loading ---------------------------------------------------------------------------------------------------------------

def epoch(folder, seed=1, epochs=1, **options):
    set_seed(seed)
    train = dls_of(folder, **options).train
    return [batch for _ in range(epochs) for batch in train]


def test_the_same_whoever_works(folder):
    alone = epoch(folder, epochs=2, num_workers=0)
    assert len(alone) == 6 and alone[0][0].shape == (4, 3, 8, 8) and alone[0][0].dtype == torch.uint8
    for options in (dict(num_workers=1), dict(num_workers=3), dict(num_workers=2, workers="processes")):
        if options.get("workers") and not LINUX: continue
        like(epoch(folder, epochs=2, **options), alone, rtol=0, atol=0)
    assert any((a[0] != b[0]).any() for a, b in zip(alone[:3], epoch(folder, 2)))    # another seed
    ours = {tuple(x.flatten().tolist()) for xb, _ in alone[:3] for x in xb}
    assert not ours & {tuple(x.flatten().tolist()) for xb, _ in alone[3:] for x in xb}   # fresh crops each epoch
    assert not multiprocessing.active_children() and not [t for t in threading.enumerate() if t.name.startswith("exp.data")]


def test_validation_is_the_middle_in_order(folder):
    valid = dls_of(folder).valid
    first, second = (torch.cat([xb for xb, _ in valid]) for _ in range(2))
    like(first, second, rtol=0, atol=0)
    like(first, torch.stack([Resize(8)(to_byte(open_rgb(f))) for f in valid.ds.items]))
    assert torch.cat([yb for _, yb in valid]).tolist() == [0]*3 + [1]*3 and [f.name for f in valid.ds.items][:1] == ["cat_0.jpg"]


def test_loader_shapes_and_options(folder):
    dls = dls_of(folder, bs=5)
    assert [len(xb) for xb, _ in dls.train] == [5, 5, 2] and len(dls.train) == 3 and len(dls.valid) == 2
    assert [len(xb) for xb, _ in dls_of(folder, bs=5, drop_last=True).train] == [5, 5]
    assert len(dls_of(folder, bs=100).one_batch()[0]) == 12 and dls_of(folder, bs=1).one_batch()[0].shape == (1, 3, 8, 8)
    assert dls.one_batch()[1].dtype == torch.int64 and dls.vocab == ["cat", "dog"] and dls.skipped == {}
    assert dls.one_batch()[0].is_contiguous(memory_format=torch.channels_last)
    assert dls_of(folder, num_workers=None).train.num_workers == min(8, data.cpus()) >= 1
    for bad, error in ((dict(bs=0), ValueError), (dict(bs=2.5), TypeError), (dict(workers="snails"), ValueError), (dict(on_error="ignore"), ValueError),
                       (dict(num_workers=-1, workers="processes"), ValueError), (dict(num_workers=-1), ValueError), (dict(num_workers=1.5), TypeError)):
        with pytest.raises(error): dls_of(folder, **bad)


def test_no_processes_where_they_cannot_be_forked(monkeypatch):
    assert data._how_many(None, "processes") == (min(8, data.cpus()) if LINUX else 0)
    monkeypatch.delattr(os, "fork", raising=False)
    assert data._how_many(None, "processes") == 0 and data._how_many(None, "threads") >= 1 and data._how_many(3, "processes") == 3


def test_thread_map_order_errors_and_end():
    def work(n):
        time.sleep(.002*(n % 3))
        if n == 20: raise KeyError("twenty")
        return n
    assert list(thread_map(work, range(20), 4)) == list(range(20)) == list(thread_map(work, range(20), 0)) and list(thread_map(work, [], 2)) == []
    with pytest.raises(KeyError, match="twenty"): list(thread_map(work, range(40), 3))
    taken, stream = [], iter(range(1000))
    for n in thread_map(work, (taken.append(i) or i for i in stream), 2):
        if n == 5: break
    assert len(taken) <= 12                                                       # only a little ahead
    time.sleep(.05); assert not [t for t in threading.enumerate() if t.name.startswith("exp.data")]


def test_looking_changes_no_random_number(folder):
    dls = dls_of(folder)
    set_seed(3); dls.one_batch(); dls.show_batch(4); a = torch.rand(1), random.random()
    set_seed(3); assert a == (torch.rand(1), random.random())


def test_decode_and_show(folder):
    normalize = Normalize([.4, .5, .6], [.2, .3, .1])
    dls = DataBlock(image_files, grandparent_splitter, parent_label, [open_rgb, to_byte, RandomResizedCrop(8)], [to_float, normalize]).dataloaders(folder, 4, device="cpu")
    set_seed(1); xb, yb = dls.one_batch()
    set_seed(1); raw = dls_of(folder).one_batch()[0]
    like(xb, (raw.float()/255 - torch.tensor([.4, .5, .6])[:, None, None])/torch.tensor([.2, .3, .1])[:, None, None])
    xs, ys = dls.decode(xb, yb)
    like(torch.stack(xs), raw/255, atol=1e-6)
    assert ys == [dls.vocab[y] for y in yb] and len(dls.show_batch(3)) == 3
    like(Normalize.of(raw.float())(raw.float()).std((0, 2, 3)), torch.ones(3), atol=1e-4)
    like(Normalize([1.], [2.])(torch.tensor([[3.]])), torch.tensor([[1.]]))
    assert normalize(xb.half()).dtype == torch.float16
    for bad in (([1.], [0.]), ([1., 2.], [1.])):
        with pytest.raises(ValueError): Normalize(*bad)
    plain = DataLoaders([(torch.rand(2, 3), torch.tensor([1, 0]))])               # loaders made by hand work, too
    assert plain.vocab is None and plain.decode(*plain.one_batch())[1] == [1, 0] and "x" in plain.show_batch()


def test_a_learner_learns(folder):
    set_seed(0)
    dls = block(open_rgb, to_byte, Resize(8), batch_tfms=[to_float]).dataloaders(folder, 4, device="cpu")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    learn = Learner(model, dls, cross_entropy, SGD, lr=.1, metrics=[accuracy])
    learn.fit(3)
    assert learn.history[-1]["train_loss"] < learn.history[0]["train_loss"] and learn.predict(dls.valid).shape == (6, 2)


def test_texts_and_tables():
    rows = [dict(a=float(i), b=i % 3, c="x"*i) for i in range(10)]
    def numbers(row): return torch.tensor([row["a"]])
    dls = DataBlock(lambda _: rows, random_splitter(1), lambda r: r["b"], [numbers]).dataloaders("somewhere", 4, device="cpu")
    assert dls.one_batch()[1].dtype == torch.int64 and dls.vocab is None
    assert DataBlock(lambda _: rows, random_splitter(1), lambda r: r["a"], [numbers]).dataloaders(None, 4, device="cpu").one_batch()[1].dtype == torch.float32
    plain = DataBlock(lambda _: rows, random_splitter(1), lambda r: r["a"], [lambda r: r["a"]]).dataloaders(None, 4, device="cpu")
    assert plain.one_batch()[0].shape == (4,)                                     # numbers are collated
    class Bag:
        def setup(self, texts): self.seen = list(texts)
        def __call__(self, text): return torch.tensor([float(len(text))])
    bag = Bag()
    dls = DataBlock(lambda _: rows, random_splitter(1), lambda r: "xy"[r["b"] > 1], [lambda r: r["c"], bag]).dataloaders(None, 4, device="cpu")
    assert sorted(map(len, bag.seen)) == sorted(len(r["c"]) for r in dls.train.ds.items) and len(bag.seen) == 8    # the training rows only
    assert dls.vocab == ["x", "y"] and "| x" in str(dls.show_batch(2))


# --- bad input -------------------------------------------------------------------------------------------------------------

def test_empty_folder_and_lopsided_splits(tmp_path, folder):
    (tmp_path/"none").mkdir()
    with pytest.raises(ValueError, match="found nothing in .*none.*folder"): dls_of(tmp_path/"none")
    with pytest.raises(ValueError, match="both|for training and for"): DataBlock(image_files, lambda items: ([0, 1], [1, 2]), parent_label, [open_rgb]).dataloaders(folder)
    with pytest.raises(FileNotFoundError): dls_of(folder/"missing")
    shutil.rmtree(folder/"val")
    with pytest.raises(ValueError, match="no validation items of 12"): dls_of(folder)
    (folder/"train").rename(folder/"val")
    with pytest.raises(ValueError, match="no training items of 12"): dls_of(folder)


def test_class_only_in_validation_and_single_images(folder):
    (folder/"val/unicorn").mkdir(); picture().save(folder/"val/unicorn/u.jpg")
    with pytest.raises(ItemError, match="unicorn/u.jpg.*'unicorn' is not among.*cat, dog.*training set"): dls_of(folder)
    given = DataBlock(image_files, grandparent_splitter, parent_label, [open_rgb, to_byte, Resize(8)], y_tfms=Categorize(["cat", "dog", "unicorn"]))
    assert given.dataloaders(folder, 4).vocab[-1] == "unicorn"
    (folder/"train/unicorn").mkdir(); picture().save(folder/"train/unicorn/one.jpg")      # one image in a class is enough
    dls = dls_of(folder)
    assert dls.vocab == ["cat", "dog", "unicorn"] and sorted(torch.cat([y for _, y in dls.train]).tolist()) == [0]*6 + [1]*6 + [2]


@pytest.mark.parametrize("options", [dict(num_workers=0), dict(num_workers=2), pytest.param(dict(num_workers=2, workers="processes"), marks=linux)], ids=["alone", "threads", "processes"])
def test_a_bad_photo_stops_or_is_skipped_and_counted(folder, options):
    (folder/"train/cat/cat_1.jpg").write_bytes(b""); (folder/"train/dog/dog_2.jpg").write_text("text"); (folder/"val/cat/cat_0.jpg").write_bytes(b"")
    with pytest.raises((BadPhoto, RuntimeError), match=r"(cat_1|dog_2)\.jpg.*on_error='skip'"): list(dls_of(folder, **options).train)
    dls = dls_of(folder, on_error="skip", bs=1, **options)
    assert sum(len(xb) for xb, _ in dls.train) == 10 and sum(len(xb) for xb, _ in dls.valid) == 5     # whole batches of bad photos vanish
    assert len(dls.skipped) == 3 and sorted(os.path.basename(f) for f in dls.skipped) == ["cat_0.jpg", "cat_1.jpg", "dog_2.jpg"]
    assert all("cannot be read" in why for why in dls.skipped.values())
    list(dls.train); assert len(dls.skipped) == 3                                 # counted once, not each epoch


def test_items_that_do_not_fit_are_named(folder):
    with pytest.raises(ItemError, match=r"cat_\d.jpg.*\(3, 20, \d+\).*Resize|dog_\d.jpg.*Resize"): list(block(open_rgb, to_byte).dataloaders(folder, 12, device="cpu").train)
    def broken(x): raise KeyError("oh")
    with pytest.raises(ItemError, match=r"_\d.jpg.*KeyError.*oh"): list(block(open_rgb, broken).dataloaders(folder, 4).train)
    bad = DataBlock(image_files, grandparent_splitter, regex_label(r"(cat)_0"), [open_rgb])
    with pytest.raises(ItemError, match="cat_1.jpg"): bad.dataloaders(folder)


def test_unicode_and_very_long_names(tmp_path, monkeypatch):
    for n, name in enumerate(("größe 写真 ☃ '\".jpg" if LINUX else "größe.jpg", "y"*250 + ".jpg", "leer zeichen.JPG", "%s{0}\\n.jpg" if LINUX else "p.jpg")):
        for part in ("train", "val"): (tmp_path/part/"ключ").mkdir(parents=True, exist_ok=True); picture(seed=n).save(tmp_path/part/"ключ"/name, "jpeg")
    monkeypatch.setenv("EXP_DATA", str(tmp_path/"cache"))
    for cache in (False, 32):
        dls = dls_of(tmp_path, bs=8, cache=cache)
        assert dls.one_batch()[0].shape == (4, 3, 8, 8) and dls.vocab == ["ключ"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_tiny_and_huge_photos(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path/"1.png")
    huge = Image.new("L", (10_000, 10_000), 200); huge.paste(50, (0, 0, 4992, 10_000)); huge.save(tmp_path/"huge.jpg", quality=50); del huge
    files = image_files(tmp_path)
    for tfm in (Resize(8), RandomResizedCrop(8)):
        assert (tfm(to_byte(open_rgb(tmp_path/"1.png"))) == torch.tensor([9, 8, 7])[:, None, None]).all()
    x = Resize(8)(to_byte(open_rgb(tmp_path/"huge.jpg")))
    assert (x[:, :, :3].int() - 50).abs().max() <= 2 and (x[:, :, 5:].int() - 200).abs().max() <= 2
    cache = PhotoCache(files, 64, tmp_path/"cache")
    assert cache(tmp_path/"huge.jpg").shape == (3, 64, 64) and cache(tmp_path/"1.png").shape == (3, 1, 1)
    assert (cache(tmp_path/"huge.jpg")[:, :, :30].int() - 50).abs().max() <= 2


# --- workers ---------------------------------------------------------------------------------------------------------------

@linux
def test_a_killed_worker_says_so(folder):
    def deadly(x): os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="worker 0 was killed by SIGKILL"):
        list(block(open_rgb, deadly).dataloaders(folder, 4, num_workers=2, workers="processes").train)
    assert time.monotonic() - start < 10 and not multiprocessing.active_children()


CTRL_C = """
import sys, time, torch
from exp.data import DataBlock, image_files, grandparent_splitter, parent_label, open_rgb, to_byte, Resize
def slow(x): time.sleep(.05); return x
block = DataBlock(image_files, grandparent_splitter, parent_label, [open_rgb, slow, to_byte, Resize(8)])
dls = block.dataloaders(sys.argv[1], 2, num_workers=2, workers=sys.argv[2], device="cpu")
while True:
    for batch in dls.train: print("batch", flush=True)
"""


@linux
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_ctrl_c_leaves_nobody_behind(folder, kind):
    process = subprocess.Popen([sys.executable, "-c", CTRL_C, str(folder), kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)                                     # as a terminal does: to all of them
        errors = process.communicate(timeout=10)[1]
        assert process.returncode in (1, -signal.SIGINT, 130) and "KeyboardInterrupt" in errors
        time.sleep(.2)
        with pytest.raises(ProcessLookupError): os.killpg(process.pid, 0)
    finally:
        if process.poll() is None: process.kill()


# --- the cache -------------------------------------------------------------------------------------------------------------

def test_cache_gives_the_same_batches(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EXP_DATA", str(tmp_path/"elsewhere"))
    plain, cached = (epoch(folder, epochs=2, cache=cache) for cache in (False, 64))
    like(cached, plain, rtol=0, atol=0)
    like(epoch(folder, epochs=2, cache=True, num_workers=3), plain, rtol=0, atol=0)
    if LINUX: like(epoch(folder, epochs=2, cache=64, num_workers=2, workers="processes"), plain, rtol=0, atol=0)
    assert not [f for f in get_files(folder) if f.suffix != ".jpg"] and list((tmp_path/"elsewhere/.decoded").glob("*.photos"))
    class Grey:
        order = 5
        def __call__(self, im): assert isinstance(im, Image.Image); return ImageOps.grayscale(im).convert("RGB")
    grey = block(open_rgb, Grey(), to_byte, Resize(8))
    like(grey.dataloaders(folder, 4, cache=64, device="cpu").one_batch(True), grey.dataloaders(folder, 4, device="cpu").one_batch(True), rtol=0, atol=0)
    with pytest.raises(ValueError, match="open_rgb"): block(lambda f: torch.zeros(1)).dataloaders(folder, cache=True)


def builds(monkeypatch):
    "Count how often a cache is built."
    count, build = [], PhotoCache._build
    monkeypatch.setattr(PhotoCache, "_build", lambda self, digest: (count.append(1), build(self, digest))[1])
    return count


def test_cache_heals_itself(folder, tmp_path, monkeypatch):
    count, files, den = builds(monkeypatch), image_files(folder), tmp_path/"den"
    make = lambda size=64: PhotoCache(files, size, den)
    first = make(); whole = first.file.read_bytes(); want = [first(f).clone() for f in files]
    make(); assert len(count) == 1                                                # good: used as it is
    flipped = bytearray(whole); flipped[-60] ^= 1                                 # in the index
    for torn in (b"", whole[:10], whole[:len(whole)//2], whole[:-1], whole[1:], whole + b"x", bytes(len(whole)), bytes(flipped)):
        n = len(count); first.file.write_bytes(torn)
        like([make()(f) for f in files], want, rtol=0, atol=0)
        assert len(count) == n + 1 and first.file.read_bytes() == whole
    n = len(count)
    picture(33, 21, 99).save(files[0]); assert make()(files[0]).shape == (3, 21, 33) and len(count) == n + 1      # a photo changed
    stat = os.stat(files[1]); os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000)); make(); assert len(count) == n + 2
    assert make(7)(files[0]).shape == (3, 7, 11) and len(count) == n + 3        # another size: another file
    make(); make(7); assert len(count) == n + 3
    fewer = PhotoCache(files[:3], 64, den); assert len(fewer) == 3 and len(count) == n + 4
    with pytest.raises(ValueError, match="not in this cache"): fewer(files[5])
    like(pickle.loads(pickle.dumps(fewer))(files[2]), fewer(files[2])); assert len(count) == n + 4
    fewer(files[2]).zero_(); assert PhotoCache(files[:3], 64, den)(files[2]).any()   # writing stays in memory
    assert not list(den.glob("*.part"))
    with pytest.raises(ValueError, match="size"): make(0)


def test_cache_keeps_bad_photos_bad(folder, tmp_path):
    bad = image_files(folder)[2]; bad.write_bytes(b"")
    cache = PhotoCache(image_files(folder), 64, tmp_path/"den")
    with pytest.raises(BadPhoto, match=bad.name): cache(bad)
    assert cache(image_files(folder)[3]).ndim == 3


BUILD = """
import sys, time
from exp.data import PhotoCache, image_files
import exp.data as data
slow = data._photo_bytes
data._photo_bytes = lambda *args: (time.sleep(.02), slow(*args))[1]
files = image_files(sys.argv[1])
cache = PhotoCache(files, 64, sys.argv[2], num_workers=0)
print(sum(int(cache(f).sum()) for f in files))
"""


def test_two_processes_may_build_at_once(folder, tmp_path):
    both = [subprocess.Popen([sys.executable, "-c", BUILD, str(folder), str(tmp_path/"den")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [p.communicate(timeout=60) for p in both]
    want = sum(int(to_byte(open_rgb(f)).sum()) for f in image_files(folder))
    assert [out.strip() for out, _ in results] == [str(want)]*2, results
    assert len(list((tmp_path/"den").iterdir())) == 1


def test_full_disk(folder, tmp_path, monkeypatch):
    files = image_files(folder)
    def full(fd): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk is full.*make room, set EXP_DATA.*smaller size") as caught: PhotoCache(files, 64, tmp_path/"den")
    assert caught.value.errno == errno.ENOSPC and not list((tmp_path/"den").iterdir())
    monkeypatch.undo()
    assert PhotoCache(files, 64, tmp_path/"den")(files[0]).any()
    monkeypatch.setattr(data, "_photo_bytes", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))   # Ctrl-C in the middle
    with pytest.raises(KeyboardInterrupt): PhotoCache(files, 63, tmp_path/"den")
    assert len(list((tmp_path/"den").iterdir())) == 1


LIMITED = """
import resource, sys
from exp.data import PhotoCache, image_files
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try: PhotoCache(image_files(sys.argv[1]), 64, sys.argv[2])
except OSError as error: print(error)
"""


@linux
def test_a_disk_that_really_refuses(folder, tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(folder), str(tmp_path/"den")], capture_output=True, text=True)
    assert "the disk is full" in done.stdout and not list((tmp_path/"den").iterdir()), done


def test_leftovers_of_the_killed_are_swept(folder, tmp_path):
    old, new = tmp_path/"a.part", tmp_path/"b.part"
    for file in (old, new): file.write_bytes(b"x")
    os.utime(old, (1, 1))
    PhotoCache(image_files(folder), 64, tmp_path)
    assert not old.exists() and new.exists()


# --- memory ----------------------------------------------------------------------------------------------------------------

MEMORY = """
import os, sys, torch
from exp.data import *
from exp.data import ItemSet, ItemLoader
torch.set_num_threads(1)
kind = sys.argv[3]
cache = PhotoCache(image_files(sys.argv[1]), 600, sys.argv[2])
def field(pid, name): return sum(int(line.split()[1]) for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith(name))/1024
def mine(pid): return field(pid, "Private_Dirty")
items = image_files(sys.argv[1]).items*24
loader = ItemLoader(ItemSet(items, torch.zeros(len(items)), compose(cache, to_byte, RandomResizedCrop(64))), 64, num_workers=2, workers=kind, device="cpu", batch_tfms=to_float)
sizes, workers = [], []
for epoch in range(6):
    for n, batch in enumerate(loader):
        if n == len(loader)//2:
            children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
            workers += [mine(c) for c in children]
    sizes.append(field("self", "Rss"))
print(min(sizes[3:]) - max(sizes[:3]), max(workers or [0]), cache.file.stat().st_size/1e6, len(children))
"""


@linux
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_memory_stays_flat_and_workers_small(tmp_path, kind):
    (tmp_path/"photos").mkdir()
    for n in range(20): picture(600, 600, n).save(tmp_path/"photos"/f"{n}.jpg")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path/"photos"), str(tmp_path/"den"), kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    growth, worker, size, children = map(float, done.stdout.split())
    assert growth < 10, f"three more epochs took {growth:.1f} MB more"
    assert worker < 100 and size > 20 and children == (2 if kind == "processes" else 0)


def test_a_batch_is_laid_out_like_its_items():
    items = [torch.arange(24, dtype=torch.uint8).view(2, 3, 4) + n for n in range(3)]
    for x in (items, [i.permute(2, 0, 1) for i in items], [i.float() for i in items], [i[..., ::2] for i in items], [i[0, 0, 0] for i in items]):
        loader = ItemLoader(ItemSet([0, 1, 2], torch.arange(3), compose(lambda n, x=x: x[n])), 3, num_workers=0, device="cpu")
        xb, yb = next(iter(loader))
        like(xb, torch.stack(x), rtol=0, atol=0)
    assert next(iter(ItemLoader(ItemSet([0], torch.zeros(1), compose(lambda n: items[0].permute(2, 0, 1))), 1, device="cpu")))[0].stride()[1:] == items[0].permute(2, 0, 1).stride()

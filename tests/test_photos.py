"exp.photos: photos in every state, crops that follow their law, JPEGs by the short road, a cache that heals itself."
import errno
import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from pictures import LINUX, gen, linux, picture, picture_set

import exp.photos as photos
from exp.data import DataBlock, Transform, grandparent_splitter, parent_label
from exp.photos import (IMAGES, BadPhoto, PhotoCache, RandomResizedCrop, Resize, cut, image_files, open_byte, open_rgb, to_byte, to_float)
from exp.setup import set_seed
from exp.testing import test_like as like


@pytest.fixture
def folder(tmp_path): return picture_set(tmp_path/"set", ".jpg")


def dls_of(folder, *tfms, **options):
    tfms = tfms or (open_byte, RandomResizedCrop(8))
    return DataBlock(image_files, grandparent_splitter, parent_label, tfms).dataloaders(folder, **{"bs": 4, **options})
def epoch(folder, *tfms, epochs=1, **options):
    set_seed(1)
    train = dls_of(folder, *tfms, **options).train
    return [batch for _ in range(epochs) for batch in train]


# --- opening ---------------------------------------------------------------------------------------------------------------

def test_image_files(tmp_path):
    for name in ("b/2.jpg", "b/10.Jpg", "a/1.PNG", "a/3.tiff", "note.txt", "b/._2.jpg"):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True); (tmp_path/name).write_bytes(b"")
    assert [f.name for f in image_files(tmp_path)] == ["1.PNG", "3.tiff", "10.Jpg", "2.jpg"] and ".webp" in IMAGES


def test_arrays_are_no_photos_yet():
    for func in (to_byte, to_float, Resize(8)):
        with pytest.raises(TypeError, match="give a tensor"): func(np.zeros((4, 4, 3), np.uint8))


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


def test_open_rgb_transparency_and_16_bits(tmp_path):
    im = picture().quantize(16); im.info["transparency"] = bytes(range(16)); im.save(tmp_path/"p.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (np.asarray(open_rgb(tmp_path/"p.png")) == np.asarray(im.convert("RGBA").convert("RGB"))).all()
    deep = np.arange(240, dtype=np.uint16).reshape(12, 20)*273
    Image.fromarray(deep).save(tmp_path/"deep.png")
    assert (np.asarray(open_rgb(tmp_path/"deep.png"))[..., 1] == deep >> 8).all()


def test_numbers_that_are_neither_bytes_nor_16_bits_are_no_photo(tmp_path):
    def opened(pixels, name="a.tif"): Image.fromarray(pixels).save(tmp_path/name); return np.asarray(open_rgb(tmp_path/name))[..., 0]
    deep = np.arange(240).reshape(12, 20)*257
    for kind in (np.uint16, ">u2", np.int32): assert (opened(deep.astype(kind)) == deep >> 8).all()
    assert (opened((deep - 300).astype(np.int32)) == np.maximum(deep - 300, 0) >> 8).all()    # below black is black
    (tmp_path/"deep.pgm").write_bytes(b"P5 3 1 65535\n" + np.array([0, 256, 65535], ">u2").tobytes())
    assert np.asarray(open_rgb(tmp_path/"deep.pgm"))[0, :, 0].tolist() == [0, 1, 255]
    for odd in ((deep/1e4).astype(np.float32), (deep//257).astype(np.int32), (deep*300).astype(np.int32)):     # a guess would be wrong in silence
        with pytest.raises(BadPhoto, match=r"a\.tif.*scale them to bytes first"): opened(odd)


@pytest.mark.parametrize("trouble", [MemoryError(), PermissionError(errno.EACCES, "no"), OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, "disk")], ids=repr)
def test_what_is_not_the_photos_fault_is_not_called_a_bad_photo(tmp_path, monkeypatch, trouble):
    picture().save(tmp_path/"a.png")
    def fail(*args, **options): raise trouble
    for owner, name in ((Image, "open"), (Image.Image, "load"), (ImageOps, "exif_transpose")):
        if name == "exif_transpose" and not isinstance(trouble, MemoryError): continue
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            if name == "load": patch.setattr(type(Image.open(tmp_path/"a.png")), "load", fail)
            with pytest.raises(type(trouble)) as caught: open_rgb(tmp_path/"a.png")
            assert caught.value is trouble
    for func in (open_rgb, open_byte):
        with pytest.raises(IsADirectoryError if LINUX else OSError): func(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_open_rgb_turns_upright(tmp_path, orientation):
    exif = Image.Exif(); exif[0x0112] = orientation
    im = picture(40, 24)
    for name in ("a.jpg", "a.png"):
        im.save(tmp_path/name, exif=exif, **({"quality": 95} if name == "a.jpg" else {}))
        with Image.open(tmp_path/name) as raw: want = ImageOps.exif_transpose(raw).convert("RGB")
        assert (np.asarray(open_rgb(tmp_path/name)) == np.asarray(want)).all()
    assert open_rgb(tmp_path/"a.png").size == ((40, 24) if orientation < 5 else (24, 40))


def exif_block(*entries) -> bytes:
    "An EXIF block by hand: (tag, type, count, four bytes)."
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHI", *e[:3]) + e[3] for e in entries) + b"\0"*4
    return b"Exif\0\0II*\0\x08\0\0\0" + body + b"\1\0\0\0\1\0\0\0"*4


TURN = (0x0112, 3, 1, struct.pack("<HH", 6, 0))                                   # orientation 6
XMP = (b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
       b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>')


def test_orientation_is_found_wherever_pillow_finds_it(tmp_path):
    im = picture(60, 40)
    im.save(tmp_path/"exif.jpg", exif=exif_block(TURN)); im.save(tmp_path/"xmp.jpg", xmp=XMP); im.save(tmp_path/"xmp.webp", xmp=XMP)
    block, info, text = exif_block(TURN), PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(block):8d}\n{block.hex()}\n", zip=True); im.save(tmp_path/"profile.png", pnginfo=info)   # as ImageMagick writes it
    text.add_itxt("XML:com.adobe.xmp", XMP.decode()); im.save(tmp_path/"xmp.png", pnginfo=text)
    for file in image_files(tmp_path):
        with Image.open(file) as raw: raw.load(); want = ImageOps.exif_transpose(raw).size
        assert open_rgb(file).size == want and open_byte(file).shape[1:] == want[::-1], file.name
    assert open_rgb(tmp_path/"exif.jpg").size == open_rgb(tmp_path/"xmp.jpg").size == (40, 60)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("note", [b"garbage", exif_block((0x010F, 5, 1, struct.pack("<I", 0x2a)), TURN), exif_block((0x010F, 1, 4, b"\1\2\3\4"), TURN),
                                  exif_block((0x0100, 2, 4, b"abc\0"), TURN)], ids=["no note", "maker as two numbers", "maker as bytes", "width as text"])
@pytest.mark.parametrize("end", ["png", "jpg", "webp"])
def test_a_damaged_note_spoils_no_pixels(tmp_path, note, end):
    if end == "jpg" and not note.startswith(b"Exif"): note = b"Exif\0\0" + note
    picture(60, 40).save(tmp_path/f"a.{end}", exif=note if end != "png" else note.removeprefix(b"Exif\0\0"))
    assert open_rgb(tmp_path/f"a.{end}").size in ((60, 40), (40, 60)) and open_byte(tmp_path/f"a.{end}").shape[0] == 3


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
    if request.param == "Pillow alone": monkeypatch.setattr(photos, "simplejpeg", None)
    elif photos.simplejpeg is None: pytest.skip("simplejpeg is not installed")


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
    if photos.simplejpeg is None: pytest.skip("simplejpeg is not installed")
    picture(40, 30).save(tmp_path/"a.jpg"); picture(40, 30).convert("CMYK").save(tmp_path/"cmyk.jpg"); picture(40, 30).save(tmp_path/"a.png")
    def short(name): return photos._plain_jpeg((tmp_path/name).read_bytes())
    assert short("a.jpg").shape == (30, 40, 3) and short("cmyk.jpg") is None and short("a.png") is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)                         # Pillow has something to say about size
    assert short("a.jpg") is None


def test_to_byte_and_to_float():
    im = picture()
    x = to_byte(im)
    assert x.shape == (3, 12, 20) and x.dtype == torch.uint8 and x.stride() == (1, 60, 3)
    assert (x.permute(1, 2, 0).numpy() == np.asarray(im)).all() and to_byte(x) is x and to_byte(im.convert("L")).shape == (1, 12, 20)
    like(to_float(im), torch.from_numpy(np.asarray(im)/255.).permute(2, 0, 1).float())
    like(to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0., .2, 1.]))
    with pytest.raises(TypeError, match="float32: bytes become floats once"): to_float(to_float(im))
    for bad in (im.quantize(4), im.convert("1"), im.convert("F"), "a.jpg"):       # a palette's numbers are no colours
        with pytest.raises(TypeError, match="no bytes of pixels.*open_rgb"): to_byte(bad)
        with pytest.raises(TypeError, match="no bytes of pixels.*open_rgb"): Resize(8)(bad)
    before = im.getpixel((0, 0)); x.zero_(); assert im.getpixel((0, 0)) == before  # a copy: it may be written to


# --- cutting ---------------------------------------------------------------------------------------------------------------

@given(w=st.integers(1, 70), h=st.integers(1, 70), nh=st.integers(1, 40), nw=st.integers(1, 40), crop=st.booleans())
def test_resize_any_to_any(w, h, nh, nw, crop):
    im, tfm = picture(w, h), Resize((nh, nw), crop)
    assert tfm(im).shape == tfm(to_byte(im)).shape == (3, nh, nw)
    flat = Image.new("RGB", (w, h), (10, 20, 30))
    assert (tfm(to_byte(flat)) == torch.tensor([10, 20, 30])[:, None, None]).all()


def test_resize_takes_the_middle_and_equals_pillow():
    im = picture(90, 60)
    like(Resize(60)(to_byte(im)), to_byte(im.crop((15, 0, 75, 60))))
    for size in (20, 30, 100):
        ours, theirs = Resize((size, size*3//2))(to_byte(im)), to_byte(im.resize((size*3//2, size), Image.BILINEAR))
        assert (ours.int() - theirs.int()).abs().max() <= 1
    like(Resize(np.int64(20))(im), Resize((20, 20))(im), rtol=0, atol=0)
    like(Resize(30, crop=False)(im), cut(to_byte(im), (0, 0, 90, 60), (30, 30)), rtol=0, atol=0)
    for box in ((0, 0, 91, 60), (0, 0, 90, 61), (-1, 0, 90, 60), (0, -1, 90, 60), (5, 0, 5, 60), (0, 9, 90, 8)):
        with pytest.raises(ValueError, match="not within a photo of 90×60"): cut(to_byte(im), box, (30, 30))
    for bad in (0, -3, 1.5, "12", (3, 0), None):
        with pytest.raises((ValueError, TypeError, RuntimeError, ZeroDivisionError)): Resize(bad)(im)


@given(w=st.integers(1, 300), h=st.integers(1, 300), seed=st.integers(0, 99))
def test_random_crop_stays_inside(w, h, seed):
    left, top, right, bottom = RandomResizedCrop(8).box(w, h, gen(seed))
    assert 0 <= left < right <= w and 0 <= top < bottom <= h
    assert RandomResizedCrop(8)(Image.new("RGB", (w, h)), gen(seed)).shape == (3, 8, 8)


def test_random_crop_follows_its_law():
    tfm, chance = RandomResizedCrop(8, scale=(.2, .5), ratio=(.5, 2.)), gen()
    boxes = np.array([tfm.box(2000, 2000, chance) for _ in range(3000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, log_ratio = w*h/4e6, np.log(w/h)
    assert abs(share.mean() - .35) < .01 and .199 < share.min() and share.max() < .501
    assert abs(log_ratio.mean()) < .03 and abs(log_ratio.std() - 2*np.log(2)/12**.5) < .02 and np.abs(log_ratio).max() < np.log(2) + .01
    slack = boxes[:, 0]/np.maximum(1, 2000 - w)                                   # the place is uniform
    assert abs(slack.mean() - .5) < .03 and slack.min() < .02 and slack.max() > .98
    whole = RandomResizedCrop(8, (1., 1.), (1., 1.))
    like(whole(to_byte(picture(9, 9)), gen(1)), Resize(8)(to_byte(picture(9, 9))))
    assert RandomResizedCrop(8, (1., 1.), (3/4, 4/3)).box(1000, 10, gen(1))[2] <= 1000    # falls back to the middle
    assert type(tfm.for_valid()) is Resize
    like(tfm.for_valid()(to_byte(picture())), Resize(8)(to_byte(picture())))


def test_the_same_crops_whoever_cuts(folder):
    alone = epoch(folder, epochs=2, num_workers=0)
    assert alone[0][0].shape == (4, 3, 8, 8) and alone[0][0].dtype == torch.uint8
    for options in (dict(num_workers=3), dict(num_workers=2, workers="processes")):
        if options.get("workers") and not LINUX: continue
        like(epoch(folder, epochs=2, **options), alone, rtol=0, atol=0)
    like(epoch(folder, open_rgb, RandomResizedCrop(8), epochs=2), alone, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_tiny_and_huge_photos(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path/"1.png")
    huge = Image.new("L", (10_000, 10_000), 200); huge.paste(50, (0, 0, 4992, 10_000)); huge.save(tmp_path/"huge.jpg", quality=50); del huge
    files = image_files(tmp_path)
    for tfm in (Resize(8), lambda x: RandomResizedCrop(8)(x, gen())):
        assert (tfm(to_byte(open_rgb(tmp_path/"1.png"))) == torch.tensor([9, 8, 7])[:, None, None]).all()
    x = Resize(8)(open_byte(tmp_path/"huge.jpg"))
    assert (x[:, :, :3].int() - 50).abs().max() <= 2 and (x[:, :, 5:].int() - 200).abs().max() <= 2
    cache = PhotoCache(files, 64, tmp_path/"cache")
    assert cache(tmp_path/"huge.jpg").shape == (3, 64, 64) and cache(tmp_path/"1.png").shape == (3, 1, 1)
    assert (cache(tmp_path/"huge.jpg")[:, :, :30].int() - 50).abs().max() <= 2


@pytest.mark.parametrize("options", [dict(num_workers=0), dict(num_workers=2), pytest.param(dict(num_workers=2, workers="processes"), marks=linux)], ids=["alone", "threads", "processes"])
def test_a_bad_photo_stops_or_is_skipped_and_counted(folder, options):
    (folder/"train/cat/cat_1.jpg").write_bytes(b""); (folder/"train/dog/dog_2.jpg").write_text("text")
    with pytest.raises(BadPhoto, match=r"(cat_1|dog_2)\.jpg.*on_error='skip'"): list(dls_of(folder, **options).train)
    dls = dls_of(folder, on_error="skip", bs=1, **options)
    assert sum(len(xb) for xb, _ in dls.train) == 10
    assert sorted(item.name for item, _ in dls.skipped) == ["cat_1.jpg", "dog_2.jpg"] and all("BadPhoto" in why and "cannot be read" in why for _, why in dls.skipped)


# --- the cache -------------------------------------------------------------------------------------------------------------

def test_cache_gives_the_same_batches(folder, tmp_path):
    cache = PhotoCache(image_files(folder), 64, tmp_path/"den")
    plain = epoch(folder, epochs=2)
    for options in (dict(), dict(num_workers=3), dict(num_workers=2, workers="processes")):
        if options.get("workers") and not LINUX: continue
        like(epoch(folder, cache, RandomResizedCrop(8), epochs=2, **options), plain, rtol=0, atol=0)


def test_cache_lies_where_sets_lie(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EXP_DATA", str(tmp_path/"elsewhere"))
    cache = PhotoCache(image_files(folder))
    assert tmp_path/"elsewhere" in cache.file.parents and cache.file.exists() and not [f for f in folder.rglob("*.*") if f.suffix != ".jpg"]


def test_what_a_transform_writes_nobody_else_sees(folder, tmp_path):
    class Erase(Transform):
        "Blackens four rows in place."
        def __call__(self, x, generator): x[:, :4] = 0; return x
        def for_valid(self): return None
    cache = PhotoCache(image_files(folder), 40, tmp_path/"den")
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"size is {size}"): PhotoCache(image_files(folder), size)
    for path in (folder, str(folder)): assert PhotoCache(path, 40, tmp_path/"den").file == cache.file     # the photos of a folder
    before = [cache(f) for f in image_files(folder)]
    for _ in range(2): list(dls_of(folder, cache, Erase(), Resize(8), num_workers=0).train)
    like([cache(f) for f in image_files(folder)], before, rtol=0, atol=0)
    train = dls_of(folder, cache, Resize(8), num_workers=0).train
    assert train.ds.tfm.tfms[0].func is cache                                     # nor is it copied for each block
    cache(image_files(folder)[0]).zero_(); assert cache(image_files(folder)[0]).any()


def builds(monkeypatch):
    "Count how often a cache is built."
    count, build = [], PhotoCache._build
    monkeypatch.setattr(PhotoCache, "_build", lambda self, stamp: (count.append(1), build(self, stamp))[1])
    return count


def test_cache_heals_itself(folder, tmp_path, monkeypatch):
    count, files, den = builds(monkeypatch), image_files(folder), tmp_path/"den"
    def make(size=64): return PhotoCache(files, size, den)
    first = make(); whole = first.file.read_bytes(); want = [first(f) for f in files]
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
    like(fewer(files[5]), to_byte(open_rgb(files[5])), rtol=0, atol=0)            # a photo that it does not hold: opened as ever
    like(pickle.loads(pickle.dumps(fewer))(files[2]), fewer(files[2])); assert len(count) == n + 4
    assert not list(den.glob("*.part")) and "3 photos" in repr(fewer)
    monkeypatch.setattr(photos, "_DECODER", "a later one")                        # other code may make other pixels
    assert make().file != first.file and len(count) == n + 5


def test_a_cache_that_cannot_be_read_back_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda part, file: file.write_bytes(b"somebody else's"))
    with pytest.raises(OSError, match="another process changed it.*another folder"): PhotoCache(image_files(folder), 64, tmp_path/"den")
    assert not list((tmp_path/"den").glob("*.part"))


def test_bad_and_missing_photos_stay_bad(folder, tmp_path):
    files = image_files(folder)
    files[2].write_bytes(b""); files[4].unlink()
    cache = PhotoCache(files, 64, tmp_path/"den")
    with pytest.raises(BadPhoto, match=files[2].name): cache(files[2])
    with pytest.raises(FileNotFoundError, match=files[4].name): cache(files[4])
    assert cache(files[3]).ndim == 3
    dls = DataBlock(lambda _: files, grandparent_splitter, parent_label, [cache, Resize(8)]).dataloaders(None, 4, on_error="skip")
    assert sum(len(yb) for _, yb in dls.train) == 10 and len(dls.skipped) == 2


BUILD = """
import sys, time
from exp.photos import PhotoCache, image_files
import exp.photos as photos
quick = photos.open_rgb
photos.open_rgb = lambda *args: (time.sleep(.02), quick(*args))[1]
files = image_files(sys.argv[1])
cache = PhotoCache(files, 64, sys.argv[2])
print(sum(int(cache(f).sum()) for f in files))
"""


def test_two_processes_may_build_at_once(folder, tmp_path):
    both = [subprocess.Popen([sys.executable, "-c", BUILD, str(folder), str(tmp_path/"den")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [p.communicate(timeout=600) for p in both]
    want = sum(int(to_byte(open_rgb(f)).sum()) for f in image_files(folder))
    assert [out.strip() for out, _ in results] == [str(want)]*2, results
    assert len(list((tmp_path/"den").iterdir())) == 1


def test_full_disk(folder, tmp_path, monkeypatch):
    files = image_files(folder)
    def full(fd): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="(?s)No space left.*make room in .*den.*smaller size") as caught: PhotoCache(files, 64, tmp_path/"den")
    assert caught.value.errno == errno.ENOSPC and not list((tmp_path/"den").iterdir())
    monkeypatch.undo()
    assert PhotoCache(files, 64, tmp_path/"den")(files[0]).any()
    monkeypatch.setattr(photos, "open_rgb", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))   # Ctrl-C in the middle
    with pytest.raises(KeyboardInterrupt): PhotoCache(files, 63, tmp_path/"den")
    assert len(list((tmp_path/"den").iterdir())) == 1


LIMITED = """
import resource, sys
from exp.photos import PhotoCache, image_files
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try: PhotoCache(image_files(sys.argv[1]), 64, sys.argv[2])
except OSError as error: print(error, *error.__notes__)
"""


@linux
def test_a_disk_that_really_refuses(folder, tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(folder), str(tmp_path/"den")], capture_output=True, text=True)
    assert "make room" in done.stdout and not list((tmp_path/"den").iterdir()), done


@linux
def test_a_cache_has_the_umasks_rights_and_leftovers_are_swept(folder, tmp_path):
    old, new, gone = tmp_path/"a.part", tmp_path/"b.part", tmp_path/"c.part"
    for file in (old, new): file.write_bytes(b"x")
    os.utime(old, (1, 1)); gone.symlink_to(tmp_path/"nowhere")                    # as if another builder had just removed it
    before = os.umask(0o027)
    try: cache = PhotoCache(image_files(folder), 64, tmp_path)
    finally: os.umask(before)
    assert not old.exists() and new.exists() and cache.file.stat().st_mode & 0o777 == 0o640


# --- workers and memory ----------------------------------------------------------------------------------------------------

CTRL_C = """
import sys, time
from exp.data import DataBlock, grandparent_splitter, parent_label
from exp.photos import Resize, image_files, open_byte
def slow(x): time.sleep(.05); return x
block = DataBlock(image_files, grandparent_splitter, parent_label, [open_byte, slow, Resize(8)])
dls = block.dataloaders(sys.argv[1], 2, num_workers=2, workers=sys.argv[2])
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
        errors = process.communicate(timeout=300)[1]
        assert process.returncode in (1, -signal.SIGINT, 130) and "KeyboardInterrupt" in errors
        for _ in range(600):                                                      # a busy machine buries slowly
            try: os.killpg(process.pid, 0)
            except ProcessLookupError: break
            time.sleep(.1)
        else: pytest.fail("somebody was left behind")
    finally:
        if process.poll() is None: process.kill()


MEMORY = """
import os, sys, torch
from exp.data import ItemSet, Pipeline
from exp.loaders import DataLoader
from exp.photos import PhotoCache, RandomResizedCrop, image_files
torch.set_num_threads(1)
kind = sys.argv[3]
cache = PhotoCache(image_files(sys.argv[1]), 600, sys.argv[2])
def field(pid, name): return sum(int(line.split()[1]) for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith(name))/1024
items = image_files(sys.argv[1]).items*24
loader = DataLoader(ItemSet(items, lambda f: 0, Pipeline([cache, RandomResizedCrop(64)]), Pipeline()), 64, num_workers=2, workers=kind)
sizes, workers = [], []
for epoch in range(6):
    for n, batch in enumerate(loader):
        if n == len(loader)//2:
            children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
            workers += [field(c, "Private_Dirty") for c in children]
    sizes.append(field("self", "Rss"))
print(min(sizes[3:]) - max(sizes[:3]), max(workers or [0]), cache.file.stat().st_size/1e6)
"""


@linux
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_memory_stays_flat_and_workers_small(tmp_path, kind):
    (tmp_path/"photos").mkdir()
    for n in range(20): picture(600, 600, n).save(tmp_path/"photos"/f"{n}.jpg")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path/"photos"), str(tmp_path/"den"), kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    growth, worker, size = map(float, done.stdout.split())
    assert growth < 10, f"three more epochs took {growth:.1f} MB more"
    assert worker < 100 and size > 20


def test_boxes_that_cannot_be_are_refused():
    for bad in (dict(scale=(0, 1)), dict(scale=(.5, 1.2)), dict(scale=(8, 100)), dict(scale=(.9, .1)), dict(ratio=(-1, 1)), dict(ratio=(2, 1))):
        with pytest.raises(ValueError, match=list(bad)[0]): RandomResizedCrop(8, **bad)

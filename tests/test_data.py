"exp.data: lists and files, splits and labels, transforms whose chance repeats, samples made when asked for, errors that name an item."
import multiprocessing
import os
import pickle
import random
import shutil
import threading
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from pictures import LINUX, gen, linux, picture, picture_set

from exp.data import (Categorize, DataBlock, ItemList, ItemLoaders, ItemSet, MultiCategorize, Normalize, Pipeline, Transform, func_splitter,
                      get_files, grandparent_splitter, parent_label, random_splitter, regex_label)
from exp.learner import Learner
from exp.loaders import DataLoader, collate
from exp.setup import set_seed
from exp.testing import test_like as like
from exp.training import SGD, accuracy, cross_entropy

ENDS = (".jpg", ".png")


@pytest.fixture
def folder(tmp_path): return picture_set(tmp_path/"set", ".png")


def find(folder): return get_files(folder, ENDS)
def pixels(file): return torch.from_numpy(np.array(Image.open(file).convert("RGB").resize((8, 8)))).permute(2, 0, 1)


class Noise(Transform):
    "Adds what chance brings."
    order = 5
    def __call__(self, x, generator): return x.float() + torch.rand(x.shape, generator=generator)
    def for_valid(self): return None


def block(*tfms, **options): return DataBlock(find, grandparent_splitter, parent_label, tfms or [pixels, Noise()], **options)
def dls_of(folder, **options): return block().dataloaders(folder, **{"bs": 4, **options})


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
    for bad in (3, -4, [0, 3], torch.tensor([5]), [True, False], torch.tensor([.5]), ["a"]):
        with pytest.raises(IndexError): ours[bad]
    for bad in (1.5, None):
        with pytest.raises(TypeError): ours[bad]
    assert ours == ["a", "b", "c"] == list(ours) and ours != ["a"] and len(ItemList()) == 0
    assert repr(ItemList(range(5000))) == "ItemList of 5,000: [0, 1, 2, …]" and repr(ItemList("ab")) == "ItemList of 2: ['a', 'b']"


def test_paths_are_made_on_access(folder):
    files = find(folder)
    assert all(type(f) is str for f in files.items) and isinstance(files[0], Path) and isinstance(next(iter(files)), Path)
    assert isinstance(files[1:3][0], Path) and isinstance(files[[2]][0], Path) and isinstance(pickle.loads(pickle.dumps(files))[0], Path)
    assert str(folder) not in repr(files[2:9]) and "train/cat/cat_2.png" in repr(files[2:9])


# --- files -----------------------------------------------------------------------------------------------------------------

def test_get_files_finds_what_walk_finds(tmp_path):
    long, uni = "x"*200 + ".JPEG", "größe 写真 ☃.jpg"
    for name in ("b/2.jpg", "b/10.Jpg", "a/1.PNG", "a/deep/er/3.jpeg", "note.txt", f"a/{long}", f"b/{uni}", "noext", "c.jpg/in.jpg"):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True); (tmp_path/name).write_bytes(b"")
    every = sorted(os.path.join(f, n) for f, _, names in os.walk(tmp_path) for n in names)
    assert get_files(tmp_path).items == get_files(str(tmp_path)).items == every
    ends = (".jpg", ".jpeg", ".png")
    assert get_files(tmp_path, ends).items == [f for f in every if f.lower().endswith(ends)] and len(get_files(tmp_path, ends)) == 7
    assert [f.name for f in get_files(tmp_path, ".txt")] == [f.name for f in get_files(tmp_path, "TXT")] == ["note.txt"]
    assert len(get_files(tmp_path, ())) == 0
    with pytest.raises(FileNotFoundError, match="nowhere"): get_files(tmp_path/"nowhere")
    with pytest.raises(NotADirectoryError, match="noext"): get_files(tmp_path/"noext")


def test_hidden_files_and_folders_are_left_out(tmp_path):
    for name in ("train/cat/1.jpg", "train/cat/._1.jpg", "__MACOSX/train/cat/._1.jpg", ".hidden/2.jpg", ".DS_Store"):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True); (tmp_path/name).write_bytes(b"")
    assert [str(f.relative_to(tmp_path)) for f in get_files(tmp_path)] == [os.path.join("train", "cat", "1.jpg")]


@linux
def test_get_files_follows_links_but_not_in_circles(tmp_path):
    (tmp_path/"real").mkdir(); (tmp_path/"real/1.jpg").write_bytes(b""); (tmp_path/"top").mkdir(); (tmp_path/"a").mkdir(); (tmp_path/"b").mkdir()
    (tmp_path/"top/link").symlink_to(tmp_path/"real"); (tmp_path/"real/back").symlink_to(tmp_path/"real"); (tmp_path/"top/up").symlink_to(tmp_path/"top")
    assert [os.path.relpath(f, tmp_path) for f in get_files(tmp_path/"top")] == ["top/link/1.jpg"]
    (tmp_path/"a/x").symlink_to(tmp_path/"b"); (tmp_path/"b/y").symlink_to(tmp_path/"a"); (tmp_path/"b/2.jpg").write_bytes(b"")   # a circle of two
    assert [os.path.relpath(f, tmp_path) for f in get_files(tmp_path/"a")] == ["a/x/2.jpg"]


# --- splitting, labelling --------------------------------------------------------------------------------------------------

@given(n=st.integers(1, 200), seed=st.integers(0, 5), share=st.floats(.01, .99))
def test_random_splitter(n, seed, share):
    split = random_splitter(seed, share)
    train, valid = split(range(n))
    assert sorted(train + valid) == list(range(n)) and split(range(n)) == (train, valid) and len(valid) == round(share*n)
    random.seed(1); before = random.random(); random.seed(1); split(range(n)); assert random.random() == before


def test_splitters():
    files = [f"/d/{part}/{kind}/1.jpg" for part in ("train", "val", "test", "unsup") for kind in "ab"] + ["lone.jpg", "x/y.jpg"]
    assert grandparent_splitter(files) == ([0, 1], [2, 3]) == grandparent_splitter([Path(f) for f in files])                  # a test set is not for choosing
    assert grandparent_splitter(files, valid=("val", "test")) == ([0, 1], [2, 3, 4, 5]) and grandparent_splitter(files[:2] + files[4:6]) == ([0, 1], [2, 3])
    assert grandparent_splitter(files, valid="test") == ([0, 1], [4, 5]) and grandparent_splitter(files, "val", ["unsup"]) == ([2, 3], [6, 7])
    assert func_splitter(lambda f: "val" in f)(files[:4]) == ([0, 1], [2, 3]) and func_splitter(bool)([]) == ([], [])
    assert random_splitter()(range(99)) == random_splitter()(range(99)) != random_splitter(1)(range(99))    # the same in every process


def positions(part, n, kind):
    "The same positions as a list, negative ones, an array, a tensor, a range or a mask."
    mask = [i in part for i in range(n)]
    return {"list": list(part), "negative": [i - n for i in part], "array": np.array(part), "tensor": torch.tensor(part), "tuple": tuple(part),
            "mask": mask, "array mask": np.array(mask), "tensor mask": torch.tensor(mask)}[kind]


KINDS = st.sampled_from(["list", "negative", "array", "tensor", "tuple", "mask", "array mask", "tensor mask"])


@given(n=st.integers(2, 9), cut=st.integers(1, 8), kinds=st.tuples(KINDS, KINDS))
def test_a_split_may_be_said_in_many_ways(n, cut, kinds):
    cut = min(cut, n - 1)
    parts = [positions(part, n, kind) for part, kind in zip((range(cut, n), range(cut)), kinds)]
    dls = DataBlock(range, lambda items: parts, lambda i: i, lambda i: torch.tensor([i])).dataloaders(n, 2, num_workers=0)
    assert list(dls.train.ds.items) == list(range(cut, n)) and list(dls.valid.ds.items) == list(range(cut))


def test_labels():
    assert parent_label(Path("a/b/c.jpg")) == parent_label("a/b/c.jpg") == parent_label(os.path.join("a", "b", "c.jpg")) == "b"
    label = regex_label(r"/(\w+)_\d+\.jpg$")
    assert label(Path("x/great_pyrenees_12.jpg")) == "great_pyrenees"
    with pytest.raises(ValueError, match="other.png"): label("x/other.png")
    with pytest.raises(ValueError, match="7.jpg"): regex_label(r"([a-z]+_)?\d+\.jpg$")("7.jpg")            # a group that takes no part is no label


@given(st.lists(st.text(min_size=1), min_size=2).filter(lambda labels: len(set(labels)) > 1))
def test_categorize_round_trip(labels):
    tfm = Categorize(); tfm.setup(iter(labels))
    assert tfm.vocab == sorted(set(labels)) and [tfm.decode(tfm(label)) for label in labels] == labels
    tfm.decode(torch.tensor(0))


@given(st.lists(st.lists(st.sampled_from("abcdef"), unique=True), min_size=2).filter(lambda rows: len({w for r in rows for w in r}) > 1))
def test_multicategorize_round_trip(rows):
    tfm = MultiCategorize(); tfm.setup(iter(rows))
    for words in rows:
        row = tfm(words)
        assert row.dtype == torch.float32 and row.sum() == len(words) and tfm.decode(row) == sorted(words)


def test_categorize_given_unseen_and_alone():
    tfm = Categorize(["no", "yes"]); tfm.setup(["yes"])
    assert tfm.vocab == ["no", "yes"] and tfm("yes") == 1
    for kind in (set, frozenset): assert Categorize(kind("edcba")).vocab == list("abcde")
    with pytest.raises(ValueError, match="'maybe'.*training set.*no.*yes"): tfm("maybe")
    with pytest.warns(UserWarning, match="photos.*two classes.*get_y"): Categorize().setup(["photos"]*9)
    many = MultiCategorize(["ball", "dog"])
    with pytest.raises(ValueError, match="unicorn"): many(["dog", "unicorn"])
    with pytest.raises(TypeError, match="list"): many("dog")
    assert many([]).tolist() == [0, 0] and many(("dog",)).tolist() == [0, 1]


# --- transforms ------------------------------------------------------------------------------------------------------------

class Shift(Transform):
    order = 5
    def setup(self, items): self.by = min(items)
    def __call__(self, x, generator): return x - self.by
    def decode(self, x): return x + self.by


class Chance(Transform):
    order = 9
    def __call__(self, x, generator): return x + torch.rand((), generator=generator).item()
    def for_valid(self): return None


class Swap(Transform):
    joint, order = True, 7
    def __call__(self, pair, generator): return pair[1], pair[0]
    def decode(self, pair): return pair[1], pair[0]


def double(x): return 2*x


def test_pipeline_orders_sets_up_and_decodes():
    pipe = Pipeline([Chance(), double, Shift()])                                  # double stays behind Chance
    assert repr(pipe) == "Shift → Chance → double" and repr(Pipeline()) == "nothing"
    pipe = Pipeline([double, Chance(), Shift()])
    pipe.setup(lambda before: map(before, [(3, None), (4, None)]))
    assert repr(pipe) == "double → Shift → Chance" and pipe.tfms[1].by == 6       # Shift saw the doubled items
    assert pipe((5, 1), gen(1)) == pipe((5, 1), gen(1)) != pipe((5, 1), gen(2))
    assert repr(pipe.for_valid()) == "double → Shift" and pipe.for_valid()((5, "y")) == (4, "y") and pipe.decode((4, "y")) == (10, "y")
    assert Pipeline()((7, 8)) == (7, 8) and Pipeline(double)((2, 0)) == (4, 0) and Pipeline(Pipeline(double).tfms)((2, 0)) == (4, 0)
    stable = Pipeline([lambda x, c=c: x + c for c in "abc"]); assert stable(("", 0))[0] == "abc"
    with pytest.raises(TypeError, match="transform"): Pipeline([Shift])           # a class would be called on x
    class Old:                                                                    # looks like a transform, but would never be set up
        def __call__(self, x): return x
        def setup(self, items): pass
    with pytest.raises(TypeError, match="Transform"): Pipeline([Old()])


def test_joint_transforms_see_pairs():
    seen = []
    class Look(Transform):
        joint, order = True, 8
        def setup(self, items): seen.extend(items)
        def __call__(self, pair, generator): return pair
    pipe = Pipeline([double, Swap(), Look()])
    pipe.setup(lambda before: map(before, [(1, "a"), (2, "b")]))
    assert seen == [("a", 2), ("b", 4)] and pipe((3, "c")) == ("c", 6) and pipe.decode(("c", 6)) == (6, "c")


@given(st.permutations(range(5)), st.integers(0, 9))
def test_a_passed_generator_decides_everything(orders, seed):
    class Add(Transform):
        def __init__(self, order): self.order = order
        def __call__(self, x, generator): return (x, self.order, torch.rand((), generator=generator).item())
    pipe = Pipeline([Add(n) for n in orders])
    torch.manual_seed(seed); before = torch.rand(2); torch.manual_seed(seed)
    assert pipe((0, 0), gen(seed)) == pipe((0, 0), gen(seed)) == Pipeline([Add(n) for n in range(5)])((0, 0), gen(seed))
    assert torch.equal(before, torch.rand(2))                                     # and the global one is left alone


def test_normalize():
    raw = torch.rand(64, 3, 5, 4)*torch.tensor([1., 10, 100])[:, None, None]
    tfm = Normalize(); tfm.setup(iter(raw.split(16)))
    like(tfm(raw).mean((0, 2, 3)), torch.zeros(3), atol=1e-4); like(tfm(raw).std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)
    like(tfm.decode(tfm(raw)), raw, atol=1e-4)
    few = Normalize(n_batches=1); few.setup(iter(raw.split(16))); like(few.mean, raw[:16].mean((0, 2, 3)))
    given = Normalize([1.], [2.]); given.setup(iter(())); like(given(torch.tensor([[3.]])), torch.tensor([[1.]]))
    assert given(torch.ones(2, 1, 2).half()).dtype == torch.float16 and Normalize([.4, .5, .6], [.2, .3, .1])(raw).shape == raw.shape


def test_normalize_measures_what_it_was_not_told():
    raw = torch.randn(40, 2)*3 + torch.tensor([5., 1000.])
    for told in (dict(mean=[1., 2.]), dict(std=[4., 5.])):
        tfm = Normalize(**told); tfm.setup(iter([raw]))
        like(torch.as_tensor(tfm.mean), torch.tensor([1., 2.]) if "mean" in told else raw.mean(0), atol=1e-4)
        like(torch.as_tensor(tfm.std), torch.tensor([4., 5.]) if "std" in told else raw.std(0, correction=0), atol=1e-3)
    flat = torch.tensor([[7., 1.], [7., 3.]])                                     # a column that never changes; one row only
    tfm = Normalize(); tfm.setup(iter([flat])); like(tfm(flat), torch.tensor([[0., -1.], [0., 1.]]))
    tfm = Normalize(); tfm.setup(iter([flat[:1]])); like(tfm(flat[:1]), torch.zeros(1, 2))
    for value in (.1, .3, .7, -5.3, 0.):                                          # its std, in float32, is a rounding error
        still = torch.stack([torch.full((123_457,), value), torch.linspace(0, 1, 123_457)], 1)
        tfm = Normalize(); tfm.setup(iter([still]))
        like(tfm.std, torch.tensor([1., still[:, 1].std(correction=0)]), rtol=1e-5)
        assert tfm(torch.tensor([[value + .1, 0.]]))[0, 0] < .2
    tfm = Normalize(mean=[0., 0.]); tfm.setup(iter([torch.tensor([[0., float("nan")], [1e-45, 1.]])]))
    assert tfm.std.tolist() == [1., 1.]                                           # a std of 0 or NaN divides nothing
    half = (torch.randn(64, 1, 40, 40) + 500).half()
    tfm = Normalize(); tfm.setup(iter([half])); like(tfm.mean, half.double().mean().float()[None], rtol=1e-5)
    with pytest.raises(TypeError, match="uint8.*to_float"): DataBlock(range, random_splitter(), abs, lambda i: torch.zeros(3, 2, 2).byte(), Normalize()).dataloaders(9, 3).one_batch()


def test_normalize_of_other_channels_or_of_items_is_refused():
    for x in (torch.ones(2, 1, 4, 4), torch.ones(3, 1)):
        with pytest.raises(ValueError, match="3 means and 3 stds for 1 channels"): Normalize([.4, .5, .6], [.2, .3, .1])(x)
    assert Normalize([1.], [2.])(torch.ones(2, 3, 4, 4)).shape == (2, 3, 4, 4)                             # one for all channels
    with pytest.raises(TypeError, match="batch_tfms"): rows(item=[lambda i: torch.zeros(3, 4, 4), Normalize([0.]*3, [1.]*3)])


# --- samples ---------------------------------------------------------------------------------------------------------------

def test_targets_are_made_when_asked_for_and_heavy_labels_once_per_sample():
    opened = []
    def mask(item): opened.append(item); return torch.full((2, 2), float(item))
    made = DataBlock(lambda n: range(n), random_splitter(0), mask, lambda i: torch.tensor([float(i)]))
    dls = made.dataloaders(50, 10, num_workers=0)
    assert len(opened) <= 1                                                       # one look at what kind it is
    opened.clear(); xb, yb = next(iter(dls.train))
    assert len(opened) == 10 and yb.shape == (10, 2, 2) and (yb[:, 0, 0] == xb[:, 0]).all()


def test_kinds_of_targets():
    rows = [dict(a=float(i), b=i % 3, c="x"*i, d=[w for w in "xyz" if (i + ord(w)) % 2]) for i in range(10)]
    def numbers(row): return torch.tensor([row["a"]])
    def made(get_y, **options): return DataBlock(lambda _: rows, random_splitter(1), get_y, numbers, **options).dataloaders(None, 4)
    assert made(lambda r: r["b"]).one_batch()[1].dtype == torch.int64 and made(lambda r: r["b"]).vocab is None
    assert made(lambda r: r["a"]).one_batch()[1].dtype == torch.float32
    many = made(lambda r: r["d"], y_tfms=MultiCategorize())
    xb, yb = many.one_batch()
    assert yb.shape == (4, 3) and many.vocab == ["x", "y", "z"] and many.decode(xb, yb)[1][0] == rows[int(xb[0])]["d"]
    plain = DataBlock(lambda _: rows, random_splitter(1), lambda r: r["a"], lambda r: r["a"]).dataloaders(None, 4)
    assert plain.one_batch()[0].shape == (4,)                                     # numbers are collated
    seen = []
    class Bag(Transform):
        def setup(self, texts): seen.extend(texts)
        def __call__(self, text, generator): return torch.tensor([float(len(text))])
    dls = DataBlock(lambda _: rows, random_splitter(1), lambda r: "xy"[r["b"] > 1], [lambda r: r["c"], Bag()]).dataloaders(None, 4)
    assert sorted(map(len, seen)) == sorted(len(r["c"]) for r in dls.train.ds.items) and len(seen) == 8    # the training rows only
    assert dls.vocab == ["x", "y"] and "| x" in str(dls.show_batch(2))


def rows(n=12, get_y=lambda i: i % 2, item=lambda i: torch.tensor([float(i)]), batch_tfms=(), y_tfms=None, **options):
    "Loaders of numbers, the first three for validation."
    made = DataBlock(range, lambda items: (range(3, n), range(3)), get_y, item, batch_tfms, y_tfms=y_tfms)
    return made.dataloaders(n, **{"bs": 4, "num_workers": 0, **options})


def test_words_in_lists_are_guessed_to_be_many_classes():
    for kind in (list, tuple, set):
        dls = rows(get_y=lambda i: kind([[], ["b"], ["a", "b"]][i % 3]))           # the first one has none
        assert dls.vocab == ["a", "b"] and dls.valid.ds[2][1].tolist() == [1, 1] and dls.train.ds[0][1].tolist() == [0, 0]
    for get_y in (lambda i: [(1., 2.)]*(i > 5), lambda i: torch.ones(2), lambda i: np.ones(2), lambda i: [], lambda i: ["a", i]):
        assert rows(get_y=get_y).vocab is None                                    # boxes, masks, nothing, something else


@pytest.mark.parametrize("kind", [bool, np.bool_])
def test_true_and_false_are_two_classes(kind):
    dls = rows(get_y=lambda i: kind(i % 3 == 0))
    xb, yb = dls.one_batch()
    assert dls.vocab == [False, True] and yb.dtype == torch.int64 and (yb == (xb[:, 0] % 3 == 0).long()).all()
    assert rows(get_y=lambda i: [True, i % 2 == 0]).vocab is None                 # in lists they stay what they are


@pytest.mark.parametrize("std", [0., [0.], [1., 0.], torch.tensor([-1.]), torch.zeros(1, 3, 1, 1)])
def test_a_std_is_above_zero(std):
    with pytest.raises(ValueError, match="give numbers above 0"): Normalize([0.], std)


@given(st.permutations([1, 2.5, 3, np.int64(4), np.float32(0), True]), st.booleans())
def test_targets_are_floats_if_one_label_is(labels, listed):
    dls = rows(get_y=lambda i: [labels[i % 6], 1] if listed else labels[i % 6])
    for _, yb in [*dls.train, *dls.valid]: assert yb.dtype == torch.float32 and yb.shape[1:] == (2,)*listed
    whole = rows(get_y=lambda i: [i, 1] if listed else i).one_batch()[1]
    assert [y.dtype for y in (whole if listed else [whole])] == [torch.int64]*(1 + listed)


def test_items_with_bad_labels_are_skipped_too():
    for good in (lambda i: "ab"[i % 2], float, int):
        def get_y(i):
            if i in (1, 3, 7): raise KeyError(f"{i} has no label")
            return good(i)
        with pytest.raises(KeyError, match="3 has no label"): [*rows(get_y=get_y).train]
        dls = rows(get_y=get_y, on_error="skip")
        assert sorted(i for xb, _ in [*dls.train, *dls.valid] for i in xb[:, 0].tolist()) == [0, 2, 4, 5, 6, 8, 9, 10, 11]
        assert sorted(i for i, why in dls.skipped if "no label" in why) == [1, 3, 7]


def test_loaders_of_other_items(folder):
    dls = block(pixels, batch_tfms=[lambda xb: xb.float()/255, Normalize()]).dataloaders(folder, 4)
    dl = dls.loader_of(dls.valid.ds.items)
    like(*([(dl.batch_tfms((xb, yb))) for xb, yb in dl] for dl in (dl, dls.valid)), rtol=0, atol=0)
    learn = Learner(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)), dls, cross_entropy, SGD, quiet=True)
    assert learn.validate(dl) == learn.validate()
    seen = []
    class Look(Transform):
        joint = True
        def __call__(self, pair, generator): seen.append(pair[1]); return pair
    assert rows(batch_tfms=Look()).batch_of([5]).tolist() == [[5.]] and seen == [None]                      # a new item has no label
    photo = dls.valid.ds.items[2]
    for one in (photo, str(photo)): like(dls.batch_of(one), dls.batch_of([photo]), rtol=0, atol=0)


def test_a_walk_over_samples_ends_and_only_at_the_end():
    ds = rows().train.ds
    assert [int(x) for x, y in ds] == list(range(3, 12))
    with pytest.raises(IndexError): ds[9]
    def torn(i): return [torch.zeros(1)]*3 if i < 5 else [][i]
    with pytest.raises(IndexError, match="(?s)list index.*at item 5"): [x for x, y in rows(item=torn).train.ds]


class Remember(Transform):
    "Keeps what it saw, in a list that it has had from the start."
    order = 3
    def __init__(self): self.seen = []
    def setup(self, xs): self.seen += list(xs)
    def __call__(self, x, generator): return torch.tensor([float(len(self.seen)), float(x)])


def test_blocks_lists_and_transforms_may_be_copied():
    class Counter:
        count = 0
        def __init__(self): self.lock = threading.Lock()                          # cannot be copied, and need not
        def __call__(self, i): self.count += 1; return i
    counter, remember = Counter(), Remember()
    made = DataBlock(range, random_splitter(), lambda i: "ab"[i % 2], [counter, remember])
    first, second, third = made.dataloaders(10, 2), made.dataloaders(20, 2), deepcopy(made).dataloaders(30, 2)
    assert [int(dls.one_batch()[0][0, 0]) for dls in (first, second, third)] == [8, 16, 24] and not remember.seen
    assert counter.count >= 8 + 16 + 24                                           # a function is used itself
    files = ItemList(["a/b", "c"], Path); twin = deepcopy(files); twin.items.append("d")
    assert len(files) == 2 and twin[0] == files[0] == Path("a/b") and pickle.loads(pickle.dumps(files)) == files
    both = Remember()                                                             # one that two pipelines share stays one
    dls = DataBlock(range, random_splitter(), lambda i: float(i), both, y_tfms=both).dataloaders(10, 2)
    assert dls.train.ds.tfm.tfms[0] is dls.train.ds.y_tfm.tfms[0] is not both


def test_target_transforms_keep_the_protocol():
    class Doubt(Transform):
        "Changes a label by chance, in training."
        order = 5
        def __call__(self, y, generator): assert isinstance(generator, torch.Generator); return (y + torch.randint(1, 3, (), generator=generator)) % 3
        def for_valid(self): return None
    def letter(i): return "abc"[i % 3]
    set_seed(1); want = torch.rand(1), random.random()
    set_seed(1); dls = rows(get_y=letter, y_tfms=[Doubt(), Categorize()])
    assert want == (torch.rand(1), random.random())                               # the labels were looked at without using up chance
    def epoch(n): set_seed(n); return torch.cat([yb for _, yb in DataLoader(dls.train.ds, 4)]).tolist()
    assert epoch(1) == epoch(1) != epoch(2) and all(y != i % 3 for i, y in zip(range(3, 12), epoch(1)))
    assert torch.cat([yb for _, yb in dls.valid]).tolist() == [0, 1, 2] and dls.vocab == ["a", "b", "c"]
    seen = []
    class Scale(Transform):
        "Learns from the training labels."
        def setup(self, ys): seen.extend(ys)
        def __call__(self, y, generator): return y/max(seen)
        def decode(self, y): return y*max(seen)
    dls = rows(get_y=float, y_tfms=[Scale()])
    assert seen == list(map(float, range(3, 12))) and dls.train.ds[8][1] == 1 and dls.valid.ds[0][1].dtype == torch.float32
    assert dls.decode(*dls.one_batch(True), valid=True)[1] == [0, 1, 2]


def test_joint_transforms_get_x_and_y_wherever_they_are():
    class Add(Transform):
        "Adds the target to x, and takes one from it."
        joint, order = True, 4
        def setup(self, pairs): self.first = next(pairs)
        def __call__(self, pair, generator): x, y = pair; return (x, y) if y is None else (x + y, y - 1)
        def decode(self, pair): x, y = pair; return x - (y + 1), y + 1
    dls = rows(get_y=lambda i: 100*i, item=[lambda i: i, Add()], batch_tfms=Add())
    assert dls.train.ds[0][0] == 303 and dls.train.ds.tfm.tfms[-1].first[1] == 300
    xb, yb = dls.one_batch(True)
    assert yb.tolist() == [-2, 98, 198] and xb.tolist() == [i + 100*i + 100*i - 1 for i in range(3)]
    xs, ys = dls.decode(xb, yb, valid=True)
    assert ys == [0, 100, 200] and [int(x) for x in xs] == [0, 1, 2]
    assert dls.batch_of([7, 8]).tolist() == [7, 8]                                # a new item has no label: y is None


def test_a_block_may_be_used_for_two_folders(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"bright")
    for file in find(tmp_path/"bright"): Image.new("RGB", (9, 9), (250, 240, 230)).save(file)
    (tmp_path/"bright/train/dog").rename(tmp_path/"bright/train/emu"); (tmp_path/"bright/val/dog").rename(tmp_path/"bright/val/emu")
    one = block(pixels, batch_tfms=[lambda xb: xb.float(), Normalize()], y_tfms=Categorize())
    first = one.dataloaders(folder, 4)
    before = first.one_batch(True)[0], first.vocab
    second = one.dataloaders(tmp_path/"bright", 4)
    like(first.one_batch(True)[0], before[0], rtol=0, atol=0)
    assert first.vocab == before[1] == ["cat", "dog"] and second.vocab == ["cat", "emu"]


# --- loaders ---------------------------------------------------------------------------------------------------------------

def epoch(folder, seed=1, epochs=1, **options):
    set_seed(seed)
    train = dls_of(folder, **options).train
    return [batch for _ in range(epochs) for batch in train]


def test_the_same_whoever_works(folder):
    alone = epoch(folder, epochs=2, num_workers=0)
    assert len(alone) == 6 and alone[0][0].shape == (4, 3, 8, 8)
    for options in (dict(num_workers=1), dict(num_workers=3), dict(num_workers=2, workers="processes")):
        if options.get("workers") and not LINUX: continue
        like(epoch(folder, epochs=2, **options), alone, rtol=0, atol=0)
    assert any((a[0] != b[0]).any() for a, b in zip(alone[:3], epoch(folder, 2)))    # another seed
    ours = {tuple(x.flatten().tolist()) for xb, _ in alone[:3] for x in xb}
    assert not ours & {tuple(x.flatten().tolist()) for xb, _ in alone[3:] for x in xb}   # fresh chance each epoch
    assert not multiprocessing.active_children() and not [t for t in threading.enumerate() if t.name.startswith("exp")]


def test_validation_is_in_order_and_without_chance(folder):
    valid = dls_of(folder).valid
    first, second = (torch.cat([xb for xb, _ in valid]) for _ in range(2))
    like(first, second, rtol=0, atol=0); like(first, torch.stack([pixels(f) for f in valid.ds.items]))
    assert torch.cat([yb for _, yb in valid]).tolist() == [0]*3 + [1]*3


def test_loader_shapes_and_options(folder):
    dls = dls_of(folder, bs=5)
    assert isinstance(dls, ItemLoaders) and isinstance(dls.train, DataLoader)
    assert [len(xb) for xb, _ in dls.train] == [5, 5, 2] and len(dls.train) == 3 and len(dls.valid) == 2
    assert [len(xb) for xb, _ in dls_of(folder, bs=5, drop_last=True).train] == [5, 5]
    assert len(dls_of(folder, bs=100).one_batch()[0]) == 12 and dls_of(folder, bs=1).one_batch()[0].shape == (1, 3, 8, 8)
    assert dls.one_batch()[1].dtype == torch.int64 and dls.vocab == ["cat", "dog"] and dls.skipped == []
    for bad in (dict(bs=0), dict(workers="snails"), dict(on_error="ignore")):
        with pytest.raises(ValueError): dls_of(folder, **bad)
    with pytest.raises(TypeError): dls_of(folder, nonsense=1)


def test_sampler_and_collate_fn(folder):
    def backwards(ds): return range(len(ds) - 1, -1, -1)
    def bag(samples): return [x.shape for x, _ in samples], torch.tensor([y for _, y in samples])
    dls = block(sampler=backwards, collate_fn=bag).dataloaders(folder, 4)
    assert [yb.tolist() for _, yb in dls.train] == [[1]*4, [1, 1, 0, 0], [0]*4] and next(iter(dls.train))[0][0] == (3, 8, 8)


def test_loader_options_win_over_the_blocks(folder):
    dls = block(collate_fn=collate).dataloaders(folder, 4, collate_fn=lambda samples: ([x for x, _ in samples], torch.tensor([y for _, y in samples])), num_workers=0)
    bare = DataBlock(find, grandparent_splitter, parent_label, pixels, (), None, lambda ds: [5, 3]).dataloaders(folder, 4)     # collate_fn, sampler by place
    assert bare.one_batch()[0].shape == (2, 3, 8, 8) and bare.train.indices == [] and [yb.tolist() for _, yb in bare.train] == [[0, 0]]
    for dl in (dls.train, dls.valid):
        xb, yb = next(iter(dl)); assert isinstance(xb, list) and xb[3].shape == (3, 8, 8) and yb.shape == (4,)
    assert dls.train.num_workers == 0 and dls_of(folder).train.workers == "threads" and dls_of(folder, workers="processes", num_workers=1).valid.workers == "processes"
    for order in (dict(sampler=[1]), dict(shuffle=False), dict(batch_sampler=[[1]])):
        with pytest.raises((TypeError, ValueError), match="shuffle"): dls_of(folder, **order)


def test_batch_transforms_keep_the_protocol_of_items(folder):
    met = []
    class Batch(Transform):
        def __init__(self, order): self.order = order
        def setup(self, items): met.append(next(iter(items)).shape)
        def __call__(self, x, generator): assert isinstance(generator, torch.Generator); return x + torch.rand((), generator=generator)
        def for_valid(self): return None
    dls = block(pixels, batch_tfms=[Batch(2), Batch(1)]).dataloaders(folder, 4)
    assert met == [(4, 3, 8, 8)]*2 and len(dls.train.batch_tfms.tfms) == 2 and not dls.valid.batch_tfms.tfms
    like(dls.one_batch(True)[0].float(), next(iter(dls.valid))[0].float(), rtol=0, atol=0)
    like(dls.train.batch_tfms((torch.zeros(2), None), gen(3))[0], dls.train.batch_tfms((torch.zeros(2), None), gen(3))[0])


def test_looking_and_setting_up_change_no_random_number(folder):
    torch.manual_seed(3); want = torch.rand(1), random.random()
    random.seed(3); want = want[0], random.random()
    torch.manual_seed(3); random.seed(3)
    dls = block(pixels, Noise(), lambda x: x/300, batch_tfms=Normalize()).dataloaders(folder, 4)
    dls.one_batch(); dls.show_batch(4)
    assert want == (torch.rand(1), random.random())


def test_a_look_leaves_the_order_of_training_alone(folder, monkeypatch):
    def order(look, generator=None):
        set_seed(4)
        dls = rows(n=40, generator=generator)
        walk = iter(dls.train); got = [next(walk)[0]]
        if look: dls.one_batch(); dls.one_batch(True); dls.show_batch(2)
        indices = dls.train.indices
        return [*got, *(xb for xb, _ in walk), *(xb for xb, _ in dls.train)], indices
    for chance in (lambda: None, gen):
        (plain, i), (looked, j) = order(False, chance()), order(True, chance())
        like(looked, plain, rtol=0, atol=0); assert i == j                        # not even in the middle of an epoch
    dls = rows()
    def hang(*args): raise AssertionError("waits for the other process")
    for name, value in dict(is_initialized=lambda: True, get_rank=lambda: 0, get_world_size=lambda: 2, all_gather_object=hang).items():
        monkeypatch.setattr(torch.distributed, name, value)
    assert len(dls.one_batch()[0]) == 4                                          # one process may look alone
    with pytest.raises(AssertionError, match="waits"): next(iter(dls.train))


LEAVES = st.sampled_from([lambda i: torch.tensor([i, 5]), lambda i: torch.full((2, 1), float(i)), lambda i: f"text {i}"])
SAMPLES = st.recursive(LEAVES, lambda part: st.one_of(
    st.lists(part, min_size=1, max_size=3).map(lambda parts: lambda i: [p(i) for p in parts]), st.lists(part, min_size=1, max_size=3).map(lambda parts: lambda i: tuple(p(i) for p in parts)),
    st.dictionaries(st.sampled_from("ab"), part, min_size=1).map(lambda parts: lambda i: {k: p(i) for k, p in parts.items()})), max_leaves=4)


def plain(x):
    "Tensors as lists, tuples as lists."
    if isinstance(x, dict): return {k: plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, (list, tuple)) else x.tolist() if isinstance(x, torch.Tensor) else x


@given(x=SAMPLES, y=SAMPLES, n=st.integers(1, 4))
def test_decode_takes_any_batch_apart_again(x, y, n):
    ds = ItemSet(range(n), y, Pipeline(x), Pipeline())
    loader = DataLoader(ds, n, batch_tfms=Pipeline())
    xs, ys = ItemLoaders(loader, loader).decode(*next(iter(loader)))
    assert plain(xs) == plain([x(i) for i in range(n)]) and plain(ys) == plain([y(i) for i in range(n)])


def test_decode_of_several_inputs_boxes_and_validation():
    two = rows(get_y=lambda i: {"kind": i % 2, "size": torch.tensor([i])}, item=lambda i: (torch.tensor([i]), torch.tensor([-i])))
    xs, ys = two.decode(*two.one_batch(True), valid=True)
    assert [tuple(map(int, x)) for x in xs] == [(0, 0), (1, -1), (2, -2)] and [(int(y["kind"]), int(y["size"])) for y in ys] == [(0, 0), (1, 1), (0, 2)]
    assert "kind" in str(two.show_batch(2))
    def bag(samples): return torch.stack([x for x, _ in samples]), [y for _, y in samples]
    boxes = rows(get_y=lambda i: torch.zeros(i, 4), collate_fn=bag)               # a list of one's own collate_fn holds an entry per item
    assert [len(y) for y in boxes.decode(*boxes.one_batch(True), valid=True)[1]] == [0, 1, 2]
    class Upside(Transform):
        "Turned in training only."
        def __call__(self, x, generator): return -x
        def decode(self, x): return -x
        def for_valid(self): return None
    dls = rows(item=[lambda i: torch.tensor([float(i)]), Upside()], batch_tfms=[lambda xb: xb*2, Normalize([3.], [2.])])
    assert dls.decode(*dls.one_batch(True), valid=True)[0] == [0, 2, 4]           # what Upside did not do is not undone
    xb, yb = dls.one_batch()
    assert all(x > 0 for x in dls.decode(xb.requires_grad_(), yb)[0]) and not dls.decode(xb, yb)[0][0].requires_grad


def test_decode_show_and_new_items(folder):
    normalize = Normalize([.4, .5, .6], [.2, .3, .1])
    dls = block(pixels, batch_tfms=[lambda xb: xb.float()/255, normalize]).dataloaders(folder, 4)
    set_seed(1); xb, yb = dls.one_batch()
    set_seed(1); raw = block(pixels).dataloaders(folder, 4).one_batch()[0]
    like(xb, (raw.float()/255 - torch.tensor([.4, .5, .6])[:, None, None])/torch.tensor([.2, .3, .1])[:, None, None])
    xs, ys = dls.decode(xb, yb)
    like(torch.stack(xs), raw/255, atol=1e-6)
    assert ys == [dls.vocab[y] for y in yb] and len(dls.show_batch(3)) == 3
    files = dls.valid.ds.items
    like(dls.batch_of([files[0], files[3]]), torch.cat([xb for xb, _ in [*map(dls.valid.batch_tfms, dls.valid)]])[[0, 3]])


def test_a_learner_sees_what_one_batch_shows(folder):
    set_seed(0)
    dls = block(pixels, batch_tfms=[lambda xb: xb.float()/255, Normalize()]).dataloaders(folder, 4)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    learn = Learner(model, dls, cross_entropy, SGD, lr=.01, metrics=[accuracy], quiet=True)
    learn.fit(3)
    assert learn.history[-1]["train_loss"] < learn.history[0]["train_loss"]
    pred = learn.predict(dls.valid)
    assert pred.shape == (6, 2)
    like(pred[:4], model(dls.one_batch(True)[0]).detach(), atol=1e-5)
    like(learn.predict(dls.batch_of(dls.valid.ds.items[[5]])), pred[5:], atol=1e-5)


# --- bad input -------------------------------------------------------------------------------------------------------------

def test_empty_folder_and_lopsided_splits(tmp_path, folder):
    (tmp_path/"none").mkdir()
    with pytest.raises(ValueError, match="found nothing.*folder"): dls_of(tmp_path/"none")
    with pytest.raises(ValueError, match="cat_1.png.*for training and for"): DataBlock(find, lambda items: ([0, 1], [1, 2]), parent_label, pixels).dataloaders(folder)
    with pytest.raises(TypeError, match=r"call it first.*random_splitter\(seed"): DataBlock(find, random_splitter, parent_label, pixels).dataloaders(folder)
    with pytest.raises(FileNotFoundError): dls_of(folder/"missing")
    with pytest.warns(UserWarning, match="'cat'.*two classes"): DataBlock(find, random_splitter(1), parent_label, pixels).dataloaders(folder/"train"/"cat")   # a flat folder
    shutil.rmtree(folder/"val")
    with pytest.raises(ValueError, match="12 training and 0 validation"): dls_of(folder)
    (folder/"train").rename(folder/"val")
    with pytest.raises(ValueError, match="0 training and 12 validation"): dls_of(folder)


def test_what_is_wrong_is_said_at_set_up():
    for split, error, words in ((lambda items: ([0, 1, 1], [1, 2]), ValueError, "1 is for training and for validation"), (lambda items: (range(12), [-1]), ValueError, "11 is for training"),
                                (lambda items: ([True]*5, [5]), IndexError, "boolean"), (lambda items: ([0], [99]), IndexError, "99"), (lambda items: ([0.5], [1]), IndexError, "integer"),
                                (lambda items: ([], [1]), ValueError, "0 training and 1 validation"), (lambda items: random_splitter(), TypeError, "call it first")):
        with pytest.raises(error, match=words): DataBlock(range, split, abs, float).dataloaders(12)
    with pytest.raises(ValueError, match="found nothing"): DataBlock(lambda path: [], random_splitter(), abs, float).dataloaders(None)
    with pytest.raises(KeyError, match="(?s)3.*at item 3"): rows(get_y=lambda i: {}[i])                       # the first look at a label is named, too
    with pytest.raises(ValueError, match="(?s)'c' is not among.*at item 5"): rows(get_y=lambda i: "abc"[i == 5 and 2], y_tfms=Categorize(["a", "b"]))    # in training
    with pytest.raises(ValueError, match="(?s)'c' is not among.*at item 1"): rows(get_y=lambda i: ["c"] if i == 1 else ["a", "b"])
    with pytest.raises(ZeroDivisionError, match="at item 7"): rows(item=[lambda i: 1/(i - 7), Remember()])
    with pytest.raises(ZeroDivisionError, match="at item 99"): rows(item=lambda i: torch.tensor([1/(i - 99)])).batch_of([5, 99])
    for share in (0, 20, .001):
        with pytest.raises(ValueError, match="validation"): DataBlock(range, random_splitter(1, share), abs, float).dataloaders(12)


def test_skipped_items_are_skipped_in_a_set_up_and_none_hides_another(tmp_path):
    def broken(i):
        if i in (4, 5): raise OSError("torn")
        return i
    dls = rows(item=[broken, Remember()], on_error="skip")
    assert sum(len(xb) for xb, _ in dls.train) == 7 and dls.one_batch()[0][0, 0] == 7                          # learned from what could be read
    assert dls.skipped == [(4, "OSError: torn"), (5, "OSError: torn")]
    for den in "pq":
        for part in ("train", "val"): (tmp_path/den/part/"cat").mkdir(parents=True); (tmp_path/den/part/"cat/1.png").write_bytes(b""); picture().save(tmp_path/den/part/"cat/2.png")
    dls = DataBlock(find, grandparent_splitter, lambda f: 0, pixels).dataloaders(tmp_path, 4, on_error="skip")
    assert sum(len(xb) for dl in (dls.train, dls.valid) for xb, _ in dl) == 4
    assert {item for item, _ in dls.skipped} == {tmp_path/den/part/"cat/1.png" for den in "pq" for part in ("train", "val")}    # alike in their last parts


def test_class_only_in_validation_and_single_images(folder):
    (folder/"val/unicorn").mkdir(); picture().save(folder/"val/unicorn/u.png")
    with pytest.raises(ValueError, match="(?s)'unicorn' is not among.*cat.*dog.*unicorn/u.png"): dls_of(folder)      # heard of before an epoch is trained
    given = block(pixels, y_tfms=Categorize(["cat", "dog", "unicorn"]))
    assert given.dataloaders(folder, 4).vocab[-1] == "unicorn"
    (folder/"train/unicorn").mkdir(); picture().save(folder/"train/unicorn/one.png")      # one image in a class is enough
    dls = dls_of(folder)
    assert dls.vocab == ["cat", "dog", "unicorn"] and sorted(torch.cat([y for _, y in dls.train]).tolist()) == [0]*6 + [1]*6 + [2]


@pytest.mark.parametrize("options", [dict(num_workers=0), dict(num_workers=2), pytest.param(dict(num_workers=2, workers="processes"), marks=linux)], ids=["alone", "threads", "processes"])
def test_a_bad_item_stops_or_is_skipped_and_named(folder, options):
    (folder/"train/cat/cat_1.png").write_bytes(b""); (folder/"train/dog/dog_2.png").write_text("text"); (folder/"val/cat/cat_0.png").write_bytes(b"")
    with pytest.raises(OSError, match=r"(cat_1|dog_2)\.png"): list(dls_of(folder, **options).train)
    dls = dls_of(folder, on_error="skip", bs=1, **options)
    assert sum(len(xb) for xb, _ in dls.train) == 10 and sum(len(xb) for xb, _ in dls.valid) == 5     # whole batches of bad photos vanish
    assert sorted(item.name for item, _ in dls.skipped) == ["cat_0.png", "cat_1.png", "dog_2.png"] and all("cannot identify" in why for _, why in dls.skipped)
    list(dls.train); assert len(dls.skipped) == 3                                 # counted once, not each epoch


def test_a_set_up_skips_bad_items_too(folder):
    (folder/"train/cat/cat_1.png").write_bytes(b"")
    dls = block(pixels, batch_tfms=[lambda xb: xb.float(), Normalize()]).dataloaders(folder, 4, on_error="skip")
    assert torch.isfinite(dls.one_batch()[0]).all()


def test_errors_name_the_item_once(folder):
    def broken(x): raise KeyError("oh")
    with pytest.raises(KeyError, match=r"(?s)oh.*train/\w+/\w+_\d.png") as caught: list(block(pixels, broken).dataloaders(folder, 4, num_workers=0).train)
    assert sum("at item" in note for note in caught.value.__notes__) == 1
    with pytest.raises(ValueError, match="cat_1.png"): DataBlock(find, grandparent_splitter, regex_label(r"(cat)_0"), pixels).dataloaders(folder)
    with pytest.raises(RuntimeError, match="equal size"): list(block(lambda f: torch.zeros(Image.open(f).size)).dataloaders(folder, 12).train)


def test_unicode_and_very_long_names(tmp_path):
    for n, name in enumerate(("größe 写真 ☃ '\".jpg" if LINUX else "größe.jpg", "y"*250 + ".jpg", "leer zeichen.JPG", "%s{0}\\n.jpg" if LINUX else "p.jpg")):
        for part in ("train", "val"):
            for kind in ("ключ", "鍵"): (tmp_path/part/kind).mkdir(parents=True, exist_ok=True); picture(seed=n).save(tmp_path/part/kind/name, "jpeg")
    dls = dls_of(tmp_path, bs=8)
    assert dls.one_batch()[0].shape == (8, 3, 8, 8) and dls.vocab == ["ключ", "鍵"]


def test_item_sets_are_datasets(folder):
    files = find(folder)
    ds = ItemSet(files, parent_label, Pipeline([pixels, Noise()]), Pipeline(Categorize(["cat", "dog"])))
    torch.manual_seed(1); a = ds[3]; torch.manual_seed(1); like(ds[3], a, rtol=0, atol=0)      # outside a loader: the global generator
    theirs = torch.utils.data.DataLoader(ds, 5, collate_fn=lambda samples: len(samples))
    assert list(theirs) == [5, 5, 5, 3]

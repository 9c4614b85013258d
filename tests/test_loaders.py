"Lesson 04a: datasets, samplers, collate, the loader with and without workers: laws, faults, and agreement with PyTorch."
import copy
import gc
import json
import multiprocessing as mp
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import warnings
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from hypothesis import given, settings, strategies as st
from torch.utils import data

from exp import loaders
from exp.loaders import BatchSampler, DataLoader, Dataset, Sampler, TensorDataset, collate, cpus, current_generator, thread_map
from exp.setup import set_seed
from exp.testing import test_like

fork_only = pytest.mark.skipif(loaders._START != "fork", reason="workers of a test need fork")
Pair = namedtuple("Pair", "image mask")


def pictures(n=20): return TensorDataset(torch.arange(n*3.).view(n, 3), torch.arange(n))


class Items:
    "A dataset without get_batch; an item may wait, fail, or kill its process."
    def __init__(self, n=20, bad=(), kill=None, wait=0.): self.n, self.bad, self.kill, self.wait = n, bad, kill, wait
    def __len__(self): return self.n
    def __getitem__(self, i):
        time.sleep(self.wait)
        if i in self.bad: raise KeyError("no such picture")
        if i == self.kill: os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((3,), float(i)), i


class Chance(Items):
    "Each item is the numbers that our generator, PyTorch's, NumPy's and Python's give it."
    def __getitem__(self, i):
        if i in self.bad: raise KeyError("no such picture")
        ours = torch.rand((), generator=current_generator(), dtype=torch.float64)
        return torch.tensor([ours, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64), i


KINDS = {"none": {}, "1 process": dict(num_workers=1), "3 processes": dict(num_workers=3),
         "persistent": dict(num_workers=2, persistent_workers=True), "threads": dict(num_workers=3, workers="threads")}
kinds = pytest.mark.parametrize("kind", [pytest.param(k, marks=fork_only) if "num_workers" in v and "workers" not in v else k for k, v in KINDS.items()])


def alive(): return mp.active_children()


def left(seconds=10.):
    "Workers that are still there; those that are just ending are given some seconds."
    end = time.monotonic() + seconds
    while alive() and time.monotonic() < end: time.sleep(.02)
    return alive()


# --- datasets, samplers, collate --------------------------------------------------------------------------------------------

def test_tensor_dataset():
    ds = pictures()
    assert len(ds) == 20 and isinstance(ds, Dataset)
    test_like(ds[3], data.TensorDataset(*ds.tensors)[3])
    test_like(ds.get_batch([4, 2, 2]), collate([ds[4], ds[2], ds[2]]))
    for bad in ((), (torch.ones(2), torch.ones(3))):
        with pytest.raises(ValueError, match="length"): TensorDataset(*bad)


def test_a_subclass_with_its_own_items_is_asked_for_each_of_them():
    class Flip(TensorDataset):
        "One coin per item."
        asked = []
        def __getitem__(self, i):
            self.asked.append(i)
            x, y = super().__getitem__(i)
            return x.flip(0) if i % 2 else x, y
    class Again(Flip): pass
    class Whole(Flip):
        def get_batch(self, idxs): return "a whole batch"
    for cls in (Flip, Again):
        ds = cls(*pictures(6).tensors)
        xb, yb = next(iter(DataLoader(ds, 6)))
        assert cls.asked == list(range(6)) and all(isinstance(i, int) for i in cls.asked); cls.asked.clear()
        test_like((xb, yb), collate([ds[i] for i in range(6)])); cls.asked.clear()
    assert next(iter(DataLoader(Whole(*pictures(6).tensors), 6))) == "a whole batch"
    class Torchy(Items):
        def __getitems__(self, idxs): return [(-i, i) for i in idxs]
    class Under(Torchy):
        def __getitem__(self, i): return 7, i
    assert next(iter(DataLoader(Torchy(), 3)))[0].tolist() == [0, -1, -2]
    assert next(iter(DataLoader(Under(), 3)))[0].tolist() == [7, 7, 7]
    assert next(iter(DataLoader(data.Subset(pictures(), [5, 3]), 2)))[1].tolist() == [5, 3]


@given(st.integers(1, 60), st.integers(1, 20), st.booleans(), st.booleans(), st.integers(0, 99))
def test_samplers_deal_every_index_once_and_as_pytorch_does(n, bs, shuffle, drop_last, seed):
    g = lambda: torch.Generator().manual_seed(seed)
    sampler = Sampler(range(n), shuffle, g())
    theirs = data.RandomSampler(range(n), generator=g()) if shuffle else data.SequentialSampler(range(n))
    assert list(sampler) == list(theirs)
    assert (again := list(sampler)) == sorted(again) or shuffle
    assert sorted(again) == list(range(n))
    ours, theirs = (f(list(range(n)), bs, drop_last) for f in (BatchSampler, data.BatchSampler))
    assert list(ours) == list(theirs) and len(ours) == len(theirs) == len(list(ours))


def test_shuffling_follows_the_seed_and_leaves_a_private_generator_private():
    orders = []
    for seed in (1, 1, 2): set_seed(seed); s = Sampler(range(50), True); orders.append((list(s), list(s)))
    assert orders[0] == orders[1] != orders[2] and orders[0][0] != orders[0][1]
    state = torch.get_rng_state()
    for ds in (pictures(), Items()): list(DataLoader(ds, 4, shuffle=True, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
    list(DataLoader(pictures(), 4)); assert torch.equal(state, torch.get_rng_state())   # rows in order: no chance involved


@pytest.mark.parametrize("items", [
    [(torch.ones(2), 1), (torch.zeros(2), 2)], [[1, 2.], [3, 4.]], [1, 2], [1.5, 2.], [True, False],
    [np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32)], [np.int32(1), np.int32(2)], [torch.tensor(1)], ["a", "b"], [b"a", b"b"],
    [{"a": torch.ones(1), "b": (1, 2.)}, {"a": torch.zeros(1), "b": (3, 4.)}], [Pair(1., 2), Pair(3., 4)],
    [{"pair": Pair(torch.ones(1), "x")}, {"pair": Pair(torch.zeros(1), "y")}],
])
def test_collate_equals_pytorchs(items):
    ours, theirs = collate(items), data.default_collate(items)
    test_like(as_tuples(ours), as_tuples(theirs))
    assert type(ours) is type(theirs) or type(items[0]) is tuple is type(ours)


def as_tuples(x):
    if isinstance(x, dict): return {k: as_tuples(v) for k, v in x.items()}
    if isinstance(x, (str, bytes)): return torch.tensor(list(x.encode() if isinstance(x, str) else x))
    return tuple(map(as_tuples, x)) if isinstance(x, (list, tuple)) else x


class Picture(torch.Tensor): "A tensor that knows it is a picture."


def test_collate_keeps_types():
    pair = collate([Pair(torch.ones(2), 1), Pair(torch.zeros(2), 2)])
    assert type(pair) is Pair and pair.image.shape == (2, 2) and pair.mask.tolist() == [1, 2]
    for make in (dict, OrderedDict, UserDict, types.MappingProxyType, lambda d: defaultdict(list, d)):
        batch = collate([make({"b": 1, "a": 2.}), make({"b": 3, "a": 4.})])            # any mapping is a dict: what else it knows of an item is not of the batch
        assert type(batch) is dict and list(batch) == ["b", "a"] and batch["b"].tolist() == [1, 3]
    image = collate([torch.ones(2).as_subclass(Picture), torch.zeros(2).as_subclass(Picture)])
    assert type(image) is Picture and image.shape == (2, 2)
    assert type(collate([(image, Pair(image, 1))])[1].image) is Picture


@pytest.mark.parametrize("items, error, words", [
    ([torch.ones(2), torch.ones(3)], RuntimeError, r"\[2\].*\[3\]"), ([(1, 2), (1,)], ValueError, "shorter"), ([None, None], TypeError, "object"),
    ([np.ones(2), np.ones(3)], ValueError, "shape"), ([{"a": 1, "b": 2}, {"a": 1}], KeyError, "b"),
    ([Image.new("L", (2, 2))]*2, TypeError, "a Image object does not stack.*collate_fn"), ([(1, None)], TypeError, "a NoneType object"),
])
def test_collate_refuses(items, error, words):
    with pytest.raises(error, match=words): collate(items)


# --- the loader in this process ---------------------------------------------------------------------------------------------

@given(st.integers(1, 40), st.integers(1, 15), st.booleans(), st.booleans())
def test_loader_gives_pytorchs_batches(n, bs, drop_last, whole):
    ds = pictures(n) if whole else Items(n)
    if drop_last and bs > n: return
    ours, theirs = DataLoader(ds, bs, drop_last=drop_last), data.DataLoader(ds, bs, drop_last=drop_last)
    assert len(ours) == len(theirs) == len(list(ours))
    test_like(list(map(tuple, ours)), list(map(tuple, theirs)))


def test_loader_options():
    order = [3, 1, 1, 7]
    assert [yb.tolist() for _, yb in DataLoader(pictures(), 2, sampler=order)] == [[3, 1], [1, 7]]
    assert list(DataLoader(pictures(4), 2, collate_fn=len)) == [2, 2]                     # not bypassed by get_batch
    dl = DataLoader(pictures(), 5, shuffle=True)
    a, b = iter(dl), iter(dl); assert sorted(torch.cat([next(i)[1] for i in (a,)*4]).tolist()) == list(range(20)); next(b)
    test_like(list(DataLoader([(1, 2), (3, 4)], 2))[0], (torch.tensor([1, 3]), torch.tensor([2, 4])))
    assert len(next(iter(DataLoader(pictures(100))))[1]) == 64
    assert DataLoader(pictures(), collate_fn=None).collate_fn is collate


def test_a_batch_sampler_decides_who_comes_together():
    lists = [[4, 2], [7], [1, 1, 0]]
    dl = DataLoader(pictures(), batch_sampler=lists)
    assert len(dl) == 3 and [yb.tolist() for _, yb in dl] == lists
    theirs = data.DataLoader(pictures(), batch_sampler=lists)
    test_like(list(map(tuple, dl)), list(map(tuple, theirs)))
    class Endless:
        def __iter__(self):
            while True: yield [0, 1]
    dl = DataLoader(pictures(), batch_sampler=Endless())
    it = iter(dl); assert [next(it)[1].tolist() for _ in range(3)] == [[0, 1]]*3
    with pytest.raises(TypeError, match="len"): len(dl)
    by_torch = data.BatchSampler(data.RandomSampler(range(20), generator=torch.Generator().manual_seed(1)), 6, False)
    assert sorted(torch.cat([yb for _, yb in DataLoader(pictures(), batch_sampler=by_torch)]).tolist()) == list(range(20))


@kinds
def test_indices_are_those_of_the_batch_just_given(kind):
    for ds in (pictures(), Items()):
        dl = DataLoader(ds, 3, shuffle=True, **KINDS[kind])
        for _, yb in dl: assert list(dl.indices) == yb.tolist()
        dl = DataLoader(ds, batch_sampler=[[4, 4], [1]], **KINDS[kind])
        assert [list(dl.indices) for _ in dl] == [[4, 4], [1]]


@pytest.mark.parametrize("args, error, words", [
    (dict(ds=[], bs=2), ValueError, "no batch: 0 items"), (dict(ds=iter([1]), bs=2), TypeError, "len"), (dict(bs=0), ValueError, "bs=0"),
    (dict(shuffle=True, sampler=[1]), ValueError, "sampler"),
    (dict(bs=9, ds=[1, 2], drop_last=True), ValueError, "drop_last"), (dict(sampler=[]), ValueError, "no batch"), (dict(batch_sampler=[]), ValueError, "no batch"),
    (dict(sampler=[1], batch_sampler=[[1]]), ValueError, "give one"), (dict(workers="gnomes"), ValueError, "gnomes"), (dict(on_error="weep"), ValueError, "weep"),
    (dict(share="eqaul"), ValueError, "'eqaul'.*'equal'"), (dict(sampler=[9]), IndexError, "9"), (dict(batch_sampler=[3]), TypeError, "iterable"),
])
def test_loader_refuses(args, error, words):
    with pytest.raises(error, match=words): list(DataLoader(**{"ds": pictures(9), "bs": 2} | args))


def test_batch_sampler_refuses_batches_of_nothing():
    for bs in (0, -1):
        with pytest.raises(ValueError, match=f"bs={bs}"): BatchSampler(range(3), bs)


def test_an_order_that_is_used_up_is_told():
    for options in (dict(bs=2, sampler=(i for i in range(5))), dict(batch_sampler=iter([[0, 1], [2]]))):
        dl = DataLoader(pictures(), **options)
        assert len(list(dl)) in (2, 3)
        with pytest.raises(RuntimeError, match="generator, used up"): list(dl)


@kinds
@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_an_order_may_be_a_tensor_or_an_array(kind, make):
    for options in (dict(batch_sampler=make([[3, 1], [1, 7]])), dict(bs=2, sampler=make([3, 1, 1, 7]))):
        for ds in (pictures(), Items()):
            dl = DataLoader(ds, **options, **KINDS[kind])
            assert [(dl.indices, yb.tolist()) for _, yb in dl] == [([3, 1], [3, 1]), ([1, 7], [1, 7])]
            assert all(type(i) is int for i in dl.indices)
    dl = DataLoader(Items(bad=[1]), batch_sampler=make([[3, 1], [1, 7]]), on_error="skip", **KINDS[kind])
    assert [yb.tolist() for _, yb in dl] == [[3], [7]] and list(dl.skipped) == [1]


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_a_mask_is_no_order(make):
    mask = make([False, True, True, False])
    for options in (dict(bs=2, sampler=mask), dict(batch_sampler=[mask])):
        for ds in (pictures(4), Items(4)):
            with pytest.raises(TypeError, match="flatnonzero"): list(DataLoader(ds, **options))
    assert [yb.tolist() for _, yb in DataLoader(pictures(4), 2, sampler=np.flatnonzero(mask))] == [[1, 2]]


def test_what_a_loader_was_made_of_is_not_exchanged():
    dl = DataLoader(pictures(), 5, shuffle=True)
    for twin in (dl, copy.copy(dl), copy.deepcopy(dl), pickle.loads(pickle.dumps(dl))):
        for name in "ds bs shuffle drop_last sampler batch_sampler collate_fn generator on_error workers num_workers".split():
            with pytest.raises(AttributeError, match=f"{name} is fixed.*new loader"): setattr(twin, name, None)
        twin.batch_tfms, twin.share, twin.note = abs, None, "mine"
        twin.note = "still mine"
        assert len(list(twin)) == 4


# --- chance -----------------------------------------------------------------------------------------------------------------

def epochs(kind, n=3, ds=None, **options):
    "n epochs as tensors (4, items): our generator, PyTorch's, NumPy's, Python's."
    set_seed(4); dl = DataLoader(ds or Chance(), **{"bs": 3} | options | KINDS[kind])
    return [torch.cat([xb for xb, _ in dl]).T for _ in range(n)]


@kinds
@pytest.mark.parametrize("order", [dict(), dict(shuffle=True), dict(sampler=[3, 1, 1, 2, 1]), dict(batch_sampler=[[1, 2], [5, 1, 0]])])
def test_chance_is_the_same_whoever_makes_the_item_and_new_every_time(kind, order):
    right, got = epochs("none", **order), epochs(kind, **order)
    rows = slice(0, 1) if kind == "threads" else slice(None)     # threads share the global generators, and draw from them in any order
    first = got[:1] if kind == "threads" else got
    for a, b in zip(right, first): test_like(a[rows], b[rows], rtol=0, atol=0)
    for row in zip(*got):
        numbers = torch.cat(row)
        assert len(numbers.unique()) == len(numbers), "no number comes twice: not in an epoch, not in the next, not for the same item again"


@settings(max_examples=15)
@given(st.integers(1, 25), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.booleans())
def test_our_generator_gives_the_same_for_any_number_of_threads(n, bs, threads, shuffle, drop_last):
    class Ours(Items):
        def __getitem__(self, i): return torch.rand(2, generator=current_generator()), i
    if drop_last and bs > n: return
    runs = []
    for options in (dict(), dict(num_workers=threads, workers="threads")):
        set_seed(n); dl = DataLoader(Ours(n), bs, shuffle, drop_last=drop_last, **options)
        runs.append([list(dl), list(dl), torch.rand(1)])
    test_like(*runs, rtol=0, atol=0)


def test_making_items_leaves_the_global_generators_where_they_were():
    set_seed(1); list(DataLoader(Items(), 3)); after = torch.rand(1), np.random.rand(), random.random()
    set_seed(1); list(DataLoader(Chance(), 3)); test_like((torch.rand(1), np.random.rand(), random.random()), after, rtol=0, atol=0)
    assert current_generator() is torch.default_generator
    class Fails(Items):
        def __getitem__(self, i): current_generator(); torch.rand(1); raise ValueError
    set_seed(1)
    with pytest.raises(ValueError): list(DataLoader(Fails(), 3))
    test_like(torch.rand(1), after[0], rtol=0, atol=0)
    assert current_generator() is torch.default_generator


def test_an_item_that_fails_moves_nobody_elses_chance():
    whole, holes = (epochs("none", ds=Chance(9, bad=bad), on_error="skip")[0] for bad in ((), (4, 8)))
    keep = [i for i in range(9) if i not in (4, 8)]
    test_like(whole[0, keep], holes[0], rtol=0, atol=0)


class ByItems(Items):
    def __getitem__(self, i): return torch.rand(2, generator=current_generator(), dtype=torch.float64), i


class ByBatches(ByItems):
    def get_batch(self, idxs): return torch.rand(len(idxs), 2, generator=current_generator(), dtype=torch.float64), torch.tensor(idxs)


@kinds
@pytest.mark.parametrize("bs", [1, 4])
@pytest.mark.parametrize("ds", [ByItems(8), data.Subset(ByItems(20), range(0, 16, 2)), ByBatches(8)], ids=["items", "Subset", "get_batch"])
def test_the_same_seed_gives_the_same_items_and_no_chance_comes_twice(kind, bs, ds):
    def two_epochs():
        dl = DataLoader(ds, bs, shuffle=True, generator=torch.Generator().manual_seed(2), **KINDS[kind])
        return [torch.cat([xb for xb, _ in dl]) for _ in range(2)]
    first, again = two_epochs(), two_epochs()
    test_like(first, again, rtol=0, atol=0)
    assert len(torch.cat(first).unique()) == 2*2*len(ds), "in no two items, batches or epochs"


@kinds
def test_every_kind_leaves_the_generators_in_the_same_state(kind):
    states = []
    for workers in ({}, KINDS[kind]):
        set_seed(1); g = torch.Generator().manual_seed(2)
        for options in (dict(generator=g), {}): dl = DataLoader(ByItems(9), 2, shuffle=True, **options, **workers); list(dl); list(dl)
        for _ in dl: break
        states.append((g.get_state(), torch.get_rng_state(), torch.tensor(random.getstate()[1]), torch.from_numpy(np.random.get_state()[1].astype(np.int64))))
    test_like(*states, rtol=0, atol=0)


@kinds
def test_a_loader_inside_an_item(kind):
    class Outer(Items):
        def __getitem__(self, i):
            before = torch.rand(1, generator=current_generator(), dtype=torch.float64)
            inner = torch.cat([xb for xb, _ in DataLoader(ByItems(3), 2)]).flatten()
            return torch.cat([before, inner, torch.rand(1, generator=current_generator(), dtype=torch.float64)]), i
    runs = []
    for workers in ({}, KINDS[kind]):
        set_seed(3); dl = DataLoader(Outer(6), 2, **workers)
        runs.append([torch.cat([xb for xb, _ in dl]), torch.cat([xb for xb, _ in dl]), torch.rand(1)])
    test_like(*runs, rtol=0, atol=0)
    assert len(torch.cat(runs[0][:2]).unique()) == 2*6*8


def test_a_loader_in_another_thread_keeps_away_from_the_global_generators():
    inside, go, seen = threading.Event(), threading.Event(), []
    class Waits(Items):
        def __getitem__(self, i): inside.set(); go.wait(60); return i
    set_seed(1); right = [torch.rand(1), torch.rand(1)]
    set_seed(1); loop = threading.Thread(target=lambda: seen.extend(DataLoader(Waits(1), 1, generator=torch.Generator()))); loop.start()
    inside.wait(60); first = torch.rand(1)                         # while an item is being made over there
    go.set(); loop.join()
    test_like([first, torch.rand(1)], right, rtol=0, atol=0)
    assert len(seen) == 1


# --- errors -----------------------------------------------------------------------------------------------------------------

@kinds
def test_a_failing_item_is_named_and_its_error_keeps_its_type(kind):
    seen = []
    with pytest.raises(KeyError, match=r"no such picture") as caught:
        for _, yb in DataLoader(Items(bad=[13]), 4, **KINDS[kind]): seen += yb.tolist()
    assert seen == list(range(12)), "what came before is delivered"
    notes = "\n".join(caught.value.__notes__)
    assert "Items[13]" in notes and ("process" not in kind or "in worker" in notes and "__getitem__" in notes)
    del caught
    gc.collect()
    assert not left()


@kinds
def test_items_that_do_not_fit_together_are_named(kind):
    class Odd(Items):
        def __getitem__(self, i): return torch.zeros(3 if i == 5 else 2)
    with pytest.raises(RuntimeError, match="equal size") as caught: list(DataLoader(Odd(), 4, **KINDS[kind]))
    assert "items [4, 5, 6, 7]" in "\n".join(caught.value.__notes__)


@fork_only
def test_an_error_that_cannot_be_sent_is_told():
    class Stubborn(Exception):
        def __init__(self, a, b): super().__init__(f"{a} and {b}")
    class Fails(Items):
        def __getitem__(self, i): raise Stubborn(i, "more")
    with pytest.raises(RuntimeError, match="Stubborn: 0 and more") as caught: list(DataLoader(Fails(), 4, num_workers=1))
    assert "Fails[0]" in "\n".join(caught.value.__notes__)


@kinds
def test_an_error_that_forgets_on_the_way_keeps_type_and_notes(kind):
    class Damaged(Items):
        def __getitem__(self, i): return json.loads("{")
    with pytest.raises(json.JSONDecodeError, match="line 1 column 2") as caught: list(DataLoader(Damaged(), 4, **KINDS[kind]))
    notes = "\n".join(caught.value.__notes__)
    assert "Damaged[0]" in notes and "items [0, 1, 2, 3]" in notes and ("process" not in kind or "(in worker" in notes)


@kinds
def test_stop_iteration_in_an_item_is_an_error_not_the_end(kind):
    class Stops(Items):
        def __getitem__(self, i): return next(iter([])) if i == 3 else i
    class StopsAtOnce(Items):
        def get_batch(self, idxs): raise StopIteration
    for ds in (Stops(), StopsAtOnce()):
        with pytest.raises(RuntimeError, match="StopIteration"): list(DataLoader(ds, 2, **KINDS[kind]))


@kinds
def test_skip_leaves_bad_items_out_and_says_which(kind):
    dl = DataLoader(Items(bad=[0, 1, 5]), 2, on_error="skip", **KINDS[kind])
    for _ in range(2):
        batches = [(list(dl.indices), yb.tolist()) for _, yb in dl]
        assert all(a == b for a, b in batches) and sum((a for a, _ in batches), []) == [i for i in range(20) if i not in (0, 1, 5)]
        assert dl.skipped == dict.fromkeys([0, 1, 5], "KeyError: 'no such picture'")
    with pytest.raises(RuntimeError, match="no item.*no such picture"): list(DataLoader(Items(bad=range(20)), 2, on_error="skip", **KINDS[kind]))
    class Half(TensorDataset):
        def __getitem__(self, i): return super().__getitem__(i) if i % 2 else 1/0
    assert next(iter(DataLoader(Half(*pictures().tensors), 6, on_error="skip", **KINDS[kind])))[1].tolist() == [1, 3, 5]


# --- workers ----------------------------------------------------------------------------------------------------------------

@kinds
def test_workers_change_nothing(kind):
    for ds in (pictures(), Items()):
        for options in (dict(shuffle=True), dict(drop_last=True), dict(sampler=[1, 1, 2]), dict(batch_sampler=[[3], [1, 2]])):
            runs = []
            for workers in ({}, KINDS[kind]):
                set_seed(1); dl = DataLoader(ds, **{"bs": 3} | options | workers)
                runs.append([list(dl), list(dl), torch.rand(1)])
            test_like(*runs, rtol=0, atol=0)
    del dl
    assert not left()


@fork_only
@pytest.mark.parametrize("batch", [torch.ones(2, dtype=torch.bfloat16), {"a": [torch.zeros(0), "text", None]}, np.arange(3), torch.ones(2, 3).T,
                                   Pair(torch.ones(1), 2), torch.ones(2).as_subclass(Picture), torch.zeros(3, dtype=torch.bool), torch.ones(2, requires_grad=True)*2,
                                   torch.ones(2, dtype=torch.cfloat).conj(), torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)])
def test_any_batch_comes_through(batch):
    got = next(iter(DataLoader(Items(2), 2, num_workers=1, collate_fn=lambda items: batch)))
    assert type(got) is type(batch)
    if isinstance(batch, dict): assert got["a"][1:] == ["text", None] and got["a"][0].shape == (0,)
    elif isinstance(batch, torch.Tensor):
        test_like(got.as_subclass(torch.Tensor), batch.detach().as_subclass(torch.Tensor)); got.zero_()   # writable
        assert got.stride() == batch.stride()
    else: test_like(got, batch)


@fork_only
def test_a_batch_that_cannot_be_sent_is_an_error_not_a_hang():
    with pytest.raises((pickle.PicklingError, AttributeError), match="pickle"): list(DataLoader(Items(), 2, num_workers=2, collate_fn=lambda items: lambda: 0))


@fork_only
@pytest.mark.parametrize("persistent", [False, True])
def test_a_killed_worker_raises(persistent):
    options = dict(num_workers=2, persistent_workers=persistent)
    with pytest.raises(RuntimeError, match=r"worker [01] was killed by SIGKILL at items \[6, 7\].*memory"): list(DataLoader(Items(kill=7), 2, **options))
    class Exits(Items):
        def __getitem__(self, i): os._exit(3)
    with pytest.raises(RuntimeError, match="exit code 3"): list(DataLoader(Exits(), 2, **options))
    dl = DataLoader(Items(40), 2, **options); it = iter(dl); next(it)
    for p in alive(): p.kill(); p.join()
    with pytest.raises(RuntimeError, match="killed by SIGKILL"): list(it)                  # killed while idle
    assert len(list(dl)) == 20, "the next epoch has new workers"
    if persistent:
        for p in alive(): p.kill(); p.join()
        assert len(list(dl)) == 20
    del dl
    assert not left()


def ending(task): os._exit(3)


@fork_only
def test_many_threads_may_ask_how_a_worker_ended():
    for _ in range(10):
        crew, says = loaders._Crew(2, ending), []
        def ask(worker, says=says):
            try: worker((0, 0, [5]))
            except RuntimeError as error: says.append(str(error))
        threads = [threading.Thread(target=ask, args=(worker,)) for worker in crew.workers*3]
        threads += [threading.Thread(target=mp.active_children)]            # it, too, takes note of who has ended
        for t in threads: t.start()
        for t in threads: t.join()
        assert len(says) == 6 and all("exit code 3 at items [5]" in word for word in says), says
        assert not crew.alive()
        stops = [threading.Thread(target=crew.stop) for _ in range(3)]
        for t in stops: t.start()
        for t in stops: t.join()


@fork_only
def test_workers_of_a_worker_are_refused_not_waited_for():
    class Outer(Items):
        def __getitem__(self, i):
            if mp.parent_process(): signal.alarm(100)                                   # who waits for ever dies of it
            return len(list(DataLoader(Items(4), 2, num_workers=1)))
    with pytest.raises(AssertionError, match="daemonic"): list(DataLoader(Outer(4), 2, num_workers=1))
    assert next(iter(DataLoader(Outer(4), 2, num_workers=2, workers="threads"))).tolist() == [2, 2]


@fork_only
def test_a_worker_holds_no_pipe_of_another():
    "Or else, where two threads start workers at once, nobody would hear of the death of one while the other lives."
    crews = []
    threads = [threading.Thread(target=lambda: crews.append(loaders._Crew(3, ending))) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    def sockets(pid): return {link for fd in os.listdir(f"/proc/{pid}/fd") if os.path.islink(f"/proc/{pid}/fd/{fd}")
                              for link in [os.readlink(f"/proc/{pid}/fd/{fd}")] if link.startswith("socket")}
    for worker in [w for crew in crews for w in crew.workers]:
        deadline = time.monotonic() + 60
        while len(mine := sockets(worker.process.pid) - sockets(os.getpid())) != 1 and time.monotonic() < deadline: time.sleep(.01)
        assert len(mine) == 1
    for crew in crews: crew.stop()
    assert not left()


@fork_only
def test_a_forked_copy_of_a_loader_leaves_the_workers_alone():
    dl = DataLoader(Items(), 2, num_workers=2, persistent_workers=True)
    assert len(list(dl)) == 10 and (pids := {p.pid for p in alive()})
    for act in ("use", "drop"):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if act == "use": code = len(list(dl)) - 10             # with workers of its own
                else: dl._crew = None; gc.collect(); code = 0
            finally: os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
    assert len(list(dl)) == 10 and {p.pid for p in alive()} == pids
    del dl
    assert not left()


@fork_only
@pytest.mark.parametrize("twin_of", [copy.copy, copy.deepcopy, lambda dl: pickle.loads(pickle.dumps(dl))], ids=["copy", "deepcopy", "pickle"])
def test_a_copy_of_a_loader_at_work_has_workers_of_its_own(twin_of):
    dl = DataLoader(data.Subset(TensorDataset(torch.arange(8.)), range(6)), 2, num_workers=2, persistent_workers=True, on_error="skip")
    right = list(dl); mine = {p.pid for p in alive()}
    twin = twin_of(dl)
    test_like(list(twin), right)
    assert mine < {p.pid for p in alive()}
    twin.skipped |= {3: "of the twin"}
    del dl; gc.collect()
    test_like(list(twin), right)
    del twin; gc.collect()
    assert not left()


@fork_only
def test_workers_persist_between_epochs_and_end_with_the_loader():
    class Who(Items):
        def __getitem__(self, i): return os.getpid()
    dl = DataLoader(Who(), 5, num_workers=2, persistent_workers=True)
    pids = {int(p) for _ in range(3) for b in dl for p in b}
    for _ in dl: break                                              # leaving early keeps them
    pids |= {int(p) for b in dl for p in b}
    assert pids == {p.pid for p in alive()} and len(pids) <= 2
    a, b = iter(dl), iter(dl)                                       # two epochs at once share them
    for x, y in zip(a, b): assert {*x.tolist(), *y.tolist()} <= pids
    del a, b
    with pytest.raises(ZeroDivisionError):
        for _ in dl: raise ZeroDivisionError
    assert len(list(dl)) == 4
    del dl; gc.collect()
    assert not left()
    pids = [{int(p) for b in DataLoader(Who(), 5, num_workers=2) for p in b} for _ in range(2)]
    assert not pids[0] & pids[1] and not left()


@fork_only
@pytest.mark.parametrize("persistent", [False, True])
def test_leaving_early_ends_the_workers_and_ctrl_c_keeps_things_usable(persistent):
    for _ in DataLoader(Items(wait=.01), 2, num_workers=2): break
    assert not left()
    class Busy(Items):
        def __getitem__(self, i):
            if self.wait and i == 0: os.kill(os.getppid(), signal.SIGINT)
            return super().__getitem__(i)
    ds = Busy(wait=600.)
    dl = DataLoader(ds, 2, num_workers=2, persistent_workers=persistent)
    it, start = iter(dl), time.monotonic()
    with pytest.raises(KeyboardInterrupt): next(it)                                     # Ctrl-C while the workers are busy for ten minutes
    assert time.monotonic() - start < 500 and not left()
    ds.wait = 0.
    assert len(list(dl)) == 10


@fork_only
@pytest.mark.parametrize("signum, persistent", [(signal.SIGINT, False), (signal.SIGKILL, True)])
def test_no_worker_outlives_its_process(signum, persistent):
    code = f"""
        import multiprocessing, sys, time
        from exp.loaders import DataLoader
        dl = DataLoader([(i, i) for i in range(1000)], 2, num_workers=2, persistent_workers={persistent})
        it = iter(dl)
        next(it); print(*[p.pid for p in multiprocessing.active_children()], flush=True)
        time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pids = list(map(int, process.stdout.readline().split()))
    assert len(pids) == 2
    process.send_signal(signum); process.wait(120)
    deadline = time.monotonic() + 120
    def running(pid):
        try: return open(f"/proc/{pid}/stat").read().split()[2] != "Z"
        except (FileNotFoundError, ProcessLookupError): return False
    while any(map(running, pids)) and time.monotonic() < deadline: time.sleep(.02)
    assert not any(map(running, pids))
    process.stdout.close(); process.stderr.close()


@fork_only
def test_many_batches_kept_need_no_file_handles():
    code = """
        import resource, torch
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        from exp.loaders import DataLoader
        class Rows:
            def __len__(self): return 400
            def __getitem__(self, i): return torch.zeros(1000), i
        print(len(list(DataLoader(Rows(), 2, num_workers=2))))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout == "200\n", done.stderr


def test_without_fork(monkeypatch):
    monkeypatch.setattr(loaders, "_START", "spawn")
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle.*lambda"): list(DataLoader(pictures(), 2, num_workers=1, collate_fn=lambda items: items))
    assert not left() and DataLoader(Items(), num_workers=None).num_workers == 0
    test_like(list(DataLoader(pictures(6), 2, num_workers=1)), list(DataLoader(pictures(6), 2)))
    local = type("Local", (Items,), {"__module__": "__main__"})             # what a notebook defines
    monkeypatch.setattr(sys.modules["__main__"], "Local", local, raising=False)
    with pytest.raises(RuntimeError, match="notebook.*num_workers=0"): list(DataLoader(local(), 2, num_workers=1))
    assert not left()


def test_as_many_workers_as_are_useful():
    assert DataLoader(pictures(), num_workers=None).num_workers == 0          # rows of tensors
    assert DataLoader(Items(), num_workers=None, workers="threads").num_workers == min(8, cpus())


# --- threads ----------------------------------------------------------------------------------------------------------------

@given(st.lists(st.integers()), st.integers(0, 4))
def test_thread_map_is_map(items, threads): assert list(thread_map(lambda x: x*x, items, threads)) == [x*x for x in items]


def test_thread_map_works_ahead_and_ends_with_its_iterator():
    started, n = [], threading.active_count()
    results = thread_map(lambda i: started.append(i) or i, range(100), 2)
    assert next(results) == 0 and len(started) <= 5
    results.close()
    assert threading.active_count() == n
    with pytest.raises(ZeroDivisionError): list(thread_map(lambda i: 1/i, [1, 0, 2], 2))
    assert threading.active_count() == n


# --- several processes ------------------------------------------------------------------------------------------------------

def in_processes(world, func, *args):
    "What func(rank, *args) returns in each of `world` processes that are joined under gloo."
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        def work(rank, pipe):
            torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
            try: result = func(rank, *args)
            except Exception as error: result = f"{type(error).__name__}: {error}"
            pipe.send(result)
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        ends = [context.Pipe() for _ in range(world)]
        processes = [context.Process(target=work, args=(rank, far_end)) for rank, (_, far_end) in enumerate(ends)]
        for p, (_, far_end) in zip(processes, ends): p.start(); far_end.close()
        try: return [end.recv() for end, _ in ends]                                     # EOFError from one that died
        finally:
            for p in processes: p.join(60)


def share(rank, n, bs, options):
    set_seed(3)
    dl = DataLoader(Chance(n), bs, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = [[(list(dl.indices), xb[:, 0].tolist()) for xb, _ in dl] for _ in range(2)]
    return len(dl), got, [str(w.message) for w in said]


@fork_only
@pytest.mark.parametrize("options", [dict(shuffle=True), dict(sampler=[*range(1, 23)]), dict(shuffle=True, num_workers=2), dict(shuffle=True, drop_last=True)])
def test_training_gives_every_process_equally_many_batches_of_one_order(options):
    alone = share(0, 23, 4, options)[1]
    results = in_processes(2, share, 23, 4, options)
    for epoch in range(2):
        ours = [result[1][epoch] for result in results]
        assert len(ours[0]) == len(ours[1]) == results[0][0] == results[1][0] == (2 if options.get("drop_last") else 3)
        dealt = [batch for pair in zip(*ours) for batch in pair]
        assert dealt == alone[epoch][:len(dealt)], "the joint order, and in it the same chance"
    assert not results[0][2] == options.get("drop_last", False)


@fork_only
@pytest.mark.parametrize("world", [2, 3])
def test_judging_leaves_nothing_out_and_nothing_twice(world):
    results = in_processes(world, share, 23, 4, {})
    for epoch in range(2):
        seen = [i for result in results for indices, _ in result[1][epoch] for i in indices]
        assert sorted(seen) == list(range(23)) and all(len(r[1][epoch]) == r[0] for r in results)
    assert not any(r[2] for r in results)


@fork_only
def test_pytorchs_own_sharing_sampler_is_not_shared_again():
    def own(rank):
        sampler = data.DistributedSampler(range(20), shuffle=False)
        dl = DataLoader(pictures(), 2, sampler=sampler)
        return len(dl), [i for _, yb in dl for i in yb.tolist()]
    assert in_processes(2, own) == [(5, list(range(0, 20, 2))), (5, list(range(1, 20, 2)))]


@fork_only
def test_processes_that_shuffle_differently_are_told():
    def differ(rank): set_seed(rank); return len(list(DataLoader(pictures(), 2, shuffle=True)))
    assert all("same seed" in result for result in in_processes(2, differ))


@fork_only
def test_shares():
    def dealt(rank):
        out = {}
        for order in ({}, dict(shuffle=True)):
            for share in ("auto", "equal", "all", None):
                set_seed(1); dl = DataLoader(Items(9), 2, share=share, **order)
                with warnings.catch_warnings(): warnings.simplefilter("ignore"); got = [yb.tolist() for _, yb in dl]
                assert len(dl) == len(got)
                out[share, bool(order)] = got
        return out
    (alone,), joined = in_processes(1, dealt), in_processes(2, dealt)
    for shuffled in (False, True):
        whole = alone["auto", shuffled]
        assert all(alone[share, shuffled] == whole for share in ("equal", "all", None)), "alone, everybody has all"
        right = {"equal": [whole[0:4:2], whole[1:4:2]], "all": [whole[0::2], whole[1::2]], None: [whole, whole]}
        right["auto"] = right["equal" if shuffled else "all"]
        for share, want in right.items(): assert [ours[share, shuffled] for ours in joined] == want, (share, shuffled)


class SameStart:
    "An order whose first twelve are the same in every process, or which is longer in one."
    def __init__(self, rank, longer): self.indices = [*range(12), *((14, 15, 12, 13) if rank else (12, 13, 14, 15)), *[16, 17]*(longer*rank)]
    def __len__(self): return len(self.indices)
    def __iter__(self): return iter(self.indices)


@fork_only
def test_processes_whose_orders_part_later_or_differ_in_length_are_told():
    class Endless:
        def __iter__(self):
            while True: yield [0, 1]
    def words(rank):
        out = []
        for make in (lambda: DataLoader(pictures(), 2, sampler=SameStart(rank, 0)), lambda: DataLoader(pictures(), 2, sampler=SameStart(rank, 1)),
                     lambda: DataLoader(pictures(), 2, shuffle=True, share="all", generator=torch.Generator().manual_seed(rank)),
                     lambda: DataLoader(pictures(20 + 4*rank), 2, share="equal"), lambda: DataLoader(pictures(), batch_sampler=Endless())):
            try: out.append(f"{len(list(make()))} batches")
            except (RuntimeError, TypeError) as error: out.append(str(error))
        set_seed(rank)                                                                  # other chance in the items is nobody's mistake
        return out, len(list(DataLoader(Chance(8), 2, sampler=range(8))))
    for said, n in in_processes(2, words):
        assert all("same seed" in word for word in said[:4]) and "no len()" in said[4] and n == 2, said


# --- the exercises' checkers ------------------------------------------------------------------------------------------------

class Weighted:
    kind = "right"
    def __init__(self, weights, n, generator=None):
        if self.kind == "in place": weights[:] = [weight/sum(weights) for weight in weights]
        self.weights, self.n, self.generator = torch.as_tensor(weights, dtype=torch.float), n, generator
        if self.kind in ("once", "early"): self.drawn = self.draw()
        if self.kind == "once": self.drawn = iter(self.drawn)

    def __len__(self): return len(self.weights) if self.kind == "its weights" else self.n
    def __iter__(self): return iter(self.drawn if self.kind in ("once", "early") else self.draw())
    def draw(self):
        weights = {"uniform": torch.ones(4), "inverse": 1/self.weights.clamp(min=.1)}.get(self.kind, self.weights)
        n = 4 if self.kind == "short" else self.n
        if self.kind == "crash": return self.nothing
        drawn = weights.multinomial(n, True, generator=None if self.kind == "global" else self.generator)
        return drawn if self.kind == "tensors" else (drawn + (self.kind == "off by one")).tolist()


class WeightedByDarts(Weighted):
    def draw(self):
        ends = self.weights.cumsum(0)
        return [int((dart >= ends).sum()) for dart in torch.rand(self.n, generator=self.generator)*ends[-1]]


class WeightedOneByOne(Weighted):
    def __iter__(self):
        for _ in range(self.n): yield int(self.weights.multinomial(1, generator=self.generator))


class WeightedForEver(Weighted):
    def __iter__(self):
        while True: yield from self.draw()


class WeightedByPool(Weighted):                                           # needs whole weights
    def draw(self):
        pool = [i for i, weight in enumerate(self.weights) for _ in range(int(weight))]
        return [pool[k] for k in torch.randint(len(pool), (self.n,), generator=self.generator)]


class WeightedSorted(Weighted):
    def draw(self): return sorted(super().draw())


class WeightedNeedsAGenerator(Weighted):
    def draw(self): return self.generator.initial_seed() and super().draw()


def pad(items, kind="right"):
    sequences, labels = zip(*items)
    lengths = [len(s) for s in sequences]
    longest = 10 if kind == "ten" else max(lengths)
    gaps = [[0]*(longest - n) for n in lengths]
    rows = [gap + s.tolist() if kind == "in front" else s.tolist() + gap for s, gap in zip(sequences, gaps)]
    padded = torch.tensor(rows, dtype=torch.float if kind == "floats" else torch.int64)
    if kind == "counts": lengths = (padded != 0).sum(1).tolist()
    if kind == "longest": lengths = [longest]*len(items)
    if kind == "pair": return padded, torch.tensor(labels)
    return padded, torch.tensor(lengths), list(labels) if kind == "list" else torch.tensor(labels)


def pad_sequence(items):
    sequences, labels = zip(*items)
    return [torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True), torch.tensor([*map(len, sequences)]), torch.tensor(labels)]
def pad_three(items): (_, _), (_, _), (_, _) = items; return pad(items)
def pad_sorts(items): items.sort(key=lambda item: -len(item[0])); return pad(items)
def pad_resizes(items):
    answer = pad(items)
    for s, _ in items: s.resize_(4)
    return answer


class Similar:
    kind = "right"
    def __init__(self, lengths, bs, generator=None):
        if self.kind == "in place": lengths.sort()
        self.lengths, self.bs, self.generator = lengths, bs, generator
        if self.kind in ("once", "early"): self.made = self.make()
        if self.kind == "once": self.made = iter(self.made)

    def __len__(self): return len(self.lengths)//self.bs + (self.kind != "drops")
    def __iter__(self): return iter(self.made if self.kind in ("once", "early") else self.make())
    def make(self):
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__, reverse=self.kind == "backwards")
        if self.kind == "in place": order = list(range(len(self.lengths)))
        if self.kind == "by chance": order = torch.randperm(len(self.lengths), generator=self.generator).tolist()
        pieces = [order[i:i + self.bs] for i in range(0, len(order), self.bs)]
        if self.kind == "inside": return [[piece[k] for k in torch.randperm(len(piece), generator=self.generator)] for piece in pieces]
        if self.kind == "lengths": pieces = [[self.lengths[i] for i in piece] for piece in pieces]
        if self.kind == "sorted": return pieces
        return [pieces[k] for k in torch.randperm(len(pieces), generator=None if self.kind == "global" else self.generator)]


class SimilarBlurred(Similar):
    def make(self):
        blurred = torch.tensor(self.lengths) + 5*torch.rand(len(self.lengths), generator=self.generator)
        pieces = blurred.argsort().split(self.bs)
        return [pieces[k] for k in torch.randperm(len(pieces), generator=self.generator)]


class SimilarNoDefault(Similar):
    def __init__(self, lengths, bs, generator): super().__init__(lengths, bs, generator)


class SimilarNeedsAGenerator(Similar):
    def make(self): return self.generator.initial_seed() and super().make()


class SimilarFraction(Similar):
    def __len__(self): return len(self.lengths)/self.bs


def kind(base, name): return type(name, (base,), {"kind": name})


LOADING = {"batches": 16, "left_out": 40, "alone": 9.125, "three": 3.125, "shared": 8}
ANSWERS = {   # right ones, in several words; wrong ones, each with a word of the advice it gets
    "weighted_sampler": ([Weighted, WeightedByDarts, WeightedOneByOne, lambda w, n, g=None: data.WeightedRandomSampler(w, n, generator=g)], {
        WeightedForEver: "4001", WeightedByPool: "index 0", WeightedSorted: "come sorted", WeightedNeedsAGenerator: "initial_seed", **{kind(Weighted, name): word for name, word in {
            "in place": "in place", "once": "second walk", "early": "both epochs", "its weights": "its length", "uniform": "weight 0", "inverse": "weight 0", "short": "4 indices",
            "global": "`generator`", "tensors": "Python ints", "off by one": "only 4 weights", "crash": "AttributeError"}.items()}}),
    "pad_collate": ([pad, pad_sequence], {
        pad_three: "ValueError", pad_sorts: "list of items was changed", pad_resizes: "has changed", **{partial(pad, kind=name): word for name, word in {
            "ten": "no longer", "in front": "behind", "floats": "int64", "counts": "zero may belong", "longest": "true lengths", "pair": "three things", "list": "int64"}.items()}}),
    "similar_lengths": ([Similar, kind(Similar, "backwards"), SimilarBlurred], {
        SimilarNoDefault: "generator", SimilarNeedsAGenerator: "initial_seed", SimilarFraction: "TypeError", **{kind(Similar, name): word for name, word in {
        "in place": "in place", "once": "exactly once", "early": "draw inside", "drops": "7 batches", "by chance": "sort by length", "inside": "shuffle the batches",
        "lengths": "exactly once", "sorted": "draw inside", "global": "`generator`"}.items()}}),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_checkers_know_right_from_wrong(name, capsys):
    from exp.exercises import loaders
    check, (right, wrong) = getattr(loaders, f"check_{name}"), ANSWERS[name]
    for answer in right:
        check(answer)
        assert "✓" in capsys.readouterr().out
    for answer, word in wrong.items():
        with pytest.raises(AssertionError, match=word) as error: check(answer)
        assert len(str(error.value).split()) >= 6, error.value


def test_predictions_of_loading_are_judged_by_number(capsys):
    from exp.exercises.loaders import check_loading
    for right in (LOADING, {name: torch.tensor(number) for name, number in LOADING.items()}):
        check_loading(right)
        assert "✓" in capsys.readouterr().out
    for name, number in {"batches": 15, "left_out": 24, "alone": 6., "three": 2., "shared": 16}.items():
        with pytest.raises(AssertionError, match=f"'{name}' is not"): check_loading(LOADING | {name: number})

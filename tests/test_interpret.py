"A folder of photos: what a learner gets wrong, doubles, doubtful labels, where it looks, a predictor on disk, and its page."
import base64
import copy
import csv
import hashlib
import http.client
import io
import json
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from exp import interpret as I
from exp.callbacks import EMA
from exp.data import DataBlock, MultiCategorize, Normalize, parent_label, random_splitter
from exp.exercises import own_photos as E
from exp.learner import Callback, CancelBatch, DataLoaders, Learner, read_checkpoint, write_checkpoint
from exp.mixup import LabelSmoothingCrossEntropy
from exp.photos import BadPhoto, PhotoCache, RandomResizedCrop, Resize, image_files, open_byte, open_rgb, to_float
from exp.precision import MixedPrecision
from exp.testing import test_like
from exp.training import cross_entropy
from exp.transfer import EfficientNetLite, transfer_net
from exp.xresnet import xresnet18

KINDS = ["blue", "green", "red"]
SMALL = dict(widths=[4, 4, 8, 8], stem=[4, 4, 4])
NORM = (.5, .4, .3), (.2, .3, .4)
ints = st.integers


def picture(seed, size=(60, 50), tint=0):
    "A photo of smooth spots in which one colour is stronger."
    g = np.random.default_rng(seed)
    spots = Image.fromarray(g.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
    pixels = np.asarray(spots).astype(int)
    pixels[..., tint] += 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def fill(folder, n=8):
    for k, kind in enumerate(KINDS):
        (folder/kind).mkdir(parents=True)
        for i in range(n): picture(100*k + i, tint=2 - k).save(folder/kind/f"{kind}_{i}.png")
    return folder


def block(side=64, opener=open_byte, tfms=()):
    return DataBlock(image_files, random_splitter(0, .4), parent_label, [opener, RandomResizedCrop(side), *tfms], [to_float, Normalize(*NORM)])


def learner(folder, side=64, loss=cross_entropy, opener=open_byte, cbs=(), on_error="raise", net=None):
    torch.manual_seed(0)
    dls = block(side, opener).dataloaders(folder, 4, num_workers=0, on_error=on_error)
    return Learner(net or xresnet18(3, **SMALL), dls, loss, lr=.01, quiet=True, device="cpu", cbs=cbs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return fill(tmp_path_factory.mktemp("photos")/"all")


@pytest.fixture(scope="module")
def learn(folder):
    made = learner(folder)
    made.fit(2)
    return made


@pytest.fixture(scope="module")
def saved(learn, tmp_path_factory): return I.export(learn, tmp_path_factory.mktemp("kept")/"mine", "exp.xresnet:xresnet18", **SMALL)


@pytest.fixture(scope="module")
def predictor(saved): return I.load_predictor(saved, device="cpu")


def everything(learn):
    "What an onlooker must not change."
    return ([m.training for m in learn.model.modules()], [v.clone() for v in learn.model.state_dict().values()], list(learn.cbs), copy.deepcopy(learn.history),
            torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), [p.grad for p in learn.model.parameters()],
            sum(len(m._forward_hooks) for m in learn.model.modules()))


def same(a, b):
    for x, y in zip(a, b, strict=True):
        if isinstance(x, (list, tuple)): same(x, y)
        elif torch.is_tensor(x): assert torch.equal(x, y)
        elif isinstance(x, np.ndarray): assert (x == y).all()
        else: assert x == y


# --- where is it wrong? ------------------------------------------------------------------------------------------------------

def test_losses_are_those_of_the_scores_whatever_the_learner_minimised(folder, learn):
    smooth = Learner(learn.model, learn.dls, LabelSmoothingCrossEntropy(.3), quiet=True, device="cpu")
    scores, y = learn.predict(with_targets=True)
    for one in (learn, smooth):
        found = I.Interpretation(one)
        test_like(found.losses, F.cross_entropy(scores, y, reduction="none"))
        assert [v.loss for v in found.top_losses(None)] == found.losses.sort(descending=True).values.tolist()


def test_a_verdict_names_item_label_and_prediction(learn):
    found = I.Interpretation(learn)
    for v in found.top_losses(None):
        assert v.item == learn.dls.valid.ds.items[v.index] and v.target == v.item.parent.name
        assert v.pred == KINDS[learn.predict(learn.dls.batch_of([v.item])).argmax()]
    assert len(found.top_losses(3)) == 3 and len(found.top_losses()) == 9 and len(found.top_losses(99)) == len(found.losses)


def test_shuffled_and_skipped_items_keep_their_names(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"some")
    for name in ("red/red_1.png", "blue/blue_3.png", "green/green_6.png"): (tmp_path/"some"/name).write_bytes(b"nothing")
    learn = learner(tmp_path/"some", on_error="skip")
    n = 0
    for dl in (learn.dls.train, learn.dls.valid, learn.dls.loader_of(image_files(tmp_path/"some"))):
        found = I.Interpretation(learn, dl)
        n += len(dl.skipped)
        assert len(found.losses) == len(dl.ds) - len(dl.skipped) and all(v.target == v.item.parent.name for v in found.top_losses(None))
        assert not {str(v.item) for v in found.top_losses(None)} & {str(dl.ds.items[i]) for i in dl.skipped}
    assert n == 6


@given(n=ints(2, 5), size=ints(1, 30), seed=ints(0, 99))
def test_the_matrix_counts(n, size, seed):
    g = torch.Generator().manual_seed(seed)
    scores, y = torch.randn(size, n, generator=g), torch.randint(n, (size,), generator=g)
    learn = Learner(nn.Identity(), DataLoaders([], [(scores, y)]), cross_entropy, quiet=True, device="cpu")
    found = I.Interpretation(learn)
    m = found.confusion_matrix()
    assert m.dtype == torch.int64 and m.sum() == size and m.shape == (n, n)
    for i in range(n):
        for j in range(n): assert m[i, j] == sum(a == i and b == j for a, b in zip(y.tolist(), scores.argmax(1).tolist()))
    pairs = found.most_confused()
    assert sum(c for *_, c in pairs) == size - m.diagonal().sum() and [c for *_, c in pairs] == sorted((c for *_, c in pairs), reverse=True)
    assert all(m[i, j] == c and i != j for i, j, c in pairs)


def test_looking_leaves_no_trace(learn):
    before = everything(learn)
    found = I.Interpretation(learn)
    found.plot_confusion_matrix(); found.plot_top_losses(4)
    I.Interpretation(learn, learn.dls.train)
    same(everything(learn), before)


class Looks(Callback):
    order = 80
    def after_epoch(self, learn): self.seen = I.Interpretation(learn).confusion_matrix()


def test_a_look_within_a_fit_changes_nothing(folder):
    plain, watched = learner(folder), learner(folder)
    torch.manual_seed(3); plain.fit(2)
    torch.manual_seed(3); watched.fit(2, cbs=Looks())
    for a, b in zip(plain.model.state_dict().values(), watched.model.state_dict().values()): assert torch.equal(a, b)
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in plain.history] == [{k: v for k, v in row.items() if k != "seconds"} for row in watched.history]


def test_a_callback_is_gone_even_after_an_error(learn):
    before = list(learn.cbs)
    with pytest.raises(RuntimeError): I.Interpretation(learn, [(torch.randn(2, 5, 8, 8), torch.tensor([0, 1]))])
    assert learn.cbs == before


class Drops(Callback):
    "Cancels some batches, at an event."
    def __init__(self, event): setattr(self, event, self.drop)
    def drop(self, learn):
        if learn.depth == 1 and learn.batch == 0: raise CancelBatch


class Peeks(Callback):
    "A pass within the pass."
    def after_pred(self, learn):
        if learn.depth == 1 and learn.batch == 0: learn.validate()


@pytest.mark.parametrize("cb", [Drops("before_batch"), Drops("after_pred"), Peeks()], ids=["before_batch", "after_pred", "nested pass"])
def test_names_stay_right_whatever_other_callbacks_do(learn, cb):
    learn.add_cb(cb)
    try: found = I.Interpretation(learn)
    finally: learn.remove_cb(cb)
    assert len(found.indices) == len(found.losses) and all(v.target == v.item.parent.name == learn.dls.valid.ds.items[v.index].parent.name for v in found.top_losses(None))


def test_names_are_forgotten_where_a_batch_went_after_all_had_heard_of_it(learn):
    cb = Drops("after_batch")
    learn.add_cb(cb)
    try: found = I.Interpretation(learn)
    finally: learn.remove_cb(cb)
    assert found.items is None and found.indices == list(range(len(found.losses))) and len(found.losses) == len(learn.dls.valid.ds) - 4
    with pytest.raises(ValueError, match="no photos are known here: give a DataBlock's loader"): found.plot_top_losses(1)


def test_a_loader_of_others_that_shuffles():
    "It does not say where an item stood: the index is the place in the walk, and is called so; labels are right all the same."
    x, y = torch.eye(3).repeat(7, 1), torch.arange(21) % 3
    one = Learner(nn.Identity(), DataLoaders([]), cross_entropy, quiet=True, device="cpu")
    found = I.Interpretation(one, DataLoader(TensorDataset(x, y), 5, shuffle=True, generator=torch.Generator().manual_seed(0)))
    assert found.items is None and found.indices == list(range(21)) and all(v.pred == v.target and v.item == v.index for v in found.top_losses(None))
    with pytest.raises(ValueError, match="give a DataBlock's loader"): found.plot_top_losses(1)


def test_a_loader_of_as_many_other_classes(learn, tmp_path):
    for kind in ("red", "yellow", "zebra"):
        (tmp_path/kind).mkdir()
        for i in range(5): picture(i).save(tmp_path/kind/f"{i}.png")
    other = block().dataloaders(tmp_path, 4, num_workers=0)
    with pytest.raises(ValueError, match=r"classes \['red', 'yellow', 'zebra'\]: give a learner of these"): I.Interpretation(learn, other.valid)


def test_as_many_scores_as_names(folder):
    with pytest.raises(ValueError, match=r"scores \(\d+, 5\).*classes \['blue', 'green', 'red'\]"): I.Interpretation(learner(folder, net=xresnet18(5, **SMALL)))


X2, Y2 = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("batch", [(X2, torch.rand(4, 3)), (X2, torch.rand(4)), (X2.view(4, 3, 1, 1), Y2.view(4, 1, 1)), (X2, torch.tensor([0, 1, 2, 3])),
                                   (X2, torch.tensor([0, 1, -100, 2])), (X2, Y2[:, None])], ids=["several labels", "floats", "pixels", "too large", "ignored", "column"])
def test_only_one_class_per_item(batch):
    learn = Learner(nn.Identity(), DataLoaders([], [batch]), cross_entropy, quiet=True, device="cpu")
    with pytest.raises(ValueError, match=r"scores \(4.*targets .*scores \(bs, classes\) and the number of one class per item"): I.Interpretation(learn)


def test_without_a_loader_and_without_photos():
    learn = Learner(nn.Identity(), DataLoaders([]), cross_entropy, quiet=True, device="cpu")
    with pytest.raises(ValueError, match="no validation loader"): I.Interpretation(learn)
    found = I.Interpretation(learn, [(X2, Y2)])
    assert found.vocab == [0, 1, 2] and found.top_losses(1)[0].item == found.losses.argmax()


def test_pictures_say_what_they_show(learn):
    found = I.Interpretation(learn)
    ax = found.plot_confusion_matrix()
    assert ax.get_xlabel() == "prediction" and ax.get_ylabel() == "label" and [t.get_text() for t in ax.get_yticklabels()] == KINDS
    assert sum(int(t.get_text()) for t in ax.texts) == len(found.losses) and f"of {len(found.losses)} as labelled" in ax.get_title(loc="left")
    axes = found.plot_top_losses(5, ncols=2)
    top = found.top_losses(5)
    assert len(axes) == 5 and all(v.pred in ax.get_title() and v.target in ax.get_title() for v, ax in zip(top, axes))


@pytest.mark.parametrize("names, word", [([], "found nothing"), (["red/1", "red/2", "red/3"], "takes two classes")], ids=["empty", "one class"])
def test_folders_that_teach_nothing(tmp_path, names, word):
    for i, name in enumerate(names):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        picture(i).save(f"{tmp_path/name}.png")
    if names:
        with pytest.warns(UserWarning, match=word): block().dataloaders(tmp_path, 2, num_workers=0)
    else:
        with pytest.raises(ValueError, match=word): block().dataloaders(tmp_path, 2, num_workers=0)


def test_a_class_of_one_photo_that_is_only_in_validation(tmp_path):
    fill(tmp_path/"all", 3)
    for i in range(2): (tmp_path/"all"/"blue"/f"blue_{i}.png").unlink()
    last = DataBlock(image_files, lambda files: ([i for i, f in enumerate(files) if f.parent.name != "blue"], [i for i, f in enumerate(files) if f.parent.name == "blue"]),
                     parent_label, [open_byte, Resize(8)], [to_float])
    with pytest.raises(ValueError, match="'blue' is not among the classes of the training set"): last.dataloaders(tmp_path/"all", 2, num_workers=0)


# --- broken and doubled --------------------------------------------------------------------------------------------------------

def test_broken_files_are_named_and_left(tmp_path):
    good = tmp_path/"good.jpg"
    picture(1).save(good)
    for name, content in (("cut.jpg", good.read_bytes()[:800]), ("page.jpg", b"<html>"), ("empty.jpg", b"")): (tmp_path/name).write_bytes(content)
    found = I.find_broken([*image_files(tmp_path), tmp_path/"gone.jpg"])
    assert [f.name for f, _ in found] == ["cut.jpg", "empty.jpg", "page.jpg", "gone.jpg"] and all(f.name in why for f, why in found)
    assert not any(str(tmp_path) in why for _, why in found) and len(image_files(tmp_path)) == 4 and I.find_broken([]) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_hash_does_not_hear_monotone_changes(tmp_path, seed):
    "Neither brightness nor contrast changes who is the brighter of two."
    def bits(grey):
        Image.fromarray(grey.astype(np.uint8)).save(tmp_path/"a.png")
        return I.difference_hash(tmp_path/"a.png")
    grey = np.random.default_rng(seed).integers(0, 100, (8, 9)).astype(np.uint8)
    want = torch.from_numpy((grey[:, 1:] > grey[:, :-1]).ravel())
    for changed in (grey, grey + 50, 2*grey, 255 - 2*(99 - grey)): assert torch.equal(bits(changed), want)
    assert not (bits(255 - grey) & want).any()


def test_a_hash_of_a_file_is_that_of_its_photo(tmp_path):
    im, turned = picture(3, (90, 70)), Image.Exif()
    turned[0x0112] = 6
    im.save(tmp_path/"a.png"); im.convert("RGBA").save(tmp_path/"b.png"); im.save(tmp_path/"c.jpg", quality=60)
    im.resize((45, 35), Image.BOX).save(tmp_path/"small.png"); picture(4, (90, 70)).save(tmp_path/"other.png")
    im.rotate(90, expand=True).save(tmp_path/"turned.jpg", quality=95, exif=turned)
    bits = I.difference_hash(tmp_path/"a.png")
    assert bits.shape == (64,) and bits.dtype == torch.bool and torch.equal(I.difference_hash(str(tmp_path/"b.png")), bits)
    for name in ("c.jpg", "small.png", "turned.jpg"): assert (I.difference_hash(tmp_path/name) != bits).sum() <= 6
    assert (I.difference_hash(tmp_path/"other.png") != bits).sum() > 12


@given(n=ints(1, 6), m=ints(1, 6), bits=st.sampled_from([1, 7, 64, 256]), seed=ints(0, 99))
def test_distances_are_counts(n, m, bits, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(k, bits, generator=g) < .5 for k in (n, m))
    assert torch.equal(I.hamming(a, b), (a[:, None] != b).sum(2)) and I.hamming(a, b).dtype == torch.int64


def test_doubles_are_found_once(tmp_path):
    for i in range(7): picture(i, (80, 80)).save(tmp_path/f"{i}.png")
    picture(2, (80, 80)).save(tmp_path/"same.png"); picture(5, (80, 80)).save(tmp_path/"saved.jpg", quality=70)
    found = I.find_doubles(image_files(tmp_path), 6)
    assert {frozenset((a.name, b.name)) for _, a, b in found} == {frozenset(("2.png", "same.png")), frozenset(("5.png", "saved.jpg"))}
    assert found[0][0] == 0 and [d for d, *_ in found] == sorted(d for d, *_ in found) and len(found) == 2
    assert len(I.find_doubles(image_files(tmp_path), 64)) == 36 and I.find_doubles([]) == [] and I.find_doubles([], 3) == []


def test_doubles_across_blocks(monkeypatch):
    "More files than rows at a time; the twins are in one block, in two, and the last."
    g, twins = torch.Generator().manual_seed(0), {(3, 700), (5, 1600), (1023, 1024), (2047, 2199)}
    hashes = torch.rand(2200, 64, generator=g) < .5
    for a, b in twins: hashes[b] = hashes[a]
    monkeypatch.setattr(I, "difference_hash", lambda i: hashes[i])
    assert {(a, b) for _, a, b in I.find_doubles(range(2200), 0)} == twins


def test_doubles_among_broken_files(tmp_path):
    (tmp_path/"bad.jpg").write_bytes(b"no")
    with pytest.raises(BadPhoto, match=r"bad\.jpg"): I.find_doubles([tmp_path/"bad.jpg"])


# --- labels ----------------------------------------------------------------------------------------------------------------------

@given(n=ints(2, 40), k=ints(2, 6), n_groups=ints(2, 40), seed=ints(0, 9))
def test_nobody_is_judged_by_who_has_seen_its_group(n, k, n_groups, seed):
    groups = [i*7 % n_groups for i in range(n)]
    k = min(k, len(set(groups)))
    if k < 2: return
    calls = []
    def train(fit, hold):
        calls.append((fit, hold))
        return torch.tensor([[float(i), 1.] for i in hold])
    out = I.out_of_fold(train, n, k, groups, seed)
    assert out[:, 0].tolist() == list(range(n)) and len(calls) == k
    for fit, hold in calls:
        assert sorted(fit + hold) == list(range(n)) and hold and not {groups[i] for i in fit} & {groups[i] for i in hold}
    again = []
    I.out_of_fold(lambda fit, hold: again.append((fit, hold)) or torch.zeros(len(hold), 1), n, k, groups, seed)
    assert again == calls, "one seed, one lot"


def test_folds_without_groups():
    sizes = []
    def train(fit, hold): sizes.append(len(hold)); return torch.zeros(len(hold), 2)
    assert I.out_of_fold(train, 11).shape == (11, 2) and sorted(sizes) == [2, 2, 2, 2, 3]
    splits = {tuple(I.out_of_fold(lambda fit, hold: torch.tensor([[float(min(hold))]]*len(hold)), 11, seed=s)[:, 0].tolist()) for s in range(3)}
    assert len(splits) == 3
    for n, k, groups in ((5, 1, None), (5, 6, None), (4, 2, ["a", "b"]), (3, 2, ["a"]*3)):
        with pytest.raises(ValueError, match="2 folds or more, but no more than groups"): I.out_of_fold(train, n, k, groups)


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, np.array, lambda groups: list(torch.tensor(groups)), lambda groups: list(np.array(groups))],
                         ids=["list", "tuple", "tensor", "array", "list of tensors", "list of numpy's numbers"])
def test_groups_of_any_kind_do_not_leak(form):
    groups, leaks = [0, 0, 0, 1, 1, 1, 2, 2, 2], []
    def train(fit, hold):
        leaks.append({groups[i] for i in fit} & {groups[i] for i in hold})
        return torch.zeros(len(hold), 2)
    I.out_of_fold(train, 9, 3, form(groups))
    assert leaks == [set()]*3


@pytest.mark.parametrize("train", [lambda fit, hold: torch.zeros(9, 2), lambda fit, hold: torch.zeros(len(hold) - 1, 2),
                                   lambda fit, hold: torch.zeros(len(hold) + (0 in hold) - (1 in hold), 2)], ids=["all items", "too few", "one too many, one too few"])
def test_a_row_for_each_position_to_judge(train):
    calls = []
    def counted(fit, hold): calls.append(hold); return train(fit, hold)
    with pytest.raises(ValueError, match=r"train gave \d rows for a fold of 3: one for each to judge"): I.out_of_fold(counted, 9, 3, [i % 3 for i in range(9)])
    rows = len(train([i for i in range(9) if i not in calls[-1]], calls[-1]))
    assert rows != 3 and all(len(train([], hold)) == 3 for hold in calls[:-1]), "heard of at the first fold that is wrong"


def test_numpy_teaches_too():
    out = I.out_of_fold(lambda fit, hold: np.array([[i, 1.] for i in hold]), 7, 3)
    assert torch.is_tensor(out) and out[:, 0].tolist() == list(range(7))


@pytest.fixture
def root(tmp_path): return fill(tmp_path/"root", 3)


def tree(root): return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != ".moves.csv"}


def review(root, does, path):
    "A reviewed list: file -> what to do."
    I.write_review([(root/name, "red", "so") for name in does], root, path)
    rows = list(csv.DictReader(path.open(newline="", encoding="utf-8-sig")))
    with path.open("w", newline="") as f:
        out = csv.DictWriter(f, rows[0].keys()); out.writeheader()
        out.writerows([row | {"do": do} for row, do in zip(rows, does.values())])
    return path


def test_a_fresh_list_does_nothing(root, tmp_path, capsys):
    path = I.write_review([(root/"red/red_0.png", "blue", "loss 3.1, äh, \"odd\"")], root, tmp_path/"list.csv")
    before = tree(root)
    assert path.read_bytes()[:3] == b"\xef\xbb\xbf", "spreadsheets take it for UTF-8"
    row, = csv.DictReader(path.open(newline="", encoding="utf-8-sig"))
    assert row == {"do": "", "file": "red/red_0.png", "label": "red", "suggestion": "blue", "why": "loss 3.1, äh, \"odd\""}
    assert I.apply_review(path, root, dry_run=False) == [] and tree(root) == before and I.undo_review(root) == 0
    assert I.apply_review(I.write_review([], root, tmp_path/"none.csv"), root) == []


def test_shown_applied_and_undone(root, tmp_path, capsys):
    does = {"red/red_0.png": "blue", "red/red_1.png": " aside ", "blue/blue_2.png": "", "green/green_0.png": "red"}
    path, before = review(root, does, tmp_path/"list.csv"), tree(root)
    planned = I.apply_review(path, root)
    said = capsys.readouterr().out.splitlines()
    assert tree(root) == before and len(said) == len(planned) == 3 and "would move red/red_0.png to blue/red_0.png" in said
    assert I.apply_review(path, root, dry_run=False) == planned
    after = tree(root)
    assert set(after) == set(before) - {"red/red_0.png", "red/red_1.png", "green/green_0.png"} | {"blue/red_0.png", ".aside/red/red_1.png", "red/green_0.png"}
    assert sorted(after.values()) == sorted(before.values()), "nothing is lost"
    assert len(image_files(root)) == 8, "what is aside is no photo of a class any more"
    second = review(root, {"blue/red_0.png": "green"}, tmp_path/"second.csv")
    I.apply_review(second, root, dry_run=False)
    assert I.undo_review(root) == 4 and tree(root) == before and I.undo_review(root) == 0


def test_names_that_differ_in_case_alone(root, tmp_path):
    "Where a file system knows no case, the second would overwrite the first."
    picture(7).save(root/"red"/"IMG_1.png"); picture(8).save(root/"green"/"img_1.png")
    moves = I.apply_review(review(root, {"red/IMG_1.png": "blue", "green/img_1.png": "blue"}, tmp_path/"l.csv"), root)
    assert [new.name for _, new in moves] == ["IMG_1.png", "img_1-2.png"]


def test_names_that_are_taken(root, tmp_path):
    for kind in ("red", "green"): picture(7).save(root/kind/"x.png")
    picture(8).save(root/"blue"/"x.png")
    before = tree(root)
    moves = I.apply_review(review(root, {"red/x.png": "blue", "green/x.png": "blue"}, tmp_path/"l.csv"), root, dry_run=False)
    assert [new.name for _, new in moves] == ["x-2.png", "x-3.png"] and sorted(tree(root).values()) == sorted(before.values())
    assert tree(root)["blue/x.png"] == before["blue/x.png"]
    I.undo_review(root)
    assert tree(root) == before


@pytest.mark.parametrize("name", ["../secret.png", "red/gone.png", "red", ""])
def test_rows_for_files_that_are_not_in_the_folder(root, tmp_path, name):
    picture(1).save(tmp_path/"secret.png")
    (tmp_path/"list.csv").write_text(f"do,file\naside,{name}\n")
    with pytest.raises(ValueError, match=f"'{name}' is no file in root"): I.apply_review(tmp_path/"list.csv", root, dry_run=False)
    assert (tmp_path/"secret.png").exists()


def test_lists_that_a_spreadsheet_has_saved(root, tmp_path):
    (tmp_path/"bom.csv").write_text("do,file\r\nblue,red/red_0.png\r\n,red/red_1.png\r\n", encoding="utf-8-sig", newline="")
    assert len(I.apply_review(tmp_path/"bom.csv", root, dry_run=False)) == 1
    (tmp_path/"other.csv").write_text("do;file\nblue;red/red_0.png\n")
    with pytest.raises(ValueError, match="it needs do and file, separated by commas"): I.apply_review(tmp_path/"other.csv", root)


def test_an_edited_list_is_not_overwritten(root, tmp_path):
    path = review(root, {"red/red_0.png": "blue"}, tmp_path/"list.csv")
    before = path.read_bytes()
    with pytest.raises(FileExistsError): I.write_review([(root/"red/red_1.png", "blue", "so")], root, path)
    assert path.read_bytes() == before


def test_a_confirmed_label_moves_nothing(root, tmp_path):
    before = tree(root)
    assert I.apply_review(review(root, {"red/red_0.png": "red", "blue/blue_1.png": " blue "}, tmp_path/"l.csv"), root, dry_run=False) == []
    assert tree(root) == before and not (root/".moves.csv").exists()


@pytest.mark.parametrize("rows, word", [(["green,red/red_0.png"], "red/red_0.png is in two rows: keep one"), (["green,red/../red/red_0.png"], "in two rows"), (["blue"], "'' is no file in root"), (["blue,.moves.csv"], "is no file"), (["blue,red/gone.png"], "no file"), (["bleu,red/red_2.png"], "'bleu' for red/red_2.png is no class folder of root: write one, or aside"),
                                        *(([f"{do},red/red_2.png"], "no class folder") for do in ("../..", ".aside", "red/"))])
def test_all_rows_or_none(root, tmp_path, rows, word):
    (tmp_path/"list.csv").write_text("\n".join(["do,file", "blue,red/red_1.png", "blue,red/red_0.png", *rows]) + "\n")
    before = tree(root)
    with pytest.raises(ValueError, match=word): I.apply_review(tmp_path/"list.csv", root, dry_run=False)
    assert tree(root) == before and not (root/".moves.csv").exists()


def test_absolute_names_under_a_relative_root(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"list.csv").write_text(f"do,file\nblue,red/red_1.png\nblue,{root}/red/red_0.png\n")
    before = tree(root)
    assert len(I.apply_review("list.csv", "root", dry_run=False)) == 2 and {"blue/red_0.png", "blue/red_1.png"} <= set(tree(root))
    assert I.undo_review("root") == 2 and tree(root) == before


def test_a_link_is_moved_itself_and_no_link_is_overwritten(root, tmp_path):
    (root/"red/link.png").symlink_to("../blue/blue_0.png"); (root/"green/red_0.png").symlink_to("nowhere")
    (tmp_path/"list.csv").write_text("do,file\ngreen,red/link.png\ngreen,red/red_0.png\n")
    I.apply_review(tmp_path/"list.csv", root, dry_run=False)
    assert (root/"green/link.png").is_symlink() and (root/"blue/blue_0.png").exists() and (root/"green/red_0.png").is_symlink() and (root/"green/red_0-2.png").exists()


def moved(root, *rows):
    (root.parent/"moves.csv").write_text("\n".join(["do,file", *rows]) + "\n")
    return I.apply_review(root.parent/"moves.csv", root, dry_run=False)


def test_undo_into_a_class_folder_that_is_gone(root):
    before = tree(root)
    moved(root, *(f"blue,red/red_{i}.png" for i in range(3)))
    (root/"red").rmdir()
    assert I.undo_review(root) == 3 and tree(root) == before


def test_what_cannot_go_back_is_named_and_stays_in_the_log(root, capsys):
    before = tree(root)
    moved(root, "blue,red/red_0.png", "blue,red/red_1.png", "blue,red/red_2.png")
    (root/"red/red_1.png").write_bytes(b"a new one"); (root/"blue/red_2.png").rename(root.parent/"away.png")
    with (root/".moves.csv").open("a") as f: f.write("green/green_0.png,blue/green_0.png\n")       # killed between log and move
    assert I.undo_review(root) == 1 and (root/"red/red_1.png").read_bytes() == b"a new one" and (root/"blue/red_1.png").exists()
    said = capsys.readouterr().out
    assert "blue/red_1.png did not go back to red/red_1.png" in said and "blue/red_2.png did not go back" in said
    (root/"red/red_1.png").unlink(); (root.parent/"away.png").rename(root/"blue/red_2.png")
    assert I.undo_review(root) == 2 and tree(root) == before and I.undo_review(root) == 0


def test_undo_does_not_take_the_wrong_file(root):
    "red to blue, blue to green; then another file takes the place in between."
    moved(root, "blue,red/red_0.png")
    moved(root, "green,blue/red_0.png")
    (root/"blue/red_0.png").write_bytes(b"another")
    assert I.undo_review(root) == 0 and (root/"blue/red_0.png").read_bytes() == b"another" and (root/"green/red_0.png").exists() and not (root/"red/red_0.png").exists()
    (root/"blue/red_0.png").unlink()
    assert I.undo_review(root) == 2 and (root/"red/red_0.png").exists()


def test_torn_and_foreign_logs(root, tmp_path):
    before = tree(root)
    moved(root, "blue,red/red_0.png")
    with (root/".moves.csv").open("a") as f: f.write("red/red_1.p")
    moved(root, "blue,red/red_2.png")
    assert I.undo_review(root) == 2 and tree(root) == before
    (tmp_path/"victim").write_text("v")
    (root/".moves.csv").write_text("../gone,blue/blue_0.png\nred/x,../victim\n\none,two,three\nred/..,red\n")
    assert I.undo_review(root) == 0 and tree(root) == before and (tmp_path/"victim").exists() and not (tmp_path/"gone").exists()


def test_two_reviews_at_once_lose_nothing(root, tmp_path, monkeypatch):
    "While one moves files, another one and an undo are refused; a dry run is not."
    for kind in ("red", "green"): picture(len(kind)).save(root/kind/"x.png")
    before, real, tried = tree(root), Path.rename, []
    first, second = (review(root, {f"{kind}/x.png": "blue"}, tmp_path/f"{kind}.csv") for kind in ("red", "green"))
    def rename(self, target):
        if not tried:
            tried.append(I.apply_review(second, root))
            for other in (lambda: I.apply_review(second, root, dry_run=False), lambda: I.undo_review(root)):
                with pytest.raises(FileExistsError, match="another review moves files in root: wait, or, if it was killed, delete .moves.lock"): other()
        return real(self, target)
    monkeypatch.setattr(Path, "rename", rename)
    I.apply_review(first, root, dry_run=False)
    I.apply_review(second, root, dry_run=False)
    assert tried and sorted(tree(root).values()) == sorted(before.values()) and {"blue/x.png", "blue/x-2.png"} <= set(tree(root))
    assert I.undo_review(root) == 2 and tree(root) == before


def test_a_failure_frees_the_folder(root, tmp_path, monkeypatch):
    path = review(root, {"red/red_0.png": "blue"}, tmp_path/"l.csv")
    def full(self, target): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="No space"): I.apply_review(path, root, dry_run=False)
    assert len(I.apply_review(path, root, dry_run=False)) == 1 and I.undo_review(root) == 1 and not (root/".moves.lock").exists()


def test_folders_that_are_links(root, tmp_path, capsys):
    "What leads out of the folder could not be undone: nothing goes there, and such a row stays in the log."
    (tmp_path/"out").mkdir(); (root/"gold").symlink_to(tmp_path/"out"); (root/"rouge").symlink_to("red")
    before = tree(root)
    with pytest.raises(ValueError, match="'gold' for red/red_0.png is a link that leads out of root"): moved(root, "blue,red/red_1.png", "gold,red/red_0.png")
    (root/".aside").symlink_to(tmp_path/"out")
    with pytest.raises(ValueError, match="'aside' for red/red_0.png is a link"): moved(root, "aside,red/red_0.png")
    (root/".aside").unlink()
    assert moved(root, "rouge,blue/blue_0.png")[0][1] == root/"red"/"blue_0.png" and I.undo_review(root) == 1 and tree(root) == before
    (tmp_path/"out"/"x.png").write_bytes(b"x")
    (root/".moves.csv").write_text("red/x.png,gold/x.png\n")
    for _ in range(2):
        assert I.undo_review(root) == 0 and "gold/x.png did not go back to red/x.png" in capsys.readouterr().out
    assert (tmp_path/"out"/"x.png").exists()


def test_a_relative_link_comes_back_from_aside(root):
    (root/"red/link.png").symlink_to("../blue/blue_0.png")
    moved(root, "aside,red/link.png")
    assert (root/".aside/red/link.png").is_symlink() and not (root/".aside/red/link.png").exists()
    assert I.undo_review(root) == 1 and (root/"red/link.png").read_bytes() == (root/"blue/blue_0.png").read_bytes()


def test_names_of_any_bytes(root, tmp_path, capsys):
    odd = os.fsdecode(b"r\xf6d.png")
    try: picture(3).save(root/"red"/odd)
    except OSError: pytest.skip("this file system wants UTF-8")
    before = tree(root)
    path = I.write_review([(root/"red"/odd, "blue", "so"), (root/"red/red_0.png", "blue", "so")], root, tmp_path/"l.csv")
    content = path.read_bytes()
    assert b"r\xf6d.png" in content and b"red_0.png" in content
    path.write_bytes(content.replace(b"\n,red/r\xf6d", b"\nblue,red/r\xf6d"))
    I.apply_review(path, root)
    assert "would move red/r?d.png to blue/r?d.png" in capsys.readouterr().out
    assert len(I.apply_review(path, root, dry_run=False)) == 1 and (root/"blue"/odd).exists()
    assert I.undo_review(root) == 1 and tree(root) == before


def test_a_list_in_another_encoding(root, tmp_path):
    picture(3).save(root/"red"/"röd.png")
    (tmp_path/"l.csv").write_bytes("do,file\nblue,red/röd.png\n".encode("cp1252"))
    with pytest.raises(ValueError, match="is no file in root.*saved as other text than UTF-8"): I.apply_review(tmp_path/"l.csv", root, dry_run=False)


def test_a_class_of_the_name_aside(root):
    (root/"Aside").mkdir()
    moved(root, "Aside,red/red_0.png", "aside,red/red_1.png")
    assert (root/"Aside"/"red_0.png").exists() and (root/".aside/red/red_1.png").exists()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError): I.undo_review(tmp_path/"gone")


# --- where does it look? -----------------------------------------------------------------------------------------------------------

@given(seed=ints(0, 30), bs=ints(1, 3), c=ints(1, 4), n=ints(2, 4))
def test_with_mean_and_linear_it_is_the_class_activation_map(seed, bs, c, n):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, c, 3), nn.Tanh()).double()
    net = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, n).double())
    x, classes = torch.randn(bs, 3, 7, 6, dtype=torch.float64), torch.randint(n, (bs,))
    got, maps = I.grad_cam(net, x, classes, relu=False), body(x).detach()
    weight, bias = net[3].weight.detach()[classes], net[3].bias.detach()[classes]
    test_like(got, torch.einsum("bc,bchw->bhw", weight, maps)/maps[0, 0].numel())
    test_like(got.sum((1, 2)), net(x).detach()[range(bs), classes] - bias)
    test_like(I.grad_cam(net, x, classes), got.clamp(min=0))
    test_like(I.grad_cam(net, x), I.grad_cam(net, x, net(x).argmax(1)))


def nets():
    yield "xresnet", xresnet18(3, **SMALL), 64
    yield "efficientnet", EfficientNetLite(((1, 4, 3, 1, 1), (2, 8, 5, 2, 2)), 3, stem=4, top=8), 32
    yield "transfer", transfer_net("xresnet18", 3), 64


@pytest.mark.parametrize("name, net, side", [*nets()], ids=lambda x: x if isinstance(x, str) else "")
def test_maps_of_our_networks(name, net, side):
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.weight, .5, 1.5)
    net.train()
    net[0].eval() if isinstance(net, nn.Sequential) else None
    for p in list(net.parameters())[:5]: p.requires_grad_(False)
    learn = Learner(net, None, cross_entropy, quiet=True, device="cpu")
    x = torch.randn(3, 3, side, side)
    before, kept = everything(learn), x.clone()
    with torch.no_grad(): got = I.grad_cam(net, x)
    same(everything(learn), before)
    assert torch.equal(x, kept) and not x.requires_grad and not got.requires_grad and got.ndim == 3 and got.shape[1] > 1 and (got >= 0).all()
    test_like(got, torch.cat([I.grad_cam(net, one[None]) for one in x]), rtol=1e-3, atol=1e-5*max(1e-3, got.max().item()))
    signed = [I.grad_cam(net, x, torch.full((3,), c), relu=False) for c in range(3)]
    assert not torch.equal(signed[0], signed[1])
    for p in net.parameters(): p.requires_grad_(False)
    test_like(I.grad_cam(net, x), got)


def test_the_whole_xresnet_obeys_the_sum_rule():
    torch.manual_seed(1)
    net = xresnet18(3, **SMALL).double().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.weight, .5, 1.5)
    x = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad(): scores, best = net(x), net(x).argmax(1)
    test_like(I.grad_cam(net, x, relu=False).sum((1, 2)), scores.amax(1) - net.head[-1].bias.detach()[best])


def test_another_layer_and_no_layer():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 4, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x = torch.randn(2, 3, 12, 12)
    assert I.grad_cam(net, x).shape == (2, 6, 6) and I.grad_cam(net, x, layer=net[1]).shape == (2, 10, 10)
    assert torch.equal(I.grad_cam(net, x, 1), I.grad_cam(net, x, torch.tensor([1, 1]))) and torch.equal(I.grad_cam(net, x, [0, 1])[1], I.grad_cam(net, x, 1)[1])
    with pytest.raises(IndexError): I.grad_cam(net, torch.randn(3, 3, 12, 12), [0, 1])
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(ValueError, match="no layer of Sequential gives maps.*larger photos, or name the layer"): I.grad_cam(flat, torch.randn(1, 3, 2, 2))


def test_heat_is_between_zero_and_one():
    cam = torch.rand(3, 4, 5) - .5
    cam[2] = -1
    heat = I.heat_of(cam, (16, 20))
    assert heat.shape == (3, 16, 20) and heat.min() >= 0 and not heat[2].any()
    test_like(heat[:2].amax((1, 2)), torch.ones(2))
    test_like(I.heat_of(7*cam, (16, 20)), heat)


# --- a predictor ----------------------------------------------------------------------------------------------------------------------

def odd_files(folder):
    im, turned = picture(5, (90, 70)), Image.Exif()
    turned[0x0112] = 6
    (folder/"odd").mkdir()
    for name, one, how in (("plain.jpg", im, {}), ("grey.png", im.convert("L"), {}), ("cmyk.jpg", im.convert("CMYK"), {}), ("alpha.png", im.convert("RGBA"), {}),
                           ("turned.jpg", im, {"exif": turned}), ("palette.gif", im.quantize(32), {}), ("deep.png", Image.fromarray(np.full((30, 40), 40_000, np.uint16)), {}),
                           ("large.jpg", picture(6, (700, 500)), {}), ("thin.png", picture(6, (300, 3)), {})): one.save(folder/"odd"/name, **how)
    return list(image_files(folder/"odd"))


@pytest.mark.parametrize("opener", ["open_byte", "open_rgb", "cache"])
def test_a_predictor_answers_as_its_learner(folder, tmp_path, opener):
    files = odd_files(tmp_path)
    how = {"open_byte": open_byte, "open_rgb": open_rgb, "cache": PhotoCache(files, 80, tmp_path/"cache") if opener == "cache" else None}[opener]
    learn = learner(folder, opener=how)
    predict = I.load_predictor(I.export(learn, tmp_path/"p", "exp.xresnet:xresnet18", **SMALL), device="cpu")
    want = learn.predict(learn.dls.batch_of(files)).softmax(1)
    for file, row in zip(files, want):
        got = predict(file)
        test_like(torch.tensor([got[k] for k in KINDS]), row, rtol=0, atol=1e-5)
        assert list(got.values()) == sorted(got.values(), reverse=True) and abs(sum(got.values()) - 1) < 1e-5
        assert predict(file.read_bytes()) == got == predict(str(file))


def as_image(path):
    with Image.open(path) as im: im.load()
    return im


@pytest.mark.parametrize("short_side", [None, 40])
def test_images_and_tensors_answer_as_their_files(predictor, tmp_path, short_side):
    "Every kind of Pillow image, upright or not, of 8 or 16 bits, large or small."
    about = dict(size=(64, 64), mean=NORM[0], std=NORM[1], short_side=short_side, device="cpu")
    predict = I.Predictor(predictor.model, KINDS, **about)
    files = odd_files(tmp_path)
    picture(7, (400, 300)).save(tmp_path/"big.png")
    for file in (*files, tmp_path/"big.png"):
        if file.name == "large.jpg": continue                    # a cache opens a large JPEG smaller than it is
        assert torch.equal(predict.pixels(as_image(file)), predict.pixels(file)), file.name
        assert torch.equal(predict.pixels(open_byte(file)), predict.pixels(file)), file.name
        assert torch.equal(predict.pixels(predict.pixels(file)), predict.pixels(file))


def test_images_that_cannot_be_used(predictor, tmp_path):
    for im in (Image.fromarray(np.random.rand(20, 20).astype(np.float32)), picture(1).convert("L").convert("I")):
        with pytest.raises(BadPhoto, match="neither bytes nor 16 bits: scale them"): predictor(im)
    (tmp_path/"cut.jpg").write_bytes(jpeg()[:1200])
    with pytest.raises(BadPhoto, match="truncated"): predictor(Image.open(tmp_path/"cut.jpg"))
    tensor = torch.from_numpy(np.array(picture(9))).permute(2, 0, 1)
    for wrong in (tensor.float(), tensor[:1], tensor[None], None, 3, [tensor]):
        with pytest.raises(TypeError, match=r"photo is .*give a path, bytes, an Image, or uint8"): predictor(wrong)


def test_answering_leaves_the_network_alone(kept):
    "It answers as in evaluation, in whatever mode it is, and stays in that mode."
    predict = I.load_predictor(kept, device="cpu")
    want, before = predict(picture(3)), copy.deepcopy(predict.model.state_dict())
    predict.model.train()
    assert predict(picture(3)) == want and all(m.training for m in predict.model.modules())
    assert torch.equal(predict.explain(picture(3))[1], I.load_predictor(kept, device="cpu").explain(picture(3))[1])
    assert all(m.training and not m._forward_hooks for m in predict.model.modules()) and all(p.grad is None for p in predict.model.parameters())
    for name, value in predict.model.state_dict().items(): assert torch.equal(value, before[name]), name


class Meanwhile(nn.Module):
    "Something happens while the network is asked."
    def __init__(self, what): super().__init__(); self.net, self.what = my_net(3, 5), what
    def forward(self, x):
        out = self.net(x)
        self.what()
        return out


def test_random_numbers_that_others_draw_meanwhile_are_not_taken_back():
    drawn = []
    predict = I.Predictor(Meanwhile(lambda: drawn.append(torch.rand(()).item())), KINDS, (16, 16), *NORM, device="cpu")
    for _ in range(3): predict(picture(1)); predict.explain(picture(1))
    assert len(drawn) == 9 == len(set(drawn)), "explain asks twice"


def test_a_heat_is_of_its_own_thread():
    "Another thread asks the same network in the middle of an explanation."
    busy = []
    def ask_too():
        if busy: return
        busy.append(True)
        other = threading.Thread(target=lambda: busy.append(predict.explain(picture(2))[1]))
        other.start(); other.join(30)
        busy.clear() if len(busy) == 1 else found.append(busy.pop())
        busy.clear()
    found = []
    torch.manual_seed(0)
    predict = I.Predictor(Meanwhile(ask_too), KINDS, (16, 16), *NORM, device="cpu")
    heat = predict.explain(picture(1))[1]
    alone = I.Predictor(predict.model.net, KINDS, (16, 16), *NORM, device="cpu")
    test_like(heat, alone.explain(picture(1))[1])
    assert len(found) == 2
    for one in found: test_like(one, alone.explain(picture(2))[1])


def test_a_name_for_each_score(predictor):
    about = dict(size=(64, 64), mean=NORM[0], std=NORM[1], device="cpu")
    with pytest.raises(ValueError, match=r"\['a', 'a', 'b'\]: all need names of their own"): I.Predictor(predictor.model, ["a", "a", "b"], **about)
    for names in (["a", "b"], ["a", "b", "c", "d"]):
        with pytest.raises(ValueError, match="zip"): I.Predictor(predictor.model, names, **about)(picture(3))


def test_photos_that_cannot_be_read(predictor, tmp_path):
    (tmp_path/"bad.jpg").write_bytes(b"no photo")
    with pytest.raises(BadPhoto, match=r"bad\.jpg"): predictor(tmp_path/"bad.jpg")
    for content in (b"", b"no photo"):
        with pytest.raises(BadPhoto, match="^'photo' cannot be read"): predictor(content)
    with pytest.raises(FileNotFoundError): predictor(tmp_path/"gone.jpg")


def test_the_description_is_for_people_too(saved):
    about = json.loads((saved/"description.json").read_text(encoding="utf-8"))
    assert about["build"] == "exp.xresnet:xresnet18" and about["classes"] == KINDS and about["arguments"] == {"n_classes": 3, **SMALL}
    assert about["photo"] == {"short_side": None, "size": [64, 64], "crop": True, "mean": [.5, .4, .3], "std": [.2, .3, .4]}
    assert sorted(f.name for f in saved.iterdir()) == ["description.json", "weights.pt"]


def test_export_leaves_the_learner_alone(folder, learn, tmp_path):
    before = everything(learn)
    I.export(learn, tmp_path/"p", "exp.xresnet:xresnet18", **SMALL)
    same(everything(learn), before)


def test_the_average_is_kept_where_validation_uses_it(folder, tmp_path):
    learn = learner(folder, cbs=EMA(.9))
    learn.fit(2)
    predict = I.load_predictor(I.export(learn, tmp_path/"p", "exp.xresnet:xresnet18", **SMALL), device="cpu")
    file = image_files(folder)[0]
    test_like(torch.tensor([predict(file)[k] for k in KINDS]), learn.predict(learn.dls.batch_of([file])).softmax(1)[0], rtol=0, atol=1e-5)


def test_transfer_nets_by_name(folder, tmp_path):
    torch.manual_seed(0)
    learn = learner(folder, net=transfer_net("xresnet18", 3, hidden=8))
    predict = I.load_predictor(I.export(learn, tmp_path/"p", name="xresnet18", hidden=8), device="cpu")
    file = image_files(folder)[2]
    test_like(torch.tensor([predict(file)[k] for k in KINDS]), learn.predict(learn.dls.batch_of([file])).softmax(1)[0], rtol=0, atol=1e-5)
    seen, heat = predict.explain(file)
    assert seen.shape == (3, 64, 64) and seen.dtype == torch.uint8 and heat.shape == (64, 64) and 0 <= heat.min() and heat.max() <= 1


def test_explain(predictor, folder):
    file = image_files(folder)[3]
    seen, heat = predictor.explain(file)
    assert torch.equal(seen, Resize(64)(open_byte(file))) and torch.equal(predictor.explain(file.read_bytes())[1], heat)
    test_like(heat, I.heat_of(I.grad_cam(predictor.model, predictor.batch([file])), (64, 64))[0])


def test_an_older_predictor_is_replaced_and_nothing_else(folder, learn, saved, tmp_path):
    make = partial(I.export, learn, build="exp.xresnet:xresnet18", **SMALL)
    (tmp_path/"there").mkdir()
    first = make(tmp_path/"there")
    old = (first/"weights.pt").read_bytes()
    make(tmp_path/"there")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["there"] and (first/"weights.pt").stat().st_size == len(old)
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"diary.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="mine holds other things than a predictor"): make(tmp_path/"mine")
    assert (tmp_path/"mine"/"diary.txt").read_text() == "dear" and sorted(f.name for f in tmp_path.iterdir()) == ["mine", "there"]
    (tmp_path/"deep").mkdir()
    assert make(tmp_path/"deep"/"er"/"p").is_dir()


def test_what_is_somebody_elses_stays(learn, tmp_path):
    make = partial(I.export, learn, build="exp.xresnet:xresnet18", **SMALL)
    for name in ("p", "new"):                                     # one that is there, and one that is not
        if name == "p": make(tmp_path/name)
        (tmp_path/f".{name}.old").mkdir(); (tmp_path/f".{name}.old"/"diary.txt").write_text("dear")
        before = tree(tmp_path)
        with pytest.raises(FileExistsError, match=rf"\.{name}\.old holds other things than a predictor"): make(tmp_path/name)
        assert tree(tmp_path) == before
    for name in ("own", "both"): (tmp_path/name).mkdir()
    learn.save(tmp_path/"own"/"weights.pt")
    for name, text in (("weights.pt", "mine"), ("description.json", '{"format": "my own"}')): (tmp_path/"both"/name).write_text(text)
    (tmp_path/"file").write_text("x"); (tmp_path/"nowhere").symlink_to("gone/too")
    before = tree(tmp_path)
    for name in ("own", "both", "file"):
        with pytest.raises(FileExistsError, match=f"{name} holds other things than a predictor"): make(tmp_path/name)
        assert tree(tmp_path) == before


def test_links_and_the_folder_itself(learn, tmp_path, monkeypatch):
    make = partial(I.export, learn, build="exp.xresnet:xresnet18", **SMALL)
    (tmp_path/"real").mkdir(); (tmp_path/"link").symlink_to("real")
    for _ in range(2):
        make(tmp_path/"link")
        assert (tmp_path/"link").is_symlink() and sorted(f.name for f in (tmp_path/"real").iterdir()) == ["description.json", "weights.pt"]
    (tmp_path/"here").mkdir(); monkeypatch.chdir(tmp_path/"here")
    make(".")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["here", "link", "real"] and (tmp_path/"here"/"weights.pt").exists()


def test_killed_between_two_renames_then_a_full_disk(learn, tmp_path, monkeypatch):
    make = partial(I.export, learn, build="exp.xresnet:xresnet18", **SMALL)
    make(tmp_path/"p").rename(tmp_path/".p.old")
    old = (tmp_path/".p.old"/"weights.pt").read_bytes()
    def full(*args): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(I, "write_checkpoint", full)
        with pytest.raises(OSError, match="No space"): make(tmp_path/"p")
    assert (tmp_path/"p"/"weights.pt").read_bytes() == old and sorted(f.name for f in tmp_path.iterdir()) == ["p"]
    make(tmp_path/"p"); I.load_predictor(tmp_path/"p")
    shutil.copytree(tmp_path/"p", tmp_path/".p.old")            # killed before the last removal
    make(tmp_path/"p")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["p"]


def test_exports_at_once_leave_one_whole_predictor(learn, tmp_path):
    where = I.export(learn, tmp_path/"p", "exp.xresnet:xresnet18", **SMALL)
    content, about = read_checkpoint(where/"weights.pt"), json.loads((where/"description.json").read_text())
    def go():
        try: I._write_whole(tmp_path/"p", dict(about), content)
        except OSError: pass                                     # another one was quicker
    threads = [threading.Thread(target=go) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    I._write_whole(tmp_path/"p", dict(about), content)
    I.load_predictor(tmp_path/"p")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["p"]


def test_what_cannot_be_read_back_is_not_written(folder, learn, tmp_path):
    odd = copy.deepcopy(learn)
    with torch.no_grad(): next(odd.model.parameters())[0] = float("nan")
    for one, how, error, word in ((odd, SMALL, ValueError, "one of NaN"), (learn, {}, ValueError, "weights are of another model"), (learn, SMALL | {"act": nn.SiLU}, ValueError, "another network"),
                                  (learn, SMALL | {"act": nn.ReLU}, TypeError, "JSON"), (learn, SMALL | {"widths": [4, 4, 8, 9]}, ValueError, "another model")):
        with pytest.raises(error, match=word): I.export(one, tmp_path/"p", "exp.xresnet:xresnet18", **how)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_answers_otherwise_is_not_exported(folder, tmp_path):
    "The same shapes, another activation, be it nearly the same."
    for act in (nn.SiLU, partial(nn.LeakyReLU, .03)):
        learn = learner(folder, net=xresnet18(3, act=act, **SMALL))
        learn.fit(1)
        with pytest.raises(ValueError, match="build makes another network.*differ by"): I.export(learn, tmp_path/"p", "exp.xresnet:xresnet18", **SMALL)
    odd = learner(folder, net=my_net(3, 5))
    with torch.no_grad(): odd.model[3].bias[1] = float("inf")
    with pytest.raises(ValueError, match="NaN"): I.export(odd, tmp_path/"p", "mine")
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_not_taken_for_another_network(folder, tmp_path):
    learn = learner(folder, cbs=MixedPrecision(torch.bfloat16))
    listening, before = list(learn.cbs), learn.predict()
    predict = I.load_predictor(I.export(learn, tmp_path/"p", "exp.xresnet:xresnet18", **SMALL), device="cpu")
    assert learn.cbs == listening and torch.equal(learn.predict(), before) and set(predict(picture(1))) == set(KINDS)


def test_what_no_predictor_can_say(folder, learn, tmp_path):
    many = DataBlock(image_files, random_splitter(0), lambda file: [parent_label(file)], [open_byte, Resize(64)], [to_float, Normalize(*NORM)], y_tfms=[MultiCategorize()])
    several = Learner(learn.model, many.dataloaders(folder, 4, num_workers=0), F.binary_cross_entropy_with_logits, quiet=True, device="cpu")
    with pytest.raises(TypeError, match="several classes per photo"): I.export(several, tmp_path/"p", "exp.xresnet:xresnet18", **SMALL)
    alone = Learner(learn.model, DataLoaders(learn.dls.train), cross_entropy, quiet=True, device="cpu")
    with pytest.raises(ValueError, match="there is no validation loader"): I.export(alone, tmp_path/"p", "exp.xresnet:xresnet18", **SMALL)
    theirs = Learner(learn.model, DataLoaders([], DataLoader(TensorDataset(torch.randn(4, 3, 64, 64), torch.arange(4) % 3), 2)), cross_entropy, quiet=True, device="cpu")
    numbers = DataBlock(image_files, random_splitter(0), lambda file: 1.5, [open_byte, Resize(64)], [to_float, Normalize(*NORM)]).dataloaders(folder, 4, num_workers=0)
    for one in (theirs, Learner(learn.model, numbers, cross_entropy, quiet=True, device="cpu")):
        with pytest.raises(ValueError, match="no validation loader of a DataBlock with classes"): I.export(one, tmp_path/"p", "exp.xresnet:xresnet18", **SMALL)
    five = learner(folder, net=xresnet18(5, **SMALL))
    with pytest.raises(ValueError, match="names of their own"): I.export(five, tmp_path/"p", "exp.xresnet:xresnet18", n_classes=5, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_transforms_are_known_by_themselves_not_by_their_names(folder, learn, tmp_path):
    def own(path): return open_byte(path)
    own.__name__ = "open_byte"
    class Squash(Resize):
        def __call__(self, x, generator=None): return super().__call__(x).flip(1)
    Squash.__name__ = "Resize"
    for opener, resize in ((own, Resize(64)), (open_byte, Squash(64)), (partial(open_rgb, at_least=32), Resize(64))):
        dls = DataBlock(image_files, random_splitter(0), parent_label, [opener, resize], [to_float, Normalize(*NORM)]).dataloaders(folder, 4, num_workers=0)
        with pytest.raises(TypeError, match="a predictor can describe only exp's"): I.export(Learner(learn.model, dls, cross_entropy, quiet=True, device="cpu"), tmp_path/"p", "exp.xresnet:xresnet18", **SMALL)


def test_transforms_without_a_word_for_them(folder, learn, tmp_path):
    def invert(x): return 255 - x
    for tfms, batch in (([open_byte, Resize(64), invert], [to_float, Normalize(*NORM)]), ([open_byte, Resize(64)], [to_float]), ([lambda p: open_byte(p), Resize(64)], [to_float, Normalize(*NORM)])):
        dls = DataBlock(image_files, random_splitter(0), parent_label, tfms, batch).dataloaders(folder, 4, num_workers=0)
        one = Learner(learn.model, dls, cross_entropy, quiet=True, device="cpu")
        with pytest.raises(TypeError, match="validation does .* to a photo: a predictor can describe"): I.export(one, tmp_path/"p", "exp.xresnet:xresnet18", **SMALL)


@pytest.fixture
def kept(saved, tmp_path):
    return shutil.copytree(saved, tmp_path/"kept")


def edit(folder, **changes):
    file = folder/"description.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def seal(folder):
    "As if these weights were of this export."
    edit(folder, sha256=hashlib.sha256((folder/"weights.pt").read_bytes()).hexdigest())


PHOTO = {"short_side": None, "size": [64, 64], "crop": True, "mean": [.5, .4, .3], "std": [.2, .3, .4]}


@pytest.mark.parametrize("changes, word", [
    ({"format": "exp predictor 1"}, r"of \('exp predictor 1', .*not of \('exp predictor 2', "), ({"build": "os:system"}, "'os:system' is not one of exp.transfer:transfer_net"),
    ({"build": "exp.xresnet:bottleneck"}, "is not one of"), ({"build": ["x"]}, "TypeError"), ({"classes": [*KINDS, "violet"]}, "names of their own"), ({"classes": KINDS[:2]}, "names of their own"),
    ({"classes": "abc"}, "names of their own"), ({"classes": ["a", "a", "b"]}, "names of their own"), ({"classes": [1, 2, 3]}, "names of their own"), ({"classes": [["a"], ["b"], ["c"]]}, "names of their own"),
    ({"classes": 5}, "TypeError"), ({"arguments": [3]}, "TypeError"), ({"arguments": {"n_classes": 3, "colour": 1, **SMALL}}, "colour"), ({"arguments": {"n_classes": 3, **SMALL, "act": "os.system"}}, "str"),
    ({"photo": PHOTO | {"gamma": 2}}, "gamma"), ({"photo": [1]}, "TypeError"), ({"photo": PHOTO | {"size": [0, 0]}}, "kept"), ({"photo": PHOTO | {"size": "99"}}, "kept"), ({"photo": PHOTO | {"std": [0, 0, 0]}}, "std is"),
    ({"photo": PHOTO | {"mean": "abc"}}, "kept"), ({"photo": PHOTO | {"device": "cpu"}}, "device"), ({"arguments": {"n_classes": 4, **SMALL}}, r"head\.2\.weight is \[3, 8\] there and \[4, 8\] here")])
def test_descriptions_that_do_not_fit(kept, changes, word, capsys):
    edit(kept, **changes)
    with pytest.raises(ValueError, match=word) as error: I.load_predictor(kept)
    assert str(error.value).startswith("kept is no predictor for here (") and "export it again" in str(error.value)
    with pytest.raises(SystemExit) as end: I.main([str(kept), "--port", "0"])
    assert end.value.code == 1 and "Traceback" not in capsys.readouterr().err


def test_weights_of_another_export(kept, folder, tmp_path):
    other = learner(folder)
    other.fit(1)
    shutil.copy(I.export(other, tmp_path/"other", "exp.xresnet:xresnet18", **SMALL)/"weights.pt", kept/"weights.pt")
    with pytest.raises(ValueError, match="its description is of .*, not of"): I.load_predictor(kept)


def test_damaged_predictors(kept, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no predictor for here \(FileNotFoundError"): I.load_predictor(tmp_path/"nowhere")
    whole, weights = (kept/"description.json").read_text(), (kept/"weights.pt").read_bytes()
    for text in (whole[:50], "[]", "3", '{"format": 1}', ""):
        (kept/"description.json").write_text(text)
        with pytest.raises(ValueError, match="kept is no predictor for here"): I.load_predictor(kept)
    (kept/"description.json").write_text(whole)
    (kept/"weights.pt").write_bytes(weights[:-500])
    with pytest.raises(ValueError, match="its description is of"): I.load_predictor(kept)
    seal(kept)
    with pytest.raises(ValueError, match="truncated or damaged"): I.load_predictor(kept)
    (kept/"weights.pt").unlink()
    with pytest.raises(ValueError, match="weights.pt"): I.load_predictor(kept)


class Trap:
    def __reduce__(self): return os.mkdir, ("sprung",)


def test_nothing_in_a_predictor_is_run(kept, monkeypatch):
    monkeypatch.chdir(kept.parent)
    torch.save({"model": Trap()}, kept/"weights.pt")
    seal(kept)
    with pytest.raises(ValueError, match="pickled code"): I.load_predictor(kept)
    (kept/"weights.pt").write_bytes(pickle.dumps(Trap()))
    seal(kept)
    with pytest.raises(ValueError): I.load_predictor(kept)
    assert not (kept.parent/"sprung").exists()


def test_weights_that_are_no_numbers(kept, learn):
    state = {k: v.clone() for k, v in learn.model.state_dict().items()}
    state["head.2.bias"][0] = float("inf")
    write_checkpoint(read_checkpoint(kept/"weights.pt") | {"model": state}, kept/"weights.pt")
    seal(kept)
    with pytest.raises(ValueError, match="one of NaN"): I.load_predictor(kept)


def test_another_scale_is_named(folder, tmp_path, monkeypatch):
    "transfer_net is smaller at EXP_SCALE=tiny."
    where = I.export(learner(folder, net=transfer_net("xresnet18", 3)), tmp_path/"p", name="xresnet18")
    monkeypatch.setenv("EXP_SCALE", "cpu")
    with pytest.raises(ValueError, match="another model.*at the same EXP_SCALE"): I.load_predictor(where)


def my_net(n_classes, width): return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, n_classes))


def test_a_network_in_training_is_asked_by_threads():
    "Modes come back when the last one has its answer; averages of norms do not move."
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    predictor = I.Predictor(net, ["a", "b"], (24, 24), [.5]*3, [.2]*3, device="cpu")
    photos = [torch.randint(256, (3, 24 + i % 5, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    want = [predictor(photo) for photo in photos]
    net.train()
    before = copy.deepcopy(net.state_dict())
    with ThreadPoolExecutor(4) as pool: assert [*pool.map(predictor, photos)] == want
    assert all(m.training for m in net.modules()) and all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))


def test_a_network_of_ones_own(folder, tmp_path):
    learn = learner(folder, net=my_net(3, 5))
    where = I.export(learn, tmp_path/"p", "my_net", width=5)
    with pytest.raises(ValueError, match="'my_net' is not one of .*give build="): I.load_predictor(where)
    predict = I.load_predictor(where, my_net, device="cpu")
    assert set(predict(picture(3))) == set(KINDS)
    class Bent(nn.Sequential):
        def forward(self, x): return super().forward(x.relu())
    with pytest.raises(ValueError, match="build makes another network"): I.load_predictor(where, lambda n_classes, width: Bent(*my_net(n_classes, width)), device="cpu")


def test_a_device_that_is_not_here_is_no_fault_of_the_predictor(saved):
    with pytest.raises((RuntimeError, AssertionError)) as error: I.load_predictor(saved, device="cuda:77")
    assert "export it again" not in str(error.value)


# --- the page ---------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def server(predictor):
    made = I.page_server(predictor, 0)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown(); made.server_close(); thread.join(10)


def ask(server, method="GET", path="/", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply, content if reply.headers["Content-Type"].startswith("text/html") else json.loads(content)


def jpeg(seed=5):
    file = io.BytesIO()
    picture(seed, (90, 70)).save(file, "JPEG")
    return file.getvalue()


def test_the_page_needs_nothing_from_elsewhere(server):
    reply, page = ask(server)
    assert reply.status == 200 and server.server_address[0] == "127.0.0.1"
    assert "default-src 'none'" in reply.headers["Content-Security-Policy"] and reply.headers["X-Content-Type-Options"] == "nosniff"
    assert b"http://" not in page and b"https://" not in page and b"src=" not in page and b"@import" not in page and str(I.LIMIT).encode() in page


def test_a_photo_is_answered(server, predictor):
    reply, found = ask(server, "POST", "/predict", jpeg())
    assert reply.status == 200 and [name for name, _ in found["classes"]] == list(predictor(jpeg()))
    test_like(torch.tensor([p for _, p in found["classes"]]), torch.tensor(list(predictor(jpeg()).values())), rtol=0, atol=1e-5)
    for key, mode in (("photo", "RGB"), ("heat", "RGBA")):
        head, data = found[key].split(",")
        im = Image.open(io.BytesIO(base64.b64decode(data)))
        assert head == "data:image/png;base64" and im.size == (64, 64) and im.mode == mode


@pytest.mark.parametrize("content, word", [(b"", "it is empty"), (b"hello", "cannot identify"), (jpeg()[:900], "cannot be read as a photo")])
def test_what_is_no_photo_is_said(server, content, word):
    reply, found = ask(server, "POST", "/predict", content)
    assert reply.status == 400 and word in found["error"] and "/" not in found["error"].replace("I/O", "")


@pytest.mark.parametrize("method, path", [("GET", "/description.json"), ("GET", "/../weights.pt"), ("GET", "/etc/passwd"), ("GET", "/predict"), ("POST", "/"), ("GET", "//x")])
def test_there_is_one_page_and_no_file(server, method, path):
    reply, found = ask(server, method, path, jpeg() if method == "POST" else None)
    assert reply.status == 404 and "error" in found


@pytest.mark.parametrize("headers", [dict(Host="evil.example"), dict(Host="evil.example:80"), dict(Origin="http://evil.example"), dict(Origin="null"), dict(Host="127.0.0.1:1")])
def test_other_pages_are_not_answered(server, headers):
    for method, path in (("GET", "/"), ("POST", "/predict")):
        reply, found = ask(server, method, path, jpeg() if method == "POST" else None, **headers)
        assert reply.status == 403 and "classes" not in found
    assert f"127.0.0.1:{server.server_port} " in found["error"]


def test_its_own_page_is(server):
    for name in ("127.0.0.1", "localhost"):
        here = f"{name}:{server.server_port}"
        assert ask(server, "POST", "/predict", jpeg(), Host=here, Origin=f"http://{here}")[0].status == 200


@pytest.mark.parametrize("name", ["LOCALHOST", "Localhost"])
def test_names_of_machines_have_no_case(server, name): assert ask(server, Host=f"{name}:{server.server_port}")[0].status == 200


def served(predictor):
    made = I.page_server(predictor, 0)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    return made


class Silent(nn.Module):
    def __init__(self): super().__init__(); self.net = my_net(3, 5)
    def forward(self, x): return self.net(x)*float("nan")


class Aside(nn.Module):
    "Its last maps feed no score."
    def __init__(self): super().__init__(); self.net, self.more = my_net(3, 5), nn.Conv2d(3, 2, 3)
    def forward(self, x): out = self.net(x); self.more(x); return out


@pytest.mark.parametrize("net, status", [(nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 3)), 200), (Aside(), 200), (Silent(), 500), (nn.Sequential(nn.Flatten(), nn.Linear(7, 3)), 500)],
                         ids=["no maps", "maps aside", "no numbers", "an error"])
def test_a_network_without_maps_or_without_an_answer(net, status):
    made = served(I.Predictor(net, KINDS, (16, 16), *NORM, device="cpu"))
    try:
        reply, found = ask(made, "POST", "/predict", jpeg())
        assert reply.status == status
        if status == 500: assert found["error"].startswith("no answer: ")
        else: assert len(found["classes"]) == 3 and not np.asarray(Image.open(io.BytesIO(base64.b64decode(found["heat"].split(",")[1]))))[..., 3].any()
        assert ask(made)[0].status == 200, "it still serves"
    finally: made.shutdown(); made.server_close()


def test_a_small_file_of_many_pixels(server):
    for size, word in (((8000, 7501), "more than 60,000,000 pixels"), ((20_000, 20_000), "bomb")):
        file = io.BytesIO()
        Image.new("1", size).save(file, "PNG")
        reply, found = ask(server, "POST", "/predict", file.getvalue())
        assert len(file.getvalue()) < 100_000 and reply.status == 400 and word in found["error"]


def test_clients_that_leave_make_no_noise(server, capfd):
    for part in (200, None):
        with socket.create_connection(("127.0.0.1", server.server_port)) as client:
            client.sendall(f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Length: {len(jpeg())}\r\n\r\n".encode() + jpeg()[:part])
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert ask(server, "POST", "/predict", jpeg())[0].status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_too_large_and_no_length(server):
    def raw(*headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        connection.putrequest("POST", "/predict")
        for header in headers: connection.putheader(*header)
        connection.endheaders()
        return connection.getresponse()
    assert raw(("Content-Length", str(I.LIMIT + 1))).status == 413 and raw().status == 411
    assert raw(("Content-Length", "9"*5000)).status == 413
    assert raw(("Content-Length", "-5")).status == 411 and raw(("Content-Length", "²")).status == 411


def test_many_at_once(server, predictor):
    want, found = {}, {}
    for i in range(6): want[i] = list(predictor(jpeg(i)))
    def one(i): found[i] = [name for name, _ in ask(server, "POST", "/predict", jpeg(i))[1]["classes"]]
    threads = [threading.Thread(target=one, args=(i,)) for i in want]
    for t in threads: t.start()
    for t in threads: t.join()
    assert found == want


def test_a_taken_port(server, saved, capsys):
    with pytest.raises(OSError): I.page_server(None, server.server_port)
    for port in (server.server_port, 99999):
        with pytest.raises(SystemExit) as end: I.main([str(saved), "--port", str(port)])
        said = capsys.readouterr().err
        assert end.value.code == 1 and said.count("\n") == 1 and f"--port {port})" in said


def test_the_command_line_in_words(tmp_path, capsys):
    with pytest.raises(SystemExit) as end: I.main(["--help"])
    assert end.value.code == 0 and "--port" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end: I.main([str(tmp_path)])
    said = capsys.readouterr().err
    assert end.value.code == 1 and "is no predictor for here" in said and "Traceback" not in said


def test_serving_until_ctrl_c(saved):
    with subprocess.Popen([sys.executable, "-m", "exp.interpret", str(saved), "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        try:
            assert line.startswith("open http://127.0.0.1:") and "Ctrl-C" in line
            connection = http.client.HTTPConnection("127.0.0.1", int(line.split(":")[2].split()[0]), timeout=60)
            connection.request("POST", "/predict", jpeg())
            assert json.loads(connection.getresponse().read())["classes"][0][0] in KINDS
        finally: process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "ended" in out and "Traceback" not in err


# --- exercises --------------------------------------------------------------------------------------------------------------------------

def wrong(check, answer, word):
    with pytest.raises(AssertionError, match=word): check(answer)


def test_checkers_take_every_right_answer_and_name_what_is_wrong(capsys):
    def mirrored(bits, size=8): return [not b for row in bits.view(size, size).tolist() for b in row[::-1]]
    E.check_mirrored(mirrored)
    wrong(E.check_mirrored, lambda bits, size=8: bits.view(size, size).flip(1).flatten(), "turns round")
    wrong(E.check_mirrored, lambda bits, size=8: (~bits).flip(0), "rows stay where they are")
    wrong(E.check_mirrored, lambda bits, size=8: bits, "answers are wrong")
    wrong(E.check_mirrored, lambda bits, size=8: bits.view(8, 8), "in one row")
    wrong(E.check_mirrored, lambda bits, size=8: bits.logical_not_(), "work on a copy")

    def joined(n, pairs):
        groups = [{i} for i in range(n)]
        for i, j in pairs:
            both = groups[i] | groups[j]
            for k in both: groups[k] = both
        return groups
    for form in (lambda groups: [min(g) for g in groups], lambda groups: torch.tensor([max(g) for g in groups]), lambda groups: np.array([min(g) for g in groups]),
                 lambda groups: tuple(map(frozenset, groups)), lambda groups: [f"photo {min(g)}" for g in groups]):
        E.check_keep_together(lambda n, pairs, form=form: form(joined(n, pairs)))
    def once(n, pairs):
        "No second look: a late bridge leaves one end behind."
        names = list(range(n))
        for i, j in pairs: names[j] = names[i]
        return names
    def by_first(n, pairs): return [min([i, *(j for pair in pairs if i in pair for j in pair)]) for i in range(n)]
    wrong(E.check_keep_together, lambda n, pairs: list(range(n)), "one pair: a chain of pairs joins photos 1 and 3, but")
    wrong(E.check_keep_together, once, "a late bridge: a chain of pairs joins photos 0 and 3, but their names differ: a double of a double")
    wrong(E.check_keep_together, by_first, "a double of a double")
    wrong(E.check_keep_together, lambda n, pairs: [0]*n, "no pairs: photos 0 and 1 share a name, but no chain")
    wrong(E.check_keep_together, lambda n, pairs: joined(n, pairs), "such as numbers")
    wrong(E.check_keep_together, lambda n, pairs: list(range(n - 1)), "a list of 5 names, one for each photo")
    wrong(E.check_keep_together, lambda n, pairs: dict(enumerate(range(n))), "one for each photo")
    wrong(E.check_keep_together, lambda n, pairs: pairs.append(1) or list(range(n)), "work on a copy")

    def occlusion(score, photo, box):
        out = []
        for i in range(photo.shape[1]//box):
            out.append([])
            for j in range(photo.shape[2]//box):
                x = photo.clone(); x[:, i*box:i*box + box, j*box:j*box + box] = 0
                out[-1].append(float(score(photo) - score(x)))
        return out
    E.check_occlusion_map(occlusion)
    wrong(E.check_occlusion_map, lambda s, x, b: -torch.tensor(occlusion(s, x, b)), "sign is wrong")
    wrong(E.check_occlusion_map, lambda s, x, b: torch.zeros(1, 1), "came out, not")
    wrong(E.check_occlusion_map, lambda s, x, b: torch.zeros(x.shape[1]//b, x.shape[2]//b), "off by")
    wrong(E.check_occlusion_map, lambda s, x, b: x.zero_(), "cover a copy")

    right = dict(strangers=32, pairs=4_999_950_000, taught=480, alarms=2001, lucky=5)
    E.check_predictions(right)
    for key in right: wrong(E.check_predictions, right | {key: 1.5}, key)

    E.check_refusal_threshold(lambda top, keep: sorted(top.tolist(), reverse=True)[int(np.ceil(keep*len(top) - 1e-9)) - 1])
    wrong(E.check_refusal_threshold, lambda top, keep: 0., "not the largest")
    wrong(E.check_refusal_threshold, lambda top, keep: 1.1, "only 0% are answered")
    wrong(E.check_refusal_threshold, lambda top, keep: top.quantile(1 - keep).item() + 1e-3, "only|not the largest")
    wrong(E.check_refusal_threshold, lambda top, keep: top, "one number")
    assert capsys.readouterr().out.count("✓") == 9


def test_asking_in_the_middle_of_a_training_does_not_end_it():
    "A predictor made of the network that trains answers in eval mode, and the rest of the epoch trains as before."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    ask = I.Predictor(net, ["a", "b"], (16, 16), [.5]*3, [.5]*3, device="cpu")
    photo = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    net.train()
    for _ in range(3):
        net(torch.randn(4, 3, 16, 16))
        got = ask(photo)
        ask.explain(photo)
    assert net[1].num_batches_tracked == 3 and all(m.training for m in net.modules())
    assert got == ask(photo)

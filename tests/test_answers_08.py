"Plausible answers to the exercises of 08 and 08a, right (None) and wrong (a word that the advice must hold)."
import hashlib
import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from answers import assert_enough, cases, judge
from exp.data import Transform, random_splitter

# --- lotteries ---------------------------------------------------------------------------------------------------------------

class Global:
    "Python's own generator."
    def __init__(self, seed): random.seed(seed)
    def shuffle(self, xs): random.shuffle(xs)


class NoLot:
    def __init__(self, seed): pass
    def shuffle(self, xs): pass


class TorchLot:
    def __init__(self, seed): self.generator = torch.Generator().manual_seed(seed or 0)
    def shuffle(self, xs): xs[:] = [xs[i] for i in torch.randperm(len(xs), generator=self.generator)]


def python_lot(seed): return random.Random(seed)
def numpy_lot(seed): return np.random.default_rng(seed)
def unseeded_lot(seed): return random.Random()
def fixed_lot(seed): return random.Random(0)
def lot_but_for_0(seed): return random.Random(seed) if seed else random.Random()
def by_lot_alone(key, valid_share=.2, seed=None): return random_splitter(seed, valid_share)


def positions_by(key, items):
    found = {}
    for i, item in enumerate(items): found.setdefault(key(item), []).append(i)
    return found


def by_set(key, items): return {name: [i for i, item in enumerate(items) if key(item) == name] for name in {key(item) for item in items}}
def by_sorted_set(key, items): return {name: [i for i, item in enumerate(items) if key(item) == name] for name in sorted({key(item) for item in items})}
def by_unique(key, items): return {name: [i for i, item in enumerate(items) if key(item) == name] for name in np.unique([key(item) for item in items])}
def by_neighbours(key, items): return {n: list(run) for n, (_, run) in enumerate(itertools.groupby(range(len(items)), key=lambda i: key(items[i])))}


# --- 08, 1: stratified_splitter ----------------------------------------------------------------------------------------------

def stratified(count=lambda s, n: min(round(s*n), n - 1), lot=python_lot, form=list, once=False, collect=positions_by):
    def stratified_splitter(get_y, valid_share=.2, seed=None):
        outside = lot(seed) if once else None
        def split(items):
            rng, train, valid = outside or lot(seed), [], []
            for positions in collect(get_y, items).values():
                rng.shuffle(positions)
                cut = count(valid_share, len(positions))
                valid += positions[:cut]
                train += positions[cut:]
            return form(train), form(valid)
        return split
    return stratified_splitter


def turned(how):
    "The right split, its two lists handed on by `how`."
    def stratified_splitter(get_y, valid_share=.2, seed=None):
        right = stratified()(get_y, valid_share, seed)
        return lambda items: how(*right(items))
    return stratified_splitter


def as_masks(train, valid):
    mask = np.zeros(len(train) + len(valid), bool)
    mask[valid] = True
    return ~mask, mask


STRATIFIED = {
    "right": (stratified(), None), "torch's lot": (stratified(lot=TorchLot), None), "numpy's lot, arrays": (stratified(lot=numpy_lot, form=np.array), None),
    "tensors": (stratified(form=lambda xs: torch.tensor(xs, dtype=torch.long)), None), "sorted arrays": (turned(lambda t, v: (np.sort(t), np.sort(v))), None),
    "no class looked at": (by_lot_alone, "class"), "rounded down": (stratified(lambda s, n: min(int(s*n), n - 1)), "round"),
    "rounded up": (stratified(lambda s, n: min(math.ceil(s*n), n - 1)), "round"), "one at least for validation": (stratified(lambda s, n: max(1, min(round(s*n), n - 1))), "fox"),
    "none kept for training": (stratified(lambda s, n: round(s*n)), "training"), "swapped": (turned(lambda t, v: (v, t)), "class"), "masks": (turned(as_masks), "position"),
    "no lot": (stratified(lot=NoLot), "lot"), "global chance": (stratified(lot=Global), "global"), "generator outside": (stratified(once=True), "each time"),
    "seed ignored": (stratified(lot=unseeded_lot), "each time"), "fixed seed": (stratified(lot=fixed_lot), "lot"),
    "sorted set": (stratified(collect=by_sorted_set), None), "np.unique": (stratified(collect=by_unique), None), "order of a set": (stratified(collect=by_set), "process"),
    "all but seed 0": (stratified(lot=lot_but_for_0), "seed 0"), "groupby, not sorted": (stratified(collect=by_neighbours), "class cat of 50"),
    "sets": (stratified(form=set), "two lists")}


# --- 08, 2: group_splitter ---------------------------------------------------------------------------------------------------

def grouped(enough=lambda held, share: held >= share, guard=True, lot=python_lot, form=list, once=False, by_groups=False, collect=positions_by, least=None):
    "enough(share held by validation, share wanted) -> stop? Or least(share wanted of items): as many items are enough."
    def group_splitter(group_of, valid_share=.2, seed=None):
        outside = lot(seed) if once else None
        def split(items):
            groups = collect(group_of, items)
            waiting, valid = list(groups), []
            (outside or lot(seed)).shuffle(waiting)
            def held(): return 1 - len(waiting)/len(groups) if by_groups else len(valid)/len(items)
            def done(): return len(valid) >= least(valid_share*len(items)) if least else enough(held(), valid_share)
            while waiting and not done(): valid += groups[waiting.pop()]
            if guard and not waiting: raise ValueError("all groups are taken")
            return form([i for name in waiting for i in groups[name]]), form(valid)
        return split
    return group_splitter


def by_sets(group_of, valid_share=.2, seed=None):
    def split(items):
        groups, valid = positions_by(group_of, items), set()
        names = sorted(groups)
        for name in random.Random(seed).sample(names, len(names)):
            if len(valid) >= valid_share*len(items): break
            valid |= set(groups[name])
        rest = set(range(len(items))) - valid
        if not rest: raise ValueError("nothing is left")
        return sorted(rest), sorted(valid)
    return split


def smallest_first(group_of, valid_share=.2, seed=None):
    def split(items):
        groups = positions_by(group_of, items)
        waiting, valid = sorted(groups, key=lambda name: -len(groups[name])), []
        while len(valid) < valid_share*len(items): valid += groups[waiting.pop()]
        if not waiting: raise ValueError("nothing is left")
        return [i for name in waiting for i in groups[name]], valid
    return split


def one_group_guard(group_of, valid_share=.2, seed=None):
    split = grouped(guard=False)(group_of, valid_share, seed)
    def guarded(items):
        if len(positions_by(group_of, items)) == 1: raise ValueError("one group")
        return split(items)
    return guarded


def by_names(group_of, valid_share=.2, seed=None):
    def split(items):
        names, chosen, held = [group_of(item) for item in items], set(), 0
        for name in np.random.default_rng(seed).permutation(np.unique(names)):
            if held >= valid_share*len(items): break
            chosen.add(name)
            held += names.count(name)
        if held == len(items): raise ValueError("nothing is left")
        return [i for i, name in enumerate(names) if name not in chosen], [i for i, name in enumerate(names) if name in chosen]
    return split


GROUPS = {
    "right": (grouped(), None), "by sets": (by_sets, None), "numpy": (grouped(lot=numpy_lot, form=np.array), None),
    "share of groups": (grouped(by_groups=True), "validation holds"), "one group too few": (grouped(lambda held, share: held >= share - .1), "less than its share"),
    "one too many": (grouped(lambda held, share: held > share), "too many|enough"), "items by lot": (by_lot_alone, "both sides"), "no guard": (grouped(guard=False), "ValueError"),
    "one group refused, two not": (one_group_guard, "1 and 9"),
    "global chance": (grouped(lot=Global), "global"), "generator outside": (grouped(once=True), "each time"), "no lot": (smallest_first, "lot"),
    "rounded up": (grouped(least=math.ceil), None), "sorted set": (grouped(collect=by_sorted_set), None), "order of a set": (grouped(collect=by_set), "process"),
    "all but seed 0": (grouped(lot=lot_but_for_0), "seed 0"), "rounded down": (grouped(least=int), "2.5"), "rounded": (grouped(least=round), "2.5"),
    "names of np.unique": (by_names, None), "sets": (grouped(form=set), "two lists")}


# --- 08, 3: FlipWithBox ------------------------------------------------------------------------------------------------------

def coin(generator): return torch.rand((), generator=generator)


def flip(turn, is_joint=True, valid=None, draw=coin):
    class FlipWithBox(Transform):
        joint = is_joint
        def __init__(self, p=.5): self.p = p
        def __call__(self, pair, generator):
            x, y = pair
            return turn(x, y) if draw(generator) < self.p else (x, y)
        def for_valid(self): return valid and self
    return FlipWithBox


def boxed(move, dim=-1):
    "Flip the photo, and move the box: move(left, top, right, bottom, width, height)."
    return lambda x, y: (x.flip(dim), torch.stack([torch.as_tensor(v) for v in move(*y, x.shape[-1], x.shape[-2])]))


def box_in_place(x, y):
    left, right, w = y[0].item(), y[2].item(), x.shape[-1]
    y[0], y[2] = w - right, w - left
    return x.flip(-1), y


def by_signs(x, y):
    w = x.shape[-1]
    return x.flip(-1), y[[2, 1, 0, 3]]*torch.tensor([-1, 1, -1, 1]) + torch.tensor([w, 0, w, 0])


right_flip = boxed(lambda l, t, r, b, w, h: (w - r, t, w - l, b))


class OtherSide(flip(right_flip)):
    "Flips where it should not: rand > p."
    def __init__(self, p=.5): self.p = 1 - p


FLIP = {
    "right": (flip(right_flip), None), "by signs": (flip(by_signs), None), "by list": (flip(lambda x, y: list(right_flip(x, y))), None),
    "right by another coin": (flip(right_flip, draw=lambda g: 1 - torch.rand(1, generator=g).item() - 1e-7), None),
    "photo only": (flip(lambda x, y: (x.flip(-1), y)), "box"), "box only": (flip(lambda x, y: (x, right_flip(x, y)[1])), "box"),
    "sides not exchanged": (flip(boxed(lambda l, t, r, b, w, h: (w - l, t, w - r, b))), "box"), "w - 1": (flip(boxed(lambda l, t, r, b, w, h: (w - 1 - r, t, w - 1 - l, b))), "box"),
    "by height": (flip(boxed(lambda l, t, r, b, w, h: (h - r, t, h - l, b))), "box"), "upside down": (flip(boxed(lambda l, t, r, b, w, h: (l, h - b, r, h - t), dim=-2)), "photo"),
    "in place": (flip(box_in_place), "in place"), "not joint": (flip(right_flip, is_joint=False), "joint"), "in validation": (flip(right_flip, valid=True), "for_valid"),
    "photo alone": (flip(lambda x, y: x.flip(-1)), "pair"), "no box": (flip(lambda x, y: (x.flip(-1), None)), "pair"), "python's chance": (flip(right_flip, draw=lambda g: random.random()), "generator"),
    "global chance": (flip(right_flip, draw=lambda g: torch.rand(())), "generator"), "box as a tuple": (flip(lambda x, y: (x.flip(-1), tuple(right_flip(x, y)[1].tolist()))), "stay a tensor"),
    "other side of p": (OtherSide, "no photo"), "for_valid = None": (type("F", (flip(right_flip),), {"for_valid": None}), "for_valid is a method"),
    "whole numbers": (flip(lambda x, y: (x.flip(-1), right_flip(x, y)[1].int())), "dtype")}


# --- 08, 4: FillMissing ------------------------------------------------------------------------------------------------------

def put(row, means): return torch.where(row.isnan(), means, row)


def fill(learn, call=put):
    class FillMissing(Transform):
        def setup(self, rows): self.means = learn(rows)
        def __call__(self, row, generator): return call(row, self.means)
    return FillMissing


def stacked(rows): return torch.stack(list(rows))


def running(rows):
    total, n = 0, 0
    for row in rows: total, n = total + row.nan_to_num(), n + ~row.isnan()
    return total/n


def twice(rows):
    n = sum(1 for _ in rows)
    return sum(row.nan_to_num() for row in rows)/n


def filled_in_place(row, means):
    row[row.isnan()] = means[row.isnan()]
    return row


def in_float64(rows): return torch.from_numpy(np.nanmean([row.tolist() for row in rows], axis=0))
def by_numpy(row, means): return torch.from_numpy(np.where(np.isnan(row.numpy()), means.numpy(), row.numpy()))


FILL = {
    "right": (fill(lambda rows: stacked(rows).nanmean(0)), None), "running": (fill(running), None), "numpy": (fill(running, by_numpy), None),
    "by clone": (fill(running, lambda row, means: filled_in_place(row.clone(), means)), None), "with zeros": (fill(lambda rows: torch.zeros(3)), "mean"),
    "holes as zeros": (fill(lambda rows: stacked(rows).nan_to_num().mean(0)), "mean"), "median": (fill(lambda rows: stacked(rows).nanmedian(0).values), "mean"),
    "mean of all columns": (fill(lambda rows: stacked(rows).nanmean().expand(3)), "mean"), "NaN mean": (fill(lambda rows: stacked(rows).mean(0)), "mean"),
    "whole rows only": (fill(lambda rows: torch.stack([row for row in rows if not row.isnan().any()]).mean(0)), "mean"), "walked twice": (fill(twice), "once|mean"),
    "in place": (fill(running, filled_in_place), "in place"), "row's own mean": (fill(running, lambda row, means: row.nan_to_num(row.nanmean().item())), "mean"),
    "always the mean": (fill(running, lambda row, means: means), "mean"),
    "float64": (fill(in_float64), "shape and dtype"), "float64 array": (fill(in_float64, lambda row, means: np.where(row.isnan(), means, row)), "shape and dtype"),
    "holes dropped": (fill(running, lambda row, means: row[~row.isnan()]), "shape and dtype"), "rows (1, 3)": (fill(lambda rows: stacked(rows).nanmean(0, keepdim=True)), "shape and dtype"),
    "list": (fill(running, lambda row, means: put(row, means).tolist()), "shape and dtype"),
    "number by number": (fill(running, lambda row, means: torch.tensor([m if math.isnan(v) else v for v, m in zip(row.tolist(), means.tolist())])), "float64")}


# --- 08, 5 and 6: predictions, flattered -------------------------------------------------------------------------------------

BLOCK = dict(batches=12, last=46, calls=1000, number=3, ones=128)
BLOCK_NUMBERS = {
    "right": (BLOCK, None), "floats": ({key: float(n) for key, n in BLOCK.items()}, None), "tensors": ({key: torch.tensor(n) for key, n in BLOCK.items()}, None),
    "last one lost": (BLOCK | dict(batches=11), "not full"), "last one full": (BLOCK | dict(last=64), "eleven full"), "training only": (BLOCK | dict(calls=750), "either side"),
    "counted from 1": (BLOCK | dict(number=4), "at 0"), "as they came": (BLOCK | dict(number=0), "sorted"), "one each": (BLOCK | dict(ones=64), "two for every"), "text": (BLOCK | dict(ones="many"), "number")}


def mixed(sure): return lambda a, n, v: sure(n, v) + (1 - sure(n, v))*a


FLATTERED = {
    "right": (mixed(lambda n, v: (n - v)/(n - 1)), None), "from 1 down": (lambda a, n, v: 1 - (v - 1)/(n - 1)*(1 - a), None),
    "tensor": (lambda a, n, v: torch.tensor(a + (1 - a)*(n - v)/(n - 1), dtype=torch.float64), None), "n instead of n - 1": (mixed(lambda n, v: (n - v)/n), "other"),
    "no flattery": (lambda a, n, v: a, "twin"), "twins only": (lambda a, n, v: (n - v)/(n - 1), "likely"), "sum": (lambda a, n, v: (n - v)/(n - 1) + a, "likely"),
    "share of validation": (mixed(lambda n, v: (v - 1)/(n - 1)), "likely"), "half": (mixed(lambda n, v: .5), "likely"), "none": (lambda a, n, v: None, "return"),
    "text": (lambda a, n, v: "much", "number"), "list": (lambda a, n, v: [a], "number")}


# --- 08a, 1: PadToSquare -----------------------------------------------------------------------------------------------------

def pad(call, place=15, base=Transform):
    class PadToSquare(base):
        order = place
        def __init__(self, fill=0): self.fill = fill
        def __call__(self, x, generator): return call(x, self.fill)
    return PadToSquare


def margins(x):
    "Left, right, top, bottom."
    (h, w), side = x.shape[1:], max(x.shape[1:])
    return (side - w)//2, side - w - (side - w)//2, (side - h)//2, side - h - (side - h)//2


def laid(x, fill, first=lambda rest: rest//2, dtype=None):
    (c, h, w), side = x.shape, max(x.shape[1:])
    top, left = first(side - h), first(side - w)
    square = torch.full((c, side, side), fill, dtype=dtype or x.dtype)
    square[:, top:top + h, left:left + w] = x
    return square


def by_cat(x, fill):
    left, right, top, bottom = margins(x)
    def bar(h, w): return x.new_full((len(x), h, w), fill)
    high = torch.cat([bar(top, x.shape[2]), x, bar(bottom, x.shape[2])], 1)
    return torch.cat([bar(high.shape[1], left), high, bar(high.shape[1], right)], 2)


def replicated(x, fill): return F.pad(x[None].float(), margins(x), mode="replicate")[0].to(x.dtype)
def stretched(x, fill): return F.interpolate(x[None].float(), (max(x.shape[1:]),)*2)[0].to(x.dtype)


def cut_off(x, fill):
    h, w = x.shape[1:]
    side = min(h, w)
    return x[:, (h - side)//2:(h - side)//2 + side, (w - side)//2:(w - side)//2 + side]


PAD = {
    "right": (pad(laid), None), "F.pad": (pad(lambda x, fill: F.pad(x, margins(x), value=fill)), None), "by cat": (pad(by_cat), None),
    "corner": (pad(lambda x, fill: laid(x, fill, lambda rest: 0)), "begin"), "larger part above": (pad(lambda x, fill: laid(x, fill, lambda rest: (rest + 1)//2)), "begin"),
    "fill ignored": (pad(lambda x, fill: laid(x, 0)), "all around"), "floats": (pad(lambda x, fill: laid(x, fill, dtype=torch.float32)), "bytes"),
    "first channel only": (pad(lambda x, fill: torch.cat([laid(x[:1], fill), laid(x[1:], 0)])), "all around"), "edge": (pad(replicated), "all around"),
    "order late": (pad(laid, 25), "order"), "not a transform": (pad(laid, base=object), "subclass"), "cut off": (pad(cut_off), "became"), "squashed": (pad(stretched), "begin"),
    "always bytes": (pad(lambda x, fill: laid(x, fill, dtype=torch.uint8)), "floats"),
    "as the fill is": (pad(lambda x, fill: laid(x, fill, dtype=torch.tensor(fill).dtype).to(x.dtype)), "fill 0: floats")}


# --- 08a, 2: fingerprint -----------------------------------------------------------------------------------------------------

def grey(file, size=(9, 8), filter=Image.BILINEAR): return np.array(Image.open(file).convert("L").resize(size, filter))
def number(bits): return int("".join("01"[int(bit)] for bit in np.ravel(bits)), 2)
def brighter(a): return a[:, :-1] > a[:, 1:]


def prints(compare=brighter, size=(9, 8), filter=Image.BILINEAR, finish=number):
    return lambda file: finish(compare(grey(file, size, filter).astype(int)))


def resized_first(file): return number(brighter(np.array(Image.open(file).resize((9, 8), Image.BILINEAR).convert("L")).astype(int)))
def bytes_that_wrap(file): return number(grey(file)[:, :-1] - grey(file)[:, 1:] > 0)
def of_red(file): return number(brighter(np.array(Image.open(file).convert("RGB").resize((9, 8), Image.BILINEAR))[..., 0].astype(int)))


def thumbnail(file):
    im = Image.open(file).convert("L")
    im.thumbnail((9, 8))
    return number(brighter(np.array(im).astype(int)))


def of_a_square(file):
    im = Image.open(file).convert("L")
    side = min(im.size)
    return number(brighter(np.array(im.crop((0, 0, side, side)).resize((9, 8), Image.BILINEAR)).astype(int)))


def digest(file): return int.from_bytes(hashlib.sha256(open(file, "rb").read()).digest()[:8], "big")


FINGERPRINT = {
    "right": (prints(), None), "other order of bits": (prints(finish=lambda bits: number(np.ravel(bits)[::-1])), None), "Lanczos": (prints(filter=Image.LANCZOS), None),
    "resized first": (resized_first, None), "numpy's uint64": (prints(finish=lambda bits: np.uint64(number(bits))), None), "constant": (lambda file: 7, "64"), "digest": (digest, "64"),
    "average": (prints(lambda a: a > a.mean(), (8, 8)), "neighbour"), "neighbours below": (prints(lambda a: a[:-1] > a[1:], (8, 9)), "neighbour"), "9 × 9": (prints(size=(9, 9)), "64"),
    "8 wide, 9 high": (prints(size=(8, 9)), "9 wide"), "darker": (prints(lambda a: a[:, :-1] < a[:, 1:]), "brighter"), "bytes that wrap": (bytes_that_wrap, "neighbour"),
    "bytes": (prints(finish=lambda bits: number(bits).to_bytes(8, "big")), "whole number"), "text": (prints(finish=lambda bits: f"{number(bits):064b}"), "whole number"),
    "list": (prints(finish=lambda bits: bits.ravel().tolist()), "whole number"), "int64": (prints(finish=lambda bits: (bits.ravel()*2**np.arange(64)).sum()), "negative"),
    "red alone": (of_red, "more red"), "thumbnail": (thumbnail, "bits set"), "a corner": (of_a_square, "bits set")}


# --- 08a, 3 to 5: break_even, predictions, magnification ---------------------------------------------------------------------

def counted(build, without, cached):
    if without <= cached: return None
    return endless(build, without, cached)


def endless(build, without, cached):
    n = 1
    while build + n*cached > n*without: n += 1
    return n


def of_a_million(build, without, cached): return next((n for n in range(1, 10**6) if build + n*cached <= n*without), None)


def paid(formula, never=None): return lambda build, without, cached: formula(build, without - cached) if without > cached else never


BREAK_EVEN = {
    "right": (paid(lambda b, saved: max(1, math.ceil(b/saved))), None), "counted": (counted, None), "tensor": (paid(lambda b, saved: torch.tensor(max(1, math.ceil(b/saved)))), None),
    "float": (paid(lambda b, saved: float(max(1, math.ceil(b/saved)))), None), "not rounded": (paid(lambda b, saved: b/saved), "from n"), "rounded": (paid(lambda b, saved: max(1, round(b/saved))), "from n"),
    "strictly less": (paid(lambda b, saved: math.floor(b/saved) + 1), "from n"), "one late": (paid(lambda b, saved: math.ceil(b/saved) + 1), "from n"),
    "zeroth epoch": (paid(lambda b, saved: math.ceil(b/saved)), "from n"), "never infinite": (paid(lambda b, saved: max(1, math.ceil(b/saved)), math.inf), "never"),
    "division by zero": (lambda b, without, cached: max(1, math.ceil(b/(without - cached))), "raised"), "text": (lambda *seconds: "late", "is late"), "list": (lambda *seconds: [5], "from n"),
    "of a million": (of_a_million, None), "twenty at most": (lambda b, w, c: next((n for n in range(1, 20) if b + n*c <= n*w), None), "n = 2000"), "endless": (endless, "never ends")}

PHOTOS = dict(byte_mb=3.1457, float_mb=12.583, cache_mb=727.2, row_stride=600, overlap=2/3)
PHOTO_NUMBERS = {
    "right": (PHOTOS, None), "rounded": (PHOTOS | dict(byte_mb=3.15, float_mb=12.6, cache_mb=727), None), "bytes for floats": (PHOTOS | dict(float_mb=3.15), "four bytes"),
    "grey": (PHOTOS | dict(byte_mb=1.05), "three bytes"), "as JPEG": (PHOTOS | dict(cache_mb=74), "decoded"), "pixels, not bytes": (PHOTOS | dict(row_stride=200), "three for each"),
    "by height": (PHOTOS | dict(row_stride=300), "row"), "all of it": (PHOTOS | dict(overlap=1.), "ten tries"), "text": (PHOTOS | dict(overlap="most"), "number")}


def sampled(low): return (low + (1 - low)*torch.rand(400_000, generator=torch.Generator().manual_seed(0))).rsqrt().mean()


MAGNIFICATION = {
    "right": (lambda low: 2/(1 + math.sqrt(low)), None), "integral": (lambda low: 2*(1 - low**.5)/(1 - low), None), "sampled": (sampled, None), "one": (lambda low: 1., "1 %"),
    "mean of √a": (lambda low: 2/3*(1 - low**1.5)/(1 - low), "√a"), "1/√mean": (lambda low: ((1 + low)/2)**-.5, "mean of a"), "mean of 1/a": (lambda low: -math.log(low)/(1 - low), "1 %"),
    "1/√low": (lambda low: low**-.5, "1 %"), "no division": (lambda low: 2*(1 - low**.5), "1 %"), "half way": (lambda low: (1 + low**-.5)/2, "1 %"),
    "none": (lambda low: None, "return"), "list": (lambda low: [1], "number"),
    "hardly measured": (lambda low: 2/(1 + math.sqrt(low))*1.011, "ten times")}


# --- all ---------------------------------------------------------------------------------------------------------------------

ANSWERS = {
    ("data_block", "stratified_splitter"): STRATIFIED, ("data_block", "group_splitter"): GROUPS, ("data_block", "FlipWithBox"): FLIP, ("data_block", "FillMissing"): FILL,
    ("data_block", "predictions"): BLOCK_NUMBERS, ("data_block", "flattered"): FLATTERED, ("photos", "PadToSquare"): PAD, ("photos", "fingerprint"): FINGERPRINT,
    ("photos", "break_even"): BREAK_EVEN, ("photos", "predictions"): PHOTO_NUMBERS, ("photos", "magnification"): MAGNIFICATION}


@pytest.mark.parametrize("module, kind, answer, word", cases(ANSWERS))
def test_checkers_convict_and_acquit(module, kind, answer, word, capsys): judge(module, kind, answer, word, capsys)


def test_every_exercise_has_two_right_and_three_wrong_answers(): assert_enough(ANSWERS)

"""Steps of the field's history, run again with our own code: what was reported, what we get.

usage: python tools/milestones.py YEAR        (make milestone Y=1989; without a year: the list)
"""
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Milestone:
    "A step, and our run of it."
    year: str
    step: str                         # what was new, and where it was published
    then: str                         # what was reported
    lesson: str                       # the file name, without ending, of the lesson that builds it
    unit: str = ""                    # of what we measure
    data: str = ""                    # what `fetch` is asked for
    run: Callable | None = None       # path of the data -> (label, seed, number) for each training
    differs: str = ""                 # in what our run is not theirs
    starts: int = 0                   # of how many some may fail


# --- 1986 -----------------------------------------------------------------------------------------

LUCKY = 14      # a start from which it takes 427 sweeps


def count_sweeps(seed: int, limit: int = 5000) -> int | None:
    "Sweeps through 64 rows of six lamps until two hidden units tell which are symmetric, or None."
    import torch

    from exp.autograd import Tensor

    def sigmoid(z): return 1/(1 + (-z).exp())
    rows = torch.tensor(list(product([0., 1.], repeat=6)))
    mirrored = (rows == rows.flip(1)).all(1, keepdim=True).float()
    generator = torch.Generator().manual_seed(seed)
    weights = [Tensor(torch.rand(*size, generator=generator)*.6 - .3, requires_grad=True)
               for size in ((6, 2), (2,), (2, 1), (1,))]
    speeds = [torch.zeros(w.shape) for w in weights]
    for sweep in range(1, limit + 1):
        w1, b1, w2, b2 = weights
        out = sigmoid(sigmoid(Tensor(rows) @ w1 + b1) @ w2 + b2)
        if ((out.data > .5) == (mirrored > .5)).all(): return sweep
        (((out - mirrored)**2).sum()*.5).backward()
        for w, speed in zip(weights, speeds):
            speed.mul_(.9).add_(w.grad, alpha=-.1)
            w.data.add_(speed)
            w.grad = None


def run_1986(path: Path) -> Iterator[tuple[str, int, float]]:
    from exp.setup import at_scale
    for seed in range(*at_scale(tiny=(LUCKY, LUCKY + 1), cpu=(10,), gpu=(10,))):
        sweeps = count_sweeps(seed)
        if sweeps: yield "sweeps", seed, sweeps
        else: print(f"start {seed} is stuck in a valley that is not the deepest")


# --- 1989 -----------------------------------------------------------------------------------------

def small_digits(path: Path, n_train: int, n_valid: int):
    "Loaders of digits with 16×16 pixels from -1 to 1."
    import torch.nn.functional as F

    from exp.datasets import load_idx
    from exp.learner import DataLoaders
    from exp.loaders import DataLoader, TensorDataset
    x, y, x_valid, y_valid = load_idx(path)

    def shrunk(x):
        middle = x.view(-1, 1, 28, 28)[..., 4:24, 4:24]
        return F.interpolate(middle, 16, mode="bilinear", antialias=True)*2 - 1
    train = TensorDataset(shrunk(x[:n_train]), y[:n_train])
    valid = TensorDataset(shrunk(x_valid[:n_valid]), y_valid[:n_valid])
    return DataLoaders(DataLoader(train, 8, shuffle=True), DataLoader(valid, 500))


def run_1989(path: Path) -> Iterator[tuple[str, int, float]]:
    import torch.nn.functional as F
    from torch import nn

    from exp.conv import conv
    from exp.learner import Learner
    from exp.optim import momentum
    from exp.setup import at_scale, set_seed
    from exp.training import accuracy

    def distance(pred, yb): return F.mse_loss(pred, F.one_hot(yb, 10)*2. - 1)
    full = 7291, 2007, 23, 3
    n_train, n_valid, passes, n_seeds = at_scale(tiny=(80, 80, 1, 1), cpu=full, gpu=full)
    dls = small_digits(path, n_train, n_valid)
    for seed in range(n_seeds):
        set_seed(seed)
        model = nn.Sequential(conv(1, 12, 5, act=nn.Tanh), conv(12, 12, 5, act=nn.Tanh),
                              nn.Flatten(), nn.Linear(192, 30), nn.Tanh(),
                              nn.Linear(30, 10), nn.Tanh())
        learn = Learner(model, dls, distance, momentum, lr=.02, metrics=accuracy, device="cpu")
        learn.fit(passes)
        yield "errors", seed, 100 - 100*learn.history[-1]["accuracy"]


# --- 2012 and 2015: two networks, the same photos -------------------------------------------------

def photo_loaders(path: Path):
    "One Imagenette photo in three, as lesson 12 takes them."
    from exp.augment import Flip
    from exp.data import DataBlock, Normalize, grandparent_splitter, parent_label
    from exp.photos import PhotoCache, RandomResizedCrop, image_files, to_float
    from exp.setup import at_scale
    every, side = at_scale(tiny=(8, 32), cpu=(3, 64), gpu=(3, 64))

    def some(path):
        files = image_files(path)
        train, valid = grandparent_splitter(files)
        return files[[*train[::every], *valid[::every]]]
    block = DataBlock(some, grandparent_splitter, parent_label,
                      [PhotoCache(image_files(path), 160), RandomResizedCrop(side, (.35, 1))],
                      [to_float, Flip(), Normalize()])
    return block.dataloaders(path, 32, drop_last=True)


def duel(path: Path, rivals: dict[str, Callable], opt_func: Callable, lr: float | None = None
         ) -> Iterator[tuple[str, int, float]]:
    "Accuracy of each network after five epochs, at its best rate of one shared search, or at lr."
    from exp.learner import DataLoaders, Learner
    from exp.schedule import one_cycle
    from exp.setup import at_scale, set_seed
    from exp.testing import best_rate
    from exp.training import accuracy, cross_entropy
    epochs, search, n_seeds = at_scale(tiny=(1, 1, 1), cpu=(5, 2, 3), gpu=(5, 2, 3))
    grid = at_scale(tiny=(.01, .03), cpu=(.003, .01, .03), gpu=(.003, .01, .03))

    def train(make, seed, lr, epochs, dls):
        set_seed(seed)
        learn = Learner(make(), dls, cross_entropy, opt_func, lr, metrics=accuracy, quiet=True)
        learn.fit(epochs, cbs=one_cycle(lr))
        return learn.history[-1]
    for name, make in rivals.items():
        def loss(lr, seed, make=make):
            only_train = DataLoaders(photo_loaders(path).train)
            return train(make, seed, lr, search, only_train)["train_loss"]
        best = lr or best_rate(loss, grid, seeds=(99,), limit=at_scale(tiny=0, cpu=8, gpu=8)).best
        for seed in range(n_seeds):
            yield name, seed, 100*train(make, seed, best, epochs, photo_loaders(path))["accuracy"]


def run_2012(path: Path) -> Iterator[tuple[str, int, float]]:
    from torch import nn

    from exp.conv import init_cnn, simple_cnn
    from exp.init import xavier_normal_
    from exp.optim import momentum
    from exp.setup import at_scale
    widths = at_scale(tiny=(4, 8), cpu=(32, 64, 128, 256), gpu=(32, 64, 128, 256))

    def xavier(weight, a): return xavier_normal_(weight, 5/3)
    rivals = {"ReLU": lambda: init_cnn(simple_cnn(widths, ni=3)),
              "tanh": lambda: init_cnn(simple_cnn(widths, ni=3, act=nn.Tanh), init=xavier)}
    return duel(path, rivals, partial(momentum, weight_decay=5e-4))


def run_2015(path: Path) -> Iterator[tuple[str, int, float]]:
    from torch import nn

    from exp.conv import conv
    from exp.optim import adamw
    from exp.setup import at_scale
    from exp.xresnet import XResNet, basic_block
    widths = at_scale(tiny=(4, 8, 8, 8), cpu=(16, 32, 64, 128), gpu=(16, 32, 64, 128))

    def plain_block(ni, nf, stride, act, norm):
        return nn.Sequential(conv(ni, nf, 3, stride, act, norm), conv(nf, nf, 3, 1, act, norm))

    def network(block): return XResNet(block, (3, 4, 6, 3), widths=widths, stem=(widths[0],)*3)
    rivals = {"34 plain layers": partial(network, plain_block),
              "34 layers that add": partial(network, basic_block)}
    return duel(path, rivals, partial(adamw, weight_decay=.05), lr=.003)


# --- 2018: texts and speed ------------------------------------------------------------------------

def run_ulmfit(path: Path) -> Iterator[tuple[str, int, float]]:
    from itertools import chain
    from random import Random

    from exp.awd_lstm import AWDLSTM, CarryState, flat_cross_entropy, language_model
    from exp.callbacks import GradientClip
    from exp.data import DataBlock, get_files, parent_label
    from exp.learner import DataLoaders, Learner
    from exp.optim import adamw
    from exp.precision import MixedPrecision, native_half
    from exp.schedule import one_cycle
    from exp.setup import at_scale, default_device, set_seed
    from exp.testing import best_rate
    from exp.text import LMDataset, Numericalize, TokenCache, Vocab, pad_collate, sort_by_length
    from exp.training import accuracy, cross_entropy
    from exp.ulmfit import fit_gradually, text_classifier, text_classifier_groups
    n_tokens, n_labels, n_judges, epochs, n_seeds = at_scale(
        tiny=(600, 8, 8, 4, 1), cpu=(2_400_000, 500, 2000, 24, 3), gpu=(2_400_000, 500, 2000, 24, 3))
    size = at_scale(tiny=dict(emb=16, nh=24, n_layers=2), cpu=dict(emb=160, nh=320, n_layers=2),
                    gpu=dict(emb=160, nh=320, n_layers=2))
    grid = at_scale(tiny=(.003, .01), cpu=(.001, .003, .01), gpu=(.001, .003, .01))
    page = at_scale(tiny=(4, 10), cpu=(32, 50), gpu=(32, 50))
    half = [MixedPrecision()]*native_half(default_device())
    files = [f for f in get_files(path, ".txt") if f.parent.parent.name in ("train", "test")]
    cache, lot = TokenCache(files), Random(0)
    unlabelled = [f for f in files if f.parent.name == "unsup"]
    train, test = ([f for f in files if f.parent.parent.name == name and f.parent.name != "unsup"]
                   for name in ("train", "test"))
    classes, judges = sorted({f.parent.name for f in train}), lot.sample(test, n_judges)
    to_read = train + unlabelled
    vocab = Vocab(chain.from_iterable(map(cache, to_read)), max_size=12_000)
    lot.shuffle(to_read)

    def reader():
        "A language model that has read so many tokens."
        some = to_read[:max(1, n_tokens//50)]
        ids = vocab.encode(chain.from_iterable(map(cache, some)))[:n_tokens]
        set_seed(0)
        model = language_model(vocab, **size, dropout=.1)
        learn = Learner(model, DataLoaders(LMDataset(ids, *page)), flat_cross_entropy, adamw,
                        cbs=[CarryState(), GradientClip(1.)], quiet=True)
        learn.fit(1, cbs=[one_cycle(.015), *half])
        return model.encoder.cpu().state_dict()

    def draw(seed, n):
        "n training files by lot, as many of each class."
        return [f for name in classes for f in Random(seed).sample(
            [f for f in train if f.parent.name == name], n//len(classes))]

    def right(seed, read, lr, labelled, judges):
        "Percent of the judges' files, after learning from the labelled ones."
        block = DataBlock(lambda path: labelled + judges,
                          lambda items: ([*range(n_labels)], [*range(n_labels, len(items))]),
                          parent_label, [cache, Numericalize(vocab)], collate_fn=pad_collate)
        dls = sort_by_length(block.dataloaders(path, min(25, n_labels//2), drop_last=True),
                             cache.length)
        set_seed(seed)
        encoder = AWDLSTM(len(vocab), **size, embed_p=.025, input_p=.2, hidden_p=.15, weight_p=.25)
        if read: encoder.load_state_dict(read)
        model = text_classifier(encoder, len(classes), max_len=400, vocab=vocab)
        learn = Learner(model, DataLoaders(dls.train), cross_entropy,
                        partial(adamw, betas=(.7, .99)), metrics=accuracy,
                        splitter=text_classifier_groups, cbs=GradientClip(1.), quiet=True)
        if read: fit_gradually(learn, epochs, lr, cbs=half)
        else: learn.fit(epochs, lr, cbs=[one_cycle(lr), *half])
        return 100*learn.validate(dls.valid)["accuracy"]

    read = reader()
    for label, start in (("read first", read), ("from scratch", None)):
        def score(lr, seed, start=start):             # by other training files, of another draw
            both = draw(seed, n_labels + n_judges//2)
            labelled = draw(seed, n_labels)
            others = [f for f in both if f not in {*labelled}]
            return right(seed, start, lr, labelled, others)
        best = best_rate(score, grid, seeds=(99,), lower_is_better=False,
                         limit=at_scale(tiny=0, cpu=4, gpu=4)).best
        for seed in range(n_seeds):
            yield label, seed, right(seed, start, best, draw(seed, n_labels), judges)


def run_dawnbench(path: Path) -> Iterator[tuple[str, int, float]]:
    from exp.imagenette import Options, ProgressiveSizes, learner
    from exp.learner import Callback, CancelFit
    from exp.schedule import one_cycle
    from exp.setup import at_scale
    goal, side, n_seeds = at_scale(tiny=(0., 32, 1), cpu=(75., 96, 3), gpu=(75., 96, 3))

    class UntilGoal(Callback):
        "Stops where the validation photos are known well enough."
        def after_epoch(self, learn):
            if 100*learn.history[-1]["accuracy"] >= goal: raise CancelFit

    def minutes(options, n, cbs):
        learn = learner(options)
        learn.fit(n, cbs=[*cbs, UntilGoal()])
        reached = 100*learn.history[-1]["accuracy"]
        if reached < goal: raise RuntimeError(
            f"{reached:.1f} % after {n} epochs: not the {goal:g} % that are timed")
        return sum(row["seconds"] for row in learn.history)/60

    for seed in range(n_seeds):
        quick = Options(size=side, epochs=3, seed=seed, half=True)
        cbs = [one_cycle(quick.lr), ProgressiveSizes(3*side//4)]
        yield "sizes that grow, one cycle, half precision", seed, minutes(quick, quick.epochs, cbs)
    for seed in range(n_seeds):
        yield "without", seed, minutes(Options(size=side, seed=seed, half=False), 12, [])


# --- all of them ----------------------------------------------------------------------------------

MILESTONES = {
    "1986": Milestone(
        "1986", "Backpropagation (Rumelhart, Hinton & Williams, *Nature* 323)",
        "two hidden units find mirror symmetry in 1,425 sweeps",
        "02a_autograd", "sweeps", "", run_1986,
        "our tape finds the gradients; we count until all 64 outputs lie on the right side of ½, "
        "and leave out starts that need more than 5,000 sweeps", 10),
    "1989": Milestone(
        "1989", "Convolutions read zip codes (LeCun et al., *Neural Computation* 1)",
        "5.0 % errors on 2,007 digits after 23 passes over 7,291",
        "05d_cnn", "% errors", "mnist", run_1989,
        "as many digits, but MNIST's; every map of the second layer sees all of the first; batches "
        "of 8 with momentum"),
    "2012": Milestone(
        "2012", "AlexNet (Krizhevsky, Sutskever & Hinton)",
        "ReLU reaches 25 % training error six times sooner than tanh (CIFAR-10)",
        "08a_photos", "%", "imagenette2-160", run_2012,
        "four layers on a third of Imagenette at 64 px, accuracy after 5 epochs, each at its best "
        "rate"),
    "2015": Milestone(
        "2015", "ResNet (He, Zhang, Ren & Sun, arXiv:1512.03385)",
        "34 layers: 28.5 % errors plain, 25.0 % where they add (ImageNet)",
        "12_xresnet", "%", "imagenette2-160", run_2015,
        "narrow networks on a third of Imagenette at 64 px, accuracy after 5 epochs, the rate that "
        "lesson 12 found for wider ones"),
    "ulmfit": Milestone(
        "2018", "ULMFiT (Howard & Ruder, arXiv:1801.06146)",
        "read first, 100 labelled reviews do the work of 1,000 to 10,000 (IMDB)",
        "13_ulmfit", "%", "imdb", run_ulmfit,
        "accuracy with 500 labels, of a small network that read 2.4 million tokens of reviews, or "
        "nothing, each at its best rate; no articles, one direction"),
    "dawnbench": Milestone(
        "2018", "DAWNBench, a contest of speed (fast.ai's entry)",
        "ImageNet to 93 % in 3 hours on one machine, with sizes that grow, one cycle and half "
        "precision", "14_imagenette", "minutes", "imagenette2-160", run_dawnbench,
        "minutes of training until 75 % of Imagenette's validation photos are right, at 96 px"),
}


def is_there(milestone: Milestone) -> bool:
    "Can it be run: has it a function, and its lesson been written?"
    return milestone.run is not None and (ROOT/"nbs"/f"{milestone.lesson}.ipynb").exists()


def results(milestone: Milestone) -> str:
    "Our records of it in words: '98.1 ± 0.2 % (label)'."
    from exp.testing import result_text
    files = sorted((ROOT/"results").glob(f"{milestone.lesson}-milestone-*.json"))
    found = [json.loads(p.read_text(encoding="utf-8")) for p in files]
    mine = [r for r in found if r["what"].startswith(f"milestone {milestone.year}: ")]
    words = [f"{r['what'].split(': ')[1]} {result_text(r)}" for r in mine]
    if len(mine) != 1: return ", ".join(words)
    how_many = f" ({len(mine[0]['values'])} of {milestone.starts} starts)"
    return result_text(mine[0]) + how_many*bool(milestone.starts)


def run(milestone: Milestone) -> list[dict]:
    "Run it and keep one record for each of its labels."
    from exp.datasets import fetch
    from exp.setup import small_network_threads
    from exp.testing import record
    small = milestone.data in ("", "mnist")       # no photos: one thread of the CPU
    if small: small_network_threads()
    path, runs, start = fetch(milestone.data) if milestone.data else "", {}, time.perf_counter()
    for label, seed, number in milestone.run(path):
        now = time.perf_counter()
        print(f"{label}, seed {seed}: {number:.4g} {milestone.unit}, {now - start:.0f} s",
              flush=True)
        runs.setdefault(label, []).append((seed, number, now - start))
        start = now
    records = []
    for label, found in runs.items():
        seeds, numbers, seconds = zip(*found)
        records.append(record(
            milestone.lesson, f"milestone {milestone.year}: {label}", numbers, unit=milestone.unit,
            data=path, seeds=seeds, seconds=seconds, device="cpu" if small else None,
            differs=milestone.differs))
    return records


def main():
    key = sys.argv[1] if len(sys.argv) > 1 else ""
    if key not in MILESTONES:
        for name, m in MILESTONES.items():
            later = "" if is_there(m) else f" (comes with lesson {m.lesson})"
            print(f"{name:10} {m.step}: {m.then}{later}")
        names = ", ".join(MILESTONES)
        sys.exit(f"no milestone {key!r}: say Y=YEAR with one of {names}" if key else 0)
    m = MILESTONES[key]
    if not is_there(m): sys.exit(f"{m.step}: comes with lesson {m.lesson}")
    print(f"{m.year} · {m.step}\nreported then: {m.then}\nhere: {m.differs}\n")
    from exp.testing import results_table
    print(f"\n{results_table(run(m))}")


if __name__ == "__main__": main()

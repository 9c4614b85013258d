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
        "2018", "ULMFiT (Howard & Ruder, arXiv:1801.06146)", "95.4 % on IMDB", "13_ulmfit"),
    "dawnbench": Milestone(
        "2018", "DAWNBench, a contest of speed (fast.ai's entry)",
        "ImageNet to 93 % in 3 hours on one machine, with sizes that grow, one cycle and half "
        "precision", "14_imagenette"),
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

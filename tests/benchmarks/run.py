"""Speed as ratios within one run: interleaved pairs, the median of their ratios, beside the aim. `make bench` prints the table.

usage: python tests/benchmarks/run.py [WORDS IN THE NAME ...]
"""
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

BENCHES = []


def bench(name: str, aim: str):
    "Register a benchmark: a function that makes (ours, theirs), two callables to be timed against each other."
    return lambda make: BENCHES.append((name, aim, make))


def seconds(func) -> float:
    start = time.perf_counter()
    func()
    return time.perf_counter() - start


def ratio(ours, theirs, pairs: int = 9) -> tuple[float, float, float]:
    "Median, lowest and highest of ours/theirs over interleaved pairs, after a warm-up of each."
    ours(); theirs()
    ratios = []
    for i in range(pairs):
        a, b = (ours, theirs) if i % 2 else (theirs, ours)     # neither always goes first
        times = {a: seconds(a)}; times[b] = seconds(b)
        ratios.append(times[ours]/times[theirs])
    return statistics.median(ratios), min(ratios), max(ratios)


def main():
    wanted = [w.lower() for w in sys.argv[1:]]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; median [lowest, highest] of interleaved pairs\n")
    print("| work | ratio | aim |\n|---|---|---|")
    for name, aim, make in BENCHES:
        if wanted and not any(w in name.lower() for w in wanted): continue
        threads = torch.get_num_threads()
        middle, low, high = ratio(*make())
        torch.set_num_threads(threads)
        print(f"| {name} | {middle:.2f}× [{low:.2f}, {high:.2f}] | {aim} |", flush=True)
    if not wanted: print(f"| import exp.learner, after import torch | {import_time('exp.learner')*1000:.0f} ms | ≤150 ms |")


def import_time(module: str) -> float:
    "Median seconds that importing a module adds to `import torch`, over nine fresh processes."
    code = f"import torch, time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return statistics.median(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(9))


def mlp(): torch.manual_seed(0); return nn.Sequential(nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))


def in_memory(n: int = 782, bs: int = 64): return list(zip(torch.randn(n, bs, 784), torch.randint(0, 10, (n, bs))))


def bare_epoch(model, batches, lr: float = .1):
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    for xb, yb in batches:
        F.cross_entropy(model(xb), yb).backward()
        opt.step(); opt.zero_grad()


@bench("Learner + Recorder + Progress against a bare loop: MLP 784-50-10, 782 batches of 64, one thread", "≤1.15×")
def learner():
    import io
    from contextlib import redirect_stdout
    from exp.learner import DataLoaders, Learner, Progress, Recorder
    torch.set_num_threads(1)
    batches = in_memory()
    def ours():
        with redirect_stdout(io.StringIO()):
            Learner(mlp(), DataLoaders(batches), F.cross_entropy, torch.optim.SGD, cbs=[Recorder(), Progress(style="terminal")]).fit(1)
    return ours, lambda: bare_epoch(mlp(), batches)


@bench("DataLoader of exp.training against torch's: 60,000 × 784 in memory, batches of 64", "≤1.0×")
def loader():
    from torch.utils import data
    from exp.training import DataLoader, TensorDataset
    x, y = torch.randn(60_000, 784), torch.randint(0, 10, (60_000,))
    mine, theirs = DataLoader(TensorDataset(x, y), 64, shuffle=True), data.DataLoader(data.TensorDataset(x, y), 64, shuffle=True)
    def drain(dl):
        for _ in dl: pass
    return lambda: drain(mine), lambda: drain(theirs)


def on_images(cbs, scheduler: bool = False):
    "One epoch of the five-layer CNN on 40 batches of 128 images."
    from exp.hooks import simple_cnn
    from exp.learner import DataLoaders, Learner
    torch.manual_seed(0)
    batches = list(zip(torch.randn(40, 128, 1, 28, 28), torch.randint(0, 10, (40, 128))))
    return lambda: Learner(simple_cnn(), DataLoaders(batches), F.cross_entropy, torch.optim.SGD, cbs=cbs()).fit(1)


@bench("ActivationStats on a CNN of 5 layers, every step, against the same training without", "≤1.3×")
def stats():
    from exp.hooks import ActivationStats
    return on_images(lambda: [ActivationStats()]), on_images(list)


@bench("one_cycle on the MLP, against the same training without", "≤1.05×")
def schedule():
    from exp.learner import DataLoaders, Learner
    from exp.schedule import one_cycle
    torch.set_num_threads(1)
    batches = in_memory()
    def train(cbs): Learner(mlp(), DataLoaders(batches), F.cross_entropy, torch.optim.SGD, cbs=cbs).fit(1)
    return lambda: train([one_cycle(.1)]), lambda: train([])


if __name__ == "__main__": main()

"""Speed as ratios within one run: interleaved pairs, the median of their ratios, beside the aim. `make bench` prints the table.

Each benchmark has a process of its own, so that none finds the memory and caches of another.

usage: python tests/benchmarks/run.py [WORDS IN THE NAME ...]
"""
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

BENCHES = []


def bench(name: str, aim: str, needs: str = "", **env: str):
    "Register a benchmark: a function that makes (ours, theirs), two callables to be timed against each other, under these environment variables; `needs` is a peer's package."
    def register(make): BENCHES.append((name, aim, make, needs, env)); return make
    return register


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
    for i, (name, aim, _, needs, env) in enumerate(BENCHES):
        if wanted and not any(w in name.lower() for w in wanted): continue
        if needs and find_spec(needs) is None: print(f"| {name} | {needs} is not installed | {aim} |"); continue
        run = subprocess.run([sys.executable, __file__, "--one", str(i)], stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **env})
        middle, low, high = json.loads(run.stdout.splitlines()[-1])
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


@bench("Learner with its default callbacks, quiet, against a bare loop: MLP 784-50-10, 782 batches of 64, one thread", "≤1.10×")
def learner():
    from exp.learner import DataLoaders, Learner
    torch.set_num_threads(1)
    batches = in_memory()
    def ours(): Learner(mlp(), DataLoaders(batches), F.cross_entropy, torch.optim.SGD, .1, quiet=True).fit(1)
    return ours, lambda: bare_epoch(mlp(), batches)


def drain(loader):
    for _ in loader: pass


def in_memory_loaders(**rival):
    "Our loader and torch's, over 60,000 × 784 numbers in memory, shuffled."
    from torch.utils import data
    from exp.loaders import DataLoader, TensorDataset
    x, y = torch.randn(60_000, 784), torch.randint(0, 10, (60_000,))
    theirs = data.TensorDataset(x, y)
    if rival: rival = {"batch_size": None, "sampler": data.BatchSampler(data.RandomSampler(theirs), 64, drop_last=False)}
    other = data.DataLoader(theirs, **(rival or {"batch_size": 64, "shuffle": True}))
    mine = DataLoader(TensorDataset(x, y), 64, shuffle=True)
    return lambda: drain(mine), lambda: drain(other)


@bench("DataLoader against torch's default: 60,000 × 784 in memory, batches of 64", "≤0.4×")
def loader_default(): return in_memory_loaders()


@bench("the same against torch's with batch_size=None, sampler=BatchSampler(…)", "≤0.9×")
def loader_batches(): return in_memory_loaders(by_batch=True)


def on_images(cbs, scheduler: bool = False):
    "One epoch of the five-layer CNN on 40 batches of 128 images."
    from exp.conv import simple_cnn
    from exp.learner import DataLoaders, Learner
    torch.manual_seed(0)
    batches = list(zip(torch.randn(40, 128, 1, 28, 28), torch.randint(0, 10, (40, 128))))
    return lambda: Learner(simple_cnn(), DataLoaders(batches), F.cross_entropy, torch.optim.SGD, .1, cbs(), quiet=True).fit(1)


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
    def train(cbs): Learner(mlp(), DataLoaders(batches), F.cross_entropy, torch.optim.SGD, .1, cbs, quiet=True).fit(1)
    return lambda: train([one_cycle(.1)]), lambda: train([])


def xresnet50_parameters(n_out: int = 10):
    "Random parameters with gradients, in the shapes of an xresnet50: 23,547,754 numbers in 167 tensors."
    convs, ni = [(3, 32, 3), (32, 32, 3), (32, 64, 3)], 64
    for n_blocks, width in zip((3, 4, 6, 3), (64, 128, 256, 512)):
        for block in range(n_blocks):
            convs += [(ni, width, 1), (width, width, 3), (width, 4*width, 1)]
            if block == 0: convs.append((ni, 4*width, 1))
            ni = 4*width
    shapes = [*[s for a, b, ks in convs for s in ((b, a, ks, ks), (b,), (b,))], (n_out, ni), (n_out,)]
    g = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=g).mul_(.05).requires_grad_() for s in shapes]
    for p in params: p.grad = torch.randn(p.shape, generator=g).mul_(.01)
    assert len(params) == 167 and sum(p.numel() for p in params) == 23_547_754
    return params


def adamw_steps(**rival):
    "A step of exp.optim's AdamW on an xresnet50's parameters, and one of PyTorch's."
    from exp.optim import adamw
    torch.set_num_threads(min(2, torch.get_num_threads()))
    return adamw(xresnet50_parameters(), lr=1e-3).step, torch.optim.AdamW(xresnet50_parameters(), lr=1e-3, **rival).step


@bench("the same in a process that keeps what it has freed, so that the large temporaries of foreach cost no page faults", "none", MALLOC_TRIM_THRESHOLD_="100000000000", MALLOC_MMAP_THRESHOLD_="100000000000")
@bench("AdamW step of exp.optim on xresnet50's parameters (23.5 M in 167 tensors), eager, against torch.optim.AdamW(foreach=True)", "≤0.7×")
def adamw_foreach(): return adamw_steps(foreach=True)


@bench("the same AdamW step against PyTorch's default (on a CPU one tensor after the other)", "none")
def adamw_default(): return adamw_steps()


@bench("the same AdamW step against torch.optim.AdamW(fused=True), one pass in C++", "none")
def adamw_fused(): return adamw_steps(fused=True)


def photo_files(n: int = 1280) -> list[str]:
    "Training photos of Imagenette, or of its stand-in, drawn by lot; always the same ones."
    import random
    from exp.datasets import fetch
    from exp.photos import image_files
    files = image_files(fetch("imagenette2-160")/"train").items
    random.Random(0).shuffle(files)
    return sorted((files*(1 + n//len(files)))[:n])


def usual_photos(files: list[str]):
    "What one writes with Pillow and PyTorch's loader: the best of 1 to 4 worker processes, which stay alive between epochs."
    import warnings
    import numpy as np
    from PIL import Image
    from torch.utils import data
    from exp.photos import RandomResizedCrop
    crop = RandomResizedCrop(128)

    class Photos(data.Dataset):
        def __len__(self): return len(files)
        def __getitem__(self, i):
            with Image.open(files[i]) as im: im = im.convert("RGB")
            im = im.resize((128, 128), Image.BILINEAR, box=crop.box(*im.size, torch.default_generator))
            return torch.from_numpy(np.array(im)).permute(2, 0, 1).contiguous().float().div_(255), 0

    warnings.filterwarnings("ignore", "This DataLoader will create")
    loaders = [data.DataLoader(Photos(), 64, shuffle=True, num_workers=n, persistent_workers=True) for n in (1, 2, 3, 4)]
    def once(dl): drain(dl); return min(seconds(lambda: drain(dl)) for _ in range(2))
    times = [once(dl) for dl in loaders]
    return loaders[times.index(min(times))]


def our_photos(files: list[str], opener):
    "An epoch of our loader, whose batches become floats as a Learner would have it."
    from exp.data import ItemSet, Pipeline
    from exp.loaders import DataLoader
    from exp.photos import RandomResizedCrop, to_float
    photos = ItemSet(files, lambda file: 0, Pipeline([opener, RandomResizedCrop(128)]), Pipeline())
    loader, on_batch = DataLoader(photos, 64, shuffle=True, num_workers=None, workers="threads"), Pipeline(to_float)
    return lambda: drain(map(on_batch, loader))


@bench("JPEG folder → RandomResizedCrop(128), batches of 64, against torch's DataLoader with Pillow at its best worker count", "≤0.6×")
def photos():
    from exp.photos import open_byte
    files = photo_files()
    mine, theirs = our_photos(files, open_byte), usual_photos(files)
    return mine, lambda: drain(theirs)


@bench("the same from the decoded cache, as from the second epoch on", "≤0.33×")
def cached_photos():
    import tempfile
    from exp.photos import PhotoCache
    files = photo_files()
    folder = tempfile.TemporaryDirectory()
    mine, theirs = our_photos(files, PhotoCache(files, 160, folder.name)), usual_photos(files)
    def ours(folder=folder): mine()                  # the folder lives as long as the benchmark
    return ours, lambda: drain(theirs)


@bench("get_files against a bare os.walk, Imagenette's folder (13,394 photos)", "≤2×")
def finding():
    import os
    from exp.data import get_files
    from exp.datasets import fetch
    from exp.photos import IMAGES
    path = str(fetch("imagenette2-160"))
    def walk():
        for _ in range(5):
            for _ in os.walk(path): pass
    def ours():
        for _ in range(5): get_files(path, IMAGES)
    return ours, walk


def augmentation(against):
    "Our Augment on a batch, against kornia's transforms in one of its two arrangements."
    import warnings
    warnings.simplefilter("ignore")
    from kornia import augmentation as K
    from exp.augment import Augment, Brightness, Contrast, Flip, Rotate, Saturation, Warp, Zoom
    x, chance = torch.rand(64, 3, 128, 128), torch.Generator().manual_seed(0)
    aug = Augment(Flip(), Rotate(10), Zoom(1, 1.2), Warp(.2), Brightness(.2), Contrast(.2), Saturation(.2))
    theirs = getattr(K, against, nn.Sequential)(K.RandomHorizontalFlip(.5), K.RandomAffine(10., scale=(1., 1.2), p=1.), K.RandomPerspective(.2, p=1.),
                                                K.ColorJiggle(.2, .2, .2, 0., p=1.))
    return lambda: aug(x, chance), lambda: theirs(x)


@bench("Augment: flip, rotate, zoom, warp and light, 64×3×128², against kornia in nn.Sequential", "≤0.7×", needs="kornia")
def augmentation_sequence(): return augmentation("Sequential")


@bench("the same against kornia's AugmentationSequential", "≤0.7×", needs="kornia")
def augmentation_sequential(): return augmentation("AugmentationSequential")


@bench("MixUp's blend of 64×3×128² photos against λ·x + (1 - λ)·x[partner]", "≤1.0×")
def blending():
    from exp.mixup import blend
    x, partner = torch.randn(64, 3, 128, 128), torch.randperm(64)
    return lambda: blend(x, partner, .3), lambda: .3*x + .7*x[partner]


@bench("an epoch of a small CNN, 64 px, with MixUp against without", "≤1.10×")
def mixing():
    from exp.conv import simple_cnn
    from exp.learner import DataLoaders, Learner
    from exp.mixup import MixUp
    batches = list(zip(torch.randn(10, 64, 3, 64, 64), torch.randint(0, 10, (10, 64))))
    def epoch(cbs):
        torch.manual_seed(0)
        net = simple_cnn((16, 32, 64, 128), ni=3, norm=nn.BatchNorm2d)
        Learner(net, DataLoaders(batches), F.cross_entropy, torch.optim.SGD, .1, cbs=cbs, quiet=True).fit(1)
    return lambda: epoch([MixUp()]), lambda: epoch([])


@bench("label smoothing, 64 rows of 1,000 classes, forward and backward, against F.cross_entropy's", "said")
def smoothing():
    from exp.mixup import LabelSmoothingCrossEntropy
    pred, y, ours = torch.randn(64, 1000).requires_grad_(), torch.randint(0, 1000, (64,)), LabelSmoothingCrossEntropy(.1)
    def run(loss):
        for _ in range(50): torch.autograd.grad(loss(pred, y), pred)
    return lambda: run(ours), lambda: run(lambda p, t: F.cross_entropy(p, t, label_smoothing=.1))


def half_training():
    "A small network with norms in float16 or bfloat16: our callback against the plain loop with torch.autocast and torch.amp.GradScaler."
    from exp.conv import simple_cnn
    from exp.learner import DataLoaders, Learner
    from exp.precision import MixedPrecision
    torch.set_num_threads(1)
    batches = [(torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))) for _ in range(20)]
    def net(): torch.manual_seed(0); return simple_cnn((8, 16), 10, 3, norm=nn.BatchNorm2d)
    def make(dtype):
        def ours(): Learner(net(), DataLoaders(batches), F.cross_entropy, torch.optim.SGD, .01, MixedPrecision(dtype), quiet=True, device="cpu").fit(1)
        def theirs():
            model, scaler = net(), torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
            opt = torch.optim.SGD(model.parameters(), lr=.01)
            for xb, yb in batches:
                with torch.autocast("cpu", dtype): loss = F.cross_entropy(model(xb), yb)
                scaler.scale(loss).backward()
                scaler.step(opt); scaler.update(); opt.zero_grad()
        return ours, theirs
    return make


@bench("MixedPrecision(float16) on a small CNN with norms, 20 batches of 16, against a bare loop with torch.autocast and torch.amp.GradScaler", "≤1.15×")
def half_float16(): return half_training()(torch.float16)


@bench("the same in bfloat16", "≤1.15×")
def half_bfloat16(): return half_training()(torch.bfloat16)


@bench("GradScaler: unscale, judge and update on xresnet50's gradients, against torch.amp.GradScaler", "said")
def unscaling():
    from exp.precision import GradScaler
    torch.set_num_threads(1)
    params = xresnet50_parameters()
    for p in params: p.grad = torch.randn_like(p)
    opt = torch.optim.SGD(params, 0.)
    def run(scaler):
        scaler.scale(torch.ones(()))
        def step(): scaler.unscale_(opt); scaler.update()
        return step
    return run(GradScaler(1.)), run(torch.amp.GradScaler("cpu", 1.))


def xresnet_step(layout):
    "Forward and backward of our xresnet18 and of timm's resnet18d, 16×3×128², float32, in one memory layout."
    import timm

    from exp.xresnet import xresnet18
    x, y = torch.randn(16, 3, 128, 128).to(memory_format=layout), torch.arange(16) % 10
    def step_of(model):
        model = model.to(memory_format=layout)
        def step():
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
        return step
    return step_of(xresnet18()), step_of(timm.create_model("resnet18d", num_classes=10))


@bench("a training step of xresnet18, 16×3×128², channels last, against timm's resnet18d", "≤1.0×", needs="timm")
def xresnet_last(): return xresnet_step(torch.channels_last)


@bench("the same with channels first", "≤1.0×", needs="timm")
def xresnet_first(): return xresnet_step(torch.contiguous_format)


@bench("two epochs of fine_tune, the first of them frozen, on a small CNN of 64 px, against bare loops that freeze by requires_grad", "≤1.15×")
def fine_tuning():
    from exp.conv import simple_cnn
    from exp.learner import DataLoaders, Learner
    from exp.transfer import fine_tune
    torch.set_num_threads(1)
    batches = [(torch.randn(32, 3, 64, 64), torch.randint(0, 10, (32,))) for _ in range(10)]
    def net(): torch.manual_seed(0); return simple_cnn((16, 32, 64, 128), ni=3, norm=nn.BatchNorm2d)
    def groups(model): return [[*model[:-1].parameters()], [*model[-1].parameters()]]
    def ours(): fine_tune(Learner(net(), DataLoaders(batches), F.cross_entropy, torch.optim.SGD, splitter=groups, quiet=True, device="cpu"), 1, .01)
    def theirs():
        model = net()
        body, head = groups(model)
        opt = torch.optim.SGD([{"params": body, "lr": 1e-4}, {"params": head, "lr": .01}])
        for frozen in (True, False):
            for p in body: p.requires_grad_(not frozen)
            for xb, yb in batches:
                F.cross_entropy(model(xb), yb).backward()
                opt.step(); opt.zero_grad()
    return ours, theirs


@bench("efficientnet_lite0, forward and backward, 16×3×128², against the package's own code", "≤1.05×", needs="efficientnet_lite_pytorch")
def lite0():
    from efficientnet_lite_pytorch import EfficientNet

    from exp.transfer import efficientnet_lite0
    x, y = torch.randn(16, 3, 128, 128), torch.arange(16)
    def step_of(model):
        def step():
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
        return step
    return step_of(efficientnet_lite0()), step_of(EfficientNet.from_name("efficientnet-lite0"))


@bench("distances of all pairs of 4,000 hashes of 64 bits, against torch.cdist(p=0)", "≤1.0×")
def hash_distances():
    from exp.interpret import hamming
    bits = torch.rand(4000, 64) < .5
    return lambda: hamming(bits, bits), lambda: torch.cdist(bits.float(), bits.float(), p=0)


@bench("tokenize, rules included, against str.split", "said")
def tokenizing():
    from exp.text import tokenize
    text = "\n".join("A film nobody had expected to be GOOD, isn't it?<br />Number 1989 is sooooo long; café & más." for _ in range(2000))
    return lambda: tokenize(text), lambda: text.split()


@bench("pad_collate of 64 documents of 10 to 1,000 tokens, against torch's pad_sequence", "≤1.2×")
def padding():
    from exp.text import PAD_ID, pad_collate
    samples = [(torch.randint(2, 9999, (int(n),)), 0) for n in torch.randint(10, 1000, (64,))]
    def theirs():
        rows, ys = zip(*samples)
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
        return (tokens, torch.tensor([len(row) for row in rows])), torch.tensor(ys)
    return lambda: pad_collate(samples), theirs


@bench("AWDLSTM 400/1152×3 with its five dropouts, 32×35 words, forward and backward, against an embedding and three nn.LSTM", "≤1.05×")
def awd_lstm():
    from exp.awd_lstm import AWDLSTM
    words, n, emb, nh = torch.randint(3, 10_000, (32, 35)), 10_000, 400, 1152
    ours, vectors = AWDLSTM(n, emb, nh).train(), nn.Embedding(n, emb)
    layers = nn.ModuleList(nn.LSTM(a, b, batch_first=True) for a, b in ((emb, nh), (nh, nh), (nh, emb)))
    def theirs():
        x = vectors(words)
        for layer in layers: x, _ = layer(x)
        x.sum().backward()
    return lambda: ours(words)[0].sum().backward(), theirs


@bench("TextClassifier 400/800×2, 16 texts of 100 to 400 words, forward and backward, against its encoder over the padded batch and three poolings", "≤1.2×")
def text_classifying():
    from exp.awd_lstm import AWDLSTM
    from exp.text import pad_collate
    from exp.ulmfit import text_classifier
    model = text_classifier(AWDLSTM(10_000, 400, 800, 2), 2)
    (tokens, lengths), y = pad_collate([(torch.randint(3, 10_000, (n,)), n % 2) for n in range(100, 401, 20)])
    own = (torch.arange(tokens.shape[1]) < lengths[:, None])[..., None]
    def theirs():
        out, _ = model.encoder(tokens)
        last, top = out[torch.arange(len(out)), lengths - 1], out.masked_fill(~own, -9e9).amax(1)
        F.cross_entropy(model.head(torch.cat([last, top, (out*own).sum(1)/lengths[:, None]], 1)), y).backward()
    return lambda: F.cross_entropy(model(tokens, lengths), y).backward(), theirs


@bench("an epoch of xresnet18 on 1,052 photos of Imagenette at 128 px, photos opened, cut and mirrored by each library's own loaders (no workers)", "≤0.8×", needs="fastai")
def imagenette_epoch():
    import warnings

    from fastai.vision import all as fastai

    from exp.data import grandparent_splitter
    from exp.datasets import fetch
    from exp.imagenette import Options, imagenette_net, learner
    from exp.learner import DataLoaders
    from exp.photos import image_files
    from exp.precision import native_half
    from exp.schedule import one_cycle
    options, path = Options(every=9, epochs=1, half=native_half("cpu")), fetch("imagenette2-160")
    files = image_files(path)
    learnt, judges = grandparent_splitter(files)
    chosen = [files[i] for i in [*learnt[::options.every], judges[0]]]
    class Half(fastai.Callback):
        def before_batch(self):
            self.learn.xb = (self.xb[0].contiguous(memory_format=torch.channels_last),)
            self.around = torch.autocast("cpu", torch.bfloat16)
            self.around.__enter__()
        def after_loss(self): self.around.__exit__(None, None, None)
    block = fastai.DataBlock((fastai.ImageBlock, fastai.CategoryBlock), get_items=lambda _: chosen, get_y=fastai.parent_label,
                             splitter=fastai.IndexSplitter([len(chosen) - 1]),
                             item_tfms=fastai.RandomResizedCrop(options.size, min_scale=options.least),
                             batch_tfms=[fastai.Flip(), fastai.Normalize.from_stats(*fastai.imagenet_stats)])
    dls = block.dataloaders(path, bs=options.bs, num_workers=0, device=torch.device("cpu"))
    def ours():
        learn = learner(options)
        learn.dls = DataLoaders(learn.dls.train)
        learn.fit(1, cbs=one_cycle(options.lr))
    def theirs():
        learn = fastai.Learner(dls, imagenette_net().to(memory_format=torch.channels_last), fastai.LabelSmoothingCrossEntropyFlat(), cbs=[Half()]*options.half)
        with warnings.catch_warnings(action="ignore"), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, options.lr)
    return ours, theirs


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]: print(json.dumps(ratio(*BENCHES[int(sys.argv[2])][2]())))
    else: main()

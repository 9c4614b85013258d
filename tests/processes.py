"What the processes of tests/test_distributed.py run: each function is called by a Team, or alone, and says what it saw."
import copy
import io
import os
import signal
import time
from contextlib import redirect_stdout
from functools import partial

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from exp.callbacks import EMA, GradientAccumulation, GradientClip
from exp.checkpoints import SaveCheckpoint
from exp.distributed import ShareGradients, SharedBatchNorm2d, same_start, share_batchnorm
from exp.learner import Callback, CancelBatch, DataLoaders, Learner, Mean, n_processes
from exp.loaders import DataLoader, TensorDataset
from exp.optim import sgd
from exp.precision import GradScaler, MixedPrecision
from exp.schedule import lr_find
from exp.training import accuracy, cross_entropy


def rank(): return distributed.get_rank() if n_processes() > 1 else 0


def total(x):
    x = x*(rank() + 1)
    if n_processes() > 1: distributed.all_reduce(x)
    return os.getpid(), n_processes(), x


def fail(how):
    "Rank 1 goes wrong, rank 0 waits for it."
    if rank() == 1:
        if how == "kill": os.kill(os.getpid(), signal.SIGTERM)
        if how == "exit": os._exit(3)
        raise ValueError("seven is not even")
    total(torch.ones(1))


def nap(seconds): time.sleep(seconds)


def points(n, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=g)
    return x.to(dtype), (x[:, 0] > 0).long()


def net(dtype=torch.float32, drop=0.):
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(drop), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


class CancelThird(Callback):
    "Every process cancels its batch 2: before its backward pass, or after it."
    def __init__(self, event): self.event = event
    def after_pred(self, learn): self.stop(learn, "after_pred")
    def after_backward(self, learn): self.stop(learn, "after_backward")
    def stop(self, learn, event):
        if learn.training and learn.batch == 2 and event == self.event: raise CancelBatch


def extras(name):
    return {"": [], "clip": [GradientClip(.05)], "ema": [EMA(.5)], "before": [CancelThird("after_pred")], "after": [CancelThird("after_backward")]}[name]


def train(options, n=64, joint_bs=16, epochs=2, dtype=torch.float32, drop=0., seed=1, extra="", folder=None, resume=None, ours=True):
    "Rows, weights, and what was printed. `joint_bs` is dealt to the processes there are."
    torch.manual_seed(seed + 10*rank())                       # on purpose: other weights and orders everywhere
    x, y = points(n, dtype)
    model = net(dtype, drop)
    dls = DataLoaders(DataLoader(TensorDataset(x, y), joint_bs//n_processes(), shuffle=True), DataLoader(TensorDataset(x, y), 7))
    learn = Learner(model, dls, cross_entropy, partial(sgd, momentum=.5), .2, metrics=accuracy, cbs=[ShareGradients(**options)] if ours else [GradientAccumulation(1)])
    said = io.StringIO()
    keep = [SaveCheckpoint(folder/str(rank()) if resume is None else folder/"again"/str(rank()))] if folder else []
    with redirect_stdout(said): learn.fit(epochs, cbs=[*extras(extra), *keep], resume=resume)
    names = "train_loss", "valid_loss", "accuracy"
    return [[row[k] for k in names] for row in learn.history], [p.detach() for p in model.parameters()], said.getvalue()


def with_ddp(wrap, overlap=True):
    "Three steps on equal shares: PyTorch's wrapper, or our callback."
    torch.manual_seed(1)
    model, (x, y) = net(), points(48)
    batches = [(xb[rank()::n_processes()], yb[rank()::n_processes()]) for xb, yb in zip(x.split(16), y.split(16))]
    trained = DistributedDataParallel(model) if wrap else model
    learn = Learner(trained, (batches, None), cross_entropy, lr=.2, quiet=True, cbs=[] if wrap else [ShareGradients(bucket_mb=1e-4, overlap=overlap)])
    learn.fit(1)
    return [p.detach() for p in model.parameters()]


class Branches(nn.Module):
    "A part for everybody, one for rank 0, one for rank 1, and one for nobody."
    def __init__(self):
        super().__init__()
        self.all, self.one, self.other, self.none = (nn.Linear(6, 2) for _ in range(4))
    def forward(self, x): return self.all(x) + (self.other if rank() else self.one)(x)


def branches(overlap, n_items):
    "One step of size 1 on shares of n_items: the gradients that moved each weight, and this process's own."
    torch.manual_seed(1)
    model, (x, y) = Branches(), points(sum(n_items))
    start = sum(n_items[:rank()])
    xb, yb = x[start:start + n_items[rank()]], y[start:start + n_items[rank()]]
    before = copy.deepcopy(model)
    cross_entropy(before(xb), yb).backward()
    learn = Learner(model, ([(xb, yb)], None), cross_entropy, partial(sgd, weight_decay=.5), 1., quiet=True, cbs=ShareGradients(bucket_mb=1e-4, overlap=overlap))
    learn.fit(1)
    old, own = dict(before.named_parameters()), {n: None if p.grad is None else p.grad for n, p in before.named_parameters()}
    return {n: (old[n].detach() - p.detach(), old[n].detach()) for n, p in model.named_parameters()}, own


def other_models(): return same_start(nn.Linear(3, 2 + rank()))
def other_order(): return same_start(nn.ModuleDict({name: nn.Linear(2, 2) for name in (("beta", "gamma") if rank() else ("gamma", "beta"))}))


class Broken(Callback):
    "A photo that one process cannot read, in the middle of an epoch; also after a step."
    def before_batch(self, learn):
        if rank() == 1 and learn.training and learn.batch == 2: raise ValueError("file 7 cannot be read")


def apart(how):
    "Fits that would train apart, or wait in vain."
    torch.manual_seed(1)
    x, y = points(48)
    batches = [*zip(x.split(4), y.split(4))][:12 - (how == "batches" and rank())]
    learn = Learner(net(), (batches, None), cross_entropy, lr=.1*(1 + (how == "rates" and rank())), quiet=True, cbs=ShareGradients())
    if how == "find": return lr_find(learn, n_batches=5)
    if how == "length": learn.dls.train = iter(batches)
    learn.fit(2, cbs=Broken() if how == "broken" else ())


def norms_without_judges():
    "Running averages after a fit without a validation loader, on shares that differ."
    torch.manual_seed(1)
    x, _ = points(8)
    learn = Learner(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)), ([(x + 9*rank(), torch.zeros(8).long())], None), cross_entropy, lr=.1, quiet=True, cbs=ShareGradients())
    learn.fit(1)
    return [b.detach() for b in learn.model[0].buffers()]


def says(words): print(words)


class Twice(Learner):
    "Two backward passes for a step."
    def train_batch(self):
        for part in (slice(0, 2), slice(2, None)): self.backward(self.get_loss(self.forward(self.xb[part]), self.yb[part])/2)
        self.step()
        self.zero_grad()


def two_backwards(overlap):
    torch.manual_seed(1)
    x, y = points(8)
    mine = slice(rank(), None, n_processes())
    learn = Twice(net(), ([(x[mine], y[mine])], None), cross_entropy, lr=.1, quiet=True, cbs=ShareGradients(overlap=overlap))
    learn.fit(1)
    return [p.detach() for p in learn.model.parameters()]


class Thaw(Callback):
    def before_batch(self, learn):
        if learn.training and learn.batch == 1: learn.unfreeze()


def thaw(late):
    torch.manual_seed(1)
    x, y = points(8)
    learn = Learner(net(), ([(x, y)]*2, None), cross_entropy, lr=.1, quiet=True, splitter=lambda m: [[*m[:3].parameters()], [*m[3:].parameters()]],
                    cbs=[ShareGradients(), *[Thaw()]*late])
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.freeze_to(-1)
    learn.fit(1)
    return [not torch.equal(a, b) for a, b in zip(before, learn.model.parameters())]


def half_precision():
    "In float16 with a scale that overflows at first: every process leaves out the same steps."
    torch.manual_seed(1)
    x, y = points(64)
    mine = slice(rank(), None, n_processes())
    half = MixedPrecision(torch.float16, GradScaler(2.**40))
    learn = Learner(net(), ([(xb, yb) for xb, yb in zip(x[mine].split(4), y[mine].split(4))]*6, None), cross_entropy, lr=.1, quiet=True,
                    cbs=[half, ShareGradients(bucket_mb=1e-4)])
    learn.fit(1)
    return half.n_skipped, [p.detach() for p in learn.model.parameters()]


class Draw(Callback):
    "What chance gives in each training batch, and which items came."
    def __init__(self): self.numbers, self.items = [], []
    def after_pred(self, learn):
        if learn.training: self.numbers.append(torch.rand(()).item()); self.items.append(learn.indices)


def chance():
    torch.manual_seed(5*rank())
    x, y = points(24)
    draw = Draw()
    learn = Learner(net(), (DataLoader(TensorDataset(x, y), 4, shuffle=True), None), cross_entropy, lr=.1, quiet=True, cbs=[ShareGradients(), draw])
    learn.fit(2)
    return draw.numbers, draw.items


def judge(n):
    "Accuracy, loss and the number of items judged."
    torch.manual_seed(1)
    count = Mean(lambda pred, yb: 1., "judged")
    learn = Learner(net(), (None, DataLoader(TensorDataset(*points(n)), 64)), cross_entropy, metrics=[accuracy, count], quiet=True)
    row = learn.validate()
    return row["accuracy"], row["valid_loss"], sum(count.weights)


def running_averages():
    "A BatchNorm's averages after each process has seen items of its own; before judging, and after."
    torch.manual_seed(1)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2))
    x, y = points(16)
    learn = Learner(model, ([(x*(rank() + 1), y)], [(x, y)]), cross_entropy, lr=.1, quiet=True, cbs=ShareGradients())
    alone = copy.deepcopy(model[0])
    alone(x*(rank() + 1))
    learn.fit(1)
    return alone.running_mean, alone.running_var, model[0].running_mean, model[0].running_var


def norm(options, split, training=True, steps=2):
    "Outputs, gradients and averages of a norm over the items of all; `split` are the sizes of the shares."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(split), 3, 4, 5, generator=g, dtype=torch.float64)*3 + 50
    weights = torch.randn(x.shape, generator=g, dtype=torch.float64)
    layer = nn.BatchNorm2d(3, **options).double()
    if layer.affine: nn.init.uniform_(layer.weight, generator=g); nn.init.uniform_(layer.bias, generator=g)
    if layer.running_mean is not None and not training: layer.running_mean.fill_(40.)
    share_batchnorm(layer).train(training)
    assert type(layer) is SharedBatchNorm2d
    start = sum(split[:rank()])
    mine = slice(start, start + split[rank()]) if n_processes() > 1 else slice(None)
    xb = x[mine].clone().requires_grad_()
    for _ in range(steps): y = layer(xb)
    (y*weights[mine]).sum().backward()
    grads = [p.grad for p in layer.parameters()]
    if n_processes() > 1:
        for grad in grads: distributed.all_reduce(grad)
    averages = [] if layer.running_mean is None else [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    return y.detach(), xb.grad, grads, averages


def norm_of_bfloat16():
    "A norm with weights in float32 over 405 numbers a channel in bfloat16, which cannot count to 405."
    x = (torch.randn(5, 2, 9, 9, generator=torch.Generator().manual_seed(0))*2 + 7).bfloat16()
    layer = share_batchnorm(nn.BatchNorm2d(2))
    y = layer(x[slice(3*rank(), 3 + 2*rank()) if n_processes() > 1 else slice(None)])
    return y.detach(), layer.running_mean, layer.running_var


def normed_step(shared):
    "Three steps of a small convolutional network; the norm sees the items of one process, or of all."
    torch.manual_seed(1)
    x, y = torch.randn(24, 2, 5, 5), torch.arange(24) % 3
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    if shared: share_batchnorm(model)
    mine = [(xb[rank()::n_processes()], yb[rank()::n_processes()]) for xb, yb in zip(x.split(8), y.split(8))]
    learn = Learner(model, (mine, None), F.cross_entropy, lr=.1, quiet=True, cbs=ShareGradients())
    learn.fit(1)
    return [t.detach() for t in model.state_dict().values()]

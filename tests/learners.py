"Small models, batches and learners for the tests of the engine."
import torch
from conftest import data
from torch import nn

from exp import learner as L
from exp.training import cross_entropy


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def batches(n=40, bs=16, seed=0): x, y = data(n, seed); return [(x[i:i+bs], y[i:i+bs]) for i in range(0, n, bs)]


def make(cbs=(), dls=None, net=None, **kwargs):
    kwargs = {"lr": .1, "quiet": True, "device": "cpu", **kwargs}
    return L.Learner(net or model(), dls or L.DataLoaders(batches(), batches(24)), kwargs.pop("loss_func", cross_entropy), cbs=cbs, **kwargs)


def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]


def equal(a, b): return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b))


def history(learn): return [{k: v for k, v in row.items() if k != "seconds"} for row in learn.history]


def notes(error): return " ".join(getattr(error, "__notes__", []))


class At(L.Callback):
    "Do something at an event, the n-th time it is heard in a mode."
    def __init__(self, event, action, n=0, mode="train", order=0):
        self.n, self.mode, self.order, self.heard = n, mode, order, 0
        def hear(learn):
            if mode in (None, learn.mode) or learn.mode is None:
                self.heard += 1
                if self.heard == self.n + 1: return action(learn)
        setattr(self, event, hear)


def raises(error):
    def act(learn): raise error
    return act

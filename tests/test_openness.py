"Four short programs that the engine was not written for, each with public names only: openness, proved."
import inspect
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from conftest import data
from torch import nn

from exp.learner import Callback, DataLoaders, Learner
from exp.loaders import DataLoader, TensorDataset
from exp.optim import adam


# --- a GAN: two models, two optimizers, ≤ 25 lines ------------------------------------------------------------------------

class GAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
        self.critic = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(.2), nn.Linear(16, 1))
    def forward(self, noise): return self.generator(noise)


class GANLearner(Learner):
    def train_batch(self):
        ones = torch.ones(len(self.xb), 1)
        fake = self.forward(torch.randn(len(self.xb), 2))
        real, made = self.forward(self.yb, self.model.critic), self.forward(fake.detach(), self.model.critic)
        self.backward(self.get_loss(real, ones) + self.get_loss(made, 0*ones))
        self.step(self.opts["critic"])
        self.zero_grad()
        self.backward(self.get_loss(self.forward(fake, self.model.critic), ones))
        self.step(self.opts["generator"])
        self.zero_grad()


def both(groups, lr): return {"generator": adam(groups[0]["params"], lr), "critic": adam(groups[1]["params"], lr)}


def test_a_gan():
    lines = [line for part in (GAN, GANLearner, both) for line in inspect.getsource(part).splitlines() if line.strip()]
    assert len(lines) <= 25
    torch.manual_seed(0)
    target = torch.randn(512, 2)*.5 + torch.tensor([2., -1.])
    train = DataLoader(TensorDataset(torch.zeros(512, 2), target), 64, shuffle=True)
    stepped, means = [], []
    class Watch(Callback):
        def after_step(self, learn): stepped.append(learn.stepping[0] is learn.opts["critic"])
        def after_epoch(self, learn): means.append(learn.predict(torch.randn(256, 2)).mean(0))
    learn = GANLearner(GAN(), DataLoaders(train), F.binary_cross_entropy_with_logits, both, lr=2e-3, quiet=True, device="cpu", cbs=Watch(),
                       splitter=lambda m: [m.generator.parameters(), m.critic.parameters()])
    learn.fit(60)
    aim = target.mean(0)          # the two circle around it, as GANs do: so the mean of many epochs is asked
    assert (torch.stack(means[20:]).mean(0) - aim).norm() < .8 < (means[0] - aim).norm()
    assert stepped[:4] == [True, False]*2 and len(stepped) == 2*8*60 and learn.opt is learn.opts["generator"]


def test_a_gan_resumes(tmp_path):
    def make():
        torch.manual_seed(0)
        train = DataLoader(TensorDataset(torch.zeros(128, 2), torch.randn(128, 2)), 64, shuffle=True)
        return GANLearner(GAN(), DataLoaders(train), F.binary_cross_entropy_with_logits, both, lr=5e-3, quiet=True, device="cpu",
                          splitter=lambda m: [m.generator.parameters(), m.critic.parameters()])
    from exp.checkpoints import SaveCheckpoint
    calm, cut, again = make(), make(), make()
    torch.manual_seed(1); calm.fit(3, cbs=SaveCheckpoint(tmp_path/"a", "train_loss"))
    torch.manual_seed(1); cut.fit(2, cbs=SaveCheckpoint(tmp_path/"b", "train_loss"))
    again.fit(3, cbs=SaveCheckpoint(tmp_path/"b", "train_loss"), resume=tmp_path/"b"/"last.pt")
    assert all(torch.equal(a, b) for a, b in zip(calm.model.parameters(), again.model.parameters()))


# --- autocast as a callback ------------------------------------------------------------------------------------------------

class Autocast(Callback):
    def around_forward(self, learn): return torch.autocast(learn.device.type, dtype=torch.bfloat16)


def test_autocast():
    seen = []
    class Look(Callback):
        def after_pred(self, learn): seen.append((learn.pred.dtype, torch.is_autocast_enabled("cpu")))
        def after_backward(self, learn): seen.append((next(learn.model.parameters()).grad.dtype, torch.is_autocast_enabled("cpu")))
    x, y = data()
    dls = DataLoaders([(x, y)]*20, [(x, y)])
    torch.manual_seed(0)
    learn = Learner(nn.Linear(6, 2), dls, F.cross_entropy, lr=.5, cbs=[Autocast(), Look()], quiet=True, device="cpu")
    learn.fit(1)
    assert set(seen) == {(torch.bfloat16, False), (torch.float32, False)} and learn.history[0]["valid_loss"] < .45
    def broken(pred, yb): raise ZeroDivisionError
    learn.loss_func = broken
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    assert not torch.is_autocast_enabled("cpu")


# --- two inputs and a dict of targets ------------------------------------------------------------------------------------------

class TwoHeads(nn.Module):
    def __init__(self): super().__init__(); self.body, self.kind, self.size = nn.Linear(9, 8), nn.Linear(8, 2), nn.Linear(8, 1)
    def forward(self, a, b):
        h = self.body(torch.cat([a, b], 1)).relu()
        return {"kind": self.kind(h), "size": self.size(h)[:, 0]}


def both_losses(pred, yb): return F.cross_entropy(pred["kind"], yb["kind"]) + F.mse_loss(pred["size"], yb["size"])


def test_two_inputs_and_a_dict_of_targets():
    x, y = data(64)
    class Pairs:
        def __len__(self): return 64
        def __getitem__(self, i): return (x[i], x[i, :3]), {"kind": y[i], "size": x[i, 1]}
    torch.manual_seed(0)
    loader = DataLoader(Pairs(), 16)
    learn = Learner(TwoHeads(), DataLoaders(loader, loader), both_losses, adam, lr=.02, quiet=True, device="cpu",
                    metrics=lambda pred, yb: (pred["kind"].argmax(1) == yb["kind"]).float().mean())
    learn.fit(20)
    pred, targets = learn.predict(with_targets=True)
    assert pred["kind"].shape == (64, 2) and torch.equal(targets["kind"], y) and learn.history[-1]["<lambda>"] > .9
    one = learn.predict((x[:3], x[:3, :3]))
    assert torch.allclose(one["size"], pred["size"][:3], atol=1e-6)


# --- two processes equal one with the joint batch ----------------------------------------------------------------------------------

PROGRAM = """
    import os, sys, torch
    import torch.distributed as dist
    from torch import nn
    from exp.callbacks import GradientAccumulation
    from exp.learner import DataLoaders, Learner, Metric
    from exp.loaders import DataLoader, TensorDataset
    from exp.training import accuracy, cross_entropy

    class Share(Metric):
        "Its state is summed."
        name = "share"
        def reset(self): self.right, self.n = torch.zeros(()), torch.zeros(())
        def add(self, pred, yb, weight): self.right += (pred.argmax(1) == yb).sum(); self.n += len(yb)
        def value(self): return self.right/self.n
        def state(self): return {"right": self.right, "n": self.n}
        def load_state(self, state): self.right, self.n = state["right"], state["n"]

    class Median(Metric):
        "Sums do not do: its states are merged."
        name = "median"
        def reset(self): self.seen = []
        def add(self, pred, yb, weight): self.seen += pred[:, 0].tolist()
        def value(self): return sorted(self.seen)[len(self.seen)//2]
        def state(self): return self.seen
        def merge(self, states): self.seen = [x for seen in states for x in seen]

    class Mute(Metric):
        "No state: right in one process, an error in several."
        name = "mute"
        def value(self): return 7.

    def train(bs):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(1001, 6, generator=g); y = (x[:, 0] > 0).long()
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        dls = DataLoaders(DataLoader(TensorDataset(x[:640], y[:640]), bs, shuffle=True), DataLoader(TensorDataset(x, y), 64))
        learn = Learner(net, dls, cross_entropy, lr=.2, metrics=[accuracy, Share(), Median()], quiet=True, device="cpu", cbs=GradientAccumulation(1))
        learn.fit(3)
        rows = [[r[k] for k in ("train_loss", "valid_loss", "accuracy", "share", "median")] for r in learn.history]
        learn.metrics = [Mute()]
        try: mute = learn.validate()["mute"]
        except NotImplementedError as error: mute = str(error)
        return {"weights": [p.detach() for p in net.parameters()], "rows": rows, "mute": mute}

    if __name__ == "__main__":
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
        result = train(16)
        torch.save(result, f"{sys.argv[3]}/{sys.argv[2]}.pt")
        dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path):
    (tmp_path/"program.py").write_text(textwrap.dedent(PROGRAM))
    start = [subprocess.Popen([sys.executable, tmp_path/"program.py", tmp_path/"meet", str(rank), tmp_path],
                              env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}) for rank in range(2)]
    assert [p.wait(timeout=600) for p in start] == [0, 0]
    import importlib.util
    spec = importlib.util.spec_from_file_location("program", tmp_path/"program.py")
    program = importlib.util.module_from_spec(spec); spec.loader.exec_module(program)
    one = program.train(32)
    two = [torch.load(tmp_path/f"{rank}.pt") for rank in range(2)]
    for got in two:
        for a, b in zip(got["weights"], one["weights"], strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(got["rows"]), torch.tensor(one["rows"]), rtol=0, atol=1e-6)
        assert got["mute"] == "metric mute has no state(): several processes need it" and one["mute"] == 7


def test_the_programs_use_public_names_only():
    import re
    text = "".join(map(inspect.getsource, (GAN, GANLearner, both, Autocast, TwoHeads, both_losses))) + PROGRAM
    assert not re.findall(r"(?:learn|self|exp)\._\w+", text.replace("self.__", "")), "no private name"

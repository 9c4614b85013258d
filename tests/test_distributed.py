"Several processes: two equal one with the joint batch, whatever the shares; who fails takes all along; norms, judging, resuming; the time model."
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import chain

import processes as P
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from exp import distributed as D
from exp.exercises import distributed as E
from exp.learner import Learner
from exp.testing import test_like
from exp.training import cross_entropy


@pytest.fixture(scope="module")
def two():
    "Two processes; whoever lets them fail gets new ones at the next call."
    with D.Team(2, timeout=1200) as team: yield team


def same(a, b, tol=1e-6):
    for x, y in zip(a, b, strict=True): test_like(x, y, rtol=0, atol=tol)


# --- a team ----------------------------------------------------------------------------------------------------------------------

def test_answers_come_by_rank_and_the_same_processes_stay(two):
    (pid, world, a), (other, _, b) = two(P.total, torch.tensor([1., 10.]))
    assert world == 2 and len({pid, other, os.getpid()}) == 3 and a.tolist() == b.tolist() == [3., 30.]
    assert [answer[0] for answer in two(P.total, torch.zeros(1))] == [pid, other]


@pytest.mark.parametrize("how, words", [("kill", "process 1 of 2 was killed by SIGTERM; the others were stopped"), ("exit", "process 1 of 2 ended with exit code 3; the others"),
                                        ("raise", "process 1 of 2 failed with ValueError: seven is not even; the others were stopped")])
def test_who_fails_takes_all_along(two, how, words):
    with pytest.raises(RuntimeError, match=words) as caught: two(P.fail, how)
    assert not two.members and not multiprocessing.active_children()
    if how == "raise": assert "in fail" in caught.value.__notes__[0], "where it happened"


def test_a_call_that_takes_too_long_ends(two, monkeypatch):
    two(P.nap, 0)
    monkeypatch.setattr(two, "timeout", .3)
    with pytest.raises(TimeoutError, match="after 0.3 s 2 of 2 processes still work .then give a longer timeout., or wait for each other: do all"): two(P.nap, 60)
    assert not multiprocessing.active_children()


def test_what_cannot_be_sent_is_refused_and_the_team_lives(two):
    pids = [answer[0] for answer in two(P.total, torch.zeros(1))]
    with pytest.raises(Exception, match="pickle|local object"): two(lambda: 1)
    assert [answer[0] for answer in two(P.total, torch.zeros(1))] == pids


def test_a_team_needs_a_member():
    with pytest.raises(ValueError, match="n is 0: a team has at least one member"): D.Team(0)


def test_no_orphan_survives_its_parent(tmp_path):
    program = """
        import os, sys, time
        from pathlib import Path
        from exp.distributed import Team
        def sleep(file): Path(file).write_text(str(os.getpid())); time.sleep(600)
        if __name__ == "__main__": Team(1)(sleep, sys.argv[1])"""
    (tmp_path/"program.py").write_text(textwrap.dedent(program))
    parent, file, end = subprocess.Popen([sys.executable, tmp_path/"program.py", tmp_path/"pid"]), tmp_path/"pid", time.monotonic() + 1200
    try:
        while not (file.exists() and file.read_text()): assert parent.poll() is None and time.monotonic() < end; time.sleep(.05)
    finally: parent.kill(); parent.wait()
    pid = int(file.read_text())
    while time.monotonic() < end:
        try: os.kill(pid, 0)
        except ProcessLookupError: return
        if "Z" in subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout: return   # nobody here to bury it
        time.sleep(.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the member outlived its parent")


def test_alone_nobody_is_joined(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"): monkeypatch.delenv(name, raising=False)
    with D.joined() as rank: assert rank == 0 and not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with D.joined() as rank: assert rank == 0 and not torch.distributed.is_initialized()


def test_each_process_needs_a_gpu(monkeypatch):
    for name, value in dict(RANK=2, LOCAL_RANK=2, WORLD_SIZE=3, LOCAL_WORLD_SIZE=3).items(): monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 2 has no GPU of its own: start 2, or set"):
        with D.joined(): pass


# --- two equal one ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, kwargs", [
    (dict(), {}), (dict(overlap=False), {}), (dict(bucket_mb=1e-5), {}), (dict(bucket_mb=1e-4), dict(dtype=torch.float64)), (dict(bucket_mb=1e-4, n_batches=2), {}),
    (dict(n_batches=3), {}), (dict(n_batches=3, overlap=False), {}), (dict(bucket_mb=1e-4), dict(extra="clip")), (dict(), dict(extra="ema")), (dict(bucket_mb=1e-4), dict(extra="before")),
    (dict(bucket_mb=1e-4), dict(extra="after")), (dict(n_batches=2), dict(extra="before")), (dict(n_batches=2), dict(extra="after")), (dict(bucket_mb=1e-4), dict(n=63)), (dict(overlap=False), dict(n=63))],
    ids=str)
def test_two_processes_equal_one_with_the_joint_batch(two, options, kwargs):
    "Losses, accuracy and weights, after two epochs; n = 63 leaves shares of 8 and 7 at the end."
    rows, weights, _ = P.train(options, **kwargs)
    tol = 1e-12 if kwargs.get("dtype") == torch.float64 else 1e-6
    for got_rows, got, _ in two(P.train, options, *kwargs_of(kwargs)):
        same(got, weights, tol)
        test_like(torch.tensor(got_rows), torch.tensor(rows), rtol=0, atol=2e-6)


def kwargs_of(kwargs):
    "Positional, for a Team passes no others."
    defaults = dict(n=64, joint_bs=16, epochs=2, dtype=torch.float32, drop=0., seed=1, extra="", folder=None, resume=None, ours=True)
    return [*(defaults | kwargs).values()]


def test_wrong_weighing_would_be_seen():
    "The law can fail: the mean of means differs from the mean of all by more than its tolerance."
    x, y = P.points(15)
    torch.manual_seed(1)
    model = P.net()
    def grads(*rows):
        out = []
        for r in rows: model.zero_grad(); cross_entropy(model(x[r]), y[r]).backward(); out.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return out
    (whole,), (a, b) = grads(slice(None)), grads(slice(0, 8), slice(8, None))
    assert ((a + b)/2 - whole).abs().max() > 1e-4 and ((8*a + 7*b)/15 - whole).abs().max() < 1e-6


def test_the_same_as_pytorchs_wrapper(two):
    (a, b), (c, d), (e, _) = two(P.with_ddp, True), two(P.with_ddp, False), two(P.with_ddp, False, False)
    for got in (b, c, d, e): same(got, a)
    same(P.with_ddp(False), a)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_part_that_only_one_process_uses(two, overlap):
    "Its gradient counts there, and zeros here, by items; what nobody uses does not even decay."
    n = [6, 2]
    (moved, own_0), (moved_1, own_1) = two(P.branches, overlap, n)
    for name, (step, old) in moved.items():
        test_like(moved_1[name][0], step, rtol=0, atol=0)
        if name.startswith("none"): assert not step.any(); continue
        parts = [k*g for k, g in zip(n, (own_0[name], own_1[name])) if g is not None]
        test_like(step, sum(parts)/8 + .5*old, rtol=0, atol=1e-6)
    assert own_0["other.weight"] is None and own_1["one.weight"] is None


def test_models_that_differ_are_named(two):
    with pytest.raises(RuntimeError, match="ValueError: the processes hold different models: look at bias, weight"): two(P.other_models)


def test_two_backwards_for_a_step(two):
    with pytest.raises(RuntimeError, match=r"a second backward adds to gradients that are sent: ShareGradients\(overlap=False\)"): two(P.two_backwards, True)
    want = two(P.two_backwards, False)
    same(want[0], want[1], 0)


def test_thawing(two):
    assert two(P.thaw, False) == [[False, False, True, True, True, True]]*2
    with pytest.raises(RuntimeError, match=r"a parameter \(5, 6\) float32 began to learn within an epoch: thaw between two"): two(P.thaw, True)


@pytest.mark.parametrize("how, words", [
    ("rates", "the processes hold different weights: have all the same rates"), ("batches", r"the processes have \[11, 12\] batches: deal equally many"),
    ("find", "several processes would find rates of their own"), ("length", "a loader without a length"),
    ("broken", "process 1 of 2 failed with ValueError: file 7 cannot be read")])
def test_who_would_train_apart_or_wait_in_vain_is_told(two, how, words):
    with pytest.raises(RuntimeError, match=words): two(P.apart, how)


def test_norms_agree_without_anybody_who_judges(two):
    same(*two(P.norms_without_judges), 0)


def test_another_order_of_parameters_is_another_model(two):
    with pytest.raises(RuntimeError, match="the processes hold different models: look at beta.bias, beta.weight, gamma.bias, gamma.weight"): two(P.other_order)


def test_what_members_print_is_not_lost(tmp_path):
    code = "import sys; sys.path[:0] = sys.argv[1:]\nif __name__ == '__main__':\n    from exp.distributed import Team\n    import processes\n    with Team(2) as team: team(processes.says, 'a word')"
    (tmp_path/"ask.py").write_text(code)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, str(tmp_path/"ask.py"), str(ROOT), str(ROOT/"tests")], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.split("\n")[:2] == ["a word"]*2, done.stderr[-1000:]


def test_several_optimizers_are_refused():
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    def opts(params): params = [*params]; return {"a": torch.optim.SGD(params[:2], .1), "b": torch.optim.SGD(params[2:], .1)}
    learn = Learner(model, ([(torch.zeros(1, 2), torch.zeros(1, 1))], None), nn.MSELoss(), opts, quiet=True, cbs=D.ShareGradients())
    with pytest.raises(ValueError, match=r"several optimizers step in turn: same_start\(model\), then GradientAccumulation\(1\)"): learn.fit(1)


def test_float16_skips_the_same_steps_everywhere(two):
    (n, a), (m, b) = two(P.half_precision)
    assert n == m > 3
    same(a, b, 0)
    torch.manual_seed(1)
    assert not all(torch.equal(x, y) for x, y in zip(a, P.net().parameters())), "some steps were taken"


# --- order and chance ------------------------------------------------------------------------------------------------------------

def test_one_order_and_a_chance_of_ones_own(two):
    "The seeds differ; every epoch holds each item once, and the numbers drawn differ."
    (numbers, items), (others, theirs) = two(P.chance)
    for epoch in range(2):
        assert sorted(chain(*items[3*epoch:3*epoch + 3], *theirs[3*epoch:3*epoch + 3])) == [*range(24)]
    assert items[:3] != items[3:] and len({*numbers, *others}) == 12


def test_resume_with_as_many_is_the_same_run(two, tmp_path):
    "To the last bit, dropout included."
    whole = two(P.train, {}, *kwargs_of(dict(drop=.5, epochs=3)))
    two(P.train, {}, *kwargs_of(dict(drop=.5, epochs=1, folder=tmp_path)))
    rest = two(P.train, {}, *kwargs_of(dict(drop=.5, epochs=3, folder=tmp_path, resume=tmp_path/"0"/"last.pt", seed=77)))
    for (_, want, _), (_, got, _) in zip(whole, rest): same(got, want, 0)
    plain, = [P.train({}, drop=0., epochs=3)]
    assert max((a - b).abs().max() for a, b in zip(plain[1], whole[0][1])) > 1e-3, "dropout was at work"


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_resume_with_another_number(two, tmp_path, before, after):
    def run(n, **kwargs): return two(P.train, {}, *kwargs_of(kwargs)) if n == 2 else [P.train({}, **kwargs)]
    _, whole, _ = P.train({}, epochs=3)
    run(before, epochs=1, folder=tmp_path)
    for _, got, _ in run(after, epochs=3, folder=tmp_path, resume=tmp_path/"0"/"last.pt"): same(got, whole)


def test_rank_0_alone_writes_and_prints(two, tmp_path):
    (_, _, said), (_, _, silence) = two(P.train, {}, *kwargs_of(dict(folder=tmp_path)))
    assert len(said.splitlines()) == 3 and "valid_loss" in said and not silence
    assert [p.name for p in tmp_path.iterdir()] == ["0"] and sorted(p.name for p in (tmp_path/"0").iterdir()) == ["best.pt", "last.pt"]


# --- judging and norms -----------------------------------------------------------------------------------------------------------

def test_1001_items_are_judged_exactly(two):
    want = P.judge(1001)
    assert want[2] == 1001
    for got in two(P.judge, 1001): test_like([*got], [*want], rtol=0, atol=1e-6); assert got[2] == 1001


def test_running_averages_agree_before_judging(two):
    (mean_0, var_0, *got), (mean_1, var_1, *other) = two(P.running_averages)
    same(got, other, 0)
    same(got, [(mean_0 + mean_1)/2, (var_0 + var_1)/2])
    assert (mean_0 - mean_1).abs().max() > 1e-2


@pytest.mark.parametrize("options, split, training", [
    (dict(), [4, 4], True), (dict(), [5, 1], True), (dict(momentum=None), [4, 2], True), (dict(affine=False), [3, 3], True), (dict(track_running_stats=False), [4, 2], True),
    (dict(track_running_stats=False), [4, 2], False), (dict(eps=.5), [4, 2], True), (dict(), [4, 2], False)], ids=str)
def test_a_shared_norm_equals_the_joint_one(two, options, split, training):
    y, gx, gs, averages = P.norm(options, split, training)                 # alone it is nn.BatchNorm2d
    results = two(P.norm, options, split, training)
    same([torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results])], [y, gx], 1e-9)
    for _, _, got, kept in results: same(got, gs, 1e-9); same(kept, averages, 1e-9)


def test_a_shared_norm_adds_up_bfloat16_in_float32(two):
    y, *averages = P.norm_of_bfloat16()
    for got, *kept in (results := two(P.norm_of_bfloat16)): same(kept, averages, 1e-5); assert got.dtype == torch.bfloat16 == y.dtype
    assert (torch.cat([got for got, *_ in results]).float() - y.float()).abs().max() <= 2**-6, "a last bit of bfloat16 at 2 to 4"


def test_only_the_shared_norm_keeps_the_law(two):
    for shared in (True, False):
        want = P.normed_step(shared)
        gap = max((a - b).abs().max() for a, b in zip(two(P.normed_step, shared)[0], want))
        assert gap < 1e-5 if shared else gap > 1e-4


def test_share_batchnorm_changes_the_kind_and_nothing_else():
    class Mine(nn.BatchNorm2d): pass
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), Mine(3), nn.BatchNorm1d(3))
    before = {n: id(t) for n, t in chain(model.named_parameters(), model.named_buffers())}
    assert D.share_batchnorm(model) is model and {n: id(t) for n, t in chain(model.named_parameters(), model.named_buffers())} == before
    assert [type(m) for m in model] == [nn.Conv2d, D.SharedBatchNorm2d, Mine, nn.BatchNorm1d]
    nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), Mine(3), nn.BatchNorm1d(3)).load_state_dict(model.state_dict())


# --- buckets and the time model --------------------------------------------------------------------------------------------------

@given(st.lists(st.tuples(st.integers(1, 30), st.sampled_from([torch.float32, torch.float16]))), st.integers(1, 100))
def test_buckets_hold_every_tensor_once_in_reverse(kinds, size):
    params = [torch.zeros(n, dtype=dtype) for n, dtype in kinds]
    buckets = D.buckets_of(params, size)
    assert [id(p) for b in buckets for p in b] == [*map(id, reversed(params))]
    weigh = [sum(p.numel()*p.element_size() for p in b) for b in buckets]
    assert all(len(b) == 1 or w <= size for b, w in zip(buckets, weigh)) and all(len({p.dtype for p in b}) == 1 for b in buckets)
    for (a, w), b in zip(zip(buckets, weigh), buckets[1:]):                    # none could have taken the next one's first
        assert a[0].dtype != b[0].dtype or w + b[0].numel()*b[0].element_size() > size


def test_a_ring_by_hand():
    assert D.all_reduce_seconds(1e6, 1, 1e9, 1e-3) == 0
    assert D.all_reduce_seconds(1e6, 2, 1e9, 1e-3) == pytest.approx(2*(1e-3 + .5e-3))
    assert D.all_reduce_seconds(1e6, 5, 1e9, 1e-3) == pytest.approx(8*(1e-3 + .2e-3))


def test_a_step_by_hand():
    "One second forward, two backward; two buckets of a second each."
    model = dict(world=2, bandwidth=1., latency=0.)
    assert D.step_seconds(3., [1., 1.], overlap=False, **model) == pytest.approx(5)
    assert D.step_seconds(3., [1., 1.], **model) == pytest.approx(4), "the first flies while the second is made"
    assert D.step_seconds(3., [4., 1.], **model) == pytest.approx(7), "the second waits for the first"
    assert D.step_seconds(3., [1.], **model) == pytest.approx(4), "one piece hides nothing"
    assert D.step_seconds(3., [1., 1.], 1, 1., 1.) == 3 and D.step_seconds(3., [], **model) == 3


@given(st.lists(st.floats(0, 1e8), min_size=1, max_size=8), st.integers(1, 1024), st.floats(1e6, 1e11), st.floats(0, 1e-3))
def test_overlapping_never_costs_and_nothing_beats_the_wire(buckets, world, bandwidth, latency):
    fast, slow = (D.step_seconds(.1, buckets, world, bandwidth, latency, overlap=o) for o in (True, False))
    wire = sum(D.all_reduce_seconds(b, world, bandwidth, latency) for b in buckets)
    assert max(.1, wire) <= fast*(1 + 1e-9) and fast <= slow*(1 + 1e-9) and slow == pytest.approx(.1 + wire)


# --- the exercises' checkers -------------------------------------------------------------------------------------------------------

def refuses(check, answer, word):
    with pytest.raises(AssertionError, match=word): check(answer)


def ring(pieces, pass_on, first=0, second=1, turns=1, copy=True):
    w, pieces = len(pieces), [list(mine) for mine in pieces] if copy else pieces
    for step in range(w - 1):
        got = pass_on([mine[(r + first - step) % w] for r, mine in enumerate(pieces)])
        for r, mine in enumerate(pieces): i = (r - 1 + first - step) % w; mine[i] = mine[i] + got[r]
    for step in range((w - 1)*turns):
        got = pass_on([mine[(r + first + second - step) % w] for r, mine in enumerate(pieces)])
        for r, mine in enumerate(pieces): mine[(r - 1 + first + second - step) % w] = got[r]
    return pieces


def test_ring_judges_behaviour(capsys):
    E.check_ring_all_reduce(ring)
    E.check_ring_all_reduce(lambda p, send: ring(p, send, first=1))              # another chunk first
    E.check_ring_all_reduce(lambda p, send: torch.stack([torch.stack(mine) for mine in ring(p, send)]))
    assert capsys.readouterr().out.count("✓") == 3
    refuses(E.check_ring_all_reduce, lambda p, send: ring(p, send, turns=0), "does not hold the sum")
    refuses(E.check_ring_all_reduce, lambda p, send: ring(p, send, second=0), "does not hold the sum")
    refuses(E.check_ring_all_reduce, lambda p, send: ring(p, send, turns=2), "calls of pass_on")
    refuses(E.check_ring_all_reduce, lambda p, send: ring(p, send, copy=False), "were changed")
    def peeking(p, send):
        for _ in range(2*len(p) - 2): send([mine[0] for mine in p])
        return [[sum(mine[i] for mine in p) for i in range(len(p))] for _ in p]
    refuses(E.check_ring_all_reduce, peeking, "does not arrive")
    refuses(E.check_ring_all_reduce, lambda p, send: send([mine[0][:1] for mine in p]), "one chunk")
    refuses(E.check_ring_all_reduce, lambda p, send: 7, "list of chunks")


def dealt(n, bs, world, training, skip=True, pad=False):
    batches = [[*range(i, min(i + bs, n))] for i in range(0, n, bs)]
    if training and skip: batches = batches[:len(batches)//world*world]
    if pad: batches += [batches[0]]*(-len(batches) % world)
    return [batches[r::world] for r in range(world)]


def test_shares_judge_behaviour(capsys):
    E.check_shares(dealt)
    E.check_shares(lambda *args: [[torch.tensor(b) for b in mine] for mine in dealt(*args)][::-1])      # another rank first
    assert capsys.readouterr().out.count("✓") == 2
    refuses(E.check_shares, lambda *args: dealt(*args, skip=False), "wait for ever")
    refuses(E.check_shares, lambda n, bs, w, t: dealt(n, bs, w, t, pad=not t), "comes twice")
    refuses(E.check_shares, lambda n, bs, w, t: dealt(n, bs, w, True), "never judged")
    def blocks(n, bs, w, t):
        flat = [b for k in range(-(-n//bs)) for mine in dealt(n, bs, w, t) for b in mine[k:k + 1]]
        each = len(flat)//w
        return [flat[r*each:(r + 1)*each] for r in range(w)] if t else dealt(n, bs, w, t)
    refuses(E.check_shares, blocks, "one process would take")
    refuses(E.check_shares, lambda n, bs, w, t: dealt(n, bs, w, t)[:1], "processes came back|wait|comes")
    refuses(E.check_shares, lambda n, bs, w, t: 3, "list of batches")


def test_moments_judge_behaviour(capsys):
    def right(n, m, v): w = (n/n.sum())[:, None]; mean = (w*m).sum(0); return mean, (w*(v + (m - mean)**2)).sum(0)
    def wide(n, m, v): n, m, v = n.double()[:, None], m.double(), v.double(); mean = (n*m).sum(0)/n.sum(); return [mean, (n*(v + m*m)).sum(0)/n.sum() - mean**2]
    for answer in (right, wide): E.check_merge_moments(answer)
    assert capsys.readouterr().out.count("✓") == 2
    refuses(E.check_merge_moments, lambda n, m, v: (m.mean(0), v.mean(0)), "weigh by the counts|the variance")
    refuses(E.check_merge_moments, lambda n, m, v: (right(n, m, v)[0], (n[:, None]*v).sum(0)/n.sum()), "within the shares")
    def naive(n, m, v): w = (n/n.sum())[:, None]; mean = (w*m).sum(0); return mean, (w*(v + m*m)).sum(0) - mean**2
    refuses(E.check_merge_moments, naive, "loses all digits")
    refuses(E.check_merge_moments, lambda n, m, v: m, "two tensors")


def test_predictions_and_rounds(capsys):
    right = dict(messages=14, sent=1.5, dropped=40, twice=23, gradient=2)
    E.check_predictions(right)
    for key, value, word in (("messages", 7, "seven to tell"), ("sent", 2, "w-th"), ("dropped", 8, "31 whole"), ("twice", 63, "16 each"), ("gradient", 3, "sums")):
        refuses(E.check_predictions, right | {key: value}, word)
    def one(x, gradients, lr, k):
        ends = []
        for f in gradients:
            y = x.clone()
            for _ in range(k): y -= lr*f(y)
            ends.append(y)
        return torch.stack(ends).mean(0)
    E.check_local_round(one)
    assert capsys.readouterr().out.count("✓") == 2
    def averaged(x, gradients, lr, k):
        for _ in range(k): x = x - lr*sum(f(x) for f in gradients)/len(gradients)
        return x
    refuses(E.check_local_round, averaged, "its own gradient")
    refuses(E.check_local_round, lambda x, g, lr, k: one(x, g, lr, 1), "takes k steps")
    def in_place(x, gradients, lr, k): x -= lr*gradients[0](x); return x
    refuses(E.check_local_round, in_place, "was changed")
    refuses(E.check_local_round, lambda x, g, lr, k: x.sum(), "return weights")

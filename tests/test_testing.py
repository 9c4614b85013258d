"exp.testing: the judge convicts and acquits, the clock checks before it times, the logbook keeps whole records."
import gc
import itertools
import json
import math
import os
import re
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from exp import testing
from exp.setup import device_name
from exp.testing import best_rate, race, record, result_text, results_table, table, test_like

# --- test_like -----------------------------------------------------------------------------------------------------------


def alike(*args, **kwargs) -> bool:
    try: test_like(*args, **kwargs)
    except AssertionError: return False
    return True


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TYPES = (*FLOATS, torch.int64, torch.uint8, torch.bool, torch.complex64)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def test_is_not_collected_by_pytest():
    assert test_like.__test__ is False       # else pytest would ask for fixtures named `actual` and `expected`


@given(one=SHAPES, two=SHAPES, i=st.integers(0, 7), j=st.integers(0, 7))
def test_shape_and_dtype_must_agree(one, two, i, j):
    a, b = torch.ones(one, dtype=TYPES[i]), torch.ones(two, dtype=TYPES[j])
    assert alike(a, b) == (one == two and i == j)


@given(shape=SHAPES, dtype=st.sampled_from(FLOATS), seed=st.integers(0, 999))
def test_agrees_with_assert_close(shape, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    a = (100*torch.randn(shape, generator=g)).to(dtype)
    b = (a.double()*(1 + 10.**-torch.randint(1, 9, shape, generator=g))).to(dtype)
    try: torch.testing.assert_close(a, b, equal_nan=True); want = True
    except AssertionError: want = False
    assert alike(a, b) == want and alike(a, a)


@pytest.mark.parametrize("a, b, same", [
    (torch.ones(4, 3), torch.ones(1), False), (torch.ones(3), torch.ones(3, 1), False), (torch.tensor(1.), torch.ones(1), False),
    (torch.ones(0), torch.ones(0), True), (torch.ones(0, 2), torch.ones(2, 0), False),
    (torch.tensor([1., torch.nan]), torch.tensor([1., torch.nan]), True), (torch.tensor([1., torch.nan]), torch.tensor([torch.nan, 1.]), False),
    (torch.tensor([torch.nan]), torch.tensor([0.]), False), (torch.tensor([0.]), torch.tensor([torch.nan]), False),
    (torch.tensor([torch.inf]), torch.tensor([torch.inf]), True), (torch.tensor([torch.inf]), torch.tensor([-torch.inf]), False),
    (torch.tensor([1e38]), torch.tensor([torch.inf]), False), (torch.tensor([100.]), torch.tensor([-100.]), False),
    (torch.tensor([2**60 + 1]), torch.tensor([2**60]), False), (torch.tensor([True]), torch.tensor([False]), False),
    (torch.ones(2, requires_grad=True), torch.ones(2), True), (torch.nn.Parameter(torch.ones(2)), torch.ones(2), True),
    (torch.ones(4, 3).T, torch.ones(3, 4), True), (torch.ones(1).expand(5), torch.ones(5), True),
    # arrays
    (np.ones(3), torch.ones(3, dtype=torch.float64), True), (np.ones(3), torch.ones(3), False), (torch.ones(3), np.ones(3, dtype="f4"), True),
    (np.float32(2), torch.tensor(2.), True), (np.arange(4)[::-1], torch.tensor([3, 2, 1, 0]), True), (np.array(3), torch.tensor(3), True),
    # numbers have no dtype
    (torch.tensor(2.5), 2.5, True), (torch.tensor(2.5), 2.6, False), (torch.tensor(2), 2, True), (torch.tensor(2.), 2, True), (torch.tensor(2), 2., False),
    (torch.tensor(2), 2.5, False), (torch.tensor(True), True, True), (torch.tensor(True), 1, False), (torch.tensor(1), True, False), (1, True, False),
    (3, 3, True), (3, 4, False), (3, 3., True), (3., 3, True), (3., 3.1, False), (.1 + .2, .3, True), (1j, 1j, True), (torch.tensor(1j), 1j, True),
    (torch.tensor(1.), 1j, False), (torch.tensor(44, dtype=torch.uint8), 300, False), (torch.tensor([1]), 1, False), (2**40 + 1, 2**40, False),
    (torch.ones(2).half(), [1, 1], True), (torch.tensor([[1., 2.], [3., 4.]]), [[1, 2], [3, 4]], True), ([1, 2], torch.tensor([1, 2]), True),
    (torch.ones(2), [1, 1, 1], False), (torch.ones(2, 1), [1, 1], False), (torch.ones(0), [], True), (torch.ones(0, dtype=torch.int64), [], True),
    # structures
    ([1, 2, 3], [1, 2, 3], True), ([1, 2, 3], [1, 2], False), ((1, 2), [1, 2], True), ([], [], True), (torch.ones(3, 4).shape, (3, 4), True),
    ([torch.ones(2), 3.], [torch.ones(2), 3.], True), ([torch.ones(2), 3.], [torch.ones(2), 4.], False),
    (dict(a=torch.ones(2)), dict(a=torch.ones(2)), True), (dict(a=1), dict(b=1), False), (dict(a=1), dict(a=1, b=2), False),
    (dict(a=[1, dict(b=2)]), dict(a=[1, dict(b=3)]), False), (torch.nn.Linear(2, 1).state_dict(), {}, False),
    # not numbers at all
    (None, 1., False), ("1", 1., False), (object(), torch.ones(1), False), ([None], [1.], False), (torch.ones(2), [[1], [1, 1]], False),
    (torch.ones(1), None, False), (torch.ones(1), "text", False), (torch.ones(1), {1: 2}, False), (torch.ones(1), np.array(["a"]), False), (None, None, False),
])
def test_cases(a, b, same): assert alike(a, b) == same


def test_tolerances():
    one, near = torch.tensor([1., 1000.]), torch.tensor([1.001, 1000.])
    assert not alike(near, one) and alike(near, one, atol=2e-3) and alike(near, one, rtol=2e-3) and not alike(near, one, atol=5e-4)
    assert not alike(torch.tensor([1e-9]), torch.tensor([0.]), rtol=1e-3), "with rtol alone, atol is 0"
    assert alike(torch.tensor([1e-9]), torch.tensor([0.])) and not alike(torch.tensor([1.]), torch.tensor([1 + 1e-6]), atol=0., rtol=0.)
    assert not alike(torch.tensor([1000.]), torch.tensor([1000.01]), atol=1e-3), "with atol alone, rtol is 0"
    assert alike(torch.tensor([5]), torch.tensor([6]), atol=1)


@pytest.mark.parametrize("a, b, words", [
    (torch.ones(4, 3), torch.ones(1), ["'shape'", r"\[4, 3\]", r"\[1\]"]),
    (torch.ones(2).half(), torch.ones(2), ["'dtype'", "float16", "float32"]),
    (torch.ones(2, device="meta"), torch.ones(2), ["'device'", "meta", "cpu"]),
    (torch.tensor([[1., 2.], [3., 9.]]), torch.tensor([[1., 2.], [3., 4.]]), [r"\(1, 1\)", "difference: 5.0", "1 / 4"]),
    (torch.tensor([0., torch.nan]), torch.zeros(2), ["difference: nan", r"\(1,\)"]),
    ([1., [2., 3.]], [1., [2., 4.]], [r"^\[1\] \[1\] "]),
    (dict(w=torch.ones(2)), dict(w=torch.zeros(2)), [r"\['w'\]"]),
    ([1], [1, 2], [r"keys differ: \[0\], expected \[0, 1\]"]),
    (dict(a=1), dict(b=1), ["keys differ", "'a'", "'b'"]),
    (None, torch.ones(1), ["None is no tensor", "returned"]), (dict(a=[1., None]), dict(a=[1., 2.]), [r"^\['a'\] \[1\] None is no tensor"]),
    (dict(a=[1., 2.]), dict(a=[1., "two"]), [r"^\['a'\] \[1\] 'two' is no tensor"]),
])
def test_the_message_says_what_and_where(a, b, words):
    with pytest.raises(AssertionError) as caught: test_like(a, b)
    for word in words: assert re.search(word, str(caught.value)), (word, str(caught.value))


# --- race ----------------------------------------------------------------------------------------------------------------


def slow(x): time.sleep(.004); return x + 1
def quick(x): return x + 1


def test_race_orders_checks_and_shows():
    x = torch.ones(5)
    run = race({"slow": slow, "quick": quick}, x, repeats=5, title="a race")
    assert [row["version"] for row in run.rows] == ["slow", "quick"]
    assert set(run.rows[0]) == {"version", "seconds", "speedup", "max_error", "times", "steady"}
    assert run.seconds["slow"] >= .004 > run.seconds["quick"] and run.rows[0]["speedup"] == 1 and run.rows[1]["speedup"] > 2
    assert run.errors == {"slow": 0., "quick": 0.} and all(len(row["times"]) == 5 for row in run.rows)
    text = repr(run)
    assert text.startswith("**a race**\n\n| version") and "slow" in text and "ms" in text and "max error" in text
    assert run._repr_markdown_() == text == run
    assert race({"slow": slow, "quick": quick}, x, repeats=1, baseline="quick").rows[0]["speedup"] < 1


def test_race_names_the_version_that_is_wrong():
    with pytest.raises(AssertionError, match="'off'"): race({"good": quick, "off": lambda x: x + 2}, torch.ones(2))
    with pytest.raises(AssertionError, match="'good'"): race({"good": quick}, torch.ones(2), check=torch.zeros(2))
    with pytest.raises(AssertionError, match="'wide'.*'shape'"): race({"wide": lambda x: x[None]}, torch.ones(2), check=torch.ones(2))
    with pytest.raises(AssertionError, match="'half'.*'dtype'"): race({"good": quick, "half": lambda x: (x + 1).half()}, torch.ones(2))
    with pytest.raises(AssertionError, match="return"): race({"forgets": lambda x: None}, torch.ones(2), check=torch.ones(2))


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [t], lambda t: {"a": (t, 1.)}, lambda t: t.numpy()])
def test_a_shared_buffer_hides_no_wrong_version(wrap):
    "Each version is judged before the next one can write into what it returned."
    buffer = torch.zeros(2)
    def fill(value): return lambda: wrap(buffer.fill_(value))
    with pytest.raises(AssertionError, match="'bad'"): race({"good": fill(1.), "bad": fill(2.)}, repeats=1)
    assert race({"good": fill(1.), "too": fill(1.)}, repeats=1).errors == {"good": 0., "too": 0.}


@pytest.mark.parametrize("args", [(torch.ones(2),), ([torch.ones(2)],), ({"a": (torch.ones(2),)},), (np.ones(2),)])
def test_a_version_that_changes_its_arguments_is_named_and_no_other(args):
    def first(x):
        while isinstance(x, (list, dict)): x = x[0] if isinstance(x, list) else x["a"][0]
        return x
    def spoils(x): first(x)[:] += 1; return float(first(x).sum())
    for check in (None, False):
        with pytest.raises(ValueError, match="'guilty' changed its arguments"):
            race({"fair": lambda x: float(first(x).sum()), "guilty": spoils, "innocent": lambda x: float(first(x).sum())}, *args, repeats=1, check=check)


def test_arguments_of_any_kind_stay_themselves():
    x = torch.tensor([1., torch.nan], requires_grad=True)
    race({"a": lambda *args: 1, "b": lambda *args: 1}, x, [None, "word", np.array(["a"])], {"n": object()}, Path("a"), np.array([True, False]), repeats=1)


def test_a_result_that_wants_gradients_may_race():
    x = torch.ones(2, requires_grad=True)
    assert race({"a": lambda x: x*2, "b": lambda x: x + x}, x, repeats=1).errors == {"a": 0., "b": 0.}


def test_race_measures_errors_against_the_judge():
    x = torch.rand(100, generator=torch.Generator().manual_seed(0))
    total = lambda dtype: lambda x: x.to(dtype).sum()
    run = race({"half": total(torch.float16), "single": total(torch.float32)}, x, check=x.double().sum(), rtol=1e-2, repeats=1)
    assert run.errors["half"] > run.errors["single"] >= 0 and run.errors["half"] == abs(x.half().sum().double() - x.double().sum()).item()
    assert race({"good": quick}, x, check=lambda x: x + 1, repeats=1).errors == {"good": 0.}
    assert race({"off": lambda x: x + 1.5}, x, check=lambda x: x + 1, atol=1., repeats=1).errors["off"] == pytest.approx(.5, rel=1e-5)
    pair = race({"pair": lambda: [torch.ones(2), 3.]}, check=[torch.ones(2), 3.], repeats=1)
    assert pair.errors == {"pair": 0.}


def test_race_without_check():
    run = race({"nothing": lambda: None}, check=False, repeats=2)
    assert run.errors == {"nothing": None} and "error" not in repr(run)


def test_race_interleaves_and_keeps_to_its_budget():
    calls = []
    race({"a": lambda: (calls.append("a"), time.sleep(.001)), "b": lambda: (calls.append("b"), time.sleep(.001))}, check=False, repeats=3)
    assert "".join(calls) == "ababbaab"
    start = time.perf_counter(); run = race({"slow": slow}, torch.ones(1), budget=.05)
    assert 1 <= len(run.rows[0]["times"]) <= 13 and time.perf_counter() - start < 2


def test_what_takes_nanoseconds_is_called_often(monkeypatch):
    many, clock = [], itertools.count()                  # a clock that ticks 1 µs when it is read: a busy machine cannot disturb it
    monkeypatch.setattr(testing.time, "perf_counter", lambda: next(clock)*1e-6)
    run = race({"tiny": lambda: many.append(1)}, check=False, repeats=1)
    assert len(many) > 20 and len(run.rows[0]["times"]) == 1


def test_race_leaves_the_garbage_collector_as_it_was():
    assert gc.isenabled()
    def boom():
        state.append(1)
        if len(state) > 1: raise KeyError("boom")
    state = []
    with pytest.raises(KeyError): race({"boom": boom}, check=False, repeats=1)
    assert gc.isenabled()
    gc.disable()
    try: race({"a": lambda: 1}, repeats=1); assert not gc.isenabled()
    finally: gc.enable()


@pytest.mark.parametrize("funcs, kwargs, error", [({"a": 3}, {}, TypeError), ({"a": quick}, dict(baseline="b"), KeyError)])
def test_race_refuses(funcs, kwargs, error):
    with pytest.raises(error): race(funcs, torch.ones(1), **{"repeats": 1, **kwargs})


class Clock:
    "Time that passes only while `work` is done."
    def __init__(self, monkeypatch): self.now = 0.; monkeypatch.setattr(testing.time, "perf_counter", lambda: self.now)
    def work(self, seconds): self.now += seconds


def test_a_median_that_contradicts_the_first_call_is_marked(monkeypatch):
    clock, calls = Clock(monkeypatch), itertools.count()
    run = race({"slows down": lambda: clock.work(.01 if next(calls) else .001)}, check=False, repeats=3)
    assert not run.rows[0]["steady"] and "~10.00 ms" in run and next(calls) == 1 + 3


@given(st.floats(1e-6, 1e-2), st.floats(.1, 2.9))
def test_steady_times_are_not_marked(first, factor):
    with pytest.MonkeyPatch.context() as patch:
        clock, calls = Clock(patch), itertools.count()
        run = race({"a": lambda: clock.work(first*(factor if next(calls) else 1))}, check=False, repeats=2)
    assert run.rows[0]["steady"] and run.seconds["a"] == pytest.approx(first*factor) and "~" not in run


def test_who_prepares_something_at_the_first_call_races_fairly(monkeypatch):
    "What a measurement costs beside its calls weighs the same in both versions: in all rounds but the first, they are called equally often."
    clock, calls = Clock(monkeypatch), {"prepares": 0, "ready": 0}
    def version(name, first):
        def run(): calls[name] += 1; clock.work(first if calls[name] == 1 else 1e-6)
        return run
    race({"prepares": version("prepares", .5), "ready": version("ready", 1e-6)}, check=False, repeats=5)
    assert 4*200 <= calls["prepares"] <= calls["ready"]


@pytest.mark.parametrize("seconds, text", [(7.891, "7.89 s"), (123.4, "123 s"), (.0123, "12.3 ms"), (.001, "1.00 ms"), (4.56e-6, "4.56 µs"), (2e-9, "0.00 µs"), (4321., "4,321 s")])
def test_times_read_well(monkeypatch, seconds, text):
    clock = Clock(monkeypatch)
    assert re.search(rf"\| +{text} \|", race({"a": lambda: clock.work(seconds)}, check=False, repeats=1))


# --- best_rate -------------------------------------------------------------------------------------------------------------


def means(found): return [sum(row["scores"])/len(row["scores"]) for row in found.rows]


@given(optimum=st.floats(-7, 7), low=st.floats(-3, 3), step=st.floats(.3, 2), n=st.integers(2, 4), sharp=st.floats(.5, 3), sign=st.sampled_from([1, -1]))
def test_the_best_of_one_valley_is_never_an_edge(optimum, low, step, n, sharp, sign):
    grid = [math.exp(low + i*step) for i in range(n)]
    need = max((low - optimum)/step, (optimum - low - (n - 1)*step)/step, 0) + 3             # steps to reach it, and one beyond
    found = best_rate(lambda rate, seed: sign*abs(math.log(rate) - optimum)**sharp, grid, lower_is_better=sign == 1, limit=math.ceil(need))
    rates = [row["rate"] for row in found.rows]
    assert not found.at_edge and rates == sorted(rates) and rates[0] < found.best < rates[-1]
    assert abs(math.log(found.best) - optimum) <= step/2 + 1e-6, "the best of the whole grid, were it endless"
    assert {math.exp(low + i*step) for i in range(n)} <= set(rates) and len(rates) <= n + need + 1
    steps = [math.log(b/a) for a, b in zip(rates, rates[1:])]
    assert max(abs(s - step) for s in steps) < 1e-6, "widened in the steps of the grid"


@given(scores=st.lists(st.one_of(st.integers(-3, 3).map(float), st.just(math.nan), st.just(math.inf)), min_size=30, max_size=30), start=st.integers(8, 18), n=st.integers(2, 4),
       limit=st.integers(0, 8), lower=st.booleans())
def test_whatever_the_scores_an_edge_is_said_loudly(scores, start, n, limit, lower):
    runs = []
    def run(rate, seed): runs.append(round(math.log2(rate))); return scores[runs[-1]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = best_rate(run, [2.**(start + i) for i in range(n)], lower_is_better=lower, limit=limit)
    rates = [row["rate"] for row in found.rows]
    assert found.at_edge == (found.best in (rates[0], rates[-1])) == bool(caught)
    assert len(runs) == len(set(runs)) == len(rates) <= n + limit, "each rate is tried once"
    finite = [m if lower else -m for m in means(found) if math.isfinite(m)]
    if found.at_edge: assert len(rates) == n + limit and f"{found.best:g}" in str(caught[0].message)
    if found.at_edge: assert ("an edge, not yet the best" in found) == bool(finite) == ("diverged" not in str(caught[0].message))
    if finite: assert (1 if lower else -1)*found.scores[0] == min(finite), "nothing tried is better"


def test_what_diverges_is_worst_and_all_seeds_count():
    def run(rate, seed):
        if rate > 5: raise FloatingPointError("NaN")
        if rate > 2: return math.inf if seed else 0.
        return (rate - 1)**2 + seed
    found = best_rate(run, [.25, .5], seeds=(0, 1, 2), title="three seeds")
    assert found.best == 1 and found.scores == [0, 1, 2] and found.startswith("**three seeds**")
    assert [row["rate"] for row in found.rows] == [.25, .5, 1, 2] and found.rows[2]["sd"] == 1
    assert best_rate(run, [4, 8, 16], seeds=(0, 1)).best == 1, "where all diverge it goes down"
    assert "diverged" in best_rate(run, [1, 3, 9], seeds=(0, 1))
    assert [row["scores"] for row in best_rate(lambda rate, seed: torch.tensor((rate - 1)**2 + seed), [.5, 1, 2], seeds=[3]).rows] == [[3.25], [3], [4]]


def test_where_every_run_diverges_none_is_called_the_best():
    with pytest.warns(RuntimeWarning, match="every run of 0.001 … 2 diverged"): found = best_rate(lambda rate, seed: math.nan, [.1, 1, 2], limit=2)
    assert "best" not in found and found.count("diverged") == 5


def test_equals_do_not_send_the_search_away():
    assert best_rate(lambda rate, seed: min(rate, 4), [1, 2, 4, 8, 16], lower_is_better=False).best == 4
    calls = []
    assert best_rate(lambda rate, seed: calls.append(rate) or 1., [1, 2, 4]).best == 2 and len(calls) == 3


@given(st.integers(0, 10**6), st.booleans())
def test_noise_is_averaged_over_seeds(seed, lower):
    "One seed alone would choose wrongly: the noise of a seed is larger than the valley is deep, but nearly cancels in the mean."
    noise = torch.randn(8, generator=torch.Generator().manual_seed(seed)).tolist()
    noise = [*noise, *(-x for x in noise)]
    def run(rate, s): return (1 if lower else -1)*abs(math.log2(rate)) + (noise[s] if rate > 1 else -noise[s])*3
    found = best_rate(run, [.25, .5], seeds=range(16), lower_is_better=lower)
    assert found.best == 1 and not found.at_edge and len(found.scores) == 16


def test_a_plateau_that_begins_at_the_edge_needs_one_step_more():
    found = best_rate(lambda rate, seed: min(rate, 4), [1, 2, 4], lower_is_better=False)
    assert found.best == 4 and [row["rate"] for row in found.rows] == [1, 2, 4, 8] and not found.at_edge


def test_seeds_may_be_a_generator_but_not_none_at_all():
    found = best_rate(lambda rate, seed: (rate - 1)**2 + seed, (2.**i for i in (-1, 0, 1)), seeds=(s for s in (0, 1)))
    assert found.best == 1 and all(len(row["scores"]) == 2 for row in found.rows)
    with pytest.raises(ValueError, match="a seed"): best_rate(lambda rate, seed: rate, [1, 2], seeds=())


def test_errors_of_the_run_come_through_and_rates_stay_numbers():
    with pytest.raises(KeyError): best_rate(lambda rate, seed: {}["loss"], [1, 2])
    with pytest.warns(RuntimeWarning, match="edge") as caught: best_rate(lambda rate, seed: rate, [1e-200, 1e-100])
    assert caught[0].filename == __file__, "the warning points at the caller"


@pytest.mark.parametrize("grid", [[], [1.], [1., 1.], [0., 1.], [-1., 1.], [1., math.inf], [math.nan, 1.]])
def test_a_grid_has_two_positive_numbers(grid):
    with pytest.raises(ValueError, match="two or more"): best_rate(lambda rate, seed: pytest.fail("nothing is run"), grid)


# --- table -----------------------------------------------------------------------------------------------------------------


def test_table_is_markdown_and_text():
    got = table([{"name": "a|b", "n": 1, "x": "–"}, {"name": "long name", "n": 22, "x": "1.5 ms"}])
    assert str(got).splitlines() == ["| name      |   n |      x |", "|-----------|----:|-------:|",
                                     "| a\\|b      |   1 |      – |", "| long name |  22 | 1.5 ms |"]
    assert got._repr_markdown_() == str(got) == repr(got)
    assert table([{"a": 1, "b": 2}, {"a": 3}]).count("\n") == 3
    assert table([{"a": 1}], title="one", rows=[7]).startswith("**one**\n\n| ") and table([{"a": 1}], rows=[7]).rows == [7]


# --- record ------------------------------------------------------------------------------------------------------------------


def kept(folder) -> list[Path]: return sorted(folder.glob("*"))


def test_record_writes_all_it_knows(tmp_path):
    got = record("04_training_loop", "Accuracy, after 5 epochs!", [87., 88., 89.], unit="%", seeds=[1, 2, 3], seconds=[10, 11, 12.5],
                 data="toy", folder=tmp_path, epochs=5, lrs=torch.tensor([1., 2.]), best=np.float64(3))
    file, = kept(tmp_path)
    assert file.name == "04_training_loop-accuracy-after-5-epochs-tiny.json"
    assert json.loads(file.read_text(encoding="utf-8")) == got
    assert {k: got[k] for k in ("lesson", "what", "unit", "values", "mean", "sd", "seeds", "seconds", "scale")} == dict(
        lesson="04_training_loop", what="Accuracy, after 5 epochs!", unit="%", values=[87, 88, 89], mean=88, sd=1, seeds=[1, 2, 3],
        seconds=[10, 11, 12.5], scale="tiny")
    assert got["data"] == dict(name="toy", source=None) and (got["epochs"], got["lrs"], got["best"]) == (5, [1, 2], 3)
    assert got["device"] == device_name("cpu") and set(got["versions"]) == {"python", "torch", "numpy"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", got["date"]) and {"commit", "dirty"} <= set(got)
    mask = os.umask(0); os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_record_takes_numbers_and_tensors(tmp_path):
    one = record("01", "x", .5, folder=tmp_path)
    assert one["values"] == [.5] and one["sd"] is None and one["seconds"] == []
    assert record("01", "x", torch.tensor([1, 2]))["mean"] == 1.5 and record("01", "x", np.float32(.5))["values"] == [.5]
    assert record("01", "x", [torch.tensor(1.), np.int64(3)])["mean"] == 2 and record("01", "x", 1, seconds=3.5)["seconds"] == [3.5]
    assert record("01", "x", range(3), seeds=range(3))["seeds"] == [0, 1, 2]
    assert len(kept(tmp_path)) == 1


def test_record_names_data_and_its_source(tmp_path):
    from exp.datasets import fetch, source_of
    path = fetch("fashion-mnist")
    got = record("01", "x", 1., data=path)
    assert got["data"] == dict(name=path.name, source=str(source_of(path))) and got["data"] == record("01", "x", 1., data=str(path))["data"]
    with pytest.raises(ValueError): record("01", "x", 1., data=tmp_path)


@pytest.mark.parametrize("args, kwargs, error, word", [
    (("01", "x", []), {}, ValueError, "finite number per run"), (("01", "x", torch.ones(0)), {}, ValueError, "finite"),
    (("01", "x", [1., float("nan")]), {}, ValueError, "nan"), (("01", "x", float("inf")), {}, ValueError, "inf"),
    (("01", "x", "good"), {}, ValueError, "good"), (("01", "x", None), {}, ValueError, "nan"),
    (("01", "x", [[1.], [2.]]), {}, ValueError, "per run"), (("01", "x", torch.ones(2, 2)), {}, ValueError, "per run"),
    (("01", "x", [1., 2.]), dict(seeds=[1]), ValueError, "a seed for each"), (("01", "x", 1.), dict(seconds=["fast"]), ValueError, "fast"),
    (("01", "x", 1.), dict(seconds=float("nan")), ValueError, "finite"), (("01", "x", [1., 2.]), dict(seconds=[1, 2, 3]), ValueError, "per run"),
    (("01", "x", 1.), dict(curve=[1., float("nan")]), ValueError, "JSON"),
    (("01", "x", [1., 2.]), dict(seeds=[.5, .7]), TypeError, "integer"), (("01", "x", 1.), dict(mean=3., sd=0.), TypeError, "mean"),
])
def test_record_refuses_and_writes_nothing(tmp_path, args, kwargs, error, word):
    with pytest.raises(error, match=word): record(*args, folder=tmp_path, **kwargs)
    assert not kept(tmp_path)


@given(st.lists(st.text(st.characters(categories=["L", "Nd"]), min_size=1, max_size=20), min_size=1, max_size=2, unique_by=str.lower))
def test_different_words_are_different_files(words):
    "Greek letters, too: a record never takes another's place because its name is not English."
    with tempfile.TemporaryDirectory() as folder:
        for word in words: record("01", f"x {word}", 1., folder=folder)
        assert len(kept(Path(folder))) == len({word.lower() for word in words})


@pytest.mark.parametrize("one, two", [("α = 1", "β = 1"), ("y"*81 + "a", "y"*81 + "b"), ("精度", "正確さ"), ("β₁ = .9", "β₂ = .9")])
def test_no_record_takes_the_place_of_another(tmp_path, one, two):
    for what in (one, two): record("01", what, 1., folder=tmp_path)
    assert len(kept(tmp_path)) == 2


SAME = [("net + BN", "net - BN"), ("rate 10^-3", "rate 10^3"), ("C", "C++"), ("a b", "a, b")]


@pytest.mark.parametrize("one, two", [*SAME, ("y"*300 + "a", "y"*300 + "b"), ("度"*100 + "a", "度"*100 + "b")])
def test_signs_and_lengths_keep_records_apart(tmp_path, one, two):
    for value in (1., 2.):
        for what in (one, two): record("01", what, value, folder=tmp_path)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in kept(tmp_path)]
    assert sorted(r["what"] for r in found) == sorted([one, two]) and all(r["mean"] == 2 for r in found), "each its own, and the newest"
    assert all(len(os.fsencode(file.name)) < 150 for file in kept(tmp_path))


def test_another_lessons_record_and_a_damaged_one_are_left(tmp_path):
    (tmp_path/"01-x-tiny.json").write_bytes(b"\xff no record")
    record("01", "x", 1., folder=tmp_path); record("01", "x", 2., folder=tmp_path)
    assert len(kept(tmp_path)) == 2 and (tmp_path/"01-x-tiny.json").read_bytes() == b"\xff no record"
    record("01 a", "b", 1., folder=tmp_path); record("01", "a b", 1., folder=tmp_path)
    assert len(kept(tmp_path)) == 4


def test_what_json_cannot_hold_is_kept_as_words(tmp_path):
    got = record("01", "x", 1., folder=tmp_path, opt=torch.optim.SGD, where=Path("a"), kinds={torch.float32}, array=np.ndarray, lrs=np.arange(2), one=torch.tensor(3))
    assert "SGD" in got["opt"] and got["where"] == "a" and "float32" in got["kinds"] and "ndarray" in got["array"] and (got["lrs"], got["one"]) == ([0, 1], 3)
    assert json.loads(kept(tmp_path)[0].read_text(encoding="utf-8")) == got


def test_record_is_atomic(tmp_path):
    record("01", "x", 1., folder=tmp_path)
    before = kept(tmp_path)[0].read_text()
    with patch.object(os, "replace", side_effect=OSError("disk full")), pytest.raises(OSError): record("01", "x", 2., folder=tmp_path)
    assert len(kept(tmp_path)) == 1 and kept(tmp_path)[0].read_text() == before
    record("01", "x", 3., folder=tmp_path)
    assert json.loads(kept(tmp_path)[0].read_text())["mean"] == 3


def checkout(tmp_path) -> Path:
    (tmp_path/"exp").mkdir(); (tmp_path/"exp/code.py").write_text("x = 1\n"); (tmp_path/"settings.ini").touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]): subprocess.run(git + command, cwd=tmp_path, check=True)
    return tmp_path


def installed_at(root): return patch.object(testing, "find_spec", return_value=SimpleNamespace(origin=str(root/"exp/__init__.py")))


def test_results_are_the_maintainers_and_my_results_the_readers(tmp_path, capsys):
    (tmp_path/"settings.ini").touch()
    with installed_at(tmp_path):
        record("01", "x", 1.)
        assert len(kept(tmp_path)) == 1, "nothing at tiny scale"
        with patch.dict(os.environ, EXP_SCALE="cpu"): record("01", "x", 1.)
        assert [f.name for f in kept(tmp_path/"my/results")] == ["01-x-cpu.json"] and not (tmp_path/"results").exists()
        assert capsys.readouterr().out == "kept in my/results/01-x-cpu.json\n"
        with patch.dict(os.environ, EXP_SCALE="cpu", EXP_RECORD="1"): record("01", "y", 1.)
        assert [f.name for f in kept(tmp_path/"results")] == ["01-y-cpu.json"] and not capsys.readouterr().out
    (tmp_path/"settings.ini").unlink()
    with installed_at(tmp_path), patch.dict(os.environ, EXP_SCALE="cpu", EXP_RECORD="1"): assert record("01", "z", 2.)["commit"] is None
    assert len(kept(tmp_path/"results")) == 1, "nothing outside a checkout"


def test_record_knows_the_commit_and_whether_the_code_changed(tmp_path):
    root = checkout(tmp_path)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    def version(): r = record("01", "x", 1.); return dict(commit=r["commit"], dirty=r["dirty"])
    with installed_at(root):
        assert version() == dict(commit=head, dirty=False)
        (root/"notes.txt").write_text("not code")
        assert version()["dirty"] is False
        (root/"exp/code.py").write_text("x = 2\n")
        assert version() == dict(commit=head, dirty=True)
        with patch.dict(os.environ, PATH=""): assert version() == dict(commit=None, dirty=None)
    with installed_at(root/"exp"): assert version()["commit"] is None


def test_record_names_the_device():
    assert record("01", "x", 1.)["device"] == device_name("cpu") and record("01", "x", 1., device="mps")["device"] == "mps"


# --- how results read --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean, sd, unit, text", [
    (87.912, .2134, "%", "87.91 ± 0.21 %"), (82.03, None, "%", "82.03 %"), (91845.8, 29527.6, "×", "92,000 ± 30,000 ×"), (.00012345, None, "", "0.0001234"),
    (.1, 1.7e-17, "", "0.1000 ± 0.0000"), (87.12, 1.4e-14, "%", "87.12 ± 0.00 %"), (0., 1e-9, "", "0.0000000000 ± 0.0000000010"), (5., 0., "s", "5.000 s"), (0., None, "", "0"), (0., 0., "", "0 ± 0"), (1234567., None, "", "1,235,000"), (-3.14159, .01, "", "-3.142 ± 0.010"),
])
def test_results_read_well(mean, sd, unit, text):
    want = {"5.000 s": "5.000 ± 0.000 s"}.get(text, text)
    assert result_text(dict(mean=mean, sd=sd, unit=unit)) == want


def test_results_table(tmp_path):
    rows = [record("01", "many runs", [1., 2., 3.], unit="%", seconds=[2., 4., 6.], data="toy"), record("01", "one run", 5.)]
    lines = results_table(rows).splitlines()
    assert len(lines) == 4 and all(line.count("|") == lines[0].count("|") for line in lines)
    assert re.search(r"many runs \| +2.0 ± 1.0 % \| +3 \| +4 \| +toy", lines[2].replace("|  ", "| ")) or "2.0 ± 1.0 %" in lines[2] and " toy " in lines[2] and " 4 " in lines[2]
    assert "5.000" in lines[3] and "–" in lines[3]

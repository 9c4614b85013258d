"exp.testing: the judge convicts and acquits, the clock checks before it times, the logbook keeps whole records."
import gc
import itertools
import json
import os
import re
import subprocess
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from exp import testing
from exp.testing import race, record, result_text, results_table, table, test_like

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
    (torch.ones(2), [[1], [1, 1]], None),
    # structures
    ([1, 2, 3], [1, 2, 3], True), ([1, 2, 3], [1, 2], False), ((1, 2), [1, 2], True), ([], [], True), (torch.ones(3, 4).shape, (3, 4), True),
    ([torch.ones(2), 3.], [torch.ones(2), 3.], True), ([torch.ones(2), 3.], [torch.ones(2), 4.], False),
    (dict(a=torch.ones(2)), dict(a=torch.ones(2)), True), (dict(a=1), dict(b=1), False), (dict(a=1), dict(a=1, b=2), False),
    (dict(a=[1, dict(b=2)]), dict(a=[1, dict(b=3)]), False), (torch.nn.Linear(2, 1).state_dict(), {}, False),
    # not numbers at all
    (None, 1., False), ("1", 1., False), (object(), torch.ones(1), False), ([None], [1.], False), ([torch.ones(1)], torch.ones(1, 1), False),
])
def test_cases(a, b, same):
    if same is None:
        with pytest.raises(TypeError, match="expected"): test_like(a, b)
    else: assert alike(a, b) == same


@pytest.mark.parametrize("expected", [None, "text", object(), [[1], [1, 2]], {1: 2}, np.array(["a"])])
def test_a_bad_expectation_is_the_callers_fault(expected):
    with pytest.raises(TypeError, match="expected is"): test_like(torch.ones(1), expected)


def test_tolerances():
    one, near = torch.tensor([1., 1000.]), torch.tensor([1.001, 1000.])
    assert not alike(near, one) and alike(near, one, atol=2e-3) and alike(near, one, rtol=2e-3) and not alike(near, one, atol=5e-4)
    assert not alike(torch.tensor([1e-9]), torch.tensor([0.]), rtol=1e-3), "with rtol alone, atol is 0"
    assert alike(torch.tensor([1e-9]), torch.tensor([0.])) and not alike(torch.tensor([1.]), torch.tensor([1 + 1e-6]), atol=0., rtol=0.)
    assert not alike(torch.tensor([1000.]), torch.tensor([1000.01]), atol=1e-3), "with atol alone, rtol is 0"
    assert alike(torch.tensor([5]), torch.tensor([6]), atol=1)
    for bad in (dict(rtol=-1), dict(atol=-1e-9), dict(atol=float("nan"))):
        with pytest.raises(ValueError, match="≥ 0"): test_like(1., 1., **bad)


@pytest.mark.parametrize("a, b, words", [
    (torch.ones(4, 3), torch.ones(1), ["shapes differ", r"\(4, 3\)", r"\(1,\)"]),
    (torch.ones(2).half(), torch.ones(2), ["dtypes differ", "float16", "float32"]),
    (torch.ones(2, device="meta"), torch.ones(2), ["devices differ", "meta", "cpu"]),
    (torch.tensor([[1., 2.], [3., 9.]]), torch.tensor([[1., 2.], [3., 4.]]), [r"\(1, 1\)", "actual 9.0", "expected 4.0", "1 / 4"]),
    (torch.tensor([0., torch.nan]), torch.zeros(2), ["actual nan", "expected 0.0"]),
    ([1., [2., 3.]], [1., [2., 4.]], [r"\[1\] \[1\]", "expected 4.0"]),
    (dict(w=torch.ones(2)), dict(w=torch.zeros(2)), [r"\['w'\]"]),
    ([1], [1, 2], ["lengths differ: 1, expected 2"]),
    (dict(a=1), dict(b=1), ["keys differ", "'a'", "'b'"]),
    (None, torch.ones(1), ["NoneType", "return"]),
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
    assert set(run.rows[0]) == {"version", "seconds", "speedup", "max_error", "times"}
    assert run.seconds["slow"] >= .004 > run.seconds["quick"] and run.rows[0]["speedup"] == 1 and run.rows[1]["speedup"] > 2
    assert run.errors == {"slow": 0., "quick": 0.} and all(len(row["times"]) == 5 for row in run.rows)
    text = repr(run)
    assert text.startswith("a race\n\n| version") and "slow" in text and "ms" in text and "max error" in text
    assert run._repr_markdown_().startswith("**a race**\n\n|")
    assert race({"slow": slow, "quick": quick}, x, repeats=1, baseline="quick").rows[0]["speedup"] < 1


def test_race_names_the_version_that_is_wrong():
    with pytest.raises(AssertionError, match="'off'"): race({"good": quick, "off": lambda x: x + 2}, torch.ones(2))
    with pytest.raises(AssertionError, match="'good'"): race({"good": quick}, torch.ones(2), check=torch.zeros(2))
    with pytest.raises(AssertionError, match="'wide'.*shapes"): race({"wide": lambda x: x[None]}, torch.ones(2), check=torch.ones(2))
    with pytest.raises(AssertionError, match="'half'.*dtypes"): race({"good": quick, "half": lambda x: (x + 1).half()}, torch.ones(2))
    with pytest.raises(AssertionError, match="return"): race({"forgets": lambda x: None}, torch.ones(2), check=torch.ones(2))


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
    assert calls[:2] == ["a", "b"] and "".join(calls[2:]) == "abbaab"
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


@pytest.mark.parametrize("funcs, kwargs, error, word", [
    ({}, {}, ValueError, "empty"), ({"a": 3}, {}, TypeError, r"funcs\['a'\] is a int"), ({"a": quick}, dict(repeats=0), ValueError, "repeats is 0"),
    ({"a": quick}, dict(baseline="b"), ValueError, r"'b'.*\['a'\]"), ({"a": quick}, dict(rtol=-1.), ValueError, "rtol"),
])
def test_race_refuses(funcs, kwargs, error, word):
    with pytest.raises(error, match=word): race(funcs, torch.ones(1), **kwargs)


@pytest.mark.parametrize("seconds, text", [(7.891, "7.89 s"), (123.4, "123 s"), (.0123, "12.3 ms"), (.001, "1.00 ms"), (4.56e-6, "4.56 µs"), (2e-9, "0.00 µs"), (4321., "4,321 s")])
def test_times_read_well(seconds, text): assert testing._time_text(seconds) == text


# --- table -----------------------------------------------------------------------------------------------------------------


def test_table_is_markdown_and_text():
    got = table([{"name": "a|b", "n": 1, "x": "–"}, {"name": "long name", "n": 22, "x": "1.5 ms"}])
    assert str(got).splitlines() == ["| name      |   n |      x |", "|-----------|----:|-------:|",
                                     "| a\\|b      |   1 |      – |", "| long name |  22 | 1.5 ms |"]
    assert got._repr_markdown_() == str(got) == repr(got)
    assert table([{"a": 1, "b": 2}, {"a": 3}]).count("\n") == 3
    with pytest.raises(ValueError, match="empty"): table([])


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
    assert got["device"] == "cpu (1 thread)" and set(got["versions"]) == {"python", "torch", "numpy"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", got["date"]) and {"commit", "dirty"} <= set(got)
    assert file.stat().st_mode & 0o777 == 0o644


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
    assert got["data"] == dict(name=path.name, source=source_of(path)) and got["data"] == record("01", "x", 1., data=str(path))["data"]
    with pytest.raises(ValueError): record("01", "x", 1., data=tmp_path)


@pytest.mark.parametrize("args, kwargs, error, word", [
    (("01", "x", []), {}, ValueError, "empty"), (("01", "x", torch.ones(0)), {}, ValueError, "empty"),
    (("01", "x", [1., float("nan")]), {}, ValueError, r"values\[1\] is nan"), (("01", "x", float("inf")), {}, ValueError, "inf"),
    (("01", "x", "good"), {}, TypeError, "'good'"), (("01", "x", [True]), {}, TypeError, "True"), (("01", "x", None), {}, TypeError, "None"),
    (("01", "x", [[1.], [2.]]), {}, TypeError, "one number per run"), (("01", "x", torch.ones(2, 2)), {}, TypeError, "one number per run"),
    (("01", "x", [1., 2.]), dict(seeds=[1]), ValueError, "1 seeds for 2 values"), (("01", "x", 1.), dict(seconds=["fast"]), TypeError, "seconds"),
    (("01", "x", 1.), dict(seconds=float("nan")), ValueError, r"seconds\[0\]"), (("01", "!?", 1.), {}, ValueError, "what"), (("", "x", 1.), {}, ValueError, "lesson"),
    (("01", "x", 1.), dict(note="/srv/data/set"), ValueError, "absolute path"), (("01", "x", 1.), dict(note=r"C:\data"), ValueError, "absolute path"),
    (("01", "x", 1.), dict(curve=[1., float("nan")]), ValueError, "JSON"), (("01", "x", 1.), dict(model=object()), TypeError, "cannot record"),
    (("01", "x", 1.), dict(where=Path("a")), TypeError, "cannot record"), (("01", "x", 1.), dict(mean=3., sd=0.), ValueError, "mean, sd"),
])
def test_record_refuses_and_writes_nothing(tmp_path, args, kwargs, error, word):
    with pytest.raises(error, match=word): record(*args, folder=tmp_path, **kwargs)
    assert not kept(tmp_path)


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


def test_record_goes_to_results_of_a_checkout_at_real_scale_only(tmp_path):
    with patch.object(testing, "_project_root", return_value=tmp_path):
        record("01", "x", 1.)
        assert not kept(tmp_path), "nothing at tiny scale"
        with patch.dict(os.environ, EXP_SCALE="cpu"): record("01", "x", 1.)
        assert [f.name for f in kept(tmp_path/"results")] == ["01-x-cpu.json"]
    with patch.object(testing, "_project_root", return_value=None), patch.dict(os.environ, EXP_SCALE="cpu"):
        assert record("01", "x", 2.)["commit"] is None
    assert len(kept(tmp_path/"results")) == 1, "nothing outside a checkout"


def test_record_knows_the_commit_and_whether_the_code_changed(tmp_path):
    root = checkout(tmp_path)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    with patch.object(testing, "_project_root", return_value=root):
        assert testing._code_version() == dict(commit=head, dirty=False)
        (root/"notes.txt").write_text("not code")
        assert testing._code_version()["dirty"] is False
        (root/"exp/code.py").write_text("x = 2\n")
        assert testing._code_version() == dict(commit=head, dirty=True)
        with patch.dict(os.environ, PATH=""): assert testing._code_version() == dict(commit=None, dirty=None)
    with patch.object(testing, "_project_root", return_value=root/"exp"): assert testing._code_version()["commit"] is None


def test_the_project_root_is_where_settings_are():
    root = testing._project_root()
    assert root and (root/"settings.ini").is_file() and (root/"exp").is_dir()
    with patch.object(testing, "find_spec", return_value=None): assert testing._project_root() is None


def test_device_names():
    assert testing._device_name(torch.device("cpu")) == "cpu (1 thread)" and testing._device_name(torch.device("mps")) == "mps"
    with patch.object(torch.cuda, "get_device_name", return_value="Some GPU"): assert testing._device_name(torch.device("cuda")) == "Some GPU"
    assert record("01", "x", 1., device="cpu")["device"].startswith("cpu")


# --- how results read --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean, sd, unit, text", [
    (87.912, .2134, "%", "87.91 ± 0.21 %"), (82.03, None, "%", "82.03 %"), (91845.8, 29527.6, "×", "92,000 ± 30,000 ×"), (.00012345, None, "", "0.0001234"),
    (5., 0., "s", "5.000 s"), (0., None, "", "0"), (0., 0., "", "0 ± 0"), (1234567., None, "", "1,235,000"), (-3.14159, .01, "", "-3.142 ± 0.010"),
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
    with pytest.raises(ValueError): results_table([])

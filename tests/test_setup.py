"exp.setup: chance, devices, scales, and the words that exercises answer with."
import random

import numpy as np
import pytest
import torch
from conftest import THREADS
from exp import setup
from hypothesis import given, strategies as st

THREADS_WORDS = f"cpu ({THREADS} thread{'s'*(THREADS != 1)})"


@given(st.integers(0, 2**32 - 1))
def test_same_seed_same_numbers(seed):
    def draw(): return random.random(), np.random.rand(), torch.rand(1).item()
    setup.set_seed(seed); first = draw()
    setup.set_seed(seed); assert draw() == first


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_bad_seed_is_named(seed):
    state = random.getstate()
    with pytest.raises(ValueError, match="between 0 and 2"): setup.set_seed(seed)
    assert random.getstate() == state, "nothing is seeded by half"


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)])
def test_a_seed_is_any_whole_number(seed):
    setup.set_seed(3); expected = random.random(), np.random.rand(), torch.rand(1).item()
    setup.set_seed(seed); assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


@pytest.mark.parametrize("seed", [1.5, 1., "1", None, torch.tensor(1.), [1, 2]])
def test_what_is_no_whole_number_seeds_nothing(seed):
    before = random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(TypeError): setup.set_seed(seed)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_default_device_order(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert setup.default_device().type == expected
    monkeypatch.delenv("EXP_SCALE")
    assert setup.scale() == ("gpu" if cuda else "cpu")


def test_scale_follows_the_environment(monkeypatch):
    for name in ("tiny", "cpu", "gpu"):
        monkeypatch.setenv("EXP_SCALE", name)
        assert setup.at_scale(tiny="tiny", cpu="cpu", gpu="gpu") == name
    monkeypatch.setenv("EXP_SCALE", "GPU")
    with pytest.raises(ValueError, match="GPU.*tiny, cpu or gpu"): setup.scale()
    with pytest.raises(TypeError): setup.at_scale(tiny=1, cpu=2)


def test_versions_is_one_line_and_names_the_device():
    assert "\n" not in setup.versions() and f"{THREADS_WORDS} ·" in setup.versions() and "scale tiny" in setup.versions()


def test_device_names(monkeypatch):
    assert setup.device_name("cpu") == THREADS_WORDS and setup.device_name(torch.device("mps")) == "mps"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Some GPU, {device}")
    assert setup.device_name("cuda:1") == "Some GPU, cuda:1"


def test_small_networks_get_one_thread_or_as_many_as_said(monkeypatch):
    before = torch.get_num_threads()
    try:
        for said, threads in (("", 1), ("2", 2), ("1", 1)):
            monkeypatch.setenv("EXP_THREADS", said)
            assert setup.small_network_threads() == torch.get_num_threads() == threads
        monkeypatch.delenv("EXP_THREADS")
        assert setup.small_network_threads() == 1
    finally: torch.set_num_threads(before)


# --- exercises -------------------------------------------------------------------------------------------------------------


def stub(x): raise NotImplementedError
def forgot(x): pass
def crash(x): return x @ torch.ones(7)
def fails(x): assert False, "mine"


@pytest.mark.parametrize("func, words", [(stub, "NotImplementedError"), (forgot, "returned None"), (crash, r"tensor\(2, 3\)"),
                                         (fails, "raised AssertionError: mine"), (None, "None.* not callable")])
def test_attempt_gives_advice(func, words):
    with pytest.raises(AssertionError, match=words): setup.attempt(func, torch.ones(2, 3))


def test_attempt_passes_results_and_keywords():
    assert setup.attempt(lambda a, *, b: a - b, 5, b=3) == 2
    assert setup.attempt(lambda: False) is False


@setup.checker
def check_double(func):
    "Two times."
    assert setup.attempt(func, torch.tensor(2.)) == 4, "2 doubled is 4"


@setup.checker
def check_answer(answer, more=0): assert answer == {"a": 1} and not more, "count again"


class Deep:
    def __init__(self): raise NotImplementedError


def wrapped(x):
    try: Deep()
    except NotImplementedError as error: raise RuntimeError("a stub somewhere inside") from error


@pytest.mark.parametrize("check, answer, said", [
    (check_double, lambda x: 2*x, "✓ double"), (check_double, stub, "○ double is still a stub"), (check_double, lambda x: Deep(), "○ double"),
    (check_double, wrapped, "○ double"), (check_double, None, "○ double: no answer yet"), (check_answer, {"a": 1}, "✓ answer"),
    (check_answer, {"a": None, "b": None}, "○ answer: no answer yet"), (check_answer, {}, "○ answer: no"),
])
def test_a_checker_ends_with_a_tick_or_a_word(capsys, check, answer, said):
    assert check(answer) is None
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("check, answers", [(check_double, [lambda x: x + 1]), (check_double, [crash]), (check_answer, [{"a": 2, "b": None}]), (check_answer, [{"a": 1}, 1])])
def test_a_checker_lets_errors_through(capsys, check, answers):
    with pytest.raises(AssertionError): check(*answers)
    assert not capsys.readouterr().out


class Misspelt(torch.nn.Module):
    def foward(self, x): return 2*x


def test_a_misspelt_forward_is_no_stub(capsys):
    with pytest.raises(AssertionError, match='missing the required "forward"'): check_double(Misspelt())
    assert not capsys.readouterr().out


def test_a_checker_keeps_its_name_and_crashes_of_its_own():
    assert check_double.__name__ == "check_double" and check_double.__doc__ == "Two times."
    @setup.checker
    def check_broken(answer): return answer.missing
    with pytest.raises(AttributeError): check_broken(1)


@pytest.mark.parametrize("number", [24, 24., np.float32(24), np.int64(24), torch.tensor(24), torch.tensor([24.]), np.array(24.1)])
def test_numbers_of_any_kind_are_right(number): setup.check_numbers({"legs": number, "more": "words"}, dict(legs=24), {})


@pytest.mark.parametrize("answer", [None, 24, {}, {"legs": "many"}, {"legs": 18}, {"legs": float("nan")}, {"legs": torch.ones(2)}, {"Legs": 24}])
def test_wrong_numbers_get_the_hint_or_the_form(answer):
    with pytest.raises(AssertionError, match="eight for each|answer with a dict|no answer yet"): setup.check_numbers(answer, dict(legs=24), dict(legs="eight for each"))


@given(right=st.floats(-1e6, 1e6), error=st.floats(-.1, .1), rtol=st.floats(1e-6, .05), atol=st.floats(0, 10))
def test_the_larger_tolerance_counts(right, error, rtol, atol):
    answer = right*(1 + error)
    try: setup.check_numbers({"a": answer}, {"a": right}, {"a": "hint"}, rtol, atol); passed = True
    except AssertionError: passed = False
    assert passed == (abs(answer - right) <= max(rtol*abs(right), atol))

"exp.setup: chance, devices, scales, and the words that exercises answer with."
import random

import numpy as np
import pytest
import torch
from exp import setup
from hypothesis import given, strategies as st


@given(st.integers(0, 2**32 - 1))
def test_same_seed_same_numbers(seed):
    def draw(): return random.random(), np.random.rand(), torch.rand(1).item()
    setup.set_seed(seed); first = draw()
    setup.set_seed(seed); assert draw() == first


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_bad_seed_is_named(seed):
    with pytest.raises(ValueError, match=str(seed)): setup.set_seed(seed)


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
    assert "\n" not in setup.versions() and "cpu, 1 thread ·" in setup.versions() and "scale tiny" in setup.versions()


def stub(x): raise NotImplementedError
def forgot(x): pass
def crash(x): return x @ torch.ones(7)
def fails(x): assert False, "mine"


@pytest.mark.parametrize("func, words", [(stub, "still a stub"), (forgot, "returned None"), (crash, r"tensor\(2, 3\)"), (fails, "mine"), (None, "expected a function")])
def test_attempt_gives_advice(func, words):
    with pytest.raises(AssertionError, match=words): setup.attempt(func, torch.ones(2, 3))


def test_attempt_passes_results_and_keywords():
    assert setup.attempt(lambda a, *, b: a - b, 5, b=3) == 2
    assert setup.attempt(lambda: False) is False

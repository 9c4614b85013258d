"Right and wrong answers of exercises: {(module, exercise): {name: (answer, None if it is right, or a word of its refusal)}}."
import importlib

import pytest


def cases(answers: dict) -> list:
    "For pytest's parametrize: module, exercise, answer, word; each named."
    return [pytest.param(module, kind, *case, id=f"{module}-{kind}-{name}") for (module, kind), some in answers.items() for name, case in some.items()]


def judge(module: str, kind: str, answer: object, word: str | None, capsys) -> None:
    "A right answer gets its tick, a wrong one a refusal with this word."
    check = getattr(importlib.import_module(f"exp.exercises.{module}"), f"check_{kind}")
    if word is None:
        check(answer)
        assert "✓" in capsys.readouterr().out
    else:
        with pytest.raises(AssertionError, match=word): check(answer)


def assert_enough(answers: dict) -> None:
    "At least two right and three wrong ones of each exercise."
    for which, some in answers.items():
        right = sum(word is None for _, word in some.values())
        assert right >= 2 and len(some) - right >= 3, which

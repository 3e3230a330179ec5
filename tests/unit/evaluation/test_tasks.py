"""The tasks of data sets and the choices of rows."""

from __future__ import annotations

from typing import Any

import pytest

from lorasb_ds.evaluation.tasks import TASKS, Choices, choices_of, find_task

FOUR = "answer1/answer2/answer3/answer4"
BOWL = {"question": "What holds soup?", "choices": ["a fork", "a bowl"]}


def adapters_row(question: str, answers: str, answer: str) -> dict[str, str]:
    """A row as the LLM-Adapters project writes them."""
    return {
        "instruction": f"{question}\n\nAnswer format: {answers}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


@pytest.mark.parametrize(
    ("question", "answers", "answer", "index"),
    [
        ("True or false: do whales breathe air?", "true/false", "true", 0),
        ("How to cool tea?\n\nSolution1: ...", "solution1/solution2", "solution2", 1),
        ("Kim won the race. How does Kim feel?", "answer1/answer2/answer3", "answer3", 2),
        ("A man picks up a saw. He ...", "ending1/ending2/ending3/ending4", "ending4", 3),
        ("The cup did not fit the box; _ was too big.", "option1/option2", "option1", 0),
        ("What do plants need?", FOUR, "answer2", 1),
        ("Which force pulls a ball down?", FOUR + "/answer5", "answer5", 4),
        ("A pan gets hot on a", FOUR, "answer1", 0),
    ],
    ids=["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-e", "arc-c", "obqa"],
)
def test_commonsense_sets(question: str, answers: str, answer: str, index: int) -> None:
    row = adapters_row(question, answers, answer)
    texts = tuple(f"the correct answer is {name}" for name in answers.split("/"))
    assert choices_of(row) == Choices(row["instruction"], texts, index)
    assert texts[index] == row["output"]


def test_commonsense_rows_with_an_input_or_without_an_answer() -> None:
    row = adapters_row("Is it so?", "true/false", "false")
    prompt = row["instruction"]
    texts = ("the correct answer is true", "the correct answer is false")
    assert choices_of(row | {"input": "It is."}) == Choices(f"{prompt}\n\nIt is.", texts, 1)
    del row["answer"]
    assert choices_of(row) == Choices(prompt, texts, 1)
    twice = adapters_row("Answer format: a/b\nIs it so?", "true / false ", "true")
    assert choices_of(twice) == Choices(twice["instruction"], texts, 0)


@pytest.mark.parametrize(
    ("row", "texts", "answer"),
    [
        (BOWL | {"answer": 1}, ("a fork", "a bowl"), 1),
        (BOWL | {"answer": "B"}, ("a fork", "a bowl"), 1),
        (BOWL | {"answer": "1"}, ("a fork", "a bowl"), 1),
        (BOWL | {"answer": "a fork"}, ("a fork", "a bowl"), 0),
        (BOWL | {"choices": ["1", "0"], "answer": "1"}, ("1", "0"), 0),
        (BOWL | {"choices": ["1", "0"], "answer": 1}, ("1", "0"), 1),
        (BOWL | {"choices": ["B", "A"], "answer": "B"}, ("B", "A"), 0),
        (BOWL | {"choices": ("a", "b"), "answer": 0}, ("a", "b"), 0),
    ],
)
def test_choices(row: dict[str, Any], texts: tuple[str, ...], answer: int) -> None:
    assert choices_of(row) == Choices(row["question"], texts, answer)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"question": "What?", "answer": "18"},
        {"instruction": "Add 1 and 2", "input": "", "output": "3"},
        adapters_row("What?", "answer1/answer2", "answer3"),
        adapters_row("What?", "answer1", "answer1"),
        adapters_row("What?", "answer1//answer2", "answer1"),
        adapters_row("What?", "a/b", "c") | {"output": None},
        BOWL,
        BOWL | {"answer": True},
        BOWL | {"answer": 2},
        BOWL | {"answer": -1},
        BOWL | {"answer": 1.0},
        BOWL | {"answer": "C"},
        BOWL | {"answer": "7"},
        BOWL | {"answer": "a spoon"},
        BOWL | {"answer": ""},
        BOWL | {"answer": ["a bowl"]},
        BOWL | {"answer": "0", "choices": []},
        BOWL | {"answer": 0, "choices": ["a bowl"]},
        BOWL | {"answer": 0, "choices": ["a bowl", " "]},
        BOWL | {"answer": 0, "choices": ["a bowl", 3]},
        BOWL | {"answer": 0, "choices": "ab"},
        BOWL | {"answer": 0, "question": " "},
        BOWL | {"answer": 0, "question": None},
        {"choices": ["a", "b"], "answer": 0},
    ],
)
def test_rows_without_choices(row: dict[str, Any]) -> None:
    assert choices_of(row) is None


GSM8K = {"question": "6 x 3?", "answer": "It is 6 * 3 = 18\n#### 18"}
META = {"query": "6 x 3?", "response": "It is 18.\n#### 18\nThe answer is: 18"}
MATH = {"problem": "1/2 of 1?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "answer": "1/2"}
PLAIN = {"question": "6 x 3?", "answer": "18"}


@pytest.mark.parametrize(
    ("rows", "task"),
    [
        ([], "exact"),
        ([None, 3, "#### 18"], "exact"),
        ([PLAIN], "exact"),
        ([{"question": "#### 18", "answer": 18}], "exact"),
        ([{"question": "a", "answer": "#### Step one\ntext"}], "exact"),
        ([{"question": "a", "answer": "see #### 18"}], "exact"),
        ([GSM8K], "gsm8k"),
        ([None, GSM8K, GSM8K, PLAIN], "gsm8k"),
        ([GSM8K, PLAIN], "exact"),
        ([PLAIN] * 15 + [GSM8K] * 17 + [PLAIN] * 99, "gsm8k"),
        ([META], "metamath"),
        ([META, MATH, META], "metamath"),
        ([MATH], "math"),
        ([BOWL | {"answer": 1}], "multiple-choice"),
        ([adapters_row("What?", "true/false", "true")] * 3 + [GSM8K] * 2, "multiple-choice"),
    ],
)
def test_the_task_is_found(rows: list[Any], task: str) -> None:
    assert find_task("data.json", rows) == task
    assert task in TASKS


def test_reasoning_gym_is_its_own_task() -> None:
    assert find_task("reasoning-gym:leg_counting?size=4", [GSM8K]) == "reasoning-gym"

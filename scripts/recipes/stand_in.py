"""Small rows in the forms of the recipes' data sets, made up here: what --smoke runs on.

python scripts/recipes/stand_in.py arithmetic|commonsense|glue FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tiny_roberta import write_tiny_roberta

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva")
THINGS = ("pears", "nails", "maps", "cups", "keys")
NUM_TRAINING_ROWS, NUM_TEST_ROWS = 64, 8

# A commonsense set of LLM-Adapters -> how it asks, what it calls its answers, and how many.
SETS = {
    "boolq": ("Please answer the following question with true or false, question:", None, 2),
    "piqa": ("Please choose the correct solution to the question:", "solution", 2),
    "social_i_qa": ("Please choose the correct answer to the question:", "answer", 3),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence:",
        "ending",
        4,
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence:",
        "option",
        2,
    ),
    "ARC-Easy": ("Please choose the correct answer to the question:", "answer", 4),
    "ARC-Challenge": ("Please choose the correct answer to the question:", "answer", 4),
    "openbookqa": ("Please choose the correct answer to the question:", "answer", 4),
}


# A task of GLUE -> its columns of texts, and how many classes it has; 0: numbers.
GLUE = {
    "cola": (("sentence",), 2),
    "rte": (("sentence1", "sentence2"), 2),
    "mrpc": (("sentence1", "sentence2"), 2),
    "stsb": (("sentence1", "sentence2"), 0),
    "sst2": (("sentence",), 2),
    "qnli": (("question", "sentence"), 2),
    "qqp": (("question1", "question2"), 2),
    "mnli": (("premise", "hypothesis"), 3),
}


def sum_of(i: int) -> tuple[str, int, int]:
    """A question, and its two numbers."""
    a, b = 2 + i % 7, 3 + i % 5
    name, thing = NAMES[i % len(NAMES)], THINGS[i % len(THINGS)]
    return f"{name} has {a} {thing} and finds {b}. How many {thing} has {name}?", a, b


def metamath(i: int) -> dict[str, str]:
    question, a, b = sum_of(i)
    response = f"There are {a} and {b}, so {a} + {b} = {a + b}.\n#### {a + b}"
    return {
        "type": "GSM_Rephrased",
        "query": question,
        "original_question": question,
        "response": f"{response}\nThe answer is: {a + b}",
    }


def gsm8k(i: int) -> dict[str, str]:
    question, a, b = sum_of(100 + i)
    return {
        "question": question,
        "answer": f"{a} and {b}: <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}",
    }


def competition_math(i: int) -> dict[str, str]:
    a, b = 2 + i, 5 + 2 * i
    return {
        "problem": f"What is ${a} + {b}$?",
        "solution": f"We add: ${a} + {b} = \\boxed{{{a + b}}}$.",
        "answer": str(a + b),
        "subject": "Prealgebra",
        "level": "1",
    }


def commonsense(name: str, i: int) -> dict[str, str]:
    """Which of the things is the longest word, or the like: rows of one set."""
    asks, label, count = SETS[name]
    right = i % count
    words = [THINGS[(i + j) % len(THINGS)] for j in range(count)]
    if label is None:
        thing = "a number" if right == 0 else "a bird"
        names, body = ["true", "false"], f"is {i} {thing}?"
    else:
        names = [f"{label}{j + 1}" for j in range(count)]
        listed = " ".join(
            f"{answer.capitalize()}: {word}" for answer, word in zip(names, words, strict=True)
        )
        body = f"Which of these is {words[right]}?\n\n{listed}"
    return {
        "instruction": f"{asks} {body}\n\nAnswer format: {'/'.join(names)}",
        "input": "",
        "output": f"the correct answer is {names[right]}",
        "answer": names[right],
    }


def glue(task: str, i: int) -> dict[str, Any]:
    """A row of a task; every class comes, and of STS-B numbers with a fraction."""
    columns, num_classes = GLUE[task]
    texts = {name: f"{NAMES[(i + j) % 5]} has {THINGS[i % 5]}." for j, name in enumerate(columns)}
    label = i % num_classes if num_classes else i % 11 * 0.45
    return {**texts, "label": label, "idx": i}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(experiment: str, folder: Path) -> None:
    if experiment == "arithmetic":
        write(folder / "metamath.json", [metamath(i) for i in range(NUM_TRAINING_ROWS)])
        write(folder / "gsm8k.jsonl", [gsm8k(i) for i in range(NUM_TEST_ROWS)])
        write(folder / "math.jsonl", [competition_math(i) for i in range(NUM_TEST_ROWS)])
        return
    if experiment == "glue":
        write_tiny_roberta(folder / "tiny-roberta")
        for task in GLUE:
            rows = [glue(task, i) for i in range(NUM_TRAINING_ROWS + NUM_TEST_ROWS)]
            write(folder / task / "train.jsonl", rows[:NUM_TRAINING_ROWS])
            write(folder / task / "validation.jsonl", rows[NUM_TRAINING_ROWS:])
        return
    names = list(SETS)
    training = [commonsense(names[i % len(names)], i) for i in range(NUM_TRAINING_ROWS)]
    write(folder / "ft-training_set/commonsense_170k.json", training)
    for name in names:
        rows = [commonsense(name, 1000 + i) for i in range(NUM_TEST_ROWS)]
        write(folder / f"dataset/{name}/test.json", rows)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""What a row asks for in an evaluation, and which task a data set is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lorasb_ds.data.formats import RESPONSE_COLUMNS, Row, is_list
from lorasb_ds.data.sources import REASONING_GYM

TASKS = ("auto", "exact", "gsm8k", "metamath", "math", "multiple-choice", "reasoning-gym")
# What the responses of each task have in common. MetaMathQA's have GSM8K's mark, too.
SIGNS = {
    "metamath": re.compile(r"the answer is:", re.IGNORECASE),
    "gsm8k": re.compile(r"^####[^\n]*[0-9]", re.MULTILINE),
    "math": re.compile(r"\\boxed\s*\{"),
}
NUM_ROWS_READ = 32  # to find the task

# LLM-Adapters' commonsense sets name the answers in the prompt and spell them out in the response.
ANSWER_FORMAT = re.compile(r"answer format:([^\n]*)", re.IGNORECASE)
RESPONSE = "the correct answer is "


@dataclass(frozen=True)
class Choices:
    prompt: str
    texts: tuple[str, ...]  # the responses to choose from
    answer: int  # which of them is right


def choices_of(row: Row) -> Choices | None:
    """The choices of a multiple-choice row; None if it is none, or its answer is not among them.

    Known are the commonsense sets of LLM-Adapters (instruction with "Answer format: a/b", answer),
    question with a list of choices (answer: its index from 0, letter or text), and ARC's and
    OpenBookQA's form (choices with text and label, answerKey).
    """
    if isinstance(row.get("instruction"), str):
        return _named_in_the_prompt(row)
    prompt = row.get("question", row.get("question_stem"))
    choices: Any = row.get("choices")
    if isinstance(choices, Mapping):
        texts: Any = choices.get("text")
        labels: Any = choices.get("label")
        if not is_list(labels) or not is_list(texts) or len(labels) != len(texts):
            return None
        key = row.get("answerKey")
        return _choices(prompt, texts, labels.index(key) if key in labels else None)
    if not is_list(choices):
        return None
    return _choices(prompt, choices, _index(row.get("answer"), choices))


def find_task(source: str, rows: Sequence[Any]) -> str:
    """Which of ``TASKS`` the rows of a source are, by what most of the first 32 have.

    Returns:
        "exact" where nothing else fits; never "auto".
    """
    if source.startswith(REASONING_GYM):
        return "reasoning-gym"
    first = list(islice((row for row in rows if isinstance(row, Mapping)), NUM_ROWS_READ))

    def most(found: Iterable[bool]) -> bool:
        return 2 * sum(found) > len(first)

    if most(choices_of(row) is not None for row in first):
        return "multiple-choice"
    for task, sign in SIGNS.items():
        if most(any(map(sign.search, _responses(row))) for row in first):
            return task
    return "exact"


def _named_in_the_prompt(row: Row) -> Choices | None:
    prompt, extra = row["instruction"], row.get("input")
    formats = ANSWER_FORMAT.findall(prompt)
    if not formats:
        return None
    names = [name.strip() for name in formats[-1].split("/")]
    right = row.get("answer")
    if right not in names:  # some rows have it in the response only
        response = row.get("output")
        right = response.strip().removeprefix(RESPONSE) if isinstance(response, str) else None
    if isinstance(extra, str) and extra.strip():
        prompt = f"{prompt}\n\n{extra}"
    if not all(names):
        return None
    texts = [RESPONSE + name for name in names]
    return _choices(prompt, texts, names.index(right) if right in names else None)


def _index(answer: Any, choices: Sequence[Any]) -> int | None:
    """Which choice an answer names: by its index, its text, or its letter."""
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        return None
    if isinstance(answer, int):
        return answer
    if answer in choices:
        return choices.index(answer)
    if re.fullmatch("[0-9]{1,3}", answer):
        return int(answer)
    return ord(answer) - ord("A") if re.fullmatch("[A-Z]", answer) else None


def _choices(prompt: Any, texts: Sequence[Any], answer: int | None) -> Choices | None:
    texts_are_good = all(isinstance(text, str) and text.strip() for text in texts)
    if not isinstance(prompt, str) or not prompt.strip() or not texts_are_good:
        return None
    if len(texts) < 2 or answer is None or not 0 <= answer < len(texts):
        return None
    return Choices(prompt, tuple(texts), answer)


def _responses(row: Row) -> list[str]:
    return [row[name] for name in RESPONSE_COLUMNS if isinstance(row.get(name), str)]

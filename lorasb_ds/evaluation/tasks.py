"""Find the task of a data set and the choices of a row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lorasb_ds.config.data_options import REASONING_GYM
from lorasb_ds.data.formats import RESPONSE_COLUMNS, Row
from lorasb_ds.data.turns import is_list

TASKS = ("auto", "exact", "gsm8k", "metamath", "math", "multiple-choice", "reasoning-gym")
# What the responses of each task contain. MetaMathQA's also contain GSM8K's mark.
SIGNS = {
    "metamath": re.compile(r"the answer is:", re.IGNORECASE),
    "gsm8k": re.compile(r"^####[^\n]*[0-9]", re.MULTILINE),
    "math": re.compile(r"\\boxed\s*\{"),
}
NUM_ROWS_READ = 32  # to find the task

# LLM-Adapters' commonsense sets list the answers' names in the prompt; responses are this sentence.
ANSWER_FORMAT = re.compile(r"answer format:([^\n]*)", re.IGNORECASE)
RESPONSE = "the correct answer is "


@dataclass(frozen=True)
class Choices:
    """A multiple-choice row."""

    prompt: str
    texts: tuple[str, ...]  # the responses to choose from
    answer: int  # index of the right one


def choices_of(row: Row) -> Choices | None:
    """Return the choices of a row; None if it has none, or its answer is not among them.

    Two forms are known: the commonsense sets of LLM-Adapters (instruction with "Answer format:
    a/b", answer), and a question with a list of choices (answer: its index from 0, letter or text).
    """
    if isinstance(row.get("instruction"), str):
        return _named_in_the_prompt(row)
    choices: Any = row.get("choices")
    if not is_list(choices):
        return None
    return _choices(row.get("question"), choices, _index(row.get("answer"), choices))


def find_task(source: str, rows: Sequence[Any]) -> str:
    """Find the task that most of a source's first 32 rows look like.

    Returns:
        One of ``TASKS``: "exact" where nothing else fits; never "auto".
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
    if right not in names:  # some rows name it in the response only
        response = row.get("output")
        right = response.strip().removeprefix(RESPONSE) if isinstance(response, str) else None
    if isinstance(extra, str) and extra.strip():
        prompt = f"{prompt}\n\n{extra}"
    if not all(names):
        return None
    texts = [RESPONSE + name for name in names]
    return _choices(prompt, texts, names.index(right) if right in names else None)


def _index(answer: Any, choices: Sequence[Any]) -> int | None:
    """Return the index of the choice that an answer names by its index, text or letter."""
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

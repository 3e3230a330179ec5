"""Load the rows of an evaluation: their task, their questions, and how to score answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.chat import render_conversation, render_prompt
from lorasb_ds.data.classification import Classes, check_labels
from lorasb_ds.data.dataset import TokenizedRows, check_tokenizer, tokenize_rows
from lorasb_ds.data.formats import Row, parse_row
from lorasb_ds.data.marks import marks_of
from lorasb_ds.data.notes import of_source
from lorasb_ds.data.sources import load_rows
from lorasb_ds.data.template import render
from lorasb_ds.data.tokenization import IGNORE_INDEX, Example
from lorasb_ds.data.turns import RowError
from lorasb_ds.errors import ConfigError
from lorasb_ds.evaluation.reasoning_gym import check_scorer
from lorasb_ds.evaluation.scoring import SCORES, Score, is_equal_math
from lorasb_ds.evaluation.tasks import Choices, choices_of, find_task
from lorasb_ds.models.tables import Tables, check_ids, check_lengths, largest_ids

CLASSIFICATION = "classification"
LONG_ANSWERS = ("gsm8k", "metamath", "math")  # which reason before they answer


@dataclass(frozen=True)
class Question:
    """A row whose answer is generated."""

    row: int  # counted from 1
    content: Mapping[str, Any]
    prompt: str  # the last turn before the answer
    expected: str
    ids: list[int]  # tokens up to the answer


@dataclass(frozen=True)
class ChoiceQuestion:
    """A row whose answer is one of several choices."""

    row: int  # counted from 1
    choices: Choices
    examples: list[Example]  # prompt and choice; only the choice's tokens are labels


@dataclass(frozen=True)
class EvalRows:
    """The rows of one source.

    Attributes:
        task: one of ``tasks.TASKS``, but never "auto"; of a classifier ``CLASSIFICATION``.
        examples: all rows with a response, for their loss; None for multiple choice.
        skipped: number of rows that cannot be used.
        warnings: about rows that the model's tables are not made for.
    """

    source: str
    task: str
    score: Score
    max_new_tokens: int
    examples: TokenizedRows | None
    questions: list[Question]
    choices: list[ChoiceQuestion]
    skipped: int
    warnings: list[str] = field(default_factory=list)


def load_eval_rows(
    source: str,
    config: RunConfig,
    tokenizer: Any,
    *,
    task: str = "auto",
    num_samples: int | None = None,
    max_new_tokens: int | None = None,
    tables: Tables | None = None,
    classes: Classes | None = None,
) -> EvalRows:
    """Load the rows of a source.

    Args:
        source: as ``--data`` takes it.
        config: its columns and ``max_length`` are used.
        task: one of ``tasks.TASKS``; "auto": the one that the rows look like.
        num_samples: take the first rows only; None: all.
        max_new_tokens: of an answer. [default: 512 where answers reason, else 128]
        tables: of the model; rows that need more are refused.
        classes: of a classifier; None: rows have responses.
    Raises:
        ConfigError: if rows cannot be read, or too many have no question of this task, or one is
            too long.
    """
    check_tokenizer(tokenizer, config)
    rows = load_rows(source, held_out=True)
    rows = [rows[i] for i in range(min(num_samples or len(rows), len(rows)))]
    if classes is not None:
        if task != "auto":
            raise ConfigError(f"--task {task}: the run is a classifier's. Leave it out.")
        if max_new_tokens is not None:
            raise ConfigError("--max-new-tokens: a classifier writes no answers. Leave it out.")
        task = CLASSIFICATION
    elif task == "auto":
        task = find_task(source, rows)
    questions: list[Question] = []
    choices: list[ChoiceQuestion] = []
    examples = None
    if task == "multiple-choice":
        choices = _choices(tokenizer, rows)
        used = {question.row for question in choices}
        _check_choices(used, len(rows), config, source)
    else:
        examples = tokenize_rows(rows, tokenizer, config, f"--data {source}")
        notes = tuple(of_source(source, examples.notes))
        examples = replace(examples, notes=notes, classes=classes)
        if classes is not None:
            check_labels(examples, classes, f"--data {source}")
        else:
            questions = _questions(tokenizer, rows, config)
        used = {question.row for question in questions} | {*examples.row_numbers.tolist()}
    found = EvalRows(
        source=source,
        task=task,
        score=_scorer(task, source),
        max_new_tokens=max_new_tokens or (512 if task in LONG_ANSWERS else 128),
        examples=examples,
        questions=questions,
        choices=choices,
        skipped=len(rows) - len(used),
    )
    if tables is None:
        return found
    return replace(found, warnings=_check_tables(found, tables, tokenizer, config))


def _check_choices(used: Set[int], num_rows: int, config: RunConfig, source: str) -> None:
    """Refuse rows of which none, or not enough, are questions with choices."""
    remedy = "docs/evaluating.md lists the forms"
    if not used:
        raise ConfigError(
            f"--task multiple-choice: no row of {source} has choices and a right one among them. "
            f"{remedy}."
        )
    skipped, allowed = num_rows - len(used), config.skippable_rows(num_rows)
    if skipped > allowed:
        first = next(row for row in range(1, num_rows + 1) if row not in used)
        raise ConfigError(
            f"--task multiple-choice: {skipped} of the {num_rows} rows of {source} have no choices "
            f"with a right one among them (the first: row {first}), and --max-skipped-rows allows "
            f"{allowed}. {remedy}; --max-skipped-rows {skipped} goes on without these rows."
        )


def _check_tables(rows: EvalRows, tables: Tables, tokenizer: Any, config: RunConfig) -> list[str]:
    """Refuse rows beyond the model's tables, and return warnings of those it is not made for.

    Raises:
        ConfigError: names the row.
    """
    ids = {q.row: q.ids for q in rows.questions}
    lengths = {row: len(of_row) + rows.max_new_tokens for row, of_row in ids.items()}
    for question in rows.choices:
        choices = [example.input_ids for example in question.examples]
        ids[question.row] = [token for choice in choices for token in choice]
        lengths[question.row] = max(map(len, choices))
    remedy = f"Lower --max-new-tokens (now {rows.max_new_tokens}), or leave such rows out."
    if rows.choices:
        remedy = "Leave such rows out."

    def name_of(row: int) -> str:
        return f"{rows.source}: row {row}"

    numbers = [*lengths]
    warning = check_lengths(
        config.model, tables, [*lengths.values()], lambda i: name_of(numbers[i]), remedy
    )
    check_ids(
        config.model,
        tokenizer,
        tables,
        lambda: [max(of_row, default=0) for of_row in ids.values()],
        lambda i: name_of(numbers[i]),
    )
    if (of_loss := rows.examples) is not None:  # those without a question, too
        known = of_loss.row_numbers
        remedy = f"Lower --max-length (now {config.max_length})."
        warning = warning or check_lengths(
            config.model, tables, of_loss.lengths, lambda i: name_of(known[i]), remedy
        )
        whole = partial(largest_ids, of_loss)
        check_ids(config.model, tokenizer, tables, whole, lambda i: name_of(known[i]))
    return [warning] if warning else []


def _scorer(task: str, source: str) -> Score:
    """Return the function that judges answers. reasoning-gym's scorers return 1.0 if right.

    Raises:
        ConfigError: if a package is missing, or the scorer could evaluate answers as code.
    """
    if task in ("metamath", "math"):
        is_equal_math("", "")  # raises before anything is loaded
    if task != "reasoning-gym":
        return SCORES.get(task, SCORES["exact"])
    remedy = "Give --task exact, which accepts only the row's own text, or use other rows."
    dataset = check_scorer(source, "--data", remedy)

    def score(text: str, row: Row, _: str) -> bool:
        try:
            return bool(dataset.score_answer(text, row) >= 1.0)
        except Exception:  # a hundred scorers fail in their own ways on what a model writes
            return False

    return score


def _questions(tokenizer: Any, rows: Sequence[Any], config: RunConfig) -> list[Question]:
    """Make a question of every row with a prompt and a response."""
    asked = []
    for number, row in enumerate(rows, 1):
        try:
            _, said, tools, _ = parse_row(row, config.prompt_column, config.response_column)
            # Plain text has no question, and a call of tools no answer to compare.
            if not isinstance(said, str) and not said[-1].get("tool_calls"):
                render_conversation(tokenizer, said, tools)  # raises for what is not learned, too
                ids = render_prompt(tokenizer, said[:-1], tools)
                expected = marks_of(tokenizer).without_end(said[-1]["content"])
                asked.append(Question(number, row, said[-2]["content"], expected, ids))
        except (RowError, RecursionError):
            continue  # counted where the rows are tokenized
    return asked


def _choices(tokenizer: Any, rows: Sequence[Any]) -> list[ChoiceQuestion]:
    asked = []
    for number, row in enumerate(rows, 1):
        found = choices_of(row) if isinstance(row, Mapping) else None
        if found is None:
            continue
        try:
            prompt = render(
                tokenizer, [{"role": "user", "content": found.prompt}], add_generation_prompt=True
            )
        except RowError:
            continue
        examples = [_continued(tokenizer, prompt, text) for text in found.texts]
        asked.append(ChoiceQuestion(number, found, examples))
    return asked


def _continued(tokenizer: Any, prompt: str, text: str) -> Example:
    """Tokenize a prompt and a choice, without an end token."""
    tokens = tokenizer(prompt + text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if end > len(prompt) else IGNORE_INDEX
        for token, (_, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    ]
    return Example(tokens["input_ids"], labels)

"""Evaluate a base with an adapter: losses, answers and scores."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import track
from torch import nn

from lorasb_ds.config.data_options import DEMO_EVAL_DATA
from lorasb_ds.config.resolve import load_run_config, with_adapter
from lorasb_ds.config.run_layout import EVAL_ANSWERS, EVAL_RESULT
from lorasb_ds.config.stored_paths import absolute, with_absolute_paths
from lorasb_ds.data.batch import collate, rank_batches
from lorasb_ds.data.template import template_origin
from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.collectives import rank_and_size
from lorasb_ds.evaluation.classification import Scores, classify
from lorasb_ds.evaluation.model import PreparedModel, prepare_model, start_model
from lorasb_ds.evaluation.proportions import Proportion
from lorasb_ds.evaluation.rows import CLASSIFICATION, EvalRows, load_eval_rows
from lorasb_ds.models.generation import Generated, from_all_ranks, generate, rounds
from lorasb_ds.models.loss import eval_mode, held_out_loss, log_likelihoods
from lorasb_ds.runs.run_log import provenance
from lorasb_ds.system.files import write_json, write_text


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation, on every rank.

    Attributes:
        loss: mean cross-entropy over the tokens of the responses, or of the right choices where the
            task is multiple choice.
        scores: "exact_match", or "accuracy" and "accuracy_norm"; {} if no row has a question. Of a
            classifier those of ``row_scores``, all but the accuracy without an interval.
        cut_off: number of answers that were stopped at ``max_new_tokens``.
        answers: a record for each row, in order.
    """

    task: str
    num_rows: int
    loss: float
    scores: Scores
    cut_off: int
    seconds: float
    answers: list[dict[str, Any]]


def evaluate_model(
    model: str | None = None,
    adapter: str | None = None,
    data: str | None = None,
    *,
    task: str = "auto",
    num_samples: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    **fields: Any,
) -> EvalResult:
    """Evaluate a base with an adapter in this process: `lorasb eval` for Python.

    Args:
        model: as the command's option, like all other arguments.
        fields: further fields of RunConfig, such as ``load_in_4bit`` or ``dtype``.
    Raises:
        ConfigError: says what is wrong and what to do about it.
    """
    source = data or DEMO_EVAL_DATA
    given = {"model": model, "data": source, "micro_batch_size": batch_size, **fields}
    config = load_run_config(with_adapter(given, adapter))
    run = prepare_model(config, adapter)
    rows = load_eval_rows(
        source,
        run.config,
        run.base.tokenizer,
        task=task,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        tables=run.tables,
        classes=run.base.classes,
    )
    return evaluate(run, rows, start_model(run))


def evaluate(run: PreparedModel, rows: EvalRows, model: Any) -> EvalResult:
    """Compute losses and scores of rows. Collective if a job is running.

    Args:
        model: from ``start_model(run)``.
    """
    start = time.perf_counter()
    scores: Scores
    with eval_mode(model):
        if rows.task == CLASSIFICATION:
            loss, scores, answers = classify(run, rows, model)
        elif rows.task == "multiple-choice":
            loss, scores, answers = _choose(run, rows, model)
        else:
            loss = _loss(run, rows, model)
            scores, answers = _answer(run, rows, model)
    return EvalResult(
        task=rows.task,
        num_rows=len(answers) or len(rows.examples.examples if rows.examples else ()),
        loss=loss,
        scores=scores,
        cut_off=sum(bool(answer.get("cut_off")) for answer in answers),
        seconds=time.perf_counter() - start,
        answers=answers,
    )


def _loss(run: PreparedModel, rows: EvalRows, model: nn.Module) -> float:
    assert rows.examples is not None
    rank, world_size = rank_and_size(None)
    batches = rank_batches(
        rows.examples.examples,
        rows.examples.lengths,
        [[i] for i in range(len(rows.examples.examples))],
        micro_batch_size=run.config.micro_batch_size,
        pad_token_id=run.base.tokenizer.pad_token_id,
        rank=rank,
        world_size=world_size,
    )
    return held_out_loss(model, batches, accelerator.device())


def _answer(run: PreparedModel, rows: EvalRows, model: Any) -> tuple[Scores, list[dict[str, Any]]]:
    """Generate greedy answers and judge them."""
    found: dict[int, tuple[Generated, bool]] = {}
    lengths = [len(question.ids) for question in rows.questions]
    for batch, counts in _tracked(lengths, run.config.micro_batch_size):
        prompts = [rows.questions[i].ids for i in batch]
        texts = generate(
            model,
            run.base.tokenizer,
            prompts,
            rows.max_new_tokens,
            accelerator.device(),
            stop=run.stop,
            synced=run.is_sharded,
        )
        for i, answer in zip(batch, texts if counts else [], strict=counts):
            asked = rows.questions[i]
            found[i] = answer, rows.score(answer.text, asked.content, asked.expected)
    found = from_all_ranks(found)
    answers = [
        {
            "row": question.row,
            "prompt": question.prompt,
            "expected": question.expected,
            "generated": found[i][0].text,
            "right": found[i][1],
            "cut_off": found[i][0].cut_off,
        }
        for i, question in enumerate(rows.questions)
    ]
    if not answers:
        return {}, []
    return {"exact_match": _proportion(answers, "right")}, answers


def _choose(
    run: PreparedModel, rows: EvalRows, model: nn.Module
) -> tuple[float, Scores, list[dict[str, Any]]]:
    """Choose by likelihood: log p, and log p divided by the choice's characters.

    These are lm-evaluation-harness's acc and acc_norm.
    """
    examples = [example for question in rows.choices for example in question.examples]
    lengths = [len(example.input_ids) for example in examples]
    found: dict[int, float] = {}
    for batch, counts in _tracked(lengths, run.config.micro_batch_size):
        collated = collate([examples[i] for i in batch], run.base.tokenizer.pad_token_id)
        values = log_likelihoods(model, collated.to(accelerator.device()))
        if counts:
            found |= dict(zip(batch, values, strict=True))
    found = from_all_ranks(found)
    answers: list[dict[str, Any]] = []
    loss, num_tokens, first = 0.0, 0, 0
    for question in rows.choices:
        texts, right = question.choices.texts, question.choices.answer
        log_p = [found[first + j] for j in range(len(texts))]
        first += len(texts)
        chosen = _argmax(log_p)
        normed = _argmax([value / len(text) for value, text in zip(log_p, texts, strict=True)])
        loss -= log_p[right]
        num_tokens += question.examples[right].num_label_tokens
        answers.append(
            {
                "row": question.row,
                "prompt": question.choices.prompt,
                "choices": list(texts),
                "expected": right,
                "log_likelihoods": log_p,
                "chosen": chosen,
                "chosen_norm": normed,
                "right": chosen == right,
                "right_norm": normed == right,
            }
        )
    scores: Scores = {
        "accuracy": _proportion(answers, "right"),
        "accuracy_norm": _proportion(answers, "right_norm"),
    }
    return loss / num_tokens, scores, answers


def _tracked(lengths: Sequence[int], batch_size: int) -> Iterable[tuple[list[int], bool]]:
    """Iterate over ``rounds``, with a progress bar in a terminal."""
    all_rounds = list(rounds(lengths, batch_size))
    return track(all_rounds, "answers", transient=True, disable=not sys.stdout.isatty())


def _proportion(answers: Sequence[dict[str, Any]], key: str) -> Proportion:
    return Proportion(sum(bool(answer[key]) for answer in answers), len(answers))


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])


def describe_run(run: PreparedModel) -> dict[str, Any]:
    """Describe what was evaluated and how, for ``eval.json``."""
    return {
        "model": with_absolute_paths({"model": run.config.model})["model"],
        "adapter": run.adapter and str(run.adapter.path),
        "batch_size": run.config.micro_batch_size,
        "chat_template": None if run.config.classifies else template_origin(run.base.tokenizer),
        "template_date": run.config.template_date,
        "dtype": run.config.dtype,
        "load_in_4bit": run.config.load_in_4bit,
        "load_in_8bit": run.config.load_in_8bit,
        "world_size": rank_and_size(None)[1],
        "zero_stage": run.ds_config["zero_optimization"]["stage"],
        **provenance(),
    }


def write_results(
    folder: Path, run: PreparedModel, results: Sequence[tuple[EvalRows, EvalResult]]
) -> None:
    """Write ``eval.json``, scores and setup, and then ``answers.jsonl``, a record for each row.

    In this order: ``eval.json`` marks the folder as ours, to be overwritten.

    Raises:
        OSError: if they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = [_describe(rows, result) for rows, result in results]
    write_json(folder / EVAL_RESULT, {"results": described, **describe_run(run)})
    answers = [
        {"data": absolute(rows.source), **a} for rows, result in results for a in result.answers
    ]
    lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    write_text(folder / EVAL_ANSWERS, "".join(lines))


def _describe(rows: EvalRows, result: EvalResult) -> dict[str, Any]:
    return {
        "data": absolute(rows.source),
        "task": result.task,
        "rows": result.num_rows,
        "loss_rows": len(rows.examples.examples if rows.examples else rows.choices),
        "skipped_rows": rows.skipped,
        "max_new_tokens": rows.max_new_tokens,
        "loss": result.loss,
        "scores": {
            name: score
            if isinstance(score, float)
            else {**asdict(score), "share": score.value, "interval": score.interval}
            for name, score in result.scores.items()
        },
        "cut_off": result.cut_off,
        "seconds": result.seconds,
    }

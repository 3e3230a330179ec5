"""Held-out loss, and exact match of generated answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lorasb_ds.batches import Batch, collate
from lorasb_ds.chat import render_prompt
from lorasb_ds.examples import Example
from lorasb_ds.forms import Messages, Row, RowError, parse_row
from lorasb_ds.loss import token_loss_sum
from lorasb_ds.rows import REASONING_GYM, reasoning_gym_dataset

Score = Callable[[str, Row, str], bool]  # (generated, row, response) -> right


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and afterwards what there was before."""
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> float:
    """Mean cross-entropy over label tokens, in eval mode. Collective if a job is running.

    Args:
        batches: this rank's, as many as on every other rank.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # Σ loss, label tokens
    with eval_mode(model):
        for batch in batches:
            totals[0] += token_loss_sum(model, batch.to(device)).double()
            totals[1] += batch.num_label_tokens
    if dist.is_initialized():
        dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()


@dataclass(frozen=True)
class EvalResult:
    num_rows: int
    loss: float
    exact_match: float | None  # share of answers that are right; None if no row asks for one
    interval: tuple[float, float] | None  # 95 %, Wilson
    seconds: float
    answers: list[dict[str, Any]]  # prompt, expected, generated, right


def evaluate_model(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    examples: Sequence[Example],
    score: Score,
    columns: tuple[str | None, str | None],
    *,
    batch_size: int,
    max_new_tokens: int,
    device: torch.device,
) -> EvalResult:
    """Loss over ``examples`` and greedy answers to ``rows``, in one process.

    Args:
        columns: --prompt-column and --response-column.
    """
    start = time.perf_counter()
    batches = [
        collate(examples[i : i + batch_size], tokenizer.pad_token_id)
        for i in range(0, len(examples), batch_size)
    ]
    loss = held_out_loss(model, batches, device)
    answers: list[dict[str, Any]] = []
    asked = _questions(tokenizer, rows, columns)
    for i in range(0, len(asked), batch_size):
        chunk = asked[i : i + batch_size]
        texts = generate(model, tokenizer, [ids for _, _, ids in chunk], max_new_tokens, device)
        for (row, messages, _), text in zip(chunk, texts, strict=True):
            response = messages[-1]["content"]
            answers.append(
                {
                    "prompt": messages[-2]["content"],
                    "expected": response,
                    "generated": text,
                    "right": score(text, row, response),
                }
            )
    right = sum(answer["right"] for answer in answers)
    return EvalResult(
        num_rows=len(answers) or len(examples),
        loss=loss,
        exact_match=right / len(answers) if answers else None,
        interval=wilson_interval(right, len(answers)) if answers else None,
        seconds=time.perf_counter() - start,
        answers=answers,
    )


def _questions(
    tokenizer: Any, rows: Sequence[Row], columns: tuple[str | None, str | None]
) -> list[tuple[Row, Messages, list[int]]]:
    """Rows that ask for a response, their conversations, and the token ids up to the response."""
    asked = []
    for row in rows:
        try:
            _, said = parse_row(row, *columns)
            if not isinstance(said, str):  # plain text asks for nothing
                asked.append((row, said, render_prompt(tokenizer, said[:-1])))
        except RowError:
            continue  # counted where the rows are tokenized
    return asked


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    device: torch.device,
) -> list[str]:
    """Greedy continuations of a batch, padded on the left."""
    length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):
        input_ids[i, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[i, length - len(prompt) :] = 1
    output = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def scorer(source: str) -> Score:
    """How answers to the rows of ``source`` are judged.

    reasoning-gym tasks bring their own scorer (1.0 counts as right); elsewhere an answer is right
    if it equals the response but for white space at its ends.
    """
    if not source.startswith(REASONING_GYM):
        return lambda text, _, response: text.strip() == response.strip()
    task = reasoning_gym_dataset(source)
    return lambda text, row, _: task.score_answer(text, row) >= 1.0


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); holds for shares near 0 and 1, too."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return tuple((centre + sign * spread) / (1 + z * z / trials) for sign in (-1, 1))  # type: ignore[return-value]

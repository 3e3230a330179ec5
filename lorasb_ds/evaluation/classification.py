"""Evaluate a classifier: the loss of rows, their scores, and what was predicted of each."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

import numpy as np
import torch

from lorasb_ds.data.batch import collate
from lorasb_ds.data.classification import Classes
from lorasb_ds.distributed import accelerator
from lorasb_ds.evaluation.model import PreparedModel
from lorasb_ds.evaluation.proportions import Proportion
from lorasb_ds.evaluation.rows import EvalRows
from lorasb_ds.models.classification import row_losses
from lorasb_ds.models.generation import from_all_ranks, rounds
from lorasb_ds.models.row_scores import score

Scores: TypeAlias = dict[str, Proportion | float]


def classify(
    run: PreparedModel, rows: EvalRows, model: Any
) -> tuple[float, Scores, list[dict[str, Any]]]:
    """Return the mean loss of rows, their scores, and a record of each. Collective in a job.

    Args:
        model: from ``start_model(run)``, in eval mode.
    """
    assert rows.examples is not None
    assert rows.examples.classes is not None
    classes, examples = rows.examples.classes, rows.examples.examples
    found: dict[int, list[float]] = {}
    for batch, counts in rounds(rows.examples.lengths.tolist(), run.config.micro_batch_size):
        collated = collate([examples[i] for i in batch], run.base.tokenizer.pad_token_id)
        with torch.no_grad():
            logits = model(**collated.to(accelerator.device()).inputs).logits.float()
        if counts:
            found |= dict(zip(batch, logits.tolist(), strict=True))
    found = from_all_ranks(found)
    logits = torch.tensor([found[i] for i in range(len(examples))])
    labels = [example.label for example in examples]
    targets = torch.tensor([classes.target(label) for label in labels])
    loss = row_losses(logits, targets).double().mean().item()
    answers = [
        _answer(int(row), label, logit, classes)
        for row, label, logit in zip(rows.examples.row_numbers, labels, logits.numpy(), strict=True)
    ]
    scores: Scores = dict(score(logits.numpy(), targets.numpy()))
    if not classes.is_regression:
        right = sum(answer["right"] for answer in answers)
        scores["accuracy"] = Proportion(right, len(answers))
    return loss, scores, answers


def _answer(row: int, label: str, logits: np.ndarray, classes: Classes) -> dict[str, Any]:
    expected = json.loads(label)
    if classes.is_regression:
        return {"row": row, "expected": expected, "predicted": float(logits[0])}
    predicted = json.loads(classes.labels[int(logits.argmax())])
    return {
        "row": row,
        "expected": expected,
        "predicted": predicted,
        "logits": logits.tolist(),
        "right": predicted == expected,
    }

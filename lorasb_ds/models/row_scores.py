"""Scores of predictions, as GLUE reports them: accuracy, F1, Matthews, Pearson, Spearman."""

from __future__ import annotations

import math

import numpy as np


def score(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return the scores of predictions by name.

    Args:
        logits: (rows, classes), or (rows, 1) for numbers.
        targets: (rows,): the classes' numbers, or the numbers to predict.
    Returns:
        "accuracy" and "matthews" of classes, and of two classes "f1", of the second one; of numbers
        "pearson" and "spearman". A correlation with something constant is 0.
    """
    if logits.shape[1] == 1:
        predicted, expected = logits[:, 0].astype(np.float64), targets.astype(np.float64)
        return {
            "pearson": pearson(predicted, expected),
            "spearman": pearson(ranks(predicted), ranks(expected)),
        }
    chosen = logits.argmax(1)
    found = {"accuracy": float((chosen == targets).mean())}
    if logits.shape[1] == 2:
        found["f1"] = f1(chosen, targets)
    return found | {"matthews": matthews(chosen, targets, logits.shape[1])}


def f1(chosen: np.ndarray, targets: np.ndarray) -> float:
    """Return the F1 of class 1: the harmonic mean of its precision and recall; 0 without a hit."""
    hits = int(((chosen == 1) & (targets == 1)).sum())
    return 2 * hits / max(1, int((chosen == 1).sum()) + int((targets == 1).sum()))


def matthews(chosen: np.ndarray, targets: np.ndarray, num_classes: int) -> float:
    """Return Matthews' correlation, for any number of classes (Gorodkin 2004, R_K)."""
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (targets, chosen), 1)
    expected, predicted, rows = counts.sum(1), counts.sum(0), counts.sum()
    covariance = np.trace(counts) * rows - expected @ predicted
    variances = (rows**2 - expected @ expected) * (rows**2 - predicted @ predicted)
    return float(covariance / math.sqrt(variances)) if variances > 0 else 0.0


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation."""
    x, y = x - x.mean(), y - y.mean()
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y / norms) if norms > 0 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, from 1; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: np.ndarray = last - (counts - 1) / 2
    return means[inverse]

"""Scores of predictions against scikit-learn's and scipy's."""

from __future__ import annotations

import numpy as np
import pytest

from lorasb_ds.models.row_scores import score

metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("num_classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_classes(num_classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    targets = generator.integers(num_classes, size=50)
    logits = generator.normal(size=(50, num_classes)) + np.eye(num_classes)[targets]
    found, chosen = score(logits, targets), logits.argmax(1)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(targets, chosen))
    assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(targets, chosen))
    assert ("f1" in found) == (num_classes == 2)
    if num_classes == 2:
        assert found["f1"] == pytest.approx(metrics.f1_score(targets, chosen))


@pytest.mark.parametrize("seed", range(3))
def test_numbers(seed: int) -> None:
    """Some of them are equal, as STS-B's are."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(6, size=50) / 2
    logits = (targets + generator.normal(size=50)).round(1)[:, None]
    found = score(logits, targets.astype(np.float32))
    assert found.keys() == {"pearson", "spearman"}
    assert found["pearson"] == pytest.approx(stats.pearsonr(logits[:, 0], targets)[0], abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(logits[:, 0], targets)[0])


def test_what_is_constant() -> None:
    """One class predicted, or one number: nothing correlates, and nothing divides by 0."""
    logits, targets = np.array([[1.0, 0.0]] * 4), np.array([0, 1, 1, 0])
    assert score(logits, targets) == {"accuracy": 0.5, "matthews": 0.0, "f1": 0.0}
    found = score(np.ones((4, 1)), np.arange(4.0))
    assert found == {"pearson": 0.0, "spearman": 0.0}

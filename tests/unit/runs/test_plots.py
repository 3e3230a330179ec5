"""Plots of any number of rows show the rows' values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from lorasb_ds.runs.plots import draw_comparison, draw_loss_curve, running_mean
from tests.unit.runs.test_history import training_row

EVALUATIONS = [
    {"step": 0, "stage": "base", "eval_loss": 3.0},
    {"step": 0, "stage": "init", "eval_loss": 2.0},
    {"step": 2, "stage": "step", "eval_loss": 1.5},
    {"step": 3, "stage": "trained", "eval_loss": 1.0},
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def drawn(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """Map label -> the points of its line."""
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]
        for axes in figure.axes
        for line in axes.lines
    }


@pytest.mark.parametrize("num_steps", [0, 1, 3])
@pytest.mark.parametrize("held_out", [0, 1, 4])
def test_loss_curve(tmp_path: Path, figures: list[Figure], num_steps: int, held_out: int) -> None:
    path = tmp_path / "loss.png"
    rows = [training_row(i, float(i)) for i in range(1, num_steps + 1)]
    draw_loss_curve(path, [*rows, *EVALUATIONS[:held_out]])
    assert path.read_bytes().startswith(b"\x89PNG")
    lines = drawn(figures[0])
    means = [(1.0, 1.0), (2.0, 1.5), (3.0, 2.0)][:num_steps]
    assert lines.get("training loss, running mean", []) == means
    assert lines.get("held-out, base", []) == [(0, 3.0)][:held_out]
    assert lines.get("held-out", []) == [(0, 2.0), (2, 1.5), (3, 1.0)][: max(0, held_out - 1)]
    assert [len(line.get_xydata()) for line in figures[0].axes[1].lines] == [num_steps], "lr"


def test_comparison(tmp_path: Path, figures: list[Figure]) -> None:
    runs = {
        "one": [training_row(1, 4.0), *EVALUATIONS],
        "two": [training_row(1, 5.0), EVALUATIONS[1]],
        "empty": [],
    }
    draw_comparison(tmp_path / "report.png", runs)
    training, held_out = figures[0].axes
    for axes, points in ((training, [1, 1]), (held_out, [3, 1])):
        labels = axes.get_legend_handles_labels()[1]
        assert labels == ["one", "two"]
        lines = {line.get_label(): line for line in axes.lines}
        assert [len(lines[label].get_xydata()) for label in labels] == points
        assert lines["one"].get_color() != lines["two"].get_color()


@pytest.mark.parametrize("window", [1, 3, 5, 100])
def test_running_mean(window: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=20).tolist()
    values[0] = values[4] = values[5] = values[6] = math.nan
    values[10] = math.inf
    found = running_mean(values, window)
    for end in range(1, 21):
        seen = [v for v in values[max(0, end - window) : end] if math.isfinite(v)]
        expected = sum(seen) / len(seen) if seen else math.nan
        assert found[end - 1] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert running_mean([], window) == []

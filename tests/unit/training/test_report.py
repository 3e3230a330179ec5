"""report.md of runs with and without training and held-out rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.init.init_report import InitReport, InitStep, LayerInit
from lorasb_ds.training.report import write_report
from tests.unit.runs.test_history import training_row

TARGETS = {"model.layers.0.q_proj": (64, 48), "model.layers.0.v_proj": (16, 48)}
LAYER = LayerInit(0.5, (4.0, 3.0), 1e-7, 1e-3, (2.0, 1.0), 8)
INIT = InitReport(
    update="sign",
    num_samples=56,
    num_label_tokens=900,
    num_batches=8,
    loss=2.5,
    step=InitStep(1e-4, 8, 2.5, 2.0, {}, 1.0),
    num_groups=1,
    passes=1,
    by_segments=False,
    predicted_memory_bytes=1 << 30,
    peak_memory_bytes=3 << 30,
    memory_at_start_bytes=1 << 30,
    gradients_s=1.0,
    communication_s=0.5,
    svd_s=0.5,
    total_s=3.0,
    layers=dict.fromkeys(TARGETS, LAYER),
)
EVALUATIONS = [
    {"step": 0, "stage": "base", "eval_loss": 3.0},
    {"step": 0, "stage": "init", "eval_loss": 2.0},
    {"step": 5, "stage": "step", "eval_loss": 0.5},
    {"step": 10, "stage": "trained", "eval_loss": 1.0},
]


def report(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    notes: list[str] | None = None,
    in_expert_pairs: int = 0,
    end: dict[str, Any] | None = None,
    **options: Any,
) -> str:
    config = RunConfig(model="tiny", data="rows.jsonl", r=2, **options)
    run = {
        "config": config.model_dump(),
        "world_size": 3,
        "trainable_parameters": 8,
        "accelerator": "cpu",
        "notes": notes or [],
        "memory": {"predicted": {"phases": {"load": 1 << 30}}, "measured": {"load": 2 << 30}},
        **(end or {}),
    }
    rebased = {"step": {"init_lr": 2**-13, "loss_before": 1.5, "loss_after": 1.25}, "total_s": 7.0}
    path = tmp_path / "report.md"
    write_report(path, run, rows, INIT, TARGETS, in_expert_pairs, 1000, {3: rebased})
    return (tmp_path / "report.md").read_text(encoding="utf-8")


def test_what_was_said_at_the_start(tmp_path: Path) -> None:
    notes = ["rows.jsonl: left out of the rows: id (5 rows)", "warning: no chat template"]
    text = report(tmp_path, [], notes=notes)
    assert "\n## Notes\n\n- rows.jsonl: left out of the rows: id (5 rows)\n- warning: " in text
    assert "## Notes" not in report(tmp_path, [])


def test_a_whole_run(tmp_path: Path) -> None:
    rows = [training_row(i, 1 / i, padding_share=0.25) for i in range(1, 10)]
    rows.append(training_row(10, math.nan, padding_share=0.25, skipped=True))
    best = {"step": 5, "eval_loss": 0.5}
    end = {"saved": EVALUATIONS[3], "best": best}
    text = report(tmp_path, [*EVALUATIONS[:3], *rows, EVALUATIONS[3]], end=end)
    for line in (
        "# lora-sb, r = 2: tiny on rows.jsonl",
        "3 process(es) on cpu; 2 layers with an adapter.",
        "| lora-sb, r = 2 | 8 |",
        "| 3 | 0.000122 | 1.5000 / 1.2500 | 7.0 s |",
        "| LoRA, r = 2, same layers | 352 (44.0 times more) |",
        "| steps | 10 |",
        "| time | 20 s |",
        "| tokens seen | 300, 15 a second |",
        "| loss: first step / mean of the last tenth | 1.0000 / 0.1111 |",
        "| padding | 25.0% of all positions |",
        "| skipped steps, loss or gradient not finite | 1 |",
        "| base | 0 | 3.0000 | 20.09 |",
        "| after the init | 0 | 2.0000 | 7.389 |",
        "| in training | 5 | 0.5000 | 1.649 |",
        "| trained | 10 | 1.0000 | 2.718 |",
        "The adapter is that of step 10: 1.0000. The best: 0.5000, at step 5.",
        "| load | 1.00 | 2.00 |",
        "| model.layers.0.v_proj | 0.5000 | 4 | 3 | 3.00e+00 | 1e-07 / 1e-03 |",
    ):
        assert line in text.splitlines()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Init",
        "## Re-basing",
        "## Training",
        "## Held-out rows",
        "## Memory of rank 0",
        "## Init, layer by layer",
    ]


def test_lora_on_experts_counts_them(tmp_path: Path) -> None:
    """4 experts of (48, 32), of rank 3, beside the linear layers' 352 numbers."""
    text = report(tmp_path, [], in_expert_pairs=4 * 3 * (48 + 32))
    assert "| LoRA, r = 2, same layers and experts | 1,312 (164.0 times more) |" in text


@pytest.mark.parametrize(("rows", "absent"), [([], "Held-out"), (EVALUATIONS[:2], "Training")])
def test_an_init_alone(tmp_path: Path, rows: list[dict[str, Any]], absent: str) -> None:
    text = report(tmp_path, rows, init_from="runs/earlier")
    assert f"## {absent}" not in text
    assert "Loaded from runs/earlier" in text
    assert "loss.png" not in text
    assert "The adapter is" not in text


def test_which_adapter_was_saved(tmp_path: Path) -> None:
    """Whatever the rows say: a lower loss may be the init's, or of other held-out rows."""
    rows = [training_row(1, 1.0), *EVALUATIONS[:2], {"step": 5, "stage": "step", "eval_loss": 2.5}]
    best = {"step": 5, "eval_loss": 2.5}
    text = report(tmp_path, rows, end={"saved": rows[-1], "best": best})
    assert "\n\nThe adapter is that of step 5: 2.5000.\n" in text
    nothing = {"step": None, "eval_loss": None}
    text = report(tmp_path, rows, end={"saved": {"step": 9}, "best": nothing})
    assert "\n\nThe adapter is that of step 9.\n" in text, "no held-out rows since a resume"


def test_what_was_not_counted_is_not_told(tmp_path: Path) -> None:
    text = report(tmp_path, [training_row(1, 1.0)])
    assert "padding" not in text
    assert "| skipped steps, loss or gradient not finite | 0 |" in text
    assert "nan" not in text

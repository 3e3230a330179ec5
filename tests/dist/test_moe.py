"""Whole runs on mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import metrics, run_ranks, word_rows, write_jsonl

REALLY_SHARDED = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


def options(model: Path, tmp_path: Path, name: str, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": write_jsonl(tmp_path / "rows.jsonl", word_rows(40)),
        "output_dir": str(tmp_path / name),
        "r": 8,
        "expert_r": 4,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "dtype": "fp32",
        "init_samples": 8,
        "max_steps": 4,
        "lr": 1e-2,
        "ds_config": "ds_configs/zero3.json",
        **more,
    }


def train(world_size: int, *runs: dict[str, Any]) -> None:
    run_ranks("methods", world_size, runs=list(runs), zero_optimization=REALLY_SHARDED)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_ranks_train_as_one_process(
    tiny_family: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    one = options(tiny_family(family), tmp_path, "one", micro_batch_size=4)
    two = options(tiny_family(family), tmp_path, "two")
    train(1, one)
    train(2, two)
    losses = [
        [row["loss"] for row in metrics(tmp_path / n) if "loss" in row] for n in ("one", "two")
    ]
    assert len(losses[0]) == 4
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=0)
    bases = [load_file(tmp_path / name / "basis.safetensors") for name in ("one", "two")]
    experts = [
        name for name, tensor in bases[0].items() if name.endswith("lora_R") and tensor.ndim == 3
    ]
    assert experts
    for name in experts:
        assert bases[0][name].any()
        torch.testing.assert_close(bases[1][name], bases[0][name], rtol=1e-3, atol=1e-6)

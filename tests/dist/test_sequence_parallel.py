"""Rows that ranks compute in pieces, against whole rows in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.dist.test_gradients import assert_close, batches_of, captured, setting, whole_gradients
from tests.dist.test_loop import config_of, plain_steps
from tests.dist.test_moe import losses, options, train
from tests.runs import metrics, run_ranks, word_rows, write_jsonl


@pytest.mark.parametrize(
    ("world_size", "size", "stage"),
    [
        (2, 2, 3),
        pytest.param(4, 2, 2, marks=pytest.mark.slow),
        pytest.param(4, 4, 3, marks=pytest.mark.slow),  # more ranks than key-value heads
        pytest.param(4, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_whole_rows(
    tiny_model: Path, tmp_path: Path, world_size: int, size: int, stage: int
) -> None:
    """Ragged rows; pieces without a label; 5 rows and 2 rows on 2 groups. SGD: errors stay."""
    config = config_of(tiny_model, tmp_path, optimizer="sgd", lr=0.3)
    expected, R = plain_steps(config)
    shared = {"sequence_parallel": size, "ds_config": f"ds_configs/zero{stage}.json"}
    out = str(tmp_path / "steps.safetensors")
    run_ranks("steps", world_size, config=config | shared, out=out)
    found = load_file(out)
    steps = found.pop("steps")
    assert steps[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert steps[:, 3].all()
    assert (steps[:, 4] <= steps[:, 5]).all(), "some places are padding"
    for name, value in R.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_gradients_of_the_init(
    tiny_model: Path, tmp_path: Path, tokenizer: Any, world_size: int
) -> None:
    """Recomputed activations: attention exchanges pieces in the backward pass, too."""
    config = setting(tiny_model, tmp_path, dtype="fp32", gradient_checkpointing=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = whole_gradients(model, batches_of(config, tokenizer, world_size // 2))
    found = captured(config | {"sequence_parallel": 2}, tmp_path, world_size)
    assert_close(found, expected, tol=1e-4)


def assert_same_course(found: Path, wanted: Path) -> None:
    rows, others = (
        [(key, row[key]) for row in metrics(run) for key in ("loss", "eval_loss") if key in row]
        for run in (found, wanted)
    )
    assert [key for key, _ in rows] == [key for key, _ in others]
    values = [value for _, value in others]
    assert [value for _, value in rows] == pytest.approx(values, rel=1e-3), found.name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3_text"])
def test_whole_runs(tiny_family: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """The init, in groups of layers; then the steps."""
    base, more = tiny_family(family), {} if "moe" in family else {"expert_r": None}
    more |= {"max_steps": 2}
    train(1, options(base, tmp_path / "whole", **more))
    more |= {"sequence_parallel": 2, "init_memory_gib": 1e-4}
    train(2, options(base, tmp_path / "pieces", **more))
    assert_same_course(tmp_path / "pieces", tmp_path / "whole")


@pytest.mark.slow
def test_evaluations_and_checkpoints(tiny_model: Path, tmp_path: Path) -> None:
    """Losses of held-out rows, and answers to them; two processes begin, and one goes on."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", word_rows(3))

    def run(name: str, **more: Any) -> dict[str, Any]:
        given = {"eval_data": held_out, "eval_every": 2, "generate_samples": 1, "expert_r": None}
        return options(tiny_model, tmp_path / name, **given, **more)

    train(1, run("whole"))
    train(2, run("half", sequence_parallel=2, max_steps=2))
    train(1, run("half", resume="auto"))
    assert_same_course(tmp_path / "half", tmp_path / "whole")
    half, whole = (
        [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        for name in ("half", "whole")
    )
    # Later ones are of models that differ by roundings.
    assert [row["stage"] for row in half[:2]] == ["base", "init"]
    assert half[:2] == whole[:2]


@pytest.mark.slow
def test_in_4_bits(tiny_model: Path, tmp_path: Path) -> None:
    given = {"dtype": "bf16", "load_in_4bit": True, "expert_r": None}
    train(1, options(tiny_model, tmp_path / "whole", **given))
    train(2, options(tiny_model, tmp_path / "pieces", **given, sequence_parallel=2))
    found, wanted = (losses(tmp_path / name) for name in ("pieces", "whole"))
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=0)


@pytest.mark.slow
def test_a_trial_tells_which_models_need_whole_rows(
    tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    """Attention of its own, and a convolution; heads apart, narrow values."""
    whole = {"falcon": True, "falcon_h1": True, "gpt2": False, "deepseek_v3": False}
    bases = {str(tiny_family(family)): refused for family, refused in whole.items()}
    run_ranks("trial_in_pieces", 2, bases=bases)

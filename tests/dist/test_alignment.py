"""Alignment on real ranks, against dense projections of autograd's gradients in one process."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.data.batch import collate
from lorasb_ds.data.dataset import tokenize_rows
from lorasb_ds.data.sources import load_rows
from lorasb_ds.models.base import Base
from tests.references import true_gradients
from tests.runs import REALLY_SHARDED, run_ranks, word_rows, write_jsonl

R, STEPS = 4, 3


def config_of(model: Path, folder: Path, method: str) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": write_jsonl(folder / "rows.jsonl", word_rows(7)),
        "method": method,
        "r": R,
        "dtype": "fp32",
        "lr": 1e-2,
        "train_batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": STEPS,
        "warmup_ratio": 0,
    }


def tracked(
    config: dict[str, Any], folder: Path, world_size: int, measured: bool = True, **zero: Any
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """What was found before and after each step, and the factors: at first, and what was trained
    after each step."""
    out = str(folder / f"{world_size}-{measured}")
    run_ranks(
        "alignment",
        world_size,
        config=config,
        out=out,
        zero_optimization=zero or REALLY_SHARDED,
        measured=measured,
    )
    return json.loads(Path(f"{out}.json").read_text()), load_file(f"{out}.safetensors")


def projector(M: torch.Tensor) -> torch.Tensor:
    """Onto the columns of M."""
    return M @ torch.linalg.pinv(M)


def dense(
    G: torch.Tensor, step: torch.Tensor, A: torch.Tensor, B: torch.Tensor, trains_r: bool
) -> dict[str, float]:
    """The formulas as they stand, in fp64."""

    def held(M: torch.Tensor) -> float:
        P_B, P_A = projector(B.double()), projector(A.T.double())
        rest = (torch.eye(len(P_B)) - P_B) @ M @ (torch.eye(len(P_A)) - P_A)
        return ((P_B @ M @ P_A if trains_r else M - rest).norm() / M.norm()).item()

    G, signs = G.double(), G.double().sign()
    return {
        "gradient_cosine": held(G),
        "sign_cosine": held(signs),
        "update_cosine": -((signs * step).sum() / signs.norm() / step.norm()).item(),
        "gradient_norm": G.norm().item(),
    }


@pytest.mark.parametrize(
    ("method", "world_size"),
    [
        pytest.param("lora-sb", 2, marks=pytest.mark.slow),
        pytest.param("lora", 1, marks=pytest.mark.slow),
        pytest.param("lora-ga", 2, marks=pytest.mark.slow),
    ],
)
def test_alignment_is_that_of_dense_matrices(
    tiny_model: Path, tmp_path: Path, method: str, world_size: int
) -> None:
    """Sharded; square layers, and layers longer on either side; before training and after steps."""
    config = config_of(tiny_model, tmp_path, method)
    found, factors = tracked(config, tmp_path, world_size)
    run = load_run_config(config)
    tokenizer = Base(str(tiny_model)).tokenizer
    examples = tokenize_rows(load_rows(config["data"]), tokenizer, run).examples
    batch = collate(examples, tokenizer.pad_token_id)
    scaling = {"lora-sb": 1.0, "lora": 16 / R, "lora-ga": 16 / math.sqrt(R)}[method]

    def factor(name: str, key: str, step: int) -> torch.Tensor:
        return factors.get(f"{step}.{name}.{key}", factors[f"{name}.{key}"]).double()

    def update(name: str, step: int) -> torch.Tensor:
        A, B = (factor(name, f"lora_{key}", step) for key in "AB")
        if method == "lora-sb":
            return B @ factor(name, "lora_R", step) @ A
        made = B @ A
        if method == "lora-ga":
            made -= factor(name, "offset_B", step) @ factor(name, "offset_A", step)
        return scaling * made

    assert len(found) == STEPS + 1
    before = {name: torch.zeros(()) for name in found[0]}  # the base
    for step, rows in enumerate(found):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        with torch.no_grad():
            for name, change in before.items():
                model.get_submodule(name).weight += change.float()
        gradients = true_gradients(model, batch)
        updates = {name: update(name, step) for name in rows}
        for name, row in rows.items():
            A, B = (factor(name, f"lora_{key}", max(0, step - 1)) for key in "AB")
            made = updates[name] - before[name]
            expected = dense(gradients[name], made, A, B, method == "lora-sb")
            # fp32 gradients in another order of sums; a sign near zero may be the other one.
            assert row == pytest.approx(expected, rel=1e-3, abs=2e-3), (step, name)
            # A step is one of those that can be made, but for what A and B do together.
            assert abs(row["update_cosine"]) <= row["sign_cosine"] + 0.02
        before = updates


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, 1])
def test_training_goes_on_as_if_nobody_had_looked(
    tiny_model: Path, tmp_path: Path, stage: int
) -> None:
    """A model that draws random numbers in training; accumulated micro-batches; 2 ranks, bf16."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    options = config_of(model, tmp_path, "lora-sb") | {
        "dtype": "bf16",
        "micro_batch_size": 1,
        "gradient_checkpointing": True,
        "ds_config": f"ds_configs/zero{stage}.json",
    }
    found, seen = tracked(options, tmp_path, 2, stage=stage)
    assert len(found) == STEPS + 1
    nothing, unseen = tracked(options, tmp_path, 2, measured=False, stage=stage)
    assert nothing == []
    assert seen.keys() == unseen.keys()
    moved = 0
    for key, value in unseen.items():
        assert torch.equal(seen[key], value), key
        moved += key.startswith("3.") and not torch.equal(value, unseen[f"1{key[1:]}"])
    assert moved == len(found[0]), "every R has been trained"

"""The training step: its loss, its agreement on what is not finite, its optimizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.data.batch import collate
from lorasb_ds.data.dataset import tokenize_rows
from lorasb_ds.data.sampler import epoch_order
from lorasb_ds.data.sources import load_rows
from lorasb_ds.models.base import Base
from lorasb_ds.models.linear_layers import linear_layers
from lorasb_ds.planner.placement import placement_of
from lorasb_ds.planner.traffic import step_traffic
from lorasb_ds.training.prepare import prepare
from tests.dist.test_training import PlainFormula, put_plain
from tests.references import own_loss
from tests.runs import run_ranks, word_rows, write_jsonl

ROWS, GLOBAL_BATCH, STEPS = 12, 5, 6  # 3 steps an epoch: of 5, 5 and 2 rows


def config_of(model: Path, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": write_jsonl(folder / "rows.jsonl", word_rows(ROWS)),
        "r": 4,
        "dtype": "fp32",
        "train_batch_size": GLOBAL_BATCH,
        "micro_batch_size": 2,
        "max_steps": STEPS,
        "lr_scheduler": "constant",
        "warmup_ratio": 0,
        "group_by_length": False,
    } | more


def plain_steps(config: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same by torch alone: one batch a step, on one process."""
    run = load_run_config(config)
    model = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    factors = {}
    for name, (out_features, in_features) in linear_layers(model).items():
        shapes = ((4, in_features), (out_features, 4), (4, 4))
        factors[name] = tuple(0.3 * torch.randn(shape, generator=generator) for shape in shapes)
    layers: list[PlainFormula] = put_plain(model, factors)
    optimizer = torch.optim.SGD([layer.R for layer in layers], lr=run.lr, momentum=0.9)
    tokenizer = Base(config["model"]).tokenizer
    examples = tokenize_rows(load_rows(config["data"]), tokenizer, run).examples
    losses = []
    for epoch in range(2):
        order = epoch_order(ROWS, run.seed, epoch)
        for first in range(0, ROWS, GLOBAL_BATCH):
            rows = [examples[i] for i in order[first : first + GLOBAL_BATCH]]
            loss = own_loss(model, collate(rows, tokenizer.pad_token_id))
            loss.backward()
            nn.utils.clip_grad_norm_([layer.R for layer in layers], run.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, {n: layer.R.detach() for n, layer in zip(factors, layers, strict=True)}


def test_the_loss_is_the_mean_over_tokens_for_any_number_of_ranks(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Ragged rows; 5 rows on 3 ranks; 2 rows, so that a rank has none. SGD: errors do not grow."""
    config = config_of(tiny_model, tmp_path, optimizer="sgd", lr=0.3)
    losses, R = plain_steps(config)
    assert max(losses) - min(losses) > 0.01
    for world_size in (1, 2, 3):
        out = str(tmp_path / f"{world_size}.safetensors")
        run_ranks("steps", world_size, config=config, out=out)
        found = load_file(out)
        steps = found.pop("steps")
        assert steps[:, 0].tolist() == pytest.approx(losses, abs=1e-5), f"{world_size} ranks"
        assert steps[:, 3].all()
        assert (steps[:, 4] <= steps[:, 5]).all(), "some places are padding"
        for name, expected in R.items():
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("stage", "dtype", "what"), [(3, "bf16", "loss"), (2, "fp32", "both"), (1, "bf16", "gradient")]
)
def test_ranks_leave_out_a_step_that_is_not_finite(
    tiny_model: Path, tmp_path: Path, stage: int, dtype: str, what: str
) -> None:
    ds_config = f"ds_configs/zero{stage}.json"
    config = config_of(tiny_model, tmp_path, dtype=dtype, ds_config=ds_config)
    run_ranks("not_finite_step", 2, config=config, zero_optimization={}, what=what)


def test_fp16(tiny_model: Path, tmp_path: Path) -> None:
    """The loss scale comes down until the gradient fits; then steps are fp32's but for rounding."""
    found = {}
    for dtype in ("fp32", "fp16"):
        config = config_of(tiny_model, tmp_path, dtype=dtype, lr=1e-2)
        out = str(tmp_path / f"{dtype}.safetensors")
        run_ranks("steps", 2, config=config, out=out, fp16=dtype == "fp16")
        found[dtype] = load_file(out)["steps"]
    scaled = found["fp16"]
    skipped = int((scaled[:, 3] == 0).sum())
    assert skipped < STEPS / 2
    assert scaled[0, 0].item() == pytest.approx(found["fp32"][0, 0].item(), abs=0.01)
    assert scaled[-1, 2] != scaled[0, 2], "R has moved"


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_zero3_gathers_once_a_layer_and_direction(
    tiny_model: Path, tmp_path: Path, checkpointing: bool
) -> None:
    """With checkpointing once a block, and no third time; bytes as planned; R alone is reduced."""
    config = config_of(tiny_model, tmp_path, gradient_checkpointing=checkpointing)
    kept = 100  # norms of 48 numbers, and R of 16; A and B have 96 and more
    sharded = {
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": kept,
    }
    settings, out = {"config": config, "zero": sharded, "steps": 1}, tmp_path / "traffic.json"
    run_ranks("traffic", 2, settings=settings, out=str(out))
    found = json.loads(out.read_text())["collectives"]
    gathers = [(size, n) for size, n in found["all_gather_into_tensor"] if size > kept * 4 / 2]
    blocks, layers = 2, 7
    at_a_time = blocks if checkpointing else blocks * layers
    micro_batches = 2  # 5 rows on 2 ranks, 2 rows at a time
    # The embedding, and for the loss the head, which is the same.
    assert sum(n for _, n in gathers) == micro_batches * (2 * at_a_time + 2)
    bytes_gathered = sum(size * n for size, n in gathers)
    num_trained = blocks * layers * 16
    of_r = num_trained * (4 + 4) // 2
    run = prepare(load_run_config(config), 2)
    run.ds_config["zero_optimization"] |= sharded
    planned = step_traffic(
        run.base.shape, placement_of(run.ds_config, "fp32", 2), run.memory.workload
    )
    assert bytes_gathered == pytest.approx(micro_batches * (planned.bytes - of_r), rel=1e-3)
    ((size, count),) = found["reduce_scatter_tensor"]
    assert (size, count) == (num_trained * 4, micro_batches)

"""The loop and the export against plain torch and PEFT, with no DeepSpeed in the reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.data.batch import collate
from lorasb_ds.data.dataset import tokenize_rows
from lorasb_ds.data.sampler import epoch_order
from lorasb_ds.data.sources import load_rows
from lorasb_ds.models.base import Base
from lorasb_ds.models.linear_layers import linear_layers
from tests.references import own_loss
from tests.runs import REALLY_SHARDED, ROOT, metrics, run_command, run_ranks, word_rows, write_jsonl

STEPS, ROWS, GLOBAL_BATCH = 10, 22, 4  # 6 steps an epoch, the last with 2 rows


class PlainFormula(nn.Module):
    """``W0 x + B R A x`` and nothing else: the reference."""

    def __init__(self, base: nn.Linear, A: torch.Tensor, B: torch.Tensor, R: torch.Tensor) -> None:
        super().__init__()
        self.base, self.A, self.B, self.R = base, A, B, nn.Parameter(R.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.base.weight.T + x @ (self.B @ self.R @ self.A).T


def put_plain(model: nn.Module, factors: dict[str, tuple[torch.Tensor, ...]]) -> list[PlainFormula]:
    model.requires_grad_(False)
    layers = []
    for name, (A, B, R) in factors.items():
        parent, _, child = name.rpartition(".")
        layer = PlainFormula(model.get_submodule(name), A, B, R)
        setattr(model.get_submodule(parent), child, layer)
        layers.append(layer)
    return layers


@pytest.fixture(scope="module")
def two_runs(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The same fp32 run on 2 ZeRO-3 ranks, and on 1 process that accumulates. Real model."""
    folder = tmp_path_factory.mktemp("two-runs")
    data = write_jsonl(folder / "rows.jsonl", word_rows(ROWS))
    shipped = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    shipped["zero_optimization"] |= REALLY_SHARDED
    (folder / "ds.json").write_text(json.dumps(shipped))
    # The basis is that of one of them: sums of another order turn signs of gradients next to 0, and
    # so the last directions of a basis, whose coordinates AdamW's steps depend on.
    for procs, accumulation, init in ((2, 1, ""), (1, 2, f"--init-from {folder}/2")):
        run_command(
            *f"lorasb train --num-procs {procs} --gradient-accumulation-steps {accumulation} "
            f"--model {demo_model} --data {data} --dtype fp32 --r 16 --init-samples 6 "
            f"--target-modules q_proj,down_proj --micro-batch-size 2 --lr 6e-3 "
            f"--max-steps {STEPS} --seed 3 --no-group-by-length --ds_config {folder}/ds.json "
            f"--output-dir {folder}/{procs} {init}".split()
        )
    return folder / "2", folder / "1", folder / "rows.jsonl"


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder) if "loss" in row]


@pytest.mark.slow
def test_two_ranks_equal_one_process(two_runs: tuple[Path, Path, Path]) -> None:
    two, one, _ = two_runs
    assert len(losses(two)) == STEPS
    assert losses(two) == pytest.approx(losses(one), abs=2e-4)
    assert sum(losses(one)[-3:]) / 3 < 0.75 * losses(one)[0], "it should have learned these rows"


@pytest.mark.slow
@pytest.mark.slow
def test_equals_plain_torch(
    two_runs: tuple[Path, Path, Path], demo_model: Path, tokenizer: Any
) -> None:
    """AdamW on R by torch alone, one batch a step, from the basis that the run stored."""
    _, run, rows = two_runs
    config = load_run_config(json.loads((run / "run.json").read_text())["config"])
    basis = load_file(run / "basis.safetensors")
    factors = {
        name: (
            basis[f"{name}.lora_A"],
            basis[f"{name}.lora_B"],
            basis[f"{name}.lora_R"],
        )
        for name in json.loads((run / "init.json").read_text())["layers"]
    }
    assert len(factors) == 60
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    layers = put_plain(model, factors)
    optimizer = torch.optim.AdamW([layer.R for layer in layers], lr=config.lr, weight_decay=0.0)
    examples = tokenize_rows(load_rows(str(rows)), tokenizer, config).examples
    order = [i for epoch in (0, 1) for i in epoch_order(ROWS, config.seed, epoch)]
    found, norms, start = [], [], 0
    for _ in range(STEPS):
        size = min(GLOBAL_BATCH, ROWS - start % ROWS)
        batch = collate([examples[i] for i in order[start : start + size]], tokenizer.pad_token_id)
        start += size
        loss = own_loss(model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_([layer.R for layer in layers], config.max_grad_norm)
        norms.append(norm.item())
        step = len(found)  # one step of warmup, then a cosine that ends after the last one
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert losses(run) == pytest.approx(found, abs=1e-3)
    assert max(norms) > config.max_grad_norm, "clipping had something to do"
    reported = [row["grad_norm"] for row in metrics(run) if "loss" in row]
    assert reported == pytest.approx(norms, rel=1e-2)
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    for (name, (A, B, _)), layer in zip(factors.items(), layers, strict=True):
        key = f"base_model.model.{name}"
        torch.testing.assert_close(adapter[f"{key}.lora_A.weight"], A, atol=0, rtol=0)
        scale = (B @ layer.R).abs().max().item()
        difference = (adapter[f"{key}.lora_B.weight"] - B @ layer.R).abs().max().item()
        assert difference <= 0.02 * scale, name


@pytest.mark.slow
def test_basis_is_orthonormal_and_descends(two_runs: tuple[Path, Path, Path]) -> None:
    two, _, _ = two_runs
    basis = load_file(two / "basis.safetensors")
    for name, layer in json.loads((two / "init.json").read_text())["layers"].items():
        A, B = basis[f"{name}.lora_A"], basis[f"{name}.lora_B"]
        for product in (A @ A.T, B.T @ B):
            torch.testing.assert_close(product, torch.eye(16), atol=1e-5, rtol=0)
        assert basis[f"{name}.slopes"].sum() > 0
        assert 0 < layer["captured_energy"] <= 1


@pytest.mark.parametrize(
    ("ds_config", "dtype"),
    [("zero3", "fp32"), ("zero3", "bf16"), ("zero2", "fp32"), ("zero2", "bf16")],
)
def test_peft_loads_what_was_in_memory(
    tiny_model: Path, tmp_path: Path, ds_config: str, dtype: str
) -> None:
    """2 ranks, all factors sharded: fill, one step, export; PEFT's logits are the model's.

    R is trained in fp32 whatever the compute dtype: it starts from the unrounded fill, moves by
    less than bf16 could hold, and is exported as it is.
    """
    lr = 1e-2 if dtype == "fp32" else 1e-4
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    given: dict[str, torch.Tensor] = {}
    for name, (out_features, in_features) in linear_layers(base).items():
        shapes = {"A": (8, in_features), "B": (out_features, 8), "R": (8, 8)}
        for factor, shape in shapes.items():
            given[f"{name}.lora_{factor}"] = 0.3 * torch.randn(shape, generator=generator)
    save_file(given, tmp_path / "basis")
    config = {
        "model": str(tiny_model),
        "data": write_jsonl(tmp_path / "rows.jsonl", word_rows(6)),
        "ds_config": f"ds_configs/{ds_config}.json",
        "dtype": dtype,
        "r": 8,
        "lr": lr,
        "micro_batch_size": 2,
    }
    run_ranks(
        "export",
        2,
        config=config,
        basis=str(tmp_path / "basis"),
        out=str(tmp_path),
        zero_optimization=REALLY_SHARDED if ds_config == "zero3" else {},
    )
    result = load_file(tmp_path / "result.safetensors")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in linear_layers(base):
        R, stepped = given[f"{name}.lora_R"], result[f"stepped.{name}"]
        torch.testing.assert_close(result[f"filled.{name}"], R, atol=0, rtol=0)
        # AdamW's first step moves an entry by up to lr: from the fill, not from the placeholder.
        assert 0 < (stepped - R).abs().max() <= 1.01 * lr
        exported = adapter[f"base_model.model.{name}.lora_B.weight"]
        expected = given[f"{name}.lora_B"].to(compute).float() @ stepped
        torch.testing.assert_close(exported, expected, atol=1e-6, rtol=1e-5)
    examples = tokenize_rows(
        load_rows(config["data"]), Base(str(tiny_model)).tokenizer, load_run_config(config)
    ).examples
    input_ids = torch.tensor([examples[0].input_ids])
    base = base.to(compute)
    with torch.no_grad():
        plain = base(input_ids=input_ids).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        found = loaded(input_ids=input_ids).logits.float()
        exact = loaded.float()(input_ids=input_ids).logits
    assert (found - plain).abs().max() > 1e-2, "the adapter should do something"
    if dtype == "fp32":
        torch.testing.assert_close(found, result["logits"], atol=1e-4, rtol=0)
    else:  # as near to the same weights' logits in fp32 as PEFT's own bf16 is
        error = torch.linalg.norm(result["logits"] - exact)
        assert error <= 1.5 * torch.linalg.norm(found - exact)
        assert error <= 0.05 * torch.linalg.norm(exact - plain)


def test_4bit_on_two_ranks_equals_one_process(tiny_model: Path, tmp_path: Path) -> None:
    """Init, 4 steps and export of the same micro-batches; the base is sharded on 2 ranks."""
    config = {
        "model": str(tiny_model),
        "data": write_jsonl(tmp_path / "rows.jsonl", word_rows(8)),
        "load_in_4bit": True,
        "ds_config": "ds_configs/zero3.json",
        "r": 8,
        "init_lr": 1e-3,
        "lr": 1e-2,
        "max_steps": 4,
        "micro_batch_size": 2,
    }
    results = []
    for world_size, accumulation in ((2, 1), (1, 2)):
        out = str(tmp_path / f"{world_size}.safetensors")
        run_ranks(
            "four_bit",
            world_size,
            config=config | {"gradient_accumulation_steps": accumulation},
            out=out,
            zero_optimization=REALLY_SHARDED,
        )
        results.append(load_file(out))
    two, one = results
    losses = two.pop("losses")
    torch.testing.assert_close(losses, one.pop("losses"), atol=2e-3, rtol=0)
    base, *_, last, very_last = losses[1:].tolist()
    assert (last + very_last) / 2 < base - 0.1, "an epoch's mean: it should have learned these rows"
    assert two.keys() == one.keys()
    for name in linear_layers(AutoModelForCausalLM.from_pretrained(tiny_model)):
        A, B = (f"base_model.model.{name}.lora_{factor}.weight" for factor in "AB")
        update, expected = two[B] @ two[A], one[B] @ one[A]
        # As above: another order of sums may turn the sign of an entry that is nearly zero.
        assert torch.linalg.norm(update - expected) <= 0.03 * torch.linalg.norm(expected), name


def test_ranks_with_other_rows_refuse(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(6))
    run_ranks("disagree", 2, config={"model": str(tiny_model), "data": data, "r": 4})

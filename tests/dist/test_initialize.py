"""The init phase on real ranks, against autograd and torch.linalg.svd in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.batch import collate
from lorasb_ds.data.dataset import tokenize_rows
from lorasb_ds.data.sources import load_rows
from lorasb_ds.models.base import Base
from tests.references import own_loss, true_gradients
from tests.runs import REALLY_SHARDED, run_ranks, word_rows, write_jsonl

Tensors = dict[str, torch.Tensor]
# So that hidden states take less than gradients, also of a tiny model.
FEW_TOKENS = {"max_length": 64, "init_samples": 2, "micro_batch_size": 1}


def setting(model: Path, tmp_path: Path, **more: Any) -> dict[str, Any]:
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(7))
    common = {"model": str(model), "data": data, "dtype": "fp32", "micro_batch_size": 2}
    return common | more


def initialized(
    config: dict[str, Any], tmp_path: Path, world_size: int
) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Return the layers' factors, the basis on disk, and the report."""
    out = tmp_path / f"{world_size}-{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    run_ranks(
        "initialize", world_size, config=config, out=str(out), zero_optimization=REALLY_SHARDED
    )
    live, basis = (load_file(out / f"{name}.safetensors") for name in ("live", "basis"))
    return live, basis, json.loads((out / "init.json").read_text())


@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_init_is_the_paper_s_formula(
    tiny_model: Path, tmp_path: Path, tokenizer: Any, world_size: int
) -> None:
    """B R A in the layers is -eta times the truncated SVD of the sign of autograd's gradient.

    Sharded; square layers, and layers longer on either side.
    """
    eta, r = 3e-4, 8
    config = setting(tiny_model, tmp_path, r=r, init_lr=eta)
    live, basis, report = initialized(config, tmp_path, world_size)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    examples = tokenize_rows(load_rows(config["data"]), tokenizer, load_run_config(config)).examples
    batch = collate(examples, tokenizer.pad_token_id)
    expected_gradients = true_gradients(model, batch)
    assert report["loss"] == pytest.approx(expected_gradients.pop("loss").item(), abs=1e-5)
    assert report["step"]["loss_before"] == pytest.approx(report["loss"], abs=1e-6)
    assert {(len(G) > G.shape[1]) - (len(G) < G.shape[1]) for G in expected_gradients.values()} == {
        -1,
        0,
        1,
    }
    updates = {}
    for name, G in expected_gradients.items():
        A, B, R = (live[f"{name}.{factor}"] for factor in "ABR")
        torch.testing.assert_close(basis[f"{name}.lora_A"], A, atol=0, rtol=0)
        torch.testing.assert_close(basis[f"{name}.lora_B"], B, atol=0, rtol=0)
        for product in (A @ A.T, B.T @ B):
            torch.testing.assert_close(product, torch.eye(r), atol=1e-5, rtol=0)
        U, S, Vh = torch.linalg.svd(G.sign(), full_matrices=False)
        torch.testing.assert_close(
            R, torch.diag(-eta * S[:r]), atol=1e-3 * eta * S[0].item(), rtol=0
        )
        update, expected = B @ R @ A, -eta * (U[:, :r] * S[:r]) @ Vh[:r]
        # An entry of G that is nearly zero may have the other sign: the tolerance is for those.
        assert torch.linalg.norm(update - expected) <= 0.03 * torch.linalg.norm(expected), name
        slope = -(update * G).sum().item() / eta
        assert slope > 0
        assert basis[f"{name}.slopes"].sum().item() == pytest.approx(slope, rel=1e-3)
        torch.testing.assert_close(basis[f"{name}.S"], S[:r], atol=1e-3 * S[0].item(), rtol=0)
        torch.testing.assert_close(basis[f"{name}.lora_R"], R, atol=0, rtol=0)
        updates[name] = update
    with torch.no_grad():
        for name, update in updates.items():
            model.get_submodule(name).weight += update
    assert report["step"]["loss_after"] == pytest.approx(own_loss(model, batch).item(), abs=1e-5)


def test_a_budget_changes_memory_and_passes_and_nothing_else(
    tiny_model: Path, tmp_path: Path
) -> None:
    """One of them searches for eta; 2 ranks in bf16, as in most runs."""
    config = setting(tiny_model, tmp_path, r=8, dtype="bf16")
    at_once, _, one_pass = initialized(config | {"init_lr": 2.0**-12}, tmp_path, 2)
    budget = {"init_memory_gib": 60e-6, "init_offload": True, "init_lr": "auto"}
    grouped, _, many = initialized(config | budget, tmp_path, 2)
    assert one_pass["num_groups"] == 1
    assert many["num_groups"] > 3
    assert many["by_segments"]
    assert one_pass["passes"] == 1 < many["passes"]
    assert many["predicted_memory_bytes"] < one_pass["predicted_memory_bytes"]
    assert one_pass["loss"] == many["loss"]
    etas = {float(eta) for eta in many["step"]["losses"]}
    assert 0 in etas
    for name in at_once:
        if name.endswith(".R"):
            continue
        assert torch.equal(at_once[name], grouped[name]), name
    # The loss was measured with a scale on the branch, and then with R filled: the same bits.
    step = many["step"]
    assert step["loss_after"] == min(step["losses"].values())
    assert step["loss_before"] == step["losses"]["0"]
    assert step["loss_after"] < step["loss_before"]
    assert step["init_lr"] > 0
    ratio = step["init_lr"] / 2.0**-12
    for name in at_once:
        if name.endswith(".R"):
            assert torch.equal(at_once[name] * ratio, grouped[name]), name


def test_larger_micro_batches_change_rounding_only(tiny_model: Path, tmp_path: Path) -> None:
    """The probe's losses, too: all are sums over label tokens."""
    config = setting(tiny_model, tmp_path, r=8, init_lr=3e-4, micro_batch_size=1)
    small, _, many = initialized(config, tmp_path, 2)
    large, _, few = initialized(config | {"init_micro_batch_size": 4}, tmp_path, 2)
    assert (many["num_batches"], few["num_batches"]) == (7, 2)
    assert few["loss"] == pytest.approx(many["loss"], rel=1e-6)
    assert few["step"]["loss_after"] == pytest.approx(many["step"]["loss_after"], rel=1e-6)
    for name in {name.rpartition(".")[0] for name in small}:
        updates = [of[f"{name}.B"] @ of[f"{name}.R"] @ of[f"{name}.A"] for of in (small, large)]
        # An entry of G that is nearly zero may have the other sign.
        assert torch.dist(*updates) <= 0.03 * torch.linalg.norm(updates[0]), name


def test_the_gradient_itself_with_its_own_scale_of_eta(tiny_model: Path, tmp_path: Path) -> None:
    """--init-update raw --init-lr auto on 2 ranks: B R A is -eta times G's truncated SVD."""
    config = setting(tiny_model, tmp_path, r=8, init_update="raw", init_lr="auto")
    live, basis, report = initialized(config, tmp_path, 2)
    step = report["step"]
    assert step["loss_after"] == min(step["losses"].values())
    assert step["loss_after"] < step["losses"]["0"]
    assert step["init_lr"] > 1e-3, "entries of a gradient are much smaller than 1"
    examples = tokenize_rows(
        load_rows(config["data"]), Base(str(tiny_model)).tokenizer, RunConfig()
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = true_gradients(model, collate(examples.examples, 2))
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
        U, S, Vh = torch.linalg.svd(expected[name], full_matrices=False)
        best = (U[:, :8] * S[:8]) @ Vh[:8]
        A, B, R = (live[f"{name}.{factor}"] for factor in "ABR")
        update = B @ R @ A / -step["init_lr"]
        assert torch.linalg.norm(update - best) <= 1e-3 * torch.linalg.norm(best), name
        torch.testing.assert_close(basis[f"{name}.S"], S[:8], atol=0, rtol=1e-3)


@pytest.mark.slow
def test_a_budget_divides_the_experts_of_a_block(
    tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    """Some experts of each of 2 ranks at a time: the same factors, with more passes."""
    sizes = {"r": 4, "expert_r": 4, "init_lr": 2.0**-12}
    config = setting(tiny_family("qwen3_moe"), tmp_path, **sizes) | FEW_TOKENS
    at_once, _, one_pass = initialized(config, tmp_path, 2)
    divided, _, many = initialized(config | {"init_memory_gib": 1e-9}, tmp_path, 2)
    assert one_pass["num_groups"] == 1
    assert many["num_groups"] > 4, "more than there are projections"
    assert many["by_segments"]
    assert many["passes"] == many["num_groups"] / 2  # blocks
    assert many["predicted_memory_bytes"] < one_pass["predicted_memory_bytes"]
    assert many["loss"] == one_pass["loss"]
    for name, factor in at_once.items():
        assert torch.equal(divided[name], factor), name

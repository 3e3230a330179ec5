"""Captured gradients against autograd's own, with the whole model in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lorasb_ds.adapters.inject import inject
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.data.batch import Batch, assign_to_ranks, collate
from lorasb_ds.data.dataset import tokenize_rows
from lorasb_ds.data.sources import load_rows
from lorasb_ds.init.gradients import average_gradients
from lorasb_ds.init.sharded_svd import truncated_svd
from lorasb_ds.models.linear_layers import linear_layers
from lorasb_ds.models.loss import add_loss_head
from tests.references import nf4_config, true_gradients
from tests.runs import REALLY_SHARDED, run_ranks, word_rows, write_jsonl


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    error, norm = (torch.linalg.vector_norm(t.double()).item() for t in (a - b, b))
    return error / norm if norm else error


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tol: float):
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tol, f"{worst}: {errors[worst]:.2e}"


def setting(model: Path, tmp_path: Path, **more: Any) -> dict[str, Any]:
    # 5 rows in micro-batches of 2: on 2 ranks the last round has one row, and one rank is short.
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(5))
    return {"model": str(model), "data": data, "r": 8, "micro_batch_size": 2, **more}


def captured(config: dict[str, Any], tmp_path: Path, world_size: int) -> dict[str, torch.Tensor]:
    out = str(tmp_path / f"{world_size}.safetensors")
    run_ranks("gradients", world_size, config=config, out=out, zero_optimization=REALLY_SHARDED)
    return load_file(out)


def examples_of(config: dict[str, Any], tokenizer: Any) -> list[Any]:
    return tokenize_rows(load_rows(config["data"]), tokenizer, load_run_config(config)).examples


def batches_of(config: dict[str, Any], tokenizer: Any, world_size: int) -> list[Batch]:
    """Return the micro-batches of all ranks: their padding decides how sums are rounded."""
    examples = examples_of(config, tokenizer)
    lengths = [len(example.input_ids) for example in examples]
    dealt = assign_to_ranks(lengths, config["micro_batch_size"], world_size)
    rows = [[examples[i] for i in mine] for ranks in dealt for mine in ranks if mine]
    return [collate(mine, tokenizer.pad_token_id) for mine in rows]


def whole_gradients(model: nn.Module, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Return ``true_gradients`` of the mean loss over all label tokens."""
    total = sum(batch.num_label_tokens for batch in batches)
    whole: dict[str, torch.Tensor] = {}
    for batch in batches:
        model.zero_grad()
        for name, G in true_gradients(model, batch).items():
            share = G * (batch.num_label_tokens / total)
            whole[name] = whole[name] + share if name in whole else share
    return whole


@pytest.mark.slow
def test_zero3_on_two_ranks_real_model(demo_model: Path, tmp_path: Path, tokenizer: Any) -> None:
    # Micro-batches of 2 and 3 rows: in those of one, a few labels, the head's product over 49152
    # tokens is rounded ten times as much (1.3e-4 of a layer's gradient, in plain torch as well).
    config = setting(demo_model, tmp_path, dtype="fp32", micro_batch_size=3)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    expected = whole_gradients(model, batches_of(config, tokenizer, 2))
    assert len(expected) == 210 + 1
    found = captured(config, tmp_path, 2)
    assert_close(found, expected, tol=1e-4)
    for name in ("0.mlp.down_proj", "14.self_attn.k_proj", "29.self_attn.q_proj"):
        signs = found[f"model.layers.{name}"].sign()
        signs = signs if len(signs) >= signs.shape[1] else signs.T
        svd = truncated_svd(signs.to(torch.int8), 96)
        exact = torch.linalg.svdvals(signs.double())[:96]
        # The energy in the span of U and Vh, and not only the one that S claims.
        kept = (svd.U_local.T @ signs @ svd.Vh.T).double().square().sum()
        assert kept >= (1 - 1e-4) * exact.square().sum(), name
        torch.testing.assert_close(svd.S.double(), exact, atol=0, rtol=1e-5)
        identity = torch.eye(96)
        torch.testing.assert_close(svd.U_local.T @ svd.U_local, identity, atol=1e-5, rtol=0)
        torch.testing.assert_close(svd.Vh @ svd.Vh.T, identity, atol=1e-5, rtol=0)


@pytest.mark.parametrize("world_size", [1, 3])
def test_checkpointing_any_ranks(
    tiny_model: Path, tmp_path: Path, tokenizer: Any, world_size: int
) -> None:
    config = setting(tiny_model, tmp_path, dtype="fp32", gradient_checkpointing=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = whole_gradients(model, batches_of(config, tokenizer, world_size))
    assert_close(captured(config, tmp_path, world_size), expected, tol=1e-4)


def hooked(
    model: nn.Module, config: dict[str, Any], tokenizer: Any, world_size: int
) -> dict[str, torch.Tensor]:
    """Use the same hooks on a whole model in this process, with all ranks' micro-batches."""
    adapters = inject(model, linear_layers(model), 8, torch.bfloat16)
    batches = batches_of(config, tokenizer, world_size)
    add_loss_head(model)
    num_tokens = sum(batch.num_label_tokens for batch in batches)
    shards = average_gradients(model, adapters, batches, num_tokens)
    whole = {
        name: G.T if adapters[name].in_features > adapters[name].out_features else G
        for name, G in shards.shards.items()
    }
    return whole | {"loss": torch.tensor(shards.loss)}


@pytest.mark.usefixtures("one_process")
def test_bf16_equals_the_unsharded_hook(tiny_model: Path, tmp_path: Path, tokenizer: Any) -> None:
    config = setting(tiny_model, tmp_path, dtype="bf16")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    # The same bf16 activations; only the order of fp32 sums differs.
    assert_close(captured(config, tmp_path, 2), hooked(model, config, tokenizer, 2), tol=1e-6)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("ds_config", "world_size", "checkpointing"),
    [("zero3", 1, False), ("zero3", 2, True), ("zero2", 2, False)],
)
def test_4bit_equals_the_dequantized_model(
    tiny_model: Path,
    tmp_path: Path,
    tokenizer: Any,
    ds_config: str,
    world_size: int,
    checkpointing: bool,
) -> None:
    config = setting(
        tiny_model,
        tmp_path,
        load_in_4bit=True,
        ds_config=f"ds_configs/{ds_config}.json",
        gradient_checkpointing=checkpointing,
    )
    found = captured(config, tmp_path, world_size)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model,
        dtype=torch.bfloat16,
        quantization_config=nf4_config(torch.bfloat16),
    )
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    layers, quantized = dict(plain.named_modules()), dict(model.named_modules())
    for name in linear_layers(plain):
        weight = quantized[name].weight
        weight = dequantize_4bit(weight.data, weight.quant_state)
        assert relative_error(layers[name].weight, weight) > 0.01, "it was not quantized"
        layers[name].weight.data = weight
    # fp32 and autograd alone: what 4 bits leave of the weights is what is differentiated, up to
    # bf16's rounding of activations.
    exact = copy.deepcopy(plain).float()
    expected = whole_gradients(exact, batches_of(config, tokenizer, world_size))
    assert_close(found, expected, tol=0.05)
    assert_close(found, hooked(plain, config, tokenizer, world_size), tol=1e-6)


def test_ranks_that_call_different_layers(tmp_path: Path) -> None:
    results = []
    for world_size in (1, 2, 3):
        out = tmp_path / f"{world_size}.safetensors"
        run_ranks("uneven", world_size, out=str(out))
        results.append(load_file(out))
    reached = {name: int(n) for name, n in results[0].items() if name.endswith(".reached")}
    assert reached == {
        "experts.0.reached": 5,
        "experts.1.reached": 4,
        "experts.2.reached": 0,
        "last.reached": 6,
    }
    assert results[0]["experts.0"].any()
    for result in results[1:]:
        assert_close(result, results[0], tol=1e-5)


def test_mixture_of_experts_under_zero3(
    demo_model: Path, tmp_path: Path, tokenizer: Any, tiny_moe: Path
) -> None:
    """Two ranks whose tokens go to different experts: no rank waits for another's."""
    config = setting(tiny_moe, tmp_path, dtype="fp32")
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    expected = whole_gradients(model, batches_of(config, tokenizer, 2))
    expected = {n: G for n, G in expected.items() if not n.endswith("shared_expert_gate")}
    assert len(expected) == 2 * (7 + 2) + 1
    assert_close(captured(config, tmp_path, 2), expected, tol=1e-4)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_every_expert_s_gradient(
    tiny_family: Callable[[str], Path],
    tmp_path: Path,
    tokenizer: Any,
    family: str,
    world_size: int,
) -> None:
    """Of biased, transposed experts; of a few rows, so that some rank's experts get no token."""
    folder = tiny_family(family)
    config = setting(folder, tmp_path, dtype="fp32", gradient_checkpointing=world_size == 2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = whole_gradients(model, batches_of(config, tokenizer, world_size))
    experts = [name for name, G in expected.items() if G.ndim == 3]
    assert len(experts) == (4 if family == "gpt_oss" else 2)
    found = captured(config, tmp_path, world_size)
    assert_close(found, {name: expected[name] for name in found}, tol=1e-4)
    for name in experts:  # one by one: small gradients are not hidden by large ones
        for G, truth in zip(found[name], expected[name], strict=True):
            error = torch.linalg.norm(G - truth)
            assert error <= 1e-4 * torch.linalg.norm(truth)

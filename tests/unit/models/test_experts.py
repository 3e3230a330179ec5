"""Experts of MoE blocks as layers: computation, loading, quantization, memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn
from transformers import AutoModelForCausalLM

from lorasb_ds.errors import ConfigError
from lorasb_ds.models.base import Base
from lorasb_ds.models.experts import ExpertsLinear, Routing, experts_modules, up_projection
from lorasb_ds.models.loading import _fill
from tests.text_families import FAMILIES, tiny_config

CHOSEN = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "qwen3_next", "nemotron_h")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Return a function that makes a tiny random model of a family, and its folder; once each."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(family: str) -> tuple[Any, Path]:
        if family not in made:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(tiny_config(family)).float().eval()
                for p in model.parameters():
                    p.data.normal_(0, 0.1)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family] = model, folder
        return made[family]

    return make


def loaded(folder: Path, kind: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    base = Base(str(folder))
    model = base.empty_model(dtype)
    _fill(model, base, kind, None)
    return model.eval()


def projections(model: nn.Module) -> dict[str, ExpertsLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, ExpertsLinear)}


@pytest.mark.parametrize("family", CHOSEN)
def test_the_split_model_computes_what_transformers_does(saved, family: str) -> None:
    model, folder = saved(family)
    found = loaded(folder)
    ids = torch.randint(0, model.config.vocab_size, (2, 7), generator=torch.manual_seed(1))
    expected, logits = model(ids).logits, found(ids).logits
    assert projections(found)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    # gradients of the hidden states, too
    for m in (model, found):
        m.requires_grad_(False)
    embeddings = model.get_input_embeddings()(ids)
    grads = []
    for m in (model, found):
        x = embeddings.detach().clone().requires_grad_()
        m(inputs_embeds=x).logits.square().sum().backward()
        grads.append(x.grad)
    # Sums in another order: single entries near 0 differ by more than their share.
    assert torch.linalg.norm(grads[1] - grads[0]) <= 1e-4 * torch.linalg.norm(grads[0])


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_every_expert_is_quantized_by_itself(saved, family: str, kind: str) -> None:
    model, folder = saved(family)
    found = loaded(folder, kind, torch.bfloat16)
    layers = projections(found)
    assert len(layers) == 4
    for name, layer in layers.items():
        weight = model.get_parameter(name)
        assert layer.weight.ndim == 1
        for expert in range(layer.num_experts):
            W = weight[expert].T if layer.stored_transposed else weight[expert]
            W = W.bfloat16().contiguous()
            if kind == "4bit":
                codes, state = quantize_4bit(W, compress_statistics=True, quant_type="nf4")
                assert torch.equal(layer.expert_weight(expert), dequantize_4bit(codes, state))
            else:
                error = (layer.expert_weight(expert) - W).abs().amax(1)
                assert (error <= W.abs().amax(1) * (0.6 / 127 + 2**-8)).all()


def test_of_packed_experts_one_is_unpacked_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ExpertsLinear(16, 64, 128, torch.float32, "4bit")
    weight = layer.empty_weight(torch.device("cpu"))
    W = torch.randn(16, 64, 128)
    for expert in range(16):
        layer.set_expert(weight, expert, W[expert])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    experts = torch.randint(0, 16, (50,)).sort().values
    x = torch.randn(50, 128, requires_grad=True)

    largest = 0
    empty = torch.empty

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal largest
        result = empty(*args, **kwargs)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch, "empty", watched)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x, Routing.of(experts, 16))
    y.square().sum().backward()
    monkeypatch.undo()
    assert 0 < largest <= 64 * 128
    assert saved == []  # no weight is kept for the backward pass

    whole = torch.stack([layer.expert_weight(e) for e in range(16)])
    x2 = x.detach().clone().requires_grad_()
    y2 = torch.einsum("soi,si->so", whole[experts], x2)
    y2.square().sum().backward()
    torch.testing.assert_close(y, y2)
    # Sums of products of some tens, in another order.
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-5, atol=1e-3)


def test_routing_with_idle_experts() -> None:
    routing = Routing.of(torch.tensor([1, 1, 4]), 6)
    assert routing.ends == [0, 2, 2, 2, 3, 3]
    assert list(routing.rows()) == [(1, slice(0, 2)), (4, slice(2, 3))]


def test_experts_are_found_in_every_family_of_the_registry() -> None:
    for family in FAMILIES:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config(family))
        modules = experts_modules(model)
        assert modules, family
        for experts in modules.values():
            for name in (up_projection(experts), "down_proj"):
                assert getattr(experts, name).ndim == 3, family


@pytest.mark.parametrize("kind", [None, "4bit"])
def test_a_value_that_is_not_finite_names_its_expert(saved, tmp_path: Path, kind: Any) -> None:
    model, _ = saved("qwen3_moe")
    name = "model.layers.1.mlp.experts.down_proj"
    weight = model.get_parameter(name)
    before = weight[2, 0, 0].item()
    weight.data[2, 0, 0] = float("nan")
    try:
        model.save_pretrained(tmp_path)
    finally:
        weight.data[2, 0, 0] = before
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.experts\.2\.down_proj.*not finite"):
        loaded(tmp_path, kind)

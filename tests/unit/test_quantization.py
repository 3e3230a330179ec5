"""The packed 4-bit layer against bitsandbytes' own and a plain linear layer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import AutoModelForCausalLM

from lorasb_ds.adapter import LoraSBLinear, linear_layers
from lorasb_ds.quantization import PackedLinear4bit, nf4_config, pack_linear_layers


def quantized(out_features: int, in_features: int, seed: int = 0) -> Linear4bit:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = Linear4bit(
            in_features, out_features, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
    return layer.bfloat16().to("cpu").requires_grad_(False)  # to() is what quantizes


def dense(layer: Linear4bit) -> nn.Linear:
    result = nn.Linear(layer.in_features, layer.out_features, device="meta")
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    result.weight = nn.Parameter(weight, requires_grad=False)
    result.bias = layer.bias
    return result


# Odd numbers of weights, of blocks (64 weights), of bytes; blocks of blocks (64 · 256) not full.
SHAPES = [(1, 1), (5, 7), (33, 70), (48, 80), (64, 64), (129, 129), (300, 130), (256, 320)]


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_equals_the_dequantized_layer_bit_for_bit(out_features: int, in_features: int) -> None:
    layer = quantized(out_features, in_features)
    packed, plain = PackedLinear4bit(layer), dense(layer)
    assert torch.equal(packed.dequantize(), plain.weight)
    (parameter, _bias), numel = packed.parameters(), out_features * in_features
    assert (parameter.dtype, parameter.dim()) == (torch.bfloat16, 1)
    # 4 bits, an 8-bit scale for 64 of them and an fp32 one for 256 scales; or parts of those.
    size = 2 * parameter.numel()
    assert numel * (0.5 + 1 / 64 + 4 / 2**14) <= size <= numel * (0.5 + 1 / 64 + 4 / 2**14) + 12
    x = torch.randn(3, 4, in_features, dtype=torch.bfloat16, requires_grad=True)
    grad_y = torch.randn(3, 4, out_features, dtype=torch.bfloat16)
    y, expected = packed(x), plain(x)
    assert torch.equal(y, expected)
    (found,) = torch.autograd.grad(y, x, grad_y)
    assert torch.equal(found, torch.autograd.grad(expected, x, grad_y)[0])


def test_no_weight_is_kept_for_the_backward() -> None:
    """The backward takes what the parameter holds then: ZeRO-3 frees and gathers it in between."""
    packed, other = (PackedLinear4bit(quantized(48, 80, seed)) for seed in (0, 1))
    adapter = LoraSBLinear(packed, 4, torch.bfloat16)
    adapter.scale = 0.0
    adapter.tap = SimpleNamespace(reached=lambda: None, add=lambda x, grad_y: None)
    x = torch.randn(3, 80, dtype=torch.bfloat16, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.numel()), t)[1], lambda t: t
    ):
        y = adapter(x)
    assert saved == [x.numel()], "the tap's input and nothing else"
    y = adapter(x)
    packed.weight.data = other.weight.data
    y.sum().backward()
    expected = torch.ones(3, 48, dtype=torch.bfloat16) @ other.dequantize()
    assert torch.equal(x.grad, expected)


def test_packing_keeps_the_model(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.bfloat16, quantization_config=nf4_config(torch.bfloat16)
    )
    model.train()  # in eval mode bitsandbytes repacks its weights on some CPUs
    layers, head = linear_layers(model), model.lm_head.weight
    input_ids = torch.arange(10).view(1, 10)
    with torch.no_grad():
        before = model(input_ids).logits
        pack_linear_layers(model)
        assert torch.equal(model(input_ids).logits, before)
        assert torch.equal(model.eval()(input_ids).logits, before)
        assert torch.equal(model(input_ids).logits, before)
    assert linear_layers(model) == layers
    kinds = {name: type(model.get_submodule(name)) for name in layers}
    assert set(kinds.values()) == {PackedLinear4bit}
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is head


def test_other_quantizations_are_refused() -> None:
    layer = Linear4bit(64, 64, compress_statistics=False, quant_type="nf4").bfloat16().to("cpu")
    with pytest.raises(ValueError, match="double quantization"):
        PackedLinear4bit(layer)

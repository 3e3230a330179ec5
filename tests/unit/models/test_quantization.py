"""The packed layers against bitsandbytes' own and a plain linear layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Int8Params, Linear4bit
from torch import nn

from lorasb_ds.adapters.lora_sb import LoraSBLinear
from lorasb_ds.models.quantization import PackedLinear, PackedLinear4bit, PackedLinear8bit

BF16 = torch.bfloat16


def quantized(
    out_features: int, in_features: int, seed: int = 0, **options: Any
) -> tuple[Linear4bit, torch.Tensor]:
    """bitsandbytes' layer, and the weight that it was made from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = Linear4bit(
            in_features, out_features, compute_dtype=BF16, **{"quant_type": "nf4"} | options
        )
    layer = layer.bfloat16().requires_grad_(False)
    W = layer.weight.data.clone()
    return layer.to("cpu"), W  # to() is what quantizes


def packed(out_features: int, in_features: int, seed: int = 0) -> PackedLinear4bit:
    layer, W = quantized(out_features, in_features, seed)
    result = PackedLinear4bit(in_features, out_features, layer.bias, BF16)
    return filled(result, result.quantize(W.split(64)))


def filled(layer: Any, value: torch.Tensor) -> Any:
    assert value.shape == layer.weight.shape
    layer.weight = nn.Parameter(value, requires_grad=False)
    return layer


def assert_computes(layer: PackedLinear, W: torch.Tensor) -> None:
    """Forward and backward of a plain layer with these weights, bit for bit."""
    assert torch.equal(layer.dequantize(), W)
    plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
    plain.weight, plain.bias = nn.Parameter(W, requires_grad=False), layer.bias
    x = torch.randn(3, 4, layer.in_features, dtype=BF16, requires_grad=True)
    grad_y = torch.randn(3, 4, layer.out_features, dtype=BF16)
    y, expected = layer(x), plain(x)
    assert torch.equal(y, expected)
    (found,) = torch.autograd.grad(y, x, grad_y)
    assert torch.equal(found, torch.autograd.grad(expected, x, grad_y)[0])


# Odd numbers of weights, of blocks (64 weights), of bytes; blocks of blocks (64 · 256) not full;
# more rows than are quantized at a time.
SHAPES = [(1, 1), (5, 7), (33, 70), (48, 80), (64, 64), (129, 129), (300, 130), (256, 320)]


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_4bit_equals_bitsandbytes(out_features: int, in_features: int) -> None:
    layer, W = quantized(out_features, in_features)
    result = PackedLinear4bit(in_features, out_features, layer.bias, BF16)
    assert result.weight.is_meta
    filled(result, result.quantize(W.split(64)))
    assert_computes(result, dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    (parameter, _bias), numel = result.parameters(), out_features * in_features
    assert (parameter.dtype, parameter.dim()) == (BF16, 1)
    # 4 bits, an 8-bit scale for 64 of them and an fp32 one for 256 scales; or parts of those.
    size = 2 * parameter.numel()
    assert numel * (0.5 + 1 / 64 + 4 / 2**14) <= size <= numel * (0.5 + 1 / 64 + 4 / 2**14) + 12


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("stored", [torch.float16, BF16])
def test_4bit_takes_up_what_bitsandbytes_stored(
    quant_type: str, nested: bool, stored: torch.dtype
) -> None:
    layer, W = quantized(48, 80, quant_type=quant_type, compress_statistics=nested)
    layer = Linear4bit(80, 48, compress_statistics=nested, quant_type=quant_type).to(stored)
    layer.weight.data = W.to(stored)
    layer = layer.to("cpu")
    tensors = layer.state_dict()
    codes, bias = tensors.pop("weight"), nn.Parameter(tensors.pop("bias").to(BF16))
    beside = {name.removeprefix("weight."): tensor for name, tensor in tensors.items()}
    result = PackedLinear4bit(
        80, 48, bias, BF16, quant_type=quant_type, nested=nested, stored_dtype=stored
    )
    filled(result, result.pack_stored(codes, beside))
    W = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert W.dtype == stored
    assert_computes(result, W.to(BF16))
    beside["quant_map"] = beside["quant_map"].flip(0)
    with pytest.raises(ValueError, match="another map"):
        result.pack_stored(codes, beside)


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_8bit_equals_bitsandbytes(out_features: int, in_features: int) -> None:
    W = torch.randn(out_features, in_features, dtype=BF16)
    bias = nn.Parameter(torch.randn(out_features, dtype=BF16), requires_grad=False)
    theirs = Int8Params(W.clone(), has_fp16_weights=False, requires_grad=False).to("cpu")
    result = PackedLinear8bit(in_features, out_features, bias, BF16)
    filled(result, result.quantize(W.split(64)))
    codes, scales = result.parts()
    assert torch.equal(codes.view(torch.int8).view(W.shape), theirs.CB)
    assert torch.equal(scales.clone().view(torch.float32), theirs.SCB)
    # Half a step of 1/127 of a row's largest weight, and what bf16 rounds.
    error = (result.dequantize().float() - W.float()).abs()
    assert (error <= 0.51 / 127 * theirs.SCB[:, None] + W.abs() * 2**-8).all()
    assert_computes(result, result.dequantize())
    stored = result.pack_stored(theirs.CB, {"SCB": theirs.SCB})
    assert torch.equal(stored.view(torch.uint8), result.weight.view(torch.uint8))
    with pytest.raises(ValueError, match="exceeds fp16"):
        result.quantize([torch.full_like(W, 1e6)])


def test_no_weight_is_kept_for_the_backward() -> None:
    """The backward takes what the parameter holds then: ZeRO-3 frees and gathers it in between."""
    layer, other = packed(48, 80, 0), packed(48, 80, 1)
    adapter = LoraSBLinear(layer, 4, torch.bfloat16)
    adapter.scale = 0.0
    adapter.gradient_hook = SimpleNamespace(
        on_forward=lambda x: None, on_backward=lambda x, grad_y: None
    )
    x = torch.randn(3, 80, dtype=torch.bfloat16, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.numel()), t)[1], lambda t: t
    ):
        y = adapter(x)
    assert saved == [x.numel()], "the hook's input and nothing else"
    y = adapter(x)
    layer.weight.data = other.weight.data
    y.sum().backward()
    expected = torch.ones(3, 48, dtype=torch.bfloat16) @ other.dequantize()
    assert torch.equal(x.grad, expected)

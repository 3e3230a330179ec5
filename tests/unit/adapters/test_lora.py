"""The layer that trains A and B, against the plain formula by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lorasb_ds.adapters.lora import LoraLinear, preconditioned
from lorasb_ds.models.quantization import PackedLinear, PackedLinear4bit, PackedLinear8bit


def filled(base: nn.Module, dtype: torch.dtype, **options: Any) -> LoraLinear:
    """Return a filled layer around a base of 6 inputs and 5 outputs, or more; r = 3, s = 0.7."""
    layer = LoraLinear(base.requires_grad_(False), 3, dtype, scaling=0.7, **options)
    generator = torch.Generator().manual_seed(0)
    for name in layer.trained + layer.frozen:
        p = layer.factor(name)
        p.data = (torch.randn(p.shape, generator=generator) / 4).to(p.dtype)
    return layer


def plain(layer: LoraLinear, x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    delta = layer.lora_B @ layer.lora_A
    if layer.frozen:
        delta = delta - layer.offset_B @ layer.offset_A
    return F.linear(x, W + layer.scale * 0.7 * delta, layer.base_layer.bias)


def assert_is_the_formula(layer: LoraLinear, W: torch.Tensor, tolerance: float) -> None:
    """Compare the output and the gradients of x, A and B."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, layer.in_features, generator=generator).to(layer.lora_A.dtype)
    x.requires_grad_()
    both = []
    for y in (layer(x), plain(layer, x, W)):
        grads = torch.autograd.grad(y.float().pow(2).sum(), (x, layer.lora_A, layer.lora_B))
        both.append((y, *grads))
    for name, found, wanted in zip(("y", "dx", "dA", "dB"), *both, strict=True):
        error = torch.linalg.norm((found - wanted).float()) / torch.linalg.norm(wanted.float())
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_gradcheck(offset: bool, scale: float) -> None:
    layer = filled(nn.Linear(6, 5, dtype=torch.float64), torch.float64, offset=offset)
    layer.scale = scale
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        layer.lora_A.data, layer.lora_B.data = A.detach(), B.detach()  # what the backward reads
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    assert torch.autograd.gradcheck(function, (x, A, B))
    assert_is_the_formula(layer, layer.base_layer.weight, 1e-12)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    layer.scale = 0.0
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("kind", [PackedLinear4bit, PackedLinear8bit])
def test_on_a_quantized_base(kind: type[PackedLinear], offset: bool) -> None:
    W = torch.randn(48, 80).bfloat16()
    base = kind(80, 48, nn.Parameter(torch.randn(48).bfloat16()), torch.bfloat16)
    base.weight = nn.Parameter(base.quantize(W.split(64)), requires_grad=False)
    # bf16's rounding of sums of 80 and 48 products.
    assert_is_the_formula(filled(base, torch.bfloat16, offset=offset), base.dequantize(), 2e-2)


def test_on_conv1d_and_on_a_layer_of_its_own_kind() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    conv = filled(Conv1D(5, 6), torch.float32, offset=True)
    assert_is_the_formula(conv, conv.base_layer.weight.T, 1e-6)
    doubled = Doubled(6, 5, bias=False)
    layer = filled(doubled, torch.float32)
    layer.scale = 0.5
    assert_is_the_formula(layer, 2 * doubled.weight, 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_saved_for_backward(reentrant: bool) -> None:
    """x and r numbers a token; no weights, which ZeRO-3 frees; checkpointing drops both."""
    layer = filled(nn.Linear(6, 5), torch.float32, offset=True)
    x = torch.randn(2, 4, 6, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = layer(x)
    assert [t.shape for t in saved] == [(2, 4, 6), (8, 3)]
    wanted = torch.autograd.grad(y.sum(), (x, layer.lora_A, layer.lora_B))
    again = checkpoint(layer, x, use_reentrant=reentrant)
    again.sum().backward()
    for found, expected in zip((x.grad, layer.lora_A.grad, layer.lora_B.grad), wanted, strict=True):
        assert torch.equal(found, expected)


def test_under_autocast_and_compiled() -> None:
    layer = filled(nn.Linear(6, 5), torch.float32, offset=True)
    x = torch.randn(2, 4, 6, requires_grad=True)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.linalg.norm(y.float() - expected) <= 2e-2 * torch.linalg.norm(expected)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("damping", [1e-6, 0.1, 10.0])
def test_the_preconditioned_update_is_the_paper_s(damping: float) -> None:
    """``(BᵀB + λI)⁻¹ dA`` and ``dB (AAᵀ + λI)⁻¹``, by dense inverses in fp64."""
    layer = filled(nn.Linear(6, 5), torch.float32)
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(2))
    plain_grads = torch.autograd.grad(layer(x).pow(2).sum(), (layer.lora_A, layer.lora_B))
    layer.precondition = damping
    found = torch.autograd.grad(layer(x).pow(2).sum(), (layer.lora_A, layer.lora_B))
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    identity = damping * torch.eye(3, dtype=torch.float64)
    wanted = (
        torch.linalg.inv(B.T @ B + identity) @ plain_grads[0].double(),
        plain_grads[1].double() @ torch.linalg.inv(A @ A.T + identity),
    )
    for ours, theirs in zip(found, wanted, strict=True):
        # The smallest eigenvalue of A Aᵀ and Bᵀ B is some 0.05 here: a condition of 30.
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    nothing = preconditioned(plain_grads[0], plain_grads[1], A * 0, B * 0, damping)
    torch.testing.assert_close(nothing[0], plain_grads[0] / damping)

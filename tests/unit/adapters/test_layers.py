"""The layer, its selection and injection, and gradient hooks in one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lorasb_ds.adapters.inject import inject
from lorasb_ds.adapters.lora_sb import LoraSBLinear
from lorasb_ds.adapters.peft_writer import peft_target_modules
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.batch import collate
from lorasb_ds.data.dataset import tokenize_rows
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.gradients import average_gradients, no_dropout
from lorasb_ds.models.base import Base
from lorasb_ds.models.linear_layers import expert_layers, linear_layers, select_targets
from lorasb_ds.models.loading import load_base
from lorasb_ds.models.loss import token_loss_sum
from lorasb_ds.models.quantization import PackedLinear, PackedLinear4bit, PackedLinear8bit
from tests.references import own_loss, true_gradients
from tests.runs import word_rows
from tests.text_families import tiny_config

SHAPES = {"m.0.q_proj": (8, 8), "m.0.k_proj": (4, 8), "m.1.q_proj": (8, 8), "m.1.k_proj": (4, 8)}


def layer(dtype: torch.dtype = torch.float64, bias: bool = True) -> LoraSBLinear:
    generator = torch.Generator().manual_seed(0)
    adapter = LoraSBLinear(nn.Linear(6, 5, bias=bias, dtype=dtype), 3, dtype)
    for p in adapter.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=dtype)
    adapter.base_layer.requires_grad_(False)
    return adapter


def test_forward_is_the_formula() -> None:
    adapter = layer()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    W = adapter.base_layer.weight + adapter.lora_B @ adapter.lora_R @ adapter.lora_A
    torch.testing.assert_close(adapter(x), F.linear(x, W, adapter.base_layer.bias))
    adapter.scale = 0.0
    assert torch.equal(adapter(x), adapter.base_layer(x))


def test_kept_updates_are_part_of_the_frozen_layer() -> None:
    """Two of three places are taken."""
    base = nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    adapter = LoraSBLinear(base, 3, torch.float64, max_kept=3)
    generator = torch.Generator().manual_seed(0)
    for name in (*adapter.trained, *adapter.frozen, *adapter.kept):
        adapter.factor(name).data.normal_(generator=generator)
    adapter.num_kept = 2
    A, B, R = (factor.detach() for factor in (adapter.kept_A, adapter.kept_B, adapter.kept_R))
    kept = B[:, :3] @ R[0] @ A[:3] + B[:, 3:6] @ R[1] @ A[3:6]
    pair = adapter.kept_lora()
    assert pair is not None
    torch.testing.assert_close(pair.B @ pair.A, kept.float())
    W, x = base.weight + kept, torch.randn(4, 6, dtype=torch.float64)
    seen: list[torch.Tensor] = []

    def on_backward(x: torch.Tensor, grad_y: torch.Tensor) -> None:
        seen.append(grad_y.flatten(0, -2).T @ x.flatten(0, -2))

    hook: Any = SimpleNamespace(on_forward=lambda x: None, on_backward=on_backward)
    for adapter.gradient_hook in (None, hook):  # fused, and with the hook: apart
        for adapter.scale in (1.0, 0.5):
            assert_is_the_formula(adapter, W, tol=1e-12)
        adapter.scale = 0.0
        torch.testing.assert_close(adapter(x), F.linear(x, W, base.bias))
    weight = W.clone().requires_grad_()
    adapter(x.requires_grad_()).square().sum().backward()
    F.linear(x, weight, base.bias).square().sum().backward()
    torch.testing.assert_close(seen[-1], weight.grad)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_gradcheck_and_only_r_is_trained(scale: float) -> None:
    adapter = layer()
    adapter.scale = scale
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
        adapter.lora_R.data = R.detach()  # which the backward pass reads
        return torch.func.functional_call(adapter, {"lora_R": R}, (x,))

    assert torch.autograd.gradcheck(function, (x, adapter.lora_R.detach().requires_grad_()))
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ["lora_R"]


def plain(adapter: LoraSBLinear, x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Compute the formula by autograd."""
    A, B, R = adapter.lora_A, adapter.lora_B, adapter.lora_R
    return F.linear(x, W, adapter.base_layer.bias) + adapter.scale * (x @ A.T @ R.T @ B.T)


def assert_is_the_formula(adapter: LoraSBLinear, W: torch.Tensor, **tolerance: float) -> None:
    """Compare the output and the gradients of x and R."""
    dtype = adapter.lora_A.dtype
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, adapter.in_features, generator=generator).to(dtype).requires_grad_()
    grad_y = torch.randn(2, 4, adapter.out_features, generator=generator).to(dtype)
    both = []
    for y in (adapter(x), plain(adapter, x, W)):
        both.append((y.detach(), *torch.autograd.grad(y, (x, adapter.lora_R), grad_y)))
    for name, found, wanted in zip(("y", "dx", "dR"), *both, strict=True):
        error = torch.linalg.norm((found - wanted).float()) / torch.linalg.norm(wanted.float())
        assert error <= tolerance["tol"], f"{name}: {error:.1e}"


def filled(adapter: LoraSBLinear) -> LoraSBLinear:
    generator = torch.Generator().manual_seed(0)
    for p in (adapter.lora_A, adapter.lora_B, adapter.lora_R):
        p.data = torch.randn(p.shape, generator=generator).to(p.dtype) / 4
    return adapter


def packed(kind: type[PackedLinear], W: torch.Tensor) -> PackedLinear:
    base = kind(
        W.shape[1], W.shape[0], nn.Parameter(torch.randn(len(W)).bfloat16()), torch.bfloat16
    )
    base.weight = nn.Parameter(base.quantize(W.split(64)), requires_grad=False)
    return base.requires_grad_(False)


@pytest.mark.parametrize("kind", [PackedLinear4bit, PackedLinear8bit])
def test_on_a_quantized_base(kind: type[PackedLinear]) -> None:
    base = packed(kind, torch.randn(48, 80).bfloat16())
    adapter = filled(LoraSBLinear(base, 4, torch.bfloat16))
    assert_is_the_formula(adapter, base.dequantize(), tol=1e-2)


def test_on_conv1d_and_on_a_layer_of_its_own_kind() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    conv = filled(LoraSBLinear(Conv1D(5, 6).requires_grad_(False), 3, torch.float32))
    assert_is_the_formula(conv, conv.base_layer.weight.T, tol=1e-6)
    doubled = Doubled(6, 5, bias=False).requires_grad_(False)
    assert_is_the_formula(
        filled(LoraSBLinear(doubled, 3, torch.float32)), 2 * doubled.weight, tol=1e-6
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_only_r_s_input_is_saved_for_backward(reentrant: bool) -> None:
    """r numbers a token, not x, y or the weights; checkpointing drops even those."""
    adapter = layer(torch.float32)
    x = torch.randn(2, 4, 6, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = adapter(x)
    assert [t.shape for t in saved] == [(8, 3)]
    y.sum().backward()
    expected = (x.grad, adapter.lora_R.grad)
    x.grad = adapter.lora_R.grad = None
    checkpoint(adapter, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(expected[0], x.grad)
    assert torch.equal(expected[1], adapter.lora_R.grad)


def test_no_gradient_of_an_input_without_requires_grad() -> None:
    adapter = layer()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    adapter(x).pow(3).sum().backward()
    found = adapter.lora_R.grad
    adapter.lora_R.grad = None
    plain(adapter, x, adapter.base_layer.weight).pow(3).sum().backward()
    torch.testing.assert_close(found, adapter.lora_R.grad)


def test_under_autocast_and_compiled() -> None:
    adapter = layer(torch.float32)
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
    expected = adapter(x)
    grads = torch.autograd.grad(expected.square().sum(), (x, adapter.lora_R))
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().square().sum(), (x, adapter.lora_R))
    for a, b in zip((y.float(), *found), (expected, *grads), strict=True):
        assert a.dtype == torch.float32
        assert torch.linalg.norm(a - b) <= 2e-2 * torch.linalg.norm(b)
    compiled = torch.compile(adapter, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), (x, adapter.lora_R))
    torch.testing.assert_close(found, grads)


def test_r_sees_the_projection_of_the_full_gradient() -> None:
    """∂L/∂R = Bᵀ G Aᵀ (arXiv 2411.19557, equation of the projected gradient)."""
    adapter = layer()
    x = torch.randn(7, 6, dtype=torch.float64)
    W = (adapter.base_layer.weight + adapter.lora_B @ adapter.lora_R @ adapter.lora_A).detach()
    W.requires_grad_()
    F.linear(x, W, adapter.base_layer.bias).pow(3).sum().backward()
    adapter(x).pow(3).sum().backward()
    expected = adapter.lora_B.T @ W.grad @ adapter.lora_A.T
    torch.testing.assert_close(adapter.lora_R.grad, expected)


def test_plain_lora_is_the_same_update() -> None:
    adapter = layer(torch.float32)
    A, B = adapter.plain_lora(dict(adapter.named_parameters(recurse=False)))
    torch.testing.assert_close(B @ A, adapter.lora_B @ adapter.lora_R @ adapter.lora_A)


def test_what_holds_experts() -> None:
    """DBRX's parameters are 2-D; 3-D ones of RecurrentGemma and RWKV are gates and decays."""
    found = {}
    for family in ("dbrx", "granitemoe", "gpt_oss", "recurrent_gemma", "rwkv", "llama"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config(family))
        found[family] = len(expert_layers(model))
    assert found == {
        "dbrx": 2,
        "granitemoe": 2,
        "gpt_oss": 2,
        "recurrent_gemma": 0,
        "rwkv": 0,
        "llama": 0,
    }


def test_select_targets() -> None:
    assert select_targets(SHAPES, "all-linear", 4) == SHAPES
    wide = ["m.0.q_proj", "m.1.q_proj"]
    assert list(select_targets(SHAPES, "all-linear", 5)) == wide, "k_proj has 4 outputs"
    assert list(select_targets(SHAPES, "all-linear", 4, directions=2)) == wide
    assert list(select_targets(SHAPES | {"gate": (1, 8)}, "all-linear", 1)) == list(SHAPES)
    assert list(select_targets(SHAPES, "q_proj", 8)) == ["m.0.q_proj", "m.1.q_proj"]
    assert list(select_targets(SHAPES, "m.1.k_proj, 0.q_proj", 4)) == ["m.0.q_proj", "m.1.k_proj"]


@pytest.mark.parametrize(
    ("target_modules", "r", "message"),
    [
        ("all-linear", 9, r"--r 9 exceeds min\(out, in\) = 8 of m.0.q_proj; lower --r"),
        ("k_proj", 5, r"--r 5 exceeds min\(out, in\) = 4 of m.0.k_proj; lower --r"),
        ("proj", 2, "no linear layer matches proj.*k_proj, q_proj"),
        ("q_proj,v_proj", 2, "no linear layer matches v_proj"),
        (",", 2, "no linear layer matches"),
    ],
)
def test_select_targets_refuses(target_modules: str, r: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_targets(SHAPES, target_modules, r)


def test_peft_target_modules() -> None:
    queries = {name: SHAPES[name] for name in SHAPES if "q_proj" in name}
    assert peft_target_modules(queries, SHAPES) == ["q_proj"]
    sequential = ["m", "m.0", "m.0.ffn", "m.0.ffn.0", "m.0.ffn.2", "m.0.q_proj"]
    layers = sequential[3:]
    assert peft_target_modules(layers, sequential) == layers, "0 would be the block m.0, too"
    one = {"m.1.q_proj": (8, 8)}
    assert peft_target_modules(one, SHAPES) == ["m.1.q_proj"], "q_proj would take another one too"


def test_shapes_without_weights_and_trainable_parameters(demo_model: Path) -> None:
    empty = Base(str(demo_model)).empty_model(torch.bfloat16)
    layers = linear_layers(empty)
    assert expert_layers(empty) == {}
    assert len(layers) == 210
    assert not any("lm_head" in name for name in layers)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.bfloat16)
    assert linear_layers(model) == layers
    adapters = inject(model, layers, 48, torch.bfloat16)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == sum(adapter.r**2 for adapter in adapters.values()) == 210 * 48 * 48
    assert "lm_head" not in adapters


def test_injection_changes_nothing(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.arange(20).unsqueeze(0)
    before = model(input_ids=ids).logits
    inject(model, linear_layers(model), 4, torch.float32)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.fixture
def tiny(tiny_model: Path, tokenizer: Any) -> tuple[Any, Any]:
    """A tiny fp32 model and one batch."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attention_dropout=0.5
    )
    examples = tokenize_rows(word_rows(3), tokenizer, RunConfig()).examples
    return model, collate(examples, tokenizer.pad_token_id)


def test_loss_is_transformers_own(tiny: tuple[Any, Any]) -> None:
    model, batch = tiny
    expected = own_loss(model.eval(), batch)
    found = token_loss_sum(model, batch) / batch.num_label_tokens
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["none", "reentrant", "non"])
def test_hooks_equal_grad_for_any_batches(
    tiny: tuple[Any, Any], tiny_model: Path, tokenizer: Any, checkpointing: bool | None
) -> None:
    model, batch = tiny
    with no_dropout(model):
        expected = true_gradients(model, batch)
    loss = expected.pop("loss")
    model.zero_grad()
    if checkpointing is not None:
        kwargs = {"use_reentrant": checkpointing}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        if checkpointing:
            model.enable_input_require_grads()

    adapters = inject(model, linear_layers(model), 4, torch.float32)
    model.eval()
    examples = tokenize_rows(word_rows(3), tokenizer, RunConfig()).examples
    batches = [collate([example], tokenizer.pad_token_id) for example in examples]
    batches.append(collate(examples[:1], tokenizer.pad_token_id, weightless=True))
    shards = average_gradients(model, adapters, batches, batch.num_label_tokens)
    assert shards.loss == pytest.approx(loss.item(), abs=1e-5)
    for name, weight_gradient in expected.items():
        G = shards.shards[name]
        G = G.T if adapters[name].in_features > adapters[name].out_features else G
        torch.testing.assert_close(G, weight_gradient, atol=1e-6, rtol=1e-4)
    assert not model.training, "the mode is given back"
    assert model.config.attention_dropout == 0.5
    assert all(a.gradient_hook is None and a.scale == 1 for a in adapters.values())
    assert all(p.grad is None for p in model.parameters()), "no parameter got a gradient"


def test_backward_stops_at_the_lowest_target(tiny: tuple[Any, Any], one_process: None) -> None:
    model, batch = tiny
    adapters = inject(model, {"model.layers.1.mlp.up_proj": (80, 48)}, 4, torch.float32)
    reached = []
    for name in ("model.layers.0", "model.layers.1.mlp.down_proj"):
        module = model.get_submodule(name)
        module.register_full_backward_hook(lambda *_, name=name: reached.append(name))
    average_gradients(model, adapters, [batch], batch.num_label_tokens)
    assert reached == ["model.layers.1.mlp.down_proj"]


def test_load_base_is_frozen(tiny_model: Path) -> None:
    config = RunConfig(model=str(tiny_model), dtype="fp32")
    ds_config = {"zero_optimization": {"stage": 2}}
    model = load_base(Base(config.model), config, ds_config)
    assert not any(p.requires_grad for p in model.parameters())

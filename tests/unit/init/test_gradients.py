"""Gradient hooks on awkward models, against autograd's own gradients. One process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2MoeConfig

from lorasb_ds.adapters.inject import inject
from lorasb_ds.adapters.lora_sb import LoraSBLinear
from lorasb_ds.data.batch import Batch
from lorasb_ds.data.tokenization import IGNORE_INDEX
from lorasb_ds.init.gradient_shards import GradientShards
from lorasb_ds.init.gradients import average_gradients
from lorasb_ds.models.linear_layers import expert_layers, linear_layers, select_targets
from tests.references import own_loss

pytestmark = pytest.mark.usefixtures("one_process")


def batch_of(rows: int = 3, length: int = 9, vocabulary: int = 50) -> Batch:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :3] = IGNORE_INDEX
    mask = torch.ones_like(ids)
    mask[-1, 4:] = 0  # padding: attention takes another kernel where there is a mask
    labels[-1, 4:] = IGNORE_INDEX
    return Batch(ids, mask, labels, rows * (length - 3) - (length - 4))


def gradients_of(model: nn.Module, adapters: dict[str, LoraSBLinear], batch: Batch, **more: Any):
    """Return (out, in) gradients of every layer, and the counts."""
    found = average_gradients(model, adapters, [batch], batch.num_label_tokens, **more)
    whole = {
        name: G.T if adapters[name].in_features > adapters[name].out_features else G
        for name, G in found.shards.items()
    }
    return whole, found


def test_conv1d_and_biases() -> None:
    """GPT-2: weights are (in, out), every layer has a bias, the head is tied."""
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    batch, layers = batch_of(), linear_layers(model)
    assert layers["transformer.h.0.attn.c_attn"] == (48, 16)
    assert len(layers) == 8
    assert "lm_head" not in layers
    model.requires_grad_(True)
    with torch.random.fork_rng():
        loss = own_loss(model, batch)
    loss.backward()
    expected = {name: model.get_submodule(name).weight.grad.T.clone() for name in layers}
    model.zero_grad(set_to_none=True)
    adapters = inject(model, layers, 4, torch.float32)
    found, shards = gradients_of(model, adapters, batch)
    assert shards.loss == pytest.approx(loss.item(), abs=1e-5)
    for name, G in expected.items():
        torch.testing.assert_close(found[name], G, atol=1e-6, rtol=1e-4)


class Toy(nn.Module):
    """One block used three times, two layers with one weight, and a layer for long rows only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.block = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.long = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 50)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **_: Any) -> Any:
        x = self.embed(input_ids)
        for _ in range(3):
            x = x + self.block(x)
        x = self.second(torch.tanh(self.first(x)))
        if input_ids.shape[1] > 6:
            x = x + self.long(x)
        logits = self.head(x[:, logits_to_keep])
        return type("Output", (), {"logits": logits})


def toy() -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy()


def test_shared_blocks_tied_weights_and_layers_that_are_not_called() -> None:
    model = toy()
    layers = linear_layers(model)
    assert list(layers) == ["block.0", "block.2", "first", "second", "long", "unused"]
    batches = [batch_of(2, 5), batch_of(3, 9), batch_of(4, 5)]
    num_tokens = sum(batch.num_label_tokens for batch in batches)
    reference = toy()
    # Two weights in place of the shared one, so that autograd tells their gradients apart.
    reference.second.weight = nn.Parameter(reference.first.weight.detach().clone())
    for batch in batches:
        keep = torch.arange(2, batch.input_ids.shape[1] - 1)
        logits = reference(batch.input_ids, keep).logits
        targets = batch.labels[:, 3:].flatten()
        nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").backward()
    adapters = inject(model, layers, 2, torch.float32)
    found = average_gradients(model, adapters, batches, num_tokens)
    for name in ("block.0", "block.2", "first", "second", "long"):
        layer = reference.get_submodule(name)
        G = found.shards[name]
        G = G.T if layer.in_features > layer.out_features else G
        torch.testing.assert_close(G * num_tokens, layer.weight.grad, atol=1e-5, rtol=1e-4)
    assert not found.shards["unused"].any()
    assert dict(found.batches_reached) == dict.fromkeys(layers, 3) | {"long": 1, "unused": 0}


def test_a_group_that_no_batch_calls() -> None:
    model = toy()
    adapters = inject(model, linear_layers(model), 2, torch.float32)
    batch = batch_of(2, 5)
    found = average_gradients(
        model, adapters, [batch], batch.num_label_tokens, layers=dict.fromkeys(["long", "unused"])
    )
    assert found.loss > 0
    assert found.shards.keys() == {"long", "unused"}
    assert not any(G.any() for G in found.shards.values())


@pytest.mark.parametrize("offload", [False, True])
def test_groups_and_offload_change_nothing(offload: bool) -> None:
    model = toy()
    adapters = inject(model, linear_layers(model), 2, torch.float32)
    batch = batch_of()
    together, _ = gradients_of(model, adapters, batch)
    for name, expected in together.items():
        alone, _ = gradients_of(model, adapters, batch, layers={name: None}, offload=offload)
        assert torch.equal(alone[name], expected), name


def test_bf16_products_are_those_of_fp32() -> None:
    """For bf16 values, on any hardware; summed over 3 calls."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 64, 40, generator=generator).bfloat16()
    grad_y = torch.randn(3, 64, 24, generator=generator).bfloat16()
    layer = {"layer": LoraSBLinear(nn.Linear(40, 24), 2, torch.bfloat16)}
    shards = GradientShards(layer)
    precision = torch.get_float32_matmul_precision()
    for i in range(3):
        shards.add("layer", x[i], grad_y[i])
    exact = torch.einsum("cti,cto->io", x.double(), grad_y.double())
    error = (shards.shards["layer"] - exact).norm() / exact.norm()
    assert error < 1e-6, "a bf16 result would be off by 1e-3"
    assert torch.get_float32_matmul_precision() == precision


def test_a_layer_with_two_parents_is_left_out() -> None:
    """PEFT would load its adapter under one of its names only."""
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.Linear(4, 4)), "b": nn.Sequential(shared)})
    assert list(linear_layers(model)) == ["a.1"]


def test_experts_are_not_layers() -> None:
    config = Qwen2MoeConfig(
        vocab_size=50,
        hidden_size=16,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = expert_layers(model)
    assert experts == {f"model.layers.{i}.mlp.experts": 4 * 3 * 12 * 16 for i in range(2)}
    targets = select_targets(linear_layers(model), "all-linear", 8)
    kinds = {name.rpartition(".")[2] for name in targets}
    assert "shared_expert_gate" not in kinds, "its one output has no room for r = 8"
    assert kinds >= {"q_proj", "gate_proj", "up_proj", "down_proj"}

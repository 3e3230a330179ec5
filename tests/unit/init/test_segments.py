"""Gradients by segments of the model against those of one pass: the same bits. One process."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig

from lorasb_ds.adapters.inject import inject
from lorasb_ds.adapters.lora_sb import LoraSBLinear
from lorasb_ds.data.batch import Batch, Sample
from lorasb_ds.init.gradients import average_gradients
from lorasb_ds.init.initialize import gradients_by_group
from lorasb_ds.init.segments import SegmentError, gradients_by_segment
from lorasb_ds.models.linear_layers import linear_layers
from lorasb_ds.planner.init_plan import InitWork, plan_init
from lorasb_ds.planner.layer_groups import Segment, cut_segments
from tests.unit.init.test_gradients import batch_of

pytestmark = pytest.mark.usefixtures("one_process")

LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
)
GPT2 = GPT2Config(n_layer=4, n_head=2, n_embd=16, vocab_size=50, n_positions=32)


def model_of(config: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model, inject(model, linear_layers(model), 4, dtype)


def by_segment(
    model: Any, adapters: dict[str, LoraSBLinear], groups: list[list[str]], batches: list[Batch]
) -> tuple[dict[str, torch.Tensor], list[float]]:
    prefix = "transformer.h." if "transformer" in groups[0][0] else "model.layers."
    found, losses = {}, []
    num_tokens = sum(batch.num_label_tokens for batch in batches)
    layers = list(map(dict.fromkeys, groups))
    for shards in gradients_by_segment(model, adapters, layers, prefix, batches, num_tokens):
        found |= shards.shards
        losses.append(shards.loss)
    return found, losses


BATCHES = [batch_of(2, 5), batch_of(3, 9)]
TOKENS = sum(batch.num_label_tokens for batch in BATCHES)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["none", "reentrant", "non"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_the_same_bits_as_one_pass(config: Any, checkpointing: bool | None) -> None:
    model, adapters = model_of(config, torch.bfloat16)
    if checkpointing is not None:
        kwargs = {"use_reentrant": checkpointing}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        if checkpointing:
            model.enable_input_require_grads()
    whole = average_gradients(model, adapters, BATCHES, TOKENS)
    names = list(adapters)
    per_block = len(names) // 4
    # A part of a block, the rest of it, two blocks, and the last block in three parts.
    last = 3 * per_block
    ends = [0, 1, per_block, last, last + 1, last + 2, len(names)]
    groups = [names[i:j] for i, j in pairwise(ends)]
    blocks = model.get_decoder().h if config is GPT2 else model.get_decoder().layers
    originals = list(blocks)
    found, losses = by_segment(model, adapters, groups, BATCHES)
    assert found.keys() == whole.shards.keys()
    for name, G in whole.shards.items():
        assert G.any()
        assert torch.equal(found[name], G), name
    assert losses == [pytest.approx(whole.loss, rel=1e-12)] * 6
    assert all(a is b for a, b in zip(blocks, originals, strict=True)), "the blocks are back"
    assert all(p.grad is None for p in model.parameters())
    assert all(adapter.scale == 1 for adapter in adapters.values())


def test_fp16_keeps_the_signs_of_a_large_sample() -> None:
    """By one pass and by segments. fp16 rounds more finely than bf16, but has no numbers below
    6e-8: a loss that is divided by so many tokens first has gradients of that size.
    """
    num_label_tokens = 400_000
    names = [
        f"model.layers.{i}.{layer}"
        for i in range(4)
        for layer in ("self_attn.q_proj", "mlp.up_proj")
    ]
    signs, of_segments = {}, {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, adapters = model_of(LLAMA, dtype)
        whole = average_gradients(
            model, adapters, BATCHES, num_label_tokens, layers=dict.fromkeys(names)
        )
        signs[dtype] = torch.cat([whole.shards[name].sign().flatten() for name in names])
        groups, found = [dict.fromkeys(names[:4]), dict.fromkeys(names[4:])], {}
        for shards in gradients_by_segment(
            model, adapters, groups, "model.layers.", BATCHES, num_label_tokens
        ):
            found |= shards.shards
            assert shards.loss == pytest.approx(whole.loss, rel=1e-12)
        of_segments[dtype] = torch.cat([found[name].sign().flatten() for name in names])
    for found in (signs, of_segments):
        agree = {dtype: (signs[torch.float32] == M).float().mean() for dtype, M in found.items()}
        assert agree[torch.float16] >= agree[torch.bfloat16] > 0.95, agree


def test_blocks_without_a_wanted_layer() -> None:
    """Below, between and above blocks that have one."""
    model, adapters = model_of(LLAMA)
    wanted = ["model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj"]
    whole = average_gradients(model, adapters, BATCHES, TOKENS, layers=dict.fromkeys(wanted))
    found, _ = by_segment(model, adapters, [[name] for name in wanted], BATCHES)
    assert found.keys() == set(wanted)
    for name in wanted:
        assert torch.equal(found[name], whole.shards[name])


def test_only_a_segment_is_run() -> None:
    model, adapters = model_of(LLAMA)
    runs = [0] * 4
    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    names = list(adapters)
    by_segment(model, adapters, [names[7 * i : 7 * i + 7] for i in range(4)], BATCHES[:1])
    assert runs == [2, 2, 2, 2], "one forward pass more than a whole pass takes"


def test_cut_segments() -> None:
    parts = {"b.4.q": None, "b.4.experts": range(3)}, {"b.4.experts": range(3, 5)}
    two_blocks = {"b.2.q": None, "b.3.q": None}
    assert cut_segments([{"b.1.q": None}, two_blocks, *parts], "b.", 7) == [
        Segment(4, 6, parts[1]),
        Segment(4, 6, parts[0]),
        Segment(2, 3, two_blocks),
        Segment(1, 1, {"b.1.q": None}),
    ]


class Remembers(nn.Module):
    """Adds the input of the block before it."""

    def __init__(self, block: nn.Module, before: Remembers | None) -> None:
        super().__init__()
        self.block, self.before, self.last = block, [before], None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.last = x.detach()
        y = self.block(x, *args, **kwargs)
        before = self.before[0]
        return y if before is None else y + before.last[0, 0]


class Twice(nn.ModuleList):
    """A model that goes through its blocks twice."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__()) * 2)

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, slice) else super().__getitem__(index)


@pytest.mark.parametrize("kind", ["remembers", "shared", "twice"])
def test_models_that_cannot_be_cut(kind: str) -> None:
    model, adapters = model_of(LLAMA)
    layers = model.model.layers
    if kind == "remembers":
        before = None
        for i, block in enumerate(list(layers)):
            layers[i] = before = Remembers(block, before)
    elif kind == "shared":
        layers[3].mlp = layers[0].mlp
    else:
        model.model.layers = Twice(list(layers))
    names = [name for name in adapters if not (kind == "shared" and "3.mlp" in name)]
    groups = [names[:7], names[7:14], names[14:]]
    with pytest.raises(SegmentError):
        by_segment(model, adapters, groups, BATCHES)
    # The init then passes the whole model once for each group.
    work = InitWork(
        {name: (adapters[name].out_features, adapters[name].in_features) for name in names},
        r=4,
        world_size=1,
        update="sign",
        tokens_per_micro_batch=1,
        boundary_bytes=0,
    )
    plan = plan_init(work, None)
    plan = replace(plan, groups=tuple(map(dict.fromkeys, groups)))
    kept = {name: adapters[name] for name in names}
    found = {}
    for shards in gradients_by_group(model, kept, plan, Sample(BATCHES, 5, TOKENS), None, False):
        found |= shards.shards
    whole = average_gradients(model, kept, BATCHES, TOKENS)
    assert found.keys() == whole.shards.keys()
    for name, G in whole.shards.items():
        assert torch.equal(found[name], G), name


def test_blocks_that_return_tuples() -> None:
    config = BloomConfig(vocab_size=50, hidden_size=16, n_layer=4, n_head=2)
    model, adapters = model_of(config)
    whole = average_gradients(model, adapters, BATCHES, TOKENS)
    names = list(adapters)
    groups = [dict.fromkeys(part) for part in (names[:4], names[4:8], names[8:])]
    found = {}
    prefix = "transformer.h."
    for shards in gradients_by_segment(model, adapters, groups, prefix, BATCHES, TOKENS):
        found |= shards.shards
    assert found.keys() == whole.shards.keys()
    for name, G in whole.shards.items():
        assert torch.equal(found[name], G), name

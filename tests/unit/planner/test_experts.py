"""Experts in the plan: bytes in every form and place, adapters, the init, the recommendation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasb_ds.adapters.inject import inject, layer_class_of
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.distributed.collectives import row_range
from lorasb_ds.models.base import Base
from lorasb_ds.models.experts import ExpertsLinear
from lorasb_ds.models.loading import _fill
from lorasb_ds.planner.base_bytes import base_bytes
from lorasb_ds.planner.config_shape import shape_from_config
from lorasb_ds.planner.footprint import footprint, init_plan
from lorasb_ds.planner.gathers import gathers_blocks
from lorasb_ds.planner.init_plan import InitWork, plan_init
from lorasb_ds.planner.known_models import BUILT_IN
from lorasb_ds.planner.placement import Form, Placement
from lorasb_ds.planner.strategies import Cluster, plan, recommended
from lorasb_ds.planner.traffic import init_traffic, step_traffic
from lorasb_ds.system.units import GIB
from tests.unit.planner.test_footprint import footprint_of, work_of

QWEN = shape_from_config("qwen3-30b-a3b", BUILT_IN["qwen3-30b-a3b"])
FORMS: dict[Any, Form] = {None: "bf16", "4bit": "nf4", "8bit": "int8"}


@pytest.mark.parametrize("kind", [None, "4bit", "8bit"])
@pytest.mark.parametrize("sides", [(4, 48, 32), (3, 17, 33), (2, 64, 130)])
def test_experts_are_stored_one_by_one(sides: tuple[int, int, int], kind: Any) -> None:
    layer = ExpertsLinear(*sides, torch.bfloat16, kind)
    numbers, scales = Placement(FORMS[kind], 1).stored_experts(sides)
    assert numbers + scales == layer.weight.nbytes
    halves = {None: 4, "8bit": 2, "4bit": 1}[kind]  # of a byte, for each number
    assert numbers == sides[0] * -(-sides[1] * sides[2] * halves // 2)


@pytest.mark.parametrize("kind", [None, "4bit", "8bit"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_loaded_mixture_has_the_predicted_bytes(
    tiny_family: Callable[[str], Path], family: str, kind: Any
) -> None:
    base = Base(str(tiny_family(family)))
    model = base.empty_model(torch.bfloat16)
    _fill(model, base, kind, None)
    loaded = sum(p.nbytes for p in model.parameters())
    work = work_of(base.shape, expert_targets=base.shape.experts, expert_r=3)
    placement = Placement(FORMS[kind], 1, stage=2)
    memory = footprint(base.shape, placement, work, init_plan(base.shape, work, 1, 2))
    assert memory.base + memory.quantization == loaded
    assert base_bytes(base.shape, placement).whole == loaded
    names = [*base.shape.layers, *base.shape.experts]
    adapters = inject(model, names, work.r, torch.bfloat16, layer_class_of(RunConfig(), 3))
    factors = [p for adapter in adapters.values() for p in adapter.parameters(recurse=False)]
    assert memory.adapters == sum(p.nbytes for p in factors)
    assert work.num_trainable == sum(p.numel() for p in factors if p.requires_grad)
    frozen = sum(p.numel() for p in factors if not p.requires_grad)
    assert work.num_in_pairs == frozen
    assert (memory.host_basis, memory.host_rank0) == (4 * work.num_trainable, 4 * frozen)


def test_experts_in_every_way_to_hold_them() -> None:
    """Qwen3-30B-A3B: computed by hand from its shapes."""
    shape = QWEN
    expert = 768 * 2048  # of each of its three matrices
    experts = 48 * 128 * 3 * expert
    assert shape.num_in_experts == experts
    rest = shape.num_parameters - experts
    whole = footprint_of(shape, Placement("bf16", 1, stage=2))
    quantized = footprint_of(shape, Placement("nf4", 1, stage=2))
    assert whole.base == 2 * (experts + rest)
    # 0.5 bytes and 0.127 bits for each number, but for embedding and head.
    expected = (0.5 + 0.127 / 8) * experts
    assert quantized.base + quantized.quantization == pytest.approx(expected + 1.8e9, rel=0.02)
    narrow = replace(shape, layers=dict.fromkeys(shape.layers, (64, 64)))
    one_expert = footprint_of(narrow, Placement("nf4", 1, stage=2)).dequantized
    assert one_expert == 2 * (2 * expert) + 2 * expert // 64 * 4, "gate and up of one expert"
    # ZeRO-3 with nothing kept gathers one projection at a time, twice that at most; a fourth is
    # held.
    sharded = footprint_of(shape, Placement("bf16", 4))
    assert sharded.base == pytest.approx(whole.base / 4, rel=1e-6)
    assert sharded.gathered == 2 * 2 * (128 * 2 * expert)
    packed = footprint_of(shape, Placement("nf4", 4))
    assert packed.gathered == 2 * 2 * 151936 * 2048, "the embedding is larger now"
    # With checkpointing a whole block is gathered, if it leaves room for a bucket.
    work = work_of(shape, gradient_checkpointing=True)
    roomy = Placement("bf16", 4, max_live_parameters=int(7e8), prefetch_bucket_size=int(5e7))
    assert gathers_blocks(shape, roomy, work)
    assert not gathers_blocks(shape, replace(roomy, max_live_parameters=int(6e8)), work)
    assert gathers_blocks(shape, replace(roomy, form="nf4", max_live_parameters=int(3e8)), work)
    hosted = footprint_of(shape, replace(roomy, offload="cpu", form="nf4"))
    assert hosted.base + hosted.quantization == 0
    assert hosted.host_base == pytest.approx(
        (quantized.base + quantized.quantization + quantized.adapters) / 4, rel=1e-3
    )


def test_adapters_on_experts() -> None:
    shape = QWEN
    placement = Placement("bf16", 4)
    frozen = footprint_of(shape, placement)
    on_experts = {"expert_targets": shape.experts, "expert_r": 8}
    trained = footprint_of(shape, placement, **on_experts)
    work = work_of(shape, **on_experts)
    sides = sum(n * (out + in_) for n, out, in_ in shape.experts.values())
    assert work.num_trainable - work_of(shape).num_trainable == 2 * 48 * 128 * 8**2
    assert trained.adapters - frozen.adapters == 2 * 8 * (sides + 2 * 48 * 128 * 8) // 4
    both = footprint_of(shape, placement, trains_r=False, **on_experts)
    assert work_of(shape, trains_r=False, **on_experts).num_trainable == work.num_in_pairs
    assert both.optimizer > 3 * 8 * sides
    # Of a token in each of 8 experts: r numbers of both projections; the inputs where A is trained.
    tokens = 128 * 48 * 8 * 2
    assert trained.activations - frozen.activations == tokens * 2 * 8
    inputs = footprint_of(shape, placement, trains_r=False).activations
    assert both.activations - inputs == tokens * (2 * 8 + 2048 + 768)
    # Gradients of a rank's experts in fp32.
    assert trained.init.shard_bytes - frozen.init.shard_bytes == 48 * 32 * 3 * 768 * 2048 * 4
    assert trained.gathered - frozen.gathered == 2 * 2 * 128 * 8 * (2 * 768 + 2048)


def test_groups_of_the_init_hold_whole_projections_or_some_of_their_experts() -> None:
    targets = {f"model.layers.{i}.q_proj": (20, 10) for i in range(4)}
    experts = {
        f"model.layers.{i}.experts.{name}": (5, *sides)
        for i in range(4)
        for name, sides in (("gate_up_proj", (12, 10)), ("down_proj", (10, 6)))
    }
    options: dict[str, Any] = {
        "r": 4,
        "world_size": 2,
        "update": "sign",
        "tokens_per_micro_batch": 7,
        "boundary_bytes": 0,
        "experts": experts,
        "experts_per_token": 2,
        "expert_r": 2,
    }
    work = InitWork(targets, **options)
    plan = plan_init(work, None)
    owned = max(len(row_range(5, rank, 2)) for rank in range(2))
    of_a_block = 4 * (10 * 10 + owned * (120 + 60))
    assert plan.shard_bytes == 4 * of_a_block
    # x and δ of both ranks' tokens for one rank's experts: of two projections; sorted; in fp32. And
    # one gradient.
    sent = 7 * 2 * 22 * 2
    received = 2 * sent
    assert plan.backward_bytes == 2 * (sent + received) + received + 2 * received + 120 * 4
    # A process alone has fp32 x and δ of an expert to which all 7 tokens go.
    alone = plan_init(InitWork({}, **options | {"world_size": 1}), None)
    assert alone.backward_bytes == 7 * 22 * 4 + 120 * 4
    # Many tokens for few experts: sums of a rank's experts of two projections.
    many = plan_init(InitWork({}, **options | {"tokens_per_micro_batch": 700}), None)
    of_sums = 700 * 22 * 4 + (1 + 2 * owned) * 120 * 4
    received = 5 * 120 * 4  # no more
    assert many.backward_bytes == max(of_sums, 2 * (100 * sent + received) + 3 * received + 120 * 4)
    groups = plan_init(work, plan.workspace_bytes + 2 * of_a_block).groups
    assert [len(group) for group in groups] == [6, 6]
    assert list(groups[0].items())[:3] == [
        ("model.layers.0.q_proj", None),
        ("model.layers.0.experts.gate_up_proj", range(5)),
        ("model.layers.0.experts.down_proj", range(5)),
    ]
    # Room for two experts of gate_up_proj on each rank: as few groups as that allows.
    divided = plan_init(work, plan.workspace_bytes + 4 * 2 * 120)
    assert not divided.exceeds_budget
    assert divided.shard_bytes <= 4 * 2 * 120
    of_block_0 = [group for group in divided.groups if "model.layers.0" in next(iter(group))]
    gate_up, down = (f"model.layers.0.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    assert of_block_0 == [
        {"model.layers.0.q_proj": None, gate_up: range(2)},
        {gate_up: range(2, 5)},
        {down: range(5)},
    ]
    # Also where hidden states take some of the budget, no more of them than there are blocks.
    stored = InitWork(targets, **options | {"boundary_bytes": 50})
    budget = plan.workspace_bytes + 4 * 2 * 120 + 5 * 50
    assert plan_init(stored, budget).groups == divided.groups
    # The whole block is run for each.
    assert divided.blocks_of_groups(4) == [1] * 12
    assert divided.passes == 3
    assert plan.blocks_of_groups(4) == [4]
    assert plan.passes == 1
    # Experts alone, too.
    alone = plan_init(InitWork({}, **options), None)
    assert alone.prefix == "model.layers."
    assert alone.shard_bytes == 4 * 4 * owned * 180


def test_no_passes_for_next_to_nothing() -> None:
    """A budget below the work on one layer: more passes, but not one for every expert."""
    work = InitWork(
        {f"h.{i}.q_proj": (4096, 2048) for i in range(8)},
        r=96,
        world_size=1,
        update="sign",
        tokens_per_micro_batch=512,
        boundary_bytes=0,
        experts={f"h.{i}.experts.down_proj": (128, 2048, 768) for i in range(8)},
        expert_r=8,
    )
    plan = plan_init(work, 1)
    assert plan.exceeds_budget
    assert plan.passes <= 16
    assert plan.predicted_bytes < plan_init(work, None).predicted_bytes / 30


@given(
    num_experts=st.integers(1, 9),
    world_size=st.integers(1, 5),
    budget=st.integers(1, 2 * 10**5),
    num_blocks=st.integers(1, 4),
)
def test_every_expert_once(num_experts: int, world_size: int, budget: int, num_blocks: int) -> None:
    experts = {f"h.{i}.experts.down_proj": (num_experts, 30, 20) for i in range(num_blocks)}
    work = InitWork(
        {f"h.{i}.q_proj": (20, 20) for i in range(num_blocks)},
        r=1,
        world_size=world_size,
        update="sign",
        tokens_per_micro_batch=7,
        boundary_bytes=100,
        experts=experts,
        expert_r=1,
    )
    plan = plan_init(work, budget)
    for name in experts:
        parts = [group[name] for group in plan.groups if name in group]
        assert [expert for part in parts for expert in part or ()] == list(range(num_experts))
    held = [
        sum(
            4 * 600 * max(len(row_range(len(part), rank, world_size)) for rank in range(world_size))
            if part is not None
            else 4 * 20 * -(-20 // world_size)
            for part in group.values()
        )
        for group in plan.groups
    ]
    assert plan.shard_bytes == max(held)
    assert plan.exceeds_budget == (plan.predicted_bytes > budget)
    assert 1 <= plan.passes <= num_experts + 1


def test_what_a_step_and_the_init_send() -> None:
    placement = Placement("bf16", 4)
    frozen, trained = (
        work_of(QWEN, expert_targets=experts, expert_r=8) for experts in ({}, QWEN.experts)
    )
    step = step_traffic(QWEN, placement, frozen).bytes
    # All but embedding and head twice.
    assert step == pytest.approx(2 * 2 * QWEN.num_parameters * 3 / 4, rel=0.02)
    factors = sum(8 * n * (out + in_) for n, out, in_ in QWEN.experts.values())
    more = step_traffic(QWEN, placement, trained).bytes - step
    assert more == pytest.approx((2 * 2 * factors + 6 * 48 * 256 * 64) * 3 / 4, rel=1e-3)
    sent = [
        init_traffic(QWEN, placement, work, footprint(QWEN, placement, work, of)).bytes
        for work in (frozen, trained)
        if (of := init_plan(QWEN, work, 4, 2))
    ]
    rounds = trained.init_rounds(4)
    # Of each expert of a token x and δ, which is far less than the gradients.
    rows = trained.tokens * QWEN.experts_per_token
    widths = sum(out + in_ for _, out, in_ in QWEN.experts.values())
    activations = rows * widths * 2 * 3 / 4
    gathers = 2 * 2 * factors * 3 / 4
    directions = 4 * factors * 3 / 4
    expected = rounds * (activations + gathers) + directions
    assert sent[1] - sent[0] == pytest.approx(expected, rel=1e-3)


def test_quantization_that_saves_little_is_not_recommended() -> None:
    """As where experts are not reached: all of them are other parameters."""
    experts = {n: k * out * in_ for n, (k, out, in_) in QWEN.experts.items()}
    unreached = replace(
        QWEN,
        experts={},
        others={**QWEN.others, **experts},
        experts_per_token=0,
        num_unreached=sum(experts.values()),
    )
    cluster = Cluster(1, 8, 80 * GIB)
    plans = {p.strategy.name: p for p in plan(unreached, cluster, work_of(unreached))}
    whole, quantized = plans["bf16, ZeRO-3"], plans["4-bit, ZeRO-3"]
    assert quantized.saves_little
    assert quantized.step.bytes < whole.step.bytes, "a little: it would be recommended"
    assert recommended([quantized, whole]) is whole
    assert recommended([quantized, replace(whole, fits=False)]) is quantized
    reached = plan(QWEN, cluster, work_of(QWEN))
    assert not any(p.saves_little for p in reached)
    best = recommended([p for p in reached if p.strategy.ds_config == "zero3.json"])
    assert best is not None
    assert best.strategy.form == "nf4"

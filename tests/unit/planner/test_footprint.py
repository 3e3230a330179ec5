"""Compare predicted bytes with the tensors of torch and bitsandbytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lorasb_ds.planner.base_bytes import _in_flight_bytes
from lorasb_ds.planner.config_shape import shape_from_config
from lorasb_ds.planner.footprint import (
    Footprint,
    footprint,
    init_plan,
)
from lorasb_ds.planner.known_models import BUILT_IN
from lorasb_ds.planner.placement import Placement, placement_of
from lorasb_ds.planner.workload import Workload

LLAMA_7B = shape_from_config("llama-7b", BUILT_IN["llama-7b"])


def work_of(shape: Any, **changes: Any) -> Workload:
    work = Workload(
        targets=shape.layers,
        r=8,
        max_length=64,
        num_labels=63,
        micro_batch_size=2,
        gradient_checkpointing=False,
        init_samples=4,
    )
    return replace(work, **changes)


def footprint_of(shape: Any, placement: Placement, **changes: Any) -> Footprint:
    work = work_of(shape, **changes)
    init = init_plan(shape, work, placement.world_size, placement.dtype_bytes)
    return footprint(shape, placement, work, init)


@pytest.mark.parametrize("sides", [(64, 64), (192, 64), (100, 130)])
def test_stored_as_bitsandbytes_has_it(sides: tuple[int, int]) -> None:
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(sides, dtype=torch.bfloat16)
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    scales = [state.absmax, state.state2.absmax, state.offset.reshape(1)]
    numbers, of_scales = Placement("nf4", 1).stored(sides)
    assert numbers == codes.nbytes
    assert of_scales - sum(part.nbytes for part in scales) in (0, 1)  # to an even length
    assert (numbers + of_scales) % 2 == 0
    numel = sides[0] * sides[1]
    assert Placement("int8", 1).stored(sides) == (numel, 4 * sides[0])
    assert Placement("bf16", 1).stored(sides) == (weight.nbytes, 0)


def test_ranks_of_layers() -> None:
    """Where all have the same, they are that rank; where some have it, those add what it costs."""
    placement, last = Placement("bf16", 4), "model.layers.31."
    uniform, larger = (footprint_of(LLAMA_7B, placement, r=r) for r in (8, 24))
    same = footprint_of(LLAMA_7B, placement, ranks=dict.fromkeys(LLAMA_7B.layers, 24))
    assert same == larger
    some = {name: 24 for name in LLAMA_7B.layers if name.startswith(last)}
    mixed = footprint_of(LLAMA_7B, placement, ranks=some)
    for part in ("adapters", "optimizer", "host_rank0", "host_basis"):
        of_one_block = (getattr(larger, part) - getattr(uniform, part)) / 32
        assert getattr(mixed, part) == getattr(uniform, part) + of_one_block
    assert mixed.gathered == larger.gathered, "the largest"


def test_parameters_over_ranks() -> None:
    whole = 2 * LLAMA_7B.num_parameters
    alone = footprint_of(LLAMA_7B, Placement("bf16", 1, stage=2))
    assert alone.base == whole
    assert alone.gathered == alone.host == alone.dequantized == 0
    work = work_of(LLAMA_7B)
    factors = 2 * sum(8 * (out + in_ + 8) for out, in_ in work.targets.values())
    assert alone.adapters == factors
    assert alone.optimizer == 12 * work.num_trainable
    shared = footprint_of(LLAMA_7B, Placement("bf16", 4))
    assert shared.base == pytest.approx(whole / 4, rel=1e-6)
    assert shared.adapters == factors / 4
    # What is small stays whole beside its shard: all norms, R, and factors of 8 x 4096.
    kept = footprint_of(LLAMA_7B, Placement("bf16", 4, persistence_threshold=8 * 4096))
    assert kept.base - shared.base == 2 * 65 * 4096
    assert kept.adapters - shared.adapters == 2 * (
        224 * 64 + 8 * 4096 * (2 * 4 * 32 + 32 * 3)  # attention's two sides, one of the MLP's three
    )


def test_four_bit_is_a_little_above_half_a_byte() -> None:
    memory = footprint_of(LLAMA_7B, Placement("nf4", 2))
    numel = sum(out * in_ for out, in_ in LLAMA_7B.layers.values())
    # QLoRA: 0.127 bits a weight for scales with double quantization.
    assert 8 * 2 * memory.quantization / numel == pytest.approx(0.127, abs=2e-3)
    rest = 2 * sum(LLAMA_7B.others.values())
    assert memory.base + memory.quantization == pytest.approx(
        (numel * (0.5 + 0.127 / 8) + rest) / 2, rel=1e-3
    )
    assert memory.dequantized > 2 * 4096 * 11008


def test_offload_and_secondary_copies() -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    on_device = footprint_of(LLAMA_7B, placement_of({"zero_optimization": zero}, "bf16", 8))
    offload = zero | {"offload_param": {"device": "cpu"}}
    hosted = footprint_of(LLAMA_7B, placement_of({"zero_optimization": offload}, "bf16", 8))
    assert hosted.base == 0
    assert hosted.host_base == on_device.base + on_device.adapters
    assert hosted.gathered == on_device.gathered > 0
    hpz = zero | {"zero_hpz_partition_size": 4}
    twice = footprint_of(LLAMA_7B, placement_of({"zero_optimization": hpz}, "bf16", 8))
    assert twice.base == pytest.approx(3 * on_device.base, rel=1e-6)  # 1/8 and 1/4


def test_a_budget_and_checkpointing_bound_what_they_should() -> None:
    placement = Placement("bf16", 2)
    free = footprint_of(LLAMA_7B, placement)
    bounded = footprint_of(LLAMA_7B, placement, init_memory_bytes=2 << 30)
    assert free.init.predicted_bytes > 2 << 30 >= bounded.init.predicted_bytes
    assert bounded.init_peak < free.init_peak
    assert bounded.train_peak == free.train_peak
    assert bounded.init_activations < free.init_activations, "of one segment"
    recomputed = footprint_of(LLAMA_7B, placement, gradient_checkpointing=True)
    assert recomputed.activations == 32 * 2 * 64 * 4096 * 2
    assert recomputed.train_peak < free.train_peak


def test_the_init_s_micro_batches() -> None:
    placement = Placement("bf16", 2)
    same = footprint_of(LLAMA_7B, placement)
    more = footprint_of(LLAMA_7B, placement, init_micro_batch_size=4)
    assert more.init_peak > same.init_peak
    assert more.train_peak == same.train_peak
    of_all = footprint_of(LLAMA_7B, placement, micro_batch_size=4)
    assert more.init_peak == of_all.init_peak


def test_methods_that_train_a_and_b() -> None:
    """Llama-7B, r = 64 in all linear layers: computed by hand from its shapes."""
    placement = Placement("bf16", 2)
    sides = sum(out + in_ for out, in_ in LLAMA_7B.layers.values())
    sb = footprint_of(LLAMA_7B, placement)
    r = 64
    both = footprint_of(LLAMA_7B, placement, r=r, trains_r=False)
    offset = footprint_of(LLAMA_7B, placement, r=r, trains_r=False, offset=True)
    assert offset.adapters == pytest.approx(2 * both.adapters, rel=1e-3)
    assert offset.host_rank0 == 2 * both.host_rank0 == 8 * r * sides
    # Adam's state and the masters of a rank's half of A and B, far more than those of R.
    assert both.optimizer > 12 * r * sides // 2 > 10 * sb.optimizer
    assert both.activations > footprint_of(LLAMA_7B, placement, r=r).activations, "inputs are kept"


def test_an_init_without_a_gradient_takes_none() -> None:
    placement = Placement("bf16", 2)
    of = {
        what: footprint_of(LLAMA_7B, placement, decomposes=what)
        for what in ("gradient", "weight", "nothing")
    }
    assert of["gradient"].init.shard_bytes > 10 << 30
    assert of["weight"].init.shard_bytes == of["nothing"].init.shard_bytes == 0
    assert of["weight"].init.svd_bytes > 4096 * 11008 * 4 > of["nothing"].init.svd_bytes == 0
    assert of["nothing"].init_peak <= of["weight"].init_peak < of["gradient"].init_peak
    tracked = footprint_of(LLAMA_7B, placement, decomposes="nothing", tracks_gradient=True)
    assert tracked.train_peak == of["gradient"].init_peak > of["nothing"].train_peak


def test_offloaded_init_is_on_the_host() -> None:
    placement = Placement("bf16", 2, stage=2)
    free, hosted = (footprint_of(LLAMA_7B, placement, init_offload=o) for o in (False, True))
    assert hosted.host == free.init.shard_bytes
    assert free.init_peak - hosted.init_peak == free.init.shard_bytes


@pytest.mark.parametrize(
    ("stage", "ranks", "in_flight"),
    # Sharded by 2: when the first 8 arrives, the other rank still has its own: 8 + 8 and a share
    # of 4, where 12 stay. By 1: a tensor and its shard at once, of the last one. Whole: what
    # arrives stays. By 4: 8 + 8 and a share of 2, where 6 stay.
    [(3, 2, 8), (3, 1, 4), (2, 1, 0), (2, 2, 0), (3, 4, 12)],
)
def test_what_is_in_flight_while_loading(stage: int, ranks: int, in_flight: int) -> None:
    placement = Placement("bf16", ranks, stage=stage)
    assert _in_flight_bytes([8, 8, 4, 4], placement) == in_flight


def test_an_optimizer_of_whole_matrices_holds_its_state_on_every_rank() -> None:
    """Muon's momentum, and in the step values and gradients: three fp32 numbers for each trained.

    Of AdamW's 12 bytes all are shared out.
    """
    found = {}
    for world_size in (1, 4):
        for whole in (False, True):
            placement = Placement("bf16", world_size)
            found[world_size, whole] = footprint_of(
                LLAMA_7B, placement, r=64, trains_r=False, whole_matrices=whole
            ).optimizer
    num_trained = 64 * sum(sum(sides) for sides in LLAMA_7B.layers.values())
    assert found[4, True] - found[4, False] == (1 + 12 - 3) * num_trained
    assert found[1, True] - found[1, False] == 4 * num_trained

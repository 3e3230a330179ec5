"""What a run will compute, as its options and rows have it: for its footprint."""

from __future__ import annotations

import math
from dataclasses import replace

from lorasb_ds.adapters.peft_methods import PeftPlan
from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.run_config import MATRIX_OPTIMIZERS, RunConfig
from lorasb_ds.data.dataset import TokenizedRows
from lorasb_ds.init.factors import Recipe
from lorasb_ds.models.linear_layers import Shapes
from lorasb_ds.planner.footprint import Footprint
from lorasb_ds.planner.workload import Workload
from lorasb_ds.system.units import GIB


def with_init_of(memory: Footprint, of_init: Footprint) -> Footprint:
    """What a run holds whose init sees other rows than its training."""
    return replace(
        memory,
        init_activations=of_init.init_activations,
        logits=max(memory.logits, of_init.logits),
    )


def workload_of(
    config: RunConfig,
    targets: Shapes,
    peft: PeftPlan | None,
    rows: TokenizedRows,
    init_samples: int,
) -> Workload:
    """What the run computes with these rows, for its footprint."""
    longest, first_label = int(rows.lengths.max()), int(rows.first_labels.min())
    if config.packing:
        longest, first_label = config.max_length, 0
    budget = config.init_memory_gib
    method = METHODS.get(config.method)
    work = Workload(
        targets=targets,
        r=config.r,
        max_length=longest,
        num_labels=longest - max(1, first_label),
        micro_batch_size=config.micro_batch_size,
        gradient_checkpointing=config.gradient_checkpointing,
        init_samples=init_samples,
        init_memory_bytes=None if budget is None else int(budget * GIB),
        init_offload=config.init_offload,
        whole_matrices=config.optimizer in MATRIX_OPTIMIZERS,
        tracks_gradient=config.track_alignment is not None,
    )
    if method is not None:
        return replace(
            work,
            init_update=Recipe.of(config).update,
            trains_r=method.trains_r,
            offset=method.offset,
            directions=method.directions,
            decomposes=method.source,
        )
    assert peft is not None, "a method is one of METHODS, or PEFT's"
    # As a LoRA of about as many numbers would have it: what PEFT's layers keep of activations
    # differs from type to type.
    sizes = tuple(math.prod(shape) for shape in peft.trained.values())
    both_sides = sum(out + in_ for out, in_ in targets.values())
    return replace(
        work,
        r=max(1, sum(sizes) // both_sides),
        trains_r=False,
        trained_sizes=sizes,
        num_kept=peft.num_kept,
    )

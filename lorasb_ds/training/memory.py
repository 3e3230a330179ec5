"""What a run will compute, as its options and rows have it: for its footprint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorasb_ds.adapters.peft_methods import PeftPlan
from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.run_config import MATRIX_OPTIMIZERS, RunConfig
from lorasb_ds.data.dataset import TokenizedRows
from lorasb_ds.distributed import accelerator
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.factors import Recipe
from lorasb_ds.models.linear_layers import Shapes
from lorasb_ds.planner.footprint import Footprint
from lorasb_ds.planner.model_shape import ModelShape
from lorasb_ds.planner.strategies import Cluster, needed, plan, recommended
from lorasb_ds.planner.traffic import CPU_SPEEDS, GPU_SPEEDS
from lorasb_ds.planner.workload import Workload
from lorasb_ds.system.host_memory import available_bytes, ranks_of_host
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


@dataclass(frozen=True)
class Forecast:
    """Peaks of a rank's device; on CPUs of rank 0's process, above what it holds when it joins."""

    phases: dict[str, int]
    runtime_bytes: int  # of GPUs, beside tensors; in none of the phases
    needed_bytes: int
    free_bytes: int
    problem: str | None  # why it does not fit, and what would

    def describe(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "problem"}

    def __str__(self) -> str:
        phase = max(self.phases, key=lambda name: self.phases[name])
        return (
            f"predicted peak {self.needed_bytes / GIB:.2f} GiB a process ({phase}), of "
            f"{self.free_bytes / GIB:.2f} free"
        )


def this_cluster(world_size: int) -> Cluster:
    """The hosts of this job, all like this one, with the memory that is free now."""
    local_ranks = min(ranks_of_host(), world_size)
    cpu, host = accelerator.name() == "cpu", available_bytes()
    return Cluster(
        nodes=max(1, world_size // local_ranks),
        ranks_per_node=local_ranks,
        memory_bytes=host // local_ranks if cpu else accelerator.free_device_bytes(),
        host_memory_bytes=host,
        cpu=cpu,
        speeds=CPU_SPEEDS if cpu else GPU_SPEEDS,
    )


def forecast(
    shape: ModelShape, memory: Footprint, work: Workload, cluster: Cluster, init_is_given: bool
) -> Forecast:
    """A run's footprint against a cluster's free memory; where it is too large, what would fit.

    Args:
        init_is_given: by --init-from, so that its memory is not taken.
    """
    phases = memory.phases(cluster.cpu)
    if init_is_given:
        del phases["init"]
    device = max(phases.values()) + cluster.runtime_bytes
    _, host = needed(memory, cluster)
    problems = []
    if device > cluster.memory_bytes:
        problems.append(
            f"It needs {device / GIB:.2f} GiB a process, and {cluster.memory_bytes / GIB:.2f} are "
            "free"
        )
    if cluster.host_memory_bytes is not None and host > cluster.host_memory_bytes:
        problems.append(
            f"It needs {host / GIB:.2f} GiB of host memory, and "
            f"{cluster.host_memory_bytes / GIB:.2f} are free"
        )
    problem = None
    if problems:
        best = recommended(plan(shape, cluster, work))
        remedy = (
            f"What would fit: {' '.join(best.options)}."
            if best is not None
            else f"Nothing fits on {cluster.world_size} of them: use more, or see `lorasb plan`."
        )
        problem = (
            f"The run does not fit. {'. '.join(problems)} ("
            + ", ".join(f"{name} {peak / GIB:.2f}" for name, peak in phases.items())
            + f"). {remedy} --force starts it all the same."
        )
    return Forecast(phases, cluster.runtime_bytes, device, cluster.memory_bytes, problem)


def check_fits(found: Forecast, force: bool) -> None:
    """Refuse a run that cannot fit.

    Raises:
        ConfigError: what is needed, what is free, and what would fit.
    """
    if found.problem is not None and not force:
        raise ConfigError(found.problem)

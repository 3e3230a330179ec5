"""The memory of a run: what its options and rows will take, compared with what is free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.training_options import MATRIX_OPTIMIZERS
from lorasb_ds.data.dataset import TokenizedRows
from lorasb_ds.data.run_rows import Data
from lorasb_ds.distributed import accelerator
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.factors import InitSettings
from lorasb_ds.planner.footprint import Footprint, footprint, init_plan
from lorasb_ds.planner.model_shape import ModelShape
from lorasb_ds.planner.placement import Form, Placement, placement_of
from lorasb_ds.planner.strategies import Cluster, needed, plan, recommended
from lorasb_ds.planner.workload import Workload
from lorasb_ds.system.host_memory import available_bytes, ranks_of_host
from lorasb_ds.system.units import GIB
from lorasb_ds.training.adapter_plan import AdapterPlan


@dataclass(frozen=True)
class RunMemory:
    """What a run holds at its peaks, planned before anything is loaded, and what is free.

    Peaks are those of tensors on a rank's device; on CPUs those of rank 0's process, above what it
    holds when it joins.

    Attributes:
        shape: of the base.
        placement: where the base is kept, and in which form.
        workload: what the run computes with its rows.
        footprint: bytes of a process, by what they are of.
        cluster: the hosts, with the memory that was free before the run began.
        computes_init: whether the run computes its init; it takes no memory if it is loaded.
    """

    shape: ModelShape
    placement: Placement
    workload: Workload
    footprint: Footprint
    cluster: Cluster
    computes_init: bool = True

    @property
    def phases(self) -> dict[str, int]:
        """Phase ("load", "init", "train") -> bytes of a process at its peak."""
        phases = self.footprint.phases(self.cluster.cpu)
        return {k: peak for k, peak in phases.items() if k != "init" or self.computes_init}

    @property
    def needed_bytes(self) -> int:
        """Bytes of a process at its highest peak, with what a GPU holds beside tensors."""
        return max(self.phases.values()) + self.cluster.runtime_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that were free for each process before the run began."""
        return self.cluster.memory_bytes

    @cached_property
    def problem(self) -> str | None:
        """Why the run does not fit, and what would; None if it fits."""
        cluster, (_, host) = self.cluster, needed(self.footprint, self.cluster)
        problems = []
        if self.needed_bytes > self.free_bytes:
            problems.append(
                f"It needs {self.needed_bytes / GIB:.2f} GiB a process, and "
                f"{self.free_bytes / GIB:.2f} are free"
            )
        if cluster.host_memory_bytes is not None and host > cluster.host_memory_bytes:
            problems.append(
                f"It needs {host / GIB:.2f} GiB of host memory, and "
                f"{cluster.host_memory_bytes / GIB:.2f} are free"
            )
        if not problems:
            return None
        best = recommended(plan(self.shape, cluster, self.workload))
        remedy = (
            f"What would fit: {' '.join(best.options)}."
            if best is not None
            else f"Nothing fits on {cluster.world_size} of them: use more, or see `lorasb plan`."
        )
        peaks = ", ".join(f"{name} {peak / GIB:.2f}" for name, peak in self.phases.items())
        return (
            f"The run does not fit. {'. '.join(problems)} ({peaks}). {remedy} --force starts it "
            "all the same."
        )

    def check_fits(self) -> None:
        """Refuse a run that cannot fit.

        Raises:
            ConfigError: what is needed, what is free, and what would fit.
        """
        if self.problem is not None:
            raise ConfigError(self.problem)

    def describe(self) -> dict[str, Any]:
        """Return what run.json holds of the prediction."""
        return {
            "phases": self.phases,
            "runtime_bytes": self.cluster.runtime_bytes,
            "needed_bytes": self.needed_bytes,
            "free_bytes": self.free_bytes,
        }

    def __str__(self) -> str:
        phase = max(self.phases, key=lambda name: self.phases[name])
        return (
            f"predicted peak {self.needed_bytes / GIB:.2f} GiB a process ({phase}), of "
            f"{self.free_bytes / GIB:.2f} free"
        )


def plan_memory(
    config: RunConfig,
    ds_config: Mapping[str, Any],
    shape: ModelShape,
    adapter: AdapterPlan,
    head_size: int,
    data: Data,
    gradient_rows: Sequence[int],
    probe_rows: Sequence[int],
    *,
    num_rebasings: int,
    world_size: int,
    computes_init: bool,
) -> RunMemory:
    """Plan a run's memory. Not collective.

    Args:
        head_size: elements of a classification head, which is trained, too; 0 without one.
        gradient_rows: rows of ``data.init`` that the init's gradient is of.
        probe_rows: those that its losses are measured on.
        num_rebasings: how often the run is re-based, each time with other rows of ``data.init``.
    """
    form: Form = "nf4" if config.load_in_4bit else "int8" if config.load_in_8bit else config.dtype
    placement = placement_of(ds_config, form, world_size)
    all_rows = range(len(data.init.examples))
    kept = {"max_kept": num_rebasings}
    workload = workload_of(config, adapter, data.train, len(gradient_rows), head_size, **kept)
    longest = int(data.init.lengths[all_rows if num_rebasings else gradient_rows].max())
    of_sample = replace(workload, max_length=longest)
    init = init_plan(shape, of_sample, world_size, placement.dtype_bytes)
    planned = footprint(shape, placement, workload, init)
    if config.init_data is not None:  # whose rows may be longer, or shorter
        sample = data.init.select(all_rows if num_rebasings else [*gradient_rows, *probe_rows])
        work = workload_of(config, adapter, sample, len(gradient_rows), head_size, **kept)
        of_init = footprint(shape, placement, work, init)
        planned = replace(
            planned,
            init_activations=of_init.init_activations,
            init_logits=of_init.init_logits,
            init_block_backward=of_init.init_block_backward,
            host_activations=max(planned.host_activations, of_init.host_activations),
            logits=max(planned.logits, of_init.logits),
        )
    cluster = this_cluster(world_size)
    return RunMemory(shape, placement, workload, planned, cluster, computes_init)


def workload_of(
    config: RunConfig,
    adapter: AdapterPlan,
    rows: TokenizedRows,
    init_samples: int,
    head_size: int = 0,
    max_kept: int = 0,
) -> Workload:
    """Describe what a run computes with some rows, for the planner.

    Args:
        init_samples: number of rows that the init's gradient is of.
        head_size: elements of a classification head.
        max_kept: how many updates in earlier bases a layer may keep.
    """
    longest, first_label = int(rows.lengths.max()), int(rows.first_labels.min())
    if config.packing:
        longest, first_label = config.max_length, 0
    budget = config.init_memory_gib
    method = METHODS.get(config.method)
    work = Workload(
        targets=adapter.targets,
        r=config.r,
        ranks=adapter.ranks,
        max_length=longest,
        num_labels=0 if config.classifies else longest - max(1, first_label),
        micro_batch_size=config.micro_batch_size,
        gradient_checkpointing=config.gradient_checkpointing,
        init_samples=init_samples,
        activation_offload=config.activation_offload,
        sequence_parallel=config.sequence_parallel,
        init_micro_batch_size=config.init_micro_batch_size,
        init_memory_bytes=None if budget is None else int(budget * GIB),
        init_offload=config.init_offload,
        whole_matrices=config.optimizer in MATRIX_OPTIMIZERS,
        tracks_gradient=config.track_alignment is not None,
        expert_targets=adapter.experts,
        expert_r=adapter.expert_r,
        head_size=head_size,
        max_kept=max_kept,
    )
    if method is not None:
        return replace(
            work,
            init_update=InitSettings.from_config(config).update,
            trains_r=method.trains_r,
            offset=method.offset,
            directions=method.directions,
            decomposes=method.decomposes,
        )
    peft = adapter.peft
    assert peft is not None, "a method is one of METHODS, or PEFT's"
    # As a LoRA of about as many numbers would have it: what PEFT's layers keep of activations
    # differs from type to type.
    sizes = tuple(math.prod(shape) for shape in peft.trained.values())
    both_sides = sum(out + in_ for out, in_ in adapter.targets.values())
    return replace(
        work,
        r=max(1, sum(sizes) // both_sides),
        trains_r=False,
        trained_sizes=sizes,
        num_kept=peft.num_kept,
    )


def this_cluster(world_size: int) -> Cluster:
    """Describe this job's hosts, all like this one, with the memory that is free now."""
    local_ranks = min(ranks_of_host(), world_size)
    cpu, host = accelerator.name() == "cpu", available_bytes()
    return Cluster(
        nodes=max(1, world_size // local_ranks),
        ranks_per_node=local_ranks,
        memory_bytes=host // local_ranks if cpu else accelerator.free_device_bytes(),
        host_memory_bytes=host,
        cpu=cpu,
    )

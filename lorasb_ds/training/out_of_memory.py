"""Explanation of an out-of-memory error: what held the memory, and what would take less."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from lorasb_ds.config.paths import SHIPPED_DS_CONFIGS, read_json
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.planner.footprint import (
    CPU_LOAD_BYTES,
    CPU_RUNTIME_BYTES,
    Footprint,
    footprint,
    init_plan,
)
from lorasb_ds.planner.placement import Placement, placement_of
from lorasb_ds.planner.strategies import BUDGETS_GIB
from lorasb_ds.planner.traffic import step_traffic
from lorasb_ds.planner.workload import Workload
from lorasb_ds.system.units import GIB
from lorasb_ds.training.memory import RunMemory

Phase = Literal["load", "init", "train", "evaluation", "save"]

NUM_REMEDIES = 3
SHOWN_BYTES = GIB // 100
# Messages of allocators that raise a plain RuntimeError: torch's on the CPU, and those of CUDA's
# libraries and NCCL (include/alloc.h). cuSOLVER calls a handle without memory an internal error.
MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "when calling `cusolverDnCreate(handle)`",
    "CUDNN_STATUS_ALLOC_FAILED",
    "'out of memory'",
    "Failed to CUDA calloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the host has no memory left."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    return any(
        isinstance(cause, MemoryError | torch.OutOfMemoryError)
        or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
        or (isinstance(cause, RuntimeError) and any(text in str(cause) for text in MESSAGES))
        for cause in causes
    )


class OutOfMemoryError(MemoryError):
    """An out-of-memory error with the message of ``explain``."""


@dataclass(frozen=True)
class Remedy:
    """A change of options that makes a phase smaller."""

    options: str
    saved_bytes: int  # planned, for one process
    recomputes: bool  # the forward pass, which is not recomputed now
    more_traffic_bytes: int  # received by a process in an optimizer step, beyond what it is now
    price: str  # what it changes in the result or the machine; empty: nothing


def explain(
    phase: Phase,
    error: BaseException,
    in_use_bytes: int,
    memory: RunMemory,
    config: RunConfig,
    name: str | None = None,
) -> str:
    """Return the message for a process that ran out of memory: what was planned, what needs less.

    Args:
        in_use_bytes: of this process, as measured now.
        name: what the user knows the phase by. [default: ``phase``]
    """
    held = parts(memory.footprint, phase, memory.cluster.cpu)
    if memory.cluster.runtime_bytes:
        held["runtime"] = memory.cluster.runtime_bytes
    largest_first = sorted(held.items(), key=lambda part: -part[1])
    lines = [
        f"Out of memory ({name or phase}). Planned were {_gib(sum(held.values()))} GiB a process "
        f"in this phase; {_gib(memory.free_bytes)} were free before the run began, and "
        f"{_gib(in_use_bytes)} are in use now.",
        "",
        "Planned, in GiB of a process:",
        *(f"  {_gib(size):>8}  {name}" for name, size in largest_first if size >= SHOWN_BYTES),
        "",
    ]
    found = remedies(phase, memory, config)[:NUM_REMEDIES]
    if found:
        lines.append("What needs less in this phase, cheapest first:")
        lines += [f"  {remedy.options}: {_describe(remedy)}" for remedy in found]
    else:
        lines.append("No option of this run makes this phase smaller.")
    lines += [
        "`lorasb plan` compares all ways to hold the model.",
        "",
        f"The error was: {str(error).strip().partition(chr(10))[0] or type(error).__name__}",
    ]
    return "\n".join(lines)


def parts(memory: Footprint, phase: Phase, one_memory: bool) -> dict[str, int]:
    """Return the bytes of a process at the peak of a phase, by what they are of.

    Those of "load" and "init" add up to ``Footprint.phases``; the larger sum of "train" and "save"
    is its "train".

    Args:
        one_memory: whether device and host are one (CPUs); otherwise only the device counts.
    """
    held = {
        "base": memory.base,
        "quantization state": memory.quantization,
        "A, B, R": memory.adapters,
        "optimizer": memory.optimizer,
    }
    passing = {"gathered": memory.gathered, "dequantized layer": memory.dequantized}
    logits = {"logits": memory.init_logits if phase == "init" else memory.logits}
    if phase == "load":
        reading = {k: held[k] for k in ("base", "quantization state")}
        reading |= {"tensors on their way": memory.load_in_flight}
        held = _larger(reading, held | passing)
    elif phase == "init":
        if one_memory or not memory.host_init:
            held["gradients of layers"] = memory.init.shard_bytes
            held["hidden states between groups"] = memory.init.boundary_bytes
        backward = {
            "one block's backward pass": memory.init_block_backward,
            "work on one layer": memory.init.backward_bytes,
        }
        steps = passing | {"activations": memory.init_activations}
        steps |= _larger(logits, backward)
        held |= _larger(steps, {"work on one layer": memory.init.svd_bytes})
        if one_memory:
            held["R as found"] = memory.host_basis
    elif phase == "train":
        backward = {"one block's backward pass": memory.block_backward}
        held |= passing | {"activations": memory.activations} | _larger(logits, backward)
    elif phase == "evaluation":
        held |= passing | logits
    elif one_memory:
        held["A and B, whole and in fp32"] = memory.host_rank0
    if one_memory:
        held["offloaded base"] = memory.host_base
        if phase in ("init", "train"):
            held["offloaded inputs of blocks"] = memory.host_activations
        held["runtime"] = CPU_LOAD_BYTES if phase == "load" else CPU_RUNTIME_BYTES
    return held


def remedies(phase: Phase, memory: RunMemory, config: RunConfig) -> list[Remedy]:
    """Return the changes that make a phase smaller.

    First those that change neither result nor machine, in the planner's order (no pass recomputed,
    then the fewest bytes received in a step); then those with a price.
    """
    shape, cluster, work = memory.shape, memory.cluster, memory.workload

    def bytes_of(placement: Placement, work: Workload) -> int:
        init = init_plan(shape, work, placement.world_size, placement.dtype_bytes)
        return sum(parts(footprint(shape, placement, work, init), phase, cluster.cpu).values())

    def traffic_of(placement: Placement, work: Workload, micro_batches: int) -> int:
        traffic = step_traffic(shape, placement, work).total_bytes
        return traffic * micro_batches * config.gradient_accumulation_steps

    before = bytes_of(memory.placement, work)
    traffic_before = traffic_of(memory.placement, work, 1)
    found = []
    for change in _changes(phase, memory, config):
        saved = before - bytes_of(change.placement, change.work)
        if saved >= SHOWN_BYTES:
            recomputes = change.work.gradient_checkpointing and not work.gradient_checkpointing
            traffic = traffic_of(change.placement, change.work, change.micro_batches)
            more = traffic - traffic_before
            found.append(Remedy(change.options, saved, recomputes, more, change.price))
    free = [remedy for remedy in found if not remedy.price]
    priced = [remedy for remedy in found if remedy.price]
    return sorted(free, key=lambda r: (r.recomputes, r.more_traffic_bytes)) + priced


@dataclass(frozen=True)
class _Change:
    options: str
    placement: Placement
    work: Workload
    micro_batches: int = 1  # for each one now
    price: str = ""


def _changes(phase: Phase, memory: RunMemory, config: RunConfig) -> Iterator[_Change]:
    """Yield every option that may help and is not on already; of equals, the best first.

    Those with a price come last, the lowest price first.
    """
    placement, work, cluster = memory.placement, memory.workload, memory.cluster
    if phase == "init":
        if work.init_memory_bytes is None:
            whole = init_plan(memory.shape, work, placement.world_size, placement.dtype_bytes)
            half = [g for g in BUDGETS_GIB if g * GIB <= whole.predicted_bytes / 2]
            if half:
                bounded = replace(work, init_memory_bytes=int(half[0] * GIB))
                yield _Change(f"--init-memory-gib {half[0]:g}", placement, bounded)
        if not work.init_offload:
            yield _Change("--init-offload", placement, replace(work, init_offload=True))
        if (size := work.in_init.micro_batch_size) > 1:
            fewer = replace(work, init_micro_batch_size=size // 2)
            yield _Change(f"--init-micro-batch-size {size // 2}", placement, fewer)
    elif (size := work.micro_batch_size) > 1:
        rows = max(n for n in range(1, size // 2 + 1) if size % n == 0)
        accumulation = config.gradient_accumulation_steps * (size // rows)
        yield _Change(
            f"--micro-batch-size {rows} --gradient-accumulation-steps {accumulation}",
            placement,
            replace(work, micro_batch_size=rows),
            micro_batches=size // rows,
        )
    if not work.gradient_checkpointing:
        checkpointed = replace(work, gradient_checkpointing=True)
        yield _Change("--gradient-checkpointing", placement, checkpointed)
    elif not (work.activation_offload or cluster.cpu):
        offloaded = replace(work, activation_offload=True)
        yield _Change("--activation-offload", placement, offloaded)
    if placement.form == "bf16":  # which is what quantized bases compute in
        rounded = "the base is rounded"
        yield _Change("--load-in-8bit", replace(placement, form="int8"), work, price=rounded)
        yield _Change("--load-in-4bit", replace(placement, form="nf4"), work, price=rounded)
    files = ["zero3.json"] if not placement.sharded and placement.world_size > 1 else []
    if placement.offload == "none" and not cluster.cpu:
        files.append("zero3_offload.json")
    for file in files:
        ds_config = read_json(str(SHIPPED_DS_CONFIGS / file), "--ds-config")
        elsewhere = placement_of(ds_config, placement.form, placement.world_size)
        yield _Change(f"--ds-config ds_configs/{file}", elsewhere, work)
    length = work.max_length // 2
    if length >= 8:
        shorter = replace(
            work, max_length=length, num_labels=max(1, work.num_labels - (work.max_length - length))
        )
        yield _Change(
            f"--max-length {length}",
            placement,
            shorter,
            price=f"rows of up to {work.max_length} tokens are cut off",
        )
    if placement.sharded and not cluster.cpu:
        more = replace(placement, world_size=2 * placement.world_size)
        yield _Change(f"{more.world_size} GPUs", more, work, price="more machines")


def _larger(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Return the larger of two parts that are not held at the same time."""
    return max(one, other, key=lambda part: sum(part.values()))


def _describe(remedy: Remedy) -> str:
    costs = []
    if remedy.recomputes:
        costs.append("the forward pass is computed twice")
    if remedy.more_traffic_bytes >= SHOWN_BYTES:
        costs.append(f"each process receives {_gib(remedy.more_traffic_bytes)} GiB more in a step")
    if remedy.price:
        costs.append(remedy.price)
    cost = "; ".join(costs) or "a step computes and sends as much as now"
    return f"{_gib(remedy.saved_bytes)} GiB less; {cost}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"

"""Compare the ways to hold a base on a cluster, and recommend one. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from lorasb_ds.config.paths import SHIPPED_DS_CONFIGS, read_json
from lorasb_ds.config.sequence_parallel import group_problems
from lorasb_ds.errors import ConfigError
from lorasb_ds.planner.base_bytes import base_bytes
from lorasb_ds.planner.footprint import Footprint, footprint, init_plan
from lorasb_ds.planner.init_plan import InitPlan
from lorasb_ds.planner.model_shape import ModelShape
from lorasb_ds.planner.placement import Form, Placement, placement_of
from lorasb_ds.planner.traffic import Traffic, init_traffic, step_traffic
from lorasb_ds.planner.workload import Workload
from lorasb_ds.system.units import GIB

# The driver's context, NCCL's buffers, what torch's allocator keeps back. Assumed.
GPU_RUNTIME_BYTES = 3 << 29
# Quantization that leaves more than this share of the base's bytes is not recommended.
SAVES_LITTLE = 0.9
# Values of --init-memory-gib that are tried where the gradients of all layers do not fit.
BUDGETS_GIB = (64, 32, 16, 8, 4, 2, 1, 0.5, 0.25)


@dataclass(frozen=True)
class Cluster:
    """Equal hosts with equal ranks."""

    nodes: int
    ranks_per_node: int
    memory_bytes: int  # of a rank's device; on CPUs its share of the host's
    host_memory_bytes: int | None = None  # of a host; None: not limited
    cpu: bool = False

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def runtime_bytes(self) -> int:
        """Return what a device holds beside torch's tensors."""
        return 0 if self.cpu else GPU_RUNTIME_BYTES


def cpu_cluster(num_procs: int, memory_bytes: int) -> Cluster:
    """Return one host whose processes share ``memory_bytes`` and compute on its CPU."""
    return Cluster(1, num_procs, memory_bytes // num_procs, cpu=True)


@dataclass(frozen=True)
class Strategy:
    """A way to hold a base."""

    name: str
    form: Form
    ds_config: str  # a shipped one
    options: tuple[str, ...] = ()


STRATEGY_DTYPE_BYTES = 2  # all of them compute in bf16
QUANTIZED = ("--load-in-4bit",)
STRATEGIES = (
    Strategy("bf16 on every rank", "bf16", "zero2.json"),
    Strategy("4-bit on every rank", "nf4", "zero2.json", QUANTIZED),
    Strategy("bf16, ZeRO-3", "bf16", "zero3.json"),
    Strategy("4-bit, ZeRO-3", "nf4", "zero3.json", QUANTIZED),
    Strategy("bf16, ZeRO-3, offloaded", "bf16", "zero3_offload.json"),
    Strategy("4-bit, ZeRO-3, offloaded", "nf4", "zero3_offload.json", QUANTIZED),
)


@dataclass(frozen=True)
class StrategyPlan:
    """What one strategy takes on a cluster.

    Attributes:
        work: as asked for, or changed by the options in ``added`` so that it fits.
        step: received by a rank in a step of one micro-batch.
        init: received by a rank in the whole init.
        needed_bytes: of a rank's device.
        host_needed_bytes: of the first host; 0 on CPUs, where ``needed_bytes`` includes it.
        added: options beyond those that were asked for.
        saves_little: the base is quantized, and takes hardly less for it.
    """

    strategy: Strategy
    placement: Placement
    work: Workload
    memory: Footprint
    step: Traffic
    init: Traffic
    needed_bytes: int
    headroom_bytes: int
    host_needed_bytes: int
    fits: bool
    added: tuple[str, ...]
    saves_little: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """Return the options of `lorasb train` that select this strategy."""
        file = f"ds_configs/{self.strategy.ds_config}"
        return ("--ds-config", file, *self.strategy.options, *self.added)


def needed(memory: Footprint, cluster: Cluster) -> tuple[int, int]:
    """Return the bytes of a rank's device and of the first host, runtime included.

    On CPUs the first number is that of rank 0's process, and the second is 0.
    """
    device = max(memory.phases(cluster.cpu).values()) + cluster.runtime_bytes
    if cluster.cpu:
        return device, 0
    return device, cluster.ranks_per_node * memory.host + memory.host_rank0


def fits(memory: Footprint, cluster: Cluster) -> bool:
    """Tell whether device, host and the init's budget are large enough."""
    device, host = needed(memory, cluster)
    host_fits = cluster.host_memory_bytes is None or host <= cluster.host_memory_bytes
    return device <= cluster.memory_bytes and host_fits and not memory.init.exceeds_budget


def plan(shape: ModelShape, cluster: Cluster, work: Workload) -> list[StrategyPlan]:
    """Plan every strategy that makes sense there, as asked for or with the least change that fits.

    One rank has nothing to shard, and on CPUs there is no other memory to offload to.

    Raises:
        ConfigError: if the ranks cannot be divided into groups that compute rows together.
    """
    if problems := group_problems(work.sequence_parallel, cluster.world_size):
        raise ConfigError(*problems)

    @cache  # the strategies differ in the base, not in the init
    def plan_init(checkpointing: bool, budget: int | None) -> InitPlan:
        changed = replace(work, gradient_checkpointing=checkpointing, init_memory_bytes=budget)
        return init_plan(shape, changed, cluster.world_size, STRATEGY_DTYPE_BYTES)

    return [
        _fitted(shape, cluster, strategy, work, plan_init)
        for strategy in STRATEGIES
        if not (cluster.world_size == 1 and strategy.ds_config == "zero3.json")
        and not (cluster.cpu and "offload" in strategy.ds_config)
    ]


def recommended(plans: Sequence[StrategyPlan]) -> StrategyPlan | None:
    """Choose among the strategies that fit, by counts alone; None if none fits.

    Quantization that saves little comes last: it rounds some weights for nothing. Otherwise first
    come those that compute no forward pass twice, then those that move the fewest bytes in a step,
    from other ranks and from the host; of equals, the first of ``STRATEGIES``.
    """
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return None
    return min(
        fitting,
        key=lambda p: (p.saves_little, p.work.gradient_checkpointing, p.step.total_bytes),
    )


def _fitted(
    shape: ModelShape,
    cluster: Cluster,
    strategy: Strategy,
    work: Workload,
    plan_init: Callable[[bool, int | None], InitPlan],
) -> StrategyPlan:
    """Plan one strategy.

    Args:
        plan_init: of the workload with this checkpointing and this budget.
    """
    ds_config = read_json(str(SHIPPED_DS_CONFIGS / strategy.ds_config), "--ds-config")
    placement = placement_of(ds_config, strategy.form, cluster.world_size)
    base = base_bytes(shape, placement)

    def memory_of(work: Workload) -> Footprint:
        init = plan_init(work.gradient_checkpointing, work.init_memory_bytes)
        return footprint(shape, placement, work, init, base)

    memory = memory_of(work)
    added: tuple[str, ...] = ()
    if not (is_fit := fits(memory, cluster)):
        for changed, options in _changes(work, memory.init.predicted_bytes):
            other = memory_of(changed)
            is_fit = fits(other, cluster)
            if is_fit or needed(other, cluster) < needed(memory, cluster):
                work, memory, added = changed, other, options
            if is_fit:
                break
    device, host = needed(memory, cluster)
    return StrategyPlan(
        strategy=strategy,
        placement=placement,
        work=work,
        memory=memory,
        step=step_traffic(shape, placement, work),
        init=init_traffic(shape, placement, work, memory),
        needed_bytes=device,
        headroom_bytes=cluster.memory_bytes - device,
        host_needed_bytes=host,
        fits=is_fit,
        added=added,
        saves_little=placement.quantized
        and base.whole > SAVES_LITTLE * placement.dtype_bytes * shape.num_parameters,
    )


def _changes(work: Workload, init_bytes: int) -> Iterator[tuple[Workload, tuple[str, ...]]]:
    """Yield workloads that take less memory and more time, the cheapest first."""
    variants: list[tuple[Workload, tuple[str, ...]]] = [(work, ())]
    if not work.gradient_checkpointing:
        checkpointed = replace(work, gradient_checkpointing=True)
        variants.append((checkpointed, ("--gradient-checkpointing",)))
    for variant, added in variants:
        if added:
            yield variant, added
        if work.init_memory_bytes is None:
            for gib in BUDGETS_GIB:
                if gib * GIB < init_bytes:
                    budgeted = replace(variant, init_memory_bytes=int(gib * GIB))
                    yield budgeted, (*added, "--init-memory-gib", f"{gib:g}")


def command(
    plan: StrategyPlan,
    cluster: Cluster,
    model: str,
    hostfile: str | None,
    options: Mapping[str, object],
) -> list[str]:
    """Return the command that starts it, with ``TRAIN.jsonl`` as the data."""
    work = {"--model": model, "--data": "TRAIN.jsonl", **options}
    arguments = [word for pair in work.items() for word in map(str, pair)]
    if plan.work.gradient_checkpointing and "--gradient-checkpointing" not in plan.added:
        arguments.append("--gradient-checkpointing")
    arguments += plan.options
    if cluster.nodes > 1:
        return ["deepspeed", "--hostfile", hostfile or "HOSTFILE", "launcher/train.py", *arguments]
    count = "--num-procs" if cluster.cpu else "--num-gpus"
    return ["lorasb", "train", count, str(cluster.ranks_per_node), *arguments]

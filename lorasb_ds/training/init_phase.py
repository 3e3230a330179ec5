"""The init phase of a run: A, B and R are computed, or loaded from an earlier init."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.adapters.peft_methods import collect_peft, disable_peft
from lorasb_ds.config.methods import METHODS
from lorasb_ds.data.batch import Sample
from lorasb_ds.distributed import zero
from lorasb_ds.init.basis import load_basis
from lorasb_ds.init.basis_file import BasisWriter, basis_sizes
from lorasb_ds.init.factors import Basis, InitSettings
from lorasb_ds.init.init_report import InitReport, no_gradient_report
from lorasb_ds.init.initialize import initialize
from lorasb_ds.init.step_size import measure_step
from lorasb_ds.runs.output_dir import say
from lorasb_ds.system.units import GIB
from lorasb_ds.training.prepare import Prepared


def initialize_by(
    run: Prepared,
    engine: Any,
    adapters: Mapping[str, AdapterLinear],
    sample: Sample,
    probe: Sample,
    keep: Callable[[Basis], None],
) -> InitReport:
    """Call ``initialize`` with a run's options. Collective."""
    return initialize(
        engine,
        adapters,
        sample,
        probe,
        run.memory.footprint.init,
        InitSettings.from_config(run.config),
        init_lr=_init_lr(run, engine) or "auto",
        offload=run.config.init_offload,
        keep=keep,
    )


def _init_lr(run: Prepared, engine: Any) -> Any:
    """Return eta: a number, "auto", or None if no option was given."""
    if run.config.init_lr == "schedule":
        return float(engine.get_lr()[0])
    return run.config.init_lr


def init_phase(
    run: Prepared, engine: Any, adapters: Mapping[str, AdapterLinear], folder: Path
) -> InitReport:
    """Fill A, B and R by the init or from an earlier one, and save them. Collective."""
    of_peft = collect_peft(engine.module) if run.adapter.peft is not None else {}
    sizes = basis_sizes(adapters) | {name: tensor.nbytes for name, tensor in of_peft.items()}
    with written_basis("the basis", folder, sizes, run.made_from) as (keep, finish):
        keep(of_peft)
        report = _make_init(run, engine, adapters, keep)
        finish(report)
    _tell(run, report)
    return report


@contextmanager
def written_basis(
    what: str, folder: Path, sizes: Mapping[str, int], made_from: Mapping[str, Any]
) -> Iterator[tuple[Callable[[Basis], None], Callable[[InitReport], None]]]:
    """Give ``add`` and ``finish`` of a ``BasisWriter`` on rank 0; elsewhere they do nothing.

    Collective.

    Args:
        what: the basis, for messages.
        folder, sizes, made_from: as for ``BasisWriter``.
    Raises:
        OSError: on every rank, if there is no room for it.
    """
    with ExitStack() as stack:
        basis: BasisWriter | None = None
        problem: list[str | None] = [None]
        if zero.rank() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                basis = stack.enter_context(BasisWriter(folder, sizes, made_from))
            except OSError as error:
                problem = [f"{what} cannot be written: {error}"]
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise OSError(f"{problem[0]}. Free some disk space and give --resume.")
        if basis is None:
            yield lambda factors: None, lambda report: None
        else:
            yield basis.add, basis.finish


def _make_init(
    run: Prepared,
    engine: Any,
    adapters: Mapping[str, AdapterLinear],
    keep: Callable[[Basis], None],
) -> InitReport:
    """Compute the init, load it, or report that which PEFT has made already. Collective."""
    config, plan = run.config, run.memory.footprint.init
    probe = run.sample(run.probe_rows)
    if run.adapter.peft is not None:
        return no_gradient_report(measure_step(engine, disable_peft(engine.module), probe))
    if config.init_from is not None and run.stored_init is not None:
        lr = _init_lr(run, engine)
        report = load_basis(engine, adapters, config.init_from, run.stored_init, probe, lr, keep)
        say(f"init loaded from {config.init_from}")
        return report
    if METHODS[config.method].needs_gradient:
        groups = ""
        if len(plan.groups) > 1:
            groups = f", in {len(plan.groups)} groups of layers, {plan.passes:.3g} passes"
        say(
            f"init: gradients and SVD will take {plan.predicted_bytes / GIB:.2f} GiB a process"
            f"{groups}"
        )
    if plan.exceeds_budget:
        say(
            f"warning: --init-memory-gib {config.init_memory_gib:g} is not enough: at least "
            f"{plan.shard_bytes / GIB:.3f} for gradients (more processes: less), "
            f"{plan.boundary_bytes / GIB:.3f} for hidden states (fewer --init-samples: less), "
            f"{plan.workspace_bytes / GIB:.3f} for work on one layer (a smaller --r: less)."
        )
    return initialize_by(run, engine, adapters, run.sample(run.gradient_rows), probe, keep)


def _tell(run: Prepared, report: InitReport) -> None:
    """Print what the init took and found; warn of layers without a step."""
    step, method = report.step, METHODS.get(run.config.method)  # None: PEFT's
    took = (
        f"{report.num_samples} rows, {report.total_s:.1f} s (gradients {report.gradients_s:.1f}, "
        f"communication {report.communication_s:.1f}, SVD {report.svd_s:.1f}); "
    )
    eta = "" if step.init_lr is None else f"eta {step.init_lr:.3g}, "
    say(
        f"init: {took if run.stored_init is None and run.adapter.peft is None else ''}{eta}loss of "
        f"{step.num_samples} other rows {step.loss_before:.4f} -> {step.loss_after:.4f}"
    )
    if report.not_descending:
        where = ", ".join(report.not_descending)
        why = "R starts at 0 there" if method and method.trains_r else "their gradient is 0"
        say(f"warning: no descent in {where}: {why}")
    if report.partly_reached:
        say(f"warning: not called by every micro-batch: {', '.join(report.partly_reached)}")

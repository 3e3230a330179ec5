"""Re-basing: the update so far is kept as it is, and training goes on in a new basis.

    W = W0 + Σ_k B_k R_k A_k + B R A

The gradient leaves the first basis as the weights move (docs/results.md). Every ``--rebase-every``
steps R is frozen where it is, the init's gradient is computed at the present weights, and its step
gives the next B, A and R. The optimizer begins anew, since its averages are in the coordinates of
the old basis; the schedule goes on.

Whatever the basis, the state of a run is that of its last checkpoint: one of step N holds the R
that was trained until then, and a run that is resumed from it is re-based again, from the same
rows. A new basis goes to a folder of its own, with the R that was kept when it was made.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.config.run_layout import BASIS_FILE, rebased_folder, rebasing_steps
from lorasb_ds.distributed import zero
from lorasb_ds.init.basis import load_factors
from lorasb_ds.init.basis_file import basis_sizes
from lorasb_ds.runs.output_dir import say
from lorasb_ds.training.engine_state import reset_optimizer
from lorasb_ds.training.held_out import evaluate
from lorasb_ds.training.init_phase import initialize_by, written_basis
from lorasb_ds.training.phases import phase
from lorasb_ds.training.training_run import TrainingRun


def rebasing_is_due(training: TrainingRun) -> bool:
    """Return whether the run is to be re-based before its next step."""
    every, step = training.run.config.rebase_every, training.state.step
    if every is None or step == 0 or step % every:
        return False
    return next(iter(training.adapters.values())).num_kept < step // every


def rebase(training: TrainingRun) -> None:
    """Keep the update so far and fill A, B and R by another init, at the present weights.

    Collective. The model changes by the init's step alone: what is kept are the factors that it
    computes with.

    Raises:
        OSError: on every rank, if there is no room for the basis. No step is lost: ``save`` comes
            before.
    """
    run, step = training.run, training.state.step
    number = step // (run.config.rebase_every or 1)
    folder = rebased_folder(training.folder, step)
    made_from = {**run.made_from, "re-based after step": step}
    adapters = training.adapters
    sizes = basis_sizes(adapters)
    sizes |= {f"{n}.kept_R": 4 * a.factor_shape("lora_R").numel() for n, a in adapters.items()}
    with written_basis(f"the basis after step {step}", folder, sizes, made_from) as (keep, finish):
        for name, adapter in adapters.items():
            R = keep_update(adapter)
            keep({} if R is None else {f"{name}.kept_R": R})
        reset_optimizer(training.engine)
        sample, probe = map(run.sample, run.rebasing_rows(number))
        report = initialize_by(run, training.engine, adapters, sample, probe, keep)
        finish(report)
    taken = report.step
    eta = "" if taken.init_lr is None else f"eta {taken.init_lr:.3g}, "
    say(
        f"re-based after step {step}, {report.total_s:.1f} s: {eta}loss of {taken.num_samples} "
        f"other rows {taken.loss_before:.4f} -> {taken.loss_after:.4f}"
    )
    with phase(run, "evaluation"):
        evaluate(training, "rebase")


def keep_update(adapter: AdapterLinear) -> torch.Tensor | None:
    """Copy B, R and A to the kept updates of a layer. Collective.

    Returns:
        R, as the model computes with it, on rank 0's CPU; None elsewhere.
    """
    values = {}
    for factor, part in _parts_of(adapter, adapter.num_kept).items():
        source = adapter.factor(f"lora_{factor}")
        with zero.gathered([source]):
            values[factor] = source.detach().clone() if zero.rank() == 0 else None
        zero.fill(adapter.factor(f"kept_{factor}"), values[factor], part)
    adapter.num_kept += 1
    R = values["R"]
    return None if R is None else R.cpu()


def load_bases(training: TrainingRun, step: int) -> None:
    """Fill A, B and R, and what is kept, as they are at a checkpoint's step. Collective.

    R is the basis's first. Rank 0 reads.
    """
    rebased_after = rebasing_steps(training.run.config.rebase_every, step)
    folders = [training.folder, *(rebased_folder(training.folder, s) for s in rebased_after)]
    for adapter in training.adapters.values():
        adapter.num_kept = 0
    for folder, next_folder in pairwise(folders):
        _load_kept(training, folder, next_folder)
    load_factors(folders[-1], training.adapters)


def _load_kept(training: TrainingRun, folder: Path, next_folder: Path) -> None:
    """Fill the next kept update of every layer. Collective; rank 0 reads.

    Args:
        folder: of the basis.
        next_folder: of the one after it, where its R is.
    """
    with ExitStack() as stack:
        of_basis: Any = None
        of_next: Any = None
        if zero.rank() == 0:
            of_basis = stack.enter_context(safe_open(folder / BASIS_FILE, "pt"))
            of_next = stack.enter_context(safe_open(next_folder / BASIS_FILE, "pt"))
        for name, adapter in training.adapters.items():
            for factor, part in _parts_of(adapter, adapter.num_kept).items():
                value = None
                if of_basis is not None and factor == "R":
                    value = of_next.get_tensor(f"{name}.kept_R")
                elif of_basis is not None:
                    value = of_basis.get_tensor(f"{name}.lora_{factor}")
                zero.fill(adapter.factor(f"kept_{factor}"), value, part)
            adapter.num_kept += 1


def _parts_of(adapter: AdapterLinear, number: int) -> dict[str, tuple[Any, ...]]:
    """Return where a kept update, counted from 0, is in kept_A, kept_B and kept_R."""
    along = slice(number * adapter.r, (number + 1) * adapter.r)
    every = slice(None)
    return {"A": (..., along, every), "B": (..., along), "R": (..., number, every, every)}

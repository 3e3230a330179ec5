"""The training loop: step, evaluate, save, and stop when a signal asks for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from lorasb_ds.data.batch import Batch
from lorasb_ds.data.sampler import Pack
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.distributed.masters import squared_norm
from lorasb_ds.distributed.optimizer_state import loss_scale_state, scale_is_smallest
from lorasb_ds.models.loss import token_loss_sum
from lorasb_ds.runs.history import Row
from lorasb_ds.runs.output_dir import say
from lorasb_ds.runs.profiler import profiled
from lorasb_ds.runs.run_log import RunLog
from lorasb_ds.training.alignment import track_alignment, trained_factors
from lorasb_ds.training.held_out import evaluate
from lorasb_ds.training.phases import phase
from lorasb_ds.training.rebase import rebase, rebasing_is_due
from lorasb_ds.training.resume import save
from lorasb_ds.training.training_run import TrainingRun

RunStatus = Literal["finished", "stopped"]


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, over all ranks.

    Attributes:
        loss: mean over label tokens, or over rows that are classified.
        grad_norm: norm of the gradient, before clipping.
        r_norm: norm of everything trained (every R), after the step.
        applied: False if the step was skipped, because loss or gradient was not finite.
        num_tokens: tokens in the batch, without padding.
        num_positions: tokens in the batch, with padding.
        stop: whether any rank had been asked to stop by the end of the step.
    """

    loss: float
    grad_norm: float
    r_norm: float
    applied: bool
    num_tokens: int
    num_positions: int
    stop: bool


def train(training: TrainingRun) -> RunStatus:
    """Train from the run's current step to its end, or until it is asked to stop. Collective."""
    run, state = training.run, training.state
    training.engine.train()
    training.stop.can_save()
    if state.step == 0 and run.config.track_alignment:
        track_alignment(training, None)
    with profiled(training.folder, run.config.profile if training.log else None) as step_done:
        status = _steps(training, step_done)
    if status == "stopped":
        return status
    training.end_if_failed()
    if state.evaluated_at != state.step:
        evaluate(training, "trained")
    state.finished = True
    save(training)
    return status


def _steps(training: TrainingRun, step_done: Callable[[], None]) -> RunStatus:
    """Train step by step, with the evaluations and checkpoints that are due. Collective."""
    run, engine, state = training.run, training.engine, training.state
    start = time.perf_counter()
    stop = any_rank(training.asked_to_stop())
    while not state.finished and state.step < run.num_steps:
        if stop:
            training.end_if_failed()
            saved = save(training)
            what = "is saved" if saved else "is not saved"
            say(f"asked to stop: step {state.step} {what}; --resume goes on")
            return "stopped"
        if rebasing_is_due(training):
            save(training)
            with phase(run, "init", "re-basing"):
                rebase(training)
            start = time.perf_counter()
        units = run.order.packs(state.step)
        lr = engine.get_lr()[0]  # of this step: the scheduler moves on at its end
        tracked = _is_due(state.step + 1, run.config.track_alignment)
        before = trained_factors(training.adapters) if tracked else None
        with smallest_scale_explained(training, units):
            result = train_step(engine, run.step_batches(units), training.asked_to_stop)
        stop = result.stop
        state.step += 1
        now = time.perf_counter()
        step_done()
        if training.log:
            row: Row = {
                "step": state.step,
                "loss": result.loss,
                "lr": lr,
                "grad_norm": result.grad_norm,
                "r_norm": result.r_norm,
                "tokens": result.num_tokens,
                "tokens_per_s": result.num_tokens / (now - start),
                "step_time_s": now - start,
                "padding_share": 1 - result.num_tokens / result.num_positions,
                "memory_bytes": accelerator.memory_bytes(),
            }
            log_step(training, row, result.applied)
        count_skips(training, result, units)
        if before is not None:
            track_alignment(training, before)
        if state.step < run.num_steps:
            new_best, evaluates = False, _is_due(state.step, run.config.eval_every)
            if evaluates:
                new_best = evaluate(training, "step")
            state.finished = is_stopped_early(training)
            saves = (new_best or _is_due(state.step, run.config.save_every)) and not state.finished
            if saves:
                save(training)
            if tracked or evaluates or saves:  # for so long that a signal may have come meanwhile
                stop = any_rank(training.asked_to_stop())
        start = time.perf_counter()
    return "finished"


def log_step(training: TrainingRun, row: Row, applied: bool) -> None:
    """Write a step's row, and show it. Not collective."""

    def write(log: RunLog) -> None:
        log.write(row | ({} if applied else {"skipped": True}))
        log.progress(row, training.run.num_steps)

    training.to_log(write)


def is_stopped_early(training: TrainingRun) -> bool:
    """Return whether early stopping ends the run: too many evaluations without a better loss."""
    state, patience = training.state, training.run.config.early_stopping_patience
    if patience is None or state.evals_since_best < patience:
        return False
    best = "none" if state.best_loss is None else f"{state.best_loss:.4f}"
    say(
        f"early stop after step {state.step}: no better held-out loss than {best} (step "
        f"{state.best_step}) in {patience} evaluations"
    )
    return True


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def any_rank(asked: bool) -> bool:
    """Return whether ``asked`` holds on any rank. Collective."""
    number = accelerator.from_host(float(asked))
    dist.all_reduce(number)
    return number.item() > 0


def train_step(
    engine: Any, batches: list[Batch], stop_requested: Callable[[], bool] = lambda: False
) -> StepResult:
    """Take one optimizer step on this rank's micro-batches. Collective.

    The step's loss is the mean over the label tokens of all ranks and micro-batches: a
    micro-batch's loss is ``ΣCE · world · accumulation / T``, T label tokens in all, because
    DeepSpeed divides by both.

    If a loss is not finite, neither is its gradient; and if a gradient is not finite on one rank,
    neither is the norm, which is the same on all ranks. The engine then skips the step: R, the
    optimizer and the schedule stay as they were (``check_grad_overflow`` in ds_config.py).

    The host waits for the device once, at the end, besides the engine's own waits for the norm:
    until then it only queues kernels.

    Args:
        stop_requested: tells whether this rank has been asked to stop; called at the step's end.
    Communication: besides the engine's, one all-reduce of 3 numbers before and one of 3 after.
    """
    device = accelerator.device()
    of_batches = [(b.num_label_tokens, b.num_tokens, b.input_ids.numel()) for b in batches]
    counts = accelerator.from_host([sum(n) for n in zip(*of_batches, strict=True)], torch.float64)
    dist.all_reduce(counts)
    scale = (zero.world_size() * len(batches) / counts[0].clamp(min=1)).float()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        loss = token_loss_sum(engine, batch.to(device))
        engine.backward(loss * torch.where(loss.detach().isfinite(), scale, math.nan))
        engine.step()
        loss_sum += loss.detach().double()
    stop = accelerator.from_host(float(stop_requested()), torch.float64)
    sums = torch.stack([loss_sum, squared_norm(engine), stop])
    dist.all_reduce(sums)
    norm = torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float64)
    if norm.is_cpu:  # stage 3's is on the device
        norm = accelerator.from_host(norm.item(), torch.float64)
    found = torch.cat([sums, norm[None], counts]).tolist()
    loss_total, squared_r, num_stops, grad_norm, *totals = found
    num_label_tokens, num_tokens, num_positions = totals
    return StepResult(
        loss=loss_total / max(1.0, num_label_tokens),
        grad_norm=grad_norm,
        r_norm=math.sqrt(squared_r),
        applied=not engine.optimizer.overflow,
        num_tokens=int(num_tokens),
        num_positions=int(num_positions),
        stop=num_stops > 0,
    )


def count_skips(training: TrainingRun, result: StepResult, units: list[Pack]) -> None:
    """Count skipped steps, and end the run after too many in a row.

    Raises:
        FloatingPointError: on every rank, naming the rows of the step, after more than
            ``max_skipped_steps`` in a row.
    """
    state = training.state
    if result.applied:
        state.updates += 1
        state.skipped_in_a_row = 0
        return
    dynamic_scale = "cur_iter" in loss_scale_state(training.engine)
    if dynamic_scale and math.isfinite(result.loss):
        return  # fp16's loss scale is adapting; if none is small enough, DeepSpeed raises
    state.skipped_in_a_row += 1
    rows = _rows_of(training, units)
    what = f"step {state.step} has loss {result.loss} and gradient norm {result.grad_norm}"
    if state.skipped_in_a_row <= training.run.config.max_skipped_steps:
        say(f"warning: {what}: skipped ({_some(rows)})")
        return
    raise FloatingPointError(
        f"{what}, like the {state.skipped_in_a_row - 1} steps before it, which were skipped. "
        f"Lower --lr or --init-lr, or look at the rows of this step: {', '.join(rows)}."
    )


@contextmanager
def smallest_scale_explained(training: TrainingRun, units: list[Pack]) -> Iterator[None]:
    """Say what can be done where fp16's loss scale cannot come down any more.

    DeepSpeed (0.19.8) raises a plain Exception then, in the step: on every rank, since all have the
    same scale and know of each other's overflows.

    Raises:
        FloatingPointError: on every rank, naming the rows of the step.
    """
    try:
        yield
    except Exception as error:
        if type(error) is not Exception or not scale_is_smallest(training.engine):
            raise
        scale = loss_scale_state(training.engine)["cur_scale"]
        raise FloatingPointError(
            f"step {training.state.step + 1} has a gradient that is not finite in fp16, though the "
            f"loss scale is {scale:g}, its minimum. Give --dtype bf16, lower --lr or --init-lr, or "
            f"look at the rows of this step: {', '.join(_rows_of(training, units))}."
        ) from error


def _rows_of(training: TrainingRun, units: list[Pack]) -> list[str]:
    return [training.run.data.train.row_id(row) for unit in units for row in unit]


def _some(rows: list[str], count: int = 8) -> str:
    return ", ".join(rows[:count]) + (f", and {len(rows) - count} more" if rows[count:] else "")

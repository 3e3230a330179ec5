"""The training loop: step, evaluate, save, and end when it is asked to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from lorasb_ds.data.batch import Batch
from lorasb_ds.data.sampler import Unit
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.models.generation import generate, stop_tokens
from lorasb_ds.models.loss import eval_mode, held_out_loss, token_loss_sum
from lorasb_ds.runs.history import perplexity
from lorasb_ds.runs.output_dir import say
from lorasb_ds.runs.profiler import profiled
from lorasb_ds.training.alignment import track_alignment, trained_factors
from lorasb_ds.training.resume import save
from lorasb_ds.training.run_state import Job

Outcome = Literal["finished", "stopped"]
Stage = Literal["base", "init", "step", "trained"]

SAMPLE_TOKENS = 128  # of a generated answer at most


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, all ranks together."""

    loss: float  # mean over label tokens
    grad_norm: float  # before clipping
    r_norm: float  # of all R after the step
    applied: bool  # or left out, since loss or gradient was not finite
    num_tokens: int  # without padding
    num_places: int  # with it


def train(job: Job) -> Outcome:
    """From where the run is to its end, or to where it is asked to stop. Collective."""
    run, progress = job.run, job.progress
    job.engine.train()
    job.stop.can_save()
    if progress.step == 0 and run.config.track_alignment:
        track_alignment(job, None)
    with profiled(job.folder, run.config.profile if job.log else None) as step_done:
        outcome = _steps(job, step_done)
    if outcome == "stopped":
        return outcome
    if progress.evaluated_at != progress.step:
        evaluate(job, "trained")
    progress.finished = True
    save(job)
    return outcome


def _steps(job: Job, step_done: Callable[[], None]) -> Outcome:
    """Steps with what is due between them, to the last one. Collective."""
    run, engine, progress = job.run, job.engine, job.progress
    start = time.perf_counter()
    while not progress.finished and progress.step < run.num_steps:
        units = run.order.units(progress.step)
        lr = engine.get_lr()[0]  # of this step: the scheduler moves on at its end
        tracked = _is_due(progress.step + 1, run.config.track_alignment)
        before = trained_factors(job.adapters) if tracked else None
        result = train_step(engine, run.step_batches(units), job.stop.requested)
        if result is None:
            saved = save(job)
            what = "is saved" if saved else "is not saved"
            say(f"asked to stop: step {progress.step} {what}; --resume goes on")
            return "stopped"
        progress.step += 1
        now = time.perf_counter()
        step_done()
        if job.log:
            row = {
                "step": progress.step,
                "loss": result.loss,
                "lr": lr,
                "grad_norm": result.grad_norm,
                "r_norm": result.r_norm,
                "tokens": result.num_tokens,
                "tokens_per_s": result.num_tokens / (now - start),
                "step_time_s": now - start,
                "padding_share": 1 - result.num_tokens / result.num_places,
                "memory_bytes": accelerator.memory_bytes(),
            }
            job.log.write(row | ({} if result.applied else {"skipped": True}))
            job.log.progress(row, run.num_steps)
        count_skips(job, result, units)
        if before is not None:
            track_alignment(job, before)
        if progress.step < run.num_steps:
            new_best = False
            if _is_due(progress.step, run.config.eval_every):
                new_best = evaluate(job, "step")
            progress.finished = is_stopped_early(job)
            due = _is_due(progress.step, run.config.save_every)
            if (new_best or due) and not progress.finished:
                save(job)
        start = time.perf_counter()
    return "finished"


def is_stopped_early(job: Job) -> bool:
    """Whether the evaluations have not improved for too long."""
    progress, patience = job.progress, job.run.config.early_stopping_patience
    if patience is None or progress.evals_since_best < patience:
        return False
    best = "none" if progress.best_loss is None else f"{progress.best_loss:.4f}"
    say(
        f"early stop after step {progress.step}: no better held-out loss than {best} (step "
        f"{progress.best_step}) in {patience} evaluations"
    )
    return True


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def train_step(engine: Any, batches: list[Batch], stop: bool = False) -> StepResult | None:
    """One optimizer step on this rank's micro-batches. Collective.

    The step's loss is the mean over its label tokens, wherever they lie: a micro-batch's loss is
    ``ΣCE · world · accumulation / T``, T tokens in all, since DeepSpeed divides by both.

    A loss that is not finite makes its gradient so, and a gradient that is not finite on some rank
    makes the norm so on which all agree: the engine then leaves R, its optimizer and the schedule
    as they were (``check_grad_overflow`` in ds_config.py).

    Args:
        stop: this rank was asked to end.
    Returns:
        None if any rank was: nothing has been done then.
    Communication: besides the engine's, one all-reduce of 4 numbers before and one of 2 after.
    """
    device = accelerator.device()
    counts = torch.tensor(
        [
            sum(batch.num_label_tokens for batch in batches),
            sum(batch.num_tokens for batch in batches),
            sum(batch.input_ids.numel() for batch in batches),
            float(stop),
        ],
        dtype=torch.float64,
        device=device,
    )
    dist.all_reduce(counts)
    num_label_tokens, num_tokens, num_places, num_stops = counts.tolist()
    if num_stops:
        return None
    scale = zero.world_size() * len(batches) / max(1.0, num_label_tokens)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        loss = token_loss_sum(engine, batch.to(device))
        engine.backward(loss * torch.where(loss.detach().isfinite(), scale, math.nan))
        engine.step()
        loss_sum += loss.detach().double()
    sums = torch.stack([loss_sum, zero.squared_norm(engine)])
    dist.all_reduce(sums)
    return StepResult(
        loss=(sums[0] / max(1.0, num_label_tokens)).item(),
        grad_norm=float(engine.get_global_grad_norm()),
        r_norm=sums[1].sqrt().item(),
        applied=not engine.optimizer.overflow,
        num_tokens=int(num_tokens),
        num_places=int(num_places),
    )


def count_skips(job: Job, result: StepResult, units: list[Unit]) -> None:
    """Bear a few steps that were left out, and no more.

    Raises:
        FloatingPointError: on every rank, with the rows of the step.
    """
    progress = job.progress
    if result.applied:
        progress.updates += 1
        progress.skipped_in_a_row = 0
        return
    dynamic_scale = "cur_iter" in zero.loss_scale_state(job.engine)
    if dynamic_scale and math.isfinite(result.loss):
        return  # fp16's loss scale finds its size; DeepSpeed ends the run where there is none
    progress.skipped_in_a_row += 1
    rows = [job.run.data.train.row_id(row) for unit in units for row in unit]
    what = f"step {progress.step} has loss {result.loss} and gradient norm {result.grad_norm}"
    if progress.skipped_in_a_row <= job.run.config.max_skipped_steps:
        say(f"warning: {what}: left out ({_some(rows)})")
        return
    raise FloatingPointError(
        f"{what}, as had the {progress.skipped_in_a_row - 1} before it, which were left out. Lower "
        f"--lr or --init-lr, or look at the rows of this step: {', '.join(rows)}."
    )


def _some(rows: list[str], count: int = 8) -> str:
    return ", ".join(rows[:count]) + (f", and {len(rows) - count} more" if rows[count:] else "")


def evaluate(job: Job, stage: Stage) -> bool:
    """Measure the held-out loss. Collective.

    Returns:
        Whether training has reached a new best.
    """
    run, progress = job.run, job.progress
    progress.evaluated_at = progress.step
    if run.data.held_out is None:
        return False
    batches = run.batches(run.data.held_out, range(len(run.data.held_out.examples)))
    loss = held_out_loss(job.engine.module, batches, accelerator.device())
    ppl = perplexity(loss)
    say(f"step {progress.step}: held-out loss {loss:.4f}, perplexity {ppl:.2f} ({stage})")
    if job.log:
        row = {"step": progress.step, "stage": stage, "eval_loss": loss, "perplexity": ppl}
        job.log.write(row)
    if run.config.generate_samples:
        write_samples(job, stage)
    if stage not in ("step", "trained"):
        return False
    best = progress.best_loss
    if math.isfinite(loss) and (best is None or loss < best):
        progress.best_step, progress.best_loss = progress.step, loss
        progress.evals_since_best = 0
        return True
    progress.evals_since_best += 1
    return False


def write_samples(job: Job, stage: Stage) -> None:
    """Greedy answers to the first held-out rows, to ``samples.jsonl``. Collective.

    Every rank generates the same, so that all take part in ZeRO-3's gathers equally often.
    """
    run, model = job.run, job.engine.module
    assert run.data.held_out is not None
    examples = run.data.held_out.examples[: run.config.generate_samples]
    prompts = [example.input_ids[: max(1, example.first_label)] for example in examples]
    with eval_mode(model):
        answers = generate(
            model,
            run.base.tokenizer,
            prompts,
            SAMPLE_TOKENS,
            accelerator.device(),
            stop=stop_tokens(run.base.tokenizer),
        )
    if job.log:
        for i, (example, prompt, answer) in enumerate(zip(examples, prompts, answers, strict=True)):
            job.log.write_sample(
                {
                    "step": job.progress.step,
                    "stage": stage,
                    "row": run.data.held_out.row_id(i),
                    "prompt": run.base.tokenizer.decode(prompt),
                    "expected": run.base.tokenizer.decode(example.input_ids[len(prompt) :]),
                    "generated": answer.text,
                }
            )

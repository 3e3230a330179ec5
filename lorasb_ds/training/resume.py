"""Checkpoints of a run: saved, restored, and the best one loaded at the end."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist

from lorasb_ds.adapters.peft_methods import fill_peft
from lorasb_ds.config.run_layout import BASIS_FILE, rebasing_steps
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.distributed.optimizer_state import loss_scale_state, set_loss_scale_state
from lorasb_ds.errors import option_name
from lorasb_ds.init.basis import stored_digests
from lorasb_ds.init.init_report import InitReport
from lorasb_ds.runs.checkpoint import (
    Checkpoint,
    Resume,
    changed_options,
    checkpoint_path,
    read_checkpoint,
    tidy,
    write_checkpoint,
)
from lorasb_ds.runs.output_dir import say
from lorasb_ds.training.engine_state import (
    collect_state,
    restore_state,
    rng_states,
    set_rng_states,
)
from lorasb_ds.training.optimizer import set_scheduler
from lorasb_ds.training.prepare import Prepared
from lorasb_ds.training.rebase import load_bases
from lorasb_ds.training.training_run import TrainingRun

HELD_OUT = "held-out rows"


def save(training: TrainingRun) -> bool:
    """Write a checkpoint, and remove those that are not kept. Collective.

    Returns:
        Whether the run can be resumed from here: False if the checkpoint could not be written.
        Before the first update nothing is written, since the run can be resumed from its init.
    Raises:
        OSError: on every rank, if it cannot be written and --on-save-error is stop.
    """
    start = time.perf_counter()
    engine, state, config = training.engine, training.state, training.run.config
    if not state.updates or state == training.saved:
        return True
    tensors, scalars = collect_state(engine, training.trained)
    all_rng: list[Any] = [None] * zero.world_size()
    dist.all_gather_object(all_rng, rng_states(accelerator.device()))
    done: list[Any] = [0, None]  # size, problem
    if zero.rank() == 0:
        digests = stored_digests(training.folder, rebasing_steps(config.rebase_every, state.step))
        for rank, states in enumerate(all_rng):
            tensors |= {f"rng.{rank}.{name}": state for name, state in states.items()}
        content = {
            "progress": asdict(state),
            "made_from": training.run.same_run | digests,
            "options": may_change(training.run),
            "world_size": zero.world_size(),
            "optimizer_scalars": scalars,
            "loss_scale": loss_scale_state(engine),
        }
        try:
            done[0] = write_checkpoint(training.folder, tensors, content, state.step)
        except OSError as error:
            done[1] = f"checkpoint of step {state.step} cannot be written: {error}"
        else:
            with suppress(OSError):  # the index is for people
                tidy(training.folder, config.keep_last, state.best_step)
    dist.broadcast_object_list(done, src=0)
    size, problem = done
    if problem is None:
        seconds = time.perf_counter() - start
        say(f"checkpoint of step {state.step}: {size / 1e6:.2f} MB, {seconds:.2f} s")
        training.saved = replace(state)
        return True
    if config.on_save_error == "stop":
        raise OSError(
            f"{problem}. The checkpoint before it is intact: free some disk space and give "
            "--resume, or train on without saving by --on-save-error continue."
        )
    say(f"warning: {problem}. Training goes on (--on-save-error continue)")
    return False


def may_change(run: Prepared) -> dict[str, Any]:
    """Return the options that a resumed run may change; it reports their changes."""
    names = ("lr", "lr_scheduler", "warmup_ratio", "weight_decay", "max_grad_norm")
    options = {option_name(name): getattr(run.config, name) for name in names}
    return {"steps": run.num_steps, HELD_OUT: held_out_digest(run)} | options


def held_out_digest(run: Prepared) -> str:
    return run.data.held_out.digest if run.data.held_out else "none"


def resume(training: TrainingRun, found: Resume) -> InitReport:
    """Restore the basis and the checkpoint from the run's folder. Collective."""
    run, checkpoint = training.run, found.checkpoint
    for warning in found.warnings:
        say(f"warning: {warning}")
    assert run.stored_init is not None, "prepare has read it"
    if run.adapter.peft is not None:
        fill_peft(training.engine.module, training.folder / BASIS_FILE)
    else:
        load_bases(training, found.step)
    if checkpoint is None:
        say("resumed after the init: there is no complete checkpoint")
    else:
        restore_training(training, checkpoint)
    return run.stored_init


def restore_training(training: TrainingRun, checkpoint: Checkpoint) -> None:
    """Restore R, optimizer, schedule, state and generators from a checkpoint. Collective."""
    run, tensors = training.run, checkpoint.tensors()
    restore_state(
        training.engine, training.trained, tensors, checkpoint.optimizer_scalars, run.config
    )
    state = training.state = checkpoint.state
    if checkpoint.path.resolve() == checkpoint_path(training.folder, state.step).resolve():
        training.saved = replace(state)  # as long as nothing is dropped below
    set_scheduler(training.engine.lr_scheduler, state.updates)
    training.engine.global_steps = state.step
    if checkpoint.loss_scale:
        set_loss_scale_state(training.engine, checkpoint.loss_scale)
    prefix = f"rng.{zero.rank()}."
    if states := {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}:
        set_rng_states(states, accelerator.device())
    wrote = checkpoint.world_size
    others = "" if wrote == zero.world_size() else f", which {wrote} process(es) wrote"
    say(f"resumed after step {state.step} from {checkpoint.path.name}{others}")
    now = may_change(run)
    for change in changed_options(checkpoint, now):
        say(f"changed since: {change}")
    if state.finished and checkpoint.options["steps"] != run.num_steps:
        state.finished, state.evals_since_best = False, 0
    best = [best_is_there(training)]
    dist.broadcast_object_list(best, src=0)
    if checkpoint.options[HELD_OUT] != now[HELD_OUT] or not best[0]:
        if state.best_step is not None:
            say("the best evaluation so far is dropped: its rows or its checkpoint are gone")
        state.best_step = state.best_loss = None
        state.evals_since_best = 0
    if checkpoint.options[HELD_OUT] != now[HELD_OUT]:
        state.evaluated_at = -1  # not on these rows


def best_is_there(training: TrainingRun) -> bool:
    """Return whether the best evaluation's checkpoint is there and complete."""
    step = training.state.best_step
    return step is not None and isinstance(
        read_checkpoint(checkpoint_path(training.folder, step)), Checkpoint
    )


def load_best(training: TrainingRun) -> int:
    """Load the trained parameters of the best evaluation's checkpoint. Collective; rank 0 reads.

    Returns:
        The step whose they are: the last one's if there is no better one, or it is gone.
    """
    step = training.state.best_step
    if step is None or step == training.state.step:
        return training.state.step
    trained = training.trained
    found: list[Any] = [None]
    if zero.rank() == 0:
        best = read_checkpoint(checkpoint_path(training.folder, step))
        if isinstance(best, Checkpoint):
            tensors = best.tensors()
            found = [{name: tensors[name] for name in trained}]
    dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        say(f"warning: the best checkpoint (step {step}) is gone: the adapter is the last step's")
        return training.state.step
    if training.run.config.rebase_every is not None:
        load_bases(training, step)
    for name, parameter in trained.items():
        zero.fill_trainable(parameter, found[0][name])
    say(f"the adapter is that of step {step}, held-out loss {training.state.best_loss:.4f}")
    return step

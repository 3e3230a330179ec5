"""A run from its configuration to its adapter: load, inject, initialize, train, save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lorasb_ds import zero
from lorasb_ds.adapter import inject
from lorasb_ds.base_files import model_path
from lorasb_ds.basis import put_back, read_report
from lorasb_ds.checkpoint import (
    Progress,
    Resume,
    changed_options,
    check_same_run,
    checkpoint_path,
    read_checkpoint,
    set_newer_aside,
)
from lorasb_ds.config import DS_CONFIG_COPY, ConfigError
from lorasb_ds.curves import draw_loss_curve
from lorasb_ds.export import collect_lora, save_peft_adapter
from lorasb_ds.files import SUMS_FILE, file_digest, write_json
from lorasb_ds.gradients import branches_off
from lorasb_ds.init_phase import init_phase
from lorasb_ds.init_report import InitReport
from lorasb_ds.loading import DTYPES, load_base
from lorasb_ds.loop import Adapters, Job, Outcome, evaluate, may_change, train
from lorasb_ds.metrics import RunLog, provenance
from lorasb_ds.optimizer import make_optimizer, make_scheduler, set_scheduler
from lorasb_ds.out_of_memory import OutOfMemoryError, Phase, explain, is_out_of_memory
from lorasb_ds.output import make_output_dir, say
from lorasb_ds.packing import keeps_packs_apart
from lorasb_ds.prepare import Prepared, check_ranks_agree
from lorasb_ds.report import draw_init, write_report
from lorasb_ds.rng import set_rng_states
from lorasb_ds.stop import StopRequest
from lorasb_ds.training_state import restore_state


def run_training(run: Prepared, stop: StopRequest, init_only: bool = False) -> Outcome:
    """The whole run, inside a process group. Collective.

    Args:
        stop: whether this process is asked to end; looked for between steps.
        init_only: stop when the init is done and reported.
    Returns:
        Whether it came to its end or was stopped on the way. The output folder holds
        ``output.OUTPUTS`` then, or checkpoints to go on from.
    """
    check_ranks_agree(run)
    zero.reset_peak_memory()
    idle_bytes = 0 if zero.accelerator_name() != "cpu" else zero.memory_bytes()
    folder = make_output_dir(run.config, resumed=run.resume is not None)
    num_steps = run.num_steps
    if run.resume is not None and run.resume.step >= num_steps and (folder / "adapter").is_dir():
        say(f"{folder} has its {num_steps} steps and its adapter: nothing is left to do")
        return "finished"
    description = describe(run, folder)
    log = None
    if zero.rank() == 0:
        # A replay reads this copy: the file it came from may change.
        write_json(folder / DS_CONFIG_COPY, run.ds_config_file)
        write_json(folder / "run.json", description)
        first_step = run.resume.step if run.resume else 0
        log = RunLog(folder, first_step, description["config"])
    announce(run, folder)
    with phase(run, "load"):
        engine, adapters = start_engine(run)
    job = Job(
        run=run,
        folder=folder,
        log=log,
        engine=engine,
        adapters=adapters,
        order=run.order,
        num_steps=num_steps,
        progress=Progress(),
        stop=stop,
        made_from=dict(run.same_run),
    )
    peaks = {"load": zero.peak_memory_bytes() - idle_bytes}
    if run.config.packing:
        check_packs(job)
    if run.resume is not None:
        init = resume(job, run.resume)
        if run.resume.checkpoint is None and not has_row(job, "init"):
            evaluate(job, "init")
    else:
        with phase(run, "evaluation"), branches_off(adapters):
            evaluate(job, "base")
        with phase(run, "init"):
            init = init_phase(run, engine, adapters, folder)
        evaluate(job, "init")
        if run.config.init_from is None:
            peaks["init"] = zero.peak_memory_bytes() - idle_bytes
    job.made_from["basis"] = basis_digest(folder)
    tensors = {}
    if not init_only:
        zero.reset_peak_memory()
        with phase(run, "train"):
            outcome = train(job)
        if outcome == "stopped":
            return outcome
        if run.config.load_best_model_at_end or run.config.early_stopping_patience:
            load_best(job)
        with phase(run, "save"):
            tensors = collect_lora(adapters)
        peaks["train"] = zero.peak_memory_bytes() - idle_bytes
    if log is not None:
        description["memory"]["measured"] = peaks
        finish(job, init, tensors, description)
    dist.barrier()
    saved = folder / ("basis.safetensors" if init_only else "adapter")
    say(f"saved: {saved}   report: {folder / 'report.md'}")
    return "finished"


@contextmanager
def phase(run: Prepared, name: Phase) -> Iterator[None]:
    """What is done in it may run out of memory, which is then explained.

    Raises:
        OutOfMemoryError: on this rank only; the launcher ends the others.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        explanation = explain(
            name,
            error,
            zero.memory_bytes(),
            run.forecast.free_bytes,
            config=run.config,
            shape=run.shape,
            placement=run.placement,
            work=run.workload,
            memory=run.footprint,
            cluster=run.cluster,
        )
        raise OutOfMemoryError(explanation) from error


def describe(run: Prepared, folder: Path) -> dict[str, Any]:
    """``run.json``: what the run is, and where it comes from."""
    return {
        "config": {**run.config.model_dump(), "output_dir": str(folder)},
        "ds_config": run.ds_config,
        "world_size": zero.world_size(),
        "accelerator": zero.accelerator_name(),
        "trainable_parameters": len(run.targets) * run.config.r**2,
        "num_steps": run.num_steps,
        "resumed_at": run.resume.step if run.resume else None,
        "rows": {"train": dict(run.train.counts)}
        | ({"held_out": dict(run.held_out.counts)} if run.held_out else {}),
        "memory": {"predicted": run.forecast.describe()},
        **provenance(),
    }


def announce(run: Prepared, folder: Path) -> None:
    """What a user should know before the base is loaded."""
    say(f"run folder {folder}")
    say(f"training rows: {run.train.describe()}")
    for note in run.notes:
        say(note)
    say(str(run.forecast))
    if run.forecast.problem:
        say(f"warning: {run.forecast.problem}")
    say(
        f"{len(run.targets)} layers with an adapter, {len(run.targets) * run.config.r**2:,} "
        f"trainable parameters, {zero.world_size()} process(es) on {zero.accelerator_name()}, "
        f"{run.num_steps} steps of {run.config.train_batch_size} "
        f"{'packs' if run.config.packing else 'rows'}"
    )
    if run.experts:
        say(
            f"{len(run.experts)} layers of MoE experts ({sum(run.experts.values()):,} parameters) "
            "stay frozen without an adapter"
        )


def start_engine(run: Prepared) -> tuple[Any, Adapters]:
    """The base with placeholders for adapters, inside the run's one engine. Collective."""
    config = run.config
    model = load_base(config, run.hf_config, run.ds_config)
    adapters = inject(model, run.targets, config.r, DTYPES[config.dtype])
    R = [adapter.lora_R for adapter in adapters.values()]
    optimizer = make_optimizer(R, config)
    scheduler = make_scheduler(optimizer, config, run.num_steps)
    return zero.make_engine(model, R, optimizer, scheduler, run.ds_config), adapters


def has_row(job: Job, stage: str) -> bool:
    """Whether an evaluation is among the run's rows. Collective."""
    found = [job.log is not None and any(row.get("stage") == stage for row in job.log.rows)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def check_packs(job: Job) -> None:
    """Refuse to train on rows that would see each other. Collective."""
    run = job.run
    examples = [run.train.examples[i] for i in range(min(8, len(run.train.examples)))]
    model = job.engine.module
    if not keeps_packs_apart(model, examples, zero.device(), one_row=run.one_row):
        raise ConfigError(
            f"--packing: rows of one pack see each other in a {type(model).__name__} with "
            f"attention {run.hf_config._attn_implementation}. Leave it out (--group-by-length pads "
            "little, too), or try another --attn-implementation."
        )


def resume(job: Job, found: Resume) -> InitReport:
    """Put back the basis and the checkpoint of the run's folder. Collective."""
    run = job.run
    for warning in found.warnings:
        say(f"warning: {warning}")
    put_back(job.engine, job.adapters, job.folder)
    if zero.rank() == 0:
        for name in set_newer_aside(job.folder, found.step):
            say(f"set aside, since this run goes on before it: checkpoints/{name}")
    checkpoint = found.checkpoint
    if checkpoint is None:
        say("resumed after the init: there is no checkpoint yet")
        return read_report(job.folder, run.config.r)
    digest = basis_digest(job.folder)
    check_same_run(f"--resume {run.config.resume}", checkpoint, {"basis": digest})
    tensors = checkpoint.tensors()
    restore_state(job.engine, job.adapters, tensors, checkpoint.optimizer_scalars, run.config)
    job.progress = checkpoint.progress
    set_scheduler(job.engine.lr_scheduler, job.progress.updates)
    job.engine.global_steps = job.progress.step
    if checkpoint.loss_scale:
        zero.set_loss_scale_state(job.engine, checkpoint.loss_scale)
    prefix = f"rng.{zero.rank()}."
    if states := {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}:
        set_rng_states(states, zero.device())
    say(
        f"resumed after step {found.step} from {checkpoint.path.name}"
        + (
            ""
            if checkpoint.world_size == zero.world_size()
            else f", which {checkpoint.world_size} process(es) wrote"
        )
    )
    for change in changed_options(checkpoint, may_change(run)):
        say(f"changed since: {change}")
    return read_report(job.folder, run.config.r)


def basis_digest(folder: Path) -> str:
    """SHA-256 of the run's basis, the same on every rank. Collective.

    Raises:
        ConfigError: on every rank, if the file is not what the init wrote.
    """
    found: list[str] = [""]
    if zero.rank() == 0:
        digest = file_digest(folder / "basis.safetensors")
        sums = folder / SUMS_FILE
        known = sums.is_file() and digest in sums.read_text(encoding="utf-8", errors="replace")
        found = [digest if known else ""]
    dist.broadcast_object_list(found, src=0)
    if not found[0]:
        raise ConfigError(
            f"{folder}/basis.safetensors is not what the init wrote there (by {SUMS_FILE}): the "
            "file is damaged. Restore it, or start the run anew by --overwrite."
        )
    return found[0]


def load_best(job: Job) -> None:
    """R of the best evaluation, from its checkpoint. Collective."""
    step = job.progress.best_step
    if step is None or step == job.progress.step:
        return
    best = read_checkpoint(checkpoint_path(job.folder, step))
    if isinstance(best, str):
        say(f"warning: the best checkpoint (step {step}) cannot be taken: {best}")
        return
    restore_state(job.engine, job.adapters, best.tensors(), {}, job.run.config)
    say(f"the adapter is that of step {step}, held-out loss {job.progress.best_loss:.4f}")


def finish(job: Job, init: InitReport, tensors: Any, description: dict[str, Any]) -> None:
    """Adapter, pictures and report. Rank 0."""
    run, folder, log = job.run, job.folder, job.log
    assert log is not None
    write_json(folder / "run.json", description)
    if tensors:
        save_peft_adapter(
            folder / "adapter",
            tensors,
            r=run.config.r,
            targets=run.targets,
            layers=dict(run.shape.layers),
            base_model=model_path(run.config.model),
        )
        draw_loss_curve(folder / "loss.png", log.rows)
    draw_init(folder / "init.png", init)
    log.close()
    # Last: a run that has its report is finished.
    write_report(folder / "report.md", description, log.rows, init, run.targets, run.experts)

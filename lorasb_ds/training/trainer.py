"""A run from its configuration to its adapter: load, inject, initialize, train, save."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lorasb_ds.adapters.inject import (
    disable_adapters,
    inject,
    layer_class_of,
    trainable_parameters,
)
from lorasb_ds.adapters.peft_methods import (
    collect_peft,
    disable_peft,
    gather_peft_together,
    inject_peft,
)
from lorasb_ds.adapters.peft_writer import collect_lora, collect_whole
from lorasb_ds.config.run_layout import (
    ADAPTER,
    BASIS_FILE,
    DS_CONFIG_COPY,
    PEFT_COPY,
    REPORT,
    RUN_JSON,
    TEMPLATE_COPY,
)
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.distributed.failures import from_rank_0
from lorasb_ds.distributed.sequence_parallel import unshare_rows
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.init_report import InitReport
from lorasb_ds.models.classification import train_head
from lorasb_ds.models.loading import DTYPES, load_base
from lorasb_ds.models.loss import add_loss_head
from lorasb_ds.planner.gathers import gathers_blocks
from lorasb_ds.runs.checkpoint import TrainerState
from lorasb_ds.runs.output_dir import output_dir, say
from lorasb_ds.runs.run_log import OnRow, RunLog
from lorasb_ds.system.files import write_json, write_text
from lorasb_ds.system.signals import StopRequest
from lorasb_ds.training.artifacts import announce, describe, describe_end, finish
from lorasb_ds.training.held_out import evaluate
from lorasb_ds.training.init_phase import init_phase
from lorasb_ds.training.loop import RunStatus, train
from lorasb_ds.training.model_check import check_model, check_packs
from lorasb_ds.training.optimizer import make_optimizer, make_scheduler
from lorasb_ds.training.phases import phase
from lorasb_ds.training.prepare import Prepared
from lorasb_ds.training.ranks_agree import check_ranks_agree
from lorasb_ds.training.resume import load_best, resume
from lorasb_ds.training.training_run import Adapters, TrainingRun


def run_training(
    run: Prepared, stop: StopRequest, init_only: bool = False, on_row: OnRow | None = None
) -> RunStatus:
    """Run the whole training, inside a process group. Collective.

    Args:
        stop: whether this process is asked to stop; checked between steps.
        init_only: end when the init is done and reported.
        on_row: is called on rank 0 with each row of ``metrics.jsonl``.
    Returns:
        Whether the run has finished, with its adapter and report in the output folder, or was
        stopped, with checkpoints to resume from.
    Raises:
        ConfigError: on every rank, if the ranks do not hold the same run, or it cannot be resumed.
        OutOfMemoryError: on the rank without memory.
    """
    check_ranks_agree(run)
    if run.resume is not None:
        if init_only and run.resume.checkpoint is not None:
            raise ConfigError(
                f"{run.resume.folder} is training already: `lorasb init` has nothing to do there. "
                "Resume it by `lorasb train`."
            )
        if is_finished(run):
            say(f"{run.resume.folder} has its adapter and report: nothing is left to do")
            return "finished"
    with output_dir(run.config, run.resume) as folder:
        return _run_in(folder, run, stop, init_only, on_row)


def _run_in(
    folder: Path, run: Prepared, stop: StopRequest, init_only: bool, on_row: OnRow | None
) -> RunStatus:
    """Do the work of ``run_training`` in its folder. Collective."""
    accelerator.reset_peak_memory()
    idle_bytes = 0 if accelerator.name() != "cpu" else accelerator.memory_bytes()
    description = describe(run, folder)
    log: RunLog | None = None
    engine = None

    def open_log() -> None:
        nonlocal log
        write_json(folder / RUN_JSON, description)
        # A replay reads this copy: the file it came from may change.
        write_json(folder / DS_CONFIG_COPY, run.ds_config_file)
        if run.adapter.peft is not None:
            write_json(folder / PEFT_COPY, run.adapter.peft.content)
        if run.config.chat_template is not None:
            write_text(folder / TEMPLATE_COPY, run.base.tokenizer.chat_template)
        first_step = run.resume.step if run.resume else 0
        config = description["config"]
        log = RunLog(folder, first_step, config, run.config.on_save_error, on_row)

    from_rank_0(open_log)
    announce(run, folder)
    # For dropout. Alike on all ranks: where models drop whole layers, all must drop the same ones.
    torch.manual_seed(run.config.seed)
    try:
        with phase(run, "load"):
            engine, adapters = start_engine(run)
        training = TrainingRun(
            run=run,
            folder=folder,
            log=log,
            engine=engine,
            adapters=adapters,
            state=TrainerState(),
            stop=stop,
        )
        peaks = {"load": accelerator.peak_memory_bytes() - idle_bytes}
        init = initialize_or_resume(training)
        if run.resume is None and run.stored_init is None and "init" in run.memory.phases:
            peaks["init"] = accelerator.peak_memory_bytes() - idle_bytes
        tensors, saved_step = {}, None
        if not init_only:
            accelerator.reset_peak_memory()
            with phase(run, "train"):
                status = train(training)
            if status == "stopped":
                close_log(training)
                return status
            saved_step = training.state.step
            if run.config.load_best_model_at_end or run.config.early_stopping_patience:
                saved_step = load_best(training)
            with phase(run, "save"):
                peft = run.adapter.peft is not None
                tensors = collect_peft(engine.module) if peft else collect_lora(adapters)
                tensors |= collect_whole(engine.module, run.base.head)
            peaks["train"] = accelerator.peak_memory_bytes() - idle_bytes
        description["memory"]["measured"] = peaks

        def finish_run() -> None:
            end = {} if saved_step is None else describe_end(training, saved_step)
            finish(training, init, tensors, description | end)

        from_rank_0(finish_run)
        close_log(training)
        dist.barrier()
    finally:
        unshare_rows()
        if log is not None:
            log.close()
        if engine is not None:
            zero.destroy(engine)
    saved = folder / (BASIS_FILE if init_only else ADAPTER)
    say(f"{'basis' if init_only else 'adapter'} saved: {saved}   report: {folder / REPORT}")
    return "finished"


def close_log(training: TrainingRun) -> None:
    """Flush what TensorBoard and trackers have buffered. Collective.

    Raises:
        OSError, JobError: as ``TrainingRun.end_if_failed``.
    """
    training.to_log(RunLog.close)
    training.end_if_failed()


def initialize_or_resume(training: TrainingRun) -> InitReport:
    """Fill A, B and R by the init, or restore the run from its checkpoint. Collective."""
    run = training.run
    if run.config.packing:
        with phase(run, "evaluation"):
            check_packs(training)
    if run.resume is not None:
        init = resume(training, run.resume)
    else:
        with phase(run, "evaluation"), base_alone(training):
            evaluate(training, "base")
        # A loaded init is only measured.
        with phase(run, "init" if run.stored_init is None else "evaluation"):
            init = init_phase(run, training.engine, training.adapters, training.folder)
    if training.state.step == 0 and not has_row(
        training, "init"
    ):  # the run may have been killed before this
        with phase(run, "evaluation"):
            evaluate(training, "init")
    return init


def base_alone(training: TrainingRun) -> AbstractContextManager[None]:
    """Return a context in which the model computes as its base alone."""
    if training.run.adapter.peft is not None:
        return disable_peft(training.engine.module)
    return disable_adapters(training.adapters)


def is_finished(run: Prepared) -> bool:
    """Return whether the run has reached the end that its options ask for, report included."""
    assert run.resume is not None
    found = run.resume.checkpoint
    if found is None or not found.state.finished:
        return False
    return found.options["steps"] == run.num_steps and (run.resume.folder / REPORT).is_file()


def start_engine(run: Prepared) -> tuple[Any, Adapters]:
    """Load the base, add empty adapters and make the run's one engine. Collective.

    Returns:
        The engine; layer -> adapter, empty if PEFT makes the layers, which it fills itself.
    """
    config, dtype, adapters = run.config, DTYPES[run.config.dtype], Adapters()
    model = load_base(run.base, config, run.ds_config)
    if run.adapter.peft is not None:
        inject_peft(model, run.adapter.peft, config, dtype)
    else:
        max_kept = run.memory.workload.max_kept
        layer_class = layer_class_of(config, run.adapter.expert_r, max_kept)
        names, ranks = run.adapter.names(run.base), run.adapter.ranks
        adapters = inject(model, names, config.r, dtype, layer_class, ranks)
    train_head(model, run.base.head)
    add_loss_head(model)
    trained = list(trainable_parameters(model).values())
    optimizer = make_optimizer(trained, config)
    scheduler = make_scheduler(optimizer, config, run.num_steps)
    engine = zero.make_engine(model, trained, optimizer, scheduler, run.ds_config)
    try:
        gather_together(run, model, adapters)
        check_model(run, model, adapters)
    except BaseException:  # a program may go on, and train another
        zero.destroy(engine)
        raise
    return engine, adapters


def gather_together(run: Prepared, model: Any, adapters: Adapters) -> None:
    """Set what ZeRO-3 gathers at a time: a layer's W0, A and B. Not collective.

    Where activations are recomputed and ``gathers_blocks``, it is a whole decoder block. DeepSpeed
    then keeps the block from its recomputation to the end of its backward pass; otherwise it
    gathers every layer again in between, although it already holds the block (docs/ds_configs.md).
    """
    for adapter in adapters.values():
        zero.gather_together(adapter, adapter.base_layer.parameters())
    gather_peft_together(model)
    memory, prefix = run.memory, run.memory.footprint.init.prefix
    if prefix is not None and gathers_blocks(memory.shape, memory.placement, memory.workload):
        for block in model.get_submodule(prefix.rstrip(".")):
            zero.gather_together(block, (p for p in block.parameters() if not p.requires_grad))


def has_row(training: TrainingRun, stage: str) -> bool:
    """Return whether an evaluation of this stage is logged already. Collective."""
    found = [
        training.log is not None and any(row.get("stage") == stage for row in training.log.rows)
    ]
    dist.broadcast_object_list(found, src=0)
    return found[0]

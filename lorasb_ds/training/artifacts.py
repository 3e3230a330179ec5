"""What a run prints and writes when it begins, and the files that it writes when it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorasb_ds.adapters.peft_experts import expert_fields
from lorasb_ds.adapters.peft_methods import save_peft_method
from lorasb_ds.adapters.peft_targets import target_fields
from lorasb_ds.adapters.peft_writer import peft_target_modules, save_peft_adapter, with_ranks
from lorasb_ds.config.paths import read_json
from lorasb_ds.config.run_layout import (
    ADAPTER,
    ALIGNMENT_PICTURE,
    INIT_PICTURE,
    INIT_REPORT,
    LOSS_PICTURE,
    MODEL_CARD,
    REPORT,
    RUN_JSON,
    rebased_folder,
    rebasing_steps,
)
from lorasb_ds.config.stored_paths import ABSOLUTE, absolute, with_absolute_paths
from lorasb_ds.data.template import template_origin
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.init.init_report import InitReport
from lorasb_ds.models.checkpoint_files import model_path
from lorasb_ds.models.classification import head_modules
from lorasb_ds.models.loading import DTYPES
from lorasb_ds.models.tokenizer_files import TokenizerFiles
from lorasb_ds.runs.history import evaluation_of, for_json
from lorasb_ds.runs.output_dir import say, say_if_bf16_is_emulated
from lorasb_ds.runs.plots import draw_alignment, draw_loss_curve
from lorasb_ds.runs.run_log import provenance
from lorasb_ds.system.files import write_json, write_text
from lorasb_ds.system.host_memory import ranks_of_host
from lorasb_ds.training.model_card import model_card
from lorasb_ds.training.prepare import Prepared
from lorasb_ds.training.report import write_report
from lorasb_ds.training.report_init import draw_init
from lorasb_ds.training.training_run import TrainingRun


def describe(run: Prepared, folder: Path) -> dict[str, Any]:
    """Return the content of ``run.json``: the options, sizes and versions of the run."""
    return {
        "config": with_absolute_paths({**run.config.model_dump(), "output_dir": str(folder)}),
        ABSOLUTE: True,
        "ds_config": run.ds_config,
        "world_size": zero.world_size(),
        "processes_per_host": ranks_of_host(default=zero.world_size()),
        "accelerator": accelerator.name(),
        "model_type": run.base.model_type,
        "chat_template": None if run.config.classifies else template_origin(run.base.tokenizer),
        "notes": run.notes,
        "adapter": {"r_of_layers": run.adapter.r_of_layers, "expert_r": run.adapter.expert_r},
        "peft_warning": run.adapter.peft_warning,
        "trainable_parameters": run.memory.workload.num_trainable,
        **_classification(run),
        "num_steps": run.num_steps,
        "resumed_at": run.resume.step if run.resume else None,
        "rows": {"train": dict(run.data.train.counts)}
        | ({"held_out": dict(run.data.held_out.counts)} if run.data.held_out else {})
        | ({"init": dict(run.data.init.counts)} if run.config.init_data else {}),
        "memory": {"predicted": run.memory.describe()},
        **provenance(),
    }


def describe_end(training: TrainingRun, saved_step: int) -> dict[str, Any]:
    """Return what ``run.json`` holds beside ``describe`` once the run is trained. Rank 0 only.

    Args:
        saved_step: the step whose adapter is saved.
    """
    assert training.log is not None
    state = training.state
    saved: dict[str, Any] = {"step": saved_step}
    if training.run.data.held_out is not None:
        saved = for_json(evaluation_of(training.log.rows, saved_step))
    return {
        "steps_done": state.step,
        "saved": saved,  # with its evaluation, as it is in metrics.jsonl
        "best": {"step": state.best_step, "eval_loss": state.best_loss},
    }


def _classification(run: Prepared) -> dict[str, Any]:
    """Return what ``run.json`` holds of a classifier: its labels and its head."""
    if run.data.classes is None:
        return {}
    size = run.memory.workload.head_size
    return {
        "labels": run.data.classes.labels,
        "head": run.base.head,
        "head_parameters": size,
        "pad_token": run.base.tokenizer.pad_token,
    }


def _together(run: Prepared) -> str:
    size = run.config.sequence_parallel
    return f", every {size} of which compute a row together" if size > 1 else ""


def announce(run: Prepared, folder: Path) -> None:
    """Print what the user should know before the base is loaded."""
    say(f"run folder {folder}")
    say(f"training rows: {run.data.train.describe()}")
    if run.config.init_data is not None:
        say(f"rows for the init ({', '.join(run.config.init_data)}): {run.data.init.describe()}")
    for note in run.notes:
        say(note)
    say(str(run.memory))
    if run.memory.problem:
        say(f"warning: {run.memory.problem}")
    say(
        f"{len(run.adapter.targets)} layers with an adapter ({run.config.method}), "
        f"{run.memory.workload.num_trainable:,} trainable parameters, {zero.world_size()} "
        f"process(es) on {accelerator.name()}{_together(run)}, {run.num_steps} steps of "
        f"{run.config.train_batch_size} {'packs' if run.config.packing else 'rows'}"
    )
    say_if_bf16_is_emulated(run.config)
    adapter = run.adapter
    if adapter.experts:
        num_experts = {shape[0] for shape in adapter.experts.values()}
        say(
            f"{len(adapter.experts)} projections of {'/'.join(map(str, sorted(num_experts)))} "
            f"experts with an adapter of rank {adapter.expert_r} for each"
        )
    if frozen := num_frozen_in_experts(run):
        why = f": {adapter.frozen_experts}" if adapter.frozen_experts else ""
        share = frozen / run.base.shape.num_parameters
        say(
            f"{frozen:,} parameters of MoE experts ({share:.0%} of the model) stay "
            f"frozen without an adapter{why}"
        )


def num_frozen_in_experts(run: Prepared) -> int:
    """Return the number of elements of the base's MoE experts that have no adapter."""
    return run.base.shape.num_in_experts - sum(map(math.prod, run.adapter.experts.values()))


def finish(
    training: TrainingRun, init: InitReport, tensors: Any, description: dict[str, Any]
) -> None:
    """Write the adapter, the pictures and the report. Rank 0 only."""
    run, folder, log = training.run, training.folder, training.log
    assert log is not None
    write_json(folder / RUN_JSON, description)
    if tensors:
        work = run.memory.workload
        num_kept = next((a.num_kept for a in training.adapters.values()), 0)
        pairs = work.pairs - work.max_kept + num_kept  # early stopping may have left some out
        save_adapter(run, folder / ADAPTER, tensors, pairs)
        rank = None if run.adapter.peft else run.adapter.largest_r(run.config.r) * pairs
        write_text(folder / ADAPTER / MODEL_CARD, model_card(description, log.rows, rank))
        draw_loss_curve(folder / LOSS_PICTURE, log.rows)
    if log.alignment:
        draw_alignment(folder / ALIGNMENT_PICTURE, log.alignment)
    if init.layers:
        draw_init(folder / INIT_PICTURE, init)
    # Last: a run that has its report is finished.
    in_pairs, frozen = run.memory.workload.num_in_expert_pairs, num_frozen_in_experts(run)
    rebased_after = rebasing_steps(run.config.rebase_every, training.state.step)
    rebasings = {
        s: read_json(str(rebased_folder(folder, s) / INIT_REPORT), "") for s in rebased_after
    }
    write_report(
        folder / REPORT,
        description,
        log.rows,
        init,
        run.adapter.targets,
        in_pairs,
        frozen,
        rebasings,
    )


def save_adapter(
    run: Prepared, folder: Path, tensors: Mapping[str, torch.Tensor], pairs: int
) -> None:
    """Write the trained adapter as a PEFT folder. Rank 0 only.

    Args:
        pairs: how many pairs of its rank a layer's factors are.
    """
    config, base_model = run.config, absolute(model_path(run.config.model))
    tokenizer = TokenizerFiles.of(run.base)
    if run.adapter.peft is not None:
        empty = run.base.empty_model(DTYPES[config.dtype])
        save_peft_method(folder, run.adapter.peft, empty, tensors, base_model, tokenizer)
        return
    adapter, r = run.adapter, run.adapter.largest_r(config.r) * pairs
    modules = peft_target_modules(adapter.targets, run.base.module_names)
    fields = target_fields(run.base.model_type, modules)
    if adapter.experts:
        ranks = dict.fromkeys(adapter.experts, adapter.expert_r * pairs)
        fields = expert_fields(r, fields, ranks, run.base.experts)
    own_ranks = {name: of * pairs for name, of in adapter.ranks.items() if of * pairs != r}
    tensors, fields = with_ranks(tensors, fields, own_ranks, r)
    save_peft_adapter(
        folder,
        tensors,
        r=r,
        base_model=base_model,
        tokenizer=tokenizer,
        modules_to_save=head_modules(run.base.model),
        **fields,
    )
    if run.adapter.peft_warning:
        say(f"warning: {run.adapter.peft_warning}")

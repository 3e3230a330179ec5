"""Everything that one process can check of a run, before a process group exists."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lorasb_ds.config.ds_config import resolve_ds_config
from lorasb_ds.config.paths import read_json
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import check_output_dir, rebasing_steps
from lorasb_ds.data.batch import Batch, Sample, rank_batches
from lorasb_ds.data.dataset import TokenizedRows
from lorasb_ds.data.run_rows import Data, load_data
from lorasb_ds.data.sampler import Pack, StepSampler, init_sample
from lorasb_ds.data.template import template_note
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.distributed.ds_config_check import check_ds_config
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.basis import fingerprint
from lorasb_ds.init.init_report import InitReport
from lorasb_ds.models.base import Base, open_base
from lorasb_ds.models.sequence_parallel import check_shareable
from lorasb_ds.runs.checkpoint import Resume, find_resume
from lorasb_ds.runs.tracking import check_tracker
from lorasb_ds.training.adapter_plan import AdapterPlan, plan_adapter
from lorasb_ds.training.memory import RunMemory, plan_memory
from lorasb_ds.training.resume_check import (
    check_init_from,
    check_resume,
    what_must_match,
    with_global_batch,
)
from lorasb_ds.training.table_check import check_tables


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked as far as one process can.

    Attributes:
        config: the options, with what the ds_config and the base's files decide.
        ds_config: for ``deepspeed.initialize``, without "auto".
        ds_config_file: the ds_config as it was read.
        base: the base's files.
        adapter: the layers with an adapter.
        data: the rows.
        gradient_rows: positions in ``data.init`` of the rows that the init's gradient is of.
        probe_rows: those of the rows that the init measures losses on.
        order: the order of the training rows.
        num_steps: optimizer steps of the whole run.
        memory: what the run holds and what is free.
        made_from: all that the init depends on but its rank.
        same_run: what a checkpoint of this run agrees on, but for the digest of its basis.
        resume: where the run goes on; None: it starts anew.
        stored_init: report of the init that is loaded: of --init-from, cut to r, or of the run that
            is resumed; None: the init is computed.
        table_notes: about rows that the model's tables are not made for.
    """

    config: RunConfig
    ds_config: dict[str, Any]
    ds_config_file: dict[str, Any]
    base: Base
    adapter: AdapterPlan
    data: Data
    gradient_rows: list[int]
    probe_rows: list[int]
    order: StepSampler
    num_steps: int
    memory: RunMemory
    made_from: dict[str, str]
    same_run: dict[str, Any]
    resume: Resume | None
    stored_init: InitReport | None
    table_notes: list[str]

    @property
    def notes(self) -> list[str]:
        """What the user should know of the base's files, the adapter and the data."""
        warning = self.adapter.peft_warning
        warnings = [f"warning: {warning}"] if warning else []
        if self.data.train.use_template and (note := template_note(self.base.tokenizer)):
            warnings.append(note)
        of_adapter = [*self.adapter.rank_note, *self.adapter.left_out, *warnings]
        return [*self.base.notes(), *of_adapter, *self.data.notes, *self.table_notes]

    def batches(self, rows: TokenizedRows, indices: Iterable[int]) -> list[Batch]:
        """Return this rank's micro-batches of some rows; every rank has as many."""
        return self._deal(rows, [[i] for i in indices], None, self.config.micro_batch_size)

    def step_batches(self, packs: Sequence[Pack]) -> list[Batch]:
        """Return this rank's micro-batches of an optimizer step on training rows."""
        rounds, size = self.config.gradient_accumulation_steps, self.config.micro_batch_size
        return self._deal(self.data.train, packs, rounds, size, packed=self.config.packing)

    def sample(self, indices: Sequence[int], rows: TokenizedRows | None = None) -> Sample:
        """Return this rank's micro-batches of some rows for the init, on its device.

        Args:
            rows: [default: ``data.init``]
        """
        rows = self.data.init if rows is None else rows
        size = self.config.init_micro_batch_size or self.config.micro_batch_size
        batches = self._deal(rows, [[i] for i in indices], None, size)
        return Sample(
            batches=[batch.to(accelerator.device()) for batch in batches],
            num_rows=len(indices),
            num_label_tokens=int(rows.num_labels[list(indices)].sum()),
        )

    def rebasing_rows(self, number: int) -> tuple[list[int], list[int]]:
        """Return ``gradient_rows`` and ``probe_rows`` of a re-basing, counted from 1.

        Each draws its own.
        """
        seed = self.config.seed_of_init + number
        return init_sample(len(self.data.init.examples), self.config.init_samples, seed)

    @property
    def one_row(self) -> bool:
        """Whether a packed batch is one row, as variable-length attention kernels take it."""
        return "flash" in (self.base.hf_config._attn_implementation or "")

    def _deal(
        self,
        rows: TokenizedRows,
        packs: Sequence[Pack],
        rounds: int | None,
        micro_batch_size: int,
        packed: bool = False,
    ) -> list[Batch]:
        shares = self.config.sequence_parallel
        batches = rank_batches(
            rows.examples,
            rows.lengths,
            packs,
            micro_batch_size=micro_batch_size,
            pad_token_id=self.base.tokenizer.pad_token_id,
            rank=zero.rank() // shares,
            world_size=zero.world_size() // shares,
            num_micro_batches=rounds,
            one_row=self.one_row if packed else None,
        )
        if shares == 1:
            return batches
        return [batch.piece(zero.rank() % shares, shares) for batch in batches]


def prepare(config: RunConfig, world_size: int, local_size: int | None = None) -> Prepared:
    """Check the options, the base's files, the rows and the memory of a run. Not collective.

    Args:
        world_size: number of processes.
        local_size: number of processes on this host. [default: all]
    Raises:
        ConfigError: what is wrong and what to do about it.
    """
    base, config = open_base(config)
    check_output_dir(config, config.init_from)
    check_tracker(config)
    resume = find_resume(config)
    if resume is not None and resume.checkpoint is not None:
        config = with_global_batch(config, resume.checkpoint)
    ds_config, config = resolve_ds_config(config, world_size, local_size)
    check_ds_config(ds_config, config.ds_config)
    ds_config_file = read_json(config.ds_config, "--ds-config")

    base.check_files()
    if config.packing:
        _check_packing(base.model)
    if config.classifies and (base.experts or base.other_experts):
        raise ConfigError(
            f"--task-type sequence-classification: --model {config.model} is a mixture of experts, "
            "which cannot be trained as a classifier yet. Give a dense model."
        )
    _make_experts_leaves(ds_config, base)
    adapter = plan_adapter(config, base, resume.folder if resume is not None else None)

    data = load_data(config, base.tokenizer)
    if data.classes is not None:
        base = base.with_classes(data.classes)
    table_notes = check_tables(config, base, data)
    if config.sequence_parallel > 1:
        check_shareable(base.model, config.sequence_parallel, data.longest)
    num_rows = len(data.init.examples)
    gradient_rows, probe_rows = init_sample(num_rows, config.init_samples, config.seed_of_init)
    order = order_of(config, data.train)
    num_steps = config.max_steps or order.num_steps(config.epochs)

    rows_digest = data.init.select(gradient_rows).digest
    made_from = fingerprint(
        config, base.digest, adapter.targets, rows_digest, adapter.experts, adapter.expert_r
    )
    if data.classes is not None:
        labels = json.dumps(data.classes.labels).encode()
        made_from["classes of the labels"] = hashlib.sha256(labels).hexdigest()
    same_run = made_from | what_must_match(config, data.train)
    stored_init = None
    if resume is not None:
        stored_init = check_resume(config, resume, num_steps, same_run, made_from, adapter.ranks)
    elif config.init_from is not None:
        stored_init = check_init_from(config, made_from, adapter.ranks)

    num_rebasings = len(rebasing_steps(config.rebase_every, num_steps))
    if config.rebase_every is not None and not num_rebasings:
        raise ConfigError(
            f"--rebase-every {config.rebase_every}: the run has {num_steps} steps, so that it is "
            "never re-based. Give fewer, or leave it out."
        )
    memory = plan_memory(
        config,
        ds_config,
        base.shape,
        adapter,
        sum(base.model.get_parameter(name).numel() for name in base.head),
        data,
        gradient_rows,
        probe_rows,
        num_rebasings=num_rebasings,
        world_size=world_size,
        computes_init=(stored_init is None or num_rebasings > 0) and adapter.peft is None,
    )
    if not config.force:
        memory.check_fits()
    return Prepared(
        config=config,
        ds_config=ds_config,
        ds_config_file=ds_config_file,
        base=base,
        adapter=adapter,
        data=data,
        gradient_rows=gradient_rows,
        probe_rows=probe_rows,
        order=order,
        num_steps=num_steps,
        memory=memory,
        made_from=made_from,
        same_run=same_run,
        resume=resume,
        stored_init=stored_init,
        table_notes=table_notes,
    )


def order_of(config: RunConfig, train: TokenizedRows) -> StepSampler:
    """Return the order in which a run trains on its rows."""
    return StepSampler(
        train.lengths,
        config.train_batch_size or 1,
        config.seed,
        source_sizes=train.source_sizes,
        weights=config.data_weights,
        group_by_length=config.group_by_length,
        pack_length=config.max_length if config.packing else None,
    )


def _make_experts_leaves(ds_config: dict[str, Any], base: Base) -> None:
    """Let ZeRO-3 gather a module of experts at once, and not part by part ("leaf modules").

    Otherwise ranks whose tokens go to different experts would wait for each other. Experts whose
    projections are layers (``split_experts``) need not be leaves: every rank calls those in every
    pass. DeepSpeed's own list names whole MoE blocks, whose trainable parameters it would reduce at
    every backward pass, the init's included.
    """
    section = ds_config["zero_optimization"]
    if section["stage"] == 3 and (base.experts or base.other_experts):
        section.setdefault("leaf_module", {"classes": [], "names": list(base.other_experts)})


def _check_packing(model: Any) -> None:
    """Refuse a model that takes no position ids; others are tested when the engine is made."""
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise ConfigError(
            f"--packing: a {type(model).__name__} takes no position ids, which keep packed rows "
            "apart. Leave it out; rows of similar lengths are batched together anyway."
        )

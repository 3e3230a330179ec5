"""All that can be known, and can be wrong, before a process group exists."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lorasb_ds.adapters.peft_config import peft_warning
from lorasb_ds.adapters.peft_methods import PeftPlan, plan_peft
from lorasb_ds.config.ds_config import resolve_ds_config
from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.paths import read_json
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import check_output_dir
from lorasb_ds.data.batch import Batch, Sample, share_out
from lorasb_ds.data.cache import load_data
from lorasb_ds.data.dataset import TokenizedRows
from lorasb_ds.data.sampler import Order, Unit, init_sample
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.basis import PEFT_FILE, check_basis, fingerprint
from lorasb_ds.init.init_report import InitReport
from lorasb_ds.models.base import Base, open_base
from lorasb_ds.models.linear_layers import Shapes, select_targets
from lorasb_ds.models.loading import DTYPES
from lorasb_ds.planner.footprint import Footprint, footprint, init_plan
from lorasb_ds.planner.placement import Placement, placement_of
from lorasb_ds.planner.strategies import Cluster
from lorasb_ds.planner.workload import Workload
from lorasb_ds.runs.checkpoint import Resume, find_resume
from lorasb_ds.runs.tracking import check_tracker
from lorasb_ds.training.memory import (
    Forecast,
    check_fits,
    forecast,
    this_cluster,
    with_init_of,
    workload_of,
)
from lorasb_ds.training.resume_check import check_resume, what_must_match, with_global_batch


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked as far as one process can."""

    config: RunConfig
    ds_config: dict[str, Any]
    ds_config_file: dict[str, Any]  # as it was read, before "auto" was filled
    base: Base
    notes: list[str]  # what the user should know of the base's files, the data and the adapter
    peft_warning: str | None  # where PEFT would not read the adapter as it is written
    targets: Shapes
    train: TokenizedRows
    held_out: TokenizedRows | None
    init_rows: TokenizedRows  # of which the init's sample is drawn; the training rows as a rule
    gradient_rows: list[int]  # which of them the gradient is of
    probe_rows: list[int]  # and those that losses are measured on
    placement: Placement
    workload: Workload
    footprint: Footprint
    cluster: Cluster
    forecast: Forecast
    stored_init: InitReport | None  # that of --init-from, cut to r, or of the resumed run
    made_from: dict[str, str]  # all that the init depends on but its rank
    order: Order
    num_steps: int
    same_run: dict[str, Any]  # what a checkpoint of this run agrees on, but for its basis
    resume: Resume | None
    peft: PeftPlan | None = None  # where PEFT makes the layers

    def batches(self, rows: TokenizedRows, indices: Iterable[int]) -> list[Batch]:
        """This rank's micro-batches of some rows; as many on every rank."""
        return self._share(rows, [[i] for i in indices], None, packed=False)

    def step_batches(self, units: Sequence[Unit]) -> list[Batch]:
        """This rank's micro-batches of an optimizer step on training rows."""
        rounds = self.config.gradient_accumulation_steps
        return self._share(self.train, units, rounds, packed=self.config.packing)

    def _share(
        self, rows: TokenizedRows, units: Sequence[Unit], rounds: int | None, packed: bool
    ) -> list[Batch]:
        return share_out(
            rows.examples,
            rows.lengths,
            units,
            micro_batch_size=self.config.micro_batch_size,
            pad_token_id=self.base.tokenizer.pad_token_id,
            rank=zero.rank(),
            world_size=zero.world_size(),
            rounds=rounds,
            one_row=self.one_row if packed else None,
        )

    @property
    def one_row(self) -> bool:
        """Variable-length kernels take a packed batch as one row."""
        return "flash" in (self.base.hf_config._attn_implementation or "")

    def sample(self, indices: Sequence[int]) -> Sample:
        """Some of ``init_rows``, on this rank's device."""
        batches = self.batches(self.init_rows, indices)
        return Sample(
            batches=[batch.to(accelerator.device()) for batch in batches],
            num_rows=len(indices),
            num_label_tokens=int(self.init_rows.num_labels[list(indices)].sum()),
        )


def prepare(config: RunConfig, world_size: int, local_size: int | None = None) -> Prepared:
    """Check the configuration, the model's shapes and the data. Not collective.

    Args:
        local_size: processes on this host. [default: all]
    Raises:
        ConfigError: what is wrong and what to do about it.
    """
    base, config = open_base(config)
    check_output_dir(config)
    check_tracker(config)
    resume = find_resume(config)
    if resume is not None and resume.checkpoint is not None:
        config = with_global_batch(config, resume)
    ds_config, config = resolve_ds_config(config, world_size, local_size)
    zero.check_ds_config(ds_config, config.ds_config)
    ds_config_file = read_json(config.ds_config, "--ds-config")
    base.check_files()
    if config.packing:
        _check_packing(base.model)
    if base.experts and ds_config["zero_optimization"]["stage"] == 3:
        # Gathered at once and not part by part ("leaf modules"): ranks whose tokens go elsewhere
        # would wait for each other. DeepSpeed's own list names whole MoE blocks, of which it would
        # reduce the trainable parameters at every backward pass, the init's too.
        leaves = {"classes": [], "names": list(base.experts)}
        ds_config["zero_optimization"].setdefault("leaf_module", leaves)
    method = METHODS.get(config.method)
    notes = base.notes()
    peft = None
    if method is None:
        peft = plan_peft(config, base.empty_model(DTYPES[config.dtype]))
        targets = peft.layers
    else:
        layers, times = dict(base.shape.layers), method.directions
        targets = select_targets(layers, config.target_modules, config.r, times)
    warning = None
    if method and (warning := peft_warning(base.model_type, targets, config.model)):
        notes.append(f"warning: {warning}")
    train, held_out, init_rows, data_notes = load_data(config, base.tokenizer)
    gradient_rows, probe_rows = init_sample(
        len(init_rows.examples), config.init_samples, config.seed_of_init
    )
    made_from = fingerprint(config, base.digest, targets, init_rows.select(gradient_rows).digest)
    order = Order(
        train.lengths,
        config.train_batch_size or 1,
        config.seed,
        source_sizes=train.source_sizes,
        weights=config.data_weights,
        group_by_length=config.group_by_length,
        pack_length=config.max_length if config.packing else None,
    )
    same_run = made_from | what_must_match(config, train)
    num_steps = config.max_steps or order.num_steps(config.epochs)
    stored_init = None
    if resume is not None:
        stored_init = check_resume(config, resume, num_steps, same_run, made_from)
    elif config.init_from is not None:
        option = f"--init-from {config.init_from}"
        folder = Path(config.init_from)
        uncut = None
        if method is not None and not method.trains_r:
            uncut = "Where A and B are trained they are not cut to a smaller r: compute them again."
        stored_init = check_basis(folder, option, config.r, made_from, uncut)
    form = "nf4" if config.load_in_4bit else "int8" if config.load_in_8bit else config.dtype
    placement = placement_of(ds_config, form, world_size)
    workload = workload_of(config, targets, peft, train, len(gradient_rows))
    longest = int(init_rows.lengths[gradient_rows].max())
    init = init_plan(
        base.shape, replace(workload, max_length=longest), world_size, placement.dtype_bytes
    )
    memory = footprint(base.shape, placement, workload, init)
    if config.init_data is not None:  # whose rows may be longer, or shorter
        sample = init_rows.select([*gradient_rows, *probe_rows])
        of_init = workload_of(config, targets, peft, sample, len(gradient_rows))
        memory = with_init_of(memory, footprint(base.shape, placement, of_init, init))
    cluster = this_cluster(world_size)
    has_init = config.init_from is not None or resume is not None or peft is not None
    forecasted = forecast(base.shape, memory, workload, cluster, has_init)
    check_fits(forecasted, config.force)
    return Prepared(
        config=config,
        ds_config=ds_config,
        ds_config_file=ds_config_file,
        base=base,
        peft_warning=warning,
        notes=[*notes, *data_notes],
        targets=targets,
        train=train,
        held_out=held_out,
        init_rows=init_rows,
        gradient_rows=gradient_rows,
        probe_rows=probe_rows,
        placement=placement,
        workload=workload,
        footprint=memory,
        cluster=cluster,
        forecast=forecasted,
        stored_init=stored_init,
        made_from=made_from,
        order=order,
        num_steps=num_steps,
        same_run=same_run,
        resume=resume,
        peft=peft,
    )


def _check_packing(model: Any) -> None:
    """Refuse a model that has no place for position ids; the engine is tried before training."""
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise ConfigError(
            f"--packing: a {type(model).__name__} takes no position ids, by which packed rows are "
            "kept apart. Leave it out; rows of similar lengths are batched together as it is."
        )


def check_ranks_agree(run: Prepared) -> None:
    """Refuse to go on unless every rank holds the same run and the same rows. Collective.

    Raises:
        ConfigError: on every rank alike.
    """
    held = {
        # ds_config is a path, which may differ between hosts; its content comes next.
        "the options": run.config.model_dump_json(exclude={"ds_config"}),
        "the ds_config": json.dumps(run.ds_config, sort_keys=True),
        "the model's layers": json.dumps(run.base.shape.layers),
        "the training rows": run.train.digest,
        "the held-out rows": run.held_out.digest if run.held_out else "",
        "the rows for the init": run.init_rows.digest,
        "the model's files": run.made_from["model files"],
        "the file of --method peft:": repr(run.peft) + run.made_from.get(PEFT_FILE, ""),
        "the basis": repr(run.stored_init),
        "the checkpoint": repr(run.resume),
    }
    all_held: list[Any] = [None] * zero.world_size()
    dist.all_gather_object(all_held, held)
    for rank, theirs in enumerate(all_held):
        differ = [what for what in held if theirs[what] != all_held[0][what]]
        if differ:
            raise ConfigError(
                f"Rank {rank} and rank 0 do not agree on {', '.join(differ)}. Every host must see "
                "the same files; and some tasks of reasoning-gym depend on Python's hash seed: set "
                "PYTHONHASHSEED=0 (`lorasb train` does)."
            )

"""All that can be known, and can be wrong, before a process group exists."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from lorasb_ds import zero
from lorasb_ds.adapter import Shapes, select_targets
from lorasb_ds.basis import check_basis, fingerprint
from lorasb_ds.config import ConfigError, RunConfig, check_output_dir, read_json
from lorasb_ds.data import (
    Batch,
    Sample,
    TokenizedRows,
    digest,
    init_sample,
    micro_batches,
    tokenize_rows,
)
from lorasb_ds.ds_config import resolve_ds_config
from lorasb_ds.init_report import InitReport
from lorasb_ds.loading import DTYPES, load_config, load_tokenizer, read_shapes
from lorasb_ds.init_plan import InitPlan, plan_init
from lorasb_ds.rows import load_rows


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked as far as one process can."""

    config: RunConfig
    ds_config: dict[str, Any]
    ds_config_file: dict[str, Any]  # as it was read, before "auto" was filled
    hf_config: Any
    tokenizer: Any
    layers: Shapes
    targets: Shapes
    experts: dict[str, int]  # MoE modules that stay frozen, and their elements
    train: TokenizedRows
    held_out: TokenizedRows | None
    gradient_rows: list[int]  # of the training rows, for the init
    probe_rows: list[int]
    init_plan: InitPlan
    stored_init: InitReport | None  # that of --init-from, cut to r
    made_from: dict[str, str]  # all that the init depends on but its rank

    def batches(self, rows: TokenizedRows, indices: Iterable[int]) -> list[Batch]:
        """This rank's micro-batches of some rows; as many on every rank."""
        return list(
            micro_batches(
                rows.examples,
                list(indices),
                self.config.micro_batch_size,
                self.tokenizer.pad_token_id,
                zero.rank(),
                zero.world_size(),
            )
        )

    def sample(self, indices: Sequence[int]) -> Sample:
        """Training rows for the init, on this rank's device."""
        return Sample(
            batches=[batch.to(zero.device()) for batch in self.batches(self.train, indices)],
            num_rows=len(indices),
            num_label_tokens=sum(self.train.examples[i].num_label_tokens for i in indices),
        )


def prepare(config: RunConfig, world_size: int) -> Prepared:
    """Check the configuration, the model's shapes and the data. Not collective.

    Raises:
        ConfigError: what is wrong and what to do about it.
    """
    ds_config, config = resolve_ds_config(config, world_size)
    ds_config_file = read_json(config.ds_config, "--ds-config")
    check_output_dir(config)
    hf_config = load_config(config.model)
    layers, experts = read_shapes(hf_config)
    if experts and ds_config["zero_optimization"]["stage"] == 3:
        # Gathered at once and not part by part ("leaf modules"): ranks whose tokens go elsewhere
        # would wait for each other. DeepSpeed's own list names whole MoE blocks, of which it would
        # reduce the trainable parameters at every backward pass, the init's too.
        leaves = {"classes": [], "names": list(experts)}
        ds_config["zero_optimization"].setdefault("leaf_module", leaves)
    targets = select_targets(layers, config.target_modules, config.r)
    tokenizer = load_tokenizer(config.model)
    train = tokenize_rows(load_rows(config.data), tokenizer, config)
    held_out = None
    if config.eval_data is not None:
        rows = load_rows(config.eval_data, "--eval-data", held_out=True)
        held_out = tokenize_rows(rows, tokenizer, config, option="--eval-data")
    gradient_rows, probe_rows = init_sample(len(train.examples), config.init_samples, config.seed)
    made_from = fingerprint(config, targets, [train.examples[i] for i in gradient_rows])
    stored_init = None if config.init_from is None else check_basis(config, made_from)
    longest = max(len(train.examples[i].input_ids) for i in gradient_rows)
    # Rows are dealt out in micro-batches.
    rounds = -(-len(gradient_rows) // (config.micro_batch_size * world_size))
    rows_per_rank = min(len(gradient_rows), rounds * config.micro_batch_size)
    bytes_per_token = hf_config.get_text_config().hidden_size * DTYPES[config.dtype].itemsize
    budget = config.init_memory_gib
    init_plan = plan_init(
        targets,
        r=config.r,
        world_size=world_size,
        update=config.init_update,
        tokens_per_micro_batch=config.micro_batch_size * longest,
        boundary_bytes=rows_per_rank * longest * bytes_per_token,
        budget_bytes=None if budget is None else int(budget * (1 << 30)),
    )
    return Prepared(
        config=config,
        ds_config=ds_config,
        ds_config_file=ds_config_file,
        hf_config=hf_config,
        tokenizer=tokenizer,
        layers=layers,
        targets=targets,
        experts=experts,
        train=train,
        held_out=held_out,
        gradient_rows=gradient_rows,
        probe_rows=probe_rows,
        init_plan=init_plan,
        stored_init=stored_init,
        made_from=made_from,
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
        "the model's layers": json.dumps(run.layers),
        "the training rows": digest(run.train.examples),
        "the held-out rows": digest(run.held_out.examples) if run.held_out else "",
        "the model's files": run.made_from["model files"],
        "the basis": repr(run.stored_init),
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

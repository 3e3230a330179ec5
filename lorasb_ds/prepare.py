"""All that can be known, and can be wrong, before a process group exists."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from lorasb_ds import zero
from lorasb_ds.adapter import Shapes, select_targets
from lorasb_ds.config import ConfigError, RunConfig, check_output_dir, read_json
from lorasb_ds.data import TokenizedRows, tokenize_rows
from lorasb_ds.ds_config import resolve_ds_config
from lorasb_ds.loading import load_config, load_tokenizer, read_shapes
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
    train: TokenizedRows
    held_out: TokenizedRows | None


def prepare(config: RunConfig, world_size: int) -> Prepared:
    """Check the configuration, the model's shapes and the data. Not collective.

    Raises:
        ConfigError: what is wrong and what to do about it.
    """
    ds_config_file = read_json(config.ds_config, "--ds-config")
    ds_config, config = resolve_ds_config(config, world_size)
    check_output_dir(config)
    hf_config = load_config(config.model)
    layers = read_shapes(hf_config)
    targets = select_targets(layers, config.target_modules, config.r)
    tokenizer = load_tokenizer(config.model)
    train = tokenize_rows(load_rows(config.data), tokenizer, config)
    held_out = None
    if config.eval_data is not None:
        rows = load_rows(config.eval_data, "--eval-data", held_out=True)
        held_out = tokenize_rows(rows, tokenizer, config, option="--eval-data")
    return Prepared(
        config=config,
        ds_config=ds_config,
        ds_config_file=ds_config_file,
        hf_config=hf_config,
        tokenizer=tokenizer,
        layers=layers,
        targets=targets,
        train=train,
        held_out=held_out,
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
        "the training rows": run.train.digest(),
        "the held-out rows": run.held_out.digest() if run.held_out else "",
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

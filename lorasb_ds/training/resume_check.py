"""Checks that a run may continue from a checkpoint, or start from an earlier init."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasb_ds.config.adapter_options import UNIFORM
from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import rebased_folder, rebasing_steps
from lorasb_ds.data.dataset import TokenizedRows
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.basis import check_basis, damage, stored_digests
from lorasb_ds.init.init_report import InitReport
from lorasb_ds.runs.checkpoint import Checkpoint, Resume, check_same_run

REBASE_KEY, ALLOCATION_KEY = "--rebase-every", "--rank-allocation"


def what_must_match(config: RunConfig, train: TokenizedRows) -> dict[str, Any]:
    """Return what a checkpoint and the run that loads it must agree on, by its name in messages.

    What their bases were made from comes on top of it.
    """
    return {
        "--r": config.r,
        "--seed": str(config.seed),  # of the rows' order; the basis has that of its init
        "training rows (--data and how it is tokenized)": train.digest,
        "--train-batch-size": config.train_batch_size,
        "--packing": config.max_length if config.packing else False,
        "--group-by-length": config.group_by_length,
        "--data-weights": list(config.data_weights or ()),
        "rows of each --data": list(train.source_sizes),
        "--optimizer": config.optimizer,
        **({} if config.rebase_every is None else {REBASE_KEY: config.rebase_every}),
        **({} if config.rank_allocation == UNIFORM else {ALLOCATION_KEY: config.rank_allocation}),
        **({} if config.precondition is None else {"--precondition": config.precondition}),
    }


def check_resume(
    config: RunConfig,
    resume: Resume,
    num_steps: int,
    same_run: Mapping[str, Any],
    made_from: Mapping[str, str],
    ranks: Mapping[str, int],
) -> InitReport:
    """Refuse to resume a run that is damaged, another run, or beyond the steps asked for.

    Args:
        num_steps: optimizer steps that the options ask for.
        same_run: what the checkpoint must agree on, but for the digest of its basis.
        made_from: what the basis must have been made from.
        ranks: layer -> its rank; {} for PEFT's methods.
    Returns:
        The report of the run's init.
    Raises:
        ConfigError: naming what is damaged or differs.
    """
    option, checkpoint = f"--resume {config.resume}", resume.checkpoint
    # Gigabytes for a large model: one process reads them, and refuses for all.
    if int(os.environ.get("RANK", 0)) == 0:
        every = checkpoint.made_from.get(REBASE_KEY) if checkpoint is not None else None
        rebased_after = rebasing_steps(every, resume.step)
        for folder in (resume.folder, *(rebased_folder(resume.folder, s) for s in rebased_after)):
            if problem := damage(folder):
                raise ConfigError(
                    f"{option}: the init in {folder} is damaged: {problem}. Restore the file, "
                    "or start the run anew by --overwrite."
                )
    if checkpoint is not None:
        rebased_after = rebasing_steps(config.rebase_every, resume.step)
        digests = stored_digests(resume.folder, rebased_after)
        check_same_run(option, checkpoint, {**same_run, **digests})
    if resume.step > num_steps:
        raise ConfigError(
            f"{option}: the run has done {resume.step} steps, more than the {num_steps} asked for "
            "(--max-steps, --epochs). To go back, name one of its checkpoints."
        )
    uncut = f"To cut its basis to a smaller r, start a new run with --init-from {resume.folder}."
    return check_basis(resume.folder, option, ranks, made_from, uncut)


def check_init_from(
    config: RunConfig, made_from: Mapping[str, str], ranks: Mapping[str, int]
) -> InitReport:
    """Refuse an earlier init (--init-from) that this run's options would not have given.

    Args:
        ranks: layer -> its rank.
    Returns:
        Its report, cut to the ranks.
    Raises:
        ConfigError: what is missing or differs.
    """
    assert config.init_from is not None
    option, method, uncut = f"--init-from {config.init_from}", METHODS.get(config.method), None
    if method is not None and not method.trains_r:
        uncut = "Where A and B are trained they are not cut to a smaller r: compute them again."
    return check_basis(Path(config.init_from), option, ranks, made_from, uncut)


def with_global_batch(config: RunConfig, checkpoint: Checkpoint) -> RunConfig:
    """Take over the checkpoint's rows per step, which the order depends on, if none are given."""
    if "train_batch_size" in config.model_fields_set:
        return config
    rows = checkpoint.made_from.get("--train-batch-size")
    return config.model_copy(update={"train_batch_size": rows})

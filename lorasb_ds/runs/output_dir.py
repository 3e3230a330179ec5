"""Prepare a run's output folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import (
    ADAPTER,
    ALIGNMENT,
    ALIGNMENT_PICTURE,
    BASIS_FILE,
    CHECKPOINTS,
    DS_CONFIG_COPY,
    EXPORTED,
    INIT_PICTURE,
    INIT_REPORT,
    INSPECT_PICTURE,
    LOCK,
    LOSS_PICTURE,
    METRICS,
    PEFT_COPY,
    PROFILE,
    PROFILE_ASIDE,
    REBASED,
    REPORT,
    RUN_JSON,
    SAMPLES,
    TEMPLATE_COPY,
    TENSORBOARD,
    TRACKING,
    WANDB,
    check_output_dir,
    default_output_dir,
    given_rows,
    is_run,
)
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.checkpoint import Resume, find_resume, set_newer_aside
from lorasb_ds.system.files import SUMS_FILE
from lorasb_ds.system.folder_lock import lock_folder

# All that a run writes into its folder, and --overwrite removes from it; but for run.json, which
# marks the folder as a run's, and is replaced.
OUTPUTS = (
    DS_CONFIG_COPY,
    PEFT_COPY,
    TEMPLATE_COPY,
    METRICS,
    SAMPLES,
    ALIGNMENT,
    ALIGNMENT_PICTURE,
    CHECKPOINTS,
    SUMS_FILE,
    TENSORBOARD,
    TRACKING,
    WANDB,
    BASIS_FILE,
    INIT_REPORT,
    INIT_PICTURE,
    ADAPTER,
    f"{ADAPTER}.tmp",
    EXPORTED,
    INSPECT_PICTURE,
    LOSS_PICTURE,
    PROFILE,
    PROFILE_ASIDE,
    REBASED,
    REPORT,
)


def say(text: str) -> None:
    """Print a line on rank 0's console."""
    if zero.rank() == 0:
        with suppress(OSError):  # a closed terminal must not end a run
            print(f"lorasb: {text}", flush=True)


def say_if_bf16_is_emulated(config: RunConfig) -> None:
    """Print that another dtype is faster on this device, where it is.

    Args:
        config: with what the base and the ds_config say.
    """
    quantized = config.load_in_4bit or config.load_in_8bit  # computes in bf16
    if config.dtype == "bf16" and not quantized and accelerator.emulates_bf16():
        on_cpu = accelerator.name() == "cpu"
        instead = "fp32 is" if on_cpu else "fp16, whose losses are scaled, is"
        say(
            f"this {'CPU' if on_cpu else 'GPU'} has no bf16 arithmetic: --dtype {instead} many "
            "times faster here"
        )


def _torn(folder: Path) -> list[str]:
    """Return the files that a killed run has left half written."""
    names = [f"{name}.tmp" for name in (RUN_JSON, *OUTPUTS)]
    return [name for name in names if (folder / name).is_file()]


@contextmanager
def output_dir(config: RunConfig, resume: Resume | None) -> Iterator[Path]:
    """Create and lock the output folder, and remove what an overwritten run left there. Collective.

    Rank 0 does it, and broadcasts the folder. The lock is released at the end of the ``with``
    block, or of the process.

    Args:
        resume: where the run goes on, of whose folder everything is kept but the report; None: it
            starts anew.
    Raises:
        ConfigError: on every rank, if the folder cannot be written, another job has it, or one has
            changed it since ``prepare``.
    """
    found: list[Any] = ["", None]  # the folder, and what is wrong
    lock = None
    if zero.rank() == 0:
        folder = Path(config.output_dir or default_output_dir(config.model))
        found[0] = str(folder)
        try:
            folder.mkdir(parents=True, exist_ok=config.output_dir is not None)
            lock = lock_folder(folder / LOCK, config.resume is not None, say)
            # Again: what is there may have come since.
            check_output_dir(config, config.init_from)
            if find_resume(config) != resume:
                raise ConfigError(f"{folder} has changed since this run was started. Try again.")
            remove_outputs(folder, resumed=resume is not None)
            if resume is None:
                remove_given_rows(folder, config)
            for name in set_newer_aside(folder, resume.step) if resume is not None else ():
                say(f"set aside, since this run continues from before it: {name}")
        except OSError as error:
            found[1] = f"--output-dir {folder} cannot be written: {error}."
        except ConfigError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    name, problem = found
    try:
        if problem is not None:
            raise ConfigError(problem)
        if lock is not None and not lock.is_held:
            say(f"warning: {name} is on a file system without locks: start no other job there")
        yield Path(name)
    finally:
        if lock is not None:
            lock.release()


def remove_given_rows(folder: Path, config: RunConfig) -> None:
    """Remove the rows that a program gave to an earlier run in the folder, unless they are used."""
    sources = (*config.data, config.eval_data, *(config.init_data or ()))
    used = {Path(source).resolve() for source in sources if source is not None}
    for path in given_rows(folder):
        if path.resolve() not in used:
            path.unlink(missing_ok=True)


def remove_outputs(folder: Path, resumed: bool) -> None:
    """Remove what an earlier run has left in its folder; nothing from any other folder.

    Args:
        resumed: keep everything but the report.
    """
    outputs = OUTPUTS if is_run(folder) else ()
    for old in (REPORT,) if resumed else (*_torn(folder), *outputs):
        if (folder / old).is_dir():
            shutil.rmtree(folder / old)
        else:
            (folder / old).unlink(missing_ok=True)

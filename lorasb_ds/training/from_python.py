"""``lorasb_ds.train``: a run from a program. Torch-free: where it runs imports what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import check_output_dir, default_output_dir
from lorasb_ds.data.given_rows import Rows, write_given_rows
from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.result import TrainResult
from lorasb_ds.system.home import ensure_home


def train(
    config: RunConfig,
    *,
    rows: Rows | None = None,
    eval_rows: Rows | None = None,
    on_log: Callable[[dict[str, Any]], object] | None = None,
    launch: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Fine-tune a model as `lorasb train` does, and leave the same in the output folder.

    In this process, on one device; or where torchrun or deepspeed has started it as a rank, in all
    processes of that job, which must all call this (collective). It may be called again: the
    process group stays. torch's global random state is seeded, and a Ctrl-C between steps ends the
    run with a checkpoint. Or with ``launch``, in processes that `lorasb train` starts.

    Rows that are given are written to ``rows-DIGEST.jsonl`` in the output folder, and are then
    ``config.data`` or ``config.eval_data`` as any other file, in run.json, too. In a job rank 0's
    are those of all: other ranks do not look at theirs.

    Args:
        config: the options, by the names that `lorasb train --help` has with "-" for "_".
        rows: rows to train on, in place of ``config.data``: dicts in any form that a line of a
            .jsonl may have, or a function that returns them, which only rank 0 calls.
        eval_rows: the same in place of ``config.eval_data``.
        on_log: is called with each new row of ``metrics.jsonl``, of a step ("loss", "lr", …) or an
            evaluation ("stage", "eval_loss", …); on rank 0 only. What it raises ends the run;
            in a job on all ranks, after the next step at the latest.
        launch: options of `lorasb train` that are not in ``config``: {"num_gpus": 8}, or
            {"hostfile": "hosts", "max_restarts": 2}. {} takes all GPUs of this host. The command
            is ended with this call, but not if this process is killed.
    Raises:
        ConfigError: if the run cannot be done as asked, before it begins wherever that is known.
        JobError: with ``launch``, if the processes end before the run does; in a job, if rank 0 has
            raised something else than a ConfigError: on the others.
        OutOfMemoryError, FloatingPointError, OSError: in this process, if the run breaks off.
        KeyboardInterrupt: at a Ctrl-C before the first step, or at a second one.
    """
    ensure_home()
    asked = {name: getattr(config, name) for name in config.model_fields_set}
    given = {"data": ("rows", rows), "eval_data": ("eval_rows", eval_rows)}
    named = {field: (name, these) for field, (name, these) in given.items() if these is not None}
    for field, (name, _) in named.items():
        if asked.get(field) is not None:
            raise ConfigError(f"{name} and config.{field} both give rows. Give one of them.")
    checked = load_run_config(asked | dict.fromkeys(named, "."))  # before rows are made

    def make_options() -> dict[str, Any]:
        check_output_dir(checked, checked.init_from)
        folder = Path(checked.output_dir or default_output_dir(checked.model)).absolute()
        options = asked | {"output_dir": str(folder)}
        for field, (name, these) in named.items():
            options[field] = str(write_given_rows(folder, these, name))
        return options

    if launch is not None:
        from lorasb_ds.training.launched import train_launched

        return train_launched(make_options, launch, on_log or (lambda row: None))
    from lorasb_ds.training.here import train_here

    return train_here(make_options, on_log)

"""`lorasb eval`: its options, and where it runs. Torch-free."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from launcher.hosts.environment import asked_for
from launcher.jobs.launch_options import LaunchOptions, launch_options
from launcher.jobs.ranks import EVAL, run_here, worker_command
from launcher.jobs.start import start
from launcher.options import (
    CONTEXT,
    EVAL_FIELDS,
    add_options,
    field_options,
    reports_problems,
    with_settings,
)
from launcher.sections import SectionedCommand
from lorasb_ds.config.data_options import DEMO_EVAL_DATA
from lorasb_ds.config.option_group import to_arguments
from lorasb_ds.config.resolve import load_run_config, with_adapter
from lorasb_ds.config.run_layout import default_output_dir
from lorasb_ds.errors import ConfigError, option_name
from lorasb_ds.evaluation.tasks import TASKS

# Options of an evaluation that a run does not have.
OWN = ("adapter", "task", "num_samples", "max_new_tokens", "lm_eval")
OPTIONS = (
    click.option("--model", help="Base, as in `train`. [default: the adapter's, or the demo]"),
    click.option(
        "--adapter",
        type=click.Path(exists=True, file_okay=False),
        help="A run's folder, one of its checkpoints, or a PEFT LoRA folder. [default: none]",
    ),
    click.option(
        "--data",
        multiple=True,
        help="Rows, as in `train`; may be given several times. [default: the demo's held-out rows]",
    ),
    click.option(
        "--task",
        type=click.Choice(TASKS),
        default="auto",
        show_default=True,
        help="What rows ask for, and how answers are judged (auto: recognized by the rows).",
    ),
    click.option(
        "--num-samples",
        type=click.IntRange(min=1),
        help="Number of rows to take, the first ones. [default: all]",
    ),
    click.option(
        *("--batch-size", "--micro-batch-size", "micro_batch_size"),
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="Rows at a time in each process.",
    ),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        help="Longest answer. [default: 512 for gsm8k, metamath and math, else 128]",
    ),
    click.option(
        "--lm-eval",
        metavar="TASKS",
        help="Run these tasks of lm-evaluation-harness instead, separated by commas (names, or "
        "their YAML files); one process.",
    ),
    click.option(
        "--output-dir",
        help="Folder for eval.json and answers.jsonl, a line for each row. [default: none; of "
        "several processes runs/eval-MODEL-DATE-TIME]",
    ),
)


def eval_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add all options; the command gets ``OWN`` as ``own``, and RunConfig's fields as ``given``."""

    @wraps(command)
    def wrapper(**options: Any) -> Any:
        own = {name: options.pop(name) for name in OWN}
        if not options["data"]:
            options["data"] = None if own["lm_eval"] else (DEMO_EVAL_DATA,)
        launch = {"launch": options.pop("launch")} if "launch" in options else {}
        return command(own=own, given=with_adapter(options, own["adapter"]), **launch)

    return add_options(*OPTIONS, field_options(*EVAL_FIELDS))(wrapper)


@click.command(name="eval", cls=SectionedCommand, context_settings=CONTEXT)
@reports_problems
@with_settings(replays=False)
@launch_options
@eval_options
def eval_command(launch: LaunchOptions, own: dict[str, Any], given: dict[str, Any]) -> None:
    """Measure loss and scores of a model on held-out rows, with or without an adapter.

    Answers are generated greedily and compared with those of the rows; choices are made by
    likelihood. Runs in this process, or with --num-procs, --num-gpus or --hostfile in several, on
    shards of ZeRO-3.
    """
    launch.check()
    several = launch.num_procs or launch.num_gpus or launch.hostfile or launch.no_ssh
    if launch.max_restarts:
        raise ConfigError("--max-restarts: an evaluation is not restarted. Leave it out.")
    if own["lm_eval"] is not None:
        asked = {"--data": given.get("data"), "--max-new-tokens": own["max_new_tokens"]}
        asked |= {"--task": own["task"] != "auto", "Several processes": several}
        asked["--task-type"] = given.get("task_type") == "sequence-classification"
        if extra := [name for name, value in asked.items() if value]:
            raise ConfigError(
                f"--lm-eval: {extra[0]} cannot be chosen with it. It brings its own rows and "
                "rules, and runs in one process."
            )
    arguments = to_arguments(own)
    if not several:
        environment = {**os.environ, **asked_for(os.environ, launch.env)}
        if useless := [name for name in launch.given() if name not in ("env", "dry_run")]:
            click.echo(
                f"lorasb: {', '.join(map(option_name, useless))}: not used, since this evaluation "
                "runs in one process",
                err=True,
            )
        command = worker_command("eval", [*arguments, *to_arguments(given)])
        if launch.dry_run:
            click.echo(shlex.join(command))
            return
        # The rows that `lorasb train` sees: some tasks of reasoning-gym depend on the hash seed.
        sys.exit(run_here(command, {"PYTHONHASHSEED": "0", **environment}))
    if given.get("output_dir") is None and not launch.no_ssh:
        given["output_dir"] = str(default_output_dir(load_run_config(given).model, "eval-"))
    sys.exit(start(launch, [EVAL, *arguments], None, given))

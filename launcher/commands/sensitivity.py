"""`lorasb sensitivity`: how much an init depends on its sample. Torch-free."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from launcher.jobs.job import make_job
from launcher.jobs.launch_options import LaunchOptions, launch_options
from launcher.options import CONTEXT, add_options, field_options, reports_problems, to_arguments
from launcher.sweeps.places import find_places
from launcher.sweeps.pool import Place
from launcher.sweeps.runs import (
    OF_NO_CONSEQUENCE,
    PARALLEL,
    Conductor,
    check_folder,
    launch_in,
    shown,
    sweep_folder,
    train_command,
)
from launcher.sweeps.sensitivity import SHARES, Draw, sample_sizes, told_sizes
from launcher.sweeps.sensitivity_run import COMMAND, PICTURE, Study, ask, run_study
from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.errors import ConfigError

# Set in its runs, or without meaning there.
OWN = ("init_samples", "init_seed", "init_from", "output_dir", "overwrite", "resume")
FREE = {*OWN, *OF_NO_CONSEQUENCE}
OPTIONS = (
    click.option("--output-dir", required=True, help="Folder of all runs and of what they say."),
    click.option(
        "--share",
        "shares",
        default=SHARES,
        show_default=True,
        metavar="SHARE,…",
        help="Samples of these shares of the rows, of two rows at least.",
    ),
    click.option(
        "--init-seeds",
        "seeds",
        default="1,2,3",
        show_default=True,
        metavar="SEED,…",
        help="Seeds, each of which draws a sample of every size.",
    ),
    PARALLEL,
    click.option("--overwrite", is_flag=True, help="Delete what --output-dir has of earlier runs."),
)


@click.command(name=COMMAND, context_settings=CONTEXT)
@reports_problems
@add_options(*OPTIONS)
@launch_options
@field_options(*(name for name in RunConfig.model_fields if name not in OWN))
def sensitivity_command(
    launch: LaunchOptions,
    output_dir: str,
    shares: str,
    seeds: str,
    parallel: int,
    overwrite: bool,
    **given: Any,
) -> None:
    """How much the init depends on its sample: samples of several sizes and seeds, compared.

    Every one of them is a run on the same rows in the same batches. Told are the losses that they
    come to, and the share of their directions that two bases have in common. The same command goes
    on where it was stopped. Takes the options of `lorasb train`.
    """
    study = Study(
        folder=Path(output_dir).expanduser(),
        launch=launch,
        given=given,
        shares=numbers("--share", shares, float),
        seeds=numbers("--init-seeds", seeds, int),
    )
    places = find_places(launch, parallel, has_batch=given["train_batch_size"] is not None)
    options = check(study, places[0])
    if not launch.dry_run:  # before rows are counted, which takes a while
        check_folder(study.folder, COMMAND, options, overwrite)
    num_rows = int(ask("rows", to_arguments(given)))
    options["rows to draw from"] = num_rows
    draws = study.draws(num_rows)
    for line in told_sizes(study.shares, num_rows):
        click.echo(line)
    if launch.dry_run:
        for i, draw in enumerate(draws):
            command = train_command(launch, study.options_of(draw), places[i % len(places)])
            click.echo(shown(draw.name, command))
        return
    if len(draws) < 2:
        raise ConfigError(
            "One sample alone cannot be compared. Give --init-seeds or --share more than one value."
        )
    with sweep_folder(study.folder, COMMAND, options, overwrite, [PICTURE]):
        sys.exit(run_study(study, options, num_rows, Conductor(places)))


def numbers(option: str, text: str, kind: Any) -> tuple[Any, ...]:
    """Those of a list with commas; each once."""
    try:
        found = tuple(dict.fromkeys(kind(word) for word in text.split(",") if word.strip()))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{option} {text} must be {what}, with commas between.") from None
    if not found:
        raise ConfigError(f"{option} is empty. Give at least one number.")
    return found


def check(study: Study, place: Place) -> dict[str, Any]:
    """What can be wrong with its runs before the first of them is started.

    Returns:
        The options that have to be the same whenever the command goes on.
    Raises:
        ConfigError: what is wrong.
    """
    sample_sizes(study.shares, num_rows=2)  # shares that are none
    draw = Draw(num_rows=2, seed=study.seeds[0])
    for seed in study.seeds:
        config = load_run_config(study.options_of(Draw(2, seed)))
    known = [name for name in METHODS if name == "lora-sb" or name.startswith("sb-")]
    if config.method not in known:
        raise ConfigError(
            f"--method {config.method}: the bases of an init are compared, and this method trains "
            f"its own, or has none that are orthonormal. Give one of {', '.join(known)}."
        )
    if config.eval_data is None and config.val_set_size is None:
        raise ConfigError(
            "Runs are compared by their held-out loss. Name held-out rows by --eval-data, or give "
            "--val-set-size."
        )
    job = make_job(launch_in(study.launch, place), [], None, study.options_of(draw))
    chosen = {name: value for name, value in config.model_dump().items() if name not in FREE}
    found: dict[str, Any] = json.loads(
        json.dumps({**chosen, "processes": job.num_procs or job.num_gpus})
    )
    return found

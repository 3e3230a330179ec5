"""`lorasb compare`: a sweep of runs, each a `lorasb train` of its own. Torch-free."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from launcher.jobs.inputs import describe_inputs
from launcher.jobs.launch_options import LaunchOptions, launch_options
from launcher.jobs.make_job import make_job
from launcher.options import CONTEXT, add_options, field_options, reports_problems, with_settings
from launcher.sections import SectionedCommand
from launcher.sweeps.allocations import find_allocations
from launcher.sweeps.compare_run import Comparison, run_comparison
from launcher.sweeps.grid import SWEPT, Trial, is_file, label, make_sweep, method_of, own_options
from launcher.sweeps.pool import Allocation
from launcher.sweeps.runs import OF_NO_CONSEQUENCE, PARALLEL, launch_in, shown, stored_options
from lorasb_ds.config.data_options import REASONING_GYM
from lorasb_ds.config.methods import PEFT_PREFIX
from lorasb_ds.config.paths import expand_home, read_json
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.stored_paths import with_absolute_paths
from lorasb_ds.errors import ConfigError, printable
from lorasb_ds.evaluation.reasoning_gym import check_scorer

POSITIVE = click.IntRange(min=1)
FREE = {*SWEPT, *OF_NO_CONSEQUENCE, "dataset_num_proc", "max_skipped_rows"}
FREE |= {"generate_samples", "trust_remote_code"}
OPTIONS = (
    click.option("--output-dir", required=True, help="Folder of the comparison."),
    click.option(
        "--method",
        "methods",
        multiple=True,
        help="As in `train`, or peft:FILE.json; may be given several times. NAME=METHOD gives it a "
        "name, under which it has options of its own (--for, --lr, --r).",
    ),
    click.option(
        "--lr",
        "lrs",
        multiple=True,
        metavar="[METHOD=]LR,…",
        help="Learning rates, separated by commas; METHOD=… for those of one method, METHOD-rN=… "
        "at r = N.",
    ),
    click.option(
        "--r",
        "ranks",
        multiple=True,
        default=["64"],
        show_default=True,
        metavar="[METHOD=]R,…",
        help="Ranks, in the same form.",
    ),
    click.option(
        "--seed",
        "seeds",
        multiple=True,
        default=["42"],
        show_default=True,
        metavar="SEED,…",
        help="Seeds, separated by commas.",
    ),
    click.option(
        "--best",
        type=POSITIVE,
        metavar="K",
        help="Run the sweep with the first seed, and the other seeds only for the K best rows of "
        "the table, at their best learning rate. [default: all seeds for all]",
    ),
    click.option(
        "--for",
        "own",
        multiple=True,
        metavar="METHOD:OPTION=VALUE",
        help="An option for the runs of one method, as lora-one:precondition=0.1.",
    ),
    PARALLEL,
    click.option(
        "--eval-samples",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Rows of --eval-data that `lorasb eval` asks the runs at their best learning rate.",
    ),
    click.option(
        "--max-new-tokens", type=POSITIVE, help="Longest answer. [default: as in `lorasb eval`]"
    ),
    click.option(
        "--eval-batch-size",
        type=POSITIVE,
        default=16,
        show_default=True,
        help="Rows that are answered at a time.",
    ),
    click.option(
        "--overwrite", is_flag=True, help="Delete the comparison that is in --output-dir."
    ),
)


@click.command(name="compare", cls=SectionedCommand, context_settings=CONTEXT)
@reports_problems
@with_settings(replays=False)
@add_options(*OPTIONS)
@launch_options
@field_options(*(name for name in RunConfig.model_fields if name not in SWEPT))
def compare_command(
    launch: LaunchOptions,
    output_dir: str,
    methods: Sequence[str],
    lrs: Sequence[str],
    ranks: Sequence[str],
    seeds: Sequence[str],
    best: int | None,
    own: Sequence[str],
    parallel: int,
    eval_samples: int,
    max_new_tokens: int | None,
    eval_batch_size: int,
    overwrite: bool,
    **given: Any,
) -> None:
    """Train methods x learning rates x ranks x seeds, and compare them in a table.

    All runs have the same rows in the same batches and the same number of steps. The same command
    goes on where it was stopped. Takes the options of `lorasb train`.
    """
    files = {method: _read_file(method) for method in methods if is_file(method)}
    sweep_ranks = {method: _rank_in(content) for method, content in files.items()}
    sweep = make_sweep(methods, lrs, ranks, seeds, best, sweep_ranks)
    folder = Path(expand_home(output_dir))
    before = {} if overwrite else stored_options(folder)
    # Some templates write the date into the rows, and a sweep may take days.
    given["template_date"] = given["template_date"] or before.get("template_date")
    comparison = Comparison(
        folder=folder,
        sweep=sweep,
        launch=launch,
        given=given,
        own=_own(own, methods, given),
        eval_samples=eval_samples,
        max_new_tokens=max_new_tokens,
        eval_batch_size=eval_batch_size,
    )
    allocations = find_allocations(
        launch, parallel, has_batch=given["train_batch_size"] is not None
    )
    options = _check(comparison, sweep.first(), allocations[0])
    options["own"] = _own_so_far(comparison, files, before)
    dated = {**given, "template_date": options["template_date"]}
    comparison = replace(comparison, given=dated, options=options)
    if launch.dry_run:
        click.echo(dry_run(comparison, allocations))
        return
    sys.exit(run_comparison(comparison, allocations, overwrite))


def _read_file(method: str) -> dict[str, Any]:
    """Read a configuration of PEFT's.

    Raises:
        ConfigError: if there is no such file.
    """
    return read_json(method_of(method).removeprefix(PEFT_PREFIX), "--method")


def _rank_in(content: Mapping[str, Any]) -> int | None:
    """Return the r of a PEFT configuration; None where it has none."""
    r = content.get("r")
    return r if isinstance(r, int) else None


def _own(
    words: Sequence[str], methods: Sequence[str], given: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return method -> its own options, with their types."""
    found = {}
    for method, chosen in own_options(words, methods).items():
        config = load_run_config({**given, **chosen, "method": method_of(method)})
        found[method] = {name: getattr(config, name) for name in chosen}
    return found


def _check(
    comparison: Comparison, trials: Sequence[Trial], allocation: Allocation
) -> dict[str, Any]:
    """Check the runs before the first of them is started.

    Returns:
        The options that have to be the same whenever the command goes on, without those that
        single methods have for themselves.
    Raises:
        ConfigError: with what is wrong.
    """
    try:
        configs = [load_run_config(comparison.options_of(trial)) for trial in trials]
    except ConfigError as error:
        several = len(comparison.sweep.lrs) > 1
        hint = "Options that only some methods have are given by --for METHOD:OPTION=VALUE."
        raise ConfigError(*error.problems, *([hint] if several else [])) from None
    config = configs[0]
    if config.eval_data is None and config.val_set_size is None:
        raise ConfigError(
            "A comparison needs the held-out loss. Name held-out rows by --eval-data, or give "
            "--val-set-size."
        )
    if comparison.eval_samples and config.eval_data is None:
        raise ConfigError(
            "--eval-samples are rows of --eval-data, which is not given. Give it, or leave "
            "--eval-samples out."
        )
    if comparison.eval_samples and (config.eval_data or "").startswith(REASONING_GYM):
        remedy = "Leave --eval-samples out, or give other rows."
        check_scorer(str(config.eval_data), "--eval-data", remedy)  # or all runs fail at their end
    # Its folder is the run's to look at: --overwrite may be about to delete it.
    one = {**comparison.options_of(trials[0]), "resume": None, "output_dir": None}
    job = make_job(launch_in(comparison.launch, allocation), [], None, one)
    # Else all of its runs would fail, one after the other.
    for line in describe_inputs(job.config, on_this_host=comparison.launch.hostfile is None):
        if comparison.launch.dry_run:
            click.echo(f"lorasb: {printable(line)}", err=True)
    fields = {**comparison.given, "eval_data": config.eval_data, "method": config.method}
    common = load_run_config(fields).model_dump()  # without what the method has for itself
    chosen = {name: value for name, value in common.items() if name not in FREE}
    with_basis = [config for config in configs if config.init_from is not None]
    chosen["template_date"] = (with_basis or configs)[0].template_date  # that of the basis's rows
    on = {"processes": job.num_procs or job.num_gpus}
    found: dict[str, Any] = json.loads(json.dumps({**with_absolute_paths(chosen), **on}))
    return found


def _own_so_far(
    comparison: Comparison,
    files: Mapping[str, Mapping[str, Any]],
    before: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Return own options by method, with those of an earlier call: methods may be added.

    Args:
        files: PEFT's configurations, which are options of their methods.
        before: the options of the earlier call.
    """
    own: dict[str, dict[str, Any]] = {}
    for method in comparison.sweep.lrs:
        content: dict[str, Any] = {"file": files[method]} if method in files else {}
        if (named := method_of(method)) != method:
            content["method"] = named
        own[label(method)] = {**with_absolute_paths(comparison.own.get(method, {})), **content}
    theirs = before.get("own")
    earlier = theirs if isinstance(theirs, Mapping) else {}
    found: dict[str, dict[str, Any]] = json.loads(json.dumps({**earlier, **own}))
    return found


def dry_run(comparison: Comparison, allocations: Sequence[Allocation]) -> str:
    """Return the runs' names and commands."""
    sweep = comparison.sweep
    lines = []
    for i, trial in enumerate(sweep.first()):
        command = comparison.train_command(trial, allocations[i % len(allocations)])
        lines.append(shown(trial.name, command))
    if sweep.best is not None and len(sweep.seeds) > 1:
        seeds = ", ".join(map(str, sweep.seeds[1:]))
        lines.append(f"# then, with seed {seeds}: the best {sweep.best}, at their best --lr")
    lines.append(f"# {len(sweep.first())} runs, {len(allocations)} at a time")
    return "\n".join(lines)

"""The `lorasb` command: one short function per verb. Torch-free, so that it answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click

from launcher.commands import plan as plan_command
from launcher.commands import report as report_command
from launcher.commands.cluster import hostfile, launch_script
from launcher.commands.compare import compare_command
from launcher.commands.doctor import doctor
from launcher.commands.eval import eval_command
from launcher.commands.plan_inputs import find_cluster, find_shape, find_workload
from launcher.jobs.launch_options import LaunchOptions, launch_options
from launcher.jobs.ranks import run_here, worker_command
from launcher.jobs.start import start
from launcher.options import (
    CONTEXT,
    check_picture,
    reports_problems,
    run_options,
)
from launcher.sections import SectionedCommand
from launcher.settings import print_settings
from lorasb_ds import __version__
from lorasb_ds.errors import ConfigError
from lorasb_ds.planner.strategies import plan as make_plan
from lorasb_ds.runs.compare import read_runs
from lorasb_ds.runs.plots import draw_comparison
from lorasb_ds.system.home import ensure_home

POSITIVE = click.FloatRange(min=0, min_open=True)
CLUSTER_OPTIONS = [
    "nodes",
    "gpus_per_node",
    "gpu_memory_gib",
    "host_memory_gib",
    "hostfile",
    "num_procs",
]


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="lorasb")
@reports_problems
def main() -> None:
    """Fine-tune very large language models by LoRA-SB on DeepSpeed."""
    ensure_home()


main.command_class = SectionedCommand


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a verb that starts a job: where it runs, and what it does."""
    return run_options(launch_options(reports_problems(command)))


def prints_config(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --print-config, which prints the options instead of starting a job."""

    @reports_problems
    @wraps(command)
    def wrapper(print_config: bool, **options: Any) -> Any:
        if not print_config:
            return command(**options)
        launch, run_json = options.pop("launch"), options.pop("run_json")
        if run_json is not None:
            raise ConfigError(
                f"--print-config: {run_json} is such a file already; --config repeats its run."
            )
        context = click.get_current_context()
        return click.echo(print_settings(context, vars(launch) | options))

    return click.option(
        "--print-config",
        is_flag=True,
        help="Print all options as a file for --config, with those given filled in, and stop.",
    )(wrapper)


@main.command(context_settings=CONTEXT)
@job_options
@prints_config
def train(launch: LaunchOptions, run_json: str | None, **given: Any) -> None:
    """Fine-tune a model: init from gradients, train, save the adapter."""
    sys.exit(start(launch, [], run_json, given))


@main.command(context_settings=CONTEXT)
@job_options
@prints_config
def init(launch: LaunchOptions, run_json: str | None, **given: Any) -> None:
    """Do the init only; `train --init-from` loads it from its folder, also for a smaller r."""
    sys.exit(start(launch, ["--init-only"], run_json, given))


@main.command(name="doctor", context_settings=CONTEXT)
@click.option("--timeout", type=POSITIVE, default=30.0, show_default=True, metavar="SECONDS")
@click.option("--json", "as_json", is_flag=True, help="All checks, as JSON.")
@job_options
def doctor_command(launch: LaunchOptions, timeout: float, as_json: bool, **given: Any) -> None:
    """Check whether a job could start on this host, or on every host of --hostfile.

    Takes the options of `lorasb train`. Ends with 1 if anything is red.
    """
    sys.exit(doctor(launch, given, timeout, as_json))


main.add_command(hostfile)
main.add_command(launch_script)
main.add_command(eval_command)
main.add_command(compare_command)


def adapter_command(name: str, help_text: str) -> None:
    """Add a verb on trained adapters, which launcher/workers/adapters.py carries out."""

    @main.command(
        name=name,
        context_settings={**CONTEXT, "ignore_unknown_options": True},
        add_help_option=False,
        help=f"{help_text} (see {name} --help).",
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: Sequence[str]) -> None:
        sys.exit(run_here(worker_command("adapters", [name, *arguments]), dict(os.environ)))


adapter_command("export", "Write an adapter as a plain LoRA folder, also of a smaller rank")
adapter_command("merge", "Write base and adapter as one model, a few rows at a time")
adapter_command("inspect", "Show what an adapter has learned, layer by layer")
adapter_command("combine", "Write the weighted sum of adapters as one adapter")


@main.group(context_settings=CONTEXT)
def data() -> None:
    """Look at training data."""


@data.command(context_settings={**CONTEXT, "ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def preview(arguments: Sequence[str]) -> None:
    """Show rows as the model sees them, and which tokens are trained on (see preview --help)."""
    environment = {"PYTHONHASHSEED": "0", **os.environ}  # the rows that `lorasb train` sees
    sys.exit(run_here(worker_command("preview", arguments), environment))


@main.command(context_settings=CONTEXT)
@click.option("--model", help="A folder, a hub name in the cache, or a shape (llama-3-70b, …).")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--gpus-per-node", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--gpu-memory-gib", type=POSITIVE, default=80.0, show_default=True)
@click.option(
    "--host-memory-gib", type=POSITIVE, help="Memory of every host. [default: not checked]"
)
@click.option("--hostfile", help="A hostfile, in place of --nodes and --gpus-per-node.")
@click.option(
    "--num-procs", type=click.IntRange(min=1), help="Processes on this host's CPU instead."
)
@click.option("--r", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--expert-r", type=click.IntRange(min=0), help="As in `train`; 0: experts stay frozen."
)
@click.option("--max-length", type=click.IntRange(min=8), default=1024, show_default=True)
@click.option("--micro-batch-size", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--gradient-checkpointing", is_flag=True)
@click.option(
    "--sequence-parallel",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="As in `train`.",
)
@click.option("--init-memory-gib", type=POSITIVE, help="[default: no limit, or what fits]")
@click.option("--init-micro-batch-size", type=click.IntRange(min=1), help="As in `train`.")
@click.option("--init-samples", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model has.")
@click.option("--json", "as_json", is_flag=True, help="All numbers, as JSON, in bytes.")
@click.option(
    "--table", is_flag=True, help="7B to 671B on 1 to 128 GPUs instead (docs/planning.md)."
)
@reports_problems
def plan(model: str | None, as_json: bool, table: bool, **options: Any) -> None:
    """Compare the ways to hold a base on a cluster: memory, bytes sent, and which to take."""
    if table:
        click.echo(plan_command.table(options))
        return
    if model is None:
        raise ConfigError("--model is missing. Name a folder, a hub name in the cache, or a shape.")
    shape = find_shape(model, options["trust_remote_code"])
    cluster = find_cluster(**{name: options[name] for name in CLUSTER_OPTIONS})
    work = find_workload(shape, options)
    plans = make_plan(shape, cluster, work)
    line = plan_command.command_line(plans, cluster, model, options["hostfile"], options)
    if as_json:
        click.echo(plan_command.as_json(shape, cluster, plans, line))
    else:
        click.echo(plan_command.render(shape, cluster, work, plans, line))


@main.command(context_settings=CONTEXT)
@click.argument("folders", metavar="DIR [DIR...]", nargs=-1, required=True)
@click.option(
    "--output", help="Picture of the losses. [default: report.png beside the first folder]"
)
@click.option("--markdown", is_flag=True, help="The table in Markdown.")
@click.option("--json", "as_json", is_flag=True, help="All numbers and options, as JSON.")
@reports_problems
def report(folders: Sequence[str], output: str | None, markdown: bool, as_json: bool) -> None:
    """Compare runs by their output folders: a table, and a picture of their losses."""
    runs = read_runs(folders)
    picture = Path(output or Path(folders[0]).absolute().parent / "report.png")
    check_picture(picture)
    draw_comparison(picture, {run.name: run.rows for run in runs})
    if as_json:
        click.echo(report_command.render_json(runs))
        return
    click.echo(report_command.render(runs, markdown))
    click.echo(f"\nlosses: {picture}")


if __name__ == "__main__":
    main()

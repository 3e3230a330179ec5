"""The `lorasb` command: one short function per verb. Torch-free, so that it answers at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import click

from launcher import plan_command, report_command
from launcher.command import job_environment, train_command, worker_command
from launcher.options import CONTEXT, run_options, to_arguments
from launcher.ranks import free_port, remove_shared_memory
from lorasb_ds import __version__
from lorasb_ds.compare import read_runs
from lorasb_ds.config import ConfigError, read_json
from lorasb_ds.curves import draw_comparison
from lorasb_ds.ds_config import resolve_ds_config
from lorasb_ds.plan import plan as make_plan
from lorasb_ds.request import check_output_dir, load_run_config, replayed_processes, resumed_run

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
def main() -> None:
    """Fine-tune very large language models by LoRA-SB on DeepSpeed."""


def reports_problems(command: Callable[..., Any]) -> Callable[..., Any]:
    """End with 2 and the problems when what was asked for cannot be done."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ConfigError as error:
            click.echo(f"lorasb: error: {error}", err=True)
            sys.exit(2)

    return wrapper


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a verb that starts a job on this host."""
    options = (
        click.option(
            "--num-procs", type=click.IntRange(min=1), help="Processes on this host's CPU."
        ),
        click.option(
            "--num-gpus", type=click.IntRange(min=1), help="GPUs of this host. [default: all]"
        ),
        click.option("--master-port", type=click.IntRange(1, 65535), help="[default: a free one]"),
        click.option("--dry-run", is_flag=True, help="Check, print the command, and stop."),
        run_options,
        reports_problems,
    )
    for option in reversed(options):
        command = option(command)
    return command


@main.command(context_settings=CONTEXT)
@job_options
def train(**options: Any) -> None:
    """Fine-tune a model: init from gradients, train, save the adapter."""
    _start_job([], **options)


@main.command(context_settings=CONTEXT)
@job_options
def init(**options: Any) -> None:
    """Do the init only; `train --init-from` takes up its output folder, also for a smaller r."""
    _start_job(["--init-only"], **options)


def _start_job(
    worker_flags: Sequence[str],
    *,
    num_procs: int | None,
    num_gpus: int | None,
    master_port: int | None,
    dry_run: bool,
    run_json: str | None,
    **given: Any,
) -> None:
    """Check what can be checked without torch, and run the worker on every rank."""
    if num_procs is not None and num_gpus is not None:
        raise ConfigError("--num-procs (CPU) and --num-gpus exclude each other. Give one of them.")
    earlier = run_json
    if earlier is None and given.get("resume") not in (None, "auto"):
        earlier = str(resumed_run(given["resume"]) / "run.json")
    if earlier is not None and num_procs is None and num_gpus is None:
        num_procs, num_gpus = replayed_processes(earlier)
    config = load_run_config(given, run_json)
    if count := num_procs or num_gpus:
        _, config = resolve_ds_config(config, count)
    else:  # DeepSpeed counts the GPUs; the workers check the rest before they join
        read_json(config.ds_config, "--ds-config")
    check_output_dir(config)
    arguments = [*worker_flags, *to_arguments({"config": run_json, **given})]
    cores = len(os.sched_getaffinity(0))
    environment = job_environment(os.environ, num_procs, num_gpus, cores)
    # With CUDA_VISIBLE_DEVICES DeepSpeed takes what it names, and must not get a count.
    named = num_procs is None and "CUDA_VISIBLE_DEVICES" in environment
    port = master_port or free_port()
    command = train_command(
        arguments, count=None if named else num_procs or num_gpus, master_port=port
    )
    if dry_run:
        import shlex

        click.echo(shlex.join(command))
        return
    status = _run_job(command, environment)
    remove_shared_memory(port)
    sys.exit(status)


@main.command(context_settings={**CONTEXT, "ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def eval(arguments: Sequence[str]) -> None:  # noqa: A001
    """Held-out loss and exact match of a model, with or without an adapter (see eval --help)."""
    sys.exit(_run(worker_command("eval", arguments), dict(os.environ)))


@main.group(context_settings=CONTEXT)
def data() -> None:
    """Look at training data."""


@data.command(context_settings={**CONTEXT, "ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def preview(arguments: Sequence[str]) -> None:
    """Show rows as the model sees them, and what is learned of them (see preview --help)."""
    environment = {"PYTHONHASHSEED": "0", **os.environ}  # the rows that `lorasb train` sees
    sys.exit(_run(worker_command("preview", arguments), environment))


@main.command(context_settings=CONTEXT)
@click.option("--model", help="A folder, a hub name in the cache, or a shape (llama-3-70b, …).")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--gpus-per-node", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--gpu-memory-gib", type=POSITIVE, default=80.0, show_default=True)
@click.option("--host-memory-gib", type=POSITIVE, help="Of every host. [default: not checked]")
@click.option("--hostfile", help="DeepSpeed's, in place of --nodes and --gpus-per-node.")
@click.option(
    "--num-procs", type=click.IntRange(min=1), help="Processes on this host's CPU instead."
)
@click.option("--r", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--max-length", type=click.IntRange(min=8), default=1024, show_default=True)
@click.option("--micro-batch-size", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--gradient-checkpointing", is_flag=True)
@click.option("--init-memory-gib", type=POSITIVE, help="[default: no limit, or what fits]")
@click.option("--init-samples", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="All numbers, in bytes.")
@click.option(
    "--table", is_flag=True, help="7B to 405B on 1 to 128 GPUs instead (docs/planning.md)."
)
@reports_problems
def plan(model: str | None, as_json: bool, table: bool, **options: Any) -> None:
    """What fits where: memory, traffic and time of every way to hold a base on a cluster."""
    if table:
        click.echo(plan_command.table(options))
        return
    if model is None:
        raise ConfigError("--model is missing. Name a folder, a hub name in the cache, or a shape.")
    shape = plan_command.find_shape(model)
    cluster = plan_command.find_cluster(**{name: options[name] for name in CLUSTER_OPTIONS})
    work = plan_command.find_workload(shape, options)
    outcomes = make_plan(shape, cluster, work)
    line = plan_command.command_line(outcomes, cluster, model, options["hostfile"], options)
    show = plan_command.as_json if as_json else plan_command.render
    click.echo(show(shape, cluster, outcomes, line))


@main.command(context_settings=CONTEXT)
@click.argument("folders", metavar="DIR [DIR...]", nargs=-1, required=True)
@click.option("--output", default="report.png", show_default=True, help="Picture of the losses.")
@click.option("--markdown", is_flag=True, help="The table in Markdown.")
@click.option("--json", "as_json", is_flag=True, help="All numbers and options.")
@reports_problems
def report(folders: Sequence[str], output: str, markdown: bool, as_json: bool) -> None:
    """Compare runs by their output folders: a table, and a picture of their losses."""
    runs = read_runs(folders)
    picture = Path(output)
    if picture.suffix != ".png" or not picture.parent.is_dir():
        raise ConfigError(f"--output {output} must be a .png file in a folder that is there.")
    draw_comparison(picture, {run.name: run.rows for run in runs})
    if as_json:
        click.echo(report_command.render_json(runs))
        return
    click.echo(report_command.render(runs, markdown))
    click.echo(f"\nlosses: {output}")


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command in a process session of its own; pass signals on; its status."""
    child = subprocess.Popen(command, env=environment, start_new_session=True)

    def pass_on(signum: int, _frame: object) -> None:
        os.killpg(child.pid, signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, pass_on)
    return _status(child.wait())


def _run_job(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a job in a process session of its own; ask it to end when a signal says so; its status.

    DeepSpeed's launchers take SIGTERM and SIGINT as an order to kill their workers. SIGUSR1 passes
    them by, as it is ignored here and children inherit that; a worker that has something to save
    listens to it. It is sent again and again, for workers that were not yet listening.
    """
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on() -> None:
        if child is not None and asked:
            twice = asked.count(signal.SIGINT) > 1
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(child.pid, signal.SIGKILL if twice else signal.SIGUSR1)

    def ask(signum: int, _frame: object) -> None:
        first = not asked
        asked.append(signum)
        pass_on()
        with suppress(OSError):  # the terminal may be closed
            if first:
                click.echo("lorasb: asked to end: after this step, if it trains", err=True)
            if first and signum == signal.SIGINT:
                click.echo("lorasb: Ctrl-C again ends it at once, without a checkpoint", err=True)

    # Under nohup SIGHUP is ignored, and stays so.
    heard = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    for signum in (signal.SIGINT, *heard):
        signal.signal(signum, ask)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    signal.signal(signal.SIGUSR1, ask)
    while True:
        try:
            return _told(child.wait(timeout=0.5))
        except subprocess.TimeoutExpired:
            pass_on()


def _told(returncode: int) -> int:
    """The status of a job; what DeepSpeed makes of a worker that a signal ended, in words."""
    if returncode < 256 - signal.NSIG:
        return _status(returncode)
    signum = 256 - returncode
    known = signum in [int(s) for s in signal.Signals]
    name = signal.Signals(signum).name if known else f"signal {signum}"
    cause = ", as the kernel does when memory runs out" if signum == signal.SIGKILL else ""
    click.echo(
        f"lorasb: error: a worker was ended by {name}{cause}. --resume auto goes on from the last "
        "checkpoint, if there is one.",
        err=True,
    )
    return 128 + signum


def _status(returncode: int) -> int:
    """As a shell has it."""
    return returncode if returncode >= 0 else 128 - returncode


if __name__ == "__main__":
    main()

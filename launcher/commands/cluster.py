"""`lorasb hostfile` and `lorasb launch-script`: files by which a cluster starts jobs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from launcher.hosts.environment import asked_for
from launcher.hosts.hostfile import equal_slots, read_hostfile, select, write_hostfile
from launcher.hosts.k8s_manifest import k8s_manifest
from launcher.hosts.slurm import from_slurm
from launcher.hosts.slurm_script import slurm_script
from launcher.jobs.launch_options import OPTIONS
from launcher.options import CONTEXT, add_options, reports_problems, run_options
from launcher.settings import given_by
from lorasb_ds.config.ds_config import resolve_ds_config
from lorasb_ds.config.option_group import to_arguments
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.errors import ConfigError, option_name

POSITIVE = click.IntRange(min=1)
# Options of `lorasb train` that the command in a job file has, too.
PASSED_ON = ("network_interface", "failure_timeout", "start_timeout")
# Those that it cannot have: a file for --config may, which is written for ssh or for this host.
LEFT_OUT = (
    *("num_procs", "launcher", "launcher_args", "ssh_port", "no_ssh", "node_rank"),
    *("master_addr", "max_restarts", "allow_fewer_hosts", "skip_preflight"),
)


@click.group(context_settings=CONTEXT)
def hostfile() -> None:
    """Check or write a hostfile."""


@hostfile.command(context_settings=CONTEXT)
@click.argument("file")
@click.option("--include", default="", help="As `lorasb train` takes it.")
@click.option("--exclude", default="", help="As `lorasb train` takes it.")
@click.option("--num-nodes", type=POSITIVE, help="The first N hosts.")
@click.option("--num-gpus", type=POSITIVE, help="GPUs of every host.")
@reports_problems
def check(file: str, num_gpus: int | None, **chosen: Any) -> None:
    """Show which ranks run where, or every bad line with its column."""
    slots = select(read_hostfile(file), num_slots=num_gpus, **chosen)
    first = 0
    for host, ids in slots.items():
        last = first + len(ids) - 1
        ranks = f"rank {first}" if first == last else f"ranks {first}-{last}"
        master = "  (master)" if first == 0 else ""
        click.echo(f"{host}  slots {','.join(map(str, ids))}  {ranks}{master}")
        first = last + 1
    click.echo(f"{len(slots)} host(s), {first} rank(s)")


@hostfile.command(name="from-slurm", context_settings=CONTEXT)
@click.option("--slots", type=POSITIVE, help="Slots of every host. [default: as Slurm says]")
@reports_problems
def from_slurm_command(slots: int | None) -> None:
    """Print the hostfile of this Slurm allocation."""
    click.echo(write_hostfile(from_slurm(os.environ, slots)), nl=False)


@click.group(name="launch-script", context_settings=CONTEXT)
def launch_script() -> None:
    """Print a job file for a scheduler, which then starts the run in place of ssh."""


def _say_left_out(ctx: click.Context, option: click.Parameter, value: Any) -> None:
    if option.name in given_by(ctx, ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP):
        click.echo(
            f"lorasb: {option.opts[0]} is left out: the scheduler starts the hosts", err=True
        )


def script_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that both schedulers have, and those of the run."""
    not_given: dict[str, Any] = {"default": None, "show_default": False}
    hidden: dict[str, Any] = {"hidden": True, "expose_value": False, "callback": _say_left_out}
    return add_options(
        click.option("--verb", type=click.Choice(["train", "init"]), default="train"),
        click.option(
            *("--nodes", "--num-nodes", "nodes"),
            type=POSITIVE,
            help="[default: 1, or as many as --hostfile names]",
        ),
        click.option(
            *("--gpus-per-node", "--num-gpus", "gpus_per_node"),
            type=POSITIVE,
            help="[default: 8, or the slots of the hostfile's hosts]",
        ),
        click.option("--hostfile", help="Only counted: the scheduler chooses the hosts."),
        click.option("--include", default="", help="Only these hosts and slots of --hostfile."),
        click.option("--exclude", default="", help="All but these hosts and slots of it."),
        click.option("--job-name", default="lorasb", show_default=True),
        click.option(
            "--master-port",
            type=click.IntRange(1, 65534),
            help="Port on the first host; ranks report to the next one. [default: Slurm: by the "
            "job's number; Kubernetes: 29500]",
        ),
        click.option("--env", multiple=True, metavar="NAME[=VALUE]", help="A variable of the job."),
        *(click.option(option_name(n), n, **OPTIONS[n] | not_given) for n in PASSED_ON),
        *(click.option(option_name(n), n, **OPTIONS[n] | hidden) for n in LEFT_OUT),
        run_options,
        reports_problems,
    )(command)


@launch_script.command(context_settings=CONTEXT)
@click.option("--time-limit", help="Time limit of the job, as Slurm writes it: 12:00:00.")
@click.option("--partition", help="[default: the cluster's]")
@click.option("--account", help="[default: the user's]")
@script_options
def slurm(env: Sequence[str], **options: Any) -> None:
    """Print a script for sbatch. The job saves before its time is over, and queues itself again."""
    own = {name: options.pop(name) for name in ("time_limit", "partition", "account")}
    shared, arguments, output_dir = _job(env, options)
    click.echo(
        slurm_script(
            arguments,
            **own,
            **shared,
            output_dir=output_dir,
            python=sys.executable,
            cwd=str(Path.cwd()),
        ),
        nl=False,
    )


@launch_script.command(context_settings=CONTEXT)
@click.option(
    "--image",
    required=True,
    help="Container image with this package installed, as `docker build` makes of the Dockerfile "
    "(docs/launching.md) and `docker push` puts where the nodes find it.",
)
@click.option("--claim", required=True, help="PersistentVolumeClaim that all pods can write to.")
@click.option("--mount", default="/data", show_default=True, help="Where the pods see it.")
@script_options
def k8s(env: Sequence[str], **options: Any) -> None:
    """Print a Service and an Indexed Job for kubectl apply: one pod for each node."""
    own = {name: options.pop(name) for name in ("image", "claim", "mount")}
    options["master_port"] = options["master_port"] or 29500
    shared, arguments, output_dir = _job(env, options, own["mount"])
    click.echo(k8s_manifest(arguments, **own, **shared, output_dir=output_dir), nl=False)


def _job(
    env: Sequence[str], options: Mapping[str, Any], root: str = "runs"
) -> tuple[dict[str, Any], list[str], str]:
    """Check the run; return what both files need, the worker's arguments, and the run's folder.

    Raises:
        ConfigError: if the run is not possible.
    """
    given = dict(options)
    nodes, gpus_per_node = _size(given)
    passed_on = {name: given.pop(name) for name in PASSED_ON}
    shared = {name: given.pop(name) for name in ("verb", "job_name", "master_port")}
    run_json = given.pop("run_json")
    if given.get("resume") not in (None, "auto"):
        raise ConfigError(
            "--resume PATH would go on from there whenever the job is queued again. Leave it out: "
            "the job goes on in its --output-dir."
        )
    config = load_run_config(given, run_json)
    if config.overwrite:
        raise ConfigError(
            "--overwrite would remove the job's own checkpoints whenever it is queued again. Leave "
            "it out, and name a new --output-dir."
        )
    resolve_ds_config(config, nodes * gpus_per_node, gpus_per_node, here=False)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", shared["job_name"])
    output_dir = config.output_dir or str(Path(root) / name)
    shared |= {"nodes": nodes, "gpus_per_node": gpus_per_node}
    shared["environment"] = asked_for(os.environ, env)
    return shared, to_arguments({"config": run_json, **given, **passed_on}), output_dir


def _size(given: dict[str, Any]) -> tuple[int, int]:
    """Take the options of hosts out of those given; return the hosts, and the GPUs of each.

    Raises:
        ConfigError: if the hostfile's hosts differ in their slots, and no number is given.
    """
    nodes, gpus_per_node = given.pop("nodes"), given.pop("gpus_per_node")
    hostfile, filters = given.pop("hostfile"), (given.pop("include"), given.pop("exclude"))
    if hostfile is None:
        if any(filters):
            raise ConfigError("--include and --exclude choose from a hostfile. Give --hostfile.")
        return nodes or 1, gpus_per_node or 8
    slots = select(read_hostfile(hostfile), *filters)
    counts = {host: len(ids) for host, ids in slots.items()}
    return nodes or len(counts), gpus_per_node or equal_slots(counts, hostfile)

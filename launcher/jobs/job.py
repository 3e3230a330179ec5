"""A job as it was asked for: options, hosts and ds_config, held against each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.hosts.checks import Question
from launcher.hosts.environment import asked_for, exported, read_deepspeed_env
from launcher.hosts.host import interfaces, resolve
from launcher.hosts.hostfile import read_hostfile, select
from launcher.jobs.command import job_environment
from launcher.jobs.launch_options import LaunchOptions
from launcher.jobs.ranks import free_port
from launcher.options import to_arguments
from lorasb_ds.config.ds_config import resolve_ds_config
from lorasb_ds.config.paths import read_json
from lorasb_ds.config.resolve import load_run_config, replayed_processes
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import RUN_JSON, check_output_dir, default_output_dir, resumed_run
from lorasb_ds.data.sources import names_a_path
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.checkpoint_files import model_path

# Programs of this host that start the others.
NEEDED = {
    "pdsh": ("ssh", "pdsh"),
    "openmpi": ("mpirun", "ompi_info"),
    "mpich": ("mpirun",),
    "impi": ("mpirun",),
    "mvapich": ("mpirun", "mpiname"),
    "slurm": ("srun", "sinfo"),
}


@dataclass(frozen=True)
class Job:
    """What was asked for, checked as far as that goes without torch."""

    launch: LaunchOptions
    worker_flags: Sequence[str]
    given: Mapping[str, Any]  # options of the run
    run_json: str | None
    config: RunConfig
    slots: Mapping[str, Sequence[int]] | None  # None: this host alone
    num_procs: int | None
    num_gpus: int | None

    @property
    def folder(self) -> Path:
        assert self.config.output_dir is not None
        return Path(self.config.output_dir)

    @property
    def arguments(self) -> list[str]:
        """Of the worker."""
        return [*self.worker_flags, *to_arguments({"config": self.run_json, **self.given})]


def make_job(
    launch: LaunchOptions,
    worker_flags: Sequence[str],
    run_json: str | None,
    given: Mapping[str, Any],
) -> Job:
    """Options, hostfile and ds_config, held against each other."""
    launch.check()
    given = dict(given)
    if given.get("resume") not in (None, "auto"):
        # A restart goes on in the folder, and with the options that it has.
        run_json = run_json or str(resumed_run(given["resume"]) / RUN_JSON)
    num_procs, num_gpus, slots = launch.num_procs, launch.num_gpus, _slots(launch)
    if slots is not None:
        on_cpu = num_procs is not None or os.environ.get("DS_ACCELERATOR") == "cpu"
        most = max(len(ids) for ids in slots.values())
        num_procs, num_gpus = (most, None) if on_cpu else (None, most)
        if _is_this_host_alone(launch, slots):
            slots = None
    elif run_json is not None and num_procs is None and num_gpus is None:
        num_procs, num_gpus = replayed_processes(run_json)
    config = load_run_config(given, run_json)
    if slots is not None:
        config = resolved_on(config, slots)
    elif count := num_procs or num_gpus:
        _, config = resolve_ds_config(config, count)
    else:  # DeepSpeed counts the GPUs; the workers check the rest before they join
        read_json(config.ds_config, "--ds-config")
    if launch.no_ssh and config.output_dir is None:
        raise ConfigError(
            "--no-ssh needs --output-dir: every host is started by itself, and all must mean the "
            "same folder. Give it."
        )
    if not launch.node_rank:  # the first host's ranks may have begun to write
        check_output_dir(config, config.init_from)
    if config.output_dir is None:
        given["output_dir"] = str(default_output_dir(config.model))
        config = config.model_copy(update={"output_dir": given["output_dir"]})
    return Job(launch, worker_flags, given, run_json, config, slots, num_procs, num_gpus)


def resolved_on(config: RunConfig, slots: Mapping[str, Sequence[int]]) -> RunConfig:
    """The run with its ds_config's numbers, on these hosts."""
    sizes = [len(ids) for ids in slots.values()]
    return resolve_ds_config(config, sum(sizes), sizes[0])[1]


def _slots(launch: LaunchOptions) -> dict[str, list[int]] | None:
    """Of every host; None where no hosts are named."""
    option = "--num-procs" if launch.num_procs is not None else "--num-gpus"
    count = launch.num_procs or launch.num_gpus
    if launch.hostfile is not None:
        hosts = read_hostfile(launch.hostfile)
        filters = (launch.include, launch.exclude, launch.num_nodes)
        slots = select(hosts, *filters, count, slots_option=option)
    elif launch.no_ssh:
        assert launch.num_nodes is not None
        assert count is not None
        slots = {f"node-{i}": list(range(count)) for i in range(launch.num_nodes)}
    else:
        return None
    if launch.node_rank is not None and launch.node_rank >= len(slots):
        raise ConfigError(
            f"--node-rank {launch.node_rank} is not one of the {len(slots)} hosts: they count "
            "from 0. Lower it."
        )
    return slots


def _is_this_host_alone(launch: LaunchOptions, slots: Mapping[str, Sequence[int]]) -> bool:
    """A hostfile that names this host only needs no ssh to it."""
    (host, *others), (ids, *_) = slots, slots.values()
    if others or launch.no_ssh or launch.launcher != "pdsh" or list(ids) != list(range(len(ids))):
        return False
    address = resolve(host) or ""
    names = ("localhost", socket.gethostname(), socket.getfqdn())
    return host in names or address.startswith("127.") or address in interfaces().values()


def question_of(
    job: Job, port: int | None = None, timeout: float = 20.0, thorough: bool = False
) -> Question:
    """What the hosts have to have for this job.

    Args:
        port: of the master, where it has been chosen.
    """
    config, launch = job.config, job.launch
    here = {socket.gethostname(): range(job.num_procs or job.num_gpus or 1)}
    if job.slots is None or launch.no_ssh:
        slots: Mapping[str, Sequence[int]] = here
    else:  # MPI and Slurm start the hosts, by their own ways and networks
        slots = job.slots if launch.launcher == "pdsh" else {}
    named = [model_path(config.model), *config.data, config.eval_data, config.ds_config]
    named += [*(config.init_data or ()), config.init_from]
    return Question(
        slots={host: len(ids) for host, ids in slots.items()},
        cpu=job.num_procs is not None,
        # Not resolved: a link may lead elsewhere on another host.
        paths=[
            str(Path(name).expanduser().absolute())
            for name in named
            if name and (Path(name).exists() or names_a_path(name))
        ],
        disk=[str(job.folder.absolute())],
        master_addr=launch.master_addr,
        master_port=port or launch.master_port or free_port(),
        network_interface=launch.network_interface,
        ssh_port=launch.ssh_port,
        timeout=timeout,
        thorough=thorough,
        programs=NEEDED[launch.launcher] if job.slots is not None else (),
    )


def job_environment_of(job: Job) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if job.slots is None else None
    environment = {**os.environ, **asked_for(os.environ, job.launch.env)}
    return job_environment(environment, job.num_procs, job.num_gpus, cores)


def variables_of_hosts(job: Job, environment: Mapping[str, str]) -> dict[str, str]:
    """What the ranks of all hosts get: the user's `.deepspeed_env` over what is handed on.

    Raises:
        ConfigError: if DeepSpeed could not read that file, or --env is wrong.
    """
    # Ours takes its place: DeepSpeed reads the file that DS_ENV_FILE names, and no other.
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    own: dict[str, str] = {}
    for file in (Path.home() / name, Path(name)):
        own |= read_deepspeed_env(file) if file.is_file() else {}
    return {**exported(environment), **own, **asked_for(environment, job.launch.env)}

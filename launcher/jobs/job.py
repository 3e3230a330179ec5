"""A job as it was asked for, checked without torch; what all kinds of jobs have in common."""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from launcher.hosts.checks import Question
from launcher.hosts.environment import asked_for
from launcher.hosts.hostfile import write_hostfile
from launcher.hosts.preflight import Findings, examine
from launcher.jobs.command import Hosts, job_environment
from launcher.jobs.launch_options import LaunchOptions
from launcher.jobs.ranks import free_port
from lorasb_ds.config.chat_templates import TEMPLATES
from lorasb_ds.config.ds_config import resolve_ds_config
from lorasb_ds.config.methods import PEFT_PREFIX
from lorasb_ds.config.option_group import to_arguments
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import DEEPSPEED_FILES, HOSTFILE, LAUNCH, launcher_files
from lorasb_ds.data.sources import names_a_path, source_path
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
class LauncherCall:
    """How DeepSpeed's launcher is called, and the socket that its agents connect to.

    Args:
        listener: None where another host's supervisor has the agents.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    listener: socket.socket | None


@dataclass(frozen=True)
class Job(ABC):
    """What was asked for, checked as far as that goes without torch.

    Subclasses say how it is started: ``LocalJob``, ``SshJob`` or ``ByHandJob``.

    Args:
        given: options of the run, fields of RunConfig; what is None was not given.
        run_json: an earlier run, whose options hold where none is given.
        config: of the run, with the numbers of its ds_config.
        num_procs: processes on the CPU of each host; None on accelerators.
        num_gpus: processes on accelerators of each host; None on CPUs, or for all that there are.
    """

    launch: LaunchOptions
    worker_flags: Sequence[str]
    given: Mapping[str, Any]
    run_json: str | None
    config: RunConfig
    num_procs: int | None
    num_gpus: int | None

    started_by_hand: ClassVar[bool] = False  # every host by itself, by a scheduler or a user
    preflight_at_start: ClassVar[bool] = True

    @property
    def folder(self) -> Path:
        assert self.config.output_dir is not None
        return Path(self.config.output_dir)

    @property
    def arguments(self) -> list[str]:
        """Command line of the worker."""
        return [*self.worker_flags, *to_arguments({"config": self.run_json, **self.given})]

    @property
    def launcher_log(self) -> Path:
        """Output of DeepSpeed's launcher on this host."""
        return self.folder / LAUNCH / f"{DEEPSPEED_FILES}.log"

    @property
    def rank_hosts(self) -> list[str] | None:
        """Host of every rank, as the hostfile names it; None where only the agents know."""
        return None

    @property
    def num_cores(self) -> int | None:
        """Cores that the ranks share; None where each rank counts those of its own host."""
        return None

    def environment(self) -> dict[str, str]:
        """Return the environment of the ranks, before anything is added for the agents.

        Raises:
            ConfigError: if --env is wrong, or fewer GPUs are visible than were asked for.
        """
        environment = {**os.environ, **asked_for(os.environ, self.launch.env)}
        return job_environment(environment, self.num_procs, self.num_gpus, self.num_cores)

    def question(
        self, port: int | None = None, timeout: float = 20.0, thorough: bool = False
    ) -> Question:
        """Return what the hosts must have for this job; here, for this host alone.

        Args:
            port: of the master, where it has been chosen.
            timeout: seconds that each host may take to answer.
            thorough: ask for what takes seconds, too.
        """
        config = self.config
        named = [model_path(config.model), *config.data, config.eval_data, config.ds_config]
        named += [*(config.init_data or ()), config.init_from, self.run_json]
        if config.method.startswith(PEFT_PREFIX):
            named.append(config.method.removeprefix(PEFT_PREFIX))
        named += [config.chat_template] if config.chat_template not in TEMPLATES else []
        return Question(
            slots={socket.gethostname(): self.num_procs or self.num_gpus or 1},
            cpu=self.num_procs is not None,
            # Not resolved: a link may lead elsewhere on another host.
            paths=[
                str(source_path(name).absolute())
                for name in named
                if name and (Path(name).exists() or names_a_path(name))
            ],
            disk=[str(self.folder.absolute())],
            master_addr=self.launch.master_addr,
            master_port=port or self.launch.master_port or free_port(),
            network_interface=self.launch.network_interface,
            ssh_port=self.launch.ssh_port,
            timeout=timeout,
            thorough=thorough,
        )

    def examine(self, question: Question) -> Findings:
        """Compare the hosts with what the job needs; here, this host alone."""
        return examine(question, local=True)

    def remove_earlier_logs(self) -> None:
        """Remove the launcher's files of an earlier job from the folder, unless it is resumed."""
        if self.config.resume is None:
            for file in launcher_files(self.folder):
                file.unlink()

    @abstractmethod
    def dry_run(self) -> str:
        """Return the command, and what would be written for it."""

    @abstractmethod
    def prepare(
        self, environment: Mapping[str, str], port: int, master_addr: str | None
    ) -> LauncherCall:
        """Listen for agents, and write the files that DeepSpeed's launcher reads.

        Args:
            environment: of the ranks, with what the agents are told.
            port: of the master.
            master_addr: address of the first host, if the preflight has found it.
        Raises:
            ConfigError: if the first host's address is not known, or a port is taken.
        """

    def restarted(self, has_begun: bool) -> Job:
        """Return the same run, to go on from its last checkpoint.

        Args:
            has_begun: whether its ranks have done in the folder what --overwrite or --resume PATH
                asked for; if not, it is still to be done.
        Raises:
            ConfigError: if it cannot go on.
        """
        return self._with_options(self._options_of_restart(has_begun))

    def _options_of_restart(self, has_begun: bool) -> dict[str, Any]:
        given = {**self.given, "output_dir": str(self.folder)}
        if has_begun or not (self.config.overwrite or self.config.resume):
            given |= {"resume": "auto", "overwrite": None}
        return given

    def _with_options(self, given: Mapping[str, Any]) -> Job:
        return replace(self, given=given, config=load_run_config(given, self.run_json))


@dataclass(frozen=True)
class HostsJob(Job):
    """A job on hosts that are named.

    Args:
        slots: host -> the numbers of its slots, in the order of the ranks.
    """

    slots: Mapping[str, Sequence[int]]

    def hosts(self, master_addr: str, port: int, hostfile: Path) -> Hosts:
        return Hosts(self.slots, str(hostfile), master_addr, port)

    @property
    def hostfile(self) -> Path:
        return (self.folder / LAUNCH / HOSTFILE).absolute()

    @property
    def hostfile_text(self) -> str:
        """Hostfile of the chosen hosts, which every back-end of DeepSpeed reads alike."""
        return write_hostfile({host: max(ids) + 1 for host, ids in self.slots.items()})

    @property
    def rank_hosts(self) -> list[str] | None:
        return [host for host, ids in self.slots.items() for _ in ids]

    def question(
        self, port: int | None = None, timeout: float = 20.0, thorough: bool = False
    ) -> Question:
        question = super().question(port, timeout, thorough)
        return replace(question, programs=NEEDED[self.launch.launcher])

    def _with_options(self, given: Mapping[str, Any]) -> Job:
        config = load_run_config(given, self.run_json)
        return replace(self, given=given, config=resolved_on(config, self.slots))


def resolved_on(config: RunConfig, slots: Mapping[str, Sequence[int]]) -> RunConfig:
    """Return the run's options with the numbers of its ds_config for these hosts."""
    sizes = [len(ids) for ids in slots.values()]
    return resolve_ds_config(config, sum(sizes), sizes[0], here=False)[1]

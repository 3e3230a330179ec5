"""Where a job runs and how it is watched: options of the launcher that workers do not see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import click

from launcher.jobs.command import BACKENDS
from launcher.options import add_options
from launcher.sections import HOSTS, SectionedOption
from lorasb_ds.errors import ConfigError, option_name

POSITIVE = click.IntRange(min=1)
PORT = click.IntRange(1, 65534)  # with --no-ssh the next one is used, too
SECONDS = click.FloatRange(min=1)


@dataclass(frozen=True)
class LaunchOptions:
    """Options as the command line has them; what was not given is None, "" or False."""

    num_procs: int | None
    num_gpus: int | None
    hostfile: str | None
    include: str
    exclude: str
    num_nodes: int | None
    launcher: str
    launcher_args: str
    ssh_port: int | None
    no_ssh: bool
    node_rank: int | None
    master_addr: str | None
    master_port: int | None
    network_interface: str | None
    env: tuple[str, ...]
    failure_timeout: float
    start_timeout: float
    max_restarts: int
    allow_fewer_hosts: bool
    skip_preflight: bool
    dry_run: bool

    def given(self) -> dict[str, Any]:
        """Return the options that are not at their defaults."""
        return {
            name: value
            for name, option in OPTIONS.items()
            if (value := getattr(self, name)) and value != option.get("default")
        }

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises:
            ConfigError: with a paragraph for each problem.
        """
        problems = []
        if self.num_procs is not None and self.num_gpus is not None:
            problems.append(
                "--num-procs (CPU) and --num-gpus exclude each other. Give one of them."
            )
        if self.hostfile is None and not self.no_ssh:
            given = {
                "--include": self.include,
                "--exclude": self.exclude,
                "--num-nodes": self.num_nodes,
                "--master-addr": self.master_addr,
                "--ssh-port": self.ssh_port,
                "--allow-fewer-hosts": self.allow_fewer_hosts,
                "--launcher": self.launcher if self.launcher != "pdsh" else None,
            }
            if alone := [name for name, value in given.items() if value]:
                problems.append(
                    f"{alone[0]} is for several hosts. Name them by --hostfile FILE, or give "
                    "--no-ssh where a scheduler starts every host."
                )
        if self.no_ssh:
            wanted = {
                "--node-rank": self.node_rank,
                "--master-addr": self.master_addr,
                "--master-port": self.master_port,
            }
            if missing := [name for name, value in wanted.items() if value is None]:
                problems.append(
                    f"--no-ssh needs {', '.join(missing)}: every host is started by itself, and "
                    "all must meet. Give them, the same but for --node-rank on every host."
                )
            if self.hostfile is None and not (self.num_nodes and (self.num_gpus or self.num_procs)):
                problems.append(
                    "--no-ssh needs --num-nodes and --num-gpus (or --num-procs) of every host, or "
                    "a --hostfile. Give them."
                )
            if self.max_restarts:
                problems.append(
                    "--max-restarts starts hosts again by ssh, which --no-ssh leaves to the "
                    "scheduler. Let that start the job again, with --resume auto."
                )
        elif self.node_rank is not None:
            problems.append("--node-rank goes with --no-ssh. Give both, or neither.")
        if self.launcher != "pdsh" and (self.no_ssh or self.ssh_port is not None):
            problems.append(
                f"--launcher {self.launcher} starts the hosts its own way: leave out --no-ssh and "
                "--ssh-port."
            )
        if problems:
            raise ConfigError(*problems)


OPTIONS: dict[str, dict[str, Any]] = {
    "num_procs": {
        "type": POSITIVE,
        "help": "Processes on the CPU of this host, or of every host of the hostfile.",
    },
    "num_gpus": {
        "type": POSITIVE,
        "help": "GPUs of this host, or of every host of the hostfile. [default: all; its slots]",
    },
    "hostfile": {
        "help": "Run on these hosts: lines of `host slots=N` (see hostfiles/). [default: this one]"
    },
    "include": {"default": "", "help": "Only these hosts and slots: host1@host2:0,2."},
    "exclude": {"default": "", "help": "All but these hosts and slots."},
    "num_nodes": {"type": POSITIVE, "help": "The first N hosts. [default: all]"},
    "launcher": {
        "type": click.Choice(BACKENDS),
        "default": "pdsh",
        "show_default": True,
        "help": "Back-end by which DeepSpeed starts the hosts.",
    },
    "launcher_args": {"default": "", "help": "More arguments for --launcher, in one word."},
    "ssh_port": {"type": PORT, "help": "Port of sshd on the hosts. [default: ssh's]"},
    "no_ssh": {
        "is_flag": True,
        "help": "Start this host only; each of the others is started with the same options.",
    },
    "node_rank": {
        "type": click.IntRange(min=0),
        "help": "Number of this host, from 0, with --no-ssh.",
    },
    "master_addr": {"help": "Address of the first host. [default: found by preflight]"},
    "master_port": {"type": PORT, "help": "Port on the first host. [default: a free one]"},
    "network_interface": {
        "help": "Network interface that the ranks use, by its name on every host. [default: the "
        "one with the route to the first host]"
    },
    "env": {
        "multiple": True,
        "metavar": "NAME[=VALUE]",
        "help": "A variable for the ranks of all hosts. HF_*, NCCL_*, OMP_* and the like are "
        "exported anyway; tokens and keys only by --env (`ps` on the hosts shows them).",
    },
    "failure_timeout": {
        "type": SECONDS,
        "default": 60.0,
        "show_default": True,
        "metavar": "SECONDS",
        "help": "A host that is silent for so long has failed, and the job ends.",
    },
    "start_timeout": {
        "type": SECONDS,
        "default": 600.0,
        "show_default": True,
        "metavar": "SECONDS",
        "help": "Time for all ranks to start, and, once one waits for the others, for all to join.",
    },
    "max_restarts": {
        "type": click.IntRange(min=0),
        "default": 0,
        "show_default": True,
        "help": "Restarts from the last checkpoint after a failure, at most.",
    },
    "allow_fewer_hosts": {
        "is_flag": True,
        "help": "Restart on the hosts that still answer; the global batch stays as it was.",
    },
    "skip_preflight": {
        "is_flag": True,
        "help": "Do not check the hosts before the start (see `lorasb doctor`).",
    },
    "dry_run": {"is_flag": True, "help": "Check, print the command, and stop."},
}


def launch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add all launch options to a command, which gets them as ``launch``."""
    names = [field.name for field in fields(LaunchOptions)]

    @wraps(command)
    def wrapper(**options: Any) -> Any:
        launch = LaunchOptions(**{name: options.pop(name) for name in names})
        return command(launch=launch, **options)

    attributes: dict[str, Any] = {"cls": SectionedOption, "section": HOSTS}
    flags = [click.option(option_name(name), name, **attributes, **OPTIONS[name]) for name in names]
    return add_options(*flags)(wrapper)

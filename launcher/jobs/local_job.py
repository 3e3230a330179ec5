"""A job on this host alone."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.jobs import channel
from launcher.jobs.channel import listen_for_agents
from launcher.jobs.command import GPU_NAMES, local_command
from launcher.jobs.job import Job, LauncherCall
from launcher.jobs.ranks import free_port


@dataclass(frozen=True)
class LocalJob(Job):
    """A job on this host alone, whose cores its ranks share."""

    @property
    def num_cores(self) -> int | None:
        return len(os.sched_getaffinity(0))

    def dry_run(self) -> str:
        port = self.launch.master_port or free_port()
        return shlex.join(self._command(self.environment(), port))

    def prepare(
        self, environment: Mapping[str, str], port: int, master_addr: str | None
    ) -> LauncherCall:
        listener, address = listen_for_agents("127.0.0.1")
        command = self._command(environment, port)
        return LauncherCall(command, {**environment, channel.SUPERVISOR: address}, listener)

    def _command(self, environment: Mapping[str, str], port: int) -> list[str]:
        count = self.num_procs or self.num_gpus
        if self.num_procs is None and "CUDA_VISIBLE_DEVICES" in environment:
            count = None  # DeepSpeed takes those that the variable names, if it gets no count
        elif self.num_procs is None and GPU_NAMES in environment:
            count = len(environment[GPU_NAMES].split(","))
        return local_command(self.arguments, count=count, master_port=port)

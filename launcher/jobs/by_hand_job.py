"""One host's part of a job whose hosts are started one by one (`--no-ssh`): Slurm, Kubernetes."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from launcher.jobs import channel
from launcher.jobs.channel import listen_for_agents
from launcher.jobs.command import by_hand_command
from launcher.jobs.job import HostsJob, LauncherCall
from launcher.jobs.ranks import free_port
from lorasb_ds.config.run_layout import DEEPSPEED_FILES, HOSTFILE, LAUNCH
from lorasb_ds.errors import ConfigError


@dataclass(frozen=True)
class ByHandJob(HostsJob):
    """This host's part of a job: nothing is agreed on beforehand but the options."""

    started_by_hand: ClassVar[bool] = True
    preflight_at_start: ClassVar[bool] = False

    @property
    def launcher_log(self) -> Path:
        return self.folder / LAUNCH / f"{DEEPSPEED_FILES}{self.launch.node_rank or ''}.log"

    def remove_earlier_logs(self) -> None:
        """Remove nothing: ranks of other hosts may have begun to write."""

    def dry_run(self) -> str:
        port = self.launch.master_port or free_port()
        return shlex.join(self._command(self.hostfile, port))

    def prepare(
        self, environment: Mapping[str, str], port: int, master_addr: str | None
    ) -> LauncherCall:
        node_rank, first_host = self.launch.node_rank, self.launch.master_addr
        assert first_host is not None
        hostfile = self.hostfile.with_name(f"{HOSTFILE}-{node_rank}")
        hostfile.write_text(self.hostfile_text)
        # The supervisor has the port after the master's.
        meaning = [*self.arguments, first_host, str(port), *self.slots]
        environment = {
            **environment,
            channel.OPTIONS: hashlib.sha256("\0".join(meaning).encode()).hexdigest(),
            channel.SUPERVISOR: f"{first_host}:{port + 1}",
            channel.NODE_RANK: str(node_rank),
        }
        listener = None
        if node_rank == 0:
            try:
                listener, _ = listen_for_agents("", port + 1)
            except OSError as error:
                raise ConfigError(
                    f"--master-port {port}: the next port, {port + 1}, is needed, too, and is not "
                    f"available here ({error.strerror}). Choose another one, on all hosts."
                ) from error
        return LauncherCall(self._command(hostfile, port), environment, listener)

    def _command(self, hostfile: Path, port: int) -> list[str]:
        node_rank, first_host = self.launch.node_rank, self.launch.master_addr
        assert node_rank is not None
        assert first_host is not None
        hosts = self.hosts(first_host, port, hostfile)
        return by_hand_command(self.arguments, hosts, node_rank=node_rank)

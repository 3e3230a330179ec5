"""A job on the hosts of a hostfile, which DeepSpeed starts from here: by pdsh, MPI or Slurm."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import click

from launcher.hosts.checks import Check, Question
from launcher.hosts.environment import (
    asked_for,
    deepspeed_env,
    exported,
    hosts_environment,
    read_deepspeed_env,
)
from launcher.hosts.host import resolve, route_from
from launcher.hosts.over_ssh import put_file
from launcher.hosts.preflight import Findings, examine
from launcher.jobs import channel, session
from launcher.jobs.channel import listen_for_agents
from launcher.jobs.command import ssh_command
from launcher.jobs.job import HostsJob, Job, LauncherCall
from launcher.jobs.ranks import free_port
from lorasb_ds.config.run_layout import DEEPSPEED_FILES
from lorasb_ds.errors import ConfigError


@dataclass(frozen=True)
class SshJob(HostsJob):
    """A job on several hosts. Only pdsh uses ssh; MPI and Slurm reach them in their own ways."""

    @property
    def uses_pdsh(self) -> bool:
        return self.launch.launcher == "pdsh"

    @property
    def rank_hosts(self) -> list[str] | None:
        return super().rank_hosts if self.uses_pdsh else None

    def question(
        self, port: int | None = None, timeout: float = 20.0, thorough: bool = False
    ) -> Question:
        slots = self.slots if self.uses_pdsh else {}
        question = super().question(port, timeout, thorough)
        return replace(question, slots={host: len(ids) for host, ids in slots.items()})

    def examine(self, question: Question) -> Findings:
        return examine(question)

    def exported_variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Return what the ranks of all hosts get: the user's `.deepspeed_env` wins, then --env.

        Raises:
            ConfigError: if DeepSpeed could not read that file, or --env is wrong.
        """
        # Ours takes its place: DeepSpeed reads the file that DS_ENV_FILE names, and no other.
        name = environment.get("DS_ENV_FILE", ".deepspeed_env")
        own: dict[str, str] = {}
        for file in (Path.home() / name, Path(name)):
            own |= read_deepspeed_env(file) if file.is_file() else {}
        return {**exported(environment), **own, **asked_for(environment, self.launch.env)}

    def dry_run(self) -> str:
        launch, port = self.launch, self.launch.master_port or free_port()
        command = self._command(launch.master_addr or "MASTER_ADDR", port)
        variables = self.exported_variables(self.environment())
        deepspeed_env(variables, launch.launcher)  # checks them
        lines = [shlex.join(command)]
        if launch.master_addr is None:
            lines.append("# MASTER_ADDR is found at the start, unless --master-addr gives it.")
        lines += [f"# {self.hostfile}:"]
        lines += [f"#   {line}" for line in self.hostfile_text.splitlines()]
        lines += [f"# {self.env_file}: {' '.join(sorted(variables))}"]
        return "\n".join(lines)

    @property
    def env_file(self) -> Path:
        return self.hostfile.with_name(f"{DEEPSPEED_FILES}_env")

    def prepare(
        self, environment: Mapping[str, str], port: int, master_addr: str | None
    ) -> LauncherCall:
        master_addr = self._master_addr(master_addr)
        self.hostfile.write_text(self.hostfile_text)
        if self.uses_pdsh:
            question, file = self.question(port), Path(environment[session.FILE])
            if problems := put_file(list(self.slots), file, question):
                raise ConfigError(
                    f"The job's secret cannot be taken to {'; '.join(problems)}. Every host must "
                    "be able to write to --output-dir."
                )
        # Where the other hosts see this one; nobody else is listened to.
        address = route_from(master_addr)
        listener, supervisor = listen_for_agents(address or "", seen_as=address or master_addr)
        environment = {**environment, channel.SUPERVISOR: supervisor}
        variables = self.exported_variables(environment)
        if not self.uses_pdsh:
            variables |= {"MASTER_ADDR": master_addr, "MASTER_PORT": str(port)}
        self.env_file.unlink(missing_ok=True)
        self.env_file.touch(mode=0o600)  # before anything is in it
        self.env_file.write_text(deepspeed_env(variables, self.launch.launcher))
        command = self._command(master_addr, port)
        if self.uses_pdsh:
            # A launcher that is suspended (Ctrl-Z) is one that the hosts do not hear of.
            signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        return LauncherCall(command, hosts_environment(environment, str(self.env_file)), listener)

    def _command(self, master_addr: str, port: int) -> list[str]:
        return ssh_command(
            self.arguments,
            self.hosts(master_addr, port, self.hostfile),
            launcher=self.launch.launcher,
            launcher_args=self.launch.launcher_args,
            ssh_port=self.launch.ssh_port,
        )

    def _master_addr(self, found: str | None) -> str:
        first = next(iter(self.slots))
        address = self.launch.master_addr or found or resolve(first)
        if address is None or address.startswith("127."):
            raise ConfigError(
                f"The address of the first host, {first}, is not known (its name resolves to "
                f"{address}). Give --master-addr."
            )
        return address

    def restarted(self, has_begun: bool) -> Job:
        if not self.uses_pdsh:
            return super().restarted(has_begun)
        limit = min(20.0, self.launch.failure_timeout)
        findings = self.examine(self.question(timeout=limit))
        # The next start reports whatever else is red.
        lost = {check.host: check for check in findings.problems if check.what == "ssh"}
        if lost and not self.launch.allow_fewer_hosts:
            raise ConfigError(
                f"No restart: {_describe(lost.values())}. --allow-fewer-hosts goes on without."
            )
        slots = {host: ids for host, ids in self.slots.items() if host not in lost}
        if not slots:
            raise ConfigError(f"No restart: no host is left. {_describe(lost.values())}.")
        given = self._options_of_restart(has_begun)
        if lost:
            click.echo(f"lorasb: goes on without {_describe(lost.values())}", err=True)
            # The order of the rows depends on the global batch, which must stay.
            given |= {"train_batch_size": self.config.train_batch_size}
            given |= {"gradient_accumulation_steps": None}
        return replace(self, slots=slots)._with_options(given)


def _describe(checks: Iterable[Check]) -> str:
    return "; ".join(f"{check.host} ({check.what}: {check.found})" for check in checks)

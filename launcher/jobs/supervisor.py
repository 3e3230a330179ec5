"""Watches a job from the host where it was started, and reports how it really ended.

DeepSpeed's launchers start the ranks; an `agent` on every rank connects to the supervisor here and
says how its worker is. A worker that fails, a host that is not heard of, a rank that never comes:
each ends the whole job, on every host, within the time limit, with a status that is not 0 and a
paragraph that names rank, host, cause and log.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import psutil

from launcher.hosts.environment import is_secret
from launcher.jobs.agent_connections import Agents
from launcher.jobs.channel import STOPPED, beat_interval
from launcher.jobs.console import Console
from launcher.jobs.ranks import listen_to, shell_status
from launcher.jobs.verdict import (
    EXIT_REFUSED,
    Failure,
    failed_rank,
    late_rank,
    launcher_gone,
    lost_rank,
)
from lorasb_ds.system.signals import EXIT_INTERRUPTED, EXIT_STOPPED

SETTLE_S = 3.0  # between the end of DeepSpeed's launcher and the last word of an agent
GO_ON = "--resume auto goes on from the last checkpoint, if there is one"
LAUNCHER_TAIL = 30  # lines of DeepSpeed's output
PR_SET_CHILD_SUBREAPER = 36
# Where DeepSpeed's launchers run: `python -m` imports what is in the working directory first, and
# DeepSpeed exports that as PYTHONPATH to all hosts. The agents go back to the user's.
ROOT = "/"


@dataclass
class Supervisor:
    """One attempt of a job.

    Args:
        listener: where the agents connect; None where another host's launcher supervises.
        session: the word that an agent has to know to be let in.
        options: digest of the options, where every host is started by itself.
        hosts: the hostfile's name of every rank's host; None where only the agents know.
        by_hand: every host is started by itself (``--no-ssh``), by a scheduler or a user.
        launcher_log: what DeepSpeed's launchers print.
        stop_signals: those that have asked the job to end; new ones are appended.
    """

    listener: socket.socket | None
    session: str
    failure_timeout: float
    start_timeout: float
    launcher_log: Path
    hosts: Sequence[str] | None = None
    by_hand: bool = False
    options: str | None = None
    stop_signals: list[int] = field(default_factory=list)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start DeepSpeed's launcher in a process session of its own, and see the job to its end.

        Call it from the main thread: it handles signals.

        Returns:
            The status for the shell.
        """
        self._agents = Agents(
            listener=self.listener,
            session=self.session,
            options=self.options,
            failure_timeout=self.failure_timeout,
            hosts=self.hosts,
            by_hand=self.by_hand,
            launcher_log=self.launcher_log,
            on_output=self._show,
            on_complete=self._show_hosts,
        )
        self._console = Console()
        self._interrupted = self._muted = False
        self._hidden = [self.session, *(v for k, v in environment.items() if is_secret(k) and v)]
        self.launcher_log.parent.mkdir(parents=True, exist_ok=True)
        self._listen_to(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # Children inherit that it is ignored: DeepSpeed's launchers are to outlive it.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        # A connection for every rank, and shells allow 1024.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        # What a launcher of DeepSpeed's leaves behind becomes a child of this process.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.launcher_log.touch(mode=0o600)  # it has all variables of the hosts
        self._log_began = self.launcher_log.stat().st_size
        with self.launcher_log.open("ab") as log:
            self._child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )
        self._listen_to(signal.SIGUSR1)
        self._started = time.monotonic()
        try:
            return self._watch_agents() if self.listener else self._watch_launcher()
        finally:
            self._end_everything()
            self._note_strangers()
            self._console.flush()

    def _watch_agents(self) -> int:
        """Return the status once all ranks have ended, or one of them has failed."""
        agents = self._agents
        child_ended: float | None = None
        next_beat, passed_on = 0.0, 0
        while True:
            agents.wait()
            now = time.monotonic()
            agents.read(now)
            if now >= next_beat or len(self.stop_signals) > passed_on:
                passed_on = len(self.stop_signals)
                next_beat = now + beat_interval(self.failure_timeout)
                agents.send(**({"stop": True} if self.stop_signals else {"beat": True}))
            if self._interrupted:
                return EXIT_INTERRUPTED
            if failure := self._failure(now):
                return self._end(failure)
            if agents.have_all_ended:
                statuses = [member.returncode for member in agents.members.values()]
                return EXIT_STOPPED if EXIT_STOPPED in statuses else 0
            if child_ended is None and self._child.poll() is not None:
                child_ended = now
            if child_ended is not None and now - child_ended > SETTLE_S:
                return self._end(self._launcher_gone())

    def _watch_launcher(self) -> int:
        """Return the status of DeepSpeed's launcher: the first host's supervisor has the agents."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._child.wait(timeout=0.5)
                stopped = self._show_agents_words()
                return EXIT_STOPPED if stopped else shell_status(status)
            if self._interrupted:
                return EXIT_INTERRUPTED
            if self.stop_signals:
                self._signal_children(signal.SIGUSR1, "agent.py")

    def _show(self, stream: int, text: str) -> None:
        if not self._muted:
            self._console.write(stream, text)

    def _show_hosts(self) -> None:
        for line in self._agents.describe():
            self._console.write(1, line)

    def _show_agents_words(self) -> bool:
        """Show what this host's agents have said; return whether they were stopped on request."""
        with self.launcher_log.open(encoding="utf-8", errors="replace") as log:
            log.seek(self._log_began)
            said = dict.fromkeys(line for line in log if line.startswith("lorasb: "))
        for line in said:
            self._console.write(2, line)
        return f"lorasb: {STOPPED}\n" in said

    def _failure(self, now: float) -> Failure | None:
        """Return why the job has to end now, if it has to."""
        agents = self._agents
        if agents.refusal:
            return Failure(EXIT_REFUSED, agents.refusal)
        members = agents.members.values()
        failure = failed_rank(members) or lost_rank(members, now, self.failure_timeout)
        return failure or late_rank(
            members,
            self.hosts,
            agents.world_size,
            limit=self.start_timeout,
            started=self._started,
            now=now,
            launcher_log=str(self.launcher_log),
        )

    def _launcher_gone(self) -> Failure:
        return launcher_gone(
            self._agents.members.values(),
            self.hosts,
            self._agents.world_size,
            status=self._child.returncode,
            launcher_log=str(self.launcher_log),
        )

    def _launcher_tail(self) -> list[str]:
        with contextlib.suppress(OSError):
            text = self.launcher_log.read_text(encoding="utf-8", errors="replace")
            for secret in self._hidden:
                text = text.replace(secret, "***")
            return text.splitlines()[-LAUNCHER_TAIL:]
        return []

    def _end(self, failure: Failure) -> int:
        """End all ranks, and say why; return the status."""
        self._muted = True  # what rank 0 says of the others' end is in its log
        self._agents.send(kill=failure.cause, stacks=True)
        self._agents.await_ends(min(5.0, self.failure_timeout))
        self._console.flush()
        with contextlib.suppress(OSError):  # the terminal may be closed
            tail = self._launcher_tail() if failure.show_launcher_log else failure.tail
            if tail:
                click.echo("\n".join(f"  | {line}" for line in tail), err=True)
            if not failure.is_reported:
                click.echo(f"lorasb: error: {failure.cause}", err=True)
            if not failure.is_reported and failure.status != EXIT_REFUSED:
                click.echo(f"lorasb: {GO_ON}", err=True)
        return failure.status

    def _end_everything(self) -> None:
        """End what is left of DeepSpeed's launchers here; an agent without us ends by itself."""
        if self._interrupted:
            self._agents.send(kill="Ctrl-C, twice")
            self._agents.await_ends(1.0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            # DeepSpeed's launchers look for the end of their agents once in a second.
            self._child.wait(timeout=SETTLE_S)
        self._signal_children(signal.SIGKILL)
        self._child.wait()
        self._agents.close()

    def _note_strangers(self) -> None:
        if self._agents.strangers:
            with contextlib.suppress(OSError), self.launcher_log.open("a") as log:
                log.write(f"lorasb: {self._agents.strangers} connections were not of this job\n")

    def _signal_children(self, signum: int, marker: str = "") -> None:
        """Signal all that this process has started (pdsh's ssh leave its process group).

        Args:
            marker: of their command lines; those without it get nothing.
        """
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if not marker or marker in " ".join(process.cmdline()):
                    process.send_signal(signum)

    def _listen_to(self, *signals: int) -> None:
        """Take these signals as requests to end the job."""

        def ask(signum: int, _frame: object) -> None:
            first = not self.stop_signals
            self.stop_signals.append(signum)
            self._interrupted = self.stop_signals.count(signal.SIGINT) > 1
            if first:
                self._console.write(2, "lorasb: asked to end: after this step, if it trains\n")
                if signum == signal.SIGINT:
                    self._console.write(
                        2, "lorasb: Ctrl-C again ends it at once, without a checkpoint\n"
                    )

        listen_to(signals, ask)

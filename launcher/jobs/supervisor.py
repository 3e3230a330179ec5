"""Watches a job from the host where it was started, and makes its end tell the truth.

DeepSpeed's launchers start the ranks; an `agent` on every rank connects to the supervisor here and
says how its worker is. A worker that fails, a host that is not heard of, a rank that never comes:
each ends the whole job, on every host, within the time limit, with a status that is not 0 and a
paragraph that names rank, host, cause and log.
"""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil

from launcher.hosts.environment import is_secret
from launcher.hosts.polling import readable
from launcher.jobs.channel import LONGEST_GREETING, LONGEST_MESSAGE, STOPPED, Channel, beat_interval
from launcher.jobs.console import Console
from launcher.jobs.ranks import listen_to, shell_status
from launcher.jobs.verdict import (
    EXIT_REFUSED,
    Failure,
    Member,
    failed_rank,
    late_rank,
    launcher_gone,
    lost_rank,
)
from lorasb_ds.system.signals import EXIT_INTERRUPTED, EXIT_STOPPED

POLL_S = 0.1
SETTLE_S = 3.0  # between the end of DeepSpeed's launcher and the last word of an agent
GO_ON = "--resume auto goes on from the last checkpoint, if there is one"
MOST_NEWCOMERS = 2048
LAUNCHER_TAIL = 30  # lines of DeepSpeed's output
PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Supervisor:
    """One job.

    Args:
        listener: where the agents connect; None where another host's launcher supervises.
        session: what an agent has to say to be let in.
        hosts: the hostfile's name of every rank's host; None where only the agents know.
        by_hand: every host is started by itself (``--no-ssh``), by a scheduler or a user.
        launcher_log: what DeepSpeed's launchers print.
        stop_signals: those that have asked the job to end; it is added to.
    """

    listener: socket.socket | None
    session: str
    failure_timeout: float
    start_timeout: float
    launcher_log: Path
    hosts: Sequence[str] | None = None
    by_hand: bool = False
    stop_signals: list[int] = field(default_factory=list)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start DeepSpeed's launcher in a process session of its own, and see the job to its end.

        From the main thread: it listens to signals.
        """
        self._world_size = len(self.hosts) if self.hosts else None
        self.members: dict[int, Member] = {}
        self._newcomers: dict[Channel, float] = {}
        self._console = Console()
        self._interrupted = self._muted = False
        self._refusal: str | None = None
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
                start_new_session=True,
            )
        self._listen_to(signal.SIGUSR1)
        self._started = time.monotonic()
        try:
            return self._watch() if self.listener else self._follow()
        finally:
            self._end_everything()
            self._console.flush()

    # -- what comes in

    def _watch(self) -> int:
        """Until all ranks have ended, or one of them has failed."""
        child_ended: float | None = None
        next_beat, told = 0.0, 0
        while True:
            self._wait_for_news()
            now = time.monotonic()
            self._read(now)
            if now >= next_beat or len(self.stop_signals) > told:
                told = len(self.stop_signals)
                next_beat = now + beat_interval(self.failure_timeout)
                self._send(**({"stop": True} if self.stop_signals else {"beat": True}))
            if self._interrupted:
                return EXIT_INTERRUPTED
            if failure := self._failure(now):
                return self._end(failure)
            if self._all_ended():
                statuses = [member.returncode for member in self.members.values()]
                return EXIT_STOPPED if EXIT_STOPPED in statuses else 0
            if child_ended is None and self._child.poll() is not None:
                child_ended = now
            if child_ended is not None and now - child_ended > SETTLE_S:
                return self._end(self._launcher_gone())

    def _follow(self) -> int:
        """The launcher's child alone: the first host's supervisor has the agents."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._child.wait(timeout=0.5)
                stopped = self._tell_what_agents_said()
                return EXIT_STOPPED if stopped else shell_status(status)
            if self._interrupted:
                return EXIT_INTERRUPTED
            if self.stop_signals:
                self._signal_children(signal.SIGUSR1, "agent.py")

    def _wait_for_news(self) -> None:
        assert self.listener is not None
        channels = [m.channel for m in self.members.values() if not m.channel.closed]
        sources = [self.listener.fileno(), *(c.fileno() for c in [*channels, *self._newcomers])]
        readable(sources, POLL_S)

    def _read(self, now: float) -> None:
        assert self.listener is not None
        with contextlib.suppress(OSError):  # no one more waits, or too many files are open
            while True:
                newcomer = Channel(self.listener.accept()[0], limit=LONGEST_GREETING)
                self._newcomers[newcomer] = now
                if len(self._newcomers) > MOST_NEWCOMERS:
                    oldest = next(iter(self._newcomers))
                    del self._newcomers[oldest]
                    oldest.close()
        for channel, since in list(self._newcomers.items()):
            messages = channel.receive()
            if messages:
                self._admit(channel, messages[0], now)
            if messages or channel.closed or now - since > self.failure_timeout:
                del self._newcomers[channel]
                if not messages:
                    channel.close()
        for member in self.members.values():
            for message in member.channel.receive():
                self._hear(member, message, now)

    def _admit(self, channel: Channel, message: dict[str, Any], now: float) -> None:
        """A new agent of this job; anything else is sent away."""
        word = str(message.get("session")).encode(errors="replace")
        if not hmac.compare_digest(word, self.session.encode()):
            channel.send(refused="it is not of this job: was it started with the same options?")
            channel.close()
            if self.by_hand:  # the word is a digest of the options
                self._refusal = (
                    f"rank {message.get('rank')} on {message.get('host')} was started with other "
                    "options than this host. Use the same on all, but for --node-rank."
                )
            return
        rank, world_size = int(message["rank"]), int(message["world_size"])
        if self.hosts is not None and world_size != len(self.hosts):
            self._refusal = (
                f"DeepSpeed started {world_size} rank(s) in place of {len(self.hosts)}. Its log: "
                f"{self.launcher_log}"
            )
            return
        if rank in self.members:
            channel.send(refused="it has come already: was a --node-rank given twice?")
            channel.close()
            return
        channel.limit = LONGEST_MESSAGE
        named = self.hosts is not None and not self.by_hand
        host = self.hosts[rank] if self.hosts and named else str(message["host"])
        member = Member(channel, rank, host, message["log"], message["interface"], heard=now)
        self.members[rank] = member
        self._world_size = world_size
        terminal = list(os.get_terminal_size(1)) if rank == 0 and os.isatty(1) else None
        channel.send(terminal=terminal)
        if len(self.members) == self._world_size:
            self._say_where()

    def _hear(self, member: Member, message: dict[str, Any], now: float) -> None:
        member.heard = now
        if "output" in message and not self._muted:
            self._console.write(int(message["stream"]), str(message["output"]))
        member.stage = message.get("stage", member.stage)
        if member.stage == "joining":
            member.joining = member.joining or now
        if "state" in message:
            member.lock = message["lock"]
            stopped = message["state"] in ("T", "t")
            member.stopped_at = (member.stopped_at or now) if stopped else None
        if "ended" in message:
            member.ended = now
            member.returncode, member.tail = int(message["ended"]), message["tail"]
            member.channel.close()

    def _tell_what_agents_said(self) -> bool:
        """Those of this host; whether they were stopped on request."""
        with self.launcher_log.open(encoding="utf-8", errors="replace") as log:
            log.seek(self._log_began)
            said = dict.fromkeys(line for line in log if line.startswith("lorasb: "))
        for line in said:
            self._console.write(2, line)
        return f"lorasb: {STOPPED}\n" in said

    # -- what it means

    def _failure(self, now: float) -> Failure | None:
        """Why the job has to end now, if it has to."""
        members = self.members.values()
        if self._refusal:
            return Failure(EXIT_REFUSED, self._refusal)
        failure = failed_rank(members) or lost_rank(members, now, self.failure_timeout)
        return failure or late_rank(
            members,
            self.hosts,
            self._world_size,
            limit=self.start_timeout,
            started=self._started,
            now=now,
            launcher_log=str(self.launcher_log),
        )

    def _launcher_gone(self) -> Failure:
        return launcher_gone(
            self.members.values(),
            self.hosts,
            self._world_size,
            status=self._child.returncode,
            launcher_log=str(self.launcher_log),
        )

    def _all_ended(self) -> bool:
        ended = [m for m in self.members.values() if m.returncode is not None]
        return len(ended) == self._world_size and self._world_size is not None

    def _launcher_tail(self) -> list[str]:
        with contextlib.suppress(OSError):
            text = self.launcher_log.read_text(encoding="utf-8", errors="replace")
            for secret in self._hidden:
                text = text.replace(secret, "***")
            return text.splitlines()[-LAUNCHER_TAIL:]
        return []

    # -- what is done about it

    def _end(self, failure: Failure) -> int:
        """End all ranks, and say why."""
        self._muted = True  # what rank 0 says of the others' end is in its log
        self._send(kill=failure.cause, stacks=True)
        self._await_ends(min(5.0, self.failure_timeout))
        self._console.flush()
        with contextlib.suppress(OSError):  # the terminal may be closed
            tail = self._launcher_tail() if failure.show_launcher_log else failure.tail
            if tail:
                click.echo("\n".join(f"  | {line}" for line in tail), err=True)
            if not failure.told:
                click.echo(f"lorasb: error: {failure.cause}", err=True)
            if not failure.told and failure.status != EXIT_REFUSED:
                click.echo(f"lorasb: {GO_ON}", err=True)
        return failure.status

    def _await_ends(self, seconds: float) -> None:
        """Until all agents have said how their workers ended, for so long at most."""
        deadline = time.monotonic() + seconds
        while (now := time.monotonic()) < deadline:
            # Who is not heard of ends by itself, as it does not hear of us either.
            heard = [m for m in self.members.values() if now - m.heard < self.failure_timeout]
            if all(m.channel.closed for m in heard):
                return
            self._wait_for_news()
            self._read(now)
            for member in heard:
                member.channel.flush()

    def _end_everything(self) -> None:
        """What is left of DeepSpeed's launchers here; an agent without us ends by itself."""
        if self._interrupted:
            self._send(kill="Ctrl-C, twice")
            self._await_ends(1.0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            # DeepSpeed's launchers look for the end of their agents once in a second.
            self._child.wait(timeout=SETTLE_S)
        self._signal_children(signal.SIGKILL)
        self._child.wait()
        for channel in [*self._newcomers, *(m.channel for m in self.members.values())]:
            channel.close()

    def _send(self, **message: Any) -> None:
        for member in self.members.values():
            if not member.channel.closed:
                member.channel.send(**message)

    def _signal_children(self, signum: int, marker: str = "") -> None:
        """All that this process has started (pdsh's ssh leave its process group).

        Args:
            marker: of their command lines; those without it get nothing.
        """
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if not marker or marker in " ".join(process.cmdline()):
                    process.send_signal(signum)

    def _listen_to(self, *signals: int) -> None:
        """Signals that ask the job to end."""

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

    def _say_where(self) -> None:
        """Other hosts: which they are, and which network they meet on."""
        members = [self.members[rank] for rank in sorted(self.members)]
        num_hosts = len({member.host for member in members})
        if self.hosts is None and num_hosts == 1:
            return
        logs = Path(members[0].log).parent
        self._console.write(
            1, f"lorasb: {len(members)} rank(s) on {num_hosts} host(s), their logs in {logs}\n"
        )
        used: dict[str, list[str]] = {}
        for member in members:
            hosts = used.setdefault(member.interface or "an unknown interface", [])
            if member.host not in hosts:
                hosts.append(member.host)
        text = "; ".join(f"{interface} on {', '.join(hosts)}" for interface, hosts in used.items())
        self._console.write(1, f"lorasb: network: {text}\n")

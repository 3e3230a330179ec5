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
import queue
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil

from launcher.channel import LONGEST_GREETING, LONGEST_MESSAGE, Channel, beat_interval, readable
from lorasb_ds.stop import EXIT_INTERRUPTED, EXIT_STOPPED

POLL_S = 0.1
SETTLE_S = 3.0  # between the end of DeepSpeed's launcher and the last word of an agent
EXIT_FAILED, EXIT_REFUSED = 1, 2
PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Member:
    """A rank, as its agent describes it."""

    channel: Channel
    rank: int
    host: str
    log: str
    interface: str | None
    heard: float  # when, of time.monotonic()
    stage: str = ""  # what its worker has told last: joining, joined
    stopped_at: float | None = None  # by SIGSTOP
    returncode: int | None = None  # as subprocess has it: negative for a signal
    tail: Sequence[str] = ()
    order: int | None = None  # how many had ended before it


@dataclass(frozen=True)
class Failure:
    """Why a job has to end before its time."""

    status: int
    cause: str
    hosts: tuple[str, ...] = ()  # where it happened
    tail: Sequence[str] = ()  # of a log that the console has not seen
    told: bool = False  # rank 0 has said what was wrong, on the console


@dataclass(frozen=True)
class Ending:
    """How a job ended: the status for the shell, and the failure if it was one."""

    status: int
    failure: Failure | None = None


@dataclass
class Supervisor:
    """One job.

    Args:
        listener: where the agents connect; None where another host's launcher supervises.
        session: what an agent has to say to be let in.
        hosts: the hostfile's name of every rank's host; None where only the agents know.
        placeholders: nobody has named the hosts: an agent's word is better.
        launcher_log: what DeepSpeed's launchers print.
    """

    listener: socket.socket | None
    session: str
    failure_timeout: float
    start_timeout: float
    launcher_log: Path
    hosts: Sequence[str] | None = None
    placeholders: bool = False
    members: dict[int, Member] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)  # signals that asked the job to end

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> Ending:
        """Start DeepSpeed's launcher in a process session of its own, and see the job to its end.

        From the main thread: it listens to signals.
        """
        self._world_size = len(self.hosts) if self.hosts else None
        self._newcomers: dict[Channel, float] = {}
        self._console = Console()
        self._interrupted = False
        self.launcher_log.parent.mkdir(parents=True, exist_ok=True)
        # Children inherit that it is ignored: DeepSpeed's launchers are to outlive it, and workers
        # to whom it is sent before they listen.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        # A connection for every rank, and shells allow 1024.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        # What a launcher of DeepSpeed's leaves behind becomes a child of this process.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        with self.launcher_log.open("ab") as log:
            self._child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log if self.listener else None,
                stderr=log if self.listener else None,
                start_new_session=True,
            )
        self._listen_to_signals()
        self._started = time.monotonic()
        try:
            ending = self._watch() if self.listener else self._follow()
        finally:
            self._end_everything()
            self._console.close()
        return ending

    # -- what comes in

    def _watch(self) -> Ending:
        """Until all ranks have ended, or one of them has failed."""
        child_ended: float | None = None
        next_beat = 0.0
        while True:
            self._wait_for_news()
            now = time.monotonic()
            self._read(now)
            if now >= next_beat:
                next_beat = now + beat_interval(self.failure_timeout)
                self._send(**({"stop": True} if self.asked else {"beat": True}))
            if self._interrupted:
                return Ending(EXIT_INTERRUPTED)
            if failure := self._failed_rank() or self._lost_rank(now):
                return self._end(failure)
            if self._all_ended():
                statuses = [member.returncode for member in self.members.values()]
                return Ending(EXIT_STOPPED if EXIT_STOPPED in statuses else 0)
            if child_ended is None and self._child.poll() is not None:
                child_ended = now
            if child_ended is not None and now - child_ended > SETTLE_S:
                return self._end(self._launcher_gone())

    def _follow(self) -> Ending:
        """The launcher's child alone: the first host's supervisor has the agents."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._child.wait(timeout=0.5)
                return Ending(status if status >= 0 else 128 - status)
            if self._interrupted:
                return Ending(EXIT_INTERRUPTED)
            if self.asked:
                self._signal_children(signal.SIGUSR1)

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
        if not hmac.compare_digest(str(message.get("session")).encode(), self.session.encode()):
            channel.send(refused="it is not of this job: was it started with the same options?")
            channel.close()
            return
        rank = int(message["rank"])
        if rank in self.members:
            channel.send(refused="it has come already: was a --node-rank given twice?")
            channel.close()
            return
        channel.limit = LONGEST_MESSAGE
        named = self.hosts is not None and not self.placeholders
        host = self.hosts[rank] if self.hosts and named else str(message["host"])
        member = Member(channel, rank, host, message["log"], message["interface"], heard=now)
        self.members[rank] = member
        self._world_size = int(message["world_size"])
        terminal = list(os.get_terminal_size(1)) if rank == 0 and os.isatty(1) else None
        channel.send(terminal=terminal)
        if len(self.members) == self._world_size:
            self._say_where()

    def _hear(self, member: Member, message: dict[str, Any], now: float) -> None:
        member.heard = now
        if "output" in message:
            self._console.write(int(message["stream"]), str(message["output"]))
        member.stage = message.get("stage", member.stage)
        if "state" in message:
            stopped = message["state"] in ("T", "t")
            member.stopped_at = (member.stopped_at or now) if stopped else None
        if "ended" in message:
            member.order = sum(m.returncode is not None for m in self.members.values())
            member.returncode, member.tail = int(message["ended"]), message["tail"]
            member.channel.close()

    # -- what it means

    def _all_ended(self) -> bool:
        ended = [m for m in self.members.values() if m.returncode is not None]
        return len(ended) == self._world_size and self._world_size is not None

    def _failed_rank(self) -> Failure | None:
        """The first rank that has ended as it should not."""
        failed = [m for m in self.members.values() if m.returncode not in (None, 0, EXIT_STOPPED)]
        if not failed:
            return None
        first = min(failed, key=lambda m: m.order or 0)
        assert first.returncode is not None
        told = first.rank == 0 and first.returncode > 0
        return Failure(
            status=first.returncode if first.returncode > 0 else 128 - first.returncode,
            cause=f"{_place(first)} {_how(first.returncode)}. Its log: {first.log}",
            hosts=(first.host,) if first.returncode < 0 else (),
            tail=() if first.rank == 0 else first.tail,
            told=told and first.returncode == EXIT_REFUSED,
        )

    def _lost_rank(self, now: float) -> Failure | None:
        """A rank that is not heard of, is stopped, or has not come."""
        alive = [m for m in self.members.values() if m.returncode is None]
        limit = self.failure_timeout
        broken = [m for m in alive if m.channel.closed]
        silent = [m for m in alive if now - m.heard > limit]
        stopped = [m for m in alive if m.stopped_at and now - m.stopped_at > limit]
        for lost, what in (
            (broken, "has gone: its agent's connection broke"),
            (
                silent,
                f"was not heard of for {limit:g} s (--failure-timeout): its host or its "
                "network is down",
            ),
            (stopped, f"has been stopped for {limit:g} s (SIGSTOP; --failure-timeout)"),
        ):
            if lost:
                return _several(lost, what)
        if now - self._started > self.start_timeout:
            return self._not_joined()
        return None

    def _not_joined(self) -> Failure | None:
        """Ranks that have not joined the others in time."""
        limit = f"within {self.start_timeout:g} s (--start-timeout)"
        if missing := sorted(set(range(self._world_size or 1)) - set(self.members)):
            hosts = [self.hosts[rank] for rank in missing] if self.hosts else []
            where = f" on {', '.join(dict.fromkeys(hosts))}" if hosts else ""
            ranks = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {missing}"
            cause = f"{ranks}{where} did not start {limit}. DeepSpeed's log: {self.launcher_log}"
            return Failure(EXIT_FAILED, cause, tuple(hosts), _tail(self.launcher_log))
        out = [m for m in self.members.values() if m.returncode is None and m.stage != "joined"]
        if out:
            # Those that wait for others are not to blame, unless all do: they cannot meet.
            late = [m for m in out if m.stage != "joining"]
            return _several(late or out, f"did not join the others {limit}")
        return None

    def _launcher_gone(self) -> Failure:
        """DeepSpeed's launcher has ended, and ranks have not said how they did."""
        status = self._child.returncode
        how = f"status {status}" if status >= 0 else _signal_name(-status)
        log, tail = self.launcher_log, _tail(self.launcher_log)
        if not self.members:
            cause = f"DeepSpeed's launcher ended with {how} before any rank began. Its log: {log}"
            return Failure(status if status > 0 else EXIT_FAILED, cause, (), tail)
        lost = [m for m in self.members.values() if m.returncode is None]
        begun = set(self.members)
        missing = [r for r in range(self._world_size or 0) if r not in begun]
        ranks = sorted([m.rank for m in lost] + missing)
        hosts = {m.host for m in lost} | {self.hosts[r] for r in missing if self.hosts}
        cause = (
            f"DeepSpeed's launcher ended with {how} while ranks {ranks} had not "
            f"({', '.join(sorted(hosts))}). Its log: {log}"
        )
        return Failure(status if status > 0 else EXIT_FAILED, cause, tuple(sorted(hosts)), tail)

    # -- what is done about it

    def _end(self, failure: Failure) -> Ending:
        """End all ranks, and say why."""
        self._send(kill=failure.cause)
        deadline = time.monotonic() + min(5.0, self.failure_timeout)
        while (now := time.monotonic()) < deadline:
            # Who is not heard of ends by itself, as it does not hear of us either.
            heard = [m for m in self.members.values() if now - m.heard < self.failure_timeout]
            if all(m.channel.closed for m in heard):
                break
            self._wait_for_news()
            self._read(now)
            for member in heard:
                member.channel.flush()
        self._console.flush()
        with contextlib.suppress(OSError):  # the terminal may be closed
            if failure.tail:
                click.echo("\n".join(f"  | {line}" for line in failure.tail), err=True)
            if not failure.told:
                click.echo(f"lorasb: error: {failure.cause}", err=True)
        return Ending(failure.status, failure)

    def _end_everything(self) -> None:
        """What is left of DeepSpeed's launchers here; an agent without us ends by itself."""
        if self._interrupted:
            self._send(kill="Ctrl-C, twice")
            deadline = time.monotonic() + 1.0
            while any(not m.channel.closed for m in self.members.values()):
                if time.monotonic() > deadline:
                    break
                self._wait_for_news()
                self._read(time.monotonic())
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Agents that ended well are waited for by launchers that look once in a second.
            self._child.wait(timeout=0.0 if self._interrupted else SETTLE_S)
        self._signal_children(signal.SIGKILL)
        self._child.wait()
        for channel in [*self._newcomers, *(m.channel for m in self.members.values())]:
            channel.close()

    def _send(self, **message: Any) -> None:
        for member in self.members.values():
            if not member.channel.closed:
                member.channel.send(**message)

    def _signal_children(self, signum: int) -> None:
        """All that this process has started: pdsh's ssh leave its process group."""
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    def _listen_to_signals(self) -> None:
        def ask(signum: int, _frame: object) -> None:
            first = not self.asked
            self.asked.append(signum)
            self._interrupted = self.asked.count(signal.SIGINT) > 1
            if first:
                self._console.write(2, "lorasb: asked to end: after this step, if it trains\n")
                if signum == signal.SIGINT:
                    self._console.write(
                        2, "lorasb: Ctrl-C again ends it at once, without a checkpoint\n"
                    )

        # Under nohup SIGHUP is ignored, and stays so.
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(signum) != signal.SIG_IGN or signum == signal.SIGINT:
                signal.signal(signum, ask)
        signal.signal(signal.SIGUSR1, ask)

    def _say_where(self) -> None:
        """Several hosts: which network they meet on."""
        members = [self.members[rank] for rank in sorted(self.members)]
        if len({member.host for member in members}) < 2:
            return
        used: dict[str, list[str]] = {}
        for member in members:
            hosts = used.setdefault(member.interface or "an unknown interface", [])
            if member.host not in hosts:
                hosts.append(member.host)
        text = "; ".join(f"{interface} on {', '.join(hosts)}" for interface, hosts in used.items())
        self._console.write(1, f"lorasb: network: {text}\n")


class Console:
    """Writes from a thread of its own: a terminal that is held (Ctrl-S) must hold nothing else."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[int, str] | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def write(self, stream: int, text: str) -> None:
        """To standard output (1) or error (2)."""
        self._queue.put((stream, text))

    def flush(self, timeout: float = 5.0) -> None:
        done = threading.Event()
        self._queue.put(done)
        done.wait(timeout)

    close = flush

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            stream, data = item[0], item[1].encode()
            with contextlib.suppress(OSError):  # a terminal that was closed
                while data:
                    data = data[os.write(stream, data) :]


def listen_for_agents(
    address: str, port: int = 0, seen_as: str | None = None
) -> tuple[socket.socket, str]:
    """A socket that agents connect to, and its ``host:port``.

    Args:
        seen_as: the address that the agents take; that of the socket if not given.
    Raises:
        OSError: if the port is taken.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(1024)
    listener.setblocking(False)
    return listener, f"{seen_as or address}:{listener.getsockname()[1]}"


def _place(member: Member) -> str:
    return f"rank {member.rank} on {member.host}"


def _several(lost: Sequence[Member], what: str) -> Failure:
    """Of ranks that share a fate, the first one speaks."""
    first = min(lost, key=lambda m: m.rank)
    hosts = tuple(dict.fromkeys(m.host for m in lost))
    others = f" (and {len(lost) - 1} more, on {', '.join(hosts)})" if len(lost) > 1 else ""
    cause = f"{_place(first)} {what}{others}. Its log: {first.log}"
    return Failure(EXIT_FAILED, cause, hosts)


def _how(returncode: int) -> str:
    if returncode > 0:
        return f"ended with status {returncode}"
    cause = ", as the kernel does when memory runs out" if returncode == -signal.SIGKILL else ""
    return f"was ended by {_signal_name(-returncode)}{cause}"


def _signal_name(signum: int) -> str:
    known = signum in [int(one) for one in signal.Signals]
    return signal.Signals(signum).name if known else f"signal {signum}"


def _tail(log: Path, lines: int = 30) -> list[str]:
    with contextlib.suppress(OSError):
        return log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    return []

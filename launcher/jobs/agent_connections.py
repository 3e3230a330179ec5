"""The supervisor's side of the connections to all agents: who is let in, and what they say."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.hosts.polling import readable
from launcher.jobs.channel import LONGEST_GREETING, LONGEST_MESSAGE, Channel
from launcher.jobs.session import is_proof, new_challenge
from launcher.jobs.verdict import Member
from lorasb_ds.errors import printable

POLL_S = 0.1
MOST_NEWCOMERS = 2048


@dataclass(frozen=True)
class _Newcomer:
    since: float
    challenge: str


@dataclass
class Agents:
    """The agents of a job.

    Args:
        listener: where they connect; None where another host's supervisor has them.
        session: the word that an agent has to know to be let in.
        options: digest of the options, which those of hosts that are started by hand must share.
        hosts: the hostfile's name of every rank's host; None where only the agents know.
        by_hand: every host is started by itself (``--no-ssh``).
        launcher_log: is named in a refusal.
        on_output: gets what rank 0 prints: 1 (standard output) or 2 (error), and text.
        on_complete: is called once all agents have come.

    Attributes:
        members: the ranks, as their agents describe them.
        world_size: None as long as it is not known.
        refusal: why the job cannot go on, if an agent was not let in because of its options.
        strangers: how many have come that were no agents of this job.
    """

    listener: socket.socket | None
    session: str
    options: str | None
    failure_timeout: float
    hosts: Sequence[str] | None
    by_hand: bool
    launcher_log: Path
    on_output: Callable[[int, str], None]
    on_complete: Callable[[], None]
    members: dict[int, Member] = field(default_factory=dict)
    refusal: str | None = None
    strangers: int = 0
    _newcomers: dict[Channel, _Newcomer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.world_size = len(self.hosts) if self.hosts else None

    @property
    def have_all_ended(self) -> bool:
        ended = [m for m in self.members.values() if m.returncode is not None]
        return len(ended) == self.world_size and self.world_size is not None

    def wait(self) -> None:
        """Wait until an agent has something to say, or for ``POLL_S``."""
        assert self.listener is not None
        channels = [m.channel for m in self.members.values() if not m.channel.closed]
        sources = [self.listener.fileno(), *(c.fileno() for c in [*channels, *self._newcomers])]
        readable(sources, POLL_S)

    def read(self, now: float) -> None:
        """Let new agents in, and take in what all of them have said."""
        assert self.listener is not None
        with contextlib.suppress(OSError):  # no one else waits, or too many files are open
            while True:
                newcomer = Channel(self.listener.accept()[0], limit=LONGEST_GREETING)
                self._newcomers[newcomer] = _Newcomer(now, new_challenge())
                newcomer.send(challenge=self._newcomers[newcomer].challenge)
                if len(self._newcomers) > MOST_NEWCOMERS:
                    oldest = next(iter(self._newcomers))
                    del self._newcomers[oldest]
                    oldest.close()
                    self.strangers += 1
        for channel, came in list(self._newcomers.items()):
            messages = channel.receive()
            if messages:
                self._admit(channel, messages[0], came.challenge, now)
            if messages or channel.closed or now - came.since > self.failure_timeout:
                del self._newcomers[channel]
                if not messages:
                    channel.close()
                    self.strangers += 1
        for member in self.members.values():
            for message in member.channel.receive():
                self._hear(member, message, now)

    def _admit(self, channel: Channel, message: dict[str, Any], challenge: str, now: float) -> None:
        """Let an agent of this job in; send anything else away."""
        if not is_proof(message.get("proof"), self.session, challenge):
            channel.send(refused="it is not of this job")
            channel.close()
            self.strangers += 1
            return
        if self.options is not None and message.get("options") != self.options:
            who, where = (printable(str(message.get(key)))[:80] for key in ("rank", "host"))
            self.refusal = (
                f"rank {who} on {where} was started with other options than this host. Use the "
                "same on all, but for --node-rank."
            )
            channel.send(refused="it was started with other options than the first host")
            channel.close()
            return
        try:
            rank, world_size = int(message["rank"]), int(message["world_size"])
            log, interface, name = (message[key] for key in ("log", "interface", "host"))
        except (KeyError, OverflowError, TypeError, ValueError):
            rank, world_size = -1, 0
        if not 0 <= rank < world_size:
            channel.send(refused="it does not say which rank it is of")
            channel.close()
            return
        if self.hosts is not None and world_size != len(self.hosts):
            self.refusal = (
                f"DeepSpeed started {world_size} rank(s) in place of {len(self.hosts)}. Its log: "
                f"{self.launcher_log}"
            )
            channel.close()
            return
        if rank in self.members:
            channel.send(refused="it has come already: was a --node-rank given twice?")
            channel.close()
            return
        channel.limit = LONGEST_MESSAGE
        named = self.hosts is not None and not self.by_hand
        host = self.hosts[rank] if self.hosts and named else str(name)
        member = Member(channel, rank, host, log, interface, heard=now)
        self.members[rank] = member
        self.world_size = world_size
        terminal = list(os.get_terminal_size(1)) if rank == 0 and os.isatty(1) else None
        channel.send(terminal=terminal)
        if len(self.members) == self.world_size:
            self.on_complete()

    def _hear(self, member: Member, message: dict[str, Any], now: float) -> None:
        member.heard = now
        if "output" in message:
            self.on_output(int(message["stream"]), str(message["output"]))
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

    def send(self, **message: Any) -> None:
        """Send a message to all that are connected."""
        for member in self.members.values():
            if not member.channel.closed:
                member.channel.send(**message)

    def await_ends(self, seconds: float) -> None:
        """Wait until all have said how their workers ended, for so many seconds at most."""
        deadline = time.monotonic() + seconds
        while (now := time.monotonic()) < deadline:
            # An agent that is not heard of ends by itself, as it does not hear of us either.
            heard = [m for m in self.members.values() if now - m.heard < self.failure_timeout]
            if all(m.channel.closed for m in heard):
                return
            self.wait()
            self.read(now)
            for member in heard:
                member.channel.flush()

    def close(self) -> None:
        for channel in [*self._newcomers, *(m.channel for m in self.members.values())]:
            channel.close()

    def describe(self) -> list[str]:
        """Return lines on the hosts and on the network that they meet on; none for one host."""
        members = [self.members[rank] for rank in sorted(self.members)]
        num_hosts = len({member.host for member in members})
        if self.hosts is None and num_hosts == 1:
            return []
        logs = Path(members[0].log).parent
        used: dict[str, list[str]] = {}
        for member in members:
            hosts = used.setdefault(member.interface or "an unknown interface", [])
            if member.host not in hosts:
                hosts.append(member.host)
        text = "; ".join(f"{interface} on {', '.join(hosts)}" for interface, hosts in used.items())
        return [
            f"lorasb: {len(members)} rank(s) on {num_hosts} host(s), their logs in {logs}\n",
            f"lorasb: network: {text}\n",
        ]

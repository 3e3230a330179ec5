"""Decides from what the agents have said whether a job has failed, and words the reason. Pure."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.jobs.channel import Channel
from launcher.jobs.ranks import shell_status
from lorasb_ds.system.signals import EXIT_STOPPED

EXIT_FAILED, EXIT_REFUSED = 1, 2


@dataclass
class Member:
    """A rank, as its agent describes it. Times are those of ``time.monotonic``."""

    channel: Channel
    rank: int
    host: str
    log: str
    interface: str | None
    heard: float  # when
    stage: str = ""  # what its worker has reported last: joining, joined
    lock: str | None = None  # of a build that it may be waiting for
    stopped_at: float | None = None  # by SIGSTOP
    returncode: int | None = None  # as subprocess has it: negative for a signal
    ended: float = 0.0  # when its end was reported
    joining: float | None = None  # since when it waits for the others
    tail: Sequence[str] = ()  # of its log, once it has ended

    @property
    def where(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class Failure:
    """Why a job has to end before its time."""

    status: int  # for the shell
    cause: str
    tail: Sequence[str] = ()  # of a rank's log that the console has not seen
    show_launcher_log: bool = False  # what DeepSpeed's launcher has printed tells more
    is_reported: bool = False  # rank 0 has said what was wrong, on the console


def failed_rank(members: Iterable[Member]) -> Failure | None:
    """Return the first rank that has failed: the others end because of it."""
    failed = [m for m in members if m.returncode not in (None, 0, EXIT_STOPPED)]
    if not failed:
        return None
    # Of two that were reported at once, a signal is more likely the cause than an exception.
    first = min(failed, key=lambda m: (m.ended, (m.returncode or 0) > 0))
    assert first.returncode is not None
    return Failure(
        status=shell_status(first.returncode),
        cause=f"{first.where} {_describe_end(first.returncode)}. Its log: {first.log}",
        tail=() if first.rank == 0 else first.tail,
        is_reported=first.rank == 0 and first.returncode == EXIT_REFUSED,
    )


def lost_rank(members: Iterable[Member], now: float, limit: float) -> Failure | None:
    """Return a rank whose agent has gone, that is not heard of, or that is stopped.

    Args:
        limit: seconds of silence that are allowed (``--failure-timeout``).
    """
    alive = [m for m in members if m.returncode is None]
    gone = [m for m in alive if m.channel.closed]
    silent = [m for m in alive if now - m.heard > limit]
    stopped = [m for m in alive if m.stopped_at is not None and now - m.stopped_at > limit]
    if gone:
        return _shared_failure(gone, "has gone: the connection to its agent broke")
    if silent:
        what = f"was not heard of for {limit:g} s (--failure-timeout): its host or network is down"
        return _shared_failure(silent, what)
    if stopped:
        return _shared_failure(
            stopped, f"has been stopped for {limit:g} s (SIGSTOP; --failure-timeout)"
        )
    return None


def late_rank(
    members: Iterable[Member],
    hosts: Sequence[str] | None,
    world_size: int | None,
    limit: float,
    started: float,
    now: float,
    launcher_log: str,
) -> Failure | None:
    """Return a rank that has not started in time, or keeps the others waiting.

    How long all of them prepare (a model is downloaded, rows are tokenized) is not limited: the
    time runs from the start until they have come, and again from the first that waits to join.

    Args:
        hosts: host of every rank, where that is known.
        world_size: None as long as no agent has reported it.
        limit: that time, in seconds (``--start-timeout``).
    """
    members = list(members)
    within = f"within {limit:g} s (--start-timeout)"
    missing = sorted(set(range(world_size or 1)) - {m.rank for m in members})
    if missing and now - started > limit:
        where = f" on {_listed(hosts[rank] for rank in missing)}" if hosts else ""
        ranks = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {missing}"
        cause = f"{ranks}{where} did not start {within}. DeepSpeed's log: {launcher_log}"
        return Failure(EXIT_FAILED, cause, show_launcher_log=True)
    out = [m for m in members if m.returncode is None and m.stage in ("", "joining")]
    waiting = [m.joining for m in out if m.joining is not None]
    if not waiting or now - min(waiting) <= limit:
        return None
    # Those that wait for others are not to blame, unless all do: they cannot meet.
    late = [m for m in out if m.stage != "joining"] or out
    locks = [m.lock for m in late if m.lock is not None]
    hint = f" Did a killed build leave {locks[0]}? Remove it." if locks else ""
    return _shared_failure(late, f"did not join the others {within}", hint)


def launcher_gone(
    members: Iterable[Member],
    hosts: Sequence[str] | None,
    world_size: int | None,
    status: int,
    launcher_log: str,
) -> Failure:
    """Return the failure where DeepSpeed's launcher has ended before its ranks.

    Args:
        status: the launcher's, as subprocess has it: negative for a signal.
    """
    members = list(members)
    how = f"DeepSpeed's launcher ended with {_status_name(status)}"
    own = status if status > 0 else EXIT_FAILED
    if not members:
        cause = f"{how} before any rank began. Its log: {launcher_log}"
        return Failure(own, cause, show_launcher_log=True)
    begun = {m.rank: m for m in members}
    left = [r for r in range(world_size or 0) if r not in begun or begun[r].returncode is None]
    left_on = (begun[r].host if r in begun else hosts[r] if hosts else "?" for r in left)
    cause = f"{how} while ranks {left} ({_listed(left_on)}) had not. Its log: {launcher_log}"
    return Failure(own, cause, show_launcher_log=True)


def _shared_failure(lost: Sequence[Member], what: str, hint: str = "") -> Failure:
    """Name the first of several ranks with the same failure, and how many more there are."""
    first, *others = sorted(lost, key=lambda m: m.rank)
    more = f" (and {len(others)} more, on {_listed(m.host for m in others)})" if others else ""
    return Failure(EXIT_FAILED, f"{first.where} {what}{more}.{hint} Its log: {first.log}")


def _listed(hosts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(hosts))


def _describe_end(returncode: int) -> str:
    if returncode > 0:
        return f"ended with status {returncode}"
    memory = ", as the kernel does when memory runs out (see dmesg there)"
    cause = memory if returncode == -signal.SIGKILL else ""
    return f"was ended by {_status_name(returncode)}{cause}"


def _status_name(returncode: int) -> str:
    """Return ``status 1`` or ``SIGKILL``."""
    if returncode >= 0:
        return f"status {returncode}"
    known = -returncode in [int(one) for one in signal.Signals]
    return signal.Signals(-returncode).name if known else f"signal {-returncode}"

"""Which rank is to blame, and what is said of it. Real faults are in tests/nodes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from launcher.jobs.channel import Channel
from launcher.jobs.verdict import Member, failed_rank, late_rank, launcher_gone, lost_rank

NOW, LIMIT = 1000.0, 60.0


@pytest.fixture
def members() -> Iterator[list[Member]]:
    """Four ranks on two hosts, all well."""
    with ExitStack() as stack:
        made = []
        for rank in range(4):
            left, right = socket.socketpair()
            stack.enter_context(left)
            channel = stack.enter_context(closing(Channel(right)))
            log = f"/run/logs/rank-{rank}.log"
            made.append(Member(channel, rank, f"n{rank // 2}", log, "eth0", NOW, stage="joined"))
        yield made


def change(member: Member, **changes: Any) -> None:
    for name, value in changes.items():
        setattr(member, name, value)


def test_all_is_well(members: list[Member]) -> None:
    change(members[1], returncode=0)
    change(members[2], returncode=75)
    assert failed_rank(members) is None
    assert lost_rank(members, NOW + LIMIT, LIMIT) is None
    assert late_rank(members, None, 4, LIMIT, 0, NOW, "log") is None


def test_the_first_one_that_ended_is_to_blame(members: list[Member]) -> None:
    """The others end because of it."""
    change(members[1], returncode=1, ended=5.0, tail=["Connection closed by peer"])
    change(members[3], returncode=-9, ended=5.0, tail=["step 3"])
    failure = failed_rank(members)
    assert failure is not None
    assert failure.status == 137
    assert failure.cause.startswith("rank 3 on n1 was ended by SIGKILL, as the kernel does when")
    assert failure.cause.endswith("Its log: /run/logs/rank-3.log")
    assert failure.tail == ["step 3"], "the console has not seen it"


def test_rank_0_has_said_what_was_refused(members: list[Member]) -> None:
    change(members[0], returncode=2, tail=["lorasb: error: --r"])
    failure = failed_rank(members)
    assert failure is not None
    assert (failure.status, failure.is_reported, failure.tail) == (2, True, ())
    change(members[0], returncode=None)
    change(members[1], returncode=2)
    failure = failed_rank(members)
    assert failure is not None
    assert not failure.is_reported
    change(members[1], returncode=-63)
    failure = failed_rank(members)
    assert failure is not None
    assert "rank 1 on n0 was ended by signal 63." in failure.cause


def test_silence(members: list[Member]) -> None:
    for rank in (2, 3):
        change(members[rank], heard=NOW - LIMIT - 1)
    failure = lost_rank(members, NOW, LIMIT)
    assert failure is not None
    assert failure.status == 1
    assert "rank 2 on n1 was not heard of for 60 s" in failure.cause
    assert "(and 1 more, on n1)" in failure.cause
    for rank in (2, 3):
        change(members[rank], returncode=0)
    assert lost_rank(members, NOW, LIMIT) is None, "it has ended, as it should"


def test_stopped_and_gone(members: list[Member]) -> None:
    change(members[1], stopped_at=NOW - LIMIT / 2)
    assert lost_rank(members, NOW, LIMIT) is None
    change(members[1], stopped_at=NOW - 2 * LIMIT)
    failure = lost_rank(members, NOW, LIMIT)
    assert failure is not None
    assert "rank 1 on n0 has been stopped for 60 s" in failure.cause
    members[2].channel.close()
    failure = lost_rank(members, NOW, LIMIT)
    assert failure is not None
    assert "rank 2 on n1 has gone" in failure.cause


def test_late(members: list[Member]) -> None:
    hosts = ["n0", "n0", "n1", "n1"]
    end = ("/run/deepspeed.log",)
    assert late_rank(members[:2], hosts, 4, LIMIT, NOW - LIMIT, NOW, *end) is None
    failure = late_rank(members[:2], hosts, 4, LIMIT, 0, NOW, *end)
    assert failure is not None
    assert failure.cause.startswith("ranks [2, 3] on n1 did not start within 60 s")
    assert failure.show_launcher_log
    failure = late_rank([], None, None, LIMIT, 0, NOW, *end)
    assert failure is not None
    assert failure.cause.startswith("rank 0 did not start")


def test_who_keeps_the_others_waiting(members: list[Member]) -> None:
    def late() -> str | None:
        failure = late_rank(members, None, 4, LIMIT, 0, NOW, "log")
        return failure and failure.cause

    for member in members:
        change(member, stage="")
    assert late() is None, "they may load a model for hours"
    for member in members[:3]:
        change(member, stage="joining", joining=NOW - LIMIT / 2)
    assert late() is None
    change(members[1], joining=NOW - 2 * LIMIT)
    assert str(late()).startswith("rank 3 on n1 did not join the others within 60 s")
    change(members[3], stage="joining", joining=NOW, lock="/c/lock")
    text = str(late())
    assert "(and 3 more, on n0, n1)" in text, "they cannot meet"
    assert "Did a killed build leave /c/lock? Remove it." in text
    for member in members:
        change(member, joining=0.0, stage="joined")
    change(members[2], stage="ended")
    assert late() is None, "its process is about to end"


def test_the_launcher_is_gone(members: list[Member]) -> None:
    hosts = ["n0", "n0", "n1", "n1"]
    failure = launcher_gone([], hosts, 4, 255, "log")
    assert (failure.status, failure.show_launcher_log) == (255, True)
    assert "ended with status 255 before any rank began" in failure.cause
    assert launcher_gone([], hosts, 4, 0, "log").status == 1, "pdsh ends with 0 when killed"
    change(members[0], returncode=0)
    failure = launcher_gone(members[:3], hosts, 4, -9, "log")
    assert "ended with SIGKILL while ranks [1, 2, 3] (n0, n1) had not" in failure.cause

"""What agents and the supervisor say to each other, and what an agent logs."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.file_baton import FileBaton

from launcher.hosts.host import old_build_locks
from launcher.hosts.polling import readable
from launcher.jobs.channel import LONGEST_GREETING, Channel
from launcher.jobs.rank_log import LONGEST_LINE, Log
from launcher.jobs.worker_process import build_locks, process_state


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Channel]]:
    left, right = socket.socketpair()
    channel = Channel(right, limit=LONGEST_GREETING)
    yield left, channel
    left.close()
    channel.close()


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text())), st.data())
def test_messages_arrive_however_they_are_cut(
    messages: list[dict[str, object]], data: st.DataObject
) -> None:
    sent = b"".join(json.dumps(message).encode() + b"\n" for message in messages)
    found: list[dict[str, object]] = []
    left, right = socket.socketpair()
    with left, closing(Channel(right)) as channel:
        while sent:
            size = data.draw(st.integers(1, len(sent)))
            left.sendall(sent[:size])
            sent = sent[size:]
            found += channel.receive()
        left.close()
        found += channel.receive()
        assert found == messages
        assert channel.closed


@pytest.mark.parametrize(
    "junk", [b"\xff\xfe\n", b"[1]\n", b"null\n", b"{\n", b"x" * (LONGEST_GREETING + 1)]
)
def test_strangers_are_hung_up_on(ends: tuple[socket.socket, Channel], junk: bytes) -> None:
    left, channel = ends
    left.sendall(junk)
    assert channel.receive() == []
    assert channel.closed


def test_the_other_side_does_not_read(ends: tuple[socket.socket, Channel]) -> None:
    """It is kept, and nothing waits."""
    left, channel = ends
    for _ in range(200):
        channel.send(output="x" * 10_000)
    assert not channel.flush()
    received = b""
    while received.count(b"\n") < 200:
        received += left.recv(1 << 20)
        channel.flush()
    assert channel.flush()


def test_a_backlog_arrives(ends: tuple[socket.socket, Channel]) -> None:
    """Many messages that have waited are not one that is too long."""
    left, channel = ends
    sender = Channel(left)
    for _ in range(300):
        sender.send(output="x" * 10_000)
    found = []
    while len(found) < 300:
        found += channel.receive()
        sender.flush()
        assert not channel.closed


def test_readable(ends: tuple[socket.socket, Channel]) -> None:
    left, channel = ends
    assert readable([channel.fileno()], 0) == set()
    left.sendall(b"{}\n")
    assert readable([channel.fileno()], 1) == {channel.fileno()}


def test_a_log_is_what_a_terminal_shows_in_the_end(tmp_path: Path) -> None:
    log = Log(tmp_path / "logs" / "rank-0.log")
    for text in ("load", "ing\r\n", "\r 1%\x1b[2K\r", "99%\x1b[0m\n", "\x1b[?25hno end"):
        log.write(text)
    log.close()
    head, *lines = log.path.read_text().splitlines()
    assert head.startswith("== 20")
    assert lines == ["loading", "99%", "no end"]
    assert list(log.tail) == lines
    again = Log(log.path)
    again.write("x" * (2 * LONGEST_LINE))
    assert "x" * LONGEST_LINE in log.path.read_text(), "a line that does not end is not kept back"
    assert len(again.tail[0]) < LONGEST_LINE
    again.close()
    assert log.path.read_text().count("== 20") == 2, "an earlier one stays"


def test_locks_of_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the process itself holds, and those that nobody can hold any longer."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert build_locks(os.getpid()) == [lock]
    assert old_build_locks() == []
    os.utime(lock, (1, 1))
    assert old_build_locks() == [str(lock)]
    baton.release()
    assert build_locks(os.getpid()) == []


def test_process_state() -> None:
    assert process_state(1 << 30) == "?"

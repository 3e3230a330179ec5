"""Who the supervisor lets in, over real connections."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.jobs.agent_connections import Agents
from launcher.jobs.channel import WORKING_DIRECTORY, as_plain_word, listen_for_agents
from launcher.paths import WORKERS

AGENT = {"session": "secret", "world_size": 2, "host": "b", "interface": "lo", "log": "/log"}


@pytest.fixture
def agents() -> Iterator[Agents]:
    """Those of a job of two ranks whose hosts are started by hand."""
    listener, _ = listen_for_agents("127.0.0.1")
    agents = Agents(
        listener=listener,
        session="secret",
        failure_timeout=5,
        hosts=["node-0", "node-1"],
        by_hand=True,
        launcher_log=Path("/log"),
        on_output=lambda *_: None,
        on_complete=lambda: None,
    )
    yield agents
    agents.close()
    listener.close()


def say(agents: Agents, **message: Any) -> tuple[socket.socket, dict[str, Any]]:
    """Connect and say something; return the connection and the answer."""
    assert agents.listener is not None
    client = socket.create_connection(agents.listener.getsockname(), timeout=5)
    client.sendall(json.dumps(message).encode() + b"\n")
    client.setblocking(False)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        agents.read(time.monotonic())
        try:
            return client, json.loads(client.recv(1 << 14))
        except BlockingIOError:
            time.sleep(0.01)
    raise AssertionError("no answer")


@pytest.mark.parametrize(
    "odd",
    [
        {"rank": 2},
        {"rank": -1},
        {"rank": "one"},
        {"rank": None},
        {"rank": 1e400},
        {"rank": 0, "world_size": []},
        {"rank": 0, "host": None, "log": ...},
        {},
    ],
)
def test_odd_ranks_are_sent_away(agents: Agents, odd: dict[str, Any]) -> None:
    message = {key: value for key, value in (AGENT | odd).items() if value is not ...}
    client, answer = say(agents, **message)
    client.close()
    assert answer == {"refused": "it does not say which rank it is of"}
    assert not agents.members
    assert agents.refusal is None


def test_a_stranger_ends_no_job_that_is_complete(agents: Agents) -> None:
    clients = [say(agents, **AGENT, rank=rank)[0] for rank in (0, 1)]
    assert agents.members.keys() == {0, 1}
    client, answer = say(agents, session="guessed", rank=0, world_size=2)
    assert "not of this job" in answer["refused"]
    assert agents.refusal is None
    for connection in (*clients, client):
        connection.close()


def test_a_stranger_who_is_no_agent_ends_none(agents: Agents) -> None:
    for message in ({}, {"rank": "one", "host": "a"}, {"session": "guessed", "rank": 1}):
        say(agents, **message)[0].close()
    assert agents.refusal is None


def test_what_a_stranger_says_is_not_printed_as_it_is(agents: Agents) -> None:
    client, _ = say(agents, session="other options", rank=1, host="\x1b[2J\n" * 999)
    client.close()
    assert agents.refusal is not None
    assert agents.refusal.isprintable()
    assert len(agents.refusal) < 400
    assert "started with other options" in agents.refusal


def test_a_working_directory_that_a_host_lacks(tmp_path: Path) -> None:
    missing = str(tmp_path / "not here: ü")
    environment = {"RANK": "3", WORKING_DIRECTORY: as_plain_word(missing)}
    assert re.fullmatch(r"[\w@%+=:./-]+", environment[WORKING_DIRECTORY], re.ASCII)
    command = [sys.executable, str(WORKERS / "jobs/agent.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"lorasb: error: rank 3 on {socket.gethostname()}: no working directory" in done.stderr
    assert "not here: ü (No such file or directory)" in done.stderr

"""Who the supervisor lets in, over real connections."""

from __future__ import annotations

import json
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.hosts.environment import is_secret
from launcher.jobs import session
from launcher.jobs.agent_connections import Agents
from launcher.jobs.channel import WORKING_DIRECTORY, as_plain_word, listen_for_agents
from launcher.jobs.session import proof
from launcher.paths import WORKERS

WORD, OPTIONS = "secret", "digest"
AGENT = {"options": OPTIONS, "world_size": 2, "host": "b", "interface": "lo", "log": "/log"}


def agents_of_a_job(**more: Any) -> Agents:
    listener, _ = listen_for_agents("127.0.0.1")
    given: dict[str, Any] = {"options": OPTIONS, "failure_timeout": 5, "hosts": None, **more}
    return Agents(
        listener=listener,
        session=WORD,
        launcher_log=Path("/log"),
        on_output=lambda *_: None,
        on_complete=lambda: None,
        **given,
    )


@pytest.fixture
def agents() -> Iterator[Agents]:
    """Those of a job of two ranks whose hosts are started by hand."""
    agents = agents_of_a_job(hosts=["node-0", "node-1"], by_hand=True)
    yield agents
    end(agents)


def end(agents: Agents) -> None:
    agents.close()
    assert agents.listener is not None
    agents.listener.close()


def connect(agents: Agents) -> socket.socket:
    assert agents.listener is not None
    client = socket.create_connection(agents.listener.getsockname(), timeout=5)
    client.setblocking(False)
    return client


def hear(agents: Agents, client: socket.socket) -> dict[str, Any]:
    """The supervisor's next message."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        agents.read(time.monotonic())
        try:
            return json.loads(client.recv(1 << 14))
        except BlockingIOError:
            time.sleep(0.01)
    raise AssertionError("no answer")


def say(agents: Agents, word: str = WORD, **message: Any) -> tuple[socket.socket, dict[str, Any]]:
    """Connect, and say something with the proof of a word; return the connection and the answer."""
    client = connect(agents)
    message = {"proof": proof(word, hear(agents, client)["challenge"]), **message}
    client.sendall(json.dumps(message).encode() + b"\n")
    return client, hear(agents, client)


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


@pytest.mark.parametrize("complete", [True, False])
def test_a_stranger_ends_no_job(agents: Agents, complete: bool) -> None:
    """Whatever it says, and whether all have come or not; it is counted."""
    clients = [say(agents, **AGENT, rank=rank)[0] for rank in (0, 1)[: 2 if complete else 1]]
    known = set(agents.members)
    for message in ({}, {"rank": "one"}, {**AGENT, "rank": 1}, {**AGENT, "proof": [WORD]}):
        client, answer = say(agents, word="guessed", **message)
        clients.append(client)
        assert answer == {"refused": "it is not of this job"}
    assert agents.strangers == 4
    assert agents.refusal is None
    assert agents.members.keys() == known
    for connection in clients:
        connection.close()


def test_a_proof_is_of_one_connection(agents: Agents) -> None:
    """Who has heard it says it again in vain."""
    client = connect(agents)
    heard = proof(WORD, hear(agents, client)["challenge"])
    again, answer = say(agents, **AGENT, rank=0, proof=heard)
    assert answer == {"refused": "it is not of this job"}
    client.close()
    again.close()


def test_other_options(agents: Agents) -> None:
    """Of a host of this job: what it says is not printed as it is."""
    odd = {**AGENT, "options": "other", "host": "\x1b[2J\n" * 999}
    client, answer = say(agents, **odd, rank=1)
    client.close()
    assert answer == {"refused": "it was started with other options than the first host"}
    assert agents.refusal is not None
    assert agents.refusal.isprintable()
    assert len(agents.refusal) < 400
    assert "started with other options" in agents.refusal


def test_a_crowd_of_strangers_and_256_agents() -> None:
    """Half-open, silent, noisy and forged connections; all agents are let in within seconds."""
    agents = agents_of_a_job(options=None, failure_timeout=60, by_hand=False)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most[1], most[1]))
    crowd = []
    began = time.monotonic()
    try:
        for rank in range(256):
            crowd += [connect(agents) for _ in range(3)]  # silent, noisy, forging
            crowd[-2].sendall(b"x" * 1000)
            crowd[-1].sendall(b'{"proof": "00", "rank": 0, "host": "a"}\n')
            message = AGENT | {"world_size": 256, "options": None}
            client, answer = say(agents, **message, rank=rank)
            crowd.append(client)
            assert "terminal" in answer
        assert len(agents.members) == agents.world_size == 256
        assert agents.strangers == 256
        assert agents.refusal is None
        assert time.monotonic() - began < 20
    finally:
        for connection in crowd:
            connection.close()
        end(agents)
        resource.setrlimit(resource.RLIMIT_NOFILE, most)


def test_the_word_is_for_its_user_only(tmp_path: Path) -> None:
    file = tmp_path / "session"
    file.write_text("an earlier job's")
    file.chmod(0o644)
    word = session.new_word(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert session.read_word({session.FILE: str(file)}) == word
    assert session.read_word({session.FILE: str(file), session.WORD: "of all hosts"}) != word
    assert session.new_word(file) != word
    assert is_secret(session.WORD), "it is not exported to hosts unasked"
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(OSError, match="symbolic"):
        session.new_word(tmp_path / "link")


def test_a_working_directory_that_a_host_lacks(tmp_path: Path) -> None:
    missing = str(tmp_path / "not here: ü")
    environment = {"RANK": "3", WORKING_DIRECTORY: as_plain_word(missing)}
    assert re.fullmatch(r"[\w@%+=:./-]+", environment[WORKING_DIRECTORY], re.ASCII)
    command = [sys.executable, str(WORKERS / "jobs/agent.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"lorasb: error: rank 3 on {socket.gethostname()}: no working directory" in done.stderr
    assert "not here: ü (No such file or directory)" in done.stderr

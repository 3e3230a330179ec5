"""Three hosts for all tests of this folder, each of which leaves them as it found them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.nodes.hosts import Hosts, missing


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Hosts n0, n1 and n2."""
    if reason := missing():
        pytest.skip(f"no hosts here: {reason}")
    with Hosts(3, tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(autouse=True)
def _left_as_found(hosts: Hosts) -> Iterator[None]:
    """After a test no process of a job is left; what it did to hosts and cables is undone."""
    yield
    deadline = time.monotonic() + 5
    while (left := _of_jobs(hosts)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for host in hosts.all:
        for pid in host.processes("launcher/"):
            with suppress(OSError):  # it may end by itself meanwhile
                host.kill(pid)
    hosts.mend()
    assert not left, "processes left:\n" + "\n".join(left)


def _of_jobs(hosts: Hosts) -> list[str]:
    return [
        f"{host.name}: {host.command_line(pid)}"
        for host in hosts.all
        for pid in host.processes("launcher/")
    ]

"""Messages between an agent and the supervisor: a JSON object on each line, over TCP."""

from __future__ import annotations

import base64
import json
import os
import socket
from typing import Any

# Environment variables of the agents.
SUPERVISOR = "LORASB_SUPERVISOR"  # host:port
OPTIONS = "LORASB_OPTIONS"  # a digest of the options, where hosts are started by hand
FAILURE_TIMEOUT = "LORASB_FAILURE_TIMEOUT"  # seconds
START_TIMEOUT = "LORASB_START_TIMEOUT"  # seconds
LOGS = "LORASB_LOGS"  # the folder of the ranks' logs
WORKING_DIRECTORY = "LORASB_WORKING_DIRECTORY"  # of the workers, by `as_plain_word`
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
NODE_RANK = "LORASB_NODE_RANK"  # where hosts are started by hand
# Environment variable of a worker, set by its agent.
REPORT_TO = "LORASB_AGENT_FD"  # a pipe

STOPPED = "stopped on request"  # from an agent to the launcher of its own host
LONGEST_MESSAGE = 1 << 22  # bytes
READS_AT_ONCE = 64
LONGEST_GREETING = 1 << 14  # bytes, from what may not be an agent


def beat_interval(failure_timeout: float) -> float:
    """Return the seconds between two signs of life."""
    return min(2.0, failure_timeout / 5)


def as_plain_word(text: str) -> str:
    """Return text as letters, digits and a few signs that come through every launcher."""
    return base64.urlsafe_b64encode(os.fsencode(text)).decode()


def from_plain_word(word: str) -> str:
    """Return what ``as_plain_word`` was given."""
    return os.fsdecode(base64.urlsafe_b64decode(word))


def tell_agent(word: str) -> None:
    """Send a word from a worker to its agent, if it has one."""
    if REPORT_TO in os.environ:
        os.write(int(os.environ[REPORT_TO]), f"{word}\n".encode())


class Channel:
    """One end of a connection; no method blocks."""

    def __init__(self, connection: socket.socket, limit: int = LONGEST_MESSAGE) -> None:
        connection.setblocking(False)
        self.limit = limit
        self._connection = connection
        self._received = self._unsent = b""
        self.closed = False

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, **message: Any) -> None:
        """Send what the other side takes now; the rest follows at the next ``flush``."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Send what is left; return whether all has been sent."""
        try:
            while self._unsent and not self.closed:
                self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        return not self._unsent

    def receive(self) -> list[dict[str, Any]]:
        """Return whole messages that have come. ``closed`` is true when there will be no more."""
        lines: list[bytes] = []
        try:
            for _ in range(READS_AT_ONCE):  # others wait, too
                data = b"" if self.closed else self._connection.recv(1 << 16)
                *whole, self._received = (self._received + data).split(b"\n")
                lines += whole
                if not data or max(map(len, [*whole, self._received])) > self.limit:
                    self.closed = True
                    break
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):  # no agent of ours
            messages = [None]
        if not all(isinstance(message, dict) for message in messages):
            self.closed = True
            return []
        return messages

    def close(self) -> None:
        self.closed = True
        self._connection.close()


def listen_for_agents(
    address: str, port: int = 0, seen_as: str | None = None
) -> tuple[socket.socket, str]:
    """Open the socket that agents connect to.

    Args:
        address: to listen on; empty for all of this host.
        port: 0 for any that is free.
        seen_as: the address that the agents use, in place of ``address``.
    Returns:
        The socket, and ``host:port`` for the agents.
    Raises:
        OSError: if the port is taken.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError:
        listener.close()
        raise
    listener.listen(1024)
    listener.setblocking(False)
    return listener, f"{seen_as or address}:{listener.getsockname()[1]}"

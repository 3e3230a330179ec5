"""Writes what the ranks print to this terminal."""

from __future__ import annotations

import os
import queue
import threading
from contextlib import suppress


class Console:
    """Writes from a thread of its own: a terminal that is held (Ctrl-S) must not block the rest."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[int, str] | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def write(self, stream: int, text: str) -> None:
        """Write to standard output (1) or error (2)."""
        self._queue.put((stream, text))

    def flush(self, timeout: float = 5.0) -> None:
        """Wait until everything has been written, at most ``timeout`` seconds."""
        done = threading.Event()
        self._queue.put(done)
        done.wait(timeout)

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            stream, data = item[0], item[1].encode()
            with suppress(OSError):  # a terminal that was closed
                while data:
                    data = data[os.write(stream, data) :]

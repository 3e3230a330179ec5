"""A limit of time for code that somebody else has written, such as a chat template. Torch-free."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the ``with`` block once it has taken so long.

    It is the timer of SIGALRM, which only the main thread has: in others there is no limit. A timer
    that runs already goes on afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(*_: object) -> NoReturn:
        raise TimeoutError(f"more than {seconds:g} s")

    handler, began = signal.signal(signal.SIGALRM, expire), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if left:
            left = max(left - (time.monotonic() - began), 1e-3)
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)

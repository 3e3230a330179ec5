"""Limits of time and memory for code that somebody else has written, such as a chat template."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

STATM = Path("/proc/self/statm")  # sizes of this process, in pages; the first is its addresses


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the ``with`` block once it has taken so long.

    It is the timer of SIGALRM, which only the main thread has: in others there is no limit. A timer
    that runs already goes on afterwards.
    """
    if not _in_main_thread():
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


@contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    """Raise MemoryError in the ``with`` block once the process has taken so many bytes more.

    It is RLIMIT_AS: the addresses of all threads count. Only the main thread has a limit, as two
    could restore each other's; and none has without /proc (macOS).
    """
    if not (STATM.exists() and _in_main_thread()):
        yield
        return
    pages = int(STATM.read_text().split()[0])
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + num_bytes
    known = [limit for limit in (before, most) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *known]), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

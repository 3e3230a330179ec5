"""Limits of time and memory, and what held before them."""

from __future__ import annotations

import resource
import signal
import threading
import time

import pytest

from lorasb_ds.system.limits import memory_limit, time_limit
from lorasb_ds.system.units import GIB


def test_what_takes_longer_is_ended() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"more than 0\.1 s"), time_limit(0.1):
        time.sleep(10)
    assert time.monotonic() - began < 2


def test_a_timer_goes_on_afterwards() -> None:
    """As that of these tests does."""
    rang: list[int] = []
    before, rest = signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with time_limit(5):
            time.sleep(0.3)  # it would have rung
        deadline = time.monotonic() + 5
        while not rang and time.monotonic() < deadline:
            time.sleep(0.01)
        assert rang == [1]
        with time_limit(0.05):
            pass
        time.sleep(0.1)
        assert rang == [1], "nothing is left of a limit that was kept"
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *rest)


def test_other_threads_have_none() -> None:
    done: list[int] = []

    def work() -> None:
        with time_limit(0.01):
            time.sleep(0.1)
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(5)
    assert done == [1]


def test_what_takes_more_memory_is_ended() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with memory_limit(GIB):
        bytearray(GIB // 2)
        with pytest.raises(MemoryError):
            bytearray(2 * GIB)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    bytearray(2 * GIB)


def test_a_stricter_limit_of_memory_stays() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with memory_limit(GIB):
        strict = resource.getrlimit(resource.RLIMIT_AS)
        with memory_limit(4 * GIB):
            assert resource.getrlimit(resource.RLIMIT_AS) == strict
        assert resource.getrlimit(resource.RLIMIT_AS) == strict
    assert resource.getrlimit(resource.RLIMIT_AS) == before

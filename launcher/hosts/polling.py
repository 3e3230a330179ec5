"""Waiting for several file descriptors at once."""

from __future__ import annotations

import select
from collections.abc import Iterable


def readable(fds: Iterable[int], seconds: float) -> set[int]:
    """Wait until one can be read, and return those that can. (``select`` allows 1024 only.)"""
    waiting = select.poll()
    for fd in fds:
        waiting.register(fd, select.POLLIN)
    return {fd for fd, _ in waiting.poll(1000 * seconds)}

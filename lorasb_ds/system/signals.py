"""Stop on request: note a signal, so that the loop saves a checkpoint before it ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The run was asked to end and can be resumed: EX_TEMPFAIL in sysexits.h, "try again later".
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130  # by a second Ctrl-C, as in shells

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Tell whether a signal has asked this process to end.

    SIGTERM, SIGUSR1 and a first SIGINT ask; a second SIGINT ends the process at once. As long as
    there is nothing to save (``can_save`` has not been called), each of them ends it at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._can_save = self._interrupted = False

    def listen(self) -> None:
        """Install the signal handlers; from the main thread only."""
        for signum in SIGNALS:
            signal.signal(signum, self._handle)

    def can_save(self) -> None:
        """From now on only note a request; the loop must check ``requested``."""
        self._can_save = True

    def _handle(self, signum: int, _frame: object) -> None:
        if not self._can_save:
            if os.environ.get("RANK", "0") == "0":
                os.write(1, b"lorasb: asked to stop before the first step: nothing to save\n")
            os._exit(EXIT_STOPPED)
        if signum == signal.SIGINT:
            if self._interrupted:
                os._exit(EXIT_INTERRUPTED)
            self._interrupted = True
        self.requested = True


class InterruptRequest(StopRequest):
    """Tell whether Ctrl-C has asked a run to end that is part of somebody else's program.

    The program goes on: a Ctrl-C before there is something to save, or a second one, is Python's
    KeyboardInterrupt. Other signals are the program's own.
    """

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGINT in the ``with`` block; in other threads than the main one, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: Any = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)

    def _handle(self, signum: int, _frame: object) -> None:
        if self.requested or not self._can_save:
            raise KeyboardInterrupt
        self.requested = True

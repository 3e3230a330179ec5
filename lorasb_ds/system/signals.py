"""Stop on request: note a signal, so that the loop saves a checkpoint before it ends."""

from __future__ import annotations

import os
import signal

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

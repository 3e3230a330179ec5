"""The log of one rank: its output as lines of plain text. Standard library only."""

from __future__ import annotations

import re
from collections import deque
from contextlib import suppress
from datetime import datetime
from pathlib import Path

TAIL_LINES, TAIL_WIDTH = 40, 1000
LONGEST_LINE = 1 << 16
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Log:
    """A rank's output as lines of plain text, without what a progress bar has overwritten."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._file = path.open("a", encoding="utf-8")
        self._line = ""
        self._file.write(f"== {datetime.now().astimezone().isoformat(timespec='seconds')}\n")

    def write(self, text: str) -> None:
        *lines, self._line = (self._line + text).replace("\r\n", "\n").split("\n")
        for line in lines:
            plain = ESCAPES.sub("", line).rpartition("\r")[2]
            self.tail.append(plain[:TAIL_WIDTH])
            self._put(plain)
        if len(self._line) > LONGEST_LINE:
            self.write("\n")

    def close(self) -> None:
        if self._line:
            self.write("\n")
        with suppress(OSError):
            self._file.close()

    def _put(self, line: str) -> None:
        with suppress(OSError):  # a full disk ends no run because of its log
            self._file.write(line + "\n")
            self._file.flush()

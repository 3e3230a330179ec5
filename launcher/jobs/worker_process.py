"""One rank's worker as a child process: its terminal or pipes, its stage, its end.

Standard library only.
"""

from __future__ import annotations

import codecs
import ctypes
import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from launcher.hosts.host import extensions_folder
from launcher.jobs.channel import REPORT_TO

STACKS_S = 0.3
PR_SET_PDEATHSIG = 1


class WorkerProcess:
    """A worker in a session of its own, so that all it starts can be killed with it.

    Attributes:
        stage: what it has reported last (``joining``, ``joined``); ``ended`` once it cannot any
            more.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], terminal: list[int] | None
    ) -> None:
        """Start it.

        Args:
            terminal: columns and lines of the user's terminal, for a worker that prints to one;
                None for pipes.
        """
        self.stage = ""
        self._locks: list[Path] = []  # of builds, that it holds
        self._reports, its_reports = os.pipe()
        libc = ctypes.CDLL(None)

        def in_the_child() -> None:
            # It dies with the agent, whatever ends that.
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            # A request to stop is lost until the worker listens to it.
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

        if terminal is not None:
            master, slave = pty.openpty()
            size = struct.pack("HHHH", terminal[1], terminal[0], 0, 0)
            fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
            attributes = termios.tcgetattr(slave)
            attributes[1] &= ~termios.OPOST  # the user's terminal makes \r\n of \n
            termios.tcsetattr(slave, termios.TCSANOW, attributes)
            ends = {master: 1}
            out = err = slave
        else:
            (read_out, out), (read_err, err) = os.pipe(), os.pipe()
            ends = {read_out: 1, read_err: 2}
        decoder = codecs.getincrementaldecoder("utf-8")
        self._streams = {fd: (stream, decoder("replace")) for fd, stream in ends.items()}
        self._process = subprocess.Popen(
            command,
            env={**environment, REPORT_TO: str(its_reports)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            pass_fds=(its_reports,),
            preexec_fn=in_the_child,
        )
        for fd in {its_reports, out, err}:
            os.close(fd)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def waits(self) -> bool:
        """Whether it has not joined the others yet."""
        return self.stage in ("", "joining")

    @property
    def state(self) -> str:
        return process_state(self._process.pid)

    @property
    def output(self) -> list[int]:
        """Descriptors of its output that are still open."""
        return list(self._streams)

    @property
    def sources(self) -> list[int]:
        """All descriptors to wait for."""
        # A closed pipe would always be readable.
        return self.output if self.stage == "ended" else [self._reports, *self._streams]

    def read_output(self, ready: Collection[int]) -> list[tuple[int, str]]:
        """Read what has come.

        Returns:
            Pairs of 1 (standard output) or 2 (error), and text that may be empty.
        """
        found = []
        for fd in [fd for fd in self._streams if fd in ready]:
            stream, decoder = self._streams[fd]
            try:
                data = os.read(fd, 1 << 16)
            except OSError:  # a terminal whose last process has gone
                data = b""
            found.append((stream, decoder.decode(data, final=not data)))
            if not data:
                del self._streams[fd]
                os.close(fd)
        return found

    def read_stage(self, ready: Collection[int]) -> None:
        if self._reports in ready:
            reports = os.read(self._reports, 1024).split()
            self.stage = reports[-1].decode() if reports else "ended"

    def remember_locks(self) -> None:
        """Note the builds' locks that it holds: once it is killed, they cannot be seen."""
        if self.stage != "ended":
            self._locks = build_locks(self._process.pid) if self.waits else []

    def ask_to_stop(self) -> None:
        self._process.send_signal(signal.SIGUSR1)

    def write_stacks(self) -> None:
        """Make it write its stacks (`train.py` listens), which show where it is or hangs."""
        self._process.send_signal(signal.SIGUSR2)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STACKS_S)

    def kill(self) -> None:
        """Kill it and all that it has started, and remove the locks that it held."""
        locks = build_locks(self._process.pid) or self._locks
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for lock in locks:
            lock.unlink(missing_ok=True)

    def wait(self) -> int:
        """Return its returncode, as subprocess has it: negative for a signal."""
        return self._process.wait()


def process_state(pid: int) -> str:
    """Return a process's state as in /proc: R, S, D, T (stopped), Z, …; "?" if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "?"


def build_locks(pid: int) -> list[Path]:
    """Return the locks of torch's builds that a process holds: every later job waits for them."""
    found = []
    extensions = extensions_folder()
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                file = entry.readlink()
                if file.name == "lock" and file.is_relative_to(extensions):
                    found.append(file)
    return found

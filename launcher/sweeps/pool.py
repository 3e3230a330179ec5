"""Several commands at a time, each on an allocation of its own. Torch-free."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.jobs.ranks import free_port, listen_to, shell_status
from lorasb_ds.system.signals import EXIT_STOPPED, SIGNALS

POLL_S = 0.1
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Allocation:
    """What one job gets: a part of this host, or another host.

    Args:
        include: the host and its slots, as --include names them; empty for this host.
        environment: variables to be set for the job.
    """

    include: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PoolJob:
    """A run of a sweep, or its evaluation, as a command.

    Args:
        command: makes its argument list, from an allocation and a port that no other job here has.
        log: its output is appended there.
    """

    name: str
    command: Callable[[Allocation, int], Sequence[str]]
    log: Path


@dataclass
class _Running:
    work: PoolJob
    child: subprocess.Popen[bytes]
    port: int
    since: float


class Pool:
    """Starts jobs while allocations are free, and passes on the signals that ask to end."""

    def __init__(self, allocations: Sequence[Allocation]) -> None:
        self.allocations = allocations
        self.stop_signals: list[int] = []
        self._running: dict[int, _Running] = {}

    @property
    def stopped(self) -> bool:
        return bool(self.stop_signals)

    def listen(self) -> None:
        """Handle signals; call it from the main thread."""
        listen_to((*SIGNALS, signal.SIGHUP), self._pass_on)

    def _pass_on(self, signum: int, _frame: object) -> None:
        self.stop_signals.append(signum)
        for running in list(self._running.values()):
            _send(running.child, signum)

    def run(
        self,
        jobs: Sequence[PoolJob],
        began: Callable[[PoolJob, Allocation], None],
        ended: Callable[[PoolJob, int, float], None],
    ) -> None:
        """See all jobs to their end; after a signal, only those that run.

        Args:
            began: is called with a job and its allocation.
            ended: is called with a job, its status as a shell has it, and its seconds.
        """
        waiting = deque(jobs)
        while self._running or (waiting and not self.stopped):
            for i, allocation in enumerate(self.allocations):
                if i not in self._running and waiting and not self.stopped:
                    work = waiting.popleft()
                    began(work, allocation)
                    self._start(i, work, allocation)
            for i, running in list(self._running.items()):
                status = running.child.poll()
                if status is not None:
                    del self._running[i]
                    status = shell_status(status)
                    if status == EXIT_STOPPED and not self.stopped:  # somebody asked that job
                        self._pass_on(signal.SIGTERM, None)
                    ended(running.work, status, time.monotonic() - running.since)
            time.sleep(POLL_S)

    def _start(self, i: int, work: PoolJob, allocation: Allocation) -> None:
        taken = {running.port for running in self._running.values()}
        while (port := free_port()) in taken:
            pass
        work.log.parent.mkdir(parents=True, exist_ok=True)
        sent = len(self.stop_signals)
        with work.log.open("ab") as log:
            child = subprocess.Popen(
                work.command(allocation, port),
                env={**os.environ, **allocation.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self._running[i] = _Running(work, child, port, time.monotonic())
        for signum in self.stop_signals[sent:]:  # it came while the job was started
            _send(child, signum)


_LIBC = ctypes.CDLL(None)  # not loaded between fork and exec


def _end_with_parent() -> None:
    """Run in the child: if this process is killed, the job is asked to end, and saves."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _send(child: subprocess.Popen[bytes], signum: int) -> None:
    """Pass Ctrl-C on as it is, since a second one means more; all others as SIGTERM."""
    if child.poll() is None:
        child.send_signal(signum if signum == signal.SIGINT else signal.SIGTERM)

"""What DeepSpeed starts on every rank of a supervised job: it starts the worker, and watches it.

The worker (`train.py`; with `--worker=eval` `eval.py`) is its child: its output goes to a log of
its own (rank 0's to the console as well), and how it ended is told to the supervisor. When the
supervisor says so, or is not heard of any longer, the worker is killed: no process outlives a job
on a host that nobody reaches.
Standard library only: it starts at once, and lives beside every rank.
"""

from __future__ import annotations

import codecs
import ctypes
import fcntl
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # DeepSpeed starts it as a script

from launcher.hosts.host import extensions_folder, interface_of, old_build_locks, route_from
from launcher.hosts.polling import readable
from launcher.jobs import channel as names
from launcher.jobs.channel import STOPPED, Channel, beat_interval
from launcher.jobs.ranks import (
    EVAL,
    rank_variables,
    remove_shared_memory,
    shell_status,
    worker_command,
)
from lorasb_ds.config.run_layout import RANK_LOG
from lorasb_ds.system.signals import EXIT_STOPPED

TAIL_LINES, TAIL_WIDTH = 40, 1000
LONGEST_LINE = 1 << 16
POLL_S = 0.2
STACKS_S = 0.3
CONNECT_S = 5.0
OLD_LOCK_S = 60.0  # of a build
DRAIN_S = 1.0  # for what a worker has written before it ended
PR_SET_PDEATHSIG = 1
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Log:
    """A rank's output as lines of plain text, without what a progress bar drew over."""

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


class Agent:
    """One rank's worker, and the connection to the supervisor."""

    def __init__(self, environment: dict[str, str], command: Sequence[str]) -> None:
        self.environment = environment
        self.command = command
        self.rank = int(environment["RANK"])
        self.failure_timeout = float(environment[names.FAILURE_TIMEOUT])
        self.log = Log(Path(environment[names.LOGS]) / RANK_LOG.format(self.rank))
        self.asked_to_stop = False
        self.killed: str | None = None  # why
        self.stage = ""  # the last word of the worker
        self.locks: list[Path] = []  # of builds, that it holds
        self.streams: dict[int, tuple[int, codecs.IncrementalDecoder]] = {}

    def run(self) -> int:
        """Until the worker has ended; its status."""
        self.channel = self._connect()
        welcome = self._introduce()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(signum, self._ask)
        self._start(welcome.get("terminal"))
        try:
            self._watch()
        finally:
            self._kill()
        self._drain()
        returncode = self.worker.wait()
        self.log.close()
        remove_shared_memory(int(self.environment["MASTER_PORT"]))
        self.channel.send(ended=returncode, tail=list(self.log.tail))
        self._say_goodbye()
        if returncode == EXIT_STOPPED:
            self._say(STOPPED)
        if returncode in (0, EXIT_STOPPED):
            return 0  # or DeepSpeed's launcher would end the others while they save
        if self.killed:
            self._say(f"the job was ended: {self.killed}")
            return 1
        return shell_status(returncode)

    def _connect(self) -> Channel:
        host, _, port = self.environment[names.SUPERVISOR].rpartition(":")
        # Where no ssh starts the hosts, the first one's launcher may come last.
        by_hand = names.NODE_RANK in self.environment
        patience = float(self.environment[names.START_TIMEOUT]) if by_hand else CONNECT_S
        deadline = time.monotonic() + patience
        while True:
            try:
                connection = socket.create_connection((host, int(port)), self.failure_timeout)
                self.supervisor_is_here = connection.getsockname()[0] == connection.getpeername()[0]
                return Channel(connection)
            except OSError as error:
                if time.monotonic() > deadline:
                    where = f"{host}:{port}"
                    if by_hand:
                        where += " (started with --node-rank 0; one above --master-port)"
                    self._fail(f"cannot reach the launcher at {where}: {error}")
            time.sleep(POLL_S)

    def _introduce(self) -> dict[str, Any]:
        environment = self.environment
        address = route_from(environment.get("MASTER_ADDR", "127.0.0.1"))
        interface = interface_of(address)
        if int(environment["WORLD_SIZE"]) > int(environment.get("LOCAL_SIZE", 0)) and interface:
            # What the user has set wins. Without it gloo binds to what the host's name means.
            for variable in names.INTERFACE_VARIABLES:
                environment.setdefault(variable, interface)
        self.channel.send(
            session=environment[names.SESSION],
            rank=self.rank,
            world_size=int(environment["WORLD_SIZE"]),
            host=socket.gethostname(),
            interface=environment.get("GLOO_SOCKET_IFNAME", interface),
            log=str(self.log.path.resolve()),
        )
        deadline = time.monotonic() + self.failure_timeout
        while not self.channel.closed and time.monotonic() < deadline:
            readable([self.channel.fileno()], POLL_S)
            for message in self.channel.receive():
                if "refused" not in message:
                    return message
                self._fail(str(message["refused"]))
        return self._fail("the launcher does not answer")

    def _fail(self, reason: str) -> NoReturn:
        self.log.write(f"lorasb: error: {reason}\n")
        self.log.close()
        self._say(f"error: rank {self.rank}: {reason}")
        sys.exit(1)

    def _say(self, text: str) -> None:
        """To DeepSpeed's log; with ``--no-ssh`` the launcher of this host shows it."""
        with suppress(OSError):
            sys.stderr.write(f"lorasb: {text}\n")
            sys.stderr.flush()

    def _ask(self, _signum: int, _frame: object) -> None:
        self.asked_to_stop = True

    def _start(self, terminal: list[int] | None) -> None:
        """The worker, in a session of its own, so that all it starts can be killed with it."""
        pipe, its_pipe = os.pipe()
        self.pipe = pipe
        libc = ctypes.CDLL(None)

        def in_the_child() -> None:
            # It dies with the agent, whatever ends that.
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            # A request to stop passes by until the worker listens to it.
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
        self.streams = {fd: (stream, decoder("replace")) for fd, stream in ends.items()}
        self.worker = subprocess.Popen(
            self.command,
            env={**self.environment, names.REPORT_TO: str(its_pipe)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            pass_fds=(its_pipe,),
            preexec_fn=in_the_child,
        )
        for fd in {its_pipe, out, err}:
            os.close(fd)

    def _watch(self) -> None:
        """Until the worker ends by itself, or has to be killed."""
        next_beat = next_ask = 0.0
        heard = time.monotonic()
        while self.worker.poll() is None:
            pipe = [] if self.stage == "ended" else [self.pipe]  # closed, and always readable
            ready = readable([self.channel.fileno(), *pipe, *self.streams], POLL_S)
            now = time.monotonic()
            self._read(ready)
            if self.pipe in ready:
                told = os.read(self.pipe, 1024).split()
                self.stage = told[-1].decode() if told else "ended"
            for message in self.channel.receive():
                heard = now
                self.asked_to_stop |= "stop" in message
                if "kill" in message:
                    self.killed = str(message["kill"])
                    if message.get("stacks"):
                        self._show_where_it_is()
            # Somebody else may kill it; what it held can only be seen before.
            if self.stage != "ended":
                self.locks = build_locks(self.worker.pid) if self._waits else []
            if self.channel.closed:
                self.killed = self.killed or "the launcher has gone"
            # On the launcher's own host the connection tells; it may only be suspended (Ctrl-Z).
            if now - heard > self.failure_timeout and not self.supervisor_is_here:
                self.killed = f"the launcher was not heard of for {self.failure_timeout:g} s"
            if self.killed:
                return
            if now >= next_beat:
                next_beat = now + beat_interval(self.failure_timeout)
                lock = next(iter(old_build_locks(OLD_LOCK_S)), None) if self._waits else None
                state = process_state(self.worker.pid)
                self.channel.send(stage=self.stage, state=state, lock=lock)
            self.channel.flush()
            if self.asked_to_stop and now >= next_ask:
                next_ask = now + 0.5
                self.worker.send_signal(signal.SIGUSR1)

    @property
    def _waits(self) -> bool:
        """Whether the worker has not joined the others yet."""
        return self.stage in ("", "joining")

    def _read(self, ready: Collection[int]) -> None:
        for fd in [fd for fd in self.streams if fd in ready]:
            stream, decoder = self.streams[fd]
            try:
                data = os.read(fd, 1 << 16)
            except OSError:  # a terminal whose last process has gone
                data = b""
            text = decoder.decode(data, final=not data)
            self.log.write(text)
            if self.rank == 0 and text:
                self.channel.send(output=text, stream=stream)
            if not data:
                del self.streams[fd]
                os.close(fd)

    def _show_where_it_is(self) -> None:
        """The worker writes its stacks to its log (`train.py` listens): where it was, or hung."""
        self.worker.send_signal(signal.SIGUSR2)
        with suppress(subprocess.TimeoutExpired):
            self.worker.wait(STACKS_S)

    def _kill(self) -> None:
        """The worker and all that it started."""
        locks = build_locks(self.worker.pid) or self.locks
        with suppress(ProcessLookupError):
            os.killpg(self.worker.pid, signal.SIGKILL)
        for lock in locks:
            lock.unlink(missing_ok=True)
        if self.killed:
            self.log.write(f"\nlorasb: killed: {self.killed}\n")

    def _drain(self) -> None:
        deadline = time.monotonic() + DRAIN_S
        while self.streams and (left := deadline - time.monotonic()) > 0:
            self._read(readable(self.streams, left))

    def _say_goodbye(self) -> None:
        """Stay until the supervisor has it all: it closes the connection."""
        deadline = time.monotonic() + self.failure_timeout
        while not self.channel.closed and time.monotonic() < deadline:
            self.channel.flush()
            readable([self.channel.fileno()], POLL_S)
            self.channel.receive()


def process_state(pid: int) -> str:
    """As /proc has it: R, S, D, T (stopped), Z, …"""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "?"


def build_locks(pid: int) -> list[Path]:
    """The locks of torch's builds that a process holds: every later job would wait for them."""
    found = []
    extensions = extensions_folder()
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                file = entry.readlink()
                if file.name == "lock" and file.is_relative_to(extensions):
                    found.append(file)
    return found


def main(arguments: Sequence[str]) -> int:
    environment = {**os.environ, **rank_variables(os.environ)}
    worker = "eval" if EVAL in arguments else "train"
    command = worker_command(worker, [word for word in arguments if word != EVAL])
    if names.SUPERVISOR not in environment:  # started by hand: nobody supervises
        os.execve(command[0], command, environment)  # noqa: S606
    return Agent(environment, command).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

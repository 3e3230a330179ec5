"""What DeepSpeed starts on every rank of a supervised job: it starts the worker, and watches it.

The worker (`train.py`; with `--worker=eval` `eval.py`) is its child: its output goes to a log of
its own (rank 0's to the console as well), and the supervisor is told how it ended. When the
supervisor asks for it, or is not heard of any longer, the worker is killed: no process outlives a
job on a host that nobody reaches.
Standard library only: it starts at once, and runs beside every rank.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

# DeepSpeed starts it as a script. An environment's packages are there, behind Python's modules.
if (root := str(Path(__file__).resolve().parents[2])) not in sys.path:
    sys.path.insert(0, root)

from launcher.hosts.host import interface_of, old_build_locks, route_from
from launcher.hosts.polling import readable
from launcher.jobs import channel as names
from launcher.jobs import session
from launcher.jobs.channel import STOPPED, Channel, beat_interval
from launcher.jobs.rank_log import Log
from launcher.jobs.ranks import (
    EVAL,
    rank_variables,
    remove_shared_memory,
    shell_status,
    worker_command,
)
from launcher.jobs.worker_process import WorkerProcess
from lorasb_ds.config.run_layout import RANK_LOG
from lorasb_ds.system.signals import EXIT_STOPPED

POLL_S = 0.2
CONNECT_S = 5.0
OLD_LOCK_S = 60.0  # of a build
DRAIN_S = 1.0  # for what a worker has written before it ended


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

    def run(self) -> int:
        """Watch the worker to its end; return the status for DeepSpeed's launcher."""
        self.channel = self._connect()
        welcome = self._introduce()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(signum, self._ask_to_stop)
        self.worker = WorkerProcess(self.command, self.environment, welcome.get("terminal"))
        try:
            self._watch()
        finally:
            self.worker.kill()
            if self.killed:
                self.log.write(f"\nlorasb: killed: {self.killed}\n")
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
        """Say who this is; return the supervisor's answer."""
        environment = self.environment
        address = route_from(environment.get("MASTER_ADDR", "127.0.0.1"))
        interface = interface_of(address)
        if int(environment["WORLD_SIZE"]) > int(environment.get("LOCAL_SIZE", 0)) and interface:
            # What the user has set wins. Without it gloo binds to what the host's name means.
            for variable in names.INTERFACE_VARIABLES:
                environment.setdefault(variable, interface)
        challenge = self._next_message().get("challenge")
        try:
            word = session.read_word(environment)
        except OSError as error:
            self._fail(
                f"the job's secret cannot be read ({error}). Name an --output-dir that all hosts "
                f"share, or set {session.WORD} to the same word on all of them."
            )
        self.channel.send(
            proof=session.proof(word, str(challenge)),
            options=environment.get(names.OPTIONS),
            rank=self.rank,
            world_size=int(environment["WORLD_SIZE"]),
            host=socket.gethostname(),
            interface=environment.get("GLOO_SOCKET_IFNAME", interface),
            log=str(self.log.path.resolve()),
        )
        return self._next_message()

    def _next_message(self) -> dict[str, Any]:
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
        """Write to DeepSpeed's log; with ``--no-ssh`` the launcher of this host shows it."""
        with suppress(OSError):
            sys.stderr.write(f"lorasb: {text}\n")
            sys.stderr.flush()

    def _ask_to_stop(self, _signum: int, _frame: object) -> None:
        self.asked_to_stop = True

    def _watch(self) -> None:
        """Return when the worker has ended by itself, or has to be killed."""
        worker = self.worker
        next_beat = next_ask = 0.0
        heard = time.monotonic()
        while not worker.has_ended:
            ready = readable([self.channel.fileno(), *worker.sources], POLL_S)
            now = time.monotonic()
            self._pass_on_output(ready)
            worker.read_stage(ready)
            for message in self.channel.receive():
                heard = now
                self.asked_to_stop |= "stop" in message
                if "kill" in message:
                    self.killed = str(message["kill"])
                    if message.get("stacks"):
                        worker.write_stacks()
            worker.remember_locks()
            if self.channel.closed:
                self.killed = self.killed or "the launcher has gone"
            # On the launcher's own host the connection tells; it may only be suspended (Ctrl-Z).
            if now - heard > self.failure_timeout and not self.supervisor_is_here:
                self.killed = f"the launcher was not heard of for {self.failure_timeout:g} s"
            if self.killed:
                return
            if now >= next_beat:
                next_beat = now + beat_interval(self.failure_timeout)
                lock = next(iter(old_build_locks(OLD_LOCK_S)), None) if worker.waits else None
                self.channel.send(stage=worker.stage, state=worker.state, lock=lock)
            self.channel.flush()
            if self.asked_to_stop and now >= next_ask:
                next_ask = now + 0.5
                worker.ask_to_stop()

    def _pass_on_output(self, ready: Collection[int]) -> None:
        """Write the worker's output to its log, and show rank 0's on the console."""
        for stream, text in self.worker.read_output(ready):
            self.log.write(text)
            if self.rank == 0 and text:
                self.channel.send(output=text, stream=stream)

    def _drain(self) -> None:
        deadline = time.monotonic() + DRAIN_S
        while (fds := self.worker.output) and (left := deadline - time.monotonic()) > 0:
            self._pass_on_output(readable(fds, left))

    def _say_goodbye(self) -> None:
        """Stay until the supervisor has received everything: it closes the connection."""
        deadline = time.monotonic() + self.failure_timeout
        while not self.channel.closed and time.monotonic() < deadline:
            self.channel.flush()
            readable([self.channel.fileno()], POLL_S)
            self.channel.receive()


def main(arguments: Sequence[str]) -> int:
    environment = {**os.environ, **rank_variables(os.environ)}
    worker = "eval" if EVAL in arguments else "train"
    command = worker_command(worker, [word for word in arguments if word != EVAL])
    if names.WORKING_DIRECTORY in environment:
        folder = names.from_plain_word(environment[names.WORKING_DIRECTORY])
        try:
            os.chdir(folder)
        except OSError as error:
            where = f"rank {environment.get('RANK')} on {socket.gethostname()}"
            sys.exit(f"lorasb: error: {where}: no working directory {folder} ({error.strerror})")
    if names.SUPERVISOR not in environment:  # started by hand: nobody supervises
        os.execve(command[0], command, environment)  # noqa: S606
    return Agent(environment, command).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

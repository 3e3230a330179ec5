"""Run a program on other hosts by ssh, which gets it on its standard input; write a file there."""

from __future__ import annotations

import inspect
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.hosts.checks import Question
from launcher.hosts.environment import SSH_OPTIONS
from launcher.hosts.private_file import write_private

MOST_BYTES = 1 << 20  # of a host's answer, which is some thousands


def ssh_command(host: str, words: Sequence[str], question: Question) -> list[str]:
    """Return the ssh command that runs an argument list on a host."""
    port = [] if question.ssh_port is None else ["-p", str(question.ssh_port)]
    limit = f"ConnectTimeout={max(1, int(question.timeout / 2))}"
    return ["ssh", *SSH_OPTIONS, "-o", limit, *port, host, f"exec {shlex.join(words)}"]


def run_program(
    command: Sequence[str], program: str, limit: float
) -> subprocess.CompletedProcess[str]:
    """Run ssh with a program on its standard input; take in ``MOST_BYTES`` of what it prints.

    Raises:
        subprocess.TimeoutExpired: after ``limit`` seconds.
    """
    pipe = subprocess.PIPE
    with (
        # In a session of its own: what it starts, such as a ProxyCommand, ends with it.
        subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        ) as child,
        ThreadPoolExecutor(max_workers=3) as pool,
    ):

        def end() -> None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

        def read(source: Any) -> str:
            data = source.read(MOST_BYTES)
            if source.read(1):
                end()
            return bytes(data).decode(errors="replace")

        def write(target: Any) -> None:
            with suppress(BrokenPipeError), target:
                target.write(program.encode())

        texts = [pool.submit(read, source) for source in (child.stdout, child.stderr)]
        pool.submit(write, child.stdin)
        try:
            child.wait(limit)
        finally:
            end()
        out, err = (text.result() for text in texts)
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of a program that has failed, or else its status."""
    return (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]


def put_file(hosts: Sequence[str], path: Path, question: Question) -> list[str]:
    """Write a file of this host's on others, for this user's eyes only; return what went wrong.

    Its content goes through ssh's standard input: `ps` shows arguments to everyone.
    """
    program = (
        f"import os, sys\n{inspect.getsource(write_private)}\n"
        "os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)\n"
        f"write_private(sys.argv[1], {path.read_text()!r})\n"
    )

    def put(host: str) -> str | None:
        command = ssh_command(host, [sys.executable, "-", str(path)], question)
        limit = question.timeout
        try:
            done = run_program(command, program, limit)
        except subprocess.TimeoutExpired:
            return f"{host}: no answer within {limit:g} s"
        if done.returncode == 0:
            return None
        return f"{host}: {complaint(done)}"

    with ThreadPoolExecutor(max_workers=max(1, len(hosts))) as pool:
        return [problem for problem in pool.map(put, hosts) if problem is not None]

"""Ranks of a job: their commands, variables, ports and remains. Standard library only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from launcher.paths import WORKERS

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108, of DeepSpeed's collectives on CPUs
EVAL = "--worker=eval"  # tells the agents that the worker is eval.py, not train.py

# RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_SIZE as MPI's and Slurm's launchers name them. DeepSpeed's
# own launcher sets them; under the others it would ask mpi4py.
FOREIGN_NAMES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"),
    "LOCAL_RANK": (
        *("OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
        *("MPI_LOCALRANKID", "SLURM_LOCALID"),
    ),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"),
    "LOCAL_SIZE": (
        *("OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
        *("MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"),
    ),
}


def worker_command(
    worker: str, worker_arguments: Sequence[str], python: str = sys.executable
) -> list[str]:
    """Return the argument list of a worker: ``train``, ``eval``, ``preview``, …"""
    folder = WORKERS if worker == "train" else WORKERS / "workers"
    return [python, str(folder / f"{worker}.py"), *worker_arguments]


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK and the like of this process, from the variables of any launcher."""
    found = {}
    for name, others in FOREIGN_NAMES.items():
        values = [environment[other] for other in (name, *others) if other in environment]
        if values:
            found[name] = values[0]
    return found


def shell_status(returncode: int) -> int:
    """Convert a returncode of subprocess, which is negative for a signal, to a shell's status."""
    return returncode if returncode >= 0 else 128 - returncode


def run_here(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command in a process session of its own, passing signals on; return its status."""
    child = subprocess.Popen(command, env=environment, start_new_session=True)

    def pass_on(signum: int, _frame: object) -> None:
        os.killpg(child.pid, signum)

    listen_to((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), pass_on)
    return shell_status(child.wait())


def listen_to(signals: Iterable[int], handler: Callable[[int, object], None]) -> None:
    """Handle signals, except for a SIGHUP that is ignored, as under nohup."""
    for signum in signals:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int, threads: int) -> dict[str, str]:
    """Return the variables that DeepSpeed's launcher sets for a rank on this host's CPU."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(world_size),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(threads),
    }


def remove_shared_memory(port: int) -> None:
    """Remove what DeepSpeed's collectives on CPUs leave: 66 MiB for every process of a job."""
    for buffer in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        with suppress(PermissionError):  # another user's, of a job with the same port
            buffer.unlink(missing_ok=True)

"""What the processes of a job are, need to meet, and leave behind. Standard library only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from launcher.paths import WORKERS

EVAL = "--worker=eval"  # told to the agents: the worker is eval.py, not train.py

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
    """The argument list of a worker: ``train``, ``eval`` or ``preview``."""
    folder = WORKERS if worker == "train" else WORKERS / "workers"
    return [python, str(folder / f"{worker}.py"), *worker_arguments]


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Which rank a process is, by the variables of whatever launcher has started it."""
    found = {}
    for name, others in FOREIGN_NAMES.items():
        values = [environment[other] for other in (name, *others) if other in environment]
        if values:
            found[name] = values[0]
    return found


def shell_status(returncode: int) -> int:
    """A returncode of subprocess, which is negative for a signal, as a shell has it."""
    return returncode if returncode >= 0 else 128 - returncode


def run_here(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command in a process session of its own; pass signals on; its status."""
    child = subprocess.Popen(command, env=environment, start_new_session=True)

    def pass_on(signum: int, _frame: object) -> None:
        os.killpg(child.pid, signum)

    listen_to((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), pass_on)
    return shell_status(child.wait())


def listen_to(signals: Iterable[int], handler: Callable[[int, object], None]) -> None:
    """Handle signals, but for SIGHUP where it is ignored, as under nohup: it stays so."""
    for signum in signals:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int, threads: int) -> dict[str, str]:
    """What DeepSpeed's launcher would tell a rank on this host's CPU."""
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
    """DeepSpeed's collectives on CPUs leave 66 MiB of it behind for every process of a job."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):  # noqa: S108
        buffer.unlink(missing_ok=True)

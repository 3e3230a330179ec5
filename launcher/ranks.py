"""What processes of one host need to meet, and what they leave behind. Torch-free."""

from __future__ import annotations

import socket
from pathlib import Path


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

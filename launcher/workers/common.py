"""Common parts of the workers of a DeepSpeed job: their device, and their end."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import click

from launcher.jobs.channel import tell_agent
from launcher.jobs.command import GPU_NAMES, GPUS_ASKED_FOR
from launcher.jobs.ranks import SHARED_MEMORY
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.home import ensure_home
from lorasb_ds.system.signals import EXIT_STOPPED

GRACE_S = 10.0
SHARED_BUFFER_BYTES = 66 << 20
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def find_home() -> None:
    """Let libraries find folders for their caches; ends the process where there are none."""
    try:
        ensure_home()
    except ConfigError as error:
        refuse(error)


def set_device_variables() -> None:
    """Set what torch reads about devices when it is imported; call it before.

    Gathers of many sizes fragment the memory of a GPU whose allocator's segments cannot grow. And
    torch rounds page-locked memory up to a power of two: a parameter in host memory may take twice
    its size. Users' own settings win.
    """
    if names := os.environ.get(GPU_NAMES):
        os.environ["CUDA_VISIBLE_DEVICES"] = names
    if any(variable in os.environ for variable in ALLOCATOR_VARIABLES):
        return
    if tuple(map(int, version("torch").split(".")[:2])) >= (2, 13):
        settings = "expandable_segments:True,pinned_max_round_threshold_mb:1"
        os.environ["PYTORCH_ALLOC_CONF"] = settings
    else:  # which does not know the second setting
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def answer_agent() -> None:
    """Write stacks to the log when the agent asks for them; its signal would end the worker."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)


def end_when_asked() -> None:
    """End at once when asked to stop, with EXIT_STOPPED; for workers with nothing to save."""
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(EXIT_STOPPED))  # from its agent
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # by hand: no traceback, and 130


def check_device() -> None:
    """Check that this process has the device that it was started for.

    Raises:
        ConfigError: if it has not.
    """
    from lorasb_ds.distributed import accelerator

    asked, local_rank = os.environ.get(GPUS_ASKED_FOR), int(os.environ.get("LOCAL_RANK", 0))
    if asked is not None and accelerator.name() == "cpu":
        raise ConfigError(
            f"--num-gpus {asked}: there is no GPU on this host that torch can use "
            f"({accelerator.why_no_gpu()}). Look at `nvidia-smi`, install a torch that fits the "
            f"driver (pytorch.org), or use --num-procs {asked} for the CPU."
        )
    if problem := accelerator.backend_problem():
        raise ConfigError(f"{problem}, by which GPUs communicate. Install torch from its wheels.")
    if accelerator.name() != "cpu" and local_rank >= accelerator.device_count():
        raise ConfigError(
            f"There is no GPU for process {local_rank} of this host: it has "
            f"{accelerator.device_count()}. Lower --num-gpus."
        )
    if accelerator.name() == "cpu" and os.environ.get("LOCAL_SIZE") == os.environ["WORLD_SIZE"]:
        check_shared_memory()


def check_shared_memory(folder: Path = SHARED_MEMORY) -> None:
    """Check that a rank on a CPU has room for the buffer in which DeepSpeed's ranks of a host meet.

    Where it cannot be made, the other ranks wait for it without end, and heed no signal.

    Raises:
        ConfigError: naming the folder, and the room that is needed.
    """
    writable = os.access(folder, os.W_OK)  # False, too, where there is none
    free = shutil.disk_usage(folder).free if writable else 0
    if free >= SHARED_BUFFER_BYTES:
        return
    found = f"has {free >> 20} MiB left" if writable else "cannot be written"
    raise ConfigError(
        f"{folder} {found}; DeepSpeed needs {SHARED_BUFFER_BYTES >> 20} MiB there for each process "
        "on the CPU. Mount it with room to write (docker run --shm-size 1g), or remove what was "
        f"left there ({folder}/deepspeed_*)."
    )


def join() -> None:
    """Join the job's process group, and tell the agent. Collective."""
    from lorasb_ds.distributed import zero

    tell_agent("joining")
    try:
        zero.init_process_group()
    except ConfigError as error:
        refuse(error)
    tell_agent("joined")


def refuse(error: Exception, status: int = 2) -> NoReturn:
    """Print what is wrong, and end. Rank 0 speaks for all.

    The other ranks mostly find the same, and DeepSpeed ends them when rank 0 has gone. One that is
    still there after ``GRACE_S`` has found something else, and prints it.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank != 0:
        time.sleep(GRACE_S)
    where = f" on rank {rank}" if rank else ""
    click.echo(f"lorasb: error{where}: {error}", err=True)
    sys.stderr.flush()
    os._exit(status)  # not sys.exit: destructors of a process group may wait for the other ranks


def end(status: int = 0) -> NoReturn:
    """End the process when everything is saved.

    On CPUs a thread of gloo's may outlive its group, and would abort the process on its way out
    ("terminate called without an active exception", seen in 2 of some 200 jobs): a run that is done
    would end with a failure.
    """
    with suppress(OSError):  # the terminal may be closed
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)

"""A run in processes that a program has started itself: in this one alone, or in a job's ranks."""

from __future__ import annotations

import atexit
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.distributed import zero
from lorasb_ds.distributed.failures import from_rank_0, on_every_rank
from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.result import TrainResult, read_result
from lorasb_ds.runs.run_log import OnRow
from lorasb_ds.system.host_memory import ranks_of_host
from lorasb_ds.system.signals import InterruptRequest
from lorasb_ds.training.prepare import Prepared, prepare
from lorasb_ds.training.trainer import run_training

# What DeepSpeed reads of a rank. Without LOCAL_SIZE it makes no buffer to meet others of the host.
ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",  # any free one
}


def train_here(make_options: Callable[[], dict[str, Any]], on_row: OnRow | None) -> TrainResult:
    """Do a run in this process, and in the others of its job if there are any. Collective.

    The process group stays for the next run.

    Args:
        make_options: returns the fields of RunConfig that are asked for, and ``output_dir``; only
            rank 0 calls it.
    Raises:
        As ``lorasb_ds.train``.
    """
    stop = InterruptRequest()
    with rank_variables(), stop.listening(), warnings.catch_warnings():
        # DeepSpeed's and others' affair, as in `lorasb train`.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        if not dist.is_initialized():
            atexit.register(zero.close_process_group)
        zero.init_process_group()
        try:
            options = from_rank_0(make_options)
            world_size = zero.world_size()

            def prepare_here() -> Prepared:
                config = load_run_config(options)
                return prepare(config, world_size, ranks_of_host(default=world_size))

            prepared = on_every_rank(prepare_here)
            status = run_training(prepared, stop, on_row=on_row)
            return from_rank_0(lambda: read_result(Path(options["output_dir"]), status))
        finally:
            gc.collect()  # engine and model refer to each other


@contextmanager
def rank_variables() -> Iterator[None]:
    """Set what DeepSpeed reads of a rank, while a run lasts; of one that is started, it is there.

    Raises:
        ConfigError: if only a part of it is.
    """
    if "RANK" in os.environ:
        if missing := [name for name in ALONE if name not in os.environ]:
            raise ConfigError(
                f"This process has RANK={os.environ['RANK']} of a job, but no "
                f"{', '.join(missing)}. Start it by torchrun or deepspeed, which set them; or "
                "unset RANK, to train in this process alone."
            )
        yield
        return
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError(
            f"This process is in a group of {dist.get_world_size()}, and has no RANK, LOCAL_RANK "
            "and WORLD_SIZE. Start the processes by torchrun or deepspeed, which set them."
        )
    before = {name: os.environ.get(name) for name in ALONE}
    os.environ.update(ALONE)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

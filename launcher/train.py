"""The worker that DeepSpeed starts on every rank: `deepspeed launcher/train.py --ds_config …`."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

import click

from launcher.channel import tell_agent
from launcher.command import GPUS_ASKED_FOR
from launcher.options import CONTEXT, run_options
from launcher.quiet import quiet_libraries
from lorasb_ds.config import ConfigError
from lorasb_ds.host_memory import ranks_of_host
from lorasb_ds.request import load_run_config
from lorasb_ds.stop import EXIT_STOPPED, StopRequest

GRACE_S = 10.0


@click.command(context_settings=CONTEXT)
@click.option("--local-rank", type=int, hidden=True, help="Given by DeepSpeed's launcher.")
@click.option("--init-only", is_flag=True, help="Stop after the init (`lorasb init`).")
@run_options
def main(local_rank: int | None, init_only: bool, run_json: str | None, **given: Any) -> None:
    """Fine-tune a model on the ranks of a DeepSpeed job."""
    if "RANK" not in os.environ:
        _refuse(
            ConfigError(
                "This is the worker of a DeepSpeed job. Start it by `lorasb train …` or `deepspeed "
                "launcher/train.py …`."
            )
        )
    quiet_libraries()
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # its agent asks where it is
    stop = StopRequest()
    stop.listen()
    try:
        config = load_run_config(given, run_json)
        # Imported only now: the options above are wrong or right without torch.
        from lorasb_ds.prepare import prepare

        _check_device()
        world_size = int(os.environ["WORLD_SIZE"])
        prepared = prepare(config, world_size, ranks_of_host(default=world_size))
    except ConfigError as error:
        _refuse(error)

    from lorasb_ds import zero
    from lorasb_ds.trainer import run_training

    tell_agent("joining")
    zero.init_process_group()
    tell_agent("joined")
    try:
        outcome = run_training(prepared, stop, init_only)
    except ConfigError as error:
        _refuse(error)
    except (FloatingPointError, MemoryError, OSError) as error:
        _refuse(error, status=1)
    zero.close_process_group()
    # Everything is saved. On CPUs a thread of gloo's may outlive its group, and would abort the
    # process on its way out ("terminate called without an active exception", seen in 2 of some 200
    # jobs): a run that is done would end with a failure.
    with suppress(OSError):  # the terminal may be closed
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(EXIT_STOPPED if outcome == "stopped" else 0)


def _check_device() -> None:
    """Whether this process has the device that it is meant to have."""
    from lorasb_ds import accelerator

    asked, local_rank = os.environ.get(GPUS_ASKED_FOR), int(os.environ.get("LOCAL_RANK", 0))
    if asked is not None and accelerator.name() == "cpu":
        raise ConfigError(
            f"--num-gpus {asked}: DeepSpeed finds no GPU on this host. Use --num-procs {asked} for "
            "the CPU, or look at `nvidia-smi` and torch.cuda.is_available()."
        )
    if accelerator.name() != "cpu" and local_rank >= accelerator.device_count():
        raise ConfigError(
            f"There is no GPU for process {local_rank} of this host: it has "
            f"{accelerator.device_count()}. Lower --num-gpus."
        )


def _refuse(error: Exception, status: int = 2) -> NoReturn:
    """Say what is wrong, and end. Rank 0 speaks for all.

    The other ranks find the same as a rule, and DeepSpeed ends them when rank 0 has gone. One that
    is still there after a while found something of its own, and says it.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank != 0:
        time.sleep(GRACE_S)
    place = f" on rank {rank}" if rank else ""
    click.echo(f"lorasb: error{place}: {error}", err=True)
    sys.stderr.flush()
    os._exit(status)  # not sys.exit: destructors of a process group may wait for the other ranks


if __name__ == "__main__":
    main()

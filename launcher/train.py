"""The worker that DeepSpeed starts on every rank: `deepspeed launcher/train.py --ds_config …`."""

from __future__ import annotations

import os
from typing import Any

import click

from launcher.options import CONTEXT, run_options
from launcher.sections import SectionedCommand
from launcher.workers.common import (
    answer_agent,
    check_device,
    end,
    find_home,
    join,
    refuse,
    set_device_variables,
)
from launcher.workers.quiet import quiet_libraries
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.errors import ConfigError, JobError
from lorasb_ds.system.host_memory import ranks_of_host
from lorasb_ds.system.signals import EXIT_STOPPED, StopRequest


@click.command(cls=SectionedCommand, context_settings=CONTEXT)
@click.option("--local-rank", type=int, hidden=True, help="Given by DeepSpeed's launcher.")
@click.option("--init-only", is_flag=True, help="Stop after the init (`lorasb init`).")
@run_options
def main(local_rank: int | None, init_only: bool, run_json: str | None, **given: Any) -> None:
    """Fine-tune a model on the ranks of a DeepSpeed job."""
    if "RANK" not in os.environ:
        refuse(
            ConfigError(
                "This is the worker of a DeepSpeed job. Start it by `lorasb train …` or `deepspeed "
                "launcher/train.py …`."
            )
        )
    find_home()
    quiet_libraries()
    set_device_variables()
    answer_agent()
    stop = StopRequest()
    stop.listen()
    try:
        config = load_run_config(given, run_json)
        # Imported only now: the options above are wrong or right without torch.
        from lorasb_ds.training.prepare import prepare

        check_device()
        world_size = int(os.environ["WORLD_SIZE"])
        prepared = prepare(config, world_size, ranks_of_host(default=world_size))
    except ConfigError as error:
        refuse(error)

    from lorasb_ds.distributed import zero
    from lorasb_ds.training.trainer import run_training

    join()
    try:
        outcome = run_training(prepared, stop, init_only)
    except ConfigError as error:
        refuse(error)
    except (FloatingPointError, JobError, MemoryError, OSError) as error:
        refuse(error, status=1)
    zero.close_process_group()
    end(EXIT_STOPPED if outcome == "stopped" else 0)


if __name__ == "__main__":
    main()

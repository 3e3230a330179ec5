"""The folder of a run."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import (
    ALIGNMENT,
    ALIGNMENT_PICTURE,
    DS_CONFIG_COPY,
    METRICS,
    PEFT_COPY,
    PROFILE,
    PROFILE_ASIDE,
    REPORT,
    SAMPLES,
    default_output_dir,
)
from lorasb_ds.distributed import zero
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.files import SUMS_FILE

# All that a run writes into its folder, and --overwrite removes.
OUTPUTS = (
    DS_CONFIG_COPY,
    PEFT_COPY,
    METRICS,
    SAMPLES,
    ALIGNMENT,
    ALIGNMENT_PICTURE,
    "checkpoints",
    SUMS_FILE,
    "tensorboard",
    "tracking.json",
    "wandb",
    "basis.safetensors",
    "init.json",
    "init.png",
    "adapter",
    "adapter.tmp",
    "exported",
    "loss.png",
    PROFILE,
    PROFILE_ASIDE,
    REPORT,
    "run.json",  # last: what bears it is a run's folder
)


def say(text: str) -> None:
    """A line on rank 0's console."""
    if zero.rank() == 0:
        with suppress(OSError):  # a terminal that was closed ends no run
            print(f"lorasb: {text}", flush=True)


def _torn(folder: Path) -> list[str]:
    """Files of a run that was killed while it wrote them."""
    names = [f"{name}.tmp" for name in OUTPUTS]
    return [name for name in names if (folder / name).is_file()]


def make_output_dir(config: RunConfig, resumed: bool) -> Path:
    """Rank 0 makes the folder, without what an overwritten run left; all hear of it. Collective.

    Args:
        resumed: everything in it stays but the report.
    """
    name: list[str] = [""]
    if zero.rank() == 0:
        folder = Path(config.output_dir or default_output_dir(config))
        try:
            folder.mkdir(parents=True, exist_ok=config.output_dir is not None)
            for old in (REPORT,) if resumed else (*_torn(folder), *OUTPUTS):
                if (folder / old).is_dir():
                    shutil.rmtree(folder / old)
                else:
                    (folder / old).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"--output-dir {folder} cannot be written: {error}.") from error
        name = [str(folder)]
    dist.broadcast_object_list(name, src=0)
    return Path(name[0])

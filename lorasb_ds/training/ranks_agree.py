"""Before a run begins: whether its ranks hold the same run."""

from __future__ import annotations

import json
from typing import Any

import torch.distributed as dist

from lorasb_ds.distributed import zero
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.basis import PEFT_FILE_KEY
from lorasb_ds.training.prepare import Prepared


def check_ranks_agree(run: Prepared) -> None:
    """Refuse to start unless every rank has the same run and the same rows. Collective.

    Raises:
        ConfigError: on every rank alike, naming what differs.
    """
    held = {
        # ds_config is a path, which may differ between hosts; its content comes next.
        # The date matters where a template writes it: then it is in the rows.
        "the options": run.config.model_dump_json(exclude={"ds_config", "template_date"}),
        "the ds_config": json.dumps(run.ds_config, sort_keys=True),
        "the model's layers": json.dumps(run.base.shape.layers),
        "the training rows": run.data.train.digest,
        "the held-out rows": run.data.held_out.digest if run.data.held_out else "",
        "the rows for the init": run.data.init.digest,
        "the model's files": run.made_from["model files"],
        "the file of --method peft:": repr(run.adapter.peft) + run.made_from.get(PEFT_FILE_KEY, ""),
        "the basis": repr(run.stored_init),
        "the checkpoint": repr(run.resume),
    }
    all_held: list[Any] = [None] * zero.world_size()
    dist.all_gather_object(all_held, held)
    for rank, theirs in enumerate(all_held):
        differ = [what for what in held if theirs[what] != all_held[0][what]]
        if differ:
            raise ConfigError(
                f"Rank {rank} and rank 0 do not agree on {', '.join(differ)}. Every host must see "
                "the same files; and some tasks of reasoning-gym depend on Python's hash seed: set "
                "PYTHONHASHSEED=0 (`lorasb train` does)."
            )

"""What only a forward pass shows of a model: whether it can be trained as the run asks."""

from __future__ import annotations

from typing import Any

import torch

from lorasb_ds.adapters.passed_by import refuse_passed_by
from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.sequence_parallel import share_rows
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.classification import check_padding
from lorasb_ds.models.loss import check_loss_head, eval_mode
from lorasb_ds.models.packing import keeps_packs_apart
from lorasb_ds.models.sequence_parallel import check_pieces
from lorasb_ds.planner.footprint import LOGIT_BYTES
from lorasb_ds.runs.output_dir import say
from lorasb_ds.system.units import GIB
from lorasb_ds.training.prepare import Prepared
from lorasb_ds.training.training_run import Adapters, TrainingRun


def check_model(run: Prepared, model: Any, adapters: Adapters) -> None:
    """Refuse a model that a forward pass of a few tokens shows to be unfit. Collective.

    Raises:
        ConfigError: on every rank alike.
    """
    config = run.config
    with eval_mode(model), refuse_passed_by(model, adapters):
        few = torch.tensor([run.data.train.examples[0].input_ids[:16]], device=accelerator.device())
        if config.classifies:
            check_padding(model, few, run.base.tokenizer.pad_token_id)
        elif not check_loss_head(model, few):
            work = run.memory.workload
            gib = (
                work.micro_batch_size
                * work.num_labels
                * run.base.shape.vocab_size
                * LOGIT_BYTES
                / GIB
            )
            say(
                f"the loss of a {type(model).__name__} is made of all its logits at once, up to "
                f"{gib:.2f} GiB in training: its output head is of an unknown kind"
            )
        if config.sequence_parallel > 1:
            share_rows(model.config._attn_implementation, config.sequence_parallel)
            check_pieces(model, few, config.sequence_parallel)


def check_packs(training: TrainingRun) -> None:
    """Refuse to train if rows of one pack would see each other. Collective."""
    run = training.run
    examples = run.data.train.examples[:8]
    model = training.engine.module
    if not keeps_packs_apart(model, examples, accelerator.device(), one_row=run.one_row):
        raise ConfigError(
            f"--packing: rows of one pack see each other in a {type(model).__name__} with "
            f"attention {run.base.hf_config._attn_implementation}. Leave it out (rows of similar "
            "lengths are batched together anyway), or try another --attn-implementation."
        )

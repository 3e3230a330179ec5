"""Sequence classifiers: their head, the loss of rows, and what they predict."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from lorasb_ds.data.batch import Batch
from lorasb_ds.data.classification import Classes
from lorasb_ds.errors import ConfigError

NUMBER_NAME = "LABEL_0"  # as transformers calls an output that is a number
POOLER = "pooler"  # of the base model: BERT's layer before the head
# Of the largest logit: so much may padding change, in roundings of the dtype.
ROUNDINGS = 32


def set_classes(hf_config: Any, classes: Classes) -> None:
    """Write into a configuration what a classifier of it predicts."""
    names = classes.names or [NUMBER_NAME]
    hf_config.id2label = dict(enumerate(names))  # this also sets num_labels
    hf_config.label2id = {label: i for i, label in enumerate(names)}
    is_number = classes.is_regression
    hf_config.problem_type = "regression" if is_number else "single_label_classification"


def is_classifier(model: nn.Module) -> bool:
    """Return whether a model of transformers has a head that classifies sequences."""
    return type(model).__name__.endswith("ForSequenceClassification")


def head_modules(model: Any) -> list[str]:
    """Return the modules of a classification head: all outside the base model, and its pooler.

    They are trained whole, and get no adapter; PEFT calls them ``modules_to_save``.

    Returns:
        Names in the model's order; [] for a model without such a head.
    """
    if not is_classifier(model):
        return []
    prefix = model.base_model_prefix
    children = ((name, m) for name, m in model.named_children() if name != prefix)
    outside = [name for name, module in children if any(True for _ in module.parameters())]
    pooler = getattr(model.base_model, POOLER, None)
    return [*([] if pooler is None else [f"{prefix}.{POOLER}"]), *outside]


def head_parameters(model: Any) -> list[str]:
    """Return the names of a classification head's parameters; [] without one."""
    prefixes = tuple(f"{name}." for name in head_modules(model))
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


def train_head(model: nn.Module, names: Sequence[str]) -> None:
    """Let the head's parameters be trained, where all others are frozen."""
    for name in names:
        model.get_parameter(name).requires_grad_(True)


def new_parameter(
    name: str, shape: torch.Size, dtype: torch.dtype, std: float, seed: int
) -> torch.Tensor:
    """Return a new parameter of a head: the same for the same seed, on any rank.

    Matrices are normal, biases 0, and the weights of norms 1: as encoders begin, whatever the
    family.
    """
    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    return (torch.randn(shape, generator=generator) * std).to(dtype)


def row_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of each row: cross-entropy, or the squared error of numbers; (rows,), fp32.

    Args:
        logits: (rows, classes), or (rows, 1) for numbers.
        targets: (rows,), int64 for classes, floating for numbers.
    """
    logits = logits.float()
    if targets.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), targets, reduction="none")
    return F.cross_entropy(logits, targets, reduction="none")


def row_loss_sum(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the sum of ``row_losses`` of a batch; 0 for one without weight.

    Collective under ZeRO-3.
    """
    assert batch.targets is not None, "the rows of a classifier have targets"
    total = row_losses(model(**batch.inputs).logits, batch.targets).sum()
    return total if batch.num_label_tokens else 0 * total


class Predictions(NamedTuple):
    """What a model predicts of rows, of all ranks together.

    Attributes:
        logits: (rows, classes), or (rows, 1) for numbers; fp32.
        targets: (rows,).
        loss: the mean of ``row_losses``.
    """

    logits: np.ndarray
    targets: np.ndarray
    loss: float


@torch.no_grad()
def predict(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> Predictions:
    """Return the predictions of rows, on every rank alike. Collective if there is a process group.

    Args:
        model: in eval mode.
        batches: this rank's; every rank has as many.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for batch in batches:
        assert batch.targets is not None, "the rows of a classifier have targets"
        logits = model(**batch.to(device).inputs).logits.float().cpu()
        if batch.num_label_tokens:
            found.append((logits.numpy(), batch.targets.numpy()))
    of_ranks: list[Any] = [found]
    if dist.is_initialized():
        of_ranks = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, found)
    pairs = [pair for of_rank in of_ranks for pair in of_rank]
    logits, targets = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    losses = row_losses(torch.from_numpy(logits), torch.from_numpy(targets))
    return Predictions(logits, targets, losses.double().mean().item())


@torch.no_grad()
def check_padding(model: Any, input_ids: torch.Tensor, pad_token_id: int) -> None:
    """Refuse a model in which padding changes a row's logits. Collective.

    A decoder that classifies by a row's last token must find it before the padding.

    Args:
        model: in eval mode.
        input_ids: (1, length), a row's tokens.
    Raises:
        ConfigError: on every rank alike.
    """
    padded = F.pad(input_ids, (0, 3), value=pad_token_id).repeat(2, 1)
    mask = torch.zeros_like(padded)
    mask[:, : input_ids.shape[1]] = 1
    alone = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits.float()
    among = model(input_ids=padded, attention_mask=mask).logits.float()
    changed = (alone - among).abs().max()
    limit = ROUNDINGS * torch.finfo(model.dtype).eps * alone.abs().max().clamp(min=1)
    found = torch.stack([(changed > limit).float(), changed])
    if dist.is_initialized():  # all raise or none: the others would wait
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    is_changed, most = found.tolist()
    if is_changed:
        raise ConfigError(
            f"--task-type sequence-classification: the logits of a {type(model).__name__} depend "
            f"on padding (they change by {most:.2g}), so that a row's loss would depend "
            "on the rows beside it. Give another model."
        )

"""Gradients of one group of layers after the other, at the cost of one more forward pass in all.

A pass over the whole model for every group would cost as many passes as there are groups. Instead
the model is cut where groups meet, between decoder blocks. One forward pass stores what enters each
segment and the gradient at the last block's output; then segments are done from the last to the
first: each is run again from its stored input, and hands the gradient at its input down. Bits are
those of a whole pass, since autograd, too, hands on between blocks just that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.data.batch import Batch
from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.collectives import Group
from lorasb_ds.init.gradients import GradientShards, branches_off, no_dropout, taps
from lorasb_ds.models.loss import token_loss_sum
from lorasb_ds.planner.init_plan import block_of

# What a segment gives on its second run may differ from the first by this share: some kernels of
# GPUs add in no fixed order. A block that depends on more than its input is off by far more.
REPLAY_TOLERANCE = 1e-2


class SegmentError(Exception):
    """The model cannot be run in segments. Raised on every rank alike, before any gradient."""


@dataclass(frozen=True)
class Segment:
    """Blocks ``first`` to ``last``, and the layers in them whose gradients are wanted."""

    first: int
    last: int
    names: tuple[str, ...]


def cut(groups: Sequence[Sequence[str]], prefix: str, num_blocks: int) -> list[Segment]:
    """Segments of the groups, from the model's end to its beginning.

    A segment reaches up to the one above it. Groups within one block share its segment.

    Args:
        groups: names of layers in the model's order; a block's layers are in one group, or in
            groups that hold no other block's.
        prefix: what comes before a block's number in those names.
    """
    segments: list[Segment] = []
    for names in reversed(groups):
        first = min(block_of(name, prefix) for name in names)
        if segments and segments[-1].first == first:
            last = segments[-1].last
        else:
            last = segments[-1].first - 1 if segments else num_blocks - 1
        segments.append(Segment(first, last, tuple(names)))
    return segments


def gradients_by_segment(
    model: PreTrainedModel,
    adapters: Mapping[str, AdapterLinear],
    groups: Sequence[Sequence[str]],
    prefix: str,
    batches: Sequence[Batch],
    num_label_tokens: int,
    group: Group = None,
    offload: bool = False,
) -> Iterator[GradientShards]:
    """``average_gradients`` of every group, from the model's last layers to its first. Collective.

    Between two of them the caller may use the model's parameters, but not run it in another mode.

    Args:
        groups, prefix: see ``cut``; ``prefix`` without its dot names the blocks' ModuleList.
        offload: keep gradient shards and what is stored between blocks in host memory.
    Yields:
        The group's shards.
    Raises:
        SegmentError: if a block's output depends on more than its input and its other arguments, or
            a block is used more than once. Groups that were not yielded are not done.
    """
    blocks = model.get_submodule(prefix.rstrip("."))
    if not isinstance(blocks, nn.ModuleList):
        raise SegmentError(f"{prefix.rstrip('.')} is no list of blocks")
    uses = Counter(module for block in blocks for module in block.modules())
    if shared := [name for name, adapter in adapters.items() if uses[adapter] != 1]:
        raise SegmentError(f"{shared[0]} is not in one block alone")
    segments = cut(groups, prefix, len(blocks))
    keep = torch.device("cpu") if offload else accelerator.device()
    with branches_off(adapters), no_dropout(model):
        starts = {segment.first for segment in segments if segment.first > 0}
        inputs, output_grads, widths, loss_sum = _first_pass(model, blocks, starts, batches, keep)
        dist.all_reduce(loss_sum, group=group)
        for i, segment in enumerate(segments):
            wanted = {name: adapters[name] for name in segment.names}
            shards = GradientShards(wanted, group, offload)
            shards.of_segment = True
            with taps(wanted, shards):
                input_grads = [
                    _replay(
                        model, blocks, segment, batch, number, inputs, output_grads, widths, shards
                    )
                    for number, batch in enumerate(batches)
                ]
            shards.finish(loss_sum.item(), num_label_tokens)
            if i + 1 < len(segments) and segments[i + 1].last != segment.last:
                output_grads = [grad for grad in input_grads if grad is not None]
                del inputs[segment.last + 1]  # was kept to compare with
            yield shards


class _Stage(nn.Module):
    """Stands in a block's place: runs it or passes its input on, and may exchange both ends."""

    def __init__(self, block: nn.Module, width: int | None) -> None:
        """
        Args:
            width: how many values the block returns as a tuple, of which the first goes on to the
                next block; None: it returns just that one.
        """
        super().__init__()
        self._block = (block,)  # in a tuple: not a module of this one
        self.width = width
        self.run = True
        self.runs = 0
        self.enter: Any = lambda hidden_states: hidden_states
        self.leave: Any = lambda hidden_states: hidden_states

    def __getattr__(self, name: str) -> Any:
        # Models look at attributes of their blocks, such as attention_type.
        return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden_states = self.enter(hidden_states)
        if not self.run:
            rest = (None,) * ((self.width or 1) - 1)
            return hidden_states if self.width is None else (hidden_states, *rest)
        self.runs += 1
        output = self._block[0](hidden_states, *args, **kwargs)
        if not isinstance(output, tuple):
            return self.leave(output)
        self.width = len(output)
        return (self.leave(output[0]), *output[1:])


@contextmanager
def _stages(blocks: nn.ModuleList, widths: Sequence[int | None]) -> Iterator[list[_Stage]]:
    """Stages in the place of all blocks, meanwhile."""
    originals = list(blocks)
    stages = [_Stage(block, width) for block, width in zip(originals, widths, strict=True)]
    for i, stage in enumerate(stages):
        blocks[i] = stage
    try:
        yield stages
    finally:
        for i, block in enumerate(originals):
            blocks[i] = block


def _first_pass(
    model: nn.Module,
    blocks: nn.ModuleList,
    starts: set[int],
    batches: Sequence[Batch],
    keep: torch.device,
) -> tuple[dict[int, list[torch.Tensor]], list[torch.Tensor], list[int | None], torch.Tensor]:
    """What enters the blocks ``starts``, and the gradient of the summed loss at the last block's
    output, both for every batch; how blocks return their output; and this rank's loss, summed."""
    inputs: dict[int, list[torch.Tensor]] = {start: [] for start in starts}
    output_grads, ends = [], []
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device())

    def record(start: int, hidden_states: torch.Tensor) -> torch.Tensor:
        inputs[start].append(hidden_states.detach().to(keep))
        return hidden_states

    def end(hidden_states: torch.Tensor) -> torch.Tensor:
        # The first batch's is compared with the last segment's.
        inputs.setdefault(len(blocks), [hidden_states.detach().to(keep)])
        ends.append(hidden_states.detach().requires_grad_())
        return ends[-1]

    with _stages(blocks, [None] * len(blocks)) as stages:
        for start in starts:
            stages[start].enter = partial(record, start)
        stages[-1].leave = end
        for batch in batches:
            loss = token_loss_sum(model, batch)
            if any(stage.runs != 1 for stage in stages):
                raise SegmentError("its blocks are not called once each")
            for stage in stages:
                stage.runs = 0
            loss.backward()  # of the sum: see GradientShards.finish
            loss_sum += loss.detach().double()
            grad = ends.pop().grad
            assert grad is not None
            output_grads.append(grad.to(keep))
    return inputs, output_grads, [stage.width for stage in stages], loss_sum


def _replay(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    segment: Segment,
    batch: Batch,
    number: int,
    inputs: Mapping[int, Sequence[torch.Tensor]],
    output_grads: Sequence[torch.Tensor],
    widths: Sequence[int | None],
    shards: GradientShards,
) -> torch.Tensor | None:
    """Forward and backward of one segment for one batch; the gradient at its input."""
    device = batch.input_ids.device
    start: torch.Tensor | None = None
    if segment.first > 0:
        start = inputs[segment.first][number].to(device).detach().requires_grad_()
    outputs: list[torch.Tensor] = []

    def begin(_: torch.Tensor) -> torch.Tensor:
        assert start is not None
        return start

    def end(hidden_states: torch.Tensor) -> torch.Tensor:
        outputs.append(hidden_states)
        return hidden_states.detach()

    with _stages(blocks, widths) as stages:
        for i, stage in enumerate(stages):
            stage.run = segment.first <= i <= segment.last
        if start is not None:
            stages[segment.first].enter = begin
        stages[segment.last].leave = end
        try:
            model.base_model(**batch.inputs, use_cache=False)  # without the head
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # Blocks that look for what others left behind do not find it.
            raise SegmentError(f"blocks {segment.first} to {segment.last}: {error!r}") from error
    output = outputs.pop()
    if number == 0:
        _check(output, inputs[segment.last + 1][number].to(device), segment)
    shards.after_forward(batch.num_label_tokens > 0)
    if output.requires_grad:
        output.backward(output_grads[number].to(device))
    shards.after_backward()
    if start is None:
        return None
    grad = start.grad if start.grad is not None else torch.zeros_like(start)
    return grad.to(inputs[segment.first][number].device)


def _check(found: torch.Tensor, expected: torch.Tensor, segment: Segment) -> None:
    error = torch.linalg.vector_norm(found.detach().float() - expected.float())
    if not error <= REPLAY_TOLERANCE * torch.linalg.vector_norm(expected.float()):
        raise SegmentError(
            f"blocks {segment.first} to {segment.last} do not give the same output for the same "
            "input: they depend on what other blocks leave behind"
        )

"""Gradients of one group of layers after the other, for one additional forward pass in total.

Running the whole model for every group would cost as many passes as there are groups. Instead the
model is cut into segments, between decoder blocks where groups meet. One pass stores each segment's
input and the gradient at the last block's output. Then the segments are run again from the last to
the first, each forward from its stored input and backward to the gradient at that input, from which
the next one starts. The bits are those of a whole pass, since between blocks autograd passes on
nothing but this gradient.
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

from lorasb_ds.adapters.inject import disable_adapters, freeze_factors
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.data.batch import Batch
from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.collectives import Group
from lorasb_ds.init.gradient_shards import GradientShards
from lorasb_ds.init.gradients import gradient_hooks, no_dropout
from lorasb_ds.models.loss import token_loss_sum
from lorasb_ds.planner.layer_groups import LayerGroup, Segment, cut_segments

# The relative error that a segment's output may have on its second run: some GPU kernels add in no
# fixed order. A block that depends on more than its input is off by far more.
REPLAY_TOLERANCE = 1e-2


class SegmentError(Exception):
    """The model cannot be run in segments. Raised on every rank alike, before any gradient."""


def gradients_by_segment(
    model: PreTrainedModel,
    adapters: Mapping[str, AdapterLinear],
    groups: Sequence[LayerGroup],
    prefix: str,
    batches: Sequence[Batch],
    num_label_tokens: int,
    group: Group = None,
    offload: bool = False,
) -> Iterator[GradientShards]:
    """Yield every group's ``average_gradients``, from the model's end to its beginning. Collective.

    While it is suspended, adapters stay disabled and dropout stays 0: the caller may use the
    model's parameters, but not run it in another mode.

    Args:
        groups, prefix: as for ``cut_segments``; ``prefix`` without its dot names the ModuleList of
            blocks.
        offload: keep gradient shards and what is stored between blocks in host memory.
    Yields:
        The group's shards.
    Raises:
        SegmentError: if a block's output depends on more than its arguments, or a block is used
            more than once. The groups not yet yielded are still to be done.
    """
    blocks = model.get_submodule(prefix.rstrip("."))
    if not isinstance(blocks, nn.ModuleList):
        raise SegmentError(f"{prefix.rstrip('.')} is not a list of blocks")
    uses = Counter(module for block in blocks for module in block.modules())
    if shared := [name for name, adapter in adapters.items() if uses[adapter] != 1]:
        raise SegmentError(f"{shared[0]} is not in exactly one block")
    segments = cut_segments(groups, prefix, len(blocks))
    keep = torch.device("cpu") if offload else accelerator.device()
    with disable_adapters(adapters), freeze_factors(model), no_dropout(model):
        starts = {segment.first for segment in segments if segment.first > 0}
        stored = _first_pass(model, blocks, starts, batches, keep)
        dist.all_reduce(stored.loss_sum, group=group)
        for i, segment in enumerate(segments):
            wanted = {name: adapters[name] for name in segment.layers}
            shards = GradientShards(wanted, group, offload, segment.layers)
            shards.from_segment = True
            with gradient_hooks(wanted, shards):
                input_grads = [
                    _replay(model, blocks, segment, batch, number, stored, shards)
                    for number, batch in enumerate(batches)
                ]
            shards.finish(stored.loss_sum.item(), num_label_tokens)
            if i + 1 < len(segments) and segments[i + 1].last != segment.last:
                stored.output_grads = [grad for grad in input_grads if grad is not None]
                del stored.inputs[segment.last + 1]  # was kept for the comparison
            yield shards


class _BlockProxy(nn.Module):
    """Replaces a block: runs it or skips it, and can replace its input and output."""

    def __init__(self, block: nn.Module, width: int | None) -> None:
        """
        Args:
            width: the length of the tuple that the block returns, whose first value is the next
                block's input; None: it returns that value alone.
        """
        super().__init__()
        self._block = (block,)  # in a tuple, so that it is not a submodule
        self.width = width
        self.run = True
        self.runs = 0
        self.on_input: Any = lambda hidden_states: hidden_states
        self.on_output: Any = lambda hidden_states: hidden_states

    def __getattr__(self, name: str) -> Any:
        # Models look at attributes of their blocks, such as attention_type.
        return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden_states = self.on_input(hidden_states)
        if not self.run:
            rest = (None,) * ((self.width or 1) - 1)
            return hidden_states if self.width is None else (hidden_states, *rest)
        self.runs += 1
        output = self._block[0](hidden_states, *args, **kwargs)
        if not isinstance(output, tuple):
            return self.on_output(output)
        self.width = len(output)
        return (self.on_output(output[0]), *output[1:])


@contextmanager
def _proxies(blocks: nn.ModuleList, widths: Sequence[int | None]) -> Iterator[list[_BlockProxy]]:
    """Replace all blocks by proxies inside the ``with`` block."""
    originals = list(blocks)
    proxies = [_BlockProxy(block, width) for block, width in zip(originals, widths, strict=True)]
    for i, proxy in enumerate(proxies):
        blocks[i] = proxy
    try:
        yield proxies
    finally:
        for i, block in enumerate(originals):
            blocks[i] = block


@dataclass
class _Stored:
    """What is kept between the runs of segments.

    Attributes:
        inputs: block -> its input for each batch; number of blocks -> the last block's output for
            the first batch. Segments are checked against the input of the block after them.
        output_grads: for each batch the gradient of the summed loss at the next segment's output.
        widths: how each block returns its output, see ``_BlockProxy``.
        loss_sum: the summed loss, fp64.
    """

    inputs: dict[int, list[torch.Tensor]]
    output_grads: list[torch.Tensor]
    widths: list[int | None]
    loss_sum: torch.Tensor


def _first_pass(
    model: nn.Module,
    blocks: nn.ModuleList,
    starts: set[int],
    batches: Sequence[Batch],
    keep: torch.device,
) -> _Stored:
    """Run every batch forward, and backward down to the last block's output. Not collective.

    Args:
        starts: the blocks whose inputs are stored.
        keep: the device to store on.
    """
    inputs: dict[int, list[torch.Tensor]] = {start: [] for start in starts}
    output_grads, ends = [], []
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device())

    def record(start: int, hidden_states: torch.Tensor) -> torch.Tensor:
        inputs[start].append(hidden_states.detach().to(keep))
        return hidden_states

    def end(hidden_states: torch.Tensor) -> torch.Tensor:
        # Kept for the first batch only: the last segment's output is compared with it.
        inputs.setdefault(len(blocks), [hidden_states.detach().to(keep)])
        ends.append(hidden_states.detach().requires_grad_())
        return ends[-1]

    with _proxies(blocks, [None] * len(blocks)) as proxies:
        for start in starts:
            proxies[start].on_input = partial(record, start)
        proxies[-1].on_output = end
        for batch in batches:
            loss = token_loss_sum(model, batch)
            if any(proxy.runs != 1 for proxy in proxies):
                raise SegmentError("its blocks are not called once each")
            for proxy in proxies:
                proxy.runs = 0
            loss.backward()  # of the sum: see GradientShards.finish
            loss_sum += loss.detach().double()
            grad = ends.pop().grad
            assert grad is not None
            output_grads.append(grad.to(keep))
    return _Stored(inputs, output_grads, [proxy.width for proxy in proxies], loss_sum)


def _replay(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    segment: Segment,
    batch: Batch,
    number: int,
    stored: _Stored,
    shards: GradientShards,
) -> torch.Tensor | None:
    """Run one segment forward and backward for one batch. Collective.

    Args:
        number: of the batch.
    Returns:
        The gradient at the segment's input; None for the first segment of the model.
    """
    device = batch.input_ids.device
    start: torch.Tensor | None = None
    if segment.first > 0:
        start = stored.inputs[segment.first][number].to(device).detach().requires_grad_()
    outputs: list[torch.Tensor] = []

    def begin(_: torch.Tensor) -> torch.Tensor:
        assert start is not None
        return start

    def end(hidden_states: torch.Tensor) -> torch.Tensor:
        outputs.append(hidden_states)
        return hidden_states.detach()

    with _proxies(blocks, stored.widths) as proxies:
        for i, proxy in enumerate(proxies):
            proxy.run = segment.first <= i <= segment.last
        if start is not None:
            proxies[segment.first].on_input = begin
        proxies[segment.last].on_output = end
        try:
            model.base_model(**batch.inputs, use_cache=False)  # without the head
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # A block needs something that a skipped block would have left behind.
            raise SegmentError(f"blocks {segment.first} to {segment.last}: {error!r}") from error
    output = outputs.pop()
    if number == 0:
        _check(output, stored.inputs[segment.last + 1][number].to(device), segment)
    shards.after_forward(batch.num_label_tokens > 0)
    if output.requires_grad:
        output.backward(stored.output_grads[number].to(device))
    shards.after_backward()
    if start is None:
        return None
    grad = start.grad if start.grad is not None else torch.zeros_like(start)
    return grad.to(stored.inputs[segment.first][number].device)


def _check(found: torch.Tensor, expected: torch.Tensor, segment: Segment) -> None:
    error = torch.linalg.vector_norm(found.detach().float() - expected.float())
    if not error <= REPLAY_TOLERANCE * torch.linalg.vector_norm(expected.float()):
        raise SegmentError(
            f"blocks {segment.first} to {segment.last} do not give the same output for the same "
            "input: they depend on what other blocks leave behind"
        )

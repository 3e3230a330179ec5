"""What ranks send each other for the init's gradients.

On CPUs a collective is waited for once the next one has been started, while the backward pass goes
on: the buffers of two are held at a time. On accelerators the stream waits for each: DeepSpeed
gathers on a group of its own, and NCCL asks that one group's work is waited for before another's
begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.collectives import Group


class Exchange:
    """Collectives of one group that run asynchronously, each with what to do with its result.

    Every method is collective: ranks call them in the same order.

    Attributes:
        waiting: the time that was spent waiting for results.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.waiting = accelerator.Stopwatch()
        self._most_running = 1 if accelerator.name() == "cpu" else 0
        # What is sent must live until it has been.
        self._running: deque[tuple[Any, Callable[[], None], torch.Tensor]] = deque()

    def reduce_scatter(self, parts: torch.Tensor, then: Callable[[torch.Tensor], None]) -> None:
        """Sum rows over ranks; ``then`` is given the sums of this rank's part of them.

        Args:
            parts: (ranks x rows, …), contiguous: each rank's rows, in rank order.
        """
        found = parts.new_empty(len(parts) // self.world_size, *parts.shape[1:])
        work = dist.reduce_scatter_tensor(found, parts, group=self.group, async_op=True)
        self._start(work, lambda: then(found), parts)

    def reduce(self, block: torch.Tensor, owner: int, then: Callable[[torch.Tensor], None]) -> None:
        """Sum a tensor over ranks in place; ``then`` is given it on the group's rank ``owner``."""
        work = dist.reduce(block, group=self.group, group_dst=owner, async_op=True)
        self._start(work, lambda: then(block) if owner == self.rank else None, block)

    def all_gather(self, mine: torch.Tensor, then: Callable[[torch.Tensor], None]) -> None:
        """Give every rank the rows of all: ``then`` is given them in rank order.

        Args:
            mine: (rows, …), contiguous, of one shape and dtype on all ranks.
        """
        found = mine.new_empty(self.world_size * len(mine), *mine.shape[1:])
        work = dist.all_gather_into_tensor(found, mine, group=self.group, async_op=True)
        self._start(work, lambda: then(found), mine)

    def all_to_all(
        self,
        rows: torch.Tensor,
        sent: Sequence[int],
        received: Sequence[int],
        then: Callable[[torch.Tensor], None],
    ) -> None:
        """Send each rank some rows; ``then`` is given those from all ranks, in rank order.

        Args:
            rows: (rows, …), contiguous, in the order of the ranks that they are for.
            sent, received: how many go to each rank, and come from it.
        """
        found = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            found, rows, list(received), list(sent), group=self.group, async_op=True
        )
        self._start(work, lambda: then(found), rows)

    def wait(self) -> None:
        """Wait for everything that runs."""
        while self._running:
            self._finish_oldest()

    def _start(self, work: Any, then: Callable[[], None], sent: torch.Tensor) -> None:
        self._running.append((work, then, sent))
        if len(self._running) > self._most_running:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        work, then, _ = self._running.popleft()
        with self.waiting:
            work.wait()
        then()

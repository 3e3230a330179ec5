"""Which layers a batch calls in its forward pass, and what ranks must agree on before gradients."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.collectives import Group, rank_and_size
from lorasb_ds.models.experts import Routing


class Calls:
    """The calls of the running batch.

    Attributes:
        counts: layer -> how often this rank has called it; set by ``agree``, as the others are.
        rows: layer -> the most rows of a call, on any rank.
        uneven: the layers that ranks do not call alike.
        ends: projection of experts that is called once -> (ranks, wanted experts + 1), in host
            memory: where each rank's rows of the first one begin, and those of each end.
    """

    def __init__(self, layers: Iterable[str], experts: Mapping[str, range], group: Group) -> None:
        """
        Args:
            experts: projection of experts -> those whose gradients are wanted.
        """
        self.layers, self.experts, self.group = list(layers), experts, group
        self.clear()

    def clear(self) -> None:
        """Forget the batch."""
        self._order: list[str] = []
        self._routings: dict[str, Routing] = {}
        self.counts: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.uneven: set[str] = set()
        self.ends: dict[str, torch.Tensor] = {}

    def add(self, name: str, x: torch.Tensor, routing: Routing | None = None) -> None:
        """Note that the running forward pass calls a layer with x (…, in)."""
        self._order.append(name)
        self.rows[name] = max(self.rows[name], x.numel() // x.shape[-1])
        if routing is not None:
            self._routings[name] = routing

    def agree(self) -> None:
        """Compare with the other ranks' calls. Collective, after the forward pass.

        Communication: one all-reduce of 3 integers for each layer, and 3 more; an all-gather of one
        for each expert.
        """
        self.counts = Counter(self._order)
        if rank_and_size(self.group)[1] == 1:
            return
        order = zlib.crc32(" ".join(self._order).encode())
        mine = [self.counts[name] for name in self.layers] + [order]
        rows = [self.rows[name] for name in self.layers] + [0]
        bounds = accelerator.from_host([mine, [-n for n in mine], rows])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.group)
        largest, negated, rows = bounds.tolist()
        *differ, other_order = (a + b != 0 for a, b in zip(largest, negated, strict=True))
        for name, differs, most in zip(self.layers, differ, rows[:-1], strict=True):
            self.rows[name] = most
            if differs or (other_order and self.counts[name]):
                self.uneven.add(name)
        # A projection that is called again has another routing then.
        once = [n for n in self.experts if self.counts[n] == 1 and n not in self.uneven]
        if once:
            self._gather_ends(once)

    def _gather_ends(self, names: Sequence[str]) -> None:
        """Find where the rows of each expert end on every rank. Collective."""
        offsets = [self._routings[name].offsets for name in names]
        mine, ranks = torch.cat(offsets), rank_and_size(self.group)[1]
        of_ranks = mine.new_empty(ranks * len(mine))
        dist.all_gather_into_tensor(of_ranks, mine, group=self.group)
        tables = of_ranks.view(ranks, -1).cpu().split([len(of) for of in offsets], 1)
        for name, ends in zip(names, tables, strict=True):
            wanted = self.experts[name]
            self.ends[name] = F.pad(ends, (1, 0))[:, wanted.start : wanted.stop + 1]

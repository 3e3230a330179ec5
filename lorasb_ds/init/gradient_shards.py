"""Every layer's average gradient as row shards, exchanged layer by layer in the backward pass.

The weight gradient ``dL/dW = δᵀ x`` of a layer's input x and output gradient δ is summed over ranks
into row shards. Ranks send each other what takes fewer bytes: their sums in fp32, or x and δ, of
which each rank then computes its own rows for all tokens (``sends_activations``).

Experts of MoE blocks are not divided: each expert's gradient goes whole to one rank, which also
decomposes it; as sums, or as the rows of x and δ that the expert got.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lorasb_ds.adapters.experts import LoraSBExperts
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.collectives import Group, row_range
from lorasb_ds.init.calls import Calls
from lorasb_ds.init.exchange import Exchange
from lorasb_ds.init.products import weight_gradient
from lorasb_ds.models.experts import Routing
from lorasb_ds.planner.init_bytes import EXCHANGE_BYTES, FP32_BYTES, sends_activations
from lorasb_ds.planner.layer_groups import LayerGroup


def is_transposed(out_features: int, in_features: int) -> bool:
    """Return whether a layer's gradient is kept transposed: rows are along the longer side."""
    return in_features > out_features


def gradient_shape(adapter: AdapterLinear) -> tuple[int, ...]:
    """Return (long side, short side) of a layer's gradient; of experts with their number first."""
    sides = (adapter.out_features, adapter.in_features)
    experts = (adapter.num_matrices,) if isinstance(adapter, LoraSBExperts) else ()
    return (*experts, max(sides), min(sides))


class GradientShards:
    """This rank's part of every layer's gradient, summed over calls, batches and ranks.

    A layer that is called several times in a forward pass adds every call's part. Layers that
    share a weight each have their own part of its gradient, as each has its own adapter.

    Attributes:
        shards: layer -> (rows here, short side), fp32: rows of G (out, in) if out >= in, else of
            Gᵀ, in the range of ``row_range``; of experts (experts here, long side, short side), in
            the ``row_range`` of the wanted ones. Sums over label tokens; means after ``finish``.
        experts: projection of experts -> the experts whose gradients are wanted.
        tokens: projection of experts -> (wanted experts,), how many tokens gave each a gradient
            that is not 0; over all ranks after ``finish``.
        batches_reached: layer -> number of micro-batches with a label that called it, over all
            ranks after ``finish``.
        loss: of the whole sample, per label token, at the base; set by ``finish``.
        calls: of the running batch.
        exchange: of gradients with the other ranks.
        from_segment: whether only a segment of the model was run for these gradients.
    """

    from_segment = False

    def __init__(
        self,
        adapters: Mapping[str, AdapterLinear],
        group: Group = None,
        offload: bool = False,
        layers: LayerGroup | None = None,
    ) -> None:
        """
        Args:
            adapters: the layers whose gradients are wanted, by name.
            offload: keep the shards in host memory, pinned unless the device is the CPU.
            layers: those of ``adapters``, and the experts that are wanted; by default all.
        """
        self.group = group
        self.exchange = Exchange(group)
        self.rank, self.world_size = self.exchange.rank, self.exchange.world_size
        self.shards: dict[str, torch.Tensor] = {}
        self.batches_reached: Counter[str] = Counter()
        self._uneven: dict[str, torch.Tensor] = {}  # whole gradients of the running batch
        self.experts: dict[str, range] = {}
        self.tokens: dict[str, torch.Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, adapter in adapters.items():
            length, *rest = gradient_shape(adapter)
            if isinstance(adapter, LoraSBExperts):
                wanted = (layers or {}).get(name)
                self.experts[name] = range(length) if wanted is None else wanted
                length = len(self.experts[name])
                self.tokens[name] = torch.zeros(
                    length, dtype=torch.int64, device=accelerator.device()
                )
            self._shapes[name] = (length, *rest)
            shape = (len(row_range(length, self.rank, self.world_size)), *rest)
            self.shards[name] = (
                accelerator.pinned_zeros(*shape)
                if offload
                else torch.zeros(shape, device=accelerator.device())
            )

        self.calls = Calls(self.shards, self.experts, group)

    def take(self, name: str) -> torch.Tensor:
        """Remove a layer's shard and return it, on the device."""
        return self.shards.pop(name).to(accelerator.device())

    def after_forward(self, has_labels: bool) -> None:
        """Find the layers that this batch called, and the rows of all ranks. Collective.

        Usually all ranks call a layer equally often and in the same order. Where they do not (the
        data decide, as in an MoE), this batch's gradient of the layer is summed whole on each rank,
        since ranks could not exchange it during the backward pass.

        Communication: that of ``Calls.agree``.
        """
        self.calls.agree()
        self.batches_reached.update({name: 1 for name in self.calls.counts if has_labels})
        for name in self.calls.uneven:
            self._uneven[name] = torch.zeros(self._shapes[name], device=accelerator.device())

    def add(self, name: str, x: torch.Tensor, grad_y: torch.Tensor) -> None:
        """Add one call's ``δᵀ x``. Collective: ranks add the same layers in the same order.

        Args:
            x: (…, in), any floating dtype.
            grad_y: (…, out), δ.
        Communication: an all-gather of x and δ; or a reduce-scatter of the sums, in pieces of
            ``EXCHANGE_BYTES``.
        """
        long, short = _long_and_short(x.flatten(0, -2), grad_y.flatten(0, -2))
        if name in self._uneven:
            self._uneven[name] += weight_gradient(long, short)
        elif self.world_size == 1:
            self._add(name, 0, weight_gradient(long, short))
        elif _sends_rows(self.world_size * self.calls.rows[name], long, short, 1):
            self._gather_rows(name, long, short)
        else:
            self._scatter_sums(name, long, short)

    def _gather_rows(self, name: str, long: torch.Tensor, short: torch.Tensor) -> None:
        """Send x and δ to all ranks, and compute this rank's rows for all tokens. Collective."""
        (tokens, width), most = long.shape, self.calls.rows[name]
        mine = row_range(width, self.rank, self.world_size)
        both = torch.cat([long, short], 1)
        if tokens < most:  # than another rank's; zeros add nothing
            both = F.pad(both, (0, 0, 0, most - tokens))

        def add(found: torch.Tensor) -> None:
            long, short = found[:, mine.start : mine.stop], found[:, width:]
            self._add(name, 0, weight_gradient(long, short))

        self.exchange.all_gather(both, add)

    def _scatter_sums(self, name: str, long: torch.Tensor, short: torch.Tensor) -> None:
        """Compute the gradient for this rank's tokens, and sum it over ranks. Collective."""
        owners, ranks = self._owners(long.shape[1]), self.world_size
        most, mine = max(map(len, owners)), len(owners[self.rank])
        if most * ranks == long.shape[1]:
            of_ranks = long.unflatten(1, (ranks, most))
        else:
            columns = [long[:, of.start : of.stop] for of in owners]
            of_ranks = torch.stack([F.pad(of, (0, most - of.shape[1])) for of in columns], 1)
        at_once = max(1, EXCHANGE_BYTES // (FP32_BYTES * ranks * short.shape[1]))
        for first in range(0, most, at_once):
            sums = weight_gradient(of_ranks[:, :, first : first + at_once].flatten(1), short)

            def add(found: torch.Tensor, first: int = first) -> None:
                self._add(name, first, found[: max(0, mine - first)])

            self.exchange.reduce_scatter(sums, add)

    def add_experts(
        self, name: str, x: torch.Tensor, grad_y: torch.Tensor, routing: Routing
    ) -> None:
        """Add one call's ``δᵀ x`` of the rows of every wanted expert. Collective, as ``add``.

        Args:
            x, grad_y: (rows, in) and (rows, out), sorted by expert.
        Communication: an all-to-all of the rows of x and δ; or one reduce of the sums for each
            ``EXCHANGE_BYTES``.
        """
        wanted = self.experts[name]
        upto = F.pad(grad_y.any(1).cumsum(0), (1, 0))  # rows with a gradient
        tokens = upto.index_select(0, F.pad(routing.offsets, (1, 0))).diff()
        self.tokens[name] += tokens[wanted.start : wanted.stop]
        long, short = _long_and_short(x, grad_y)
        of_ranks = self.calls.ends.get(name)
        if of_ranks is None:
            ends = [0, *routing.ends][wanted.start : wanted.stop + 1]
        else:
            ends = of_ranks[self.rank].tolist()
        if name in self._uneven:
            _add_products(self._uneven[name], long, short, ends)
        elif self.world_size == 1:
            _add_products(self.shards[name], long, short, ends)
        elif of_ranks is not None and _sends_rows(
            self._most_received(of_ranks), long, short, len(wanted)
        ):
            self._send_rows(name, long, short, of_ranks)
        else:
            self._reduce_sums(name, long, short, ends)

    def _send_rows(
        self, name: str, long: torch.Tensor, short: torch.Tensor, of_ranks: torch.Tensor
    ) -> None:
        """Send each row of x and δ to the rank of its expert. Collective.

        Args:
            of_ranks: ``Calls.ends`` of the projection.
        """
        ends, width = of_ranks[self.rank].tolist(), long.shape[1]
        owners = self._owners(len(ends) - 1)
        rows = torch.cat([part[ends[0] : ends[-1]] for part in (long, short)], 1)
        sent = [ends[of.stop] - ends[of.start] for of in owners]
        mine = owners[self.rank]
        # (ranks, experts here): the rows that come from each rank, sorted by expert.
        numbers = of_ranks[:, mine.start : mine.stop + 1].diff(dim=1)

        def add(found: torch.Tensor) -> None:
            experts = torch.arange(numbers.shape[1]).repeat(len(numbers))
            order = experts.repeat_interleave(numbers.flatten()).argsort(stable=True)
            found = found.index_select(0, accelerator.from_host(order))
            ends = [0, *numbers.sum(0).cumsum(0).tolist()]
            _add_products(self.shards[name], found[:, :width], found[:, width:], ends)

        self.exchange.all_to_all(rows, sent, numbers.sum(1).tolist(), add)

    def _most_received(self, of_ranks: torch.Tensor) -> int:
        """Return the most rows that one rank's experts get from all ranks."""
        ends = of_ranks.sum(0).tolist()
        return max(ends[of.stop] - ends[of.start] for of in self._owners(len(ends) - 1))

    def _reduce_sums(
        self, name: str, long: torch.Tensor, short: torch.Tensor, ends: Sequence[int]
    ) -> None:
        """Compute every expert's gradient for this rank's rows, and sum it over ranks. Collective.

        Args:
            ends: where the rows of the first wanted expert begin, and those of each end.
        """
        sides = self._shapes[name][1:]
        at_once = max(1, EXCHANGE_BYTES // (FP32_BYTES * sides[0] * sides[1]))
        for owner, owned in enumerate(self._owners(len(ends) - 1)):
            for first in range(owned.start, owned.stop, at_once):
                last = min(first + at_once, owned.stop)
                sums = torch.zeros(last - first, *sides, device=long.device)
                _add_products(sums, long, short, ends[first : last + 1])
                self.exchange.reduce(sums, owner, partial(self._add, name, first - owned.start))

    def after_backward(self) -> None:
        """Sum what ``after_forward`` decided to sum whole, and wait for all sums. Collective.

        Communication: of each of those layers one reduce to each rank.
        """
        for name, whole in self._uneven.items():
            for owner, owned in enumerate(self._owners(len(whole))):
                if owned:
                    sums = whole[owned.start : owned.stop]
                    self.exchange.reduce(sums, owner, partial(self._add, name, 0))
        self.exchange.wait()
        self._uneven.clear()
        self.calls.clear()

    def finish(self, loss_sum: float, num_label_tokens: int) -> None:
        """Divide the sums by the number of label tokens, and sum ``batches_reached`` over ranks.

        Collective. Gradients are divided here, in fp32, and not before: if the loss were divided by
        a large sample's tokens, many entries would be 0 in fp16.

        Args:
            loss_sum: of the whole sample.
            num_label_tokens: of the whole sample.
        """
        self.loss = loss_sum / num_label_tokens
        for shard in self.shards.values():
            shard /= num_label_tokens
        for tokens in self.tokens.values():
            dist.all_reduce(tokens, group=self.group)
        counts = accelerator.from_host([self.batches_reached[name] for name in self.shards])
        dist.all_reduce(counts, group=self.group)
        self.batches_reached = Counter(dict(zip(self.shards, counts.tolist(), strict=True)))

    def _owners(self, length: int) -> list[range]:
        """Return the rows, or experts, of each rank."""
        return [row_range(length, rank, self.world_size) for rank in range(self.world_size)]

    def _add(self, name: str, first: int, sums: torch.Tensor) -> None:
        """Add to this rank's rows, or experts, of a layer from the ``first`` on."""
        part = self.shards[name][first : first + len(sums)]
        part += sums.to(part.device)


def _long_and_short(x: torch.Tensor, grad_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of a gradient as it is kept, ``longᵀ short``."""
    return (x, grad_y) if is_transposed(grad_y.shape[1], x.shape[1]) else (grad_y, x)


def _sends_rows(num_rows: int, long: torch.Tensor, short: torch.Tensor, num_matrices: int) -> bool:
    """Return whether to exchange rows of x and δ, of which a rank receives so many."""
    width = long.shape[1] + short.shape[1]
    rows = num_rows * width * torch.promote_types(long.dtype, short.dtype).itemsize
    return sends_activations(rows, num_matrices * long.shape[1] * short.shape[1] * FP32_BYTES)


def _add_products(
    gradients: torch.Tensor, long: torch.Tensor, short: torch.Tensor, ends: Sequence[int]
) -> None:
    """Add ``longᵀ short`` of each expert's rows to its gradient, maybe in host memory.

    Args:
        ends: where the rows of the first expert begin, and those of each end.
    """
    for G, (start, stop) in zip(gradients, pairwise(ends), strict=True):
        if stop > start:
            G += weight_gradient(long[start:stop], short[start:stop]).to(G.device)

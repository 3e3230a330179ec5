"""Which layers the init decomposes at the same time, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.distributed import zero
from lorasb_ds.init.factors import InitSettings
from lorasb_ds.planner.init_bytes import decomposes_whole


class Turn(NamedTuple):
    """Layers that are decomposed at the same time, at most as many as there are ranks.

    Attributes:
        r: the most singular vectors that the method takes of one.
        heights: the rows of each layer's matrix, where each rank decomposes one of them; None where
            all ranks decompose each.
    """

    names: list[str]
    r: int
    heights: list[int] | None


def in_turns(
    adapters: Mapping[str, AdapterLinear], settings: InitSettings, budget_bytes: int | None
) -> Iterator[Turn]:
    """Yield every layer in one turn.

    Args:
        budget_bytes: --init-memory-gib.
    """
    ranks, method = zero.world_size(), settings.method
    update = settings.update if method.needs_gradient else method.matrix
    whole, sharded = list[str](), list[str]()
    for name, adapter in adapters.items():
        sides, r = (adapter.out_features, adapter.in_features), adapter.r * method.directions
        by_one = ranks > 1 and decomposes_whole(*sides, r, update, budget_bytes)
        (whole if by_one else sharded).append(name)
    # Layers of one size take about the same time.
    whole.sort(key=lambda name: adapters[name].out_features * adapters[name].in_features)
    heights = {name: max(of.out_features, of.in_features) for name, of in adapters.items()}
    for layers, by_one in ((whole, True), (sharded, False)):
        for first in range(0, len(layers), ranks):
            names = layers[first : first + ranks]
            r = max(adapters[name].r for name in names) * method.directions
            yield Turn(names, r, [heights[name] for name in names] if by_one else None)

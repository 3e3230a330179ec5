"""Groups of layers by their names, and the decoder blocks that are run for each. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

# Layers whose gradients are held at the same time -> None; projections of experts -> those of their
# experts.
LayerGroup: TypeAlias = Mapping[str, range | None]


@dataclass(frozen=True)
class Segment:
    """Blocks ``first`` to ``last``, and the layers in them whose gradients are wanted."""

    first: int
    last: int
    layers: LayerGroup


def cut_segments(groups: Sequence[LayerGroup], prefix: str, num_blocks: int) -> list[Segment]:
    """Return the segments of the groups, from the model's end to its beginning.

    A segment ends where the one above it begins. Groups within one block share its segment.

    Args:
        groups: layers in the model's order; a block's layers are in one group, or in groups without
            layers of other blocks.
        prefix: the part of their names before the block's number.
    """
    segments: list[Segment] = []
    for layers in reversed(groups):
        first = min(block_of(name, prefix) for name in layers)
        if segments and segments[-1].first == first:
            last = segments[-1].last
        else:
            last = segments[-1].first - 1 if segments else num_blocks - 1
        segments.append(Segment(first, last, layers))
    return segments


def blocks_prefix(names: Iterable[str]) -> str | None:
    """Return the prefix shared by all names, such as ``model.layers.``; None if there is none."""
    prefixes = {match[1] if (match := re.match(r"(.*?\.)\d+\.", name)) else None for name in names}
    return prefixes.pop() if len(prefixes) == 1 else None


def block_of(name: str, prefix: str) -> int:
    """Return the number of a layer's block."""
    return int(name.removeprefix(prefix).partition(".")[0])

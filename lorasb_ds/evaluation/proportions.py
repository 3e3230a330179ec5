"""Shares of rows and their intervals. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """How many rows were right."""

    right: int
    rows: int

    @property
    def share(self) -> float:
        return self.right / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.rows)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} (95 %: {low:.1%} to {high:.1%})"


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); holds for shares near 0 and 1, too."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    low, high = ((centre + sign * spread) / (1 + z * z / trials) for sign in (-1, 1))
    return low, high

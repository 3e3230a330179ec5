"""Proportions of rows and their confidence intervals. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Proportion:
    """The proportion of rows that were right."""

    right: int
    rows: int

    @property
    def value(self) -> float:
        return self.right / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval."""
        return wilson_interval(self.right, self.rows)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} (95 %: {low:.1%} to {high:.1%})"


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927), also valid near 0 and 1."""
    observed = successes / trials
    centre = observed + z * z / (2 * trials)
    spread = z * math.sqrt(observed * (1 - observed) / trials + z * z / (4 * trials * trials))
    low, high = ((centre + sign * spread) / (1 + z * z / trials) for sign in (-1, 1))
    return low, high

"""Eta by measurement: a few forward passes along one direction. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable

FIRST_EXPONENT = -13  # 1.2e-4: the best one is within a factor of 4 as a rule
MAX_EVALUATIONS = 9


def search_init_lr(loss_at: Callable[[float], float], unit: float = 1.0) -> dict[float, float]:
    """Losses at a handful of eta, 0 among them; the best is the one to take.

    Steps of 4 until the best one lies between two worse ones, then its neighbours at a factor of 2.
    All are powers of two: multiplying by them is exact, so that the loss that was measured with
    a scaled branch is, bit for bit, that of the filled adapter.

    Args:
        loss_at: the loss with the update multiplied by its argument; infinite or nan is bad.
        unit: what eta is counted in, rounded to a power of two; 1 for a sign matrix.
    """
    unit = 2.0 ** round(math.log2(unit))
    losses: dict[int | None, float] = {}

    def measure(exponent: int | None) -> None:
        if exponent not in losses and len(losses) < MAX_EVALUATIONS:
            loss = loss_at(0.0 if exponent is None else unit * 2.0**exponent)
            losses[exponent] = loss if math.isfinite(loss) else math.inf

    def best() -> int:
        return min((e for e in losses if e is not None), key=lambda e: losses[e])

    measure(None)
    for exponent in (FIRST_EXPONENT, FIRST_EXPONENT + 2, FIRST_EXPONENT - 2):
        measure(exponent)
    low, high = FIRST_EXPONENT - 2, FIRST_EXPONENT + 2
    while len(losses) < MAX_EVALUATIONS - 2:
        if best() == high:
            high += 2
            measure(high)
        elif best() == low:
            low -= 2
            measure(low)
        else:
            break
    centre = best()
    measure(centre + 1)
    measure(centre - 1)
    return {0.0 if e is None else unit * 2.0**e: loss for e, loss in losses.items()}

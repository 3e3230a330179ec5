"""The search for eta, on curves with a known minimum."""

from __future__ import annotations

import math

import pytest

from lorasb_ds.init.step_size import MAX_EVALUATIONS, search_init_lr


def curve(best: float):
    """A loss with its minimum at ``best``, a parabola in log eta that ends at the base's 2.0."""
    return lambda eta: 2.0 if eta == 0 else 1.0 + 0.1 * math.log2(eta / best) ** 2


@pytest.mark.parametrize("unit", [1.0, 3000.0])
@pytest.mark.parametrize("best", [1e-6, 1e-5, 6e-5, 1e-4, 3e-4, 1e-3, 8e-3])
def test_finds_the_minimum_within_a_factor_of_two(best: float, unit: float) -> None:
    losses = search_init_lr(curve(best * 2.0 ** round(math.log2(unit))), unit)
    assert 0.0 in losses
    assert len(losses) <= MAX_EVALUATIONS
    found = min(losses, key=lambda eta: losses[eta]) / 2.0 ** round(math.log2(unit))
    assert best / 2 <= found <= best * 2
    assert all(eta == 0 or math.log2(eta).is_integer() for eta in losses), "powers of two"


def test_stays_at_the_base_where_every_step_is_worse() -> None:
    losses = search_init_lr(lambda eta: 1.0 + eta)
    assert min(losses, key=lambda eta: losses[eta]) == 0
    assert len(losses) <= MAX_EVALUATIONS


def test_what_overflows_is_not_taken() -> None:
    losses = search_init_lr(lambda eta: math.nan if eta > 1e-4 else 1.0 - eta)
    assert 0 < min(losses, key=lambda eta: losses[eta]) <= 1e-4
    assert all(loss == math.inf for eta, loss in losses.items() if eta > 1e-4)

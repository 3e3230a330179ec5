"""Ranks by layer: the greedy choice, against all choices."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from lorasb_ds.init.rank_allocation import allocate_ranks

SPECTRA = st.lists(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=4).map(lambda S: sorted(S, reverse=True)),
    min_size=1,
    max_size=3,
)


def gain(gains: list[list[float]], ranks: tuple[int, ...]) -> float:
    return sum(sum(of[:r]) for of, r in zip(gains, ranks, strict=True))


def cost(ranks: tuple[int, ...]) -> int:
    return sum(r * r for r in ranks)


def allocated(gains: list[list[float]], budget: int) -> tuple[int, ...]:
    found = allocate_ranks({str(i): of for i, of in enumerate(gains)}, budget)
    assert [*found] == [str(i) for i in range(len(gains))]
    return tuple(found.values())


@given(SPECTRA, st.integers(0, 40))
def test_no_other_ranks_gain_much_more(gains: list[list[float]], more: int) -> None:
    """The best of all ranks within the budget gain less than one direction in addition."""
    budget = len(gains) + more
    ranks = allocated(gains, budget)
    assert cost(ranks) <= budget
    every = [*product(*(range(1, len(of) + 1) for of in gains))]
    best = max(gain(gains, of) for of in every if cost(of) <= budget)
    left = budget - cost(ranks)
    steps = [of[r] for of, r in zip(gains, ranks, strict=True) if r < len(of)]
    assert all(2 * r + 1 > left for of, r in zip(gains, ranks, strict=True) if r < len(of))
    assert best <= gain(gains, ranks) + max(steps, default=0.0) + 1e-9


@given(SPECTRA)
def test_exact_for_what_it_costs(gains: list[list[float]]) -> None:
    """Until a direction does not fit, no ranks of that cost gain more."""
    every = [*product(*(range(1, len(of) + 1) for of in gains))]
    ranks = [1] * len(gains)
    while True:
        budget = cost(tuple(ranks))
        assert allocated(gains, budget) == tuple(ranks)
        best = max(gain(gains, of) for of in every if cost(of) <= budget)
        assert gain(gains, tuple(ranks)) >= best - 1e-9 * max(1.0, best)
        steps = [
            (-of[r] / (2 * r + 1), i)
            for i, (of, r) in enumerate(zip(gains, ranks, strict=True))
            if r < len(of)
        ]
        if not steps:
            return
        ranks[min(steps)[1]] += 1


def test_equal_spectra_have_equal_ranks() -> None:
    gains = [[4.0, 3.0, 2.0, 1.0]] * 3
    assert allocated(gains, 3 * 9) == (3, 3, 3)
    assert allocated(gains, 3 * 9 + 7) == (4, 3, 3)
    assert allocated(gains, 1000) == (4, 4, 4), "as many as there are directions"


def test_a_layer_without_energy_keeps_one_direction() -> None:
    assert allocated([[0.0] * 9, [3.0] * 9], 26) == (1, 5)

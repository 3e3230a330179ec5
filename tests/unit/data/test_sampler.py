"""Which rows a step sees."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasb_ds.data.sampler import StepSampler, best_fit_decreasing, epoch_order, init_sample

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def epoch_of(order: StepSampler, epoch: int) -> list[list[int]]:
    first = sum(order.steps_of_epoch(e) for e in range(epoch))
    steps = range(first, first + order.steps_of_epoch(epoch))
    return list(chain.from_iterable(order.packs(step) for step in steps))


@given(
    lengths=LENGTHS,
    packs_per_step=st.integers(1, 9),
    group=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_epoch_sees_every_row_once(
    lengths: list[int], packs_per_step: int, group: bool, packed: bool, seed: int
) -> None:
    def make() -> StepSampler:
        pack_length = 30 if packed else None
        options = {"group_by_length": group, "pack_length": pack_length}
        return StepSampler(np.array(lengths), packs_per_step, seed, **options)

    order = make()
    for epoch in range(3):
        units = epoch_of(order, epoch)
        assert sorted(chain.from_iterable(units)) == list(range(len(lengths)))
        assert all(sum(lengths[row] for row in unit) <= 30 for unit in units)
        assert packed or all(len(unit) == 1 for unit in units)
    sizes = [len(order.packs(step)) for step in range(order.steps_of_epoch(0))]
    assert all(size == packs_per_step for size in sizes[:-1])
    assert 1 <= sizes[-1] <= packs_per_step
    late = order.steps_of_epoch(0) + order.steps_of_epoch(1)
    assert make().packs(late) == order.packs(late), "a function of the step alone"


def test_plain_order_is_the_epochs_permutation() -> None:
    order = StepSampler(np.ones(11, int), 4, seed=3)
    assert [row for (row,) in epoch_of(order, 1)] == epoch_order(11, 3, 1)
    assert order.num_steps(2) == 6
    assert order.num_steps(0.1) == 1
    assert order.num_steps(1.34) == 4


@pytest.mark.parametrize("weights", [(1.0, 2.0), (0.5, 1.0), (0.3, 2.5)])
def test_weights_say_how_often_an_epoch_sees_a_source(weights: Any) -> None:
    sizes = (10, 4)
    order = StepSampler(np.ones(14, int), 3, 0, source_sizes=sizes, weights=weights)
    seen: Counter[int] = Counter()
    for epoch in range(10):
        rows = [row for (row,) in epoch_of(order, epoch)]
        of_first = [row for row in rows if row < 10]
        assert len(of_first) == weights[0] * 10
        assert len(rows) - len(of_first) == weights[1] * 4
        seen.update(rows)
        if epoch in (1, 3):  # never again before all others have been seen
            counts = [seen[row] for row in range(10)]
            assert max(counts) - min(counts) <= 1
    assert {seen[row] for row in range(10)} == {round(10 * weights[0])}
    assert {seen[row] for row in range(10, 14)} == {round(10 * weights[1])}
    assert epoch_of(order, 0) != epoch_of(order, 1)


def test_grouping_makes_batches_of_similar_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 4000)

    def padding(group: bool) -> float:
        order = StepSampler(lengths, 8, 0, group_by_length=group)
        steps = [order.packs(step) for step in range(order.steps_of_epoch(0))]
        longest = sum(8 * max(lengths[row] for (row,) in units) for units in steps)
        return 1 - lengths.sum() / longest

    assert padding(group=True) < 0.05 < 0.4 < padding(group=False)
    order = StepSampler(lengths, 8, 0, group_by_length=True)
    firsts = [int(lengths[order.packs(step)[0][0]]) for step in range(20)]
    assert firsts != sorted(firsts, reverse=True), "steps are in random order"


@given(lengths=LENGTHS)
def test_best_fit_decreasing(lengths: list[int]) -> None:
    """Against the rule itself, stated slowly."""
    expected: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        loads = [sum(lengths[i] for i in found) for found in expected]
        fitting = [load for load in loads if load + lengths[item] <= 30]
        if fitting:
            expected[loads.index(max(fitting))].append(item)
        else:
            expected.append([item])
    found = best_fit_decreasing(lengths, 30)
    assert sorted(chain.from_iterable(found)) == list(range(len(lengths)))
    loads = sorted(sum(lengths[i] for i in pack) for pack in found)
    assert loads == sorted(sum(lengths[i] for i in pack) for pack in expected)


def test_orders() -> None:
    assert sorted(epoch_order(9, 1, 0)) == list(range(9))
    assert epoch_order(50, 1, 0) != epoch_order(50, 1, 1)
    assert epoch_order(50, 1, 0) != epoch_order(50, 2, 0)
    assert [len(rows) for rows in init_sample(1_000_000, None, 0)] == [875, 125]
    assert [len(rows) for rows in init_sample(5000, None, 0)] == [56, 8]
    gradient, held_back = init_sample(30, None, 0)
    assert sorted(gradient + held_back) == list(range(30))
    assert [len(rows) for rows in init_sample(30, 7, 0)] == [6, 1]
    assert init_sample(30, 1, 0)[0] == init_sample(30, 1, 0)[1]

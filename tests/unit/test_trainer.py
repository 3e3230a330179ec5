"""Schedules and the number of steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from lorasb_ds.config import RunConfig
from lorasb_ds.trainer import count_steps, make_scheduler


def rates(shape: Any, num_steps: int = 20) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    config = RunConfig(lr=2.0, lr_scheduler=shape, warmup_ratio=0.2)
    scheduler = make_scheduler(optimizer, config, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_schedules_warm_up_and_waste_no_step(shape: str) -> None:
    found = rates(shape)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert min(found) > 0
    if shape == "constant":
        assert found[4:] == pytest.approx([2.0] * 16)
    else:
        assert all(a > b for a, b in pairwise(found[3:]))
    if shape == "linear":
        assert found[4] - found[5] == pytest.approx(2.0 / 17)


def test_count_steps() -> None:
    assert count_steps(RunConfig(micro_batch_size=2, epochs=2), num_rows=11, world_size=2) == 6
    assert count_steps(RunConfig(micro_batch_size=8, epochs=0.1), num_rows=11, world_size=2) == 1
    assert count_steps(RunConfig(max_steps=7, epochs=3), num_rows=11, world_size=1) == 7

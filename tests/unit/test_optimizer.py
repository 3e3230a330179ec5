"""What trains R, and its schedule."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from lorasb_ds.config import RunConfig
from lorasb_ds.optimizer import fresh_state, make_optimizer, make_scheduler, set_scheduler


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


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_a_schedule_is_put_back(shape: Any) -> None:
    optimizers = [torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0) for _ in "ab"]
    config = RunConfig(lr=2.0, lr_scheduler=shape, warmup_ratio=0.2)
    went, put = (make_scheduler(optimizer, config, 20) for optimizer in optimizers)
    for _ in range(7):
        optimizers[0].step()
        went.step()
    set_scheduler(put, 7)
    for _ in range(5):
        assert put.get_last_lr() == went.get_last_lr()
        assert optimizers[1].param_groups[0]["lr"] == optimizers[0].param_groups[0]["lr"]
        for optimizer, schedule in zip(optimizers, (went, put), strict=True):
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_optimizers_go_on_from_a_state_that_is_put_back(name: Any) -> None:
    """The same updates as without a break, also where state is cut into other flat parts."""
    config = RunConfig(optimizer=name, lr=0.1, weight_decay=0.01)
    start = torch.linspace(-1, 1, 12)

    def step(parameter: torch.nn.Parameter, optimizer: Any, k: int) -> None:
        parameter.grad = torch.cos(parameter.detach() * 3 + k)
        optimizer.step()

    whole = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer([whole], config)
    for k in range(3):
        step(whole, optimizer, k)
    stored = {
        key: value.clone() if torch.is_tensor(value) else value
        for key, value in optimizer.state[whole].items()
    }
    parts = [torch.nn.Parameter(part.detach().clone()) for part in (whole[:5], whole[5:])]
    for part, span in zip(parts, (slice(0, 5), slice(5, 12)), strict=True):
        state = fresh_state(part, config)
        assert state.keys() == stored.keys()
        for key, value in stored.items():
            if torch.is_tensor(value) and value.shape == whole.shape:
                state[key].copy_(value[span])
            else:
                state[key] = value.clone() if torch.is_tensor(value) else value
        again = make_optimizer([part], config)
        again.state[part] = state
        for k in range(3, 5):
            part.grad = torch.cos(part.detach() * 3 + k)
            again.step()
    for k in range(3, 5):
        step(whole, optimizer, k)
    torch.testing.assert_close(torch.cat([p.detach() for p in parts]), whole.detach())
    assert (whole - start).abs().max() > 0.1

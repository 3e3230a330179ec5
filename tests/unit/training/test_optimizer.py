"""What trains R, and its schedule."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.distributed.matrix_optimizer import MatrixOptimizer, MatrixPart
from lorasb_ds.errors import ConfigError
from lorasb_ds.training.optimizer import fresh_state, make_optimizer, make_scheduler, set_scheduler


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


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_whole_matrices_in_a_flat_master(name: Any) -> None:
    """Two matrices and padding, as ZeRO lays them out, with a schedule: torch's own steps."""
    config = RunConfig(optimizer=name, lr=0.1, weight_decay=0.1, lr_scheduler="linear")
    start = [torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(1, 3, 4).view(2, 2)]
    plain = [torch.nn.Parameter(value.clone()) for value in start]
    kinds = {"adafactor": torch.optim.Adafactor, "muon": torch.optim.Muon}
    reference = kinds[name](plain, lr=0.1, weight_decay=0.1)
    model = [torch.nn.Parameter(value.clone()) for value in start]
    optimizer = make_optimizer(model, config)
    assert isinstance(optimizer, MatrixOptimizer)
    schedules = [make_scheduler(each, config, 4) for each in (reference, optimizer)]
    flat = torch.cat([*(value.flatten() for value in start), torch.zeros(2)]).requires_grad_()
    parts = [MatrixPart(model[0], (3, 4), 0, 0, 12), MatrixPart(model[1], (2, 2), 0, 12, 4)]
    optimizer.set_parts([(flat, parts)])
    optimizer.param_groups[0]["params"] = [flat]
    for k in range(4):
        for parameter in plain:
            parameter.grad = torch.cos(parameter.detach() * 3 + k)
        flat.grad = torch.cos(flat.detach() * 3 + k)
        reference.step()
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    for value, (first, last) in zip(plain, ((0, 12), (12, 16)), strict=True):
        assert torch.equal(flat[first:last].view_as(value), value)
    assert not flat[16:].any(), "padding"
    assert (flat[:12] - start[0].flatten()).abs().max() > 0.05
    assert optimizer.state_of(model[1]).keys() == reference.state[plain[1]].keys()


def test_muon_is_for_matrices() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (4,))]
    with pytest.raises(ConfigError, match=r"--optimizer muon.* 1 of the param.* \(4,\)"):
        make_optimizer(parameters, RunConfig(optimizer="muon"))
    make_optimizer(parameters, RunConfig(optimizer="adafactor"))

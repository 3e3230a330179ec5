"""How often the host waits for the device: a step once, a layer of the init a few times."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.device.test_runs import SHARDED, ZERO1, check_run, configured, train
from tests.runs import run_ranks

__all__ = ["configured"]  # a fixture

STEPS = (2, 6)
RUNS: dict[str, dict[str, Any]] = {
    **{f"steps-{n}": SHARDED | {"max_steps": n} for n in STEPS},
    **{
        f"accumulated-{n}": ZERO1 | {"max_steps": n, "train_batch_size": 16, "dtype": "bf16"}
        for n in STEPS
    },
    "few-layers": SHARDED | {"max_steps": 2, "target_modules": "q_proj"},
}
LAYERS = 14 - 2  # more in "steps-2" than in "few-layers"


@pytest.fixture(scope="module")
def waits(
    configured: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Counter[str]]:
    """A function that makes a run: line -> how often its rank 0 has waited there."""
    out = tmp_path_factory.mktemp("waits")

    @functools.cache
    def of_run(name: str) -> Counter[str]:
        train(configured({name: RUNS[name]}, out), 2, out)
        return lines(check_run(out, name)[0])

    return of_run


def lines(counted: dict[str, Any]) -> Counter[str]:
    found: Counter[str] = Counter()
    for why, where, number in counted["waits"]:
        found[f"{where} ({why})"] += number
    return found


def in_files(found: Counter[str], package: str) -> Counter[str]:
    return Counter({line: n for line, n in found.items() if line.startswith(package)})


@pytest.mark.parametrize(
    ("kind", "num_micro_batches"),
    [("steps", 1), pytest.param("accumulated", 4, marks=pytest.mark.slow)],
)
def test_a_step_waits_once(
    kind: str, num_micro_batches: int, waits: Callable[[str], Counter[str]]
) -> None:
    """However many micro-batches it has.

    Besides, DeepSpeed waits for its norm, and transformers looks into each padding mask, twice.
    """
    few, many = (waits(f"{kind}-{n}") for n in STEPS)
    more, num_steps = many - few, STEPS[1] - STEPS[0]
    own = in_files(more, "lorasb_ds/")
    assert own.total() == num_steps, own
    assert all(line.startswith("lorasb_ds/training/loop.py:") for line in own), own
    assert in_files(more, "transformers/").total() <= 2 * num_micro_batches * num_steps, more
    assert in_files(more, "deepspeed/").total() <= 4 * num_steps, more


def test_a_layer_of_the_init_waits_a_few_times(waits: Callable[[str], Counter[str]]) -> None:
    """11.5 times have been seen: SVD 7, report 1.5, factors 3. Of a Krylov space more."""
    more = in_files(waits("steps-2") - waits("few-layers"), "lorasb_ds/init")
    assert LAYERS <= more.total() <= 14 * LAYERS, more


def test_a_krylov_space_waits_where_it_is_looked_at() -> None:
    run_ranks("tests.device.cases:krylov_waits", 1)

"""The extension is built once, in a rank of its own: no process of tests loads it."""

from __future__ import annotations

import pytest

from tests.device import pretend
from tests.runs import run_ranks


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    if found := pretend.missing():
        pytest.skip(f"the device `pretend` cannot be built: {found}")
    run_ranks("tests.device.cases:build", 1, timeout=300)

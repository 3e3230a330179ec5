"""What the device and its backend refuse, so that the runs on them can fail."""

from __future__ import annotations

import pytest

from tests.runs import run_ranks


@pytest.mark.parametrize("case", ["mixed_devices", "generators", "memory", "host_waits"])
def test_the_device_has_cuda_s_rules(case: str) -> None:
    run_ranks(f"tests.device.cases:{case}", 1)


def test_the_backend_has_nccl_s_rules() -> None:
    run_ranks("tests.device.cases:collectives", 2)

"""--profile: the trace, and the table of the most expensive operations."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from lorasb_ds.config.run_layout import PROFILE
from lorasb_ds.runs.profiler import profiled

pytestmark = pytest.mark.usefixtures("one_process")


def names(folder: Path) -> list[str]:
    trace = json.loads(gzip.decompress((folder / PROFILE).read_bytes()))
    return [event["name"] for event in trace["traceEvents"] if event.get("cat") == "cpu_op"]


@pytest.mark.parametrize(("num_steps", "profiled_steps"), [(2, 2), (9, 3)])
def test_steps_after_the_first(
    num_steps: int, profiled_steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Profile a run of 4 steps, which may end before all requested steps are profiled."""
    weight = torch.randn(300, 300)
    with profiled(tmp_path, num_steps) as step_done:
        for _ in range(4):
            torch.tanh(weight @ weight)
            step_done()
    assert names(tmp_path).count("aten::mm") == profiled_steps
    assert [path.name for path in tmp_path.iterdir()] == [PROFILE]
    printed = capsys.readouterr().out
    assert str(tmp_path / PROFILE) in printed
    _, rows = printed.split("operation\n")
    shares = [float(line.split("%")[0]) for line in rows.splitlines()]
    assert len(shares) <= 10
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.5
    assert rows.index("aten::mm") < rows.index("aten::matmul")


def test_one_step_alone_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with profiled(tmp_path, 2) as step_done:
        step_done()
    assert not list(tmp_path.iterdir())
    assert "no profile" in capsys.readouterr().out


def test_nothing_without_it(tmp_path: Path) -> None:
    with profiled(tmp_path, None) as step_done:
        step_done()
    assert not list(tmp_path.iterdir())

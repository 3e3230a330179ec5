"""What is said on the console."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.distributed import accelerator
from lorasb_ds.runs.output_dir import say_if_bf16_is_emulated


@pytest.mark.parametrize(("rank", "says"), [(None, True), ("0", True), ("1", False)])
def test_slow_bf16_is_said_before_the_process_group(
    rank: str | None, says: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(accelerator, "emulates_bf16", lambda: True)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    say_if_bf16_is_emulated(RunConfig(dtype="bf16"))
    assert ("--dtype fp32 is many times faster" in capsys.readouterr().out) == says
    for other in (RunConfig(dtype="fp32"), RunConfig(dtype="bf16", load_in_4bit=True)):
        say_if_bf16_is_emulated(other)
        assert not capsys.readouterr().out

"""Whole runs on state-space and hybrid models, and what comes out of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.evaluation.model import prepare_model, start_model
from lorasb_ds.export.adapter_reader import read_adapter
from lorasb_ds.export.merge import merge_adapter
from tests.dist.test_moe import IDS, base_of, losses, options, train

FAMILIES = (
    pytest.param("falcon_h1", marks=pytest.mark.slow),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("granitemoehybrid", "jamba", "lfm2")),
)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_hybrids(
    tiny_family: Callable[[str], Path], one_process: None, tmp_path: Path, family: str
) -> None:
    """Ranks train as one process; PEFT and merged models compute the same."""
    base, run, two = tiny_family(family), tmp_path / "run", tmp_path / "two"
    more = {} if "moe" in family or family == "jamba" else {"expert_r": None}
    train(1, options(base, run, **more))
    train(2, options(base, two, micro_batch_size=2, **more))
    assert len(losses(run)) == 4
    torch.testing.assert_close(losses(two), losses(run), rtol=1e-3, atol=0)
    config = load_run_config({"model": str(base), "dtype": "fp32"})
    wanted = logits(start_model(prepare_model(config, str(run))))
    assert (wanted - logits(base_of(base))).abs().max() > 0.05
    peft = logits(PeftModel.from_pretrained(base_of(base), run / "adapter"))
    torch.testing.assert_close(peft, wanted, rtol=1e-4, atol=1e-4)
    merge_adapter(read_adapter(str(run)), str(base), tmp_path / "merged")
    torch.testing.assert_close(logits(base_of(tmp_path / "merged")), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_in_4_bits(tiny_family: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(2, options(tiny_family("falcon_h1"), run, load_in_4bit=True, dtype="bf16", expert_r=None))
    assert losses(run).isfinite().all()

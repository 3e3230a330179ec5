"""`scripts/bench.py plan` on a tiny model: tensors have the predicted bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT, benchmark


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ds_config", "options"),
    [("zero3.json", {}), ("nothing kept", {"load_in_4bit": True}), ("zero2.json", {})],
)
def test_tensors_within_five_percent(
    ds_config: str, options: dict[str, Any], tmp_path: Path
) -> None:
    with benchmark("bench_plan") as bench:
        model = bench.model_folder(tmp_path / "model", (128, 320, 2, 4, 2))
        nothing_kept = bench.really_sharded(tmp_path)
        file = nothing_kept if ds_config == "nothing kept" else str(ROOT / "ds_configs" / ds_config)
        settings = bench.inputs(tmp_path, rows=4) | {"max_length": 64, "init_samples": 4}
        result = bench.measure(
            bench.run, settings | options | {"model": model, "ds_config": file}, 2
        )
        printed = bench.table({("tiny", ds_config, 2): result})
    for kind, measured in result["tensors"].items():
        # Tokens and counts of batches, and ids that Python keeps, are no part of the plan.
        slack = 30_000 if kind == "optimizer" else 0
        assert abs(result["predicted"][kind] - measured) <= 0.05 * measured + slack, kind
    assert all(peak > 0 for peak in result["peaks"].values())
    assert "tiny" in printed

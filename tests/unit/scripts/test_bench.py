"""The benchmarks run, on small shapes, and their numbers are what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.runs import run_command


def test_svd_quick(tmp_path: Path) -> None:
    out = tmp_path / "svd.json"
    printed = run_command(sys.executable, "scripts/bench.py", "svd", "--quick", "--out", str(out))
    result = json.loads(out.read_text())
    assert result["machine"]["threads"] == 1
    assert [record["r"] for record in result["records"]] == [16, 96, 16, 96]
    for record in result["records"]:
        assert f"{record['out_features']}x{record['in_features']}" in printed
        assert 0 < record["best_energy"] <= 1
        for way in ("auto", "krylov", "gram"):
            assert -1e-6 < record[way]["loss"] < 1e-4, (record["name"], way)
        # The paper's method is what leaves something out.
        assert record["svd_lowrank"]["loss"] > -1e-6
        assert record["met"] == (record["auto"]["ratio"] <= 1)

"""The benchmark's cases of the init, on a tiny model: both sides run and measure what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, word_rows, write_jsonl


def test_both_sides(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench = __import__("bench_init")
    try:
        data = write_jsonl(tmp_path / "rows.jsonl", word_rows(9))
        config = {"model": str(tiny_model), "data": data, "r": 8, "init_lr": 1e-4}
        paper = bench.measure(bench.paper, config)
        ours = bench.measure(bench.ours, config | {"init_memory_gib": 0.0002})
    finally:
        del sys.modules["bench_init"]
    for result in (paper, ours):
        assert result["peak_bytes"] > 0
        assert 0 < result["gradients_s"] + result["svd_s"] <= result["total_s"]
    assert ours["groups"] > 1
    # Every layer's gradient in fp32: 2 x (2 x 48 x 48 + 2 x 24 x 48 + 3 x 80 x 48) numbers.
    assert ours["shard_bytes"] == 4 * 2 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 80 * 48)

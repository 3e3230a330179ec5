"""The benchmarks run, on small shapes, and their numbers are what they say."""

from __future__ import annotations

import json
import sys
from math import isfinite
from pathlib import Path

import pytest

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


def test_load_quick(tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    command = [sys.executable, "scripts/bench.py", "load", "--quick", "--out", str(out)]
    printed = run_command(*command, timeout=380)
    result = json.loads(out.read_text())
    runs = {case: ranks for case, (ranks,) in result["runs"].items()}
    # Two bytes for each number of embeddings, norms, and two blocks of the shape in bench_load.py.
    block = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128 + 2 * 128)
    whole = 2 * (49152 * 128 + 128) + 2 * block
    assert result["block_bytes"] == pytest.approx(block, rel=0.01)  # with a file's header
    (one,) = runs["load_base, bf16 whole, 1 rank"]
    assert one["held_bytes"] == whole
    # The weights lie somewhere.
    assert one["anon_peak_bytes"] + one["mapped_peak_bytes"] > whole
    assert one["peak_bytes"] > whole
    two = runs["load_base, bf16 ZeRO-3, 2 ranks"]
    assert [rank["held_bytes"] for rank in two] == [whole / 2, whole / 2]
    quantized = runs["from_pretrained, 4-bit whole, 1 rank"][0]["held_bytes"]
    # Half a byte a number, and for every 64 of them one of scale, and 4 for every 256 of those.
    linear = block / 2 - 2 * 128
    codes = linear * (1 / 2 + 1 / 64 + 4 / 64 / 256)
    assert quantized == pytest.approx(whole - 2 * (2 * linear - codes), rel=1e-4)
    for record in result["targets"]:
        assert record["met"] == (record["reached"] <= record["wanted"])
        assert f"| {record['case']} |" in printed
    assert {record["what"] for record in result["targets"]} == {
        "anon_peak_bytes",
        "anon_after_bytes",
        "mapped_peak_bytes",
        "seconds",
    }


def test_wide_quick(tmp_path: Path) -> None:
    out = tmp_path / "wide.json"
    command = [sys.executable, "scripts/bench.py", "wide", "--quick", "--out", str(out)]
    run_command(*command, timeout=380)
    result = json.loads(out.read_text())
    one, two = result["measured"]["1"], result["measured"]["2"]
    assert all(isfinite(loss) for loss in two["losses"])
    # Narrow as the layers are, their gradients exceed the budget.
    assert two["groups"] > 1
    numbers = [2 * 128 * 128, 2 * 64 * 128, 3 * 448 * 128]
    sides = 4 * 128 + 2 * (64 + 128) + 3 * (448 + 128)
    codes = sum(numbers) * (1 / 2 + 1 / 64 + 4 / 64 / 256)
    # bf16: A and B with r = 8, seven R, two norms. Shards are padded to even lengths.
    block = (codes + 2 * (8 * sides + 7 * 64 + 2 * 128)) / 2
    assert two["block_bytes"] == pytest.approx(block, rel=0.01)
    assert two["held_bytes"] - one["held_bytes"] == two["block_bytes"]
    assert two["basis_bytes"] == 2 * 8 * sides
    assert set(result["seconds of 80 layers"]) >= {"load", "init", "step"}
    for part, by_ranks in result["peak bytes of 80 layers by ranks"].items():
        assert by_ranks["2"] > by_ranks["8"] > 0, part

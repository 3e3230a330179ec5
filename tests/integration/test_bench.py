"""The benchmarks' cases on tiny models: all sides run and measure what they say."""

from __future__ import annotations

import json
import sys
from math import isfinite
from pathlib import Path
from typing import Any

import pytest

from tests.runs import benchmark, run_command, word_rows, write_jsonl

pytestmark = pytest.mark.slow


def quick(name: str, folder: Path) -> tuple[str, Any]:
    """A benchmark in its small form: what it prints, and its JSON."""
    out = folder / f"{name}.json"
    command = [sys.executable, "scripts/bench.py", name, "--quick", "--out", str(out)]
    return run_command(*command, timeout=700), json.loads(out.read_text())


def test_both_sides(tiny_model: Path, tmp_path: Path) -> None:
    with benchmark("bench_init") as bench:
        data = write_jsonl(tmp_path / "rows.jsonl", word_rows(9))
        config = {"model": str(tiny_model), "data": data, "r": 8, "init_lr": 1e-4}
        paper = bench.measure(bench.paper, config)
        ours = bench.measure(bench.ours, config | {"init_memory_gib": 0.0002})
    for result in (paper, ours):
        assert result["peak_bytes"] > 0
        assert 0 < result["gradients_s"] + result["svd_s"] <= result["total_s"]
    assert ours["groups"] > 1
    # Every layer's gradient in fp32: 2 x (2 x 48 x 48 + 2 x 24 x 48 + 3 x 80 x 48) numbers.
    assert ours["shard_bytes"] == 4 * 2 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 80 * 48)


def test_ranks_quick(tmp_path: Path) -> None:
    printed, result = quick("ranks", tmp_path)
    assert "| SVDs, 2 ranks, each on one |" in printed
    (alone,), *of_two = (runs for name, runs in result["runs"].items() if name.startswith("SVDs"))
    assert len(of_two) == 2
    for (run,) in of_two:
        assert run["captured_energy"] == pytest.approx(alone["captured_energy"], rel=1e-4)


def test_load_quick(tmp_path: Path) -> None:
    printed, result = quick("load", tmp_path)
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
    quantized = runs["load_base, 4-bit whole, 1 rank"][0]["held_bytes"]
    # Half a byte a number, and for every 64 of them one of scale, and 4 for every 256 of those.
    linear = block / 2 - 2 * 128
    codes = linear * (1 / 2 + 1 / 64 + 4 / 64 / 256)
    assert quantized == pytest.approx(whole - 2 * (2 * linear - codes), rel=1e-4)
    for record in result["targets"]:
        assert record["met"] == (record["reached"] <= record["wanted"])
        assert f"| {record['case']} |" in printed
        if record["what"] in ("anon_peak_bytes", "mapped_peak_bytes"):
            assert record["met"], record  # the others are lost in noise at this size
    assert {record["what"] for record in result["targets"]} == {
        "anon_peak_bytes",
        "anon_after_bytes",
        "mapped_peak_bytes",
        "seconds",
    }


def test_wide_quick(tmp_path: Path) -> None:
    _, result = quick("wide", tmp_path)
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
    assert two["basis_bytes"] == 2 * 8 * sides + 4 * 7 * 64  # A and B in bf16, seven R in fp32
    assert set(result["seconds of 80 layers"]) >= {"load", "init", "step"}
    for part, by_ranks in result["peak bytes of 80 layers by ranks"].items():
        assert by_ranks["2"] > by_ranks["8"] > 0, part


def test_step_quick(tmp_path: Path) -> None:
    printed, result = quick("step", tmp_path)
    (layers,) = result["layers"]
    assert layers["peaks"].keys() <= layers["seconds"].keys()
    assert all(seconds > 0 for seconds in layers["seconds"].values())
    products = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128
    sums = 2 * (128 + 128) + 2 * (64 + 128) + 3 * (256 + 128)
    assert layers["arithmetic"] == pytest.approx(64 * sums / products)
    # The same rows, in some order, and none of them padded beyond the longest.
    runs = {way: run for way, (run,) in result["trainers"]["runs"].items()}
    ours, theirs = runs["lorasb"], runs["SFTTrainer, base in bf16"]
    assert sum(ours["tokens"]) == sum(theirs["tokens"])
    assert all(
        t <= p for run in runs.values() for t, p in zip(run["tokens"], run["places"], strict=True)
    )
    for found in result["zero3"].values():
        assert sum(n for _, n in found["collectives"]["reduce_scatter_tensor"]) == 1
        assert sum(n for _, n in found["collectives"]["all_gather_into_tensor"]) > 0
    times = {name: found["times"] for name, found in result["quantized"].items()}
    # The inputs of the first block's q, k and v want no gradient: they are used once.
    assert times == {"4 bits": 2 - 3 / 14, "4 bits, checkpointing": 3 - 3 / 14}
    for name in (*layers["seconds"], *runs, *result["zero3"], *times):
        assert f"| {name} |" in printed


def test_merge_quick(tmp_path: Path) -> None:
    printed, result = quick("merge", tmp_path)
    runs = {case: run for case, (run,) in result["runs"].items()}
    assert len(runs) == 4
    for case, run in runs.items():
        assert f"| {case} |" in printed
        assert 0 < run["seconds"] < run["whole_seconds"]
        assert 0 < run["above_imports_bytes"] < run["peak_bytes"]
        assert run["anon_peak_bytes"] > 0
    # fp32 sums in another order, rounded once to bf16.
    assert result["compared"]["different_share"] < 1e-3
    assert result["compared"]["largest_ulps"] <= 1
    for target in result["targets"]:
        assert target["met"] == (target["reached"] <= target["wanted"])


def test_moe_quick(tmp_path: Path) -> None:
    printed, result = quick("moe", tmp_path)
    runs = result["runs"]
    assert len(runs) == 5
    *whole, divided = runs.values()
    assert {run["groups"] for run in whole} == {1}
    assert divided["groups"] > 2  # more than there are blocks
    assert divided["losses"] == pytest.approx(runs["4-bit, 1"]["losses"], rel=1e-3)
    for ranks in (1, 2):
        assert runs[f"4-bit, {ranks}"]["held_bytes"] < runs[f"bf16, {ranks}"]["held_bytes"]
    for key in (*runs, *result["blocks"]["medians"]):
        assert key.split(",")[0] in printed


def test_gpu_check_works_on_cpus(tmp_path: Path) -> None:
    """What it prints and writes; what is about GPUs in it no GPU has run."""
    out = tmp_path / "gpu_check.json"
    printed = run_command(
        sys.executable, "scripts/gpu_check.py", "--on-cpu", "--out", str(out), timeout=700
    )
    found = json.loads(out.read_text())
    (check,), measured = found["checks"], found["measured"]
    assert check["problem"] == ""
    assert f"{check['name']:34} passed" in printed
    assert all(seconds > 0 for seconds in measured["pass_s"].values())
    assert measured["step_bytes"] > 0
    assert measured["init"]["gradients_s"] > 0

"""scripts/sensitivity.py on a tiny model: its table, its runs, and what they leave on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from scipy.linalg import subspace_angles

from tests.runs import metrics, run_command, word_rows, write_jsonl

NAMES = ("2-rows-s1", "9-rows-s1")


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_two_samples(tiny_model: Path, tmp_path: Path) -> None:
    """The table says what the runs have; a second call only reads them."""
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(40))
    rows = write_jsonl(tmp_path / "eval.jsonl", word_rows(6))
    command = (
        f"scripts/sensitivity.py --samples 9,2 --init-seeds 1 --output-dir {tmp_path}/study "
        f"--num-procs 1 --model {tiny_model} --data {data} --eval-data {rows} --r 4 --dtype fp32 "
        "--max-steps 2 --init-lr 1e-3"
    )
    output = run_command(sys.executable, *command.split(), timeout=700)
    folders = [tmp_path / "study" / name for name in NAMES]
    cells = [line.split(" | ") for line in output.splitlines() if line.startswith(("| 2 ", "| 9 "))]
    assert [words[0] for words in cells] == ["| 2", "| 9"]
    runs = [metrics(folder / "train") for folder in folders]
    for words, run, folder in zip(cells, runs, folders, strict=True):
        losses = {row["stage"]: row["eval_loss"] for row in run if "eval_loss" in row}
        assert words[1:3] == [f"{losses[stage]:.4f}" for stage in ("init", "trained")]
        config = json.loads((folder / "init" / "run.json").read_text())["config"]
        assert (f"{config['init_samples']}-rows-s{config['init_seed']}") == folder.name
    assert cells[0][3:5] == cells[1][3:5] == ["-", "-"]  # one seed: nothing between seeds
    assert cells[1][5:] == ["-", "- |"]
    # Against scipy's principal angles; three digits are printed.
    expected = [overlap(folders, side) for side in "AB"]
    found = [float(word.strip(" |")) for word in cells[0][5:]]
    assert found == pytest.approx(expected, abs=6e-4)
    # The same batches after different inits: other losses of the same tokens.
    small, large = ([row for row in run if "loss" in row] for run in runs)
    assert [row["tokens"] for row in small] == [row["tokens"] for row in large]
    assert small[0]["loss"] != large[0]["loss"]


def overlap(folders: list[Path], side: str) -> float:
    bases = [load_file(folder / "init" / "basis.safetensors") for folder in folders]
    names = [name for name in bases[0] if name.endswith(f".lora_{side}")]
    assert len(names) == 14
    each = []
    for name in names:
        spans = [basis[name].double().numpy() for basis in bases]
        angles = subspace_angles(*(span.T if side == "A" else span for span in spans))
        each.append(np.mean(np.cos(angles) ** 2))
    return float(np.mean(each))

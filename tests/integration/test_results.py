"""The scripts of docs/results.md that are not `lorasb compare`, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, word_rows, write_jsonl

pytestmark = pytest.mark.slow


def run(script: str, folder: Path, *options: str) -> str:
    data = write_jsonl(folder / "rows.jsonl", word_rows(24))
    held_out = write_jsonl(folder / "held-out.jsonl", word_rows(30)[24:])
    command = [sys.executable, str(ROOT / "scripts/results" / script)]
    command += ["--output", str(folder / "out.json"), "--data", data, "--eval-data", held_out]
    done = subprocess.run(
        [*command, "--max-steps", "3", "--init-samples", "16", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_first_step(tiny_model: Path, tmp_path: Path) -> None:
    """Ways differ in their bases; a second call runs what is missing, and nothing else."""
    options = ["--model", str(tiny_model), "--r", "4", "--lr", "2e-2", "--seeds", "1"]
    run("first_step.py", tmp_path, *options, "--ways", "tokens,rows")
    text = run("first_step.py", tmp_path, *options, "--ways", "tokens,rows,signs,eta-20")
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert list(results) == ["tokens 1", "rows 1", "signs 1", "eta-20 1"]
    assert "tokens, seed" not in text
    assert text.count("\n| ") >= 5, "the header and four rows"
    for result in results.values():
        assert result["at_the_end"] < result["after_init"]
    assert len({result["after_init"] for result in results.values()}) >= 3
    assert "was made with" in failure("first_step.py", tmp_path, *options, "--r", "8")


def failure(script: str, folder: Path, *options: str) -> str:
    with pytest.raises(AssertionError) as caught:
        run(script, folder, *options)
    return str(caught.value)


def test_learning_rates(tiny_model: Path, tmp_path: Path) -> None:
    options = ["--models", str(tiny_model), "--ranks", "4", "--batches", "2"]
    text = run("learning_rates.py", tmp_path, *options)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results) == 5
    assert len({result["after_init"] for result in results.values()}) == 1, "one init"
    assert len({result["loss"] for result in results.values()}) == 5
    best = min(result["loss"] for result in results.values())
    assert f"| {best:.4f} |" in text

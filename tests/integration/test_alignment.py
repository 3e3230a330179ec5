"""`--track-alignment` in whole runs: what it leaves behind, and what it leaves alone."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from lorasb_ds.config.run_layout import ALIGNMENT, ALIGNMENT_PICTURE
from lorasb_ds.runs.history import Row, read_rows
from tests.runs import metrics, run_worker, word_rows, write_jsonl


def losses(folder: Path) -> list[float]:
    return [row[key] for row in metrics(folder) for key in ("loss", "eval_loss") if key in row]


def bits(rows: list[Row]) -> list[str]:
    """Of every number; nan is equal to nan."""
    return [repr(row) for row in rows]


@pytest.mark.parametrize("method", ["lora-sb", pytest.param("pissa", marks=pytest.mark.slow)])
def test_a_tracked_run(tiny_model: Path, tmp_path: Path, method: str) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(30))
    options = (
        f"--model {tiny_model} --data {data} --eval-data {data} --r 4 --dtype fp32 "
        f"--method {method} --train-batch-size 4 --micro-batch-size 2 --max-steps 5 "
        "--save-every 2 --lr 5e-3"
    ).split()
    tracked = ("--track-alignment", "2", "--init-memory-gib", "1e-4")  # layers in groups
    plain, folder = tmp_path / "plain", tmp_path / "tracked"
    run_worker(*options, "--output-dir", str(plain))
    assert not (plain / ALIGNMENT).exists()
    output = run_worker(*options, "--output-dir", str(folder), *tracked)
    assert losses(folder) == losses(plain), "the same to the bit"
    rows = read_rows(folder / ALIGNMENT)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    assert len(layers) == 14
    assert [(row["step"], row["layer"]) for row in rows] == [
        (step, layer) for step in (0, 2, 4) for layer in layers
    ]
    for row in rows:
        assert 0 < row["gradient_cosine"] < 1
        assert 0 < row["sign_cosine"] < 1
        assert row["gradient_norm"] > 0
        no_step = row["step"] == 0 and method == "pissa"  # which begins with W0
        assert math.isnan(row["update_cosine"]) == no_step
    told = [line for line in output.splitlines() if "the adapter holds" in line]
    assert [line.split(":")[1].split()[1] for line in told] == ["0", "2", "4"]
    assert "(step 0: " in told[1]
    assert (folder / ALIGNMENT_PICTURE).read_bytes().startswith(b"\x89PNG")
    # The last steps once more, from a checkpoint; and all of them, from the init.
    for last in (2, 0):
        for path in (folder / "checkpoints").glob("step-*"):
            if int(path.name[5:]) > last:
                shutil.rmtree(path)
        (folder / "report.md").unlink()
        run_worker(*options, "--output-dir", str(folder), "--resume", "auto", *tracked)
        assert bits(read_rows(folder / ALIGNMENT)) == bits(rows), last
        assert losses(folder) == losses(plain)

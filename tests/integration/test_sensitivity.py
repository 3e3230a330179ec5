"""`lorasb sensitivity` as a user runs it; and an init on one task for training on another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.linalg import subspace_angles

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.training.prepare import prepare
from tests.runs import metrics, run_command, run_worker, word_rows, write_jsonl

SUMS = [{"problem": f"What is {i} + {i}?", "solution": str(2 * i)} for i in range(30)]
NAMES = [f"{size}-rows-s{seed}" for size in (2, 9) for seed in (1, 2)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    return {
        "words": write_jsonl(folder / "words.jsonl", word_rows(40)),
        "sums": write_jsonl(folder / "sums.jsonl", SUMS),
        "eval": write_jsonl(folder / "eval.jsonl", word_rows(6)),
    }


class Study:
    """`lorasb sensitivity` of a tiny model: samples of one task, training on another."""

    def __init__(self, folder: Path, model: Path, files: dict[str, str]) -> None:
        self.folder, self.model, self.files = folder, model, files

    def __call__(self, more: str, status: int = 0) -> str:
        return run_command(
            *f"lorasb sensitivity --num-procs 1 --parallel 2 --model {self.model} --data "
            f"{self.files['words']} --eval-data {self.files['eval']} --init-data "
            f"{self.files['sums']} --r 4 --dtype fp32 --max-steps 3 --init-lr 1e-3 "
            f"--share 0.001,0.3,0.01 --output-dir {self.folder} {more}".split(),
            status=status,
            timeout=380,
        )

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def described(self) -> dict[str, Any]:
        return json.loads((self.folder / "sensitivity.json").read_text())


@pytest.fixture(scope="module")
def study(
    tiny_model: Path, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Study:
    """With a seed more than at first."""
    study = Study(tmp_path_factory.mktemp("sensitivity") / "study", tiny_model, files)
    first = study("--init-seeds 1")
    assert "0.001 of 30 rows: samples of 2 (the fewest that there can be" in first
    assert "0.01 of 30 rows: samples of 2 (the fewest" in first
    assert "0.3 of 30 rows: samples of 9" in first
    assert study.described()["sizes"][0]["overlap_between_seeds"] == {"A": None, "B": None}
    again = study("--init-seeds 1,2")
    assert "2 of 4 runs have come to their end before" in again
    assert f"{NAMES[1]} begins (1 of 2)" in again
    assert f"{NAMES[3]} begins (2 of 2)" in again
    return study


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_what_it_leaves(study: Study) -> None:
    assert {path.name for path in study.folder.glob("runs/*/")} == set(NAMES)
    assert (study.folder / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    found = study.described()
    assert [run["name"] for run in found["runs"]] == NAMES
    for run in found["runs"]:
        rows = metrics(study.run(run["name"]))
        losses = {row["stage"]: row["eval_loss"] for row in rows if "eval_loss" in row}
        assert (run["init_loss"], run["loss"]) == (losses["init"], losses["trained"])
        config = json.loads((study.run(run["name"]) / "run.json").read_text())["config"]
        assert (config["init_samples"], config["init_seed"]) == (run["num_rows"], run["seed"])
        init = json.loads((study.run(run["name"]) / "init.json").read_text())
        assert init["num_samples"] + init["step"]["num_samples"] == run["num_rows"]
        assert init["step"]["init_lr"] == run["init_lr"] == 1e-3
    markdown = (study.folder / "sensitivity.md").read_text()
    assert all(f"| {name} |" in markdown for name in NAMES)


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_the_same_batches_after_different_inits(study: Study) -> None:
    """The base's loss and every step's tokens are the same; the losses of steps are not."""
    runs = [metrics(study.run(name)) for name in NAMES]
    for rows in runs[1:]:
        assert rows[0]["eval_loss"] == runs[0][0]["eval_loss"]
        assert [r["tokens"] for r in rows if "loss" in r] == [
            r["tokens"] for r in runs[0] if "loss" in r
        ]
    assert len({next(row["loss"] for row in rows if "loss" in row) for rows in runs}) == len(NAMES)


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_overlaps_of_the_bases_on_disk(study: Study) -> None:
    """Against scipy's principal angles, a layer and a pair at a time."""
    bases = [load_file(study.run(name) / "basis.safetensors") for name in NAMES]
    layers = [name.removesuffix(".S") for name in bases[0] if name.endswith(".S")]
    assert len(layers) == 14

    def overlap(i: int, j: int, side: str) -> float:
        each = []
        for layer in layers:
            spans = [bases[k][f"{layer}.lora_{side}"].double().numpy() for k in (i, j)]
            angles = subspace_angles(*(span.T if side == "A" else span for span in spans))
            each.append(np.mean(np.cos(angles) ** 2))
        return float(np.mean(each))

    found = study.described()
    small, large = found["sizes"]
    for side in "AB":
        # fp32 against double, of numbers up to 1.
        for i, j in ((0, 1), (0, 3), (2, 3)):
            assert found["overlaps"][side][i][j] == pytest.approx(overlap(i, j, side), abs=1e-5)
        between = small["overlap_between_seeds"][side]
        assert between == pytest.approx(overlap(0, 1, side), abs=1e-5)
        with_largest = small["overlap_with_largest"][side]
        expected = (overlap(0, 3, side) + overlap(1, 2, side)) / 2
        assert with_largest == pytest.approx(expected, abs=1e-5)
        assert large["overlap_between_seeds"][side] > between, "larger samples are more alike"


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_it_goes_on_with_the_same_options_only(study: Study) -> None:
    assert "--r is 5 now, and was 4" in study("--init-seeds 1,2 --r 5", status=2)
    assert "One sample alone cannot be compared" in study("--init-seeds 1 --share 0.1", status=2)
    output = study("--init-seeds 2,1 --dry-run")
    assert f"{NAMES[1]}: lorasb train --num-procs 1 " in output
    assert "--init-samples 2 --init-seed 2 --resume auto" in output


@pytest.fixture(scope="module")
def on_one_task(
    tiny_model: Path, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Inits on two ZeRO-3 ranks of the rows of sums: as what is trained on, and beside that."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {"sums": f"--data {files['sums']}"}
    rows["words"] = f"--data {files['words']} --init-data {files['sums']}"
    for name, given in rows.items():
        output = run_worker(
            *f"--init-only --model {tiny_model} {given} --r 4 --dtype fp32 "
            f"--init-samples 6 --init-seed 3 --output-dir {folder / name}".split(),
            world_size=2,
        )
    assert f"rows for the init ({files['sums']}): 30 kept" in output
    assert "training rows: 40 kept" in output
    return {name: folder / name for name in rows}


def test_the_init_is_that_of_its_own_rows(on_one_task: dict[str, Path]) -> None:
    """Gradients and eta: to the bit, whatever is to be trained on."""
    alone, beside = (load_file(folder / "basis.safetensors") for folder in on_one_task.values())
    assert alone.keys() == beside.keys()
    assert all(torch.equal(tensor, beside[name]) for name, tensor in alone.items())
    reports = [json.loads((f / "init.json").read_text()) for f in on_one_task.values()]
    assert reports[0]["step"]["losses"] == reports[1]["step"]["losses"]
    assert reports[0]["loss"] == reports[1]["loss"]
    described = json.loads((on_one_task["words"] / "run.json").read_text())
    assert described["rows"]["init"] == {"kept": 30}
    assert described["rows"]["train"] == {"kept": 40}
    assert (
        f"adapter; init on {described['config']['init_data'][0]}."
        in (on_one_task["words"] / "report.md").read_text()
    )


def test_one_init_serves_several_tasks(
    on_one_task: dict[str, Path], tiny_model: Path, files: dict[str, str]
) -> None:
    """With --init-from and the rows that it was made of; a replay on other data keeps them."""
    made = on_one_task["words"]
    common = {"model": str(tiny_model), "dtype": "fp32", "r": 4, "init_samples": 6, "init_seed": 3}
    given = common | {"init_from": str(made), "init_data": files["sums"]}
    for data in (files["sums"], files["eval"]):
        assert prepare(load_run_config(given | {"data": data}), 1).stored_init is not None
    replayed = load_run_config({"data": files["eval"]}, str(made / "run.json"))
    assert replayed.init_data == (files["sums"],)

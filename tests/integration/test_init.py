"""`lorasb init`, and what `lorasb train --init-from` makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.errors import ConfigError
from lorasb_ds.training.prepare import prepare
from tests.runs import metrics, run_command, run_worker, word_rows, write_jsonl

COMMON = {"dtype": "fp32", "r": 12, "init_samples": 4}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", word_rows(20))


@pytest.fixture(scope="module")
def made(tiny_model: Path, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init") / "init"
    output = run_worker(
        *f"--init-only --model {tiny_model} --data {rows} --r 12 --dtype fp32 --init-samples 4 "
        f"--micro-batch-size 1 --init-memory-gib 1.5e-4 --output-dir {folder}".split(),
        world_size=2,
    )
    assert "groups of layers" in output
    assert "basis saved" in output
    return folder


def test_the_folder(made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    assert names >= {"basis.safetensors", "init.json", "init.png", "report.md", "run.json"}
    assert not names & {"adapter", "loss.png"}
    assert (made / "init.png").read_bytes().startswith(b"\x89PNG")
    report = (made / "report.md").read_text()
    assert "passes over the sample | 3, and one more forward |" in report
    assert "## Training" not in report
    assert report.count("| model.layers.") == 14
    init = json.loads((made / "init.json").read_text())
    parts = ("gradients_s", "communication_s", "svd_s")
    assert all(init[part] > 0 for part in parts)
    assert sum(init[part] for part in parts) + init["step"]["seconds"] <= init["total_s"]
    # The first rows are the gradient's, the others were held back.
    assert (init["num_samples"], init["step"]["num_samples"]) == (3, 1)


@pytest.mark.slow
def test_the_command_itself(tiny_model: Path, rows: str, tmp_path: Path) -> None:
    output = run_command(
        *f"lorasb init --num-procs 2 --model {tiny_model} --data {rows} --r 12 --dtype fp32 "
        f"--init-samples 4 --micro-batch-size 1 --init-memory-gib 1.5e-4 "
        f"--output-dir {tmp_path}/init".split()
    )
    assert "groups of layers" in output
    assert "basis saved" in output


@pytest.mark.parametrize(("r", "num_procs"), [(12, 3), (5, 1)])
def test_train_takes_it_up(
    made: Path, tiny_model: Path, rows: str, tmp_path: Path, r: int, num_procs: int
) -> None:
    """On other numbers of processes, sharded and not, and cut to a smaller r."""
    run_worker(
        *f"--model {tiny_model} --data {rows} "
        f"--eval-data {rows} --r {r} --dtype fp32 --init-from {made} --init-samples 4 "
        f"--micro-batch-size 1 --max-steps 2 "
        f"--output-dir {tmp_path}/run".split(),
        world_size=num_procs,
    )
    stored, taken = (load_file(f / "basis.safetensors") for f in (made, tmp_path / "run"))
    cut = {"lora_A": lambda t: t[:r], "lora_B": lambda t: t[:, :r], "lora_R": lambda t: t[:r, :r]}
    assert stored.keys() == taken.keys()
    for name, tensor in taken.items():
        expected = cut.get(name.rpartition(".")[2], lambda t: t[:r])(stored[name])
        assert torch.equal(tensor, expected), name
    init = json.loads((tmp_path / "run" / "init.json").read_text())
    for name, layer in init["layers"].items():
        S = stored[f"{name}.S"].double().square()
        whole = json.loads((made / "init.json").read_text())["layers"][name]["captured_energy"]
        share = (S[:r].sum() / S.sum()).item()
        assert layer["captured_energy"] == pytest.approx(whole * share, rel=1e-6)
    losses = [row["eval_loss"] for row in metrics(tmp_path / "run") if "eval_loss" in row]
    assert losses[1] < losses[0], "the fill of the earlier run descends here, too"
    steps = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert len(steps) == 2


def test_the_schedule_s_eta(made: Path, tiny_model: Path, rows: str, tmp_path: Path) -> None:
    """3 steps, all of them warmup to 9e-4: the first one's learning rate is a third of that."""
    run_worker(
        *f"--init-only --model {tiny_model} --data {rows} --r 12 --dtype fp32 "
        f"--init-from {made} --init-samples 4 --init-lr schedule --lr 9e-4 --max-steps 3 "
        f"--warmup-ratio 0.99 "
        f"--output-dir {tmp_path}/run".split()
    )
    basis = load_file(tmp_path / "run" / "basis.safetensors")
    for name, R in basis.items():
        if name.endswith(".lora_R"):
            S = basis[name.replace("lora_R", "S")]
            torch.testing.assert_close(R, torch.diag(-3e-4 * S))


def refused(made: Path, **given: Any) -> str:
    with pytest.raises(ConfigError) as error:
        prepare(load_run_config(COMMON | {"init_from": str(made)} | given), 1)
    return str(error.value)


def test_what_was_made_from_something_else_is_refused(
    made: Path, tiny_model: Path, rows: str, tmp_path: Path
) -> None:
    same = {"model": str(tiny_model), "data": rows}
    prepare(load_run_config(COMMON | {"init_from": str(made)} | same), 2)
    assert "exceeds r = 12 of the basis" in refused(made, **same | {"r": 13})
    assert "--seed" in refused(made, **same, seed=7)
    assert ": --dtype differ" in refused(made, **same | {"dtype": "bf16"})
    assert ": --init-update differ" in refused(made, **same, init_update="raw")
    assert ": target layers differ" in refused(made, **same, target_modules="q_proj")
    other = write_jsonl(tmp_path / "other.jsonl", word_rows(21)[1:])
    assert "rows of the init sample" in refused(made, **same | {"data": other})
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_model, tuned)
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    assert ": model files differ" in refused(made, **same | {"model": str(tuned)})


def test_what_is_no_basis_is_refused(made: Path, tiny_model: Path, rows: str, tmp_path: Path):
    same = {"model": str(tiny_model), "data": rows}
    assert "there is no basis.safetensors" in refused(tmp_path, **same)
    broken = tmp_path / "broken"
    shutil.copytree(made, broken)
    (broken / "basis.safetensors").write_bytes(b"0" * 100)
    assert "not a basis of this version" in refused(broken, **same)
    (broken / "init.json").unlink()
    assert "there is no init.json" in refused(broken, **same)
    shutil.copy(made / "basis.safetensors", broken)
    (broken / "init.json").write_text("{}")
    assert "not a basis of this version" in refused(broken, **same)
    assert "would be overwritten" in refused(made, **same, output_dir=str(made), overwrite=True)


SUMS = [{"problem": f"What is {i} + {i}?", "solution": str(2 * i)} for i in range(30)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    return {
        "words": write_jsonl(folder / "words.jsonl", word_rows(40)),
        "sums": write_jsonl(folder / "sums.jsonl", SUMS),
        "eval": write_jsonl(folder / "eval.jsonl", word_rows(6)),
    }


@pytest.fixture(scope="module")
def on_one_task(
    tiny_model: Path, tasks: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Inits on two ZeRO-3 ranks of the rows of sums: as what is trained on, and beside that."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {"sums": f"--data {tasks['sums']}"}
    rows["words"] = f"--data {tasks['words']} --init-data {tasks['sums']}"
    for name, given in rows.items():
        output = run_worker(
            *f"--init-only --model {tiny_model} {given} --r 4 --dtype fp32 "
            f"--init-samples 6 --init-seed 3 --output-dir {folder / name}".split(),
            world_size=2,
        )
    assert f"rows for the init ({tasks['sums']}): 30 kept" in output
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
    on_one_task: dict[str, Path], tiny_model: Path, tasks: dict[str, str]
) -> None:
    """With --init-from and the rows that it was made of; a replay on other data keeps them."""
    made = on_one_task["words"]
    common = {"model": str(tiny_model), "dtype": "fp32", "r": 4, "init_samples": 6, "init_seed": 3}
    given = common | {"init_from": str(made), "init_data": tasks["sums"]}
    for data in (tasks["sums"], tasks["eval"]):
        assert prepare(load_run_config(given | {"data": data}), 1).stored_init is not None
    replayed = load_run_config({"data": tasks["eval"]}, str(made / "run.json"))
    assert replayed.init_data == (tasks["sums"],)

"""Whole runs on the device: each finishes, and computes what it computes on the CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasb_ds.config.methods import METHODS
from tests.runs import REALLY_SHARDED, metrics, run_ranks, word_rows, write_jsonl

CONFIGS = "ds_configs"
ZERO1, ZERO2, ZERO3 = ({"ds_config": f"{CONFIGS}/zero{stage}.json"} for stage in (1, 2, 3))
SHARDED = ZERO3 | {"zero_optimization": REALLY_SHARDED, "dtype": "fp32"}
# With --init-memory-gib: less than all layers take.
IN_GROUPS = {"init_memory_gib": 1.5e-4, "init_offload": True, "micro_batch_size": 1}
RECOMPUTED = {"gradient_checkpointing": True}
# Every answer is a class.
CLASSIFIES = {
    "task_type": "sequence-classification",
    "prompt_column": "question",
    "response_column": "answer",
}

# Name -> options. The first ones are in the default tests; each of them holds several features.
RUNS: dict[str, dict[str, Any]] = {
    "zero3": SHARDED,
    "moe": SHARDED | {"model": "moe"},
    "recomputed": SHARDED | RECOMPUTED,
    "activations-offloaded": SHARDED | RECOMPUTED | {"activation_offload": True},
}
METHOD_RUNS: dict[str, dict[str, Any]] = {
    **{f"method-{name}": SHARDED | {"method": name} for name in METHODS},
    "method-lora-one-preconditioned": SHARDED | {"method": "lora-one", "precondition": 0.1},
    "dora": ZERO3 | {"method": "peft:dora"},
}
OTHER_RUNS: dict[str, dict[str, Any]] = {
    # By bitsandbytes' kernels for all devices, which are in PyTorch; on CUDA it has its own.
    "zero3-4bit": ZERO3 | {"load_in_4bit": True, "dtype": "bf16"},
    "groups-offloaded": SHARDED | IN_GROUPS,
    "zero2-8bit-adafactor": ZERO2 | {"load_in_8bit": True, "optimizer": "adafactor"},
    "zero1-accumulation": ZERO1 | {"train_batch_size": 8, "dtype": "bf16"},
    "zero3-fp16-checkpointing": ZERO3 | {"dtype": "fp16", "gradient_checkpointing": True},
    **{
        f"optimizer-{name}": (ZERO2 if name in ("muon", "sgd") else ZERO3) | {"optimizer": name}
        for name in ("sgd", "lion", "adafactor", "muon")
    },
    **{f"zero2-{dtype}": ZERO2 | {"dtype": dtype} for dtype in ("fp16", "bf16", "fp32")},
    "offload": {"ds_config": f"{CONFIGS}/zero3_offload.json"},
    "hpz": {"ds_config": f"{CONFIGS}/zero3_hpz.json"},
    "8bit-sharded": SHARDED | {"load_in_8bit": True, "dtype": "bf16"},
    "rebased": SHARDED | {"rebase_every": 1},
    "rebased-groups": SHARDED | IN_GROUPS | {"rebase_every": 1},
    **{
        f"rebased-{name}": {"ds_config": f"{CONFIGS}/{name}.json", "rebase_every": 1}
        for name in ("zero2", "zero3_offload", "zero3_hpz")
    },
    "pieces": SHARDED | RECOMPUTED | {"sequence_parallel": 2, "eval_every": 1},
    "packing": ZERO3 | {"packing": True, "max_length": 128},
    "tracked": ZERO3
    | {
        "track_alignment": 1,
        "eval_every": 1,
        "generate_samples": 2,
        "load_best_model_at_end": True,
    },
}
MOE_RUNS: dict[str, dict[str, Any]] = {
    **{f"moe-{name}": SHARDED | {"model": "moe", "method": name} for name in ("pissa", "lora")},
    **{f"moe-{n}bit": ZERO3 | {"model": "moe", f"load_in_{n}bit": True} for n in (4, 8)},
    "moe-checkpointing-fp16": ZERO2
    | {"model": "moe", "dtype": "fp16", "gradient_checkpointing": True},
    "moe-rebased": SHARDED | {"model": "moe", "rebase_every": 1},
    "moe-groups": SHARDED | IN_GROUPS | {"model": "moe", "init_memory_gib": 1e-5},
    **{family: SHARDED | {"model": family} for family in ("gpt_oss", "deepseek_v3", "qwen3_moe")},
}
CLASSIFIER_RUNS: dict[str, dict[str, Any]] = {
    "classifier": SHARDED | CLASSIFIES | {"eval_every": 1},
    "classifier-bf16": ZERO2 | CLASSIFIES | {"dtype": "bf16", "method": "lora"},
}
SLOW_RUNS = (
    METHOD_RUNS,
    OTHER_RUNS,
    MOE_RUNS,
    CLASSIFIER_RUNS,
)  # each in a process group of its own


@pytest.fixture(scope="module")
def configured(
    tiny_model: Path,
    tiny_moe: Path,
    tiny_family: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[dict[str, dict[str, Any]], Path], dict[str, dict[str, Any]]]:
    """A function that gives runs their models, rows and folders."""
    folder = tmp_path_factory.mktemp("given")
    rows = write_jsonl(folder / "rows.jsonl", word_rows(40))
    dora = folder / "dora.json"
    dora.write_text(json.dumps({"peft_type": "LORA", "r": 4, "use_dora": True}))
    models = {None: lambda: tiny_model, "moe": lambda: tiny_moe}

    def configs(runs: dict[str, dict[str, Any]], out: Path) -> dict[str, dict[str, Any]]:
        found = {}
        for name, options in runs.items():
            kind = options.get("model")
            model = models[kind]() if kind in models else tiny_family(str(kind))
            given = {
                "data": rows,
                "val_set_size": 8,
                "micro_batch_size": 2,
                "max_steps": 2,
                "init_samples": 8,
                "lr": 1e-2,
                "r": 4,
                **options,
                "model": str(model),
                "output_dir": str(out / name),
            }
            if given.get("method") == "peft:dora":
                del given["r"]
                given["method"] = f"peft:{dora}"
            found[name] = given
        return found

    return configs


def train(configs: dict[str, dict[str, Any]], world_size: int, out: Path, **more: Any) -> None:
    run_ranks(
        "tests.device.cases:runs", world_size, timeout=380, configs=configs, out=str(out), **more
    )


@pytest.fixture(scope="module")
def default_runs(configured: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    train(configured(RUNS, out), 2, out)
    return out


@pytest.fixture(scope="module")
def slow_runs(configured: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that does all runs of a table when it is asked for the first of them."""
    folders: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in folders:
            out = tmp_path_factory.mktemp("slow-runs")
            runs = next(table for table in SLOW_RUNS if name in table)
            folders.update(dict.fromkeys(runs, out))
            train(configured(runs, out), 2, out)
        return folders[name]

    return run


def check_run(out: Path, name: str, world_size: int = 2) -> list[dict[str, Any]]:
    """What each rank has counted in a run that has finished well."""
    found = [json.loads((out / f"{name}.{rank}.json").read_text()) for rank in range(world_size)]
    for rank, of_rank in enumerate(found):
        assert of_rank["problem"] is None, f"rank {rank}: {of_rank['problem']}"
    losses = [
        row[key] for row in metrics(out / name) for key in ("loss", "eval_loss") if key in row
    ]
    assert torch.tensor(losses).isfinite().all(), losses
    return found


@pytest.mark.parametrize("name", RUNS)
def test_runs(name: str, default_runs: Path) -> None:
    check_run(default_runs, name)


def test_offloaded_activations_come_back_as_they_were(default_runs: Path) -> None:
    runs = [default_runs / name for name in ("recomputed", "activations-offloaded")]
    losses = [[row["loss"] for row in metrics(run) if "loss" in row] for run in runs]
    assert losses[0] == losses[1]
    bases = [(run / "basis.safetensors").read_bytes()[-10_000:] for run in runs]
    assert bases[0] == bases[1], "nor does the init's gradient change"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for table in SLOW_RUNS for name in table])
def test_all_ways_to_run(name: str, slow_runs: Callable[[str], Path]) -> None:
    check_run(slow_runs(name), name)


def test_the_numbers_are_the_cpu_s(configured: Any, default_runs: Path, tmp_path: Path) -> None:
    """The same kernels, but by other collectives, and to a side stream's rules."""
    compared = {name: RUNS[name] for name in ("zero3", "moe")}
    train(configured(compared, tmp_path), 2, tmp_path, on_device=False)
    for name in compared:
        check_run(tmp_path, name)
        assert_same_losses(default_runs / name, tmp_path / name)


def assert_same_losses(run: Path, other: Path) -> None:
    for key in ("loss", "eval_loss", "grad_norm"):
        of_runs = [[row[key] for row in metrics(f) if key in row] for f in (run, other)]
        torch.testing.assert_close(*map(torch.tensor, of_runs), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_on_three_ranks(configured: Any, tmp_path: Path) -> None:
    """Rows and experts that three ranks cannot share evenly."""
    names = ("zero3", "moe")
    train(configured({name: RUNS[name] for name in names}, tmp_path), 3, tmp_path)
    for name in names:
        check_run(tmp_path, name, 3)


@pytest.mark.slow
def test_resume(tiny_model: Path, configured: Any, tmp_path: Path) -> None:
    """A run of 4 steps in two parts is the run of 4 steps: random numbers of the device, too."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    options = SHARDED | {"max_steps": 4, "save_every": 2, "lr_scheduler": "constant"}
    whole = configured({"whole": options, "halves": options | {"max_steps": 2}}, tmp_path)
    for given in whole.values():
        given["model"] = str(model)
    train(whole, 2, tmp_path)
    rest = {"rest": {"resume": str(tmp_path / "halves"), "max_steps": 4}}
    train(rest, 2, tmp_path)
    for name in whole:
        check_run(tmp_path, name)
    assert json.loads((tmp_path / "rest.0.json").read_text())["problem"] is None
    ends = [[row["loss"] for row in metrics(tmp_path / name) if "loss" in row] for name in whole]
    assert len(ends[0]) == 4
    assert ends[0] == ends[1]


def test_eval_init_and_merge(configured: Any, default_runs: Path, tmp_path: Path) -> None:
    """The other workers, in one process; the run's held-out loss by two other ways."""
    run = default_runs / "zero3"
    check_run(default_runs, "zero3")
    rows = word_rows(40)
    held_out = write_jsonl(tmp_path / "rows.jsonl", rows[:8])
    model = json.loads((run / "run.json").read_text())["config"]["model"]
    common = f"--data {held_out} --dtype fp32 --max-new-tokens 2"
    work("adapters", f"merge {run} --out {tmp_path}/merged")
    work("eval", f"--adapter {run}/adapter {common} --output-dir {tmp_path}/adapter")
    work("eval", f"--model {tmp_path}/merged {common} --output-dir {tmp_path}/whole")
    files = [tmp_path / name / "eval.json" for name in ("adapter", "whole")]
    losses = [json.loads(file.read_text())["results"][0]["loss"] for file in files]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    work(
        "train",
        f"--init-only --model {model} --data {held_out} --r 4 --init-samples 4 --dtype fp32 "
        f"--output-dir {tmp_path}/init",
    )
    assert (tmp_path / "init" / "basis.safetensors").is_file()


def work(worker: str, options: str) -> None:
    run_ranks("tests.device.cases:worker", 1, worker=worker, options=options.split())

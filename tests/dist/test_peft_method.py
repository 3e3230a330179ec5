"""PEFT's own methods as whole runs: on shards, against a plain loop of torch's, and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import get_peft_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.batch import Batch, collate
from lorasb_ds.data.dataset import tokenize_rows
from lorasb_ds.data.sources import load_rows
from lorasb_ds.models.base import Base
from lorasb_ds.runs.checkpoint import checkpoint_path
from tests.references import own_loss
from tests.runs import REALLY_SHARDED, Runs, metrics, run_ranks, word_rows, write_jsonl

# PEFT's, of norms.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")

LR, STEPS, ROWS = 1e-2, 3, 8
# Looks at W0 in its init (dora, psoft), reads it in its forward (dora), is no matrix (ia3, ln),
# shares buffers between layers (vera).
FILES: dict[str, dict[str, Any]] = {
    "dora": {"peft_type": "LORA", "use_dora": True, "r": 4},
    "loha": {"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj", "down_proj"]},
    "oft": {"peft_type": "OFT", "oft_block_size": 4},
    "psoft": {"peft_type": "PSOFT", "r": 8},
    "vera": {"peft_type": "VERA", "r": 16},
    "ia3": {"peft_type": "IA3"},
    "ln": {"peft_type": "LN_TUNING"},
}
QUICK = ("dora", "ln")
NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FILES]
# Losses near ln 49152 in fp32, whose sums go in other orders; training moves them by 1e-3 at least.
ROUNDING = 2e-5


def config_of(name: str, model: Path, folder: Path, **options: Any) -> dict[str, Any]:
    (folder / f"{name}.json").write_text(json.dumps(FILES[name]))
    return {
        "model": str(model),
        "data": str(folder / "rows.jsonl"),
        "eval_data": str(folder / "held-out.jsonl"),
        "output_dir": str(folder / name),
        "method": f"peft:{folder / name}.json",
        "lr": LR,
        "lr_scheduler": "constant",
        "warmup_ratio": 0.0,
        "max_grad_norm": 0.0,
        "dtype": "fp32",
        "max_steps": STEPS,
        "save_every": 2,
        "init_samples": 8,
        "train_batch_size": ROWS,
        "micro_batch_size": 2,
        **options,
    }


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """On two ranks that hold shards only; every step is of all rows."""
    folder = tmp_path_factory.mktemp("peft")
    write_jsonl(folder / "rows.jsonl", word_rows(ROWS))
    write_jsonl(folder / "held-out.jsonl", word_rows(ROWS + 6)[ROWS:])

    def make(name: str) -> Path:
        config = config_of(name, tiny_model, folder)
        zero = {"stage": 3, **REALLY_SHARDED}
        run_ranks("methods", 2, runs=[config], zero_optimization=zero)
        return Path(config["output_dir"])

    return Runs(folder, make)


def batch_of(file: Path, model: Path) -> Batch:
    tokenizer = Base(str(model)).tokenizer
    rows = tokenize_rows(load_rows(str(file)), tokenizer, RunConfig())
    return collate(rows.examples, tokenizer.pad_token_id)


def losses(run: Path) -> dict[str, float]:
    return {row["stage"]: row["eval_loss"] for row in metrics(run) if "stage" in row}


def base_of(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", NAMES)
def test_trains_as_a_plain_loop_does(name: str, runs: Runs, tiny_model: Path) -> None:
    """PEFT's model in one process, from the same beginning, by torch's AdamW and autograd."""
    found = losses(runs[name])
    values = {"target_modules": "all-linear"} if name not in ("ia3", "ln") else {}
    tuned: Any = get_peft_model(
        base_of(tiny_model), get_peft_config({**values, "task_type": "CAUSAL_LM", **FILES[name]})
    )
    there = dict(tuned.named_parameters()) | dict(tuned.named_buffers(remove_duplicate=False))
    for key, value in load_file(runs[name] / "basis.safetensors").items():
        there[f"base_model.model.{key}"].data.copy_(value)
    files = (runs.folder / "rows.jsonl", runs.folder / "held-out.jsonl")
    rows, held_out = (batch_of(file, tiny_model) for file in files)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    with torch.no_grad():
        before = own_loss(tuned, held_out).item()
    for _ in range(STEPS):
        optimizer.zero_grad()
        own_loss(tuned, rows).backward()
        optimizer.step()
    with torch.no_grad():
        after = own_loss(tuned, held_out).item()
    assert found["base"] == pytest.approx(found["init"], abs=ROUNDING)
    assert before == pytest.approx(found["init"], abs=ROUNDING)
    assert after == pytest.approx(found["trained"], abs=ROUNDING)
    assert abs(after - before) > 1e-3
    described = json.loads((runs[name] / "run.json").read_text())
    assert described["trainable_parameters"] == sum(p.numel() for p in trained)


@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_what_was_trained(name: str, runs: Runs, tiny_model: Path) -> None:
    tuned = PeftModel.from_pretrained(base_of(tiny_model), runs[name] / "adapter").eval()
    with torch.no_grad():
        loss = own_loss(tuned, batch_of(runs.folder / "held-out.jsonl", tiny_model)).item()
    assert loss == pytest.approx(losses(runs[name])["trained"], abs=ROUNDING)


@pytest.mark.slow
def test_resumes_on_another_number_of_ranks(runs: Runs, tiny_model: Path, tmp_path: Path) -> None:
    """From step 2 of two ranks' run; the file of --method may be gone."""
    names, configs = ("dora", "vera"), []
    for name in names:
        run = tmp_path / name
        shutil.copytree(runs[name], run)
        shutil.rmtree(checkpoint_path(run, STEPS))
        shutil.rmtree(run / "adapter")
        (run / "report.md").unlink()
        configs.append({"resume": str(run), "gradient_accumulation_steps": 4})
    moved = [(runs.folder / f"{name}.json").rename(tmp_path / f"{name}.json") for name in names]
    try:
        run_ranks("methods", 1, runs=configs, zero_optimization={"stage": 2})
    finally:
        for file in moved:
            file.rename(runs.folder / file.name)
    for name in names:
        rows = metrics(tmp_path / name)
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
        there = losses(tmp_path / name)["trained"]
        assert there == pytest.approx(losses(runs[name])["trained"], abs=ROUNDING)
        ours, theirs = (
            load_file(folder / name / "adapter" / "adapter_model.safetensors")
            for folder in (tmp_path, runs.folder)
        )
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-5)

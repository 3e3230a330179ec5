"""The Python of docs/training.md and docs/not_ours.md: a run from a program, and TRL after it."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import ROOT, metrics, run_command, word_rows, write_jsonl

pytestmark = pytest.mark.slow
ON_CPU = '"runs/dpo", use_cpu=True, bf16=False, max_steps=4, logging_steps=1, report_to="none"'


def block_of(page: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return block


def run(script: str, folder: Path, **replaced: str) -> str:
    for old, new in replaced.items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    return run_command(sys.executable, "-c", f"import os; os.chdir({str(folder)!r})\n{script}")


def test_a_run_from_python_and_dpo_on_its_adapter(tiny_model: Path, tmp_path: Path) -> None:
    options = f'"{tiny_model}", dtype="fp32", r=8, init_samples=8'
    said = run(block_of("training.md"), tmp_path, **{'"demo"': options})
    folder = tmp_path / "runs/from-python"
    first, *_, last = (row["eval_loss"] for row in metrics(folder) if "stage" in row)
    assert f"finished: {first:.4f} -> {last:.4f}, {folder}/adapter" in said
    folder.rename(tmp_path / "runs/my-run")

    preferences = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "chosen": [{"role": "assistant", "content": row["answer"]}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for row in word_rows(16)
    ]
    write_jsonl(tmp_path / "preferences.jsonl", preferences)
    replaced = {'"mistralai/Mistral-7B-v0.1"': f'"{tiny_model}"', "bfloat16": "float32"}
    replaced |= {
        '"runs/dpo", learning_rate=5e-6, num_train_epochs=1': f"{ON_CPU}, learning_rate=1e-2"
    }
    shows = "\nprint(trainer.state.log_history)\n"
    said = run(block_of("not_ours.md") + shows, tmp_path, **replaced)
    losses = [float(loss) for loss in re.findall(r"'loss': (\d\.\d+)", said)]
    assert math.isclose(losses[0], math.log(2), rel_tol=1e-4), "the reference is our adapter"
    assert losses[-1] < losses[0] - 0.01

    before = load_file(tmp_path / "runs/my-run/adapter/adapter_model.safetensors")
    after = load_file(tmp_path / "runs/dpo/adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    inspect = f"lorasb inspect {tmp_path}/runs/dpo --json --no-base --output {tmp_path}/layers.png"
    layers = json.loads(run_command(*inspect.split()).splitlines()[-1])
    assert len(layers) == len(before) // 2

"""A whole run as a user starts it: the real model, two ZeRO-3 processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasb_ds.models.loading import DTYPES
from lorasb_ds.system.signals import EXIT_STOPPED
from tests.runs import ROOT, metrics, run_command, run_worker, word_rows, write_jsonl
from tests.unit.runs.test_run_log import session_groups

TASK = "reasoning-gym:word_sequence_reversal?max_words=4"
R, STEPS = 32, 12
pytestmark = pytest.mark.timeout(900)  # the fixture below, on a slow CPU
WRITTEN = ("adapter", "exported")
METRICS = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_time_s"}


@pytest.fixture(scope="module")
def run(demo_model: Path, demo_dtype: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    run_command(
        *f"lorasb train --num-procs 2 --data {TASK}&size=200&seed=1 "
        f"--eval-data {TASK}&size=24&seed=2 --r {R} --init-samples 32 --micro-batch-size 8 "
        f"--lr 4e-3 --max-steps {STEPS} --dtype {demo_dtype} --output-dir {folder}".split(),
        timeout=800,
    )
    return folder


@pytest.mark.slow
def test_training_lowers_the_held_out_loss(run: Path) -> None:
    base, filled, trained = (row["eval_loss"] for row in metrics(run) if "eval_loss" in row)
    assert filled < base, "eta = 1e-4 descends on this model"
    # Seen: 3.2 -> 2.1 -> 0.4. The margin leaves room for other processors' arithmetic.
    assert trained < 0.4 * base
    assert trained < 0.6 * filled


@pytest.mark.slow
def test_metrics(run: Path) -> None:
    rows = [row for row in metrics(run) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row.keys() >= METRICS
        assert row["tokens"] > 0
        assert row["step_time_s"] > 0
    rates = [row["lr"] for row in rows]
    assert rates[0] == max(rates) == pytest.approx(4e-3)
    assert 0 < rates[-1] < rates[0]
    (group,) = session_groups(run)
    assert group.hparams["r"].number_value == R
    assert {value.name.tag for value in group.metric_values} >= {"train/loss", "eval/eval_loss"}


@pytest.mark.slow
def test_others_can_read_the_run(run: Path) -> None:
    """Every file has the mode that the umask says, whoever has written it."""
    (run / "as-the-umask-says").touch()
    mode = (run / "as-the-umask-says").stat().st_mode
    for path in run.rglob("*"):
        if path.is_file() and path.parent.name != "launch":  # which has variables of the hosts
            assert path.stat().st_mode == mode, path


@pytest.mark.slow
def test_run_json(run: Path) -> None:
    content = json.loads((run / "run.json").read_text())
    assert content["config"]["r"] == R
    assert content["config"]["output_dir"] == str(run)
    assert content["ds_config"]["train_batch_size"] == 16
    assert content["world_size"] == 2
    assert content["versions"].keys() >= {"lorasb-ds", "python", "torch", "deepspeed"}
    assert "--max-steps" in content["command"]
    assert content["rows"]["train"] == {"kept": 200}
    memory = content["memory"]
    assert memory["measured"].keys() == memory["predicted"]["phases"].keys()
    assert memory["predicted"]["needed_bytes"] < memory["predicted"]["free_bytes"]
    for phase in ("init", "train"):
        predicted = memory["predicted"]["phases"][phase]
        assert 0.5 < predicted / memory["measured"][phase] < 2, phase


@pytest.mark.slow
def test_report(run: Path) -> None:
    text = (run / "report.md").read_text()
    assert f"{210 * R * R:,}" in text, "trainable parameters"
    assert text.count("| model.layers.") == 210
    assert "| GiB | predicted | measured |" in text
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    init = json.loads((run / "init.json").read_text())
    assert init["step"]["loss_after"] < init["step"]["loss_before"]
    assert init["num_groups"] == 1
    assert len(init["step"]["losses"]) >= 4
    assert all(0.2 < layer["captured_energy"] <= 1 for layer in init["layers"].values())


@pytest.mark.slow
def test_basis_is_nearly_orthonormal(run: Path, demo_dtype: str) -> None:
    for name, stored in load_file(run / "basis.safetensors").items():
        kind = name.rpartition(".")[2]
        if kind == "S":
            assert (stored.diff() <= 0).all()
        if kind not in ("lora_A", "lora_B"):
            assert stored.dtype == torch.float32
            continue
        assert stored.dtype == DTYPES[demo_dtype]
        factor = stored.float() if name.endswith("lora_A") else stored.float().T
        error = factor @ factor.T - torch.eye(R)
        assert error.abs().max() <= 3e-3, name
        assert torch.linalg.matrix_norm(error, 2) <= 1e-2, name


@pytest.mark.slow
def test_the_adapter_has_the_same_loss(run: Path, demo_dtype: str, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    done = run_command(
        *f"lorasb eval --adapter {run}/adapter --data {TASK}&size=24&seed=2 "
        f"--max-new-tokens 24 --dtype {demo_dtype} --output-dir {out}".split()
    )
    assert "held-out loss" in done
    (result,) = json.loads((out / "eval.json").read_text())["results"]
    in_memory = [row for row in metrics(run) if "eval_loss" in row][-1]["eval_loss"]
    # bf16: the folder holds B R, the run multiplies by R and then by B.
    assert result["loss"] == pytest.approx(in_memory, abs=0.02)
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    score = result["scores"]["exact_match"]
    assert len(answers) == result["rows"] == score["rows"] == 24
    assert score["right"] == sum(answer["right"] for answer in answers)
    assert score["interval"][0] <= score["share"] <= score["interval"][1]
    assert score["share"] > 0.1, "it has learned something; seen: 0.5"


@pytest.mark.slow
def test_what_comes_out_of_a_run_says_the_same(run: Path, demo_dtype: str, tmp_path: Path) -> None:
    """Its checkpoint on two ZeRO-3 processes, and the merged model: the loss of the run."""
    in_memory = [row for row in metrics(run) if "eval_loss" in row][-1]["eval_loss"]
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    common = f"--data {TASK}&size=24&seed=2 --max-new-tokens 1 --dtype {demo_dtype}"
    several = run_command(
        *f"lorasb eval --num-procs 2 --adapter {checkpoint} {common} "
        f"--output-dir {tmp_path}/several".split()
    )
    assert "95 %" in several
    assert list((tmp_path / "several" / "logs").glob("rank-*.log"))
    run_command(*f"lorasb merge {run} --out {tmp_path}/merged".split())
    run_worker(
        *f"--model {tmp_path}/merged {common} --output-dir {tmp_path}/one".split(),
        worker="eval",
        world_size=None,
    )
    files = [tmp_path / name / "eval.json" for name in ("several", "one")]
    losses = [json.loads(file.read_text())["results"][0]["loss"] for file in files]
    # bf16: B R, or W0 + B R A, are rounded to it, where the run keeps R and B apart.
    assert losses == pytest.approx([in_memory] * 2, abs=0.02)


@pytest.mark.slow
def test_an_evaluation_ends_when_it_is_asked_to(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(200))
    command = (
        f"lorasb eval --num-procs 2 --model {tiny_model} --data {data} --batch-size 1 "
        f"--max-new-tokens 1500 --output-dir {tmp_path}/out"
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    job = subprocess.Popen(command.split(), cwd=ROOT, env={**os.environ, "PATH": path})
    try:
        while len(list((tmp_path / "out" / "logs").glob("rank-*.log"))) < 2:
            assert job.poll() is None
            time.sleep(0.1)
        job.terminate()
        assert job.wait(timeout=60) == EXIT_STOPPED
    finally:
        job.kill()
    assert not (tmp_path / "out" / "eval.json").exists()


@pytest.mark.slow
def test_tasks_of_the_harness(run: Path, demo_dtype: str, tmp_path: Path) -> None:
    row = {"question": "1 + 1 =", "choices": ["0", "2"], "answer": 1}
    data = write_jsonl(tmp_path / "rows.jsonl", [row] * 3)
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    command = (
        f"lorasb eval --adapter {run} --dtype {demo_dtype} --output-dir {tmp_path}/out --lm-eval"
    )
    output = run_command(*command.split(), f"{tmp_path}/toy.yaml", HF_HOME=str(tmp_path / "hf"))
    assert "|toy" in output
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert found["lm_eval"]["toy"]["acc,none"] in (0, 1)
    refused = run_command(*command.split(), "no-such-task", "--overwrite", status=2)
    assert "neither a task" in refused
    assert "--lm-eval: --data" in run_command(*command.split(), "x", "--data", data, status=2)


@pytest.mark.slow
def test_a_run_is_replayed_and_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(9))
    first, again = tmp_path / "first", tmp_path / "again"
    run_command(
        *f"lorasb train --num-procs 1 --model {tiny_model} --data {data} --r 4 --max-steps 3 "
        f"--dtype fp32 --init-lr 1e-3 --micro-batch-size 2 --output-dir {first}".split(),
        OMP_NUM_THREADS="1",  # as the worker below has
    )
    again.mkdir()
    (again / "report.md").write_text("of an older run")
    replay = ["lorasb", "train", "--config", str(first / "run.json"), "--output-dir", str(again)]
    assert "is not empty" in run_command(*replay, status=2)
    assert "is not a run's folder" in run_command(*replay, "--overwrite", status=2)
    assert (again / "report.md").read_text() == "of an older run"
    shutil.copy(first / "run.json", again)  # what marks a run's folder
    run_command(*replay, "--overwrite", OMP_NUM_THREADS="1")
    losses = [[row["loss"] for row in metrics(run)] for run in (first, again)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert "of an older run" not in (again / "report.md").read_text()
    configs = [json.loads((run / "run.json").read_text())["config"] for run in (first, again)]
    differ = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert differ == {"output_dir", "overwrite", "ds_config"}
    # Once more in its own place, reading what it overwrites; and without clipping.
    replay[3] = str(again / "run.json")
    run_worker(*replay[2:], "--overwrite", "--max-grad-norm", "0")
    unclipped = metrics(again)
    assert unclipped[0]["loss"] == losses[0][0]
    assert all(row["grad_norm"] > 0 for row in unclipped)


def train_once(model: Path, data: Path, run: Path) -> str:
    return run_worker(
        *f"--model {model} --data {data} --r 4 --expert-r 0 --max-steps 1 --init-samples 8 "
        f"--dtype fp32 --micro-batch-size 4 --output-dir {run}".split()
    )


def test_peft_reads_an_adapter_of_dense_and_shared_layers(
    tiny_deepseek: Path, tmp_path: Path
) -> None:
    """They have the names of experts. Logits are those of the weights with the update added."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, model = tmp_path / "run", shutil.copytree(tiny_deepseek, tmp_path / "model")
    said = train_once(model, write_jsonl(tmp_path / "rows.jsonl", word_rows(12)), run)
    assert "PEFT" not in said + (run / "report.md").read_text()
    factors = load_file(run / "adapter" / "adapter_model.safetensors")
    input_ids, logits = torch.arange(3, 23).view(2, 10), []
    for kind in ("by hand", "PEFT"):
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if kind == "PEFT":
            base = PeftModel.from_pretrained(base, run / "adapter")
        else:
            for key in factors:
                name = key.removesuffix(".lora_A.weight")
                if name != key:
                    update = factors[f"{name}.lora_B.weight"] @ factors[key]
                    weight = base.get_submodule(name.removeprefix("base_model.model.")).weight
                    weight.data += update
        with torch.no_grad():
            logits.append(base(input_ids).logits)
    assert len(factors) == 2 * 16
    assert torch.allclose(*logits, rtol=0, atol=1e-5 * logits[0].abs().max().item())  # fp32
    shutil.rmtree(model)
    assert "PEFT" not in run_worker("export", str(run), worker="adapters", world_size=None)
    configs = [json.loads((run / n / "adapter_config.json").read_text()) for n in WRITTEN]
    assert configs[0] == configs[1]
    assert configs[0]["target_parameters"] == [f"{n}_proj.weight" for n in ("down", "gate", "up")]


def test_an_adapter_that_peft_would_not_read_is_told(tiny_laguna: Path, tmp_path: Path) -> None:
    """Before it is trained, when it is saved, in the report, and at an export without the base."""
    run, model = tmp_path / "run", shutil.copytree(tiny_laguna, tmp_path / "model")
    said = train_once(model, write_jsonl(tmp_path / "rows.jsonl", word_rows(12)), run)
    what = "PEFT will not read 3 of 16 layers, such as model.layers.1.mlp.shared_experts.gate_proj"
    before, _, after = said.partition("trainable parameters")
    assert f"warning: {what}" in before
    assert f"warning: {what}" in after
    assert f"**Not for PEFT**: {what}" in (run / "report.md").read_text()
    shutil.rmtree(model)
    assert "PEFT will not read 3 of 16 layers" in run_worker(
        "export", str(run), worker="adapters", world_size=None
    )


def test_a_base_without_a_chat_template(tiny_model: Path, tmp_path: Path) -> None:
    """What stands in is said, and stored beside the adapter; so is what of the rows is left out."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    rows = write_jsonl(tmp_path / "rows.jsonl", [{**row, "id": 7} for row in word_rows(8)])
    options = f"--model {base} --data {rows} --r 2 --init-samples 4 --max-steps 1 --dtype fp32"
    out = run_worker(*f"{options} --output-dir {tmp_path / 'run'}".split())
    stands_in, left_out = "the model has no chat template", "left out of the rows: id (8 rows)"
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    report = (tmp_path / "run" / "report.md").read_text()
    for said in (out, report, "\n".join(content["notes"])):
        assert stands_in in said
        assert left_out in said
    assert content["chat_template"] == "stand-in"
    assert len(content["config"]["template_date"]) == len("2026-01-31")
    template = (tmp_path / "run" / "adapter" / "chat_template.jinja").read_text()
    assert "### Answer:" in template
    evaluation = f"--adapter {tmp_path / 'run'} --data {rows} --max-new-tokens 2"
    said = run_worker(*evaluation.split(), worker="eval", world_size=None)
    assert stands_in in said


def test_a_chosen_pad_token_is_named(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    says = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(says | {"pad_token": None}))
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(8))
    output = run_worker(
        *f"--init-only --model {model} --data {data} --r 4 --init-lr 1e-3 "
        f"--target-modules q_proj --output-dir {tmp_path}/run".split()
    )
    assert output.count("has no pad token: padding with <|endoftext|> (masked") == 1


@pytest.mark.parametrize(
    ("ds_config", "options"),
    [
        ("zero3", "--load-in-4bit"),
        pytest.param("zero2", "--load-in-4bit", marks=pytest.mark.slow),
        ("zero3_offload", "--gradient-checkpointing"),
        pytest.param("zero1", "--gradient-accumulation-steps 2", marks=pytest.mark.slow),
    ],
)
def test_two_epochs(tiny_model: Path, tmp_path: Path, ds_config: str, options: str) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(11))
    run_worker(
        *f"--model {tiny_model} --data {data} --eval-data {data} --r 8 {options} "
        f"--ds_config ds_configs/{ds_config}.json --epochs 2 "
        f"--micro-batch-size 2 --init-lr 1e-3 --output-dir {tmp_path}/run".split(),
        world_size=2,
    )
    rows = metrics(tmp_path / "run")
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 2 * (2 if "accumulation" in options else 3), "11 rows, 2 a micro-batch"
    evals: list[Any] = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert evals[-1] < evals[0]
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 14
    assert all(tensor.numel() > 0 and tensor.abs().max() > 0 for tensor in tensors.values())

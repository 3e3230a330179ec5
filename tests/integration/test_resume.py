"""Runs that are stopped, killed, damaged or moved, and go on."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.jobs.ranks import free_port, rank_environment
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.checkpoint import checkpoint_path, list_checkpoints, read_checkpoint
from lorasb_ds.system.signals import EXIT_STOPPED
from lorasb_ds.training.prepare import prepare
from tests.runs import (
    ROOT,
    metrics,
    output_of,
    run_command,
    run_worker,
    small_disk,
    word_rows,
    write_jsonl,
)

STEPS = 24
LORASB = [str(Path(sys.executable).parent / "lorasb"), "train"]


def training(folder: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in metrics(folder) if "loss" in row}


def num_rows(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.is_file() else 0


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            time.sleep(0.5)
            child.send_signal(signal.SIGINT)
        child.wait(timeout=60)


def wait_for_rows(child: subprocess.Popen[str], folder: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while num_rows(folder) < count:
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline, f"{num_rows(folder)} of {count} steps after 240 s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def options(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """fp32, 5 rows a step of 13: 3 steps an epoch, the last with 3 rows."""
    folder = tmp_path_factory.mktemp("data")
    data = write_jsonl(folder / "rows.jsonl", word_rows(13))
    return (
        f"--model {tiny_model} --data {data} --eval-data {data} --r 4 --dtype fp32 "
        f"--init-lr 1e-3 --lr 5e-3 --train-batch-size 5 --micro-batch-size 2 --max-steps {STEPS} "
        f"--save-every 4 --eval-every 6 --generate-samples 1"
    ).split()


@pytest.fixture(scope="module")
def alone(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to, on two processes."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    output = run_worker(*options, "--output-dir", str(folder), world_size=2)
    assert "checkpoint of step 4: 0.0" in output, "its size is said"
    return folder


def test_evaluations_while_training(alone: Path) -> None:
    rows = [row for row in metrics(alone) if "eval_loss" in row]
    assert [(row["step"], row["stage"]) for row in rows] == [
        *((0, "base"), (0, "init"), (6, "step"), (12, "step"), (18, "step"), (24, "trained")),
    ]
    samples = [json.loads(line) for line in (alone / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 6, 12, 18, 24]
    assert all("Say" in sample["prompt"] and sample["expected"] for sample in samples)
    best = min(rows[2:], key=lambda row: row["eval_loss"])["step"]
    index = json.loads((alone / "checkpoints" / "index.json").read_text())
    assert index["best_step"] == best
    kept = {20, 24, best}
    assert {int(path.name[5:]) for path in list_checkpoints(alone)} == kept
    for row in training(alone).values():
        assert 0 <= row["padding_share"] < 1
        assert row["r_norm"] > 0
        assert row["memory_bytes"] > 0


@pytest.mark.slow
def test_it_goes_on_with_1_and_2_and_3_processes(
    options: list[str], alone: Path, tmp_path: Path
) -> None:
    """Asked to end by SIGTERM, SIGUSR1 and Ctrl-C. 5 rows do not divide by 2 or 3 processes."""
    folder = tmp_path / "run"
    again = [*options, "--output-dir", str(folder), "--resume", "auto"]
    stops = ((1, signal.SIGTERM, 3), (2, signal.SIGUSR1, 8), (3, signal.SIGINT, 14))
    for num_procs, signum, after in stops:
        with started(*LORASB, *again, "--num-procs", str(num_procs)) as child:
            wait_for_rows(child, folder, max(after, num_rows(folder) + 1))
            child.send_signal(signum)
            output = output_of(child, 60)
        assert child.returncode == EXIT_STOPPED, output
        assert "asked to end: after this step" in output
        step = num_rows(folder)
        assert f"asked to stop: step {step} is saved" in output
        assert after <= step < STEPS
        assert not (folder / "adapter").exists()
    run_worker(*again, world_size=2)
    found, expected = training(folder), training(alone)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1)), "no step lost or twice"
    for key in ("loss", "grad_norm", "lr", "tokens"):
        differences = [abs(found[step][key] - expected[step][key]) for step in found]
        assert max(differences) <= 1e-4, key
    evals = [[r["eval_loss"] for r in metrics(f) if "eval_loss" in r] for f in (folder, alone)]
    assert evals[0] == pytest.approx(evals[1], abs=1e-4)
    output = run_worker(*again, world_size=2)
    assert "nothing is left to do" in output
    assert (folder / "report.md").is_file()


@pytest.mark.slow
def test_killed_again_and_again(tiny_model: Path, tmp_path: Path) -> None:
    """SIGKILL, also in the middle of a save; the same processes: equal to the bit.

    `scripts/stress_resume.py` is the longer version.
    """
    out = tmp_path / "result.json"
    script = str(ROOT / "scripts" / "stress_resume.py")
    options = f"--kills 4 --steps 60 --model {tiny_model} --output {out}".split()
    run_command(sys.executable, script, *options, timeout=700)
    result = json.loads(out.read_text())
    assert len(result["kills"]) >= 3, "a fast machine may be done before"
    assert result["in_a_save"] >= 1
    assert result["largest_difference"] == 0
    assert result["same_adapter"]
    assert result["inits"] == 1


def test_another_run_is_refused(options: list[str], alone: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = dict(zip(options[::2], options[1::2], strict=True))
    given = {name.removeprefix("--").replace("-", "_"): v for name, v in given.items()}
    given |= {"output_dir": str(alone), "resume": "auto"}
    prepare(load_run_config(given), 2)
    prepare(load_run_config(given | {"lr": "1e-4", "max_steps": "48"}), 3)
    other = write_jsonl(tmp_path / "other.jsonl", word_rows(12))
    cases = (
        ({"r": "5"}, "--r (the checkpoint has 4, this run 5)"),
        ({"data": other}, "training rows"),
        ({"max_length": "36"}, "training rows"),
        ({"train_batch_size": "4"}, "--train-batch-size (the checkpoint has 5, this run 4)"),
        ({"seed": "1"}, "--seed"),
        ({"optimizer": "sgd"}, "--optimizer"),
        ({"target_modules": "q_proj"}, "target layers"),
    )
    for change, what in cases:
        with pytest.raises(ConfigError, match=r"is of another run\. What differs") as error:
            prepare(load_run_config(given | change), 2)
        assert what in str(error.value), change
    init_only = Path(shutil.copytree(alone, tmp_path / "init-only"))
    shutil.rmtree(init_only / "checkpoints")
    with pytest.raises(ConfigError, match=r"--r 3 differs from the run's r = 4.*--init-from"):
        prepare(load_run_config(given | {"output_dir": str(init_only), "r": "3"}), 2)
    prepare(load_run_config(given | {"output_dir": str(init_only)}), 2)
    with pytest.raises(ConfigError, match="has done 24 steps, more than the 5"):
        prepare(load_run_config(given | {"max_steps": "5"}), 2)
    model = shutil.copytree(given["model"], tmp_path / "model")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match="model files"):
        prepare(load_run_config(given | {"model": str(model)}), 2)


def test_damage(options: list[str], alone: Path, tmp_path: Path) -> None:
    """A torn checkpoint is skipped; a basis that is not the run's is refused."""
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    shutil.rmtree(run / "adapter")
    state = checkpoint_path(run, 24) / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    again = [*options, "--output-dir", str(run), "--resume", "auto"]
    output = run_worker(*again)
    assert "warning: checkpoint step-00000024 is skipped: state.safetensors is not" in output
    assert "resumed after step 20" in output
    assert training(run).keys() == set(range(1, STEPS + 1))
    assert isinstance(read_checkpoint(state.parent), str) is False, "written anew"
    (run / "report.md").unlink()  # else it is finished
    for file, position in (("basis.safetensors", -7), ("init.json", 30)):
        whole = (run / file).read_bytes()
        content = bytearray(whole)
        content[position] ^= 64
        (run / file).write_bytes(content)
        output = run_worker(*again, status=2)
        assert f"damaged: {file} is not what was written" in output
        assert "Traceback" not in output
        (run / file).write_bytes(whole)


def test_evaluations_on_other_rows_begin_anew(
    options: list[str], alone: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    other = write_jsonl(tmp_path / "other.jsonl", word_rows(4))
    more = f"--output-dir {run} --resume auto --max-steps 26 --load-best-model-at-end"
    output = run_worker(*options, *more.split(), "--eval-data", other)
    assert "changed since: held-out rows" in output
    assert "changed since: steps 24 -> 26" in output
    assert "the best evaluation so far is dropped" in output
    index = json.loads((run / "checkpoints" / "index.json").read_text())
    assert index["best_step"] == 26
    described = json.loads((run / "run.json").read_text())
    assert described["steps_done"] == 26
    assert described["saved"] == metrics(run)[-1], "although earlier rows may have lower losses"
    assert (run / "report.md").read_text().count("The adapter is that of step 26: ") == 1
    (run / "report.md").unlink()
    num_rows = len(metrics(run))
    run_worker(*options, *more.split())
    (again,) = metrics(run)[num_rows:]
    assert (again["step"], again["stage"]) == (26, "trained"), "its last step, on these rows"
    assert json.loads((run / "run.json").read_text())["saved"] == again != described["saved"]


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk(options: list[str], alone: Path, tmp_path: Path, policy: str) -> None:
    """The checkpoint before it is whole, and training ends with the reason or goes on."""
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    shutil.rmtree(run / "adapter")
    for step in (24, 20, 18):
        shutil.rmtree(checkpoint_path(run, step), ignore_errors=True)
    again = [*options, "--output-dir", str(run), "--resume", "auto"]
    again += ["--save-every", "1", "--keep-last", "100", "--on-save-error", policy]
    with small_disk(run / "checkpoints", "160k"):
        output = run_worker(*again, status=1 if policy == "stop" else 0)
        assert "No space left on device" in output
        assert "Traceback" not in output
        saved = list_checkpoints(run)
        assert saved
        assert all(not isinstance(read_checkpoint(path), str) for path in saved)
        assert not list((run / "checkpoints").glob("*.tmp"))
    assert (run / "adapter").exists() == (policy == "continue")
    if policy == "continue":
        assert "Training goes on" in output
        assert training(run).keys() == set(range(1, STEPS + 1))


@pytest.mark.slow
def test_ctrl_c_twice(options: list[str], tmp_path: Path) -> None:
    """The second one does not wait for anything."""
    folder = tmp_path / "run"
    endless = f"--max-steps 1000000 --output-dir {folder} --num-procs 2"
    with started(*LORASB, *options, *endless.split()) as child:
        wait_for_rows(child, folder, 2)
        began = time.monotonic()
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGINT)
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        output_of(child, 60)
    assert child.returncode not in (0, EXIT_STOPPED)
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_a_closed_terminal(options: list[str], tmp_path: Path) -> None:
    """It asks the run to end, which writes to it no more."""
    folder = tmp_path / "run"
    endless = f"--max-steps 1000000 --output-dir {folder} --num-procs 2"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
        os.execv(LORASB[0], [*LORASB, *options, *endless.split()])  # noqa: S606
    deadline = time.monotonic() + 240
    try:
        while num_rows(folder) < 2:
            assert os.read(terminal, 1 << 16), "it has ended"
            assert time.monotonic() < deadline, f"{num_rows(folder)} of 2 steps after 240 s"
    finally:  # the run ends with the test, also where no step came
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == EXIT_STOPPED
    (checkpoint,) = list_checkpoints(folder)[-1:]
    found = read_checkpoint(checkpoint)
    assert not isinstance(found, str)
    assert found.state.step == num_rows(folder)


def test_what_is_not_finite_ends_the_run_with_its_rows(options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    output = run_worker(
        *options,
        *f"--lr 1e30 --max-skipped-steps 2 --output-dir {folder}".split(),
        status=1,
    )
    rows = training(folder)
    skipped = [step for step, row in rows.items() if row.get("skipped")]
    assert len(skipped) == 3
    assert skipped == list(range(min(skipped), min(skipped) + 3))
    assert output.count("skipped (rows.jsonl:") == 2
    assert "look at the rows of this step: rows.jsonl:" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_early_stopping_keeps_the_best(options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = (
        f"--lr 0.3 --lr-scheduler constant --eval-every 1 --early-stopping-patience 2 "
        f"--max-steps 200 --output-dir {folder}"
    )
    output = run_worker(*options, *more.split())
    evals = {r["step"]: r["eval_loss"] for r in metrics(folder) if r.get("stage") == "step"}
    best = min(evals, key=lambda step: evals[step])
    assert max(evals) == best + 2 < 200
    assert f"(step {best}) in 2 evaluations" in output
    assert f"the adapter is that of step {best}" in output
    described = json.loads((folder / "run.json").read_text())
    assert described["steps_done"] == best + 2
    assert described["best"] == {"step": best, "eval_loss": evals[best]}
    assert (described["saved"]["step"], described["saved"]["eval_loss"]) == (best, evals[best])
    card = (folder / "adapter" / "README.md").read_text()
    assert f"parameters, step {best} of {best + 2}, the best evaluation's." in card
    assert f"| trained | {best} | {evals[best]:.4f} |" in card
    again = ["--resume", str(folder)]
    assert "nothing is left to do" in run_worker(*again)
    longer = run_worker(*again, "--max-steps", "201")
    assert max(training(folder)) >= best + 4, "two more evaluations at least"
    assert "changed since: steps 200 -> 201" in longer
    index = json.loads((folder / "checkpoints" / "index.json").read_text())
    best = index["best_step"]
    from safetensors.torch import load_file

    stored = load_file(checkpoint_path(folder, best) / "state.safetensors")
    basis = load_file(folder / "basis.safetensors")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    expected = basis[f"{name}.lora_B"].float() @ stored[f"{name}.lora_R"]
    assert adapter[f"base_model.model.{name}.lora_B.weight"].sub(expected).abs().max() < 1e-6


@pytest.mark.slow
def test_out_of_memory_is_explained(options: list[str], tmp_path: Path) -> None:
    """For real: the process may not take more than so much memory."""
    rows = write_jsonl(tmp_path / "rows.jsonl", word_rows(13) * 4000)
    large = (
        f"--train-batch-size 40000 --micro-batch-size 40000 --init-samples 8 --max-steps 2 --force "
        f"--output-dir {tmp_path}/run"
    )
    limited = ["prlimit", "--data=4000000000", sys.executable, "launcher/train.py"]
    given = [*options[:2], "--data", rows, *options[4:], *large.split()]
    environment = rank_environment(0, 1, free_port(), threads=2)
    output = run_command(*limited, *given, status=1, **environment)
    assert "Out of memory (train)" in output
    assert "--micro-batch-size 20000 --gradient-accumulation-steps 2" in output
    assert "activations" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        "--packing --max-length 48 --data {data} --data-weights 2,0.5",
        "--group-by-length --optimizer lion --ds-config ds_configs/zero3_offload.json",
        "--optimizer sgd --ds-config ds_configs/zero1.json --gradient-checkpointing --dtype bf16",
    ],
)
def test_other_ways_to_train_go_on(options: list[str], tmp_path: Path, more: str) -> None:
    """With a resume in the middle."""
    folder = tmp_path / "run"
    other = write_jsonl(tmp_path / "other.jsonl", word_rows(7))
    more = more.format(data=other)
    run = [*options, *more.split(), "--max-steps", "6", "--save-every", "3"]
    run_worker(*run, "--output-dir", str(folder))
    first = training(folder)
    assert sum(row["tokens"] for row in first.values()) > 0
    run_worker(*run, "--resume", str(checkpoint_path(folder, 3)))
    assert {k: r["loss"] for k, r in training(folder).items()} == {
        k: r["loss"] for k, r in first.items()
    }

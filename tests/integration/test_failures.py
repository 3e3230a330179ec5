"""What a user gets who asks for the impossible, and what happens when a process dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_layout import LOCK
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.folder_lock import FolderLock
from lorasb_ds.system.signals import EXIT_STOPPED
from lorasb_ds.training.prepare import prepare
from tests.runs import ROOT, run_command, run_worker, status_of, word_rows, write_jsonl


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "rows.jsonl", word_rows(8))


def refused(**given: Any) -> str:
    """The message of a run that is refused before any process group."""
    with pytest.raises(ConfigError) as error:
        prepare(load_run_config(given), 1)
    return str(error.value)


def test_models(tiny_model: Path, tmp_path: Path, rows: str) -> None:
    assert "no such folder" in refused(model="/no/such/model", data=rows)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(model=str(tmp_path / "empty"), data=rows)
    assert "needs a network" in refused(model="someone/some-model", data=rows)
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_model, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    message = refused(model=str(pickled), data=rows)
    assert "pickles" in message
    assert "save_pretrained" in message
    bert = tmp_path / "bert"
    shutil.copytree(tiny_model, bert)
    (bert / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    )
    assert "is a BertForMaskedLM, not a causal" in refused(model=str(bert), data=rows)
    (bert / "config.json").write_text("{")
    assert "--model" in refused(model=str(bert), data=rows)


def broken(tiny_model: Path, folder: Path, **config: Any) -> str:
    """A copy of the model with other entries in its config.json."""
    shutil.copytree(tiny_model, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    return str(folder)


def test_quantized_and_malformed_models(tiny_model: Path, tmp_path: Path, rows: str) -> None:
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model = broken(tiny_model, tmp_path / "a", quantization_config=quantized)
    message = refused(model=model, data=rows, r=4)
    assert "config.json and the weights do not agree on whether they are quantized" in message
    assert "is quantized already" in refused(model=model, data=rows, load_in_8bit=True)
    quantized = {"quant_method": "gptq", "bits": 4}
    model = broken(tiny_model, tmp_path / "d", quantization_config=quantized)
    assert "is quantized by gptq" in refused(model=model, data=rows)
    model = broken(tiny_model, tmp_path / "b", hidden_size="wide")
    assert "cannot be read" in refused(model=model, data=rows)
    model = broken(tiny_model, tmp_path / "c")
    (tmp_path / "c" / "tokenizer.json").unlink()
    assert "its tokenizer cannot be read" in refused(model=model, data=rows, r=4)


@pytest.mark.parametrize("fault", ["truncated", "renamed"])
def test_weights_that_cannot_be_read(
    tiny_model: Path, tmp_path: Path, rows: str, fault: str
) -> None:
    model = broken(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        tensors = {f"module.{name}": tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    options = f"--model {model} --data {rows} --r 4 --output-dir {tmp_path}/run"
    output = run_worker(*options.split(), world_size=2, status=2)
    assert {"truncated": "is no whole safetensors file", "renamed": "the files lack"}[
        fault
    ] in output
    assert "Traceback" not in output


def test_a_folder_in_use(tiny_model: Path, tmp_path: Path, rows: str) -> None:
    """Refused on every rank, also where no launcher has looked; nothing there is touched."""
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder / LOCK)
    before = (folder / LOCK).read_text()
    options = f"--model {tiny_model} --data {rows} --r 4 --output-dir {folder}"
    output = run_worker(*options.split(), world_size=2, status=2)
    lock.release()
    assert f"{folder} is in use: process {os.getpid()} on" in output
    assert "Traceback" not in output
    assert [path.name for path in folder.iterdir()] == [LOCK]
    assert (folder / LOCK).read_text() == before


def test_layers(tiny_model: Path, rows: str) -> None:
    message = refused(model=str(tiny_model), data=rows, r=25, target_modules="k_proj,o_proj")
    assert "--r 25 exceeds min(out, in) = 24 of model.layers.0.self_attn.k_proj" in message
    message = refused(model=str(tiny_model), data=rows, r=4, target_modules="c_attn")
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message


def test_what_cannot_fit(tiny_model: Path, rows: str, tmp_path: Path) -> None:
    """Refused before anything is loaded; with --force it starts."""
    given = {"model": str(tiny_model), "data": rows, "r": 4, "micro_batch_size": 10**7}
    message = refused(**given)
    assert "GiB a process" in message
    assert "free" in message
    assert "--force" in message
    forced = prepare(load_run_config(given | {"force": True}), 1)
    assert "--force" in str(forced.memory.problem)
    small = prepare(load_run_config(given | {"micro_batch_size": 1}), 1)
    assert small.memory.problem is None
    assert 0 < small.memory.needed_bytes < small.memory.free_bytes


def test_eval_data_is_named(tiny_model: Path, rows: str, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"title": "a"}])
    message = refused(model=str(tiny_model), data=rows, r=4, eval_data=other)
    assert f"--eval-data {other}: no known prompt and response columns" in message


@pytest.mark.slow
def test_the_status_comes_through_deepspeed(tiny_model: Path, rows: str) -> None:
    command = f"lorasb train --num-procs 2 --model {tiny_model} --data {rows} --r 99"
    done = run_command(*command.split(), status=2, timeout=60)
    assert done.count("--r 99 exceeds") == 1, "one rank speaks"
    assert "Traceback" not in done


def test_the_worker_alone_says_how_to_start_it() -> None:
    done = run_command(sys.executable, "launcher/train.py", status=2)
    assert "deepspeed launcher/train.py" in done


def workers(marker: str, program: str = "launcher/train.py") -> list[int]:
    """Processes of a program whose command line holds the marker."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if marker in command and program in command:
                found.append(int(folder.name))
    return found


@pytest.fixture
def running(tiny_model: Path, tmp_path: Path):
    """A run of two processes that would take hours, once its first step is done.

    Its working directory is full of traps.
    """
    folder, traps = tmp_path / "long-run", tmp_path / "traps"
    traps.mkdir()
    for name in ("random", "torch", "numpy", "deepspeed", "lorasb_ds", "sitecustomize"):
        (traps / f"{name}.py").write_text(
            f"open({str(tmp_path / 'imported')!r}, 'a').write(__name__)"
        )
    command = (
        f"{Path(sys.executable).parent}/lorasb train --num-procs 2 --model {tiny_model} --r 4 "
        f"--data reasoning-gym:chain_sum?size=100 --max-steps 1000000 --output-dir {folder}"
    )
    log = (tmp_path / "log").open("w")
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    child = subprocess.Popen(command.split(), cwd=traps, env=environment, stdout=log, stderr=log)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 240
    try:
        while not metrics.exists() or not metrics.read_text():
            log_text = (tmp_path / "log").read_text()
            assert child.poll() is None, log_text
            assert time.monotonic() < deadline, (
                f"no step within 240 s; the log:\n{log_text[-4000:]}"
            )
            time.sleep(0.5)
        yield child, str(folder)
    finally:  # also where no step came: its ranks would slow all later tests down
        child.kill()
        child.wait()
        log.close()
        for pid in workers(str(folder)):
            os.kill(pid, signal.SIGKILL)


def environment_of(pid: int) -> dict[str, str]:
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def shared_memory(worker: int) -> list[Path]:
    """DeepSpeed's buffers of the job of a worker."""
    port = environment_of(worker)["MASTER_PORT"]
    return list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))  # noqa: S108


def gone(marker: str, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while workers(marker, "launcher") and time.monotonic() < deadline:
        time.sleep(0.2)
    return not workers(marker, "launcher")


def intrude(worker: int) -> str:
    """Talk to the launcher of a worker without its secret; what it says."""
    host, _, port = environment_of(worker)["LORASB_SUPERVISOR"].rpartition(":")
    said = ""
    forged = b'{"proof": "guessed", "rank": 0, "ended": 1}\n'
    odd = b'{"proof": "\\ud800", "rank": 0}\n'
    for text in (b"\xff\0garbage\n", b"[1]\n", b"[" * 9000 + b"\n", odd, forged):
        with socket.create_connection((host, int(port)), timeout=5) as stranger:
            stranger.sendall(text)
            with suppress(ConnectionResetError):
                while received := stranger.recv(1000):
                    said += received.decode()
    return said


def test_a_killed_worker_ends_the_run(running: tuple[subprocess.Popen[bytes], str]) -> None:
    child, folder = running
    ranks = [pid for pid in workers(folder) if b"--local_rank=1" in _cmdline(pid)]
    traps = Path(f"/proc/{max(ranks)}/cwd").readlink()
    assert traps.name == "traps", "where it was started"
    assert not (traps.parent / "imported").exists(), "and imports nothing from there"
    for option in ("--overwrite", "--resume auto"):
        command = f"lorasb train --data x --output-dir {folder} {option}".split()
        assert f"{folder} is in use: process " in run_command(*command, status=2)
    buffers = shared_memory(max(ranks))
    assert len(buffers) == 2
    assert "it is not of this job" in intrude(max(ranks))
    assert child.poll() is None, "a stranger changes nothing"
    session = Path(folder) / "launch" / "session"
    assert session.stat().st_mode & 0o777 == 0o600
    for pid in (child.pid, *workers(folder), *workers(folder, "launcher/jobs/agent.py")):
        shown = _cmdline(pid) + Path(f"/proc/{pid}/environ").read_bytes()
        assert session.read_bytes() not in shown, "the secret is in no argument and no environment"
    os.kill(max(ranks), signal.SIGKILL)
    log = Path(folder).parent / "log"
    assert status_of(child, log, 60) == 128 + signal.SIGKILL
    text = log.read_text()
    place = f"rank 1 on {socket.gethostname()}"
    assert f"{place} was ended by SIGKILL, as the kernel does when memory" in text
    assert f"Its log: {folder}/logs/rank-1.log" in text
    assert "--resume auto goes on" in text
    launched = (Path(folder) / "launch" / "deepspeed.log").read_text()
    assert "lorasb: 5 connections were not of this job\n" in launched
    assert gone(folder, 10), "no process is left"
    assert not any(buffer.exists() for buffer in buffers), "they went with it"
    assert not (Path(folder) / "adapter").exists()
    # What the init found was on disk before the first step, whole.
    basis = load_file(Path(folder) / "basis.safetensors")
    assert len(basis) == 5 * 14


@pytest.mark.slow
def test_sigterm_ends_every_process(running: tuple[subprocess.Popen[bytes], str]) -> None:
    child, folder = running
    assert len(workers(folder)) == 2
    assert len(workers(folder, "launcher/jobs/agent.py")) >= 2
    child.send_signal(signal.SIGTERM)
    log = Path(folder).parent / "log"
    assert status_of(child, log, 60) == EXIT_STOPPED
    assert "return code" not in log.read_text(), "DeepSpeed does not call it an error"
    assert gone(folder, 10), "no process is left"


def _cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount")
def test_shared_memory_that_cannot_be_written(tiny_model: Path, tmp_path: Path, rows: str) -> None:
    """DeepSpeed's ranks would wait for each other there, deaf to signals."""
    mount = 'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"'
    options = f"--num-procs 2 --model {tiny_model} --data {rows} --r 4 --output-dir {tmp_path}/run"
    command = ["unshare", "-m", "sh", "-c", mount, "sh", "lorasb", "train", *options.split()]
    output = run_command(*command, status=2, timeout=120)
    assert "shm cannot be written; DeepSpeed needs 66 MiB there for each process" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_rank_that_dies_in_the_init(demo_dtype: str, tmp_path: Path) -> None:
    """Nothing that looks finished is left, and no process waits for the dead one."""
    folder, log = tmp_path / "init", tmp_path / "log"
    command = (
        f"{Path(sys.executable).parent}/lorasb init --num-procs 2 --init-samples 800 --r 8 "
        f"--dtype {demo_dtype} --output-dir {folder}"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    with log.open("w") as file:
        child = subprocess.Popen(command.split(), cwd=ROOT, env=environment, stdout=file)
        try:
            deadline = time.monotonic() + 120
            while "init: gradients and SVD will take" not in log.read_text():
                assert child.poll() is None
                assert time.monotonic() < deadline, f"no init in 120 s: {log.read_text()[-4000:]}"
                time.sleep(0.3)
            time.sleep(3)  # in the middle of a pass that takes a minute
            ranks = [p for p in workers(str(folder)) if b"--local_rank=1" in _cmdline(p)]
            os.kill(max(ranks), signal.SIGKILL)
            assert status_of(child, log, 60) != 0
            assert gone(str(folder), 10), "no process is left"
        finally:
            child.kill()
            for pid in workers(str(folder)):
                os.kill(pid, signal.SIGKILL)
    assert not (folder / "basis.safetensors").exists()
    with pytest.raises(ConfigError, match=r"there is no basis\.safetensors"):
        prepare(load_run_config({"init_from": str(folder), "r": 8}), 1)

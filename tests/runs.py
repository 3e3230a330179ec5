"""Starting real processes: ranks of a test case, and whole commands."""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from launcher.jobs.ranks import free_port, rank_environment, remove_shared_memory
from lorasb_ds.config.run_config import RunConfig
from tests.fork_server import Job, Outcome

ROOT = Path(__file__).resolve().parent.parent

# Nothing stays gathered: what is measured is what a model larger than memory would do.
REALLY_SHARDED = {
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


@contextmanager
def benchmark(name: str) -> Iterator[Any]:
    """A module of scripts/, which find each other by their folder."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
        del sys.modules[name]


def run_ranks(case: str, world_size: int | None, timeout: float = 240, **arguments: Any) -> None:
    """Run a function of tests/dist/cases.py on gloo ranks; fails as soon as one of them does.

    Args:
        case: its name, or MODULE:NAME of another module's.
        world_size: None: in one process, which nobody has started as a rank.
    """
    given = {"case": case, **arguments}
    outcome = _forked("run_case", world_size, timeout, given)
    assert outcome.statuses == [0] * (world_size or 1), f"{case}: {_described(outcome, timeout)}"


class Runs(dict[str, Path]):
    """Folders of runs by name; each is made when it is first looked up."""

    def __init__(self, folder: Path, make: Callable[[str], Path]) -> None:
        super().__init__()
        self.folder, self._make = folder, make

    def __missing__(self, name: str) -> Path:
        self[name] = self._make(name)
        return self[name]


def run_worker(
    *options: str,
    world_size: int | None = 1,
    worker: str = "train",
    status: int = 0,
    timeout: float = 240,
) -> str:
    """Run a worker as DeepSpeed's launcher would, on ranks; what they printed.

    For what a run leaves and says. It saves the launchers' seconds, and the imports of every rank;
    what the launchers do is not tested by it.

    Args:
        world_size: None where no job is started: `lorasb eval` by itself, `lorasb merge`.
        worker: a key of ``fork_server.WORKERS``; "adapters" takes its verb as the first option.
        status: of the first rank that ends with another one than 0.
    """
    given = {"worker": worker, "options": list(options)}
    outcome = _forked("run_worker", world_size, timeout, given)
    found = next((s for s in outcome.statuses if s), None if outcome.timed_out else 0)
    command = shlex.join([worker, *options])
    assert found == status, f"{command}: {_described(outcome, timeout)}"
    return "".join(outcome.outputs)


def _forked(
    function: str, world_size: int | None, timeout: float, arguments: dict[str, Any]
) -> Outcome:
    """Ranks that do a function of tests/fork_server.py, with one thread each: models are tiny."""
    port = free_port()
    environments = [
        dict(os.environ) | rank_environment(rank, world_size, port, threads=1)
        for rank in range(world_size or 0)
    ]
    if world_size is None:
        environments = [dict(os.environ) | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}]
    try:
        return _fork_server().run(Job(function, arguments, environments, timeout))
    finally:
        remove_shared_memory(port)


def _described(outcome: Outcome, timeout: float) -> str:
    """Which ranks have failed or were waited for, and the end of what each has printed."""
    ends = {
        rank: f"ended with status {status}"
        if status is not None
        else f"was still at work after {timeout} s; its stacks are below"
        if outcome.timed_out
        else "was ended, since another one had failed"
        for rank, status in enumerate(outcome.statuses)
    }
    texts = enumerate(outcome.outputs)
    return "\n".join(
        [*(f"rank {rank} {end}" for rank, end in ends.items())]
        + [f"---- rank {rank}, the end of its output:\n{text[-6000:]}" for rank, text in texts]
    )


class ForkServer:
    """A process that runs tests/fork_server.py, with one thread from before torch is imported."""

    def __init__(self) -> None:
        self._connection, other = Pipe()
        start = "from tests import fork_server; fork_server.main()"
        command = [sys.executable, "-c", start, str(other.fileno())]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, as long as the server
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[other.fileno()],
            start_new_session=True,  # a Ctrl-C is this process's affair
        )
        other.close()

    def run(self, job: Job) -> Outcome:
        try:
            self._connection.send(job)
            return self._connection.recv()
        except BaseException as error:  # also the test's limit, which finds ranks at work
            self.end()
            _fork_server.cache_clear()
            if isinstance(error, pytest.fail.Exception):
                raise AssertionError(f"waited for {job.function} {job.arguments}") from error
            if not isinstance(error, (EOFError, OSError)):
                raise
            self._log.seek(0)
            raise RuntimeError(f"the fork server has ended:\n{self._log.read()[-6000:]}") from error

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@functools.cache
def _fork_server() -> ForkServer:
    server = ForkServer()
    atexit.register(server.end)
    return server


def run_command(*command: str, timeout: float = 380, status: int = 0, **environment: str) -> str:
    """Run a command in the project's root as in the activated environment; what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    # Not a pipe: what the command leaves behind would hold it open.
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean | {"PATH": path} | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        began = time.monotonic()
        try:
            child.wait(timeout)
            how, cause = f"status {child.returncode} in place of {status}", None
        except (subprocess.TimeoutExpired, pytest.fail.Exception) as error:  # the test's limit
            how, cause = f"no end after {time.monotonic() - began:.0f} s", error
        finally:
            _terminate(child)
        log.seek(0)
        output = log.read()
    if cause or child.returncode != status:
        raise AssertionError(
            f"{shlex.join(command)}: {how}. Its output:\n{output[-6000:]}"
        ) from cause
    return output


def _terminate(child: subprocess.Popen[Any]) -> None:
    """End a command that is still at work; lorasb passes the signal on to its job."""
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(30)
        child.kill()
        child.wait()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A tmpfs of a size as mount has it (64k) over a folder, with what was in it; else a skip."""
    aside = Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-aside")))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root, and a container that lets it")
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def wait_until(
    condition: Callable[[], object], what: str, seconds: float = 10, log: Path | None = None
) -> None:
    """Wait for what comes about by itself; fails, saying what did not, past the time limit."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            said = f"; the end of {log}:\n{log.read_text()[-6000:]}" if log else ""
            raise AssertionError(f"not after {seconds} s: {what}{said}")
        time.sleep(0.01)


def status_of(command: subprocess.Popen[Any], log: Path, seconds: float) -> int:
    """The status of a command once it has ended; fails past the time limit."""
    what = f"the end of {shlex.join(map(str, command.args))}"
    wait_until(lambda: command.poll() is not None, what, seconds, log)
    return command.returncode


def output_of(command: subprocess.Popen[str], seconds: float) -> str:
    """What a command has written into its pipe once it has ended; fails past the time limit."""
    try:
        return command.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired as error:
        so_far = (error.output or b"").decode(errors="replace")[-6000:]
        what = shlex.join(map(str, command.args))
        raise AssertionError(f"{what}: no end after {seconds} s. Its output:\n{so_far}") from error


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_on_words(model: Path, folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """Options of a run of a few steps, each of which is saved, on rows of words in a folder."""
    return {
        "model": str(model),
        "data": write_jsonl(folder / "rows.jsonl", word_rows(24)),
        "eval_data": write_jsonl(folder / "held-out.jsonl", word_rows(30)[24:]),
        "output_dir": str(folder / name),
        "lr": 2e-2,
        "dtype": "fp32",
        "save_every": 1,
        "keep_last": 10,
        "init_samples": 8,
        "train_batch_size": 4,
        "micro_batch_size": 2,
        **options,
    }


def word_rows(count: int) -> list[dict[str, str]]:
    """Short question/answer rows of different lengths."""
    words = [
        "red",
        "orange",
        "yellow",
        "green",
        "blue",
        "indigo",
        "violet",
        "black",
        "white",
        "grey",
    ]
    return [
        {
            "question": f"Say {' '.join(words[i % 7 : i % 7 + 1 + i % 4])}",
            "answer": " ".join(words[(i * 3) % 6 : (i * 3) % 6 + 1 + i % 3]),
        }
        for i in range(count)
    ]


def made_up_run(
    folder: Path,
    options: Mapping[str, Any] | None = None,
    num_steps: int = 10,
    finished: bool = True,
) -> Path:
    """A folder as a training run leaves it, without training: losses 1, 1/2, 1/3, …"""
    folder.mkdir(parents=True)
    config = RunConfig(model="mistralai/Mistral-7B-v0.1", data="data/train.jsonl").model_dump()
    description: dict[str, Any] = {
        "config": {**config, "output_dir": str(folder), **(options or {})},
        "world_size": 2,
        "accelerator": "cpu",
        "trainable_parameters": 12345,
        "memory": {},
    }
    rows: list[dict[str, Any]] = [
        {"step": 0, "stage": stage, "eval_loss": loss, "perplexity": math.exp(loss)}
        for stage, loss in (("base", 3.0), ("init", 2.0))
    ]
    for step in range(1, num_steps + 1):
        row = {"step": step, "loss": 1 / step, "lr": 1e-3, "grad_norm": 1.0, "r_norm": 1.0}
        row |= {"tokens": 100, "tokens_per_s": 50.0, "step_time_s": 2.0, "padding_share": 0.2}
        rows.append(row | {"memory_bytes": 5 << 30})
        if step == num_steps // 2:
            rows.append({"step": step, "stage": "step", "eval_loss": 0.5})
    if finished:
        rows.append({"step": num_steps, "stage": "trained", "eval_loss": 0.75})
        description["memory"]["measured"] = {"init": 4 << 30, "train": 6 << 30}
        (folder / "report.md").write_text("made up")
    (folder / "run.json").write_text(json.dumps(description))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder

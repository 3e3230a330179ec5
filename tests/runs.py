"""Starting real processes: ranks of a test case, and whole commands."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.jobs.ranks import free_port, rank_environment, remove_shared_memory
from lorasb_ds.config.run_config import RunConfig

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


def run_ranks(case: str, world_size: int, timeout: float = 240, **arguments: Any) -> None:
    """Run a function of tests/dist/cases.py on gloo ranks; fails as soon as one of them does."""
    port = free_port()
    outputs = [tempfile.TemporaryFile("w+") for _ in range(world_size)]  # noqa: SIM115, closed below
    ranks = []
    for rank, output in enumerate(outputs):
        environment = os.environ | rank_environment(rank, world_size, port, threads=1)
        command = [sys.executable, "-m", "tests.dist.cases", case, json.dumps(arguments)]
        ranks.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        )
    deadline = time.monotonic() + timeout
    try:
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        statuses = [rank.poll() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        remove_shared_memory(port)
    texts = []
    for output in outputs:
        output.seek(0)
        texts.append(output.read()[-5000:])
        output.close()
    assert statuses == [0] * world_size, f"{case}: {statuses}\n" + "\n----\n".join(texts)


def run_command(*command: str, timeout: float = 280, status: int = 0, **environment: str) -> str:
    """Run a command in the project's root as in the activated environment; what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=clean | {"PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.terminate()  # lorasb passes it on to its job
        output, _ = child.communicate()
    assert child.returncode == status, f"status {child.returncode}:\n{output[-6000:]}"
    return output


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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

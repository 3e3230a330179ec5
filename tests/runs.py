"""Starting real processes: ranks of a test case, and whole commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launcher.ranks import free_port, rank_environment, remove_shared_memory

ROOT = Path(__file__).resolve().parent.parent

# Nothing stays gathered: what is measured is what a model larger than memory would do.
REALLY_SHARDED = {
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


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

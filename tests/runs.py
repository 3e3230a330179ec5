"""Starting real processes: ranks of a test case, and whole commands."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def run_ranks(case: str, world_size: int, timeout: float = 240, **arguments: Any) -> None:
    """Run a function of tests/dist/cases.py on gloo ranks; fails if one of them does."""
    port = str(free_port())
    ranks = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "LOCAL_SIZE": str(world_size),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.dist.cases", case, json.dumps(arguments)]
        ranks.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for index, (rank, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert rank.returncode == 0, f"rank {index} of {case}:\n{output[-6000:]}"


def run_command(
    *command: str, timeout: float = 280, status: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's root, as in the activated environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=clean | {"PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == status, f"status {done.returncode}:\n{done.stdout[-6000:]}"
    return done


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

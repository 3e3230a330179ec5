"""Common parts of the benchmarks: fresh processes, fair timing, the machine in words."""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch

from launcher.jobs.ranks import free_port, rank_environment, remove_shared_memory

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("deepspeed", "transformers", "peft", "bitsandbytes", "trl")


def machine() -> dict[str, Any]:
    """Return processor, accelerator, versions and threads of this process."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    models = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return {
        "processor": ", ".join(sorted(models)) or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": torch.cpu._is_avx512_bf16_supported(),
        "int8": torch.cpu._is_vnni_supported(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: _version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def interleaved_medians(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return median seconds of each way, timed in turn: a busy machine slows all alike.

    Every round starts with another way, since what ran before matters. With several rounds, all
    ways are called once beforehand.
    """
    if repeats > 1:
        for run in ways.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for _ in range(repeats):
        order = [*order[1:], order[0]]
        for name in order:
            start = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(
    case: Callable[..., None],
    settings: Mapping[str, Any],
    world_size: int = 1,
    *,
    on_cpu: bool = True,
    limit_s: float = math.inf,
) -> Any:
    """Run a case in fresh processes that share this machine's cores.

    Args:
        case: a function of a script which, given its name, the settings as JSON and a path, calls
            it with the settings and the path. One rank writes its result there, as JSON.
        on_cpu: whether ranks are CPU processes wherever they run; else DeepSpeed chooses.
        limit_s: seconds after which all ranks are ended.
    Returns:
        The result.
    Raises:
        SystemExit: if a rank fails; the others, which would wait for it, are ended.
    """
    port = free_port()
    threads = max(1, len(os.sched_getaffinity(0)) // world_size)
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "result.json")
        script = inspect.getfile(case)
        command = [sys.executable, script, case.__name__, json.dumps(settings), out]
        ranks = []
        for rank in range(world_size):
            environment = os.environ | rank_environment(rank, world_size, port, threads)
            environment |= {"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}
            if not on_cpu:
                del environment["DS_ACCELERATOR"]
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        end = time.monotonic() + limit_s
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks) or time.monotonic() > end:
                for rank in ranks:
                    rank.kill()
            time.sleep(0.1)
        statuses = [rank.wait() for rank in ranks]
        remove_shared_memory(port)
        if any(statuses):
            raise SystemExit(f"{case.__name__} {settings} failed")
        return json.loads(Path(out).read_text())


def run_as_rank(*cases: Callable[..., None]) -> NoReturn:
    """Run the case that ``measure`` has named to this process, and end."""
    name, settings, out = sys.argv[1:]
    {case.__name__: case for case in cases}[name](json.loads(settings), out)
    # As the worker ends (launcher/train.py): some thread of gloo's may outlive its group.
    os._exit(0)


def medians(results: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def print_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    print("\n" + row(title, columns))
    print("|---|" + "---:|" * len(columns))
    for name, cells in rows.items():
        print(row(name, cells))


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1).replace(f"{ROOT}/", "")  # no paths of this machine
    path.write_text(text + "\n")
    print(f"\nwritten: {path}")

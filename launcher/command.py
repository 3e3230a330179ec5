"""What to run: the argument list and environment of a job. Pure."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

WORKERS = Path(__file__).resolve().parent


def train_command(
    worker_arguments: Sequence[str],
    *,
    num_procs: int | None,
    num_gpus: int | None,
    master_port: int,
    python: str = sys.executable,
) -> list[str]:
    """The argument list of `deepspeed` on this host.

    Args:
        num_procs: processes on the CPU; excludes num_gpus.
        num_gpus: processes, each with its GPU. None with num_procs None: all that DeepSpeed finds.
    """
    # `python -m` and not the `deepspeed` script: it need not be on PATH, and is this environment's.
    command = [python, "-m", "deepspeed.launcher.runner"]
    command += ["--log_level", "error"]
    count = num_procs or num_gpus
    if count is not None:
        command += ["--num_accelerators", str(count)]
    command += ["--master_port", str(master_port)]
    return [*command, str(WORKERS / "train.py"), *worker_arguments]


def eval_command(worker_arguments: Sequence[str], python: str = sys.executable) -> list[str]:
    return [python, str(WORKERS / "eval.py"), *worker_arguments]


def job_environment(
    environment: Mapping[str, str], num_procs: int | None, num_cores: int
) -> dict[str, str]:
    """The child's environment: ninja is found, and on the CPU the ranks share the cores."""
    result = dict(environment)
    # ninja lies beside the interpreter, whose environment need not be active.
    bin_dir = str(Path(sys.executable).parent)
    result["PATH"] = os.pathsep.join([bin_dir, *filter(None, [result.get("PATH")])])
    if num_procs is not None:
        result["DS_ACCELERATOR"] = "cpu"
        result.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_procs)))
    return result

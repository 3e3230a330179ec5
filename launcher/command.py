"""What to run: the argument list and environment of a job. Pure."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorasb_ds.config import ConfigError

# Tells the workers that the CPU, which DeepSpeed falls back to, is not what was asked for.
GPUS_ASKED_FOR = "LORASB_NUM_GPUS"
WORKERS = Path(__file__).resolve().parent


def train_command(
    worker_arguments: Sequence[str],
    *,
    count: int | None,
    master_port: int,
    python: str = sys.executable,
) -> list[str]:
    """The argument list of `deepspeed` on this host.

    Args:
        count: processes. None: one for each GPU that DeepSpeed finds, or that
            CUDA_VISIBLE_DEVICES names (DeepSpeed ignores that variable when it gets a count).
    """
    # `python -m` and not the `deepspeed` script: it need not be on PATH, and is this environment's.
    command = [python, "-m", "deepspeed.launcher.runner"]
    # This host only: without a hostfile of its own, DeepSpeed would read /job/hostfile.
    command += ["--log_level", "critical", "--hostfile", os.devnull]
    if count is not None:
        command += ["--num_accelerators", str(count)]
    command += ["--master_port", str(master_port)]
    return [*command, str(WORKERS / "train.py"), *worker_arguments]


def worker_command(
    worker: str, worker_arguments: Sequence[str], python: str = sys.executable
) -> list[str]:
    """The argument list of a verb that runs in one process: ``eval`` or ``preview``."""
    return [python, str(WORKERS / f"{worker}.py"), *worker_arguments]


def visible_gpus(environment: Mapping[str, str], num_gpus: int | None) -> str | None:
    """CUDA_VISIBLE_DEVICES of a job: the first ``num_gpus`` of those that are visible now.

    Returns:
        None where the variable is not set; all GPUs are visible then.
    Raises:
        ConfigError: if fewer are visible.
    """
    visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if not visible:
        return None
    if num_gpus is not None and num_gpus > len(visible):
        raise ConfigError(
            f"--num-gpus {num_gpus}, but CUDA_VISIBLE_DEVICES={','.join(visible)} shows "
            f"{len(visible)}. Lower it, or change the variable."
        )
    return ",".join(visible[:num_gpus])


def job_environment(
    environment: Mapping[str, str], num_procs: int | None, num_gpus: int | None, num_cores: int
) -> dict[str, str]:
    """The child's environment: ninja is found, and on the CPU the ranks share the cores."""
    result = dict(environment)
    # Some generated data depends on it, and all ranks must see the same rows.
    result.setdefault("PYTHONHASHSEED", "0")
    # ninja lies beside the interpreter, whose environment need not be active.
    bin_dir = str(Path(sys.executable).parent)
    result["PATH"] = os.pathsep.join([bin_dir, *filter(None, [result.get("PATH")])])
    if num_procs is not None:
        result["DS_ACCELERATOR"] = "cpu"
        result.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_procs)))
    elif num_gpus is not None:
        result[GPUS_ASKED_FOR] = str(num_gpus)
        if (visible := visible_gpus(environment, num_gpus)) is not None:
            result["CUDA_VISIBLE_DEVICES"] = visible
    return result

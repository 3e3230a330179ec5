"""The checks of scripts/gpu_check.sh."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

BUDGET_S = 580.0  # all checks together
TASK = "reasoning-gym:word_sequence_reversal?max_words=6"
TRAIN = f"--data {TASK}&size=1000&seed=1 --eval-data {TASK}&size=64&seed=2 --r 64 --max-steps 20"
EVAL = f"--data {TASK}&size=64&seed=2 --max-new-tokens 32"


class Result(NamedTuple):
    name: str
    problem: str  # empty: passed
    seconds: float
    losses: list[float]  # held-out: of the base, trained, of the adapter's folder


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu_check: there is no GPU here (torch.cuda.is_available() is False); nothing run.")
        return 0
    num_gpus = torch.cuda.device_count()
    for index in range(num_gpus):
        print(torch.cuda.get_device_name(index), torch.version.cuda)
    many = f"--num-gpus {num_gpus}"
    checks = {
        f"ZeRO-3, {num_gpus} GPU(s)": f"{many} --ds-config ds_configs/zero3.json",
        f"4-bit, ZeRO-3, {num_gpus} GPU(s)": f"{many} --load-in-4bit --ds-config "
        "ds_configs/zero3.json",
        f"4-bit, ZeRO-2, {num_gpus} GPU(s)": f"{many} --load-in-4bit --ds-config "
        "ds_configs/zero2.json",
        "ZeRO-3, parameters offloaded": f"{many} --ds-config ds_configs/zero3_offload.json",
        "ZeRO-2, gradient checkpointing": "--num-gpus 1 --gradient-checkpointing",
        "ZeRO-3, fp32": "--num-gpus 1 --dtype fp32 --ds-config ds_configs/zero3.json",
        "init in 0.2 GiB, shards offloaded": f"{many} --init-memory-gib 0.2 --init-offload",
    }
    deadline = time.monotonic() + BUDGET_S
    with tempfile.TemporaryDirectory() as scratch:
        results = [
            check(name, options, Path(scratch) / str(index), deadline)
            for index, (name, options) in enumerate(checks.items())
        ]
    print(f"\n{'check':34} {'result':8} {'time':>6}   held-out loss: base, trained, of the folder")
    for name, problem, seconds, losses in results:
        text = ", ".join(f"{loss:.3f}" for loss in losses)
        print(f"{name:34} {'FAILED' if problem else 'passed':8} {seconds:5.0f}s   {text} {problem}")
    return 1 if any(result.problem for result in results) else 0


def check(name: str, options: str, run: Path, deadline: float) -> Result:
    """Train, see the loss fall, and evaluate the adapter's folder on the base as it was trained."""
    print(f"== {name}", flush=True)
    start, out = time.monotonic(), run.with_name(f"{run.name}-eval")
    losses: list[float] = []
    try:
        train = ["lorasb", "train", *TRAIN.split(), *options.split(), "--output-dir", str(run)]
        call(train, deadline)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        evals = [row["eval_loss"] for row in lines if "eval_loss" in row]
        losses = [evals[0], evals[-1]]
        adapter = ["--adapter", str(run / "adapter"), "--output-dir", str(out)]
        call(["lorasb", "eval", *EVAL.split(), *adapter], deadline)
        losses.append(json.loads((out / "eval.json").read_text())["results"][0]["loss"])
        problem = verdict(losses)
    except Exception as error:
        # Whatever goes wrong in one check, the others are run and the table is printed.
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return Result(name, problem, time.monotonic() - start, losses)


def call(command: list[str], deadline: float) -> None:
    """Run to the end or to the deadline; then terminate, which lorasb passes on to its job."""
    child = subprocess.Popen(command)
    try:
        status = child.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.terminate()
        child.wait()
        raise TimeoutError("out of time") from None
    if status:
        raise RuntimeError(f"{' '.join(command[:2])} ended with status {status}")


def verdict(losses: list[float]) -> str:
    """Return what is wrong with the losses; NaN fails every comparison."""
    base, trained, exported = losses
    if not trained <= 0.5 * base:
        return "the loss did not halve"
    if not abs(exported - trained) <= 0.02:  # B R is rounded to bf16, where a run keeps R apart
        return "the adapter's folder has another loss"
    return ""


if __name__ == "__main__":
    sys.exit(main())

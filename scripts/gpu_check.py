"""The checks of scripts/gpu_check.sh."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TASK = "reasoning-gym:word_sequence_reversal?max_words=6"
TRAIN = f"--data {TASK}&size=1000&seed=1 --eval-data {TASK}&size=64&seed=2 --r 64 --max-steps 20"
EVAL = f"--data {TASK}&size=64&seed=2 --max-new-tokens 32"


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu_check: there is no GPU here (torch.cuda.is_available() is False); nothing run.")
        return 0
    num_gpus = torch.cuda.device_count()
    for index in range(num_gpus):
        print(torch.cuda.get_device_name(index), torch.version.cuda)
    with tempfile.TemporaryDirectory() as scratch:
        results = [
            check(f"ZeRO-3, {num_gpus} GPU(s)", scratch, f"--num-gpus {num_gpus}"),
            check(
                "ZeRO-3, gradient checkpointing", scratch, "--num-gpus 1 --gradient-checkpointing"
            ),
            check(
                "ZeRO-3, parameters offloaded",
                scratch,
                f"--num-gpus {num_gpus} --ds-config ds_configs/zero3_offload.json",
            ),
            check("ZeRO-3, fp32", scratch, "--num-gpus 1 --dtype fp32"),
            check("4-bit, ZeRO-3, 1 GPU", scratch, "--num-gpus 1 --load-in-4bit"),
            check(
                f"4-bit, ZeRO-2, {num_gpus} GPU(s)",
                scratch,
                f"--num-gpus {num_gpus} --load-in-4bit --ds-config ds_configs/zero2.json",
            ),
        ]
    print(f"\n{'check':34} {'result':8} {'time':>6}   held-out loss: base, trained, by PEFT")
    for name, problem, seconds, losses in results:
        text = ", ".join(f"{loss:.3f}" for loss in losses)
        print(f"{name:34} {'FAILED' if problem else 'passed':8} {seconds:5.0f}s   {text}{problem}")
    return 1 if any(problem for _, problem, _, _ in results) else 0


def check(name: str, scratch: str, options: str) -> tuple[str, str, float, list[float]]:
    """Train, see the loss fall, and load the exported adapter (onto a plain base) by PEFT."""
    print(f"== {name}", flush=True)
    run, out = Path(scratch) / name.replace("/", " "), Path(scratch) / "eval.json"
    start = time.monotonic()
    losses: list[float] = []
    problem = ""
    try:
        train = ["lorasb", "train", *TRAIN.split(), *options.split(), "--output-dir", str(run)]
        subprocess.run(train, check=True, timeout=300)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        evals = [row["eval_loss"] for row in lines if "eval_loss" in row]
        losses = [evals[0], evals[-1]]
        command = ["lorasb", "eval", *EVAL.split(), "--adapter", str(run / "adapter")]
        subprocess.run([*command, "--output", str(out)], check=True, timeout=120)
        losses.append(json.loads(out.read_text())["loss"])
        if losses[1] > 0.5 * losses[0]:
            problem = "  the loss did not halve"
        # A 4-bit run's adapter on the bf16 base is close, and not equal.
        elif abs(losses[2] - losses[1]) > (0.3 if "4bit" in options else 0.02):
            problem = "  PEFT sees another loss"
    except (subprocess.SubprocessError, OSError) as error:
        problem = f"  {type(error).__name__}: {str(error)[:80]}"
    return name, problem, time.monotonic() - start, losses


if __name__ == "__main__":
    sys.exit(main())

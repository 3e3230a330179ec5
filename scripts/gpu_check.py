"""The checks of scripts/gpu_check.sh, and what it measures."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from bench_common import ROOT, machine, measure, write_json
from bench_layers import BASE, PEFT
from bench_step import QUICK, STACK
from gpu_measure import gpu

BUDGET_S, MEASURE_S = 450.0, 130.0  # all checks together; what is measured after them
TASK = "reasoning-gym:word_sequence_reversal?max_words=6"
TRAIN = f"--data {TASK}&size=1000&seed=1 --eval-data {TASK}&size=64&seed=2 --r 64 --max-steps 20"
EVAL = f"--data {TASK}&size=64&seed=2 --max-new-tokens 32"
MIB = 1 << 20


class Result(NamedTuple):
    name: str
    problem: str  # empty: passed
    seconds: float
    losses: list[float]  # held-out: of the base, trained, of the adapter's folder
    init: dict[str, float]  # gradients, communication and SVD, in seconds


@click.command()
@click.option("--out", type=Path, default=ROOT / "gpu_check.json", show_default=True)
@click.option(
    "--on-cpu", is_flag=True, help="One check in two processes: whether this script works."
)
def main(out: Path, on_cpu: bool) -> None:
    """Run on GPUs every path that no GPU has run yet, and measure; write one JSON file to send."""
    if not (torch.cuda.is_available() or on_cpu):
        print("gpu_check: there is no GPU here (torch.cuda.is_available() is False); nothing run.")
        return
    num_gpus = 2 if on_cpu else torch.cuda.device_count()
    gpus = [] if on_cpu else [torch.cuda.get_device_name(i) for i in range(num_gpus)]
    print(*gpus, torch.version.cuda, sep="\n")
    many = f"--num-procs {num_gpus}" if on_cpu else f"--num-gpus {num_gpus}"
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
    if on_cpu:
        checks = dict(list(checks.items())[:1])
    deadline = time.monotonic() + BUDGET_S
    with tempfile.TemporaryDirectory() as scratch:
        results = [
            check(name, options, Path(scratch) / str(index), deadline)
            for index, (name, options) in enumerate(checks.items())
        ]
    measured = measured_on(num_gpus, on_cpu)
    print_measured(measured)
    print(f"\n{'check':34} {'result':8} {'time':>6}   held-out loss: base, trained, of the folder")
    for name, problem, seconds, losses, init in results:
        text = ", ".join(f"{loss:.3f}" for loss in losses)
        parts = ", ".join(f"{part} {s:.1f} s" for part, s in init.items())
        print(f"{name:34} {'FAILED' if problem else 'passed':8} {seconds:5.0f}s   {text} {problem}")
        print(f"{'':34} {'':8} {'':6}   init: {parts}")
    found = {"machine": machine(), "gpus": gpus, "cuda": torch.version.cuda, "measured": measured}
    write_json(out, found | {"checks": [result._asdict() for result in results]})
    print(f"\nPlease send us {out}.")
    sys.exit(1 if any(result.problem for result in results) or "problem" in measured else 0)


def measured_on(num_ranks: int, on_cpu: bool) -> dict[str, Any]:
    """Run ``gpu_measure.gpu`` on all ranks; return what it found, or its problem."""
    print("== a pass, a step, the init", flush=True)
    config = {"data": f"{TASK}&size=64&seed=1", "init_samples": 16, "r": 64, "max_length": 128}
    config |= {"ds_config": str(ROOT / "ds_configs/zero3.json")}
    settings = {"config": config, "stack": QUICK if on_cpu else STACK}
    try:
        found: dict[str, Any] = measure(gpu, settings, num_ranks, on_cpu=on_cpu, limit_s=MEASURE_S)
    except SystemExit:
        return {"problem": f"a rank failed, or it took more than {MEASURE_S:.0f} s"}
    return found


def print_measured(found: dict[str, Any]) -> None:
    if "problem" in found:
        print(f"\nnot measured: {found['problem']}")
        return
    init, passes = found["init"], found["pass_s"]
    print(
        f"\na step: {found['step_s'] * 1e3:.1f} ms, {found['step_host_waits']} waits of the host, "
        f"{found['step_bytes'] / MIB:.1f} MiB sent by DeepSpeed"
    )
    parts = ", ".join(f"{part[:-2]} {init[part]:.1f} s" for part in init if part.endswith("_s"))
    print(
        f"the init: {parts}; the host waits {init['host_waits_a_layer']:.1f} times a layer; peak "
        f"{init['peak_bytes'] / MIB:.0f} MiB"
    )
    for way, seconds in passes.items():
        print(
            f"a pass, {way}: {seconds * 1e3:.1f} ms, {seconds / passes[BASE]:.3f} of the frozen "
            f"base's, {seconds / passes[PEFT]:.2f} of PEFT's"
        )


def check(name: str, options: str, run: Path, deadline: float) -> Result:
    """Train, see the loss fall, and evaluate the adapter's folder on the base as it was trained."""
    print(f"== {name}", flush=True)
    start, out = time.monotonic(), run.with_name(f"{run.name}-eval")
    losses: list[float] = []
    init: dict[str, float] = {}
    try:
        train = ["lorasb", "train", *TRAIN.split(), *options.split(), "--output-dir", str(run)]
        call(train, deadline)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        evals = [row["eval_loss"] for row in lines if "eval_loss" in row]
        losses = [evals[0], evals[-1]]
        report = json.loads((run / "init.json").read_text())
        init = {part: report[f"{part}_s"] for part in ("gradients", "communication", "svd")}
        adapter = ["--adapter", str(run / "adapter"), "--output-dir", str(out)]
        call(["lorasb", "eval", *EVAL.split(), *adapter], deadline)
        losses.append(json.loads((out / "eval.json").read_text())["results"][0]["loss"])
        problem = verdict(losses)
    except Exception as error:
        # Whatever goes wrong in one check, the others are run and the table is printed.
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return Result(name, problem, time.monotonic() - start, losses, init)


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
    main()

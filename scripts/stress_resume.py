#!/usr/bin/env python
"""Kill a run with SIGKILL again and again, resume it each time, and compare it with one left alone.

    scripts/stress_resume.py --kills 20

Every other kill comes while a checkpoint is being written, the others at random moments; some hit
one worker, some every process of the job. The run goes on with `--resume auto` on the same number
of processes, so that losses, gradient norms and the adapter must be the same to the bit. Prints a
table and, with --output, JSON. Ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lorasb_ds.system.files import file_digest

KEYS = ("loss", "grad_norm", "lr", "r_norm", "eval_loss")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--procs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = stress(options, Path(folder))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print("| kill | in a save | whom | started from | killed after | ended within |")
    print("|---:|---|---|---:|---:|---:|")
    for i, kill in enumerate(result["kills"], 1):
        print(
            f"| {i} | {'yes' if kill['in_a_save'] else ''} | {kill['whom']} | "
            f"{kill['started_from']} | step {kill['step']} | {kill['ended_s']:.1f} s |"
        )
    print(
        f"\n{len(result['kills'])} kills, {result['in_a_save']} of them in the middle of a save; "
        f"{result['rows']} rows of metrics, largest difference {result['largest_difference']}; "
        f"adapters {'equal' if result['same_adapter'] else 'DIFFER'}; init finished "
        f"{result['inits']} time(s)"
    )
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["largest_difference"] == 0 and result["same_adapter"] else 1


def stress(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = [
        {
            "question": f"Say {'red blue ' * (1 + i % 5)}{i}",
            "answer": f"{'blue red ' * (1 + i % 3)}{i}",
        }
        for i in range(30)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *(str(Path(sys.executable).parent / "lorasb"), "train", "--num-procs", str(options.procs)),
        *("--model", options.model, "--data", str(data), "--eval-data", str(data)),
        *("--r", "8", "--init-lr", "1e-3", "--lr", "1e-2", "--micro-batch-size", "2"),
        *("--target-modules", "q_proj,v_proj", "--max-steps", str(options.steps)),
        *("--save-every", "1", "--eval-every", "10", "--seed", "3"),
    ]
    alone, killed = folder / "alone", folder / "killed"
    subprocess.run([*command, "--output-dir", str(alone)], check=True, stdout=subprocess.DEVNULL)
    generator = random.Random(options.seed)  # noqa: S311
    kills, inits = [], 0
    while True:
        log = (folder / "log").open("w+")
        start = [*command, "--output-dir", str(killed), "--resume", "auto"]
        child = subprocess.Popen(start, stdout=log, stderr=log)
        kill = None
        if len(kills) < options.kills:
            kill = kill_at_some_moment(child, killed, generator, in_a_save=len(kills) % 2 == 1)
        status = child.wait()
        log.seek(0)
        text = log.read()
        log.close()
        inits += text.count("; eta ")
        resumed = [line for line in text.splitlines() if "resumed after" in line]
        started = "the start"
        if resumed:
            started = resumed[0].partition("after ")[2].partition(":")[0].partition(" from")[0]
        if kill is None:
            if status != 0:
                raise SystemExit(f"status {status}:\n{text[-4000:]}")
            break
        kills.append(kill | {"started_from": started})
    found, expected = (metrics(run) for run in (killed, alone))
    assert found.keys() == expected.keys(), "rows are missing"
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(found), "rows are twice"
    differences = [
        abs(found[k][key] - expected[k][key]) for k in found for key in KEYS if key in found[k]
    ]
    adapters = [
        file_digest(run / "adapter" / "adapter_model.safetensors") for run in (alone, killed)
    ]
    return {
        "kills": kills,
        "in_a_save": sum(kill["in_a_save"] for kill in kills),
        "rows": len(found),
        "largest_difference": max(differences),
        "same_adapter": adapters[0] == adapters[1],
        "inits": inits,
        "steps": options.steps,
        "processes": options.procs,
        "model": options.model,
    }


def kill_at_some_moment(
    child: subprocess.Popen[Any], run: Path, generator: random.Random, in_a_save: bool
) -> dict[str, Any] | None:
    """Send SIGKILL to a worker or to the whole job; return None if the run was done before.

    Args:
        in_a_save: wait for rank 0, which saves, to begin with that, and kill it there.
    """
    steps_before = len(metrics(run)) if run.is_dir() else 0
    while child.poll() is None and (not run.is_dir() or len(metrics(run)) <= steps_before):
        time.sleep(0.01)
    if child.poll() is not None:
        return None
    job = psutil.Process(child.pid).children(recursive=True)
    commands = {process.pid: " ".join(process.cmdline()) for process in job}
    workers = [pid for pid, line in commands.items() if "launcher/train.py --local_rank" in line]
    rank_0 = [pid for pid in workers if "--local_rank=0" in commands[pid]]
    everyone = generator.random() < 0.3
    whom = (
        [p.pid for p in job] if everyone else rank_0 if in_a_save else [generator.choice(workers)]
    )
    time.sleep(generator.uniform(0, 1.5))
    left_before = torn(run)
    if in_a_save:
        whom = [*rank_0, *(pid for pid in whom if pid not in rank_0)]
        while child.poll() is None and torn(run) <= left_before:
            pass  # a save takes some hundredths of a second
    if child.poll() is not None:
        return None
    began = time.monotonic()
    for pid in whom:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    status = child.wait()
    assert status != 0, "a killed run must not end with 0"
    for process in psutil.process_iter(["cmdline"]):
        assert str(run) not in " ".join(process.info["cmdline"] or []) or process.pid == os.getpid()
    return {
        "in_a_save": not torn(run) <= left_before,
        "whom": "every process" if everyone else "one worker",
        "step": max((row["step"] for row in metrics(run).values()), default=0),
        "ended_s": time.monotonic() - began,
    }


def torn(run: Path) -> set[int]:
    """Return inodes of the folders of unfinished checkpoints, whether or not the writer lives."""
    found = set()
    for path in (run / "checkpoints").glob("step-*.tmp"):
        with suppress(FileNotFoundError):
            found.add(path.stat().st_ino)
    return found


def metrics(run: Path) -> dict[str, Any]:
    """Return rows by step and stage, without a torn last line."""
    file = run / "metrics.jsonl"
    rows: dict[str, Any] = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[f"{row['step']} {row.get('stage', 'train')}"] = row
    return rows


if __name__ == "__main__":
    sys.exit(main())

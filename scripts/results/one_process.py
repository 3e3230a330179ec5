"""What is measured in one process: results that are kept, trainings from what is filled in."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench_run
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from launcher.jobs.ranks import free_port, rank_environment
from lorasb_ds.system.files import write_json


def measured(
    output: Path,
    settings: Mapping[str, Any],
    cases: Mapping[str, Iterable[str]],
    measure: Callable[[str, Sequence[str], Callable[[str, Any], None]], None],
) -> dict[str, Any]:
    """Return the results of all cases, of which those that the output lacks are measured.

    Args:
        settings: what all of them have; an output with others is refused.
        cases: what needs an engine of its own, and so a process -> names of its results.
        measure: measures some results of a case, and gives each to its last argument.
    """
    done: dict[str, Any] = json.loads(output.read_text()) if output.is_file() else {}
    if done.setdefault("settings", dict(settings)) != dict(settings):
        raise click.UsageError(f"{output} was made with {done['settings']}")
    done.setdefault("results", {})

    def keep(name: str, result: Any) -> None:
        click.echo(f"{name}: {result}")
        done["results"][name] = result
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, done)

    for case, names in cases.items():
        if due := [name for name in names if name not in done["results"]]:
            child = os.fork()
            if child == 0:
                os.environ |= rank_environment(0, 1, free_port(), threads=threads())
                measure(case, due, keep)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                sys.exit(1)
            done = json.loads(output.read_text())
    results: dict[str, Any] = done["results"]
    return results


def threads() -> int:
    """Return OMP_NUM_THREADS, or the number of cores."""
    return int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))


def train(run: Any, engine: Any, num_steps: int, lr: float) -> None:
    """Train from what is filled in, with a new optimizer and half a cosine without a warmup."""
    from lorasb_ds.training.engine_state import reset_optimizer
    from lorasb_ds.training.loop import train_step

    reset_optimizer(engine)
    engine.train()
    for step in range(num_steps):
        for group in engine.optimizer.optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / num_steps)) / 2
        train_step(engine, run.step_batches(run.order.packs(step)))


def held_out(run: Any, engine: Any) -> float:
    """Return the loss of the held-out rows."""
    rows = run.data.held_out
    return loss_of(run.batches(rows, range(len(rows.examples))), engine)


def loss_of(batches: Sequence[Any], engine: Any) -> float:
    from lorasb_ds.distributed import accelerator
    from lorasb_ds.models.loss import held_out_loss

    return held_out_loss(engine.module, batches, accelerator.device())

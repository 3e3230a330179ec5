#!/usr/bin/env python
"""Which learning rate is best, for models, ranks and batches, and what could have told it.

    scripts/results/learning_rates.py --output OUT.json --data FILE --eval-data FILE --models demo

For each model, r and batch: one init, and from it a training at every learning rate. Beside each
of them are shorter ones of the same rows, whose loss on the init's held-back rows is what a search
at the beginning of a run would see; and the init's own step, eta · ‖S‖.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent))
from one_process import held_out, loss_of, measured, train

from launcher.text import markdown

STEP_SIZES = [2.0**exponent for exponent in range(-6, -1)]  # lr · r
SHORT = (8,)  # steps of the searches
COLUMNS = (
    "model",
    "r",
    "rows a step",
    "after the init",
    "best lr",
    "lr · r",
    "loss",
    "init's ‖ΔW‖",
)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--models", default="demo", show_default=True)
@click.option("--ranks", default="32,96", show_default=True)
@click.option("--batches", default="2,8", show_default=True)
@click.option("--data", required=True)
@click.option("--eval-data", required=True)
@click.option("--max-steps", default=24, show_default=True)
@click.option("--init-samples", default=40, show_default=True)
def main(output: Path, models: str, ranks: str, batches: str, **options: Any) -> None:
    """Run all trainings, and print the table."""
    settings = {"max_length": 512, "init_micro_batch_size": 8, **options}
    cases = {
        " ".join(case): [" ".join([*case, f"{size:g}"]) for size in STEP_SIZES]
        for case in product(models.split(","), ranks.split(","), batches.split(","))
    }

    def measure(case: str, due: Sequence[str], keep: Callable[[str, Any], None]) -> None:
        model, r, batch = case.split()
        sizes = {"micro_batch_size": int(batch), "train_batch_size": int(batch), "r": int(r)}
        follow(settings | sizes | {"model": model}, due, keep)

    results = measured(output, settings, cases, measure)
    click.echo("\n".join(markdown(COLUMNS, table(results))))


def follow(
    settings: Mapping[str, Any], due: Sequence[str], keep: Callable[[str, Any], None]
) -> None:
    """Make one init and train from it at each learning rate that is due."""
    from bench_run import started_empty  # with torch, which is the child's

    from lorasb_ds.distributed import zero
    from lorasb_ds.training.init_phase import initialize_by

    run, engine, adapters = started_empty(settings)
    samples = (run.sample(rows) for rows in (run.gradient_rows, run.probe_rows))
    report = initialize_by(run, engine, adapters, *samples, lambda factors: None)
    eta = report.step.init_lr
    norms = [eta * math.sqrt(layer.squared_norm) for layer in report.layers.values()]
    probe = run.sample(run.probe_rows).batches
    shared = {
        "eta": eta,
        "init_norm": math.sqrt(statistics.fmean(norm * norm for norm in norms)),
        "after_init": held_out(run, engine),
        "probe_after_init": loss_of(probe, engine),
    }
    first = {name: zero.full_fp32(adapter.lora_R) for name, adapter in adapters.items()}

    def trained(num_steps: int, lr: float) -> None:
        for name, adapter in adapters.items():
            zero.fill_trainable(adapter.lora_R, first[name])
        train(run, engine, num_steps, lr)

    for name in due:
        lr = float(name.split()[-1]) / run.config.r
        result = {"lr": lr, **shared}
        for num_steps in SHORT:
            trained(num_steps, lr)
            result[f"probe_after_{num_steps}"] = loss_of(probe, engine)
        trained(run.num_steps, lr)
        keep(name, {**result, "probe": loss_of(probe, engine), "loss": held_out(run, engine)})


def table(results: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Return a row for each model, r and batch, at its best learning rate."""
    rows = []
    for case in dict.fromkeys(name.rpartition(" ")[0] for name in results):
        found = [result for name, result in results.items() if name.rpartition(" ")[0] == case]
        best = min(found, key=lambda result: result["loss"])
        model, r, batch = case.split()
        cells = [Path(model).name, r, batch, f"{best['after_init']:.4f}", f"{best['lr']:.2g}"]
        norm = f"{best['init_norm']:.3g}"
        rows.append([*cells, f"{best['lr'] * int(r):.3g}", f"{best['loss']:.4f}", norm])
    return rows


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""What the paper leaves open in the first step, measured on one model; in one process.

    scripts/results/first_step.py --output OUT.json --data FILE --eval-data FILE --seeds 42,43

The matrix whose SVD gives the basis is made in three ways from the same rows, and eta is chosen on
more rows. Each way is followed by the same training. A way that the output has is not run again.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent))
from one_process import held_out, measured, train

from launcher.text import markdown


@dataclass(frozen=True)
class Way:
    """One way to take the first step."""

    what: str
    matrix: str = "tokens"  # a key of ``matrices``
    update: str = "sign"
    probe_rows: int | None = None  # rows that eta is chosen on. [default: one in eight]


WAYS = {
    "tokens": Way("sign of the mean over label tokens (default)"),
    "rows": Way("sign of the mean over rows of their means", matrix="rows"),
    "signs": Way("mean of the signs of all rows", matrix="signs", update="raw"),
    "eta-20": Way("default, eta chosen on 20 rows", probe_rows=20),
    "eta-80": Way("default, eta chosen on 80 rows", probe_rows=80),
}
COLUMNS = ("first step", "eta", "loss after the init", "loss at the end")


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--model", default="demo", show_default=True)
@click.option("--data", required=True)
@click.option("--eval-data", required=True)
@click.option("--seeds", default="42", show_default=True)
@click.option("--r", default=96, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--max-steps", default=24, show_default=True)
@click.option("--init-samples", default=40, show_default=True)
@click.option("--ways", default=",".join(WAYS), show_default=True)
def main(output: Path, seeds: str, ways: str, **options: Any) -> None:
    """Run every way with every seed, and print the table."""
    settings = {"micro_batch_size": 8, "max_length": 512, **options}
    cases = {seed: [f"{way} {seed}" for way in ways.split(",")] for seed in seeds.split(",")}

    def measure(seed: str, due: Sequence[str], keep: Callable[[str, Any], None]) -> None:
        from bench_run import started_empty  # with torch, which is the child's

        run, engine, adapters = started_empty(settings | {"seed": int(seed)})
        found = matrices(run, engine, adapters)
        for name in due:
            way = WAYS[name.split()[0]]
            keep(name, follow(way, run, engine, adapters, found[way.matrix]))

    results = measured(output, settings, cases, measure)
    click.echo("\n".join(markdown(COLUMNS, table(results))))


def matrices(run: Any, engine: Any, adapters: Any) -> dict[str, dict[str, Any]]:
    """Return way -> layer -> its matrix, from one pass over the rows, each by itself."""
    import torch

    from lorasb_ds.init.gradients import average_gradients

    samples = [run.sample([row]) for row in run.gradient_rows]
    num_tokens = sum(sample.num_label_tokens for sample in samples)
    found: dict[str, dict[str, Any]] = {"tokens": {}, "rows": {}, "signs": {}}
    for sample in samples:
        T = sample.num_label_tokens
        shards = average_gradients(engine.module, adapters, sample.batches, T)
        for name in adapters:
            G = shards.take(name)
            terms = {"tokens": G * (T / num_tokens), "rows": G / len(samples)}
            terms["signs"] = G.sign() / len(samples)
            for way, term in terms.items():
                found[way][name] = found[way].get(name, torch.zeros_like(G)).add_(term)
    return found


def follow(
    way: Way, run: Any, engine: Any, adapters: Any, gradients: Mapping[str, Any]
) -> dict[str, float]:
    """Take one first step and train from it; return eta and the held-out losses."""
    from lorasb_ds.init.decomposition import decompose, describe_layer
    from lorasb_ds.init.factors import InitSettings, fill_layer, gather_directions
    from lorasb_ds.init.step_size import choose_step

    settings, layers = InitSettings.from_config(run.config), {}
    for name, adapter in adapters.items():
        of_layer = {name: gradients[name]}
        svd, slopes = decompose(of_layer, adapter.r, way.update, seed=settings.seed)[name]
        layers[name] = describe_layer(svd, slopes, adapter.lora_A.dtype, 1, None)
        fill_layer(name, adapter, gather_directions(adapter, svd, None), settings)
    probe_rows = run.probe_rows
    if way.probe_rows is not None:
        unseen = set(range(len(run.data.init.examples))) - set(run.gradient_rows)
        probe_rows = sorted(unseen)[: way.probe_rows]
    step = choose_step(engine, adapters, layers, run.sample(probe_rows), "auto")

    after_init = held_out(run, engine)
    train(run, engine, run.num_steps, run.config.lr)
    return {"eta": step.init_lr, "after_init": after_init, "at_the_end": held_out(run, engine)}


def table(results: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Return a row for each way: means and standard deviations over the seeds."""
    rows = []
    for name, way in WAYS.items():
        found = [result for key, result in results.items() if key.split()[0] == name]
        if found:
            etas = ", ".join(sorted({f"{result['eta']:.3g}" for result in found}))
            losses = [spread([r[key] for r in found]) for key in ("after_init", "at_the_end")]
            rows.append([way.what, etas, *losses])
    return rows


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation."""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()

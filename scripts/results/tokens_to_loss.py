#!/usr/bin/env python
"""After how many tokens runs reach the loss with which the last of them ends.

    scripts/results/tokens_to_loss.py --output OUT.json RUN… LORA

Runs have held-out losses from --eval-every, between which it is interpolated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from launcher.text import markdown
from lorasb_ds.system.files import write_json

COLUMNS = ("run", "r", "steps", "time", "after the init", "at the end", "tokens", "rows of inits")


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(output: Path, runs: Sequence[Path]) -> None:
    """Print the table, and write it with the losses that it is from."""
    found = {run.name: watched(run) for run in runs}
    target = found[runs[-1].name]["losses"][-1][1]
    for of_run in found.values():
        of_run["tokens_to_target"] = first_at(target, of_run["losses"])
    write_json(output, {"target": target, "runs": found})
    click.echo("\n".join(markdown(COLUMNS, [row(name, of_run) for name, of_run in found.items()])))


def watched(run: Path) -> dict[str, Any]:
    """Return a run's r and steps, the seconds and rows of steps and inits, and its losses.

    These are (tokens trained on, held-out loss), from right after the init on.
    """
    tokens, points, seconds, steps, init_rows = 0, list[tuple[int, float]](), 0.0, 0, 0
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        logged = json.loads(line)
        tokens, steps = tokens + logged.get("tokens", 0), logged["step"]
        seconds += logged.get("step_time_s", 0.0)
        if "eval_loss" in logged and logged.get("stage") != "base":
            points.append((tokens, logged["eval_loss"]))
    for report in (run / "init.json", *sorted(run.glob("rebased/*/init.json"))):
        init = json.loads(report.read_text(encoding="utf-8"))
        seconds += init["total_s"]
        if init["num_samples"]:
            init_rows += init["num_samples"] + init["step"]["num_samples"]
    config = json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]
    sizes = {"r": config["r"], "steps": steps, "seconds": round(seconds), "init_rows": init_rows}
    return {**sizes, "losses": points}


def first_at(target: float, points: Sequence[tuple[int, float]]) -> float | None:
    """Return the tokens after which the loss is first as low as the target; None: it never is."""
    before = points[0]
    for tokens, loss in points:
        if loss <= target:
            drop = before[1] - loss
            share = (before[1] - target) / drop if drop > 0 else 1.0
            return before[0] + share * (tokens - before[0])
        before = (tokens, loss)
    return None


def row(name: str, of_run: Mapping[str, Any]) -> list[str]:
    first, *_, last = (f"{loss:.4f}" for _, loss in of_run["losses"])
    reached = of_run["tokens_to_target"]
    tokens = "never" if reached is None else f"{reached:,.0f}"
    sizes = [str(of_run["r"]), str(of_run["steps"]), f"{of_run['seconds']} s"]
    return [name, *sizes, first, last, tokens, str(of_run["init_rows"])]


if __name__ == "__main__":
    main()

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

COLUMNS = ("run", "r", "after the init", "at the end", "tokens", "of all", "rows of inits")


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
    """Return a run's r, its (tokens trained on, held-out loss), and the rows of its inits."""
    tokens, points, inits = 0, list[tuple[int, float]](), 0
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        logged = json.loads(line)
        tokens += logged.get("tokens", 0)
        if "eval_loss" in logged and logged.get("stage") != "base":
            points.append((tokens, logged["eval_loss"]))
    for report in (run / "init.json", *sorted(run.glob("rebased/*/init.json"))):
        init = json.loads(report.read_text(encoding="utf-8"))
        inits += init["num_samples"] + init["step"]["num_samples"] if init["num_samples"] else 0
    config = json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]
    return {"r": config["r"], "losses": points, "init_rows": inits}


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
    points, reached = of_run["losses"], of_run["tokens_to_target"]
    cells = [name, str(of_run["r"]), f"{points[0][1]:.4f}", f"{points[-1][1]:.4f}"]
    tokens, share = "never", "-"
    if reached is not None:
        tokens, share = f"{reached:,.0f}", f"{reached / points[-1][0]:.0%}"
    return [*cells, tokens, share, str(of_run["init_rows"])]


if __name__ == "__main__":
    main()

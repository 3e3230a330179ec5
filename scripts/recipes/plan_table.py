"""The recipes' memory plans as the table of docs/recipes.md: python scripts/recipes/plan_table.py

The commands are those that `scripts/recipes/RECIPE.sh --plan` runs; what they recommend is shown.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from launcher.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
MODELS = {"mistral-7b": "arithmetic", "gemma-2-9b": "arithmetic", "llama-3.2-3b": "commonsense"}
GIB = 1 << 30
COLUMNS = ("", "GPUs", "base", "rows", "load", "init", "train", "needs", "of")


def commands(model: str) -> list[list[str]]:
    """Return the words of the `lorasb plan` commands of a model's recipe, for each machine."""
    recipe = ROOT / "scripts/recipes" / f"{MODELS[model]}.sh"
    shown = subprocess.run(
        [recipe, "--model", model, "--plan", "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [
        shlex.split(line.removeprefix("$ lorasb "))
        for line in shown.stdout.splitlines()
        if line.startswith("$ lorasb plan ")
    ]


def planned(words: list[str]) -> dict[str, Any]:
    """Return the output of a `lorasb plan` command."""
    result = CliRunner().invoke(main, [*words, "--json"])
    if result.exit_code != 0:
        raise SystemExit(result.output)
    found: dict[str, Any] = json.loads(result.output)
    return found


def recommended(plan: dict[str, Any]) -> dict[str, Any]:
    return next(s for s in plan["strategies"] if s["name"] == plan["recommended"])


def line(words: list[str]) -> str:
    plan = planned(words)
    best, cluster = recommended(plan), plan["cluster"]
    peaks = [f"{best['peak_bytes'][phase] / GIB:.1f}" for phase in ("load", "init", "train")]
    budget = " (b)" if "--init-memory-gib" in words else ""
    cells = (
        plan["model"],
        f"{cluster['ranks_per_node']} x {cluster['memory_bytes'] // GIB} GB",
        f"{best['name']}{budget}",
        words[words.index("--micro-batch-size") + 1],
        *peaks,
        f"{best['needed_bytes'] / GIB:.1f}",
        f"{cluster['memory_bytes'] // GIB}",
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|" + "---:|" * (len(COLUMNS) - 3)]
    return "\n".join(lines + [line(words) for model in MODELS for words in commands(model)])


if __name__ == "__main__":
    print(table())

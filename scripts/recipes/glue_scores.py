"""The scores of GLUE's tasks in a table: python scripts/recipes/glue_scores.py FOLDER TASK…

The folder holds TASK/after/, each of a `lorasb eval`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

# What GLUE reports of a task (gluebenchmark.com); of all others the accuracy.
REPORTED = {
    "cola": ("matthews",),
    "stsb": ("pearson", "spearman"),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
}


def scores(folder: Path, task: str) -> tuple[dict[str, float], int]:
    """Return what is reported of a task, and the number of its rows."""
    (result,) = json.loads((folder / task / "after/eval.json").read_text())["results"]
    found = {}
    for name in REPORTED.get(task, ("accuracy",)):
        score = result["scores"][name]
        found[name] = score if isinstance(score, float) else score["share"]
    return found, result["rows"]


def table(folder: Path, tasks: Sequence[str]) -> str:
    lines, firsts = [], []
    for task in tasks:
        found, rows = scores(folder, task)
        firsts.append(next(iter(found.values())))
        said = "   ".join(f"{name:9} {value:7.2%}" for name, value in found.items())
        lines.append(f"{task:8} {rows:6} rows   {said}")
    lines.append(f"{'mean':8} of the first scores: {sum(firsts) / len(firsts):.2%}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]), sys.argv[2:]))

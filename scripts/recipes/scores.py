"""The scores of a recipe side by side: python scripts/recipes/scores.py FOLDER

The folder holds before-SET and after-SET, each as `lorasb eval --output-dir` leaves it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def read(folder: Path) -> dict[str, Any] | None:
    """The score of an evaluation; None where there is none."""
    file = folder / "eval.json"
    if not file.is_file():
        return None
    scores = json.loads(file.read_text())["scores"]
    return scores.get("accuracy") or scores.get("exact_match")


def cells(score: dict[str, Any] | None) -> tuple[str, str]:
    if score is None:
        return "-", ""
    low, high = score["interval"]
    return f"{score['share']:.1%}", f"{low:.1%} to {high:.1%}"


def table(folder: Path) -> str:
    interval = f"{'95 % interval':>16}"
    lines = [f"{'':14} {'before':>7} {interval} {'after':>7} {interval} {'rows':>6}"]
    for after in sorted(folder.glob("after-*"), key=lambda path: path.stat().st_mtime):
        name = after.name.removeprefix("after-")
        scores = [read(folder / f"before-{name}"), read(after)]
        (before, before_interval), (now, now_interval) = map(cells, scores)
        rows = scores[1]["rows"] if scores[1] else 0
        lines.append(
            f"{name:14} {before:>7} {before_interval:>16} {now:>7} {now_interval:>16} {rows:>6}"
        )
    shares = [score["share"] for path in folder.glob("after-*") if (score := read(path))]
    if shares:
        lines.append(f"{'mean, after':14} {'':>7} {'':>16} {sum(shares) / len(shares):>7.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))

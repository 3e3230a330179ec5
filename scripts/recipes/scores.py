"""The scores of a recipe side by side: python scripts/recipes/scores.py FOLDER SET…

The folder holds before/ and after/, each of a `lorasb eval` with as many --data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the score of every set."""
    results = json.loads((folder / "eval.json").read_text())["results"]
    return [r["scores"].get("accuracy") or r["scores"]["exact_match"] for r in results]


def cells(score: dict[str, Any]) -> tuple[str, str]:
    low, high = score["interval"]
    return f"{score['share']:.1%}", f"{low:.1%} to {high:.1%}"


def table(folder: Path, names: Sequence[str]) -> str:
    interval = f"{'95 % interval':>16}"
    lines = [f"{'':14} {'before':>7} {interval} {'after':>7} {interval} {'rows':>6}"]
    both = [read(folder / when) for when in ("before", "after")]
    for name, *scores in zip(names, *both, strict=True):
        (before, before_interval), (now, now_interval) = map(cells, scores)
        rows = scores[1]["rows"]
        lines.append(
            f"{name:14} {before:>7} {before_interval:>16} {now:>7} {now_interval:>16} {rows:>6}"
        )
    means = [f"{sum(score['share'] for score in scores) / len(names):.1%}" for scores in both]
    lines.append(f"{'mean':14} {means[0]:>7} {'':>16} {means[1]:>7}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]), sys.argv[2:]))

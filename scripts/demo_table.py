"""The demo's closing table: before and after, and the adapter as PEFT loads it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# bf16: the adapter folder holds (B R), the run multiplies by R and then by B, rounding otherwise.
TOLERANCE = 0.02


def main(run: Path, before_folder: Path, after_folder: Path) -> int:
    before, after = (_results(folder) for folder in (before_folder, after_folder))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    trained = [row["eval_loss"] for row in map(json.loads, lines) if "eval_loss" in row][-1]
    print(f"\n{'':8} {'held-out loss':>14} {'exact match':>12}   95 % interval")
    for name, result in (("before", before), ("after", after)):
        score = result["scores"]["exact_match"]
        low, high = score["interval"]
        match = f"{score['share']:.1%}"
        print(f"{name:8} {result['loss']:14.4f} {match:>12}   {low:.1%} to {high:.1%}")
    print("\nthe same three rows, before and after:")
    for old, new in list(zip(before["answers"], after["answers"], strict=True))[:3]:
        print(f"  wanted  {new['expected']}\n  before  {_short(old)}\n  after   {_short(new)}\n")
    difference = abs(after["loss"] - trained)
    same = difference <= TOLERANCE
    print(
        f"held-out loss in the run {trained:.4f}, of {run}/adapter "
        f"{after['loss']:.4f}: {'the same' if same else 'NOT THE SAME'} within {TOLERANCE}\n"
    )
    return 0 if same else 1


def _results(folder: Path) -> dict[str, Any]:
    lines = (folder / "answers.jsonl").read_text().splitlines()
    summary = json.loads((folder / "eval.json").read_text())
    return {**summary["results"][0], "answers": [json.loads(line) for line in lines]}


def _short(answer: dict[str, Any]) -> str:
    text = " ".join(answer["generated"].split())
    return text if len(text) <= 70 else text[:70] + " …"


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))

"""Rows of GSM-Symbolic (arXiv 2410.05229, as reasoning-gym makes them) in GSM8K's form.

    python scripts/results/data.py FOLDER

A question, and its worked answer, which ends in ``#### n``; only short ones, since fifty runs are
to take an hour. Training and test rows are of other seeds of the same templates; a question that is
in both is left out of the test.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import reasoning_gym

SIZES = {"train": (1, 600), "test": (2, 128)}  # seed, rows
LONGEST = 500  # characters of a row, about 200 tokens


def rows(seed: int, size: int) -> list[dict[str, str]]:
    """Make the rows of one seed; a template without a worked answer is skipped."""
    made = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=4 * size)
    found = [
        {"question": row["question"], "answer": row["metadata"]["answer_cot"]}
        for row in made
        if "####" in row["metadata"]["answer_cot"]
    ]
    found = [row for row in found if len(row["question"] + row["answer"]) <= LONGEST]
    return found[:size]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sets = {name: rows(*which) for name, which in SIZES.items()}
    seen = {row["question"] for row in sets["train"]}
    sets["test"] = [row for row in sets["test"] if row["question"] not in seen]
    for name, found in sets.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(found)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

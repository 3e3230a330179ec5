#!/usr/bin/env python
"""Every family of causal language models in transformers, tiny and random: what works with it.

Each is trained for a few steps, loaded by PEFT, merged, and loaded in 4 bits. The results are kept
in docs/models.json after each family, from which docs/models.md is made; a second call goes on with
those that are missing.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from bench_common import ROOT, machine, measure, row, write_json
from model_family import RUN, family_case, multimodal

sys.path.append(str(ROOT))  # for the tests' configurations

ENOUGH, SAME = 0.99, 1e-4
BEGIN, END = "<!-- made by scripts/models.py -->", "<!-- end -->"
COLUMNS = ("adapter", "in 4 bits", "loss before", "after", "in PEFT", "merged", "what is said")


def families() -> list[str]:
    """Return the model types of all families: those of text, then those of images and text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - multimodal()), *sorted(multimodal())]


def verdict(of: Mapping[str, Any]) -> str:
    """Return what a family's result comes to."""
    if "refused" in of:
        return "in part" if "adapted" in of else "refused"
    if "trouble" in of:
        return "not built" if of["trouble"].startswith("write:") else "trouble"
    shares = min(of["adapted"], of["packed"]) / (of["linear"] + of["experts"])
    wanted = of["run_loss"]
    same = [abs(of[key] - wanted) <= SAME * wanted for key in ("peft_loss", "merged_loss")]
    return "whole" if shares >= ENOUGH and all(same) else "in part"


def cells(of: Mapping[str, Any]) -> list[str]:
    total = of.get("linear", 0) + of.get("experts", 0)
    shares = [f"{of[key] / total:.1%}" if key in of else "" for key in ("adapted", "packed")]
    keys = ("base_loss", "run_loss", "peft_loss", "merged_loss")
    losses = [f"{of[key]:.4f}" if key in of else "" for key in keys]
    said = of.get("refused") or of.get("trouble") or "; ".join(of.get("notes", ()))
    return [*shares, *losses, textwrap.shorten(said.replace("|", "/"), 300, placeholder=" …")]


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the part of docs/models.md that is made."""
    verdicts = {family: verdict(of) for family, of in found.items()}
    counts = Counter(verdicts.values())
    lines = [
        f"transformers {version('transformers')}, PEFT {version('peft')}: of {len(found)} families "
        + ", ".join(f"{count} {name}" for name, count in counts.most_common())
        + ".",
        "",
        row("family", ("", *COLUMNS)),
        "|---|---|" + "---:|" * (len(COLUMNS) - 1) + "---|",
        *(row(family, (verdicts[family], *cells(of))) for family, of in found.items()),
    ]
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--out", type=Path, default=ROOT / "docs/models.json", show_default=True)
@click.option("--page", "to", type=Path, default=ROOT / "docs/models.md", show_default=True)
@click.option("--only", multiple=True, help="A model type, made again; may be repeated.")
@click.option("--anew", is_flag=True, help="Make all again.")
def main(out: Path, to: Path, only: tuple[str, ...], anew: bool) -> None:
    found: dict[str, Any] = {}
    if out.is_file() and not anew:
        found = json.loads(out.read_text())["families"]
    for family in only or [family for family in families() if family not in found]:
        try:
            found[family] = measure(family_case, {"family": family})
        except SystemExit as error:  # it was killed
            found[family] = {"trouble": f"process: {error}"}
        of = found[family]
        click.echo(f"{family}: {verdict(of)} | {' | '.join(cells(of))}", err=True)
        found = {name: found[name] for name in families() if name in found}
        write_json(out, {"machine": machine(), "run": RUN, "families": found})
    if to.is_file():
        head, _, rest = to.read_text().partition(BEGIN)
        to.write_text(f"{head}{BEGIN}\n{page(found)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()

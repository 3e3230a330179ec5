"""The table of all families is what scripts/models.py has found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, run_command

sys.path.append(str(ROOT / "scripts"))
import models

KEPT = json.loads((ROOT / "docs/models.json").read_text())["families"]


def test_the_page_is_made_of_the_numbers() -> None:
    text = (ROOT / "docs/models.md").read_text()
    made = text.partition(models.BEGIN)[2].partition(models.END)[0].strip()
    assert made.splitlines()[1:] == models.page(KEPT).splitlines()[1:], "but for the versions"


def test_every_family_is_there() -> None:
    assert list(KEPT) == models.families()
    assert not [family for family, of in KEPT.items() if models.verdict(of) == "trouble"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "whole"),
        ({"packed": 90}, "in part"),
        ({"adapted": 98}, "in part"),
        ({"peft_loss": 1.01}, "in part"),
        ({"merged_loss": 0.99}, "in part"),
        ({"refused": "its files cannot be merged"}, "in part"),
        ({"trouble": "merge: KeyError"}, "trouble"),
    ],
)
def test_what_a_result_comes_to(changed: dict[str, object], expected: str) -> None:
    whole = {"linear": 60, "experts": 40, "adapted": 100, "packed": 99}
    whole |= dict.fromkeys(("run_loss", "peft_loss", "merged_loss"), 1)
    assert models.verdict(whole | changed) == expected
    assert models.verdict({"refused": "an encoder"}) == "refused"
    assert models.verdict({"trouble": "write: ImportError"}) == "not built"


@pytest.mark.slow
def test_families_are_tried_and_kept(tmp_path: Path) -> None:
    out, page = tmp_path / "models.json", tmp_path / "models.md"
    page.write_text(f"before\n{models.BEGIN}\nold\n{models.END}\nbehind\n")
    command = [sys.executable, "scripts/models.py", "--out", str(out), "--page", str(page)]
    for family in ("llama4_text", "qwen3_moe", "bert"):
        run_command(*command, "--only", family)
    found = json.loads(out.read_text())["families"]
    assert {family: models.verdict(of) for family, of in found.items()} == {
        "bert": "refused",
        "llama4_text": "in part",
        "qwen3_moe": "whole",
    }
    llama4 = found["llama4_text"]
    assert llama4["adapted"] == llama4["packed"] == llama4["linear"]
    assert "experts stay frozen" in llama4["notes"][0]
    before, made, behind = page.read_text().partition("before\n")[2].partition("behind")
    assert "of 3 families" in before
    assert "old" not in before
    assert (made, behind) == ("behind", "\n")

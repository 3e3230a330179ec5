"""docs/results.md: its rows, and that it says what its numbers say."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT

RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def data() -> Any:
    spec = importlib.util.spec_from_file_location("data", ROOT / "scripts" / "results" / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_gsm8k_s_and_disjoint(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SIZES", {"train": (1, 60), "test": (2, 40)})
    data.main(tmp_path)
    sets = {}
    for name in ("train", "test"):
        sets[name] = list(map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines()))
        for row in sets[name]:
            assert set(row) == {"question", "answer"}
            assert re.search(r"#### -?[\d.,/]+$", row["answer"]), row["answer"][-40:]
    assert len(sets["train"]) == 60
    # Templates have few values, so that other seeds make some of the same questions.
    assert 20 < len(sets["test"]) < 40
    questions = {row["question"] for row in sets["train"]}
    assert questions.isdisjoint(row["question"] for row in sets["test"])


def test_the_script_is_bash_s() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "scripts" / "results.sh")], check=True)


def test_the_page_is_its_numbers() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    script = (ROOT / "scripts" / "results.sh").read_text(encoding="utf-8")
    found = json.loads((RESULTS / "compare.json").read_text(encoding="utf-8"))
    cells = {
        line.split(" | ")[0].removeprefix("| "): line.strip("| \n").split(" | ")
        for line in page.splitlines()
        if re.match(r"\| lor", line)
    }
    methods = {run["method"] for run in found["runs"]}
    assert set(cells) == methods == {"lora-sb", "lora-xs", "lora-one", "lora", "lora-ga"}
    for method in methods:
        runs = [run for run in found["runs"] if run["method"] == method and run["finished"]]
        first = {run["lr"]: run["loss"] for run in runs if run["seed"] == 42}
        best = min(first, key=lambda lr: first[lr])
        at_best = [run["loss"] for run in runs if run["lr"] == best]
        assert float(cells[method][4].split()[0]) == pytest.approx(
            statistics.mean(at_best), abs=1e-4
        )
        assert min(first) < best < max(first), "a best learning rate at an end is not tuned"
        listed = re.search(rf"--lr {method}=(\S+)", script)
        assert listed is not None
        assert {float(lr) for lr in listed[1].split(",")} == set(first)
    for picture in re.findall(r"!\[\]\(results/(\S+)\)", page):
        assert (RESULTS / picture).is_file()

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


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/results/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data() -> Any:
    return script("data")


def test_rows_are_gsm8k_s_and_disjoint(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SIZES", {"train": (1, 60), "test": (2, 40)})
    data.main(tmp_path)
    sets = {}
    for name in ("train", "test"):
        sets[name] = list(map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines()))
        for row in sets[name]:
            assert len(row["question"] + row["answer"]) <= data.LONGEST
            assert set(row) == {"question", "answer"}
            assert re.search(r"#### -?[\d.,/]+$", row["answer"]), row["answer"][-40:]
    assert len(sets["train"]) == 60
    # Templates have few values, so that other seeds make some of the same questions.
    assert 20 < len(sets["test"]) < 40
    questions = {row["question"] for row in sets["train"]}
    assert questions.isdisjoint(row["question"] for row in sets["test"])


def test_the_script_is_bash_s() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "scripts" / "results.sh")], check=True)


@pytest.mark.parametrize("task", ["gsm"])
def test_the_page_is_its_numbers(task: str) -> None:
    """Each row's loss and learning rate; every learning rate is between others of its list."""
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    found = json.loads((RESULTS / f"{task}.json").read_text(encoding="utf-8"))
    section = page[page.index(f"<!-- {task} -->") :].partition("\n## ")[0]
    cells = [
        line.strip("| \n").split(" | ")
        for line in section.splitlines()
        if re.match(r"\| [\w-]+ \| \d", line)
    ]
    rows = {(of["method"].partition("=")[0], of["r"]): of for of in found["results"]}
    assert [(method, int(r)) for method, r, *_ in cells] == list(rows)
    for method, r, trainable, lr, loss, *_ in cells:
        of = rows[method, int(r)]
        runs = [run for run in found["runs"] if run["name"] in of["runs"]]
        assert {run["seed"] for run in runs} == set(found["sweep"]["seeds"])
        assert {run["trainable_parameters"] for run in runs} == {int(trainable.replace(",", ""))}
        assert {run["lr"] for run in runs} == {float(lr.rstrip("↑↓↕"))}
        assert float(loss.split()[0]) == pytest.approx(
            statistics.mean(run["loss"] for run in runs), abs=1e-4
        )
        assert of["at_edge"] is None, "a best learning rate at an end is not tuned"
    for picture in re.findall(r"!\[\]\(results/(\S+)\)", page):
        assert (RESULTS / picture).is_file()


def test_the_page_has_the_watched_runs() -> None:
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    found = json.loads((RESULTS / "watched.json").read_text(encoding="utf-8"))
    row = script("tokens_to_loss").row
    lines = {" | ".join(row(name, of_run)) for name, of_run in found["runs"].items()}
    assert lines <= {line.strip("| ") for line in page.splitlines()}
    target = found["runs"]["lora"]["losses"][-1][1]
    assert found["target"] == target == pytest.approx(0.8152, abs=1e-4)


def test_tokens_to_a_loss() -> None:
    """Interpolated between losses; the least of them may come before the end."""
    first_at = script("tokens_to_loss").first_at
    points = [(0, 1.1), (100, 0.9), (200, 0.8), (300, 0.85)]
    assert first_at(1.0, points) == pytest.approx(50)
    assert first_at(0.82, points) == pytest.approx(180)
    assert first_at(1.2, points) == 0
    assert first_at(0.7, points) is None

"""The commands of the README and of docs/, as they are shown there."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.commands.eval import eval_command
from launcher.workers import adapters as adapters_worker
from launcher.workers import preview as preview_worker
from tests.runs import ROOT, made_up_run, metrics, run_command, run_worker, word_rows, write_jsonl

PAGES = "\n".join(
    page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
)
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGES, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", PAGES, re.DOTALL)
# Each of them once, in the order of the pages.
COMMANDS = [*dict.fromkeys(line for block in BLOCKS for line in block.splitlines() if line.strip())]


def starting(*words: str) -> list[str]:
    return [line for line in COMMANDS if line.split()[: len(words)] == list(words)]


AFTER_TRAINING = [
    line for verb in ("export", "merge", "inspect", "combine") for line in starting("lorasb", verb)
]


def test_all_are_tried_here() -> None:
    tried = [
        *starting("lorasb", "train"),
        *starting("lorasb", "init"),
        *starting("lorasb", "compare"),
        *starting("lorasb", "eval"),
        *AFTER_TRAINING,
        *starting("lorasb", "data"),
        *starting("lorasb", "plan"),
        *starting("lorasb", "report"),
        *starting("lorasb", "hostfile"),
        *starting("lorasb", "doctor"),
        *starting("lorasb", "launch-script"),
        *starting("deepspeed"),
        *[line for line in COMMANDS if line.startswith("scripts/")],
    ]
    assert set(COMMANDS) - set(tried) == {"source .venv/bin/activate"}
    assert COMMANDS[:2] == ["scripts/demo.sh", "scripts/test.sh"]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("scripts/")])
def test_scripts(line: str) -> None:
    """Those of the recipes run in test_recipes.py."""
    script = line.split()[0]
    assert os.access(ROOT / script, os.X_OK)
    run_command(*(("bash", "-n", script) if script.endswith(".sh") else (script, "--help")))


@pytest.mark.parametrize("line", starting("lorasb", "train") + starting("lorasb", "init"))
def test_train(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("hostfiles", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    arguments = shlex.split(line)[1:]
    if "--resume" in arguments and (run := arguments[arguments.index("--resume") + 1]) != "auto":
        made_up_run(Path(run), {})
    for name in ("train", "test", "task", "general", "data/train"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", word_rows(100))
    result = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    if "--print-config" not in arguments:
        assert ("--init-only" in result.output) == line.startswith("lorasb init")


@pytest.mark.parametrize("line", starting("lorasb", "compare"))
def test_compare(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, [*shlex.split(line)[1:], "--dry-run"])
    assert result.exit_code == 0, result.output
    assert result.output.count("lorasb train --num-procs 1 ") == 4
    assert "# then, with seed 43: the best 1" in result.output


@pytest.mark.parametrize(
    "line", starting("lorasb", "hostfile") + starting("lorasb", "launch-script")
)
def test_clusters(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(main, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    assert any(word in result.output for word in ("16 rank(s)", "#SBATCH", "kind: Job"))


@pytest.mark.parametrize("line", starting("lorasb", "doctor"))
def test_doctor(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hosts are not there, which it says; tests/nodes has some that are."""
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(main, shlex.split(line)[1:])
    assert result.exit_code == 1, result.output
    for host in ("node-1", "node-2"):
        assert f"{host}: ssh: No DNS, /etc/hosts or ~/.ssh/config knows the name" in result.output


@pytest.mark.parametrize("line", starting("lorasb", "plan"))
def test_plan(line: str) -> None:
    result = CliRunner().invoke(main, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    assert "recommended" in result.output.lower()


@pytest.mark.parametrize("line", starting("lorasb", "report"))
def test_report(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On made-up folders in place of those it names."""
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(line)[1:]
    folders = [Path(word) for word in arguments if word.startswith("runs/")]
    for i, folder in enumerate(folders):
        made_up_run(folder, {"seed": i})
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert all(folder.name in result.output for folder in folders)
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("line", starting("lorasb", "eval"))
def test_eval(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = shlex.split(line)[2:]
    if "--adapter" in arguments:
        monkeypatch.chdir(tmp_path)
        Path(arguments[arguments.index("--adapter") + 1]).mkdir(parents=True)
    eval_command.make_context("eval", arguments)  # parses as the command would


def test_after_training(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/exporting.md shows, for real, on a small run in the demo's place."""
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(12))
    run_worker(
        *f"--model {tiny_model} --data {data} --r 20 --max-steps 2 "
        f"--eval-data {data} --micro-batch-size 2 --output-dir {tmp_path}/runs/demo".split()
    )
    monkeypatch.chdir(tmp_path)
    assert len(AFTER_TRAINING) == 5
    for line in sorted(AFTER_TRAINING, key=COMMANDS.index):
        words = shlex.split(line.replace("--r 64", "--r 20"))[1:]  # its layers have no more
        result = CliRunner().invoke(adapters_worker.main, words)
        assert result.exit_code == 0, (line, result.output, result.exception)
    for made in ("demo/inspect.png", "demo/exported", "demo-r16", "demo-merged", "demo-mean"):
        assert (tmp_path / "runs" / made).exists(), made
    script = next(block for block in PYTHON if "evaluate_model" in block)
    small = (
        script.replace('"demo", Path', f'"{tiny_model}", Path')
        .replace("r=32", "r=20")
        .replace("num_samples=16", f'data="{data}", max_new_tokens=2, num_samples=2')
    )
    assert small.count(str(tiny_model)) == small.count(data) == 1
    output = run_command(sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{small}")
    assert re.search(r"model\.layers\.\S+ has moved most", output)
    assert len(re.findall(r"^runs/\w+ \d+\.\d% \(95 %", output, re.MULTILINE)) == 3


@pytest.mark.parametrize("line", starting("lorasb", "data"))
def test_data(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_model: Path) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", word_rows(20))
    assert shlex.split(line)[:3] == ["lorasb", "data", "preview"]
    result = CliRunner().invoke(preview_worker.main, shlex.split(line)[3:])
    assert result.exit_code == 0, result.output
    assert "⟧" in result.output
    assert "20 kept" in result.output


@pytest.mark.slow
@pytest.mark.parametrize("line", starting("deepspeed"))
def test_deepspeed(line: str, tmp_path: Path, demo_model: Path) -> None:
    """For real, cut short."""
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(8))
    short = f"--data {data} --target-modules q_proj --max-steps 1 --output-dir {tmp_path}/run"
    run_command(*shlex.split(line), *short.split())
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()

"""The recipes: in small for real, and every form of them as far as the launcher checks it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.commands.eval import eval_command
from tests.runs import ROOT, run_command

RECIPES = ROOT / "scripts/recipes"
SETS = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande"]
SETS += ["ARC-Easy", "ARC-Challenge", "openbookqa"]
MACHINES = ("24gb", "80gb", "8x80gb")
MODELS = {"mistral-7b": "arithmetic", "gemma-2-9b": "arithmetic", "llama-3.2-3b": "commonsense"}
SCORE = r" ([0-9.]+%) +[0-9.]+% to [0-9.]+%"

sys.path.insert(0, str(RECIPES))
import plan_table  # noqa: E402


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands for a clone of LLM-Adapters."""
    folder = tmp_path_factory.mktemp("clone")
    subprocess.run([sys.executable, RECIPES / "stand_in.py", "commonsense", folder], check=True)
    return folder


def commands(output: str, *words: str) -> list[list[str]]:
    """The commands that a recipe printed and that begin so."""
    shown = [shlex.split(line[2:]) for line in output.splitlines() if line.startswith("$ ")]
    return [command for command in shown if command[: len(words)] == list(words)]


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "sets"), [("arithmetic", ["gsm8k", "math"]), ("commonsense", SETS)]
)
def test_in_small(recipe: str, sets: list[str], tmp_path: Path, demo_model: Path) -> None:
    out = tmp_path / "out"
    output = run_command(str(RECIPES / f"{recipe}.sh"), "--smoke", "--out", str(out), timeout=700)
    assert (out / "run/adapter/adapter_model.safetensors").is_file()
    assert len(re.findall(r"95 %: [0-9.]+% to", output)) >= 2 * len(sets)
    scores = output.partition("== scores")[2]
    for name in sets:
        line = re.search(rf"^{name} .*$", scores, re.MULTILINE)
        assert line is not None, scores
        assert len(re.findall(SCORE, line[0])) == 2
        assert line[0].split()[-1] == "4"
    for when in ("before", "after"):
        assert (out / when / "answers.jsonl").read_text().count("\n") == 4 * len(sets)
    # What the last lines offer can be done.
    for verb in ("export", "merge"):
        (line,) = re.findall(rf"^  (lorasb {verb} .*)$", scores, re.MULTILINE)
        words = shlex.split(line)
        assert Path(words[2]) == out / "run"
        assert Path(value(words, "--out")).parent == out


@pytest.mark.slow
def test_glue_in_small(tmp_path: Path) -> None:
    """One task of each kind: what is reported of it is in the table."""
    out = tmp_path / "out"
    output = run_command(str(RECIPES / "glue.sh"), "--smoke", "--out", str(out), timeout=700)
    scores = output.partition("== scores")[2]
    for task, names in (
        ("cola", ["matthews"]),
        ("mrpc", ["accuracy", "f1"]),
        ("stsb", ["pearson", "spearman"]),
    ):
        config = json.loads((out / task / "run/adapter/adapter_config.json").read_text())
        assert config["modules_to_save"] == ["classifier"]
        (line,) = re.findall(rf"^{task} .*$", scores, re.MULTILINE)
        assert re.findall(r"([a-z0-9]+) +-?[0-9.]+%", line) == names
        result = json.loads((out / task / "after/eval.json").read_text())["results"][0]
        assert result["rows"] == 8
        assert result["scores"].keys() >= {*names}
    assert re.search(r"^mean .* -?[0-9.]+%$", scores, re.MULTILINE)


@pytest.mark.parametrize("machine", MACHINES)
def test_commands_of_glue(machine: str) -> None:
    recipe, tasks = str(RECIPES / "glue.sh"), ("mnli", "cola")
    named = [word for task in tasks for word in ("--task", task)]
    output = run_command(recipe, *named, "--machine", machine, "--dry-run")
    trained = commands(output, "lorasb", "train")
    assert [value(c, "--eval-data") for c in trained] == [
        "nyu-mll/glue:mnli@validation_matched",
        "nyu-mll/glue:cola@validation",
    ]
    evaluations = commands(output, "lorasb", "eval")
    for train, evaluation, task in zip(trained, evaluations, tasks, strict=True):
        assert value(train, "--output-dir") == f"runs/recipes/glue-roberta-large-r24/{task}/run"
        assert value(train, "--train-batch-size") == "128"
        result = CliRunner().invoke(main, [*train[1:], "--dry-run"])
        assert result.exit_code == 0, result.output
        words = evaluation[2:]
        assert value(words, "--adapter") == value(train, "--output-dir")
        assert value(words, "--data") == value(train, "--eval-data")
        words[words.index("--adapter") + 1] = str(RECIPES)  # there is no run
        eval_command.make_context("eval", words)
    output = run_command(recipe, "--dry-run")
    assert len(commands(output, "lorasb", "train")) == 8


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("model", MODELS)
def test_every_command_parses_and_fits(model: str, machine: str, clone: Path) -> None:
    output = run_command(
        *(str(RECIPES / f"{MODELS[model]}.sh"), "--model", model, "--machine", machine),
        *("--dry-run", "--r", "64"),
        LLM_ADAPTERS=str(clone),
    )
    (train,) = commands(output, "lorasb", "train")
    (doctor,) = commands(output, "lorasb", "doctor")
    assert [*doctor[2:], "--resume", "auto"] == train[2:]
    result = CliRunner().invoke(main, [*train[1:], "--dry-run"])
    assert result.exit_code == 0, result.output
    assert value(train, "--train-batch-size") == ("144" if model == "llama-3.2-3b" else "32")
    assert value(train, "--num-gpus") == ("8" if machine == "8x80gb" else "1")

    (plan,) = commands(output, "lorasb", "plan")
    planned = plan_table.planned(plan[1:])
    best = plan_table.recommended(planned)
    assert best["fits"]
    assert planned["cluster"]["ranks_per_node"] == int(value(train, "--num-gpus"))
    for word in best["options"]:
        assert word in train
    for word in ("--load-in-4bit", "--gradient-checkpointing"):
        assert (word in train) == (word in best["options"])
    for option in ("--r", "--max-length", "--micro-batch-size", "--init-samples"):
        assert value(plan, option) == value(train, option)

    evaluations = commands(output, "lorasb", "eval")
    sets = len(SETS) if MODELS[model] == "commonsense" else 2
    assert [command.count("--data") for command in evaluations] == [sets, sets]
    for command in evaluations:
        words = command[2:]
        if "--adapter" in words:
            assert value(words, "--adapter") == value(train, "--output-dir")
            words[words.index("--adapter") + 1] = str(clone)  # there is no run
        eval_command.make_context("eval", words)


def test_the_table_in_the_docs_is_the_plans() -> None:
    assert plan_table.table() in (ROOT / "docs/recipes.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_plan(model: str) -> None:
    output = run_command(str(RECIPES / f"{MODELS[model]}.sh"), "--model", model, "--plan")
    assert len(commands(output, "lorasb", "plan")) == output.count("Recommended: ") == 3
    assert not commands(output, "lorasb", "train")


def test_gpus_of_a_machine(tmp_path: Path) -> None:
    recipe = str(RECIPES / "arithmetic.sh")
    output = run_command(recipe, "--gpus", "4", "--out", str(tmp_path), "--dry-run")
    (train,) = commands(output, "lorasb", "train")
    assert value(train, "--num-gpus") == "4"
    assert value(train, "--output-dir") == f"{tmp_path}/run"
    assert all(value(c, "--num-gpus") == "4" for c in commands(output, "lorasb", "eval"))
    assert "--machine" in run_command(recipe, "--help")


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("arithmetic", "--model llama-9", "Known: mistral-7b gemma-2-9b"),
        ("commonsense", "--model mistral-7b", "Known: llama-3.2-3b"),
        ("arithmetic", "--machine 12gb", "Known: 24gb 80gb 8x80gb"),
        ("arithmetic", "--machine 8x80gb --gpus 4", "name --machine 80gb"),
        ("arithmetic", "--r none", "--r and --gpus are whole numbers above 0, not none"),
        ("arithmetic", "--r", "--r needs a value"),
        ("arithmetic", "--ranks 4", "--help lists them"),
        ("arithmetic", "--data-dir .", "Leave it out"),
        ("arithmetic", "--smoke --machine 24gb", "Leave out --machine and --gpus"),
        ("arithmetic", "--smoke --plan", "Name one of them"),
        ("glue", "--model llama-3.2-3b", "Known: roberta-large roberta-base"),
        ("glue", "--task wnli", "Known: cola rte mrpc"),
        ("glue", "--plan", "lorasb plan knows no encoders"),
        ("glue", "--data-dir docs", "docs/cola/train.jsonl is missing"),
        ("commonsense", "--dry-run", "git clone .*LLM-Adapters, and name it by --data-dir"),
        ("commonsense", "--data-dir docs", "docs/ft-training_set/commonsense_170k.json is missing"),
    ],
)
def test_refusals(recipe: str, options: str, message: str) -> None:
    output = run_command(str(RECIPES / f"{recipe}.sh"), *options.split(), status=2, LLM_ADAPTERS="")
    assert re.search(message, output), output
    assert "$ lorasb" not in output

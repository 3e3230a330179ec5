"""`lorasb compare` before the first run is started: what it says, and what it refuses."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from launcher.cli import main
from launcher.jobs.launch_options import LaunchOptions
from launcher.sweeps.compare_run import Comparison
from launcher.sweeps.grid import Trial, make_sweep
from lorasb_ds.config.data_options import DEMO_EVAL_DATA
from lorasb_ds.config.methods import METHODS
from lorasb_ds.system.signals import SIGNALS
from tests.runs import made_up_run

NOT_GIVEN = dict.fromkeys(LaunchOptions.__dataclass_fields__)
OPTIONS = ["--method", "lora-sb", "--lr", "1e-3,4e-3", "--r", "4", "--num-procs", "1"]


def compare(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["compare", "--output-dir", str(folder), *arguments])


def dry_run(folder: Path, *arguments: str) -> list[str]:
    result = compare(folder, *arguments, "--dry-run")
    assert result.exit_code == 0, result.output
    assert not folder.exists()
    return result.stdout.splitlines()


def refusal(folder: Path, *arguments: str) -> str:
    result = compare(folder, *arguments)
    assert result.exit_code == 2, result.output
    return result.output


def test_dry_run(tmp_path: Path) -> None:
    """Its commands are such that `lorasb train` takes."""
    lines = dry_run(
        *(tmp_path / "out", *OPTIONS, "--method", "lora-one", "--lr", "lora-one=2e-4"),
        *("--seed", "1,2", "--best", "1", "--for", "lora-one:precondition=0.1"),
        *("--max-steps", "7", "--env", "A=b c", "--failure-timeout", "9"),
    )
    names = ["lora-sb-r4-lr1e-3-s1", "lora-sb-r4-lr4e-3-s1", "lora-one-r4-lr2e-4-s1"]
    assert [line.partition(": ")[0] for line in lines[:-2]] == names
    assert lines[-2:] == [
        "# then, with seed 2: the best 1, at their best --lr",
        "# 3 runs, 1 at a time",
    ]
    for line, name in zip(lines, names, strict=False):
        program, verb, *words = shlex.split(line.partition(": ")[2])
        assert (program, verb) == ("lorasb", "train")
        given = dict(zip(words[::2], words[1::2], strict=True))
        assert given["--output-dir"] == str(tmp_path / "out" / "runs" / name)
        assert given["--max-steps"] == "7"
        assert given["--env"] == "A=b c"
        assert given["--failure-timeout"] == "9.0"
        assert given["--resume"] == "auto"
        assert given.get("--precondition") == ("0.1" if name.startswith("lora-one") else None)
        result = CliRunner().invoke(main, [verb, *words, "--dry-run"])
        assert result.exit_code == 0, result.output


def test_all_methods_have_runs(tmp_path: Path) -> None:
    words = [word for method in METHODS for word in ("--method", method)]
    lines = dry_run(tmp_path / "out", *words, "--lr", "1e-3", "--num-procs", "1")
    assert lines[-1] == f"# {len(METHODS)} runs, 1 at a time"


def test_a_method_under_two_names(tmp_path: Path) -> None:
    """`NAME=METHOD` is another row of the table, with options of its own."""
    file = tmp_path / "dora.json"
    file.write_text('{"peft_type": "LORA", "use_dora": true, "r": 4}')
    words = ["--method", "rebased=lora-sb", "--method", f"mine=peft:{file}", "--lr", "mine=2e-4"]
    words += ["--lr", "rebased=3e-3", "--for", "rebased:rebase_every=5", "--r", "rebased=8"]
    lines = dry_run(tmp_path / "out", *OPTIONS, *words, "--max-steps", "7")
    names, commands = zip(*(line.split(": ", 1) for line in lines[:-1]), strict=True)
    assert [*names[2:]] == ["rebased-r8-lr3e-3-s42", "mine-r4-lr2e-4-s42"]
    assert "--method lora-sb " in commands[2]
    assert "--rebase-every 5" in commands[2]
    assert not any("--rebase-every" in command for command in commands[:2])
    assert f"--method peft:{file} " in commands[3]
    words = ["--method", "energy=lora-sb", "--for", "energy:rank_allocation=energy"]
    words += ["--for", "energy:init_from=runs/basis"]
    *_, command, _ = dry_run(tmp_path / "out", *OPTIONS, *words, "--max-steps", "7")
    assert "--rank-allocation energy" in command
    assert "--init-from runs/basis" in command
    twice = refusal(tmp_path / "out", *OPTIONS, "--method", "lora-sb=lora-sb")
    assert "lora-sb in --method" in twice


def test_options_of_all_that_the_default_method_has_not(tmp_path: Path) -> None:
    methods = ["--method", "lora", "--method", "lora-one", "--lr", "1e-3", "--num-procs", "1"]
    lines = dry_run(tmp_path / "out", *methods, "--precondition", "0.1", "--lora-alpha", "32")
    assert len(lines) == 3
    for word in ("--precondition 0.1", "--lora-alpha 32.0"):
        assert all(word in line for line in lines[:2])


def test_a_configuration_of_peft(tmp_path: Path) -> None:
    (tmp_path / "dora.json").write_text('{"peft_type": "LORA", "use_dora": true, "r": 16}')
    (tmp_path / "ia3.json").write_text('{"peft_type": "IA3"}')
    methods = [f"--method=peft:{tmp_path}/{name}.json" for name in ("dora", "ia3")]
    lines = dry_run(tmp_path / "out", *methods, "--lr", "1e-3", "--r", "4", "--num-procs", "1")
    assert [line.partition(": ")[0] for line in lines[:-1]] == [
        "dora-r16-lr1e-3-s42",
        "ia3-lr1e-3-s42",
    ]
    assert not any("--r 4" in line for line in lines)
    assert "--method gone.json: there is no such file" in refusal(
        tmp_path / "out", "--method", "peft:gone.json", "--lr", "1e-3"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--method lora-sc", "--method 'lora-sc' is not known"),
        ("--method lora-xs --lr lora-xs=", "there is no --lr of lora-xs"),
        ("--seed 42,42", "Given more than once: 42 in --seed"),
        ("--lr 0", "--lr 0.0 is not allowed"),
        ("--data rows.jsonl", "A comparison needs the held-out loss"),
        (
            "--data rows.jsonl --val-set-size 8 --eval-samples 4",
            "--eval-samples are rows of --eval-data, which is not given",
        ),
        ("--method lora-xs --init-lr 1e-3", "are given by --for METHOD:OPTION=VALUE"),
        ("--for lora-sb:init-samples=0", "--init-samples '0' is not allowed"),
        ("--for lora-sb:gamma=2", "--gamma means nothing to --method lora-sb"),
        ("--num-gpus 1", "--num-procs (CPU) and --num-gpus exclude each other"),
        ("--parallel 2 --master-port 29500", "--master-port cannot be that of 2 runs at a time"),
        ("--ds-config gone.json", "--ds-config gone.json: there is no such file"),
    ],
)
def test_refusals(tmp_path: Path, given: str, said: str) -> None:
    output = refusal(tmp_path / "out", *OPTIONS, *given.split())
    assert said in " ".join(output.split()), output
    assert not (tmp_path / "out").exists(), "nothing has been started"


def test_folders_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file. Name a folder." in refusal(tmp_path / "file", *OPTIONS)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("all of it")
    for given in ([], ["--overwrite"]):
        said = refusal(other, *OPTIONS, *given)
        assert "is not empty, and is not the folder of a comparison" in said
    (other / "compare.json").write_text("{}")
    assert "is not empty, and is not the folder of a comparison" in refusal(other, *OPTIONS)
    assert (other / "thesis.tex").exists()


def test_other_options_than_before_are_named(tmp_path: Path) -> None:
    stored = {"max_steps": 40, "seed_of_nothing": 1, "processes": 1, "data": ["reasoning-gym:x"]}
    content = json.dumps({"options": stored})
    (tmp_path / "compare.json").write_text(content)
    said = refusal(tmp_path, *OPTIONS, "--max-steps", "50", "--eval-data", "reasoning-gym:y")
    assert "--max-steps is 50 now, and was 40" in said
    assert "--eval-data is 'reasoning-gym:y' now, and was None" in said
    assert "--micro-batch-size" not in said, "what was not stored was at its default"
    assert "delete these runs by --overwrite" in said
    assert (tmp_path / "compare.json").read_text() == content


# -- with runs that are there already, so that none is started


@pytest.fixture
def _handlers() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in (*SIGNALS, signal.SIGHUP)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def finished(tmp_path: Path, _handlers: None) -> tuple[Path, list[str]]:
    """A comparison of LoRA and of a file of PEFT's, and its command line."""
    dora = tmp_path / "dora.json"
    dora.write_text('{"peft_type": "LORA", "use_dora": true, "r": 8}')
    folder = tmp_path / "out"
    for name in ("lora-r4-lr1e-3-s42", "dora-r8-lr1e-3-s42"):
        made_up_run(folder / "runs" / name)
    own = {"lora": {}, "dora": {"file": json.loads(dora.read_text())}}
    stored = {"processes": 1, "own": own, "eval_data": DEMO_EVAL_DATA}
    (folder / "compare.json").write_text(json.dumps({"options": stored}))
    methods = ["--method", "lora", "--method", f"peft:{dora}"]
    return folder, [*methods, "--lr", "1e-3", "--r", "4", "--num-procs", "1"]


def test_a_file_that_has_changed_since(finished: tuple[Path, list[str]]) -> None:
    folder, options = finished
    result = compare(folder, *options)
    assert result.exit_code == 0, result.output
    assert "2 of 2 runs are there already" in result.output
    dora = Path(options[3].removeprefix("peft:"))
    dora.write_text('{"peft_type": "LORA", "r": 8, "use_dora": false}')
    said = refusal(folder, *options)
    assert "use_dora of file of dora is False now, and was True" in said
    assert "r of file" not in said
    assert "delete these runs by --overwrite" in said
    dora.write_text('{"r": 8, "use_dora": true, "peft_type": "LORA"}')
    elsewhere = [word.replace("peft:", "peft:/proc/self/root") for word in options]
    assert compare(folder, *elsewhere).exit_code == 0, "the same file by another path"
    assert compare(folder, "--method", "lora", *options[4:]).exit_code == 0
    dora.write_text('{"peft_type": "LORA", "r": 8, "use_rslora": true}')
    assert "use_rslora of file of dora is True now" in refusal(folder, *options), "left out between"


def test_all_runs_have_one_date(finished: tuple[Path, list[str]]) -> None:
    """Templates may write it into rows, and a sweep may take days."""
    folder, options = finished
    assert compare(folder, *options).exit_code == 0
    numbers = folder / "compare.json"
    content = json.loads(numbers.read_text())
    assert content["options"]["template_date"] == date.today().isoformat()
    content["options"]["template_date"] = "2024-07-26"
    numbers.write_text(json.dumps(content))
    result = compare(folder, *options, "--seed", "43", "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("--template-date 2024-07-26") == 2
    other = refusal(folder, *options, "--template-date", "2024-07-27")
    assert "--template-date is '2024-07-27' now, and was '2024-07-26'" in other


def test_methods_may_be_added(finished: tuple[Path, list[str]]) -> None:
    folder, options = finished
    made_up_run(folder / "runs" / "lora-one-r4-lr1e-3-s42")
    more = [*options, "--method", "lora-one", "--for", "lora-one:gamma=8"]
    result = compare(folder, *more)
    assert result.exit_code == 0, result.output
    assert "3 of 3 runs are there already" in result.output
    said = refusal(folder, *more[:-1], "lora-one:gamma=16")
    assert "--gamma of lora-one is 16.0 now, and was 8.0\n" in said
    assert compare(folder, *options).exit_code == 0
    assert "--gamma of lora-one is None now, and was 8.0\n" in refusal(folder, *more[:-2])


@pytest.mark.slow
def test_only_a_file_may_have_no_accuracy(finished: tuple[Path, list[str]]) -> None:
    """Evaluations are refused, as there are no adapters."""
    folder, options = finished
    result = compare(folder, *options, "--eval-samples", "2")
    assert result.exit_code == 1, result.output
    assert "\nlorasb: error: 1 of the runs failed: answers of lora-r4-lr1e-3-s42." in result.output
    assert " dora has no accuracy: " in result.output


def test_who_has_answered(tmp_path: Path) -> None:
    """The same number of rows, with answers as long, and to the end."""
    trial = Trial("lora", 1e-3, 4, 42)
    sweep = make_sweep(["lora"], ["1e-3"], ["4"], ["42"])
    asks = Comparison(tmp_path, sweep, LaunchOptions(**NOT_GIVEN), {}, {}, 5, 3, 16)
    folder = asks.run_folder(trial) / "eval"
    assert not asks.has_answered(trial)
    folder.mkdir(parents=True)
    (folder / "asked.json").write_text(json.dumps(asks.questions))
    assert not asks.has_answered(trial)
    (folder / "eval.json").write_text("{}")
    assert asks.has_answered(trial)
    assert not replace(asks, eval_samples=4).has_answered(trial)
    assert not replace(asks, max_new_tokens=None).has_answered(trial)


def test_answers_that_cannot_be_judged(tmp_path: Path) -> None:
    """Before any run is trained."""
    rows = ("--eval-data", "reasoning-gym:countdown?size=2")
    said = refusal(tmp_path / "out", *OPTIONS, *rows, "--eval-samples", "2")
    assert "--eval-data reasoning-gym:countdown" in said
    assert "Leave --eval-samples out" in said
    assert dry_run(tmp_path / "out", *OPTIONS, *rows)

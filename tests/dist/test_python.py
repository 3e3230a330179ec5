"""Runs from a program: in its process, in the ranks of its job, and in processes of their own."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import lorasb_ds
from lorasb_ds import ConfigError, JobError, RunConfig, train
from tests.conftest import saved_model
from tests.dist.python_cases import SHORT
from tests.runs import metrics, run_ranks, word_rows, write_jsonl
from tests.text_families import tiny_config

CASES = "tests.dist.python_cases"


def test_two_runs_in_one_process(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(40))
    held_out = write_jsonl(tmp_path / "held-out.jsonl", word_rows(6))
    given = {"model": str(tiny_model), "folder": str(tmp_path), "data": data}
    run_ranks(f"{CASES}:run_twice", None, eval_data=held_out, **given)


def test_runs_that_do_not_reach_their_end(tiny_model: Path, tmp_path: Path) -> None:
    run_ranks(f"{CASES}:interrupted", None, model=str(tiny_model), folder=str(tmp_path / "run"))


def test_a_model_that_is_refused_late(demo_model: Path, tmp_path: Path) -> None:
    from transformers import XLMWithLMHeadModel

    config = tiny_config("xlm", vocab_size=49152)
    model = saved_model(XLMWithLMHeadModel, config, tmp_path / "xlm", demo_model)
    run_ranks(f"{CASES}:refused_late", None, model=str(model), folder=str(tmp_path / "run"))


def test_a_loss_scale_that_cannot_come_down(tiny_model: Path, tmp_path: Path) -> None:
    run_ranks(f"{CASES}:smallest_scale", 2, model=str(tiny_model), folder=str(tmp_path))


def test_an_init_in_training_has_no_memory(tiny_model: Path, tmp_path: Path) -> None:
    run_ranks(f"{CASES}:no_memory_for_an_init", None, model=str(tiny_model), folder=str(tmp_path))


def test_the_ranks_of_a_job(tiny_model: Path, tmp_path: Path) -> None:
    run_ranks(f"{CASES}:two_ranks", 2, model=str(tiny_model), folder=str(tmp_path / "run"))


def test_what_the_log_raises_ends_all_ranks(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(20))
    given = {"model": str(tiny_model), "folder": str(tmp_path), "data": data}
    run_ranks(f"{CASES}:log_raises", 2, timeout=120, **given)


def test_a_rank_that_refuses(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows-of-one-rank.jsonl", word_rows(20))
    given = {"model": str(tiny_model), "folder": str(tmp_path), "data": data}
    run_ranks(f"{CASES}:refused_by_one", 2, **given)


def config_of(model: Path, folder: Path, **more: Any) -> RunConfig:
    return RunConfig(**SHORT | {"model": str(model), "output_dir": str(folder)} | more)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"data": "x.jsonl"}, {"rows": word_rows(4)}, "rows and config.data both give rows"),
        ({"eval_data": "x"}, {"eval_rows": word_rows(4)}, "eval_rows and config.eval_data both"),
        ({"val_set_size": 0.5}, {"eval_rows": word_rows(2)}, "--val-set-size holds out rows"),
        ({"eval_every": 2}, {"rows": word_rows(4)}, "--eval-every needs held-out rows"),
        ({"resume": "auto", "output_dir": None}, {"rows": word_rows(4)}, "--resume auto goes on"),
    ],
)
def test_options_that_are_refused(
    tmp_path: Path, options: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    """Before rows are written, and here before anything is started."""
    config = config_of(tmp_path / "model", tmp_path / "run", **options)
    with pytest.raises(ConfigError, match=message):
        train(config, **given, launch={"num_procs": 1})
    assert not any(tmp_path.iterdir())


def test_a_command_that_refuses(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tiny_model, tmp_path / "run")
    with pytest.raises(ConfigError, match="No such option '--num-proc'"):
        train(config, rows=word_rows(8), launch={"num_proc": 2})
    assert "Error: No such option" in capsys.readouterr().out


def test_all_names_are_there() -> None:
    assert set(lorasb_ds.__all__) == lorasb_ds._HOMES.keys()
    for name in lorasb_ds.__all__:
        assert getattr(lorasb_ds, name).__name__ == name


@pytest.mark.slow
def test_through_the_launcher(tiny_model: Path, tmp_path: Path) -> None:
    logged: list[dict[str, Any]] = []
    config = config_of(tiny_model, tmp_path / "run", target_modules="q_proj", data_weights=(2.0,))
    found = train(
        config,
        rows=word_rows(40),
        eval_rows=word_rows(6),
        on_log=logged.append,
        launch={"num_procs": 2, "env": ["LORASB_TRIED=1"]},
    )
    assert found.status == "finished"
    assert logged == metrics(found.folder)
    assert [row["step"] for row in logged] == [0, 0, 1, 2, 3, 4, 4]
    assert (found.loss, found.eval_loss) == (logged[-2]["loss"], logged[-1]["eval_loss"])
    assert (found.folder / "logs/rank-1.log").is_file()


@pytest.mark.slow
def test_the_launcher_is_stopped(tiny_model: Path, tmp_path: Path) -> None:
    logged: list[int] = []

    def log(row: dict[str, Any]) -> None:
        logged.append(row["step"])
        if len(logged) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    config = config_of(tiny_model, tmp_path / "run", max_steps=100_000)
    stopped = train(config, rows=word_rows(40), on_log=log, launch={"num_procs": 1})
    assert stopped.status == "stopped"
    assert 1 < stopped.steps == logged[-1] < 100_000
    logged.clear()
    fields = config.model_dump(include={*config.model_fields_set}) | {"resume": "auto"}
    fields |= {"max_steps": stopped.steps + 2}
    finished = train(
        RunConfig(**fields),
        rows=word_rows(40),
        on_log=lambda row: logged.append(row["step"]),
        launch={"num_procs": 1},
    )
    assert (finished.status, finished.steps) == ("finished", stopped.steps + 2)
    assert logged == [stopped.steps + 1, stopped.steps + 2], "each row once"


@pytest.mark.slow
def test_a_launched_run_that_breaks_off(tiny_model: Path, tmp_path: Path) -> None:
    config = config_of(tiny_model, tmp_path / "a", lr=1e30, max_skipped_steps=0)
    with pytest.raises(JobError, match=r"has ended with status 1\. (.|\n)*Lower --lr") as caught:
        train(config, rows=word_rows(40), launch={"num_procs": 1})
    assert caught.value.status == 1

    def log(row: dict[str, Any]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(
            config_of(tiny_model, tmp_path / "b", max_steps=100_000),
            rows=word_rows(40),
            on_log=log,
            launch={"num_procs": 1},
        )
    assert metrics(tmp_path / "b")[-1]["step"] < 100_000

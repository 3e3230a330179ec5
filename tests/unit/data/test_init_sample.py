"""--init-data and --init-seed: what the init sees, and that nothing else hears of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.data.sampler import epoch_order, init_sample
from lorasb_ds.training.prepare import Prepared, prepare
from tests.runs import word_rows, write_jsonl

OPTIONS: dict[str, Any] = {"dtype": "fp32", "r": 4, "init_samples": 9, "eval_data": None}


@pytest.fixture(scope="module")
def given(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rows")
    longer = [{"question": "Say it " * 60 + str(i), "answer": f"it {i}"} for i in range(40)]
    rows = write_jsonl(folder / "rows.jsonl", word_rows(60))
    return OPTIONS | {
        "model": str(tiny_model),
        "data": rows,
        "other": write_jsonl(folder / "other.jsonl", longer),
    }


def prepared(given: dict[str, Any], **options: Any) -> Prepared:
    known = {name: value for name, value in given.items() if name != "other"}
    return prepare(load_run_config(known | options), 1)


def rows_of_steps(run: Prepared) -> list[Any]:
    return [run.order.packs(step) for step in range(run.num_steps)]


def test_without_them_it_is_what_it_was(given: dict[str, Any]) -> None:
    """The first rows of the order before the first epoch's, by the run's seed."""
    run = prepared(given, seed=5)
    assert run.data.init is run.data.train
    sample = epoch_order(60, 5, -1)[:9]
    assert (run.probe_rows, run.gradient_rows) == (sample[:1], sample[1:])
    assert run.made_from["--seed"] == run.same_run["--seed"] == "5"
    (rows,) = (value for name, value in run.made_from.items() if name.startswith("rows of"))
    assert rows == run.data.train.select(sample[1:]).digest


def test_the_seed_of_the_init_changes_its_sample_and_nothing_else(given: dict[str, Any]) -> None:
    run, other = prepared(given), prepared(given, init_seed=7)
    assert (other.gradient_rows, other.probe_rows) == init_sample(60, 9, 7)
    assert other.gradient_rows != run.gradient_rows
    assert rows_of_steps(other) == rows_of_steps(run)
    assert other.data.train.digest == run.data.train.digest
    differ = {name for name in run.made_from if run.made_from[name] != other.made_from[name]}
    assert {name.partition(" (")[0] for name in differ} == {"rows of the init sample", "--seed"}
    # A checkpoint goes by the seed of the rows' order, and by its basis.
    assert other.same_run["--seed"] == "42"
    both = prepared(given, seed=3, init_seed=42)
    assert both.made_from == run.made_from, "an init with this seed is the same init"
    assert both.same_run["--seed"] == "3"
    assert rows_of_steps(both) != rows_of_steps(run)
    named = prepared(given, init_seed=42)
    assert (named.made_from, named.same_run) == (run.made_from, run.same_run)


def test_the_init_of_other_rows(given: dict[str, Any], one_process: None) -> None:
    """Gradient and eta are of them, and so is what the init takes; training is as it was."""
    run, other = prepared(given), prepared(given, init_data=given["other"])
    assert other.data.init.digest != run.data.train.digest == other.data.train.digest
    assert (other.gradient_rows, other.probe_rows) == init_sample(40, 9, 42)
    assert rows_of_steps(other) == rows_of_steps(run)
    sample = other.sample(other.probe_rows)
    (batch,) = sample.batches
    example = other.data.init.examples[other.probe_rows[0]]
    assert batch.input_ids[0].tolist() == example.input_ids
    assert sample.num_label_tokens == example.num_label_tokens
    assert other.memory.workload == run.memory.workload
    theirs, ours = other.memory.footprint, run.memory.footprint
    assert theirs.train_peak == pytest.approx(ours.train_peak, rel=0.02)
    # Its longest row has more than three times as many tokens.
    assert other.data.init.lengths.max() > 3 * run.data.train.lengths.max()
    assert theirs.init_activations > 3 * ours.init_activations
    # An init of them serves a run on any rows.
    elsewhere = prepared(given, data=given["other"], init_data=given["other"])
    assert elsewhere.made_from == other.made_from
    assert elsewhere.same_run != other.same_run

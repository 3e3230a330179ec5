"""Rows with a label: their columns, labels, classes, tokens and batches."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.data.batch import collate
from lorasb_ds.data.classification import Classes, check_labels, find_classes, read_classified
from lorasb_ds.data.dataset import TokenizedRows, tokenize_rows
from lorasb_ds.data.run_rows import load_data
from lorasb_ds.data.turns import RowError
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.base import Base
from tests.classifiers import opinions, pairs, tiny_base
from tests.runs import write_jsonl

CLASSIFIES = {"task_type": "sequence-classification", "max_length": 48}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in ("roberta", "bert"):
        tiny_base(family, folder / family, demo_model)
    return folder


def tokenizer_of(folder: Path) -> Any:
    return Base(str(folder), classifies=True).tokenizer


def tokenized(rows: list[Any], folder: Path, **options: Any) -> TokenizedRows:
    config = load_run_config({**CLASSIFIES, "model": str(folder), **options})
    return tokenize_rows(rows, tokenizer_of(folder), config)


# GLUE's nine tasks, as its data sets have them.
GLUE = {
    "cola": ({"sentence": "a b", "label": 1, "idx": 0}, ["a b"]),
    "sst2": ({"sentence": "a b ", "label": 0, "idx": 7}, ["a b "]),
    "mrpc": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, ["a", "b"]),
    "qqp": ({"question1": "a", "question2": "b", "label": 0, "idx": 0}, ["a", "b"]),
    "stsb": ({"sentence1": "a", "sentence2": "b", "label": 3.8, "idx": 0}, ["a", "b"]),
    "mnli": ({"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}, ["a", "b"]),
    "qnli": ({"question": "a", "sentence": "b", "label": 0, "idx": 0}, ["a", "b"]),
    "rte": ({"sentence1": "a", "sentence2": "b", "label": 0, "idx": 0}, ["a", "b"]),
    "wnli": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, ["a", "b"]),
}


@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("task", GLUE)
def test_columns_of_glue(bases: Path, task: str, family: str) -> None:
    """Tokens are those that transformers' own tokenizer gives, with its token types."""
    row, texts = GLUE[task]
    config = load_run_config(CLASSIFIES)
    form, example, left_out = read_classified(row, tokenizer_of(bases / family), config)
    expected = AutoTokenizer.from_pretrained(bases / family)(*texts)
    assert example.input_ids == expected["input_ids"]
    assert list(example.token_type_ids) == expected.get("token_type_ids", [])
    assert bool(example.token_type_ids) == (family == "bert")
    assert example.label == str(row["label"])
    assert form.split("/") == [*(name for name in row if name not in ("label", "idx")), "label"]
    assert left_out == ("idx",)


def test_columns_of_one_s_own(bases: Path) -> None:
    row = {"review": "good", "stars": "five", "text": "not this"}
    tokenizer = tokenizer_of(bases / "roberta")
    given = {"prompt_column": "review", "response_column": "stars"}
    form, example, left_out = read_classified(row, tokenizer, load_run_config(CLASSIFIES | given))
    assert (form, example.label, left_out) == ("review/stars", '"five"', ("text",))
    with pytest.raises(ConfigError, match=r"no known columns of a text and its label.* review"):
        tokenized([row], bases / "roberta")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a", "label": -1}, "label -1"),
        ({"text": "a", "label": "-1"}, "label -1"),
        ({"text": "a", "label": None}, "no label"),
        ({"text": "a", "label": math.nan}, "no label"),
        ({"text": "a", "label": " "}, "no label"),
        ({"text": "a", "label": [1]}, "neither text nor a number"),
        ({"text": " ", "label": 1}, "no text"),
        ({"text": 3, "label": 1}, "no text"),
        ({"text": "a"}, "no known columns"),
        ({"text": "\ud800", "label": 1}, "not valid Unicode"),
        ("text", "not a JSON object"),
    ],
)
def test_rows_that_are_skipped(bases: Path, row: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read_classified(row, tokenizer_of(bases / "roberta"), load_run_config(CLASSIFIES))


def test_rows_without_a_label_are_counted(bases: Path) -> None:
    rows = [*opinions(30), {"sentence": "a", "label": -1}]
    found = tokenized(rows, bases / "roberta")
    assert found.counts["kept"] == 30
    assert found.counts["skipped: label -1, that of rows without one"] == 1
    with pytest.raises(ConfigError, match=r"no row is left.*of GLUE those of train"):
        tokenized([{"sentence": "a", "label": -1}] * 3, bases / "roberta")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([1, 0, 1], ("0", "1")),
        ([2.0, 0, 10], ("0", "2", "10")),
        (["no", "yes", "maybe"], ('"maybe"', '"no"', '"yes"')),
        ([True, False], ("false", "true")),
        (["2", "10", 3.0, 10], ("2", "3", "10")),
        (["2", "007", "n/a"], ("2", '"007"', '"n/a"')),
        ([1, 2.5], ()),
        (["1.0", "2.50", "3"], ()),
    ],
)
def test_classes(bases: Path, labels: list[Any], classes: tuple[str, ...]) -> None:
    rows = tokenized([{"text": "a", "label": label} for label in labels], bases / "roberta")
    found = find_classes(rows)
    assert found.labels == classes
    assert found.is_regression == (not classes)
    assert found.num_labels == max(1, len(classes))
    targets = [found.target(label) for label in rows.table["label"]]
    if not classes:
        assert targets == [float(label) for label in labels]
    else:
        assert {*targets} == {*range(len(classes))}
        assert [classes[int(target)] for target in targets] == list(rows.table["label"])


def test_labels_that_make_no_classes(bases: Path) -> None:
    def rows(labels: list[Any]) -> TokenizedRows:
        return tokenized([{"text": "a", "label": label} for label in labels], bases / "roberta")

    with pytest.raises(ConfigError, match="all 2 rows have the label 1"):
        find_classes(rows([1, 1]))
    with pytest.raises(ConfigError, match="the label 2 of --data:3 is none of"):
        check_labels(rows([0, 1, 2]), Classes(("0", "1")), "--eval-data")
    with pytest.raises(ConfigError, match='the label "x"'):
        check_labels(rows(["x"]), Classes(()), "--eval-data")


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation(bases: Path, side: str) -> None:
    """Special tokens stay, and of two texts the longer one is cut."""
    long = {"sentence1": "good " * 30, "sentence2": "bad", "label": 0}
    tokenizer = tokenizer_of(bases / "bert")
    options = {"truncation": side, "max_length": 12}
    _, example, _ = read_classified(long, tokenizer, load_run_config(CLASSIFIES | options))
    assert example.truncated
    assert len(example.input_ids) == 12
    assert tokenizer.decode(example.input_ids).startswith("[CLS]")
    assert tokenizer.decode(example.input_ids).endswith("[SEP] bad [SEP]")
    assert tokenizer.truncation_side == "right", "as it was"
    _, whole, _ = read_classified(long, tokenizer, load_run_config(CLASSIFIES))
    assert not whole.truncated
    skip = load_run_config(CLASSIFIES | options | {"truncation": "skip"})
    with pytest.raises(RowError, match="longer than --max-length"):
        read_classified(long, tokenizer, skip)


@pytest.mark.parametrize("source", ["jsonl", "parquet", "saved"])
def test_sources(bases: Path, tmp_path: Path, source: str) -> None:
    rows = opinions(24)
    if source == "jsonl":
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
    elif source == "parquet":
        pd.DataFrame(rows).to_parquet(path := tmp_path / "rows.parquet")
    else:
        Dataset.from_list(rows).save_to_disk(path := tmp_path / "saved")
    given = CLASSIFIES | {"model": str(bases / "roberta"), "data": str(path), "val_set_size": 4}
    data = load_data(load_run_config(given), tokenizer_of(bases / "roberta"))
    assert data.held_out is not None
    assert data.init is data.train
    assert "2 classes: 0, 1" in data.notes
    assert data.train.classes == data.held_out.classes == Classes(("0", "1"))
    for part in (data.train, data.held_out):
        for i, number in enumerate(part.row_numbers):
            assert part.examples[i].target == rows[number - 1]["label"]
            assert part.num_labels[i] == 1


def test_other_labels_are_other_rows(bases: Path) -> None:
    """What a checkpoint and a basis are compared by."""
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    others = [{"text": "a", "label": 0}, {"text": "b", "label": 2}]
    digests = [tokenized(of, bases / "roberta").digest for of in (rows, others, rows)]
    assert digests[0] == digests[2] != digests[1]


def test_batches(bases: Path) -> None:
    for rows, dtype in ((opinions(3), torch.int64), (pairs(3), torch.float32)):
        found = tokenized(rows, bases / "bert")
        examples = replace(found, classes=find_classes(found)).examples[:]
        batch = collate(examples, pad_token_id=0)
        assert batch.targets is not None
        assert batch.targets.dtype == dtype
        assert batch.targets.tolist() == pytest.approx([row["label"] for row in rows])
        assert batch.num_label_tokens == 3
        assert (batch.labels == -100).all()
        types = batch.inputs["token_type_ids"]
        for example, of_row in zip(examples, types, strict=True):
            assert of_row.tolist()[: len(example.input_ids)] == list(example.token_type_ids)
        assert types[batch.attention_mask == 0].sum() == 0
        weightless = collate(examples, 0, weightless=True)
        assert (weightless.num_label_tokens, weightless.num_tokens) == (0, 0)
        assert batch.to(torch.device("cpu")).targets is not None

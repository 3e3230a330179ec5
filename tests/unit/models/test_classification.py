"""Classifiers made of bases: their head, what is loaded of them, and the loss of their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.data.batch import Batch, collate
from lorasb_ds.data.classification import Classes
from lorasb_ds.data.dataset import tokenize_rows
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.base import Base
from lorasb_ds.models.classification import (
    check_padding,
    head_modules,
    new_parameter,
    predict,
    row_loss_sum,
)
from lorasb_ds.models.linear_layers import linear_layers
from lorasb_ds.models.loading import load_base
from tests.classifiers import FAMILIES, opinions, pairs, tiny_base

TWO = Classes(("0", "1"))
HEADS = {"roberta": ["classifier"], "bert": ["bert.pooler", "classifier"], "llama": ["score"]}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Callable[[str], Path]:
    folders = tmp_path_factory.mktemp("bases")

    def make(family: str) -> Path:
        made = folders / family
        return made if made.exists() else tiny_base(family, made, demo_model)

    return make


def loaded(folder: Path, classes: Classes = TWO, **options: Any) -> tuple[Base, Any]:
    config = load_run_config(
        {"task_type": "sequence-classification", "model": str(folder), "dtype": "fp32", **options}
    )
    base = Base(str(folder), classifies=True, classes=classes)
    return base, load_base(base, config, {"zero_optimization": {"stage": 2}}).eval()


def batch_of(base: Base, rows: list[dict[str, Any]], weightless: bool = False) -> Batch:
    config = load_run_config({"task_type": "sequence-classification"})
    found = tokenize_rows(rows, base.tokenizer, config)
    examples = replace(found, classes=base.classes).examples[:]
    return collate(examples, base.tokenizer.pad_token_id, weightless)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_new_and_all_else_is_the_files(
    folder_of: Callable[[str], Path], family: str
) -> None:
    folder = folder_of(family)
    base, model = loaded(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    head = set(base.head)
    assert head_modules(model) == HEADS[family]
    assert base.new_parameters == base.head, "a masked language model has no pooler"
    for name, value in plain.state_dict().items():
        assert torch.equal(model.get_parameter(name), value) == (
            name not in head or (value == 0).all().item()
        ), name
    assert not any(name.startswith(tuple(HEADS[family])) for name in linear_layers(model))
    _, again = loaded(folder)
    _, other = loaded(folder, seed=1)
    for name in head:
        value = again.get_parameter(name)
        assert torch.equal(value, model.get_parameter(name))
        assert torch.equal(value, other.get_parameter(name)) == (value == 0).all().item()


def test_a_pooler_of_the_files_is_kept(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """And a head of the files is not, whatever its classes were."""
    plain: Any = AutoModelForSequenceClassification.from_pretrained(folder_of("bert"), num_labels=3)
    tiny_copy(folder_of("bert"), tmp_path)
    plain.save_pretrained(tmp_path)
    base, model = loaded(tmp_path)
    base.check_files()
    assert base.new_parameters == ["classifier.weight", "classifier.bias"]
    assert torch.equal(model.bert.pooler.dense.weight, plain.bert.pooler.dense.weight)
    assert model.classifier.weight.shape == (2, 32)
    (note,) = [note for note in base.notes() if "no part" in note]
    assert note.startswith("2 tensors of the checkpoint are no part of this classifier")


def tiny_copy(source: Path, target: Path) -> None:
    for file in source.glob("*token*"):
        (target / file.name).write_bytes(file.read_bytes())


def test_new_parameters() -> None:
    W = new_parameter("h.weight", torch.Size([200, 300]), torch.float32, 0.02, 1)
    assert W.std().item() == pytest.approx(0.02, rel=0.02)
    assert (new_parameter("h.bias", torch.Size([3]), torch.float32, 0.02, 1) == 0).all()
    assert (new_parameter("norm.weight", torch.Size([3]), torch.float32, 0.02, 1) == 1).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_number", [False, True])
def test_the_loss_is_transformers_own(
    folder_of: Callable[[str], Path], family: str, is_number: bool
) -> None:
    rows = pairs(6) if is_number else opinions(6)
    base, model = loaded(folder_of(family), Classes(()) if is_number else TWO)
    batch = batch_of(base, rows)
    with torch.no_grad():
        expected = model(**batch.inputs, labels=batch.targets).loss
        found = row_loss_sum(model, batch) / batch.num_label_tokens
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert model.config.problem_type.startswith("regression" if is_number else "single_label")
    assert row_loss_sum(model, batch_of(base, rows, weightless=True)).item() == 0

    parts = [batch_of(base, rows[:4]), batch_of(base, rows[:1], True), batch_of(base, rows[4:])]
    predictions = predict(model, parts, torch.device("cpu"))
    assert predictions.loss == pytest.approx(expected.item(), rel=1e-5)
    assert predictions.targets.tolist() == pytest.approx([row["label"] for row in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(folder_of: Callable[[str], Path], family: str) -> None:
    base, model = loaded(folder_of(family))
    ids = torch.tensor([[5, 6, 7, 8]])
    check_padding(model, ids, base.tokenizer.pad_token_id)
    if family == "llama":
        model.config.pad_token_id = 9  # so that the last token is a pad
        with pytest.raises(ConfigError, match="depend on padding"):
            check_padding(model, ids, base.tokenizer.pad_token_id)


def test_kinds_of_models(tmp_path: Path) -> None:
    from transformers import BartConfig, CLIPConfig

    for config, why in ((BartConfig(), "an encoder with a decoder"), (CLIPConfig(), "no text cla")):
        config.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=why):
            _ = Base(str(tmp_path), classifies=True).hf_config

"""Classifiers over ranks: gradients of the sample, and the head's step, against autograd's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.classifiers import opinions, pairs, tiny_base
from tests.dist.test_gradients import assert_close
from tests.runs import REALLY_SHARDED, run_ranks, write_jsonl

CASES = "tests.dist.classifier_cases"


@pytest.fixture(scope="module")
def base(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")

    def make(family: str) -> Path:
        made = folder / family
        return made if made.exists() else tiny_base(family, made, demo_model)

    return make


def setting(model: Path, tmp_path: Path, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    config = {"task_type": "sequence-classification", "model": str(model), "r": 4, "dtype": "fp32"}
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    return config | {"data": data, "micro_batch_size": 2, "max_length": 48} | more


def plain_model(model: Path, rows: list[dict[str, Any]], head: dict[str, torch.Tensor]) -> Any:
    """transformers' own model in fp32, with the head that the ranks had."""
    is_number = any(isinstance(row["label"], float) for row in rows)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1 if is_number else len({row["label"] for row in rows})
    )
    missing, unexpected = plain.load_state_dict(head, strict=False)
    assert not unexpected
    assert len(missing) + len(head) == len(plain.state_dict())
    return plain.eval()


def true_gradients(
    model: Path, rows: list[dict[str, Any]], head: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`.grad` of all parameters: transformers' loss of each row alone, without padding."""
    plain, tokenizer = plain_model(model, rows, head), AutoTokenizer.from_pretrained(model)
    loss = torch.zeros(())
    for row in rows:
        texts = [row[name] for name in ("sentence", "sentence1", "sentence2") if name in row]
        inputs = tokenizer(*texts, return_tensors="pt")
        loss = loss + plain(**inputs, labels=torch.tensor([row["label"]])).loss / len(rows)
    loss.backward()
    found = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize(
    ("family", "rows", "world_size", "stage"),
    [
        ("roberta", opinions(5), 1, 2),
        pytest.param("roberta", pairs(5), 2, 3, marks=pytest.mark.slow),
        ("bert", pairs(5), 2, 2),
        pytest.param("bert", opinions(5), 3, 3, marks=pytest.mark.slow),
        ("llama", opinions(5), 2, 3),
    ],
)
def test_gradients_of_the_sample(
    base: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    rows: list[dict[str, Any]],
    world_size: int,
    stage: int,
) -> None:
    """Rows of different lengths on ranks of which some have fewer."""
    config = setting(base(family), tmp_path, rows, ds_config=f"ds_configs/zero{stage}.json")
    out = tmp_path / "out.safetensors"
    sharded = REALLY_SHARDED if stage == 3 else {}
    case = f"{CASES}:gradients"
    run_ranks(case, world_size, config=config, out=str(out), zero_optimization=sharded)
    compare(base(family), rows, load_file(out))


def compare(model: Path, rows: list[dict[str, Any]], found: dict[str, torch.Tensor]) -> None:
    head = {n: v for n, v in found.items() if n.endswith((".weight", ".bias"))}
    expected = true_gradients(model, rows, head)
    layers = {name: G for name, G in found.items() if name not in head}
    assert len(layers) - 1 == (14 if "llama" in str(model) else 12)
    of_layers = {name: expected[f"{name}.weight"] for name in layers if name != "loss"}
    assert_close(layers, of_layers | {"loss": expected["loss"]}, tol=1e-4)


def test_gradients_by_segments(base: Callable[[str], Path], tmp_path: Path) -> None:
    """A group of layers after the other: nothing goes to the head's gradient."""
    rows = opinions(5)
    config = setting(base("roberta"), tmp_path, rows, init_memory_gib=1e-6)
    out = tmp_path / "out.safetensors"
    run_ranks(
        f"{CASES}:gradients", 2, config=config, out=str(out), zero_optimization={}, by_segments=True
    )
    compare(base("roberta"), rows, load_file(out))


@pytest.mark.parametrize(
    ("family", "rows", "world_size", "stage"),
    [
        ("roberta", opinions(5), 1, 1),
        ("roberta", pairs(5), 3, 3),
        pytest.param("bert", opinions(5), 2, 2, marks=pytest.mark.slow),
        pytest.param("llama", opinions(5), 2, 3, marks=pytest.mark.slow),
    ],
)
def test_a_step_of_the_head(
    base: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    rows: list[dict[str, Any]],
    world_size: int,
    stage: int,
) -> None:
    """The loss is the mean over the rows of all ranks; SGD's first step is the gradient's."""
    config = setting(base(family), tmp_path, rows, ds_config=f"ds_configs/zero{stage}.json")
    config |= {"optimizer": "sgd", "lr": 0.5, "lr_scheduler": "constant", "warmup_ratio": 0}
    config |= {"max_grad_norm": 0, "train_batch_size": 5}
    out = tmp_path / "out.safetensors"
    run_ranks(f"{CASES}:step", world_size, config=config, out=str(out))
    found = load_file(out)
    head = {n.removeprefix("before."): v for n, v in found.items() if n.startswith("before.")}
    expected = true_gradients(base(family), rows, head)
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    for name, before in head.items():
        moved = (before - found[f"after.{name}"]) / 0.5
        assert expected[name].abs().max() > 1e-3, "there is something to compare"
        torch.testing.assert_close(moved, expected[name], atol=1e-5, rtol=1e-4)

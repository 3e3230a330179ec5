"""Whole runs on the text part of multimodal checkpoints, and what comes out of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.evaluation.model import prepare_model, start_model
from lorasb_ds.export.adapter_reader import read_adapter
from lorasb_ds.export.merge import merge_adapter
from lorasb_ds.export.to_peft import export_adapter
from tests.conftest import saved_model
from tests.dist.test_moe import IDS, losses, options, train
from tests.multimodal_families import tiny_multimodal_config

# Attention that asks for the kinds of tokens in training; experts; another name of the text part.
FAMILIES = (
    "gemma3",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_vl_moe", "idefics3")),
)


@pytest.fixture(scope="module")
def base(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that makes a family's tiny checkpoint, as it would be published."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"multimodal-{family}"
        if not folder.exists():
            config = tiny_multimodal_config(family, 49152)
            saved_model(AutoModelForImageTextToText.from_config, config, folder, demo_model)
            (folder / "preprocessor_config.json").write_text('{"image_processor_type": "X"}')
        return folder

    return make


def whole(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_multimodal(
    base: Callable[[str], Path],
    one_process: None,
    tmp_path: Path,
    family: str,
) -> None:
    """Ranks train as one process; PEFT and merged models compute the same on text."""
    model, run, two = base(family), tmp_path / "run", tmp_path / "two"
    train(1, options(model, run, expert_r=None))
    train(2, options(model, two, micro_batch_size=2, expert_r=None))
    assert len(losses(run)) == 4
    torch.testing.assert_close(losses(two), losses(run), rtol=1e-3, atol=0)
    config = load_run_config({"model": str(model), "dtype": "fp32"})
    wanted = logits(start_model(prepare_model(config, str(run))))
    plain = whole(model)
    assert (wanted - logits(plain)).abs().max() > 0.05

    def equals(found: torch.Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    (checkpoint,) = (run / "checkpoints").glob("step-*4")
    export_adapter(read_adapter(str(checkpoint)), tmp_path / "exported")
    for adapter in (run / "adapter", tmp_path / "exported"):
        peft = PeftModel.from_pretrained(whole(model), adapter)
        equals(logits(peft))
        names = [name for name, _ in peft.named_parameters()]
        assert any(".vis" in name for name in names)
        # PEFT puts no layers of its own into the encoder.
        assert not [name for name in names if "lora_" in name and ".vis" in name]

    merge_adapter(read_adapter(str(run)), str(model), tmp_path / "merged")
    equals(logits(whole(tmp_path / "merged")))
    assert (tmp_path / "merged/preprocessor_config.json").is_file()
    before, after = (load_file(f / "model.safetensors") for f in (model, tmp_path / "merged"))
    assert before.keys() == after.keys()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert any("vis" in name for name in same)
    assert len(same) < len(before)


@pytest.mark.slow
def test_in_4_bits(base: Callable[[str], Path], tmp_path: Path) -> None:
    """The text part alone is in memory, and quantized; notes say what is left out."""
    run = tmp_path / "run"
    given = options(base("gemma3"), run, load_in_4bit=True, dtype="bf16", expert_r=None)
    train(2, given)
    assert losses(run).isfinite().all()
    notes = json.loads((run / "run.json").read_text())["notes"]
    assert any("training is on text, without model.vision_tower (0.0 M" in note for note in notes)
    with safe_open(run / "basis.safetensors", "pt") as basis:
        names = [name for name in basis.keys() if name.endswith("lora_A")]  # noqa: SIM118
    assert len(names) == 14
    assert all(name.startswith("model.language_model.layers.") for name in names)

"""Files of --method peft: what is rejected, and what a configuration makes of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lorasb_ds.adapters import peft_methods
from lorasb_ds.adapters.peft_method_file import make_peft_config
from lorasb_ds.adapters.peft_methods import (
    PeftPlan,
    disable_peft,
    frozen_tensors,
    inject_peft,
    plan_peft,
    save_peft_method,
)
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.adapter_reader import read_adapter
from lorasb_ds.models.base import Base

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")


def options(folder: Path, content: Any, **more: Any) -> dict[str, Any]:
    file = folder / "method.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return {"method": f"peft:{file}", **more}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ("{}", "the file has no peft_type"),
        ({"peft_type": 3}, "the file has no peft_type"),
    ],
)
def test_invalid_files(content: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_run_config(options(tmp_path, content))


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_run_config({"method": "peft:nowhere.json"})


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"load_in_4bit": True}, "packed weights"),
        ({"load_in_8bit": True}, "packed weights"),
        ({"track_alignment": 5}, "our own layers"),
        ({"init_from": "somewhere"}, "PEFT has its own init"),
        ({"init_data": "rows.jsonl"}, "PEFT has its own init"),
        ({"precondition": 0.1}, "their own gradients"),
        ({"r": 8}, "the file decides it"),
        ({"target_modules": "q_proj"}, "the file decides it"),
    ],
)
def test_options_that_do_not_apply(given: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_run_config(options(tmp_path, {"peft_type": "LOHA"}, **given))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"peft_type": "LORAX"}, "no peft_type 'LORAX'.* ADALORA, .* XLORA"),
        ({"peft_type": "LOHA", "rang": 3}, "rang is not a field of PEFT's LOHA"),
        ({"peft_type": "LOHA", "r": -1}, "PEFT rejects it|PEFT cannot"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "before the input"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, "before the input"),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": 4}, "before the input"),
        ({"peft_type": "ADAPTION_PROMPT"}, "before the input"),
        ({"peft_type": "ADALORA", "total_step": 9}, "ranks between layers"),
        ({"peft_type": "XLORA"}, "trained before"),
        ({"peft_type": "LORA", "modules_to_save": ["norm"]}, "whole modules"),
        ({"peft_type": "LORA", "bias": "all"}, "biases of the base"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"peft_type": "LORA", "target_modules": ["qq_proj"]}, "PEFT cannot inject its layers"),
        ({"peft_type": "LORA", "target_modules": ["lm_head"]}, "an embedding or the head"),
        ({"peft_type": "LORA", "target_modules": ["embed_tokens"]}, "an embedding or the head"),
        ({"peft_type": "C3A", "block_size": 7}, "PEFT cannot inject its layers"),
    ],
)
def test_rejected_configurations(
    content: dict[str, Any], problem: str, tmp_path: Path, tiny_model: Path
) -> None:
    config = load_run_config(options(tmp_path, content, model=str(tiny_model)))
    with pytest.raises(ConfigError, match=problem) as error:
        plan_peft(config, Base(str(tiny_model)).empty_model(torch.float32))
    assert "method.json" in str(error.value)


def test_muon_needs_matrices(tmp_path: Path, tiny_model: Path) -> None:
    given = options(tmp_path, {"peft_type": "LORA", "use_dora": True}, model=str(tiny_model))
    config = load_run_config({**given, "optimizer": "muon"})
    with pytest.raises(ConfigError, match=r"muon trains matrices only.*magnitude"):
        plan_peft(config, Base(str(tiny_model)).empty_model(torch.float32))


def test_an_adapter_config_of_peft_is_a_valid_file(tmp_path: Path) -> None:
    """As PEFT saves it with an adapter, naming base and task."""
    LoraConfig(r=3, target_modules=["q_proj"], base_model_name_or_path="x").save_pretrained(
        str(tmp_path)
    )
    content = json.loads((tmp_path / "adapter_config.json").read_text()) | {"inference_mode": True}
    made: Any = make_peft_config("peft:x", content)
    assert (made.r, made.target_modules, made.inference_mode) == (3, {"q_proj"}, False)


def plan_of(folder: Path, model: Path, content: dict[str, Any]) -> tuple[Any, PeftPlan]:
    config = load_run_config(options(folder, content, model=str(model), dtype="fp32"))
    return config, plan_peft(config, Base(str(model)).empty_model(torch.float32))


def test_plan_of_a_configuration(tmp_path: Path, tiny_model: Path) -> None:
    _, dora = plan_of(tmp_path, tiny_model, {"peft_type": "LORA", "use_dora": True, "r": 4})
    assert len(dora.layers) == 14
    assert dora.layers["model.layers.1.mlp.up_proj"] == (80, 48)
    sizes = [torch.Size(shape).numel() for shape in dora.trained.values()]
    assert sum(sizes) == sum(4 * (out + in_) + out for out, in_ in dora.layers.values())
    assert dora.num_kept == 0
    content = {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj"]}
    _, vera = plan_of(tmp_path, tiny_model, content)
    assert vera.num_kept == 4 * (48 + 48)  # one pair for all layers


def injected(folder: Path, model: Path, content: dict[str, Any]) -> tuple[Any, PeftPlan]:
    config, plan = plan_of(folder, model, content)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    state = torch.get_rng_state()
    inject_peft(base, plan, config, torch.float32)
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    return base, plan


def test_the_seed_makes_the_layers(tmp_path: Path, tiny_model: Path) -> None:
    content = {"peft_type": "FOURIERFT", "n_frequency": 20}  # does not begin at the base
    one, plan = injected(tmp_path, tiny_model, content)
    torch.manual_seed(1)
    other, _ = injected(tmp_path, tiny_model, content)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
        assert not torch.allclose(one(ids).logits, base(ids).logits, atol=1e-3)
        with disable_peft(one):
            assert torch.equal(one(ids).logits, base(ids).logits)
        assert torch.equal(one(ids).logits, other(ids).logits)
    trained = {n: tuple(p.shape) for n, p in one.named_parameters() if p.requires_grad}
    assert trained == plan.trained


def test_an_init_that_changes_the_base(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by comparing weights, whichever of PEFT's classes does it."""
    config, plan = plan_of(tmp_path, tiny_model, {"peft_type": "LORA", "r": 4})
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = base.model.layers[0].self_attn.q_proj.weight.clone()
    made = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
    monkeypatch.setattr(peft_methods, "make_peft_config", lambda *_: made)
    with pytest.raises(ConfigError, match="changes the base's weights"):
        inject_peft(base, plan, config, torch.float32)
    changed = base.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.equal(changed, before), "PiSSA was expected to change it"


@pytest.mark.parametrize("kind", ["LOKR", "VERA", "OFT", "OSF", "LN_TUNING"])
def test_what_is_saved_is_what_peft_saves(kind: str, tmp_path: Path, tiny_model: Path) -> None:
    """Names and numbers of PEFT's own ``save_pretrained`` of the same layers."""
    content: dict[str, Any] = {"peft_type": kind, **({"r": 4} if kind in ("LOKR", "VERA") else {})}
    if kind == "OFT":
        content["oft_block_size"] = 4
    model, plan = injected(tmp_path, tiny_model, content)
    generator = torch.Generator().manual_seed(3)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tensors = {n: t.data.clone() for n, t in {**trained, **frozen_tensors(model)}.items()}
    empty = Base(str(tiny_model)).empty_model(torch.float32)
    save_peft_method(tmp_path / "ours", plan, empty, tensors, str(tiny_model))
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tuned = get_peft_model(base, make_peft_config("peft:x", plan.content)).eval()
    there = dict(tuned.named_parameters()) | dict(tuned.named_buffers(remove_duplicate=False))
    for name, value in tensors.items():
        there[f"base_model.model.{name}"].data.copy_(value)
    tuned.save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    config, other = (
        json.loads((tmp_path / folder / "adapter_config.json").read_text())
        for folder in ("ours", "theirs")
    )
    assert config["inference_mode"] is True
    config["target_modules"], other["target_modules"] = (
        set(found["target_modules"]) for found in (config, other)
    )
    assert config == other
    ids = torch.arange(16)[None]
    again: nn.Module = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), tmp_path / "ours"
    ).eval()
    with torch.no_grad():
        # OSF's layers decompose W0 anew when they are loaded: fp32's rounding.
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="only LORA is supported"):
        read_adapter(str(tmp_path / "ours"))

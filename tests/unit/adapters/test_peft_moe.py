"""Adapters of mixtures of experts, loaded by PEFT: logits against weights added by hand."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lorasb_ds.adapters.low_rank import LoraPair
from lorasb_ds.adapters.peft_config import PREFIX
from lorasb_ds.adapters.peft_experts import (
    REGISTERED,
    ExpertPair,
    StoredExperts,
    expert_fields,
    expert_tensors,
    find_experts,
)
from lorasb_ds.adapters.peft_targets import (
    MOVED_NAMES,
    misread_by_peft,
    peft_warning,
    renamed_by_peft,
    target_fields,
)
from lorasb_ds.adapters.peft_writer import (
    peft_target_modules,
    peft_tensors,
    save_peft_adapter,
    with_ranks,
)
from lorasb_ds.config.run_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.adapter_reader import read_adapter
from lorasb_ds.models.linear_layers import linear_layers
from tests.references import nf4_config
from tests.text_families import tiny_config

# model_type -> options, the layers that PEFT would misread, and the experts' parameters.
FAMILIES: dict[str, tuple[dict[str, Any], int, int]] = {
    "qwen3_moe": ({}, 0, 4),
    "qwen2_moe": ({}, 0, 4),
    "mixtral": ({}, 0, 4),
    "gpt_oss": ({}, 0, 4),
    "deepseek_v3": ({}, 6, 2),
    "glm4_moe": ({}, 6, 2),
    "qwen3_next": ({}, 6, 4),
    "afmoe": ({"num_dense_layers": 1, "num_shared_experts": 1}, 8, 2),
    "longcat_flash": ({"num_layers": 1}, 6, 2),  # its layers hold two blocks each
    "nemotron_h": ({}, 0, 2),
    "llama4_text": ({"interleave_moe_layer_step": 2}, 0, 2),
}
TRANSPOSED = ("gpt_oss", "llama4_text")  # experts' weights are (experts, in, out)
# Read by their weights, or of another output than a linear layer's: an adapter does not act.
ROUTERS = ("router", "classifier")
INPUT_IDS = torch.arange(3, 27).view(2, 12)
R, EXPERT_R = 3, 2


def make(model_type: str) -> Any:
    """Return a random fp32 model of two blocks."""
    config = tiny_config(model_type, **FAMILIES[model_type][0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:  # so that every layer matters in the logits
                parameter.data.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def models() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(model_type: str) -> Any:
        if model_type not in made:
            made[model_type] = make(model_type)
        return deepcopy(made[model_type])

    return get


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT_IDS, use_cache=False).logits


def randn(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator) / 4


def layers_of(model: Any) -> dict[str, tuple[int, int]]:
    layers = linear_layers(model)
    return {name: shape for name, shape in layers.items() if not name.endswith(ROUTERS)}


def experts_of(model: Any) -> dict[str, nn.Parameter]:
    """Return the experts' parameters by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and name.endswith(REGISTERED)
    }


def add_layers(model: Any, tensors: dict[str, torch.Tensor], r: int = R) -> Any:
    """Add random updates to all linear layers by hand, and return their names and shapes."""
    layers = layers_of(model)
    for name, (out, in_) in layers.items():
        A, B = randn(r, in_), randn(out, r)
        tensors |= peft_tensors(name, A, B)
        model.get_submodule(name).weight.data += B @ A
    return layers


def add_experts(model: Any, r: int = EXPERT_R, only: str = "") -> dict[str, ExpertPair]:
    """Add random updates to all experts by hand, and return them as PEFT's file has them."""
    pairs = {}
    for name, parameter in experts_of(model).items():
        if not name.endswith(only):
            continue
        transposed = model.config.model_type in TRANSPOSED
        weight = parameter.data.mT if transposed else parameter.data
        num, out, in_ = weight.shape
        pair = ExpertPair(randn(num, r, in_), randn(num, out, r))
        for e in range(num):
            weight[e] += pair.B[e] @ pair.A[e]
        # Llama 4's experts do not say that they are transposed.
        pairs[name] = pair.swapped() if model.config.model_type == "llama4_text" else pair
    return pairs


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    # fp32, whose errors Qwen3-Next's recurrence amplifies. An update moves logits by 0.01 or more.
    return bool((found - wanted).abs().max() <= 3e-5 * wanted.abs().max())


def ranks_of(pairs: Mapping[str, ExpertPair]) -> dict[str, int]:
    return {name: pair.A.shape[1] for name, pair in pairs.items()}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_adapters_of_layers(model_type: str, models: Any, tmp_path: Path) -> None:
    """Also of dense and shared layers that have the names of experts. PEFT warns of nothing."""
    base, by_hand, tensors = models(model_type), models(model_type), {}
    layers = add_layers(by_hand, tensors)
    misread = misread_by_peft(model_type, layers)
    fields = target_fields(model_type, peft_target_modules(layers, linear_layers(base)))
    assert len(misread) == FAMILIES[model_type][1]
    assert ("target_parameters" in fields) == bool(misread), "others are written as before"
    save_peft_adapter(tmp_path, tensors, r=R, base_model=None, **fields)
    wanted = logits(by_hand)
    assert not close(logits(base), wanted)
    by_transformers = models(model_type)
    by_transformers.load_adapter(str(tmp_path))
    assert close(logits(by_transformers), wanted)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert close(logits(loaded), wanted)
    assert close(logits(loaded.merge_and_unload()), wanted)
    assert read_adapter(str(tmp_path)).layers.keys() == layers.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_adapters_of_experts_and_layers(model_type: str, models: Any, tmp_path: Path) -> None:
    """With a rank of their own; what is written is read again."""
    base, by_hand, tensors = models(model_type), models(model_type), {}
    layers = add_layers(by_hand, tensors)
    without_experts = logits(by_hand)
    pairs = add_experts(by_hand)
    assert len(pairs) == FAMILIES[model_type][2]
    wanted = logits(by_hand)
    assert not close(without_experts, wanted)
    fields = target_fields(model_type, peft_target_modules(layers, linear_layers(base)))
    fields = expert_fields(R, fields, ranks_of(pairs), experts_of(base))
    save_peft_adapter(tmp_path, tensors | expert_tensors(pairs), r=R, base_model=None, **fields)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert close(logits(loaded), wanted)
    assert close(logits(loaded.merge_and_unload()), wanted)
    for name, found in read(tmp_path).items():
        assert found[0].scale == 1
        assert all(map(torch.equal, found[1], pairs[name]))
    assert read(tmp_path).keys() == pairs.keys()


@pytest.mark.parametrize("names", ["short", "whole"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_layers_of_several_ranks(model_type: str, names: str, models: Any, tmp_path: Path) -> None:
    """With experts of yet another, and layers that PEFT finds by their weights."""
    base, by_hand, tensors = models(model_type), models(model_type), {}
    ranks = {name: 1 + i % R for i, name in enumerate(layers_of(base))}
    for name, r in ranks.items():
        out, in_ = layers_of(base)[name]
        pair = LoraPair(randn(r, in_), randn(out, r))
        tensors |= peft_tensors(name, *pair)
        by_hand.get_submodule(name).weight.data += pair.B @ pair.A
    pairs = add_experts(by_hand)
    modules = [*ranks] if names == "whole" else peft_target_modules(ranks, linear_layers(base))
    fields = target_fields(model_type, modules)
    fields = expert_fields(R, fields, ranks_of(pairs), experts_of(base))
    tensors |= expert_tensors(pairs)
    written, fields = with_ranks(tensors, fields, {n: r for n, r in ranks.items() if r != R}, R)
    save_peft_adapter(tmp_path, written, r=R, base_model=None, **fields)
    stored = read_adapter(str(tmp_path))
    by_weight = misread_by_peft(model_type, ranks)
    for name, r in ranks.items():
        assert stored.rank_of(name) == (R if name in by_weight else r)
        A, B = stored.pair(name)
        own_A, own_B = (tensors[f"{PREFIX}{name}.lora_{leaf}.weight"] for leaf in "AB")
        assert torch.equal(B @ A, own_B @ own_A)
    assert {stored.rank_of(name) for name in stored.experts} == {EXPERT_R}
    assert close(logits(PeftModel.from_pretrained(base, tmp_path)), logits(by_hand))


def read(folder: Path) -> dict[str, tuple[StoredExperts, ExpertPair]]:
    """Read the experts' factors of a folder."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    rows = {
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): len(tensor)
        for key, tensor in tensors.items()
        if key.endswith(".lora_A.weight")
    }
    return {
        name: (it, it.pair(*(tensors[f"{PREFIX}{it.layer}.lora_{leaf}.weight"] for leaf in "AB")))
        for name, it in find_experts(folder, config, rows).items()
    }


@pytest.mark.parametrize("only", ["", "gate_up_proj", "down_proj"])
def test_adapters_of_experts_alone(only: str, models: Any, tmp_path: Path) -> None:
    """Of both parameters, or of one, which PEFT then wraps once."""
    base, by_hand = models("gpt_oss"), models("gpt_oss")
    pairs = add_experts(by_hand, only=only)
    fields = expert_fields(EXPERT_R, {"target_modules": []}, ranks_of(pairs), experts_of(base))
    assert "rank_pattern" not in fields
    save_peft_adapter(tmp_path, expert_tensors(pairs), r=EXPERT_R, base_model=None, **fields)
    wanted = logits(by_hand)
    assert not close(logits(base), wanted)
    assert close(logits(PeftModel.from_pretrained(base, tmp_path)), wanted)
    assert read(tmp_path).keys() == pairs.keys()
    stored = read_adapter(str(tmp_path))
    assert {expert.projection for expert in stored.experts.values()} == pairs.keys()
    for layer, expert in stored.experts.items():
        A, B = stored.pair(layer)
        assert torch.equal(A, pairs[expert.projection].A[expert.number])
        assert torch.equal(B, pairs[expert.projection].B[expert.number])


def test_experts_of_some_blocks_and_of_several_ranks(models: Any, tmp_path: Path) -> None:
    """They are named in full where a short name would select others, too."""
    base, by_hand, tensors = models("qwen3_moe"), models("qwen3_moe"), {}
    layers = add_layers(by_hand, tensors)
    pairs = add_experts(by_hand, r=1, only="layers.1.mlp.experts.down_proj")
    pairs |= add_experts(by_hand, r=4, only="layers.1.mlp.experts.gate_up_proj")
    pairs |= add_experts(by_hand, r=R, only="layers.0.mlp.experts.down_proj")
    fields = target_fields("qwen3_moe", peft_target_modules(layers, linear_layers(base)))
    fields = expert_fields(R, fields, ranks_of(pairs), experts_of(base))
    assert fields["target_parameters"] == sorted(["mlp.experts.down_proj", list(pairs)[1]])
    save_peft_adapter(tmp_path, tensors | expert_tensors(pairs), r=R, base_model=None, **fields)
    assert close(logits(PeftModel.from_pretrained(base, tmp_path)), logits(by_hand))
    assert {name: it.r for name, (it, _) in read(tmp_path).items()} == {
        name: pair.A.shape[1] for name, pair in pairs.items()
    }


def test_a_base_in_4_bits(models: Any, tmp_path: Path) -> None:
    """PEFT gives its layers for bitsandbytes' to weights that are named as parameters."""
    models("glm4_moe").save_pretrained(tmp_path / "base")

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            dtype=torch.float32,
            quantization_config=nf4_config(torch.float32),
        )

    tensors: dict[str, torch.Tensor] = {}
    layers = add_layers(models("glm4_moe"), tensors)
    fields = target_fields("glm4_moe", list(layers))
    save_peft_adapter(tmp_path / "adapter", tensors, r=R, base_model=None, **fields)
    by_hand = load()
    for name in layers:
        A, B = (tensors[f"{PREFIX}{name}.lora_{leaf}.weight"] for leaf in "AB")
        by_hand.get_submodule(name).register_forward_hook(
            lambda _, inputs, y, A=A, B=B: y + inputs[0] @ A.T @ B.T
        )
    # As in training: bitsandbytes' kernel for inference, of CPUs with AVX512, wants 64 columns.
    by_peft = PeftModel.from_pretrained(load(), tmp_path / "adapter").train()
    assert close(logits(by_peft), logits(by_hand.train()))


def test_an_adapter_that_peft_made_of_old_names(models: Any, tmp_path: Path) -> None:
    """PEFT turns target_modules into names of parameters alone, and ranks into patterns."""
    base = models("qwen3_moe")
    config = LoraConfig(
        r=R,
        lora_alpha=7,
        target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"],
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of its own patterns
        made = get_peft_model(base, config)
    made.save_pretrained(tmp_path)
    found = read(tmp_path)
    assert found.keys() == experts_of(models("qwen3_moe")).keys()
    wrappers = dict(made.named_modules())
    for it, pair in found.values():
        wanted = wrappers[f"{PREFIX}{it.layer}"].get_delta_weight("default")
        assert torch.allclose(it.scale * pair.B @ pair.A, wanted, atol=1e-6)  # fp32, size 1


def test_layers_whose_tensors_peft_renames(models: Any) -> None:
    """In Laguna a rule takes the model's own ``shared_experts`` for a checkpoint's name."""
    layers = [f"model.layers.1.{name}" for name in ("mlp.shared_experts.up_proj", "mlp.gate")]
    assert renamed_by_peft("laguna", layers) == layers[:1]
    assert "PEFT will not read 1 of 2 layers" in str(peft_warning("laguna", layers, None))
    for model_type in FAMILIES:
        assert renamed_by_peft(model_type, layers_of(models(model_type))) == []
        assert peft_warning(model_type, layers_of(models(model_type)), None) is None


def test_tables_of_peft_and_transformers(models: Any) -> None:
    """What is known of them by heart."""
    assert set(MOVED_NAMES) == {name for it in _MOE_TARGET_MODULE_MAPPING.values() for name in it}
    for model_type in FAMILIES:
        orders: Mapping[str, list[str]] = {}
        for name in experts_of(models(model_type)):
            orders.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
        assert all(order == sorted(order, key=REGISTERED.index) for order in orders.values())
    parameter = re.compile(r"^class |self\.(gate_up_proj|up_proj|down_proj) = nn\.Parameter", re.M)
    files = list(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
    seen = 0
    for file in files:
        if "Experts" not in (text := file.read_text()):
            continue
        names = [found.group(1) for found in parameter.finditer(text)]
        seen += names.count("down_proj")
        for first, second in pairwise(names):
            assert first != "down_proj" or second not in REGISTERED, file.name
    assert seen > 50


BROKEN: dict[str, tuple[dict[str, Any], dict[str, int], str]] = {
    "rows that are no experts": (
        {},
        {"a.experts": 7},
        "7 rows, which is no multiple of the rank 2",
    ),
    "another rank": ({"r": 0}, {"a.experts": 8}, "r = 0 .* is no positive integer"),
    "a pattern": ({"rank_pattern": {"a[b]": 2}}, {"a.experts": 8}, "rank_pattern .* name layers"),
    "a wrapper too many": ({}, {"a.experts": 8, "a.experts.base_layer": 8}, "has 2 LoRAs, .* 1 of"),
    "no rows": ({}, {"a.q_proj": 2}, "'experts.down_proj', of which there is no LoRA"),
    "an unknown order": (
        {"target_parameters": ["experts.w1", "experts.w2"]},
        {"a.experts": 8, "a.experts.base_layer": 8},
        "which is not known for w1, w2 of a.experts",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_experts_that_do_not_fit(case: str, tmp_path: Path) -> None:
    change, rows, message = BROKEN[case]
    config = {"r": 2, "lora_alpha": 2, "target_parameters": ["experts.down_proj"]} | change
    with pytest.raises(ConfigError, match=message):
        find_experts(tmp_path, config, rows)

"""Compare shapes from a config.json with what transformers builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Llama4TextConfig

from lorasb_ds.errors import ConfigError
from lorasb_ds.models.empty_model import empty_model
from lorasb_ds.models.experts import ExpertsLinear, experts_modules, split_experts
from lorasb_ds.models.shape import shape_of
from lorasb_ds.planner.config_shape import shape_from_config
from lorasb_ds.planner.known_models import BUILT_IN
from lorasb_ds.planner.model_shape import shape_as_json, shape_from_json
from tests.text_families import FAMILIES, VOCABULARY, tiny_config

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
MOE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
GROUPS = {"n_routed_experts": 4, "n_shared_experts": 2, "n_group": 1, "topk_group": 1}
GROUPS |= {"first_k_dense_replace": 1}
LATENT = {"model_type": "deepseek_v3", "kv_lora_rank": 12, "v_head_dim": 10}
LATENT |= {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma"},
    "untied gemma": {"model_type": "gemma2", "head_dim": 16, "tie_word_embeddings": False},
    "gemma without a soft cap": {"model_type": "gemma2", "attn_logit_softcapping": None},
    "phi3": {"model_type": "phi3"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "attention_bias": True},
    "qwen3_moe, some blocks": MOE
    | {"model_type": "qwen3_moe", "decoder_sparse_step": 2, "num_hidden_layers": 4}
    | {"mlp_only_layers": [1], "num_experts": 4},
    "qwen3_next, layer types": MOE
    | {"model_type": "qwen3_next", "layer_types": ["full_attention", "linear_attention"]}
    | {"num_experts": 4, "shared_expert_intermediate_size": 20, "linear_conv_kernel_dim": 3}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 16},
    "gpt_oss without biases": {"model_type": "gpt_oss", "attention_bias": False, "head_dim": 8}
    | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe with norms": MOE | GROUPS | {"model_type": "glm4_moe", "use_qk_norm": True},
    "deepseek_v3 with biases": MOE | GROUPS | LATENT | {"q_lora_rank": 16, "attention_bias": True},
    "deepseek_v3, whole queries": MOE | GROUPS | LATENT | {"q_lora_rank": None},
}
CONFIGS = BUILT_IN | {name: SMALL | more for name, more in VARIANTS.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_as_transformers_builds_it(name: str, tmp_path: Path) -> None:
    given = dict(CONFIGS[name])
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    model = empty_model(config, torch.bfloat16, buffers=False)
    built = shape_of(name, model)
    assert built.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape_from_json(shape_as_json(built)) == built
    for source in (CONFIGS[name], written):
        shape = shape_from_config(name, source)
        assert list(shape.layers.items()) == list(built.layers.items())
        assert shape == built


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-7b", 6.738),
        ("llama-3.2-3b", 3.213),
        ("llama-3-70b", 70.554),
        ("llama-3-405b", 405.853),
        ("mixtral-8x7b", 46.703),
    ],
)
def test_published_numbers_of_parameters(name: str, billions: float) -> None:
    shape = shape_from_config(name, BUILT_IN[name])
    assert round(shape.num_parameters / 1e9, 3) == billions


@pytest.mark.parametrize(
    ("name", "billions"),
    # As their model cards round them; without layers that predict further tokens.
    [
        ("mixtral-8x22b", 141),
        ("qwen3-30b-a3b", 30.5),
        ("qwen3-235b-a22b", 235),
        ("qwen3-next-80b", 80),
        ("gpt-oss-20b", 20.9),
        ("gpt-oss-120b", 116.8),
        ("glm-4.5-air", 106),
        ("deepseek-v3", 671),
    ],
)
def test_published_sizes_of_mixtures(name: str, billions: float) -> None:
    shape = shape_from_config(name, BUILT_IN[name])
    assert shape.num_parameters / 1e9 == pytest.approx(billions, rel=0.02)
    assert 0.9 < shape.num_in_experts / shape.num_parameters < 1
    assert shape.num_unreached == 0


def test_a_router_by_another_name() -> None:
    """HunYuan's is a linear layer called wg."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_experts": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model("hunyuan_v1_moe", vocab_size=64, moe_topk=2, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    (router,) = (name for name, _ in model.named_modules() if name.endswith("gate.wg"))
    layers = shape_of("hunyuan", model).layers
    assert router not in layers
    assert router.replace("gate.wg", "shared_mlp.gate_proj") in layers


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_every_family(family: str) -> None:
    """Their sides are those of the layers made of them; routing is in the dtype that is assumed."""
    config = tiny_config(family)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    shape = shape_of(family, model)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    dtypes = set()
    for experts in experts_modules(model).values():
        experts.register_forward_pre_hook(lambda _, arguments: dtypes.add(arguments[2].dtype))
    model(torch.randint(VOCABULARY, (1, 5)))
    assert dtypes == {torch.float32 if shape.fp32_routing else torch.bfloat16}
    assert shape.experts_per_token == 2
    assert shape.expert_width == (
        48 if family in ("mixtral", "olmoe", "gpt_oss", "minimax") else 24
    )
    split_experts(model, torch.bfloat16, None)
    assert shape.experts == {
        name: (layer.num_experts, layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, ExpertsLinear)
    }
    has_experts = [any(f".{i}." in name for name in shape.experts) for i in range(2)]
    assert [block.num_experts > 0 for block in shape.blocks] == has_experts


def test_experts_that_transformers_computes_in_another_way() -> None:
    config = Llama4TextConfig(
        **SMALL,
        intermediate_size_mlp=80,
        num_local_experts=4,
        head_dim=8,
        interleave_moe_layer_step=1,
    )
    shape = shape_of("llama4", empty_model(config, torch.bfloat16, buffers=False))
    assert not shape.experts
    assert shape.experts_per_token == 0
    assert shape.num_unreached == shape.num_in_experts == 2 * 4 * 3 * 32 * 48
    assert sum(shape.others.values()) > shape.num_unreached


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"type 'gpt2'.*without torch only llama"),
        ({"hidden_size": None}, r"hidden_size in its config.json is None"),
        ({"vocab_size": "many"}, r"vocab_size in its config.json is 'many'"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_from_config("x", BUILT_IN["llama-7b"] | change)

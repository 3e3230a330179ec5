"""Tiny configurations of language models: two blocks, of four experts each if they have any."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

VOCABULARY = 128
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
# Set where a family's configuration has them.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 48,
    "num_layers": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "zero_expert_num": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
}
# model type -> what its configuration has besides
TWO_MIXERS = {"layer_types": ["linear_attention", "full_attention"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "dbrx": {
        "d_model": 32,
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 24,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_groups": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "deepseek_v2": {"n_shared_experts": 2},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["attention", "moe"]},
    "qwen2_moe": {"shared_expert_intermediate_size": 40},
    "qwen3_5_moe_text": TWO_MIXERS,
    "qwen3_next": {**TWO_MIXERS, "shared_expert_intermediate_size": 40},
    "xlnet": {"d_head": 8, "d_inner": 48},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
# Those of tests of all families that transformers computes by its registry.
FAMILIES = (
    *("qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "olmoe", "gpt_oss", "deepseek_v2"),
    *("deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe", "laguna", "minimax", "nemotron_h"),
)


def tiny_config(family: str, **more: Any) -> Any:
    """Return a family's configuration with ``SIZES`` and its own options."""
    known = AutoConfig.for_model(family)
    fields = {*known.to_dict(), *type(known).attribute_map}
    sizes = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in sizes and "num_key_value_heads" in sizes:  # as many as there are heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if "vocab_size_per_layer_input" in fields:  # Gemma 3n, Gemma 4
        sizes["vocab_size_per_layer_input"] = more.get("vocab_size", VOCABULARY)
    return AutoConfig.for_model(family, **{**TOKENS, **sizes, **OPTIONS.get(family, {}), **more})

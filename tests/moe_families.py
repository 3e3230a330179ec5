"""Tiny configurations of the MoE families that transformers computes by its registry."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

VOCABULARY = 128
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
# model type -> what its configuration has besides _COMMON
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": dict(**_EXPERTS, shared_expert_intermediate_size=40),
    "qwen3_moe": {"num_local_experts": 4, "moe_intermediate_size": 24},
    "qwen3_next": dict(
        **_EXPERTS,
        shared_expert_intermediate_size=40,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "deepseek_v2": dict(**_DEEPSEEK, topk_method="greedy"),
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "dots1": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_layer_start_index": 1,
    },
    "laguna": dict(**_EXPERTS, shared_expert_intermediate_size=20),
    "minimax": {"num_local_experts": 4},
    "nemotron_h": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "layers_block_type": ["attention", "moe"],
        "moe_shared_expert_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
    },
}


def tiny_config(family: str, **more: Any) -> Any:
    """Return a configuration of two blocks and four experts."""
    return AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **more})

"""Sizes of published models, by name. Torch-free."""

from __future__ import annotations

from typing import Any


def _config(model_type: str, sizes: str, **more: Any) -> dict[str, Any]:
    """Return ``hidden intermediate blocks heads kv-heads vocabulary`` under config.json's keys."""
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads "
    keys += "num_key_value_heads vocab_size"
    numbers = dict(zip(keys.split(), map(int, sizes.split()), strict=True))
    return {"model_type": model_type, **numbers, **more}


def _qwen3_moe(sizes: str, width: int) -> dict[str, Any]:
    return _config(
        "qwen3_moe",
        sizes,
        head_dim=128,
        moe_intermediate_size=width,
        num_experts=128,
        num_experts_per_tok=8,
    )


def _gpt_oss(blocks: int, num_experts: int) -> dict[str, Any]:
    return _config(
        "gpt_oss",
        f"2880 2880 {blocks} 64 8 201088",
        head_dim=64,
        num_local_experts=num_experts,
        num_experts_per_tok=4,
        attention_bias=True,
    )


# From each model's published config.json: what its shape depends on.
BUILT_IN = {
    "llama-7b": _config("llama", "4096 11008 32 32 32 32000"),
    "llama-13b": _config("llama", "5120 13824 40 40 40 32000"),
    "llama-30b": _config("llama", "6656 17920 60 52 52 32000"),
    "llama-65b": _config("llama", "8192 22016 80 64 64 32000"),
    "llama-3-8b": _config("llama", "4096 14336 32 32 8 128256"),
    "llama-3-70b": _config("llama", "8192 28672 80 64 8 128256"),
    "llama-3-405b": _config("llama", "16384 53248 126 128 8 128256"),
    "llama-3.2-3b": _config(
        "llama", "3072 8192 28 24 8 128256", head_dim=128, tie_word_embeddings=True
    ),
    "mistral-7b": _config("mistral", "4096 14336 32 32 8 32000"),
    "mixtral-8x7b": _config(
        "mixtral", "4096 14336 32 32 8 32000", num_local_experts=8, num_experts_per_tok=2
    ),
    "mixtral-8x22b": _config(
        "mixtral", "6144 16384 56 48 8 32000", num_local_experts=8, num_experts_per_tok=2
    ),
    "qwen2.5-32b": _config("qwen2", "5120 27648 64 40 8 152064"),
    "qwen2.5-72b": _config("qwen2", "8192 29568 80 64 8 152064"),
    "qwen3-32b": _config("qwen3", "5120 25600 64 64 8 151936", head_dim=128),
    "qwen3-30b-a3b": _qwen3_moe("2048 6144 48 32 4 151936", 768),
    "qwen3-235b-a22b": _qwen3_moe("4096 12288 94 64 4 151936", 1536),
    "qwen3-next-80b": _config(
        "qwen3_next",
        "2048 5120 48 16 2 151936",
        head_dim=256,
        full_attention_interval=4,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        num_experts=512,
        num_experts_per_tok=10,
    ),
    "gemma-2-9b": _config("gemma2", "3584 14336 42 16 8 256000", head_dim=256),
    "gemma-2-27b": _config("gemma2", "4608 36864 46 32 16 256000", head_dim=128),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "glm-4.5-air": _config(
        "glm4_moe",
        "4096 10944 46 96 8 151552",
        head_dim=128,
        attention_bias=True,
        use_qk_norm=False,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        n_routed_experts=128,
        n_shared_experts=1,
        num_experts_per_tok=8,
    ),
    "deepseek-v3": _config(
        "deepseek_v3",
        "7168 18432 61 128 128 129280",
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
    ),
}

# Where their weights are on the hub.
HUB_NAMES = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama-30b": "huggyllama/llama-30b",
    "llama-65b": "huggyllama/llama-65b",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3-405b": "meta-llama/Llama-3.1-405B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-v0.1",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "qwen3-next-80b": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-2-27b": "google/gemma-2-27b",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "glm-4.5-air": "zai-org/GLM-4.5-Air",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
}

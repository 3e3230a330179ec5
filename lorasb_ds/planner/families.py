"""How transformers builds the usual model types, and their config.json. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorasb_ds.errors import ConfigError
from lorasb_ds.planner.model_shape import EAGER_SCORES, SINKS_SCORES, SOFTCAP_SCORES


@dataclass(frozen=True)
class Experts:
    """How a family builds its MoE blocks."""

    width: str = "moe_intermediate_size"
    dense_first: bool = False  # the first first_k_dense_replace blocks; else by decoder_sparse_step
    shared: str = ""  # shared_expert: one with a gate; shared_experts: n_shared_experts of them
    router: str = "gate"
    biased: bool = False  # routers and experts
    own_gate: bool = False


@dataclass(frozen=True)
class Family:
    """How transformers 5 builds the decoder blocks of one model type."""

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    tied: bool = False  # where the file does not say
    head_dim: int = 0  # where the file does not say; 0: hidden_size / num_attention_heads
    bias: str = ""  # projections of attention that have one; with a "?", where attention_bias is on
    head_norms: str = ""  # of queries and keys: "always", or "option": where use_qk_norm is on
    fused: bool = False  # qkv_proj and gate_up_proj
    gated: bool = False  # a gate of attention's output, from q_proj
    latent: bool = False  # DeepSeek's attention
    sinks: bool = False  # gpt-oss's attention
    scores: int = 0  # that attention keeps for a position and a head
    experts: Experts | None = None


_GEMMA2_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
FAMILIES = {
    "llama": Family(bias="qkvo?"),
    "mistral": Family(),
    "mixtral": Family(experts=Experts(width="intermediate_size")),
    "qwen2": Family(bias="qkv"),
    "qwen3": Family(bias="qkvo?", head_norms="always", head_dim=128),
    "qwen3_moe": Family(bias="qkvo?", head_norms="always", experts=Experts()),
    "qwen3_next": Family(
        bias="qkvo?",
        head_norms="always",
        head_dim=256,
        gated=True,
        experts=Experts(shared="shared_expert"),
    ),
    "gemma": Family(bias="qkvo?", tied=True, head_dim=256),
    "gemma2": Family(
        norms=Family.norms + _GEMMA2_NORMS,
        bias="qkvo?",
        tied=True,
        head_dim=256,
        scores=EAGER_SCORES,
    ),
    "phi3": Family(fused=True),
    "gpt_oss": Family(
        bias="qkvo?",
        head_dim=64,
        sinks=True,
        scores=SINKS_SCORES,
        experts=Experts(width="intermediate_size", router="router", biased=True, own_gate=True),
    ),
    "glm4_moe": Family(
        bias="qkv?",
        head_norms="option",
        experts=Experts(dense_first=True, shared="shared_experts"),
    ),
    "deepseek_v3": Family(latent=True, experts=Experts(dense_first=True, shared="shared_experts")),
}


@dataclass(frozen=True)
class ConfigJson:
    """A config.json of one of the families."""

    name: str
    content: Mapping[str, Any]
    family: Family

    def size(self, *keys: str, default: int | None = None) -> int:
        """Return the first of some settings that the file has; else the default.

        Raises:
            ConfigError: if it is no whole number above 0.
        """
        found = [self.content[key] for key in keys if self.content.get(key) is not None]
        value = found[0] if found else default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"--model {self.name}: {keys[0]} in its config.json is {value!r}; it must be a "
                "whole number above 0. Fix the file, or name another model."
            )
        return value

    @property
    def biased(self) -> str:
        """Return the projections of attention that have a bias, by their letters."""
        bias = self.family.bias
        return bias.rstrip("?") if self.content.get("attention_bias") or bias[-1:] != "?" else ""

    @property
    def has_head_norms(self) -> bool:
        option = self.family.head_norms == "option" and bool(self.content.get("use_qk_norm"))
        return option or self.family.head_norms == "always"

    @property
    def hidden(self) -> int:
        return self.size("hidden_size")

    @property
    def heads(self) -> int:
        return self.size("num_attention_heads")

    @property
    def head_dim(self) -> int:
        return self.size("head_dim", default=self.family.head_dim or self.hidden // self.heads)

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.size("num_key_value_heads", default=self.heads) * self.head_dim

    @property
    def scores(self) -> int:
        softcap = self.content.get("attn_logit_softcapping", 50.0)  # only Gemma 2 has it
        capped = self.content["model_type"] == "gemma2" and softcap is not None
        return self.family.scores + (SOFTCAP_SCORES if capped else 0)

    @property
    def latent(self) -> int:
        """Return the width of DeepSeek's low-rank queries, keys and values, together."""
        return self.size("kv_lora_rank") + (self.content.get("q_lora_rank") or 0)

    @property
    def delta(self) -> tuple[int, int, int, int]:
        """Return the numbers of key heads, of a key, of value heads, of a value."""
        sizes = ("num_key_heads", "key_head_dim", "num_value_heads", "value_head_dim")
        key_heads, key_dim, value_heads, value_dim = (self.size(f"linear_{s}") for s in sizes)
        return key_heads, key_dim, value_heads, value_dim

    @property
    def num_experts(self) -> int:
        return self.size("num_experts", "num_local_experts", "n_routed_experts")

    @property
    def width(self) -> int:
        """Return the width of an expert."""
        return self.size(self.family.experts.width) if self.family.experts else 0

    @property
    def shared_width(self) -> int:
        """Return the width of the shared experts of a block, together."""
        shared = self.family.experts.shared if self.family.experts else ""
        if shared == "shared_expert":
            return self.size("shared_expert_intermediate_size")
        return self.size("n_shared_experts") * self.width if shared else 0

    def has_experts(self, block: int) -> bool:
        experts = self.family.experts
        if experts is None or block in (self.content.get("mlp_only_layers") or ()):
            return False
        if experts.dense_first:
            return block >= (self.content.get("first_k_dense_replace") or 0)
        return (block + 1) % self.size("decoder_sparse_step", default=1) == 0

    def is_linear(self, block: int) -> bool:
        """Tell whether attention of a block is the gated delta rule."""
        if self.content.get("model_type") != "qwen3_next":
            return False
        if types := self.content.get("layer_types"):
            return bool(types[block] == "linear_attention")
        return (block + 1) % self.size("full_attention_interval", default=4) != 0

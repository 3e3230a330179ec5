"""Sizes of a model's parameters, from its config.json alone. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorasb_ds.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal language model that a plan depends on."""

    name: str
    layers: Mapping[str, tuple[int, int]]  # linear layers but the head -> (out, in), model's order
    others: Mapping[str, int]  # all other parameters -> elements: embeddings, head, norms, experts
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of all that one token passes at once: experts_per_token of an MoE's
    num_heads: int
    head_dim: int
    num_blocks: int
    normed_width: int  # numbers of a token that one block's norms read, together

    @property
    def num_parameters(self) -> int:
        return sum(out * in_ for out, in_ in self.layers.values()) + sum(self.others.values())


@dataclass(frozen=True)
class _Family:
    """How transformers 5 builds the decoder blocks of one model type."""

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    tied: bool = False  # where the file does not say
    attention_bias: str = "no"  # "qkv", or "option": on all four where attention_bias is true
    query_norm: bool = False  # and of keys, one head's width each
    fused: bool = False  # qkv_proj and gate_up_proj
    experts: bool = False


_GEMMA2_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
FAMILIES = {
    "llama": _Family(attention_bias="option"),
    "mistral": _Family(),
    "mixtral": _Family(experts=True),
    "qwen2": _Family(attention_bias="qkv"),
    "qwen3": _Family(attention_bias="option", query_norm=True),
    "gemma": _Family(attention_bias="option", tied=True),
    "gemma2": _Family(norms=_Family.norms + _GEMMA2_NORMS, attention_bias="option", tied=True),
    "phi3": _Family(fused=True),
}


def shape_from_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """Return the shape of the model that transformers builds from a ``config.json``.

    Raises:
        ConfigError: if the model type is none of ``FAMILIES``, or a size is missing.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"--model {name} is of type {model_type!r}; `lorasb plan` knows {', '.join(FAMILIES)}. "
            "`lorasb train` plans any model, from what transformers builds, before it loads."
        )
    family = FAMILIES[model_type]

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"--model {name}: {key} in its config.json is {value!r}; it must be a whole number "
                "above 0. Fix the file, or name another model."
            )
        return value

    hidden, vocab, blocks = size("hidden_size"), size("vocab_size"), size("num_hidden_layers")
    heads = size("num_attention_heads")
    head_dim = size("head_dim", hidden // heads)
    num_experts = size("num_local_experts") if family.experts else 1
    per_token = size("num_experts_per_tok") if family.experts else 1
    sides = _Sides(
        hidden=hidden,
        intermediate=size("intermediate_size"),
        queries=heads * head_dim,
        keys=size("num_key_value_heads", heads) * head_dim,
        head_dim=head_dim,
        num_experts=num_experts,
    )
    tied = config.get("tie_word_embeddings", family.tied)
    others = {"model.embed_tokens.weight": vocab * hidden, "model.norm.weight": hidden}
    others |= {} if tied else {"lm_head.weight": vocab * hidden}
    layers: dict[str, tuple[int, int]] = {}
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        layers |= {prefix + n: shape for n, shape in _linear(family, sides)}
        others |= {prefix + n: count for n, count in _other(family, sides, config)}
    return ModelShape(
        name=name,
        layers=layers,
        others=others,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=sides.intermediate * per_token,
        num_heads=heads,
        head_dim=head_dim,
        num_blocks=blocks,
        normed_width=len(family.norms) * hidden
        + (sides.queries + sides.keys if family.query_norm else 0),
    )


@dataclass(frozen=True)
class _Sides:
    hidden: int
    intermediate: int
    queries: int
    keys: int
    head_dim: int
    num_experts: int


def _linear(family: _Family, sides: _Sides) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (name, (out, in)) of one block's linear layers, in the model's order."""
    hidden, intermediate = sides.hidden, sides.intermediate
    if family.fused:  # Phi3Attention and Phi3MLP make the outer projection first
        yield "self_attn.o_proj", (hidden, sides.queries)
        yield "self_attn.qkv_proj", (sides.queries + 2 * sides.keys, hidden)
        yield "mlp.gate_up_proj", (2 * intermediate, hidden)
    else:
        yield "self_attn.q_proj", (sides.queries, hidden)
        yield "self_attn.k_proj", (sides.keys, hidden)
        yield "self_attn.v_proj", (sides.keys, hidden)
        yield "self_attn.o_proj", (hidden, sides.queries)
        if family.experts:
            return
        yield "mlp.gate_proj", (intermediate, hidden)
        yield "mlp.up_proj", (intermediate, hidden)
    yield "mlp.down_proj", (hidden, intermediate)


def _other(family: _Family, sides: _Sides, config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (name, elements) of one block's other parameters."""
    for norm in family.norms:
        yield f"{norm}.weight", sides.hidden
    if family.query_norm:
        yield "self_attn.q_norm.weight", sides.head_dim
        yield "self_attn.k_norm.weight", sides.head_dim
    biased = family.attention_bias == "option" and bool(config.get("attention_bias"))
    if biased or family.attention_bias == "qkv":
        yield "self_attn.q_proj.bias", sides.queries
        yield "self_attn.k_proj.bias", sides.keys
        yield "self_attn.v_proj.bias", sides.keys
    if biased:
        yield "self_attn.o_proj.bias", sides.hidden
    if config.get("mlp_bias"):  # Llama's
        yield "mlp.gate_proj.bias", sides.intermediate
        yield "mlp.up_proj.bias", sides.intermediate
        yield "mlp.down_proj.bias", sides.hidden
    if family.experts:
        expert = sides.num_experts * sides.intermediate * sides.hidden
        yield "mlp.experts.gate_up_proj", 2 * expert
        yield "mlp.experts.down_proj", expert
        yield "mlp.gate.weight", sides.num_experts * sides.hidden


def _config(model_type: str, sizes: str, **more: Any) -> dict[str, Any]:
    """Return ``hidden intermediate blocks heads kv-heads vocabulary`` under config.json's keys."""
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads "
    keys += "num_key_value_heads vocab_size"
    numbers = dict(zip(keys.split(), map(int, sizes.split()), strict=True))
    return {"model_type": model_type, **numbers, **more}


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
    "qwen2.5-32b": _config("qwen2", "5120 27648 64 40 8 152064"),
    "qwen2.5-72b": _config("qwen2", "8192 29568 80 64 8 152064"),
    "qwen3-32b": _config("qwen3", "5120 25600 64 64 8 151936", head_dim=128),
    "gemma-2-9b": _config("gemma2", "3584 14336 42 16 8 256000", head_dim=256),
    "gemma-2-27b": _config("gemma2", "4608 36864 46 32 16 256000", head_dim=128),
}

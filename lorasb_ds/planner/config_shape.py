"""The shape of a model from its config.json alone, for the usual model types. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorasb_ds.errors import ConfigError
from lorasb_ds.planner.families import FAMILIES, ConfigJson
from lorasb_ds.planner.model_shape import (
    CASTS_ROUTING,
    GATE_KEPT,
    OWN_GATE_KEPT,
    Block,
    ModelShape,
    delta_attention,
    full_attention,
    latent_attention,
)

# A parameter's name in its block, and its sizes: (experts, out, in) of a projection of experts,
# (out, in) of a linear layer, (elements,) of any other.
Parameter = tuple[str, tuple[int, ...]]


def shape_from_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """Return the shape of the model that transformers builds from a ``config.json``.

    Raises:
        ConfigError: if the model type is none of ``FAMILIES``, or a size is missing.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"--model {name} is of type {model_type!r}; without torch only "
            f"{', '.join(FAMILIES)} are known."
        )
    family = FAMILIES[model_type]
    c = ConfigJson(name, config, family)
    hidden, vocab = c.hidden, c.size("vocab_size")
    tied = config.get("tie_word_embeddings", family.tied)
    others = {"model.embed_tokens.weight": vocab * hidden, "model.norm.weight": hidden}
    others |= {} if tied else {"lm_head.weight": vocab * hidden}
    layers: dict[str, tuple[int, int]] = {}
    experts: dict[str, tuple[int, int, int]] = {}
    num_blocks = c.size("num_hidden_layers")
    for block in range(num_blocks):
        for parameter, sizes in _parameters(c, block):
            full_name = f"model.layers.{block}.{parameter}"
            match sizes:
                case (num_experts, out, in_):
                    experts[full_name] = (num_experts, out, in_)
                case (out, in_):
                    layers[full_name] = (out, in_)
                case (count,):
                    others[full_name] = count
    moe = family.experts
    return ModelShape(
        name=name,
        layers=layers,
        others=others,
        vocab_size=vocab,
        hidden_size=hidden,
        blocks=tuple(_block(c, block) for block in range(num_blocks)),
        experts=experts,
        experts_per_token=c.size("num_experts_per_tok") if moe else 0,
        expert_width=c.width,
        expert_kept=0 if moe is None else OWN_GATE_KEPT if moe.own_gate else GATE_KEPT,
        fp32_routing=moe is not None and model_type not in CASTS_ROUTING,
    )


def _parameters(c: ConfigJson, block: int) -> Iterator[Parameter]:
    """Yield a block's parameters, linear layers in the model's order."""
    if c.is_linear(block):
        yield from _delta_attention(c)
    elif c.family.latent:
        yield from _latent_attention(c)
    else:
        yield from _attention(c)
    if c.has_experts(block):
        yield from _experts(c)
    else:
        yield from _mlp(c, "mlp", c.size("intermediate_size"))
    for norm in c.family.norms:
        yield f"{norm}.weight", (c.hidden,)


def _attention(c: ConfigJson) -> Iterator[Parameter]:
    hidden, queries, keys = c.hidden, c.queries, c.keys
    sides = {"q": (2 if c.family.gated else 1) * queries, "k": keys, "v": keys, "o": hidden}
    if c.family.fused:  # Phi3Attention makes the outer projection first
        yield "self_attn.o_proj", (hidden, queries)
        yield "self_attn.qkv_proj", (queries + 2 * keys, hidden)
    else:
        for letter, out in sides.items():
            yield f"self_attn.{letter}_proj", (out, queries if letter == "o" else hidden)
    if c.has_head_norms:
        yield "self_attn.q_norm.weight", (c.head_dim,)
        yield "self_attn.k_norm.weight", (c.head_dim,)
    for letter in c.biased:
        yield f"self_attn.{letter}_proj.bias", (sides[letter],)
    if c.family.sinks:
        yield "self_attn.sinks", (c.heads,)


def _latent_attention(c: ConfigJson) -> Iterator[Parameter]:
    hidden, heads, kv_rank = c.hidden, c.heads, c.size("kv_lora_rank")
    rope, nope, v = (c.size(f"{part}_head_dim") for part in ("qk_rope", "qk_nope", "v"))
    biased = {"kv_a_proj_with_mqa": kv_rank + rope, "o_proj": hidden}
    if c.content.get("q_lora_rank") is None:
        yield "self_attn.q_proj", (heads * (nope + rope), hidden)
    else:
        q_rank = c.size("q_lora_rank")
        biased["q_a_proj"] = q_rank
        yield "self_attn.q_a_proj", (q_rank, hidden)
        yield "self_attn.q_b_proj", (heads * (nope + rope), q_rank)
        yield "self_attn.q_a_layernorm.weight", (q_rank,)
    yield "self_attn.kv_a_proj_with_mqa", (kv_rank + rope, hidden)
    yield "self_attn.kv_b_proj", (heads * (nope + v), kv_rank)
    yield "self_attn.o_proj", (hidden, heads * v)
    yield "self_attn.kv_a_layernorm.weight", (kv_rank,)
    if c.content.get("attention_bias"):
        for name, out in biased.items():
            yield f"self_attn.{name}.bias", (out,)


def _delta_attention(c: ConfigJson) -> Iterator[Parameter]:
    key_heads, key_dim, value_heads, value_dim = c.delta
    keys, values = key_heads * key_dim, value_heads * value_dim
    convolved = (2 * keys + values) * c.size("linear_conv_kernel_dim")
    yield "linear_attn.in_proj_qkvz", (2 * keys + 2 * values, c.hidden)
    yield "linear_attn.in_proj_ba", (2 * value_heads, c.hidden)
    yield "linear_attn.out_proj", (c.hidden, values)
    yield "linear_attn.conv1d.weight", (convolved,)
    yield "linear_attn.dt_bias", (value_heads,)
    yield "linear_attn.A_log", (value_heads,)
    yield "linear_attn.norm.weight", (value_dim,)


def _mlp(c: ConfigJson, name: str, width: int) -> Iterator[Parameter]:
    if c.family.fused:
        yield f"{name}.gate_up_proj", (2 * width, c.hidden)
    else:
        yield f"{name}.gate_proj", (width, c.hidden)
        yield f"{name}.up_proj", (width, c.hidden)
    yield f"{name}.down_proj", (c.hidden, width)
    if c.content.get("mlp_bias"):  # Llama's
        yield f"{name}.gate_proj.bias", (width,)
        yield f"{name}.up_proj.bias", (width,)
        yield f"{name}.down_proj.bias", (c.hidden,)


def _experts(c: ConfigJson) -> Iterator[Parameter]:
    moe, num_experts, width = c.family.experts, c.num_experts, c.width
    assert moe is not None, "called for blocks with experts"
    yield "mlp.experts.gate_up_proj", (num_experts, 2 * width, c.hidden)
    yield "mlp.experts.down_proj", (num_experts, c.hidden, width)
    yield f"mlp.{moe.router}.weight", (num_experts * c.hidden,)
    if moe.biased:
        yield f"mlp.{moe.router}.bias", (num_experts,)
        yield "mlp.experts.gate_up_proj_bias", (num_experts * 2 * width,)
        yield "mlp.experts.down_proj_bias", (num_experts * c.hidden,)
    if moe.shared:
        yield from _mlp(c, f"mlp.{moe.shared}", c.shared_width)
    if moe.shared == "shared_expert":
        yield "mlp.shared_expert_gate", (1, c.hidden)


def _block(c: ConfigJson, block: int) -> Block:
    """Return what the activations of a block depend on."""
    normed, moe = len(c.family.norms) * c.hidden, c.family.experts
    if c.is_linear(block):
        attention = delta_attention(*c.delta)
    elif c.family.latent:
        nope, rope, v = (c.size(f"{part}_head_dim") for part in ("qk_nope", "qk_rope", "v"))
        attention = latent_attention(c.heads, nope, rope, v, c.latent)
        normed += c.latent
    else:
        attention = full_attention(c.heads, c.head_dim, gated=c.family.gated, scores=c.scores)
        if c.has_head_norms:
            normed += c.queries + c.keys
    if moe is None or not c.has_experts(block):
        return Block(attention, normed, mlp=c.size("intermediate_size"))
    gate = moe.shared == "shared_expert"
    return Block(attention, normed, c.shared_width, c.num_experts, gate)

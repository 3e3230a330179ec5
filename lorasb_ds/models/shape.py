"""The shape of any causal language model that transformers makes, for the planner."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from torch import nn

from lorasb_ds.models.experts import ExpertShapes, experts_modules, projections
from lorasb_ds.models.linear_layers import Shapes, expert_layers, linear_layers
from lorasb_ds.planner.model_shape import (
    CASTS_ROUTING,
    EAGER_SCORES,
    GATE_KEPT,
    OWN_GATE_KEPT,
    SINKS_SCORES,
    SOFTCAP_SCORES,
    Attention,
    Block,
    ModelShape,
    delta_attention,
    full_attention,
    latent_attention,
)

PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


def shape_of(name: str, model: Any) -> ModelShape:
    """Return the shape of a causal language model as transformers makes it.

    Args:
        model: before ``split_experts``; may be on the meta device.
    """
    layers, experts, modules = linear_layers(model), projections(model), experts_modules(model)
    weights = {f"{layer}.weight" for layer in layers} | set(experts)
    # Tied parameters come once.
    others = {n: p.numel() for n, p in model.named_parameters() if n not in weights}
    settings = _Settings(model.config.get_text_config())
    inside = [in_ for name, (_, _, in_) in experts.items() if name.endswith(".down_proj")]
    own_gate = any(_has_own_gate(module) for module in modules.values())
    return ModelShape(
        name=name,
        layers=layers,
        others=others,
        vocab_size=settings.config.vocab_size,
        hidden_size=settings.config.hidden_size,
        blocks=_blocks(model, settings, layers, experts),
        experts=experts,
        experts_per_token=_experts_per_token(model, settings) if experts else 0,
        expert_width=max(inside, default=0),
        expert_kept=0 if not experts else OWN_GATE_KEPT if own_gate else GATE_KEPT,
        fp32_routing=bool(experts) and settings.config.model_type not in CASTS_ROUTING,
        num_unreached=sum(other_experts(model).values()),
    )


def other_experts(model: nn.Module) -> dict[str, int]:
    """Return the modules with 3-D parameters that transformers' registry does not compute.

    Returns:
        Name -> number of elements.
    """
    known = experts_modules(model)
    return {name: n for name, n in expert_layers(model).items() if name not in known}


class _Settings:
    """A configuration's settings, under the names that models have for them."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def size(self, *keys: str, default: int) -> int:
        """Return the first of some settings that is there and not 0; else the usual value.

        Of a setting that differs by layer the largest value is returned.
        """
        found = (max(self._integers(key), default=0) for key in keys)
        return next((n for n in found if n), default)

    def _integers(self, key: str) -> list[int]:
        try:
            found = getattr(self.config, key, None)
        except RuntimeError:  # transformers' own: the layers have one each (Gemma 4)
            found = [getattr(of_layer, key, None) for of_layer in self.config.per_layer_config]
        values = found if isinstance(found, list | tuple) else [found]
        return [value for value in values if isinstance(value, int)]


def _experts_per_token(model: nn.Module, settings: _Settings) -> int:
    """Return the experts of a token, by the configuration or else by a router's ``top_k``."""
    routed = (getattr(module, "top_k", None) for module in model.modules())
    of_module = next((k for k in routed if isinstance(k, int)), 1)
    return settings.size(*PER_TOKEN, default=of_module)


def _has_own_gate(module: Any) -> bool:
    # transformers' decorator gives the other classes a function of its own file.
    gate = type(module)._apply_gate
    return bool(module.has_gate) and gate.__module__ == type(module).__module__


def _blocks(
    model: Any, settings: _Settings, layers: Shapes, experts: ExpertShapes
) -> tuple[Block, ...]:
    """Return the decoder blocks, those that the configuration counts."""
    count = settings.size("num_hidden_layers", default=1)
    prefixes = Counter(m[1] for n in [*layers, *experts] if (m := re.match(r"(.*?\.)\d+\.", n)))
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    parts: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, parameter in model.named_parameters():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdigit() and int(number) < count:
            parts[int(number)][rest] = parameter.shape
    numbers = {n.removeprefix(prefix).partition(".")[0]: sides[0] for n, sides in experts.items()}
    eager = model.config._attn_implementation == "eager"
    return tuple(
        _block(settings, part, numbers.get(str(block), 0), bool(experts), eager)
        for block, part in enumerate(parts)
    )


def _block(
    settings: _Settings, part: dict[str, Any], num_experts: int, is_moe: bool, eager: bool
) -> Block:
    """Return what the activations of a block depend on.

    Args:
        part: name in the block -> shape, of every parameter.
        num_experts: of the block.
        is_moe: whether any block of the model has experts.
        eager: whether attention keeps its scores.
    """
    config, size = settings.config, settings.size
    hidden = config.hidden_size
    heads = size("num_attention_heads", default=1)
    head_dim = size("head_dim", default=hidden // heads)
    kv_heads = size("num_key_value_heads", default=heads)
    widths = {"q_norm": heads * head_dim, "k_norm": kv_heads * head_dim}
    ends = {name.removesuffix(".weight").rpartition(".")[2]: s for name, s in part.items()}
    normed = 0
    for name, shape in part.items():
        norm = name.removesuffix(".weight").rpartition(".")[2]
        if "norm" in norm and name.endswith(".weight") and "linear_attn" not in name:
            normed += widths.get(norm, shape.numel())
    attention: Attention
    scores = 0
    if eager:
        scores = SINKS_SCORES if "sinks" in ends else EAGER_SCORES
        scores += SOFTCAP_SCORES if getattr(config, "attn_logit_softcapping", None) else 0
    if "linear_attn.conv1d.weight" in part:
        attention = delta_attention(
            config.linear_num_key_heads,
            config.linear_key_head_dim,
            config.linear_num_value_heads,
            config.linear_value_head_dim,
        )
    elif "kv_b_proj" in ends and "kv_a_layernorm" in ends:
        latent = ends["kv_b_proj"][1] + (ends["q_b_proj"][1] if "q_b_proj" in ends else 0)
        dims = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)
        attention = latent_attention(heads, *dims, latent, scores)
    else:
        gated = "q_proj" in ends and ends["q_proj"][0] == 2 * heads * head_dim
        attention = full_attention(heads, head_dim, gated=gated, scores=scores)
    mlp = _mlp_width(settings, part, is_moe)
    return Block(attention, normed, mlp, num_experts, "shared_expert_gate" in ends)


def _mlp_width(settings: _Settings, part: dict[str, Any], is_moe: bool) -> int:
    """Return the width of a block's MLPs, beside experts.

    In families of the registry it is the width of their down projections. In all others it is the
    configuration's, times the experts of a token.
    """
    if is_moe:
        downs = (".down_proj.weight", ".output_linear.weight")
        return sum(s[1] for name, s in part.items() if name.endswith(downs) and len(s) == 2)
    usual = 4 * settings.config.hidden_size
    per_token = settings.size(*PER_TOKEN, default=1)
    keys = ("moe_intermediate_size", "intermediate_size") if per_token > 1 else ()
    return settings.size(*keys, "intermediate_size", default=usual) * per_token

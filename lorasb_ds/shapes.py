"""The sizes of a model's parameters, from what transformers builds."""

from __future__ import annotations

from typing import Any

from lorasb_ds.planner.model_shape import ModelShape
from lorasb_ds.targets import linear_layers


def shape_of(name: str, model: Any) -> ModelShape:
    """The shape of any causal language model as transformers built it."""
    layers = linear_layers(model)
    weights = {f"{layer}.weight" for layer in layers}
    # Tied parameters come once.
    others = {n: p.numel() for n, p in model.named_parameters() if n not in weights}
    config = model.config.get_text_config()

    def size(*keys: str, default: int) -> int:
        """What some model types' configurations say, and others leave to what is usual."""
        return next((n for key in keys if (n := getattr(config, key, None))), default)

    blocks = size("num_hidden_layers", default=1)
    heads = size("num_attention_heads", default=1)
    head_dim = size("head_dim", default=config.hidden_size // heads)
    kv_heads = size("num_key_value_heads", default=heads)
    per_token = size("num_experts_per_tok", default=1)
    widths = {"q_norm": heads * head_dim, "k_norm": kv_heads * head_dim}
    norms = [n.split(".")[-2] for n in others if "norm" in n and n.endswith(".weight")]
    normed = sum(widths.get(norm, config.hidden_size) for norm in norms[:-1])
    return ModelShape(
        name=name,
        layers=layers,
        others=others,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=size("intermediate_size", default=4 * config.hidden_size) * per_token,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_blocks=blocks,
        normed_width=normed // blocks,  # the model's last norm is in no block
        num_experts=size("num_local_experts", "num_experts", default=1),
        experts_per_token=per_token,
    )

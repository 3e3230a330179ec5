"""Sizes of a model, as far as its memory and its messages depend on them. Torch-free.

`config_shape.shape_from_config` reads them from a config.json; `models/shape.py` takes them from
any model that transformers makes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Attention:
    """Numbers of one token that attention keeps for its backward pass.

    Attributes:
        kept: in the compute dtype.
        fp32: in fp32.
        inputs: those of its linear layers, other than the block's hidden states.
        scores: for every position of the row, in the compute dtype; 0 where scores are not kept.
        more_scores: as many more are there in the backward pass.
    """

    kept: int
    fp32: int
    inputs: int
    scores: int = 0
    more_scores: int = 0


@dataclass(frozen=True)
class Block:
    """Numbers of one token in a decoder block.

    Attributes:
        attention: what attention keeps.
        normed: read by the block's norms, together.
        mlp: the width of the MLPs that every token passes, together: a dense one, shared experts.
        num_experts: 0 in a block without experts.
        shared_gate: whether the shared experts' output has a gate of its own.
    """

    attention: Attention
    normed: int
    mlp: int
    num_experts: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal language model that a plan depends on.

    Experts are those that transformers computes by its registry (``models/experts.py``); of other
    families they are in ``others``.

    Attributes:
        layers: linear layers but the head -> (out, in), in the model's order.
        experts: projections of MoE experts, as transformers names their parameters
            (``model.layers.0.mlp.experts.gate_up_proj``) -> (experts, out, in), for y = W x.
        others: all other parameters -> elements: embeddings, head, norms, routers.
        blocks: the decoder blocks, in order.
        experts_per_token: in a block with experts; 0 without.
        expert_width: numbers of a token in one expert, between its projections.
        expert_kept: times ``expert_width``: what a token's gate in one expert keeps.
        fp32_routing: whether the router's weights, and so the products with them, are fp32.
        num_unreached: elements of experts in ``others``.
    """

    name: str
    layers: Mapping[str, tuple[int, int]]
    others: Mapping[str, int]
    vocab_size: int
    hidden_size: int
    blocks: tuple[Block, ...]
    experts: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    experts_per_token: int = 0
    expert_width: int = 0
    expert_kept: int = 0
    fp32_routing: bool = False
    num_unreached: int = 0

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def num_in_experts(self) -> int:
        """Return the number of elements in experts, those in ``others`` included."""
        return sum(n * out * in_ for n, out, in_ in self.experts.values()) + self.num_unreached

    @property
    def num_parameters(self) -> int:
        linear = sum(out * in_ for out, in_ in self.layers.values())
        experts = sum(n * out * in_ for n, out, in_ in self.experts.values())
        return linear + experts + sum(self.others.values())


# Times the width of an expert: gate and up, and the activation of the gate; and for a gate of the
# model's own (gpt-oss's), both of them clamped, the sigmoid and its product, too.
GATE_KEPT, OWN_GATE_KEPT = 3, 6
# Their routers cast the weights to the dtype of the hidden states; those of most others do not.
CASTS_ROUTING = {
    *("ernie4_5_moe", "gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared", "laguna"),
    *("olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next"),
}
# Numbers that attention keeps for a position and a head where torch's scaled_dot_product_attention
# is not used: transformers takes the softmax in fp32, and casts it; gpt-oss's sinks, in the compute
# dtype; and Gemma 2's soft cap of the scores keeps its tanh.
EAGER_SCORES, SINKS_SCORES, SOFTCAP_SCORES = 3, 1, 1
DELTA_CHUNK = 64  # tokens that transformers' gated delta rule takes at a time


def full_attention(
    heads: int,
    head_dim: int,
    *,
    gated: bool = False,
    scores: int = 0,
) -> Attention:
    """Return what softmax attention keeps.

    These are queries, keys and values for all heads (keys and values are repeated where there is a
    padding mask), and the output, which is the outer projection's input, with its logarithms.

    Args:
        gated: whether the output has a gate of its own width.
        scores: numbers kept for each position and head, in the place of the output, where torch's
            ``scaled_dot_product_attention`` is not used.
    """
    width = heads * head_dim
    return Attention(
        kept=(3 if scores else 4) * width + (2 * width if gated else 0),
        fp32=0 if scores else heads,
        inputs=width if scores or gated else 0,
        scores=scores * heads,
        more_scores=min(3, scores + 1) * heads if scores else 0,
    )


def latent_attention(
    heads: int, nope_dim: int, rope_dim: int, value_dim: int, latent: int, scores: int = 0
) -> Attention:
    """Return what DeepSeek's attention keeps (arXiv 2405.04434, section 2.1).

    As ``full_attention``, but values are made in one tensor with the part of keys that is not
    rotated, and keep it; and the output is copied for the outer projection.

    Args:
        latent: the width of low-rank queries, keys and values, together.
    """
    keys, values = heads * (nope_dim + rope_dim), heads * value_dim
    return Attention(
        kept=2 * keys + heads * nope_dim + (1 if scores else 2) * values,
        fp32=0 if scores else heads,
        inputs=latent + values,
        scores=scores * heads,
        more_scores=min(3, scores + 1) * heads if scores else 0,
    )


def delta_attention(key_heads: int, key_dim: int, value_heads: int, value_dim: int) -> Attention:
    """Return what the gated delta rule keeps (Qwen3-Next, arXiv 2412.06464).

    As transformers computes it in torch, in fp32; kernels of flash-linear-attention keep less.
    """
    keys, values = value_heads * key_dim, value_heads * value_dim  # keys are repeated
    convolved = 2 * key_heads * key_dim + values
    states = keys * value_dim // DELTA_CHUNK
    return Attention(
        kept=2 * convolved + values,
        fp32=5 * DELTA_CHUNK * value_heads + 8 * keys + 6 * values + states,
        inputs=values,
    )


def shape_as_json(shape: ModelShape) -> str:
    """Return a shape as text for ``shape_from_json``."""
    return json.dumps(asdict(shape))


def shape_from_json(text: str) -> ModelShape:
    """Return the shape that ``shape_as_json`` has written."""
    found = json.loads(text)
    for key in ("layers", "experts"):
        found[key] = {name: tuple(sides) for name, sides in found[key].items()}
    found["blocks"] = tuple(
        Block(**block | {"attention": Attention(**block["attention"])}) for block in found["blocks"]
    )
    return ModelShape(**found)

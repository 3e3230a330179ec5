"""Which models compute rows in pieces (``--sequence-parallel``): by their files, and by a trial."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist

from lorasb_ds.data.batch import collate
from lorasb_ds.data.tokenization import Example
from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.collectives import rank_and_size
from lorasb_ds.distributed.sequence_parallel import whole_rows
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.loss import eval_mode

PIECE_TOKENS = 8
# Shares of the effect of the other pieces: convolutions, which see few tokens of them, have 0.003;
# kernels of other shapes round less in fp32, and by so many roundings in 16 bits.
TOLERANCE, ROUNDINGS = 1e-3, 12
# Kinds of layers that see windows of a row, and the fields that say how long.
WINDOWED = {"sliding_attention", "chunked_attention"}
WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "local_attention")
# Fields of attention to the tokens of a row that an index finds.
INDEXED = ("index_topk", "index_topk_blocks")
# Their rotary embeddings depend on the largest position, which in a piece is not the row's.
LENGTH_DEPENDENT = {"dynamic", "longrope"}


def check_shareable(model: Any, size: int, longest: int) -> None:
    """Refuse a model whose attention DeepSpeed's Ulysses does not compute. Not collective.

    Args:
        model: may be empty.
        size: number of ranks that compute a row together.
        longest: tokens of the longest row.
    Raises:
        ConfigError: why, and what to do.
    """
    option, config = f"--sequence-parallel {size}", model.config.get_text_config()
    name, implementation = type(model).__name__, model.config._attn_implementation
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise ConfigError(f"{option}: a {name} takes no position ids. Leave the option out.")
    if implementation != "sdpa" and "flash" not in str(implementation):
        raise ConfigError(
            f"{option} drops masks, without which only sdpa and flash_attention_2 are causal; this "
            f"{name} has {implementation}. Give --attn-implementation sdpa."
        )
    others = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", *WINDOWED}
    if others or any(getattr(config, field, None) for field in INDEXED):
        others = others or {"indexed_attention"}
        raise ConfigError(
            f"{option}: a {name} has layers of {' and '.join(sorted(others))}, which need whole "
            "rows. Leave the option out."
        )
    if longest > (window := _window(config)):
        raise ConfigError(
            f"{option}: layers of this {name} see {window} tokens, by masks that DeepSpeed drops, "
            f"and rows have up to {longest}. Give --max-length {window}, or leave the option out."
        )
    if longest > (original := _constant_until(config)):
        raise ConfigError(
            f"{option}: the rotary embedding of this {name} changes in rows of more than "
            f"{original} tokens, but a piece does not show how long its row is (up to {longest}). "
            f"Give --max-length {original}, or leave the option out."
        )
    heads = getattr(config, "num_attention_heads", size)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % size or (kv_heads % size and size % kv_heads):
        raise ConfigError(
            f"{option} gives each process its share of a {name}'s {heads} attention heads and "
            f"{kv_heads} key-value heads. Give a divisor of {heads} that divides {kv_heads}, or is "
            "divisible by it."
        )


def _window(config: Any) -> float:
    """Return the fewest tokens that a layer sees; infinity if all see whole rows."""
    if not {*(getattr(config, "layer_types", None) or WINDOWED)} & WINDOWED:
        return torch.inf
    found = [getattr(config, name, None) for name in WINDOWS]
    return min((length for length in found if length), default=torch.inf)


def _constant_until(config: Any) -> float:
    """Return up to which length of rows rotary embeddings are the same."""
    rope = getattr(config, "rope_parameters", None) or {}
    of_layers = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    default = getattr(config, "max_position_embeddings", 0)
    return min(
        (
            of.get("original_max_position_embeddings") or default
            for of in of_layers
            if of.get("rope_type") in LENGTH_DEPENDENT
        ),
        default=torch.inf,
    )


@torch.no_grad()
def check_pieces(model: Any, input_ids: torch.Tensor, size: int) -> None:
    """Refuse a model that computes something else in pieces than in whole rows. Collective.

    Three passes over a few tokens, after ``share_rows``: in pieces; whole, on each rank; and of
    each piece alone, which shows what it is to miss the others.

    Args:
        input_ids: (1, length), some tokens; the same on every rank.
        size: number of ranks that compute a row together.
    Raises:
        ConfigError: on every rank.
    """
    length = size * PIECE_TOKENS
    tokens = input_ids.flatten().tolist() * length
    row = collate([Example(tokens[:length], tokens[:length])], 0)
    index = rank_and_size(None)[0] % size
    piece = row.piece(index, size).to(accelerator.device())
    reason = ""
    with eval_mode(model):
        with whole_rows():
            whole = _logits(model, row.to(accelerator.device()))
            whole = whole[:, index * PIECE_TOKENS : (index + 1) * PIECE_TOKENS]
            alone = _logits(model, piece)
        try:
            shared = _logits(model, piece)
        except (AssertionError, TypeError, ValueError) as found:  # of shapes: on all ranks alike
            shared, reason = alone, f" DeepSpeed says: {found}"
    squares = torch.stack([(of - whole).square().sum() for of in (shared, alone)])
    dist.all_reduce(squares)
    error, effect = squares.sqrt().tolist()
    tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(model.dtype).eps)
    if reason or not error <= tolerance * effect:
        raise ConfigError(
            f"--sequence-parallel {size}: a {type(model).__name__} with attention "
            f"{model.config._attn_implementation} computes something else in pieces of rows than "
            f"in whole rows.{reason} Leave it out."
        )


def _logits(model: Any, batch: Any) -> torch.Tensor:
    return model(**batch.inputs, use_cache=False).logits.double()

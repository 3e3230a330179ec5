"""The tables in which a model looks up ids and positions, and whether rows stay within them.

Beyond a table's end a CPU raises an IndexError, and a GPU a device-side assert that names no row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from lorasb_ds.data.dataset import TokenizedRows
from lorasb_ds.errors import ConfigError

# wpe (GPT-2), embed_positions (OPT, GPT-J), position_embeddings (BERT), pos_encoding (CTRL), …
POSITION_TABLE = re.compile(r"wpe|(?:.*_)?pos(?:itions?)?(?:_.*)?")


@dataclass(frozen=True)
class Tables:
    """How far a model's tables go.

    Attributes:
        num_embeddings: ids from there on have no embedding. Tokenizers may have fewer.
        num_positions: tokens of the longest row; None without a table, as in rotary models.
        made_for: tokens of the longest row by config.json, which rotary models may exceed.
    """

    num_embeddings: int
    num_positions: int | None
    made_for: int | None


def tables_of(model: Any) -> Tables:
    """Return the sizes of a model's tables.

    Args:
        model: of transformers; its parameters may be on the meta device.
    """
    config = model.config.get_text_config()
    made_for = getattr(config, "max_position_embeddings", None)
    made_for = made_for if isinstance(made_for, int) and made_for > 0 else None
    found = [rows for rows in _position_tables(model, made_for) if rows is not None]
    if hasattr(model.base_model, "build_mpt_alibi_tensor"):  # ALiBi's, for so many positions
        found.append(config.max_seq_len)
    num_positions = min(found, default=None)
    return Tables(model.get_input_embeddings().num_embeddings, num_positions, made_for)


def _position_tables(model: nn.Module, made_for: int | None) -> list[int]:
    """Return the positions that each table has, of those that config.json speaks of.

    Others with such names may be a vision model's.
    """
    sizes = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and POSITION_TABLE.fullmatch(name.rpartition(".")[2]):
            # OPT's relatives leave out two positions, RoBERTa's those up to the padding token's.
            after_padding = 0 if module.padding_idx is None else module.padding_idx + 1
            first = getattr(module, "offset", after_padding)
            if made_for in (module.num_embeddings, module.num_embeddings - first):
                sizes.append(module.num_embeddings - first)
    for name, buffer in model.named_buffers():
        if buffer.dim() == 2 and POSITION_TABLE.fullmatch(name.rpartition(".")[2]):
            sizes += [len(buffer)] if len(buffer) == made_for else []
    return sizes


def largest_ids(rows: TokenizedRows) -> np.ndarray:
    """Return the largest id of every example, (examples,), int64. Reads all ids."""
    largest = []
    for chunk in rows.table.data.column("input_ids").chunks:
        offsets = chunk.offsets.to_numpy()
        ids = chunk.values.to_numpy()[: offsets[-1]]
        has_ids = np.diff(offsets) > 0  # rows that were skipped have none
        found = np.zeros(len(has_ids), np.int64)
        if has_ids.any():
            found[has_ids] = np.maximum.reduceat(ids, offsets[:-1][has_ids])
        largest.append(found)
    return np.concatenate(largest)[rows.index]


def check_ids(
    model: str,
    tokenizer: Any,
    tables: Tables,
    largest: Callable[[], Sequence[int] | np.ndarray],
    name_of: Callable[[int], str],
) -> None:
    """Refuse rows with ids beyond the embedding.

    Args:
        model: ``--model``, for messages.
        largest: returns every row's largest id. It is called only if the tokenizer has such ids.
        name_of: names the row at a position.
    Raises:
        ConfigError: naming the largest id, its row, and how many rows have such ids.
    """
    if max(tokenizer.get_vocab().values(), default=-1) < tables.num_embeddings:
        return
    ids = np.asarray(largest())
    count = int((ids >= tables.num_embeddings).sum())
    if count:
        row = int(ids.argmax())
        token = tokenizer.convert_ids_to_tokens(int(ids[row]))
        raise ConfigError(
            f"{name_of(row)} has the token {token!r} of id {ids[row]}, but the embedding of "
            f"--model {model} ends at id {tables.num_embeddings - 1}; {count} of {len(ids)} rows "
            "have such ids. The tokenizer is another model's, or has tokens that were added "
            "without embeddings: put the model's own tokenizer files into its folder, or leave "
            "out such rows."
        )


def check_lengths(
    model: str,
    tables: Tables,
    lengths: Sequence[int] | np.ndarray,
    name_of: Callable[[int], str],
    remedy: str,
) -> str | None:
    """Refuse rows that are longer than a table of positions.

    Args:
        model: ``--model``, for messages.
        lengths: tokens of every row, with its answer if it is still to be generated.
        name_of: names the row at a position.
    Returns:
        A warning if there is no table, and rows are longer than what the model was made for.
    Raises:
        ConfigError: naming the longest row, and how many are too long.
    """
    lengths = np.asarray(lengths)
    limit = tables.made_for if tables.num_positions is None else tables.num_positions
    if limit is None or not len(lengths) or lengths.max() <= limit:
        return None
    row, count = int(lengths.argmax()), int((lengths > limit).sum())
    what = f"{name_of(row)} may need {lengths[row]} tokens"
    if tables.num_positions is None:
        return (
            f"warning: {count} of {len(lengths)} rows are longer than the {limit} tokens that "
            f"--model {model} was made for (max_position_embeddings): {what}. {remedy}"
        )
    raise ConfigError(
        f"{what}, and --model {model} has {limit} positions; {count} of {len(lengths)} rows are "
        f"too long. {remedy}"
    )

"""Compare all rows of a run with the tables of its base."""

from __future__ import annotations

from functools import partial

import numpy as np

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.dataset import TokenizedRows
from lorasb_ds.data.run_rows import Data
from lorasb_ds.models.base import Base
from lorasb_ds.models.tables import check_ids, check_lengths, largest_ids, tables_of

SAMPLE_TOKENS = 128  # in an answer of --generate-samples, at most


def check_tables(config: RunConfig, base: Base, data: Data) -> list[str]:
    """Return warnings of rows that are longer than what the model was made for.

    Raises:
        ConfigError: if an id or a position of a row is beyond one of the model's tables.
    """
    tables = tables_of(base.model)
    sources = {"training row": data.train, "held-out row": data.held_out}
    if data.init is not data.train:
        sources["row for the init"] = data.init
    notes = []
    for what, rows in sources.items():
        if rows is None:
            continue

        def name_of(i: int, rows: TokenizedRows = rows, what: str = what) -> str:
            return f"{what} {rows.row_id(i)}"

        check_ids(config.model, base.tokenizer, tables, partial(largest_ids, rows), name_of)
        remedy = f"Lower --max-length (now {config.max_length})."
        notes += [check_lengths(config.model, tables, rows.lengths, name_of, remedy)]
    if data.held_out is not None and config.generate_samples and tables.num_positions is not None:
        samples = data.held_out.select(range(len(data.held_out.index))[: config.generate_samples])
        check_lengths(
            config.model,
            tables,
            np.maximum(samples.first_labels, 1) + SAMPLE_TOKENS,
            lambda i: f"--generate-samples: {samples.row_id(i)}",
            f"An answer may have {SAMPLE_TOKENS} tokens: leave out --generate-samples.",
        )
    return [note for note in notes if note is not None]

"""The rows of a run: those to train on, those held out, and those of the init's sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from lorasb_ds.config.data_options import DataOptions
from lorasb_ds.data.cache import tokenize_sources
from lorasb_ds.data.classification import Classes, check_labels, find_classes
from lorasb_ds.data.dataset import TokenizedRows
from lorasb_ds.errors import ConfigError


class Data(NamedTuple):
    """The rows of a run."""

    train: TokenizedRows
    held_out: TokenizedRows | None
    init: TokenizedRows  # for the init's sample: --init-data's, or the training rows
    notes: list[str]  # for the user

    @property
    def classes(self) -> Classes | None:
        """What the labels of all rows are; None: tokens are learned."""
        return self.train.classes

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(int(rows.lengths.max()) for rows in self[:3] if rows is not None)

    def classified(self) -> Data:
        """Return the same rows with the classes of those of --data.

        Raises:
            ConfigError: if these have one class only, or other rows have other ones.
        """
        everything = replace(self.train, index=np.arange(len(self.train.table)))  # held out, too
        classes = find_classes(everything)
        train, held_out, init = replace(self.train, classes=classes), self.held_out, self.init
        if held_out is not None:
            check_labels(held_out, classes, "--eval-data")
            held_out = replace(held_out, classes=classes)
        if init is self.train:
            init = train
        else:
            check_labels(init, classes, "--init-data")
            init = replace(init, classes=classes)
        return Data(train, held_out, init, [*self.notes, classes.describe()])


def load_data(options: DataOptions, tokenizer: Any) -> Data:
    """Load and tokenize all rows of a run.

    Raises:
        ConfigError: if rows cannot be read, or none are left, or too many are skipped; or if labels
            are of one class, or held-out rows have other classes.
    """
    train, notes = tokenize_sources(options.data, tokenizer, options)
    held_out = None
    if options.eval_data is not None:
        held_out, more = tokenize_sources(
            (options.eval_data,), tokenizer, options, "--eval-data", held_out=True
        )
        notes = [*notes, *(note for note in more if note not in notes)]
    elif options.val_set_size is not None:
        parts = split_rows(len(train.examples), options.val_set_size, options.seed)
        notes.append(
            f"rows: {train.describe()}; {len(parts[1])} of them held out (--val-set-size "
            f"{options.val_set_size:g})"
        )
        train, held_out = (train.select(part) for part in parts)
    init = train
    if options.init_data is not None:
        init, more = tokenize_sources(options.init_data, tokenizer, options, "--init-data")
        if options.val_set_size is not None and held_out is not None:
            init = _exclude_held_out(init, held_out, options)
        notes = [*notes, *(note for note in more if note not in notes)]
    data = Data(train, held_out, init, notes)
    return data.classified() if options.classifies else data


def _exclude_held_out(
    init: TokenizedRows, held_out: TokenizedRows, options: DataOptions
) -> TokenizedRows:
    """Remove held-out rows from those of the init: --init-data may name --data's sources.

    Raises:
        ConfigError: if none are left.
    """
    left = np.flatnonzero(~np.isin(init.row_digests, held_out.row_digests))
    if not len(left):
        raise ConfigError(
            f"--init-data {', '.join(options.init_data or ())}: all of its rows are held out by "
            f"--val-set-size {options.val_set_size:g}. Lower it, or name other rows."
        )
    return init if len(left) == len(init.examples) else init.select(left)


def split_rows(num_rows: int, val_set_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows by the seed into those to train on and those to hold out, each ascending.

    Args:
        val_set_size: a fraction of the rows if below 1, but at least one row; else their number.
    Raises:
        ConfigError: if no row would be left to train on.
    """
    wanted = round(num_rows * val_set_size) if val_set_size < 1 else int(val_set_size)
    num_held_out = max(1, wanted)
    if num_held_out >= num_rows:
        raise ConfigError(
            f"--val-set-size {val_set_size:g} would hold out {num_held_out} of {num_rows} rows, "
            "and leave none to train on. Lower it."
        )
    # Another generator than that of an epoch's order, whose first rows would be those held out.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + 999_983)
    order = torch.randperm(num_rows, generator=generator).numpy()
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])

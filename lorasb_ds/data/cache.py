"""Tokenize sources of rows once on each host, and keep them for the next run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from lorasb_ds.config.data_options import DataOptions
from lorasb_ds.config.paths import cache_dir
from lorasb_ds.data.dataset import (
    COLUMNS,
    TokenizedRows,
    check_tokenizer,
    features,
    outcomes_of,
    tokenize_columns,
)
from lorasb_ds.data.notes import notes_on, of_source
from lorasb_ds.data.outcomes import Outcomes, too_many_skipped
from lorasb_ds.data.sources import load_rows, source_fingerprint
from lorasb_ds.data.template import date_in, stand_in
from lorasb_ds.system.files import file_digest, fsync, publish, write_json

FORMAT = 5  # version of the tables: raise it when the same rows would give other tables
META = "lorasb.json"  # beside the table: its key, digests and counts
BATCH_TOKENS = 1 << 20  # tokens of a batch whose rows are as long as --max-length allows
WORTH_SAYING_S = 5.0
LONGEST_WAIT_S = 12 * 3600.0  # for another process that tokenizes
WORTH_A_WORKER_S = 10.0  # a worker takes seconds to start


def tokenize_sources(
    sources: Sequence[str],
    tokenizer: Any,
    options: DataOptions,
    option: str = "--data",
    held_out: bool = False,
    *,
    refuse: bool = True,
) -> tuple[TokenizedRows, list[str]]:
    """Tokenize sources one after the other, or read them from the cache; memory-mapped.

    Args:
        held_out: take the held-out split of a source with several; see ``load_rows``.
        refuse: raise if more rows of a source are skipped than --max-skipped-rows allows; else that
            is a note.
    Returns:
        The rows, and notes for the user.
    Raises:
        ConfigError: if a source cannot be read, or no row of it is left, or too many are skipped.
    """
    import datasets

    check_tokenizer(tokenizer, options)
    fingerprint = _tokenizer_fingerprint(tokenizer)
    tables, notes = [], []
    counts: Counter[str] = Counter()
    forms: Counter[str] = Counter()
    for source in sources:
        rows = load_rows(source, option, held_out=held_out)
        key = _key(source_fingerprint(source, rows), fingerprint, options)
        table, meta, note = _cached(key, rows, tokenizer, options, f"{option} {source}")
        found = Outcomes(Counter(meta["counts"]), Counter(meta["forms"]), meta["first"])
        if error := too_many_skipped(found, rows, options, f"{option} {source}"):
            if refuse:
                raise error
            notes.append(f"`lorasb train` would refuse these rows: {error}")
        tables.append(table)
        counts += found.counts
        forms += found.forms
        notes += [note] if note is not None and note not in notes else []
        notes += [said for said in of_source(source, meta["notes"]) if said not in notes]
    ends = np.cumsum([len(table) for table in tables]).tolist()
    table = datasets.concatenate_datasets(tables)
    index = np.arange(len(table), dtype=np.int64)
    return TokenizedRows(table, index, counts, forms, tuple(zip(sources, ends, strict=True))), notes


def _key(source: str, tokenizer: str, options: DataOptions) -> str:
    """Return the cache's key of a table: equal for equal tables.

    Args:
        source, tokenizer: their fingerprints.
    """
    names = ("task_type", "prompt_column", "response_column", "max_length", "loss_on", "truncation")
    parts = [FORMAT, source, tokenizer, {name: getattr(options, name) for name in names}]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a digest of everything that decides which tokens a conversation becomes."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend |= {"padding": None, "truncation": None}  # of the last call
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = tokenizer.chat_template or stand_in(tokenizer)
    parts = [type(tokenizer).__name__, backend, template, special, date_in(tokenizer)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _cached(
    key: str, rows: Sequence[Any], tokenizer: Any, options: DataOptions, option: str
) -> tuple[Any, dict[str, Any], str | None]:
    """Return the table of a key, its metadata, and a note. One process of a host makes the table.

    A table that is torn, or not ours, is made again. If the cache cannot be written, each process
    makes its own, in a temporary folder.
    """
    folder = cache_dir() / "tokenized" / key
    # Without the lock: it may be another user's, whose tables can be read all the same.
    if (found := _read(folder, key)) is not None:
        return *found, None
    make = partial(_make, key=key, rows=rows, tokenizer=tokenizer, options=options, option=option)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if (found := _read(folder, key)) is None:
                make(folder)
                found = _read(folder, key)
        assert found is not None
        return *found, None
    except OSError as error:
        why = f"cannot be written ({error.strerror or error})"
        if isinstance(error, Timeout):
            why = f"is locked by a process that has not tokenized these rows ({error.lock_file})"
        with tempfile.TemporaryDirectory() as temporary:
            make(Path(temporary) / key)
            found = _read(Path(temporary) / key, key)
        # Memory-mapped: it exists as long as this process.
        assert found is not None
        return *found, (
            f"the cache {folder.parent} {why}: every "
            "process tokenizes all rows itself. LORASB_CACHE names another folder"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock; say so where it is waited for.

    Raises:
        filelock.Timeout: an OSError, after ``LONGEST_WAIT_S``. The holder may have been suspended.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=WORTH_SAYING_S)
    except Timeout:
        print(
            f"lorasb: waiting for {path}: another process tokenizes the same rows. After "
            f"{LONGEST_WAIT_S / 3600:g} hours this one does it itself",
            flush=True,
        )
        lock.acquire(timeout=LONGEST_WAIT_S)
    try:
        yield
    finally:
        lock.release()


def _read(folder: Path, key: str) -> tuple[Any, dict[str, Any]] | None:
    """Return a table and its metadata; None if it is not whole."""
    import datasets

    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        table = datasets.load_from_disk(str(folder))
        whole = meta["key"] == key and meta["digests"] == _digests(folder)
        if whole and len(table) == meta["counts"]["kept"] and set(table.features) == set(COLUMNS):
            return table, meta
    except Exception:
        return None  # datasets and pyarrow raise a dozen types; the table is made again
    return None


def _digests(folder: Path) -> dict[str, str]:
    """Return digests of a table's files, which find damage."""
    return {f.name: file_digest(f) for f in sorted(folder.iterdir()) if f.name != META}


def _make(
    folder: Path,
    *,
    key: str,
    rows: Sequence[Any],
    tokenizer: Any,
    options: DataOptions,
    option: str,
) -> None:
    """Tokenize all rows into a table on disk: those that are kept, and the counts of all."""
    aside = folder.with_suffix(".tmp")
    for old in (aside, folder):
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    aside.mkdir()
    try:
        made = _tokenize(aside / "all.arrow", key, rows, tokenizer, options, option)
        kept, found = outcomes_of(made)
        # Too many that are skipped are no reason to tokenize again: that is checked afterwards.
        if not len(kept) and (error := too_many_skipped(found, rows, options, option)):
            raise error
        table = aside / "table"
        made.select(kept).save_to_disk(table)
        meta = {"key": key, "digests": _digests(table), **vars(found)}
        write_json(table / META, meta | {"notes": notes_on(made, kept)})
        for file in table.iterdir():
            fsync(file)
        publish(table, folder)
    finally:
        shutil.rmtree(aside)


def _tokenize(
    file: Path, key: str, rows: Sequence[Any], tokenizer: Any, options: DataOptions, option: str
) -> Any:
    """Tokenize all rows, in order, into a table that is memory-mapped from ``file``."""
    import datasets

    num_proc = _num_proc(rows, tokenizer, options, option)
    batch_size = max(1, min(1000, BATCH_TOKENS // options.max_length))
    return datasets.Dataset.from_dict({"row": np.arange(len(rows))}).map(
        partial(_batch, rows=rows, tokenizer=tokenizer, options=options),
        batched=True,
        batch_size=batch_size,
        writer_batch_size=batch_size,
        features=features(),
        num_proc=num_proc if num_proc > 1 else None,
        cache_file_name=str(file),
        load_from_cache_file=False,
        new_fingerprint=key[:32],  # datasets adds to it, and takes 64 characters
        desc="Tokenizing",
    )


def _batch(
    batch: dict[str, list[int]], *, rows: Sequence[Any], tokenizer: Any, options: DataOptions
) -> dict[str, list[Any]]:
    return tokenize_columns(rows, batch["row"], tokenizer, options)


def _num_proc(rows: Sequence[Any], tokenizer: Any, options: DataOptions, option: str) -> int:
    """Return how many processes to start, judged by the time that some of the rows take."""
    some = range(0, len(rows), max(1, len(rows) // 100))
    tokenize_columns(rows, some[:1], tokenizer, options)  # the first row compiles the template
    start = time.perf_counter()
    tokenize_columns(rows, some, tokenizer, options)
    seconds = (time.perf_counter() - start) / len(some) * len(rows)
    cores = len(os.sched_getaffinity(0))
    by_work = max(1, min(cores, int(seconds / WORTH_A_WORKER_S)))
    num_proc = min(options.dataset_num_proc or by_work, len(rows))
    if seconds / num_proc > WORTH_SAYING_S:
        print(
            f"tokenizing {len(rows):,} rows of {option} in {num_proc} process(es): about "
            f"{seconds / num_proc:.0f} s, once; the result is kept in {cache_dir() / 'tokenized'}",
            flush=True,
        )
    return num_proc

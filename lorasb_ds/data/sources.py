"""Read rows of files, saved folders, the hub and reasoning-gym."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from lorasb_ds.config.data_options import REASONING_GYM
from lorasb_ds.config.paths import expand_home
from lorasb_ds.data.file_rows import FileRows
from lorasb_ds.data.json_rows import JsonRows
from lorasb_ds.data.tables import CsvRows, ParquetRows, saved_tables
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.files import file_digest

FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")
HELD_OUT_SPLITS = ("test", "validation", "valid", "dev")


def load_rows(source: str, option: str = "--data", *, held_out: bool = False) -> Sequence[Any]:
    """Load the rows of a file, a saved folder, a reasoning-gym task or a hub data set.

    A hub data set is named ``NAME``, ``NAME:CONFIG``, ``NAME@SPLIT`` or ``NAME:CONFIG@SPLIT``.
    The default split is train, or with ``held_out`` the first of ``HELD_OUT_SPLITS`` that exists.
    A split may be a slice in the syntax of ``datasets``: ``NAME@train[:50000]``,
    ``NAME@train[:5%]``.

    Args:
        option: the option that named the source, for messages.
    Returns:
        Rows, each read when it is accessed; None in the place of one that is not JSON.
    Raises:
        ConfigError: if the source cannot be read or has no rows.
    """
    try:
        if source.startswith(REASONING_GYM):
            rows: Sequence[Any] = reasoning_gym_dataset(source, option)
        else:
            rows = _load(source, option, held_out)
        if len(rows) > 0:
            return rows
    except ValueError as error:
        raise ConfigError(f"{option} {source}: {error}. Fix the file.") from None
    raise ConfigError(f"{option} {source} has no rows. Give data with at least one row.")


def source_path(source: str) -> Path:
    """Return the path that a source may be: as it is written, but for a home directory's ~."""
    return Path(expand_home(source))


def names_a_path(source: str) -> bool:
    """Return whether a source that does not exist can only mean a file or folder."""
    return Path(source).suffix.lower() in FILE_TYPES or source.startswith((".", "/", "~"))


def _load(source: str, option: str, held_out: bool) -> Sequence[Any]:
    path = source_path(source)
    splits = HELD_OUT_SPLITS if held_out else ("train",)
    try:
        if path.is_file():
            suffix = path.suffix.lower()
            if suffix not in FILE_TYPES:
                raise ConfigError(
                    f"{option} {source}: unknown file type {path.suffix!r}. Known: "
                    f"{', '.join(FILE_TYPES)}."
                )
            if suffix == ".csv":
                return CsvRows(path)
            if suffix == ".parquet":
                return ParquetRows(path) if path.stat().st_size else []
            return JsonRows(path)
        if path.is_dir():
            return _one_split(saved_tables(path), splits, source, option)
        if names_a_path(source):
            raise ConfigError(f"{option} {source}: there is no such file.")
        hub = re.fullmatch(r"([^:@]+)(?::([^@]+))?(?:@(.+))?", source)
        if hub is None:
            raise ConfigError(f"{option} {source}: a hub data set is named NAME[:CONFIG][@SPLIT].")
        name, configuration, split = hub.groups()
        if Path(name).is_dir():
            # `datasets` would read its files, and keep the rows by their path and time.
            raise ConfigError(
                f"{option} {source}: {name} is a folder here, and not a data set of the hub. Name "
                "a file in it, or a folder saved by `datasets`."
            )
        import datasets  # takes seconds, which files do not need

        if split is not None and split.endswith("]"):
            return datasets.load_dataset(name, configuration, split=split)
        loaded = datasets.load_dataset(name, configuration)
        return _one_split(loaded, (split,) if split else splits, source, option)
    except ConfigError:
        raise
    except Exception as error:
        # datasets raises some twenty types here, from parse errors to the hub client's.
        reason = _root_cause(error)
        raise ConfigError(
            f"{option} {source} cannot be read as "
            f"{'a file' if path.is_file() else 'a saved folder' if path.is_dir() else 'a hub name'}"
            f": {reason} Give a {'/'.join(FILE_TYPES)} file, a folder saved by `datasets`, a hub "
            "name (needs a network or a filled cache), or 'reasoning-gym:NAME?size=N&seed=S'."
        ) from error


def _one_split(loaded: Any, wanted: tuple[str, ...], source: str, option: str) -> Sequence[Any]:
    if not isinstance(loaded, Mapping):
        return loaded
    found = next((name for name in wanted if name in loaded), None)
    if found is None:
        raise ConfigError(
            f"{option} {source}: no split {' or '.join(wanted)}; it has {', '.join(loaded)}."
        )
    return loaded[found]


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300].rstrip(".") + "."


def reasoning_gym_dataset(source: str, option: str = "--data") -> Any:
    """Create the task ``reasoning-gym:NAME?size=N&seed=S``, which also scores answers.

    Other parameters of the address go to the task's configuration, numbers as numbers.
    """
    try:
        with warnings.catch_warnings():
            # Of its dependencies' code, when Python compiles it for the first time.
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ConfigError(
            f"{option} {source} needs the package reasoning-gym: pip install 'lorasb-ds[demo]'."
        ) from None
    name, _, query = source.removeprefix(REASONING_GYM).partition("?")
    if name not in DATASETS:
        raise ConfigError(
            f"{option} {source}: reasoning-gym has no task {name!r}. It has: "
            f"{', '.join(sorted(DATASETS))}."
        )
    parameters = {key: _number(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    try:
        return reasoning_gym.create_dataset(name, **{"size": 1000, "seed": 0, **parameters})
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"{option} {source}: {error}. The address is reasoning-gym:NAME?size=N&seed=S, with "
            f"further parameters of the task {name}."
        ) from None


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def source_fingerprint(source: str, rows: Any) -> str:
    """Return a text that is equal for sources with equal rows, on any host.

    It has the digest of the content of a file or a saved folder, the fingerprint that ``datasets``
    gives a table of the hub, or a task's address.
    """
    if source.startswith(REASONING_GYM):
        import reasoning_gym

        # Some tasks depend on Python's hash seed.
        seed = os.environ.get("PYTHONHASHSEED", "random")
        return f"{source} {reasoning_gym.__version__} {seed}"
    if isinstance(rows, FileRows):
        # Of the bytes that rows are read from: another file may be at the path by now.
        return f"{rows.path.suffix.lower()} {rows.digest}"
    if source_path(source).is_dir():
        files = [file_digest(Path(file["filename"])) for file in rows.cache_files]
        return f"saved {' '.join(files)}"
    return f"table {rows._fingerprint}"

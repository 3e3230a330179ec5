"""The files of a base: where they are and which tensors they hold. Torch-free."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasb_ds.config.paths import DEMO_MODEL, demo_model_dir, expand_home, read_json
from lorasb_ds.errors import ConfigError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Files that a base needs beside its weights, which a repository may also hold in other formats.
DOWNLOADED = ("*.json", "*.jinja", "*.model", "*.txt")
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
ITEM_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_DIMENSIONS = 16
LONGEST_LINE = 300  # of another library, in a message


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a checkpoint is stored."""

    file: Path
    dtype: str  # as safetensors names it: BF16, F32, U8, …
    shape: tuple[int, ...]
    begin: int  # in bytes, from the beginning of the file
    end: int


def model_path(model: str) -> str:
    """Resolve ``--model`` to the demo's folder, a folder, or a hub name.

    Raises:
        ConfigError: if a folder is named that does not exist or holds no model.
    """
    if model == DEMO_MODEL:
        folder = demo_model_dir()
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"--model demo: {folder} does not hold the demo model. Fetch it by "
                "the repository's scripts/setup.sh, or name a model of your own."
            )
        return str(folder)
    folder = Path(expand_home(model))
    if not folder.exists():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise ConfigError(
                f"--model {model}: there is no such folder. Give a folder with config.json and "
                "*.safetensors, or a hub name such as mistralai/Mistral-7B-v0.1."
            )
        return model
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model {model}: the folder has no config.json, so it is no model.")
    return str(folder)


def model_type_of(model: str | None) -> str | None:
    """Read model_type from a base's config.json, in its folder or the hub's cache.

    Returns:
        None if there is no such file, or it has none; the hub is not asked.
    """
    if model is None:
        return None
    try:
        path = model_path(model)
        file: Any = Path(path) / "config.json"
        if not file.is_file():
            from huggingface_hub import try_to_load_from_cache

            file = try_to_load_from_cache(path, "config.json")  # does not ask the hub
        if not isinstance(file, str | Path):  # None, or a mark that the hub has none
            return None
        found = read_json(str(file), "--model").get("model_type")
    except (ConfigError, OSError, RuntimeError, ValueError):  # also of names that are none
        return None
    return found if isinstance(found, str) else None


def model_folder(model: str, trust_remote_code: bool = False) -> Path:
    """Return the folder with a base's files; a hub name's are downloaded if not in the cache.

    Args:
        trust_remote_code: whether Python files are downloaded, too.
    Raises:
        ConfigError: if it cannot be fetched.
    """
    path = model_path(model)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [*DOWNLOADED, *(["*.py"] if trust_remote_code else [])]
    try:
        folder = Path(snapshot_download(path, allow_patterns=patterns))
        weights = [WEIGHTS]
        if (folder / INDEX).is_file():
            weights += sorted(set(_weight_map(folder, model).values()))
        return Path(snapshot_download(path, allow_patterns=weights))
    except (OSError, HFValidationError) as error:  # all of the hub's errors are one of these
        if getattr(error, "errno", None) == errno.ENOSPC:
            remedy = "The disk is full: free some of it, or name another one by HF_HOME."
        else:
            remedy = (
                "It must be a folder with a model, or the name of one on the hub (which needs a "
                "network or a filled cache; a gated one needs `hf auth login`)."
            )
        raise ConfigError(
            f"--model {model} cannot be fetched: {first_line(error)} {remedy}"
        ) from error


def stored_tensors(model: str, folder: Path) -> dict[str, StoredTensor]:
    """Read every tensor's place in a base's checkpoint, from the files' headers alone.

    Args:
        model: as --model gives it, for messages.
        folder: of ``model_folder``.
    Raises:
        ConfigError: naming the file, and the tensor if there is one, if the files are not complete
            or not safetensors.
    """
    index_file = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS, f"--model {model}")
    if not index_file.is_file():
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        legacy = sorted(file.name for file in folder.glob("*.bin"))
        found = ", ".join(others) or "none"
        if legacy:
            found = f"only {', '.join(legacy)}, which are pickles and can run code"
        elif not others and is_hub_name(model):
            found = "none (pickles, which can run code, are not fetched)"
        raise ConfigError(
            f"--model {model}: the weights must be {WEIGHTS}, or several files with {INDEX}; "
            f"{folder} has {found}. Convert them by save_pretrained of a trusted copy."
        )
    index = _weight_map(folder, model)
    found_tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(index.values())):
        names = [name for name, where in index.items() if where == file]
        path = folder / file
        if not _is_file(path):
            raise ConfigError(
                f"--model {model}: {file} is missing, which {INDEX} names for {len(names)} "
                f"tensors such as {names[0]}. Fetch the file again."
            )
        # A tensor may be in two files; the index says which is meant.
        header = read_header(path, f"--model {model}")
        found_tensors |= {n: t for n, t in header.items() if index.get(n, file) == file}
        if lost := [name for name in names if name not in header]:
            raise ConfigError(
                f"--model {model}: {INDEX} names {len(lost)} tensors that are not in {file}, "
                f"such as {lost[0]}. Fetch both files again."
            )
    return found_tensors


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, for one
        return False


def is_hub_name(model: str) -> bool:
    """Return whether --model names a repository on the hub, and no folder."""
    return not Path(model_path(model)).is_dir()


def _weight_map(folder: Path, model: str) -> dict[str, str]:
    """Read the index: tensor -> file, in the folder or below."""
    index = read_json(str(folder / INDEX), "--model").get("weight_map")
    if (
        not isinstance(index, dict)
        or not index
        or not all(isinstance(f, str) and ".." not in Path(f).parts for f in index.values())
        or any(Path(f).is_absolute() for f in index.values())
    ):
        raise ConfigError(
            f"--model {model}: {INDEX} has no weight_map of files. Fetch the file again."
        )
    return index


def read_header(path: Path, option: str) -> dict[str, StoredTensor]:
    """Read the tensors of a safetensors file: https://huggingface.co/docs/safetensors (format).

    The header is not trusted: every tensor returned is inside the file, and none overlap.

    Args:
        option: the option that named the file, for messages.
    Raises:
        ConfigError: if the file is not complete, or not safetensors.
    """
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= file_size - 8:
                raise ValueError("it ends within its header")
            if length > HEADER_BYTES:
                raise ValueError(f"its header has {length:,} bytes; {HEADER_BYTES:,} are allowed")
            header = json.loads(file.read(length))
        tensors = {
            name: _stored_tensor(path, name, entry, 8 + length)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end, before = 8 + length, "the header"
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if tensor.begin < end:
                raise ValueError(f"{name} overlaps {before}")
            end, before = tensor.end, name
        if end > file_size:
            raise ValueError(
                f"it ends at byte {file_size:,}, within {before}, which ends at {end:,}"
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{option}: {path.name} is no whole safetensors file: {first_line(error)} "
            "Fetch it again."
        ) from error
    return tensors


def _stored_tensor(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """Check one entry of a header.

    Args:
        data: where the tensors begin, in bytes from the beginning of the file.
    Raises:
        KeyError, TypeError, ValueError: if the entry is not one.
    """
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, begin, end)
    if not isinstance(dtype, str) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name} has dtype {dtype!r} and {len(shape)} dimensions")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers) or end < begin:
        raise ValueError(f"the shape or the offsets of {name} are not valid")
    if dtype in ITEM_BYTES and end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(
            f"it has {end - begin:,} bytes for {name}, which is {dtype} of shape {shape}"
        )
    return StoredTensor(path, dtype, shape, data + begin, data + end)


def weights_digest(folder: Path, stored: Mapping[str, StoredTensor]) -> str:
    """Identify the weights in a folder by a SHA-256 of samples.

    It is of config.json and, for every file, its name, its header, and 4 KiB from the beginning,
    middle and end of every tensor. Training, merging or quantizing changes those; an edit of a few
    rows may not.

    Args:
        stored: of ``stored_tensors``, in its order.
    """
    result = hashlib.sha256((folder / "config.json").read_bytes())
    by_file: dict[Path, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        by_file.setdefault(tensor.file, {})[name] = tensor
    for path, tensors in sorted(by_file.items()):
        result.update(path.name.encode())
        _digest(path, tensors, result)
    return result.hexdigest()


def _digest(path: Path, tensors: Mapping[str, StoredTensor], result: hashlib._Hash) -> None:
    sample = 4096
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            result.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            middle = (tensor.begin + tensor.end) // 2
            for start in (tensor.begin, middle, max(tensor.begin, tensor.end - sample)):
                file.seek(start)
                result.update(file.read(min(sample, tensor.end - start)))


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, short, without its advice."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return textwrap.shorten(text, LONGEST_LINE, placeholder=" …").rstrip(".") + "."

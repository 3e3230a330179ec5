"""The folder of an unfinished merge: lock, finished files, and the files beside the weights."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasb_ds.errors import ConfigError
from lorasb_ds.export.merge_file import FileJob, Written
from lorasb_ds.models.checkpoint_files import DOWNLOADED, INDEX, WEIGHTS, read_header
from lorasb_ds.system.files import SUMS_FILE, file_digest, fsync, publish, write_json, write_text

RECORD, LOCK = "merge.json", "merge.lock"
# Copied from the base's folder: what a model needs beside its weights, and what must accompany it.
COPIED = (*DOWNLOADED, "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*")
# Not copied: indices of other weights, adapters and an earlier merge's record would be wrong there.
LEFT = ("*.index.json", "adapter_*", RECORD, "config.json", "README*")


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Lock the folder against other merges.

    Raises:
        ConfigError: if another merge is writing there, or the folder is not a merge's.
    """
    there = {path.name for path in partial.iterdir()} if partial.is_dir() else set()
    if there and not there & {LOCK, RECORD}:
        raise ConfigError(
            f"--out: {partial}, where an unfinished merge is kept, holds something else. Move it "
            "away, or give another name."
        )
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = (partial / LOCK).open("w")
    except OSError as error:
        raise ConfigError(f"--out: {partial} cannot be written: {error.strerror}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--out: another merge is writing into {partial}. Wait for it, or end it."
            ) from None
        yield


def foreign_to_merge(folder: Path) -> list[str]:
    """Return the names in a folder that no merge has written there."""
    there = sorted(name_in(path, folder) for path in folder.rglob("*") if path.is_file())
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    own = {line[66:] for line in lines}  # behind the digest and two spaces
    if RECORD not in own or RECORD not in there:
        return there or ["folders"]
    return [name for name in there if name not in {*own, SUMS_FILE, LOCK}]


def finished_files(
    partial: Path, record: Mapping[str, Any], jobs: Sequence[FileJob]
) -> dict[str, Written]:
    """Return the files that an earlier merge with the same ``made_of`` has finished."""
    try:
        found = json.loads((partial / RECORD).read_text())
        files = {name: Written(**entry) for name, entry in found.pop("files").items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    if found.get("made_of") != record["made_of"]:
        return {}
    names = {name_in(job.target, partial) for job in jobs} & files.keys()
    sizes = {name: _size(partial / name) for name in names}
    return {name: files[name] for name in names if sizes[name] == files[name].num_bytes}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def name_in(path: Path, partial: Path) -> str:
    """Return a file's name in the record: its path relative to the folder."""
    return str(path.relative_to(partial))


def remove_unfinished(partial: Path, finished: Mapping[str, Any]) -> None:
    """Remove all files that are not finished."""
    kept = {*finished, LOCK, *([RECORD] if finished else [])}
    for path in [p for p in partial.rglob("*") if not p.is_dir()]:
        if name_in(path, partial) not in kept:
            path.unlink()


def copy_rest(base: Path, partial: Path, changed: Mapping[str, Any] | None) -> None:
    """Copy configuration, tokenizer, templates and licences, without syncing them to disk.

    Args:
        changed: fields to set in config.json, or to leave out (None); None: copy it unchanged.
    """
    config = base / "config.json"
    if changed is None:
        shutil.copyfile(config, partial / config.name)
    else:
        content = json.loads(config.read_text()) | dict(changed)
        kept = {n: v for n, v in content.items() if v is not None or n not in changed}
        write_json(partial / config.name, kept)
    code = ["*.py"] if json.loads(config.read_text()).get("auto_map") else []
    for path in {path for pattern in (*COPIED, *code) for path in base.glob(pattern)}:
        if path.is_file() and not any(path.match(pattern) for pattern in LEFT):
            target = partial / path.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def write_index(base: Path, partial: Path, jobs: Sequence[FileJob], rewritten: bool) -> None:
    """Copy the base's index, or write one of the ``rewritten`` files. A single file has none."""
    if [job.source.name for job in jobs] == [WEIGHTS]:
        return
    if not rewritten:
        shutil.copyfile(base / INDEX, partial / INDEX)
        return
    index = json.loads((base / INDEX).read_text())
    weight_map, total = {}, 0
    for job in jobs:
        for key, tensor in read_header(job.target, str(job.target)).items():
            weight_map[key] = name_in(job.target, partial)
            total += tensor.end - tensor.begin
    metadata = (index.get("metadata") or {}) | {"total_size": total}
    write_json(partial / INDEX, index | {"metadata": metadata, "weight_map": weight_map})


def write_all_sums(partial: Path, finished: Mapping[str, Written]) -> None:
    """Sync all files to disk, and write their ``SHA256SUMS``."""
    lines = []
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        name = name_in(path, partial)
        if name in (LOCK, SUMS_FILE):
            continue
        if name not in finished:
            fsync(path)
        digest = finished[name].sha256 if name in finished else file_digest(path)
        lines.append(f"{digest}  {name}\n")
    write_text(partial / SUMS_FILE, "".join(lines))


def put_in_place(partial: Path, out: Path) -> None:
    """Rename ``partial`` to ``out``; what is there is set aside first and removed afterwards."""
    aside = out.with_name(out.name + ".lorasb-replaced")
    if out.is_dir() and any(out.iterdir()):
        if aside.exists():  # left by a merge that was killed between the lines below
            shutil.rmtree(aside)
        out.replace(aside)
    publish(partial, out)
    (out / LOCK).unlink()  # only now: another merge that began in ``partial`` would find it free
    if aside.exists():
        shutil.rmtree(aside)

"""Write ``W0 + scale · B R A`` as a model's folder, file by file: no model is ever in memory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lorasb_ds.config.overwriting import check_replaceable
from lorasb_ds.config.paths import expand_home
from lorasb_ds.config.stored_paths import with_absolute_paths
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.adapter_reader import trained_on
from lorasb_ds.export.chat_format import template_to_add
from lorasb_ds.export.merge_file import (
    FileJob,
    Written,
    finish_file,
    merge_file,
    size_bound,
    use_threads,
    write_aside,
)
from lorasb_ds.export.merge_folder import (
    RECORD,
    copy_rest,
    finished_files,
    foreign_to_merge,
    locked,
    name_in,
    put_in_place,
    remove_unfinished,
    write_all_sums,
    write_index,
)
from lorasb_ds.export.merge_plan import base_of, plan_merge
from lorasb_ds.export.stored_adapter import StoredAdapter
from lorasb_ds.models.base import Base
from lorasb_ds.models.tokenizer_files import CHAT_TEMPLATE
from lorasb_ds.system.files import file_digest, write_json, write_text
from lorasb_ds.system.units import GIB


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote.

    Attributes:
        files: number of weight files.
        bytes: of these files together.
        resumed_files: those of them that an earlier attempt had finished.
    """

    files: int
    merged_layers: int
    bytes: int
    seconds: float
    resumed_files: int


def merge_adapter(
    adapter: StoredAdapter,
    model: str,
    out: Path,
    *,
    load_in_4bit: bool = False,
    num_procs: int = 1,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> MergeResult:
    """Write a base with an adapter in its weights, as a folder like the base's.

    Files are written into ``OUT.partial`` beside ``out``, which becomes ``out`` when it is
    complete; a second call continues with the files that a killed one has finished. ``merge.json``
    in it says what was merged, and stays.

    Args:
        model: the base: a folder or hub name. The weights' dtypes are kept; those in FP8 or MXFP4
            are written in bf16.
        load_in_4bit: write all linear layers but the head in NF4 with double quantization.
        num_procs: processes, each of which merges one file at a time.
        overwrite: replace ``out``, which must be that of an earlier merge, when the new one is
            complete.
        say: called with each message to the user.
    Raises:
        ConfigError: before anything is written, if base, adapter and ``out`` do not match or the
            disk is too small; later if it fills up or a merged number is not finite.
    """
    start = time.perf_counter()
    base, out = base_of(adapter, model, trust_remote_code), Path(expand_home(str(out))).resolve()
    _check_out(out, base.folder, adapter.path, overwrite)
    partial = out.with_name(out.name + ".partial")
    jobs, config = plan_merge(adapter, base, partial, load_in_4bit)
    record = _record(adapter, base, load_in_4bit)
    if trained_on(adapter) not in (None, record["made_of"]["base"]):
        say(
            f"warning: --model {model} has other files than the base that the run was trained on: "
            "another copy or revision, or another model of the same shape."
        )
    bounds = {job: size_bound(job) for job in jobs}
    _check_disk(partial, bounds, finished_files(partial, record, jobs))
    with locked(partial):
        finished = finished_files(partial, record, jobs)
        remove_unfinished(partial, finished)
        resumed = len(finished)
        if resumed:
            say(f"{resumed} of {len(jobs)} files are there from an earlier attempt.")
        left = [job for job in jobs if name_in(job.target, partial) not in finished]
        left.sort(key=lambda job: -bounds[job])
        for job, written in _written(left, num_procs):
            name = name_in(job.target, partial)
            finished[name] = written
            files = {name: asdict(finished[name]) for name in sorted(finished)}
            write_json(partial / RECORD, record | {"files": files})
            say(f"{name}: {len(job.updates)} layers ({len(finished)} of {len(jobs)} files)")
        try:
            copy_rest(base.folder, partial, config)
            template = None if adapter.head else template_to_add(adapter, base)
            if template is not None:
                write_text(partial / CHAT_TEMPLATE, template)
            rewritten = load_in_4bit or base.encoding is not None or bool(adapter.head)
            write_index(base.folder, partial, jobs, rewritten)
            write_all_sums(partial, finished)
            put_in_place(partial, out)
        except OSError as error:
            raise ConfigError(
                f"--out {out} cannot be written: {error}. The finished files are in {partial}: the "
                "same command continues from there."
            ) from error
    return MergeResult(
        files=len(finished),
        merged_layers=len(adapter.layers),
        bytes=sum(written.num_bytes for written in finished.values()),
        seconds=time.perf_counter() - start,
        resumed_files=resumed,
    )


def _check_out(out: Path, base: Path, adapter: Path, overwrite: bool) -> None:
    for what, folder in (("the base's", base.resolve()), ("the adapter's", adapter.resolve())):
        if out.is_relative_to(folder) or folder.is_relative_to(out):
            raise ConfigError(
                f"--out {out} and {what} folder {folder} are the same, or one contains the other. "
                "Name another folder."
            )
    if out.is_dir() and Path.cwd().is_relative_to(out):
        raise ConfigError(f"--out {out} holds this shell. Name another folder.")
    kind = "the folder of a model that lorasb has merged"
    check_replaceable("--out", out, overwrite, foreign_to_merge, kind)


def _record(adapter: StoredAdapter, base: Base, load_in_4bit: bool) -> dict[str, Any]:
    """Describe what is merged; merges with the same ``made_of`` write the same files."""
    files = sorted({tensor.file for tensor in adapter.stored.values()})
    made_of = {
        "base": base.digest,
        "adapter": {file.name: file_digest(file) for file in files},
        "scales": {name: factors.scale for name, factors in sorted(adapter.layers.items())},
        "load_in_4bit": load_in_4bit,
    }
    base_name = with_absolute_paths({"model": base.name})["model"]
    return {"base": base_name, "adapter": str(adapter.path), "made_of": made_of}


def _check_disk(partial: Path, bounds: Mapping[FileJob, int], finished: Mapping[str, Any]) -> None:
    needed = sum(n for job, n in bounds.items() if name_in(job.target, partial) not in finished)
    stale = [p for p in partial.rglob("*") if p.is_file() and name_in(p, partial) not in finished]
    parent = next(folder for folder in (partial, *partial.parents) if folder.is_dir())
    free = shutil.disk_usage(parent).free + sum(path.stat().st_size for path in stale)
    if needed > free:
        raise ConfigError(
            f"--out {partial.with_suffix('')}: {needed / GIB:.2f} GiB must still be written, and "
            f"{parent} has {free / GIB:.2f} GiB left. Free some, or name a folder on another disk."
        )


def _written(jobs: Sequence[FileJob], num_procs: int) -> Iterator[tuple[FileJob, Written]]:
    """Merge the files and yield them in the order in which they are finished."""
    if num_procs == 1 or len(jobs) < 2:
        with _threads(max(1, _num_cores() - 1)):
            yield from _written_here(jobs)
        return
    count = min(num_procs, len(jobs))
    threads = max(1, _num_cores() // count)
    with ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=use_threads, initargs=(threads,)
    ) as processes:
        futures = {processes.submit(merge_file, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                f"One of the {count} processes was killed (out of memory?). Give a smaller "
                "--num-procs; what is finished is kept."
            ) from error
        finally:
            processes.shutdown(cancel_futures=True)


def _written_here(jobs: Sequence[FileJob]) -> Iterator[tuple[FileJob, Written]]:
    """Merge the files in this process; each is hashed and synced while the next is written."""
    with ThreadPoolExecutor(1) as behind:
        waiting: list[tuple[FileJob, Future[Written]]] = []
        for job in jobs:
            aside = write_aside(job)
            while waiting:
                before, future = waiting.pop()
                yield before, future.result()
            waiting.append((job, behind.submit(finish_file, job, aside)))
        for job, future in waiting:
            yield job, future.result()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Limit torch's threads, which spin while they wait, so that a core is left for digests."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""One file of a base with updates of low rank added, written in memory for a few rows of it.

This is what a merge's processes import: torch, and nothing that takes more memory than it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasb_ds.errors import ConfigError
from lorasb_ds.models.checkpoint_files import ITEM_BYTES, StoredTensor, read_header
from lorasb_ds.planner.placement import bytes_4bit
from lorasb_ds.system.files import file_digest, publish
from lorasb_ds.system.safetensors_writer import (
    ALIGNMENT,
    TensorWriter,
    bytes_of,
    fill,
    header_of,
    metadata_of,
)

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in FLOATS.items()} | {torch.uint8: "U8"}
CHUNK_BYTES = 4 << 20  # that are copied at a time
CHUNK = 1 << 18  # elements that are merged at a time: they stay in a cache
# The parts of a 4-bit weight beside its codes: how many, and at most so many bytes of those whose
# size does not depend on the weight's (maps of 16 and 256 numbers, a JSON of its shape).
NUM_PARTS, PARTS_BYTES = 6, 4 * (16 + 256) + 1024


@dataclass(frozen=True)
class Update:
    """``W += scale · B R A``, by where the factors are stored; without R, ``scale · B A``.

    Attributes:
        transposed: whether W is stored as (in, out).
    """

    A: StoredTensor
    B: StoredTensor
    R: StoredTensor | None
    scale: float
    transposed: bool

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """L and R of ``L R``, as W is stored; fp32."""
        A, B = _read_fp32(self.A), _read_fp32(self.B)
        if self.R is not None:
            B = B @ _read_fp32(self.R)
        if self.scale != 1:
            B = B * self.scale
        return (A.T.contiguous(), B.T.contiguous()) if self.transposed else (B, A)


@dataclass(frozen=True, eq=False)
class FileJob:
    """What one file of a base becomes.

    Attributes:
        target: where it goes; complete or not there.
        updates: by the stored name of the weight.
        quantized: stored names of weights to be written in 4 bits.
    """

    source: Path
    target: Path
    updates: Mapping[str, Update]
    quantized: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Written:
    sha256: str
    num_bytes: int


def merge_file(job: FileJob) -> Written:
    """Write a file, and give it its name when it is on the disk.

    Raises:
        ConfigError: naming the file, and the tensor if there is one, where it cannot be read or
            written, or a merged number is not finite.
    """
    return finish_file(job, write_aside(job))


def write_aside(job: FileJob) -> Path:
    """Write a file under another name; not yet through to the disk. Raises as ``merge_file``."""
    aside = job.target.with_name(job.target.name + ".tmp")
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        _write(job, aside)
    except OSError as error:
        raise _disk_error(job, error) from error
    return aside


def finish_file(job: FileJob, aside: Path) -> Written:
    """What is left to do. Raises as ``merge_file``."""
    try:
        digest = file_digest(aside)
        publish(aside, job.target)
        return Written(digest, job.target.stat().st_size)
    except OSError as error:
        raise _disk_error(job, error) from error


def use_threads(count: int) -> None:
    """How a process of several begins: with its share of the cores, and with its parent's life."""
    import multiprocessing
    from threading import Thread

    torch.set_num_threads(count)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        # It would else go on writing beside the merge that resumes a killed one.
        parent.join()
        os._exit(1)

    Thread(target=end_with_parent, daemon=True).start()


def size_bound(job: FileJob) -> int:
    """Bytes of the file that is written, at most."""
    return sum(_bounds(job, read_header(job.source, str(job.source)), metadata_of(job.source)))


def _write(job: FileJob, aside: Path) -> None:
    tensors, metadata = read_header(job.source, str(job.source)), metadata_of(job.source)
    parts: dict[str, list[str]] = {name: [name] for name in tensors}
    late: dict[str, torch.Tensor] = {}
    with (
        closing(TensorWriter(aside, *_bounds(job, tensors, metadata))) as writer,
        job.source.open("rb", buffering=0) as file,
    ):
        descriptor = file.fileno()
        for name in (name for name in tensors if name in job.quantized):
            found = _quantized(job, name, tensors[name], descriptor)
            parts[name] = list(found)
            for part, made in found.items():
                if made.nbytes % ALIGNMENT:  # what comes after it would not be aligned
                    late[part] = made
                else:
                    writer.add(part, NAMES[made.dtype], made.shape, [bytes_of(made)])
        for name, tensor in _in_order(tensors, job.quantized):
            if name in job.updates:
                rows = _rows(name, tensor, descriptor, job.updates[name])
                chunks: Iterable[memoryview] = map(bytes_of, rows)
            else:
                chunks = _copied(tensor, descriptor)
            writer.add(name, tensor.dtype, tensor.shape, chunks)
        for part, made in sorted(late.items(), key=lambda item: -item[1].itemsize):
            writer.add(part, NAMES[made.dtype], made.shape, [bytes_of(made)])
        writer.finish([part for found in parts.values() for part in found], metadata)


def _in_order(
    tensors: Mapping[str, StoredTensor], quantized: frozenset[str]
) -> list[tuple[str, StoredTensor]]:
    """What is not quantized, as it lies; where something is, the largest numbers first: aligned."""
    found = [(name, tensor) for name, tensor in tensors.items() if name not in quantized]
    if quantized:
        return sorted(found, key=lambda item: (-ITEM_BYTES.get(item[1].dtype, 8), item[1].begin))
    return sorted(found, key=lambda item: item[1].begin)


def _bounds(
    job: FileJob, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> tuple[int, int]:
    """Bytes of the header and of the tensors, at most."""
    sizes = {
        name: _bound_4bit(*t.shape) if name in job.quantized else t.end - t.begin
        for name, t in tensors.items()
    }
    data_bytes = sum(sizes.values())
    entries: dict[str, dict[str, Any]] = {}
    for name, t in tensors.items():
        entry = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [data_bytes] * 2}
        entries[name] = entry
        if name in job.quantized:
            shape = [data_bytes] * 2
            suffix = ".quant_state.bitsandbytes__nf4"  # the longest of them
            entries |= {f"{name}{suffix}{i}": entry | {"shape": shape} for i in range(NUM_PARTS)}
    return len(header_of(entries, metadata)), data_bytes


def _bound_4bit(rows: int, columns: int) -> int:
    return sum(bytes_4bit(rows, columns)) + PARTS_BYTES


def _copied(tensor: StoredTensor, descriptor: int) -> Iterator[memoryview]:
    """A tensor's bytes; a chunk is overwritten by the next."""
    size = tensor.end - tensor.begin
    buffer = memoryview(bytearray(min(size, CHUNK_BYTES)))
    for first in range(0, size, CHUNK_BYTES):
        part = buffer[: min(CHUNK_BYTES, size - first)]
        fill(part, descriptor, tensor.begin + first)
        yield part


def _rows(
    name: str, tensor: StoredTensor, descriptor: int, update: Update | None
) -> Iterator[torch.Tensor]:
    """A weight's rows with its update, in fp32 and rounded once; the next overwrite them.

    Raises:
        ConfigError: if a number is not finite.
    """
    dtype, (num_rows, width) = FLOATS[tensor.dtype], tensor.shape
    left, right = (None, None) if update is None else update.factors()
    step = max(1, min(num_rows, CHUNK // width))
    stored, wide = torch.empty(step, width, dtype=dtype), torch.empty(step, width)
    for first in range(0, num_rows, step):
        rows = stored[: num_rows - first]
        fill(bytes_of(rows), descriptor, tensor.begin + first * width * rows.itemsize)
        if left is not None and right is not None:
            W = wide[: len(rows)].copy_(rows)
            rows.copy_(W.addmm_(left[first : first + step], right))
        # The bounds are NaN if there is one: no tensor of truth values is made.
        if not all(math.isfinite(bound) for bound in rows.aminmax()):
            raise ConfigError(
                f"{name} in {Path(tensor.file).name} is not finite in {tensor.dtype} once merged: "
                "the base or the adapter holds such numbers, or their sum exceeds "
                f"{torch.finfo(dtype).max:.3g}. Nothing of it can be used."
            )
        yield rows


def _quantized(
    job: FileJob, name: str, tensor: StoredTensor, descriptor: int
) -> dict[str, torch.Tensor]:
    """A merged weight in 4 bits: stored name -> tensor."""
    from lorasb_ds.models.quantization import stored_4bit

    W = torch.empty(tensor.shape, dtype=FLOATS[tensor.dtype])
    first = 0
    for rows in _rows(name, tensor, descriptor, job.updates.get(name)):
        W[first : first + len(rows)] = rows
        first += len(rows)
    found = stored_4bit(W)
    return {f"{name}.{part}" if part else name: tensor for part, tensor in found.items()}


def _read_fp32(tensor: StoredTensor) -> torch.Tensor:
    found = torch.empty(tensor.shape, dtype=FLOATS[tensor.dtype])
    with tensor.file.open("rb", buffering=0) as file:
        fill(bytes_of(found), file.fileno(), tensor.begin)
    return found.float()


def _disk_error(job: FileJob, error: OSError) -> ConfigError:
    with suppress(OSError):  # space for another attempt
        job.target.with_name(job.target.name + ".tmp").unlink()
    return ConfigError(
        f"{job.target} cannot be written: {error.strerror or error}. What is finished is kept: the "
        "same command goes on from there."
    )

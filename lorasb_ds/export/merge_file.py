"""Write one file of a base with low-rank updates added, a few rows in memory at a time.

A merge's processes import this module: torch, and nothing that takes more memory than torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lorasb_ds.errors import ConfigError
from lorasb_ds.export.merge_update import (
    FLOATS,
    ReadFactor,
    Update,
    UpdatesOfWeight,
    read_fp32,
)
from lorasb_ds.models.checkpoint_files import ITEM_BYTES, StoredTensor
from lorasb_ds.models.stored_formats import EncodedTensor
from lorasb_ds.models.tensor_reader import DTYPE_NAMES
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

CHUNK_BYTES = 4 << 20  # copied at a time
CHUNK = 1 << 18  # elements merged at a time: they stay in a cache
# A 4-bit weight's parts beside its codes: their number, and an upper bound for the bytes of those
# whose size does not depend on the weight's (tables of 16 and 256 numbers, a JSON of its shape).
NUM_PARTS, PARTS_BYTES = 6, 4 * (16 + 256) + 1024


@dataclass(frozen=True, eq=False)
class FileJob:
    """The merge of one file of a base.

    Attributes:
        target: the file to write, complete or not there.
        tensors: those of the base that it holds.
        updates: stored name of a weight -> the update of each of its matrices: one, or one for each
            expert (None: it has none).
        quantized: stored names of weights to write in 4 bits.
        added: tensors of other files that are written beside them, as they are stored.
    """

    source: Path
    target: Path
    tensors: Mapping[str, StoredTensor]
    updates: Mapping[str, Sequence[Update | None]]
    quantized: frozenset[str] = frozenset()
    added: Mapping[str, StoredTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """A file that is complete."""

    sha256: str
    num_bytes: int


def merge_file(job: FileJob) -> Written:
    """Write a file, and rename it to its target when it is on disk.

    Raises:
        ConfigError: if it cannot be read or written, or a merged number is not finite; names the
            file, and the tensor if there is one.
    """
    return finish_file(job, write_aside(job))


def write_aside(job: FileJob) -> Path:
    """Write a file under another name, without syncing it to disk. Raises like ``merge_file``."""
    aside = job.target.with_name(job.target.name + ".tmp")
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        _write(job, aside)
    except OSError as error:
        raise _disk_error(job, error) from error
    return aside


def finish_file(job: FileJob, aside: Path) -> Written:
    """Hash the written file, sync it and rename it to its target. Raises like ``merge_file``."""
    try:
        digest = file_digest(aside)
        publish(aside, job.target)
        return Written(digest, job.target.stat().st_size)
    except OSError as error:
        raise _disk_error(job, error) from error


def use_threads(count: int) -> None:
    """Set up one of several processes: limit its threads, and end it when its parent ends."""
    import multiprocessing
    from threading import Thread

    torch.set_num_threads(count)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        # Otherwise it would still write while another merge resumes the killed one.
        parent.join()
        os._exit(1)

    Thread(target=end_with_parent, daemon=True).start()


def size_bound(job: FileJob) -> int:
    """Return an upper bound for the bytes of the written file."""
    return sum(_bounds(job, metadata_of(job.source)))


def _write(job: FileJob, aside: Path) -> None:
    tensors, metadata = job.tensors, metadata_of(job.source)
    parts: dict[str, list[str]] = {name: [name] for name in (*job.added, *tensors)}
    late: dict[str, torch.Tensor] = {}
    # In PEFT's form one B is that of all experts of a projection: it is read once.
    read = lru_cache(maxsize=2)(read_fp32)
    with (
        closing(TensorWriter(aside, *_bounds(job, metadata))) as writer,
        job.source.open("rb", buffering=0) as file,
    ):
        descriptor = file.fileno()
        for name, tensor in job.added.items():  # first: fp32 leaves what follows aligned
            with tensor.file.open("rb", buffering=0) as other:
                writer.add(name, tensor.dtype, tensor.shape, _copied(tensor, other.fileno()))
        for name in (name for name in tensors if name in job.quantized):
            found = _quantized(job, name, tensors[name], descriptor, read)
            parts[name] = list(found)
            for part, made in found.items():
                if made.nbytes % ALIGNMENT:  # the tensors after it would not be aligned
                    late[part] = made
                else:
                    writer.add(part, DTYPE_NAMES[made.dtype], made.shape, [bytes_of(made)])
        for name, tensor in _in_order(job):
            if name in job.updates or isinstance(tensor, EncodedTensor):
                rows = _rows(name, tensor, descriptor, job.updates.get(name, ()), read)
                chunks: Iterable[memoryview] = map(bytes_of, rows)
            else:
                chunks = _copied(tensor, descriptor)
            writer.add(name, tensor.dtype, tensor.shape, chunks)
        for part, made in sorted(late.items(), key=lambda item: -item[1].itemsize):
            writer.add(part, DTYPE_NAMES[made.dtype], made.shape, [bytes_of(made)])
        writer.finish([part for found in parts.values() for part in found], metadata)


def _in_order(job: FileJob) -> list[tuple[str, StoredTensor]]:
    """Order the tensors that are not quantized.

    As stored; or, where others are quantized or decoded, by descending item size, so that all are
    aligned.
    """
    found = [(name, tensor) for name, tensor in job.tensors.items() if name not in job.quantized]
    if job.quantized or any(isinstance(tensor, EncodedTensor) for _, tensor in found):
        return sorted(found, key=lambda item: (-ITEM_BYTES.get(item[1].dtype, 8), item[1].begin))
    return sorted(found, key=lambda item: item[1].begin)


def _bounds(job: FileJob, metadata: Mapping[str, str]) -> tuple[int, int]:
    """Return upper bounds for the bytes of the header and of the tensors."""
    sizes = {
        name: _bound_4bit(*t.shape) if name in job.quantized else _num_bytes(t)
        for name, t in (*job.added.items(), *job.tensors.items())
    }
    data_bytes = sum(sizes.values())
    entries: dict[str, dict[str, Any]] = {}
    for name, t in (*job.added.items(), *job.tensors.items()):
        entry = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [data_bytes] * 2}
        entries[name] = entry
        if name in job.quantized:
            shape = [data_bytes] * 2
            suffix = ".quant_state.bitsandbytes__nf4"  # the longest of them
            entries |= {f"{name}{suffix}{i}": entry | {"shape": shape} for i in range(NUM_PARTS)}
    return len(header_of(entries, metadata)), data_bytes


def _num_bytes(tensor: StoredTensor) -> int:
    """Return the bytes of a tensor that is written as it is, or decoded."""
    if isinstance(tensor, EncodedTensor):
        return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
    return tensor.end - tensor.begin


def _bound_4bit(rows: int, columns: int) -> int:
    return sum(bytes_4bit(rows, columns)) + PARTS_BYTES


def _copied(tensor: StoredTensor, descriptor: int) -> Iterator[memoryview]:
    """Yield a tensor's bytes in chunks; each is overwritten by the next."""
    size = tensor.end - tensor.begin
    buffer = memoryview(bytearray(min(size, CHUNK_BYTES)))
    for first in range(0, size, CHUNK_BYTES):
        part = buffer[: min(CHUNK_BYTES, size - first)]
        fill(part, descriptor, tensor.begin + first)
        yield part


def _rows(
    name: str,
    tensor: StoredTensor,
    descriptor: int,
    updates: Sequence[Update | None],
    read: ReadFactor,
) -> Iterator[torch.Tensor]:
    """Yield a weight's rows with its updates, summed in fp32 and rounded once.

    Each chunk of rows is overwritten by the next.

    Raises:
        ConfigError: if a number is not finite.
    """
    dtype, rounded, first = FLOATS[tensor.dtype], torch.empty(0), 0
    added = UpdatesOfWeight(updates, math.prod(tensor.shape[:-1]), read)
    for W in _rows_fp32(tensor, descriptor):
        added.add_to(W, first)
        if first == 0:  # no later chunk is larger
            rounded = torch.empty(W.shape, dtype=dtype)
        rows = rounded[: len(W)].copy_(W)
        # The extrema are NaN if any element is: this needs no boolean tensor, unlike isfinite().
        if not all(math.isfinite(bound) for bound in rows.aminmax()):
            raise ConfigError(
                f"{name} in {Path(tensor.file).name} is not finite in {tensor.dtype} once merged: "
                "the base or the adapter holds such numbers, or their sum exceeds "
                f"{torch.finfo(dtype).max:.3g}. The merged model would be unusable."
            )
        yield rows
        first += len(W)


def _rows_fp32(tensor: StoredTensor, descriptor: int) -> Iterator[torch.Tensor]:
    """Yield rows (number, last dimension) in fp32; each chunk is overwritten by the next."""
    num_rows, width = math.prod(tensor.shape[:-1]), tensor.shape[-1]
    step = max(1, min(num_rows, CHUNK // width))
    if isinstance(tensor, EncodedTensor):
        try:
            yield from tensor.decoder.chunks(
                _read_bytes, 0, num_rows, step, torch.float32, torch.device("cpu")
            )
        except ValueError as error:
            raise ConfigError(f"The base cannot be merged: {error}.") from error
        return
    stored, wide = torch.empty(step, width, dtype=FLOATS[tensor.dtype]), torch.empty(step, width)
    for first in range(0, num_rows, step):
        rows = stored[: num_rows - first]
        fill(bytes_of(rows), descriptor, tensor.begin + first * width * rows.itemsize)
        yield wide[: len(rows)].copy_(rows)


def _read_bytes(_: str, tensor: StoredTensor, begin: int, size: int) -> torch.Tensor:
    found = torch.empty(size, dtype=torch.uint8)
    with tensor.file.open("rb", buffering=0) as file:
        fill(bytes_of(found), file.fileno(), tensor.begin + begin)
    return found


def _quantized(
    job: FileJob, name: str, tensor: StoredTensor, descriptor: int, read: ReadFactor
) -> dict[str, torch.Tensor]:
    """Merge and quantize a weight to 4 bits: stored name -> tensor."""
    from lorasb_ds.models.quantization import stored_4bit

    W = torch.empty(tensor.shape, dtype=FLOATS[tensor.dtype])
    first = 0
    for rows in _rows(name, tensor, descriptor, job.updates.get(name, ()), read):
        W[first : first + len(rows)] = rows
        first += len(rows)
    found = stored_4bit(W)
    return {f"{name}.{part}" if part else name: tensor for part, tensor in found.items()}


def _disk_error(job: FileJob, error: OSError) -> ConfigError:
    with suppress(OSError):  # space for another attempt
        job.target.with_name(job.target.name + ".tmp").unlink()
    return ConfigError(
        f"{job.target} cannot be written: {error.strerror or error}. Finished files are kept: the "
        "same command continues from there."
    )

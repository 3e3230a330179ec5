"""Write safetensors files atomically, or tensor by tensor. Linux."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lorasb_ds.system.files import written_aside

ALIGNMENT = 8  # bytes to which the first tensor is aligned, so that no number straddles one


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part of it.

    Raises:
        OSError: if it cannot be written.
    """
    with written_aside(path) as aside:
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, aside, metadata=metadata)
        except SafetensorError as error:  # not an OSError, though a full disk may be the cause
            raise OSError(f"{path.name}: {error}") from error


class TensorWriter:
    """Writer of a safetensors file whose tensors come one after the other, of unknown sizes.

    The header is written last, into space that was reserved for it: it may end in spaces.
    """

    def __init__(self, path: Path, header_bytes: int, data_bytes: int) -> None:
        """
        Args:
            header_bytes: upper bound of the header's size.
            data_bytes: upper bound of the size of all tensors.
        """
        self._start = -(-(8 + header_bytes) // ALIGNMENT) * ALIGNMENT
        self._end = self._start
        self._entries: dict[str, dict[str, Any]] = {}
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            # Without allocated blocks, pages take six times as long to write (measured on ext4).
            os.posix_fallocate(self._descriptor, 0, self._start + data_bytes)
        except OSError as error:
            # Not every file system can do it: blocks are then allocated while writing.
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.close()
                raise

    def add(
        self, name: str, dtype: str, shape: Iterable[int], chunks: Iterable[memoryview]
    ) -> None:
        begin = self._end
        for chunk in chunks:
            while chunk:
                count = os.pwrite(self._descriptor, chunk, self._end)
                chunk, self._end = chunk[count:], self._end + count
        offsets = [begin - self._start, self._end - self._start]
        self._entries[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": offsets}

    def finish(self, order: Iterable[str], metadata: Mapping[str, str]) -> None:
        """Write the header, with its entries in the given order."""
        header = header_of({name: self._entries[name] for name in order}, metadata)
        assert len(header) <= self._start - 8, "the header exceeds its bound"
        header = header.ljust(self._start - 8)
        os.pwrite(self._descriptor, len(header).to_bytes(8, "little") + header, 0)
        os.ftruncate(self._descriptor, self._end)

    def close(self) -> None:
        os.close(self._descriptor)


def header_of(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Return a file's header without its length."""
    header = {"__metadata__": metadata} if metadata else {}
    return json.dumps(header | dict(entries), separators=(",", ":")).encode()


def metadata_of(path: Path) -> dict[str, str]:
    """Return the metadata of a file whose header is known to be valid."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found = header.get("__metadata__")
    return found if isinstance(found, dict) else {}


def fill(buffer: memoryview, descriptor: int, offset: int) -> None:
    """Fill a buffer from a file; OSError if the file is too short."""
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            raise OSError(errno.EIO, "a file of the base or of the adapter has become shorter")
        buffer, offset = buffer[count:], offset + count


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a CPU tensor's bytes, without a copy if it is contiguous."""
    flat = tensor.reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]

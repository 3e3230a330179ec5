"""Safetensors files: whole or not there, or written as their tensors come. Linux."""

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

from lorasb_ds.system.files import publish

ALIGNMENT = 8  # of the tensors' beginning, so that none of their numbers is cut by a boundary


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part.

    Raises:
        OSError: if it cannot be written.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, aside, metadata=metadata)
    except SafetensorError as error:  # no OSError, though a full disk may be the cause
        raise OSError(f"{path.name}: {error}") from error
    publish(aside, path)


class TensorWriter:
    """A safetensors file whose tensors are written one after the other, of sizes yet unknown.

    Its header comes last, into a place that was kept free for it: the format lets it end in spaces.
    """

    def __init__(self, path: Path, header_bytes: int, data_bytes: int) -> None:
        """
        Args:
            header_bytes: of the header at most; data_bytes: of all tensors at most.
        """
        self._start = -(-(8 + header_bytes) // ALIGNMENT) * ALIGNMENT
        self._end = self._start
        self._entries: dict[str, dict[str, Any]] = {}
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            # Measured on ext4: pages of a file without blocks take six times as long to write.
            os.posix_fallocate(self._descriptor, 0, self._start + data_bytes)
        except OSError as error:
            # Not every file system can: then they are found while they are written.
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
        """Write the header, with its entries in this order."""
        header = header_of({name: self._entries[name] for name in order}, metadata)
        assert len(header) <= self._start - 8, "the header exceeds its bound"
        header = header.ljust(self._start - 8)
        os.pwrite(self._descriptor, len(header).to_bytes(8, "little") + header, 0)
        os.ftruncate(self._descriptor, self._end)

    def close(self) -> None:
        os.close(self._descriptor)


def header_of(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """A file's header, but for its length."""
    header = {"__metadata__": metadata} if metadata else {}
    return json.dumps(header | dict(entries), separators=(",", ":")).encode()


def metadata_of(path: Path) -> dict[str, str]:
    """Of a file whose header has been read."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found = header.get("__metadata__")
    return found if isinstance(found, dict) else {}


def fill(buffer: memoryview, descriptor: int, offset: int) -> None:
    """Read a buffer full. OSError if the file ends before."""
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            raise OSError(errno.EIO, "a file of the base or of the adapter has become shorter")
        buffer, offset = buffer[count:], offset + count


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes."""
    flat = tensor.reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]

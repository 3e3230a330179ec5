"""Read a checkpoint's tensors, a few rows or an expert at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence

import torch

from lorasb_ds.distributed import accelerator
from lorasb_ds.models.checkpoint_files import StoredTensor
from lorasb_ds.models.quantization import rows_at_a_time
from lorasb_ds.models.stored_formats import EncodedTensor

STORED_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


class TensorReader:
    """Reader of a checkpoint's tensors by ``pread``, a few rows at a time, to this rank's device.

    safetensors itself either maps the file, which counts as this process's memory and stays, or
    reads a whole tensor for every slice.

    All methods raise ValueError, naming tensor and file, if a tensor cannot be read, has an unknown
    dtype, or has a value that is not finite.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored
        self._descriptors: dict[os.PathLike[str], int] = {}

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read a whole tensor in ``dtype``; None: as it is stored, with values not checked."""
        shape = self.stored[key].shape
        return self._joined(key, dtype, 0, _num_rows(shape)).view(shape)

    def expert(self, key: str, index: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one matrix (rows, columns) of a 3-D tensor, as ``read`` does, and no other."""
        count, height, _ = self.stored[key].shape
        assert 0 <= index < count
        return self._joined(key, dtype, index * height, (index + 1) * height)

    def rows(
        self, key: str, dtype: torch.dtype | None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield chunks (rows, last dimension) of a tensor in order.

        Every chunk but the last has a multiple of ``multiple`` rows. A chunk's memory is
        overwritten by the next one.
        """
        return self._rows(key, dtype, 0, _num_rows(self.stored[key].shape), multiple)

    def _joined(self, key: str, dtype: torch.dtype | None, first: int, last: int) -> torch.Tensor:
        """Return some rows as one tensor (rows, last dimension)."""
        tensor = self.stored[key]
        kind = _dtype(key, tensor) if dtype is None else dtype
        size = (last - first, _width(tensor.shape))
        result, start = torch.empty(size, dtype=kind, device=accelerator.device()), 0
        for chunk in self._rows(key, dtype, first, last):
            if len(chunk) == len(result):
                return chunk  # none comes after it that would overwrite it
            result[start : start + len(chunk)] = chunk
            start += len(chunk)
        return result

    def _rows(
        self, key: str, dtype: torch.dtype | None, first: int, last: int, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield rows ``first`` to ``last`` of a tensor, as ``rows`` does."""
        tensor = self.stored[key]
        stored_dtype = _dtype(key, tensor)
        if dtype is not None and dtype.is_floating_point != stored_dtype.is_floating_point:
            raise ValueError(
                f"{key} in {tensor.file.name} is stored as {tensor.dtype}, but the model has "
                f"{dtype}"
            )
        if isinstance(tensor, EncodedTensor):
            chunks = self._decoded_rows(tensor, dtype or stored_dtype, first, last, multiple)
        else:
            chunks = self._plain_rows(key, dtype or stored_dtype, first, last, multiple)
        for chunk in chunks:
            if dtype is not None and not _is_finite(chunk):
                raise ValueError(
                    f"{key} in {tensor.file.name} holds values that are not finite in {dtype}"
                )
            yield chunk

    def _plain_rows(
        self, key: str, dtype: torch.dtype, first: int, last: int, multiple: int
    ) -> Iterator[torch.Tensor]:
        tensor = self.stored[key]
        width = _width(tensor.shape)
        row_bytes = (tensor.end - tensor.begin) // max(1, _num_rows(tensor.shape))
        step = rows_at_a_time(width, multiple)
        buffer = accelerator.pinned_bytes(min(step, last - first) * row_bytes)
        for start in range(first, last, step):
            count = min(step, last - start)
            part = buffer[: count * row_bytes]
            self._fill(part, key, tensor, start * row_bytes)
            chunk = part.view(_dtype(key, tensor)).view(count, width)
            yield chunk.to(accelerator.device(), dtype)

    def _decoded_rows(
        self, tensor: EncodedTensor, dtype: torch.dtype, first: int, last: int, multiple: int
    ) -> Iterator[torch.Tensor]:
        def read(name: str, part: StoredTensor, begin: int, size: int) -> torch.Tensor:
            buffer = accelerator.pinned_bytes(size)
            self._fill(buffer, name, part, begin)
            return buffer

        assert not tensor.decoder.transposed or tensor.shape[-2] % multiple == 0
        step = rows_at_a_time(tensor.decoder.sides[1], multiple)
        return tensor.decoder.chunks(read, first, last, step, dtype, accelerator.device())

    def _fill(self, buffer: torch.Tensor, key: str, tensor: StoredTensor, begin: int) -> None:
        """Read bytes of a tensor, from ``begin`` of its own on."""
        path, offset = tensor.file, tensor.begin + begin
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        try:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            while view:
                count = os.preadv(self._descriptors[path], [view], offset)
                if count == 0:
                    raise OSError("the file ends before it")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise ValueError(f"{key} in {path.name} cannot be read: {error}") from error


def _dtype(key: str, tensor: StoredTensor) -> torch.dtype:
    if tensor.dtype not in STORED_DTYPES:
        raise ValueError(
            f"{key} in {tensor.file.name} is stored as {tensor.dtype}; only "
            f"{', '.join(STORED_DTYPES)} are known"
        )
    return STORED_DTYPES[tensor.dtype]


def _num_rows(shape: Sequence[int]) -> int:
    return math.prod(shape[:-1])


def _width(shape: Sequence[int]) -> int:
    return shape[-1] if shape else 1


def _is_finite(values: torch.Tensor) -> bool:
    if not values.is_floating_point() or not values.numel():
        return True
    # The bounds are NaN if any value is; no boolean tensor is made.
    return all(math.isfinite(bound.item()) for bound in values.aminmax())

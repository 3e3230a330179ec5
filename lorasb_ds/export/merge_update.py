"""Low-rank updates of the matrices of one stored weight, of which one is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from lorasb_ds.export.expert_layers import Expert
from lorasb_ds.models.checkpoint_files import StoredTensor
from lorasb_ds.system.safetensors_writer import bytes_of, fill

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

ReadFactor: TypeAlias = Callable[[StoredTensor], torch.Tensor]


@dataclass(frozen=True)
class Update:
    """The stored factors of ``W += scale · B R A``; without R, ``scale · B A``.

    Attributes:
        transposed: W is stored as (in, out).
        expert: of an expert's update, where its columns of B are.
        rows: of B; None: all. Of an expert some projections are stored in parts.
    """

    A: StoredTensor
    B: StoredTensor
    R: StoredTensor | None
    scale: float
    transposed: bool
    expert: Expert | None = None
    rows: range | None = None

    def factors(self, read: ReadFactor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the two factors of the product that is added to W as stored; fp32."""
        A, B = read(self.A), read(self.B)
        if self.expert is not None:
            B = self.expert.columns(B)
        if self.rows is not None:
            B = B[self.rows.start : self.rows.stop]
        if self.R is not None:
            B = B @ read(self.R)
        if self.scale != 1:
            B = B * self.scale
        return (A.T.contiguous(), B.T.contiguous()) if self.transposed else (B, A)


class UpdatesOfWeight:
    """The updates of a weight's matrices, of which the factors of one are in memory at a time."""

    def __init__(self, updates: Sequence[Update | None], num_rows: int, read: ReadFactor) -> None:
        """
        Args:
            updates: of matrices that are stored one below the other.
            num_rows: of all of them.
        """
        self.updates, self.rows_each = updates, num_rows // max(1, len(updates))
        self._read = read
        self._matrix = -1
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None

    def add_to(self, W: torch.Tensor, first: int) -> None:
        """Add them to some rows of the weight, in place.

        Args:
            first: number of the first of these rows.
        """
        row, end = first, first + len(W)
        while self.updates and row < end:
            matrix = row // self.rows_each
            begin = matrix * self.rows_each
            stop = min(end, begin + self.rows_each)
            if matrix != self._matrix:
                update = self.updates[matrix]
                self._matrix, self._factors = matrix, update.factors(self._read) if update else None
            if self._factors is not None:
                left, right = self._factors
                W[row - first : stop - first].addmm_(left[row - begin : stop - begin], right)
            row = stop


def read_fp32(tensor: StoredTensor) -> torch.Tensor:
    """Read a stored tensor, in fp32."""
    found = torch.empty(tensor.shape, dtype=FLOATS[tensor.dtype])
    with tensor.file.open("rb", buffering=0) as file:
        fill(bytes_of(found), file.fileno(), tensor.begin)
    return found.float()

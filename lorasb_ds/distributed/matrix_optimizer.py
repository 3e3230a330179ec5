"""Optimizers of whole matrices, on masters that ZeRO cuts into flat parts. Torch only.

Adafactor keeps means over rows and columns, and Muon orthogonalizes: neither can step a flat part
of a matrix, or several concatenated matrices. Trainable parameters are small, so every rank steps
every matrix whole, with torch's own optimizer, and keeps its own part of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lorasb_ds.distributed.collectives import all_reduce


class MatrixPart(NamedTuple):
    """The entries of a matrix, in row-major order, that this rank's flat master holds."""

    parameter: torch.nn.Parameter  # the model's, which may be sharded
    shape: tuple[int, ...]  # of the whole matrix
    start: int  # in the whole matrix
    start_in_master: int
    length: int  # may be 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class MatrixOptimizer(torch.optim.Optimizer):
    """One of torch's optimizers of whole matrices, for an engine that has flat masters.

    Call ``set_parts`` before the first step. The state is whole and equal on every rank.

    Args:
        params: the model's parameters; the engine replaces them by its flat masters.
        make: makes the inner optimizer from a list of whole matrices.
        rates: ``lr`` and ``weight_decay``, which schedules may change.
    """

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        rates: Mapping[str, float],
    ) -> None:
        super().__init__(params, dict(rates))
        # Only the state outlives a step: values and gradients come from the masters each time.
        self._matrices = {p: torch.nn.Parameter(torch.empty(0, 0)) for p in params}
        self._inner = make(list(self._matrices.values()))
        self._parts: list[tuple[torch.Tensor, Sequence[MatrixPart]]] = []

    def set_parts(self, parts: Sequence[tuple[torch.Tensor, Sequence[MatrixPart]]]) -> None:
        """Set which parts of which matrices each flat master holds.

        Args:
            parts: for each flat master its parts, of the same matrices in the same order on every
                rank.
        """
        self._parts = list(parts)

    @property
    def inner_state(self) -> dict[Any, dict[str, Any]]:
        """The states of all matrices."""
        return self._inner.state

    def state_of(self, parameter: torch.nn.Parameter) -> dict[str, Any]:
        """Return the whole state of one of the model's parameters; {} before the first step."""
        return self._inner.state.get(self._matrices[parameter], {})

    def set_state(self, parameter: torch.nn.Parameter, state: dict[str, Any]) -> None:
        """Set the whole state of one of the model's parameters."""
        self._inner.state[self._matrices[parameter]] = state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step the masters that have gradients. Collective.

        Communication: for each master one all-reduce of 2 fp32 numbers for each entry of its
        matrices, to which every rank contributes its own part.
        """
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._step(flat, {key: group[key] for key in ("lr", "weight_decay")})

    def _step(self, flat: torch.Tensor, rates: dict[str, float]) -> None:
        parts = next(parts for master, parts in self._parts if master is flat)
        assert flat.grad is not None
        whole = flat.new_zeros(2, sum(part.size for part in parts))  # values, gradients
        matrices, own, first = [], [], 0
        for part in parts:
            here = slice(part.start_in_master, part.start_in_master + part.length)
            there = slice(first + part.start, first + part.start + part.length)
            whole[0, there], whole[1, there] = flat[here], flat.grad[here]
            own.append((here, there))
            matrix = self._matrices[part.parameter]
            matrix.data, matrix.grad = whole[:, first : first + part.size].view(2, *part.shape)
            matrices.append(matrix)
            first += part.size
        all_reduce(whole, None)
        (group,) = self._inner.param_groups
        group.update(rates, params=matrices)
        self._inner.step()
        for here, there in own:
            flat[here] = whole[0, there]
        for matrix in matrices:
            matrix.data, matrix.grad = matrix.data.new_empty(0, 0), None

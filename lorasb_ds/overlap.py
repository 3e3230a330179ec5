"""How much of their directions the bases of several runs share, a layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lorasb_ds.config.run_layout import BASIS_FILE
from lorasb_ds.errors import ConfigError

SIDES = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Overlaps:
    """Means over layers, each between 0 (orthogonal subspaces) and 1 (the same one).

    Attributes:
        A: ``A[i][j]`` is that of the row spaces of A of runs i and j.
        B: of the column spaces of B.
        chance: of two random subspaces, for A and B: the mean of r / in, and of r / out.
    """

    A: list[list[float]]
    B: list[list[float]]
    chance: tuple[float, float]


def subspace_overlaps(bases: torch.Tensor) -> torch.Tensor:
    """Mean squared cosines of the principal angles between all pairs of subspaces.

    ``‖Q_iᵀ Q_j‖²_F / r``, where Q has orthonormal columns (Golub and Van Loan, section 6.4.3; Hu
    et al., arXiv 2106.09685, eq. 4, with i = j).

    Args:
        bases: (runs, n, r), r <= n: columns that span a subspace for each run; they need not be
            orthonormal, as those that were rounded to bf16 are not quite.
    Returns:
        (runs, runs), fp32; symmetric, with ones on the diagonal.
    """
    num_runs, n, r = bases.shape
    Q = torch.linalg.qr(bases.float()).Q
    columns = Q.transpose(0, 1).reshape(n, num_runs * r)
    cosines = (columns.T @ columns).reshape(num_runs, r, num_runs, r)
    return cosines.square().sum(dim=(1, 3)) / r


def basis_overlaps(folders: Sequence[Path]) -> Overlaps:
    """Of the bases in some runs' folders. One layer of every run is in memory at a time.

    Raises:
        ConfigError: if one of them is missing or broken, or they are not of the same layers with
            the same r.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_open(folder)) for folder in folders]
        shapes = [
            {name: file.get_slice(name).get_shape() for name in file.keys() if _is_factor(name)}  # noqa: SIM118
            for file in files
        ]
        for folder, found in zip(folders, shapes, strict=True):
            if found != shapes[0]:
                raise ConfigError(
                    f"{folder} and {folders[0]} have bases of other layers, or of another r: they "
                    "cannot be compared. Start anew in another --output-dir."
                )
        sums = {side: torch.zeros(len(files), len(files)) for side in SIDES}
        chance = dict.fromkeys(SIDES, 0.0)
        for name in shapes[0]:
            side = name.rpartition(".")[2]
            bases = torch.stack([_columns(file.get_tensor(name), side) for file in files])
            sums[side] += subspace_overlaps(bases)
            chance[side] += bases.shape[2] / bases.shape[1]
    num_layers = len(shapes[0]) // len(SIDES)
    means = {side: (total / num_layers).tolist() for side, total in sums.items()}
    A, B = SIDES
    return Overlaps(means[A], means[B], (chance[A] / num_layers, chance[B] / num_layers))


def _open(folder: Path) -> safe_open:
    try:
        return safe_open(folder / BASIS_FILE, "pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder / BASIS_FILE} cannot be read: {error}. Remove the run's folder, and start "
            "the same command again: that run is done anew."
        ) from error


def _is_factor(name: str) -> bool:
    return name.rpartition(".")[2] in SIDES


def _columns(factor: torch.Tensor, side: str) -> torch.Tensor:
    """The directions as columns: A has them as rows."""
    return factor.T if side == "lora_A" else factor

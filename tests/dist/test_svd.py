"""The row-sharded SVD on 1 to 4 ranks against torch.linalg.svd of the whole matrix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasb_ds.linalg import row_range
from tests.runs import run_ranks

RANKS = {"square": 8, "tall": 5, "ragged": 3, "few_rows": 2, "column": 1, "deficient": 6, "zero": 3}


def matrices() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def signs(m: int, n: int, inner: int) -> torch.Tensor:
        left = torch.randn(m, inner, generator=generator)
        right = torch.randn(inner, n, generator=generator)
        return (left @ right).sign().to(torch.int8)

    rank_two = signs(30, 1, 1) @ torch.ones(1, 12, dtype=torch.int8)
    rank_two[:, 3] = signs(30, 1, 1)[:, 0]
    return {
        "square": signs(64, 64, 4),
        "tall": signs(201, 24, 2),
        "ragged": signs(67, 13, 3),
        "few_rows": signs(3, 3, 3),
        "column": signs(5, 1, 1),
        "deficient": rank_two,
        "zero": torch.zeros(9, 7, dtype=torch.int8),
    }


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_equals_the_whole_svd(world_size: int, tmp_path: Path) -> None:
    given = matrices()
    save_file(given, tmp_path / "matrices")
    run_ranks("svd", world_size, matrices=str(tmp_path / "matrices"), out=str(tmp_path), r=RANKS)
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(world_size)]
    for name, M in given.items():
        r, exact = RANKS[name], torch.linalg.svd(M.double(), full_matrices=False)
        S, Vh = ranks[0][f"{name}.S"], ranks[0][f"{name}.Vh"]
        for k, rank in enumerate(ranks):
            assert torch.equal(rank[f"{name}.S"], S), "S differs between ranks"
            assert torch.equal(rank[f"{name}.Vh"], Vh), "Vh differs between ranks"
            assert len(rank[f"{name}.U"]) == len(row_range(len(M), k, world_size))
        U = torch.cat([rank[f"{name}.U"] for rank in ranks])
        torch.testing.assert_close(S.double(), exact.S[:r], atol=1e-5, rtol=1e-5)
        for basis in (U.T @ U, Vh @ Vh.T):
            torch.testing.assert_close(basis, torch.eye(r), atol=1e-5, rtol=0)
        optimal = (exact.U[:, :r] * exact.S[:r]) @ exact.Vh[:r]
        error = torch.linalg.matrix_norm(M.double() - (U * S) @ Vh).item()
        best = torch.linalg.matrix_norm(M.double() - optimal).item()
        assert error <= best + 1e-4 * torch.linalg.matrix_norm(M.double()).item() + 1e-6
        energy = ranks[0][f"{name}.energy"].item()
        total = exact.S.square().sum().item()
        expected = exact.S[:r].square().sum().item() / total if total else 1.0
        assert energy == pytest.approx(expected, rel=1e-6)
        assert (Vh.gather(1, Vh.abs().argmax(1, keepdim=True)) > 0).all()


def test_not_finite_fails_on_every_rank() -> None:
    run_ranks("not_finite", 2, config={})

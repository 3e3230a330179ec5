"""The row-sharded SVD on 1 to 4 ranks against torch.linalg.svd of the whole matrix."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasb_ds.distributed.collectives import row_range
from lorasb_ds.init.sharded_svd import truncated_svd
from tests.runs import run_ranks

RANKS = {
    "square": 8,
    "tall": 5,
    "ragged": 3,
    "few_rows": 2,
    "column": 1,
    "deficient": 6,
    "zero": 3,
    "noisy": 12,
    "real": 10,
}
METHODS = ["auto", "gram", "krylov"]
WAYS = [*METHODS, "whole"]


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
        "noisy": signs(353, 301, 12),
        "real": torch.randn(90, 70, generator=generator) @ torch.randn(70, 70, generator=generator),
    }


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, torch.Tensor]]:
    """Return what every rank returned for every matrix and method."""
    folder = tmp_path_factory.mktemp(f"svd-{request.param}")
    save_file(matrices(), folder / "matrices")
    given = {"matrices": str(folder / "matrices"), "out": str(folder), "r": RANKS}
    run_ranks("svd", request.param, methods=METHODS, **given)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(request.param)]


@pytest.mark.parametrize("method", WAYS)
def test_equals_the_whole_svd(results: list[dict[str, torch.Tensor]], method: str) -> None:
    for name, M in matrices().items():
        key, r = f"{method}.{name}", RANKS[name]
        exact = torch.linalg.svd(M.double(), full_matrices=False)
        S, Vh = results[0][f"{key}.S"], results[0][f"{key}.Vh"]
        for k, rank in enumerate(results):
            assert torch.equal(rank[f"{key}.S"], S), "S differs between ranks"
            assert torch.equal(rank[f"{key}.Vh"], Vh), "Vh differs between ranks"
            assert len(rank[f"{key}.U"]) == len(row_range(len(M), k, len(results)))
        U = torch.cat([rank[f"{key}.U"] for rank in results])
        for basis in (U.T @ U, Vh @ Vh.T):
            torch.testing.assert_close(basis, torch.eye(r), atol=1e-5, rtol=0)
        # The sign was chosen in fp64: in fp32 a negative entry may come out as large, not larger.
        assert torch.equal(Vh.amax(1), Vh.abs().amax(1))
        total = exact.S.square().sum().item()
        expected = exact.S[:r].square().sum().item() / total if total else 1.0
        energy = results[0][f"{key}.energy"].item()
        kept = (U.T.double() @ M.double() @ Vh.T.double()).square().sum().item()
        assert kept >= 0.9999 * exact.S[:r].square().sum().item()
        assert energy == pytest.approx(expected, rel=1e-4)
        if method == "krylov" or name in ("noisy", "real"):
            continue  # stopped where 0.9999 of the energy is certain
        assert energy == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(S.double(), exact.S[:r], atol=1e-5, rtol=1e-5)
        optimal = (exact.U[:, :r] * exact.S[:r]) @ exact.Vh[:r]
        error = torch.linalg.matrix_norm(M.double() - (U * S) @ Vh).item()
        best = torch.linalg.matrix_norm(M.double() - optimal).item()
        assert error <= best + 1e-4 * torch.linalg.matrix_norm(M.double()).item() + 1e-6


@pytest.mark.parametrize("method", ["gram", "krylov"])
def test_the_same_subspace_as_one_process(
    results: list[dict[str, torch.Tensor]], method: str
) -> None:
    """Where a gap makes it well-defined: after the 12 directions of "noisy"."""
    M = matrices()["noisy"]
    alone = truncated_svd(M, 3, method=method)  # type: ignore[arg-type]
    Vh = results[0][f"{method}.noisy.Vh"]
    U = torch.cat([rank[f"{method}.noisy.U"] for rank in results])
    # The leading ones of either lie within the other's 12, up to the energy left out.
    assert (Vh @ alone.Vh.T).square().sum(0).min() >= 0.999
    assert (U.T @ alone.U_local).square().sum(0).min() >= 0.999


def test_not_finite_fails_on_every_rank() -> None:
    run_ranks("not_finite", 2, config={})

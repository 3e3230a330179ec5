"""The SVD in one process, on matrices of any kind; and row ranges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasb_ds.linalg import row_range, truncated_svd


@given(num_rows=st.integers(0, 200), world_size=st.integers(1, 40))
def test_row_ranges_cover_all_rows_once(num_rows: int, world_size: int) -> None:
    ranges = [row_range(num_rows, rank, world_size) for rank in range(world_size)]
    assert [i for rows in ranges for i in rows] == list(range(num_rows))
    sizes = [len(rows) for rows in ranges]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_sign_matrix(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 9))
    m = data.draw(st.integers(n, 14))
    r = data.draw(st.integers(1, n))
    entries = data.draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=m * n, max_size=m * n))
    M = torch.tensor(entries, dtype=torch.int8).view(m, n)
    U, S, Vh, energy = truncated_svd(M, r)
    exact = torch.linalg.svdvals(M.double())
    torch.testing.assert_close(S.double(), exact[:r], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(U.T @ U, torch.eye(r), atol=1e-5, rtol=0)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(r), atol=1e-5, rtol=0)
    total = exact.square().sum().item()
    best = (exact[:r].square().sum().item() / total) if total else 1.0
    assert energy == pytest.approx(best, abs=1e-6)
    # What is captured by the bases themselves, without S: B Bᵀ M Aᵀ A.
    kept = (U.T.double() @ M.double() @ Vh.T.double()).square().sum().item()
    assert kept >= (1 - 1e-4) * exact[:r].square().sum().item() - 1e-6


def test_real_valued_with_a_wide_spectrum() -> None:
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(90, 40, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(0, -5, 40, dtype=torch.float64)
    found = truncated_svd(((U * spectrum) @ V.T).float(), 40)
    torch.testing.assert_close(found.S.double(), spectrum, atol=3e-8, rtol=1e-2)
    torch.testing.assert_close(found.U_local.T @ found.U_local, torch.eye(40), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("m", "n", "r", "directions"), [(256, 192, 16, 1), (576, 192, 64, 1), (600, 300, 64, 2)]
)
def test_large_and_rank_deficient(m: int, n: int, r: int, directions: int) -> None:
    """Rounding must not pass for the directions that are not there."""
    generator = torch.Generator().manual_seed(m)
    M = (
        torch.randn(m, 1, generator=generator).sign()
        @ torch.randn(1, n, generator=generator).sign()
    )
    if directions == 2:
        M[: m // 2] = 0
        M[0] = -1
    U, S, Vh, energy = truncated_svd(M.to(torch.int8), r)
    assert torch.linalg.matrix_rank(M) == directions
    exact = torch.linalg.svdvals(M.double())[:r].float()
    torch.testing.assert_close(S, exact, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close((U * S) @ Vh, M, atol=1e-4, rtol=0)
    torch.testing.assert_close(U.T @ U, torch.eye(r), atol=1e-5, rtol=0)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(r), atol=1e-5, rtol=0)
    assert energy == pytest.approx(1.0, abs=1e-6)


def test_the_same_bits_every_time() -> None:
    M = torch.randn(50, 20, generator=torch.Generator().manual_seed(3)).sign().to(torch.int8)
    first, second = truncated_svd(M, 6), truncated_svd(M, 6)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize(
    ("shape", "r", "message"),
    [
        ((4, 6), 2, "give its transpose"),
        ((6, 4), 5, r"1\.\.4"),
        ((6, 4), 0, "r = 0"),
        ((6,), 1, "2-D"),
    ],
)
def test_bad_input(shape: tuple[int, ...], r: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        truncated_svd(torch.ones(shape), r)

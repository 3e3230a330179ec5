"""The SVD in one process, on matrices of any kind; and row ranges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasb_ds.distributed.collectives import row_range
from lorasb_ds.init import sharded_svd
from lorasb_ds.init.sharded_svd import SVDMethod, truncated_svd

METHODS = ("gram", "krylov")


def noisy_signs(m: int, n: int, directions: int, noise: float) -> torch.Tensor:
    """Return signs of directions that fall like 1/sqrt(i), plus noise: similar to gradients."""
    generator = torch.Generator().manual_seed(m + directions)
    scale = torch.arange(1, directions + 1).rsqrt()
    left = torch.randn(m, directions, generator=generator) * scale
    signal = left @ torch.randn(directions, n, generator=generator)
    signal /= signal.square().mean().sqrt()
    return (signal + noise * torch.randn(m, n, generator=generator)).sign().to(torch.int8)


def assert_orthonormal(found: sharded_svd.TruncatedSVD) -> None:
    identity = torch.eye(len(found.S))
    torch.testing.assert_close(found.U_local.T @ found.U_local, identity, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.Vh @ found.Vh.T, identity, atol=1e-5, rtol=0)


def kept_energy(found: sharded_svd.TruncatedSVD, M: torch.Tensor) -> float:
    """Return M's energy in the span of the bases, independent of S."""
    return (found.U_local.T.double() @ M.double() @ found.Vh.T.double()).square().sum().item()


def assert_optimal(found: sharded_svd.TruncatedSVD, M: torch.Tensor) -> None:
    """Check for 0.9999 of the energy that r directions can hold, and that S agrees."""
    exact = torch.linalg.svdvals(M.double()).square()
    best = exact[: len(found.S)].sum().item()
    assert_orthonormal(found)
    assert kept_energy(found, M) >= 0.9999 * best
    assert found.S.double().square().sum().item() == pytest.approx(kept_energy(found, M), rel=1e-5)
    assert found.captured_energy * exact.sum().item() == pytest.approx(best, rel=1e-4)


@given(num_rows=st.integers(0, 200), world_size=st.integers(1, 40))
def test_row_ranges_cover_all_rows_once(num_rows: int, world_size: int) -> None:
    ranges = [row_range(num_rows, rank, world_size) for rank in range(world_size)]
    assert [i for rows in ranges for i in rows] == list(range(num_rows))
    sizes = [len(rows) for rows in ranges]
    assert max(sizes) - min(sizes) <= 1


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
    """Rounding errors must not be taken for directions."""
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("m", "n", "directions", "noise", "r"),
    [
        (300, 300, 60, 1.0, 4),
        (400, 260, 60, 1.0, 48),
        (500, 260, 8, 0.3, 16),  # fewer strong directions than r
        (333, 211, 1, 5.0, 20),  # hardly any
        (700, 130, 130, 0.1, 64),
        (260, 260, 40, 0.0, 33),
    ],
)
def test_both_ways_on_noisy_signs(
    m: int, n: int, directions: int, noise: float, r: int, method: SVDMethod
) -> None:
    M = noisy_signs(m, n, directions, noise)
    assert_optimal(truncated_svd(M, r, method=method), M)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 130),
    n=st.integers(1, 90),
    share=st.floats(0, 1),
    directions=st.integers(1, 12),
    noise=st.sampled_from([0.0, 0.2, 2.0]),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 2**31),
)
def test_any_shape_any_way(
    m: int, n: int, share: float, directions: int, noise: float, method: SVDMethod, seed: int
) -> None:
    m, n = max(m, n), min(m, n)
    M = noisy_signs(m, n, directions, noise)
    assert_optimal(truncated_svd(M, 1 + round(share * (n - 1)), method=method, seed=seed), M)


@pytest.mark.parametrize("method", METHODS)
def test_clustered_and_multiple_values(method: SVDMethod) -> None:
    """Without a gap: many singular values that are equal, exactly or nearly."""
    hadamard = torch.ones(1, 1)
    for _ in range(7):
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    M = hadamard.to(torch.int8)
    assert_optimal(truncated_svd(M, 20, method=method), M)
    generator = torch.Generator().manual_seed(5)
    U, _ = torch.linalg.qr(torch.randn(300, 30, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(240, 30, generator=generator, dtype=torch.float64))
    nearly = (U @ V.T).sign().to(torch.int8)
    for r in (10, 30, 40):
        assert_optimal(truncated_svd(nearly, r, method=method), nearly)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("directions", [0, 1, 3])
def test_fewer_directions_than_r(directions: int, method: SVDMethod) -> None:
    generator = torch.Generator().manual_seed(directions)
    M = torch.zeros(350, 250, dtype=torch.int8)
    for i in range(directions):  # of disjoint rows: rank is their number
        rows = torch.arange(350) % 3 == i
        M[rows] = torch.randn(250, generator=generator).sign().to(torch.int8)
    found = truncated_svd(M, 20, method=method)
    assert_orthonormal(found)
    torch.testing.assert_close((found.U_local * found.S) @ found.Vh, M.float(), atol=1e-4, rtol=0)
    assert found.S[directions:].abs().max() <= 1e-4
    assert found.captured_energy == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [60, 400])
def test_real_values_to_a_hundred_thousandth_of_the_largest(n: int, method: SVDMethod) -> None:
    generator = torch.Generator().manual_seed(n)
    U, _ = torch.linalg.qr(torch.randn(n + 60, 50, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, 50, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(0, -7, 50, dtype=torch.float64)
    r = int((spectrum >= 1e-5).sum())
    found = truncated_svd((U * spectrum) @ V.T, r, method=method)
    torch.testing.assert_close(found.S.double(), spectrum[:r], atol=0, rtol=1e-2)
    assert_orthonormal(found)


@pytest.mark.parametrize("int8_product", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (130, 130), (517, 33), (2000, 257)])
def test_gram_of_signs_is_exact(
    shape: tuple[int, int], int8_product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not int8_product:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    generator = torch.Generator().manual_seed(shape[0])
    M = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
    assert torch.equal(sharded_svd._gram(M).double(), M.double().T @ M.double())


def test_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    M = noisy_signs(300, 220, 30, 0.5)
    assert_optimal(truncated_svd(M, 12, method="krylov"), M)


def test_the_same_bits_every_time() -> None:
    M = torch.randn(50, 20, generator=torch.Generator().manual_seed(3)).sign().to(torch.int8)
    for method in METHODS:
        first, second = (truncated_svd(M, 6, method=method) for _ in range(2))
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value: float) -> None:
    M = torch.ones(6, 4)
    M[2, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        truncated_svd(M, 2)

"""Computations on factors against the dense SVD in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasb_ds.adapters.low_rank import (
    LoraPair,
    effective_rank,
    energy_kept,
    orthonormality_error,
    padded,
    product_svd,
    weighted_sum,
)

SIDES, RANKS = st.integers(1, 12), st.integers(1, 15)  # also r > min(out, in)
KINDS = ("random", "zero", "zero A", "one direction", "repeated", "graded")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_pair(out: int, inner: int, r: int, kind: str, exponents: tuple[int, int]) -> LoraPair:
    generator = seeded(out * 1000 + inner * 31 + r + 10**6 * exponents[0] % 2**32)
    A = torch.randn(r, inner, generator=generator)
    B = torch.randn(out, r, generator=generator)
    if kind == "zero":
        B.zero_()
    if kind == "zero A":
        A.zero_()
    if kind == "one direction":
        A[1:] = A[0]
    if kind == "repeated":
        B[:, 1:] = B[:, :1]
    if kind == "graded":  # 15 directions over 30 orders of magnitude
        A *= 10.0 ** -torch.arange(r).float()[:, None]
        B *= 10.0 ** -torch.arange(r).float()
    return LoraPair(A * 2.0 ** exponents[0], B * 2.0 ** exponents[1])


PAIRS = st.builds(
    make_pair,
    SIDES,
    SIDES,
    RANKS,
    st.sampled_from(KINDS),
    st.tuples(st.integers(-30, 30), st.integers(-30, 30)),
)


def dense(pair: LoraPair) -> torch.Tensor:
    return pair.B.double() @ pair.A.double()


def size(pair: LoraPair) -> float:
    """Return the scale of errors: the update itself may be small by cancellation."""
    return (pair.A.double().norm() * pair.B.double().norm()).item()


@given(PAIRS)
def test_the_svd_is_that_of_the_product(pair: LoraPair) -> None:
    W, found = dense(pair), product_svd(pair)
    k = min(len(pair.A), *W.shape)
    assert (found.U.shape, found.S.shape, found.Vh.shape) == (
        (len(W), k),
        (k,),
        (k, W.shape[1]),
    )
    assert found.S.dtype == torch.float64
    expected = torch.linalg.svdvals(W)
    tolerance = 1e-13 * size(pair)  # 15 products of fp64
    assert (found.S - expected[:k]).abs().max() <= tolerance
    assert expected[k:].max().item() <= tolerance if k < len(expected) else True
    assert ((found.U * found.S) @ found.Vh - W).norm() <= tolerance
    for Q in (found.U, found.Vh.T):
        assert (Q.T @ Q - torch.eye(k, dtype=Q.dtype)).abs().max() < 1e-12  # fp64
    assert (found.S.diff() <= 0).all()


@given(PAIRS, RANKS)
def test_no_update_of_rank_r_is_nearer(pair: LoraPair, r: int) -> None:
    W, cut = dense(pair), product_svd(pair).pair(r)
    assert (cut.A.shape, cut.B.shape) == ((r, W.shape[1]), (len(W), r))
    assert cut.A.dtype == cut.B.dtype == torch.float32
    best = torch.linalg.svdvals(W)[r:].norm().item()
    error = (dense(cut) - W).norm().item()
    # Rounding of A and of B to fp32, 6e-8 each, and that of the dense SVD.
    assert abs(error - best) <= 1.5e-7 * W.norm().item() + 1e-13 * size(pair)
    k = min(len(pair.A), *W.shape, r)
    gram = cut.A.double() @ cut.A.double().T
    wanted = torch.diag((torch.arange(r) < k).double())
    assert (gram - wanted).abs().max() < 1e-6  # fp32


def test_directions_of_very_different_size() -> None:
    """1e-12 of the largest is below fp32's resolution, and the factors still give it."""
    Q, _ = torch.linalg.qr(torch.randn(40, 3, generator=seeded(1), dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(30, 3, generator=seeded(2), dtype=torch.float64))
    S = torch.tensor([1.0, 1e-6, 1e-12], dtype=torch.float64)
    found = product_svd(LoraPair(V.T, Q * S))
    assert torch.allclose(found.S, S, rtol=1e-3, atol=0)  # 1e-16 / 1e-12


@given(PAIRS)
def test_energy_is_what_truncation_leaves(pair: LoraPair) -> None:
    W, found = dense(pair), product_svd(pair)
    kept = energy_kept(found.S)
    assert kept.shape == found.S.shape
    assert kept[-1] == 1
    if not W.any():
        assert (kept == 1).all()
        return
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    for k in range(1, len(kept) + 1):
        rest = (W - (U[:, :k] * S[:k]) @ Vh[:k]).norm() / W.norm()
        # Squares of fp64; what cancels in the product is lost to both.
        assert kept[k - 1].item() == pytest.approx(
            1 - rest.item() ** 2, abs=1e-12 * max(1.0, size(pair) / W.norm().item())
        )


def test_energy_of_numbers() -> None:
    assert energy_kept(torch.tensor([4.0, 3.0, 0.0])).tolist() == [0.64, 1.0, 1.0]
    assert energy_kept(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    tiny = torch.tensor([3e-38, 4e-38]) * 1e-4  # squares would be 0 in fp32
    assert energy_kept(tiny)[0].item() == pytest.approx(0.36, abs=1e-3)  # denormal inputs


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9), st.floats(1e-9, 1e9))
def test_effective_rank(values: list[float], scale: float) -> None:
    shares = [value / math.fsum(values) for value in values]
    expected = math.exp(-math.fsum(p * math.log(p) for p in shares))
    S = torch.tensor(values, dtype=torch.float64)
    assert effective_rank(S * scale) == pytest.approx(expected, rel=1e-12)  # fp64
    assert 1 - 1e-12 <= effective_rank(S) <= len(values) + 1e-12


def test_effective_rank_of_numbers() -> None:
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == 1  # 0 log 0 = 0
    assert effective_rank(torch.zeros(4)) == 0


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5), (7, 1), (1, 1)])
def test_orthonormality(shape: tuple[int, int]) -> None:
    long, short = max(shape), min(shape)
    Q, _ = torch.linalg.qr(torch.randn(long, short, generator=seeded(3), dtype=torch.float64))

    def turned(M: torch.Tensor) -> torch.Tensor:
        return M if shape == (long, short) else M.T

    assert orthonormality_error(turned(Q)) < 1e-14  # fp64
    stretched = Q.clone()
    stretched[:, -1] *= 1.5
    assert orthonormality_error(turned(stretched)) == pytest.approx(1.5**2 - 1)
    if short > 1:
        leaning = Q.clone()
        leaning[:, 1] += 0.1 * Q[:, 0]  # QᵀQ has 0.1 beside the diagonal, 0.01 more on it
        assert orthonormality_error(turned(leaning)) == pytest.approx(0.1)


WEIGHT = st.integers(-32, 32).map(lambda eighths: eighths / 8)


@given(SIDES, SIDES, RANKS, st.lists(WEIGHT, min_size=1, max_size=4))
def test_sums_in_one_basis(out: int, inner: int, r: int, weights: list[float]) -> None:
    A, B = make_pair(out, inner, r, "random", (0, 0))
    trained = [torch.randn(r, r, generator=seeded(i)) for i in range(len(weights))]
    found = weighted_sum([LoraPair(A.clone(), B @ R) for R in trained], weights)
    assert found.A.shape == A.shape
    assert torch.equal(found.A, A)
    R = sum(w * R.double() for w, R in zip(weights, trained, strict=True))
    expected = B.double() @ R @ A.double()
    scale = sum(abs(w) for w in weights) * B.norm() * A.norm() * max(R.norm() for R in trained)
    assert (dense(found) - expected).norm() <= 1e-6 * scale  # B R and the sum are rounded to fp32


@given(
    SIDES,
    SIDES,
    st.lists(st.tuples(WEIGHT, RANKS, st.sampled_from(KINDS)), min_size=2, max_size=4),
)
def test_sums_of_different_bases(
    out: int, inner: int, given_terms: list[tuple[float, int, str]]
) -> None:
    pairs = [make_pair(out, inner, r, kind, (i, -i)) for i, (_, r, kind) in enumerate(given_terms)]
    weights = [w for w, _, _ in given_terms]
    found = weighted_sum(pairs, weights)
    same = all(torch.equal(pair.A, pairs[0].A) for pair in pairs)
    assert len(found.A) == (len(pairs[0].A) if same else sum(len(pair.A) for pair in pairs))
    expected = sum(w * dense(pair) for w, pair in zip(weights, pairs, strict=True))
    scale = sum(abs(w) * size(pair) for w, pair in zip(weights, pairs, strict=True))
    assert (dense(found) - expected).norm() <= 1e-6 * scale  # w B is rounded to fp32


@given(PAIRS, RANKS)
def test_padding_with_zeros(pair: LoraPair, r: int) -> None:
    found = padded(pair, r)
    assert len(found.A) == found.B.shape[1] == max(r, len(pair.A))
    assert torch.equal(found.A[: len(pair.A)], pair.A)
    assert torch.equal(found.B[:, : len(pair.A)], pair.B)
    assert not found.A[len(pair.A) :].any()
    assert not found.B[:, len(pair.A) :].any()

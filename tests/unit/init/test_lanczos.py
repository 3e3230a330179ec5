"""The orthonormalization of a Krylov step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorasb_ds.init import lanczos
from lorasb_ds.init.sharded_svd import truncated_svd


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_twice_is_enough(condition: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, 1, 16, base=1 / condition)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    Y = (torch.randn(3000, 16, generator=generator) * scales) @ rotation
    Q, R = lanczos._qr(Y, exact=False)
    torch.testing.assert_close(Q @ R, Y, atol=1e-5 * Y.abs().max().item(), rtol=0)
    Q, R = lanczos._qr(Q, exact=False)
    torch.testing.assert_close(Q.T @ Q, torch.eye(16), atol=1e-6, rtol=0)
    assert (R.diagonal() > 0.5).all(), "such a block is not done again"


@pytest.mark.parametrize("rank", [0, 5])
def test_a_block_of_lower_rank_shows(rank: int) -> None:
    Y = torch.randn(500, rank) @ torch.randn(rank, 16)
    Q, _ = lanczos._qr(Y, exact=False)
    assert torch.isfinite(Q).all()
    _, R = lanczos._qr(Q, exact=False)
    assert (R.diagonal() < 0.5).any()


def test_steps_of_sign_matrices_take_no_reflections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the random first block does."""
    calls: list[tuple[int, ...]] = []
    reflections = torch.linalg.qr

    def counted(Y: torch.Tensor) -> Any:
        calls.append(tuple(Y.shape))
        return reflections(Y)

    monkeypatch.setattr(torch.linalg, "qr", counted)
    truncated_svd(torch.randn(400, 300).sign().to(torch.int8), 16, method="krylov")
    assert calls == [(300, lanczos.KRYLOV_BLOCK)]

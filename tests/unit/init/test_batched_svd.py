"""Truncated SVDs of a batch of matrices, against torch.linalg.svd."""

from __future__ import annotations

import pytest
import torch

from lorasb_ds.init.batched_svd import batched_svd


def matrices(kind: str, batch: int, m: int, n: int) -> torch.Tensor:
    generator = torch.manual_seed(0)
    G = torch.randn(batch, m, n, generator=generator)
    if kind == "few tokens":  # sums of a few outer products: ranks 0, 1, 2, …
        for e, g in enumerate(G):
            g.copy_(torch.randn(m, e, generator=generator) @ torch.randn(e, n, generator=generator))
    if kind == "decaying":
        G = G @ torch.diag(torch.linspace(0, -6, n).exp())
    return G


@pytest.mark.parametrize("sign", [True, False])
@pytest.mark.parametrize("kind", ["random", "few tokens", "decaying"])
@pytest.mark.parametrize(("m", "n", "r"), [(96, 64, 4), (320, 256, 8), (512, 300, 16)])
def test_equals_dense_svd(m: int, n: int, r: int, kind: str, sign: bool) -> None:
    M = matrices(kind, 5, m, n)
    M = M.sign().to(torch.int8) if sign else M
    U, S, Vh, captured = batched_svd(M, r)
    dense = M.double()
    best = torch.linalg.svdvals(dense)[:, :r]
    energy = dense.square().sum((1, 2))
    identity = torch.eye(r).expand(5, r, r)
    torch.testing.assert_close(U.mT @ U, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(Vh @ Vh.mT, identity, rtol=0, atol=1e-5)
    assert (S.double().square().sum(1) >= 0.9999 * best.square().sum(1) - 1e-9).all()
    projected = U.double().mT @ dense @ Vh.double().mT
    # Of real-valued matrices each value to 1e-2 of its square's residual; 1e-3 of the largest.
    tolerance = 1e-3 * float(best.max())
    torch.testing.assert_close(projected, torch.diag_embed(S.double()), rtol=0, atol=tolerance)
    share = torch.where(energy > 0, best.square().sum(1) / energy, torch.ones_like(energy))
    torch.testing.assert_close(captured.double(), share, rtol=1e-4, atol=1e-6)
    assert (Vh.gather(2, Vh.abs().argmax(2, keepdim=True)) > 0).all()


def test_an_empty_batch() -> None:
    U, S, Vh, captured = batched_svd(torch.zeros(0, 8, 6, dtype=torch.int8), 3)
    assert U.shape == (0, 8, 3)
    assert S.shape == (0, 3)
    assert Vh.shape == (0, 3, 6)
    assert captured.shape == (0,)

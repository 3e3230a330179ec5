"""From one layer's gradient to its factors."""

from __future__ import annotations

import pytest
import torch

from lorasb_ds.initialize import InitReport, decompose

pytestmark = pytest.mark.usefixtures("one_process")


def report_of(**layers: torch.Tensor) -> InitReport:
    found = {name: decompose(name, G, 1, 1e-4)[1] for name, G in layers.items()}
    return InitReport(1, 1, 1e-4, 0.0, 0.0, 0.0, 0.0, 0.0, 0, found)


def test_descent_is_the_inner_product_with_the_update() -> None:
    G = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    svd, layer = decompose("layer", G, 3, 0.1)
    update = (svd.U_local * (-0.1 * svd.S)) @ svd.Vh
    assert layer.descent == pytest.approx((update * G).sum().item(), rel=1e-5)
    assert layer.descent < 0
    exact = torch.linalg.svd(G.sign())
    expected = -0.1 * (exact.U[:, :3] * exact.S[:3]) @ exact.Vh[:3]
    torch.testing.assert_close(update, expected, atol=1e-5, rtol=0)


def test_layers_that_do_not_descend_are_named() -> None:
    uphill = torch.full((6, 6), 0.01)
    uphill[0, 0] = -100.0  # one entry is all of G and hardly any of sign(G)
    report = report_of(good=torch.ones(3, 2), uphill=uphill, unused=torch.zeros(4, 4))
    assert report.not_descending == ["uphill", "unused"]

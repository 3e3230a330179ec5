"""From one layer's gradient to its SVD, slopes and report."""

from __future__ import annotations

import pytest
import torch

from lorasb_ds.init.decomposition import decompose, describe_layer
from lorasb_ds.init.init_report import LayerInit

pytestmark = pytest.mark.usefixtures("one_process")


def layer_of(G: torch.Tensor, r: int = 1, update: str = "sign") -> LayerInit:
    svd, slopes = decompose({"layer": G}, r, update)["layer"]
    return describe_layer(svd, slopes, torch.bfloat16, 1, None)


@pytest.mark.parametrize("update", ["sign", "adam", "raw"])
def test_the_update_and_its_slope(update: str) -> None:
    G = 1e-7 * torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    wanted = {
        "sign": torch.where(G > 0, 1.0, -1.0),
        "adam": torch.tensor([[g / (abs(g) + 1e-8) for g in row] for row in G.tolist()]),
        "raw": G,
    }[update]
    svd, slopes = decompose({"layer": G}, 3, update)["layer"]
    found = (svd.U_local * svd.S) @ svd.Vh
    exact = torch.linalg.svd(wanted)
    expected = (exact.U[:, :3] * exact.S[:3]) @ exact.Vh[:3]
    torch.testing.assert_close(found, expected, atol=1e-5 * wanted.abs().max().item(), rtol=0)
    slope = (found * G).sum().item()
    assert slopes.sum().item() == pytest.approx(slope, rel=1e-4)
    assert slope > 0


def test_report_of_a_layer() -> None:
    G = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    layer = layer_of(G, 3)
    assert layer.orthonormality_error < 1e-5 < layer.stored_orthonormality_error < 1e-2
    assert layer.squared_norm == pytest.approx(54, rel=1e-5)
    torch.testing.assert_close(layer.R(0.5), torch.diag(-0.5 * torch.tensor(layer.spectrum)))


def test_layers_that_do_not_descend_start_at_zero() -> None:
    uphill = torch.full((6, 6), 0.01)
    uphill[0, 0] = -100.0  # one entry is all of G and hardly any of sign(G)
    matrices = {"good": torch.ones(3, 2), "uphill": uphill, "unused": torch.zeros(4, 4)}
    layers = {name: layer_of(G) for name, G in matrices.items()}
    assert [name for name, layer in layers.items() if layer.slope <= 0] == ["uphill", "unused"]
    assert [name for name, layer in layers.items() if layer.R(1.0).any()] == ["good"]
    assert layers["unused"].orthonormality_error < 1e-5, "any basis, but a basis"

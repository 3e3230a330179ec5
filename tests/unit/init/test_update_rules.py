"""Updates against one real step of the optimizers that they imitate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.training_options import FIRST_STEPS
from lorasb_ds.init.decomposition import decompose
from lorasb_ds.init.update_rules import UPDATE_RULES, step_scale
from tests.runs import run_ranks

pytestmark = pytest.mark.usefixtures("one_process")

LR = 0.5
# Newton-Schulz with coefficients that converge, until nothing changes: torch's own 5 steps stop
# where singular values are between 0.7 and 1.2.
EXACT = {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 60}


def gradient(out_features: int, in_features: int) -> torch.Tensor:
    """Return a gradient with rows and columns of different sizes and a few dominant directions."""
    generator = torch.Generator().manual_seed(out_features)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    G = normal(out_features, in_features) + normal(out_features, 3) @ normal(3, in_features)
    return G * normal(out_features, 1).exp() * normal(1, in_features).exp()


def real_step(name: str, W: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """Return what torch's optimizer of that name subtracts from W, divided by the learning rate."""
    parameter = torch.nn.Parameter(W.clone())
    kinds: dict[str, Any] = {
        "sign": lambda p: torch.optim.AdamW(p, lr=LR, eps=1e-30, weight_decay=0.0),
        "adam": lambda p: torch.optim.AdamW(p, lr=LR, eps=1e-8, weight_decay=0.0),
        "raw": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=LR, weight_decay=0.0),
        "muon": lambda p: torch.optim.Muon(p, lr=LR, weight_decay=0.0, **EXACT),
    }
    optimizer = kinds[name]([parameter])
    parameter.grad = G.clone()
    optimizer.step()
    return (W - parameter.detach()) / LR


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)])
@pytest.mark.parametrize("name", UPDATE_RULES)
def test_an_update_is_the_optimizer_s_first_step(name: str, shape: tuple[int, int]) -> None:
    """All of it, scale included, from rows of the gradient or of its transpose."""
    G = 1e-3 * gradient(*shape)
    W = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = real_step(name, W, G)
    transposed = shape[1] > shape[0]
    rows = G.T.contiguous() if transposed else G
    scale = step_scale(name, *shape, lambda: W.square().mean().sqrt().item())
    svd, slopes = decompose({"layer": rows}, min(shape), name, scales={"layer": scale})["layer"]
    found = (svd.U_local * svd.S) @ svd.Vh
    found = found.T if transposed else found
    # torch's Muon works in bf16, and the small directions of G need many of its steps.
    tolerance = 0.03 if name == "muon" else 1e-4
    assert torch.linalg.norm(found - wanted) <= tolerance * torch.linalg.norm(wanted)
    assert slopes.sum().item() == pytest.approx((wanted * G).sum().item(), rel=tolerance)
    assert svd.captured_energy == pytest.approx(1.0)


def test_muon_s_update_keeps_the_gradient_s_leading_directions() -> None:
    """All equally far; as torch's Muon with its 5 steps, too."""
    G = gradient(24, 10)
    svd, slopes = decompose({"layer": G}, 4, "muon", scales={"layer": math.sqrt(2.4)})["layer"]
    exact = torch.linalg.svd(G, full_matrices=False)
    assert svd.S.tolist() == pytest.approx([math.sqrt(2.4)] * 4)
    assert svd.captured_energy == pytest.approx(0.4), "all of UVᵀ's directions are equal"
    torch.testing.assert_close(svd.U_local @ svd.Vh, exact.U[:, :4] @ exact.Vh[:4])
    torch.testing.assert_close(slopes, math.sqrt(2.4) * exact.S[:4])
    parameter = torch.nn.Parameter(torch.zeros(24, 10))
    parameter.grad = G.clone()
    torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0).step()
    along = -(svd.U_local.T @ parameter.detach() @ svd.Vh.T) / math.sqrt(2.4)
    assert (along - torch.eye(4)).abs().max() < 0.4, "its 5 steps stop between 0.7 and 1.2"


def test_muon_s_update_of_a_gradient_of_a_lower_rank() -> None:
    """No step along directions that the gradient does not have."""
    G = torch.outer(torch.arange(1.0, 10.0), torch.ones(6))
    svd, slopes = decompose({"layer": G}, 3, "muon")["layer"]
    assert svd.S.tolist() == [1.0, 0.0, 0.0]
    assert svd.captured_energy == 1.0
    assert slopes.sum().item() == pytest.approx(torch.linalg.norm(G).item(), rel=1e-5)
    nothing, flat = decompose({"layer": torch.zeros(9, 6)}, 3, "muon")["layer"]
    assert nothing.S.tolist() == flat.tolist() == [0.0] * 3


def test_adafactor_s_update_of_small_and_missing_gradients() -> None:
    """Sizes do not matter, as in the paper (its epsilon is 1e-30); rows of zeros stay zeros."""
    G = gradient(12, 8)
    G[3], G[:, 5] = 0.0, 0.0
    update = UPDATE_RULES["adafactor"].matrix(G, None)
    assert not update[3].any()
    assert not update[:, 5].any()
    assert update.square().mean().sqrt() <= 1.0 + 1e-5
    tiny = UPDATE_RULES["adafactor"].matrix(1e-9 * G, None)
    torch.testing.assert_close(tiny, update, atol=1e-4, rtol=1e-4)
    assert not UPDATE_RULES["adafactor"].matrix(torch.zeros(4, 3), None).any()


def test_every_optimizer_has_its_update() -> None:
    found = {name: RunConfig(optimizer=name).update_rule for name in FIRST_STEPS}  # type: ignore[arg-type]
    assert found == FIRST_STEPS
    assert set(found.values()) <= UPDATE_RULES.keys()
    assert RunConfig(optimizer="muon", init_update="sign").update_rule == "sign"


def test_sharded_as_whole(tmp_path: Any) -> None:
    """2 ranks with different numbers of rows; only sums over rows may round differently."""
    G = gradient(25, 10)
    save_file({"G": G}, tmp_path / "G")
    run_ranks("updates", 2, gradient=str(tmp_path / "G"), out=str(tmp_path))
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for name in UPDATE_RULES:
        alone, slopes = decompose({"layer": G}, 4, name)["layer"]
        whole = (alone.U_local * alone.S) @ alone.Vh
        U = torch.cat([part[f"{name}.U"] for part in parts])
        for part in parts:
            found = (U * part[f"{name}.S"]) @ part[f"{name}.Vh"]
            torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(part[f"{name}.slopes"], slopes, atol=1e-4, rtol=1e-4)
    assert len(parts[0]["sign.U"]) == 12

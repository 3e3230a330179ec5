"""Overlaps of subspaces, against scipy's principal angles and sums over what is on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.linalg import subspace_angles

from lorasb_ds.errors import ConfigError
from lorasb_ds.export.inspection import basis_overlaps, subspace_overlaps

R, LAYERS = 4, {"one": (24, 10), "two": (7, 30)}


def dense(a: torch.Tensor, b: torch.Tensor) -> float:
    """The mean squared cosine of the principal angles, which scipy takes from another SVD."""
    return float(np.mean(np.cos(subspace_angles(a.double().numpy(), b.double().numpy())) ** 2))


def test_principal_angles() -> None:
    generator = torch.Generator().manual_seed(0)
    bases = torch.randn(5, 40, 6, generator=generator)
    bases[1] = bases[0] @ torch.randn(6, 6, generator=generator)  # the same span
    bases[2, :, :3] = bases[0, :, :3]  # half of it shared
    found = subspace_overlaps(bases)
    expected = torch.tensor([[dense(a, b) for a in bases] for b in bases])
    # fp32 QR and products: a few ulps of numbers up to 1; scipy is in double.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found[0, 1] == pytest.approx(1, abs=1e-5)
    assert found[0, 2] > 0.5 > found[0, 3]


def test_known_angles() -> None:
    """A plane that is turned by 60 degrees around one of its axes: cosines 1 and 1/2."""
    eye = torch.eye(3)
    turned = torch.stack([eye[0], 0.5 * eye[1] + 0.75**0.5 * eye[2]])
    apart = torch.stack([eye[:2].T, turned.T])
    assert subspace_overlaps(apart)[0, 1].item() == pytest.approx((1 + 0.25) / 2, abs=1e-6)
    orthogonal = torch.stack([eye[:, :1], eye[:, 1:2]])
    assert subspace_overlaps(orthogonal)[0, 1].item() == pytest.approx(0, abs=1e-6)


def test_random_subspaces_meet_by_chance() -> None:
    """Their mean is r / n; that of 190 pairs has a deviation of a hundredth of it or so."""
    bases = torch.randn(20, 64, 16, generator=torch.Generator().manual_seed(1))
    found = subspace_overlaps(bases)
    pairs = found[torch.triu_indices(20, 20, 1).unbind()]
    assert pairs.mean().item() == pytest.approx(16 / 64, rel=0.05)


def save_basis(folder: Path, seed: int, layers: dict[str, tuple[int, int]] = LAYERS) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, in_) in layers.items():
        B = torch.linalg.qr(torch.randn(out, R, generator=generator)).Q
        A = torch.linalg.qr(torch.randn(in_, R, generator=generator)).Q.T
        tensors[f"{name}.lora_A"] = A.contiguous().bfloat16()
        tensors[f"{name}.lora_B"] = B.contiguous().bfloat16()
        tensors[f"{name}.lora_R"] = torch.zeros(R, R)
        tensors[f"{name}.S"] = torch.ones(R)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "basis.safetensors")
    return folder


def test_bases_on_disk(tmp_path: Path) -> None:
    """Rows of A and columns of B, the mean over layers; the same basis is 1 although rounded."""
    from safetensors.torch import load_file

    folders = [save_basis(tmp_path / str(seed), seed) for seed in (1, 2, 3)]
    folders.append(save_basis(tmp_path / "again", 2))
    found = basis_overlaps(folders)
    bases = [load_file(folder / "basis.safetensors") for folder in folders]
    for side, overlaps in (("lora_A", found.A), ("lora_B", found.B)):
        for i, j in ((0, 1), (0, 2), (2, 1)):
            spans = [
                [basis[f"{name}.{side}"].T if side == "lora_A" else basis[f"{name}.{side}"]]
                for basis in (bases[i], bases[j])
                for name in LAYERS
            ]
            ours, theirs = spans[: len(LAYERS)], spans[len(LAYERS) :]
            each = [dense(a[0], b[0]) for a, b in zip(ours, theirs, strict=True)]
            assert overlaps[i][j] == pytest.approx(np.mean(each), abs=1e-5)
            assert overlaps[j][i] == pytest.approx(overlaps[i][j], abs=1e-6)
        assert overlaps[1][3] == pytest.approx(1, abs=1e-5)
    assert found.chance == pytest.approx(((R / 10 + R / 30) / 2, (R / 24 + R / 7) / 2))


def test_bases_that_cannot_be_compared(tmp_path: Path) -> None:
    one = save_basis(tmp_path / "one", 1)
    other = save_basis(tmp_path / "other", 1, {"one": (24, 10)})
    with pytest.raises(ConfigError, match="have bases of other layers, or of another r"):
        basis_overlaps([one, other])
    with pytest.raises(ConfigError, match=r"nowhere/basis\.safetensors cannot be read"):
        basis_overlaps([one, tmp_path / "nowhere"])
    (other / "basis.safetensors").write_bytes(b"0" * 40)
    with pytest.raises(ConfigError, match=r"other/basis\.safetensors cannot be read"):
        basis_overlaps([one, other])

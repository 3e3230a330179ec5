"""Models' folders in FP8 and MXFP4, with their decoded twins: written by plain torch."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
PROJECTION = re.compile(r"proj\w*\.weight$")
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def tensors_of(folder: Path) -> Tensors:
    return {
        k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()
    }


def write_model(
    source: Path, folder: Path, files: Mapping[str, Tensors], quantization: Any = None
) -> Path:
    """Copy a model's folder with other weights and another quantization_config."""
    left = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(source, folder, ignore=left, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        places = {name: file for file, tensors in files.items() for name in tensors}
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def to_fp8(W: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return E4M3 codes and the fp32 scales of their blocks, of matrices of any sides."""
    rows, columns = W.shape[-2:]
    grid = [-(-n // size) for n, size in zip((rows, columns), block, strict=True)]
    padding = (0, grid[1] * block[1] - columns, 0, grid[0] * block[0] - rows)
    blocks = torch.nn.functional.pad(W.float(), padding)
    blocks = blocks.unflatten(-1, (grid[1], block[1])).unflatten(-3, (grid[0], block[0]))
    scales = blocks.abs().amax((-3, -1)) / 448
    return (W / spread(scales, block, W)).to(torch.float8_e4m3fn), scales


def spread(scales: torch.Tensor, block: tuple[int, int], W: torch.Tensor) -> torch.Tensor:
    """Repeat the scale of each block for each of its elements."""
    wide = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : W.shape[-2], : W.shape[-1]]


def in_fp8(plain: Path, folder: Path, block: tuple[int, int]) -> tuple[Path, Path]:
    """Write a model with its projections in FP8, their scales in another file; and its twin."""
    codes, scales, decoded = Tensors(), Tensors(), Tensors()
    for name, W in tensors_of(plain).items():
        codes[name] = decoded[name] = W
        if PROJECTION.search(name):
            codes[name], scales[f"{name}_scale_inv"] = to_fp8(W, block)
            decoded[name] = codes[name].float() * spread(scales[f"{name}_scale_inv"], block, W)
    files = {"model-1.safetensors": codes, "model-2.safetensors": scales}
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    return (
        write_model(plain, folder / "fp8", files, quantization),
        write_model(plain, folder / "decoded", {"model.safetensors": decoded}),
    )


def to_mxfp4(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return blocks and scales, uint8, of experts (experts, in, out)."""
    groups = W.transpose(1, 2).unflatten(-1, (-1, 32)).float()
    exponents = groups.abs().amax(-1).log2().floor() - 2
    numbers = groups / exponents.exp2().unsqueeze(-1)
    codes = (numbers.abs().unsqueeze(-1) - FP4).abs().argmin(-1) + 8 * (numbers < 0)
    pairs = codes.unflatten(-1, (16, 2))
    return (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8), (exponents + 127).to(torch.uint8)


def in_mxfp4(plain: Path, folder: Path, decode: Callable[..., torch.Tensor]) -> tuple[Path, Path]:
    """Write a gpt-oss with its experts in MXFP4; and its twin, decoded by a function."""
    stored, decoded = Tensors(), Tensors()
    for name, W in tensors_of(plain).items():
        stored[name] = decoded[name] = W
        if re.search(r"experts\.\w+_proj$", name):
            del stored[name]
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = parts = to_mxfp4(W)
            decoded[name] = decode(*parts, dtype=torch.float32)
    files = {
        "model-1.safetensors": {n: t for n, t in stored.items() if not n.endswith("_scales")},
        "model-2.safetensors": {n: t for n, t in stored.items() if n.endswith("_scales")},
    }
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return (
        write_model(plain, folder / "mxfp4", files, quantization),
        write_model(plain, folder / "decoded", {"model.safetensors": decoded}),
    )

"""A base on several ranks: read once, shared by all, whole or in ZeRO-3 shards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import dot_natural_key

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.models.base import Base
from lorasb_ds.models.loading import load_base
from tests.runs import REALLY_SHARDED, run_ranks

STAGE_3: dict[str, Any] = {"stage": 3} | REALLY_SHARDED


@pytest.mark.parametrize(
    ("world_size", "zero_optimization", "quantization"),
    [
        (3, STAGE_3, {}),
        pytest.param(3, STAGE_3, {"load_in_4bit": True}, marks=pytest.mark.slow),
        pytest.param(2, STAGE_3, {"load_in_8bit": True}, marks=pytest.mark.slow),
        pytest.param(2, {"stage": 2}, {"load_in_4bit": True}, marks=pytest.mark.slow),
    ],
    ids=["zero3-bf16", "zero3-4bit", "zero3-8bit", "zero2-4bit"],
)
def test_ranks_hold_what_one_process_does(
    demo_model: Path,
    tmp_path: Path,
    world_size: int,
    zero_optimization: Any,
    quantization: dict[str, bool],
) -> None:
    options = {"model": str(demo_model)} | quantization
    out = str(tmp_path / "out.safetensors")
    run_ranks("load", world_size, config=options, out=out, zero_optimization=zero_optimization)
    found = load_file(out)
    bytes_read = int(found.pop("bytes_read"))
    files_bytes = sum(file.stat().st_size for file in demo_model.glob("*.safetensors"))
    # Once in all; headers, configurations and Python's own modules by every rank.
    assert files_bytes <= bytes_read <= files_bytes + world_size * (8 << 20)
    if quantization:
        config = RunConfig(**options)
        ds_config = {"zero_optimization": {"stage": 2}}
        model = load_base(Base(config.model), config, ds_config)
    else:
        model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.bfloat16)
    assert_same(found, model)


def assert_same(found: dict[str, torch.Tensor], model: Any) -> None:
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Packed weights come as bytes, which as numbers may be NaN.
        assert torch.equal(found[name], value.view(found[name].dtype)), name


def test_moe_experts_are_fused_on_their_way(tiny_moe: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out.safetensors")
    config = {"model": str(tiny_moe), "dtype": "fp32"}
    run_ranks("load", 2, config=config, out=out, zero_optimization=STAGE_3)
    found = load_file(out)
    found.pop("bytes_read")
    for name in [name for name in found if ".experts." in name]:  # transformers' names
        found[name.removesuffix(".weight")] = found.pop(name)
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    assert any(tensor.dim() == 3 for tensor in found.values())
    assert_same(found, model)


@pytest.mark.parametrize("owner", [0, 1])
def test_one_rank_that_cannot_read_ends_all(tiny_model: Path, tmp_path: Path, owner: int) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    # Ranks take turns, the largest first.
    name = f"model.layers.0.mlp.{('gate_proj', 'up_proj')[owner]}.weight"
    order = sorted(tensors, key=lambda n: (-tensors[n].nbytes, dot_natural_key(n)))
    assert order.index(name) % 2 == owner
    tensors[name][0, 5] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})
    message = rf"The base cannot be loaded: {name} in model\.safetensors holds values "
    for quantized in (False, True):
        config = {"model": str(tmp_path / "model"), "load_in_4bit": quantized}
        run_ranks("load_broken", 2, config=config, message=message)

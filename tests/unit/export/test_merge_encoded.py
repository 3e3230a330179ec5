"""Merge into bases in FP8 and MXFP4: the merged model is in bf16."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lorasb_ds.errors import ConfigError
from lorasb_ds.export.adapter_reader import read_adapter
from lorasb_ds.export.inspection import inspect_adapter
from lorasb_ds.export.merge_plan import weights_of
from tests.encoded import in_fp8, in_mxfp4, tensors_of, write_model
from tests.references import load_whole
from tests.unit.export.test_merge import by_peft, merged, ulps, write_adapter
from tests.unit.models.test_loading import base, everything
from tests.unit.models.test_stored_formats import plain


@pytest.fixture(params=["DeepseekV3", "GptOss"], scope="module")
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A base in FP8 or MXFP4, its twin in fp32, and an adapter."""
    folder = tmp_path_factory.mktemp(request.param)
    source = plain(request.param, folder / "plain", torch.bfloat16)
    if request.param == "GptOss":
        stored, twin = in_mxfp4(source, folder, convert_moe_packed_tensors)
    else:
        stored, twin = in_fp8(source, folder, (10, 20))
    query = "q_proj" if request.param == "GptOss" else "q_b_proj"
    return stored, twin, write_adapter(twin, folder / "adapter", [query, "o_proj"])


def test_the_merged_model_is_in_bf16(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    stored, twin, adapter = models
    out = tmp_path / "out"
    merged(adapter, stored, out)
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    found, decoded = tensors_of(out), tensors_of(twin)
    assert found.keys() == decoded.keys()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    changed = {f"{layer}.weight" for layer in read_adapter(str(adapter)).layers}
    expected = by_peft(twin, adapter)
    for name, tensor in found.items():
        if name in changed:
            assert ulps(tensor, expected[name].bfloat16()) <= 1, name
            assert not torch.equal(tensor, decoded[name].bfloat16())
        else:
            assert torch.equal(tensor, decoded[name].to(tensor.dtype)), name
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    tokens = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, load_whole(str(out), "bf16")(tokens).logits)


def test_in_4_bits(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """As loading quantizes the merged model in bf16, but for experts, which stay in bf16."""
    stored, _, adapter = models
    merged(adapter, stored, tmp_path / "bf16")
    merged(adapter, stored, tmp_path / "4bit", load_in_4bit=True)
    ours, theirs = (
        everything(base(tmp_path / folder, load_in_4bit=True)) for folder in ("4bit", "bf16")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if ours[name].ndim == 3:
            assert tensor.ndim == 1
        else:
            assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_the_size_of_updates(models: tuple[Path, Path, Path]) -> None:
    stored, twin, path = models
    adapter = read_adapter(str(path))
    ours, theirs = (
        inspect_adapter(adapter, weights_of(adapter, str(model))) for model in (stored, twin)
    )
    assert ours == theirs
    assert all(update.relative_norm for update in ours.values())


def test_a_scale_that_is_not_a_number(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    stored, _, adapter = models
    tensors = tensors_of(stored)
    name = next(name for name in tensors if "scale" in name)
    wrong = 255 if tensors[name].dtype == torch.uint8 else torch.inf
    tensors[name].flatten()[0] = wrong
    broken = write_model(stored, tmp_path / "broken", {"model.safetensors": tensors})
    message = rf"cannot be merged: {name} in model\.safetensors holds scales that are not finite"
    with pytest.raises(ConfigError, match=message):
        merged(adapter, broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()

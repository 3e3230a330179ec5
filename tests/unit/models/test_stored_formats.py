"""Bases in FP8 and MXFP4 against plain torch, and against what transformers decodes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lorasb_ds.errors import ConfigError
from lorasb_ds.models.base import Base
from lorasb_ds.models.checkpoint_files import read_header
from lorasb_ds.models.linear_layers import linear_layers
from lorasb_ds.models.quantization import PackedLinear
from lorasb_ds.models.stored_formats import decoded
from lorasb_ds.models.tensor_reader import TensorReader
from lorasb_ds.models.weight_map import unused_tensors
from tests.encoded import (
    PROJECTION,
    Tensors,
    in_fp8,
    in_mxfp4,
    spread,
    tensors_of,
    to_fp8,
    to_mxfp4,
    write_model,
)
from tests.references import load_whole
from tests.unit.models.test_loading import (
    ARCHITECTURES,
    DTYPES,
    LLAMA,
    MOE,
    base,
    edit_tensor,
    everything,
)

CONFIGS = ARCHITECTURES | {
    "Qwen3Moe": LLAMA | MOE | {"num_experts": 4, "head_dim": 8},
    # Sides that are no multiples of 64 either.
    "GptOss": LLAMA
    | {"hidden_size": 96, "intermediate_size": 32, "num_local_experts": 3, "head_dim": 8}
    | {"num_experts_per_tok": 2},
    "DeepseekV4": LLAMA
    | MOE
    | {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "q_lora_rank": 32}
    | {
        "o_lora_rank": 32,
        "o_groups": 2,
        "n_routed_experts": 4,
        "head_dim": 32,
        "num_key_value_heads": 1,
    },
}
UP = "model.layers.1.mlp.up_proj.weight"
UP_SCALES = f"{UP}_scale_inv"
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"


def plain(architecture: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random model."""
    config = getattr(transformers, f"{architecture}Config")(**CONFIGS[architecture])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def assert_equal(found: Any, expected: Any) -> None:
    ours, theirs = everything(found), everything(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    input_ids = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        logits, theirs_logits = found(input_ids).logits, expected.eval()(input_ids).logits
    if found.config.model_type == "gpt_oss":  # its products are summed in another order
        torch.testing.assert_close(logits, theirs_logits, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits, theirs_logits)
    assert {type(found.get_submodule(name)) for name in linear_layers(found)} == {nn.Linear}
    assert not hasattr(found.config, "quantization_config")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("architecture", ["Llama", "DeepseekV3", "Qwen3Moe"])
def test_fp8_equals_plain_torch(architecture: str, dtype: str, tmp_path: Path) -> None:
    """In blocks that the sides are no multiples of, with scales in another file."""
    stored, twin = in_fp8(plain(architecture, tmp_path / "plain"), tmp_path, (10, 20))
    expected = AutoModelForCausalLM.from_pretrained(twin, dtype=DTYPES[dtype])
    assert_equal(load_whole(str(stored), dtype), expected)
    found = Base(str(stored))
    assert found.quantization is None
    assert unused_tensors(found.model, found.sources, found.stored) == []


@pytest.mark.parametrize("scale", ["float", "ue8m0", "of a matrix", "of a row"])
@pytest.mark.parametrize("architecture", ["DeepseekV3", "Qwen3Moe"])
def test_fp8_equals_transformers(architecture: str, scale: str, tmp_path: Path) -> None:
    """Written by transformers' quantizer, and read by its dequantizer."""
    source = plain(architecture, tmp_path / "plain", torch.bfloat16)
    config = FineGrainedFP8Config(
        weight_block_size=(4, 8) if scale in ("float", "ue8m0") else None,
        scale_fmt="ue8m0" if scale == "ue8m0" else "float",
        modules_to_not_convert=["lm_head", "o_proj"],
    )
    quantizer = Fp8Quantize(SimpleNamespace(quantization_config=config))
    tensors = Tensors()
    for name, W in tensors_of(source).items():
        tensors[name] = W
        if PROJECTION.search(name) and "o_proj" not in name:
            tensors |= quantizer._quantize_one(name, W)
            if scale == "of a row":
                tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(W, (1, W.shape[1]))
    assert sum(t.dtype == torch.float8_e4m3fn for t in tensors.values()) > 10
    files = {"model.safetensors": tensors}
    folder = write_model(source, tmp_path / "fp8", files, config.to_dict())
    expected = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    assert_equal(load_whole(str(folder), "bf16"), expected)


def test_fp8_with_experts_in_fp4(tmp_path: Path) -> None:
    """DeepSeek-V4's files: scales are E8M0, under another name."""
    source = plain("DeepseekV4", tmp_path / "plain", torch.bfloat16)
    tensors = Tensors()
    for name, W in tensors_of(source).items():
        tensors[name], scales = W, f"{name.removesuffix('.weight')}.scale"
        if ".experts." in name:
            blocks, exponents = to_mxfp4(W.T[None])
            tensors[name] = blocks[0].flatten(1).view(torch.int8)
            tensors[scales] = exponents[0].view(torch.float8_e8m0fnu)
        elif re.search(r"\.(attn\.w(kv|[qo]_[ab])|shared_experts\.w\d)\.weight$", name):
            tensors[name], fp32 = to_fp8(W, (16, 16))
            tensors[scales] = fp32.log2().ceil().exp2().to(torch.float8_e8m0fnu)
    assert sum(t.dtype == torch.int8 for t in tensors.values()) == 2 * 4 * 3
    config = FineGrainedFP8Config(
        weight_block_size=(16, 16), scale_fmt="ue8m0", expert_dtype="fp4", dequantize=True
    )
    folder = write_model(source, tmp_path / "fp8", {"model.safetensors": tensors}, config.to_dict())
    expected = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config
    )
    ours, theirs = everything(load_whole(str(folder), "bf16")), everything(expected)
    assert ours.keys() == theirs.keys()
    # While it dequantizes, transformers forgets that some norms are to be fp32.
    assert all(torch.equal(ours[name].to(t.dtype), t) for name, t in theirs.items())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_mxfp4_equals_transformers(dtype: str, tmp_path: Path) -> None:
    source = plain("GptOss", tmp_path / "plain", torch.bfloat16)
    stored, twin = in_mxfp4(source, tmp_path, convert_moe_packed_tensors)
    found = load_whole(str(stored), dtype)
    assert_equal(found, AutoModelForCausalLM.from_pretrained(twin, dtype=DTYPES[dtype]))
    if dtype == "bf16":
        expected = AutoModelForCausalLM.from_pretrained(
            stored, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
        )
        assert_equal(found, expected)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype])
    W, decoded = (everything(m)[EXPERTS].float() for m in (original, found))
    assert 0.01 < (decoded - W).norm() / W.norm() < 0.2


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("architecture", ["DeepseekV3", "GptOss"])
def test_quantized_anew(architecture: str, kind: str, tmp_path: Path) -> None:
    source = plain(architecture, tmp_path / "plain", torch.bfloat16)
    if architecture == "GptOss":
        stored, twin = in_mxfp4(source, tmp_path, convert_moe_packed_tensors)
    else:
        stored, twin = in_fp8(source, tmp_path, (10, 20))
    found, expected = (base(f, **{f"load_in_{kind}": True}) for f in (stored, twin))
    assert all(isinstance(found.get_submodule(n), PackedLinear) for n in linear_layers(found))
    ours, theirs = everything(found), everything(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # Packed bytes are not numbers: some would be NaN.
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def stack(form: str) -> tuple[Tensors, dict[str, Any] | None]:
    """Five matrices of (64, 96); the third of them is not finite."""
    W = torch.randn(5, 64, 96, generator=torch.Generator().manual_seed(0))
    if form == "plain":
        W[2, 3, 4] = torch.nan
        return {"W": W}, None
    if form == "fp8":
        codes, scales = to_fp8(W, (10, 20))
        scales[2, 3, 4] = torch.inf
        return {"W": codes, "W_scale_inv": scales}, {
            "quant_method": "fp8",
            "weight_block_size": [10, 20],
        }
    blocks, scales = to_mxfp4(W)
    scales[2, 95, 1] = 255
    return {"W_blocks": blocks, "W_scales": scales}, {"quant_method": "mxfp4"}


@pytest.mark.parametrize("form", ["plain", "fp8", "mxfp4"])
def test_an_expert_is_read_without_the_others(form: str, tmp_path: Path) -> None:
    tensors, quantization = stack(form)
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    stored = decoded(read_header(file, "--model"), quantization, "x")
    assert stored.keys() == {"W"}
    assert stored["W"].shape == (5, 64, 96)
    expected = {
        "plain": lambda t: t["W"],
        "fp8": lambda t: t["W"].float() * spread(t["W_scale_inv"], (10, 20), t["W"]),
        "mxfp4": lambda t: convert_moe_packed_tensors(*t.values(), dtype=torch.float32),
    }[form](tensors)
    with closing(TensorReader(stored)) as reader:
        for index in (0, 1, 3, 4):
            for dtype in (torch.float32, torch.bfloat16):
                found = reader.expert("W", index, dtype)
                assert torch.equal(found, expected[index].to(dtype)), index
        for read in (reader.read, lambda key, dtype: reader.expert(key, 2, dtype)):
            with pytest.raises(ValueError, match=r"^W\w* in model\.safetensors holds"):
                read("W", torch.float32)


def test_the_digest_covers_codes_and_scales(tmp_path: Path) -> None:
    folder, _ = in_fp8(plain("Llama", tmp_path / "plain"), tmp_path, (10, 20))
    digests = {Base(str(folder)).digest}
    for name in (UP, UP_SCALES):
        edit_tensor(folder, name, lambda t: (t.float() * 1.25).to(t.dtype))
        digests.add(Base(str(folder)).digest)
    assert len(digests) == 3


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    """Return a fault: another tensor of that name, or none."""

    def fault(tensors: Tensors) -> Tensors:
        changed = change(tensors[name])
        left = {n: t for n, t in tensors.items() if n != name}
        return left if changed is None else left | {name: changed}

    return fault


def with_value(index: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.uint8 if tensor.itemsize == 1 else tensor.dtype)[index] = value
        return tensor

    return change


# What is wrong -> the fault, whether headers show it, the message.
FAULTS_FP8: dict[str, tuple[Any, bool, str]] = {
    "no scales": (
        replaced(UP_SCALES, lambda _: None),
        True,
        rf"{UP} in model\.safetensors is quantized, but its scales, {UP_SCALES}, are missing",
    ),
    "scales of another weight": (
        replaced(UP_SCALES, lambda t: t.T.contiguous()),
        True,
        rf"{UP_SCALES} in model\.safetensors has shape \(2, 5\), but {UP} of shape \(48, 32\) "
        r"needs one for each matrix, for each row, or for each block of \(10, 20\)",
    ),
    "whole numbers": (
        replaced(UP_SCALES, lambda t: t.int()),
        True,
        rf"{UP_SCALES} in model\.safetensors is stored as I32; scales are F32, BF16, F16, F8_E8M0",
    ),
    "a scale of no weight": (
        replaced(UP, lambda _: None),
        True,
        rf"{UP_SCALES} in model\.safetensors is the scale of {UP}, which is missing",
    ),
    "a scale of a plain weight": (
        replaced(UP, lambda t: t.bfloat16()),
        True,
        rf"{UP_SCALES} in \S+ is the scale of {UP}, which is stored as BF16; it must be F8_E4M3",
    ),
    "another shape": (
        lambda t: t | {UP: t[UP][:10].clone(), UP_SCALES: t[UP_SCALES][:1].clone()},
        True,
        rf"{UP} in model\.safetensors makes {UP} of shape \(10, 32\)",
    ),
    "a scale that is not a number": (
        replaced(UP_SCALES, with_value((1, 1), torch.nan)),
        False,
        rf"loaded: {UP_SCALES} in model\.safetensors holds scales that are not finite",
    ),
    "a code that is not a number": (
        replaced(UP, with_value((47, 31), 0x7F)),
        False,
        rf"loaded: {UP} in model\.safetensors holds values that are not finite in torch\.bfloat16",
    ),
    "too large for bf16": (
        replaced(UP_SCALES, lambda t: t * 0 + 3e38),
        False,
        rf"{UP} in model\.safetensors holds values that are not finite",
    ),
}
BLOCKS, EXPONENTS = f"{EXPERTS}_blocks", f"{EXPERTS}_scales"
FAULTS_MXFP4: dict[str, tuple[Any, bool, str]] = {
    "no scales": (
        replaced(EXPONENTS, lambda _: None),
        True,
        rf"{BLOCKS} in model\.safetensors is quantized, but its scales, {EXPONENTS}, are missing",
    ),
    "no blocks": (replaced(BLOCKS, lambda _: None), True, rf"files lack .*{EXPERTS}"),
    "scales of another shape": (
        replaced(EXPONENTS, lambda t: t[:, :-1].contiguous()),
        True,
        rf"{EXPONENTS} in \S+ has shape \(3, 63, 3\), but {BLOCKS} of shape \(3, 64, 3, 16\) needs",
    ),
    "scales in fp32": (
        replaced(EXPONENTS, lambda t: t.float()),
        True,
        rf"{EXPONENTS} in model\.safetensors is stored as F32; scales are U8",
    ),
    "other blocks": (
        replaced(BLOCKS, lambda t: t.unflatten(-1, (2, 8)).flatten(2, 3)),
        True,
        rf"{BLOCKS} in model\.safetensors is U8 of shape \(3, 64, 6, 8\); MXFP4 experts are",
    ),
    "other dtype": (
        replaced(BLOCKS, lambda t: t.view(torch.int8)),
        True,
        rf"{BLOCKS} in \S+ is I8",
    ),
    "a scale that is not a number": (
        replaced(EXPONENTS, with_value((2, 63, 2), 255)),
        False,
        rf"loaded: {EXPONENTS} in model\.safetensors holds scales that are not finite",
    ),
    "too large for bf16": (
        replaced(EXPONENTS, lambda t: t * 0 + 254),
        False,
        rf"{EXPERTS} in model\.safetensors holds values that are not finite in torch\.bfloat16",
    ),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("intact")
    mxfp4 = plain("GptOss", folder / "oss", torch.bfloat16)
    return {
        "fp8": in_fp8(plain("Llama", folder / "llama"), folder, (10, 20))[0],
        "mxfp4": in_mxfp4(mxfp4, folder, convert_moe_packed_tensors)[0],
    }


@pytest.mark.parametrize(
    ("form", "fault"),
    [("fp8", fault) for fault in FAULTS_FP8] + [("mxfp4", fault) for fault in FAULTS_MXFP4],
)
def test_broken_files(form: str, fault: str, intact: dict[str, Path], tmp_path: Path) -> None:
    change, seen_in_headers, message = {"fp8": FAULTS_FP8, "mxfp4": FAULTS_MXFP4}[form][fault]
    files = {"model.safetensors": change(tensors_of(intact[form]))}
    folder = str(write_model(intact[form], tmp_path, files))
    if seen_in_headers:
        with pytest.raises(ConfigError, match=message):
            Base(folder).check_files()
        return
    Base(folder).check_files()
    with pytest.raises(ConfigError, match=message):
        base(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "gptq"},
            "quantized by gptq; .* and those in FP8 and MXFP4 can be trained",
        ),
        ({"quant_method": ["fp8"]}, "quantized by "),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            r"weight_block_size .* is \[128\]; two",
        ),
        ({"quant_method": "fp8", "weight_block_size": [0, 9]}, r"is \[0, 9\]; two whole numbers"),
        ({"quant_method": "fp8", "weight_block_size": "x"}, "is 'x'; two whole numbers or null"),
        ({"quant_method": "fp8"}, r"for each block of \(128, 128\)"),
        ({"quant_method": "fp8", "weight_block_size": None}, r"for each row\. Fetch"),
        (None, r"proj\.weight in model-1\.safetensors is stored as F8_E4M3; only BF16"),
    ],
    ids=str,
)
def test_what_config_json_says(
    quantization: Any, message: str, intact: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(intact["fp8"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        base(tmp_path)

"""The streaming loader against transformers' own, on files as they come and on broken ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.base import Base, open_base
from lorasb_ds.models.config_json import is_encoder
from lorasb_ds.models.experts import ExpertsLinear
from lorasb_ds.models.linear_layers import linear_layers
from lorasb_ds.models.loading import load_base
from lorasb_ds.models.quantization import PackedLinear, PackedLinear4bit, PackedLinear8bit
from lorasb_ds.models.weight_map import unused_tensors
from tests.references import load_whole, nf4_config, with_own_code

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LLAMA = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MOE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
GPT2 = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Tied heads; biases; fused and renamed experts; 1-D and scalar buffers; fp32 kept beside bf16;
# weights stored as (in, out); one projection for q, k and v.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": LLAMA | {"tie_word_embeddings": True},
    "Qwen2": LLAMA,
    "Gemma2": LLAMA | {"head_dim": 8},
    "Mixtral": LLAMA | {"num_local_experts": 4},
    "Qwen2Moe": LLAMA | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 40},
    "DeepseekV3": LLAMA | MOE | DEEPSEEK,
    "Phi3": LLAMA | {"pad_token_id": 0, "eos_token_id": 2},
    "GPT2": GPT2,
    "Bloom": {"vocab_size": 512, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def make(architecture: str, folder: Path) -> Path:
    """A random model in many small files."""
    config = getattr(transformers, f"{architecture}Config")(**ARCHITECTURES[architecture])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("Llama", tmp_path_factory.mktemp("models") / "llama")


def everything(model: Any) -> dict[str, torch.Tensor]:
    """All parameters and buffers, under transformers' names and in its orientation."""
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, module in model.named_modules():
        if isinstance(module, ExpertsLinear):
            weight = found.pop(f"{name}.weight")
            whole_and_transposed = module.kind is None and module.stored_transposed
            found[name] = weight.mT if whole_and_transposed else weight
    return found


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_transformers(architecture: str, dtype: str, tmp_path: Path) -> None:
    folder = make(architecture, tmp_path)
    assert (folder / "model.safetensors.index.json").is_file()
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    found = load_whole(str(folder), dtype)
    ours, theirs = everything(found), everything(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    input_ids = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        assert torch.equal(found(input_ids).logits, expected.eval()(input_ids).logits)


def test_a_head_stored_under_the_other_name(llama: Path, tmp_path: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(llama)
    shutil.copy(llama / "config.json", tmp_path)
    tensors = {name: tensor.clone() for name, tensor in expected.state_dict().items()}
    del tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old files; unused
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load_whole(str(tmp_path), "fp32")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(found.lm_head.weight, expected.lm_head.weight)


def base(folder: Path, **options: Any) -> Any:
    config = RunConfig(model=str(folder), **options)
    return load_base(Base(config.model), config, {"zero_optimization": {"stage": 2}})


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "GPT2", "Mixtral"])
def test_4bit_equals_transformers_and_bitsandbytes(architecture: str, tmp_path: Path) -> None:
    folder = make(architecture, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=nf4_config(torch.bfloat16)
    ).train()  # in eval mode bitsandbytes repacks its weights on some CPUs
    found = base(folder, load_in_4bit=True).train()
    kinds = {type(found.get_submodule(name)) for name in linear_layers(found)}
    assert kinds == {PackedLinear4bit}
    assert linear_layers(found).keys() == linear_layers(expected).keys()
    assert not isinstance(found.lm_head, PackedLinear)
    for name, layer in found.named_modules():
        if isinstance(layer, ExpertsLinear):  # transformers leaves them in bf16
            weight = expected.get_parameter(name)
            weight.data.copy_(torch.stack([layer.expert_weight(e) for e in range(len(weight))]))
    input_ids = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        assert torch.equal(found(input_ids).logits, expected(input_ids).logits)


@pytest.mark.parametrize("offload", [False, True])
def test_recomputing_makes_no_input_require_grad(llama: Path, offload: bool) -> None:
    """ZeRO-3 would gather the embedding, and every backward pass end at it."""
    model = base(llama, dtype="fp32", gradient_checkpointing=True, activation_offload=offload)
    assert model.is_gradient_checkpointing
    assert not model.train()(input_ids=torch.arange(4)[None]).logits.requires_grad


def test_8bit_is_near_the_base(llama: Path) -> None:
    plain, found = base(llama), base(llama, load_in_8bit=True)
    layers = linear_layers(plain)
    assert {type(found.get_submodule(name)) for name in layers} == {PackedLinear8bit}
    for name in layers:
        W, quantized = plain.get_submodule(name).weight, found.get_submodule(name).dequantize()
        error = torch.linalg.norm((quantized - W).float()) / torch.linalg.norm(W.float())
        assert 0 < error < 0.01, name


@pytest.mark.parametrize("nested", [True, False])
def test_quantized_files_are_taken_as_they_are(llama: Path, tmp_path: Path, nested: bool) -> None:
    quantization = nf4_config(torch.bfloat16)
    quantization.bnb_4bit_use_double_quant = nested
    if nested:  # as for FSDP: bytes that are called bf16
        quantization.bnb_4bit_quant_storage = torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.bfloat16, quantization_config=quantization
    )
    theirs.save_pretrained(tmp_path)
    found = base(tmp_path, load_in_4bit=True)
    for name in linear_layers(found):
        layer, stored = found.get_submodule(name), theirs.get_submodule(name).weight
        assert isinstance(layer, PackedLinear4bit)
        assert layer.nested == nested
        assert torch.equal(layer.parts()[0], stored.data.flatten().view(torch.uint8)), name
    input_ids = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        assert torch.equal(found(input_ids).logits, theirs.train()(input_ids).logits)


def save_in_8_bits(model: Path, folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True),
    )
    theirs.save_pretrained(folder)


def test_8bit_files_are_taken_as_they_are(llama: Path, tmp_path: Path) -> None:
    save_in_8_bits(llama, tmp_path)
    found, ours = base(tmp_path, load_in_8bit=True), base(llama, load_in_8bit=True)
    for name in linear_layers(found):
        layer, again = found.get_submodule(name), ours.get_submodule(name)
        assert isinstance(layer, PackedLinear8bit)
        assert torch.equal(layer.dequantize(), again.dequantize()), name


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors[name])}, path, metadata={"format": "pt"})


def edit_header(folder: Path, name: str, dtype: str) -> None:
    path = Base(str(folder)).stored[name].file
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[name]["dtype"] = dtype
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    path.write_bytes(content[:8] + text + content[8 + length :])


UP = "model.layers.1.mlp.up_proj.weight"


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[3, 2] = torch.nan
    return tensor


def truncate(folder: Path) -> None:
    path = folder / Base(str(folder)).stored[UP].file.name
    path.write_bytes(path.read_bytes()[:-100])


def test_a_head_that_is_tied_but_differs(llama: Path, tmp_path: Path) -> None:
    """Old files hold both; where they differ, config.json is wrong or the file is."""
    shutil.copy(llama / "config.json", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(llama)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load_whole(str(tmp_path), "fp32")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    tensors["lm_head.weight"][7, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"
    ):
        load_whole(str(tmp_path), "fp32")


@pytest.mark.parametrize("change", ["num_hidden_layers", "attention_bias"])
def test_tensors_without_a_place_are_told(tmp_path: Path, change: str) -> None:
    folder = make("Llama", tmp_path)
    edit_tensor(folder, UP, lambda t: t)
    whole = Base(str(folder))
    assert unused_tensors(whole.model, whole.sources, whole.stored) == []
    config = json.loads((folder / "config.json").read_text())
    if change == "num_hidden_layers":
        (folder / "config.json").write_text(json.dumps(config | {change: 1}))
        expected = [name for name in whole.stored if ".layers.1." in name]
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        path = folder / index[UP]
        bias = {"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}
        save_file(load_file(path) | bias, path, metadata={"format": "pt"})
        expected = list(bias)
    edited = Base(str(folder))
    unused = unused_tensors(edited.model, edited.sources, edited.stored)
    assert sorted(unused) == sorted(expected)


def without(tensors: dict[str, torch.Tensor], suffix: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(suffix)}


BROKEN_4BIT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "no absmax": (
        lambda t: without(t, "1.mlp.up_proj.weight.absmax"),
        rf"{UP} in model\.safetensors is quantized, but absmax is missing beside it",
    ),
    "no nested map": (
        lambda t: without(t, "1.mlp.up_proj.weight.nested_quant_map"),
        r"nested_quant_map is missing",
    ),
    "no state": (
        lambda t: without(t, "1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"),
        r"quant_state\.bitsandbytes__nf4 is missing",
    ),
    "garbage state": (
        lambda t: t | {f"{UP}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)},
        r"bitsandbytes__nf4 in model\.safetensors does not say how its weight is quantized",
    ),
    "too few codes": (
        lambda t: t | {UP: t[UP][:-3].clone()},
        rf"loaded: {UP} in model\.safetensors: parts of \[765, ",
    ),
    "another map": (
        lambda t: t | {f"{UP}.quant_map": t[f"{UP}.quant_map"].flip(0)},
        rf"loaded: {UP} in model\.safetensors: it was quantized with another map",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_4BIT)
def test_broken_quantized_files(llama: Path, tmp_path: Path, fault: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.bfloat16, quantization_config=nf4_config(torch.bfloat16)
    )
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    change, message = BROKEN_4BIT[fault]
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        base(tmp_path, load_in_4bit=True)


def test_8bit_codes_of_another_shape(llama: Path, tmp_path: Path) -> None:
    save_in_8_bits(llama, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {UP: tensors[UP].T.contiguous()}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"of shape \(32, 48\), but .* has \(48, 32\)"):
        base(tmp_path, load_in_8bit=True)
    save_file(without(tensors, "up_proj.SCB"), path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="SCB is missing beside it"):
        base(tmp_path, load_in_8bit=True)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "foo"},
        {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}},
        {"pad_token_id": 512},
        {"vocab_size": -1},
        {"dtype": "foo"},
        {"quantization_config": "foo"},
        {"num_attention_heads": "many"},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense(llama: Path, tmp_path: Path, change: Any) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError):
        base(tmp_path)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (
        lambda f: Base(str(f)).stored[UP].file.unlink(),
        r"model-0000\d-of-0000\d\.safetensors is missing, which model\.safetensors\.index\.json "
        r"names for \d+ tensors such as model\.layers\.",
    ),
    "truncated file": (truncate, r"ends at byte [\d,]+, within model\.layers\.1\.\S+, which ends"),
    "empty file": (
        lambda f: Base(str(f)).stored[UP].file.write_bytes(b""),
        "is no whole safetensors file: it ends within its header",
    ),
    "tensor that is not there": (
        lambda f: edit_index(f, lambda i: i.update({"model.extra": i[UP]})),
        r"names 1 tensors that are not in model-\S+, such as model\.extra",
    ),
    "tensor that is not named": (
        lambda f: edit_tensor(f, UP, lambda t: t) or edit_index(f, lambda i: i.pop(UP)),
        "",  # it is there: the index is not needed for it
    ),
    "other shape": (
        lambda f: edit_tensor(f, UP, lambda t: t[:-1].contiguous()),
        r"up_proj\.weight of shape \(47, 32\), but the model of config\.json has \(48, 32\)",
    ),
    "not a number": (lambda f: edit_tensor(f, UP, with_nan), rf"{UP} in model-\S+ holds values "),
    "infinite in bf16": (
        lambda f: edit_tensor(f, UP, lambda t: t * 0 + 3.4e38),
        rf"{UP} in model-\S+ holds values that are not finite in torch\.bfloat16",
    ),
    "whole numbers": (
        lambda f: edit_tensor(f, UP, lambda t: t.to(torch.int32)),
        rf"{UP} in model-\S+ is stored as I32, but the model has torch\.bfloat16",
    ),
    "offsets that lie": (
        lambda f: edit_header(f, UP, "F16"),
        rf"bytes for {UP}, which is F16 of shape \(48, 32\)",
    ),
    "no file name": (
        lambda f: edit_index(f, lambda i: i.update({UP: None})),
        r"index\.json has no weight_map of files",
    ),
    "unknown dtype": (
        lambda f: edit_tensor(f, UP, lambda t: t.to(torch.float8_e4m3fn)),
        rf"{UP} in model-\S+ is stored as F8_E4M3; only BF16, F16, ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_files(fault: str, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    break_it, message = FAULTS[fault]
    break_it(folder)
    for quantized in (False, True):
        if not message:
            assert base(folder, load_in_4bit=quantized) is not None
            continue
        with pytest.raises(ConfigError, match=message):
            base(folder, load_in_4bit=quantized)


def test_the_digest_sees_every_tensor(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    digests = {Base(str(folder)).digest}
    assert digests == {Base(str(llama)).digest}
    names = list(Base(str(folder)).stored)
    for name in names:
        edit_tensor(folder, name, lambda t: t * 1.01)
        digests.add(Base(str(folder)).digest)
    assert len(digests) == 1 + len(names)


def test_code_of_a_base_needs_a_flag(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    folder = with_own_code(llama, tmp_path / "model")
    remedy = "If you trust that code, give --trust-remote-code; --config and --resume do not take"
    with pytest.raises(ConfigError, match=remedy):
        _ = Base(str(folder)).hf_config
    trusted = RunConfig(model=str(folder), trust_remote_code=True, dtype="fp32")
    found = load_base(open_base(trusted)[0], trusted, {"zero_optimization": {"stage": 2}})
    assert type(found).__name__ == "OwnForCausalLM"
    expected = AutoModelForCausalLM.from_pretrained(llama)
    input_ids = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        assert torch.equal(found(input_ids).logits, expected(input_ids).logits)


@pytest.mark.parametrize(
    ("family", "decoder"), [("bert", False), ("roberta", False), ("bert", True)]
)
def test_encoders(tmp_path: Path, family: str, decoder: bool) -> None:
    """They see both sides, unless they are made decoders."""
    config = AutoConfig.for_model(family, is_decoder=decoder)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.save_pretrained(tmp_path)
    if decoder:
        assert Base(str(tmp_path)).hf_config.is_decoder
    else:
        with pytest.raises(ConfigError, match=rf"is an encoder \({family}\).* is_decoder: true"):
            _ = Base(str(tmp_path)).hf_config


def test_decoders_that_do_not_say_so(tmp_path: Path) -> None:
    """GPT-NeoX, and the decoder of BART, which its class makes one."""
    for family in ("gpt_neox", "bart"):
        config = AutoConfig.for_model(family)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
        assert not is_encoder(config)

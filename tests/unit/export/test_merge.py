"""Compare merged folders with PEFT, transformers and bitsandbytes; kill and refuse merges."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from launcher.workers import adapters
from lorasb_ds.errors import ConfigError
from lorasb_ds.export import merge as merging
from lorasb_ds.export import merge_file
from lorasb_ds.export.adapter_reader import read_adapter
from lorasb_ds.export.merge import merge_adapter
from lorasb_ds.export.merge_plan import weights_of
from lorasb_ds.models.base import Base
from lorasb_ds.models.weight_map import map_weights
from tests.references import load_whole

ROOT = Path(__file__).resolve().parents[3]
LAYERS = ["q_proj", "v_proj", "down_proj"]
TOKENS = torch.arange(5, 29).view(2, 12)


def write_base(model: Path, folder: Path, dtype: torch.dtype, shard: str = "50GB") -> Path:
    """Copy a model to another dtype or into several files, with its tokenizer."""
    AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(
        folder, max_shard_size=shard
    )
    for file in [*model.glob("*token*"), *model.glob("*.jinja")]:
        shutil.copy(file, folder)
    (folder / "LICENSE.txt").write_text("of the base")
    (folder / "README.md").write_text("of the base")
    return folder


def write_adapter(model: Path, folder: Path, layers: Any = LAYERS, **options: Any) -> Path:
    """Let PEFT write an adapter with a random B."""
    torch.manual_seed(7)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": layers} | options)
    adapted = get_peft_model(base, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(folder)
    return folder


def merged(adapter: Path, model: Path, out: Path, **options: Any) -> Any:
    return merge_adapter(
        read_adapter(str(adapter)), str(model), out, **{"say": lambda _: None} | options
    )


def by_peft(model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return the merged weights in fp32."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Return the largest distance of two bf16 tensors in units in the last place."""
    bits = (t.view(torch.int16).int() for t in (a, b))
    ordered = [torch.where(i < 0, -(i & 0x7FFF), i) for i in bits]
    return int((ordered[0] - ordered[1]).abs().max())


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(TOKENS).logits


@pytest.fixture(scope="module")
def sharded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in bf16 and several files."""
    folder = tmp_path_factory.mktemp("base") / "sharded"
    write_base(tiny_model, folder, torch.bfloat16, "20KB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tiny_model, tmp_path_factory.mktemp("adapter") / "plain")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conv1D layers, which are stored as (in, out)."""
    folder = tmp_path_factory.mktemp("gpt2") / "tiny"
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=24, n_layer=2, n_head=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_alpha": 4}])
def test_fp32_equals_peft(tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = write_adapter(tiny_model, tmp_path / "adapter", **options)
    result = merged(adapter, tiny_model, tmp_path / "out")
    assert (result.merged_layers, result.files, result.resumed_files) == (6, 1, 0)
    expected, before = by_peft(tiny_model, adapter), tensors(tiny_model)
    found = tensors(tmp_path / "out")
    assert list(found) == list(before)
    for name, tensor in found.items():
        if any(f"{layer}." in name for layer in LAYERS):
            assert not torch.equal(tensor, before[name])
            # fp32 sums in another order.
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(tensor, before[name])
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, adapter)(TOKENS).logits
    torch.testing.assert_close(logits(tmp_path / "out"), adapted, rtol=1e-5, atol=1e-6)


def test_conv1d_equals_peft(gpt2: Path, tmp_path: Path) -> None:
    layers = ["c_attn", "c_proj", "c_fc"]
    adapter = write_adapter(gpt2, tmp_path / "adapter", layers, fan_in_fan_out=True)
    assert merged(adapter, gpt2, tmp_path / "out").merged_layers == 8
    expected = by_peft(gpt2, adapter)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        # fp32 sums in another order.
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_experts_stay(tiny_moe: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_moe, tmp_path / "adapter", ["q_proj", "shared_expert.up_proj"])
    merged(adapter, tiny_moe, tmp_path / "out")
    before, found = tensors(tiny_moe), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], found[name])}
    assert changed == {
        f"model.layers.{i}.{name}.weight"
        for i in range(2)
        for name in ("self_attn.q_proj", "mlp.shared_expert.up_proj")
    }
    expected = by_peft(tiny_moe, adapter)
    for name in changed:
        # fp32 sums in another order.
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)


def test_files_are_the_bases(sharded: Path, adapter: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = merged(adapter, sharded, tmp_path / "out", say=said.append)
    out = tmp_path / "out"
    names = {file.name for file in sharded.iterdir()} - {"README.md"}
    assert {file.name for file in out.iterdir()} == names | {"SHA256SUMS", "merge.json"}
    assert not (tmp_path / "out.partial").exists()
    assert result.files == len(said) == len(list(sharded.glob("*.safetensors")))
    for name in names:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (sharded / name).read_bytes()
            continue
        with safe_open(out / name, "pt") as found, safe_open(sharded / name, "pt") as base:
            assert found.metadata() == base.metadata()
            assert list(found.keys()) == list(base.keys())
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    assert len((out / "SHA256SUMS").read_text().splitlines()) == len(names) + 1
    record = json.loads((out / "merge.json").read_text())
    assert (record["base"], record["adapter"]) == (str(sharded), str(adapter))


def test_rounded_once(sharded: Path, adapter: Path, tmp_path: Path) -> None:
    merged(adapter, sharded, tmp_path / "out")
    before, found = tensors(sharded), tensors(tmp_path / "out")
    stored, pairs = read_adapter(str(adapter)), {}
    for layer, weight in weights_of(stored, str(sharded)).items():
        assert weight == Base(str(sharded)).stored[f"{layer}.weight"]
        pairs[f"{layer}.weight"] = stored.pair(layer)
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        if name in pairs:
            expected = (before[name].float() + pairs[name].B @ pairs[name].A).bfloat16()
            # The fp32 sum may lie on the other side of the middle of two bf16 numbers.
            assert ulps(tensor, expected) <= 1
            assert (tensor != expected).float().mean() < 1e-3
        else:
            assert torch.equal(tensor.view(torch.int16), before[name].view(torch.int16))


def test_chunks_do_not_matter(
    sharded: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(adapter, sharded, tmp_path / "whole")
    monkeypatch.setattr(merge_file, "CHUNK", 7 * 48)
    monkeypatch.setattr(merge_file, "CHUNK_BYTES", 1001)
    merged(adapter, sharded, tmp_path / "pieces")
    whole, pieces = tensors(tmp_path / "whole"), tensors(tmp_path / "pieces")
    # Products of other sizes sum in another order.
    assert max(ulps(whole[name], pieces[name]) for name in whole) <= 1


def test_processes_write_the_same(sharded: Path, adapter: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        merged(adapter, sharded, tmp_path / f"of{count}", num_procs=count)
    sums = [(tmp_path / f"of{count}" / "SHA256SUMS").read_text() for count in (1, 2)]
    assert sums[0] == sums[1]


def test_run_with_its_r(tiny_model: Path, tmp_path: Path) -> None:
    """Merge B R A of a checkpoint, as ``StoredAdapter.pair`` computes it."""
    run, name = tmp_path / "run", "model.layers.1.self_attn.k_proj"
    A, B, R = torch.randn(3, 48), torch.randn(24, 3), torch.randn(3, 3)
    stored = write_adapter(tiny_model, run / "adapter", ["k_proj"])
    found = read_adapter(str(stored))
    save_file({"A": A, "B": B, "R": R}, run / "factors.safetensors")
    from lorasb_ds.export.stored_adapter import Factors, StoredAdapter
    from lorasb_ds.models.checkpoint_files import read_header

    header = read_header(run / "factors.safetensors", "test")
    layers = {name: Factors("A", "B", "R", 0.5)}
    own = StoredAdapter(found.path, None, {}, None, layers, header)
    merge_adapter(own, str(tiny_model), tmp_path / "out", say=lambda _: None)
    before, after = tensors(tiny_model), tensors(tmp_path / "out")
    key = f"{name}.weight"
    # fp32 sums in another order.
    torch.testing.assert_close(after[key], before[key] + 0.5 * B @ R @ A, rtol=1e-5, atol=1e-5)


def test_killed_merge_goes_on(sharded: Path, adapter: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from lorasb_ds.export.adapter_reader import read_adapter\n"
        "from lorasb_ds.export.merge import merge_adapter\n"
        "merge_adapter(read_adapter(sys.argv[1]), sys.argv[2], Path(sys.argv[3]),\n"
        "      say=lambda _: time.sleep(0.5))\n"
    )
    command = [sys.executable, "-c", script, str(adapter), str(sharded), str(out)]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}) as child:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and child.poll() is None:
            record = partial / "merge.json"
            if record.is_file() and len(json.loads(record.read_text())["files"]) >= 2:
                break
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert partial.is_dir()
    assert not out.exists()
    kept = json.loads((partial / "merge.json").read_text())["files"]
    times = {name: (partial / name).stat().st_mtime_ns for name in kept}
    said: list[str] = []
    result = merged(adapter, sharded, out, say=said.append)
    assert result.resumed_files == len(kept) >= 2
    assert said[0].startswith(f"{len(kept)} of {result.files} files are there")
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == times
    merged(adapter, sharded, tmp_path / "other")
    assert (out / "SHA256SUMS").read_text() == (tmp_path / "other/SHA256SUMS").read_text()


def test_only_the_same_merge_is_resumed(
    tiny_model: Path,
    sharded: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(merging, "write_index", fail)
        with pytest.raises(ConfigError, match=r"No space left .*the same command continues"):
            merged(adapter, sharded, out)
    some = sorted(partial.glob("*.safetensors"))
    some[0].write_bytes(b"cut")
    (partial / "left.safetensors.tmp").write_bytes(b"left")
    assert merged(adapter, sharded, out).resumed_files == len(some) - 1
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    assert not (out / "left.safetensors.tmp").exists()

    with monkeypatch.context() as patched:
        patched.setattr(merging, "write_index", fail)
        with pytest.raises(ConfigError):
            merged(adapter, sharded, tmp_path / "again")
    other = write_adapter(tiny_model, tmp_path / "adapter", lora_alpha=13)
    assert merged(other, sharded, tmp_path / "again").resumed_files == 0
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"that lorasb has merged: .*\(notes\.txt\)"):
        merged(other, sharded, out, overwrite=True)
    (out / "notes.txt").unlink()
    assert merged(other, sharded, out, overwrite=True).resumed_files == 0
    assert (out / "SHA256SUMS").read_text() == (tmp_path / "again/SHA256SUMS").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "again", "out"}


def test_one_merge_at_a_time(sharded: Path, adapter: Path, tmp_path: Path) -> None:
    def second(_: str) -> None:
        with pytest.raises(ConfigError, match="another merge is writing"):
            merged(adapter, sharded, tmp_path / "out")

    merged(adapter, sharded, tmp_path / "out", say=second)


@pytest.mark.parametrize("base", ["tiny_model", "tiny_moe", "sharded"])
def test_4bit_is_loaded_by_both(base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    from transformers import BitsAndBytesConfig

    model = request.getfixturevalue(base)
    if base != "sharded":
        model = write_base(model, tmp_path / "base", torch.bfloat16)
    adapter = write_adapter(model, tmp_path / "adapter", ["q_proj", "v_proj"])
    out = tmp_path / "out"
    merged(adapter, model, out, load_in_4bit=True)
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    ours = load_whole(str(out), "bf16")
    merged(adapter, model, tmp_path / "plain")
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain",
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    with torch.no_grad():
        # bitsandbytes' own product for inference on CPUs does not take such narrow layers.
        a, b, c = (m.train()(TOKENS).logits for m in (found, ours, quantized))
    assert torch.equal(a, b)
    assert torch.equal(a, c)
    theirs, state = quantized.state_dict(), found.state_dict()
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.items())
    index = out / "model.safetensors.index.json"
    assert index.exists() == (base == "sharded")
    if index.exists():
        places = json.loads(index.read_text())["weight_map"]
        assert places.keys() == tensors(out).keys()


def test_names_and_codes_of_4bit(sharded: Path, adapter: Path, tmp_path: Path) -> None:
    """The same bits as transformers saves of the merged model."""
    from transformers import BitsAndBytesConfig

    merged(adapter, sharded, tmp_path / "plain")
    merged(adapter, sharded, tmp_path / "out", load_in_4bit=True)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16, quantization_config=config
    ).save_pretrained(tmp_path / "saved")
    expected, found = tensors(tmp_path / "saved"), tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def edited(model: Path, folder: Path, name: str, change: Any) -> Path:
    """Copy a model with one tensor changed."""
    shutil.copytree(model, folder)
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    stored[name] = change(stored[name])
    save_file(stored, file, metadata={"format": "pt"})
    return folder


def test_refused_bases(tiny_model: Path, gpt2: Path, adapter: Path, tmp_path: Path) -> None:
    def refused(match: str, adapter: Path, model: Path, **options: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            merged(adapter, model, tmp_path / "out", **options)
        assert not list(tmp_path.glob("out*"))

    merged(adapter, tiny_model, tmp_path / "nf4", load_in_4bit=True)
    refused(
        "is quantized .*Give the base that it was made from by --model", adapter, tmp_path / "nf4"
    )
    refused("factors for model.layers.0.*has no such layer", adapter, gpt2)
    of_gpt2 = write_adapter(gpt2, tmp_path / "of_gpt2", ["c_attn"], fan_in_fan_out=True)
    refused("c_attn of .* is a Conv1D", of_gpt2, gpt2, load_in_4bit=True)
    wide = tmp_path / "wide"
    config = LlamaConfig.from_pretrained(tiny_model, intermediate_size=96)
    AutoModelForCausalLM.from_config(config).save_pretrained(wide)
    refused(r"down_proj is .* = \(48, 80\), but that .*\(48, 96\)", adapter, wide)
    head = shutil.copytree(adapter, tmp_path / "head")
    factors = {"A": torch.randn(4, 48), "B": torch.randn(49152, 4)}
    prefix = "base_model.model.lm_head.lora_"
    file = head / "adapter_model.safetensors"
    save_file({f"{prefix}{name}.weight": factor for name, factor in factors.items()}, file)
    refused("lm_head, whose weight .* ties .*embed_tokens", head, tiny_model)
    key = "model.layers.0.self_attn.q_proj.weight"
    double = edited(tiny_model, tmp_path / "double", key, torch.Tensor.double)
    refused(f"{key} is stored as F64; F32, F16, BF16", adapter, double)


def test_refused_fusion(tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch) -> None:
    def fused(*arguments: Any) -> Any:
        sources = map_weights(*arguments)
        for source in sources:
            if "model.layers.1.mlp.down_proj.weight" in source.targets:
                source.converter = object()
        return sources

    monkeypatch.setattr("lorasb_ds.models.base.map_weights", fused)
    with pytest.raises(ConfigError, match=r"1.mlp.down_proj.weight from .*merge_and_unload"):
        merged(adapter, tiny_model, tmp_path / "out")


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_overflow_is_named(
    tiny_model: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    base = write_base(tiny_model, tmp_path / "base", dtype)
    weights = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    weights[f"{prefix}B.weight"] *= torch.finfo(dtype).max
    weights[f"{prefix}A.weight"] *= 100
    shutil.copytree(adapter, tmp_path / "adapter")
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    for count in (1, 2):
        with pytest.raises(
            ConfigError, match=f"layers.1.mlp.down_proj.weight in .* not finite in {name}"
        ):
            merged(tmp_path / "adapter", base, tmp_path / "out", num_procs=count)
    assert not (tmp_path / "out").exists()


def test_refused_places(
    sharded: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(sharded, tmp_path / "base")
    for out in (base, base / "in", adapter, adapter / "in", tmp_path):
        with pytest.raises(ConfigError, match="are the same, or one contains the other"):
            merged(adapter, base, out, overwrite=True)
    out = tmp_path / "out"
    out.mkdir()
    (out / "own.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        merged(adapter, base, out)
    with pytest.raises(
        ConfigError, match=r"is not the folder of a model that lorasb .* \(own\.txt\)"
    ):
        merged(adapter, base, out, overwrite=True)
    assert (out / "own.txt").read_text() == "mine"
    others = shutil.copytree(sharded, tmp_path / "others")  # another's model
    with pytest.raises(ConfigError, match="is not the folder of a model that lorasb has merged"):
        merged(adapter, base, others, overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        merged(adapter, base, out / "own.txt")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "own.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        merged(adapter, base, tmp_path / "new")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1 << 20))
    with pytest.raises(ConfigError, match=r"0\.00 GiB must still be written.* has 0\.00 GiB left"):
        merged(adapter, base, tmp_path / "full")
    assert not (tmp_path / "full.partial").exists()


def test_code_goes_with_auto_map(sharded: Path, adapter: Path, tmp_path: Path) -> None:
    base = shutil.copytree(sharded, tmp_path / "base")
    (base / "modeling_own.py").write_text("")
    (base / "adapter_config.json").write_text("{}")
    merged(adapter, base, tmp_path / "plain")
    assert not (tmp_path / "plain/modeling_own.py").exists()
    assert not (tmp_path / "plain/adapter_config.json").exists()
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["modeling_own.Own", None]}
    (base / "config.json").write_text(json.dumps(config))
    merged(adapter, base, tmp_path / "own")
    assert (tmp_path / "own/modeling_own.py").exists()


def made_up_run(model: Path, folder: Path, digest: str, **options: Any) -> Path:
    """Put an adapter into a run's folder."""
    write_adapter(model, folder / "adapter", ["q_proj"])
    basis = {
        "x.lora_A": torch.ones(1, 2),
        "x.lora_B": torch.ones(2, 1),
        "x.lora_R": torch.ones(1, 1),
    }
    metadata = {"made_from": json.dumps({"model files": digest})}
    save_file(basis, folder / "basis.safetensors", metadata=metadata)
    config = {"model": str(model), **options}
    (folder / "run.json").write_text(json.dumps({"config": config}))
    return folder


def test_what_the_command_says_of_the_base(tiny_model: Path, tmp_path: Path) -> None:
    same = Base(str(tiny_model)).digest
    plain = made_up_run(tiny_model, tmp_path / "plain", same)
    in_4bit = made_up_run(tiny_model, tmp_path / "4bit", same, load_in_4bit=True)
    of_another = made_up_run(tiny_model, tmp_path / "another", "0" * 64)
    said = {}
    for run in (plain, in_4bit, of_another):
        out = tmp_path / f"{run.name}-merged"
        result = CliRunner().invoke(adapters.main, ["merge", str(run), "--out", str(out)])
        assert result.exit_code == 0, result.output
        said[run] = result.output
    assert "trained on the base in 4 bits" not in said[plain]
    assert "trained on the base in 4 bits" in said[in_4bit]
    assert "has other files than the base" in said[of_another]
    assert "has other files" not in said[plain] + said[in_4bit]

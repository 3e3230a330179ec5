"""Adapters of PEFT and of runs; damaged and malicious files."""

from __future__ import annotations

import json
import resource
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import BASIS_FILE, STATE_FILE, TRAINER_FILE
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.adapter_reader import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG_BYTES,
    read_adapter,
)
from lorasb_ds.export.stored_adapter import StoredAdapter
from lorasb_ds.models.base import Base
from lorasb_ds.models.checkpoint_files import read_header
from lorasb_ds.runs.checkpoint import TrainerState, write_checkpoint
from lorasb_ds.system.files import SUMS_FILE, write_sums
from lorasb_ds.system.safetensors_writer import save_tensors
from tests.runs import made_up_run

TARGETS = ["q_proj", "v_proj", "down_proj"]


def save_lora(model: Any, folder: Path, *, seed: int = 0, dtype: Any = None, **config: Any) -> Path:
    """Let PEFT write an adapter whose B is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": TARGETS, **config})
        peft = get_peft_model(model, lora)
        for name, parameter in peft.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(0, 0.1)
    if dtype is not None:
        peft.to(dtype)
    peft.save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def peft_deltas(base: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Map layer -> ΔW, computed in fp32 by PEFT from what it loads."""
    peft = PeftModel.from_pretrained(base, folder)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in peft.named_modules()
        if hasattr(module, "get_delta_weight")
    }


KINDS: dict[str, dict[str, Any]] = {
    "alpha is r": {"lora_alpha": 4},
    "alpha is not r": {"lora_alpha": 10},
    "rsLoRA": {"lora_alpha": 10, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 6},
        "alpha_pattern": {"model.layers.1.self_attn.q_proj": 3, "v_proj": 20},
    },
    "patterns of rsLoRA": {
        "use_rslora": True,
        "rank_pattern": {"down_proj": 7},
        "alpha_pattern": {"down_proj": 5, "1.self_attn.v_proj": 2.5},
    },
    "a negative alpha": {"lora_alpha": -3},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "some layers": {"layers_to_transform": [1]},
    "a pattern of layers": {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"},
    "all layers": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_peft_s(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    save_lora(load(tiny_model), tmp_path, **KINDS[kind])
    adapter, expected = read_adapter(str(tmp_path)), peft_deltas(load(tiny_model), tmp_path)
    assert adapter.layers.keys() == expected.keys() == adapter.shapes.keys()
    assert adapter.r == max(len(adapter.pair(name).A) for name in adapter.layers)
    assert (adapter.base_model, adapter.base_path) == (str(tiny_model), str(tiny_model))
    for name, delta in expected.items():
        A, B = adapter.pair(name)
        assert A.dtype == B.dtype == torch.float32
        assert adapter.shapes[name] == delta.shape
        # The scaling is multiplied in before the product here and after it there: fp32.
        assert (B @ A - delta).abs().max() <= 1e-6 * delta.abs().max(), name
        assert delta.any()


def test_layers_that_keep_their_weight_transposed(tmp_path: Path) -> None:
    def model() -> Any:
        config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=8)
        return GPT2LMHeadModel(config)

    save_lora(model(), tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    adapter = read_adapter(str(tmp_path))
    ((name, delta),) = peft_deltas(model(), tmp_path).items()
    A, B = adapter.pair(name)
    assert adapter.shapes == {name: (48, 16)}
    assert torch.allclose(B @ A, delta.T, rtol=0, atol=1e-6 * delta.abs().max().item())  # fp32


@pytest.fixture(scope="module")
def lora(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lora(load(tiny_model), tmp_path_factory.mktemp("adapters") / "lora", lora_alpha=10)


@pytest.fixture
def copy(lora: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lora, tmp_path / "lora"))


def edit_config(folder: Path, **change: Any) -> None:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def set_tensor(folder: Path, leaf: str, tensor: torch.Tensor) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({f"{Q}.{leaf}": tensor}))


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / ADAPTER_WEIGHTS), folder / "adapter_model.bin")
    (folder / ADAPTER_WEIGHTS).unlink()


def config_faults() -> dict[str, tuple[Callable[[Path], object], str]]:
    fields: dict[str, Any] = {
        "use_dora": True,
        "modules_to_save": ["lm_head"],
        "bias": "lora_only",
        "init_lora_weights": "pissa",
        "lora_bias": True,
        "layer_replication": [[0, 2]],
        "trainable_token_indices": [1],
        "use_qalora": True,
        "corda_config": {"corda_method": "kpm"},
        "of_a_later_peft": 1,
    }

    def fault(name: str, value: Any) -> tuple[Callable[[Path], object], str]:
        message = rf"{name} = .* makes it another adapter than a plain LoRA\. Merge it with PEFT"
        return lambda folder: edit_config(folder, **{name: value}), message

    return {f"{name} {value}": fault(name, value) for name, value in fields.items()}


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = config_faults() | {
    "olora": (lambda f: edit_config(f, init_lora_weights="olora"), "init_lora_weights = 'olora'"),
    "pissa_niter": (
        lambda f: edit_config(f, init_lora_weights="pissa_niter_4"),
        "init_lora_weights = 'pissa_niter_4'",
    ),
    "IA3": (lambda f: edit_config(f, peft_type="IA3"), "'IA3'; only LORA is supported"),
    "no type": (lambda f: edit_config(f, peft_type=None), "peft_type is None"),
    "a type that is a list": (lambda f: edit_config(f, peft_type=["LORA"]), r"peft_type is \["),
    "alpha in words": (lambda f: edit_config(f, lora_alpha="8"), "lora_alpha '8' .* not a number"),
    "alpha is null": (lambda f: edit_config(f, lora_alpha=None), "lora_alpha None .* not a number"),
    "alpha is true": (lambda f: edit_config(f, lora_alpha=True), "lora_alpha True .* not a number"),
    "alpha is NaN": (lambda f: edit_config(f, lora_alpha=float("nan")), "lora_alpha nan"),
    "alpha is infinite": (lambda f: edit_config(f, lora_alpha=float("inf")), "lora_alpha inf"),
    "alpha of one layer": (
        lambda f: edit_config(f, alpha_pattern={"0.self_attn.q_proj": [1]}),
        r"lora_alpha \[1\]",
    ),
    "alpha by an expression": (
        lambda f: edit_config(f, alpha_pattern={"q_(proj)": 3}),
        "alpha_pattern .* must name layers",
    ),
    "alpha_pattern is a list": (
        lambda f: edit_config(f, alpha_pattern=["q_proj"]),
        "alpha_pattern .* must name layers",
    ),
    "weights of layers that are no experts' names": (
        lambda f: edit_config(f, target_parameters=["q_proj.weight"]),
        "model.layers.0.self_attn.q_proj.weight in target_parameters is neither",
    ),
    "experts that the file has not": (
        lambda f: edit_config(f, target_parameters=["experts.up_proj"]),
        "name 'experts.up_proj', of which there is no LoRA in the file",
    ),
    "target_parameters is no list": (
        lambda f: edit_config(f, target_parameters="up_proj.weight"),
        "target_parameters = 'up_proj.weight' .* another adapter",
    ),
    "pickle": (to_pickle, r"no adapter_model\.safetensors\. .* is a pickle, which can run code"),
    "no weights": (
        lambda f: (f / ADAPTER_WEIGHTS).unlink(),
        r"has no adapter_model\.safetensors\.$",
    ),
    "no configuration": (
        lambda f: (f / ADAPTER_CONFIG).unlink(),
        "is not an adapter. Name a run's",
    ),
    "configuration is a list": (
        lambda f: (f / ADAPTER_CONFIG).write_text("[]"),
        "must hold a JSON object, not list",
    ),
    "no JSON": (lambda f: (f / ADAPTER_CONFIG).write_text("{"), "is not valid JSON"),
    "no text": (lambda f: (f / ADAPTER_CONFIG).write_bytes(b"\xff\xfe\xfa"), "is not valid JSON"),
    "a long number": (
        lambda f: (f / ADAPTER_CONFIG).write_text('{"lora_alpha": ' + "1" * 5000 + "}"),
        "is not valid JSON",
    ),
    "deep JSON": (
        lambda f: (f / ADAPTER_CONFIG).write_text('{"r": ' + "[" * 200_000),
        "valid JSON",
    ),
    "a huge configuration": (
        lambda f: edit_config(f, revision="x" * CONFIG_BYTES),
        "more than 1 MiB",
    ),
    "no factors": (lambda f: edit_tensors(f, dict.clear), "holds no factors of a LoRA"),
    "A is missing": (
        lambda f: edit_tensors(f, lambda t: t.pop(f"{Q}.lora_A.weight")),
        r"q_proj\.lora_A\.weight is missing",
    ),
    "B is missing": (
        lambda f: edit_tensors(f, lambda t: t.pop(f"{Q}.lora_B.weight")),
        r"q_proj\.lora_B\.weight is missing",
    ),
    "magnitudes of DoRA": (
        lambda f: set_tensor(f, "lora_magnitude_vector", torch.ones(48)),
        "lora_magnitude_vector .* is not a factor of a LoRA",
    ),
    "bias of B": (
        lambda f: set_tensor(f, "lora_B.bias", torch.ones(48)),
        r"lora_B\.bias .* is not a factor of a LoRA",
    ),
    "an embedding": (
        lambda f: set_tensor(f, "lora_embedding_A", torch.ones(4, 48)),
        "lora_embedding_A .* is not a factor of a LoRA",
    ),
    "another tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": torch.ones(2)})),
        r"lm_head\.weight .* is not a factor of a LoRA",
    ),
    "whole numbers": (
        lambda f: set_tensor(f, "lora_A.weight", torch.ones(4, 48, dtype=torch.int32)),
        "is stored as I32; F32, F16, BF16 are allowed",
    ),
    "fp64": (
        lambda f: set_tensor(f, "lora_A.weight", torch.ones(4, 48, dtype=torch.float64)),
        "is stored as F64",
    ),
    "fp8": (
        lambda f: set_tensor(f, "lora_A.weight", torch.ones(4, 48).to(torch.float8_e4m3fn)),
        "is stored as F8_E4M3",
    ),
    "another rank": (
        lambda f: set_tensor(f, "lora_A.weight", torch.ones(5, 48)),
        r"have shapes \(5, 48\) and \(48, 4\), which make no update",
    ),
    "a vector": (lambda f: set_tensor(f, "lora_A.weight", torch.ones(48)), r"\(48,\) and \(48, 4"),
    "a number": (lambda f: set_tensor(f, "lora_A.weight", torch.tensor(1.0)), r"shapes \(\) and"),
    "three axes": (lambda f: set_tensor(f, "lora_A.weight", torch.ones(4, 6, 8)), "make no update"),
    "nothing in": (lambda f: set_tensor(f, "lora_A.weight", torch.ones(4, 0)), "make no update"),
    "NaN": (
        lambda f: set_tensor(f, "lora_B.weight", torch.full((48, 4), torch.nan)),
        "lora_B.weight .* holds values that are not finite",
    ),
    "infinite": (
        lambda f: set_tensor(f, "lora_A.weight", torch.full((4, 48), -torch.inf)),
        "lora_A.weight .* holds values that are not finite",
    ),
    "infinite when scaled": (
        lambda f: (
            set_tensor(f, "lora_B.weight", torch.full((48, 4), 3e38)),
            edit_config(f, lora_alpha=1e8),
        ),
        "finite",
    ),
}


def read_all(folder: Path) -> StoredAdapter:
    """Read an adapter with all its numbers."""
    adapter = read_adapter(str(folder))
    for name, (out, inner) in adapter.shapes.items():
        A, B = adapter.pair(name)
        assert (A.shape[1], B.shape[0], A.shape[0]) == (inner, out, B.shape[1])
        assert A.isfinite().all()
        assert B.isfinite().all()
    return adapter


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(copy: Path, fault: str) -> None:
    assert len(read_all(copy).layers) == 6
    break_it, message = FAULTS[fault]
    break_it(copy)
    with pytest.raises(ConfigError, match=message):
        read_all(copy)


def test_a_rank_that_no_one_means(copy: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.lora_A.weight"] = torch.ones(1 << 17, 1, dtype=torch.bfloat16)
        tensors[f"{Q}.lora_B.weight"] = torch.ones(1, 1 << 17, dtype=torch.bfloat16)

    edit_tensors(copy, change)
    with pytest.raises(ConfigError, match=r"have shapes \(131072, 1\) and \(1, 131072\)"):
        read_all(copy)


@pytest.mark.parametrize("path", ["nowhere", "~no-such-user-here/run", "x" * 300, "a\0b"])
def test_a_path_that_is_none(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=r"is not an adapter|cannot be read"):
        read_adapter(path if path.startswith("~") else str(tmp_path / path))


def test_extras_that_do_no_harm(copy: Path) -> None:
    before = read_all(copy)
    edit_config(copy, use_dora=None, modules_to_save=[], peft_version="99.0", revision="main")
    edit_config(copy, alpha_pattern=None, rank_pattern=None, of_a_later_peft=False)
    after = read_all(copy)
    for name in before.layers:
        assert torch.equal(before.pair(name).B, after.pair(name).B)


LAYERS = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 80)}


def make_run(folder: Path, r: int = 4, **options: Any) -> dict[str, torch.Tensor]:
    """Write a run's folder as after the init; return the tensors of its basis."""
    generator = torch.Generator().manual_seed(5)
    basis = {}
    for name, (out, inner) in LAYERS.items():
        basis[f"{name}.lora_A"] = torch.linalg.qr(torch.randn(inner, r, generator=generator))[0].T
        basis[f"{name}.lora_B"] = torch.linalg.qr(torch.randn(out, r, generator=generator))[0]
        basis[f"{name}.S"] = torch.arange(r, 0, -1).float()
        basis[f"{name}.lora_R"] = -1e-3 * torch.diag(basis[f"{name}.S"])
        basis[f"{name}.slopes"] = torch.ones(r)
    made_up_run(folder, {"model": "base", "r": r, **options})
    save_tensors(folder / BASIS_FILE, basis, {"format": "pt", "made_from": "{}"})
    (folder / "init.json").write_text("{}")
    write_sums(folder, (BASIS_FILE, "init.json"))
    return basis


def make_checkpoint(run: Path, step: int, r: int = 4) -> dict[str, torch.Tensor]:
    """Map layer -> R of a checkpoint."""
    generator = torch.Generator().manual_seed(step)
    trained = {name: torch.randn(r, r, generator=generator) for name in LAYERS}
    tensors = {"rank0.cpu": torch.zeros(9, dtype=torch.uint8)}
    for name, R in trained.items():
        tensors |= {f"{name}.lora_R": R, f"{name}.lora_R.exp_avg": torch.ones(r, r)}
    content = {
        "progress": vars(TrainerState(step=step, updates=step)),
        "made_from": {},
        "options": {},
        "world_size": 1,
        "optimizer_scalars": {"step": float(step)},
        "loss_scale": {},
    }
    write_checkpoint(run, tensors, content, step)
    return trained


def holds(
    adapter: StoredAdapter, basis: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]
) -> bool:
    """Check that an adapter's updates are B R A."""
    assert list(adapter.layers) == list(LAYERS)
    assert adapter.shapes == LAYERS
    for name, R in trained.items():
        A, B = adapter.pair(name)
        expected = basis[f"{name}.lora_B"] @ R @ basis[f"{name}.lora_A"]
        if not torch.allclose(B @ A, expected, rtol=0, atol=1e-6):  # fp32, numbers of size 1
            return False
    return True


def test_a_run_is_its_adapter_or_its_newest_whole_checkpoint(lora: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    basis = make_run(run)
    with pytest.raises(ConfigError, match="has no adapter and no complete checkpoint"):
        read_adapter(str(run))
    trained = {step: make_checkpoint(run, step) for step in (2, 10, 9)}
    found = read_adapter(str(run))
    assert (found.path.name, found.run, found.r) == ("step-00000010", run, 4)
    assert (found.base_model, found.target_modules) == ("base", list(LAYERS))
    assert holds(found, basis, trained[10])
    assert not holds(found, basis, trained[9])

    named = read_adapter(str(run / "checkpoints" / "step-00000002"))
    assert named.run == run
    assert holds(named, basis, trained[2])

    state = run / "checkpoints" / "step-00000010" / STATE_FILE
    state.write_bytes(state.read_bytes()[:-1] + b"\x7f")
    found = read_adapter(str(run))
    assert found.path.name == "step-00000009"
    assert holds(found, basis, trained[9])
    with pytest.raises(ConfigError, match=r"state\.safetensors is not what was written.* another"):
        read_adapter(str(state.parent))

    shutil.copytree(lora, run / "adapter")
    found = read_adapter(str(run))
    assert (found.path, found.run) == (run / "adapter", run)
    assert found.run_config["r"] == 4
    assert found.base_model == "base", "as the run names it"
    assert found.peft_config["lora_alpha"] == 10
    assert read_adapter(str(run / "adapter")).run == run
    assert read_adapter(str(lora)).run is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_basis_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    run = tmp_path / "run"
    basis = make_run(run)
    halved = {k: v.to(dtype) if k[-1] in "AB" else v for k, v in basis.items()}
    save_tensors(run / BASIS_FILE, halved, {"format": "pt"})
    trained = make_checkpoint(run, 3)
    rounded = {k: v.float() for k, v in halved.items()}
    assert holds(read_adapter(str(run)), rounded, trained)


def edit_basis(run: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(run / BASIS_FILE)
    change(tensors)
    save_file(tensors, run / BASIS_FILE)


def edit_state(run: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Replace a checkpoint's tensors, with matching checksums."""
    folder = run / "checkpoints" / "step-00000003"
    tensors = load_file(folder / STATE_FILE)
    change(tensors)
    save_file(tensors, folder / STATE_FILE)
    write_sums(folder, (STATE_FILE, TRAINER_FILE))


def edit_trainer(run: Path, text: str) -> None:
    folder = run / "checkpoints" / "step-00000003"
    (folder / TRAINER_FILE).write_text(text)
    write_sums(folder, (STATE_FILE, TRAINER_FILE))


FIRST = next(iter(LAYERS))
RUN_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no basis": (lambda run: (run / BASIS_FILE).unlink(), r"basis\.safetensors is no whole"),
    "a torn basis": (
        lambda run: (run / BASIS_FILE).write_bytes((run / BASIS_FILE).read_bytes()[:-9]),
        r"basis\.safetensors is no whole safetensors file: it ends at byte",
    ),
    "an empty basis": (lambda run: edit_basis(run, dict.clear), "holds no factors of a LoRA"),
    "no B": (lambda run: edit_basis(run, lambda t: t.pop(f"{FIRST}.lora_B")), "lora_B is missing"),
    "R of another rank": (
        lambda run: edit_state(run, lambda t: t.update({f"{FIRST}.lora_R": torch.ones(3, 3)})),
        "make no update",
    ),
    "R of whole numbers": (
        lambda run: edit_state(
            run, lambda t: t.update({f"{FIRST}.lora_R": torch.ones(4, 4, dtype=torch.int64)})
        ),
        "is stored as I64",
    ),
    "R is NaN": (
        lambda run: edit_state(
            run, lambda t: t.update({f"{FIRST}.lora_R": torch.full((4, 4), torch.nan)})
        ),
        "lora_R .* not finite",
    ),
    "R is not there": (
        lambda run: edit_state(run, lambda t: t.pop(f"{FIRST}.lora_R")),
        "lora_R is missing",  # that of the init, in the basis, is another one
    ),
    "another version": (
        lambda run: edit_trainer(run, '{"format": 99, "progress": {}}'),
        "no complete checkpoint",
    ),
    "progress of another kind": (
        lambda run: edit_trainer(run, '{"format": 1, "progress": {"steps": 1}}'),
        "no complete checkpoint",
    ),
    "no progress": (lambda run: edit_trainer(run, "{}"), "no complete checkpoint"),
    "no JSON beside the state": (lambda run: edit_trainer(run, "{"), "no complete checkpoint"),
    "no sums": (
        lambda run: (run / "checkpoints" / "step-00000003" / SUMS_FILE).unlink(),
        "no complete checkpoint",
    ),
    "run.json is no JSON": (lambda run: (run / "run.json").write_text("{"), "is not valid JSON"),
    "a number that int() cannot read": (
        lambda run: (run / "checkpoints" / "step-00000003").rename(run / "checkpoints" / "step-²"),
        "no complete checkpoint",
    ),
}


@pytest.mark.parametrize("fault", RUN_FAULTS)
def test_broken_runs(tmp_path: Path, fault: str) -> None:
    run = tmp_path / "run"
    make_run(run)
    make_checkpoint(run, 3)
    assert read_all(run).path.name == "step-00000003"
    break_it, message = RUN_FAULTS[fault]
    break_it(run)
    with pytest.raises(ConfigError, match=message):
        read_all(run)


def test_a_run_json_without_options(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run)
    make_checkpoint(run, 3)
    (run / "run.json").write_text('{"config": 7}')
    adapter = read_all(run)
    assert adapter.base_model is None
    assert adapter.target_modules == list(LAYERS)
    assert RunConfig().r > 0  # and the rest of the package was not needed for it


# What follows changes whole files at random. They are small, so that a change matters.


def small_file() -> bytes:
    tensors = {
        "base_model.model.a.0.q.lora_A.weight": torch.arange(1.0, 7).view(2, 3),
        "base_model.model.a.0.q.lora_B.weight": torch.arange(1.0, 9).view(4, 2).bfloat16(),
    }
    from safetensors.torch import save

    return save(tensors, {"format": "pt"})


SMALL = small_file()
SMALL_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q"]}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzed")
    write_small(folder)
    assert len(read_all(folder).layers) == 1
    return folder


def write_small(folder: Path, content: bytes = SMALL, config: Any = SMALL_CONFIG) -> None:
    (folder / ADAPTER_WEIGHTS).write_bytes(content)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))


def with_header(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    count = len(header) if length is None else length
    return count.to_bytes(8, "little") + header + data


def works_or_refuses(folder: Path) -> str | None:
    """Read an adapter and return why it was refused; any other exception is a failure."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    try:
        read_all(folder)
        return None
    except ConfigError as error:
        str(error).encode()  # it can be printed
        return str(error)
    finally:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 50_000, f"{grown} KiB for a file of 500 bytes"
        assert time.perf_counter() - start < 2


EDITS = st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), max_size=6)


@given(EDITS, st.integers(0, len(SMALL)), st.binary(max_size=9))
def test_bytes_that_were_changed(
    fuzzed: Path, edits: list[tuple[int, int]], end: int, more: bytes
) -> None:
    content = bytearray(SMALL)
    for position, value in edits:
        content[position] = value
    kept = content if end % 3 else content[:end]  # two of three keep their length
    write_small(fuzzed, bytes(kept) + more)
    works_or_refuses(fuzzed)


@pytest.mark.parametrize(
    "length",
    [0, 1, 2, 7, 8, len(SMALL) - 8, len(SMALL) - 7, 10**8 + 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1],
)
def test_lengths_of_a_header(fuzzed: Path, length: int) -> None:
    write_small(fuzzed, length.to_bytes(8, "little") + SMALL[8:])
    tracemalloc.start()
    try:
        assert works_or_refuses(fuzzed) is not None
        assert tracemalloc.get_traced_memory()[1] < 2 << 20  # a message, a few frames
    finally:
        tracemalloc.stop()


A_KEY, B_KEY = (f"base_model.model.a.0.q.lora_{leaf}.weight" for leaf in "AB")
A_ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B_ENTRY = {"dtype": "BF16", "shape": [4, 2], "data_offsets": [24, 40]}
NAN_OR_ANY = st.none() | st.booleans() | st.floats() | st.text(max_size=5)
SIZES = st.integers(-5, 50) | st.sampled_from([2**31, 2**63, 2**64, 10**400, -(2**63)])
VALUES = st.recursive(
    NAN_OR_ANY | SIZES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": VALUES | st.sampled_from(["F32", "BF16", "F16", "F64", "F4", "U8", "f32"]),
        "shape": VALUES | st.lists(SIZES, max_size=4),
        "data_offsets": VALUES | st.lists(SIZES, min_size=2, max_size=2),
    },
)
ALPHAS = st.sampled_from([8, 8.5])


@given(ENTRIES, ENTRIES | st.none(), ALPHAS, st.booleans())
def test_headers_that_lie(
    fuzzed: Path, a: dict[str, Any], b: dict[str, Any] | None, alpha: float, rslora: bool
) -> None:
    header = {A_KEY: A_ENTRY | a, B_KEY: B_ENTRY | (b or {})}
    content = with_header(json.dumps(header).encode(), b"\0" * 40)
    write_small(fuzzed, content, SMALL_CONFIG | {"lora_alpha": alpha, "use_rslora": rslora})
    works_or_refuses(fuzzed)


@given(VALUES | st.dictionaries(st.text(max_size=3) | st.just(A_KEY), VALUES, max_size=3))
def test_headers_of_any_json(fuzzed: Path, header: Any) -> None:
    write_small(fuzzed, with_header(json.dumps(header).encode(), b"\0" * 40))
    assert works_or_refuses(fuzzed) is not None


def entry(key: str, value: str) -> str:
    """Write a header in which one field of A's entry is as given."""
    parts = {k: json.dumps(v) for k, v in A_ENTRY.items()} | {key: value}
    inside = ", ".join(f'"{k}": {v}' for k, v in parts.items())
    return f'{{"{A_KEY}": {{{inside}}}, "{B_KEY}": {json.dumps(B_ENTRY)}}}'


LYING_HEADERS: dict[str, tuple[str, str]] = {
    "nothing": ("", "ends within its header"),
    "an array": ("[]", "no whole safetensors file"),
    "deep arrays": ("[" * 100_000, "no whole safetensors file"),
    "deep objects": ('{"a":' * 100_000, "no whole safetensors file"),
    "no JSON": ("{]", "no whole safetensors file"),
    "a shape of true": (entry("shape", "[true, 6]"), "no whole safetensors file"),
    "a shape of floats": (entry("shape", "[2.0, 3.0]"), "no whole safetensors file"),
    "a negative shape": (entry("shape", "[-2, -3]"), "no whole safetensors file"),
    "a shape in words": (entry("shape", '"23"'), "no whole safetensors file"),
    "a huge shape": (entry("shape", f"[{2**62}, {2**62}]"), "no whole safetensors file"),
    "a longer number than int() takes": (entry("shape", "[" + "9" * 5000 + "]"), "no whole"),
    "a huge shape of nothing": (
        entry("shape", f"[0, {2**63}]").replace("[0, 24]", "[0, 0]"),
        "no whole safetensors file",
    ),
    "a rank beyond floats": (
        entry("shape", f"[{10**400}, 0]").replace("[0, 24]", "[0, 0]"),
        "no whole safetensors file",
    ),
    "no dtype": (entry("dtype", "4"), "no whole safetensors file"),
    "an unknown dtype": (entry("dtype", '"F99"'), "is stored as F99"),
    "an unknown dtype of a rank beyond floats": (
        entry("dtype", '"F99"').replace("[2, 3]", f"[{10**400}, 3]"),
        "no whole safetensors file",
    ),
    "offsets that overlap": (entry("data_offsets", "[8, 32]"), "overlaps"),
    "offsets beyond the end": (entry("data_offsets", "[40, 64]"), "ends at byte"),
    "offsets beyond all ends": (
        entry("data_offsets", f"[{10**4299}, {10**4299 + 24}]"),
        "no whole safetensors file",
    ),
    "offsets before the data": (entry("data_offsets", "[-24, 0]"), "no whole safetensors file"),
    "offsets turned round": (entry("data_offsets", "[24, 0]"), "no whole safetensors file"),
    "three offsets": (entry("data_offsets", "[0, 24, 24]"), "no whole safetensors file"),
    "no offsets": (entry("data_offsets", "null"), "no whole safetensors file"),
    "a name twice": (
        entry("dtype", '"F32"')[:-1] + f', "{A_KEY}": {json.dumps(A_ENTRY | {"dtype": "I8"})}}}',
        "no whole safetensors file",
    ),
}


def test_a_shape_that_takes_long_to_multiply(fuzzed: Path) -> None:
    shape = "[" + ",".join(["9" * 4299] * 460) + "]"
    write_small(fuzzed, with_header(entry("shape", shape).encode(), b"\0" * 40))
    assert works_or_refuses(fuzzed) is not None


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("case", LYING_HEADERS)
def test_lying_headers(fuzzed: Path, case: str, rslora: bool) -> None:
    header, message = LYING_HEADERS[case]
    write_small(fuzzed, with_header(header.encode(), b"\0" * 40))
    edit_config(fuzzed, lora_alpha=8.5, use_rslora=rslora)
    assert message in (works_or_refuses(fuzzed) or "it was read")


def test_the_small_header_is_read(fuzzed: Path) -> None:
    """The cases above are refused because of what they change."""
    write_small(fuzzed, with_header(entry("dtype", '"F32"').encode(), b"\0" * 40))
    assert works_or_refuses(fuzzed) is None
    (fuzzed / ADAPTER_WEIGHTS).write_bytes(b"")
    assert "ends within its header" in (works_or_refuses(fuzzed) or "")


FIELDS = sorted({*vars(LoraConfig(target_modules=["q"])), "peft_type", "alpha_pattern", "other"})


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_configurations_of_any_json(fuzzed: Path, change: dict[str, Any]) -> None:
    write_small(fuzzed, config=SMALL_CONFIG | change)
    works_or_refuses(fuzzed)


@given(st.sampled_from(["lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights"]), VALUES)
def test_fields_that_make_the_update(fuzzed: Path, field: str, value: Any) -> None:
    pattern = {"q": value} if field == "alpha_pattern" else value
    write_small(fuzzed, config=SMALL_CONFIG | {field: pattern})
    works_or_refuses(fuzzed)


@given(VALUES)
def test_any_json_for_a_configuration(fuzzed: Path, config: Any) -> None:
    write_small(fuzzed, config=config)
    assert works_or_refuses(fuzzed) is not None


@given(st.binary(max_size=60))
def test_any_bytes_for_a_configuration(fuzzed: Path, content: bytes) -> None:
    write_small(fuzzed)
    (fuzzed / ADAPTER_CONFIG).write_bytes(content)
    assert works_or_refuses(fuzzed) is not None


# Bases: the same headers, and an index that names files.

OUTSIDE = [
    "../secret.safetensors",
    "a/../../secret.safetensors",
    "..",
    "/etc/passwd",
    "//secret.safetensors",
    "",
    ".",
    "sub",
    "a\0b",
    "x" * 300,
    7,
    None,
    True,
    ["model.safetensors"],
    {"file": "model.safetensors"},
]


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: str(name)[:30])
def test_an_index_that_names_other_files(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for file in (tmp_path / "secret.safetensors", folder / "part.safetensors"):
        save_file({"w": torch.ones(2)}, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "part.safetensors"}}))
    assert Base(str(folder)).stored["w"].file == folder / "part.safetensors"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ConfigError):
        _ = Base(str(folder)).stored


@given(VALUES | st.fixed_dictionaries({"weight_map": VALUES}))
def test_an_index_of_any_json(fuzzed: Path, content: Any) -> None:
    folder = fuzzed / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError):
        _ = Base(str(folder)).stored


def test_a_header_of_a_base_is_checked_alike(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(with_header(b"{}", length=2**63))
    with pytest.raises(ConfigError, match=r"--model .*: model\.safetensors is no whole"):
        _ = Base(str(tmp_path)).stored
    (tmp_path / "model.safetensors").write_bytes(SMALL)
    found = read_header(tmp_path / "model.safetensors", "x")
    assert {name: tensor.shape for name, tensor in found.items()} == {A_KEY: (2, 3), B_KEY: (4, 2)}

"""Every shipped DeepSpeed configuration: DeepSpeed's own class takes it, and it really runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from safetensors.torch import load_file

from lorasb_ds.config.ds_config import resolve_ds_config
from lorasb_ds.config.paths import SHIPPED_DS_CONFIGS
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.distributed import ds_config_check as check
from lorasb_ds.distributed.ds_config_check import check_ds_config
from lorasb_ds.errors import ConfigError
from tests.runs import REALLY_SHARDED, metrics, run_worker, word_rows, write_jsonl

SHIPPED = sorted(file.stem for file in SHIPPED_DS_CONFIGS.glob("*.json"))


def resolved(name: str, world_size: int, **given: Any) -> dict[str, Any]:
    path = str(SHIPPED_DS_CONFIGS / f"{name}.json")
    return resolve_ds_config(load_run_config({"ds_config": path, **given}), world_size)[0]


@pytest.fixture(autouse=True)
def fast_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where zero3_nvme keeps the base


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_takes_them(name: str) -> None:
    # Without a process group DeepSpeed counts one process, for which everything must fit.
    given = {"micro_batch_size": 3, "gradient_accumulation_steps": 4, "max_grad_norm": 0.5}
    config = DeepSpeedConfig(resolved(name, 1, **given))
    assert config.train_batch_size == 12
    assert config.train_micro_batch_size_per_gpu == 3
    assert config.gradient_clipping == 0.5
    assert config.bfloat16_config.enabled
    assert config.zero_config.stage == int(name[4])
    many = resolved(name, 8, **given)
    assert many.pop("train_batch_size") == 96
    section = DeepSpeedConfig(many).zero_config
    assert section.zero_hpz_partition_size == (8 if name == "zero3_hpz" else 1)
    assert section.zero_quantized_weights == (name == "zero3_qwz")
    device = section.offload_param.device if section.offload_param else "none"
    assert device == {"zero3_offload": "cpu", "zero3_nvme": "nvme"}.get(name, "none")


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ({"stage": 3, "stage3_max_live": 1}, "stage3_max_live: Extra inputs"),
        ({"stage": 3, "reduce_bucket_size": "big"}, "reduce_bucket_size: Input should be"),
        ({"stage": 3, "offload_param": {"device": "disk"}}, "offload_param.device"),
        ({"stage": 3, "zero_quantized_weights": True}, "on GPUs only"),
    ],
)
def test_what_deepspeed_refuses_is_refused_before_loading(
    section: dict[str, Any], part: str
) -> None:
    content = resolved("zero3", 2) | {"zero_optimization": section}
    with pytest.raises(ConfigError, match=part):
        check_ds_config(content, "my.json")


def test_nvme_without_libaio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler that links it, to be exact."""
    monkeypatch.setenv("CC", "false")
    with pytest.raises(ConfigError, match=r"libaio is missing.*libaio-dev"):
        check_ds_config(resolved("zero3_nvme", 2), "zero3_nvme.json")


@pytest.mark.parametrize("name", ["zero3_qwz", "zero3_nvme"])
def test_a_gpu_without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """DeepSpeed's own check finds a builder compatible that then needs nvcc. No GPU is here."""
    aio = type(get_accelerator().create_op_builder("AsyncIOBuilder"))
    monkeypatch.setattr(aio, "is_compatible", lambda _: True)  # libaio, which is asked for first
    monkeypatch.setattr(check, "installed_ops", {})
    monkeypatch.setattr(check.torch.version, "cuda", "13.0")
    monkeypatch.setattr(check.accelerator, "name", lambda: "cuda")
    monkeypatch.setattr(check, "CUDA_HOME", None)
    with pytest.raises(ConfigError, match=r"there is no nvcc. Install the CUDA toolkit 13\.0"):
        check_ds_config(resolved(name, 2), "my.json")
    monkeypatch.setattr(check, "CUDA_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=f"no nvcc in {tmp_path}"):
        check_ds_config(resolved(name, 2), "my.json")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    check_ds_config(resolved(name, 2), "my.json")
    check_ds_config(resolved("zero3_offload", 2), "my.json")


def train(model: Path, folder: Path, ds_config: str, world_size: int, rows: int) -> Path:
    data = write_jsonl(folder / "rows.jsonl", word_rows(11))
    run_worker(
        *f"--model {model} --data {data} --eval-data {data} --dtype fp32 --r 4 "
        f"--init-samples 4 --init-lr 1e-3 --max-steps 2 --ds-config {ds_config} "
        f"--micro-batch-size {rows} --output-dir {folder}/run".split(),
        world_size=world_size,
    )
    return folder / "run"


@pytest.fixture(scope="module")
def by_zero2(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero2")
    return train(tiny_model, folder, "ds_configs/zero2.json", 2, 2)


HAS_LIBAIO = get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible()


@pytest.mark.parametrize(
    ("name", "world_size", "rows", "changes"),
    [
        ("zero1", 2, 2, {}),
        ("zero3", 2, 2, REALLY_SHARDED),
        ("zero3_offload", 2, 2, REALLY_SHARDED),
        # Two groups of two: the same rows in a step.
        pytest.param(
            *("zero3_hpz", 4, 1, REALLY_SHARDED | {"zero_hpz_partition_size": 2}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "zero3_nvme",
            2,
            2,
            REALLY_SHARDED,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not HAS_LIBAIO, reason="libaio is missing"),
            ],
        ),
    ],
)
def test_the_same_run_as_by_zero2(
    tiny_model: Path,
    tmp_path: Path,
    by_zero2: Path,
    name: str,
    world_size: int,
    rows: int,
    changes: dict[str, Any],
) -> None:
    content = json.loads((SHIPPED_DS_CONFIGS / f"{name}.json").read_text())
    content["zero_optimization"] |= changes
    (tmp_path / "ds.json").write_text(json.dumps(content))
    run = train(tiny_model, tmp_path, str(tmp_path / "ds.json"), world_size, rows)
    found, expected = metrics(run), metrics(by_zero2)
    assert len(found) == len(expected) == 5  # base, init, two steps, trained
    for row, reference in zip(found, expected, strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & reference.keys():
            # fp32 sums in another order; the init's signs may turn where a gradient is nearly 0.
            assert row[key] == pytest.approx(reference[key], rel=1e-4), key
    basis = load_file(run / "basis.safetensors")
    assert all(tensor.abs().max() > 0 for key, tensor in basis.items() if key.endswith("lora_R"))
    on_drive = list(Path(os.environ["TMPDIR"]).glob("zero_stage_3/**/*.swp"))
    assert bool(on_drive) == (name == "zero3_nvme")

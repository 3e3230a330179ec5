"""Whole runs on mixtures of experts, and what comes out of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.errors import ConfigError
from lorasb_ds.evaluation.model import prepare_model, start_model
from lorasb_ds.export.adapter_reader import read_adapter
from lorasb_ds.export.combine import combine_adapters
from lorasb_ds.export.merge import merge_adapter
from lorasb_ds.export.to_peft import export_adapter, measure_energy
from lorasb_ds.export.to_vllm import export_for_vllm
from lorasb_ds.models.base import Base
from tests.runs import metrics, run_ranks, word_rows, write_jsonl

# With biases, interleaved gates and transposed weights; published experts by themselves; with dense
# and shared layers of the experts' names.
FAMILY_MARKS = (
    "gpt_oss",
    pytest.param("qwen3_moe", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", marks=pytest.mark.slow),
)
REALLY_SHARDED = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
IDS = torch.arange(100, 124).view(2, 12)


def options(model: Path, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": write_jsonl(folder.parent / "rows.jsonl", word_rows(40)),
        "output_dir": str(folder),
        "r": 8,
        "expert_r": 4,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "dtype": "fp32",
        "init_samples": 8,
        "max_steps": 4,
        "lr": 1e-2,
        "ds_config": "ds_configs/zero3.json",
        **more,
    }


def train(world_size: int, *runs: dict[str, Any]) -> None:
    run_ranks("methods", world_size, runs=list(runs), zero_optimization=REALLY_SHARDED)


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in metrics(run) if "loss" in row])


@pytest.fixture(scope="module")
def trained(
    tiny_family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A function that trains on a family, in one process; once each."""
    found: dict[str, Path] = {}

    def run(family: str) -> Path:
        if family not in found:
            found[family] = tmp_path_factory.mktemp(family) / "one"
            train(1, options(tiny_family(family), found[family]))
        return found[family]

    return run


@pytest.mark.parametrize("family", FAMILY_MARKS)
def test_ranks_train_as_one_process(
    tiny_family: Callable[[str], Path],
    trained: Callable[[str], Path],
    tmp_path: Path,
    family: str,
) -> None:
    one, two = trained(family), tmp_path / "two"
    train(2, options(tiny_family(family), two, micro_batch_size=2))
    assert len(losses(one)) == 4
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-3, atol=0)
    bases = [load_file(run / "basis.safetensors") for run in (one, two)]
    experts = [n for n, tensor in bases[0].items() if n.endswith("lora_R") and tensor.ndim == 3]
    assert experts
    for name in experts:
        assert bases[0][name].any()
        torch.testing.assert_close(bases[1][name], bases[0][name], rtol=1e-3, atol=1e-6)
    report = (one / "report.md").read_text()
    assert "## Init of experts" in report
    assert experts[0].removesuffix(".lora_R") in report


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def base_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILY_MARKS)
def test_what_comes_out(
    tiny_family: Callable[[str], Path],
    trained: Callable[[str], Path],
    one_process: None,
    tmp_path: Path,
    family: str,
) -> None:
    base, run = tiny_family(family), trained(family)
    config = load_run_config({"model": str(base), "dtype": "fp32"})
    wanted = logits(start_model(prepare_model(config, str(run))))
    assert (wanted - logits(base_of(base))).abs().max() > 0.05

    def equals(found: torch.Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    equals(logits(PeftModel.from_pretrained(base_of(base), run / "adapter")))
    (checkpoint,) = (run / "checkpoints").glob("step-*4")
    equals(logits(start_model(prepare_model(config, str(checkpoint)))))
    for adapter, out in ((run, "merged"), (checkpoint, "merged from a checkpoint")):
        merge_adapter(read_adapter(str(adapter)), str(base), tmp_path / out)
        equals(logits(base_of(tmp_path / out)))

    stored = read_adapter(str(checkpoint))
    export_adapter(stored, tmp_path / "exported")
    equals(logits(PeftModel.from_pretrained(base_of(base), tmp_path / "exported")))
    total = combine_adapters([stored, stored], [0.75, 0.25], tmp_path / "combined")
    assert total.one_basis
    equals(logits(PeftModel.from_pretrained(base_of(base), tmp_path / "combined")))

    if family == "gpt_oss":  # its files have one tensor for all experts
        with pytest.raises(ConfigError, match=r"--to vllm: .* holds all experts"):
            export_for_vllm(stored, Base(str(base)), tmp_path / "vllm")
    else:
        export_for_vllm(stored, Base(str(base)), tmp_path / "vllm")
        single = read_adapter(str(tmp_path / "vllm"))
        assert single.experts == {}
        assert single.peft_config["target_modules"] == sorted(
            {name.rpartition(".")[2] for name in single.layers}
        )
        experts = "model.layers.1.mlp.experts.3"
        whole = stored.pair(f"{experts}.gate_up_proj")
        halves = [single.pair(f"{experts}.{name}") for name in ("gate_proj", "up_proj")]
        together = torch.cat([pair.B @ pair.A for pair in halves])
        torch.testing.assert_close(together, whole.B @ whole.A)

    export_adapter(stored, tmp_path / "cut", r=2)
    cut = read_adapter(str(tmp_path / "cut"))
    assert {cut.rank_of(name) for name in cut.layers} == {2}
    kept = measure_energy(stored)
    assert kept.total[1] < kept.total[3] <= kept.total[-1] == pytest.approx(1)
    found = logits(start_model(prepare_model(config, str(tmp_path / "cut"))))
    peft = logits(PeftModel.from_pretrained(base_of(base), tmp_path / "cut"))
    torch.testing.assert_close(found, peft, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_4_bit_experts_resume(tiny_family: Callable[[str], Path], tmp_path: Path) -> None:
    """On a packed base, over two sharded ranks, with a basis that is loaded, and a resume."""
    folder = tiny_family("qwen3_moe")
    whole = options(folder, tmp_path / "whole", micro_batch_size=2, load_in_4bit=True, dtype="bf16")
    first = whole | {"output_dir": str(tmp_path / "parts"), "max_steps": 2, "save_every": 2}
    first |= {"init_from": str(tmp_path / "whole"), "lr_scheduler": "constant", "warmup_ratio": 0.0}
    whole |= {"lr_scheduler": "constant", "warmup_ratio": 0.0}
    second = first | {"max_steps": 4, "resume": str(tmp_path / "parts")}
    train(2, whole, first)
    train(2, second)
    assert torch.equal(losses(tmp_path / "parts"), losses(tmp_path / "whole"))
    adapters = [
        load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("whole", "parts")
    ]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[1][name], A) for name, A in adapters[0].items())


def test_a_basis_that_is_cut(tiny_family: Callable[[str], Path], tmp_path: Path) -> None:
    """Layers get the smaller rank; experts keep the one that they have."""
    whole = options(tiny_family("qwen3_moe"), tmp_path / "whole", r=12, expert_r=None, max_steps=1)
    cut = whole | {
        "r": 8,
        "output_dir": str(tmp_path / "cut"),
        "init_from": str(tmp_path / "whole"),
    }
    train(1, whole, cut)
    ranks = [
        {
            "experts" in name: A.shape[0]
            for name, A in load_file(tmp_path / run / "adapter/adapter_model.safetensors").items()
            if name.endswith("lora_A.weight")
        }
        for run in ("whole", "cut")
    ]
    assert ranks[0][True] == ranks[1][True]
    assert (ranks[0][False], ranks[1][False]) == (12, 8)


def test_alignment_leaves_experts_out(tiny_family: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(1, options(tiny_family("qwen3_moe"), run, max_steps=2, track_alignment=1))
    rows = [json.loads(line) for line in (run / "alignment.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {0, 1, 2}
    assert not any("experts" in row["layer"] for row in rows)


@pytest.mark.slow
def test_experts_in_host_memory(tiny_family: Callable[[str], Path], tmp_path: Path) -> None:
    """Packed experts, offloaded by ZeRO-3: the same losses."""
    given = options(tiny_family("gpt_oss"), tmp_path / "here", load_in_4bit=True, dtype="bf16")
    offloaded = given | {"ds_config": "ds_configs/zero3_offload.json"}
    train(2, given, offloaded | {"output_dir": str(tmp_path / "host")})
    torch.testing.assert_close(losses(tmp_path / "host"), losses(tmp_path / "here"))

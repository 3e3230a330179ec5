"""Every method as a whole run: sharded by ZeRO-3, on a 4-bit base, and as what PEFT then loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorasb_ds.adapters.low_rank import LoraPair
from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.batch import Batch, collate
from lorasb_ds.data.dataset import tokenize_rows
from lorasb_ds.data.sources import load_rows
from lorasb_ds.errors import ConfigError
from lorasb_ds.evaluation.model import prepare_model, start_model
from lorasb_ds.export.adapter_reader import read_adapter, read_init
from lorasb_ds.models.base import Base
from lorasb_ds.models.linear_layers import linear_layers
from lorasb_ds.runs.checkpoint import checkpoint_path
from lorasb_ds.training.prepare import prepare
from tests.references import own_loss
from tests.runs import REALLY_SHARDED, Runs, metrics, run_ranks, word_rows, write_jsonl

R, STEPS = 4, 3
PRECONDITIONED = "lora-one, preconditioned"
# Those of which none is another one with a line changed; the rest is slow.
QUICK = ("lora-sb", "lora-xs", "lora-one", "lora-ga", PRECONDITIONED)
NAMES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in (*METHODS, PRECONDITIONED)
]
# Learning rates at which three steps can be told from none.
RATES = {"lora_R": 2e-2, "lora_A": 5e-3}


def config_of(name: str, model: Path, folder: Path, **options: Any) -> dict[str, Any]:
    method = name.partition(",")[0]
    config = {
        "model": str(model),
        "data": str(folder / "rows.jsonl"),
        "eval_data": str(folder / "held-out.jsonl"),
        "output_dir": str(folder / name.replace(", ", "-")),
        "method": method,
        "r": R,
        "lr": RATES[METHODS[method].trained[0]],
        "dtype": "fp32",
        "max_steps": STEPS,
        "save_every": 2,
        "init_samples": 16,
        "train_batch_size": 4,
        "micro_batch_size": 2,
        **options,
    }
    return config | ({"precondition": 0.1} if name == PRECONDITIONED else {})


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(1, marks=pytest.mark.slow)],
    ids=["2 ZeRO-3 ranks", "1 process"],
)
def runs(request, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("methods")
    write_jsonl(folder / "rows.jsonl", word_rows(24))
    write_jsonl(folder / "held-out.jsonl", word_rows(30)[24:])
    world_size = request.param
    zero: dict[str, Any] = {"stage": 3, **REALLY_SHARDED} if world_size == 2 else {"stage": 2}
    more = {} if world_size == 2 else {"gradient_accumulation_steps": 2}

    def make(name: str) -> Path:
        config = config_of(name, tiny_model, folder, **more)
        run_ranks("methods", world_size, runs=[config], zero_optimization=zero)
        return Path(config["output_dir"])

    return Runs(folder, make)


def held_out(folder: Path, model: Path) -> Batch:
    tokenizer = Base(str(model)).tokenizer
    rows = tokenize_rows(load_rows(str(folder / "held-out.jsonl")), tokenizer, RunConfig())
    return collate(rows.examples, tokenizer.pad_token_id)


def losses(run: Path) -> dict[str, float]:
    return {row["stage"]: row["eval_loss"] for row in metrics(run) if "stage" in row}


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_exports(name: str, runs: Runs, tiny_model: Path) -> None:
    run, method = runs[name], METHODS[name.partition(",")[0]]
    found = losses(run)
    batch = held_out(runs.folder, tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        # The means of other batches, in fp32: to some of its roundings.
        assert own_loss(base, batch).item() == pytest.approx(found["base"], rel=1e-5)
        tuned = PeftModel.from_pretrained(base, run / "adapter").eval()
        assert own_loss(tuned, batch).item() == pytest.approx(found["trained"], rel=1e-5)
    assert abs(found["trained"] - found["init"]) > 1e-4, "nothing was trained"
    if not method.takes_step and name not in ("lora-one", PRECONDITIONED):
        assert found["init"] == pytest.approx(found["base"], rel=1e-5)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == (2 * R if method.offset else R)
    described = json.loads((run / "run.json").read_text())
    trained = sum(
        p.numel() // (2 if method.offset else 1)
        for n, p in tuned.named_parameters()
        if "lora_" in n
    )
    if method.trains_r:
        trained = 14 * R * R
    assert described["trainable_parameters"] == trained


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_read_as_the_adapter(name: str, runs: Runs) -> None:
    """The last checkpoint and the adapter's folder are the same update; an earlier one is not."""
    run = runs[name]
    folders = (checkpoint_path(run, STEPS), run / "adapter", checkpoint_path(run, 2))
    last, saved, earlier = (read_adapter(str(path)) for path in folders)
    assert last.r == saved.r
    for layer in saved.layers:
        a, b, c = (dense(adapter.pair(layer)) for adapter in (last, saved, earlier))
        assert torch.linalg.norm(a - b) <= 1e-5 * torch.linalg.norm(b)
        assert torch.linalg.norm(a - c) > 1e-4 * torch.linalg.norm(b)


def dense(pair: LoraPair) -> torch.Tensor:
    return pair.B @ pair.A


def test_preconditioning_changes_the_path(runs: Runs) -> None:
    with_, without = (losses(runs[name]) for name in (PRECONDITIONED, "lora-one"))
    assert with_["init"] == without["init"]
    assert abs(with_["trained"] - without["trained"]) > 1e-5


@pytest.mark.parametrize(
    "method",
    ["lora-xs", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "pissa"))],
)
def test_a_basis_of_another_method_is_rejected(method: str, runs: Runs, tiny_model: Path) -> None:
    """Neither --init-from nor --resume accepts it."""
    config = config_of("lora-sb", tiny_model, runs.folder)
    taken = {**config, "init_from": str(runs[method]), "output_dir": str(runs.folder / "new")}
    resumed = {**config, "resume": "auto", "output_dir": str(runs[method])}
    for given in (taken, resumed):
        with pytest.raises(ConfigError, match="--method"):
            prepare(load_run_config(given), 1)


def test_checkpoint_and_init_of_lora_with_scaling_1(
    runs: Runs, tiny_model: Path, tmp_path: Path
) -> None:
    """LoRA with alpha = r, read from its checkpoint and from its init."""
    folder = str(tmp_path / "run")
    config = config_of("lora", tiny_model, runs.folder, lora_alpha=R, output_dir=folder)
    run_ranks("methods", 1, runs=[config], zero_optimization={"stage": 2})
    adapter = read_adapter(str(checkpoint_path(tmp_path / "run", STEPS)))
    assert all(adapter.pair(layer).B.any() for layer in adapter.layers)
    init = read_init(adapter)
    assert init is not None
    assert not any(init.pair(layer).B.any() for layer in init.layers)


def test_an_offset_counts_in_evaluation(runs: Runs, tiny_model: Path) -> None:
    """A checkpoint of lora-ga, whose offset is still apart, evaluated as the run did itself."""
    run = runs["lora-ga"]
    given = {"model": str(tiny_model), "dtype": "fp32", "ds_config": "ds_configs/zero2.json"}
    prepared = prepare_model(load_run_config(given), str(checkpoint_path(run, STEPS)))
    with torch.no_grad():
        loss = own_loss(start_model(prepared), held_out(runs.folder, tiny_model)).item()
    assert loss == pytest.approx(losses(run)["trained"], rel=1e-5)


@pytest.fixture(scope="module")
def four_bit(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four-bit")
    write_jsonl(folder / "rows.jsonl", word_rows(24))
    write_jsonl(folder / "held-out.jsonl", word_rows(30)[24:])
    options = {"load_in_4bit": True, "dtype": "bf16"}
    run_ranks(
        "methods",
        2,
        runs=[config_of(name, tiny_model, folder, **options) for name in METHODS],
        zero_optimization={"stage": 3, **REALLY_SHARDED},
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_on_a_4_bit_base(method: str, four_bit: Path, tiny_model: Path) -> None:
    """Sharded 4 bits; PEFT on weights that bitsandbytes has rounded to 4 bits gives that loss."""
    found = losses(four_bit / method)
    batch = held_out(four_bit, tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    for name in linear_layers(base):
        weight = base.get_submodule(name).weight
        packed = quantize_4bit(weight.data, quant_type="nf4", compress_statistics=True)
        weight.data = dequantize_4bit(*packed)
    with torch.no_grad():
        tuned = PeftModel.from_pretrained(base, four_bit / method / "adapter").eval()
        loss = own_loss(tuned, batch).item()
    # bf16 keeps 8 bits: of a loss near ln 49152 a few thousandths.
    assert loss == pytest.approx(found["trained"], abs=5e-3)
    assert math.isfinite(found["trained"])
    assert abs(found["trained"] - found["base"]) > 1e-3

"""What is trained by every optimizer, sharded or not, against torch's own on whole matrices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.data.batch import collate
from lorasb_ds.data.dataset import tokenize_rows
from lorasb_ds.data.sampler import epoch_order
from lorasb_ds.data.sources import load_rows
from lorasb_ds.models.base import Base
from lorasb_ds.models.linear_layers import linear_layers
from tests.dist.test_initialize import initialized
from tests.dist.test_initialize import setting as init_setting
from tests.dist.test_loop import GLOBAL_BATCH, ROWS, config_of
from tests.dist.test_training import put_plain
from tests.references import own_loss, true_gradients
from tests.runs import run_ranks

STEPS = 4
OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "sgd": lambda p, **rates: torch.optim.SGD(p, momentum=0.9, **rates),
    "lion": bitsandbytes.optim.Lion,
    "adafactor": lambda p, **rates: torch.optim.Adafactor(p, eps=(1e-15, 1e-3), **rates),
    "muon": torch.optim.Muon,
}
# Of a good size each: R moves by several percent in 4 steps.
RATES = {"adamw": 1e-2, "sgd": 0.3, "lion": 1e-2, "adafactor": 0.1, "muon": 2e-2}


def setting(model: Path, folder: Path, optimizer: str, stage: int, **more: Any) -> dict[str, Any]:
    return config_of(
        model,
        folder,
        optimizer=optimizer,
        lr=RATES[optimizer],
        weight_decay=0.1,
        ds_config=f"ds_configs/zero{stage}.json",
        target_modules="q_proj,down_proj",
        **more,
    )


def stretch(folder: Path, config: dict[str, Any], ranks: int, **more: Any) -> dict[str, Any]:
    out = folder / f"{len(list(folder.iterdir()))}.safetensors"
    given: dict[str, Any] = {"first": 0, "last": STEPS, "state": None} | more
    run_ranks("stretch", ranks, config=config, out=str(out), **given)
    return {"path": str(out), **load_file(out)}


def reference(config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What is trained of an unsharded fp32 model, at first and after ``STEPS``; with losses."""
    run = load_run_config(config)
    model = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    trains_r = run.method == "lora-sb"
    factors = {}
    for name, (out_features, in_features) in linear_layers(model).items():
        if name.endswith(("q_proj", "down_proj")):
            pair = normal(4, in_features), normal(out_features, 4)
            factors[name] = (*pair, normal(4, 4) if trains_r else torch.eye(4))
    trained = {}
    for name, layer in zip(factors, put_plain(model, factors), strict=True):
        if trains_r:
            trained[f"{name}.lora_R"] = layer.R
        else:
            layer.R.requires_grad_(False)
            layer.A, layer.B = nn.Parameter(layer.A), nn.Parameter(layer.B)
            trained |= {f"{name}.lora_A": layer.A, f"{name}.lora_B": layer.B}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    parameters = list(trained.values())
    optimizer = OPTIMIZERS[run.optimizer](parameters, lr=run.lr, weight_decay=run.weight_decay)
    tokenizer = Base(config["model"]).tokenizer
    examples = tokenize_rows(load_rows(config["data"]), tokenizer, run).examples
    batches = [
        [examples[i] for i in epoch_order(ROWS, run.seed, epoch)[first : first + GLOBAL_BATCH]]
        for epoch in range(2)
        for first in range(0, ROWS, GLOBAL_BATCH)
    ]
    losses = []
    for rows in batches[:STEPS]:
        loss = own_loss(model, collate(rows, tokenizer.pad_token_id))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, run.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found = {name: parameter.detach() for name, parameter in trained.items()}
    return start, found | {"losses": torch.tensor(losses)}


def assert_the_same_steps(
    found: dict[str, Any], expected: dict[str, torch.Tensor], config: dict[str, Any]
) -> None:
    """Within rounding, of which Muon has more: its Newton-Schulz steps are in bf16, where the last
    bit of a gradient may decide a rounding. In Lion's step it may decide a sign, where a gradient
    is nearly 0. A run in bf16 rounds all that there is.
    """
    bound = {"muon": 2e-3, "lion": 0.02}.get(config["optimizer"], 1e-5)
    if config["dtype"] == "bf16":
        bound = 0.03
    for name, value in expected.items():
        error = torch.linalg.norm(found[name] - value) / torch.linalg.norm(value)
        assert error < bound, f"{name}: {error}"


@pytest.mark.parametrize(
    ("optimizer", "stage", "ranks", "method"),
    [
        ("adafactor", 3, 3, "lora"),
        pytest.param("adafactor", 2, 2, "lora-sb", marks=pytest.mark.slow),
        ("muon", 3, 2, "lora-sb"),
        pytest.param("muon", 1, 2, "lora, bf16", marks=pytest.mark.slow),
        ("lion", 3, 2, "lora-sb"),
    ],
)
def test_the_same_steps_as_on_whole_matrices(
    tiny_model: Path, tmp_path: Path, optimizer: str, stage: int, ranks: int, method: str
) -> None:
    """R, or A and B; stage 1 in bf16 with two micro-batches is another optimizer of DeepSpeed's."""
    more: dict[str, Any] = {}
    if method != "lora-sb":
        more = {"method": "lora", "lora_alpha": 4.0}
    if method.endswith("bf16"):
        more |= {"dtype": "bf16"}
    config = setting(tiny_model, tmp_path, optimizer, stage, **more)
    found = stretch(tmp_path, config, ranks)
    start, expected = reference(config)
    assert_the_same_steps(found, expected, config)
    for name in start:
        moved = torch.linalg.norm(expected[name] - start[name]) / torch.linalg.norm(start[name])
        assert moved > 0.02, f"{name}: {moved}"


@pytest.mark.parametrize(
    ("optimizer", "stage"),
    [pytest.param("adafactor", 3, marks=pytest.mark.slow), ("muon", 2)],
)
def test_a_state_that_is_put_back(
    tiny_model: Path, tmp_path: Path, optimizer: str, stage: int
) -> None:
    """On as many ranks to the bit; on another number to rounding."""
    config = setting(tiny_model, tmp_path, optimizer, stage)
    through = stretch(tmp_path, config, 2)
    half = stretch(tmp_path, config, 2, last=2)
    again = stretch(tmp_path, config, 2, first=2, state=half["path"])
    for name, value in through.items():
        if torch.is_tensor(value) and name != "losses":
            assert torch.equal(again[name], value), name
    assert torch.equal(again["losses"], through["losses"][2:])
    alone = stretch(tmp_path, config, 1, first=2, state=half["path"])
    assert_the_same_steps(alone, {k: v for k, v in again.items() if torch.is_tensor(v)}, config)
    keys = {name.rpartition(".")[2] for name in through if ".lora_R." in name}
    assert keys == {"adafactor": {"row_var", "col_var"}, "muon": {"momentum_buffer"}}[optimizer]


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_the_init_takes_the_optimizer_s_first_step(
    tiny_model: Path, tmp_path: Path, tokenizer: Any, optimizer: str
) -> None:
    """On 2 ZeRO-3 ranks: B R A is the best rank-r part of what torch's Adafactor would do to W0; of
    Muon's step, in which all directions are equal, the part along the gradient's largest ones.
    """
    eta, r = 3e-2, 8
    config = init_setting(tiny_model, tmp_path, r=r, init_lr=eta, optimizer=optimizer)
    live, _, report = initialized(config, tmp_path, 2)
    assert report["update"] == optimizer
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    examples = tokenize_rows(load_rows(config["data"]), tokenizer, load_run_config(config)).examples
    gradients = true_gradients(model, collate(examples, tokenizer.pad_token_id))
    for name in linear_layers(model):
        W, G = model.get_submodule(name).weight, gradients[name]
        if optimizer == "adafactor":
            before = W.detach().clone()
            OPTIMIZERS["adafactor"]([W], lr=eta, weight_decay=0.0).step()
            U, S, Vh = torch.linalg.svd(W.detach() - before, full_matrices=False)
        else:  # torch's is in bf16 (test_update_rules.py): here what it converges to
            U, S, Vh = torch.linalg.svd(-G, full_matrices=False)
            S = torch.full_like(S, eta * math.sqrt(max(1.0, len(G) / G.shape[1])))
        expected = (U[:, :r] * S[:r]) @ Vh[:r]
        A, B, R = (live[f"{name}.{factor}"] for factor in "ABR")
        error = torch.linalg.norm(B @ R @ A - expected) / torch.linalg.norm(expected)
        assert error < 1e-3, f"{name}: {error}"  # of gradients in fp32, and of directions close by

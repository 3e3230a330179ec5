"""Every row of the table against its paper's formula, by dense matrices, and against PEFT."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from lorasb_ds.adapters.inject import layer_class_of
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.adapters.lora_sb import LoraSBLinear
from lorasb_ds.config.methods import DEFAULT_ALPHA, METHODS
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.distributed import zero
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.decomposition import decompose
from lorasb_ds.init.factors import (
    InitSettings,
    fill_layer,
    gather_directions,
    random_directions,
    weight_rows,
)
from lorasb_ds.init.sharded_svd import truncated_svd

pytestmark = pytest.mark.usefixtures("one_process")

OUT, IN, R = 20, 14, 4
BASES = {"weight", "gradient", "sign", "random"}


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill parameters only: without an engine there are no fp32 masters."""
    monkeypatch.setattr(zero, "fill_trainable", lambda param, value: param.data.copy_(value))


def matrix(seed: int, out: int = OUT, in_: int = IN) -> torch.Tensor:
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed))


def filled(
    method: str, W: torch.Tensor, G: torch.Tensor, r: int = R, **options: Any
) -> AdapterLinear:
    """Return a layer around W0, filled by a method whose gradient is G."""
    config = RunConfig(method=method, r=r, **options)
    settings = InitSettings.from_config(config)
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data = W.clone()
    linear.requires_grad_(False)
    layer = layer_class_of(config)(linear, r, torch.float32)
    k = r * settings.method.directions
    if settings.method.needs_gradient:
        transposed = G.shape[1] > G.shape[0]
        ((svd, _),) = decompose({"layer": G.T if transposed else G}, k, settings.update).values()
        directions = gather_directions(layer, svd, None)
    elif settings.method.matrix == "weight":
        directions = gather_directions(layer, truncated_svd(weight_rows(layer), k), None)
    else:
        directions = random_directions("layer", layer, settings)
    fill_layer("layer", layer, directions, settings)
    return layer


def update(layer: AdapterLinear) -> torch.Tensor:
    """Return ΔW as the model computes it."""
    with torch.no_grad():
        return (
            layer(torch.eye(layer.in_features)) - layer.base_layer(torch.eye(layer.in_features))
        ).T


def best(M: torch.Tensor, r: int) -> torch.Tensor:
    """Return the best rank-r approximation by numpy (Eckart and Young)."""
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    return ((U[:, :r] * S[:r]) @ Vh[:r]).float()


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Compare to fp32's rounding through an SVD, relative to the largest entry."""
    atol = tolerance * max(1e-6, wanted.abs().max().item())
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
@pytest.mark.parametrize("method", METHODS)
def test_where_training_starts(method: str, shape: tuple[int, int]) -> None:
    W, G = matrix(0, *shape), matrix(1, *shape)
    layer = filled(method, W, G)
    found, row = update(layer), METHODS[method]
    if method == "lora-one":
        # One step of gradient descent, cut to rank r: s/gamma of -G_r / S_1.
        first = torch.linalg.matrix_norm(G, 2)
        close(found, -DEFAULT_ALPHA / math.sqrt(R) / 128 * best(G, R) / first)
    elif method == "lora-xs":
        # s B R A with B A = the best of W0: as small as R is.
        assert 0 < found.abs().max() < 1e-3 * best(W, R).abs().max()
    else:
        # R of LoRA-SB's step is filled afterwards; of all others the model is its base.
        assert found.abs().max() <= 1e-6 * W.abs().max()
    assert row.paper.startswith("arXiv")
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(row.trained)


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
def test_xs_is_the_weight_s_svd(shape: tuple[int, int]) -> None:
    W = matrix(0, *shape)
    layer = filled("lora-xs", W, W, r=R)
    close(layer.lora_B @ layer.lora_A, best(W, R))
    close(layer.lora_A @ layer.lora_A.T, torch.eye(R))
    spread = torch.cat(
        [filled("lora-xs", W, W, r=12, seed=s).factor("lora_R").flatten() for s in range(9)]
    )
    assert spread.std().item() == pytest.approx(1e-5, rel=0.1)  # 1296 numbers: 2 % of it
    assert abs(spread.mean().item()) < 1e-6


@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("sb-")])
def test_the_bases_of_the_ablations(method: str) -> None:
    W, G = matrix(0), matrix(1)
    layer = filled(method, W, G)
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    close(A @ A.T, torch.eye(R))
    close(B.T @ B, torch.eye(R))
    assert not layer.factor("lora_R").any()
    source = {"weight": W, "gradient": G, "sign": G.sign()}.get(method.split("-")[1])
    if source is None:
        assert (B @ B.T - filled(method, W, G, seed=1).lora_B @ B.T).abs().max() > 0.01
        return
    exact = torch.linalg.svd(source)
    close(B @ B.T, exact.U[:, :R] @ exact.U[:, :R].T, 1e-3)
    close(A.T @ A, exact.Vh[:R].T @ exact.Vh[:R], 1e-3)


def peft_layer(W: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    """Return PEFT's layer around W0, and its model."""
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
    model[0].weight.data = W.clone()
    config = LoraConfig(target_modules=["0"], r=R, lora_alpha=DEFAULT_ALPHA, **options)
    if options.get("init_lora_weights") == "lora_ga":

        def train_step() -> None:
            G = matrix(1, *W.shape)
            (model(torch.eye(W.shape[1])).T * G).sum().backward()  # its gradient is G

        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # its hook expects another model below
            preprocess_loraga(model, config, train_step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, config)
    return tuned.base_model.model[0], tuned


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
def test_pissa_is_peft_s(shape: tuple[int, int]) -> None:
    W = matrix(0, *shape)
    ours = filled("pissa", W, W)
    theirs, _ = peft_layer(W, init_lora_weights="pissa")
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    close(ours.lora_A.T @ ours.lora_A, A.T @ A, 1e-4)  # signs of singular vectors are free
    close(ours.lora_B @ ours.lora_B.T, B @ B.T, 1e-4)
    close(ours.lora_B @ ours.lora_A, B @ A, 1e-4)
    # They take it out of W0; ours subtracts it, and leaves W0 as it is.
    close(
        W - theirs.base_layer.weight,
        DEFAULT_ALPHA / R * ours.factor("offset_B") @ ours.factor("offset_A"),
        1e-4,
    )
    assert torch.equal(ours.base_layer.weight, W)


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
def test_lora_ga_is_peft_s(shape: tuple[int, int]) -> None:
    W, G = matrix(0, *shape), matrix(1, *shape)
    ours = filled("lora-ga", W, G)
    ga = LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16)
    theirs, _ = peft_layer(W, init_lora_weights="lora_ga", lora_ga_config=ga, use_rslora=True)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    # The same directions. Theirs are of a randomized SVD with 4 r >= all directions here: exact but
    # for rounding. Sizes are not compared: PEFT 0.21.2 leaves A's alone and gives B the singular
    # values, where the paper scales both alike and takes none.
    for mine, their in ((ours.lora_A, A), (ours.lora_B.T, B.T)):
        cosines = torch.cosine_similarity(mine.detach(), their.detach())
        close(cosines.abs(), torch.ones(R), 1e-4)
    # And the paper's "ArB2r" by hand: A of directions 1..r, B of r+1..2r.
    exact = torch.linalg.svd(G)
    size = math.sqrt(shape[0]) / 16
    close(ours.lora_A.T @ ours.lora_A, size * exact.Vh[:R].T @ exact.Vh[:R], 1e-3)
    of_B = exact.U[:, R : 2 * R] @ exact.U[:, R : 2 * R].T
    close(ours.lora_B @ ours.lora_B.T, size * of_B, 1e-3)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_lora_is_peft_s(method: str) -> None:
    W = matrix(0)
    theirs, _ = peft_layer(W, use_rslora=method == "rslora")
    layer = filled(method, W, W)
    assert not layer.lora_B.any()
    # PEFT's Kaiming numbers: uniform up to 1/√in, so of variance 1/(3 in).
    ours = torch.stack([filled(method, W, W, seed=s).lora_A.detach() for s in range(99)])
    assert 0.98 < ours.abs().max().item() * math.sqrt(IN) <= 1
    assert ours.var().item() == pytest.approx(1 / (3 * IN), rel=0.05)  # 5544 numbers
    assert theirs.lora_A["default"].weight.abs().max().item() * math.sqrt(IN) <= 1
    # With the same factors, the same output.
    layer.lora_A.data, layer.lora_B.data = matrix(2, R, IN), matrix(3, OUT, R)
    theirs.lora_A["default"].weight.data = layer.lora_A.data
    theirs.lora_B["default"].weight.data = layer.lora_B.data
    x = matrix(4, 7, IN)
    close(layer(x).detach(), theirs(x).detach(), 1e-6)


def test_lora_one_s_factors_are_balanced() -> None:
    G = matrix(1)
    layer = filled("lora-one", G, G, gamma=10.0, lora_alpha=6.0)
    S = torch.linalg.svdvals(G)[:R]
    close(layer.lora_A @ layer.lora_A.T, torch.diag(S / S[0] / 10), 1e-4)
    close(layer.lora_B.T @ layer.lora_B, torch.diag(S / S[0] / 10), 1e-4)
    close(update(layer), -6 / math.sqrt(R) / 10 / S[0] * best(G, R), 1e-4)
    nothing = filled("lora-one", G, torch.zeros_like(G))
    assert not nothing.lora_B.any()
    assert nothing.lora_A.any(), "both 0 would stay 0"


def test_seeds_and_layers_differ_and_repeat() -> None:
    W = matrix(0)
    first, again, other = (filled("lora", W, W, seed=s).lora_A for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.01
    layer, settings = filled("lora", W, W), InitSettings.from_config(RunConfig(method="lora", r=R))
    before = torch.get_rng_state()
    fill_layer("layer", layer, random_directions("layer", layer, settings), settings)
    assert torch.equal(torch.get_rng_state(), before), "global generators are left alone"


@given(
    r=st.integers(1, 8),
    alpha=st.floats(0.1, 100),
    method=st.sampled_from(
        ["lora", "rslora", "lora-one", "lora-ga", "pissa", "lora-xs", "lora-sb"]
    ),
)
@settings(deadline=None, max_examples=30)
def test_scalings(r: int, alpha: float, method: str) -> None:
    found = METHODS[method].scale(r, alpha)
    power = {"lora": 1, "pissa": 1, "lora-xs": None, "lora-sb": None}.get(method, 0.5)
    assert found == pytest.approx(1.0 if power is None else alpha / r**power)


def test_lora_sb_s_row_is_the_paper_s() -> None:
    config = RunConfig()
    assert (config.method, config.update_rule) == ("lora-sb", "sign")
    layer = layer_class_of(config)(torch.nn.Linear(3, 4), 2, torch.float32)
    assert type(layer) is LoraSBLinear
    assert InitSettings.from_config(config).scaling == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"method": "lora-xt"}, "--method 'lora-xt' is not allowed"),
    "gamma": ({"method": "lora-one", "gamma": 0.0}, "--gamma 0.0 is not allowed"),
    "negative gamma": ({"method": "lora-ga", "gamma": -1.0}, "--gamma -1.0 is not allowed"),
    "lambda": ({"method": "lora-one", "precondition": 0.0}, "--precondition 0.0 is not allowed"),
    "alpha": ({"lora_alpha": 16.0}, "--lora-alpha means nothing to --method lora-sb"),
    "no gamma": ({"method": "pissa", "gamma": 2.0}, "--gamma means nothing to --method pissa"),
    "no lambda": ({"method": "lora-xs", "precondition": 1e-3}, "--precondition means nothing"),
    "no step": ({"method": "lora", "init_lr": 1e-3}, "--init-lr means nothing to --method lora"),
    "no gradient": ({"method": "lora", "init_data": "x.jsonl"}, "--init-data means nothing"),
    "no memory": ({"method": "pissa", "init_memory_gib": 1.0}, "--init-memory-gib means nothing"),
    "no update": ({"method": "sb-sign", "init_update": "raw"}, "--init-update means nothing"),
}


@pytest.mark.parametrize("given", REFUSED)
def test_rejected_options(given: str) -> None:
    options, message = REFUSED[given]
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_run_config(options)


def test_a_replay_with_another_method(tmp_path: Path) -> None:
    """Options of the replayed run's method are not taken over."""
    options = {"method": "lora-one", "lr": 7e-4, "precondition": 0.1, "gamma": 3.0}
    config = load_run_config(options)
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"config": config.model_dump(mode="json")}))
    same = load_run_config({}, str(file))
    assert (same.method, same.lr, same.precondition) == ("lora-one", 7e-4, 0.1)
    other = load_run_config({"method": "lora-ga"}, str(file))
    assert (other.lr, other.precondition, other.gamma) == (2e-4, None, None)
    assert load_run_config({"method": "lora-sb", "r": 50}, str(file)).lr == 2e-3


def test_each_method_s_learning_rate() -> None:
    assert load_run_config({"method": "lora"}).lr == 2e-4
    assert [load_run_config({"r": r}).lr for r in (50, 64, 96)] == [2e-3, 1.56e-3, 1.04e-3]
    assert load_run_config({"method": "lora-xs", "r": 30}).lr == 1e-3
    assert load_run_config({"method": "lora", "lr": 1e-3}).lr == 1e-3


@pytest.mark.parametrize(("lr", "at_half"), [(None, 2e-3), (7e-4, 7e-4)])
def test_a_replay_at_another_r(lr: float | None, at_half: float, tmp_path: Path) -> None:
    """A learning rate that nobody chose is that of the new r."""
    config = load_run_config({"r": 100, "lr": lr})
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"config": config.model_dump(mode="json")}))
    assert load_run_config({}, str(file)).lr == config.lr
    assert load_run_config({"r": 50}, str(file)).lr == at_half


@pytest.mark.parametrize("make", [lambda: filled("lora-ga", matrix(0), matrix(1), r=R)])
def test_plain_lora_of_an_offset_has_twice_the_rank(make: Callable[[], AdapterLinear]) -> None:
    layer = make()
    values = {n: layer.factor(n).detach() for n in layer.trained + layer.frozen}
    pair = layer.plain_lora(values | {"lora_A": values["lora_A"] + 1})
    assert len(pair.A) == 2 * R
    layer.lora_A.data += 1
    close(update(layer), pair.B @ pair.A, 1e-4)

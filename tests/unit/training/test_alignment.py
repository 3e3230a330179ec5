"""What an adapter can follow of a gradient, against dense projections; and what is kept of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, LlamaConfig

from lorasb_ds.adapters.inject import inject
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.adapters.lora import LoraLinear
from lorasb_ds.adapters.lora_sb import LoraSBLinear
from lorasb_ds.adapters.low_rank import LoraPair
from lorasb_ds.config.run_layout import ALIGNMENT
from lorasb_ds.init.gradients import average_gradients
from lorasb_ds.models.linear_layers import linear_layers
from lorasb_ds.runs.history import read_rows
from lorasb_ds.runs.plots import describe_alignment, draw_alignment, mean_alignment
from lorasb_ds.runs.run_log import RunLog
from lorasb_ds.training.alignment import difference, measure_layer, orthonormal_basis
from tests.references import true_gradients
from tests.unit.init.test_gradients import batch_of

LONG, SHORT, R = 9, 6, 2
FIELDS = ("gradient_cosine", "sign_cosine", "update_cosine", "gradient_norm")
NOTHING = LoraPair(torch.zeros(1, SHORT), torch.zeros(LONG, 1))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def best_cosine(G: np.ndarray, directions: list[np.ndarray]) -> float:
    """Of G and the nearest sum of some directions, by least squares."""
    basis = np.stack([d.ravel() for d in directions], 1)
    weights = np.linalg.lstsq(basis, G.ravel(), rcond=None)[0]
    nearest = basis @ weights
    return float(np.linalg.norm(nearest) / np.linalg.norm(G))


def moves(A: np.ndarray, B: np.ndarray, trains_r: bool) -> list[np.ndarray]:
    """The change of W for each number that is trained, one at a time."""
    if trains_r:
        return [np.outer(B[:, i], A[j]) for i in range(B.shape[1]) for j in range(len(A))]
    of_B = [np.outer(e, A[j]) for e in np.eye(len(B)) for j in range(len(A))]
    of_A = [np.outer(B[:, i], e) for e in np.eye(A.shape[1]) for i in range(B.shape[1])]
    return of_B + of_A


@pytest.mark.parametrize("trains_r", [True, False])
@pytest.mark.parametrize("B", ["any", "orthonormal", "deficient", "zero"])
def test_projection_is_onto_all_that_can_be_trained(trains_r: bool, B: str) -> None:
    """Of a gradient and of its sign, whatever B is: LoRA starts with zeros."""
    torch.manual_seed(1)
    G, pair = torch.randn(LONG, SHORT), LoraPair(torch.randn(R, SHORT), torch.randn(LONG, R))
    if B == "orthonormal":
        pair = LoraPair(pair.A, torch.linalg.qr(pair.B)[0])
    elif B == "deficient":
        pair = LoraPair(pair.A, pair.B[:, :1] @ torch.tensor([[1.0, -4.0]]))
    elif B == "zero":
        pair = LoraPair(pair.A, torch.zeros(LONG, R))
    found = measure_layer(G, pair, NOTHING, trains_r)
    directions = moves(pair.A.double().numpy(), pair.B.double().numpy(), trains_r)
    for M, value in ((G, found.gradient_cosine), (G.sign(), found.sign_cosine)):
        assert value == pytest.approx(best_cosine(M.double().numpy(), directions), abs=1e-6)
    assert (found.gradient_cosine == 0) == (trains_r and B == "zero")
    assert found.gradient_norm == pytest.approx(np.linalg.norm(G.numpy()), rel=1e-6)
    assert math.isnan(found.update_cosine)


def test_a_gradient_within_reach_and_none_at_all() -> None:
    torch.manual_seed(2)
    pair = LoraPair(torch.randn(R, SHORT), torch.randn(LONG, R))
    within = pair.B @ torch.randn(R, R) @ pair.A
    assert measure_layer(within, pair, NOTHING, True).gradient_cosine == pytest.approx(1, abs=1e-6)
    along_A = torch.randn(LONG, R) @ pair.A
    assert measure_layer(along_A, pair, NOTHING, False).gradient_cosine == pytest.approx(
        1, abs=1e-6
    )
    assert measure_layer(along_A, pair, NOTHING, True).gradient_cosine < 0.9
    found = measure_layer(torch.zeros(LONG, SHORT), pair, pair, True)
    assert math.isnan(found.gradient_cosine)
    assert math.isnan(found.update_cosine)
    assert found.gradient_norm == 0


def test_orthonormal_basis() -> None:
    torch.manual_seed(3)
    M = torch.randn(8, 2) @ torch.randn(2, 4)
    Q = orthonormal_basis(M)
    assert Q.shape == (8, 2)
    torch.testing.assert_close(Q.T @ Q, torch.eye(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(Q @ (Q.T @ M), M, atol=1e-5, rtol=0)
    assert orthonormal_basis(torch.zeros(8, 4)).shape == (8, 0)


def test_a_small_step_between_large_factors_keeps_its_digits() -> None:
    """Products of fp32 factors would leave 1e-7 of 100 for a step of 1e-4."""
    torch.manual_seed(4)
    before = LoraPair(10 * torch.randn(R, SHORT), 10 * torch.randn(LONG, R))
    now = LoraPair(before.A + 1e-5 * torch.randn(R, SHORT), before.B + 1e-5 * torch.randn(LONG, R))
    exact = now.B.double() @ now.A.double() - before.B.double() @ before.A.double()
    step = difference(now, before)
    error = (step.B @ step.A - exact).norm() / exact.norm()
    assert error < 1e-5
    naive = (now.B @ now.A - before.B @ before.A - exact).norm() / exact.norm()
    assert naive > 1e-3
    assert len(difference(LoraPair(before.A, now.B), before).A) == R, "A has not moved"
    assert not difference(now, now).B.any()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", [LoraSBLinear, LoraLinear])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_is_that_of_the_weights_as_they_are(
    kind: type[AdapterLinear], checkpointing: bool
) -> None:
    """Branches on, some layers at a time; nothing that is trained hears of it."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        attention_dropout=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        merged, batch = copy.deepcopy(model).eval(), batch_of()
        adapters: dict[str, AdapterLinear] = inject(
            model, linear_layers(model), R, torch.float32, kind
        )
        for name, adapter in adapters.items():
            keys = (*adapter.trained, *adapter.frozen)
            for key in keys:
                adapter.factor(key).data.normal_(std=0.3)
            pair = adapter.plain_lora({key: adapter.factor(key).data for key in keys})
            merged.get_submodule(name).weight.data += pair.B @ pair.A
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [adapter.factor(key) for adapter in adapters.values() for key in adapter.trained]
    kept = [torch.full_like(factor, 7.0) for factor in trained]
    for factor, value in zip(trained, kept, strict=True):
        factor.grad = value.clone()  # of a micro-batch before
    expected = true_gradients(merged, batch)
    for names in (list(adapters)[:3], list(adapters)[3:]):
        found = average_gradients(
            model,
            adapters,
            [batch],
            batch.num_label_tokens,
            layers=dict.fromkeys(names),
            with_adapters=True,
        )
        assert found.loss == pytest.approx(expected["loss"].item(), abs=1e-5)
        for name in names:
            G = (
                expected[name]
                if len(expected[name]) >= expected[name].shape[1]
                else expected[name].T
            )
            # The loss is of order 1; fp32 rounds at 1e-7 of that, in another order of sums.
            torch.testing.assert_close(found.shards[name], G, atol=1e-6, rtol=1e-4)
    assert all(factor.requires_grad for factor in trained)
    assert all(torch.equal(factor.grad, value) for factor, value in zip(trained, kept, strict=True))
    assert model.training
    assert config.attention_dropout == model.config.attention_dropout == 0.5


def rows_of(step: int, **values: float) -> list[dict[str, Any]]:
    """Two layers, the second with twice the numbers of the first."""
    nothing = dict.fromkeys(FIELDS, math.nan)
    return [
        {"step": step, "layer": f"model.layers.{i}.q_proj"}
        | nothing
        | {key: (i + 1) * value for key, value in values.items()}
        for i in range(2)
    ]


def test_the_line_that_is_told() -> None:
    start = rows_of(0, gradient_cosine=0.3)
    assert describe_alignment(start) == "step 0: the adapter holds 45% of the gradient"
    filled = rows_of(0, gradient_cosine=0.3, update_cosine=0.1)
    told = "step 0: the adapter holds 45% of the gradient, the init's cosine with -sign(G) is 0.15"
    assert describe_alignment(filled) == told
    assert describe_alignment(filled + rows_of(20, gradient_cosine=0.2, update_cosine=-0.1)) == (
        "step 20: the adapter holds 30% of the gradient (step 0: 45%), the step's cosine with "
        "-sign(G) is -0.15"
    )
    half = rows_of(5, gradient_cosine=0.2)
    half[0]["gradient_cosine"] = math.nan  # a layer without a gradient
    assert mean_alignment(half, "gradient_cosine") == {5: 0.4}
    assert math.isnan(mean_alignment(half, "update_cosine")[5])


def test_rows_of_a_resumed_run(tmp_path: Path) -> None:
    """Later ones are forgotten, and those of step 0 where the run begins there once more."""
    log = RunLog(tmp_path)
    for step in (0, 2, 4):
        log.write_alignment(rows_of(step, gradient_cosine=0.25))
    written = [json.loads(line) for line in (tmp_path / ALIGNMENT).read_text().splitlines()]
    assert [(row["step"], row["gradient_cosine"]) for row in written] == [
        (step, value) for step in (0, 2, 4) for value in (0.25, 0.5)
    ]
    assert written[0]["update_cosine"] is None
    log.close()
    for first_step, kept in ((3, [0, 0, 2, 2]), (2, [0, 0, 2, 2]), (0, [])):
        log = RunLog(tmp_path, first_step)
        assert [row["step"] for row in log.alignment] == kept
        assert [row["step"] for row in read_rows(tmp_path / ALIGNMENT)] == kept
        log.close()


@pytest.mark.parametrize("steps", [[0], [0, 2, 4], list(range(0, 100, 5))])
def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    """Layers of one kind are together; a step that has no number is left white."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: (saved.append(figure), save(figure, *a, **k))
    )
    names = [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("q_proj", "mlp.up_proj")]
    rows = [
        {"step": step, "layer": name, "gradient_norm": 1.0}
        | {"gradient_cosine": (i + 1) / 10, "sign_cosine": 0.5}
        | {"update_cosine": math.nan if step == 0 else -0.1}
        for step in steps
        for i, name in enumerate(names)
    ]
    path = tmp_path / "alignment.png"
    draw_alignment(path, rows)
    assert path.read_bytes().startswith(b"\x89PNG")
    held, _, update = saved[0].axes[:3]
    assert [label.get_text() for label in held.get_yticklabels()] == ["q_proj", "up_proj"]
    image = np.ma.filled(held.images[0].get_array(), np.nan)
    np.testing.assert_allclose(image[:, 0], [0.1, 0.3, 0.5, 0.2, 0.4, 0.6])
    assert image.shape == (6, len(steps))
    shown = np.ma.filled(update.images[0].get_array().astype(float), np.nan)
    assert np.isnan(shown[:, 0]).all()
    assert (shown[:, 1:] == -0.1).all()
    labels = [label.get_text() for label in update.get_xticklabels()]
    assert labels[:2] == [str(steps[0])] + (
        [str(steps[1 if len(steps) < 9 else 3])] if steps[1:] else []
    )
    assert len(labels) <= 8

"""Compare exported and combined adapters with dense updates, and load them by PEFT."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.workers.adapters import main
from lorasb_ds.adapters.peft_targets import misread_by_peft
from lorasb_ds.adapters.peft_writer import peft_target_modules, peft_tensors, save_peft_adapter
from lorasb_ds.config.paths import demo_model_dir
from lorasb_ds.config.run_layout import BASIS_FILE
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.adapter_reader import ADAPTER_WEIGHTS, read_adapter
from lorasb_ds.export.combine import combine_adapters
from lorasb_ds.export.inspection import LayerUpdate, draw_updates, inspect_adapter
from lorasb_ds.export.stored_adapter import StoredAdapter
from lorasb_ds.export.to_peft import EnergyKept, export_adapter, max_lora_rank, measure_energy
from lorasb_ds.models.base import Base
from lorasb_ds.models.linear_layers import linear_layers, select_targets
from tests.references import nf4_config
from tests.unit.export.test_adapter_reader import (
    LAYERS,
    edit_config,
    load,
    make_checkpoint,
    make_run,
    save_lora,
)

INPUT_IDS = torch.arange(3, 23).view(2, 10)


def deltas(adapter: StoredAdapter) -> dict[str, torch.Tensor]:
    """Map layer -> ΔW, fp64."""
    pairs = {name: adapter.pair(name) for name in adapter.layers}
    return {name: pair.B.double() @ pair.A.double() for name, pair in pairs.items()}


def best(W: torch.Tensor, r: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return ((found - expected).norm() <= tolerance * expected.norm()).item()


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Let PEFT write adapters: two with different ranks and scalings, one of other layers."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds: list[dict[str, Any]] = [
        {"lora_alpha": 10},
        {"r": 6, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
        {"target_modules": ["o_proj", "q_proj"], "layers_to_transform": [1]},
        {"r": 2, "target_modules": ["o_proj", "q_proj"]},
    ]
    base = load(tiny_model)
    for i, kind in enumerate(kinds):
        save_lora(base, folder / str(i), seed=i, **kind)
        base = load(tiny_model)
    return [folder / str(i) for i in range(len(kinds))]


def written(folder: Path, layers: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> StoredAdapter:
    """Write an adapter with the given factors A and B."""
    tensors = {k: t for name, (A, B) in layers.items() for k, t in peft_tensors(name, A, B).items()}
    r = max(len(A) for A, _ in layers.values())
    save_peft_adapter(folder, tensors, r=r, target_modules=list(layers), base_model="base")
    return read_adapter(str(folder))


def random_adapter(folder: Path, seed: int, r: int = 3, names: Sequence[str] = ("a", "b")) -> Any:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (12, 9), "b": (7, 11), "c": (5, 6)}
    return written(
        folder,
        {
            name: (
                torch.randn(r, shapes[name][1], generator=generator),
                torch.randn(shapes[name][0], r, generator=generator),
            )
            for name in names
        },
    )


# Export


@pytest.mark.parametrize("r", [1, 3, 4])
def test_a_cut_is_the_best_one(folders: list[Path], tmp_path: Path, r: int) -> None:
    adapter = read_adapter(str(folders[0]))
    size = export_adapter(adapter, tmp_path / "out", r=r)
    found = read_adapter(str(tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / ADAPTER_WEIGHTS)
    assert size == sum(tensor.nbytes for tensor in tensors.values())
    assert (found.r, found.peft_config["r"], found.peft_config["lora_alpha"]) == (r, r, r)
    assert found.layers.keys() == adapter.layers.keys()
    cut = deltas(found)
    for name, W in deltas(adapter).items():
        assert near(cut[name], best(W, r), 1e-6), name  # two factors in fp32


def test_a_whole_one_is_equal_to_the_bit(folders: list[Path], tmp_path: Path) -> None:
    for folder in folders:
        adapter = read_adapter(str(folder))
        export_adapter(adapter, tmp_path / folder.name)
        found = read_adapter(str(tmp_path / folder.name))
        assert found.base_path == adapter.base_path
        assert found.r == adapter.r
        for name in adapter.layers:
            A, B = adapter.pair(name)
            again, r = found.pair(name), len(A)
            assert torch.equal(again.A[:r], A)
            assert torch.equal(again.B[:, :r], B)
            assert not again.A[r:].any()
            assert not again.B[:, r:].any()


@pytest.mark.parametrize(("dtype", "digits"), [("bf16", 8), ("fp16", 11)])
def test_half_precision(folders: list[Path], tmp_path: Path, dtype: str, digits: int) -> None:
    adapter = read_adapter(str(folders[0]))
    export_adapter(adapter, tmp_path / "out", r=2, dtype=dtype)
    found = read_adapter(str(tmp_path / "out"))
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "out" / ADAPTER_WEIGHTS).values()}
    assert kinds == {{"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]}
    for name, W in deltas(adapter).items():
        # Both factors are rounded, by half a unit of so many binary digits.
        assert near(deltas(found)[name], best(W, 2), 2 * 2.0**-digits), name


def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    adapter = written(tmp_path / "a", {"q": (torch.ones(1, 3), torch.full((4, 1), 7e4))})
    export_adapter(adapter, tmp_path / "bf16", dtype="bf16")
    with pytest.raises(ConfigError, match="--dtype fp16: the factors of q exceed its range"):
        export_adapter(adapter, tmp_path / "fp16", dtype="fp16")
    assert not (tmp_path / "fp16").exists()
    largest = torch.finfo(torch.float32).max
    adapter = written(tmp_path / "c", {"q": (torch.ones(1, 3), torch.full((4, 1), largest))})
    with pytest.raises(ConfigError, match="exceed its range"):
        export_adapter(adapter, tmp_path / "rounded", dtype="bf16")  # the next one is infinite


@pytest.mark.parametrize("r", [0, -1, 5, 10**9])
def test_ranks_that_are_none(folders: list[Path], tmp_path: Path, r: int) -> None:
    adapter = read_adapter(str(folders[0]))
    with pytest.raises(ConfigError, match=rf"--r {r}: the adapter has rank 4; give 1 to 4"):
        export_adapter(adapter, tmp_path / "out", r=r)


def test_the_energy_of_every_rank(folders: list[Path]) -> None:
    adapter = read_adapter(str(folders[1]))
    kept, dense = measure_energy(adapter), deltas(adapter)
    assert len(kept.total) == len(kept.lowest) == adapter.r == 6
    whole = sum(W.norm().item() ** 2 for W in dense.values())
    for k in range(1, 7):
        shares = {name: (best(W, k).norm() / W.norm()).item() ** 2 for name, W in dense.items()}
        total = sum(shares[name] * W.norm().item() ** 2 for name, W in dense.items()) / whole
        assert kept.total[k - 1] == pytest.approx(total, rel=1e-12)  # fp64
        assert kept.lowest[k - 1] == pytest.approx(min(shares.values()), rel=1e-12)
    assert kept.lowest[0] < kept.total[0]


def test_the_energy_of_nothing(tmp_path: Path) -> None:
    nothing = written(tmp_path / "0", {"q": (torch.ones(3, 5), torch.zeros(4, 3))})
    assert measure_energy(nothing) == EnergyKept([1.0] * 3, [1.0] * 3)
    beside = written(
        tmp_path / "1",
        {"q": (torch.ones(2, 5), torch.zeros(4, 2)), "v": (torch.eye(2, 5), torch.eye(4, 2))},
    )
    kept = measure_energy(beside)
    assert kept.total == pytest.approx([0.5, 1.0])
    assert kept.lowest == pytest.approx([0.5, 1.0])


def test_the_smallest_rank_of_an_energy() -> None:
    kept = EnergyKept([0.5, 0.9, 0.95, 1.0], [0.1] * 4)
    wanted = {0.01: 1, 0.5: 1, 0.51: 2, 0.9: 2, 0.901: 3, 0.999: 4, 1.0: 4}
    assert {energy: kept.smallest_r(energy) for energy in wanted} == wanted
    assert EnergyKept([0.5, 1 - 1e-16], []).smallest_r(1.0) == 2


def test_the_rank_for_vllm() -> None:
    wanted = {1: 8, 8: 8, 9: 16, 64: 64, 65: 128, 257: 320, 321: 512, 512: 512, 513: None}
    assert {r: max_lora_rank(r) for r in wanted} == wanted


def test_a_checkpoint_is_exported(tmp_path: Path) -> None:
    basis = make_run(tmp_path / "run", model="demo")
    trained = make_checkpoint(tmp_path / "run", 3)
    export_adapter(read_adapter(str(tmp_path / "run")), tmp_path / "out")
    found = read_adapter(str(tmp_path / "out"))
    for name, R in trained.items():
        expected = basis[f"{name}.lora_B"] @ R @ basis[f"{name}.lora_A"]
        assert near(deltas(found)[name].float(), expected, 1e-6)  # fp32
    assert found.target_modules == list(LAYERS)


def test_peft_knows_no_demo(tmp_path: Path) -> None:
    make_run(tmp_path / "run", model="demo")
    make_checkpoint(tmp_path / "run", 3)
    export_adapter(read_adapter(str(tmp_path / "run")), tmp_path / "out")
    assert read_adapter(str(tmp_path / "out")).base_path == str(demo_model_dir())


# Combine


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, -2.0], [0.0, 1.0], [0.0, 0.0], [-1.0, 0.25]])
def test_sums_in_one_basis_keep_the_rank(tmp_path: Path, weights: list[float]) -> None:
    basis = make_run(tmp_path / "run")
    trained = [make_checkpoint(tmp_path / "run", step) for step in (1, 2)]
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    adapters = [read_adapter(str(path)) for path in checkpoints]
    found = combine_adapters(adapters, weights, tmp_path / "out")
    assert (found.r, found.one_basis) == (4, True)
    assert found.energy_kept == 1.0
    stored = read_adapter(str(tmp_path / "out"))
    assert stored.r == 4
    for name in LAYERS:
        R = sum(w * Rs[name].double() for w, Rs in zip(weights, trained, strict=True))
        A, B = (basis[f"{name}.lora_{leaf}"] for leaf in "AB")
        assert torch.equal(stored.pair(name).A, A)
        expected = B.double() @ R @ A.double()
        error = (deltas(stored)[name] - expected).norm()
        assert error <= 1e-6 * sum(Rs[name].norm() for Rs in trained)  # B R is fp32


@pytest.mark.parametrize("r", [None, 1, 5])
def test_sums_of_different_bases(folders: list[Path], tmp_path: Path, r: int | None) -> None:
    adapters = [read_adapter(str(folder)) for folder in folders[:3]]
    weights = [0.75, -1.5, 2.0]
    found = combine_adapters(adapters, weights, tmp_path / "out", r=r)
    assert not found.one_basis
    stored = read_adapter(str(tmp_path / "out"))
    assert stored.r == found.r == (r or 4 + 6 + 4), "q_proj of the last block is in all three"
    terms = [deltas(adapter) for adapter in adapters]
    names = {name for term in terms for name in term}
    assert stored.layers.keys() == names
    assert set(stored.target_modules) == names
    kept = whole = 0.0
    for name in names:
        W = sum(w * term[name] for w, term in zip(weights, terms, strict=True) if name in term)
        expected = best(W, found.r)
        assert near(deltas(stored)[name], expected, 2e-6), name  # w B and two factors in fp32
        kept += expected.norm().item() ** 2
        whole += W.norm().item() ** 2
    assert found.energy_kept == pytest.approx(kept / whole, rel=1e-6)  # w B in fp32


def test_no_rank_beyond_the_sides(tmp_path: Path) -> None:
    adapters = [random_adapter(tmp_path / str(i), i, r=5, names=("c",)) for i in range(3)]
    found = combine_adapters(adapters, [1, 1, 1], tmp_path / "out")
    assert found.r == 5, "of a matrix of 5 x 6, where 15 directions are stacked"
    W = sum(deltas(adapter)["c"] for adapter in adapters)
    assert near(deltas(read_adapter(str(tmp_path / "out")))["c"], W, 1e-6)  # fp32
    with pytest.raises(ConfigError, match="--r 6: the sum has rank 5 at most; give 1 to 5"):
        combine_adapters(adapters, [1, 1, 1], tmp_path / "other", r=6)


def test_layers_of_one_adapter_only(tmp_path: Path) -> None:
    one = random_adapter(tmp_path / "1", 1, names=("a",))
    other = random_adapter(tmp_path / "2", 2, names=("b",))
    combine_adapters([one, other], [2, -1], tmp_path / "out")
    found = deltas(read_adapter(str(tmp_path / "out")))
    assert found.keys() == {"a", "b"}
    assert near(found["a"], 2 * deltas(one)["a"], 1e-6)  # fp32
    assert near(found["b"], -deltas(other)["b"], 1e-6)


def test_sums_that_cannot_be(tmp_path: Path) -> None:
    one = random_adapter(tmp_path / "1", 1)
    taller = written(tmp_path / "2", {"b": (torch.ones(3, 11), torch.ones(8, 3))})
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"b has shape \(8, 11\), and \(7, 11\) in another"):
        combine_adapters([one, taller], [1, 1], out)
    for weights in ([1.0], [1.0, 1.0, 1.0], []):
        message = f"--weights has {len(weights)} numbers for 2 adapters"
        with pytest.raises(ConfigError, match=message):
            combine_adapters([one, one], weights, out)
    for weight in (math.nan, math.inf, -math.inf):
        with pytest.raises(ConfigError, match="--weights must be finite"):
            combine_adapters([one, one], [1.0, weight], out)
    with pytest.raises(ConfigError, match="--dtype fp16: the factors of a exceed its range"):
        combine_adapters([one, one], [1e5, 1e5], out, dtype="fp16")
    assert not out.exists()


def test_shapes_differ_where_the_first_has_no_layer(tmp_path: Path) -> None:
    one = random_adapter(tmp_path / "1", 1)
    other = random_adapter(tmp_path / "2", 2, names=("c",))
    taller = written(tmp_path / "3", {"c": (torch.ones(1, 6), torch.ones(6, 1))})
    with pytest.raises(ConfigError, match=r"c has shape \(6, 6\), and \(5, 6\) in"):
        combine_adapters([one, other, taller], [1, 1, 1], tmp_path / "out")


@pytest.mark.parametrize("same", [False, True])
def test_sums_beyond_fp32(tmp_path: Path, same: bool) -> None:
    one = random_adapter(tmp_path / "1", 1)
    other = one if same else random_adapter(tmp_path / "2", 2)
    with pytest.raises(ConfigError, match="exceed"):
        combine_adapters([one, other], [1e300, 1], tmp_path / "out")


# Inspect


def test_what_was_learned_is_what_dense_matrices_say(tmp_path: Path) -> None:
    basis = make_run(tmp_path / "run")
    trained = make_checkpoint(tmp_path / "run", 3)
    weights = {name: torch.randn(shape).bfloat16() for name, shape in LAYERS.items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = inspect_adapter(read_adapter(str(tmp_path / "run")), Base(str(tmp_path)).stored)
    assert list(found) == list(LAYERS)
    for name, layer in found.items():
        A, B, R = (basis[f"{name}.lora_{leaf}"].double() for leaf in "ABR")
        W, start = B @ trained[name].double() @ A, B @ R @ A
        S = torch.linalg.svdvals(W)[:4]
        shares = S / S.sum()
        assert (layer.r, layer.shape) == (4, LAYERS[name])
        # B R is rounded to fp32.
        assert layer.singular_values == pytest.approx(S.tolist(), rel=1e-6, abs=1e-6)
        assert layer.singular_values == pytest.approx(
            torch.linalg.svdvals(trained[name].double()).tolist(), abs=1e-6
        ), "of R alone: A and B are orthonormal"
        entropy = -(shares * shares.log()).sum()
        assert layer.effective_rank == pytest.approx(entropy.exp().item(), rel=1e-6)
        assert layer.norm == pytest.approx(W.norm().item(), rel=1e-6)
        whole = weights[name].double().norm().item()
        assert layer.relative_norm == pytest.approx(W.norm().item() / whole, rel=1e-6)
        share = (W - start).norm() / W.norm()
        assert layer.trained_share == pytest.approx(share.item(), rel=1e-6)
        assert layer.orthonormality_error < 1e-6  # QR in fp32


def test_a_small_step_from_the_init_is_seen(tmp_path: Path) -> None:
    """1e-5 of the update: a difference of norms would not see it."""
    basis = make_run(tmp_path / "run")
    make_checkpoint(tmp_path / "run", 3)
    state = tmp_path / "run" / "checkpoints" / "step-00000003"
    adapter = read_adapter(str(state))
    moved = {
        name: basis[f"{name}.lora_R"] + torch.full((4, 4), 1e-8) for name in LAYERS
    }  # the init has R of size 4e-3
    save_file({f"{n}.lora_R": R for n, R in moved.items()}, tmp_path / "r.safetensors")
    from lorasb_ds.models.checkpoint_files import read_header

    adapter = replace(
        adapter, stored={**adapter.stored, **read_header(tmp_path / "r.safetensors", "x")}
    )
    for name, layer in inspect_adapter(adapter).items():
        R, start = moved[name].double(), basis[f"{name}.lora_R"].double()
        expected = ((R - start).norm() / R.norm()).item()
        assert 5e-6 < expected < 5e-5
        # Rounding of B R and of B R_init to fp32, 6e-8 of the update each.
        assert layer.trained_share == pytest.approx(expected, abs=2e-7)


def test_a_basis_that_is_not_orthonormal(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    make_checkpoint(tmp_path / "run", 3)
    (first, second), path = LAYERS, tmp_path / "run" / BASIS_FILE
    tensors = load_file(path)
    tensors[f"{first}.lora_B"][:, 1] *= 1.5
    tensors[f"{second}.lora_A"][1] *= 2
    save_file(tensors, path)
    found = inspect_adapter(read_adapter(str(tmp_path / "run")))
    assert found[first].orthonormality_error == pytest.approx(1.25, abs=1e-5)  # fp32
    assert found[second].orthonormality_error == pytest.approx(3, abs=1e-5)


def test_a_plain_lora_has_no_init(folders: list[Path]) -> None:
    adapter = read_adapter(str(folders[0]))
    found = inspect_adapter(adapter)
    for name, W in deltas(adapter).items():
        assert found[name].trained_share is None
        assert found[name].relative_norm is None
        assert found[name].norm == pytest.approx(W.norm().item(), rel=1e-6)  # fp32
        assert found[name].orthonormality_error > 1e-3, "PEFT's A is Kaiming-uniform"


def test_a_broken_basis_beside_an_adapter(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run)
    make_checkpoint(run, 3)
    export_adapter(read_adapter(str(run)), run / "adapter")
    adapter = read_adapter(str(run))
    before = inspect_adapter(adapter)[next(iter(LAYERS))].trained_share
    assert before is not None
    assert before > 0.9
    tensors = load_file(run / BASIS_FILE)
    save_file({"other.lora_A": torch.ones(2, 2)}, run / BASIS_FILE)
    with pytest.raises(ConfigError, match="basis"):
        inspect_adapter(adapter)
    save_file(tensors, run / BASIS_FILE)
    (run / BASIS_FILE).write_bytes((run / BASIS_FILE).read_bytes()[:-9])
    with pytest.raises(ConfigError, match="basis"):
        inspect_adapter(adapter)


UPDATE = LayerUpdate(2, (4, 3), 0.0, (2.0, 1.0), 1.9, 2.2, None, None)
NAMES: dict[str, list[str]] = {
    "blocks": [f"model.layers.{i}.{m}" for i in range(3) for m in ("attn.q", "mlp.up")],
    "no numbers": ["embed", "model.proj_in", "model.proj_out"],
    "both": ["proj_in", "layers.0.q", "layers.11.q"],
    "experts": [f"layers.0.mlp.experts.{i}.up" for i in range(4)],
    "one": ["q"],
    "a long number": ["layers." + "9" * 5000 + ".q"],
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("known", [False, True])
def test_a_picture(tmp_path: Path, names: str, known: bool) -> None:
    update = replace(UPDATE, relative_norm=0.01, trained_share=0.5) if known else UPDATE
    layers = dict.fromkeys(NAMES[names], update)
    layers[NAMES[names][0]] = UPDATE  # of one the base was not found
    draw_updates(tmp_path / "out.png", layers)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_shows_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    shown: list[Any] = []
    show = Axes.imshow

    def keep(axes: Axes, grid: Any, **options: Any) -> Any:
        shown.append(grid.tolist())
        return show(axes, grid, **options)

    monkeypatch.setattr(Axes, "imshow", keep)
    names = ["layers.0.q", "layers.0.k", "layers.2.k", "layers.2.q"]
    layers = {name: replace(UPDATE, norm=float(i)) for i, name in enumerate(names)}
    draw_updates(tmp_path / "out.png", layers)
    assert shown[0] == [[0.0, 1.0], [3.0, 2.0]]
    assert shown[1] == [[1.9, 1.9], [1.9, 1.9]]
    assert len(shown) == 2


# The round trip through PEFT


def logits(model: Any, input_ids: torch.Tensor = INPUT_IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids).logits.float()


def with_updates(model: Any, updates: dict[str, torch.Tensor]) -> Any:
    for name, W in updates.items():
        weight = model.get_submodule(name).weight
        weight.data = (weight.double() + W).to(weight.dtype)
    return model


@pytest.mark.parametrize("r", [None, 2])
def test_peft_loads_what_is_exported(
    tiny_model: Path, folders: list[Path], tmp_path: Path, r: int | None
) -> None:
    for folder in (folders[0], folders[1], folders[3]):
        adapter, out = read_adapter(str(folder)), tmp_path / folder.name
        export_adapter(adapter, out, r=r)
        updates = {name: best(W, r or 99) for name, W in deltas(adapter).items()}
        expected = logits(with_updates(load(tiny_model), updates))
        peft = PeftModel.from_pretrained(load(tiny_model), out)
        found = logits(peft)
        assert (found - expected).abs().max() < 1e-5  # fp32, numbers of size 1
        assert (logits(load(tiny_model)) - expected).abs().max() > 1e-3
        merged = logits(peft.merge_and_unload())
        assert (merged - expected).abs().max() < 1e-5  # fp32


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, 2.0]])
def test_peft_adds_adapters_as_we_do(
    tiny_model: Path, folders: list[Path], tmp_path: Path, weights: list[float]
) -> None:
    """PEFT stacks the factors, too; where an adapter lacks a layer, it counts as 0 in both."""
    first, last = folders[0], folders[3]
    peft = PeftModel.from_pretrained(load(tiny_model), first, adapter_name="one")
    peft.load_adapter(last, adapter_name="two")
    peft.add_weighted_adapter(["one", "two"], weights, "both", combination_type="cat")
    peft.set_adapter("both")
    expected = logits(peft)
    adapters = [read_adapter(str(first)), read_adapter(str(last))]
    combine_adapters(adapters, weights, tmp_path / "out")
    found = logits(PeftModel.from_pretrained(load(tiny_model), tmp_path / "out"))
    assert (found - expected).abs().max() < 1e-5  # fp32, numbers of size 1
    assert (logits(load(tiny_model)) - expected).abs().max() > 1e-3


def test_two_exported_adapters_in_one_model(
    tiny_model: Path, folders: list[Path], tmp_path: Path
) -> None:
    adapters = [read_adapter(str(folder)) for folder in folders[:2]]
    for i, adapter in enumerate(adapters):
        export_adapter(adapter, tmp_path / str(i), r=2)
    peft = PeftModel.from_pretrained(load(tiny_model), tmp_path / "0", adapter_name="one")
    peft.load_adapter(tmp_path / "1", adapter_name="two")
    for name, adapter in zip(("one", "two"), adapters, strict=True):
        peft.set_adapter(name)
        updates = {layer: best(W, 2) for layer, W in deltas(adapter).items()}
        expected = logits(with_updates(load(tiny_model), updates))
        assert (logits(peft) - expected).abs().max() < 1e-5  # fp32, numbers of size 1


def test_on_a_base_in_bf16(tiny_model: Path, folders: list[Path], tmp_path: Path) -> None:
    adapter = read_adapter(str(folders[0]))
    export_adapter(adapter, tmp_path / "out")

    def base() -> Any:
        return load(tiny_model, dtype=torch.bfloat16)

    # The base's rounded weights, and all that follows in fp32.
    exact = logits(with_updates(base().float(), deltas(adapter)))
    plain = logits(base().float())
    found = logits(PeftModel.from_pretrained(base(), tmp_path / "out"))
    # bf16 has 8 binary digits: so much does the base alone lose without any adapter, up to chance.
    rounding = (logits(base()) - plain).norm()
    assert (found - exact).norm() < 2 * rounding
    assert (exact - plain).norm() > 4 * rounding
    original = logits(PeftModel.from_pretrained(base(), folders[0]))
    assert (found - original).norm() < 2 * rounding


def test_on_a_base_in_4_bits(tiny_model: Path, folders: list[Path], tmp_path: Path) -> None:
    def base() -> Any:
        return load(tiny_model, quantization_config=nf4_config(torch.float32))

    def own(model: Any) -> torch.Tensor:
        with torch.no_grad():  # in eval mode bitsandbytes repacks its weights on some CPUs
            return model.train()(INPUT_IDS).logits.float()

    plain = own(base())
    for folder in folders[:2]:
        export_adapter(read_adapter(str(folder)), tmp_path / folder.name)
        expected = own(PeftModel.from_pretrained(base(), folder))
        found = own(PeftModel.from_pretrained(base(), tmp_path / folder.name))
        assert (found - expected).abs().max() < 1e-5  # the scaling is in B: fp32
        assert (found - plain).abs().max() > 1e-3


# Through the commands


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_export(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    text = run("export", folders[0], "--out", out, "--r", 2)
    assert "adapter of rank 2, 6 layers" in text
    assert "vLLM: --enable-lora --max-lora-rank 8" in text
    kept = measure_energy(read_adapter(str(folders[0])))
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:4]}
    assert rows["2"] == [f"{kept.total[1]:.4f}", f"{kept.lowest[1]:.4f}", "<-"]
    assert rows["4"] == ["1.0000", "1.0000"]
    expected = {name: best(W, 2) for name, W in deltas(read_adapter(str(folders[0]))).items()}
    found = deltas(read_adapter(str(out)))
    assert all(near(found[name], W, 1e-6) for name, W in expected.items())  # fp32

    again = run("export", folders[0], "--out", out, status=2)
    assert f"lorasb: error: --out {out} is not empty" in again
    assert read_adapter(str(out)).r == 2, "it was left as it was"
    answer = json.loads(
        run("export", folders[0], "--out", out, "--overwrite", "--json", "--dtype", "bf16")
    )
    assert answer == {
        "r": 4,
        "out": str(out),
        "energy_kept": {"total": kept.total, "lowest": kept.lowest},
    }
    assert read_adapter(str(out)).r == 4


def test_export_by_energy(folders: list[Path], tmp_path: Path) -> None:
    kept = measure_energy(read_adapter(str(folders[1])))
    share = (kept.total[1] + kept.total[2]) / 2
    answer = json.loads(
        run("export", folders[1], "--out", tmp_path / "out", "--energy", share, "--json")
    )
    assert answer["r"] == read_adapter(str(tmp_path / "out")).r == 3


def test_a_run_is_exported_beside_its_adapter(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    make_checkpoint(tmp_path / "run", 3)
    run("export", tmp_path / "run")
    assert read_adapter(str(tmp_path / "run" / "exported")).r == 4


REFUSED: dict[str, tuple[list[str], str]] = {
    "two ways": (["--r", "2", "--energy", "0.5"], "--r and --energy both choose the rank"),
    "too large": (["--r", "5"], "--r 5: the adapter has rank 4; give 1 to 4"),
    "no rank": (["--r", "0"], "--r"),
    "no energy": (["--energy", "0"], "--energy"),
    "not a number": (["--energy", "nan"], "--energy"),
    "more than all": (["--energy", "1.1"], "--energy"),
    "another form": (["--to", "gguf"], "--to"),
    "another dtype": (["--dtype", "fp8"], "--dtype"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_exports_that_are_refused(folders: list[Path], tmp_path: Path, case: str) -> None:
    options, message = REFUSED[case]
    assert message in run("export", folders[0], "--out", tmp_path / "out", *options, status=2)
    assert not (tmp_path / "out").exists()


def test_places_that_are_refused(folders: list[Path], tmp_path: Path) -> None:
    folder = folders[0]
    assert "is not in a run's folder. Name a new folder by --out" in run("export", folder, status=2)
    for out in (folder, folder.parent, folder / ".." / folder.name):
        text = run("export", folder, "--out", out, "--overwrite", status=2)
        assert "holds what is read" in text
    theirs = shutil.copytree(folder, tmp_path / "theirs")  # PEFT has written it
    text = run("export", folder, "--out", theirs, "--overwrite", status=2)
    assert "is not the folder of an adapter that lorasb has exported" in text
    (tmp_path / "new.tmp").mkdir()  # under which the new one would be written first
    (tmp_path / "new.tmp" / "own.txt").touch()
    text = run("export", folder, "--out", tmp_path / "new", status=2)
    assert "is not what an export has left: " in text
    assert "(own.txt)" in text
    (tmp_path / "file").write_text("kept")
    run("export", folder, "--out", tmp_path / "file", "--overwrite", status=2)
    assert (tmp_path / "file").read_text() == "kept"
    assert "is not an adapter" in run("export", tmp_path, "--out", tmp_path / "out", status=2)


@pytest.mark.parametrize("out", [".", "link", "file/below", "x" * 300])
def test_odd_places(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    """They are written, or refused with a message."""
    (tmp_path / "here" / "real").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to("real")
    (tmp_path / "here" / "file").write_text("kept")
    monkeypatch.chdir(tmp_path / "here" / "real" if out == "." else tmp_path / "here")
    result = CliRunner().invoke(main, ["export", str(folders[0].resolve()), "--out", out])
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    if result.exit_code != 0:
        assert "lorasb: error" in result.output
    else:
        assert read_adapter(out).r == 4


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    """JSON may hold half of a surrogate pair; it is written, or refused with a message."""
    adapter = random_adapter(tmp_path / "a", 1, names=("a",))
    path = adapter.path / ADAPTER_WEIGHTS
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b"model.a.lora", b"model.\\ud800.lora")
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["export", str(adapter.path), "--out", str(out)])
    assert result.exit_code in (0, 2), repr(result.exception)


def test_combine(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = run("combine", *folders[:2], "--weights", "-1,0.5", "--out", out, "--r", 3)
    assert "adapter of rank 3 (different bases, stacked; energy kept 0." in text
    one, two = (deltas(read_adapter(str(folder))) for folder in folders[:2])
    found = deltas(read_adapter(str(out)))
    for name, W in one.items():
        assert near(found[name], best(-W + 0.5 * two[name], 3), 2e-6), name  # fp32
    text = run("combine", folders[0], folders[0], "--weights", "1,1", "--out", tmp_path / "same")
    assert "adapter of rank 4 (one basis, summed in it; energy kept 1.0000)" in text
    text = run("combine", *folders[:2], "--weights", "1,1", "--out", out, status=2)
    assert "is not empty" in text
    for weights, message in {
        "1": "has 1 numbers for 2 adapters",
        "1,x": "must be numbers, separated by commas",
        "1,": "must be numbers",
        "1,nan": "must be finite",
        "1,1e999": "must be finite",
    }.items():
        arguments = ("--weights", weights, "--out", tmp_path / "new")
        assert message in run("combine", *folders[:2], *arguments, status=2)
    assert not (tmp_path / "new").exists()


def test_combining_adapters_of_two_bases_is_told(folders: list[Path], tmp_path: Path) -> None:
    other = random_adapter(tmp_path / "other", 1)
    text = run("combine", folders[0], other.path, "--weights", "1,1", "--out", tmp_path / "out")
    assert f"warning: the adapters name different bases: {read_adapter(str(folders[0])).base_path}"
    assert "the adapters name different bases" in text


def test_inspect_without_the_base(folders: list[Path], tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    arguments = ("inspect", folders[0], "--no-base", "--output", picture)
    found = json.loads(run(*arguments, "--json"))
    expected = deltas(read_adapter(str(folders[0])))
    assert found.keys() == expected.keys()
    for name, W in expected.items():
        S = torch.linalg.svdvals(W)[:4].tolist()
        assert found[name]["singular_values"] == pytest.approx(S, rel=1e-6)  # fp32 factors
        assert found[name]["relative_norm"] is None
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = run(*arguments)
    assert all(name in table for name in expected)
    assert "must be a .png file" in run(*arguments[:-1], tmp_path / "x.jpg", status=2)


def test_the_picture_of_inspect_is_where_its_adapter_is(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    alone = shutil.copytree(folders[0], tmp_path / "alone")
    of_run = shutil.copytree(folders[0], tmp_path / "run/adapter")
    (tmp_path / "run/run.json").write_text('{"config": {}}')
    for folder, picture in ((alone, "alone-inspect.png"), (of_run, "run/inspect.png")):
        for named in (folder, Path("..") / folder.relative_to(tmp_path)):
            said = run("inspect", named, "--no-base")
            assert "heat map: " in said
            (tmp_path / picture).unlink()  # raises where there is none
    assert not any((tmp_path / "here").iterdir())
    assert not list(alone.glob("*.png"))


def test_an_export_of_some_blocks_names_them(
    tiny_model: Path, folders: list[Path], tmp_path: Path
) -> None:
    """PEFT gives no adapter to layers that have none in the file."""
    export_adapter(read_adapter(str(folders[2])), tmp_path / "out")
    peft = PeftModel.from_pretrained(load(tiny_model), tmp_path / "out")
    having = {name for name, _ in peft.named_modules() if name.endswith(".lora_A.default")}
    assert len(having) == len(read_adapter(str(folders[2])).layers) == 2


def test_a_target_module_that_is_no_name(folders: list[Path], tmp_path: Path) -> None:
    """Fields of a folder's configuration are copied only if PEFT accepts them."""
    adapter = read_adapter(str(folders[0]))
    copy = tmp_path / "copy"
    export_adapter(adapter, copy)
    edit_config(copy, target_modules=7, base_model_name_or_path=["x"])
    export_adapter(read_adapter(str(copy)), tmp_path / "out")
    written_config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written_config["target_modules"] == list(adapter.layers)
    assert written_config["base_model_name_or_path"] is None


MOE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8, "n_group": 1, "topk_group": 1}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4}
DENSE_AND_SHARED = "gate_proj,up_proj,down_proj"
# A model_type, its options, target modules, and how many layers PEFT would take for experts.
BASES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "DeepSeek-V3": ("deepseek_v3", MOE | LATENT, "all-linear", 9),
    "its dense layer": (
        "deepseek_v3",
        MOE | LATENT,
        ",".join(f"model.layers.0.mlp.{name}" for name in DENSE_AND_SHARED.split(",")) + ",o_proj",
        3,
    ),
    "its attention": ("deepseek_v3", MOE | LATENT, "o_proj,kv_b_proj", 0),
    "GLM-4-MoE": ("glm4_moe", MOE | {"head_dim": 8}, "all-linear", 9),
    # Gates in its attention have a name of the experts', too; and its routers are linear layers.
    "AFMoE": (
        "afmoe",
        MOE | {"num_experts": 4, "num_dense_layers": 1, "head_dim": 8, "num_shared_experts": 1},
        "all-linear",
        12,
    ),
    "Qwen2-MoE": (
        "qwen2_moe",
        MOE | {"num_experts": 4, "shared_expert_intermediate_size": 20},
        "all-linear",
        0,
    ),
    "Mixtral": ("mixtral", MOE | {"num_local_experts": 4}, "all-linear", 0),
    "Llama": ("llama", MOE, "all-linear", 0),
}


@pytest.mark.parametrize("kind", BASES)
def test_peft_reads_all_layers_of_an_export(kind: str, tmp_path: Path) -> None:
    """So does transformers. The adapter was written as earlier versions did."""
    model_type, options, modules, count = BASES[kind]
    known = AutoConfig.for_model(model_type)
    config = AutoConfig.for_model(
        model_type, **{name: value for name, value in options.items() if hasattr(known, name)}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    layers = linear_layers(base)
    targets = select_targets(layers, modules, 2)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: tensor
        for name, (out, in_) in targets.items()
        for key, tensor in peft_tensors(
            name,
            torch.randn(2, in_, generator=generator),
            torch.randn(out, 2, generator=generator),
        ).items()
    }
    save_peft_adapter(
        tmp_path / "adapter",
        tensors,
        r=2,
        target_modules=peft_target_modules(targets, layers),
        base_model=str(tmp_path / "base"),
    )
    assert len(misread_by_peft(model_type, targets)) == count
    assert "PEFT" not in run("export", tmp_path / "adapter", "--out", tmp_path / "out")
    stored = load_file(tmp_path / "out" / ADAPTER_WEIGHTS)
    by_peft = PeftModel.from_pretrained(base, tmp_path / "out").get_base_model()
    by_transformers = load(tmp_path / "base")
    by_transformers.load_adapter(str(tmp_path / "out"))
    for loaded in (by_peft, by_transformers):
        found = {n: p for n, p in loaded.named_parameters() if n.endswith(".default.weight")}
        assert len(found) == len(stored) == 2 * len(targets)
        for name, value in found.items():
            assert torch.equal(value, stored[f"base_model.model.{name.replace('.default', '')}"])


def test_an_export_without_the_base_of_its_experts(tmp_path: Path) -> None:
    """It keeps the form that the adapter has, and tells what that may mean."""
    names = ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.o_proj"]
    factors = {name: (torch.ones(2, 6), torch.ones(5, 2)) for name in names}
    for folder, fields in {
        "old": {"target_modules": ["up_proj", "o_proj"]},
        "new": {"target_modules": ["o_proj"], "target_parameters": ["up_proj.weight"]},
    }.items():
        written(tmp_path / folder, factors)
        edit_config(tmp_path / folder, **fields)
        out, half = tmp_path / f"{folder} out", ("--weights", "0.5,0.5")
        told = run("export", tmp_path / folder, "--out", out)
        told += run("combine", *[tmp_path / folder] * 2, *half, "--out", tmp_path / f"{folder} sum")
        assert read_adapter(str(out)).peft_config.items() >= fields.items()
        assert read_adapter(str(tmp_path / f"{folder} sum")).peft_config.items() >= fields.items()
        warning = "PEFT may not read 1 of 2 layers, such as model.layers.0.mlp.up_proj"
        assert told.count(warning) == (2 if folder == "old" else 0)
        assert told.count("the config.json of base, which") == (2 if folder == "old" else 0)
    # A sum with an adapter of other layers names them all.
    written(tmp_path / "more", {"model.layers.0.mlp.x": factors[names[0]]})
    run("combine", tmp_path / "new", tmp_path / "more", *half, "--out", tmp_path / "sum")
    found = read_adapter(str(tmp_path / "sum")).peft_config
    assert found["target_modules"] == [names[1], "model.layers.0.mlp.x"]
    assert found["target_parameters"] == [f"{names[0]}.weight"]


def test_an_adapter_of_single_experts_keeps_its_names(tmp_path: Path) -> None:
    """PEFT converts them, as transformers 4 has them."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen3_moe"}')
    name = "model.layers.0.mlp.experts.3.up_proj"
    adapter = written(tmp_path / "adapter", {name: (torch.ones(2, 6), torch.ones(5, 2))})
    edit_config(adapter.path, base_model_name_or_path=str(tmp_path / "base"))
    assert read_adapter(str(adapter.path)).target_fields == {"target_modules": [name]}


def test_a_run_knows_what_its_base_was(tmp_path: Path) -> None:
    """Its base need not be there; an earlier run's has to be."""
    make_run(tmp_path / "run")
    make_checkpoint(tmp_path / "run", 3)
    file = tmp_path / "run" / "run.json"
    content = json.loads(file.read_text())
    assert read_adapter(str(tmp_path / "run")).model_type is None
    file.write_text(json.dumps(content | {"model_type": "deepseek_v3"}))
    assert read_adapter(str(tmp_path / "run")).model_type == "deepseek_v3"

"""--rank-allocation energy: whole runs whose layers have different ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasb_ds.adapters.low_rank import LoraPair
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.batch import Batch, collate
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.adapter_reader import read_adapter
from lorasb_ds.export.inspection import inspect_adapter
from lorasb_ds.export.stored_adapter import StoredAdapter
from lorasb_ds.export.to_peft import export_adapter
from lorasb_ds.init.rank_allocation import allocate_ranks
from lorasb_ds.runs.checkpoint import checkpoint_path, list_checkpoints
from lorasb_ds.training.prepare import Prepared, prepare
from tests.references import own_loss, true_gradients
from tests.runs import (
    REALLY_SHARDED,
    Runs,
    metrics,
    run_on_words,
    run_ranks,
)

R, OF_BASIS, STEPS = 5, 14, 4
STAGE_3 = {"stage": 3, **REALLY_SHARDED}
NAMES = ["2 ranks", pytest.param("1 rank", marks=pytest.mark.slow)]
BASIS = "basis of {}"


def config_of(model: Path, folder: Path, name: str, **options: Any) -> dict[str, Any]:
    return run_on_words(model, folder, name, **{"max_steps": STEPS} | options)


def config_by_energy(model: Path, folder: Path, basis: str, **options: Any) -> dict[str, Any]:
    taken = {"r": R, "rank_allocation": "energy", "init_from": str(folder / basis)}
    return config_of(model, folder, **{"name": "new"} | taken | options)


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A basis with more directions, and a run whose ranks are chosen from it."""
    folder = tmp_path_factory.mktemp("ranks")

    def make(name: str) -> Path:
        basis = BASIS.format(name)
        first = config_of(tiny_model, folder, basis, r=OF_BASIS, max_steps=1)
        by_energy = config_by_energy(tiny_model, folder, basis, name=name)
        # The second one is checked when the first one has ended.
        both, world_size = [first, by_energy], int(name.partition(" ")[0])
        run_ranks("methods", world_size, runs=both, zero_optimization=STAGE_3)
        return folder / name

    return Runs(folder, make)


def dense(adapter: StoredAdapter) -> dict[str, torch.Tensor]:
    return {name: product(adapter.pair(name)) for name in adapter.layers}


def product(pair: LoraPair) -> torch.Tensor:
    return pair.B @ pair.A


def whole_held_out(run: Prepared) -> Batch:
    assert run.data.held_out is not None
    return collate(run.data.held_out.examples, run.base.tokenizer.pad_token_id)


def prepared(runs: Runs, model: Path, **options: Any) -> Prepared:
    return prepare(load_run_config(config_by_energy(model, runs.folder, **options)), 1)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_are_those_of_the_spectra_and_factors_the_first_directions(
    name: str, runs: Runs, tiny_model: Path
) -> None:
    run = runs[name]
    basis = runs.folder / BASIS.format(name)
    before, after = (load_file(of / "basis.safetensors") for of in (basis, run))
    layers = [key.removesuffix(".lora_A") for key in before if key.endswith(".lora_A")]
    spectra = {layer: before[f"{layer}.S"].square().tolist() for layer in layers}
    ranks = {layer: len(after[f"{layer}.lora_A"]) for layer in layers}
    wanted = allocate_ranks(spectra, len(layers) * R**2)
    assert ranks == wanted
    assert min(ranks.values()) < R < max(ranks.values()) <= OF_BASIS
    for layer, r in ranks.items():
        assert torch.equal(after[f"{layer}.lora_A"], before[f"{layer}.lora_A"][:r])
        assert torch.equal(after[f"{layer}.lora_B"], before[f"{layer}.lora_B"][:, :r])
        assert torch.equal(after[f"{layer}.S"], before[f"{layer}.S"][:r])
        assert after[f"{layer}.lora_R"].shape == (r, r)
    described = json.loads((run / "run.json").read_text())
    numbers = sum(r * r for r in ranks.values())
    assert described["trainable_parameters"] == numbers <= len(layers) * R**2
    assert f"ranks of {min(ranks.values())} to {max(ranks.values())}" in described["notes"][0]
    report = (run / "report.md").read_text()
    kinds = {layer.rpartition(".")[2] for layer in layers}
    assert all(f"\n| {kind} | " in report for kind in kinds)
    of_up = [r for layer, r in ranks.items() if layer.endswith("up_proj")]
    assert f"| up_proj | {min(of_up)} | {sum(of_up) / 2:.1f} | {max(of_up)} |" in report
    # The captured energy is that of the whole update.
    stored = [json.loads((of / "init.json").read_text())["layers"] for of in (basis, run)]
    for layer, r in ranks.items():
        S = before[f"{layer}.S"]
        share = (S[:r].square().sum() / S.square().sum()).item()
        assert stored[1][layer]["captured_energy"] == pytest.approx(
            stored[0][layer]["captured_energy"] * share, rel=1e-5
        )


@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_the_adapter(name: str, runs: Runs, tiny_model: Path) -> None:
    run = runs[name]
    trained = next(row["eval_loss"] for row in metrics(run) if row.get("stage") == "trained")
    saved, last = read_adapter(str(run / "adapter")), read_adapter(str(checkpoint_path(run, STEPS)))
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == saved.r > R
    assert config["rank_pattern"] == config["alpha_pattern"]
    batch = whole_held_out(prepared(runs, tiny_model, basis=BASIS.format(name)))
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        tuned = PeftModel.from_pretrained(base, run / "adapter").eval()
        assert own_loss(tuned, batch).item() == pytest.approx(trained, rel=1e-5)
    for layer, update in dense(saved).items():
        assert saved.rank_of(layer) == last.rank_of(layer)
        assert saved.rank_of(layer) == config["rank_pattern"].get(layer, config["r"])
        torch.testing.assert_close(product(last.pair(layer)), update, atol=1e-6, rtol=1e-5)
    inspected = inspect_adapter(saved)
    assert all(inspected[layer].r == saved.rank_of(layer) for layer in saved.layers)
    assert all(of.orthonormality_error < 1e-5 for of in inspected.values())


def test_an_export_has_one_rank(runs: Runs, tmp_path: Path) -> None:
    """The largest, to which others are padded: other tools know no ranks of layers."""
    saved = read_adapter(str(runs["2 ranks"] / "adapter"))
    export_adapter(saved, tmp_path / "exported")
    exported = read_adapter(str(tmp_path / "exported"))
    assert {exported.rank_of(layer) for layer in exported.layers} == {saved.r}
    for layer, update in dense(saved).items():
        assert torch.equal(product(exported.pair(layer)), update)


@pytest.mark.parametrize("name", NAMES)
def test_resumed_to_the_bit_without_the_basis(name: str, runs: Runs, tiny_model: Path) -> None:
    run, folder = runs[name], runs.folder / f"resumed {name}"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "adapter")
    (folder / "report.md").unlink()
    for path in list_checkpoints(folder)[2:]:
        shutil.rmtree(path)
    config = config_by_energy(tiny_model, runs.folder, "gone", name=folder.name, resume="auto")
    run_ranks("methods", int(name[0]), runs=[config], zero_optimization=STAGE_3)
    found, wanted = (
        load_file(of / "adapter" / "adapter_model.safetensors") for of in (folder, run)
    )
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
    assert [row["step"] for row in metrics(folder) if "loss" in row] == [*range(1, STEPS + 1)]


@pytest.mark.parametrize("trained", [True, False])
def test_resuming_with_other_ranks_is_refused(trained: bool, runs: Runs, tiny_model: Path) -> None:
    """With a checkpoint, and right after the init."""
    folder = runs.folder / f"refused {trained}"
    shutil.copytree(runs["2 ranks"], folder)
    (folder / "report.md").unlink()
    if not trained:
        shutil.rmtree(folder / "checkpoints")
    asked = {"name": folder.name, "resume": "auto", "basis": BASIS.format("2 ranks")}
    with pytest.raises(ConfigError, match="--r 6 differs from the run's 5"):
        prepared(runs, tiny_model, **asked, r=6)
    with pytest.raises(ConfigError, match="--rank-allocation" if trained else "--r 5 differs"):
        prepared(runs, tiny_model, **asked, rank_allocation="uniform")


def test_a_basis_without_more_directions_is_refused(runs: Runs, tiny_model: Path) -> None:
    run = runs["2 ranks"]
    basis = BASIS.format(run.name)
    with pytest.raises(ConfigError, match=f"has r = {OF_BASIS}, .*lorasb init --r {2 * OF_BASIS}"):
        prepared(runs, tiny_model, basis=basis, r=OF_BASIS)
    with pytest.raises(ConfigError, match=r"there is no basis\.safetensors"):
        prepared(runs, tiny_model, basis="nowhere")
    with pytest.raises(ConfigError, match="--seed differ"):
        prepared(runs, tiny_model, basis=basis, seed=7)
    again = prepared(runs, tiny_model, basis=run.name)
    assert again.stored_init is not None
    taken = {name: len(layer.spectrum) for name, layer in again.stored_init.layers.items()}
    assert again.adapter.ranks == taken, "the same budget, of the directions that are there"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 1])
def test_re_based_with_the_same_ranks(world_size: int, runs: Runs, tiny_model: Path) -> None:
    """Each later basis has a layer's own number of directions of the gradient then."""
    start = runs[f"{world_size} rank{'s' if world_size > 1 else ''}"]
    options = {
        "rebase_every": 2,
        "name": f"re-based {world_size}",
        "basis": BASIS.format(start.name),
    }
    config = config_by_energy(tiny_model, runs.folder, **options)
    run_ranks("methods", world_size, runs=[config], zero_optimization=STAGE_3)
    run, before = Path(config["output_dir"]), prepared(runs, tiny_model, basis=options["basis"])
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for layer, update in dense(read_adapter(str(checkpoint_path(run, 2)))).items():
        base.get_submodule(layer).weight.data += update
    examples = [before.data.init.examples[row] for row in before.rebasing_rows(1)[0]]
    gradients = true_gradients(base, collate(examples, before.base.tokenizer.pad_token_id))
    gradients.pop("loss")
    folder = run / "rebased" / "step-00000002"
    basis, report = (
        load_file(folder / "basis.safetensors"),
        json.loads((folder / "init.json").read_text()),
    )
    for layer, G in gradients.items():
        r = before.adapter.ranks[layer]
        U, S, Vh = torch.linalg.svd(G.sign(), full_matrices=False)
        A, B, R = (basis[f"{layer}.lora_{factor}"] for factor in "ABR")
        assert (len(A), B.shape[1], *R.shape) == (r, r, r, r)
        best = (U[:, :r] * S[:r]) @ Vh[:r]
        eta = report["step"]["init_lr"]
        # An entry of G that is nearly zero may have the other sign.
        assert torch.linalg.norm(B @ R @ A / -eta - best) <= 0.1 * best.norm(), layer
        captured = (S[:r].square().sum() / S.square().sum()).item()
        assert report["layers"][layer]["captured_energy"] == pytest.approx(captured, rel=1e-2)
    saved, last = read_adapter(str(run / "adapter")), read_adapter(str(checkpoint_path(run, STEPS)))
    for layer, update in dense(saved).items():
        assert saved.rank_of(layer) == 2 * before.adapter.ranks[layer]
        torch.testing.assert_close(product(last.pair(layer)), update, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    {
        "lora-xs": {"method": "lora-xs"},
        "sb-gradient": {"method": "sb-gradient"},
        "4 bits, tracked": {"load_in_4bit": True, "dtype": "bf16", "track_alignment": 2},
        "muon": {"optimizer": "muon", "init_update": "sign"},
    }.items(),
)
def test_with_other_options(
    name: str, options: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    first = config_of(tiny_model, tmp_path, "basis", r=OF_BASIS, **options | {"max_steps": 1})
    by_energy = config_by_energy(tiny_model, tmp_path, "basis", name=name, **options)
    run_ranks("methods", 2, runs=[first, by_energy], zero_optimization=STAGE_3)
    run = tmp_path / name
    saved, last = read_adapter(str(run / "adapter")), read_adapter(str(checkpoint_path(run, STEPS)))
    assert min(map(saved.rank_of, saved.layers)) < R < saved.r
    for layer, update in dense(saved).items():
        torch.testing.assert_close(product(last.pair(layer)), update, atol=1e-6, rtol=1e-5)
    described = json.loads((run / "run.json").read_text())
    numbers = sum(saved.rank_of(layer) ** 2 for layer in saved.layers)
    assert described["trainable_parameters"] == numbers
    if "track_alignment" in options:
        rows = [json.loads(line) for line in (run / "alignment.jsonl").read_text().splitlines()]
        assert {row["step"] for row in rows} >= {2, 4}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_experts_keep_their_rank(
    family: str, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_family(family)
    more = {"expert_r": 3, "max_steps": 1}
    first = config_of(model, tmp_path, "basis", r=OF_BASIS, **more)
    by_energy = config_by_energy(model, tmp_path, "basis", name="run", lr=1e-2, **more)
    run_ranks("methods", 2, runs=[first, by_energy], zero_optimization=STAGE_3)
    run = tmp_path / "run"
    saved = read_adapter(str(run / "adapter"))
    assert saved.experts
    assert {saved.rank_of(layer) for layer in saved.experts} == {3}
    linear = {saved.rank_of(layer) for layer in saved.layers if layer not in saved.experts}
    assert min(linear) < R < max(linear)
    notes = json.loads((run / "run.json").read_text())["notes"]
    assert "adapters of experts keep rank 3" in notes[0]
    trained = next(row["eval_loss"] for row in metrics(run) if row.get("stage") == "trained")
    new = prepare(load_run_config(config_by_energy(model, tmp_path, "basis", **more)), 1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        tuned = PeftModel.from_pretrained(base, run / "adapter").eval()
        assert own_loss(tuned, whole_held_out(new)).item() == pytest.approx(trained, rel=1e-4)
    last = read_adapter(str(checkpoint_path(run, 1)))
    for layer, update in dense(saved).items():
        torch.testing.assert_close(product(last.pair(layer)), update, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "sb-random", "lora-ga"])
def test_other_methods_are_refused(method: str) -> None:
    asked = {"method": method, "rank_allocation": "energy", "init_from": "runs/basis"}
    with pytest.raises(ConfigError, match="means nothing to --method"):
        load_run_config(asked)


def test_what_it_needs_is_said() -> None:
    with pytest.raises(ConfigError, match="lorasb init --r 64 --output-dir runs/basis"):
        load_run_config({"rank_allocation": "energy", "r": 32})
    assert RunConfig().rank_allocation == "uniform"

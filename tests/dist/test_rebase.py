"""Re-basing: the next basis is that of the gradient at the present weights, and nothing is lost."""

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
from lorasb_ds.config.run_layout import CHECKPOINT_FILES
from lorasb_ds.data.batch import Batch, collate
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.adapter_reader import read_adapter
from lorasb_ds.export.inspection import inspect_adapter
from lorasb_ds.export.merge import merge_adapter
from lorasb_ds.export.stored_adapter import StoredAdapter
from lorasb_ds.export.to_peft import export_adapter
from lorasb_ds.models.base import Base
from lorasb_ds.runs.checkpoint import (
    Checkpoint,
    checkpoint_path,
    list_checkpoints,
    read_checkpoint,
)
from lorasb_ds.system.files import write_sums
from lorasb_ds.training.prepare import Prepared, prepare
from tests.references import own_loss, true_gradients
from tests.runs import (
    REALLY_SHARDED,
    Runs,
    metrics,
    run_on_words,
    run_ranks,
)

R, STEPS, EVERY = 4, 6, 2
STAGE_3 = {"stage": 3, **REALLY_SHARDED}
NAMES = ["2 ranks", pytest.param("1 process", marks=pytest.mark.slow)]


def config_of(model: Path, folder: Path, name: str, **options: Any) -> dict[str, Any]:
    return run_on_words(
        model, folder, name, **{"r": R, "max_steps": STEPS, "rebase_every": EVERY} | options
    )


def train(config: dict[str, Any], world_size: int = 2, zero: dict[str, Any] = STAGE_3) -> Path:
    run_ranks("methods", world_size, runs=[config], zero_optimization=zero)
    return Path(config["output_dir"])


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("rebased")

    def make(name: str) -> Path:
        alone = name == "1 process"
        config = config_of(tiny_model, folder, name)
        return train(config, 1, {"stage": 2}) if alone else train(config)

    return Runs(folder, make)


def dense(adapter: StoredAdapter) -> dict[str, torch.Tensor]:
    return {name: product(adapter.pair(name)) for name in adapter.layers}


def product(pair: LoraPair) -> torch.Tensor:
    return pair.B @ pair.A


def with_update(model: Path, adapter: StoredAdapter | None) -> Any:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, update in dense(adapter).items() if adapter is not None else ():
        base.get_submodule(name).weight.data += update
    return base


def prepared(model: Path, runs: Runs) -> Prepared:
    return prepare(load_run_config(config_of(model, runs.folder, "new")), 1)


def whole(run: Prepared, rows: list[int]) -> Batch:
    examples = [run.data.init.examples[row] for row in rows]
    return collate(examples, run.base.tokenizer.pad_token_id)


@pytest.mark.parametrize("name", NAMES)
def test_the_next_basis_is_that_of_the_gradient_at_the_present_weights(
    name: str, runs: Runs, tiny_model: Path
) -> None:
    """Against autograd's gradients of the base plus the update of the checkpoint before it."""
    run, before = runs[name], prepared(tiny_model, runs)
    drawn = []
    for number, step in enumerate((EVERY, 2 * EVERY), 1):
        model = with_update(tiny_model, read_adapter(str(checkpoint_path(run, step))))
        gradient_rows, probe_rows = before.rebasing_rows(number)
        drawn.append(gradient_rows)
        gradients = true_gradients(model, whole(before, gradient_rows))
        basis = load_file(run / "rebased" / f"step-{step:08d}" / "basis.safetensors")
        report = json.loads((run / "rebased" / f"step-{step:08d}" / "init.json").read_text())
        assert report["loss"] == pytest.approx(gradients.pop("loss").item(), rel=1e-5)
        eta = report["step"]["init_lr"]
        assert report["step"]["loss_after"] < report["step"]["loss_before"]
        for layer, G in gradients.items():
            U, S, Vh = torch.linalg.svd(G.sign(), full_matrices=False)
            A, B = basis[f"{layer}.lora_A"], basis[f"{layer}.lora_B"]
            first_R = basis[f"{layer}.lora_R"]
            torch.testing.assert_close(
                first_R, torch.diag(-eta * S[:R]), atol=3e-3 * eta * S[0].item(), rtol=0
            )
            best = (U[:, :R] * S[:R]) @ Vh[:R]
            # An entry of G that is nearly zero may have the other sign.
            assert torch.linalg.norm(B @ first_R @ A / -eta - best) <= 0.1 * best.norm(), layer
        losses = [own_loss(model, whole(before, [row])).item() for row in probe_rows]
        assert len(losses) == 1, "one row is held back, whose mean is the loss"
        assert report["step"]["loss_before"] == pytest.approx(losses[0], rel=1e-5)
    assert drawn[0] != drawn[1] != before.gradient_rows


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_plain_lora_whose_rank_has_grown(name: str, runs: Runs, tiny_model: Path) -> None:
    run = runs[name]
    stages = {
        (row["step"], row["stage"]): row["eval_loss"] for row in metrics(run) if "stage" in row
    }
    assert [*stages] == [
        *((0, "base"), (0, "init"), (2, "rebase"), (4, "rebase"), (6, "trained")),
    ]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3 * R
    batch = whole_held_out(tiny_model, runs)
    base = with_update(tiny_model, None).eval()
    with torch.no_grad():
        tuned = PeftModel.from_pretrained(base, run / "adapter").eval()
        assert own_loss(tuned, batch).item() == pytest.approx(stages[6, "trained"], rel=1e-5)
    report = (run / "report.md").read_text()
    assert all(f"\n| {step} | " in report for step in (2, 4))
    described = json.loads((run / "run.json").read_text())
    assert described["trainable_parameters"] == 14 * R * R


def whole_held_out(model: Path, runs: Runs) -> Batch:
    run = prepared(model, runs)
    assert run.data.held_out is not None
    return collate(run.data.held_out.examples, run.base.tokenizer.pad_token_id)


def test_a_checkpoint_has_what_was_kept_before_it(runs: Runs, tiny_model: Path) -> None:
    """At every step; that of a re-basing's step is of before it."""
    run = runs["2 ranks"]
    saved = read_adapter(str(run / "adapter"))
    adapters = [read_adapter(str(checkpoint_path(run, step))) for step in range(1, STEPS + 1)]
    assert [adapter.r for adapter in adapters] == [R, R, 2 * R, 2 * R, 3 * R, 3 * R]
    for layer, update in dense(saved).items():
        torch.testing.assert_close(product(adapters[-1].pair(layer)), update, atol=1e-6, rtol=1e-5)
    # What is kept does not change any more.
    for layer in saved.layers:
        kept = [adapter.pair(layer) for adapter in adapters[4:]]
        first, second = (product(LoraPair(p.A[R:], p.B[:, R:])) for p in kept)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, product(adapters[3].pair(layer)), atol=1e-6, rtol=1e-5)


def test_the_optimizer_begins_anew(runs: Runs) -> None:
    """The first step in a basis moves every entry of R by the learning rate, as AdamW's first."""
    run = runs["2 ranks"]
    lr = next(row["lr"] for row in metrics(run) if row["step"] == EVERY + 1 and "lr" in row)
    trained = read_checkpoint(checkpoint_path(run, EVERY + 1))
    assert isinstance(trained, Checkpoint)
    assert trained.optimizer_scalars["step"] == 1
    first = load_file(run / "rebased" / f"step-{EVERY:08d}" / "basis.safetensors")
    names = [name for name in trained.tensors() if name.endswith(".lora_R")]
    moved = torch.stack([trained.tensors()[name] - first[name] for name in names]).abs()
    assert (moved / lr).median().item() == pytest.approx(1, rel=1e-3)


@pytest.mark.slow
def test_a_checkpoint_of_another_course_is_not_mixed_with_new_bases(
    runs: Runs, tiny_model: Path
) -> None:
    """Those after the step that a run continues from are set aside, and their bases with them."""
    folder = runs.folder / "another course"
    shutil.copytree(runs["2 ranks"], folder)
    (folder / "report.md").unlink()
    shutil.rmtree(folder / "adapter")
    step = checkpoint_path(folder, 3)
    train(config_of(tiny_model, runs.folder, folder.name, resume=str(step), lr=1e-2))
    aside = checkpoint_path(folder, 5).with_suffix(".superseded")
    assert aside.is_dir()
    assert (folder / "rebased" / "step-00000004.superseded").is_dir()
    with pytest.raises(ConfigError, match="basis of step 4 of its run has been made again"):
        read_adapter(str(aside))
    assert read_adapter(str(checkpoint_path(folder, 5))).r == 3 * R


def test_merging_a_checkpoint_is_refused(runs: Runs, tiny_model: Path, tmp_path: Path) -> None:
    """Until its updates are folded, by an export."""
    last = read_adapter(str(checkpoint_path(runs["2 ranks"], STEPS)))
    with pytest.raises(ConfigError, match="has updates in earlier bases"):
        merge_adapter(last, str(tiny_model), tmp_path / "merged")
    export_adapter(last, tmp_path / "exported")
    merge_adapter(read_adapter(str(tmp_path / "exported")), str(tiny_model), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = with_update(tiny_model, last)
    for name in last.layers:
        found, wanted = (m.get_submodule(name).weight for m in (merged, expected))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_inspection_looks_at_one_basis(runs: Runs) -> None:
    for update in inspect_adapter(read_adapter(str(runs["2 ranks"]))).values():
        assert update.r == 3 * R
        assert update.orthonormality_error < 1e-5


@pytest.mark.slow
def test_no_room_for_a_basis(runs: Runs, tiny_model: Path) -> None:
    """The run ends on all ranks, and goes on from the step of the re-basing."""
    folder = runs.folder / "no room"
    shutil.copytree(runs["2 ranks"], folder)
    for path in (folder / "adapter", folder / "rebased", *list_checkpoints(folder)[1:]):
        shutil.rmtree(path)
    (folder / "report.md").unlink()
    (folder / "rebased").write_text("a file where a folder is to be")
    config = config_of(tiny_model, runs.folder, folder.name, resume="auto", save_every=100)
    with pytest.raises(AssertionError, match="the basis after step 2 cannot be written"):
        train(config)
    assert list_checkpoints(folder)[-1] == checkpoint_path(folder, EVERY)
    (folder / "rebased").unlink()
    run = train(config)
    assert [row["step"] for row in metrics(run) if "loss" in row] == [*range(1, STEPS + 1)]
    wanted = read_adapter(str(runs["2 ranks"]))
    for layer, update in dense(read_adapter(str(run))).items():
        torch.testing.assert_close(update, product(wanted.pair(layer)), atol=0, rtol=0)


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_resumed_to_the_bit(step: int, runs: Runs, tiny_model: Path) -> None:
    """From within the second basis, and from the step after which the third is made."""
    run = runs["2 ranks"]
    folder = runs.folder / f"resumed at {step}"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "adapter")
    (folder / "report.md").unlink()
    for path in list_checkpoints(folder):
        if path > checkpoint_path(folder, step):
            shutil.rmtree(path)
    written = checkpoint_path(folder, step).stat().st_ino
    train(config_of(tiny_model, runs.folder, folder.name, resume="auto"))
    assert checkpoint_path(folder, step).stat().st_ino == written, "it is not written again"
    found, wanted = (
        load_file(of / "adapter" / "adapter_model.safetensors") for of in (folder, run)
    )
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    rows = [row["step"] for row in metrics(folder) if "loss" in row]
    assert rows == [*range(1, STEPS + 1)]
    assert [row["step"] for row in metrics(folder) if row.get("stage") == "rebase"] == [2, 4]


def test_resuming_is_refused(runs: Runs, tiny_model: Path) -> None:
    """With other steps between bases, and where a basis is damaged or that of another run."""
    run = runs["2 ranks"]
    folder = runs.folder / "damaged"
    shutil.copytree(run, folder)
    (folder / "report.md").unlink()
    again = config_of(tiny_model, runs.folder, folder.name, resume="auto", max_steps=8)
    with pytest.raises(ConfigError, match="--rebase-every"):
        prepare(load_run_config(again | {"rebase_every": 3}), 2)
    file = folder / "rebased" / "step-00000004" / "basis.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="step-00000004 is damaged"):
        prepare(load_run_config(again), 2)
    shutil.rmtree(file.parent)
    with pytest.raises(ConfigError, match="step-00000004 is damaged"):
        prepare(load_run_config(again), 2)
    taken = config_of(tiny_model, runs.folder, "new")
    with pytest.raises(ConfigError, match="re-based after step"):
        prepare(load_run_config(taken | {"init_from": str(run / "rebased" / "step-00000002")}), 2)


@pytest.mark.parametrize("best", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_best_may_be_of_an_earlier_basis(best: int, runs: Runs, tiny_model: Path) -> None:
    """A run that is resumed at its end, with a checkpoint of the first or second basis as best."""
    folder = runs.folder / f"best of step {best}"
    shutil.copytree(runs["2 ranks"], folder)
    (folder / "report.md").unlink()
    last = checkpoint_path(folder, STEPS)
    content = json.loads((last / "trainer.json").read_text())
    content["progress"] |= {"best_step": best, "best_loss": 0.0}
    (last / "trainer.json").write_text(json.dumps(content))
    write_sums(last, CHECKPOINT_FILES)
    asked = {"load_best_model_at_end": True, "eval_every": 100, "resume": "auto"}
    run = train(config_of(tiny_model, runs.folder, folder.name, **asked))
    saved, wanted = read_adapter(str(run)), read_adapter(str(checkpoint_path(run, best)))
    assert saved.r == wanted.r == (R if best == 1 else 2 * R)
    for layer, update in dense(wanted).items():
        torch.testing.assert_close(product(saved.pair(layer)), update, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("every", "options", "message"),
    [
        (6, {}, "the run has 6 steps"),
        (2, {"method": "lora"}, "methods that train R in a basis of the gradient"),
        (2, {"method": "lora-xs"}, "methods that train R in a basis of the gradient"),
    ],
)
def test_where_it_means_nothing(
    every: int, options: dict[str, Any], message: str, runs: Runs, tiny_model: Path
) -> None:
    config = config_of(tiny_model, runs.folder, "new", rebase_every=every, **options)
    with pytest.raises(ConfigError, match=message):
        prepare(load_run_config(config), 1)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "lion", "adafactor", "muon"])
def test_with_other_optimizers(optimizer: str, runs: Runs, tiny_model: Path) -> None:
    run = train(config_of(tiny_model, runs.folder, optimizer, optimizer=optimizer))
    assert read_adapter(str(run / "adapter")).r == 3 * R
    found = read_checkpoint(checkpoint_path(run, EVERY + 1))
    assert isinstance(found, Checkpoint)
    assert found.optimizer_scalars.get("step", 1) == 1, "of those that count their steps"


@pytest.mark.slow
def test_on_a_4_bit_base_in_bf16(runs: Runs, tiny_model: Path) -> None:
    """What is kept is what the model computes with: re-basing at eta 0 would change no bit."""
    options = {"load_in_4bit": True, "dtype": "bf16"}
    run = train(config_of(tiny_model, runs.folder, "4 bits", **options))
    losses = {row["step"]: row["eval_loss"] for row in metrics(run) if row.get("stage") == "rebase"}
    assert [*losses] == [2, 4]
    adapters = [read_adapter(str(checkpoint_path(run, step))) for step in (4, 5)]
    for layer in adapters[0].layers:
        before, after = (adapter.pair(layer) for adapter in adapters)
        kept = product(LoraPair(after.A[R:], after.B[:, R:]))
        assert (kept - product(before)).norm() <= 2**-8 * kept.norm(), "R rounded to bf16"


@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_experts(family: str, tiny_family: Callable[[str], Path], tmp_path: Path) -> None:
    """Every expert keeps its own; PEFT loads them, and a checkpoint is read as the adapter."""
    model = tiny_family(family)
    run = train(config_of(model, tmp_path, "run", r=8, expert_r=4, lr=1e-2, max_steps=4))
    trained = next(row["eval_loss"] for row in metrics(run) if row.get("stage") == "trained")
    tokenizer = Base(str(model)).tokenizer
    held_out = prepare(load_run_config(config_of(model, tmp_path, "new")), 1).data.held_out
    assert held_out is not None
    batch = collate(held_out.examples, tokenizer.pad_token_id)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        tuned = PeftModel.from_pretrained(base, run / "adapter").eval()
        assert own_loss(tuned, batch).item() == pytest.approx(trained, rel=1e-4)
    last, saved = read_adapter(str(checkpoint_path(run, 4))), read_adapter(str(run / "adapter"))
    assert saved.experts
    for layer in saved.layers:
        assert saved.rank_of(layer) == last.rank_of(layer) == (8 if layer in saved.experts else 16)
    for layer, update in dense(saved).items():
        torch.testing.assert_close(product(last.pair(layer)), update, atol=1e-6, rtol=1e-5)

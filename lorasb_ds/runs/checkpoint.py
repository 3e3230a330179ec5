"""Write and find checkpoints: R and its training's state, for any number of processes.

    checkpoints/index.json                     a list of them, for people and tools
    checkpoints/step-00000100/
        state.safetensors     R and its optimizer's state, whole, fp32; every rank's generators
        trainer.json          progress, and what the run was made from
        SHA256SUMS            of both; `sha256sum -c` reads it

A checkpoint is written under another name, fsynced and renamed: it is complete or not there. An
earlier one of the same step is step-00000100.old meanwhile, and gets its name back if the new one
does not come. It has a few megabytes for a 7B model; A and B are stored once, in the run's
basis.safetensors.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import (
    ADAPTER,
    CHECKPOINT_FILES,
    CHECKPOINT_INDEX,
    CHECKPOINT_PREFIX,
    CHECKPOINTS,
    REBASED,
    STATE_FILE,
    TRAINER_FILE,
    resumed_run,
)
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.files import SUMS_FILE, check_sums, publish, write_json, write_sums
from lorasb_ds.system.safetensors_writer import save_tensors

FORMAT = 1
OLD = ".old"  # ends the name of a checkpoint that is being replaced


@dataclass
class TrainerState:
    """How far a run is. ``step`` is also the data's position: batches are a function of it."""

    step: int = 0  # optimizer steps done or skipped
    updates: int = 0  # steps done: the schedule's position
    skipped_in_a_row: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    evals_since_best: int = 0
    evaluated_at: int = -1  # step
    finished: bool = False  # all steps are done, or early stopping has ended them

    def take_loss(self, loss: float, threshold: float = 0.0) -> bool:
        """Note an evaluation's loss; return whether it is a new best.

        Args:
            threshold: a best that is better by no more than this does not end the wait for one.
        """
        best, self.evals_since_best = self.best_loss, self.evals_since_best + 1
        if not math.isfinite(loss) or (best is not None and loss >= best):
            return False
        self.best_step, self.best_loss = self.step, loss
        if best is None or best - loss > threshold:
            self.evals_since_best = 0
        return True


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint without its tensors."""

    path: Path
    state: TrainerState
    made_from: dict[str, Any]
    options: dict[str, Any]  # of the run that wrote it; they may change
    world_size: int
    optimizer_scalars: dict[str, float]
    loss_scale: dict[str, float]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Load the tensors of state.safetensors, on the CPU."""
        return load_file(self.path / STATE_FILE)


@dataclass(frozen=True)
class Resume:
    """Where a run continues: a folder with a finished init, and its checkpoint if it has one."""

    folder: Path
    checkpoint: Checkpoint | None
    warnings: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        return self.checkpoint.state.step if self.checkpoint else 0


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any], step: int
) -> int:
    """Write ``checkpoints/step-N``. Not collective: one process calls it.

    Args:
        tensors: for state.safetensors.
        content: for trainer.json.
    Returns:
        Its size in bytes.
    Raises:
        OSError: if it cannot be written; nothing of it is left then, and one of the same step that
            was there is there still.
    """
    path = checkpoint_path(folder, step)
    aside, old = (path.with_name(path.name + suffix) for suffix in (".tmp", OLD))
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_tensors(aside / STATE_FILE, tensors, {"format": "pt"})
        write_json(aside / TRAINER_FILE, {"format": FORMAT, **content})
        write_sums(aside, CHECKPOINT_FILES)
        size = sum(file.stat().st_size for file in aside.iterdir())
        if path.exists():  # of the same step: a finished run that continues
            shutil.rmtree(old, ignore_errors=True)  # of an earlier kill
            path.replace(old)
        publish(aside, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError:
        restore_replaced(folder)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return size


def restore_replaced(folder: Path) -> None:
    """Give back their names to checkpoints whose replacement never came. Not collective.

    Every rank may call it, in any order: a rename is done by one of them, and seen by all.
    """
    for old in (folder / CHECKPOINTS).glob(f"{CHECKPOINT_PREFIX}*{OLD}"):
        if not (path := old.with_suffix("")).exists():
            with suppress(OSError):  # another rank has done it
                old.replace(path)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the checkpoint's folder in a run's folder."""
    return folder / CHECKPOINTS / f"{CHECKPOINT_PREFIX}{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of a ``checkpoint_path``."""
    return int(path.name.removeprefix(CHECKPOINT_PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """List all folders with a checkpoint's name, complete or not, oldest first."""
    found = (folder / CHECKPOINTS).glob(f"{CHECKPOINT_PREFIX}*")
    named = [path for path in found if path.name.removeprefix(CHECKPOINT_PREFIX).isdecimal()]
    return sorted(named, key=step_of)


def tidy(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Remove old checkpoints and what a crash has left; then write ``index.json``."""
    restore_replaced(folder)
    for path in (folder / CHECKPOINTS).glob("*"):
        if path.is_dir() and path.suffix in (".tmp", OLD):
            shutil.rmtree(path, ignore_errors=True)
    paths = list_checkpoints(folder)
    keep = {*paths[-keep_last:]}
    if best_step is not None:
        keep.add(checkpoint_path(folder, best_step))
    for path in paths:
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)
    kept = [path for path in paths if path in keep]
    listed = [{"step": step_of(path), "folder": path.name} for path in kept]
    write_json(
        folder / CHECKPOINTS / CHECKPOINT_INDEX, {"checkpoints": listed, "best_step": best_step}
    )


def read_checkpoint(path: Path) -> Checkpoint | str:
    """Read a checkpoint; return what is wrong if it is not complete."""
    problem = check_sums(path, CHECKPOINT_FILES)
    if problem is not None:
        return problem
    try:
        content = json.loads((path / TRAINER_FILE).read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            return "it was written by another version"
        return Checkpoint(path, TrainerState(**content.pop("progress")), **content)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return f"{TRAINER_FILE} lacks fields of a checkpoint, or has others"


def find_resume(config: RunConfig) -> Resume | None:
    """Find what ``--resume`` continues: the newest complete checkpoint, or the named one.

    A kill may have left it under another name: it gets its own back.

    Returns:
        None where there is nothing to continue: the run starts anew.
    Raises:
        ConfigError: if a folder or checkpoint that was named cannot be used.
    """
    if config.resume is None:
        return None
    assert config.output_dir is not None, "check_output_dir has set it"
    option, folder = f"--resume {config.resume}", Path(config.output_dir)
    restore_replaced(folder)
    candidates, exact = list_checkpoints(folder), False
    if config.resume != "auto":
        source, named = resumed_run(config.resume), Path(config.resume)
        if source.resolve() != folder.resolve():
            raise ConfigError(
                f"{option} continues in {source}. Leave out --output-dir {folder}; to try other "
                "options from its basis, start a new run with --init-from."
            )
        exact = named.resolve() != source.resolve()
        candidates = [named] if exact else candidates
    warnings: list[str] = []
    for path in reversed(candidates):
        found = read_checkpoint(path)
        if isinstance(found, Checkpoint):
            return Resume(folder, found, warnings)
        if exact:
            raise ConfigError(f"{option}: {found}. Name another one, or the run's folder.")
        warnings.append(f"checkpoint {path.name} is skipped: {found}")
    if (folder / SUMS_FILE).is_file():  # written when the init is done
        return Resume(folder, None, warnings)
    if config.resume != "auto" or candidates or (folder / ADAPTER).exists():
        raise ConfigError(
            f"{option}: the run has no complete checkpoint and no finished init to continue from. "
            f"Start it anew, with --overwrite --output-dir {folder}."
        )
    return None


def check_same_run(option: str, checkpoint: Checkpoint, made_from: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        ConfigError: says what differs.
    """
    differ = [
        what if _is_hash(value) else f"{what} (the checkpoint has {theirs}, this run {value})"
        for what in {**made_from, **checkpoint.made_from}
        if (theirs := checkpoint.made_from.get(what)) != (value := made_from.get(what))
    ]
    if differ:
        raise ConfigError(
            f"{option}: {checkpoint.path.name} is of another run. What differs: "
            f"{'; '.join(differ)}. Give the options of that run (see its run.json), or start "
            "a new run in another --output-dir."
        )


def changed_options(checkpoint: Checkpoint, options: Mapping[str, Any]) -> list[str]:
    """Describe the options that may change and have changed."""
    return [
        name if _is_hash(value) else f"{name} {checkpoint.options[name]} -> {value}"
        for name, value in options.items()
        if name in checkpoint.options and checkpoint.options[name] != value
    ]


def set_newer_aside(folder: Path, step: int) -> list[str]:
    """Rename checkpoints after the step that a run continues from, and return their new names.

    So are the bases that they were trained in, which the run makes again.
    """
    rebased = [path for path in (folder / REBASED).glob(f"{CHECKPOINT_PREFIX}*") if not path.suffix]
    newer = [path for path in list_checkpoints(folder) if step_of(path) > step]
    newer += [path for path in sorted(rebased) if step_of(path) >= step]
    moved = []
    for path in newer:
        aside = path.with_name(path.name + ".superseded")
        for earlier in (aside, path.with_name(path.name + OLD)):  # which would take its name
            shutil.rmtree(earlier, ignore_errors=True)
        path.replace(aside)
        moved.append(f"{path.parent.name}/{aside.name}")
    return moved


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64

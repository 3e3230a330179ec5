"""The updates in earlier bases of a run that is re-based, as a checkpoint of it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from lorasb_ds.config.run_layout import BASIS_FILE, rebased_folder, rebasing_steps
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.expert_layers import split_basis
from lorasb_ds.export.stored_adapter import Factors
from lorasb_ds.init.basis import stored_digests
from lorasb_ds.models.checkpoint_files import StoredTensor, read_header
from lorasb_ds.runs.checkpoint import Checkpoint

KEPT_R = ".kept_R"  # in a basis that --rebase-every has made: R of the one before


def read_bases(
    folder: Path, found: Checkpoint, run: Path, every: Any
) -> list[dict[str, StoredTensor]]:
    """Return the tensors of each basis of a run until a checkpoint.

    Args:
        folder: of the checkpoint.
        every: ``rebase_every`` of run.json.
    Raises:
        ConfigError: if they are not those that the checkpoint was trained in.
    """
    every, step = every or None, found.state.step
    if not all(isinstance(n, int) and n >= 0 for n in (every or 1, step)):
        raise ConfigError(f"{folder}: step or rebase_every is no number of steps. Fetch it again.")
    rebased_after, tensors = rebasing_steps(every, step), []
    for basis in chain([run], (rebased_folder(run, after) for after in rebased_after)):
        tensors.append(read_header(basis / BASIS_FILE, str(basis)))  # ends where there is none
    digests = stored_digests(run, rebased_after)
    digests.pop("basis")  # which is made once
    if differ := [what for what, digest in digests.items() if found.made_from.get(what) != digest]:
        raise ConfigError(
            f"{folder}: the {' and the '.join(differ)} of its run has been made again since. Name "
            "a checkpoint that is not set aside."
        )
    return tensors


def add_kept(
    layers: dict[str, Factors], bases: Sequence[Mapping[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """Give layers the updates in all bases but the last, whose tensors are returned by name."""
    stored: dict[str, StoredTensor] = {}
    for number, (basis, after) in enumerate(pairwise(bases)):
        whole = {key: t for key, t in basis.items() if key.endswith((".lora_A", ".lora_B"))}
        R = {key.removesuffix(KEPT_R): t for key, t in after.items() if key.endswith(KEPT_R)}
        whole |= {f"{name}.lora_R": tensor for name, tensor in R.items()}
        prefix = f"kept {number}: "
        stored |= {f"{prefix}{key}": tensor for key, tensor in split_basis(whole)[0].items()}
        for name, factors in layers.items():
            keys = tuple(f"{prefix}{name}.lora_{factor}" for factor in "ABR")
            layers[name] = replace(factors, kept=(*factors.kept, keys))
    return stored

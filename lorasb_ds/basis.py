"""The result of an init on disk: what it was made from, and taking it up again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from lorasb_ds import zero
from lorasb_ds.adapter import LoraSBLinear, Shapes
from lorasb_ds.base_files import weights_digest
from lorasb_ds.batches import Sample
from lorasb_ds.config import ConfigError, RunConfig
from lorasb_ds.files import SUMS_FILE, check_sums, save_tensors, write_json, write_sums
from lorasb_ds.init_report import InitReport, LayerInit, Step
from lorasb_ds.initialize import Basis, fill_factors
from lorasb_ds.step import choose_step

BASIS_FORMAT = "3"
BASIS_FILE, REPORT_FILE = "basis.safetensors", "init.json"


def fingerprint(config: RunConfig, targets: Shapes, rows_digest: str) -> dict[str, str]:
    """All that a basis depends on but its rank, by the name under which a difference is told.

    Args:
        rows_digest: of the tokenized rows that the gradient is taken of.
    """
    return {
        "basis format": BASIS_FORMAT,
        "model files": weights_digest(config.model),
        "--load-in-4bit": str(config.load_in_4bit),
        "--load-in-8bit": str(config.load_in_8bit),
        "--dtype": config.dtype,
        "target layers": hashlib.sha256(json.dumps(targets).encode()).hexdigest(),
        "rows of the init sample (--data, --init-samples, --seed, --max-length, --loss-on, …)": (
            rows_digest
        ),
        "--init-update": config.init_update,
        "--seed": str(config.seed),
    }


def save_basis(
    folder: Path, basis: Basis, report: InitReport, made_from: Mapping[str, str]
) -> None:
    """Write ``init.json``, then ``basis.safetensors``: with their ``SHA256SUMS`` the init is done.

    It holds ``<layer>.lora_A`` (r, in) and ``.lora_B`` (out, r) in the run's dtype, and in fp32
    ``.lora_R`` (r, r), ``.S`` and ``.slopes`` (r,), the singular values and ``LayerInit.slopes``.
    """
    content = asdict(report)
    tensors = dict(basis)
    for name, layer in content["layers"].items():
        tensors[f"{name}.lora_R"] = report.layers[name].R(report.step.init_lr)
        tensors[f"{name}.S"] = torch.tensor(layer.pop("spectrum"))
        tensors[f"{name}.slopes"] = torch.tensor(layer.pop("slopes"))
    write_json(folder / REPORT_FILE, content)
    metadata = {"format": "pt", "made_from": json.dumps(dict(made_from), sort_keys=True)}
    save_tensors(folder / BASIS_FILE, tensors, metadata)
    write_sums(folder, (BASIS_FILE, REPORT_FILE))


def check_basis(
    folder: Path, option: str, r: int, made_from: Mapping[str, str], *, may_cut: bool
) -> InitReport:
    """Refuse a basis that this run's settings would not have given.

    Args:
        option: by which the folder was named, for messages.
        r: of the run.
        may_cut: r may be smaller than that of the basis.
    Returns:
        What the init found, cut to r.
    Raises:
        ConfigError: what is missing or differs.
    """
    for file in (BASIS_FILE, REPORT_FILE):
        if not (folder / file).is_file():
            raise ConfigError(
                f"{option}: there is no {file} in it. Name the output folder of a `lorasb init` or "
                "`lorasb train` whose init has finished."
            )
    try:
        with safe_open(folder / BASIS_FILE, "pt") as file:
            metadata = file.metadata() or {}
            names = [name for name in file.keys() if name.endswith(".S")]  # noqa: SIM118
            r_max = min(file.get_slice(name).get_shape()[0] for name in names)
        theirs = json.loads(metadata["made_from"])
        report = _read_report(folder, r)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{option}: {BASIS_FILE} and {REPORT_FILE} are not a basis of this version. Compute it "
            "again by `lorasb init`."
        ) from error
    differ = [what for what, value in made_from.items() if theirs.get(what) != value]
    if differ:
        raise ConfigError(
            f"{option} was made from something else: {', '.join(differ)} differ. Give the options "
            f"that it was made with (its run.json has them), or leave {option.split()[0]} out."
        )
    if r < r_max and not may_cut:
        raise ConfigError(
            f"--r {r} is not that of the run, {r_max}. To cut its basis to a smaller r, start a "
            f"new run with --init-from {folder}."
        )
    if r > r_max:
        raise ConfigError(
            f"--r {r} is larger than the basis of {option}, which has r = {r_max}. A "
            "smaller r is cut from it exactly; for a larger one compute it again."
        )
    return report


def _read_report(folder: Path, r: int) -> InitReport:
    """What a stored init found, cut to its first r directions, which is exact."""
    content = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    with safe_open(folder / BASIS_FILE, "pt") as file:
        layers = {
            name: _cut(
                layer,
                file.get_tensor(f"{name}.S").tolist(),
                file.get_tensor(f"{name}.slopes").tolist(),
                r,
            )
            for name, layer in content.pop("layers").items()
        }
    return InitReport(**content | {"step": Step(**content["step"])}, layers=layers)


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a finished init; None if they are as they were written."""
    return check_sums(folder, (BASIS_FILE, REPORT_FILE))


def stored_digest(folder: Path) -> str:
    """SHA-256 of the basis, as it was when it was written."""
    return (folder / SUMS_FILE).read_text(encoding="utf-8").split()[0]


def put_back(adapters: Mapping[str, LoraSBLinear], folder: Path, report: InitReport) -> None:
    """Fill A, B and R as the init left them. Collective; rank 0 reads.

    Args:
        report: of ``check_basis``, the same on every rank.
    """
    _fill_factors_from(folder, adapters)
    for name, adapter in adapters.items():
        zero.fill_trainable(adapter.lora_R, report.layers[name].R(report.step.init_lr))


def _fill_factors_from(folder: Path, adapters: Mapping[str, LoraSBLinear]) -> Basis:
    """A and B of an earlier init, cut to the adapters' r. Collective; rank 0 reads."""
    basis: Basis = {}
    with ExitStack() as stack:
        file: Any = None
        if zero.rank() == 0:
            file = stack.enter_context(safe_open(folder / BASIS_FILE, "pt"))
        for name, adapter in adapters.items():
            A = B = None
            if file is not None:
                A = file.get_slice(f"{name}.lora_A")[: adapter.r]
                B = file.get_slice(f"{name}.lora_B")[:, : adapter.r]
            basis |= fill_factors(name, adapter, A, B)
    return basis


def _cut(scalars: dict[str, Any], S: list[float], slopes: list[float], r: int) -> LayerInit:
    share = sum(s * s for s in S[:r]) / sum(s * s for s in S) if any(S) else 1.0
    scalars["captured_energy"] *= share
    return LayerInit(**scalars, spectrum=tuple(S[:r]), slopes=tuple(slopes[:r]))


def take_up(
    engine: Any,
    adapters: Mapping[str, LoraSBLinear],
    folder: str,
    report: InitReport,
    probe: Sample,
    init_lr: float | Literal["auto"] | None,
) -> tuple[InitReport, Basis]:
    """Fill A, B and R from an earlier init, cut to the adapters' r. Collective; rank 0 reads.

    Args:
        report: of ``check_basis``, the same on every rank.
        init_lr: eta, where another one than the stored is wanted.
    Returns:
        As ``initialize``.
    """
    basis = _fill_factors_from(Path(folder), adapters)
    step = choose_step(
        engine, adapters, report.layers, probe, report.step.init_lr if init_lr is None else init_lr
    )
    return replace(report, step=step), basis

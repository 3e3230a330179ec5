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

from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.config.methods import DEFAULT_METHOD, METHODS, PEFT_PREFIX
from lorasb_ds.config.resolve import read_peft_file
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import BASIS_FILE, INIT_REPORT
from lorasb_ds.data.batch import Sample
from lorasb_ds.distributed import zero
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.factors import Basis, Recipe, fill_factors
from lorasb_ds.init.gradients import branches_off
from lorasb_ds.init.init_report import InitReport, LayerInit, Step
from lorasb_ds.init.step_size import choose_step, measure_step
from lorasb_ds.models.linear_layers import Shapes
from lorasb_ds.system.files import SUMS_FILE, check_sums, write_json, write_sums
from lorasb_ds.system.safetensors_writer import save_tensors

BASIS_FORMAT = "3"
SCALING = "scaling (--lora-alpha, --r)"
PEFT_FILE = "--method peft: (its file)"


def fingerprint(
    config: RunConfig, base_digest: str, targets: Shapes, rows_digest: str
) -> dict[str, Any]:
    """All that a basis depends on but its rank, by the name under which a difference is told.

    Args:
        base_digest: ``Base.digest``.
        rows_digest: of the tokenized rows that the gradient is taken of.
    """
    return {
        "basis format": BASIS_FORMAT,
        "model files": base_digest,
        "--load-in-4bit": str(config.load_in_4bit),
        "--load-in-8bit": str(config.load_in_8bit),
        "--dtype": config.dtype,
        "target layers": hashlib.sha256(json.dumps(targets).encode()).hexdigest(),
        **_sample_of(config, rows_digest),
        "--seed": str(config.seed_of_init),
        **_method_of(config),
    }


def _sample_of(config: RunConfig, rows_digest: str) -> dict[str, str]:
    """What a basis owes to a gradient, if to any."""
    method = METHODS.get(config.method)
    if method is None or not method.needs_gradient:
        return {}
    return {
        "rows of the init sample (--data, --init-samples, --seed, --max-length, --loss-on, …)": (
            rows_digest
        ),
        "--init-update": Recipe.of(config).update,
    }


def _method_of(config: RunConfig) -> dict[str, Any]:
    """What the basis of another method than LoRA-SB depends on beside."""
    if config.method == DEFAULT_METHOD:
        return {}
    if config.method.startswith(PEFT_PREFIX):
        content = json.dumps(read_peft_file(config.method), sort_keys=True)
        return {PEFT_FILE: hashlib.sha256(content.encode()).hexdigest()}
    method = METHODS[config.method]
    return {
        "--method": config.method,
        SCALING: method.scale(config.r, config.lora_alpha),
        "--gamma": config.gamma or method.gamma,
    }


def save_basis(
    folder: Path, basis: Basis, report: InitReport, made_from: Mapping[str, Any]
) -> None:
    """Write ``init.json``, then ``basis.safetensors``: with their ``SHA256SUMS`` the init is done.

    It holds the factors that the run starts from, frozen ones in its dtype and trained ones in
    fp32: ``<layer>.lora_A`` (r, in), ``.lora_B`` (out, r), and ``.lora_R`` (r, r) or
    ``.offset_A`` and ``.offset_B``; and ``.S`` and ``.slopes``, the singular values and
    ``LayerInit.slopes``, where something was decomposed. Of PEFT's methods: what PEFT has put into
    the model, by its names there.
    """
    content = asdict(report)
    tensors = dict(basis)
    for name, layer in content["layers"].items():
        if report.step.init_lr is not None:
            tensors[f"{name}.lora_R"] = report.layers[name].R(report.step.init_lr)
        tensors[f"{name}.S"] = torch.tensor(layer.pop("spectrum"))
        tensors[f"{name}.slopes"] = torch.tensor(layer.pop("slopes"))
    write_json(folder / INIT_REPORT, content)
    metadata = {"format": "pt", "made_from": json.dumps(dict(made_from), sort_keys=True)}
    save_tensors(folder / BASIS_FILE, tensors, metadata)
    write_sums(folder, (BASIS_FILE, INIT_REPORT))


def check_basis(
    folder: Path, option: str, r: int | None, made_from: Mapping[str, Any], uncut: str | None
) -> InitReport:
    """Refuse a basis that this run's settings would not have given.

    Args:
        option: by which the folder was named, for messages.
        r: of the run; None where PEFT's configuration says what there is.
        uncut: what to do about an r that is smaller than that of the basis; None: it is cut.
    Returns:
        What the init found, cut to r.
    Raises:
        ConfigError: what is missing or differs.
    """
    for file in (BASIS_FILE, INIT_REPORT):
        if not (folder / file).is_file():
            raise ConfigError(
                f"{option}: there is no {file} in it. Name the output folder of a `lorasb init` or "
                "`lorasb train` whose init has finished."
            )
    try:
        with safe_open(folder / BASIS_FILE, "pt") as file:
            metadata = file.metadata() or {}
            names = [name for name in file.keys() if name.endswith(".lora_A")]  # noqa: SIM118
            ranks = [file.get_slice(name).get_shape()[0] for name in names]
        theirs = json.loads(metadata["made_from"])
        report = _read_report(folder, r, min(ranks) if r is not None else None)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{option}: {BASIS_FILE} and {INIT_REPORT} are not a basis of this version. Compute it "
            "again by `lorasb init`."
        ) from error
    # What only one of the two depends on is a difference, too.
    differ = [what for what in {**made_from, **theirs} if theirs.get(what) != made_from.get(what)]
    if differ:
        raise ConfigError(
            f"{option} was made from something else: {', '.join(differ)} differ. Give the options "
            f"that it was made with (its run.json has them), or leave {option.split()[0]} out."
        )
    if r is None:
        return report
    r_max = min(ranks)
    if r < r_max and uncut is not None:
        raise ConfigError(f"--r {r} is not that of the run, {r_max}. {uncut}")
    if r > r_max:
        raise ConfigError(
            f"--r {r} is larger than the basis of {option}, which has r = {r_max}. A "
            "smaller r is cut from it exactly; for a larger one compute it again."
        )
    return report


def _read_report(folder: Path, r: int | None, r_max: int | None) -> InitReport:
    """What a stored init found, cut to the first r of r_max directions, which is exact."""
    cut = r if r is not None and r_max is not None and r < r_max else None
    content = json.loads((folder / INIT_REPORT).read_text(encoding="utf-8"))
    with safe_open(folder / BASIS_FILE, "pt") as file:
        layers = {
            name: _cut(
                layer,
                file.get_tensor(f"{name}.S").tolist(),
                file.get_tensor(f"{name}.slopes").tolist(),
                cut,
            )
            for name, layer in content.pop("layers").items()
        }
    return InitReport(**content | {"step": Step(**content["step"])}, layers=layers)


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a finished init; None if they are as they were written."""
    return check_sums(folder, (BASIS_FILE, INIT_REPORT))


def stored_digest(folder: Path) -> str:
    """SHA-256 of the basis, as it was when it was written."""
    return (folder / SUMS_FILE).read_text(encoding="utf-8").split()[0]


def put_back(folder: Path, adapters: Mapping[str, AdapterLinear]) -> Basis:
    """Fill all factors as an init left them, cut to the adapters' r. Collective; rank 0 reads."""
    basis: Basis = {}
    with ExitStack() as stack:
        file: Any = None
        if zero.rank() == 0:
            file = stack.enter_context(safe_open(folder / BASIS_FILE, "pt"))
        for name, adapter in adapters.items():
            factors = None
            if file is not None:
                factors = {
                    key: file.get_slice(f"{name}.{key}")[
                        tuple(slice(n) for n in adapter.factor_shape(key))
                    ]
                    for key in adapter.frozen + adapter.trained
                }
            basis |= fill_factors(name, adapter, factors)
    return basis


def _cut(scalars: dict[str, Any], S: list[float], slopes: list[float], r: int | None) -> LayerInit:
    share = sum(s * s for s in S[:r]) / sum(s * s for s in S) if any(S) else 1.0
    scalars["captured_energy"] *= share
    return LayerInit(**scalars, spectrum=tuple(S[:r]), slopes=tuple(slopes[:r]))


def take_up(
    engine: Any,
    adapters: Mapping[str, AdapterLinear],
    folder: str,
    report: InitReport,
    probe: Sample,
    init_lr: float | Literal["auto"] | None,
) -> tuple[InitReport, Basis]:
    """Fill all factors from an earlier init, cut to the adapters' r. Collective; rank 0 reads.

    Args:
        report: of ``check_basis``, the same on every rank.
        init_lr: eta, where another one than the stored is wanted.
    Returns:
        As ``initialize``.
    """
    basis = put_back(Path(folder), adapters)
    if report.step.init_lr is None:
        step = measure_step(engine, branches_off(adapters), probe)
    else:
        eta = report.step.init_lr if init_lr is None else init_lr
        step = choose_step(engine, adapters, report.layers, probe, eta)
    return replace(report, step=step), basis

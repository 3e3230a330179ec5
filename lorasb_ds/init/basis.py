"""The basis of a run on disk: check what it was made from, load it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from lorasb_ds.adapters.inject import disable_adapters
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.config.methods import DEFAULT_METHOD, METHODS, PEFT_PREFIX
from lorasb_ds.config.resolve import read_peft_file
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import BASIS_FILE, INIT_REPORT, rebased_folder
from lorasb_ds.data.batch import Sample
from lorasb_ds.distributed import zero
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.basis_file import EXPERT_TENSORS
from lorasb_ds.init.factors import Basis, InitSettings, fill_factors
from lorasb_ds.init.init_report import ExpertsInit, InitReport, InitStep, LayerInit
from lorasb_ds.init.step_size import choose_step, measure_step
from lorasb_ds.models.experts import ExpertShapes
from lorasb_ds.models.linear_layers import Shapes
from lorasb_ds.system.files import SUMS_FILE, check_sums

BASIS_FORMAT = "3"
SCALING_KEY = "scaling (--lora-alpha, --r)"
PEFT_FILE_KEY = "--method peft: (its file)"


def fingerprint(
    config: RunConfig,
    base_digest: str,
    targets: Shapes,
    rows_digest: str,
    experts: ExpertShapes | None = None,
    expert_r: int = 0,
) -> dict[str, Any]:
    """Return everything that a basis depends on, except its rank.

    The keys are what messages call a difference. They are stored with every basis: a new one makes
    the bases of earlier runs unusable.

    Args:
        base_digest: ``Base.digest``.
        rows_digest: of the tokenized rows that the gradient is computed on.
        experts, expert_r: projections of experts with an adapter, and its rank.
    """
    of_experts = {}
    if experts:
        digest = hashlib.sha256(json.dumps(experts).encode()).hexdigest()
        of_experts = {"projections of experts": digest, "--expert-r": str(expert_r)}
    return {
        "basis format": BASIS_FORMAT,
        "model files": base_digest,
        "--load-in-4bit": str(config.load_in_4bit),
        "--load-in-8bit": str(config.load_in_8bit),
        "--dtype": config.dtype,
        "target layers": hashlib.sha256(json.dumps(targets).encode()).hexdigest(),
        **_gradient_entries(config, rows_digest),
        "--seed": str(config.seed_of_init),
        **_method_entries(config),
        **of_experts,
    }


def _gradient_entries(config: RunConfig, rows_digest: str) -> dict[str, str]:
    """Return what the gradient depends on; {} if the method needs none."""
    method = METHODS.get(config.method)
    if method is None or not method.needs_gradient:
        return {}
    return {
        "rows of the init sample (--data, --init-samples, --seed, --max-length, --loss-on, …)": (
            rows_digest
        ),
        "--init-update": InitSettings.from_config(config).update,
    }


def _method_entries(config: RunConfig) -> dict[str, Any]:
    """Return what the basis of a method other than LoRA-SB depends on in addition."""
    if config.method == DEFAULT_METHOD:
        return {}
    if config.method.startswith(PEFT_PREFIX):
        content = json.dumps(read_peft_file(config.method), sort_keys=True)
        return {PEFT_FILE_KEY: hashlib.sha256(content.encode()).hexdigest()}
    method = METHODS[config.method]
    return {
        "--method": config.method,
        SCALING_KEY: method.scale(config.r, config.lora_alpha),
        "--gamma": config.gamma or method.gamma,
    }


@contextmanager
def open_basis(folder: Path, option: str) -> Iterator[Any]:
    """Open the file of a basis, whose report is there, too. Reading it in the block is covered.

    Args:
        option: the option and folder, for messages.
    Raises:
        ConfigError: if a file is missing, or cannot be read as a basis's.
    """
    for name in (BASIS_FILE, INIT_REPORT):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{option}: there is no {name} in it. Give the output folder of a `lorasb init` or "
                "`lorasb train` whose init has finished."
            )
    try:
        with safe_open(folder / BASIS_FILE, "pt") as file:
            yield file
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{option}: {BASIS_FILE} and {INIT_REPORT} are not a basis of this version. Compute it "
            "again with `lorasb init`."
        ) from error


def stored_ranks(file: Any) -> dict[str, int]:
    """Return the rank of each layer of an open basis; not of projections of experts."""
    keys = [name for name in file.keys() if name.endswith(".lora_A")]  # noqa: SIM118
    shapes = {key.removesuffix(".lora_A"): file.get_slice(key).get_shape() for key in keys}
    return {name: shape[0] for name, shape in shapes.items() if len(shape) == 2}


def check_basis(
    folder: Path,
    option: str,
    ranks: Mapping[str, int],
    made_from: Mapping[str, Any],
    uncut: str | None,
) -> InitReport:
    """Reject a basis that other settings than this run's have made.

    Args:
        option: the option and folder, for messages.
        ranks: layer -> its rank in this run; {} for PEFT's methods, whose configuration decides.
        made_from: this run's ``fingerprint``.
        uncut: the remedy to suggest if a rank is smaller than that of the basis; None: cut it.
    Returns:
        The stored report, cut to the ranks.
    Raises:
        ConfigError: naming what is missing or differs.
    """
    with open_basis(folder, option) as file:
        stored = stored_ranks(file)
        theirs = json.loads((file.metadata() or {})["made_from"])
        smaller = {n: r for n, r in ranks.items() if r < stored.get(n, r)}
        report = _read_report(folder, file, smaller)
    # A key that only one of the two has is a difference, too.
    differ = [what for what in {**made_from, **theirs} if theirs.get(what) != made_from.get(what)]
    if differ:
        raise ConfigError(
            f"{option} was made with other settings: {', '.join(differ)} differ. Give the options "
            f"that it was made with (its run.json has them), or leave {option.split()[0]} out."
        )
    if smaller and uncut is not None:
        name, r = next(iter(smaller.items()))
        raise ConfigError(f"--r {r} differs from the run's r = {stored[name]}. {uncut}")
    for name, r in ranks.items():
        if r > stored.get(name, r):
            raise ConfigError(
                f"--r {r} exceeds r = {stored[name]} of the basis of {option}. Give a smaller r, "
                "which is cut from it exactly, or compute a new basis."
            )
    return report


def _read_report(folder: Path, file: Any, cut_to: Mapping[str, int]) -> InitReport:
    """Read a stored report, cut to the first directions of some layers, which is exact."""
    content = json.loads((folder / INIT_REPORT).read_text(encoding="utf-8"))
    layers = {
        name: _cut(
            layer,
            file.get_tensor(f"{name}.S").tolist(),
            file.get_tensor(f"{name}.slopes").tolist(),
            cut_to.get(name),
        )
        for name, layer in content.pop("layers").items()
    }
    experts = {
        name: ExpertsInit(
            **scalars, **{key: file.get_tensor(f"{name}.{key}") for key in EXPERT_TENSORS}
        )
        for name, scalars in content.pop("experts", {}).items()
    }
    step = InitStep(**content.pop("step"))
    return InitReport(**content, step=step, layers=layers, experts=experts)


def damage(folder: Path) -> str | None:
    """Return what is wrong with the files of a finished init; None if they are undamaged."""
    return check_sums(folder, (BASIS_FILE, INIT_REPORT))


def stored_digests(run: Path, rebased_after: Iterable[int]) -> dict[str, str]:
    """Return the SHA-256 that the bases of a run had when they were written.

    Args:
        rebased_after: the steps after which the run was re-based.
    """
    folders = {"basis": run}
    for step in rebased_after:
        folders[f"basis of step {step}"] = rebased_folder(run, step)
    sums = {what: folder / SUMS_FILE for what, folder in folders.items()}
    return {
        what: file.read_text(encoding="utf-8").split()[0] if file.is_file() else "missing"
        for what, file in sums.items()
    }


def load_factors(
    folder: Path,
    adapters: Mapping[str, AdapterLinear],
    keep: Callable[[Basis], None] = lambda factors: None,
) -> None:
    """Fill all factors from a stored basis, cut to the adapters' r. Collective; rank 0 reads.

    Args:
        keep: is given each layer's factors, on rank 0; {} elsewhere.
    """
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
            keep(fill_factors(name, adapter, factors))


def _cut(scalars: dict[str, Any], S: list[float], slopes: list[float], r: int | None) -> LayerInit:
    share = sum(s * s for s in S[:r]) / sum(s * s for s in S) if any(S) else 1.0
    scalars["captured_energy"] *= share
    return LayerInit(**scalars, spectrum=tuple(S[:r]), slopes=tuple(slopes[:r]))


def load_basis(
    engine: Any,
    adapters: Mapping[str, AdapterLinear],
    folder: str,
    report: InitReport,
    probe: Sample,
    init_lr: float | Literal["auto"] | None,
    keep: Callable[[Basis], None],
) -> InitReport:
    """Fill all factors from an earlier init, cut to the adapters' r. Collective; rank 0 reads.

    Args:
        report: from ``check_basis``, the same on every rank.
        probe: the rows to measure losses on.
        init_lr: another eta than the stored one; None: the stored one.
        keep: as in ``initialize``.
    Returns:
        As ``initialize`` does.
    """
    load_factors(Path(folder), adapters, keep)
    if report.step.init_lr is None:
        step = measure_step(engine, disable_adapters(adapters), probe)
    else:
        eta = report.step.init_lr if init_lr is None else init_lr
        step = choose_step(engine, adapters, report.decompositions, probe, eta)
    return replace(report, step=step)

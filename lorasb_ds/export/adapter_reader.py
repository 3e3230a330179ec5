"""Read adapters of every kind of folder: PEFT's, a run's, a checkpoint's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasb_ds.adapters.peft_config import (
    PREFIX,
    check_plain,
    scale_of,
)
from lorasb_ds.adapters.peft_experts import REGISTERED, find_experts
from lorasb_ds.config.methods import DEFAULT_METHOD, METHODS, PEFT_PREFIX, Method
from lorasb_ds.config.paths import read_json
from lorasb_ds.config.run_layout import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASIS_FILE,
    RUN_JSON,
    STATE_FILE,
    TRAINER_FILE,
)
from lorasb_ds.config.stored_paths import ABSOLUTE, with_absolute_paths
from lorasb_ds.data.classification import Classes
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.expert_layers import Expert, split_basis, split_peft
from lorasb_ds.export.kept_updates import add_kept, read_bases
from lorasb_ds.export.stored_adapter import FLOATS, Factors, StoredAdapter, check_factors
from lorasb_ds.init.basis import SCALING_KEY
from lorasb_ds.models.checkpoint_files import StoredTensor, read_header
from lorasb_ds.runs.checkpoint import Checkpoint, list_checkpoints, read_checkpoint
from lorasb_ds.system.safetensors_writer import metadata_of

CONFIG_BYTES = 1 << 20  # at most


def read_adapter(path: str, *, with_head: bool = False) -> StoredAdapter:
    """Open the adapter of a run, of one of its checkpoints, or of a PEFT LoRA folder.

    A run without an adapter yet stands for its newest complete checkpoint.

    Args:
        with_head: take a classifier's, too, whose head the caller reads beside the layers.
    Raises:
        ConfigError: if the folder is none of them, broken, or not a plain LoRA.
    """
    try:
        found = _read(Path(path).expanduser().resolve())
    except (OSError, RuntimeError, ValueError) as error:  # impossible file names, unknown users
        raise ConfigError(f"{path} cannot be read: {error}. Name another folder.") from error
    if found is None:
        raise ConfigError(
            f"{path} is not an adapter. Name a run's folder, one of its checkpoints, or a PEFT "
            f"LoRA folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}."
        )
    if found.head and not with_head and found.classes is None:
        raise ConfigError(
            f"{path} is a classifier's, and does not say what its classes are; {RUN_JSON} of its "
            "run does. Name the run's folder."
        )
    if found.head and not with_head:
        raise ConfigError(
            f"{path} is a classifier's (--task-type sequence-classification): it has a head beside "
            "its layers, with which this cannot be done yet. `lorasb merge`, `lorasb eval "
            "--adapter` and PEFT (AutoModelForSequenceClassification) take it."
        )
    return found


def _read(folder: Path) -> StoredAdapter | None:
    if (folder / ADAPTER_CONFIG).is_file():
        return _peft_folder(folder)
    if (folder / TRAINER_FILE).is_file():
        return _checkpoint(folder, folder.parent.parent)
    if not (folder / RUN_JSON).is_file():
        return None
    if (folder / ADAPTER / ADAPTER_CONFIG).is_file():
        return _peft_folder(folder / ADAPTER)
    for found in reversed(list_checkpoints(folder)):
        if isinstance(read_checkpoint(found), Checkpoint):
            return _checkpoint(found, folder)
    raise ConfigError(
        f"{folder}: the run has no adapter and no complete checkpoint. Finish it by `lorasb train "
        f"--resume {folder}`."
    )


def read_init(adapter: StoredAdapter) -> StoredAdapter | None:
    """Open what an adapter was when its training began.

    Returns:
        None where its run has no basis, or one of PEFT's methods.
    Raises:
        ConfigError: if the basis is broken.
    """
    run = adapter.run
    if run is None or not (run / BASIS_FILE).is_file() or _is_pefts(adapter.run_config):
        return None
    stored, experts = split_basis(read_header(run / BASIS_FILE, str(run)))
    layers = _of_basis(stored, experts, run)
    check_factors(run, layers, stored)
    return StoredAdapter(run, run, adapter.run_config, {}, layers, stored)


def trained_on(adapter: StoredAdapter) -> str | None:
    """Return the ``Base.digest`` of the base that a run was trained on; None if not stored."""
    if adapter.run is None or not (adapter.run / BASIS_FILE).is_file():
        return None
    read_header(adapter.run / BASIS_FILE, str(adapter.run))
    digest = _made_from(adapter.run).get("model files")
    return digest if isinstance(digest, str) else None


def _made_from(run: Path) -> dict[str, Any]:
    """Return what a run's basis was made from; {} if it does not say."""
    try:
        found = json.loads(metadata_of(run / BASIS_FILE).get("made_from", "{}"))
    except (ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _method_of(run: Path) -> Method:
    """Return the method of a run; it is one of ``METHODS``."""
    method = METHODS.get(str(_made_from(run).get("--method", DEFAULT_METHOD)))
    if method is None:
        raise ConfigError(f"{run}: {BASIS_FILE} is of an unknown --method. Fetch it again.")
    return method


def _of_basis(
    stored: Mapping[str, StoredTensor], experts: Mapping[str, Expert], run: Path
) -> dict[str, Factors]:
    """Return the factors of a run's basis, with or without those of a checkpoint.

    Args:
        experts: layer -> the expert that it is, of ``split_basis``.
    """
    method, scale = _method_of(run), _made_from(run).get(SCALING_KEY, 1.0)
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ConfigError(f"{run}: {BASIS_FILE} has {scale!r} as its scaling. Fetch it again.")
    layers = {}
    for name in (key.removesuffix(".lora_A") for key in stored if key.endswith(".lora_A")):
        layers[name] = Factors(
            f"{name}.lora_A",
            f"{name}.lora_B",
            f"{name}.lora_R" if method.trains_r else None,
            float(scale),
            (f"{name}.offset_A", f"{name}.offset_B") if method.offset else None,
            experts.get(name),
        )
    return layers


def _is_pefts(run_config: Mapping[str, Any]) -> bool:
    return str(run_config.get("method")).startswith(PEFT_PREFIX)


def _run_config(run: Path) -> dict[str, Any]:
    content = read_json(str(run / RUN_JSON), "RUN")
    config = content.get("config")
    if not isinstance(config, dict):
        return {}
    return config if content.get(ABSOLUTE) else with_absolute_paths(config)


def _checkpoint(folder: Path, run: Path) -> StoredAdapter:
    """Open R of a checkpoint with the A and B that it was trained in, and what was kept before."""
    found = read_checkpoint(folder)
    if isinstance(found, str):
        raise ConfigError(f"{folder}: {found}. Name another one.")
    if _is_pefts(_run_config(run)):
        raise ConfigError(
            f"{folder} is of a method of PEFT's, whose checkpoints only --resume reads. Finish the "
            "run: PEFT loads its adapter."
        )
    bases = read_bases(folder, found, run, _run_config(run).get("rebase_every"))
    state = read_header(folder / STATE_FILE, str(folder))
    trained = tuple(f".{factor}" for factor in _method_of(run).trained)
    whole = {key: t for key, t in bases[-1].items() if not key.endswith(trained)} | state
    stored, experts = split_basis(whole)
    layers = _of_basis(stored, experts, run)
    stored |= add_kept(layers, bases)
    check_factors(folder, layers, stored)
    head, classes = _head_of_run(run)
    in_state = {name: name for name in head}
    _check_head(folder, in_state, stored)
    return StoredAdapter(folder, run, _run_config(run), {}, layers, stored, in_state, classes)


def _head_of_run(run: Path) -> tuple[list[str], Classes | None]:
    """Return the parameters of the head that a run trains, and what it predicts; of a classifier.

    Raises:
        ConfigError: if run.json has something else than lists of text there.
    """
    content = read_json(str(run / RUN_JSON), "RUN")
    head, labels = content.get("head", []), content.get("labels")
    for found in (head, labels or []):
        if not isinstance(found, list) or not all(isinstance(value, str) for value in found):
            raise ConfigError(f"{run}: head and labels in {RUN_JSON} must be lists of text.")
    return head, None if labels is None else Classes(tuple(labels))


def _check_head(folder: Path, head: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> None:
    for name, key in head.items():
        if key not in stored or stored[key].dtype not in FLOATS:
            raise ConfigError(
                f"{folder}: {name} of the head is missing, or no floats. Fetch it again."
            )


def _peft_folder(folder: Path) -> StoredAdapter:
    if (folder / ADAPTER_CONFIG).stat().st_size > CONFIG_BYTES:
        raise ConfigError(f"{folder}: {ADAPTER_CONFIG} has more than 1 MiB. Is it a PEFT folder?")
    config = read_json(str(folder / ADAPTER_CONFIG), "ADAPTER")
    check_plain(folder, config)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = " adapter_model.bin is a pickle, which can run code, and is not read."
        has = pickled if (folder / "adapter_model.bin").exists() else ""
        raise ConfigError(f"{folder}: the folder has no {ADAPTER_WEIGHTS}.{has}")
    stored = read_header(folder / ADAPTER_WEIGHTS, str(folder))
    layers, head = {}, {}
    saved = config.get("modules_to_save") or []
    for key in stored:
        if any(f".{module}." in key for module in saved) and key.startswith(PREFIX):
            head[key.removeprefix(PREFIX)] = key
            continue
        name, _, leaf = key.rpartition(".lora_")
        if leaf not in ("A.weight", "B.weight") or not name.startswith(PREFIX):
            raise ConfigError(
                f"{folder}: {key} in {ADAPTER_WEIGHTS} is not a factor of a LoRA "
                f"({PREFIX}LAYER.lora_A.weight). Merge such an adapter by PEFT."
            )
        layer = name.removeprefix(PREFIX)
        keys = (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
        r = stored[keys[0]].shape[0] if keys[0] in stored and stored[keys[0]].shape else 1
        layers[layer] = Factors(*keys, scale=scale_of(folder, config, layer, r))
    check_factors(folder, layers, stored)
    rows = {name: stored[factors.A].shape[0] for name, factors in layers.items()}
    of_experts = {}
    for projection, experts in find_experts(folder, config, rows).items():
        if projection.rpartition(".")[2] not in REGISTERED:
            raise ConfigError(
                f"{folder}: {projection} in target_parameters is neither a projection of experts "
                "nor the weight of a layer with such a name. Merge such an adapter with PEFT."
            )
        whole = layers.pop(experts.layer)
        for expert, A in split_peft(projection, experts, stored[whole.A]).items():
            stored[key := f"{PREFIX}{expert.name}.lora_A.weight"] = A
            of_experts[expert.name] = Factors(key, whole.B, scale=experts.scale, expert=expert)
    if of_experts:
        check_factors(folder, of_experts, stored)
        layers |= of_experts
    in_run = folder.name == ADAPTER and (folder.parent / RUN_JSON).is_file()
    run = folder.parent if in_run else None
    run_config = _run_config(run) if run is not None else {}
    _check_head(folder, head, stored)
    classes = _head_of_run(run)[1] if run is not None else None
    return StoredAdapter(folder, run, run_config, config, layers, stored, head, classes)

"""LoRA adapters on disk, read a layer at a time: PEFT folders, finished runs, checkpoints.

Only safetensors and JSON are read, and what they say is checked before it is used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasb_ds.adapters.low_rank import LoraPair
from lorasb_ds.adapters.peft_config import (
    NARROWING,
    PREFIX,
    check_plain,
    scale_of,
)
from lorasb_ds.config.methods import DEFAULT_METHOD, METHODS, PEFT_PREFIX, Method
from lorasb_ds.config.paths import DEMO_MODEL, demo_model_dir, read_json
from lorasb_ds.config.run_layout import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASIS_FILE,
    RUN_JSON,
    STATE_FILE,
    TRAINER_FILE,
)
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.basis import SCALING_KEY
from lorasb_ds.models.checkpoint_files import StoredTensor, model_type_of, read_header
from lorasb_ds.models.streaming import TensorReader
from lorasb_ds.runs.checkpoint import Checkpoint, list_checkpoints, read_checkpoint
from lorasb_ds.system.safetensors_writer import metadata_of

CONFIG_BYTES = 1 << 20
FLOATS = ("F32", "F16", "BF16")
MAX_RANK = 1 << 16
# What torch and people call modules; no control characters, which a console would obey.
LAYER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,512}")


@dataclass(frozen=True)
class Factors:
    """Where a layer's update lies: ``ΔW = scale · (B R A - B0 A0)``; R is I where there is none,
    and B0 A0 is 0.
    """

    A: str
    B: str
    R: str | None = None
    scale: float = 1.0
    offset: tuple[str, str] | None = None  # of A0 and B0

    @property
    def all(self) -> list[str]:
        return [key for key in (self.A, self.B, self.R, *(self.offset or ())) if key is not None]


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter on disk.

    Attributes:
        path: the folder that was read.
        run: the folder of the run that it is of, if it lies in one.
        run_config: the options of that run; {} without one.
        peft_config: adapter_config.json; {} where R was read from a checkpoint.
        layers: layer -> its factors, as names in ``stored``.
        shapes: layer -> (out, in).
    """

    path: Path
    run: Path | None
    run_config: Mapping[str, Any]
    peft_config: Mapping[str, Any]
    layers: Mapping[str, Factors]
    stored: Mapping[str, StoredTensor]

    @property
    def base_model(self) -> str | None:
        """As the run names it, or else as the adapter does."""
        named = self.run_config.get("model") or self.peft_config.get("base_model_name_or_path")
        return named if isinstance(named, str) else None

    @property
    def base_path(self) -> str | None:
        """The same for other tools, to which "demo" means nothing."""
        named = self.peft_config.get("base_model_name_or_path") or self.base_model
        named = str(demo_model_dir()) if named == DEMO_MODEL else named
        return named if isinstance(named, str) else None

    @property
    def model_type(self) -> str | None:
        """Of the base: as the run says, or else its config.json; None where neither is here."""
        if self.run is not None:
            named = read_json(str(self.run / RUN_JSON), "RUN").get("model_type")
            if isinstance(named, str):
                return named
        return next(filter(None, map(model_type_of, (self.base_model, self.base_path))), None)

    @property
    def target_modules(self) -> list[str]:
        """As PEFT takes them: short names where they mean exactly the layers, else all names."""
        named = self.peft_config.get("target_modules")
        narrowed = any(self.peft_config.get(field) for field in NARROWING)
        if isinstance(named, list) and all(isinstance(n, str) for n in named) and not narrowed:
            return named
        return list(self.layers)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        stored = self.stored
        return {n: (stored[f.B].shape[0], stored[f.A].shape[1]) for n, f in self.layers.items()}

    @property
    def r(self) -> int:
        """The largest rank of a layer."""
        return max(self.rank_of(name) for name in self.layers)

    def rank_of(self, name: str) -> int:
        """Of a layer's factors; those of an offset are added."""
        factors = self.layers[name]
        keys = [factors.A, *(factors.offset or ())[:1]]
        return sum(self.stored[key].shape[0] for key in keys)

    def pair(self, name: str) -> LoraPair:
        """A layer's update, fp32 on the CPU.

        Raises:
            ConfigError: if the file cannot be read, or a number is not finite.
        """
        factors = self.layers[name]
        A, B = self.read(factors.A), self.read(factors.B)
        if factors.R is not None:
            B = B @ self.read(factors.R)
        if factors.offset is not None:
            first_A, first_B = (self.read(key) for key in factors.offset)
            A, B = torch.cat([A, first_A]), torch.cat([B, -first_B], 1)
        if factors.scale != 1:
            B = B * factors.scale
        if not B.isfinite().all():
            raise ConfigError(f"{self.path}: the update of {name} exceeds fp32's range.")
        return LoraPair(A, B)

    def read(self, key: str) -> torch.Tensor:
        """One of ``stored``, fp32 on the CPU. Raises as ``pair``."""
        try:
            with closing(TensorReader(self.stored)) as reader:
                return reader.read(key, torch.float32).cpu()
        except ValueError as error:
            raise ConfigError(f"{self.path}: {error}. Fetch it again.") from error


def read_adapter(path: str) -> StoredAdapter:
    """What a run's folder, one of its checkpoints, or a PEFT LoRA folder holds.

    Of a run its adapter, or where it has none yet, its newest whole checkpoint.

    Raises:
        ConfigError: if it is none of them, broken, or something else than a plain LoRA.
    """
    try:
        found = _read(Path(path).expanduser().resolve())
    except (OSError, RuntimeError, ValueError) as error:  # names of no file, unknown users
        raise ConfigError(f"{path} cannot be read: {error}. Name another folder.") from error
    if found is None:
        raise ConfigError(
            f"{path} is no adapter. Name the folder of a run, a checkpoint of one, or a PEFT LoRA "
            f"folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}."
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
        f"{folder}: the run has no adapter and no whole checkpoint. Finish it by `lorasb train "
        f"--resume {folder}`."
    )


def read_init(adapter: StoredAdapter) -> StoredAdapter | None:
    """What an adapter was when its training began; None where its run's basis is not there, or is
    PEFT's.

    Raises:
        ConfigError: if the basis is broken.
    """
    run = adapter.run
    if run is None or not (run / BASIS_FILE).is_file() or _is_pefts(adapter.run_config):
        return None
    stored = read_header(run / BASIS_FILE, str(run))
    layers = _of_basis(stored, run)
    _check(run, layers, stored)
    return StoredAdapter(run, run, adapter.run_config, {}, layers, stored)


def trained_on(adapter: StoredAdapter) -> str | None:
    """``Base.digest`` of the base that a run was trained on; None where no basis says it."""
    if adapter.run is None or not (adapter.run / BASIS_FILE).is_file():
        return None
    read_header(adapter.run / BASIS_FILE, str(adapter.run))
    digest = _made_from(adapter.run).get("model files")
    return digest if isinstance(digest, str) else None


def _made_from(run: Path) -> dict[str, Any]:
    """What a basis says that it was made from; {} if nothing."""
    try:
        found = json.loads(metadata_of(run / BASIS_FILE).get("made_from", "{}"))
    except (ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _method_of(run: Path) -> Method:
    """Of a run with one of ``METHODS``."""
    method = METHODS.get(str(_made_from(run).get("--method", DEFAULT_METHOD)))
    if method is None:
        raise ConfigError(f"{run}: {BASIS_FILE} is of an unknown --method. Fetch it again.")
    return method


def _of_basis(stored: Mapping[str, StoredTensor], run: Path) -> dict[str, Factors]:
    """Of a run whose basis these are, with or without those of a checkpoint."""
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
        )
    return layers


def _is_pefts(run_config: Mapping[str, Any]) -> bool:
    return str(run_config.get("method")).startswith(PEFT_PREFIX)


def _run_config(run: Path) -> dict[str, Any]:
    config = read_json(str(run / RUN_JSON), "RUN").get("config")
    return config if isinstance(config, dict) else {}


def _checkpoint(folder: Path, run: Path) -> StoredAdapter:
    """R as it was at a step, with the run's A and B."""
    found = read_checkpoint(folder)
    if isinstance(found, str):
        raise ConfigError(f"{folder}: {found}. Name another one.")
    if _is_pefts(_run_config(run)):
        raise ConfigError(
            f"{folder} is of a method of PEFT's, whose checkpoints only --resume reads. Finish the "
            "run: its adapter is what PEFT loads."
        )
    basis = read_header(run / BASIS_FILE, str(run))
    state = read_header(folder / STATE_FILE, str(folder))
    trained = tuple(f".{factor}" for factor in _method_of(run).trained)
    stored = {key: t for key, t in basis.items() if not key.endswith(trained)} | state
    layers = _of_basis(stored, run)
    _check(folder, layers, stored)
    return StoredAdapter(folder, run, _run_config(run), {}, layers, stored)


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
    layers = {}
    for key in stored:
        name, _, leaf = key.rpartition(".lora_")
        if leaf not in ("A.weight", "B.weight") or not name.startswith(PREFIX):
            raise ConfigError(
                f"{folder}: {key} in {ADAPTER_WEIGHTS} is no factor of a LoRA "
                f"({PREFIX}LAYER.lora_A.weight). Merge such an adapter by PEFT."
            )
        layer = name.removeprefix(PREFIX)
        keys = (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
        r = stored[keys[0]].shape[0] if keys[0] in stored and stored[keys[0]].shape else 1
        layers[layer] = Factors(*keys, scale=scale_of(folder, config, layer, r))
    _check(folder, layers, stored)
    in_run = folder.name == ADAPTER and (folder.parent / RUN_JSON).is_file()
    run = folder.parent if in_run else None
    run_config = _run_config(run) if run is not None else {}
    return StoredAdapter(folder, run, run_config, config, layers, stored)


def _check(folder: Path, layers: Mapping[str, Factors], stored: Mapping[str, StoredTensor]) -> None:
    """Whether the factors are there, are floats, and fit together."""
    if not layers:
        raise ConfigError(f"{folder} holds no factors of a LoRA.")
    for name, factors in layers.items():
        if not LAYER_NAME.fullmatch(name):
            raise ConfigError(f"{folder}: {name[:80]!r} is no name of a layer.")
        for key in factors.all:
            if key not in stored:
                raise ConfigError(f"{folder}: {key} is missing. Fetch it again.")
            if stored[key].dtype not in FLOATS:
                raise ConfigError(
                    f"{folder}: {key} is stored as {stored[key].dtype}; {', '.join(FLOATS)} are "
                    "allowed."
                )
        A, B = stored[factors.A].shape, stored[factors.B].shape
        R = stored[factors.R].shape if factors.R else (A[0], A[0]) if A else ()
        if factors.offset is not None:
            fits = [stored[key].shape for key in factors.offset] == [A, B]
            R = R if fits else ()
        fit = len(A) == len(B) == 2 and A[0] == B[1] and (A[0], A[0]) == R and min(*A, *B) > 0
        if not fit or A[0] > MAX_RANK:
            raise ConfigError(
                f"{folder}: the factors of {name} have shapes {A} and {B}, which make no update: "
                "(r, in) and (out, r) are wanted."
            )

"""An adapter on disk, whose factors are read a layer at a time.

Only safetensors and JSON are read, and their content is checked before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lorasb_ds.adapters.low_rank import LoraPair
from lorasb_ds.adapters.peft_config import NARROWING
from lorasb_ds.adapters.peft_targets import TargetFields, target_fields
from lorasb_ds.config.paths import DEMO_MODEL, demo_model_dir, read_json
from lorasb_ds.config.run_layout import RUN_JSON
from lorasb_ds.config.stored_paths import absolute
from lorasb_ds.data.classification import Classes
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.expert_layers import Expert
from lorasb_ds.models.checkpoint_files import StoredTensor, model_type_of
from lorasb_ds.models.tensor_reader import TensorReader

FLOATS = ("F32", "F16", "BF16")
MAX_RANK = 1 << 16
# Names that torch and people give to modules; no control characters, which a console would obey.
LAYER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,512}")
SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Factors:
    """The stored names of a layer's factors: ``ΔW = scale · (B R A - B0 A0) + Σ_k B_k R_k A_k``.

    Without R, it is I; without an offset (A0, B0), ``B0 A0`` is 0. The sum is of what
    ``--rebase-every`` has kept.
    """

    A: str
    B: str
    R: str | None = None
    scale: float = 1.0
    offset: tuple[str, str] | None = None  # A0 and B0
    expert: Expert | None = None  # that the layer is
    kept: tuple[tuple[str, ...], ...] = ()  # A, B and R of each

    @property
    def all(self) -> list[str]:
        """Return the names that are there."""
        own = (self.A, self.B, self.R, *(self.offset or ()))
        return [*filter(None, own), *chain.from_iterable(self.kept)]


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter on disk.

    Attributes:
        path: the folder that was read.
        run: the folder of its run; None if it is not in one.
        run_config: the options of that run; {} without one.
        peft_config: adapter_config.json; {} where R was read from a checkpoint.
        layers: layer -> its factors, as names in ``stored``.
        head: parameter of a classification head, which is trained whole -> its name in ``stored``.
        classes: what a classifier's run predicts; None without a run.
    """

    path: Path
    run: Path | None
    run_config: Mapping[str, Any]
    peft_config: Mapping[str, Any]
    layers: Mapping[str, Factors]
    stored: Mapping[str, StoredTensor]
    head: Mapping[str, str] = field(default_factory=dict)
    classes: Classes | None = None

    @property
    def base_model(self) -> str | None:
        """Return the base as the run names it, or else as adapter_config.json does."""
        named = self.run_config.get("model") or self.peft_config.get("base_model_name_or_path")
        return named if isinstance(named, str) else None

    @property
    def base_path(self) -> str | None:
        """Return the base for other tools, which do not know "demo": a path is absolute."""
        named = self.peft_config.get("base_model_name_or_path") or self.base_model
        named = str(demo_model_dir()) if named == DEMO_MODEL else named
        if not isinstance(named, str):
            return None
        model = self.run_config.get("model")
        # A run's name that is no absolute path is the hub's, whatever has the same name here.
        of_hub = isinstance(model, str) and model == named and not Path(model).is_absolute()
        return named if of_hub else absolute(named)

    @property
    def model_type(self) -> str | None:
        """Return the base's type from the run or its config.json; None where neither is here."""
        if self.run is not None:
            named = read_json(str(self.run / RUN_JSON), "RUN").get("model_type")
            if isinstance(named, str):
                return named
        return next(filter(None, map(model_type_of, (self.base_model, self.base_path))), None)

    @property
    def target_modules(self) -> list[str]:
        """Return PEFT's short names if they match exactly these layers, else the layers' names.

        Those that ``target_parameters`` names are not among them.
        """
        named = self.peft_config.get("target_modules")
        narrowed = any(self.peft_config.get(field) for field in NARROWING)
        if isinstance(named, list) and all(isinstance(n, str) for n in named) and not narrowed:
            return named
        layers = [name for name in self.layers if name not in self.experts]
        return [name for name in layers if not self.is_named_by_weight(name)]

    @cached_property
    def target_parameters(self) -> list[str]:
        """Return the parameters that PEFT finds by their names, the weights of some layers."""
        named: list[str] = self.peft_config.get("target_parameters") or []
        experts = {f".{expert.projection}" for expert in self.experts.values()}
        return [name for name in named if not any(e.endswith(f".{name}") for e in experts)]

    def is_named_by_weight(self, layer: str) -> bool:
        """Return whether ``target_parameters`` has a layer's weight."""
        return f".{layer}.weight".endswith(tuple(f".{name}" for name in self.target_parameters))

    @property
    def target_fields(self) -> TargetFields:
        """Return the fields of adapter_config.json by which PEFT finds the linear layers."""
        # PEFT converts the names of single experts' layers, which only transformers 4 has.
        layers = [name for name in self.layers if name not in self.experts]
        of_experts = any(SINGLE_EXPERT.search(name) for name in layers)
        model_type = None if of_experts else self.model_type
        return target_fields(model_type, self.target_modules, self.target_parameters)

    @cached_property
    def experts(self) -> dict[str, Expert]:
        """Return layer -> the expert that it is, of those that are one."""
        found = {name: factors.expert for name, factors in self.layers.items()}
        return {name: expert for name, expert in found.items() if expert is not None}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return layer -> (out, in)."""
        stored = self.stored
        return {n: (stored[f.B].shape[0], stored[f.A].shape[1]) for n, f in self.layers.items()}

    @cached_property
    def r(self) -> int:
        """Return the largest rank of a layer."""
        return max(self.rank_of(name) for name in self.layers)

    def rank_of(self, name: str) -> int:
        """Return the rank of a layer's factors, plus those of its offset and of what is kept."""
        factors = self.layers[name]
        keys = [factors.A, *(factors.offset or ())[:1], *(A for A, _, _ in factors.kept)]
        return sum(self.stored[key].shape[0] for key in keys)

    def pair(self, name: str) -> LoraPair:
        """Read a layer's update, fp32 on the CPU.

        Raises:
            ConfigError: if the file cannot be read, or a number is not finite.
        """
        factors = self.layers[name]
        A = self.read(factors.A)
        if factors.expert is not None and factors.expert.interleaved:
            B = factors.expert.columns(self._of_all_experts(factors.B))
        else:
            B = self.read(factors.B)
        if factors.R is not None:
            B = B @ self.read(factors.R)
        if factors.offset is not None:
            first_A, first_B = (self.read(key) for key in factors.offset)
            A, B = torch.cat([A, first_A]), torch.cat([B, -first_B], 1)
        if factors.scale != 1:
            B = B * factors.scale
        for of_kept in factors.kept:
            kept_A, kept_B, kept_R = map(self.read, of_kept)
            A, B = torch.cat([A, kept_A]), torch.cat([B, kept_B @ kept_R], 1)
        if not B.isfinite().all():
            raise ConfigError(f"{self.path}: the update of {name} exceeds fp32's range.")
        return LoraPair(A, B)

    def _of_all_experts(self, key: str) -> torch.Tensor:
        """Read a tensor that several experts share, once for those that follow each other."""
        if key not in self._last_read:
            self._last_read.clear()
            self._last_read[key] = self.read(key)
        return self._last_read[key]

    @cached_property
    def _last_read(self) -> dict[str, torch.Tensor]:
        return {}

    def read(self, key: str) -> torch.Tensor:
        """Read one tensor of ``stored``, fp32 on the CPU. Raises like ``pair``."""
        try:
            with closing(TensorReader(self.stored)) as reader:
                return reader.read(key, torch.float32).cpu()
        except ValueError as error:
            raise ConfigError(f"{self.path}: {error}. Fetch it again.") from error


def check_factors(
    folder: Path, layers: Mapping[str, Factors], stored: Mapping[str, StoredTensor]
) -> None:
    """Check that the factors exist, are floats, and have matching shapes.

    Raises:
        ConfigError: says which factor is wrong.
    """
    if not layers:
        raise ConfigError(f"{folder} holds no factors of a LoRA.")
    for name, factors in layers.items():
        if not LAYER_NAME.fullmatch(name):
            raise ConfigError(f"{folder}: {name[:80]!r} is not a layer's name.")
        for key in factors.all:
            if key not in stored:
                raise ConfigError(f"{folder}: {key} is missing. Fetch it again.")
            if stored[key].dtype not in FLOATS:
                raise ConfigError(
                    f"{folder}: {key} is stored as {stored[key].dtype}; {', '.join(FLOATS)} are "
                    "allowed."
                )
        A, B = stored[factors.A].shape, stored[factors.B].shape
        if factors.expert is not None and factors.expert.interleaved and len(B) == 2:
            B = (B[0], B[1] // factors.expert.count)
        R = stored[factors.R].shape if factors.R else (A[0], A[0]) if A else ()
        if factors.offset is not None:
            fits = [stored[key].shape for key in factors.offset] == [A, B]
            R = R if fits else ()
        for of_kept in factors.kept:
            if [stored[key].shape for key in of_kept] != [A, B, R]:
                R = ()
        fit = len(A) == len(B) == 2 and A[0] == B[1] and (A[0], A[0]) == R and min(*A, *B) > 0
        if not fit or A[0] > MAX_RANK:
            raise ConfigError(
                f"{folder}: the factors of {name} have shapes {A} and {B}, which make no update: "
                "they must be (r, in) and (out, r)."
            )

"""Which layers of the base get an adapter, and who makes it: this library or PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorasb_ds.adapters.peft_methods import PeftPlan, plan_peft
from lorasb_ds.adapters.peft_targets import peft_warning, refused_by_peft
from lorasb_ds.config.adapter_options import (
    NARROW,
    UNIFORM,
    default_expert_r,
    wide_enough,
    without_adapter,
)
from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.overwriting import read_object
from lorasb_ds.config.paths import expand_home
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import RUN_JSON
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.experts import EXPERT_UPDATES
from lorasb_ds.init.factors import InitSettings
from lorasb_ds.init.rank_allocation import planned_ranks
from lorasb_ds.models.base import Base
from lorasb_ds.models.experts import ExpertShapes
from lorasb_ds.models.hybrids import layers_read_by_parents
from lorasb_ds.models.linear_layers import (
    Shapes,
    is_all_linear,
    select_names,
    select_targets,
    unlike_linear,
)
from lorasb_ds.models.loading import DTYPES


@dataclass(frozen=True)
class AdapterPlan:
    """The layers with an adapter.

    Attributes:
        targets: layer -> (out, in).
        ranks: layer -> its rank, of all targets; {} for PEFT's methods.
        r_of_layers: the --r that all-linear has taken the layers by: that of the first basis.
        experts: projection of MoE experts -> (experts, out, in).
        expert_r: rank of every expert's adapter.
        frozen_experts: why projections of experts that --target-modules selects get no adapter;
            None: they do, or there are none.
        peft: PEFT's plan for ``--method peft:FILE``; None: the layers are this library's.
        peft_warning: why PEFT would not read the adapter as it is written; None: it would.
        left_out: linear layers that all-linear leaves out, with the reason; one sentence for each.
    """

    targets: Shapes
    ranks: Mapping[str, int] = field(default_factory=dict)
    r_of_layers: int = 0
    experts: ExpertShapes = field(default_factory=dict)
    expert_r: int = 0
    frozen_experts: str | None = None
    peft: PeftPlan | None = None
    peft_warning: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def rank_note(self) -> list[str]:
        """A sentence on ranks that differ; none if they do not."""
        if len(ranks := {*self.ranks.values()}) < 2:
            return []
        experts = f"; adapters of experts keep rank {self.expert_r}" if self.experts else ""
        return [f"ranks of {min(ranks)} to {max(ranks)} by the energy of their directions{experts}"]

    def largest_r(self, r: int) -> int:
        """Return the largest rank of a layer; ``r``, of --r, where only experts have an adapter."""
        return max(self.ranks.values(), default=r)

    def names(self, base: Base) -> list[str]:
        """Return all layers and projections with an adapter, in the model's order."""
        order = base.order
        return sorted((*self.targets, *self.experts), key=order.__getitem__)


def plan_adapter(config: RunConfig, base: Base, run: Path | None = None) -> AdapterPlan:
    """Find the layers that get an adapter, and their ranks. Not collective.

    Args:
        run: the folder of the run that is resumed; None: the run starts anew.
    Raises:
        ConfigError: if --target-modules, --r, --expert-r or PEFT's configuration does not fit the
            base, --rank-allocation the basis, or --track-alignment the layers.
    """
    method = METHODS.get(config.method)
    if method is None:
        # PEFT puts its layers into the model that it looks at.
        plan = plan_peft(config, base.empty_model(DTYPES[config.dtype]))
        if base.experts and plan.content.get("target_parameters"):
            raise ConfigError(
                f"--method {config.method}: its target_parameters cannot be trained, since experts "
                "are layers here. Leave them out, or take a method that trains experts: lora-sb."
            )
        return AdapterPlan(plan.layers, peft=plan)
    layers, left_out = dict(base.shape.layers), tuple[str, ...]()
    r_of_layers, r_of_experts = _ranks_of_basis(config, run)
    if is_all_linear(config.target_modules):
        refused = refused_by_peft(base.model_type, layers)
        wide = wide_enough(layers, r_of_layers * method.directions)
        narrow = {n: shape for n, shape in layers.items() if n not in {*wide, *refused}}
        left_out = _left_out(base, refused, narrow if wide else {})
        chosen = wide or layers
        layers = {name: shape for name, shape in chosen.items() if name not in refused}
    targets = select_targets(
        layers, config.target_modules, config.r, method.directions, base.experts
    )
    experts, expert_r, why_frozen = _plan_experts(config, base, r_of_experts)
    if not targets and not experts:
        raise ConfigError(
            f"--target-modules {config.target_modules} selects nothing but experts, and "
            f"{why_frozen}. Name other layers, too."
        )
    if not targets and config.track_alignment is not None:
        raise ConfigError(
            f"--track-alignment {config.track_alignment} measures linear layers, and "
            f"--target-modules {config.target_modules} selects nothing but experts. Leave it out, "
            "or name other layers, too."
        )
    warning = peft_warning(base.model_type, targets, config.model)
    ranks = dict.fromkeys(targets, config.r)
    if config.rank_allocation != UNIFORM:
        ranks = planned_ranks(config, targets, run)
    return AdapterPlan(
        targets,
        ranks,
        r_of_layers,
        experts,
        expert_r,
        why_frozen,
        peft_warning=warning,
        left_out=left_out,
    )


def _ranks_of_basis(config: RunConfig, run: Path | None) -> tuple[int, int | None]:
    """Return the r that has decided which layers are in the basis, and the rank of its experts.

    They are those of the run that is resumed, or of --init-from's; else --r, and None.
    """
    folders = [Path(expand_home(str(f))) for f in (run, config.init_from) if f is not None]
    found = [read_object(folder / RUN_JSON) for folder in folders]
    for stored in found:
        match stored.get("adapter"):
            case {"r_of_layers": int(r), "expert_r": int(r_of_experts)}:
                return r, r_of_experts
    if config.init_from is not None:
        match found[-1].get("config"):
            case {"r": int(r)}:  # of an earlier version
                return r, None
    return config.r, None


def _left_out(base: Base, refused: Sequence[str], narrow: Iterable[str]) -> tuple[str, ...]:
    """Describe the linear layers that get no adapter although all are asked for.

    Args:
        refused: of ``refused_by_peft``.
        narrow: those that are not ``wide_enough``.
    """
    sizes = {name: out * in_ for name, (out, in_) in base.shape.layers.items()}
    read, unlike = layers_read_by_parents(base.model), unlike_linear(base.model)
    total = sum(sum(of.values()) for of in (sizes, read, unlike))
    reasons = (
        (read, f"{base.model_type} reads their weights instead of calling them"),
        (unlike, f"{base.model_type} multiplies by their weights in another way"),
        (
            {name: sizes[name] for name in refused},
            "PEFT refuses to load one; --target-modules with their name trains them",
        ),
        ({name: sizes[name] for name in narrow}, NARROW),
    )
    return tuple(
        without_adapter(names, sum(names.values()) / total, reason)
        for names, reason in reasons
        if names
    )


def _plan_experts(
    config: RunConfig, base: Base, r_of_basis: int | None
) -> tuple[ExpertShapes, int, str | None]:
    """Return the projections of experts that get an adapter, its rank, and why they get none."""
    selected = set(select_names(base.experts, config.target_modules))
    experts = {name: shape for name, shape in base.experts.items() if name in selected}
    if not experts:
        if config.expert_r:
            raise ConfigError(
                f"--expert-r {config.expert_r}: --target-modules {config.target_modules} selects "
                f"no experts of this base. Leave --expert-r out."
            )
        return {}, 0, None
    if config.expert_r == 0:
        return {}, 0, "--expert-r is 0"
    if why := _why_not(config):
        if config.expert_r is not None:
            raise ConfigError(f"--expert-r {config.expert_r}: {why}. Give 0, or leave it out.")
        return {}, 0, why
    r = config.expert_r if config.expert_r is not None else r_of_basis
    if r == 0:
        return {}, 0, "the basis has none of experts"
    if r is None:
        r = default_expert_r(config.r, base.shape.experts_per_token)
    name, shape = min(experts.items(), key=lambda item: min(item[1][1:]))
    if r > min(shape[1:]):
        raise ConfigError(
            f"--expert-r {r} exceeds min(out, in) = {min(shape[1:])} of the experts of {name}. "
            "Give a smaller one; 0 leaves experts frozen."
        )
    return experts, r, None


def _why_not(config: RunConfig) -> str | None:
    """Return why experts cannot be trained with these options; None if they can."""
    if not METHODS[config.method].trains_r:
        return f"--method {config.method} trains A and B, which experts do not have yet"
    if InitSettings.from_config(config).update not in EXPERT_UPDATES:
        return f"--optimizer {config.optimizer} takes whole matrices, not those of experts yet"
    return None

"""Which layers of the base get an adapter, and who makes it: this library or PEFT."""

from __future__ import annotations

from dataclasses import dataclass

from lorasb_ds.adapters.peft_methods import PeftPlan, plan_peft
from lorasb_ds.adapters.peft_targets import peft_warning
from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.models.base import Base
from lorasb_ds.models.linear_layers import Shapes, select_targets
from lorasb_ds.models.loading import DTYPES


@dataclass(frozen=True)
class AdapterPlan:
    """The layers with an adapter.

    Attributes:
        targets: layer -> (out, in).
        peft: PEFT's plan for ``--method peft:FILE``; None: the layers are this library's.
        peft_warning: why PEFT would not read the adapter as it is written; None: it would.
    """

    targets: Shapes
    peft: PeftPlan | None = None
    peft_warning: str | None = None


def plan_adapter(config: RunConfig, base: Base) -> AdapterPlan:
    """Find the layers that get an adapter. Not collective.

    Raises:
        ConfigError: if --target-modules, --r or PEFT's configuration does not fit the base.
    """
    method = METHODS.get(config.method)
    if method is None:
        # PEFT puts its layers into the model that it looks at.
        plan = plan_peft(config, base.empty_model(DTYPES[config.dtype]))
        return AdapterPlan(plan.layers, plan)
    layers = dict(base.shape.layers)
    targets = select_targets(layers, config.target_modules, config.r, method.directions)
    return AdapterPlan(targets, None, peft_warning(base.model_type, targets, config.model))

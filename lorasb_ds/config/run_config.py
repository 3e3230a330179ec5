"""What a run is: all groups of options as one. Torch-free: the command line starts with it."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from lorasb_ds.config.adapter_options import AdapterOptions
from lorasb_ds.config.data_options import DataOptions
from lorasb_ds.config.deepspeed_options import DeepSpeedOptions
from lorasb_ds.config.evaluation_options import EvaluationOptions
from lorasb_ds.config.init_options import InitOptions
from lorasb_ds.config.model_options import ModelOptions
from lorasb_ds.config.output_options import OutputOptions
from lorasb_ds.config.training_options import FIRST_STEPS, TrainingOptions
from lorasb_ds.errors import option_name


# Pydantic collects fields from the last base to the first: they come in the reverse of this order,
# which is that of --help. The learning rate's default looks at the method, which so comes before.
class RunConfig(
    OutputOptions,
    EvaluationOptions,
    DeepSpeedOptions,
    TrainingOptions,
    InitOptions,
    AdapterOptions,
    DataOptions,
    ModelOptions,
):
    """One run, resolved. Fields are flat: as ``config.lr``, as ``--lr``, and in run.json."""

    @property
    def update_rule(self) -> str:
        """``init_update``, or the optimizer's first step."""
        return self.init_update or FIRST_STEPS[self.optimizer]

    @property
    def seed_of_init(self) -> int:
        """``init_seed``, or the run's."""
        return self.seed if self.init_seed is None else self.init_seed


def problems_of(error: ValidationError) -> list[str]:
    """Return one sentence for each field that is wrong."""
    by_field: dict[str, list[dict[str, Any]]] = {}
    for found in error.errors():
        # A default that looks at other fields is not asked for when one of them is wrong.
        if found["type"] != "default_factory_not_called":
            field = str(found["loc"][0]) if found["loc"] else "?"
            by_field.setdefault(field, []).append(dict(found))
    return [_problem(field, errors) for field, errors in by_field.items()]


def _problem(field: str, errors: list[dict[str, Any]]) -> str:
    if errors[0]["type"] == "extra_forbidden":
        known = ", ".join(RunConfig.model_fields)
        return f"'{field}' is not an option of this version. It knows: {known}."
    # A field of several types has a message for each of them.
    messages = " or ".join(e["msg"][0].lower() + e["msg"][1:] for e in errors)
    return f"{option_name(field)} {errors[0]['input']!r} is not allowed: {messages}."

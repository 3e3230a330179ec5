"""Options of the adapter: its method, its size and its layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Literal

from pydantic import Field, field_validator

from lorasb_ds.config.methods import DEFAULT_ALPHA, DEFAULT_METHOD, METHODS, PEFT_PREFIX
from lorasb_ds.config.option_group import OptionGroup, default_is

ALL_LINEAR = "all-linear"
NARROW = "fewer outputs or inputs than its rank"  # why all-linear leaves a layer out
SMALLEST_EXPERT_R = 4
UNIFORM: Final = "uniform"  # of --rank-allocation


class AdapterOptions(OptionGroup):
    method: str = Field(
        DEFAULT_METHOD,
        description=f"How the adapter is made: {', '.join(METHODS)} (docs/methods.md), or "
        "peft:FILE.json, a configuration of PEFT's.",
    )
    r: int = Field(
        64, ge=1, description="Rank of the adapter; r x r numbers are trained for each layer."
    )
    expert_r: int | None = Field(
        None,
        ge=0,
        description="Rank of the adapter of every expert of a mixture of experts; 0: experts stay "
        "frozen without one.",
        json_schema_extra=default_is(
            f"--r divided by the experts of a token, at least {SMALLEST_EXPERT_R}"
        ),
    )
    rank_allocation: Literal["uniform", "energy"] = Field(
        UNIFORM,
        description="'uniform': every layer has rank --r. 'energy': as many numbers are trained, "
        "and ranks are larger where the next directions have more of the init's step; needs "
        "--init-from a basis with a larger r.",
    )
    target_modules: str = Field(
        ALL_LINEAR,
        min_length=1,
        description="Layers with an adapter: 'all-linear' (all but the head), or names as "
        "PEFT takes them, separated by commas: q_proj,v_proj.",
    )
    lora_alpha: float | None = Field(
        None,
        gt=0,
        description="Scaling of methods that have one: alpha/r, or alpha/sqrt(r).",
        json_schema_extra=default_is(f"{DEFAULT_ALPHA:g}"),
    )
    gamma: float | None = Field(
        None,
        gt=0,
        description="Scales A and B of lora-ga by out^(1/4)/sqrt(gamma), those of lora-one by "
        "1/sqrt(gamma).",
        json_schema_extra=default_is(
            ", ".join(f"{m.gamma:g} for {name}" for name, m in METHODS.items() if m.gamma != 1)
        ),
    )
    precondition: float | None = Field(
        None,
        gt=0,
        description="Lambda of LoRA-One's preconditioned update, of methods that train A and B: "
        "gradients go through inverses of (B'B + lambda I) and (AA' + lambda I); where A or B is 0 "
        "they are divided by lambda.",
        json_schema_extra=default_is("none"),
    )

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS and not value.startswith(PEFT_PREFIX):
            raise ValueError(f"Give one of {', '.join(METHODS)}, or {PEFT_PREFIX}FILE.json")
        return value


def default_expert_r(r: int, experts_per_token: int) -> int:
    """Return the rank of an expert's adapter, if ``--expert-r`` does not give one."""
    return max(SMALLEST_EXPERT_R, r // experts_per_token)


def wide_enough(layers: Mapping[str, tuple[int, int]], rank: int) -> dict[str, tuple[int, int]]:
    """Return the layers that all-linear takes: those with at least ``rank`` outputs and inputs.

    Narrow ones are gates, indexers and projections to one number for each head.

    Args:
        layers: name -> (out, in).
        rank: of the adapter, times the singular directions that the method takes for each of it.
    """
    return {name: shape for name, shape in layers.items() if min(shape) >= max(rank, 2)}


def without_adapter(names: Collection[str], share: float, reason: str) -> str:
    """Return a sentence on layers that all-linear leaves out.

    Args:
        share: of the linear weights.
    """
    return (
        f"no adapter on {len(names)} layer(s) such as {next(iter(names))} ({share:.1%} of the "
        f"linear weights): {reason}"
    )

"""Which layers and experts get an adapter, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.base import Base
from lorasb_ds.training.adapter_plan import AdapterPlan, plan_adapter


@pytest.fixture(scope="module")
def planned(tiny_family: Callable[[str], Path]) -> Callable[..., AdapterPlan]:
    folder = tiny_family("deepseek_v3")

    def plan(run: Path | None = None, **options: Any) -> AdapterPlan:
        config = load_run_config({"model": str(folder), **options})
        return plan_adapter(config, Base(str(folder)), run)

    return plan


UP, DOWN = (f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down"))


def test_all_linear_includes_experts(planned: Callable[..., AdapterPlan], tiny_family: Any) -> None:
    plan = planned(r=12)
    assert plan.experts == {UP: (4, 48, 32), DOWN: (4, 32, 24)}
    assert plan.expert_r == 6  # a token goes to two experts
    assert planned(r=4).expert_r == 4
    assert not any(".gate" in name and not name.endswith("gate_proj") for name in plan.targets)
    names = plan.names(Base(str(tiny_family("deepseek_v3"))))
    assert names.index(UP) + 1 == names.index(DOWN)
    assert names.index("model.layers.0.mlp.down_proj") < names.index(UP)


def test_experts_by_name(planned: Callable[..., AdapterPlan]) -> None:
    plan = planned(r=4, target_modules="q_a_proj,down_proj")
    assert set(plan.experts) == {DOWN}
    assert "model.layers.0.mlp.down_proj" in plan.targets
    assert planned(r=4, target_modules="gate_up_proj").targets == {}
    assert planned(r=4, target_modules="q_a_proj").experts == {}


def test_experts_have_the_rank_of_the_basis(
    planned: Callable[..., AdapterPlan], tmp_path: Path
) -> None:
    """A smaller --r cuts layers, not experts; and a run that is resumed needs no other folder."""
    made = planned(r=12)
    stored = {"r_of_layers": made.r_of_layers, "expert_r": made.expert_r}
    (tmp_path / "run.json").write_text(json.dumps({"config": {"r": 12}, "adapter": stored}))
    cut = planned(r=8, init_from=str(tmp_path))
    assert (cut.expert_r, planned(r=8).expert_r) == (6, 4)
    assert planned(r=8, run=tmp_path, init_from="gone").expert_r == 6
    assert planned(r=8, init_from=str(tmp_path), expert_r=5).expert_r == 5
    stored["expert_r"] = 0
    (tmp_path / "run.json").write_text(json.dumps({"adapter": stored}))
    without = planned(r=8, init_from=str(tmp_path))
    assert (without.experts, without.frozen_experts) == ({}, "the basis has none of experts")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"expert_r": 0}, "--expert-r is 0"),
        ({"method": "lora"}, "--method lora trains A and B"),
        ({"optimizer": "muon"}, "--optimizer muon takes whole matrices"),
    ],
)
def test_why_experts_stay_frozen(
    planned: Callable[..., AdapterPlan], options: dict[str, Any], why: str
) -> None:
    plan = planned(r=4, **options)
    assert plan.experts == {}
    assert plan.frozen_experts is not None
    assert plan.frozen_experts.startswith(why)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_r": 25}, "--expert-r 25 exceeds min(out, in) = 24 of the experts of"),
        ({"expert_r": 4, "method": "lora"}, "--expert-r 4: --method lora trains A and B"),
        ({"expert_r": 4, "target_modules": "q_a_proj"}, "selects no experts of this base"),
        ({"expert_r": 0, "target_modules": "gate_up_proj"}, "selects nothing but experts"),
        ({"track_alignment": 5, "target_modules": "gate_up_proj"}, "--track-alignment 5 measures"),
        ({"target_modules": "gate_up"}, "no linear layer matches gate_up. The model has linear"),
    ],
)
def test_what_is_refused(
    planned: Callable[..., AdapterPlan], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        planned(**{"r": 4, **options})

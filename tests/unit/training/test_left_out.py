"""Linear layers without an adapter are named, with their share and the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig
from peft.tuners import tuners_utils
from torch import nn

from lorasb_ds.adapters.peft_targets import REFUSED_IN, REFUSED_NAMES, refused_by_peft
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.base import Base
from lorasb_ds.models.linear_layers import linear_layers, unlike_linear
from lorasb_ds.training.adapter_plan import AdapterPlan, plan_adapter


def planned(folder: Path, **options: object) -> AdapterPlan:
    config = load_run_config({"model": str(folder), "r": 4, **options})
    return plan_adapter(config, Base(str(folder)))


@pytest.mark.parametrize("name", [*REFUSED_NAMES, "in_proj", "o_proj"])
@pytest.mark.parametrize("model_type", [*REFUSED_IN, "jamba", "bamba", "llama"])
def test_what_peft_refuses(model_type: str, name: str) -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    refused = refused_by_peft(model_type, [f"a.{name}"]) == [f"a.{name}"]
    check = tuners_utils._check_lora_target_modules_mamba
    if refused:
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            check(LoraConfig(), model, name)
    else:
        check(LoraConfig(), model, name)


def test_of_a_hybrid(tiny_family: Callable[[str], Path]) -> None:
    folder = tiny_family("falcon_h1")
    plan = planned(folder)
    assert not [name for name in plan.targets if name.endswith("out_proj")]
    (note,) = plan.left_out
    assert re.match(
        r"no adapter on \d layer\(s\) such as model\.\S+out_proj \(\d+\.\d% of the linear "
        r"weights\): PEFT refuses to load one",
        note,
    )
    asked = planned(folder, target_modules="out_proj,in_proj")
    assert {name.rpartition(".")[2] for name in asked.targets} == {"out_proj", "in_proj"}
    assert asked.left_out == ()
    assert asked.peft_warning is not None
    assert "it refuses layers such as" in asked.peft_warning


def test_of_grouped_projections(tiny_family: Callable[[str], Path]) -> None:
    """DeepSeek-V4's are linear by their class only; its other layers get adapters."""
    folder = tiny_family("deepseek_v4")
    plan = planned(folder)
    assert not [name for name in plan.targets if name.endswith("o_a_proj")]
    assert [name for name in plan.targets if name.endswith("o_b_proj")]
    (note,) = plan.left_out
    assert re.match(
        r"no adapter on 2 layer\(s\) such as model\.layers\.0\.self_attn\.o_a_proj "
        r"\(\d\.\d% of the linear weights\): deepseek_v4 multiplies by their weights in another ",
        note,
    )
    with pytest.raises(ConfigError, match="no linear layer matches o_a_proj"):
        planned(folder, target_modules="o_a_proj")


def test_a_class_of_its_own_that_is_linear() -> None:
    """Falcon's has a forward of its own, which computes what nn.Linear does."""
    from transformers.models.falcon.modeling_falcon import FalconLinear

    model = nn.ModuleDict({"a": FalconLinear(4, 4), "b": nn.Linear(4, 4)})
    assert unlike_linear(model) == {}
    assert list(linear_layers(model)) == ["a", "b"]


def test_of_weights_that_are_read(tiny_family: Callable[[str], Path]) -> None:
    plan = planned(tiny_family("jamba"), expert_r=2)
    assert not [name for name in plan.targets if name.endswith("dt_proj")]
    (note,) = plan.left_out
    assert "dt_proj" in note
    assert "jamba reads their weights instead of calling them" in note


def test_of_layers_narrower_than_the_rank(tiny_model: Path, tmp_path: Path) -> None:
    """As Qwen3.5's in_proj_a of 32 outputs at the default rank of 64."""
    plan = planned(tiny_model, r=25)
    assert {name.rpartition(".")[2] for name in plan.targets} == {
        *("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    (tmp_path / "run.json").write_text(json.dumps({"config": {"r": 25}}))
    cut = planned(tiny_model, r=4, init_from=str(tmp_path))
    assert list(cut.targets) == list(plan.targets), "a basis that is cut has the layers of its r"
    for r_of_run in (4, 25):  # of a run that has cut it, or not
        stored = {"r_of_layers": 25, "expert_r": 0}
        (tmp_path / "run.json").write_text(
            json.dumps({"config": {"r": r_of_run}, "adapter": stored})
        )
        again = planned(tiny_model, r=4, init_from=str(tmp_path))
        assert (list(again.targets), again.r_of_layers) == (list(plan.targets), 25)
    (note,) = plan.left_out
    assert re.match(
        r"no adapter on \d layer\(s\) such as model\.layers\.0\.self_attn\.k_proj "
        r"\(\d+\.\d% of the linear weights\): fewer outputs or inputs than its rank",
        note,
    )

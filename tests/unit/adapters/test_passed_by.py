"""Adapters on layers that the model does not call are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorasb_ds.adapters.inject import inject
from lorasb_ds.adapters.passed_by import refuse_passed_by
from lorasb_ds.errors import ConfigError
from tests.references import with_own_code
from tests.runs import run_command, word_rows, write_jsonl

# To the end of a Llama of its own code.
READS_A_WEIGHT = """
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import LlamaMLP

def reading(mlp, x):
    return mlp.down_proj(mlp.act_fn(linear(x, mlp.gate_proj.weight)) * mlp.up_proj(x))

class OwnMLP(LlamaMLP):
    forward = reading

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.__class__ = OwnMLP
"""


class Mixer(nn.Module):
    """Calls one layer, and multiplies by the weight of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x) + F.linear(x, self.read.weight)


class Model(nn.Module):
    """Two mixers, of which a token may need the first one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mixer(), Mixer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x)


def test_a_layer_whose_weight_is_read() -> None:
    model = Model()
    adapters = inject(model, ["blocks.0.called", "blocks.1.called"], 2, torch.float32)
    pass_through(model, adapters)  # of the second block nothing is called: no token went there
    adapters |= inject(model, ["blocks.0.read", "blocks.1.read"], 2, torch.float32)
    with pytest.raises(ConfigError, match=r"1 layer\(s\) such as blocks\.0\.read would do "):
        pass_through(model, adapters)
    assert not [module for module in model.modules() if module._forward_pre_hooks]


def pass_through(model: nn.Module, adapters: dict[str, Any]) -> None:
    with refuse_passed_by(model, adapters):
        model(torch.ones(1, 4))


@pytest.mark.slow
def test_a_model_of_its_own_code(tiny_model: Path, tmp_path: Path) -> None:
    folder = with_own_code(tiny_model, tmp_path / "model")
    with (folder / "own.py").open("a") as code:
        code.write(
            "from transformers.models.llama.modeling_llama import LlamaMLP\n" + READS_A_WEIGHT
        )
    rows = write_jsonl(tmp_path / "rows.jsonl", word_rows(8))
    command = f"lorasb train --num-procs 1 --model {folder} --data {rows} --r 4 --max-steps 1"
    command += f" --trust-remote-code --output-dir {tmp_path}/run"
    said = run_command(*command.split(), status=2)
    assert "such as model.layers.0.mlp.gate_proj would do nothing" in said
    assert "Traceback" not in said
    others = "q_proj,k_proj,v_proj,o_proj,up_proj,down_proj"
    run_command(*command.split(), "--overwrite", "--target-modules", others)

"""`lorasb plan` for models whose sizes only transformers knows: in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, Llama4TextConfig

from tests.runs import run_command


def test_any_model_that_transformers_makes(tmp_path: Path) -> None:
    # 12 blocks of 12 · 768² + 13 · 768, two tables and the last norm: 124.4 million.
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    found = json.loads(run_command("lorasb", "plan", "--model", str(tmp_path), "--json"))
    assert found["model"] == str(tmp_path)
    assert found["parameters"] == 12 * (12 * 768**2 + 13 * 768) + (50257 + 1024 + 2) * 768
    assert found["parameters_in_experts"] == 0
    assert found["recommended"] == "bf16 on every rank"


@pytest.mark.slow
def test_what_stays_out_is_said(tmp_path: Path) -> None:
    config = Llama4TextConfig(num_hidden_layers=2, architectures=["Llama4ForCausalLM"])
    config.save_pretrained(tmp_path)
    text = run_command("lorasb", "plan", "--model", str(tmp_path), "--r", "8")
    assert "% of them in experts that stay as they are under --load-in-4bit" in text
    assert "Recommended: bf16" in text


@pytest.mark.slow
def test_a_model_that_cannot_be_trained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    text = run_command("lorasb", "plan", "--model", str(tmp_path), status=2)
    assert "is a BertModel, not a causal language model" in text
    assert "Traceback" not in text

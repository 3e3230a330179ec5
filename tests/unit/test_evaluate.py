"""Intervals, scorers, generation and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from lorasb_ds.evaluate import generate, scorer, wilson_interval
from lorasb_ds.export import save_peft_adapter
from lorasb_ds.files import write_text
from lorasb_ds.rows import load_rows


def test_wilson_interval() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20, without continuity correction.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_scorers() -> None:
    exact = scorer("rows.jsonl")
    assert exact(" 7\n", {}, "7")
    assert not exact("7.0", {}, "7")
    source = "reasoning-gym:chain_sum?size=3&seed=1"
    task = scorer(source)
    row = load_rows(source)[1]
    assert task(row["answer"], row, "")
    assert not task("no idea", row, "")


def test_a_batch_generates_what_single_prompts_do(tiny_model: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16]]
    device = torch.device("cpu")
    together = generate(model, tokenizer, prompts, 6, device)
    alone = [generate(model, tokenizer, [prompt], 6, device)[0] for prompt in prompts]
    assert together == alone
    assert len(set(together)) == 3


def test_writing_leaves_no_part_behind(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "1")
    write_text(tmp_path / "a.json", "2")
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"a.json": "2"}


def test_the_adapter_config_is_peft_s(tmp_path: Path) -> None:
    tensors = {"base_model.model.m.q_proj.lora_A.weight": torch.ones(2, 4)}
    for _ in range(2):  # the second replaces the first
        save_peft_adapter(
            tmp_path / "adapter",
            tensors,
            r=2,
            targets={"m.q_proj": (4, 4)},
            layers={"m.q_proj": (4, 4), "m.k_proj": (4, 4)},
            base_model="base",
        )
    config = LoraConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 2, {"q_proj"})
    assert config.inference_mode
    written = {f.name for f in (tmp_path / "adapter").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["bias"] == "none"

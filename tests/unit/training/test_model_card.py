"""The README.md beside an adapter, as the hub reads it."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.training.model_card import DEMO_BASE, model_card

ROWS = [
    {"stage": "base", "step": 0, "eval_loss": 1.5},
    {"stage": "init", "step": 0, "eval_loss": 1.25},
    {"step": 1, "loss": 1.0},
    {"stage": "step", "step": 1, "eval_loss": 1.1},
    {"stage": "trained", "step": 2, "eval_loss": 0.75},
]


def run(template: str = "model's own", **options: Any) -> dict[str, Any]:
    if template.startswith("--chat-template "):  # as run.json has it
        options["chat_template"] = template.partition(" ")[2]
    config = RunConfig.model_validate(options).model_dump()
    return {
        "config": config,
        "versions": {"lorasb-ds": "0.1.0"},
        "trainable_parameters": 12345,
        "num_steps": 9,
        "steps_done": 2,
        "saved": ROWS[-1],
        "chat_template": template,
    }


def test_of_a_base_and_data_on_the_hub() -> None:
    data = ("openai/gsm8k:main@train", "/home/me/secret/rows.jsonl", "reasoning-gym:gcd?size=9")
    text = model_card(run(model="mistralai/Mistral-7B-v0.3", data=data, r=96, lr=1e-3), ROWS, 96)
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "base_model": "mistralai/Mistral-7B-v0.3",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "transformers", "lora-sb", "lorasb-ds"],
        "datasets": ["openai/gsm8k"],
    }
    assert "secret" not in text, "folders may have private names"
    assert "`openai/gsm8k:main@train`, `rows.jsonl`, `reasoning-gym:gcd?size=9`" in text
    assert "12,345 trained parameters, 2 steps" in text
    assert "| r | 96 |\n| lr | 0.001 |" in text
    assert "seed" not in text, "it is the default's"
    assert "| base | 0 | 1.5000 | 4.482 |" in text
    assert "| trained | 2 | 0.7500 | 2.117 |" in text
    assert "in training" not in text
    assert 'from_pretrained("mistralai/Mistral-7B-v0.3"' in text
    assert "--max-lora-rank 128" in text, "vLLM takes no 96"


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("model's own", "(model's own)"),
        ("--chat-template zephyr", "(zephyr)"),
        ("--chat-template /home/me/secret/own.jinja", "(own.jinja)"),
    ],
)
def test_the_template_and_private_folders(template: str, shown: str) -> None:
    described = run(template, model="/home/me/secret/my-base") | {"saved": {"step": 2}}
    text = model_card(described, [], 4)
    assert shown in text
    assert "secret" not in text
    assert ModelCard(text).data.base_model == "my-base"
    assert "held-out" not in text


def test_of_the_best_evaluation() -> None:
    """Its adapter is not the last step's; what is after it is not shown."""
    rows = [*ROWS[:-1], {"stage": "rebase", "step": 1, "eval_loss": 1.125}, ROWS[-1]]
    text = model_card(run() | {"saved": {"stage": "step", "step": 1, "eval_loss": 1.1}}, rows, 4)
    assert "12,345 trained parameters, step 1 of 2, the best evaluation's." in text
    table = [line for line in text.splitlines() if line.count("|") == 5]
    assert table == [
        "| | step | loss | perplexity |",
        "|---|---:|---:|---:|",
        "| base | 0 | 1.5000 | 4.482 |",
        "| after the init | 0 | 1.2500 | 3.49 |",
        "| trained | 1 | 1.1000 | 3.004 |",
    ]


def test_of_the_demo_and_of_pefts_methods() -> None:
    config = run()
    config["config"]["method"] = "peft:/home/me/dora.json"
    card = ModelCard(model_card(config, ROWS, None))
    assert card.data.base_model == DEMO_BASE
    assert card.data.tags == ["lora", "transformers", "peft", "lorasb-ds"]
    assert "/home/me" not in card.text
    assert "vllm" not in card.text

"""Templates in place of the model's own: those with a name, and files."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorasb_ds.config.chat_templates import LARGEST_BYTES, TEMPLATES, read_chat_template
from lorasb_ds.config.resolve import load_run_config, with_adapter
from lorasb_ds.config.run_layout import RUN_JSON, TEMPLATE_COPY
from lorasb_ds.config.stored_paths import with_absolute_paths
from lorasb_ds.data.chat import render_conversation, render_prompt
from lorasb_ds.data.template import render, template_note, template_origin
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.base import open_base
from lorasb_ds.models.tokenizer import use_chat_template
from lorasb_ds.models.tokenizer_files import TokenizerFiles

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Red?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Blue?"},
    {"role": "assistant", "content": "No."},
]
# As the models' own documentation shows them, with <s> and </s> for the tokenizer's tokens.
EXPECTED = {
    "alpaca": "Be brief.\n\n### Instruction:\nRed?\n\n### Response:\nYes.</s>\n\n"
    "### Instruction:\nBlue?\n\n### Response:\nNo.</s>\n\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRed?<|im_end|>\n"
    "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nBlue?<|im_end|>\n"
    "<|im_start|>assistant\nNo.<|im_end|>\n",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nRed?<end_of_turn>\n<start_of_turn>model\nYes."
    "<end_of_turn>\n<start_of_turn>user\nBlue?<end_of_turn>\n<start_of_turn>model\nNo."
    "<end_of_turn>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nRed?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBlue?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nNo.<|eot_id|>",
    "mistral": "<s>[INST] Be brief.\n\nRed? [/INST] Yes.</s>[INST] Blue? [/INST] No.</s>",
    "vicuna": "<s>Be brief. USER: Red? ASSISTANT: Yes.</s>USER: Blue? ASSISTANT: No.</s>",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nRed?</s>\n<|assistant|>\nYes.</s>\n"
    "<|user|>\nBlue?</s>\n<|assistant|>\nNo.</s>\n",
}
# Marks that tokenizers of other families have.
MARKS = [
    "<start_of_turn>",
    "<end_of_turn>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


@pytest.fixture
def knowing(tokenizer: Any) -> Any:
    """A tokenizer with all marks, <s> and </s>."""
    knows = copy.deepcopy(tokenizer)
    knows.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    knows.add_special_tokens({"additional_special_tokens": [*MARKS, "<|im_start|>", "<|im_end|>"]})
    knows.chat_template = "{{ 'its own' }}"
    return knows


@pytest.mark.parametrize("name", TEMPLATES)
def test_those_with_a_name(knowing: Any, name: str) -> None:
    use_chat_template(knowing, name)
    assert render(knowing, TURNS) == EXPECTED[name]
    made = render_conversation(knowing, TURNS)
    learned = [made.text[start:end] for start, end in made.spans]
    end = next(
        mark for mark in ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "</s>") if mark in made.text
    )
    assert [text.strip() for text in learned] == [f"Yes.{end}", f"No.{end}"]
    assert (made.remarks, made.left_out, made.ended) == ((), (), True)
    prompt = knowing.decode(render_prompt(knowing, TURNS[:-1]))
    assert made.text.startswith(prompt), "answers are asked for as they were learned"
    assert template_origin(knowing) == f"--chat-template {name}"
    assert template_note(knowing) == f"chat template: {name} (--chat-template)"


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_marks_that_are_no_tokens(tokenizer: Any, name: str) -> None:
    """Answers would not end there: generation stops at tokens."""
    with pytest.raises(
        ConfigError, match=rf"--chat-template {name} ends turns by .* tokens of this"
    ):
        use_chat_template(copy.deepcopy(tokenizer), name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ raise_exception('never') }}", "a question and an answer: the chat template refuses"),
        ("{% for %}", "the chat template refuses it"),
        ("{{ 'a' * 10 ** 11 }}", "more than 2 GiB"),
    ],
)
def test_files_that_are_no_templates(
    tokenizer: Any, tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        use_chat_template(copy.deepcopy(tokenizer), str(file))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of the templates with a name: alpaca, chatml"):
        read_chat_template("chatlm")
    with pytest.raises(ConfigError, match=r"cannot be read|there is no such file"):
        read_chat_template("{% for m in messages %}" * 40)
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_chat_template(str(tmp_path / "latin"))
    (tmp_path / "large").write_text(" " * (LARGEST_BYTES + 1))
    with pytest.raises(ConfigError, match="more than 1 MiB"):
        read_chat_template(str(tmp_path / "large"))


def test_it_goes_with_the_adapter(demo_model: Path, tmp_path: Path) -> None:
    """The base's own is in the way in no form that tokenizers have for one."""
    model, out = shutil.copytree(demo_model, tmp_path / "model"), tmp_path / "adapter"
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("{{ 'tools' }}")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "old"}))
    base, _ = open_base(load_run_config({"model": str(model), "chat_template": "vicuna"}))
    out.mkdir()
    TokenizerFiles.of(base).copy_into(out)
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.chat_template == TEMPLATES["vicuna"]
    assert loaded.apply_chat_template(TURNS, tokenize=False) == render(base.tokenizer, TURNS)


def test_a_replay_and_an_evaluation_read_the_runs_copy(tmp_path: Path) -> None:
    file, run = tmp_path / "own.jinja", tmp_path / "run"
    file.write_text(TEMPLATES["zephyr"])
    run.mkdir()
    stored = with_absolute_paths({"model": "demo", "chat_template": str(file)})
    assert stored["chat_template"] == str(file)
    assert with_absolute_paths({"chat_template": "zephyr"}) == {"chat_template": "zephyr"}
    (run / RUN_JSON).write_text(json.dumps({"config": stored, "absolute_paths": True}))
    (run / TEMPLATE_COPY).write_text(TEMPLATES["zephyr"])
    file.unlink()
    replayed = load_run_config({}, str(run / RUN_JSON))
    assert replayed.chat_template == str(run / TEMPLATE_COPY)
    assert with_adapter({}, str(run))["chat_template"] == str(run / TEMPLATE_COPY)
    (run / TEMPLATE_COPY).unlink()
    assert "chat_template" not in with_adapter({}, str(run)), "the adapter has a copy"
    assert with_adapter({"chat_template": "alpaca"}, str(run))["chat_template"] == "alpaca"

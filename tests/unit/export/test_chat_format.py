"""The tokenizer and chat template beside adapters, exported ones and merged models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from lorasb_ds.adapters.peft_writer import peft_tensors, save_peft_adapter
from lorasb_ds.data.chat import render_prompt
from lorasb_ds.data.template import stand_in
from lorasb_ds.export.adapter_reader import read_adapter
from lorasb_ds.export.chat_format import template_to_add, tokenizer_files, use_template_of
from lorasb_ds.export.merge import merge_adapter
from lorasb_ds.export.to_peft import export_adapter
from lorasb_ds.models.base import Base
from lorasb_ds.models.tokenizer_files import CHAT_TEMPLATE, TokenizerFiles, has_chat_template

TURNS = [{"role": "user", "content": "Say red"}]
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a chat template."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(tiny_model, folder)
    (folder / CHAT_TEMPLATE).unlink()
    return folder


@pytest.fixture(scope="module")
def adapter(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as training writes it."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    tensors = peft_tensors(LAYER, torch.ones(2, 48), torch.ones(48, 2))
    save_peft_adapter(
        folder,
        tensors,
        r=2,
        target_modules=[LAYER],
        base_model=str(plain),
        tokenizer=TokenizerFiles.of(Base(str(plain))),
    )
    return folder


def same_prompt(folder: Path, plain: Path) -> bool:
    """Whether a server's tokenizer makes the prompt that was trained on."""
    served: Any = AutoTokenizer.from_pretrained(folder)
    ids = served.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    return bool(ids == render_prompt(Base(str(plain)).tokenizer, TURNS))


def test_the_stand_in_is_beside_the_adapter(adapter: Path, plain: Path) -> None:
    names = {file.name for file in plain.glob("*token*")} | {CHAT_TEMPLATE}
    assert {file.name for file in adapter.iterdir()} == names | {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert same_prompt(adapter, plain)
    assert not has_chat_template(plain)
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(adapter))
    assert loaded.get_input_embeddings().weight.shape == (49152, 48)


def test_exports_and_merged_models_bring_it(adapter: Path, plain: Path, tmp_path: Path) -> None:
    stored = read_adapter(str(adapter))
    export_adapter(stored, tmp_path / "exported", r=1)
    assert same_prompt(tmp_path / "exported", plain)
    export_adapter(stored, tmp_path / "exported", r=2, overwrite=True)
    merge_adapter(stored, str(plain), tmp_path / "merged", say=lambda _: None)
    assert same_prompt(tmp_path / "merged", plain)
    assert CHAT_TEMPLATE in (tmp_path / "merged" / "SHA256SUMS").read_text()


def test_a_models_own_template_is_kept(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    base = Base(str(tiny_model))
    assert template_to_add(read_adapter(str(adapter)), base) is None
    TokenizerFiles.of(base).copy_into(tmp_path)
    for name in (CHAT_TEMPLATE, "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (tiny_model / name).read_bytes()


def test_an_adapters_template_is_used_where_the_base_has_none(
    adapter: Path, plain: Path, tmp_path: Path
) -> None:
    tokenizer = Base(str(plain)).tokenizer
    use_template_of(read_adapter(str(adapter)), tokenizer)
    assert tokenizer.chat_template is None, "it is the stand-in, which ends answers by its words"
    other = shutil.copytree(adapter, tmp_path / "other")
    (other / CHAT_TEMPLATE).write_text("{{ messages[0].content }}")
    use_template_of(read_adapter(str(other)), tokenizer)
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert template_to_add(read_adapter(str(other)), Base(str(plain))) == tokenizer.chat_template


def test_files_that_servers_could_not_read(plain: Path, tmp_path: Path) -> None:
    source, out = shutil.copytree(plain, tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    template = stand_in(Base(str(plain)).tokenizer)
    TokenizerFiles(source, template).copy_into(out)
    assert same_prompt(out, plain)
    own_code = config | {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(own_code))
    shutil.rmtree(out)
    out.mkdir()
    TokenizerFiles(source, template).copy_into(out)
    assert [file.name for file in out.iterdir()] == [CHAT_TEMPLATE]


def test_that_of_an_unfinished_run(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Its checkpoints have no tokenizer: the template of --chat-template is in the run's folder."""
    run, checkpoint = tmp_path / "run", tmp_path / "run/checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    (run / CHAT_TEMPLATE).write_text("{{ messages[0].content }}")
    stored = read_adapter(str(adapter))
    of_base = {"base_model_name_or_path": str(tiny_model)}
    stored = replace(stored, path=checkpoint, run=run, run_config={}, peft_config=of_base)
    assert template_to_add(stored, Base(str(tiny_model))) == "{{ messages[0].content }}"
    found = tokenizer_files(stored)
    assert found is not None
    (tmp_path / "out").mkdir()
    found.copy_into(tmp_path / "out")
    assert (tmp_path / "out" / CHAT_TEMPLATE).read_text() == "{{ messages[0].content }}"
    (run / CHAT_TEMPLATE).unlink()
    assert template_to_add(stored, Base(str(tiny_model))) is None

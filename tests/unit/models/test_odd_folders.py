"""A model's folder with odd contents ends in a sentence: no traceback, no control characters."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.data.template import render
from lorasb_ds.data.turns import RowError
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.base import Base
from lorasb_ds.models.generation import stop_tokens, stored_end_tokens
from lorasb_ds.training.adapter_plan import plan_adapter

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghij"]
TURNS = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
TEMPLATE = "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s>{% endfor %}"
FILES = (
    *("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"),
    *("model.safetensors.index.json", "chat_template.jinja"),
)
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2.5, 10**30, -(10**30), 1e308, float("nan"), "", "x" * 5000),
    *("\x1b[2J\x07", "a\nb" * 50, "../../etc/passwd", [], {}, [[]], [None], {"": {}}, [0] * 1000),
)
A_SCREEN = 2000  # characters


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a folder has, two shards included."""
    folder = tmp_path_factory.mktemp("whole")
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("pad_token", "bos_token", "eos_token"), WORDS, strict=False)),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 14}
    config = LlamaConfig(**sizes, num_attention_heads=2, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng():
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1KB")
    assert all((folder / name).is_file() for name in FILES)
    look_at(folder)
    return folder


def look_at(folder: Path) -> None:
    """Read all that training and evaluation read of a folder before any weight."""
    base = Base(str(folder))
    base.check_files()
    base.notes()
    plan_adapter(load_run_config({"model": str(folder), "r": 2}), base)
    render(base.tokenizer, TURNS)
    base.tokenizer("a b c")
    stop_tokens(base.tokenizer, stored_end_tokens(base.name, folder))


def changed(content: Any, draw: random.Random) -> Any:
    """A JSON value with something odd somewhere inside."""
    if isinstance(content, dict) and content and draw.random() < 0.9:
        key = draw.choice(list(content))
        if draw.random() < 0.1:
            return {k: v for k, v in content.items() if k != key}
        return {**content, key: changed(content[key], draw)}
    if isinstance(content, list) and content and draw.random() < 0.7:
        at = draw.randrange(len(content))
        return [*content[:at], changed(content[at], draw), *content[at + 1 :]]
    return draw.choice(ODD)


def torn(data: bytes, draw: random.Random) -> bytes:
    """Bytes of which some are missing, others or odd."""
    at = draw.randrange(len(data))
    odd = draw.choice([b"", b"\xff", b"\0", b"{{", b"[" * 2000, bytes([draw.randrange(256)])])
    rest = b"" if draw.random() < 0.3 else data[at + draw.randrange(3) :]
    return data[:at] + odd + rest


def check(whole: Path, folder: Path, seed: int) -> None:
    """Change a file or two of a copy, and look at it."""
    draw = random.Random(seed)  # noqa: S311, to be repeated
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    for name in draw.sample(FILES, draw.choice([1, 1, 1, 2])):
        file = folder / name
        if file.suffix == ".json" and draw.random() < 0.8:
            file.write_text(json.dumps(changed(json.loads(file.read_text()), draw)))
        else:
            file.write_bytes(torn(file.read_bytes(), draw))
    try:
        look_at(folder)
    except (ConfigError, RowError) as error:
        said = str(error)
        assert said, seed
        assert all(c.isprintable() or c == "\n" for c in said), (seed, said)
        assert len(said) <= A_SCREEN, (seed, said)
    except Exception as error:
        error.add_note(f"seed {seed}")
        raise


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_odd_contents(whole: Path, tmp_path: Path, first: int) -> None:
    for seed in range(first, first + 20):
        check(whole, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 11_000, 1000))
def test_many_odd_contents(whole: Path, tmp_path: Path, first: int) -> None:
    for seed in range(first, first + 1000):
        check(whole, tmp_path, seed)

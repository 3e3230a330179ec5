"""Tokenizers from every kind of folder, against sentencepiece itself; and what they pad with."""

from __future__ import annotations

import json
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoConfig, PreTrainedTokenizerFast

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.tokenization import encode
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.base import Base
from lorasb_ds.models.tokenizer import choose_pad_token, read_tokenizer
from tests.runs import ROOT

VOCAB_SIZE = 600
LLAMA = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "add_dummy_prefix": True}
GEMMA = {
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "eos_piece": "<eos>",
    "bos_piece": "<bos>",
    "add_dummy_prefix": False,
    # Gemma's runs of spaces and line ends are single tokens.
    "user_defined_symbols": ["<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁"],
}
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "gemma": GEMMA, "gemma2": GEMMA}
TEXTS = [
    "Hello world",
    "two  spaces   three    four",
    "  leading and trailing  ",
    "a\nb\n\nc\td",
    "1234 + 5678 = 6912",
    "emoji 🙂👍🏽, ünïcode, 漢字",
    "def f(x):\n    return x  # doubled\n\n\n",
    " ",
    "",
]


# As Llama 2 and Mistral have it.
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece_folder(folder: Path, family: str, **options: Any) -> Path:
    """A model's folder without weights: config.json and a tokenizer.model trained on the README."""
    folder.mkdir()
    SentencePieceTrainer.train(
        sentence_iterator=iter((ROOT / "README.md").read_text().splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB_SIZE,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        minloglevel=2,
        **{
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            **options,
        },
    )
    (folder / "tokenizer.vocab").unlink()
    write_config(folder, family)
    return folder


def write_config(folder: Path, model_type: str) -> None:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB_SIZE, **ids)
    config.architectures = ["AnyForCausalLM"]
    config.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("sentencepiece")
    return {name: sentencepiece_folder(base / name, name, **o) for name, o in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_tokenizer_model_gives_sentencepieces_tokens(
    folders: dict[str, Path], family: str
) -> None:
    tokenizer = Base(str(folders[family])).tokenizer
    reference = SentencePieceProcessor(model_file=str(folders[family] / "tokenizer.model"))
    assert len(tokenizer) == VOCAB_SIZE, "no token is added"
    assert tokenizer.padding_side == "right"
    assert tokenizer.eos_token_id == reference.eos_id()
    for text in TEXTS:
        expected = reference.encode(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, text
        assert tokenizer(text)["input_ids"] == [reference.bos_id(), *expected], text
        assert tokenizer.decode(expected) == text
        assert tokenizer.decode([*expected, reference.eos_id()], skip_special_tokens=True) == text


@pytest.mark.parametrize(("family", "pad"), [("llama", "<unk>"), ("gemma", "<pad>")])
def test_rows_of_a_bare_tokenizer_model(folders: dict[str, Path], family: str, pad: str) -> None:
    tokenizer = Base(str(folders[family])).tokenizer
    assert tokenizer.pad_token == pad
    turns = [{"role": "user", "content": "Say red"}, {"role": "assistant", "content": "red"}]
    example = encode(tokenizer, turns, RunConfig())
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.input_ids[example.first_label : -1]) == "red"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", [None, INSTRUCT], ids=["default", "instruct"])
def test_what_is_learned_of_sentencepiece_s_tokens(
    folders: dict[str, Path], family: str, template: str | None
) -> None:
    """Spaces, bytes and digits are tokens with odd ends; decoded, they are what was said."""
    tokenizer = Base(str(folders[family])).tokenizer
    tokenizer.chat_template = template
    mark = f" {tokenizer.eos_token}" if template else tokenizer.eos_token
    answers = ["red", "12 345", "🙂👍🏽, ünïcode, 漢字", "a  b\n\n\tc", "s"]
    turns = []
    for answer in answers:
        turns += [{"role": "user", "content": f"Say {answer}"}]
        turns += [{"role": "assistant", "content": answer}]
    example = encode(tokenizer, turns, RunConfig(max_length=10_000))
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids[1] != tokenizer.bos_token_id
    learned, end = [], 0
    for on, group in groupby(label >= 0 for label in example.labels):
        start, end = end, end + len(list(group))
        if on:  # cut out of the whole: alone, a text would lose its first space
            before, upto = (tokenizer.decode(example.input_ids[:i]) for i in (start, end))
            learned.append(upto[len(before) :])
    assert [text.strip() for text in learned] == [answer + mark for answer in answers]


def test_what_tokenizer_config_says_holds(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["mistral"], tmp_path / "model"))
    turns = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    says = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "chat_template": turns}
    (folder / "tokenizer_config.json").write_text(json.dumps(says))
    tokenizer = Base(str(folder)).tokenizer
    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer("Hello world")["input_ids"] == reference.encode("Hello world")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    example = encode(tokenizer, turns, RunConfig())
    prompt = example.input_ids[: example.first_label]
    assert prompt == reference.encode("[INST] Hi [/INST]")


def test_a_class_that_is_not_known(folders: dict[str, Path], tmp_path: Path) -> None:
    """AutoTokenizer would make a tokenizer of it that drops every space."""
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    write_config(folder, "qwen2")
    with pytest.raises(ConfigError, match=r"how a qwen2 model uses tokenizer\.model is not known"):
        _ = Base(str(folder)).tokenizer


def test_a_tokenizer_model_of_another_kind(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's form
    with pytest.raises(ConfigError, match=r"is no sentencepiece model.*tokenizer\.json"):
        _ = Base(str(folder)).tokenizer
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match="its tokenizer cannot be read"):
        _ = Base(str(folder)).tokenizer


@pytest.mark.parametrize(
    "other",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
    ],
)
def test_other_tokens_than_sentencepieces_are_refused(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    folder = sentencepiece_folder(tmp_path / "model", "llama", **LLAMA, **other)
    with pytest.raises(ConfigError, match=r"does not give the tokens that sentencepiece gives"):
        _ = Base(str(folder)).tokenizer


def words(*tokens: str, **special: str) -> Any:
    """A real tokenizer of some words."""
    from tokenizers import Tokenizer, models

    vocabulary = {token: i for i, token in enumerate(("a", "b", *tokens))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize(
    ("tokens", "special", "vocab_size", "chosen"),
    [
        (("</s>", "<pad>", "mine"), {"pad_token": "mine"}, 5, None),
        (("</s>", "<unk>", "<pad>"), {"unk_token": "<unk>"}, 5, "<pad>"),
        (("</s>", "<unk>", "<pad>"), {"unk_token": "<unk>"}, 4, "<unk>"),
        (("</s>", "<|finetune_right_pad_id|>"), {}, 4, "<|finetune_right_pad_id|>"),
        (("</s>", "<unk>"), {"unk_token": "<unk>"}, 4, "<unk>"),
        (("</s>",), {"unk_token": "</s>"}, 3, "</s>"),
        (("</s>",), {}, 3, "</s>"),
        (("</s>",), {"pad_token": "[PAD]"}, 3, "</s>"),  # added beyond the model's vocabulary
    ],
)
def test_pad_token(
    tokens: tuple[str, ...], special: dict[str, str], vocab_size: int, chosen: str | None
) -> None:
    tokenizer = words(*tokens, eos_token="</s>", **special)  # noqa: S106
    length = len(tokenizer)
    note = choose_pad_token(tokenizer, vocab_size)
    assert tokenizer.pad_token_id < vocab_size
    assert len(tokenizer) == length, "no token is added"
    assert tokenizer.pad_token == (chosen or special["pad_token"])
    if chosen is None:
        assert note is None
    else:
        assert f"padding with {chosen}" in str(note)
        assert ("pads with [PAD]" in str(note)) == ("pad_token" in special)


def test_a_tokenizer_of_another_model(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    words("x", "y", "</s>", eos_token="</s>").save_pretrained(folder)  # noqa: S106
    write_config(folder, "llama")
    config = Base(str(folder)).hf_config
    assert read_tokenizer(str(folder), folder, config).eos_token_id == 4
    config.vocab_size = 4
    with pytest.raises(ConfigError, match=r"number 4.*has 4 tokens"):
        read_tokenizer(str(folder), folder, config)

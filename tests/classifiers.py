"""Tiny random bases for classifiers, with the tokenizers of their kinds, and rows for them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, WordPieceTrainer

FAMILIES = ("roberta", "bert", "llama")
WORDS = "the film is was a good bad great poor story and it not really nice dull to see".split()  # noqa: SIM905
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # large enough for logits that differ
}


def tiny_base(family: str, folder: Path, demo_model: Path) -> Path:
    """A random base as its publisher would give it: a masked or causal language model."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        LlamaConfig,
        LlamaForCausalLM,
        RobertaConfig,
        RobertaForMaskedLM,
    )

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, **SIZES))
            for file in demo_model.glob("*token*"):
                folder.mkdir(exist_ok=True)
                shutil.copy(file, folder)
        elif family == "bert":
            size = _bert_tokenizer(folder)
            model = BertForMaskedLM(
                BertConfig(vocab_size=size, max_position_embeddings=64, **SIZES)
            )
        else:
            size = _roberta_tokenizer(folder)
            # Its positions begin behind that of the padding token, 1.
            sizes = {"vocab_size": size, "max_position_embeddings": 66, "type_vocab_size": 1}
            model = RobertaForMaskedLM(RobertaConfig(**sizes, **SIZES))
        model.save_pretrained(folder)
    return folder


_TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_ENCODER = SIZES | {"max_position_embeddings": 80}
_DECODER = _ENCODER | {"num_key_value_heads": 2, "head_dim": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "albert": _ENCODER | {"embedding_size": 16},
    "deberta-v2": _ENCODER | {"pooler_hidden_size": 32},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "electra": _ENCODER | {"embedding_size": 32},
    "gemma2": _DECODER,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 80},
    "modernbert": _ENCODER | _TOKENS | {"cls_token_id": 0, "sep_token_id": 2},
    "mpnet": _ENCODER,
    "qwen3": _DECODER,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}


def other_base(family: str, folder: Path) -> Path:
    """A random base of one of ``OTHERS``, without any head, with RoBERTa's tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModel

    size = _roberta_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CONFIG_MAPPING[family](vocab_size=size, **OTHERS[family])
        AutoModel.from_config(config).save_pretrained(folder)
    return folder


def _roberta_tokenizer(folder: Path) -> int:
    from transformers import RobertaTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    RobertaTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def _bert_tokenizer(folder: Path) -> int:
    from transformers import BertTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def opinions(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows of one text of different lengths, with a label that a word of it decides."""
    words = {0: ("bad", "poor", "dull"), 1: ("good", "great", "nice")}
    rows = []
    for i in range(first, first + count):
        label = i * 7 % 3 % 2
        rest = " ".join(WORDS[(i + j) % len(WORDS)] for j in range(i % 5))
        rows.append({"sentence": f"it is {words[label][i % 3]} {rest}".strip(), "label": label})
    return rows


def pairs(count: int) -> list[dict[str, Any]]:
    """Rows of two texts, with a number from 0 to 5: the more equal words, the higher."""
    rows = []
    for i in range(count):
        first = [WORDS[(i * 3 + j) % len(WORDS)] for j in range(2 + i % 4)]
        second = [WORDS[(i * 5 + j) % len(WORDS)] for j in range(2 + i % 3)]
        share = len({*first} & {*second}) / len({*first} | {*second})
        rows.append(
            {"sentence1": " ".join(first), "sentence2": " ".join(second), "label": 0.3 + 4 * share}
        )
    return rows

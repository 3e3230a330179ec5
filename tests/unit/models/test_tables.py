"""Tables of models, compared with what the models do at their ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.data.dataset import TokenizedRows, features
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.empty_model import empty_model
from lorasb_ds.models.tables import largest_ids, tables_of
from lorasb_ds.training.prepare import prepare
from tests.runs import word_rows, write_jsonl

SIZE, VOCABULARY = 12, 40
HEADS: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
GPT2: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": SIZE}
BART: dict[str, Any] = {
    "d_model": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
}
BERT = {**HEADS, "intermediate_size": 16, "is_decoder": True}
# model type -> its configuration, and whether rows may be longer than its positions.
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt2": (GPT2, False),
    "gpt_bigcode": (GPT2, False),
    "gptj": ({**GPT2, "rotary_dim": 8}, False),
    "codegen": ({**GPT2, "n_head": 4, "rotary_dim": 4}, False),
    "openai-gpt": (GPT2, False),
    "ctrl": ({**GPT2, "dff": 16}, False),
    "gpt_neo": ({**HEADS, "num_layers": 1, "attention_types": [[["global"], 1]]}, False),
    "opt": ({**HEADS, "ffn_dim": 16, "word_embed_proj_dim": 16}, False),
    "biogpt": ({**HEADS, "intermediate_size": 16}, False),
    "bart": (BART, False),
    "bert": (BERT, False),
    "roberta": ({**BERT, "pad_token_id": 1}, False),
    "mpt": ({"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": SIZE}, False),
    "xglm": ({**BART, "num_layers": 1, "attention_heads": 2, "ffn_dim": 16}, True),
    "bloom": ({"n_layer": 1, "n_head": 2, "hidden_size": 16}, True),
    "falcon": ({**HEADS, "alibi": True}, True),
    "gpt_neox": ({**HEADS, "intermediate_size": 16}, True),
    "llama": ({**HEADS, "intermediate_size": 16}, True),
    "qwen3": (
        {**HEADS, "intermediate_size": 16, "head_dim": 8, "num_key_value_heads": 2},
        True,
    ),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_where_each_family_ends(kind: str) -> None:
    """The longest row passes, one token more does not; the same with ids."""
    options, is_open = FAMILIES[kind]
    is_given = {"n_positions", "max_seq_len"} & set(options)
    positions = {} if is_given else {"max_position_embeddings": SIZE}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = AutoConfig.for_model(kind, **{**tokens, **positions, **options})
    tables = tables_of(empty_model(config, torch.float32))
    assert tables.num_embeddings == VOCABULARY
    assert (tables.num_positions is None) == is_open
    model = AutoModelForCausalLM.from_config(config).eval()

    def run(length: int, token: int = 5) -> None:
        with torch.inference_mode():
            model(input_ids=torch.full((1, length), token), use_cache=False)

    longest = tables.num_positions or SIZE + 3
    run(longest)
    run(3, VOCABULARY - 1)
    with pytest.raises(IndexError):
        run(3, VOCABULARY)
    if not is_open:
        with pytest.raises((IndexError, RuntimeError)):
            run(longest + 1)


@given(st.lists(st.lists(st.integers(0, 99), max_size=4), min_size=1, max_size=9), st.data())
def test_largest_ids(ids: list[list[int]], data: st.DataObject) -> None:
    """Of some rows of a table in several parts, some rows of which are empty."""
    import datasets

    columns: dict[str, list[Any]] = {name: [None] * len(ids) for name in features()}
    table = datasets.Dataset.from_dict({**columns, "input_ids": ids}, features=features())
    cut = data.draw(st.integers(0, len(ids)))
    parts = [table.select(range(a, b)) for a, b in ((0, cut), (cut, len(ids))) if a < b]
    index = np.array([i for i in range(len(ids)) if ids[i]], np.int64)
    rows: Any = TokenizedRows(datasets.concatenate_datasets(parts), index, None, None, ())  # type: ignore[arg-type]
    assert largest_ids(rows).tolist() == [max(of_row) for of_row in ids if of_row]


def with_config(tiny_model: Path, folder: Path, **changed: Any) -> Path:
    """A model's folder without weights: they are looked at after the rows."""
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    return folder


def test_rows_that_the_model_cannot_hold(tiny_model: Path, tmp_path: Path) -> None:
    """Refused before any process group: a longer row of each kind, and an id of an added token."""
    from transformers import OPTConfig, OPTForCausalLM

    folder = tmp_path / "opt"
    tokens = {"vocab_size": 49152, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 2}
    sizes = {**FAMILIES["opt"][0], "max_position_embeddings": 128}
    OPTForCausalLM(OPTConfig(**sizes, **tokens)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    long = {"question": "Say it", "answer": "word " * 160}
    rows = write_jsonl(tmp_path / "rows.jsonl", word_rows(9))
    longer = write_jsonl(tmp_path / "longer.jsonl", [*word_rows(9), long])
    given: dict[str, Any] = {"model": str(folder), "r": 2, "init_samples": 4, "data": rows}
    prepare(load_run_config({**given, "data": longer, "max_length": 128}), 1)
    for which, what in (
        ({"data": longer}, "training row longer.jsonl:10 may need"),
        ({"eval_data": longer}, "held-out row longer.jsonl:10 may need"),
        ({"init_data": longer}, "row for the init longer.jsonl:10 may need"),
        ({"eval_data": rows, "generate_samples": 2, "eval_every": 1}, "--generate-samples: rows."),
    ):
        with pytest.raises(ConfigError, match="has 128 positions") as error:
            prepare(load_run_config({**given, **which}), 1)
        assert what in str(error.value)
    tokenizer.add_tokens(["<answer>"])
    tokenizer.save_pretrained(folder)
    prepare(load_run_config(given), 1)  # no row has it
    added = [*word_rows(9), {"question": "Say it", "answer": "<answer> yes"}]
    data = write_jsonl(tmp_path / "added.jsonl", added)
    with pytest.raises(ConfigError) as error:
        prepare(load_run_config({**given, "data": data}), 1)
    message = str(error.value)
    assert "training row added.jsonl:10 has the token '<answer>' of id 49152" in message
    assert "ends at id 49151; 1 of 10 rows have such ids" in message


def test_rotary_models_are_warned_of(tiny_model: Path, tmp_path: Path) -> None:
    folder = with_config(tiny_model, tmp_path / "model", max_position_embeddings=100)
    long = {"question": "Say it", "answer": "word " * 160}
    data = write_jsonl(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}, long] * 4)
    given = {"model": str(folder), "r": 2, "init_samples": 4, "data": data}
    (note,) = prepare(load_run_config(given), 1).table_notes
    assert "4 of 8 rows are longer than the 100 tokens that" in note
    assert "training row rows.jsonl:2 may need" in note

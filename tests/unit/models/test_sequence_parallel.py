"""Which runs are refused that would compute rows in pieces, before there are processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask

from lorasb_ds.config.ds_config import resolve_ds_config
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.data.batch import collate
from lorasb_ds.data.tokenization import Example
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.sequence_parallel import check_shareable
from lorasb_ds.training.prepare import prepare
from tests.runs import word_rows, write_jsonl
from tests.text_families import tiny_config

EAGER = {"attn_implementation": "eager"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


def empty(family: str, **more: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family, **more))


@pytest.mark.parametrize(
    ("family", "more", "size", "longest", "message"),
    [
        ("bart", {}, 2, 64, "takes no position ids"),
        ("llama", EAGER, 2, 64, "has eager. Give --attn-implementation sdpa"),
        ("qwen3_next", {}, 2, 64, "has layers of linear_attention, which need whole rows"),
        ("minimax_m3_vl_text", {}, 2, 64, "has layers of indexed_attention"),
        ("mistral", {"sliding_window": 32}, 2, 64, "see 32 tokens.*Give --max-length 32"),
        ("mistral", {"sliding_window": 64}, 2, 64, None),
        ("mistral", {"sliding_window": None}, 2, 1 << 20, None),
        ("gemma3_text", {"sliding_window": 16}, 2, 64, "see 16 tokens"),
        ("llama4_text", {"attention_chunk_size": 16}, 2, 64, "see 16 tokens"),
        ("llama", {"rope_parameters": DYNAMIC}, 2, 4096, "changes in rows of more than 2048"),
        ("llama", {"rope_parameters": YARN | {"rope_theta": 1e4}}, 2, 4096, None),
        ("llama", {}, 3, 64, "4 attention heads and 2 key-value heads. Give a divisor of 4"),
        ("llama", {}, 4, 64, None),
        (
            "llama",
            {"num_attention_heads": 8, "num_key_value_heads": 6},
            4,
            64,
            "8 attention heads and 6 key-value",
        ),
    ],
)
def test_models(
    family: str, more: dict[str, Any], size: int, longest: int, message: str | None
) -> None:
    model = empty(family, **more)
    if message is None:
        check_shareable(model, size, longest)
        return
    with pytest.raises(ConfigError, match=f"--sequence-parallel {size}") as error:
        check_shareable(model, size, longest)
    assert re.search(message, str(error.value)), str(error.value)


def test_options(tmp_path: Path, tiny_model: Path) -> None:
    for more in ({"packing": True}, {"task_type": "sequence-classification"}):
        with pytest.raises(ConfigError, match="--sequence-parallel 2 does not work with --"):
            load_run_config({"sequence_parallel": 2, **more})
    config = load_run_config({"sequence_parallel": 2, "micro_batch_size": 3})
    with pytest.raises(ConfigError, match="2 does not divide the number of processes, 3,"):
        resolve_ds_config(config, 3)
    resolved, settled = resolve_ds_config(config, 4)
    assert settled.train_batch_size == 6, "of two groups"
    assert resolved["train_batch_size"] == 12, "to DeepSpeed all ranks have rows of their own"
    own = tmp_path / "own.json"
    own.write_text('{"sequence_parallel_size": 2, "zero_optimization": {"stage": 3}}')
    with pytest.raises(ConfigError, match="sequence_parallel_size would change what gradients"):
        resolve_ds_config(load_run_config({"ds_config": str(own)}), 2)
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(4))
    given = {"model": str(tiny_model), "data": data, "r": 4, "sequence_parallel": 3}
    with pytest.raises(ConfigError, match="--sequence-parallel 3 gives each process its share"):
        prepare(load_run_config(given), 3)


def test_no_mask_is_made_of_a_piece() -> None:
    """It would have the square of the piece's length, and DeepSpeed drops it."""
    config = tiny_config("llama")
    config._attn_implementation = "sdpa"
    row = collate([Example([5] * 11, [5] * 11)], 2)
    for index in range(3):
        inputs = row.piece(index, 3).inputs
        embeddings = torch.zeros(*inputs.pop("input_ids").shape, 32)
        made = create_causal_mask(config, embeddings, past_key_values=None, **inputs)
        assert made is None

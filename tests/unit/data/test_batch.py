"""Padding, packing and dealing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from lorasb_ds.data.batch import Batch, assign_to_ranks, collate, collate_packed
from lorasb_ds.data.tokenization import IGNORE_INDEX, Example
from lorasb_ds.models.loss import token_loss_sum
from lorasb_ds.models.packing import keeps_packs_apart


def examples_of(*lengths: int, vocab_size: int = 1000) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in lengths:
        ids = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        examples.append(Example(ids, [IGNORE_INDEX] * (length // 3) + ids[length // 3 :]))
    return examples


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    micro_batch_size=st.integers(1, 5),
    world_size=st.integers(1, 5),
    more_rounds=st.integers(0, 2),
)
def test_dealing_loses_and_repeats_nothing(
    lengths: list[int], micro_batch_size: int, world_size: int, more_rounds: int
) -> None:
    fewest = -(-len(lengths) // (micro_batch_size * world_size))
    dealt = assign_to_ranks(lengths, micro_batch_size, world_size, fewest + more_rounds)
    assert len(dealt) == fewest + more_rounds
    assert assign_to_ranks(lengths, micro_batch_size, world_size) == assign_to_ranks(
        lengths, micro_batch_size, world_size, fewest
    )
    assert all(len(ranks) == world_size for ranks in dealt), "ranks would wait for each other"
    batches = list(chain.from_iterable(dealt))
    assert sorted(chain.from_iterable(batches)) == list(range(len(lengths)))
    assert max(map(len, batches)) <= micro_batch_size
    assert max(map(len, batches)) - min(map(len, batches)) <= 1, "evenly"
    in_order = [lengths[i] for i in chain.from_iterable(batches)]
    assert in_order == sorted(lengths, reverse=True)


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_is_the_unpacked_loss(tiny_model: Path, attention: str, one_row: bool) -> None:
    """And so are the gradients, in fp32. Packs of other lengths, so that some are padded."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation=attention
    )
    examples = examples_of(5, 9, 3, 12, 1, 7)
    # A row that is learned from its first token on, as plain text is.
    examples[2] = Example(examples[2].input_ids, examples[2].input_ids)
    found = []
    for batches in (
        [collate_packed([examples[:3], examples[3:]], 2, one_row=one_row)],
        [collate([example], 2) for example in examples],
        [collate(examples, 2)],
    ):
        model.zero_grad()
        loss = torch.stack([token_loss_sum(model, batch) for batch in batches]).sum()
        loss.backward()
        weight = model.model.layers[0].self_attn.q_proj.weight
        found.append((loss.item(), weight.grad.clone(), sum(b.num_label_tokens for b in batches)))
        assert sum(b.num_tokens for b in batches) == 37
    (packed, gradient, labels), *others = found
    for loss, expected, num_labels in others:
        assert packed == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        assert labels == num_labels
    assert collate_packed([examples], 2, one_row=one_row, weightless=True).num_label_tokens == 0


def test_models_that_mix_packs_are_found_out(tiny_model: Path) -> None:
    examples = examples_of(1, 9, 12)
    device = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).train()
        assert keeps_packs_apart(model, examples, device, one_row=False)
        assert model.training

    class Mixing(torch.nn.Module):
        def forward(self, position_ids: Any = None, **inputs: Any) -> Any:
            return model(**inputs)

    assert not keeps_packs_apart(Mixing(), examples, device, one_row=False)


def test_bloom_has_no_position_ids() -> None:
    import inspect

    assert "position_ids" not in inspect.signature(BloomForCausalLM.forward).parameters
    assert BloomConfig().model_type == "bloom"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_pieces_have_what_whole_rows_have(count: int) -> None:
    batch = collate(examples_of(9, 4, 1), 2)
    pieces = [batch.piece(i, count) for i in range(count)]
    assert len({piece.input_ids.shape for piece in pieces}) == 1

    def joined(of: Callable[[Batch], Any]) -> torch.Tensor:
        return torch.cat([of(piece) for piece in pieces], 1)[:, :9]

    assert torch.equal(joined(lambda piece: piece.input_ids), batch.input_ids)
    assert torch.equal(joined(lambda piece: piece.next_labels), batch.next_labels)
    assert torch.equal(joined(lambda piece: piece.position_ids), torch.arange(9).repeat(3, 1))
    assert max(int(piece.inputs["position_ids"].max()) for piece in pieces) == 8, "for its table"
    assert sum(piece.num_tokens for piece in pieces) == batch.num_tokens
    assert sum(piece.num_label_tokens for piece in pieces) == batch.num_label_tokens
    assert sum(len(piece.label_positions) for piece in pieces) == batch.num_label_tokens
    weightless = collate(examples_of(9), 2, weightless=True).piece(0, count)
    assert (weightless.num_tokens, weightless.num_label_tokens) == (0, 0)

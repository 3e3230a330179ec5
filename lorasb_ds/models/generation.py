"""What a model says of held-out rows: losses, greedy answers, likelihoods of given answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lorasb_ds.data.batch import deal
from lorasb_ds.data.chat import NEXT_QUESTION, end_of_turn
from lorasb_ds.data.formats import RowError
from lorasb_ds.distributed.collectives import rank_and_size

T = TypeVar("T")


@dataclass(frozen=True)
class Generated:
    text: str
    cut_off: bool  # it has as many tokens as it was allowed, and does not end


def stop_tokens(tokenizer: Any, others: int | Sequence[int] | None = None) -> list[int]:
    """Tokens that end an answer: the end of text, and the mark with which the template ends a turn,
    which is what training teaches.

    Args:
        others: a generation configuration's own, ``eos_token_id``.
    """
    found = {tokenizer.eos_token_id}
    found |= {others} if isinstance(others, int) else set(others or ())
    with suppress(RowError):  # a template that refuses the simplest conversation
        mark = tokenizer(end_of_turn(tokenizer), add_special_tokens=False)["input_ids"]
        found |= set(mark) if len(mark) == 1 else set()
    return sorted(found)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    device: torch.device,
    *,
    stop: Sequence[int],
    synced: bool = False,
) -> list[Generated]:
    """Greedy continuations of a batch, padded on the left.

    Where the tokenizer has no chat template, an answer also ends where the next question begins: a
    base that knows no turns goes on to invent one.

    Args:
        stop: ``stop_tokens``.
        synced: under ZeRO-3, where ranks have different prompts: every rank goes on until the last
            one has ended, since all take part in gathers. Collective then.
    """
    length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):
        input_ids[i, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[i, length - len(prompt) :] = 1
    has_turns = tokenizer.chat_template is not None
    by_text = {} if has_turns else {"stop_strings": [NEXT_QUESTION], "tokenizer": tokenizer}
    output = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(stop),
        synced_gpus=synced,
        **by_text,
    )[:, length:]
    ended = torch.isin(output, torch.tensor(list(stop), device=output.device)).any(1).tolist()
    full = output.shape[1] >= max_new_tokens
    answers = []
    for text, end in zip(
        tokenizer.batch_decode(output, skip_special_tokens=True), ended, strict=True
    ):
        said, more, _ = (text, "", "") if has_turns else text.partition(NEXT_QUESTION)
        answers.append(Generated(said.strip(), cut_off=full and not end and not more))
    return answers


def rounds(lengths: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], bool]]:
    """This rank's batches: positions in ``lengths``, and whether they count.

    There are as many on every rank, so that all take part in ZeRO-3's gathers equally often. One
    that is short of rows does some over that do not count. Rows of similar lengths come together.
    """
    if not lengths:
        return
    rank, world_size = rank_and_size(None)
    shortest = min(range(len(lengths)), key=lambda i: lengths[i])
    for of_ranks in deal(lengths, batch_size, world_size):
        yield of_ranks[rank] or [shortest], bool(of_ranks[rank])


def from_all_ranks(mine: dict[int, T]) -> dict[int, T]:
    """What all ranks have found, on every rank. Collective."""
    if not dist.is_initialized():
        return mine
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return {key: value for part in found for key, value in part.items()}

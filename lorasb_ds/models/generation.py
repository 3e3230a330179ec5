"""Greedy generation, and the distribution of prompts over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lorasb_ds.config.paths import read_json
from lorasb_ds.data.batch import assign_to_ranks
from lorasb_ds.data.template import NEXT_QUESTION, end_of_turn
from lorasb_ds.data.turns import RowError
from lorasb_ds.distributed.collectives import rank_and_size
from lorasb_ds.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Generated:
    """A generated answer.

    Attributes:
        text: without special tokens, stripped.
        cut_off: whether it reached the limit of new tokens before it ended.
    """

    text: str
    cut_off: bool


def stop_tokens(tokenizer: Any, others: int | Sequence[int] | None = None) -> list[int]:
    """Return the tokens that end an answer, sorted.

    They are the end of text, and the mark with which the chat template ends a turn, as the model
    learns it in training.

    Args:
        others: ``eos_token_id`` of the base's generation configuration.
    """
    found = {tokenizer.eos_token_id}
    found |= {others} if isinstance(others, int) else set(others or ())
    with suppress(RowError):  # a template that refuses the simplest conversation
        mark = tokenizer(end_of_turn(tokenizer), add_special_tokens=False)["input_ids"]
        found |= set(mark) if len(mark) == 1 else set()
    return sorted(found)


def stored_end_tokens(model: str, folder: Path) -> list[int]:
    """Return the tokens that end an answer by a base's generation_config.json, if it says any.

    Args:
        model: as --model gives it, for messages.
        folder: the folder with the files.
    Raises:
        ConfigError: if they are no tokens.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return []
    found = read_json(str(file), "--model").get("eos_token_id")
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and 0 <= token < 1 << 31 for token in tokens):
        raise ConfigError(
            f"--model {model}: eos_token_id in generation_config.json is no token, nor a list of "
            "tokens. Fix the file, or remove it."
        )
    return tokens


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
    """Generate greedy continuations of a batch, padded on the left.

    If the tokenizer has no chat template, an answer also ends where the next question begins: a
    base that knows no turns goes on and invents one.

    Args:
        prompts: token ids.
        stop: of ``stop_tokens``.
        synced: needed under ZeRO-3 if ranks have different prompts: every rank goes on until the
            last one has ended, since all take part in gathers. The call is then collective.
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
    """Yield this rank's batches: positions in ``lengths``, and whether the batch counts.

    Every rank gets as many batches, so that all take part in the same gathers of ZeRO-3; a rank
    without rows left repeats one that does not count. Rows of similar lengths come together.
    """
    if not lengths:
        return
    rank, world_size = rank_and_size(None)
    shortest = min(range(len(lengths)), key=lambda i: lengths[i])
    for of_ranks in assign_to_ranks(lengths, batch_size, world_size):
        yield of_ranks[rank] or [shortest], bool(of_ranks[rank])


def from_all_ranks(mine: dict[int, T]) -> dict[int, T]:
    """Merge the ranks' dictionaries on every rank. Collective."""
    if not dist.is_initialized():
        return mine
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return {key: value for part in found for key, value in part.items()}

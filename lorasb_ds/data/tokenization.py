"""A row as token ids, and the labels among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.chat import Rendered, bos_text, render_conversation
from lorasb_ds.data.formats import Messages, RowError

IGNORE_INDEX = -100  # torch's cross-entropy skips these labels


@dataclass(frozen=True)
class Example:
    """One row as the model sees it. Labels are aligned with the token ids; the loss shifts them."""

    input_ids: list[int]
    labels: list[int]  # IGNORE_INDEX where nothing is to be learned
    truncated: bool = False

    @property
    def num_label_tokens(self) -> int:
        """The first token of a row has nothing before it to be predicted from."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])

    @property
    def first_label(self) -> int:
        """Position of the first token that is learned; the row's length if none is."""
        known = (i for i, label in enumerate(self.labels) if label != IGNORE_INDEX)
        return next(known, len(self.labels))


def encode(tokenizer: Any, said: Messages | str, config: RunConfig) -> Example:
    """A conversation, or plain text, as tokens; at most ``--max-length`` of them.

    Raises:
        RowError: if the chat template refuses it, or nothing of it would be learned: such a row
            would weigh nothing.
    """
    if isinstance(said, str):
        text = bos_text(tokenizer) + said
        rendered = Rendered(text, [(0, len(text))], ended=False)
    else:
        rendered = render_conversation(tokenizer, said)
    spans = {
        "responses": rendered.spans,
        "last": rendered.spans[-1:],
        "all": [(0, len(rendered.text))],
    }[config.loss_on]
    # Templates write the beginning of sequence themselves.
    tokens = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids = tokens["input_ids"]
    learned = _overlaps(tokens["offset_mapping"], spans)
    if not rendered.ended:
        input_ids = [*input_ids, tokenizer.eos_token_id]
        learned.append(True)
    labels = [i if on else IGNORE_INDEX for i, on in zip(input_ids, learned, strict=True)]
    return _fit(Example(input_ids, labels), config)


def _overlaps(offsets: Iterable[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token has a part in one of the spans, which ascend.

    A token reaches back to the one before it: some tokenizers leave white space out of offsets.
    """
    found, k, last_end = [], 0, 0
    for start, end in offsets:
        start = min(start, last_end)
        while k < len(spans) and spans[k][1] <= start:
            k += 1
        found.append(k < len(spans) and spans[k][0] < end)
        last_end = max(last_end, end)
    return found


def _fit(example: Example, config: RunConfig) -> Example:
    """Cut to ``--max-length`` as ``--truncation`` says."""
    n, too_long = config.max_length, len(example.input_ids) > config.max_length
    if too_long and config.truncation == "skip":
        raise RowError("longer than --max-length")
    if too_long:
        kept = slice(n) if config.truncation == "right" else slice(-n, None)
        example = Example(example.input_ids[kept], example.labels[kept], truncated=True)
    if example.num_label_tokens == 0:
        raise RowError("no response token left after truncation" if too_long else "too short")
    return example

"""Turn a row into token ids and labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorasb_ds.config.data_options import DataOptions
from lorasb_ds.data.chat import CHANGED, render_conversation, render_text
from lorasb_ds.data.turns import Messages, RowError, Tools

IGNORE_INDEX = -100  # torch's cross-entropy skips these labels


@dataclass(frozen=True)
class Example:
    """One row as the model sees it. Labels are aligned with the token ids; the loss shifts them.

    Attributes:
        label: of a row that is classified, as JSON; "" of others, which have labels of tokens.
        target: the number of that label's class, or the number that it is; None: not known yet.
        token_type_ids: which of two texts a token is of, for models that ask for it; else ().
    """

    input_ids: list[int]
    labels: list[int]  # IGNORE_INDEX where nothing is to be learned
    truncated: bool = False
    remarks: tuple[str, ...] = field(default=(), compare=False)  # see ``Rendered``
    left_out: tuple[str, ...] = field(default=(), compare=False)
    label: str = ""
    target: int | float | None = None
    token_type_ids: tuple[int, ...] = ()

    @property
    def num_label_tokens(self) -> int:
        """Number of labels that are learned: all but the first token's, which nothing precedes.

        A row's own label is one.
        """
        if self.label or self.target is not None:
            return 1
        return sum(label != IGNORE_INDEX for label in self.labels[1:])

    @property
    def first_label(self) -> int:
        """Position of the first token that is learned, or the row's length."""
        known = (i for i, label in enumerate(self.labels) if label != IGNORE_INDEX)
        return next(known, len(self.labels))


def encode(
    tokenizer: Any, content: Messages | str, options: DataOptions, tools: Tools | None = None
) -> Example:
    """Tokenize a conversation or plain text, to at most ``--max-length`` tokens.

    Args:
        tools: that the conversation may call.
    Raises:
        RowError: if the chat template refuses it, or nothing of it would be learned.
    """
    if isinstance(content, str):
        rendered = render_text(tokenizer, content)
    else:
        rendered = render_conversation(tokenizer, content, tools)
    spans = {
        "responses": rendered.spans,
        "last": rendered.spans[-1:],
        "all": [(0, len(rendered.text))],
    }[options.loss_on]
    # Templates write the beginning-of-sequence token themselves.
    tokens = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids = tokens["input_ids"]
    learned = _overlaps(tokens["offset_mapping"], spans)
    if not rendered.ended:
        input_ids = [*input_ids, tokenizer.eos_token_id]
        learned.append(True)
    labels = [i if on else IGNORE_INDEX for i, on in zip(input_ids, learned, strict=True)]
    # With "last", what the template makes of earlier responses is read, but not learned.
    said = tuple(r for r in rendered.remarks if r != CHANGED or options.loss_on != "last")
    example = Example(input_ids, labels, remarks=said, left_out=rendered.left_out)
    return _fit(example, options)


def _overlaps(offsets: Iterable[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Tell for each token whether it overlaps one of the spans, which ascend.

    A token begins where the one before it ends: some tokenizers leave white space out of offsets.
    """
    found, k, last_end = [], 0, 0
    for start, end in offsets:
        start = min(start, last_end)
        while k < len(spans) and spans[k][1] <= start:
            k += 1
        found.append(k < len(spans) and spans[k][0] < end)
        last_end = max(last_end, end)
    return found


def _fit(example: Example, options: DataOptions) -> Example:
    """Cut to ``--max-length`` as ``--truncation`` says."""
    n, too_long = options.max_length, len(example.input_ids) > options.max_length
    if too_long and options.truncation == "skip":
        raise RowError("longer than --max-length")
    if too_long:
        kept = slice(n) if options.truncation == "right" else slice(-n, None)
        ids, labels = example.input_ids[kept], example.labels[kept]
        example = replace(example, input_ids=ids, labels=labels, truncated=True)
    if example.num_label_tokens == 0:
        raise RowError("no response token left after truncation" if too_long else "too short")
    return example

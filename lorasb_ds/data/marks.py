"""Recognize what texts and prompts hold already of the marks that a template would write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lorasb_ds.data.template import MARK, bos_text, chat_template, render, text_around
from lorasb_ds.data.turns import RowError


@dataclass(frozen=True)
class Marks:
    """What a template and its tokenizer write around texts.

    Attributes:
        bos: what begins a text, once; "" if nothing does.
        end: ends an assistant's turn; "" if nothing does.
        eos: the end-of-sequence token.
        special: all special tokens but those for padding and unknown text, and ``bos``.
        opening: what a conversation begins with, without ``bos``: its first special token, or the
            text before the first turn.
        closing: what a prompt ends with, from the last turn's end up to the response.
        header: the part of it that asks for a response.
    """

    bos: str
    end: str
    eos: str
    special: tuple[str, ...]
    opening: str
    closing: str
    header: str

    def ends(self, text: str) -> bool:
        """Return whether a text ends with a special token."""
        return text.rstrip().endswith(self.special)

    def without_end(self, text: str) -> str:
        """Return a response without the marks of its end that it has already."""
        marks = tuple(mark for mark in (self.end, self.eos) if mark)
        while (cut := text.rstrip()).endswith(marks):
            text = cut[: -len(next(mark for mark in marks if cut.endswith(mark)))]
        return text

    def is_prompt(self, text: str) -> bool:
        """Return whether a prompt was rendered already.

        A special token at its beginning says so; a template of plain words must have written its
        end, too.
        """
        text = text.strip().removeprefix(self.bos).strip()
        if not self.opening or not text.startswith(self.opening):
            return False
        closing = self.closing.strip()
        return self.opening in self.special or bool(closing and text.endswith(closing))


def marks_of(tokenizer: Any) -> Marks:
    """Return the marks of a tokenizer and its template."""
    return _marks(tokenizer, chat_template(tokenizer))


@lru_cache(maxsize=8)
def _marks(tokenizer: Any, _template: str) -> Marks:
    """Return the marks; the template, which may be changed, is for the cache's key."""
    added = [str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special]
    bos, eos = bos_text(tokenizer), str(tokenizer.eos_token)
    end, head, closing, header = "", "", "", ""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}]
    try:
        whole = render(tokenizer, turns)
        named = tokenizer.bos_token
        # Where it also begins turns, it is such a mark, and no beginning of sequence.
        if named and whole.startswith(named) and whole.count(named) == 1:
            bos = str(named)
        head = text_around(tokenizer, turns[:1], 0)[0].removeprefix(bos)
        end = text_around(tokenizer, turns, 1)[1].strip()
        asked = [{"role": "user", "content": MARK}]
        prompt = render(tokenizer, asked, add_generation_prompt=True)
        closing = prompt.rpartition(MARK)[2]
        header = prompt.removeprefix(render(tokenizer, asked))
        header = "" if header == prompt else header
    except RowError:  # a template that refuses the simplest conversation
        pass
    unlike = {tokenizer.unk_token, tokenizer.pad_token, bos} - {eos, end}
    special = tuple(dict.fromkeys(t for t in (eos, end, *added) if t and t not in unlike))
    first = next((token for token in special if head.lstrip().startswith(token)), head.strip())
    return Marks(bos, end, eos, special, first, closing, header)

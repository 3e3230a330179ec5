"""Render a conversation by the chat template, and find the assistant's turns in the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from lorasb_ds.data.formats import Messages, RowError

# For tokenizers without a chat template. Other turns, such as system's, are written as they are.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}"
    "{% if turn.role == 'user' %}{{ '### Question:\n' + turn.content + '\n\n' }}"
    "{% elif turn.role == 'assistant' %}{{ '### Answer:\n' + turn.content + eos_token }}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}"
    "{% else %}{{ turn.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Answer:\n' }}{% endif %}"
)
NEXT_QUESTION = "### Question:"  # the start of a user's turn in it
MARK = "\ue000turn\ue000"  # placeholder of a turn; private characters, which no text has


@dataclass(frozen=True)
class Rendered:
    """A text, and the parts of it that are learned."""

    text: str
    spans: list[tuple[int, int]]  # (start, end) in characters; ascending
    ended: bool  # whether the text ends with an end-of-turn mark; else an EOS token must follow


def chat_template(tokenizer: Any) -> Any:
    return tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE


def bos_text(tokenizer: Any) -> str:
    """Return the beginning-of-sequence token if the tokenizer begins texts with it, else ""."""
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if begins and tokenizer.bos_token else ""


def render(tokenizer: Any, messages: Messages, add_generation_prompt: bool = False) -> str:
    """Render a conversation by the chat template.

    Raises:
        RowError: if the template refuses it: Gemma's takes no system turns, Mistral's requires
            alternating roles, …
    """
    own = {} if tokenizer.chat_template else {"bos_token": bos_text(tokenizer)}
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template(tokenizer) if own else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **own,
        )
    except (TemplateError, TypeError) as error:
        raise RowError("the chat template refuses the conversation") from error


def render_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Return the token ids of everything before a response. Raises as ``render``."""
    text = render(tokenizer, messages, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_of_turn(tokenizer: Any) -> str:
    """Return the template's mark of the end of an assistant's turn; "" if it has none."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}]
    return _text_around(tokenizer, messages, 1)[1].strip()


def render_conversation(tokenizer: Any, messages: Messages) -> Rendered:
    """Render a conversation that ends with the assistant, and find the assistant's turns.

    A turn of the assistant starts where the template's prompt for it ends, and ends with the
    template's end-of-turn mark (``<|im_end|>``), which the model has to learn. Templates may
    rewrite turns (Qwen 3 drops the thoughts of earlier ones): a turn is found by the text that the
    template writes around a placeholder in its place. Text after the last turn's mark is cut off.

    Raises:
        RowError: if the template refuses the conversation, or drops a turn.
    """
    text = render(tokenizer, messages)
    _, tail = _text_around(tokenizer, messages, len(messages) - 1)
    mark = tail.rstrip()
    spans = []
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant" or turn.get("weight") == "0":
            continue
        head, tail = _text_around(tokenizer, messages, i)
        end = len(text) - len(tail)
        start = _prompt_length(tokenizer, messages[:i], text[:end])
        if start is None and text.startswith(head) and len(head) <= end:
            start = len(head)
        if start is None or not text.endswith(tail):
            raise RowError("the chat template drops a response")
        spans.append((start, end + len(mark) if tail.startswith(mark) else end))
    if not spans:
        raise RowError("no response with a weight")
    return Rendered(text[: spans[-1][1]], spans, ended=bool(mark))


def _text_around(tokenizer: Any, messages: Messages, i: int) -> tuple[str, str]:
    """Return the text that the template writes before and after the content of turn ``i``."""
    marked = [*messages[:i], {**messages[i], "content": MARK}, *messages[i + 1 :]]
    parts = render(tokenizer, marked).split(MARK)
    if len(parts) != 2:
        raise RowError("the chat template drops a response")
    return parts[0], parts[1]


def _prompt_length(tokenizer: Any, before: Messages, text: str) -> int | None:
    """Return the length of the prompt for the next response; None if ``text`` has another start."""
    if not before:
        return None
    try:
        prompt = render(tokenizer, before, add_generation_prompt=True)
    except RowError:
        return None
    return len(prompt) if text.startswith(prompt) else None

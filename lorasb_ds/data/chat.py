"""Render what a row says, and find the parts of the text that are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from lorasb_ds.data.marks import Marks, marks_of
from lorasb_ds.data.template import bos_text, render, text_around
from lorasb_ds.data.turns import Messages, RowError, Tools

# What is said of rows that are kept, behind their number.
RENDERED = "were rendered already: they are taken as they are, without the chat template"
HELD = "have special tokens at their ends already: none is added again"
AS_WRITTEN = "have a last response that the chat template would change: it is learned as written"
CHANGED = (
    "have earlier responses that the chat template changes: they are learned as it writes them"
)
ELSEWHERE = (
    "have a response that begins elsewhere than the chat template's prompt ends: answers begin "
    "differently when they are generated"
)
WARNINGS = (CHANGED, ELSEWHERE)


@dataclass(frozen=True)
class Rendered:
    """A text, and the parts of it that are learned.

    Attributes:
        spans: (start, end) in characters; ascending.
        ended: whether the text ends with an end-of-turn mark; else an EOS token must follow.
        remarks: what the user should know.
        left_out: fields of turns that the template does not write.
    """

    text: str
    spans: list[tuple[int, int]]
    ended: bool
    remarks: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def render_text(tokenizer: Any, text: str) -> Rendered:
    """Return plain text, with the tokens that begin and end it unless it has them."""
    marks, bos = marks_of(tokenizer), bos_text(tokenizer)
    begun, ended = bool(bos) and text.lstrip().startswith(bos), marks.ends(text)
    whole = text if begun else bos + text
    return Rendered(whole, [(0, len(whole))], ended, (HELD,) if begun or ended else ())


def render_prompt(tokenizer: Any, messages: Messages, tools: Tools | None = None) -> list[int]:
    """Return the token ids of everything before a response.

    Raises:
        RowError: as ``render``.
    """
    marks = marks_of(tokenizer)
    if _is_rendered(marks, messages):
        text = _with_bos(marks, messages[0]["content"])
    else:
        messages, _ = _without_marks(marks, messages)
        text = render(tokenizer, messages, tools, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render_conversation(tokenizer: Any, messages: Messages, tools: Tools | None = None) -> Rendered:
    """Render a conversation that ends with the assistant, and find the assistant's turns.

    A turn of the assistant starts where the template's prompt for it ends, and ends with the
    template's end-of-turn mark (``<|im_end|>``), which the model has to learn. Templates may
    rewrite turns (Qwen 3 drops the thoughts of earlier ones): a turn is found by the text that the
    template writes around a placeholder in its place. Text after the last turn's mark is cut off.
    The last turn is written as the row has it where the template would drop a part of it, as
    DeepSeek-R1's drops thoughts.

    Raises:
        RowError: if the template refuses the conversation, drops a turn, or knows no tools.
    """
    marks = marks_of(tokenizer)
    if _is_rendered(marks, messages[:-1]):
        return _rendered_pair(marks, *(turn["content"] for turn in messages))
    messages, remarks = _without_marks(marks, messages)
    text = render(tokenizer, messages, tools)
    messages, left_out = _known_parts(tokenizer, messages, tools, text)
    head, tail = _around(tokenizer, messages, len(messages) - 1, tools)
    mark = tail.rstrip()
    learned, spans = learned_turns(messages), []
    for i in learned:
        content = messages[i]["content"]
        if (
            i == len(messages) - 1
            and text.startswith(head)
            and not _holds(text, len(head), content)
        ):
            text = f"{head}{content}{tail}"
            remarks.append(AS_WRITTEN)
        turn = _find_turn(tokenizer, messages, i, tools, text)
        if not _holds(text[: turn.end], turn.content, content):
            remarks.append(CHANGED)
        if i == learned[-1] and not turn.follows_prompt:
            remarks.append(ELSEWHERE)
        end = turn.end + len(mark) if text.startswith(mark, turn.end) else turn.end
        spans.append((turn.start, end))
    if not spans:
        raise RowError("no response with a weight")
    text = text[: spans[-1][1]]
    ended = bool(mark and text.endswith(mark)) or marks.ends(text)
    return Rendered(text, spans, ended, tuple(dict.fromkeys(remarks)), left_out)


def learned_turns(messages: Messages) -> list[int]:
    """Return the positions of the turns that are learned."""
    of_assistant = (i for i, turn in enumerate(messages) if turn["role"] == "assistant")
    return [i for i in of_assistant if messages[i].get("weight") != "0"]


class _Turn(NamedTuple):
    """Where a turn of the assistant is in a text.

    Attributes:
        start: behind the template's prompt for it.
        content: where its content begins, at the latest.
        end: without its mark, if it calls no tools.
        follows_prompt: whether the text has that prompt, or the template makes none.
    """

    start: int
    content: int
    end: int
    follows_prompt: bool


def _find_turn(tokenizer: Any, messages: Messages, i: int, tools: Tools | None, text: str) -> _Turn:
    """Find an assistant's turn in the text of the conversation.

    Raises:
        RowError: if it is not there.
    """
    head, tail = _around(tokenizer, messages, i, tools)
    if messages[i].get("tool_calls"):  # the turn ends where the text up to it ends
        upto = render(tokenizer, messages[: i + 1], tools).rstrip()
        end = len(upto) if text.startswith(upto) else -1
    else:
        end = len(text) - len(tail) if text.endswith(tail) else -1
    prompt = _prompt(tokenizer, messages[:i], tools)
    if prompt is not None and text[: max(0, end)].startswith(prompt):
        return _Turn(len(prompt), min(len(prompt), len(head)), end, True)
    if not text.startswith(head) or len(head) > end:
        raise RowError("the chat template drops a response")
    return _Turn(len(head), len(head), end, prompt is None)


def _around(tokenizer: Any, messages: Messages, i: int, tools: Tools | None) -> tuple[str, str]:
    """Return the text before and after a turn; calls of tools are a part of it.

    Templates write such calls beside the content or in its place. What is around them is what
    would be around a plain turn.
    """
    if not messages[i].get("tool_calls"):
        return text_around(tokenizer, messages, i, tools)
    plain = {key: value for key, value in messages[i].items() if key != "tool_calls"}
    return text_around(tokenizer, [*messages[:i], plain], i, tools)


def _prompt(tokenizer: Any, before: Messages, tools: Tools | None) -> str | None:
    """Return the prompt for the next response; None if the template makes none."""
    if not before:
        return None
    try:
        return render(tokenizer, before, tools, add_generation_prompt=True)
    except RowError:
        return None


def _known_parts(
    tokenizer: Any, messages: Messages, tools: Tools | None, text: str
) -> tuple[Messages, tuple[str, ...]]:
    """Leave out what the template does not write.

    Args:
        text: of the conversation; it is the same without what is left out.
    Returns:
        The turns, and names of what was left out.
    Raises:
        RowError: if these are tools or calls of them.
    """
    left_out = []
    if tools is not None and _is_same(tokenizer, messages, None, text):
        raise RowError("tools, which the chat template does not know")
    fields = {field for turn in messages for field in turn} - {"role", "content", "weight"}
    for field in sorted(fields):
        without = [{k: v for k, v in turn.items() if k != field} for turn in messages]
        if not _is_same(tokenizer, without, tools, text):
            continue
        if field == "tool_calls":
            raise RowError("calls of tools, which the chat template does not know")
        messages = without
        left_out.append(f"{field} of turns")
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant" and not _holds(text, 0, turn["content"]):
            try:
                text_around(tokenizer, messages, i, tools)
            except RowError:
                left_out.append(f"turns of the {turn['role']}")
    return messages, tuple(dict.fromkeys(left_out))


def _is_same(tokenizer: Any, messages: Messages, tools: Tools | None, text: str) -> bool:
    try:
        return render(tokenizer, messages, tools) == text
    except RowError:
        return False


def _holds(text: str, start: int, part: str) -> bool:
    """Return whether a text has a part behind ``start``, whatever white space is in it."""
    return part in text[start:] or "".join(part.split()) in "".join(text[start:].split())


def _without_marks(marks: Marks, messages: Messages) -> tuple[Messages, list[str]]:
    """Return the turns without the special tokens that the template will write, and a remark."""
    cleaned = []
    for i, turn in enumerate(messages):
        content = turn["content"].removeprefix(marks.bos) if i == 0 else turn["content"]
        if turn["role"] == "assistant":
            content = marks.without_end(content)
        cleaned.append({**turn, "content": content})
    return cleaned, [HELD] if cleaned != messages else []


def _is_rendered(marks: Marks, before: Messages) -> bool:
    """Return whether a conversation is a prompt that was rendered already, and its response."""
    return (
        len(before) == 1 and before[0]["role"] == "user" and marks.is_prompt(before[0]["content"])
    )


def _rendered_pair(marks: Marks, prompt: str, response: str) -> Rendered:
    """Join a prompt that was rendered already and its response."""
    header = marks.header.strip()
    if header and not prompt.rstrip().endswith(header) and response.lstrip().startswith(header):
        said = response.partition(header)[2].lstrip()
        prompt, response = prompt + response.removesuffix(said), said
    prompt = _with_bos(marks, prompt)
    has_end = marks.ends(response)
    text = (prompt + response).rstrip() if has_end else prompt + response + marks.end
    ended = has_end or bool(marks.end)
    return Rendered(text, [(len(prompt), len(text))], ended, (RENDERED,))


def _with_bos(marks: Marks, text: str) -> str:
    return text if text.startswith(marks.bos) else marks.bos + text

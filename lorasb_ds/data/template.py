"""The chat template of a tokenizer, or the plain one that stands in for it: render turns by it."""

from __future__ import annotations

import textwrap
from datetime import date
from typing import Any

from jinja2 import TemplateError

from lorasb_ds.data.turns import Messages, RowError, Tools
from lorasb_ds.errors import ConfigError, printable
from lorasb_ds.system.limits import memory_limit, time_limit
from lorasb_ds.system.units import GIB

# For tokenizers without a chat template. Other turns, such as system's, are written as they are.
STAND_IN = (
    "{% for turn in messages %}"
    "{% if turn.role == 'user' %}{{ '### Question:\n' + turn.content + '\n\n' }}"
    "{% elif turn.role == 'assistant' %}{{ '### Answer:\n' + turn.content + eos_token }}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}"
    "{% else %}{{ turn.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Answer:\n' }}{% endif %}"
)
NEXT_QUESTION = "### Question:"  # the start of a user's turn in it
MARK = "\ue000turn\ue000"  # placeholder of a turn; private characters, which no text has
CLOCK = "strftime_now"  # the function by which templates ask for today's date
RENDER_S = 20.0  # for a conversation, of which thousands of turns take a second
RENDER_BYTES = 2 * GIB  # likewise: beside what the process has
WORDS = 100  # characters at most of what a template says


def chosen_template(tokenizer: Any) -> str | None:
    """Return what --chat-template named, if its template is in the place of the tokenizer's own."""
    return getattr(tokenizer, "template_name", None)


def template_origin(tokenizer: Any) -> str:
    """Return whose the template is, for run.json: "model's own", "stand-in", or the chosen one."""
    if (chosen := chosen_template(tokenizer)) is not None:
        return f"--chat-template {chosen}"
    return "model's own" if tokenizer.chat_template else "stand-in"


def template_note(tokenizer: Any) -> str | None:
    """Return what the user should know of the template; None if it is the model's own."""
    if (chosen := chosen_template(tokenizer)) is not None:
        return f"chat template: {chosen} (--chat-template)"
    if tokenizer.chat_template:
        return None
    return (
        "warning: the model has no chat template: a plain one stands in for it (### Question: … "
        "### Answer: …). A server needs the same one: chat_template.jinja beside the adapter. "
        "--chat-template takes another one"
    )


def stand_in(tokenizer: Any) -> str:
    """Return the stand-in for a tokenizer: it begins texts as the tokenizer itself does."""
    return ("{{ bos_token }}" if bos_text(tokenizer) else "") + STAND_IN


def chat_template(tokenizer: Any, tools: Tools | None = None) -> str:
    """Return the template that conversations are rendered by; with tools it may be another."""
    if not tokenizer.chat_template:
        return stand_in(tokenizer)
    return str(tokenizer.get_chat_template(tools=tools))


def check_template(model: str, tokenizer: Any) -> None:
    """Refuse a tokenizer with several templates of which none is the default.

    Args:
        model: for the message.
    Raises:
        ConfigError: it lists their names.
    """
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise ConfigError(
            f"--model {model}: it has several chat templates ({', '.join(sorted(named))}), and "
            'none is named "default". Copy the one to use to chat_template.jinja in the model\'s '
            "folder: that is the default."
        )


def bos_text(tokenizer: Any) -> str:
    """Return the beginning-of-sequence token if the tokenizer begins texts with it, else ""."""
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if begins and tokenizer.bos_token else ""


def fix_date(tokenizer: Any, today: date) -> None:
    """Let templates that ask for today's date get this one, wherever the tokenizer is used."""
    tokenizer.template_date = today


def date_in(tokenizer: Any) -> str | None:
    """Return the date that the tokenizer's templates write; None if they ask for none."""
    templates = tokenizer.chat_template
    texts = templates.values() if isinstance(templates, dict) else [templates or ""]
    today = getattr(tokenizer, "template_date", None)
    return str(today) if today is not None and any(CLOCK in text for text in texts) else None


def render(
    tokenizer: Any,
    messages: Messages,
    tools: Tools | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Render a conversation by the chat template.

    Raises:
        RowError: if the template refuses it, with its own words: Gemma 2's takes no system turns,
            Mistral's requires alternating roles, …
        ConfigError: if it takes longer than ``RENDER_S``, or more than ``RENDER_BYTES``.
    """
    turns = [{k: v for k, v in turn.items() if k != "weight"} for turn in messages]
    try:
        template = chat_template(tokenizer, tools)
        _set_clock(tokenizer, template)
        with time_limit(RENDER_S), memory_limit(RENDER_BYTES):
            return str(
                tokenizer.apply_chat_template(
                    turns,
                    tools=tools,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
    except MemoryError as error:
        raise ConfigError(
            f"The chat template takes more than {RENDER_BYTES // GIB} GiB of memory for one "
            "conversation. Fix chat_template.jinja in the model's folder, or the file of "
            "--chat-template."
        ) from error
    except TimeoutError as error:
        raise ConfigError(
            f"The chat template takes {error} for one conversation: it may have a loop without an "
            "end. Fix chat_template.jinja in the model's folder, or the file of --chat-template."
        ) from error
    except Exception as error:  # a template is a program, and fails in as many ways
        raise RowError(f"the chat template refuses it: {_words(error)}") from error


def _set_clock(tokenizer: Any, template: str) -> None:
    """Let the template's ``strftime_now`` give the run's date.

    transformers takes no functions from outside; it compiles a template once in a process and
    keeps it, with this function among its globals.
    """
    if CLOCK not in template:
        return
    from transformers.utils.chat_template_utils import _compile_jinja_template

    today = getattr(tokenizer, "template_date", None) or date.today()
    _compile_jinja_template(template).globals[CLOCK] = today.strftime


def _words(error: Exception) -> str:
    """Return what an error says: short, on one line, without control characters."""
    text = printable(str(error))
    kind = "" if isinstance(error, TemplateError) and text.strip() else f"{type(error).__name__}: "
    return textwrap.shorten(kind + text, WORDS, placeholder=" …").removesuffix(":")


def end_of_turn(tokenizer: Any) -> str:
    """Return the template's mark of the end of an assistant's turn; "" if it has none.

    Raises:
        RowError: as ``text_around``.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}]
    return text_around(tokenizer, messages, 1)[1].strip()


def text_around(
    tokenizer: Any, messages: Messages, i: int, tools: Tools | None = None
) -> tuple[str, str]:
    """Return the text that the template writes before and after the content of turn ``i``.

    Raises:
        RowError: if the template refuses the conversation, or drops or repeats the turn.
    """
    marked = [*messages[:i], {**messages[i], "content": MARK}, *messages[i + 1 :]]
    parts = render(tokenizer, marked, tools).split(MARK)
    if len(parts) != 2:
        raise RowError(f"the chat template drops a {_called(messages[i])}")
    return parts[0], parts[1]


def _called(turn: dict[str, Any]) -> str:
    return "response" if turn["role"] == "assistant" else f"turn of the {turn['role']}"

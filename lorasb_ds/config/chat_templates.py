"""Chat templates that --chat-template takes by name, in the formats of their first models."""

from __future__ import annotations

import textwrap
from pathlib import Path

from lorasb_ds.config.paths import expand_home
from lorasb_ds.errors import ConfigError

LARGEST_BYTES = 1 << 20  # of a template in a file

# What begins a text; tokenizers without such a token write nothing.
BOS = "{{ bos_token or '' }}"
# Llama 2's and Gemma's formats have no system turn: its words begin the user's first one.
SYSTEM_INTO_USER = (
    "{% if messages and messages[0].role == 'system' %}"
    "{% set first = messages[0].content ~ '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set first = '' %}{% endif %}"
)
TEMPLATES = {
    "alpaca": (
        "{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '### Instruction:\n' ~ m.content ~ '\n\n' }}"
        "{% elif m.role == 'assistant' %}{{ '### Response:\n' ~ m.content ~ eos_token ~ '\n\n' }}"
        "{% else %}{{ m.content ~ '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}"
        "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "gemma": (
        BOS + SYSTEM_INTO_USER + "{% for m in messages %}"
        "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{% set said = (first if loop.first else '') ~ m.content %}"
        "{{ '<start_of_turn>' ~ role ~ '\n' ~ said | trim ~ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "llama3": (
        BOS + "{% for m in messages %}"
        "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim ~ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        BOS + SYSTEM_INTO_USER + "{% for m in messages %}"
        "{% if m.role == 'user' %}"
        "{{ '[INST] ' ~ (first if loop.first else '') ~ m.content ~ ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' ~ m.content ~ eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant turns can be written.') }}"
        "{% endif %}{% endfor %}"
    ),
    "vicuna": (
        BOS + "{% for m in messages %}"
        "{% if m.role == 'user' %}{{ 'USER: ' ~ m.content ~ ' ' }}"
        "{% elif m.role == 'assistant' %}{{ 'ASSISTANT: ' ~ m.content ~ eos_token }}"
        "{% else %}{{ m.content ~ ' ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}"
        "{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token ~ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}


def read_chat_template(chosen: str) -> str:
    """Return the text of ``--chat-template``: one of ``TEMPLATES``, or a file.

    Raises:
        ConfigError: if it is neither, or cannot be read.
    """
    if chosen in TEMPLATES:
        return TEMPLATES[chosen]
    file = Path(expand_home(chosen))
    try:
        if not file.is_file():
            raise ConfigError(
                f"--chat-template {chosen}: there is no such file, and none of the templates with "
                f"a name: {', '.join(TEMPLATES)}."
            )
        if file.stat().st_size > LARGEST_BYTES:
            raise ConfigError(f"--chat-template {chosen} has more than 1 MiB. Name another file.")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        named = f"--chat-template {textwrap.shorten(chosen, 200)}"
        raise ConfigError(f"{named} cannot be read: {error.args[-1]}.") from None

"""What is learned of a conversation, under several chat templates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.chat import render_conversation, render_prompt
from lorasb_ds.data.formats import Messages, RowError, parse_row
from lorasb_ds.data.tokenization import IGNORE_INDEX, Example, _overlaps, encode

# As Qwen 3: thoughts of earlier turns are dropped, and the last one gets an empty thought.
THINKING = """
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- set thought = m.content.split('</think>')[0] if '</think>' in m.content else '' %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.last %}
{{- '<think>\\n' + thought.split('<think>')[-1].strip('\\n') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- said + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# As Llama 2: contents are stripped, and the mark of a turn's end has a space before it.
TRIMMED = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# The prompt begins a thought that is in no turn of the past.
BEGUN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
TURNS = [
    {"role": "user", "content": "Say red"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "Say red e"},
    {"role": "assistant", "content": "e"},  # also in the mark <|im_end|>
]
END = "<|im_end|>"


def with_template(tokenizer: Any, template: str | None) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def learned(tokenizer: Any, said: Messages | str, **options: Any) -> list[str]:
    """The texts that are learned."""
    example = encode(tokenizer, said, RunConfig(**options))
    texts, previous = [], False
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
        if label != IGNORE_INDEX:
            texts = texts if previous else [*texts, []]
            texts[-1].append(token)
        previous = label != IGNORE_INDEX
    return [tokenizer.decode(ids) for ids in texts]


def test_the_ids_of_a_single_turn(tokenizer: Any) -> None:
    """Prompt, response and end are tokens of their own, as the model will generate them."""
    for response in ("red", " red, blue", "42", "é🙂", "end of im_end|>", "<|"):
        example = encode(tokenizer, [TURNS[0], TURNS[1] | {"content": response}], RunConfig())
        prompt = render_prompt(tokenizer, TURNS[:1])
        answer = tokenizer(response, add_special_tokens=False)["input_ids"]
        assert example.input_ids == [*prompt, *answer, tokenizer.eos_token_id]
        assert example.labels == [IGNORE_INDEX] * len(prompt) + [*answer, tokenizer.eos_token_id]
        assert example.first_label == len(prompt)


@pytest.mark.parametrize(
    ("template", "responses"),
    [
        ("own", [f"red{END}", f"e{END}"]),
        (THINKING, [f"red{END}", f"<think>\n\n</think>\n\ne{END}"]),
        (TRIMMED, [f" red {END}", f" e {END}"]),
        (ENDLESS, [" red", f" e{END}"]),  # the prompt's last space is in the first token
        (None, [f"red{END}", f"e{END}"]),
        (BEGUN, [f"red{END}", f"e{END}"]),
    ],
    ids=["own", "thinking", "trimmed", "endless", "default", "begun"],
)
def test_what_is_learned(tokenizer: Any, template: str | None, responses: list[str]) -> None:
    if template != "own":
        tokenizer = with_template(tokenizer, template)
    assert learned(tokenizer, TURNS) == responses
    assert learned(tokenizer, TURNS, loss_on="last") == responses[1:]
    (everything,) = learned(tokenizer, TURNS, loss_on="all")
    assert everything.endswith(responses[1])
    whole = render_conversation(tokenizer, TURNS).text
    assert everything == (whole if whole.endswith(END) else whole + END)


def test_thoughts_of_earlier_turns_are_not_there_to_be_learned(tokenizer: Any) -> None:
    tokenizer = with_template(tokenizer, THINKING)
    turns = [dict(turn) for turn in TURNS]
    turns[1]["content"] = "<think>red or blue?</think>\n\nred"
    turns[3]["content"] = "<think>\nthe letter e\n</think>\n\ne"
    assert learned(tokenizer, turns) == [
        f"red{END}",
        f"<think>\nthe letter e\n</think>\n\ne{END}",
    ]


def test_contents_are_found_though_they_are_stripped_or_repeated(tokenizer: Any) -> None:
    tokenizer = with_template(tokenizer, TRIMMED)
    turns = [
        {"role": "user", "content": "  yes"},
        {"role": "assistant", "content": "\n yes \n"},
        {"role": "user", "content": "yes yes"},
        {"role": "assistant", "content": "yes"},
    ]
    assert learned(tokenizer, turns) == [f" yes {END}"] * 2


def test_the_default_template(tokenizer: Any) -> None:
    plain = with_template(tokenizer, None)
    example = encode(plain, TURNS[:2], RunConfig())
    assert plain.decode(example.input_ids) == f"### Question:\nSay red\n\n### Answer:\nred{END}"
    prompt = plain("### Question:\nSay red\n\n### Answer:\n")["input_ids"]
    assert render_prompt(plain, TURNS[:1]) == prompt == example.input_ids[: example.first_label]
    text = render_conversation(plain, [{"role": "system", "content": "Be short."}, *TURNS]).text
    assert text == (
        "Be short.\n\n### Question:\nSay red\n\n### Answer:\nred<|im_end|>\n\n"
        "### Question:\nSay red e\n\n### Answer:\ne<|im_end|>"
    )


def test_plain_text_is_learned_whole_and_ends(tokenizer: Any) -> None:
    for loss_on in ("responses", "last", "all"):
        assert learned(tokenizer, "Once upon", loss_on=loss_on) == [f"Once upon{END}"]


def test_templates_that_refuse_or_drop(tokenizer: Any) -> None:
    strict = with_template(
        tokenizer,
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    assert learned(strict, TURNS[:2]) == [f"red{END}"]
    with pytest.raises(RowError, match="the chat template refuses the conversation"):
        encode(strict, [{"role": "system", "content": "s"}, *TURNS], RunConfig())
    forgetful = with_template(tokenizer, "{{ messages[0].content }}")
    with pytest.raises(RowError, match="the chat template drops a response"):
        encode(forgetful, TURNS, RunConfig())


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_turns_may_be_left_out_of_the_loss(tokenizer: Any, mark: dict[str, Any]) -> None:
    """As OpenAI's and axolotl's rows say it."""
    first = [TURNS[0], TURNS[1] | mark, *TURNS[2:]]
    said = parse_row({"messages": first})[1]
    assert learned(tokenizer, said) == ["e" + END]
    last = [*TURNS[:3], TURNS[3] | mark]
    assert learned(tokenizer, parse_row({"messages": last})[1]) == ["red" + END]
    assert learned(tokenizer, parse_row({"messages": TURNS})[1]) == ["red" + END, "e" + END]
    with pytest.raises(RowError, match="no response with a weight"):
        learned(tokenizer, parse_row({"messages": [TURNS[0], TURNS[1] | mark]})[1])


def test_tokens_with_odd_offsets() -> None:
    # "a \n" + "é": offsets without white space (as RoBERTa's), then two bytes of one character.
    offsets = [(0, 1), (3, 3), (3, 4), (3, 4)]
    assert _overlaps(offsets, [(1, 3)]) == [False, True, False, False]
    assert _overlaps(offsets, [(3, 4)]) == [False, False, True, True]
    assert _overlaps(offsets, [(0, 1), (3, 4)]) == [True, False, True, True]
    # A token that two spans share, and one that reaches into a span.
    assert _overlaps([(0, 4), (4, 6)], [(1, 2), (3, 5)]) == [True, True]
    assert _overlaps([(0, 2), (2, 5)], [(4, 5)]) == [False, True]


def test_truncation(tokenizer: Any) -> None:
    whole = encode(tokenizer, TURNS, RunConfig())
    n = len(whole.input_ids)
    for truncation in ("right", "left", "skip"):
        same = encode(tokenizer, TURNS, RunConfig(max_length=n, truncation=truncation))
        assert same == whole, "a row that just fits is not truncated"
    right = encode(tokenizer, TURNS, RunConfig(max_length=n - 2))
    assert right == Example(whole.input_ids[:-2], whole.labels[:-2], truncated=True)
    left = encode(tokenizer, TURNS, RunConfig(max_length=n - 2, truncation="left"))
    assert left == Example(whole.input_ids[2:], whole.labels[2:], truncated=True)
    with pytest.raises(RowError, match="longer than --max-length"):
        encode(tokenizer, TURNS, RunConfig(max_length=n - 2, truncation="skip"))
    with pytest.raises(RowError, match="no response token left after truncation"):
        encode(tokenizer, TURNS, RunConfig(max_length=8))


TEXT = st.text(max_size=30) | st.sampled_from(["e", END, "end", "<|im", " ", "\n", "assistant\n"])


@given(contents=st.lists(TEXT, min_size=2, max_size=6), template=st.sampled_from(["own", None]))
def test_spans_are_what_was_said(tokenizer: Any, contents: list[str], template: Any) -> None:
    """These templates write contents as they are: a span is a content and its mark."""
    contents = contents[: len(contents) // 2 * 2]
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]
    if template is None:
        tokenizer = with_template(tokenizer, None)
    rendered = render_conversation(tokenizer, turns)
    found = [rendered.text[start:end] for start, end in rendered.spans]
    assert found == [text + END for text in contents[1::2]]
    assert rendered.ended

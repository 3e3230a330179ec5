"""What is learned of a conversation, under several chat templates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.chat import (
    AS_WRITTEN,
    CHANGED,
    ELSEWHERE,
    HELD,
    RENDERED,
    Rendered,
    render_conversation,
    render_prompt,
)
from lorasb_ds.data.formats import parse_row
from lorasb_ds.data.template import render
from lorasb_ds.data.tokenization import IGNORE_INDEX, Example, _overlaps, encode
from lorasb_ds.data.turns import Messages, RowError

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


def with_template(tokenizer: Any, template: Any) -> Any:
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
    with pytest.raises(RowError, match="the chat template refuses it: no system turns"):
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
    """These templates write contents as they are: a span is a content and one mark."""
    contents = contents[: len(contents) // 2 * 2]
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]
    if template is None:
        tokenizer = with_template(tokenizer, None)
    rendered = render_conversation(tokenizer, turns)
    found = [rendered.text[start:end] for start, end in rendered.spans]
    assert found == [("" if text == END else text) + END for text in contents[1::2]]
    assert rendered.ended


# As DeepSeek-R1's: thoughts of every response are dropped, and the prompt begins one.
DROPPING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# Knows tools, calls and thoughts.
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "get_rate", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "get_rate", "arguments": {"of": "EUR"}}}
CALLING = [
    {"role": "user", "content": "rate?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "1.1"},
    {"role": "assistant", "content": "It is 1.1.", "reasoning_content": "A rate."},
]


def spans(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_the_last_response_is_learned_as_the_row_has_it(tokenizer: Any) -> None:
    tokenizer = with_template(tokenizer, DROPPING)
    thought = TURNS[1] | {"content": "<think>\nred or blue?\n</think>\n\nred"}
    rendered = render_conversation(tokenizer, [TURNS[0], thought])
    assert spans(rendered) == [f"red or blue?\n</think>\n\nred{END}"]
    assert rendered.remarks == (AS_WRITTEN,)
    # It goes on from the prompt that is given when answers are generated.
    prompt = render(tokenizer, TURNS[:1], add_generation_prompt=True)
    assert rendered.text == f"{prompt}{spans(rendered)[0]}"

    rendered = render_conversation(tokenizer, TURNS[:2])
    assert (spans(rendered), rendered.remarks) == ([f"red{END}"], (ELSEWHERE,))

    rendered = render_conversation(tokenizer, [TURNS[0], thought, TURNS[2], thought])
    assert spans(rendered) == [f"\n\nred{END}", f"red or blue?\n</think>\n\nred{END}"]
    assert rendered.remarks == (CHANGED, AS_WRITTEN)
    turns = [TURNS[0], thought, TURNS[2], thought]
    assert encode(tokenizer, turns, RunConfig()).remarks == (CHANGED, AS_WRITTEN)
    assert encode(tokenizer, turns, RunConfig(loss_on="last")).remarks == (AS_WRITTEN,)


def test_white_space_and_added_thoughts_are_no_change(tokenizer: Any) -> None:
    for template in (THINKING, TRIMMED, ENDLESS, None):
        other = with_template(tokenizer, template)
        padded = [TURNS[0], TURNS[1] | {"content": " <think>a</think>\n\nred \n"}]
        assert render_conversation(other, padded).remarks == (), template
        assert render_conversation(other, TURNS).remarks == (), template


def test_tools_and_calls_reach_templates_that_know_them(tokenizer: Any) -> None:
    knowing = with_template(tokenizer, WITH_TOOLS)
    rendered = render_conversation(knowing, CALLING, [TOOL])
    call = '<call>{"name": "get_rate", "arguments": {"of": "EUR"}}</call>'
    assert spans(rendered) == [f"{call}{END}", f"<think>A rate.</think>It is 1.1.{END}"]
    assert rendered.text.startswith('<|im_start|>system\n[{"type": "function", "function": ')
    assert (rendered.remarks, rendered.left_out, rendered.ended) == ((), (), True)
    ends_in_a_call = render_conversation(knowing, CALLING[:2], [TOOL])
    assert (spans(ends_in_a_call), ends_in_a_call.ended) == ([f"{call}{END}"], True)
    prompt = render_prompt(knowing, CALLING[:3], [TOOL])
    example = encode(knowing, CALLING, RunConfig(loss_on="last"), [TOOL])
    assert example.input_ids[: example.first_label] == prompt


def test_templates_that_know_no_tools(tokenizer: Any) -> None:
    with pytest.raises(RowError, match=r"^tools, which the chat template does not know"):
        render_conversation(tokenizer, TURNS, [TOOL])
    with pytest.raises(RowError, match=r"^calls of tools, which the chat template does not know"):
        render_conversation(tokenizer, CALLING)
    last = [CALLING[0], {**CALLING[3], "name": "Bo"}]
    rendered = render_conversation(tokenizer, last)
    assert rendered.left_out == ("name of turns", "reasoning_content of turns")
    assert spans(rendered) == [f"It is 1.1.{END}"]


def test_turns_that_a_template_drops_are_said(tokenizer: Any) -> None:
    deaf = with_template(
        tokenizer, ENDLESS.replace("messages %}", "messages if m.role != 'system' %}", 1)
    )
    rendered = render_conversation(deaf, [{"role": "system", "content": "Be short."}, *TURNS])
    assert rendered.left_out == ("turns of the system",)


def with_bos(tokenizer: Any, template: str | None) -> Any:
    """A tokenizer that begins texts with <|endoftext|>, as Llama's do."""
    other = with_template(tokenizer, template)
    other.bos_token = "<|endoftext|>"  # noqa: S105
    bos = [("<|endoftext|>", other.bos_token_id)]
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=bos
    )
    return other


BEGINS = "{{ bos_token }}" + WITH_TOOLS


@pytest.mark.parametrize("end", ["", END, f"{END}\n"])
def test_text_is_begun_and_ended_once(tokenizer: Any, end: str) -> None:
    begun = with_bos(tokenizer, BEGINS)
    for start in ("", "<|endoftext|>"):
        example = encode(begun, f"{start}<|im_start|>user\nHi{end}", RunConfig())
        assert example.input_ids[0] == begun.bos_token_id
        assert begun.bos_token_id not in example.input_ids[1:-1]
        assert example.input_ids[1] != begun.bos_token_id
        assert (example.remarks == (HELD,)) == bool(start or end)
        assert example.input_ids.count(begun.eos_token_id) == 1


def test_a_prompt_that_was_rendered_is_not_rendered_again(tokenizer: Any) -> None:
    begun = with_bos(tokenizer, BEGINS)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    whole = encode(begun, turns, RunConfig())
    assert whole.remarks == ()
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for asked, said in (
        (prompt, "Hello"),
        (prompt, f"Hello{END}"),
        (f"<|endoftext|>{prompt}", f"Hello{END}\n"),
        (prompt.partition("<|im_start|>assistant")[0], f"<|im_start|>assistant\nHello{END}"),
    ):
        pair = [turns[0] | {"content": asked}, turns[1] | {"content": said}]
        example = encode(begun, pair, RunConfig())
        assert (example, example.remarks) == (whole, (RENDERED,))
    ids = render_prompt(begun, [turns[0] | {"content": prompt}])
    assert ids == render_prompt(begun, turns[:1]) == whole.input_ids[: whole.first_label]


def test_marks_that_contents_bring_are_not_doubled(tokenizer: Any) -> None:
    begun = with_bos(tokenizer, BEGINS)
    marked = [TURNS[0] | {"content": "<|endoftext|>Say red"}, TURNS[1] | {"content": f"red{END}\n"}]
    example = encode(begun, marked, RunConfig())
    assert (example, example.remarks) == (encode(begun, TURNS[:2], RunConfig()), (HELD,))


@given(asked=TEXT, said=TEXT, template=st.sampled_from(["own", None, BEGINS]))
def test_rendered_pairs_are_their_conversations(
    tokenizer: Any, asked: str, said: str, template: Any
) -> None:
    if template != "own":
        tokenizer = with_template(tokenizer, template)
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    prompt = render(tokenizer, turns[:1], add_generation_prompt=True)
    pair = [turns[0] | {"content": prompt}, turns[1]]
    whole, again = render_conversation(tokenizer, turns), render_conversation(tokenizer, pair)
    assert again.remarks == (RENDERED,)
    assert (again.text, again.spans, again.ended) == (whole.text, whole.spans, whole.ended)

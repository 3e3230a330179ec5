"""Chat templates: what they say when they refuse, their names, and their clock."""

from __future__ import annotations

import copy
import pickle
import time
from datetime import date
from typing import Any

import pytest

from lorasb_ds.data import template as template_module
from lorasb_ds.data.template import (
    STAND_IN,
    check_template,
    date_in,
    fix_date,
    render,
    stand_in,
    template_note,
    template_origin,
)
from lorasb_ds.data.turns import RowError
from lorasb_ds.errors import ConfigError
from tests.unit.data.test_chat import ENDLESS, TURNS, with_template

DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\n' }}" + ENDLESS
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system\x1b[31m turns\n') }}", r"no system \[31m turns$"),
        ("{{ raise_exception('long ' * 100) }}", r"(long ){10,20}…$"),
        ("{{ raise_exception('') }}", r"TemplateError$"),
        ("{{ 1 // (messages | length - 2) }}", "ZeroDivisionError: .*zero"),
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ messages[0]['x']['y'] }}", "has no attribute 'x'"),
        ("{{ dict(1) }}", "TypeError: "),
        ("{{ 'a' | int | format('b') }}", ": "),
        ("{% for m in %}", "Expected an expression"),
        ("{{ no_such_function() }}", "'no_such_function' is undefined"),
    ],
)
def test_every_exception_is_a_reason_in_its_own_words(
    tokenizer: Any, template: str, words: str
) -> None:
    with pytest.raises(RowError, match=f"the chat template refuses it: .*{words}") as error:
        render(with_template(tokenizer, template), TURNS[:2])
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 140


def test_named_templates(tokenizer: Any) -> None:
    """As Command R's and some of Hermes': "default" is used, with tools "tool_use"."""
    named = with_template(tokenizer, {"default": ENDLESS, "tool_use": "{{ tools | length }}"})
    check_template("m", named)
    assert render(named, TURNS[:1]) == "user: Say red\n"
    assert render(named, TURNS[:1], TOOLS) == "1"
    nameless = with_template(tokenizer, {"rag": ENDLESS, "chatml": ENDLESS})
    with pytest.raises(ConfigError, match=r"--model m: .*several chat templates \(chatml, rag\)"):
        check_template("m", nameless)


def test_the_stand_in(tokenizer: Any) -> None:
    assert template_origin(tokenizer) == "model's own"
    assert template_note(tokenizer) is None
    plain = with_template(tokenizer, None)
    assert template_origin(plain) == "stand-in"
    assert "no chat template: a plain one stands in" in str(template_note(plain))
    assert stand_in(plain) == STAND_IN, "its tokenizer begins texts with nothing"
    # A server that is given the text as the tokenizer's template writes the same.
    assert render(with_template(tokenizer, stand_in(plain)), TURNS) == render(plain, TURNS)


def test_the_clock_is_the_runs(tokenizer: Any) -> None:
    first, second = with_template(tokenizer, DATED), with_template(tokenizer, DATED)
    fix_date(first, date(2024, 7, 26))
    fix_date(second, date(2025, 1, 2))
    for _ in range(2):  # transformers compiles their template once for both
        assert render(first, TURNS[:1]).startswith("Today is 26 Jul 2024\n")
        assert render(second, TURNS[:1]).startswith("Today is 02 Jan 2025\n")
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):  # noqa: S301
        assert render(copied, TURNS[:1]).startswith("Today is 26 Jul 2024\n")
    today = date.today()
    undated = with_template(tokenizer, DATED)
    assert render(undated, TURNS[:1])[: len("Today is 26 Jul 2024")] in {
        f"Today is {day:%d %b %Y}" for day in (today, date.today())
    }


def test_only_templates_with_a_clock_have_a_date(tokenizer: Any) -> None:
    for template, dated in ((DATED, True), (ENDLESS, False), (None, False)):
        for named in (template, {"default": ENDLESS, "tool_use": template or ENDLESS}):
            other = with_template(tokenizer, named)
            assert date_in(other) is None, "no run has fixed it"
            fix_date(other, date(2024, 7, 26))
            assert date_in(other) == ("2024-07-26" if dated else None)


def test_a_loop_without_an_end(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jinja's sandbox bounds one range to 100,000 turns, not two of them inside each other."""
    monkeypatch.setattr(template_module, "RENDER_S", 0.3)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"takes more than 0\.3 s for one conversation"):
        render(with_template(tokenizer, loops), TURNS[:1])
    assert time.monotonic() - began < 3
    assert render(with_template(tokenizer, ENDLESS), TURNS[:1]), "others go on"


@pytest.mark.parametrize(
    "greedy",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{% set n = namespace(a='a') %}{% for i in range(99) %}{% set n.a = n.a * 2 %}{% endfor %}",
        "{{ '%30000000000d' % 1 }}",
        "{{ ([0] * 99999999999) | join }}",
    ],
    ids=["text", "doubled", "padded", "list"],
)
def test_a_template_that_takes_much_memory(tokenizer: Any, greedy: str) -> None:
    with pytest.raises(ConfigError, match="takes more than 2 GiB of memory for one conversation"):
        render(with_template(tokenizer, greedy), TURNS[:1])
    assert render(with_template(tokenizer, ENDLESS), TURNS[:1]), "others go on"

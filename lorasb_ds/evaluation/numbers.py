r"""Read the number that an answer ends in, in linear time; nothing is evaluated.

How an answer is marked, and that only its last number counts, is what the field's tools agree on:
GSM8K's own mark is ``####``; lm-evaluation-harness's task gsm8k takes the number behind it
("strict-match") or the text's last number ("flexible-extract"); math-verify looks for a box and
for "the final answer is" first. ``docs/evaluating.md`` lists what is read as which number.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

# Marks of a final answer: GSM8K's, MetaMathQA's and Minerva's. \boxed{} is found by ``last_box``.
MARK = re.compile(r"####+|\bthe\s+(?:final\s+)?answer\s+is\b\s*:?|\banswer[*_]*\s*:", re.IGNORECASE)
# An escaped brace is a character; so is one after a line break (\\), but a box after it is a box.
BRACE = re.compile(r"\\boxed\s*\{|\\\\(?!boxed)|\\[{}]|[{}]")

# No pattern may scan a text again from every position (quadratic time): hence the bound on groups.
INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3}){1,12}(?!,?[0-9])|[0-9]+)"
NUMBER = re.compile(
    # A hyphen after a digit, word or bracket joins (3-4, non-5); before a space it starts a list.
    r"(?P<sign>(?<![^\W_])(?<![)\]}%-])-[$€£¥]?(?=\.?[0-9]))?"
    r"(?:"
    rf"(?:(?P<whole>{INTEGER})[ ])?"
    # Between further slashes it is a date.
    rf"(?<![0-9]/)(?P<top>{INTEGER})[ ]?/[ ]?(?P<bottom>{INTEGER})(?![0-9]|[/.][0-9])"
    r"|"
    rf"(?P<decimal>(?:{INTEGER}(?:\.[0-9]+)?|(?<![\w.)])\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r")"
)
FRAC = re.compile(
    r"\\[dtc]?frac"
    rf"[ ]?(?:\{{[ ]?(-?{INTEGER})[ ]?\}}|([0-9]))"
    rf"[ ]?(?:\{{[ ]?({INTEGER})[ ]?\}}|([0-9]))"
)
# Thousands that are separated by anything but commas, and decimal commas; see ``_unseparated``.
SEPARATED = re.compile(
    r"(?<![0-9.,'])(?:"
    r"(?P<spaced>[1-9][0-9]{0,2}(?P<by>[ \u2009'])[0-9]{3}(?:(?P=by)[0-9]{3}){0,11})"
    r"(?:[.,](?P<spaced_part>[0-9]+))?(?![ ]?/)|"
    r"(?P<dotted>[1-9][0-9]{0,2}(?:\.[0-9]{3}){1,12}),(?P<dotted_part>[0-9]+)|"
    r"(?P<dots>[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,12})|"
    r"(?P<lakhs>[1-9][0-9]?(?:,[0-9]{2}){1,12},[0-9]{3})|"
    r"(?P<zero>0),(?P<zero_part>[0-9]+)|"
    r"(?<![(\[{])(?P<ones>[1-9][0-9]*),(?P<ones_part>[0-9]{1,2})"
    r")(?![0-9]|[.,][0-9])"
)
# Dashes and signs that stand for a minus, except the em dash; full-width signs; spaces that do not
# break, of any width, as thin ones. Digits of all scripts are translated elsewhere.
SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2007\u2008\u202f", "\u2009"),
        **dict.fromkeys("\u2044\u2215\uff0f", "/"),
        "\uff04": "$",
        "\uff05": "%",
        "\uff08": "(",
        "\uff09": ")",
        "\uff0b": "+",
        "\uff0c": ",",
        "\uff0e": ".",
        "\uff1d": "=",
        "\u066b": ".",
        "\u066c": ",",
        "\u2019": "'",
        "\u3000": " ",
    }
)
LATEX = ((r"\ ", "\u2009"), ("{,}", ","), (r"\!", ""), (r"\$", "$"), (r"\%", "%"))
VULGAR = re.compile(r"(?:(?<=[0-9])[ \u2009]?)?([\u00bc-\u00be\u2150-\u215e\u2189])")
POWER = re.compile(
    r"(?<=[0-9])[ ]?(?:[x\u00d7·*]|\\times|\\cdot)[ ]?10[ ]?(?:\^|\*\*)[ ]?"
    r"(?:\{[ ]?(-?[0-9]{1,3})[ ]?\}|(-?[0-9]{1,3})(?![0-9]))"
)
EQUALS = re.compile(r"[=≈]|\\approx(?![a-zA-Z])")
SENTENCE_END = re.compile(r"\n|[.!?][\])}*_$\"'”]{0,4}(?=\s|$)")
# Between the beginning of an answer and its number: marks, brackets and currencies, but no words.
OPENING = re.compile(r"(?:[^\w\\]|_|\\[^\w]|(?:[A-Z]{2,3}|Rs)(?=[ $.0-9]))*")
OPERATOR = re.compile(r"[ ]?(?:[x\u00d7·*+/÷^-]|\\times|\\cdot|\\div)[ ]?[({$]?[0-9]")
MAX_DIGITS = 400  # also the largest exponent: arithmetic on longer ones gets slow


class Found(NamedTuple):
    """A number in a text, and where it is."""

    value: Fraction
    start: int
    end: int


def extract_number(text: str) -> Fraction | None:
    """Return the number in which the answer after the last mark ends, or else the text's last one.

    That answer is a box's content, or the first sentence after the mark with a number in it. What
    counts is behind its last "=". If it begins with the number ("18 apples for 3 children"), it is
    this; if it begins with words or is a computation ("He makes 18", "20 - 2, so 18"), the last.

    Percent signs and units are ignored: "18 %" is 18. Takes linear time in the text's length.

    Returns:
        The exact number; None without one there. Divisions by zero and numbers of more than 400
        digits do not count.
    """
    answer, is_box = after_the_last_mark(text)
    if answer is not None:
        answer = plain_text(answer)
        return _final(answer if is_box else _first_sentence(answer))
    last = deque(_numbers(plain_text(text)), maxlen=1)
    return last[0].value if last else None


def after_the_last_mark(text: str) -> tuple[str | None, bool]:
    """Return the text after the last mark and False, or the last box's content and True.

    Whichever begins last counts; without either, None and False. Hashes with nothing behind them
    mark nothing if another mark has come before.
    """
    marks = deque(MARK.finditer(text), maxlen=2)
    if len(marks) == 2 and marks[1][0][0] == "#" and not text[marks[1].end() :].strip():
        text = text[: marks.pop().start()]
    start, end = last_box(text)
    if marks and marks[-1].start() > start:
        return text[marks[-1].end() :], False
    return (text[start:end], True) if start >= 0 else (None, False)


def last_box(text: str) -> tuple[int, int]:
    """Return where the content of the last closed box begins and ends; (-1, -1) without one."""
    last = (-1, -1)
    open_braces: list[int] = []  # where their contents begin; -2 if not a box's
    for brace in BRACE.finditer(text):
        if brace[0] == "}" and open_braces:
            last = max(last, (open_braces.pop(), brace.start()))
        elif brace[0].startswith((r"\boxed", "{")):
            open_braces.append(brace.end() if brace[0] != "{" else -2)
    return last


def plain_text(text: str) -> str:
    r"""Rewrite numbers as ASCII has them: ``-\dfrac12`` as -1/2, ``1½`` as 1 1/2, 18 000 as 18000.

    Digits and signs of all scripts and widths, LaTeX's spaces, separators of thousands, decimal
    commas and powers of ten are read; what is no number is left as it is.
    """
    text = re.sub(r"(?![0-9])\d", lambda m: str(unicodedata.decimal(m[0])), text.translate(SIGNS))
    for latex, plain in LATEX:
        text = text.replace(latex, plain)
    text = re.sub(r"(?<=[0-9])(?:\\[,;:]|~)(?=[0-9]{3}(?![0-9]))", "\u2009", text)
    text = re.sub(r"(?<=[0-9]),\u2009?(?=[0-9]{3}(?![0-9]))", ",", text)
    text = SEPARATED.sub(_unseparated, text)
    text = POWER.sub(lambda m: f"e{m[1] or m[2]}", text)
    text = VULGAR.sub(_as_fraction, text)
    text = re.sub(r"(?<=[0-9])(?=\\[dtc]?frac)", " ", text)
    return FRAC.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]} ", text)


def _unseparated(match: re.Match[str]) -> str:
    """Return a numeral without its separators, and with a decimal point."""
    found = match.groupdict()
    part = next((v for name, v in found.items() if name.endswith("_part") and v is not None), None)
    names = ("spaced", "dotted", "dots", "lakhs", "zero", "ones")
    whole = next(found[name] for name in names if found[name] is not None)
    return re.sub("[^0-9]", "", whole) + ("" if part is None else f".{part}")


def _as_fraction(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[1]).partition("\u2044")
    is_mixed = match.start() > 0 and match.string[match.start() - 1].isdigit()
    return f"{' ' if is_mixed else ''}{top}/{bottom} "


def _first_sentence(text: str) -> str:
    """Return the first sentence that has a number, or a part of a line; "" if none has."""
    first = next(_numbers(text), None)
    if first is None:
        return ""
    before = deque(SENTENCE_END.finditer(text, 0, first.start), maxlen=1)
    after = SENTENCE_END.search(text, first.end)
    return text[before[0].end() if before else 0 : after.start() if after else len(text)]


def _final(answer: str) -> Fraction | None:
    """Return the number in which an answer ends; see ``extract_number``."""
    last: Fraction | None = None
    for part in reversed(EQUALS.split(answer)):
        first: Found | None = None
        final: Found | None = None
        for final in _numbers(part):
            first = first or final
        if first is None or final is None:
            continue
        if OPENING.match(part).end() < first.start:  # type: ignore[union-attr]  # it always matches
            return final.value
        if not OPERATOR.match(part, first.end):
            return first.value
        last = final.value if last is None else last
    return last


def _numbers(text: str) -> Iterator[Found]:
    for match in NUMBER.finditer(text):
        if len(match[0]) > MAX_DIGITS:
            continue
        sign = -1 if match["sign"] else 1
        if match["decimal"]:
            digits = match["decimal"].replace(",", "")
            _, _, exponent = digits.lower().partition("e")
            if abs(int(exponent or 0)) <= MAX_DIGITS:
                yield Found(sign * Fraction(digits), *match.span())
            continue
        parts = (match[name] or "0" for name in ("whole", "top", "bottom"))
        whole, top, bottom = (int(part.replace(",", "")) for part in parts)
        if bottom == 0:
            continue
        part = Fraction(top, bottom)
        if match["whole"] and part >= 1:  # not a mixed number, but two numbers
            yield Found(Fraction(sign * whole), match.start(), match.end("whole"))
            yield Found(part, match.start("top"), match.end())
        else:
            yield Found(sign * (whole + part), *match.span())

"""Compare a generated answer with a reference: exact text, final numbers, mathematics."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction

from lorasb_ds.data.formats import Row
from lorasb_ds.errors import ConfigError

Score = Callable[[str, Row, str], bool]  # (generated, row, response) -> right

# Marks of a final answer: GSM8K's, MetaMathQA's and Minerva's. \boxed{} is found by ``_last_box``.
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
# A number alone, or with its currency, percent sign or unit of more than one letter.
PLAIN = re.compile(rf"[$€£¥]?{NUMBER.pattern}(?:\s*%)?(?:\s*[^\W\d_]{{2}}[^\\^_=+*/(){{}}\d]*)?")
MAX_DIGITS = 400  # also the largest exponent: arithmetic on longer ones gets slow
MAX_LATEX = 1000  # characters; no answer is longer, and math-verify's patterns are slow on more


def final_answer(text: str) -> str | None:
    r"""Return the answer after the last mark: its first line, or a box's content.

    White space at its ends and a final full stop are removed.

    Returns:
        None if there is no "####", "the answer is", "Answer:" or closed ``\boxed{}``.
    """
    answer, boxed = _after_the_last_mark(text)
    if answer is None:
        return None
    answer = answer.strip()
    if not boxed:
        answer = answer.partition("\n")[0].rstrip()
    return answer.removesuffix(".").rstrip()


def extract_number(text: str) -> Fraction | None:
    """Return the first number after the last mark of an answer, or else the text's last number.

    Percent signs and units are ignored: "18 %" is 18. Takes linear time in the text's length.

    Returns:
        The exact number; None without one there. Divisions by zero and numbers of more than 400
        digits do not count.
    """
    answer, _ = _after_the_last_mark(text)
    if answer is not None:
        return next(_numbers(answer), None)
    last = deque(_numbers(text), maxlen=1)
    return last[0] if last else None


def is_equal_number(text: str, reference: str) -> bool:
    """Tell whether both have the same final number, exactly: 18.00 is 18, but 0.33 is not 1/3."""
    number = extract_number(text)
    return number is not None and number == extract_number(reference)


def is_equal_math(text: str, reference: str) -> bool:
    """Tell whether both final answers are mathematically equal, by math-verify.

    It has 5 s for each of its steps. Its time limits are signals: outside of the main thread there
    are none. A reference without a mark is an answer itself; in a text without one, math-verify
    looks for the last formula.

    Raises:
        ConfigError: if math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
        from math_verify.errors import TimeoutException  # a BaseException
    except ImportError:
        raise ConfigError(
            "Answers in LaTeX are compared by the package math-verify: "
            "pip install 'lorasb-ds[eval]'."
        ) from None
    gold, answer = final_answer(reference), final_answer(text)
    gold = reference.strip() if gold is None else gold
    said = text.strip() if answer is None else answer
    if said == gold:
        return gold != ""
    if (answer is not None and len(answer) > MAX_LATEX) or len(gold) > MAX_LATEX:
        return False
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    try:
        expected = parse(_latex(gold), parsing_timeout=limit)
        found = text[-MAX_LATEX:] if answer is None else _latex(answer)
        return bool(verify(expected, parse(found, parsing_timeout=limit), timeout_seconds=limit))
    except (Exception, TimeoutException):  # of some dozen types: what cannot be parsed is not right
        return False


def _after_the_last_mark(text: str) -> tuple[str | None, bool]:
    """Return the text after the last mark and False, or the last box's content and True.

    Whichever begins last counts; without either, None and False.
    """
    mark = deque(MARK.finditer(text), maxlen=1)
    start, end = _last_box(text)
    if mark and mark[0].start() > start:
        return text[mark[0].end() :], False
    return (text[start:end], True) if start >= 0 else (None, False)


def _last_box(text: str) -> tuple[int, int]:
    """Return where the content of the last closed box begins and ends; (-1, -1) without one."""
    last = (-1, -1)
    open_braces: list[int] = []  # where their contents begin; -2 if not a box's
    for brace in BRACE.finditer(text):
        if brace[0] == "}" and open_braces:
            last = max(last, (open_braces.pop(), brace.start()))
        elif brace[0].startswith((r"\boxed", "{")):
            open_braces.append(brace.end() if brace[0] != "{" else -2)
    return last


def _numbers(text: str) -> Iterator[Fraction]:
    for match in NUMBER.finditer(_without_latex(text)):
        if len(match[0]) > MAX_DIGITS:
            continue
        sign = -1 if match["sign"] else 1
        if match["decimal"]:
            digits = match["decimal"].replace(",", "")
            _, _, exponent = digits.lower().partition("e")
            if abs(int(exponent or 0)) <= MAX_DIGITS:
                yield sign * Fraction(digits)
            continue
        parts = (match[name] or "0" for name in ("whole", "top", "bottom"))
        whole, top, bottom = (int(part.replace(",", "")) for part in parts)
        if bottom == 0:
            continue
        part = Fraction(top, bottom)
        if match["whole"] and part >= 1:  # not a mixed number, but two numbers
            yield Fraction(sign * whole)
            yield part
        else:
            yield sign * (whole + part)


def _without_latex(text: str) -> str:
    r"""Rewrite fractions, thousands and signs as plain text: ``-\dfrac12`` as -1/2."""
    for latex, plain in (("\u2212", "-"), ("{,}", ","), (r"\!", ""), (r"\$", "$"), (r"\%", "%")):
        text = text.replace(latex, plain)
    text = re.sub(r"(?<=[0-9])\\[,;:](?=[0-9]{3}(?![0-9]))", ",", text)
    text = re.sub(r"(?<=[0-9])(?=\\[dtc]?frac)", " ", text)
    return FRAC.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]} ", text)


def _latex(answer: str) -> str:
    """Put an answer into a box, or into a sentence if only a part of it is LaTeX.

    math-verify reads both.
    """
    if answer.count("$") > 1 or r"\(" in answer:
        return f"The final answer is {answer}"
    return rf"\boxed{{{answer}}}"


def _score_gsm8k(text: str, _: Row, response: str) -> bool:
    return is_equal_number(text, response.rpartition("####")[2])


def _score_metamath(text: str, _: Row, response: str) -> bool:
    reference = final_answer(response) or response
    answer = final_answer(text) or text
    # 2 is neither 2x nor 2\sqrt{3}; in a sentence without a mark the last number counts.
    plain = [PLAIN.fullmatch(_without_latex(said).strip()) for said in (reference, answer)]
    if plain[0] and (plain[1] or answer is text):
        return is_equal_number(text, reference)
    return is_equal_math(text, reference)


def _score_math(text: str, _: Row, response: str) -> bool:
    start, end = _last_box(response)
    return is_equal_math(text, response if start < 0 else rf"\boxed{{{response[start:end]}}}")


SCORES: dict[str, Score] = {
    "exact": lambda text, _, response: text.strip() == response.strip(),
    "gsm8k": _score_gsm8k,
    "metamath": _score_metamath,
    "math": _score_math,
}

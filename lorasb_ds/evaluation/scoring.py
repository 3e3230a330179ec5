"""Compare a generated answer with a reference: exact text, final numbers, mathematics."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

from lorasb_ds.data.formats import Row
from lorasb_ds.errors import ConfigError
from lorasb_ds.evaluation.numbers import (
    NUMBER,
    after_the_last_mark,
    extract_number,
    last_box,
    plain_text,
)

Score = Callable[[str, Row, str], bool]  # (generated, row, response) -> right

# A number alone, or with its currency, percent sign or unit of more than one letter.
PLAIN = re.compile(rf"[$€£¥]?{NUMBER.pattern}(?:\s*%)?(?:\s*[^\W\d_]{{2}}[^\\^_=+*/(){{}}\d]*)?")
# The same behind a computation ("6 x 3 = 18"), or behind words ("She makes 18 dollars"). What has
# variables, roots or several values is for math-verify: 2 is neither 2x nor 2\sqrt{3}.
STATED = re.compile(
    r"(?:(?:[0-9\s.,()+*/\u00d7·÷^%$€£¥-]|x(?=[ ]?[0-9])|\\(?:times|cdot|div)(?![a-zA-Z]))*=\s*"
    r"|(?!(?:sin|cos|tan|log|ln|exp|sqrt|pi)\b)(?:[^\W\d_]{2}|[AI] )[^\\^_=+*/(){}]*?(?<![0-9.,]))"
    rf"{PLAIN.pattern}"
)
MAX_LATEX = 1000  # characters; no answer is longer, and math-verify's patterns are slow on more


def final_answer(text: str) -> str | None:
    r"""Return the answer after the last mark: its first line, or a box's content.

    White space at its ends and a final full stop are removed.

    Returns:
        None if there is no "####", "the answer is", "Answer:" or closed ``\boxed{}``.
    """
    answer, boxed = after_the_last_mark(text)
    if answer is None:
        return None
    answer = answer.strip()
    if not boxed:
        answer = answer.partition("\n")[0].rstrip()
    return answer.removesuffix(".").rstrip()


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


def _latex(answer: str) -> str:
    """Put an answer into a box, or into a sentence if only a part of it is LaTeX.

    math-verify reads both.
    """
    if answer.count("$") > 1 or r"\(" in answer:
        return f"The final answer is {answer}"
    return rf"\boxed{{{answer}}}"


def _score_gsm8k(text: str, _: Row, response: str) -> bool:
    return is_equal_number(text, response)


def _score_metamath(text: str, _: Row, response: str) -> bool:
    reference, answer = final_answer(response) or response, final_answer(text)
    # In a sentence without a mark the last number counts.
    if PLAIN.fullmatch(plain_text(reference).strip()) and (not answer or _is_number(answer)):
        return is_equal_number(text, reference)
    return is_equal_math(text, reference)


def _is_number(answer: str) -> bool:
    """Tell whether an answer is nothing but a number, alone or as ``STATED``."""
    plain = plain_text(answer).strip()
    if PLAIN.fullmatch(plain):
        return True
    return len(plain) <= MAX_LATEX and STATED.fullmatch(plain) is not None


def _score_math(text: str, _: Row, response: str) -> bool:
    start, end = last_box(response)
    return is_equal_math(text, response if start < 0 else rf"\boxed{{{response[start:end]}}}")


SCORES: dict[str, Score] = {
    "exact": lambda text, _, response: text.strip() == response.strip(),
    "gsm8k": _score_gsm8k,
    "metamath": _score_metamath,
    "math": _score_math,
}

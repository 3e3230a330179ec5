"""The number that an answer ends in, as people and models write it."""

from __future__ import annotations

import time
import unicodedata
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasb_ds.evaluation.numbers import extract_number
from lorasb_ds.evaluation.scoring import SCORES

MARKS = ("The answer is: {}", "The answer is {}.", "#### {}", r"\boxed{{{}}}", "**Answer:** {}\n7")
SPACES = (" ", "\u00a0", "\u2009", "\u202f", "\u2007", r"\,", r"\ ", "~")


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        # a computation: behind the last "="
        ("6 x 3 = 18", 18),
        ("6 \u00d7 3 = 18 apples for 2 days", 18),
        ("$6 \\times 3 = 18$", 18),
        ("20 - 2 = 18, not 19", 18),
        ("3 apples + 15 apples = 18", 18),
        ("16 + 2 = <<16+2=18>>18 eggs for 2 people", 18),
        ("x = 36 / 2 = 18", 18),
        ("36/2 ≈ 18", 18),
        ("36/2 \\approx 18", 18),
        ("18 = 6 x 3", 18),
        ("18 (= 6 x 3)", 18),
        ("18 (6 x 3 = 18)", 18),
        ("20 - 2, which is 18", 18),
        # a sentence: the number that it ends in
        ("He makes $18", 18),
        ("The 3 items cost 18", 18),
        ("In 3 days she makes -18 dollars", -18),
        ("approx. 18", 18),
        # the number first: what follows is said of it
        ("18 apples for 3 children", 18),
        ("$18 (USD) in 3 days", 18),
        ("USD 18 in 3 days", 18),
        ("Rs. 18 in 3 days", 18),
        ("18 of 24", 18),
        # how it is written
        ("½", Fraction(1, 2)),
        ("2¾ cups", Fraction(11, 4)),
        ("2 ⅞", Fraction(23, 8)),
        ("-1½", Fraction(-3, 2)),
        ("1\u20442", Fraction(1, 2)),
        ("\uff11\uff18", 18),
        ("\uff0d\uff11\uff0c\uff12\uff13\uff14\uff0e\uff15", Fraction(-2469, 2)),
        ("\u0661\u0668", 18),
        ("\u221218", -18),
        ("\u201318", -18),
        ("18 000", 18000),
        ("1 234 567,5 km", Fraction(2469135, 2)),
        ("1'234'567.5", Fraction(2469135, 2)),
        ("1\u2019234", 1234),
        ("12,34,567", 1234567),
        ("1,234.50", Fraction(2469, 2)),
        ("1.234,50", Fraction(2469, 2)),
        ("1.234.567", 1234567),
        ("1.234", Fraction(617, 500)),
        ("1,234", 1234),
        ("3,50 €", Fraction(7, 2)),
        ("(3,5)", 3),
        ("3, 5", 3),
        ("2 100/300", Fraction(7, 3)),
        ("1.8 \u00d7 10^4", 18000),
        (r"1.8 \times 10^{-2}", Fraction(9, 500)),
        (r"18\%", 18),
        (r"18\text{ cm in } 3\text{ days}", 18),
    ],
)
def test_the_number_an_answer_ends_in(answer: str, number: Fraction | int) -> None:
    for mark in MARKS:
        assert extract_number(f"First 5 and 6.\n{mark.format(answer)}") == number
    # GSM8K's references are read by the same rules.
    assert SCORES["gsm8k"](f"The answer is {answer}.", {}, f"2 + 3 = 5\n#### {answer}")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 18. Check: 6 x 3 = 19", 18),
        ("The answer is 18! For 3 days.", 18),
        ("#### 18\n\nExplanation: 3 x 6 = 19", 18),
        ("####\n18 of 20", 18),
        ("The answer is 18 of 20. ####", 18),
        ("18 of 20 ####", None),
        ("I have 18, but the answer is unknown. ####", None),
        ("without a mark: 6 x 3 = 18 apples for 2", 2),
    ],
)
def test_where_an_answer_ends(text: str, number: int | None) -> None:
    assert extract_number(text) == number


@given(
    st.integers(-(10**12), 10**12),
    st.integers(0, 99),
    st.sampled_from(["", *SPACES]),
    st.sampled_from(".,"),
    st.sampled_from(["{}", "{} €", "6 x 3 = {}", "He makes {}", "{} km in 3 days", "**{}**"]),
    st.sampled_from(MARKS),
)
def test_every_grouping_is_read(
    n: int, cents: int, space: str, point: str, answer: str, mark: str
) -> None:
    """By spaces of any kind, with a decimal point or comma, and the Unicode minus."""
    sign = "\u2212" if n < 0 else ""
    written = f"{sign}{abs(n):,}".replace(",", space) + f"{point}{cents:02}"
    expected = (-1 if n < 0 else 1) * (abs(n) + Fraction(cents, 100))
    assert extract_number(mark.format(answer.format(written))) == expected


@given(st.integers(-(10**9), 10**9), st.integers(0, 0x10FFFF).map(chr))
def test_digits_of_every_script_are_read(n: int, other: str) -> None:
    zero = ord(other) - unicodedata.decimal(other, 0)  # ASCII's and full-width ones are among them
    zero = zero if unicodedata.decimal(other, None) is not None else 0xFF10
    written = "".join(chr(zero + int(c)) if c.isdigit() else c for c in str(n))
    assert extract_number(f"#### {written}") == n


@given(
    st.text(
        "0123456789,./-$%eE \\{}frac#:=x\u00d7½¾٣\uff11'\u2019\u2009\u2212~^boxd\n", max_size=80
    )
)
def test_whatever_is_written_has_a_number_or_none(text: str) -> None:
    for mark in ("", "The answer is: ", "\\boxed{"):
        assert isinstance(extract_number(mark + text), Fraction | None)


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "1 000 ",
            "1'000",
            "1.000",
            "1,00,",
            "0,1",
            "1=",
            "= ",
            "1½ ",
            "\uff11",
            "1 x 1",
            "1x10^",
        ),
        *("1.\n", "18. ", "aa 1 ", "(", "Rs", "AB ", "####\n", "#### 1", "~1", r"\ 1", "1\u2009"),
    ],
)
@pytest.mark.parametrize(
    ("length", "seconds"), [(20_000, 2), pytest.param(100_000, 10, marks=pytest.mark.slow)]
)
def test_hostile_numbers_take_linear_time(piece: str, length: int, seconds: float) -> None:
    SCORES["metamath"]("1", {}, "The answer is: x")  # imports math-verify
    long = piece * (length // len(piece))
    for text in (long, f"The answer is: {long}x", f"#### aa {long[:900]}(", f"\\boxed{{{long}}}"):
        start = time.process_time()
        extract_number(text)
        SCORES["metamath"](text, {}, "The answer is: 5")
        assert time.process_time() - start < seconds, "quadratic time would be many times that"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("6 x 3 = 18", True),
        (r"6 \times 3 = 18", True),
        ("20 - 2 = $18 dollars", True),
        ("She makes 18 dollars", True),
        ("In 3 days I make $18.", True),
        ("½ + 17½ = 18", True),
        ("9y + 18", False),
        ("18 x 3 = 54", False),
    ],
)
def test_sentences_and_computations_of_metamath(answer: str, right: bool) -> None:
    assert SCORES["metamath"](f"The answer is: {answer}", {}, "The answer is: 18") is right

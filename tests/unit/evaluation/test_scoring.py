"""Right and wrong answers."""

from __future__ import annotations

import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasb_ds.errors import ConfigError
from lorasb_ds.evaluation.numbers import extract_number
from lorasb_ds.evaluation.scoring import (
    SCORES,
    final_answer,
    is_equal_math,
    is_equal_number,
)

HALF = Fraction(1, 2)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # nothing at all
        ("", None),
        ("I do not know.", None),
        ("The answer is: unknown.", None),
        ("She has 3 apples. The answer is:", None),
        ("####", None),
        (r"\boxed{}", None),
        (r"\boxed{\pi}", None),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        ("- . , % $ e5", 5),
        # plain
        ("18", 18),
        ("-18", -18),
        ("+18", 18),
        ("\u221218", -18),
        ("0", 0),
        ("-0", 0),
        ("007", 7),
        ("18.", 18),
        ("18,", 18),
        ("**18**.", 18),
        ("__18__", 18),
        ("(18)", 18),
        ("=18", 18),
        ("x=-18", -18),
        # decimals and exponents
        ("18.00", 18),
        ("18.5.", Fraction(37, 2)),
        (".5", HALF),
        ("-.5", -HALF),
        ("5.", 5),
        ("well...5", 5),
        ("Rs.500", 500),
        ("1.5e3", 1500),
        ("1.5E-1", Fraction(3, 20)),
        ("2e3", 2000),
        ("2eggs", 2),
        ("1e999999999", None),
        # thousands
        ("1,234", 1234),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("-1,234", -1234),
        ("$1,234.", 1234),
        ("1{,}234", 1234),
        (r"1\,234", 1234),
        (r"1,\!234", 1234),
        (r"12\,345\,678", 12345678),
        ("1,23", Fraction(123, 100)),
        ("1,2345", 2345),
        ("12345,678", 678),
        ("0,123", Fraction(123, 1000)),
        ("1, 2, 3", 3),
        # currencies, units, percentages
        ("$18", 18),
        ("$ 18", 18),
        ("$-18", -18),
        ("-$18", -18),
        ("-$.50", -HALF),
        ("\u20ac18", 18),
        ("USD18", 18),
        (r"\$18", 18),
        (r"-\$1,800", -1800),
        ("18%", 18),
        (r"18\%", 18),
        ("18 %", 18),
        ("18 dollars", 18),
        ("18km", 18),
        ("18th", 18),
        (r"18\text{ cm}", 18),
        ("18^\\circ", 18),
        # fractions and mixed numbers
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("3 / 4", Fraction(3, 4)),
        ("6/8 of it", Fraction(3, 4)),
        ("1,000/3", Fraction(1000, 3)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        ("The answer is 2019 3/2", 2019),
        ("2019 3/2", Fraction(3, 2)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"\dfrac34", Fraction(3, 4)),
        (r"\tfrac{3}4", Fraction(3, 4)),
        (r"\frac 3 4", Fraction(3, 4)),
        (r"-\frac{1}{2}", -HALF),
        (r"\frac{-1}{2}", -HALF),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        (r"-1\dfrac12", Fraction(-3, 2)),
        (r"\frac{1,000}{3}", Fraction(1000, 3)),
        (r"\frac{1}{2}\frac{1}{3}", Fraction(1, 3)),
        # hyphens that are not signs
        ("3-4", 4),
        ("2019-20", 20),
        ("non-5", 5),
        ("$3-$5", 5),
        ("5%-10%", 10),
        ("(3)-4", 4),
        ("3 - 4", 4),
        ("- 5 apples", 5),
        ("5--6", 6),
        ("pages 3\u20134", 4),
        # dates and times
        ("3/4/2020", 2020),
        ("2020-03-14", 14),
        ("In 2019 she was 12", 12),
        ("10:30", 30),
        ("The answer is 10:30", 10),
        # text around it, and marks
        ("16 - 3 - 4 = <<16-3-4=9>>9 eggs\n#### 18", 18),
        ("#### $1,800.00", 1800),
        ("####-5", -5),
        ("The answer is 18 of 24.", 18),
        ("the ANSWER is: 18, not 24", 18),
        ("The final answer is $18$. I hope it is correct, 100 %.", 18),
        ("The answer is:\n\n18\n\nAlso 5.", 18),
        ("The answer is x = 5", 5),
        ("Answer: 18 (in 3 days)", 18),
        ("**Answer:** 18, 19", 18),
        ("**Answer**: 18, 19", 18),
        ("the answer issued 3, 4", 4),
        (r"so $\boxed{18}$ of 20", 18),
        (r"\boxed{\text{about } 18} of 20", 18),
        (r"\boxed {18} of 20", 18),
        (r"\boxed{\boxed{18}} of 20", 18),
        (r"\\boxed{18} of 20", 18),
        (r"\boxed{\{18, 19\}} of 20", 18),
        (r"{ \boxed{18} of 20", 18),
        (r"} \boxed{18} of 20", 18),
        (r"\boxed{18", 18),
        # several marks: the last counts
        ("#### 18\nThe answer is: 19, 20", 19),
        ("The answer is: 18\n#### 19, 20", 19),
        (r"The answer is 18. \boxed{19} 20", 19),
        (r"\boxed{19} The answer is 18, 20", 18),
        (r"\boxed{1} and \boxed{2} 3", 2),
        (r"The answer is 18, 20. \boxed{19", 18),
        ("The answer is 5. No, the answer is 6 or 7.", 6),
        ("#### 1\n#### 2, 3", 2),
    ],
)
def test_the_final_number(text: str, number: Fraction | int | None) -> None:
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("no mark 18", None),
        (r"\boxed{18", None),
        ("a\n#### 18 \nb", "18"),
        ("The answer is: 5.", "5"),
        ("The answer is\n\n 5 apples.\nReally", "5 apples"),
        (r"The answer is: $\frac{1}{2}$.", r"$\frac{1}{2}$"),
        (r"it is \boxed{ x^{2} } or so", "x^{2}"),
        (
            r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}",
            r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        ),
        (r"\boxed{\{1, \{2\}\}}", r"\{1, \{2\}\}"),
        ("\\boxed{a\nb}", "a\nb"),
        ("The answer is:", ""),
    ],
)
def test_the_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_numbers_are_compared_exactly() -> None:
    assert is_equal_number("The answer is 18.00", "#### 18")
    assert is_equal_number("50/100", r"\boxed{\frac{1}{2}}")
    assert not is_equal_number("0.33", "1/3")
    assert not is_equal_number("none", "none")


@given(st.text())
def test_any_text_has_a_number_or_none(text: str) -> None:
    for mark in ("", "The answer is: ", "\\boxed{"):
        assert isinstance(extract_number(mark + text), Fraction | None)
        assert isinstance(final_answer(mark + text), str | None)


@given(st.text("0123456789,./-$%eE \\{}frac#:\u2212boxd", max_size=60))
def test_any_text_of_numbers_has_a_number_or_none(text: str) -> None:
    assert isinstance(extract_number(text), Fraction | None)


@given(
    st.integers(-(10**15), 10**15)
    | st.decimals(-(10**9), 10**9, places=2, allow_nan=False, allow_infinity=False)
)
def test_a_number_is_found_however_it_is_written(n: int | Decimal) -> None:
    dollars = f"-${-n:,}" if n < 0 else f"${n:,}"
    for written in (f"{n}", f"{n:,}", f"{n:,}".replace("-", "\u2212"), f"${n:,}", dollars, f"{n}%"):
        for sentence in (
            "{}",
            "It is {}.",
            "In 2 days: **{}**, as 3 - 1.\n#### {}",
            "The answer is: {}.",
            "The answer is {} km in 3 days",
            "Answer: {}\n4",
            r"4 \boxed{{{}}} 5",
        ):
            assert extract_number(sentence.format(written, written)) == Fraction(n)


@given(st.integers(-999, 999), st.integers(1, 999), st.integers(0, 999))
def test_a_fraction_is_found_however_it_is_written(top: int, bottom: int, whole: int) -> None:
    sign = "-" if top < 0 else ""
    for written in (
        f"{top}/{bottom}",
        rf"\frac{{{top}}}{{{bottom}}}",
        rf"{sign}\dfrac{{{abs(top)}}}{{{bottom}}}",
    ):
        assert extract_number(f"The answer is {written}.") == Fraction(top, bottom)
    if 0 <= top < bottom:
        for written in (f"{whole} {top}/{bottom}", rf"{whole}\frac{{{top}}}{{{bottom}}}"):
            assert extract_number(written) == whole + Fraction(top, bottom)


@pytest.mark.parametrize(
    "piece",
    [
        *("1", ",111", "1,", "1 ", "1/", "1.", "1e", "-", " ", "$", "\\", "{", "}", "#", "9/9 "),
        *(r"\boxed{", r"\boxed{}", r"\boxed{1}", r"\frac", r"\frac{1", "the answer is ", "the "),
        *(
            "\u0661",
            "-1",
            "1 1/",
            "1/1",
            "answer \n",
            "the answer is 1\n",
            "answer",
            "answer:",
            "\\frac{1}{2}",
            "1\\,",
            "answer*",
            "e+1",
        ),
    ],
)
@pytest.mark.parametrize("length", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_long_texts_take_linear_time(piece: str, length: int) -> None:
    is_equal_math("1", "2")  # imports math-verify
    long = piece * (length // len(piece))
    for text in (long, f"The answer is 5{long}=", f"The answer is: {long}x", f"\\boxed{{{long}"):
        start = time.process_time()
        extract_number(text)
        assert time.process_time() - start < 1
        start = time.process_time()
        SCORES["metamath"](f"#### {text}", {}, "The answer is: 5")
        assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        (r"\boxed{\frac{1}{2}}", r"\boxed{\frac12}"),
        (r"The answer is: \frac{1}{2}", r"\boxed{\frac12}"),
        (r"The answer is: $\frac{1}{2}$.", r"\frac12"),
        (r"The answer is $\frac{1}{2}$ because $x = 3$.", r"\frac12"),
        (r"The answer is: \(\frac{1}{2}\)", "0.5"),
        ("#### 1/2", r"\boxed{\frac12}"),
        (r"so we get $x = \frac{1}{2}$.", r"\frac12"),
        (r"\boxed{-\frac{1}{2}}", r"\boxed{\frac{-1}{2}}"),
        (r"\boxed{[0, \infty)}", r"\boxed{[0,\infty)}"),
        (r"\boxed{(-\infty, 2) \cup (3, \infty)}", r"\boxed{(3,\infty)\cup(-\infty,2)}"),
        (r"\boxed{\{2, 1\}}", r"\boxed{\{1, 2\}}"),
        (r"\boxed{2\sqrt{3}}", r"\boxed{\sqrt{12}}"),
        (r"\boxed{50\%}", r"\boxed{50}"),
        (r"\boxed{5\text{ cm}}", r"\boxed{5}"),
        (r"\boxed{5}", r"\boxed{5 \text{ cm}}"),
        (r"\boxed{120^\circ}", r"\boxed{120}"),
        (
            r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}",
            r"\boxed{\begin{bmatrix}1&2\\3&4\end{bmatrix}}",
        ),
        (r"\boxed{(1,2)}", r"\boxed{(1, 2)}"),
        ("The answer is: x^2 + 2x + 1", r"\boxed{(x+1)^2}"),
        (r"\boxed{x = 5}", "5"),
        ("The answer is: 1,234", "1234"),
        ("The answer is $18", "18"),
        ("The answer is: Friday", r"\boxed{\text{Friday}}"),
        ("abc", "abc"),
    ],
)
def test_equal_mathematics(text: str, reference: str) -> None:
    assert is_equal_math(text, reference) is True


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        (r"\boxed{\frac{1}{2}}", r"\boxed{\frac13}"),
        (r"\boxed{0.33}", r"\boxed{\frac13}"),
        (r"\boxed{(0, 1]}", r"\boxed{[0, 1]}"),
        (r"\boxed{\{1, 2\}}", r"\boxed{\{1, 3\}}"),
        (r"\boxed{(1, 2)}", r"\boxed{(2, 1)}"),
        (r"\boxed{2\sqrt{3}}", r"\boxed{2}"),
        (r"\boxed{2x}", r"\boxed{2}"),
        (
            r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}",
            r"\boxed{\begin{pmatrix} 1 & 2 \\ 4 & 3 \end{pmatrix}}",
        ),
        (r"\boxed{1} \boxed{2}", r"\boxed{1}"),
        ("", ""),
        ("", r"\boxed{5}"),
        (r"\boxed{}", r"\boxed{}"),
        (r"\boxed{\frac{}{}}", r"\boxed{5}"),
        (r"\boxed{5" + "}" * 50, r"\boxed{4}"),
        ("\ud800", r"\boxed{5}"),
        (r"\boxed{" + "{" * 1000 + "}" * 1000 + "}", "5"),
        ("$$" * 50_000, "5"),
        ("x" * 100_000, "5"),
        ("The answer is: " + "(" * 100_000, "5"),
    ],
)
def test_different_mathematics(text: str, reference: str) -> None:
    assert is_equal_math(text, reference) is False


def test_mathematics_outside_of_the_main_thread() -> None:
    right: list[bool] = []
    pairs = ((r"\boxed{\frac{2}{6}}", r"\frac13"), (r"\boxed{\frac{2}{7}}", r"\frac13"))
    thread = threading.Thread(target=lambda: right.extend(is_equal_math(*p) for p in pairs))
    thread.start()
    thread.join()
    assert right == [True, False]


def test_a_computation_without_an_end_is_wrong() -> None:
    start = time.monotonic()
    assert is_equal_math(r"\boxed{9^{9^{9^{9}}}}", "5") is False
    assert time.monotonic() - start < 30


def test_math_verify_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"pip install 'lorasb-ds\[eval\]'"):
        is_equal_math("5", "5")


@pytest.mark.parametrize(
    ("task", "text", "response", "right"),
    [
        ("exact", " a b\n", "a b", True),
        ("exact", "a  b", "a b", False),
        ("gsm8k", "That makes $1,800.", "6 * 300 = 1800\n#### 1,800", True),
        ("gsm8k", "The answer is: 1800.00", "The answer is 3.\n#### 1800", True),
        ("gsm8k", "#### 18 apples of 20", "#### 18", True),
        ("gsm8k", "#### 20", "#### 18", False),
        ("metamath", "The answer is: 18", "#### 18\nThe answer is: 18", True),
        ("metamath", "The answer is: $18 dollars.", "#### 18\nThe answer is: 18", True),
        ("metamath", "That makes 18", "#### 18\nThe answer is: 18", True),
        ("metamath", "The answer is: 19", "#### 18\nThe answer is: 18", False),
        ("metamath", "The answer is: 2x", "The answer is: 2", False),
        ("metamath", r"The answer is: 2\sqrt{3}", "The answer is: 2", False),
        ("metamath", r"\boxed{x = 2}", "The answer is: 2", True),
        ("metamath", r"The answer is: 0.5", r"The answer is: \frac{1}{2}", True),
        ("metamath", r"The answer is: \sqrt{12}", r"\boxed{1} The answer is: 2\sqrt{3}", True),
        ("metamath", r"The answer is: \sqrt{13}", r"The answer is: 2\sqrt{3}", False),
        ("math", r"The answer is: 2x", r"so $\boxed{x + x}$. The answer is 3.", True),
        ("math", r"\boxed{(1, 2)}", r"\boxed{(3, 4)} or $\boxed{\left(1, 2\right)}$", True),
        ("math", r"\boxed{(3, 4)}", r"\boxed{(3, 4)} or $\boxed{\left(1, 2\right)}$", False),
    ],
)
def test_scores(task: str, text: str, response: str, right: bool) -> None:
    assert SCORES[task](text, {}, response) is right

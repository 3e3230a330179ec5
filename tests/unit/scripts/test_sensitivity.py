"""What scripts/sensitivity.py compares with what, on made-up numbers."""

from __future__ import annotations

import math

from lorasb_ds.export.inspection import Overlaps
from tests.runs import benchmark


def overlaps(n: int, **pairs: float) -> list[list[float]]:
    """A matrix with ones on its diagonal: ``_03=0.5`` is the overlap of the samples 0 and 3."""
    found = [[float(i == j) for j in range(n)] for i in range(n)]
    for name, value in pairs.items():
        i, j = int(name[1]), int(name[2])
        found[i][j] = found[j][i] = value
    return found


def test_what_is_compared_with_what() -> None:
    """Samples of a size between seeds; and with the largest sample of another seed."""
    A = overlaps(4, _01=0.3, _23=0.9, _03=0.5, _12=0.7, _02=0.99, _13=0.98)
    B = overlaps(4, _01=0.2, _23=0.8, _03=0.4, _12=0.5, _02=0.99, _13=0.98)
    with benchmark("sensitivity") as script:
        losses = {
            script.Sample(4, 1): (4.5, 3.25),
            script.Sample(4, 2): (3.5, 2.75),
            script.Sample(40, 1): (3.0, 2.0),
            script.Sample(40, 2): (3.25, 2.25),
        }
        assert script.table(losses, Overlaps(A, B, (0.1, 0.05))) == [
            ["4", "4.0000 ± 0.7071", "3.0000 ± 0.3536", "0.300", "0.200", "0.600", "0.450"],
            ["40", "3.1250 ± 0.1768", "2.1250 ± 0.1768", "0.900", "0.800", "0.900", "0.800"],
        ]


def test_one_seed() -> None:
    """Nothing is between seeds, and the largest sample is that of the same seed."""
    found = Overlaps(overlaps(2, _01=0.6), overlaps(2, _01=0.5), (0.1, 0.05))
    with benchmark("sensitivity") as script:
        losses = {script.Sample(4, 1): (3.5, 2.75), script.Sample(1000, 1): (3.0, math.nan)}
        assert script.table(losses, found) == [
            ["4", "3.5000", "2.7500", "-", "-", "0.600", "0.500"],
            ["1,000", "3.0000", "-", "-", "-", "-", "-"],
        ]
        assert "0.100 (A) and 0.050 (B) for random ones" in script.legend(found)

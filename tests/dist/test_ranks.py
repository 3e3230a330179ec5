"""The ranks that the other tests of this folder start: what is said of those that fail."""

from __future__ import annotations

import pytest

from tests.runs import run_ranks, run_worker


def test_a_rank_that_fails_ends_the_others() -> None:
    with pytest.raises(AssertionError) as error:
        run_ranks("rank_1_fails", 2, sleep_s=1000)
    assert "rank 0 was ended, since another one had failed" in str(error.value)
    assert "rank 1 ended with status 1" in str(error.value)
    assert "ValueError: on purpose" in str(error.value)


def test_a_rank_that_hangs_says_where() -> None:
    with pytest.raises(AssertionError) as error:
        run_ranks("rank_1_fails", 1, timeout=1, sleep_s=1000)
    assert "rank 0 was still at work after 1 s" in str(error.value)
    assert "in rank_1_fails" in str(error.value), "its stack"


def test_a_worker_that_is_asked_for_the_impossible() -> None:
    assert "lorasb: error: --r 0" in run_worker("--r", "0", status=2)
    with pytest.raises(AssertionError, match="rank 0 ended with status 2"):
        run_worker("--r", "0")

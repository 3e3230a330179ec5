"""What one rank raises, raised on all: nobody waits for a rank that has given up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from lorasb_ds.distributed import zero
from lorasb_ds.errors import ConfigError, JobError


def from_rank_0(make: Callable[[], Any]) -> Any:
    """Return what rank 0 makes, on every rank. Collective.

    Raises:
        Exception: what it raises on rank 0.
        ConfigError: on other ranks, if that is one.
        JobError: on other ranks, if it is another one.
    """
    result, failure = _attempt(make) if zero.rank() == 0 else (None, None)
    told: list[Any] = [result, *_told(failure)]
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    result, problems, other = told
    _raise(0, problems, other)
    return result


def on_every_rank(make: Callable[[], Any]) -> Any:
    """Return what this rank makes, if every rank has made its own. Collective.

    Raises:
        Exception: what it raises on this rank.
        ConfigError: if nothing is raised on this rank, and one on another: its problems.
        JobError: if nothing is raised on this rank, and another error on another.
    """
    result, failure = _attempt(make)
    found: list[Any] = [None] * zero.world_size()
    dist.all_gather_object(found, _told(failure))
    if failure is not None:
        raise failure
    for rank, (problems, other) in enumerate(found):
        _raise(rank, [f"Rank {rank}: {problem}" for problem in problems], other)
    return result


def _attempt(make: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return make(), None
    except Exception as error:  # of the options, the program or the disk
        return None, error


def _told(failure: Exception | None) -> tuple[tuple[str, ...], str | None]:
    """Return what other ranks are told: a ConfigError's problems, or another error."""
    if failure is None:
        return (), None
    if isinstance(failure, ConfigError) and failure.problems:
        return failure.problems, None
    return (), f"{type(failure).__name__}: {failure}"


def _raise(rank: int, problems: Sequence[str], other: str | None) -> None:
    """Raise what another rank has told, if it has failed."""
    if problems:
        raise ConfigError(*problems)
    if other is not None:
        raise JobError(f"Rank {rank} has failed: {other}", status=1)

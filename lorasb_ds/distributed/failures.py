"""What one rank raises, raised on all: nobody waits for a rank that has given up."""

from __future__ import annotations

from collections.abc import Callable
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
    made: list[Any] = [None, None, None]  # the result; what is wrong: problems, another error
    failure: Exception | None = None
    if zero.rank() == 0:
        try:
            made[0] = make()
        except ConfigError as error:
            failure, made[1] = error, error.problems
        except Exception as error:  # of the program or the disk
            failure, made[2] = error, _described(error)
    dist.broadcast_object_list(made, src=0)
    if failure is not None:
        raise failure
    result, problems, other = made
    if problems is not None:
        raise ConfigError(*problems)
    if other is not None:
        raise JobError(f"Rank 0 has failed: {other}", status=1)
    return result


def on_every_rank(make: Callable[[], Any]) -> Any:
    """Return what this rank makes, if every rank has made its own. Collective.

    Raises:
        Exception: what it raises on this rank.
        ConfigError: if nothing is raised on this rank, and one on another: its problems.
        JobError: if nothing is raised on this rank, and another error on another.
    """
    result: Any = None
    failure: Exception | None = None
    problems: tuple[str, ...] = ()
    try:
        result = make()
    except ConfigError as error:
        failure, problems = error, error.problems
    except Exception as error:
        failure = error
    other = None if failure is None or problems else _described(failure)
    found: list[Any] = [None] * zero.world_size()
    dist.all_gather_object(found, (problems, other))
    if failure is not None:
        raise failure
    for rank, (problems, other) in enumerate(found):
        if problems:
            raise ConfigError(*(f"Rank {rank}: {problem}" for problem in problems))
        if other is not None:
            raise JobError(f"Rank {rank} has failed: {other}", status=1)
    return result


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

"""The phases of a run, as an out-of-memory error names them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lorasb_ds.distributed import accelerator
from lorasb_ds.training.out_of_memory import OutOfMemoryError, Phase, explain, is_out_of_memory
from lorasb_ds.training.prepare import Prepared


@contextmanager
def phase(run: Prepared, planned: Phase, name: str | None = None) -> Iterator[None]:
    """Explain an out-of-memory error that is raised inside, unless a phase within this one has.

    Args:
        planned: the planner's phase, whose memory this takes.
        name: what the user knows it by. [default: ``planned``]
    Raises:
        OutOfMemoryError: on this rank only; the launcher ends the others.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        in_use = accelerator.memory_bytes()
        explanation = explain(planned, error, in_use, run.memory, run.config, name)
        raise OutOfMemoryError(explanation) from error

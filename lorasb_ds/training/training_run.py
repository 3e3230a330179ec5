"""A run with its engine, as its phases share it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorasb_ds.adapters.inject import trainable_parameters
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.distributed import zero
from lorasb_ds.distributed.failures import from_rank_0
from lorasb_ds.runs.checkpoint import TrainerState
from lorasb_ds.runs.run_log import RunLog
from lorasb_ds.system.signals import StopRequest
from lorasb_ds.training.prepare import Prepared

Adapters = dict[str, AdapterLinear]


@dataclass
class TrainingRun:
    """A run whose engine is made.

    Attributes:
        run: the run as it was checked and planned.
        folder: its output folder.
        log: on rank 0; None elsewhere.
        engine: DeepSpeed's engine.
        adapters: layer -> adapter; empty if PEFT makes the layers.
        state: how far the run is.
        stop: whether the run is asked to stop.
        saved: the state in the checkpoint that this process has written or restored last; None:
            there is none yet.
        failure: what the log has raised on rank 0; the run is to end with it.
    """

    run: Prepared
    folder: Path
    log: RunLog | None
    engine: Any
    adapters: Adapters
    state: TrainerState
    stop: StopRequest
    saved: TrainerState | None = None
    failure: Exception | None = None

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Every trained parameter, by name."""
        return trainable_parameters(self.engine.module)

    def to_log(self, action: Callable[[RunLog], object]) -> None:
        """Do something with the log, on rank 0 only. Not collective.

        If it raises (a full disk, a program's ``on_log``), the run is to stop, and nothing more
        goes to the log: the other ranks, which are on their way into the next collective, learn of
        it by ``asked_to_stop`` and ``end_if_failed``. A process alone raises it at once.
        """
        if self.log is None or self.failure is not None:
            return
        try:
            action(self.log)
        except Exception as error:
            if zero.world_size() == 1:
                raise
            self.failure = error

    def asked_to_stop(self) -> bool:
        """Return whether this rank is asked to stop, or has failed to log."""
        return self.stop.requested or self.failure is not None

    def end_if_failed(self) -> None:
        """End the run if rank 0's log has failed. Collective.

        Raises:
            Exception: what the log has raised, on rank 0.
            JobError: on the other ranks, unless it is a ConfigError.
        """

        def raise_failure() -> None:
            if self.failure is not None:
                raise self.failure

        from_rank_0(raise_failure)

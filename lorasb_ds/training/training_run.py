"""A run with its engine, as its phases share it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorasb_ds.adapters.inject import trainable_parameters
from lorasb_ds.adapters.layer import AdapterLinear
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
    """

    run: Prepared
    folder: Path
    log: RunLog | None
    engine: Any
    adapters: Adapters
    state: TrainerState
    stop: StopRequest
    saved: TrainerState | None = None

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Every trained parameter, by name."""
        return trainable_parameters(self.engine.module)

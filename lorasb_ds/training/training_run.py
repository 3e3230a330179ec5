"""A run with its engine: what its phases hand on to each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorasb_ds.adapters.inject import trained_in
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.runs.checkpoint import TrainerState
from lorasb_ds.runs.run_log import RunLog
from lorasb_ds.system.signals import StopRequest
from lorasb_ds.training.prepare import Prepared

Adapters = dict[str, AdapterLinear]


@dataclass
class TrainingRun:
    run: Prepared
    folder: Path
    log: RunLog | None  # rank 0's
    engine: Any
    adapters: Adapters  # none where PEFT makes the layers
    state: TrainerState
    stop: StopRequest
    saved: TrainerState | None = None  # by this process

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name."""
        return trained_in(self.engine.module)

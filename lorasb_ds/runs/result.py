"""What a run has come to, by the files in its folder. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorasb_ds.config.overwriting import read_object
from lorasb_ds.config.run_layout import ADAPTER, METRICS, RUN_JSON
from lorasb_ds.runs.history import read_rows, saved_loss, summarize


@dataclass(frozen=True)
class TrainResult:
    """The end of a run.

    Attributes:
        status: "finished", with its adapter and report; or "stopped" by request, with a checkpoint
            if there was something to save: the same call with ``resume="auto"`` goes on.
        folder: of the run, absolute.
        steps: that are done.
        loss: of training, the mean over the last tenth of the steps; nan without any.
        eval_loss: of the held-out rows, with ``adapter``; of a stopped run, with what is trained so
            far, at its last evaluation. nan without any.
    """

    status: Literal["finished", "stopped"]
    folder: Path
    steps: int
    loss: float
    eval_loss: float

    @property
    def adapter(self) -> Path:
        """The adapter's folder, in PEFT's format; it is there once the run has finished."""
        return self.folder / ADAPTER


def read_result(folder: Path, status: Literal["finished", "stopped"]) -> TrainResult:
    """Return the result of a run that has ended.

    Raises:
        ConfigError: if its ``metrics.jsonl`` is damaged.
    """
    rows = read_rows(folder / METRICS)
    found, finished = summarize(rows), status == "finished"
    return TrainResult(
        status=status,
        folder=folder.absolute(),
        steps=found.steps,
        loss=found.final_loss,
        eval_loss=saved_loss(read_object(folder / RUN_JSON), rows) if finished else found.last_loss,
    )

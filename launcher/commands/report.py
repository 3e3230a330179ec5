"""`lorasb report`: runs as text. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence

from launcher.text import columns, markdown
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.errors import option_name
from lorasb_ds.runs.compare import COLUMNS, Run, as_dict, differing_options, table

LEGEND = (
    "loss: mean over the last tenth of the training steps. Held-out loss: base > after the init > "
    "best > last, and a classifier's last scores. GiB: peak of rank 0."
)


def render(runs: Sequence[Run], as_markdown: bool) -> str:
    """Return a table of the runs, and one of the options in which they differ."""
    aligned = markdown if as_markdown else columns
    lines = [*aligned(COLUMNS, table(runs)), "", LEGEND]
    if differing := differing_options(runs):
        names = [run.name for run in runs if run.description]
        rows = [
            [_option(name), *("-" if value is None else str(value) for value in values)]
            for name, values in differing.items()
        ]
        lines += ["", *aligned(["differs", *names], rows)]
    return "\n".join(lines)


def _option(name: str) -> str:
    return option_name(name) if name in RunConfig.model_fields else name


def render_json(runs: Sequence[Run]) -> str:
    differing = list(differing_options(runs))
    return json.dumps({"runs": list(map(as_dict, runs)), "differing": differing}, indent=1)

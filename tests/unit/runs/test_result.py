"""What a run has come to, from its folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lorasb_ds.runs.result import read_result
from tests.runs import made_up_run


def test_the_loss_is_that_of_the_adapter(tmp_path: Path) -> None:
    """Which is that of the best evaluation here, not of the last."""
    run = made_up_run(tmp_path / "run", {"load_best_model_at_end": True})
    found = read_result(run, "finished")
    assert (found.steps, found.eval_loss) == (10, 0.5), "of an earlier version"
    described = json.loads((run / "run.json").read_text())
    for saved, loss in (({"step": 5, "eval_loss": 0.625}, 0.625), ({"step": 5}, math.nan)):
        (run / "run.json").write_text(json.dumps(described | {"saved": saved}))
        assert str(read_result(run, "finished").eval_loss) == str(loss)
    assert read_result(run, "stopped").eval_loss == 0.75, "of the last evaluation"

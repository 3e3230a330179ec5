"""Options and rows at trackers: TensorBoard; and Weights & Biases or Trackio, of one API."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import TRACKING
from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.compare import NOT_COMPARED
from lorasb_ds.system.files import write_json

PROJECT = "lorasb-ds"


def check_tracker(config: RunConfig) -> None:
    """Refuse --report-to if its package is missing.

    Raises:
        ConfigError: names the command that installs it.
    """
    package = config.report_to
    if package == "none":
        return
    spec = find_spec(package)
    # wandb leaves a folder "wandb" behind, which Python takes for a package without files.
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"--report-to {package} needs the package {package}: pip install {package}"
        )


def tensorboard_options(config: Mapping[str, Any]) -> Any:
    """Return the options of a run as a summary, which TensorBoard's tab HPARAMS shows.

    Written into the run's own folder, it has the tab show the last values of its scalars, too.
    (`SummaryWriter.add_hparams` makes another run, and writes values of its own into it.)
    """
    from torch.utils.tensorboard.summary import hparams

    def shown(value: Any) -> float | str:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return value
        return json.dumps(value, ensure_ascii=False).strip("[]")

    given = {n: v for n, v in config.items() if v is not None and n not in NOT_COMPARED}
    _, start_of_session, _ = hparams({name: shown(value) for name, value in given.items()}, {})
    return start_of_session


class Tracker:
    """A run at a tracker: a new one, or the one that the folder's ``tracking.json`` names.

    Server and account are configured by the tracker's own means (`wandb login`,
    TRACKIO_SPACE_ID, …). Its exceptions pass through to the caller.
    """

    def __init__(self, package: str, folder: Path, config: Mapping[str, Any]) -> None:
        """Start or continue the run there.

        Args:
            package: "wandb" or "trackio".
            config: of the run, shown beside its rows.
        """
        self._module: Any = importlib.import_module(package)
        known = _known(folder / TRACKING, package)
        name = known.get("name", folder.resolve().name)
        given: dict[str, Any] = {
            "project": os.environ.get(f"{package.upper()}_PROJECT") or PROJECT,
            "name": name,
            "config": dict(config),
        }
        if package == "wandb":
            given.update(id=known.get("id"), resume="allow", dir=str(folder))
            # Otherwise wandb would also send the console's output.
            given["settings"] = {"console": "off"}
        else:  # trackio identifies a run by its name, and takes the latest of several
            given["resume"] = "allow" if known else "never"
        run = self._module.init(**given)
        write_json(folder / TRACKING, {"tracker": package, "id": run.id, "name": name})

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send one row."""
        self._module.log(dict(values), step=step)

    def finish(self) -> None:
        """Wait until everything has arrived."""
        self._module.finish()


def _known(path: Path, package: str) -> dict[str, str]:
    """Return id and name of the run's earlier part at this tracker; {} if there was none."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if content["tracker"] == package else {}

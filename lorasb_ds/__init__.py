"""LoRA-SB fine-tuning on DeepSpeed.

What `lorasb train`, `export`, `merge`, `inspect`, `combine` and `eval` do, for Python: the names in
``__all__``. They are imported when they are first asked for, since torch is with most of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasb_ds.config.run_config import RunConfig
    from lorasb_ds.errors import ConfigError, JobError
    from lorasb_ds.evaluation.evaluator import evaluate_model
    from lorasb_ds.export.adapter_reader import read_adapter
    from lorasb_ds.export.combine import combine_adapters
    from lorasb_ds.export.inspection import draw_updates, inspect_adapter
    from lorasb_ds.export.merge import merge_adapter
    from lorasb_ds.export.merge_plan import weights_of
    from lorasb_ds.export.to_peft import export_adapter, measure_energy
    from lorasb_ds.runs.result import TrainResult
    from lorasb_ds.training.from_python import train

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "JobError",
    "RunConfig",
    "TrainResult",
    "combine_adapters",
    "draw_updates",
    "evaluate_model",
    "export_adapter",
    "inspect_adapter",
    "measure_energy",
    "merge_adapter",
    "read_adapter",
    "train",
    "weights_of",
]
_HOMES = {
    "ConfigError": "errors",
    "JobError": "errors",
    "RunConfig": "config.run_config",
    "TrainResult": "runs.result",
    "combine_adapters": "export.combine",
    "draw_updates": "export.inspection",
    "evaluate_model": "evaluation.evaluator",
    "export_adapter": "export.to_peft",
    "inspect_adapter": "export.inspection",
    "measure_energy": "export.to_peft",
    "merge_adapter": "export.merge",
    "read_adapter": "export.adapter_reader",
    "train": "training.from_python",
    "weights_of": "export.merge_plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

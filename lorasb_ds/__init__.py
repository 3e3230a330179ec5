"""LoRA-SB fine-tuning on DeepSpeed.

What `lorasb export`, `merge`, `inspect`, `combine` and `eval` do, for Python: the names in
``__all__``. They are imported when they are first asked for, since torch is with most of them.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ConfigError": "errors",
    "combine_adapters": "export.combine",
    "draw_updates": "export.inspection",
    "evaluate_model": "evaluation.evaluator",
    "export_adapter": "export.to_peft",
    "inspect_adapter": "export.inspection",
    "measure_energy": "export.to_peft",
    "merge_adapter": "export.merge",
    "read_adapter": "export.adapter_reader",
    "weights_of": "export.merge_plan",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

"""State-space layers whose code reads the weights of their projections instead of calling them.

An adapter on such a projection would do nothing, and packed or sharded weights would be misread.
What a class reads is found in its source.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

from torch import nn

# Classes of models, also of custom code.
MODELING = ("transformers.models.", "transformers_modules.")
# What Mamba's mixers call in training: kernels that take the weights of projections, too.
FUSED = "fused_output = "
READS_WEIGHT = re.compile(r"self\.(\w+)\.weight\s*@")


def _source(module: nn.Module) -> str:
    kind: Any = type(module)
    return _source_of(kind)


@functools.cache
def _source_of(of: Any) -> str:
    if not of.__module__.startswith(MODELING):
        return ""
    try:
        return inspect.getsource(of)
    except (OSError, TypeError):
        return ""


def layers_read_by_parents(model: nn.Module) -> dict[str, int]:
    """Return the linear layers whose parents multiply by their weights instead of calling them.

    Returns:
        Name -> elements of the weight.
    """
    return {
        f"{name}.{child}" if name else child: layer.weight.numel()
        for name, parent in model.named_modules()
        for child in set(READS_WEIGHT.findall(_source(parent)))
        if isinstance(layer := getattr(parent, child, None), nn.Linear)
    }


def call_projections(model: nn.Module) -> None:
    """Let mixers call their projections in training as they do in evaluation, in place.

    Convolution and scan still run by kernels where those are installed.
    """
    for module in model.modules():
        if FUSED in _source(module):
            module.register_forward_pre_hook(_as_in_evaluation)


def _as_in_evaluation(mixer: nn.Module, _: Any) -> None:
    mixer.training = False  # of the mixer itself, which has no dropout

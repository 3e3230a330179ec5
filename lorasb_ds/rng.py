"""The global random generators of a process, as tensors.

Nothing of this project draws from them (its generators are seeded by the run and made for their
purpose), but a model's layers may: dropout, layer drop.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def rng_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Torch's generators on the host and on the device, Python's and numpy's."""
    numpy_state: Any = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "numpy": torch.tensor([*numpy_state[1].tolist(), numpy_state[2]], dtype=torch.int64),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_rng_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Go on from there; a device's generator is left alone where the states have none."""
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))
    *key, position = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, np.uint32), position, 0, 0.0))
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"], device)

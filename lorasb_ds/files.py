"""Files that are whole or not there: written aside, fsynced and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    publish(aside, path)


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """The same for a safetensors file."""
    aside = path.with_name(path.name + ".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, aside, metadata=metadata)
    publish(aside, path)


def publish(aside: Path, path: Path) -> None:
    """Give a file or folder that is complete its name, durably."""
    fsync(aside)
    aside.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Write a file or folder through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The folder of the files that are started as processes."""

from __future__ import annotations

from pathlib import Path

WORKERS = Path(__file__).resolve().parent

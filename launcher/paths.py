"""Where the files are that other processes start."""

from __future__ import annotations

from pathlib import Path

WORKERS = Path(__file__).resolve().parent

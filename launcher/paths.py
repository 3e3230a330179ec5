"""The folder of the files that are started as processes.

By their paths, not by `python -m`: that would import what is in the working directory first, a
stranger's `random.py` for example.
"""

from __future__ import annotations

from pathlib import Path

WORKERS = Path(__file__).resolve().parent

"""Units that messages and options use."""

from __future__ import annotations

GIB = 1 << 30

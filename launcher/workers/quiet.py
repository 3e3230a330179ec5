"""Silences messages of libraries that do not concern a user, and that every rank would print."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Silence libraries, except for errors and DeepSpeed's log; call it before transformers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # torch warns of every host whose address has no name.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.stderr.isatty() or int(os.environ.get("RANK", 0)) > 0:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Deprecations inside DeepSpeed, PEFT and transformers, for their authors.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # bitsandbytes offers to download a CPU kernel, which is neither wanted nor used.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Without a traceback for a line of DeepSpeed's log whose reader has gone (`… | head -1`).
    logging.raiseExceptions = False

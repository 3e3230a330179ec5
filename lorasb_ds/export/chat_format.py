"""The tokenizer and chat template that accompany what is made of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasb_ds.config.run_layout import ADAPTER, TEMPLATE_COPY
from lorasb_ds.data.template import chat_template, chosen_template, stand_in
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.stored_adapter import StoredAdapter
from lorasb_ds.models.base import Base
from lorasb_ds.models.tokenizer_files import (
    CHAT_TEMPLATE,
    TOKENIZER_CONFIG,
    TokenizerFiles,
    has_chat_template,
)


def tokenizer_files(adapter: StoredAdapter) -> TokenizerFiles | None:
    """Return the tokenizer of an adapter: beside it, or of its run's base if that is here."""
    for folder in _folders(adapter):
        if any((folder / name).is_file() for name in (TOKENIZER_CONFIG, CHAT_TEMPLATE)):
            return TokenizerFiles(folder)
    if adapter.run is None or adapter.base_path is None or not Path(adapter.base_path).is_dir():
        return None
    try:
        base = Base(adapter.base_path)
        found = _template_beside(adapter)  # of --chat-template, where the run is not finished
        return TokenizerFiles(base.folder, found) if found else TokenizerFiles.of(base)
    except ConfigError:  # no tokenizer there that could be read
        return None


def template_to_add(adapter: StoredAdapter, base: Base) -> str | None:
    """Return the chat template that a merged model needs beside the base's files.

    It is the adapter's, which may have been trained with another one than the base's; the stand-in
    for a run of ours on a base without one.
    """
    found = _template_beside(adapter)
    try:
        plain = stand_in(base.tokenizer)
    except ConfigError:  # the base has no tokenizer that could be read
        return found
    if has_chat_template(base.folder):
        return found if found != plain else None
    return found or (plain if adapter.run is not None else None)


def use_template_of(adapter: StoredAdapter, tokenizer: Any) -> None:
    """Give a tokenizer the adapter's chat template, unless that is the stand-in."""
    file = adapter.path / CHAT_TEMPLATE
    if not file.is_file() or chosen_template(tokenizer) is not None:
        return
    template = file.read_text(encoding="utf-8")
    if template not in (stand_in(tokenizer), chat_template(tokenizer)):
        tokenizer.chat_template = template


def _template_beside(adapter: StoredAdapter) -> str | None:
    """Return the chat template beside an adapter, or that of its run's --chat-template."""
    files = [folder / CHAT_TEMPLATE for folder in _folders(adapter)]
    if adapter.run is not None:
        files.append(adapter.run / TEMPLATE_COPY)
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)


def _folders(adapter: StoredAdapter) -> list[Path]:
    return [adapter.path, *([adapter.run / ADAPTER] if adapter.run is not None else [])]

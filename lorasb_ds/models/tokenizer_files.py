"""The files of a tokenizer with its chat template, as they accompany an adapter."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lorasb_ds.config.paths import read_json
from lorasb_ds.data.template import stand_in
from lorasb_ds.models.base import Base
from lorasb_ds.system.files import write_json, write_text

CHAT_TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
MORE_TEMPLATES = "additional_chat_templates"  # a folder
NAMES = (
    CHAT_TEMPLATE,
    TOKENIZER_CONFIG,
    "chat_template.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's files, and what is written in the place of its chat template.

    The files are copied, and not saved by transformers: another version need not know the classes
    that this one would name.

    Attributes:
        template: a chat template in the place of the files'; None: theirs, if they have one.
    """

    folder: Path
    template: str | None = None

    @classmethod
    def of(cls, base: Base) -> TokenizerFiles:
        """Return those of a base, with the template that was chosen or stands in for its own."""
        tokenizer = base.tokenizer
        if base.classifies:
            return cls(base.folder)
        if base.chat_template is not None:
            return cls(base.folder, tokenizer.chat_template)
        return cls(base.folder, None if tokenizer.chat_template else stand_in(tokenizer))

    def copy_into(self, folder: Path) -> None:
        """Copy the files into a folder that exists.

        A tokenizer with Python code of its own stays with its base: only a stand-in is written.
        """
        config = self.folder / TOKENIZER_CONFIG
        content = read_json(str(config), TOKENIZER_CONFIG) if config.is_file() else {}
        if "auto_map" not in content:
            for path in self._files:
                target = folder / path.relative_to(self.folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
            # Without it, transformers would look for the model's config.json beside it.
            fixed = dict(content)
            fixed["tokenizer_class"] = content.get("tokenizer_class") or "PreTrainedTokenizerFast"
            if self.template is not None:
                fixed.pop("chat_template", None)
            if content and fixed != content:
                write_json(folder / config.name, fixed)
        if self.template is not None:
            write_text(folder / CHAT_TEMPLATE, self.template)

    @property
    def _files(self) -> list[Path]:
        found = [self.folder / name for name in NAMES if (self.folder / name).is_file()]
        if self.template is not None:
            return [file for file in found if not file.name.startswith("chat_template.")]
        return [*found, *(self.folder / MORE_TEMPLATES).glob("*.jinja")]


def has_chat_template(folder: Path) -> bool:
    """Return whether the files of a tokenizer bring a chat template."""
    config = folder / TOKENIZER_CONFIG
    content = read_json(str(config), TOKENIZER_CONFIG) if config.is_file() else {}
    files = [*folder.glob("chat_template.*"), *(folder / MORE_TEMPLATES).glob("*.jinja")]
    return bool(files or content.get("chat_template"))

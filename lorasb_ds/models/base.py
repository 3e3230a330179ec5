"""The base model on disk: its configuration, tensors, tokenizer and digest, each read once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lorasb_ds.config.paths import read_json
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.classification import Classes
from lorasb_ds.data.template import check_template, fix_date
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.checkpoint_files import (
    StoredTensor,
    is_hub_name,
    model_folder,
    stored_tensors,
    weights_digest,
)
from lorasb_ds.models.classification import head_modules, head_parameters, set_classes
from lorasb_ds.models.config_json import is_encoded, load_config, stored_quantization
from lorasb_ds.models.empty_model import empty_model
from lorasb_ds.models.experts import ExpertShapes
from lorasb_ds.models.multimodal import encoders, is_multimodal
from lorasb_ds.models.quantization import Kind
from lorasb_ds.models.shape import other_experts, shape_of
from lorasb_ds.models.stored_formats import decoded
from lorasb_ds.models.tokenizer import choose_pad_token, read_tokenizer, use_chat_template
from lorasb_ds.models.weight_map import WeightSource, map_weights, unused_tensors
from lorasb_ds.planner.model_shape import ModelShape

# Properties of a base that do not depend on what a classifier predicts.
OF_FILES = ("folder", "encoding", "_tokenizer_and_note", "headers", "stored", "digest")


@dataclass(frozen=True)
class Base:
    """A base model's files. Each property is read or computed at its first use, and then kept.

    All properties raise ConfigError, naming the file, if the files are missing, broken, or do not
    belong together. None is collective.

    Args:
        name: a folder, a hub name or "demo".
        trust_remote_code: run Python code that comes with the files.
        attn_implementation: of transformers; None: the model's own.
        template_date: what chat templates get as today's date, in ISO format; None: today.
        chat_template: of ``--chat-template``, in place of the files'.
        classifies: make a classifier of the files, and not a causal language model.
        classes: what it predicts; None: not known yet, as before the rows are read.
    """

    name: str
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    template_date: str | None = None
    chat_template: str | None = None
    classifies: bool = False
    classes: Classes | None = None

    @cached_property
    def folder(self) -> Path:
        """The folder with the files, downloaded if need be."""
        return model_folder(self.name, self.trust_remote_code)

    @cached_property
    def hf_config(self) -> Any:
        """The transformers configuration of the model, without ``encoding``."""
        hf_config = load_config(self.name, self.folder, self.trust_remote_code, self.classifies)
        if self.encoding is not None:
            del hf_config.quantization_config
        if self.attn_implementation is not None:
            hf_config._attn_implementation = self.attn_implementation
        if self.classes is not None:
            set_classes(hf_config, self.classes)
        return hf_config

    @cached_property
    def encoding(self) -> dict[str, Any] | None:
        """The quantization_config of files in FP8 or MXFP4; None if there is none, or another.

        Such files are decoded as they are read: for all else the base is in full precision.
        """
        config = read_json(str(self.folder / "config.json"), "--model")
        found = config.get("quantization_config")
        return found if isinstance(found, dict) and is_encoded(found) else None

    @property
    def quantization(self) -> Kind | None:
        """How bitsandbytes has quantized the files; None if it has not."""
        return stored_quantization(self.hf_config, self.name)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, padding on the right with a token that the model has an embedding for."""
        return self._tokenizer_and_note[0]

    @cached_property
    def _tokenizer_and_note(self) -> tuple[Any, str | None]:
        tokenizer = read_tokenizer(
            *(self.name, self.folder, self.hf_config, self.trust_remote_code),
            needs_end=not self.classifies,
        )
        if self.template_date is not None:
            fix_date(tokenizer, date.fromisoformat(self.template_date))
        if self.chat_template is not None:
            use_chat_template(tokenizer, self.chat_template)
        check_template(self.name, tokenizer)
        return tokenizer, choose_pad_token(tokenizer, self.hf_config.get_text_config().vocab_size)

    @cached_property
    def model(self) -> Any:
        """The model without weights, in bf16, to look at. Do not change it: see ``empty_model``."""
        return self.empty_model(torch.bfloat16)

    @cached_property
    def whole_model(self) -> Any:
        """As ``model``; a multimodal one with its encoders. The files are of this model."""
        if not is_multimodal(self.hf_config):
            return self.model
        return empty_model(self.hf_config, torch.bfloat16, self.trust_remote_code, text_part=False)

    def empty_model(self, dtype: torch.dtype) -> Any:
        """Make a new model without weights: see the function ``empty_model``.

        A decoder that classifies reads a row's last token before the padding, and keeps no cache.
        """
        model = empty_model(
            self.hf_config, dtype, self.trust_remote_code, classifies=self.classifies
        )
        if self.classifies:
            model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
            model.config.use_cache = False
        return model

    def with_classes(self, classes: Classes) -> Base:
        """Return the base of a classifier of these classes; what was read of its files is kept."""
        base = replace(self, classes=classes)
        vars(base).update({name: vars(self)[name] for name in OF_FILES if name in vars(self)})
        return base

    @property
    def model_type(self) -> str:
        """The model's own: it may be a part of a composite configuration."""
        return self.model.config.model_type

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes of the model's layers, for the planner."""
        return shape_of(self.name, self.model)

    @property
    def experts(self) -> ExpertShapes:
        """The projections of MoE experts that can be quantized and get an adapter."""
        return self.shape.experts

    @cached_property
    def order(self) -> dict[str, int]:
        """Position in the model of every linear layer and projection of experts."""
        order = {name: 2 * i for i, (name, _) in enumerate(self.model.named_modules())}
        of_experts = {}
        for name in self.experts:
            module, _, projection = name.rpartition(".")
            of_experts[name] = order[module] + (projection == "down_proj")
        return order | of_experts

    @cached_property
    def other_experts(self) -> dict[str, int]:
        """Other modules with 3-D parameters -> their number of elements.

        They stay frozen, and as they are stored.
        """
        return other_experts(self.model)

    @cached_property
    def headers(self) -> dict[str, StoredTensor]:
        """Every tensor of the checkpoint, as its file's header has it."""
        return stored_tensors(self.name, self.folder)

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """Every tensor of the checkpoint, those in FP8 or MXFP4 with the scales decoded into it."""
        return decoded(self.headers, self.encoding, self.name)

    @cached_property
    def sources(self) -> list[WeightSource]:
        """Every parameter and stored buffer of the model, and the stored tensors that make it."""
        names = self.model.state_dict()
        return [s for s in self._all_sources if any(name in names for name in s.targets)]

    @cached_property
    def _all_sources(self) -> list[WeightSource]:
        within = f"{self.model.base_model_prefix}."
        new = [name for name in self.head if not name.startswith(within)]
        return map_weights(self.whole_model, self.stored, self.name, new, self.head)

    @cached_property
    def head(self) -> list[str]:
        """The parameters of a classifier's head, which are trained whole; [] without one."""
        return head_parameters(self.model)

    @cached_property
    def new_parameters(self) -> list[str]:
        """Those of the head that are not in the files: all but a pooler that is."""
        stored = {target for source in self.sources for target in source.targets}
        return [name for name in self.head if name not in stored]

    @cached_property
    def module_names(self) -> list[str]:
        """The names of all modules, among which PEFT looks for an adapter's: encoders', too."""
        return [name for name, _ in self.whole_model.named_modules()]

    @cached_property
    def digest(self) -> str:
        """What identifies these weights: the hub's commit, or ``weights_digest`` of a folder."""
        if is_hub_name(self.name):
            # A snapshot's folder in the cache is named by its commit.
            return f"{self.name}@{self.folder.name}"
        return weights_digest(self.folder, self.headers)

    def check_files(self) -> None:
        """Refuse files that do not make the model of config.json; headers are read, not tensors.

        Raises:
            ConfigError: naming the tensor, or the contradiction.
        """
        if any(source.beside for source in self.sources) != (self.quantization is not None):
            raise ConfigError(
                f"--model {self.name}: config.json and the weights do not agree on whether they "
                "are quantized (quantization_config). Fetch the files again."
            )

    def notes(self) -> list[str]:
        """Return what the user should know: the pad token chosen, stored tensors not used."""
        notes = [note] if (note := self._tokenizer_and_note[1]) is not None else []
        if self.whole_model is not self.model:
            left = encoders(self.whole_model)
            size = sum(p.numel() for encoder in left.values() for p in encoder.parameters())
            notes.append(
                f"multimodal: training is on text, without {', '.join(left) or 'an encoder'} "
                f"({size / 1e6:,.1f} M parameters, not loaded). The adapter has the names of the "
                "whole model, and `lorasb merge` writes all of it"
            )
        unused = unused_tensors(self.whole_model, self._all_sources, self.stored)
        if self.classifies:
            sizes = {name: self.model.get_parameter(name).numel() for name in self.head}
            new = sum(sizes[name] for name in self.new_parameters)
            notes.append(
                f"classification head: {', '.join(head_modules(self.model))} "
                f"({sum(sizes.values()):,} parameters, {new:,} of them new), trained whole and "
                "without an adapter"
            )
            if unused:
                notes.append(
                    f"{len(unused)} tensors of the checkpoint are no part of this classifier, such "
                    f"as {', '.join(unused[:3])}"
                )
        elif unused:
            notes.append(
                f"warning: {len(unused)} tensors of the checkpoint have no place in the model of "
                f"config.json, such as {', '.join(unused[:3])}"
            )
        return notes


def open_base(config: RunConfig) -> tuple[Base, RunConfig]:
    """Open the base that the options name.

    Returns:
        The base; and the options, with ``load_in_4bit`` or ``load_in_8bit`` set if its files are
        quantized.
    Raises:
        ConfigError: if its config.json cannot be used, or the options ask for another quantization
            than that of the files.
    """
    base = Base(
        config.model,
        config.trust_remote_code,
        config.attn_implementation,
        config.template_date,
        config.chat_template,
        config.classifies,
    )
    if base.quantization is None:
        return base, config
    asked = {"load_in_4bit": config.load_in_4bit, "load_in_8bit": config.load_in_8bit}
    if any(given for name, given in asked.items() if name != f"load_in_{base.quantization}"):
        raise ConfigError(
            f"--model {config.model} is quantized already, to {base.quantization[0]} bits. Leave "
            "out --load-in-4bit and --load-in-8bit, or give the base it was made from."
        )
    return base, config.model_copy(update={f"load_in_{base.quantization}": True})

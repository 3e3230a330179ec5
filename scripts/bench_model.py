"""Random checkpoints of real shapes, written a decoder block at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_llama(folder: Path, shape: Mapping[str, Any]) -> None:
    """Write a bf16 Llama with the demo's vocabulary and tokenizer; see ``write_model``.

    Args:
        shape: fields of LlamaConfig.
    """
    from transformers import LlamaConfig

    write_model(folder, LlamaConfig(**demo_tokens(), **shape))


def write_qwen3_moe(folder: Path, shape: Mapping[str, Any]) -> None:
    """Write a bf16 Qwen3-MoE, its experts' matrices by themselves, as they are published.

    Args:
        shape: fields of Qwen3MoeConfig.
    """
    from transformers import Qwen3MoeConfig

    write_model(folder, Qwen3MoeConfig(**demo_tokens(), **shape))


def demo_tokens() -> dict[str, int]:
    """Return the fields of a configuration that the demo's tokenizer needs."""
    from transformers import LlamaConfig

    from lorasb_ds.config.paths import demo_model_dir

    config = LlamaConfig.from_pretrained(demo_model_dir())
    tokens = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    return {key: getattr(config, key) for key in tokens}


def write_model(folder: Path, config: Any) -> None:
    """Write a random bf16 model with the demo's tokenizer.

    Every decoder block has a file, in order; what is left has the last one. Weights are normal with
    a deviation of 1/sqrt(hidden size), norms are 1. What is held in memory is one file's tensors.
    The folder may hold the same model already: it is then left as it is.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    described = config.to_json_string(use_diff=True)
    written = folder / "config.json"  # the last file that is written
    if written.is_file():
        if written.read_text() != described:
            raise SystemExit(f"{folder} holds another model. Name an empty folder.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}  # tied ones once
    files = [
        [name for name in shapes if name.startswith(f"model.layers.{i}.")]
        for i in range(config.num_hidden_layers)
    ]
    files.append([name for name in shapes if not re.match(r"model\.layers\.", name)])
    index = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        generator = torch.Generator().manual_seed(number)
        tensors = {name: torch.ones(shapes[name], dtype=torch.bfloat16) for name in names}
        for weight in tensors.values():
            if weight.dim() > 1:
                weight.normal_(std=config.hidden_size**-0.5, generator=generator)
        tensors = {key: part for item in tensors.items() for key, part in _as_published(*item)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    total = sum(2 * shape.numel() for shape in shapes.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))
    copy_tokenizer(folder)
    written.write_text(described)


def copy_tokenizer(folder: Path) -> None:
    """Copy the demo's tokenizer, with its chat template, into a model's folder."""
    from lorasb_ds.config.paths import demo_model_dir

    demo = demo_model_dir()
    for file in [*demo.glob("*token*"), demo / "chat_template.jinja"]:
        shutil.copy(file, folder)


def _as_published(name: str, weight: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Return a parameter as it is stored: a projection of experts as one matrix for each."""
    module, _, leaf = name.rpartition(".")
    if leaf not in ("gate_up_proj", "down_proj"):
        return [(name, weight)]
    leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    return [
        (f"{module}.{expert}.{part_leaf}.weight", part.clone())
        for expert, W in enumerate(weight)
        for part_leaf, part in zip(leaves, W.chunk(len(leaves)), strict=True)
    ]


def read_once(folder: Path) -> None:
    """Bring a model's files into the page cache."""
    buffer = bytearray(1 << 24)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

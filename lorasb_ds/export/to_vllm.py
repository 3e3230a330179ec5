"""Write an adapter with experts in the form that vLLM loads: LoRAs of each expert's own layers."""

from __future__ import annotations

from pathlib import Path

import torch

from lorasb_ds.adapters.low_rank import LoraPair, padded
from lorasb_ds.adapters.peft_writer import peft_tensors, save_peft_adapter
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.chat_format import tokenizer_files
from lorasb_ds.export.merge_plan import parts_of_experts
from lorasb_ds.export.stored_adapter import StoredAdapter
from lorasb_ds.export.to_peft import check_folder, truncated
from lorasb_ds.models.base import Base


def export_for_vllm(
    adapter: StoredAdapter,
    base: Base,
    out: Path,
    *,
    r: int | None = None,
    dtype: str = "fp32",
    overwrite: bool = False,
) -> int:
    """Write a LoRA folder with the layers of single experts, as the base's checkpoint names them.

    For example ``experts.5.gate_proj`` and ``experts.5.up_proj`` in the place of
    ``experts.gate_up_proj``: both have the A of that projection, and their rows of its B. vLLM
    loads such folders for families whose experts it adapts. All layers have the same rank there, to
    which experts are padded.

    Args: as ``to_peft.export_adapter``.
    Raises:
        ConfigError: as ``export_adapter``; and if the checkpoint has no matrices of single experts.
    """
    folder = check_folder(out, [adapter], overwrite)
    rank = r or adapter.r
    parts = parts_of_experts(adapter, base)
    tensors: dict[str, torch.Tensor] = {}
    for name, pair in truncated(adapter, r, dtype):
        A, B = padded(pair, rank)
        layers = {name: LoraPair(A, B)}
        if name in parts:
            layers = {}
            for part in parts[name]:
                if len(base.stored[part.key].shape) != 2:
                    raise ConfigError(
                        f"--to vllm: {part.key} holds all experts of --model {base.name}, and "
                        "vLLM's form for such families is not known here. Use `lorasb merge`."
                    )
                of_part = LoraPair(A, B[part.rows.start : part.rows.stop].contiguous())
                layers[part.key.removesuffix(".weight")] = of_part
        for layer, of_layer in layers.items():
            # A copy of A: safetensors stores no tensor twice.
            tensors |= peft_tensors(layer, of_layer.A.clone(), of_layer.B)
    modules = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in tensors})
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_peft_adapter(
        folder,
        tensors,
        r=rank,
        target_modules=modules,
        base_model=adapter.base_path,
        tokenizer=tokenizer_files(adapter),
    )
    return sum(tensor.nbytes for tensor in tensors.values())

"""What the project is compared with: transformers' own loss and autograd's own gradients."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lorasb_ds.config.ds_config import resolve_ds_config
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.data.batch import Batch
from lorasb_ds.models.base import Base
from lorasb_ds.models.experts import experts_modules, up_projection
from lorasb_ds.models.linear_layers import linear_layers
from lorasb_ds.models.loading import load_base


def own_loss(model: Any, batch: Batch) -> torch.Tensor:
    """transformers' mean loss over the labels of one padded batch."""
    return model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss


def true_gradients(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """`.grad` of every linear weight after one backward of that loss, and the "loss".

    Of experts it is that of their projections, (experts, out, in).
    """
    model.requires_grad_(True)
    loss = own_loss(model, batch)
    loss.backward()
    modules = dict(model.named_modules())
    result = {name: modules[name].weight.grad.float() for name in linear_layers(model)}
    for module_name, experts in experts_modules(model).items():
        for name in (up_projection(experts), "down_proj"):
            G = getattr(experts, name).grad.float()
            result[f"{module_name}.{name}"] = G.mT if experts.is_transposed else G
    return result | {"loss": loss.detach()}


def nf4_config(compute_dtype: torch.dtype) -> Any:
    """NF4 with double quantization, as transformers' ``quantization_config``."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_own_code(llama: Path, folder: Path) -> Path:
    """Copy a Llama to a folder where it is a model of its own code, for --trust-remote-code."""
    shutil.copytree(llama, folder)
    (folder / "own.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.OwnForCausalLM",
    }
    config["architectures"] = ["OwnForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load_whole(folder: str, dtype: str) -> Any:
    """A base as this project loads it: plain, in one process."""
    config = load_run_config({"model": folder, "dtype": dtype})
    ds_config, config = resolve_ds_config(config, 1)
    return load_base(Base(config.model), config, ds_config).eval()


def write_random_lora(base: Path, folder: Path, **options: Any) -> Any:
    """A LoRA that is large enough to change answers, as PEFT saves it; its model, in fp32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    tuned.save_pretrained(folder)
    return tuned.eval()

"""The base: its configuration, its tokenizer, its shapes, and its frozen weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from lorasb_ds import quantization, zero
from lorasb_ds.adapter import Shapes, expert_layers, linear_layers
from lorasb_ds.config import DEMO_MODEL, ConfigError, RunConfig, demo_model_dir

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def model_path(model: str) -> str:
    """What transformers is given for ``--model``: the demo's folder for 'demo', else the same.

    Raises:
        ConfigError: if a folder is named that does not exist or holds no safetensors.
    """
    if model == DEMO_MODEL:
        folder = demo_model_dir()
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"--model demo: {folder} does not hold the demo model. Fetch it by "
                "scripts/setup.sh, or name a model of your own."
            )
        return str(folder)
    folder = Path(model).expanduser()
    if not folder.exists():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise ConfigError(
                f"--model {model}: there is no such folder. Give a folder with config.json and "
                "*.safetensors, or a hub name such as mistralai/Mistral-7B-v0.1."
            )
        return model
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model {model}: the folder has no config.json, so it is no model.")
    if not any(folder.glob("*.safetensors")):
        legacy = sorted(f.name for f in folder.glob("*.bin"))
        found = (
            f"only {', '.join(legacy)}, which are pickles and can run code" if legacy else "none"
        )
        raise ConfigError(
            f"--model {model}: the weights must be *.safetensors; the folder has {found}. Convert "
            "them by save_pretrained of a trusted copy."
        )
    return str(folder)


def load_config(model: str) -> Any:
    """The transformers configuration of a causal language model.

    Raises:
        ConfigError: if there is none, no network to get it, or it is another kind of model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(model_path(model), trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ConfigError(
            f"--model {model} cannot be read: {_first_line(error)} It must be a folder with a "
            "model that transformers knows, or the name of one on the hub (which needs a network "
            "or a filled cache)."
        ) from error
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"--model {model} is quantized already. Give the base it was made from; "
            "--load-in-4bit quantizes it."
        )
    architectures = config.architectures or []
    causal = all(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not causal:
        raise ConfigError(
            f"--model {model} is a {', '.join(architectures) or type(config).__name__}, not a "
            "causal language model (…ForCausalLM). Only those can be trained so far."
        )
    return config


def load_tokenizer(model: str) -> Any:
    """The base's tokenizer, padding on the right; a missing pad token becomes the end of sequence.

    Labels never come from padding (it is masked by position), so that no embedding is added.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(model), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model {model}: its tokenizer cannot be read: {' '.join(str(error).split())[:300]} "
            "The folder needs tokenizer.json (or tokenizer.model) and tokenizer_config.json."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"--model {model}: its tokenizer has no end-of-sequence token.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def read_shapes(hf_config: Any) -> tuple[Shapes, dict[str, int]]:
    """Linear layers, and expert modules with their elements, from a model's configuration alone."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    return linear_layers(model), expert_layers(model)


def weights_digest(model: str) -> str:
    """Tells one model's weights from another's: the hub's commit, or of every file in a folder its
    name, header, and 4 KiB from the beginning, middle and end of every tensor.

    Training, merging or quantizing changes those; an edit of a few rows may not.

    Raises:
        ConfigError: if a file is broken.
    """
    from transformers.utils import cached_file

    folder = Path(model_path(model))
    if not folder.is_dir():
        # A snapshot's folder in the cache is named after the commit.
        return f"{model}@{Path(str(cached_file(model, 'config.json'))).parent.name}"
    result = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        result.update(path.name.encode())
        try:
            _digest_tensors(path, result)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"--model {model}: {path.name} cannot be read: it is no whole safetensors file."
            ) from error
    return result.hexdigest()


def _digest_tensors(path: Path, result: Any) -> None:
    # https://huggingface.co/docs/safetensors: length of the header (8 bytes), header, tensors.
    sample, file_size = 4096, path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > file_size:
            raise ValueError("the file ends within its header")
        header = file.read(length)
        result.update(header)
        for name, entry in json.loads(header).items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            if end > file_size:
                raise ValueError("the file ends before its last tensor")
            for start in (begin, (begin + end) // 2, max(begin, end - sample)):
                file.seek(start)
                result.update(file.read(min(sample, end - start)))


def load_base(config: RunConfig, hf_config: Any, ds_config: dict[str, Any]) -> nn.Module:
    """The frozen base where the run wants it: ZeRO-3 shards, 4-bit, or plain on the device.

    Collective under ZeRO-3 (transformers reads on every rank and shards parameter by parameter),
    but not in 4 bits: every rank reads and quantizes all of the checkpoint, and the engine shards
    it. A rank's peak is then the whole 4-bit model on its device, plus one weight on its way: in
    bf16 with bitsandbytes' intermediates (about 14 bytes for each of its numbers on a CPU), or
    quantized twice while it is packed. The checkpoint's files are mapped, not held.
    """
    dtype = DTYPES[config.dtype]
    options: dict[str, Any] = {"dtype": dtype}
    alive = None
    if config.load_in_4bit:
        options["quantization_config"] = quantization.nf4_config(dtype)
        options["device_map"] = {"": zero.device()}
    else:
        alive = zero.loading_context(ds_config)
    model = _read_weights(config.model, config=hf_config, **options)
    del alive
    if config.load_in_4bit:
        quantization.pack_linear_layers(model)
    if config.gradient_checkpointing:
        # The reentrant kind needs inputs that require grad, which a frozen embedding's do not.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.requires_grad_(False)
    return model


def _read_weights(model: str, **options: Any) -> Any:
    """from_pretrained, but a weight that is missing is an error and not a random one."""
    from transformers import AutoModelForCausalLM

    try:
        result: Any = AutoModelForCausalLM.from_pretrained(
            model_path(model),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "mismatch" not in str(error):
            raise
        raise ConfigError(
            f"--model {model}: its weights cannot be read: {_first_line(error)}"
        ) from error
    loaded, info = result
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"--model {model}: the files lack {len(missing)} weights of the model, such as "
            f"{', '.join(missing[:3])}. Is it a whole {type(loaded).__name__} checkpoint?"
        )
    return loaded


def _first_line(error: BaseException) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text.strip().rstrip(".") + "."


def load_plain(
    model: str, dtype: str, adapter: str | None = None
) -> tuple[nn.Module, torch.device]:
    """A whole model on one device for inference, with PEFT's reading of an adapter folder."""
    if adapter is not None:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (Path(adapter) / file).is_file():
                raise ConfigError(f"--adapter {adapter}: the folder has no {file}.")
    device = zero.device()
    base = _read_weights(model, dtype=DTYPES[dtype], device_map={"": device})
    if adapter is not None:
        from peft import PeftModel

        try:
            base = PeftModel.from_pretrained(base, adapter)
        except (RuntimeError, ValueError, SafetensorError) as error:
            raise ConfigError(
                f"--adapter {adapter} does not fit --model {model}: {_first_line(error)}"
            ) from error
    return base.eval(), device

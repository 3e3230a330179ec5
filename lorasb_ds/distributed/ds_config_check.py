"""Check a ds_config with DeepSpeed's own classes, before anything is loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from pydantic import ValidationError
from torch.utils.cpp_extension import CUDA_HOME

from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.zero import VERSION
from lorasb_ds.errors import ConfigError


def check_ds_config(ds_config: dict[str, Any], path: str) -> None:
    """Reject a ds_config now that DeepSpeed would reject after loading the base. Not collective.

    Args:
        path: the file that it comes from, for messages.
    Raises:
        ConfigError: if DeepSpeed's own class rejects it, or an operator that it needs cannot run
            on this machine.
    """
    # Without a process group DeepSpeed counts one process, and train_batch_size would not fit.
    alone = {k: v for k, v in copy.deepcopy(ds_config).items() if k != "train_batch_size"}
    try:
        section = DeepSpeedConfig(alone).zero_config
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: DeepSpeed {VERSION} rejects it: {found}.") from error
    except (DeepSpeedConfigError, AssertionError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: DeepSpeed {VERSION} rejects it: {error}") from error
    if ds_config.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f"--dtype fp16: DeepSpeed finds no fp16 arithmetic on this {accelerator.name()}. Use "
            "bf16, which is more precise where it matters, or fp32."
        )
    if ds_config.get("bf16", {}).get("enabled") and not get_accelerator().is_bf16_supported():
        raise ConfigError(
            f"--dtype bf16: DeepSpeed finds no bf16 arithmetic on this {accelerator.name()}. Use "
            "--dtype fp16, whose losses are scaled since its range is smaller, or fp32."
        )
    if section.zero_quantized_weights and accelerator.name() == "cpu":
        raise ConfigError(
            f"{path}: zero_quantized_weights is true, but DeepSpeed quantizes on GPUs only. Remove "
            "it, or use ds_configs/zero3.json."
        )
    if section.zero_quantized_weights:
        _check_compiler("QuantizerBuilder", f"{path}: zero_quantized_weights is true", "zero3.json")
    offload = section.offload_param
    if offload is not None and offload.device == "nvme":
        builder = get_accelerator().create_op_builder("AsyncIOBuilder")
        if builder is None or not builder.is_compatible():
            raise ConfigError(
                f"{path}: offload_param.device is nvme, for which DeepSpeed compiles async_io, but "
                "libaio is missing. Install it (Debian and Ubuntu: libaio-dev), or point CFLAGS "
                "and LDFLAGS to it; `ds_report` shows what DeepSpeed finds. Or use "
                "ds_configs/zero3_offload.json, which needs no libaio."
            )
        what = f"{path}: offload_param.device is nvme"
        _check_compiler("AsyncIOBuilder", what, "zero3_offload.json")


def _check_compiler(builder_name: str, what: str, instead: str) -> None:
    """Reject an operator that DeepSpeed compiles when it is first used, if it cannot.

    Its own check passes: builders look for nvcc only when they compile (``nvcc_args``).
    """
    if torch.version.cuda is None or accelerator.name() != "cuda":
        return  # ROCm brings its compiler
    builder = get_accelerator().create_op_builder(builder_name)
    is_built = builder is not None and installed_ops.get(builder.name, False)
    if not is_built and (CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").is_file()):
        raise ConfigError(
            f"{what}, for which DeepSpeed compiles an operator, but there is no nvcc"
            f"{f' in {CUDA_HOME}' if CUDA_HOME else ''}. Install the CUDA toolkit "
            f"{torch.version.cuda} and set CUDA_HOME to it, or use ds_configs/{instead}, which "
            "compiles nothing."
        )

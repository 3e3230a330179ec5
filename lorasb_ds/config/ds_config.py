"""The DeepSpeed configuration of a run: one place where "auto" becomes a value. Torch-free.

A shipped configuration says "auto" and the option fills it; a number in the file wins over an
option that was not given; an option that was given and differs is an error.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorasb_ds.config.deepspeed_options import DEFAULT_DS_CONFIG, SINGLE_PROCESS_DS_CONFIG
from lorasb_ds.config.paths import read_json
from lorasb_ds.config.run_config import RunConfig, problems_of
from lorasb_ds.config.sequence_parallel import group_problems, own_group_problems
from lorasb_ds.errors import ConfigError, option_name

# DeepSpeed's keys and our fields. A missing key is filled like "auto": DeepSpeed's own defaults
# differ (gradient_clipping is 1.0 when it is not set).
FIELD_OF_KEY = {
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_batch_size": "train_batch_size",
    "gradient_clipping": "max_grad_norm",
}

MICS = (
    "DeepSpeed has removed MiCS. zero_hpz_partition_size keeps the gathers of a frozen base within "
    "a host, too: see ds_configs/zero3_hpz.json."
)
# Keys of zero_optimization that are refused, and why.
REFUSED = {
    "mics_shard_size": MICS,
    "mics_hierarchical_params_gather": MICS,
    "zero_quantized_nontrainable_weights": "DeepSpeed quantizes the memory of frozen parameters "
    "before it is filled, and A and B would be cut to whole numbers. Remove it; --load-in-4bit and "
    "--load-in-8bit store the base quantized.",
    "zero_quantized_gradients": "R's gradients are small: quantizing them saves nothing and costs "
    "precision. Remove it.",
}


def resolve_ds_config(
    config: RunConfig, world_size: int, local_size: int | None = None, here: bool = True
) -> tuple[dict[str, Any], RunConfig]:
    """Read ``config.ds_config`` and make it and the options agree.

    Args:
        config: the run; what is in its ``model_fields_set`` was asked for.
        world_size: number of processes.
        local_size: number of processes on each host; all of them by default.
        here: whether they are on this host, whose NVMe drive is then looked at.
    Returns:
        The configuration for ``deepspeed.initialize``, without any "auto" (but for that drive's
        folder, unless ``here``); and the run with the file's numbers in place of its defaults.
    Raises:
        ConfigError: with one paragraph for every problem.
    """
    is_default = config.ds_config == DEFAULT_DS_CONFIG
    if world_size == 1 and is_default and "ds_config" not in config.model_fields_set:
        # Stage 3 has nothing to shard on one process, and spends half of its time on trying.
        config = config.model_copy(update={"ds_config": SINGLE_PROCESS_DS_CONFIG})
    raw = read_json(config.ds_config, "--ds-config")
    problems: list[str] = []
    updates: dict[str, Any] = {}

    def agree(key: str, value: object, field: str) -> None:
        """Compare one number of the file with the option of the same meaning."""
        if value is None or value == "auto":
            return
        wanted = getattr(config, field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            problems.append(
                f"{config.ds_config}: {key} is {value!r}; it must be a number or 'auto'."
            )
        elif field in config.model_fields_set and value != wanted:
            problems.append(
                f"{option_name(field)} {wanted} differs from {key} {value} in {config.ds_config}. "
                f'Leave the option out, or set {key} to "auto" there.'
            )
        else:
            updates[field] = value

    for key, field in FIELD_OF_KEY.items():
        agree(key, raw.get(key), field)
    for section in ("optimizer", "scheduler"):
        problems += _check_section(section, raw, config.ds_config, agree)
    problems += _check_precision(raw, config, updates)
    zero_section = _fill_zero(_section(raw, "zero_optimization"), local_size or world_size, here)
    problems += _check_zero(zero_section, config, world_size, here)
    problems += group_problems(config.sequence_parallel, world_size)
    problems += own_group_problems(raw, config.ds_config)
    if problems:
        raise ConfigError(*problems)
    try:
        # The file's numbers must be valid options, too.
        resolved_config = RunConfig(**{**dict(config), **updates})
    except ValidationError as error:
        raise ConfigError(*(f"{config.ds_config}: {p}" for p in problems_of(error))) from None
    fixed = {*config.model_fields_set, *updates}
    resolved_config = _settle_batch(resolved_config, fixed, world_size)

    resolved = {k: v for k, v in raw.items() if k not in ("optimizer", "scheduler", "fp16")}
    for key, field in FIELD_OF_KEY.items():
        resolved[key] = getattr(resolved_config, field)
    # DeepSpeed's is always the product; a step may hold fewer rows.
    # To it, ranks that share rows are like any others (``sequence_parallel.py``).
    shares = resolved_config.sequence_parallel
    resolved["train_batch_size"] = batch_capacity(resolved_config, world_size) * shares
    # Without it, ranks of stages 1 and 2 may disagree about a gradient that is not finite.
    agreeing = {"enabled": resolved_config.dtype == "bf16", "check_grad_overflow": True}
    resolved["bf16"] = {**_section(raw, "bf16"), **agreeing}
    if resolved_config.dtype == "fp16":
        resolved["fp16"] = {**_section(raw, "fp16"), "enabled": True}
    # Else DeepSpeed waits for the device before and after every micro-batch, for a speed that it
    # logs where ``steps_per_print`` is set.
    resolved.setdefault("timers", {"throughput": {"enabled": False}})
    if resolved_config.optimizer != "adamw":
        # DeepSpeed has tested Adam only. Masters are flat, which is right for optimizers that go by
        # elements; matrix_optimizer.py gives matrices to the others.
        resolved["zero_allow_untested_optimizer"] = True
    resolved["zero_optimization"] = zero_section
    # What is still "auto" has no option and gets DeepSpeed's default.
    return _without_auto(resolved), resolved_config


def batch_capacity(config: RunConfig, world_size: int) -> int:
    """Return how many rows an optimizer step has room for; ``train_batch_size`` may be fewer."""
    ranks_with_own_rows = world_size // config.sequence_parallel
    return config.micro_batch_size * config.gradient_accumulation_steps * ranks_with_own_rows


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def _check_section(name: str, raw: dict[str, Any], path: str, agree: Any) -> list[str]:
    """Return problems of a section, which may ask for nothing but our AdamW and schedule."""
    section = _section(raw, name)
    params = dict(_section(section, "params"))
    if name == "optimizer":
        agree("optimizer.params.lr", params.pop("lr", None), "lr")
        if section and section.get("type") not in ("Adam", "AdamW"):
            return [
                f"{path}: optimizer.type is {section.get('type')!r}; R is trained by AdamW. Remove "
                "the section and use --lr."
            ]
    fixed = sorted(k for k, v in params.items() if v != "auto")
    if fixed:
        return [
            f"{path}: {name}.params sets {', '.join(fixed)}, which would not be used. Set them to "
            '"auto" or remove the section, and use --lr, --lr-scheduler and --warmup-ratio.'
        ]
    return []


def _check_precision(raw: dict[str, Any], config: RunConfig, updates: dict[str, Any]) -> list[str]:
    enabled = {name: _section(raw, name).get("enabled", "auto") for name in ("bf16", "fp16")}
    if enabled["bf16"] is True and enabled["fp16"] is True:
        return [f"{config.ds_config}: bf16 and fp16 are both enabled. Enable one of them."]
    dtype = next((name for name, value in enabled.items() if value is True), None)
    if dtype is None and enabled["bf16"] is False and enabled["fp16"] != "auto":
        dtype = "fp32"
    elif dtype is None and enabled["bf16"] is False:
        dtype = "fp16" if config.dtype == "fp16" else "fp32"
    if dtype is not None:
        if "dtype" in config.model_fields_set and dtype != config.dtype:
            return [
                f"--dtype {config.dtype} differs from {config.ds_config}, where bf16.enabled is "
                f"{str(enabled['bf16']).lower()} and fp16.enabled {str(enabled['fp16']).lower()}. "
                'Leave the option out, or set them to "auto" there.'
            ]
        updates["dtype"] = dtype
    if config.load_in_4bit and config.load_in_8bit:
        return ["--load-in-4bit and --load-in-8bit exclude each other. Give one of them."]
    quantized = config.load_in_4bit or config.load_in_8bit
    if quantized and updates.get("dtype", config.dtype) != "bf16":
        return [
            f"--load-in-{4 if config.load_in_4bit else 8}bit computes in bf16. Leave out --dtype "
            f"{updates.get('dtype', config.dtype)} (or set bf16 to enabled)."
        ]
    return []


def _fill_zero(section: dict[str, Any], local_size: int, here: bool) -> dict[str, Any]:
    """Fill what depends on the host: its number of processes, and its NVMe drive."""
    section = dict(section)
    if section.get("zero_hpz_partition_size") == "auto":
        section["zero_hpz_partition_size"] = local_size
    offload = _section(section, "offload_param")
    if here and offload.get("nvme_path") == "auto":
        section["offload_param"] = {**offload, "nvme_path": os.environ.get("TMPDIR")}
    return section


def _check_zero(
    section: dict[str, Any], config: RunConfig, world_size: int, here: bool
) -> list[str]:
    path = config.ds_config
    problems = [
        f"{path}: zero_optimization.{key} is set. {reason}"
        for key, reason in REFUSED.items()
        if section.get(key, False) is not False
    ]
    if section.get("compute_grad_norm") is False:
        problems.append(
            f"{path}: zero_optimization.compute_grad_norm is false, but the norm shows whether a "
            "gradient is finite. Remove it."
        )
    stage = section.get("stage", 0)
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        problems.append(
            f"{path}: zero_optimization.stage is {stage!r}; it must be 1, 2 or 3. (Without ZeRO "
            "DeepSpeed keeps no fp32 master of R that can be set. Stage 1 replicates the base in "
            "the same way.)"
        )
    if _section(section, "offload_optimizer").get("device", "none") != "none":
        problems.append(
            f"{path}: offload_optimizer is set. The optimizer of LoRA-SB is tiny and "
            "DeepSpeed offloads no torch optimizer; remove it (offload_param may stay)."
        )
    if (config.load_in_4bit or config.load_in_8bit) and section.get("zero_quantized_weights"):
        problems.append(
            f"{path}: zero_quantized_weights is true, but the parameters of a quantized base are "
            "bytes, not numbers: they would be ruined. Remove it, or leave --load-in-4bit "
            "(or --load-in-8bit) out."
        )
    on_nvme = _section(section, "offload_param").get("device") == "nvme"
    if on_nvme:
        folder = _section(section, "offload_param").get("nvme_path")
        problems += _check_nvme_path(folder, path, here)
    group = section.get("zero_hpz_partition_size", 1)
    if isinstance(group, bool) or not isinstance(group, int) or group < 1 or world_size % group:
        problems.append(
            f"{path}: zero_hpz_partition_size is {group!r}; it must divide the number of "
            f'processes, {world_size}. Set it to those of one host, or to "auto".'
        )
    elif group > 1 and on_nvme:
        problems.append(
            f"{path}: zero_hpz_partition_size is {group}, but DeepSpeed cannot keep a host's "
            "second copy of the base on NVMe. Remove it, or offload_param."
        )
    return problems


def _check_nvme_path(folder: object, path: str, here: bool) -> list[str]:
    if not isinstance(folder, str):
        return [
            f"{path}: offload_param.nvme_path is not set. Name a folder on an NVMe drive of each "
            'host; "auto" takes the one that the environment variable TMPDIR names.'
        ]
    if here and not (Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return [
            f"{path}: offload_param.nvme_path is {folder}, which is not a folder that can be "
            "written to. Create it on an NVMe drive of each host, or name another one."
        ]
    return []


def _settle_batch(config: RunConfig, fixed: set[str], world_size: int) -> RunConfig:
    """Compute the accumulation from the global batch, or the global batch from the accumulation.

    Args:
        fixed: fields that an option or the file has set.
    """
    shares = config.sequence_parallel
    total, per_round = config.train_batch_size, config.micro_batch_size * world_size // shares
    if total is None:
        return config.model_copy(update={"train_batch_size": batch_capacity(config, world_size)})
    if "gradient_accumulation_steps" not in fixed:
        rounds = math.ceil(total / per_round)
        return config.model_copy(update={"gradient_accumulation_steps": rounds})
    if total > batch_capacity(config, world_size):
        raise ConfigError(
            f"A global batch of {total} rows (--train-batch-size, or train_batch_size in "
            f"{config.ds_config}) does not fit into --micro-batch-size {config.micro_batch_size} x "
            f"--gradient-accumulation-steps {config.gradient_accumulation_steps} x {world_size} "
            f"processes{f' / --sequence-parallel {shares}' if shares > 1 else ''} = "
            f"{batch_capacity(config, world_size)}. Leave "
            "--gradient-accumulation-steps out, or change one of them."
        )
    return config


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_auto(v) for k, v in value.items() if v != "auto"}
    return value

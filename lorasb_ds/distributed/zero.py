"""All that this project asks of DeepSpeed but for devices (``accelerator``)."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from pydantic import ValidationError

from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.collectives import broadcast, rank_and_size
from lorasb_ds.distributed.masters import flat_masters, parts_of_masters
from lorasb_ds.distributed.matrix_optimizer import MatrixOptimizer
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.host_memory import ranks_of_host

VERSION = deepspeed.__version__


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def init_process_group() -> None:
    """Join the job that the launcher's environment describes. Collective.

    Collectives time out after DEEPSPEED_TIMEOUT minutes (DeepSpeed's variable; 10).

    On a CPU the ranks of a host share its cores evenly, unless OMP_NUM_THREADS says otherwise:
    torch would give every rank all of them.
    """
    if accelerator.name() == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // max(1, ranks_of_host())))
    else:
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    deepspeed.init_distributed()


def new_group() -> dist.ProcessGroup:
    """A group of all ranks beside the engine's, with the same time limit. Collective."""
    return dist.new_group(timeout=default_pg_timeout)


def close_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def check_ds_config(ds_config: dict[str, Any], path: str) -> None:
    """Refuse what DeepSpeed would refuse when the base has been loaded. Not collective.

    Args:
        path: the file it comes from, for messages.
    Raises:
        ConfigError: if DeepSpeed's own class does not take it, or an operator that it needs cannot
            run here.
    """
    # Without a process group DeepSpeed counts one process, and train_batch_size would not fit.
    alone = {k: v for k, v in copy.deepcopy(ds_config).items() if k != "train_batch_size"}
    try:
        section = DeepSpeedConfig(alone).zero_config
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: DeepSpeed {VERSION} does not take it: {found}.") from error
    except (DeepSpeedConfigError, AssertionError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: DeepSpeed {VERSION} does not take it: {error}") from error
    if ds_config.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f"--dtype fp16: DeepSpeed finds no fp16 arithmetic on this {accelerator.name()}. Use "
            "bf16, which is more precise where it matters, or fp32."
        )
    if section.zero_quantized_weights and accelerator.name() == "cpu":
        raise ConfigError(
            f"{path}: zero_quantized_weights is true, and DeepSpeed quantizes on GPUs only. Remove "
            "it, or take ds_configs/zero3.json."
        )
    offload = section.offload_param
    if offload is not None and offload.device == "nvme":
        builder = get_accelerator().create_op_builder("AsyncIOBuilder")
        if builder is None or not builder.is_compatible():
            raise ConfigError(
                f"{path}: offload_param.device is nvme, for which DeepSpeed compiles async_io, and "
                "libaio is missing. Install it (Debian and Ubuntu: libaio-dev), or point CFLAGS "
                "and LDFLAGS to it; `ds_report` shows what DeepSpeed finds. The other way is "
                "ds_configs/zero3_offload.json."
            )


class _Init(deepspeed.zero.Init):
    """``zero.Init`` for parameters of which every rank holds the same value already."""

    def _zero_init_param(self, param: Any) -> None:
        # DeepSpeed's own broadcasts rank 0's value in between.
        self._convert_to_deepspeed_param(param)
        param.partition()


def sharder(ds_config: dict[str, Any]) -> Callable[[torch.nn.Parameter], None] | None:
    """What turns a parameter, whole and equal on every rank, into its ZeRO-3 shard. Collective.

    DeepSpeed does it: what a ds_config says of offload, hpZ or quantization holds. None below
    stage 3.
    """
    if ds_config["zero_optimization"]["stage"] != 3:
        return None
    init = _Init(module=torch.nn.Module(), config_dict_or_path=ds_config)
    return lambda parameter: init._convert_to_zero_parameters([parameter])


def make_engine(
    model: torch.nn.Module,
    trainable: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: Any,
    ds_config: dict[str, Any],
) -> Any:
    """The one engine of a run. Collective. Only one may ever be made on the same parameters."""
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trainable,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        config=ds_config,
    )
    if isinstance(optimizer, MatrixOptimizer):
        optimizer.place(parts_of_masters(engine))
    return engine


def make_inference_engine(model: torch.nn.Module, ds_config: Mapping[str, Any]) -> Any:
    """ZeRO-3's gathers around a model that is not trained. Collective."""
    section = {k: v for k, v in ds_config["zero_optimization"].items() if k != "offload_optimizer"}
    inference = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": ds_config["bf16"]["enabled"]},
        "fp16": {"enabled": "fp16" in ds_config},
        "zero_optimization": section,
    }
    engine, *_ = deepspeed.initialize(model=model, config=inference)
    return engine


def gather_together(module: torch.nn.Module, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Let ZeRO-3 gather these with the module's own, whose forward uses them. Not collective."""
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            deepspeed.zero.register_external_parameter(module, parameter)


def release(engine: Any) -> None:
    """Free every gathered parameter. Collective.

    After a backward pass that ended above the model's first layer, ZeRO-3 still waits for that
    layer's input gradient and counts its parameters as in use; they could not be filled.
    """
    engine.empty_partition_cache()


@contextmanager
def gathered(params: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Whole values of ZeRO-3 shards for reading; does nothing to other parameters. Collective."""
    with deepspeed.zero.GatheredParameters(list(params), modifier_rank=None):
        yield


def fill(param: torch.nn.Parameter, value: torch.Tensor | None) -> None:
    """Set a parameter, sharded or not, from rank 0's ``value`` (others may give None). Collective
    if a job is running.
    """
    if hasattr(param, "ds_id"):
        with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
            if rank() == 0:
                param.data.copy_(_given(value))
        return
    if rank_and_size(None)[0] == 0:
        param.data.copy_(_given(value))
    broadcast(param.data, 0, None)


def _given(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None, "rank 0 must give the value"
    return value


def fill_trainable(param: Any, value: torch.Tensor) -> None:
    """Set a trainable parameter and the optimizer's fp32 master of it. Collective.

    Without the second, the first optimizer step would bring the old value back.

    Args:
        value: whole and equal on every rank.
    """
    fill(param, value)
    value = value.to(accelerator.device(), torch.float32)
    if hasattr(param, "ds_id"):
        safe_set_local_fp32_param(param, _local_part(param, value))
    else:
        safe_set_full_fp32_param(param, value)


def fill_trainable_from(param: Any, value: torch.Tensor | None) -> None:
    """``fill_trainable`` from rank 0's ``value`` (others may give None). Collective."""
    whole = torch.empty(whole_shape(param), device=accelerator.device())
    if rank() == 0:
        whole.copy_(_given(value))
    fill_trainable(param, broadcast(whole, 0, None))


def whole_shape(param: Any) -> torch.Size:
    """Of a parameter that may be sharded: ZeRO-3 keeps it in ds_shape."""
    return torch.Size(getattr(param, "ds_shape", param.shape))


def _local_part(param: Any, value: torch.Tensor) -> torch.Tensor:
    """This rank's flat part of a value as ZeRO-3 shards the parameter.

    DeepSpeed's own functions for whole values (0.19.8) raise where the elements are no multiple of
    the world size and the last rank's part is padded.
    """
    length = param.ds_tensor.ds_numel
    padded = F.pad(value.flatten(), (0, length * world_size() - value.numel()))
    return padded[length * rank() : length * (rank() + 1)]


def full_fp32(param: torch.nn.Parameter) -> torch.Tensor:
    """The whole fp32 master of a trainable parameter, on every rank. Collective."""
    value = safe_get_full_fp32_param(param)
    assert value is not None, "not a parameter that this engine trains"
    return value.detach().float()


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The one that the engine was given."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    return optimizer


def optimizer_state(engine: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """A flat master and the torch optimizer's state of it: {} before the first step.

    All flat masters have states of the same keys.
    """
    flat = flat_masters(engine)[0]
    return flat, engine.optimizer.optimizer.state.get(flat, {})


def set_optimizer_state(engine: Any, states: Sequence[dict[str, Any]]) -> None:
    """Give every flat master a state, of which the parameters' parts can then be set."""
    for flat, state in zip(flat_masters(engine), states, strict=True):
        engine.optimizer.optimizer.state[flat] = state
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # Stages 1 and 2 link parameters to their part of a state when it is there; DeepSpeed does
        # so in its first step, and has no public function for it.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def full_optimizer_state(param: torch.nn.Parameter, key: str) -> torch.Tensor:
    """A parameter's whole state such as ``exp_avg``, on every rank. Collective."""
    value = safe_get_full_optimizer_state(param, key)
    assert value is not None, "not a parameter that this engine trains"
    return value.detach().float()


def fill_optimizer_state(param: Any, key: str, value: torch.Tensor) -> None:
    """Set it from a whole value that is equal on every rank. Collective."""
    value = value.to(accelerator.device(), torch.float32)
    if hasattr(param, "ds_id"):
        safe_set_local_optimizer_state(param, _local_part(param, value), key)
    else:
        safe_set_full_optimizer_state(param, value, key)


def squared_norm(engine: Any) -> torch.Tensor:
    """Of this rank's part of all masters, fp64; the sum over ranks is that of all R."""
    norms = [flat.detach().double().square().sum() for flat in flat_masters(engine)]
    return torch.stack(norms).sum().to(accelerator.device())


def loss_scale_state(engine: Any) -> dict[str, float]:
    """Of fp16's dynamic loss scale; empty for other dtypes."""
    if not engine.fp16_enabled():
        return {}
    return {
        name: value
        for name, value in vars(engine.optimizer.loss_scaler).items()
        if name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    }


def set_loss_scale_state(engine: Any, state: Mapping[str, float]) -> None:
    vars(engine.optimizer.loss_scaler).update(state)

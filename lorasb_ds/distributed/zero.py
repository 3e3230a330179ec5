"""DeepSpeed's process group, its engines, and parameters that ZeRO-3 may have sharded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from deepspeed.utils import (
    groups,
    safe_get_full_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)

from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.collectives import broadcast, rank_and_size
from lorasb_ds.distributed.masters import parts_of_masters
from lorasb_ds.distributed.matrix_optimizer import MatrixOptimizer
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.host_memory import ranks_of_host

VERSION = deepspeed.__version__


def rank() -> int:
    """Return this process's rank; before it has joined, the one that the launcher gave it."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size()


def init_process_group() -> None:
    """Join the job that the launcher's environment describes. Collective.

    Collectives time out after DEEPSPEED_TIMEOUT minutes (DeepSpeed's variable, 10 by default).

    On CPUs the ranks of a host share its cores evenly unless OMP_NUM_THREADS is set: torch would
    use all cores in every rank.

    Raises:
        ConfigError: if two ranks were given one accelerator; on all ranks that have one.
    """
    if accelerator.name() == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // max(1, ranks_of_host())))
    else:
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    deepspeed.init_distributed()
    if accelerator.name() != "cpu":
        # By the store: a collective would end with NCCL's "Duplicate GPU detected", or wait.
        store = dist.distributed_c10d._get_default_store()
        check_own_device(store, rank(), world_size(), accelerator.device_id())


def check_own_device(store: dist.Store, rank: int, world_size: int, device: str) -> None:
    """Check that no other rank has this rank's device. Collective.

    Args:
        device: from ``accelerator.device_id``.
    Raises:
        ConfigError: naming the ranks.
    """
    names = [f"lorasb device of {other}" for other in range(world_size)]
    store.set(names[rank], device)
    devices = [found.decode() for found in store.multi_get(names)]
    same = [str(other) for other, found in enumerate(devices) if found == device]
    if len(same) > 1:
        raise ConfigError(
            f"Ranks {', '.join(same)} were given the same {device}. Give each rank of a host "
            "another LOCAL_RANK, from 0 on, and let CUDA_VISIBLE_DEVICES show all of the host's "
            "GPUs to all of them (Slurm: --gpus-per-node, not --gpus-per-task)."
        )


def new_group() -> dist.ProcessGroup:
    """Make another group of all ranks, with the engine's time limit. Collective."""
    return dist.new_group(timeout=default_pg_timeout)


def close_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class _Init(deepspeed.zero.Init):
    """``zero.Init`` for parameters whose whole value is already the same on every rank."""

    def _zero_init_param(self, param: Any) -> None:
        # DeepSpeed's own method broadcasts rank 0's value in between.
        self._convert_to_deepspeed_param(param)
        param.partition()


def sharder(ds_config: dict[str, Any]) -> Callable[[torch.nn.Parameter], None] | None:
    """Return a function that replaces a parameter by its ZeRO-3 shard; None below stage 3.

    Collective, as is the function, which takes a parameter that is whole and equal on every rank.
    DeepSpeed does the work, so that the ds_config's offload, hpZ and quantization apply.
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
    """Make the run's engine. Collective. Only one may ever be made for the same parameters."""
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trainable,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        config=ds_config,
    )
    if isinstance(optimizer, MatrixOptimizer):
        optimizer.set_parts(parts_of_masters(engine))
    return engine


def destroy(engine: Any) -> None:
    """Free the memory of an engine and its model, which nobody may use any more. Not collective.

    DeepSpeed would keep it for as long as the process lives: by hooks on gradients, which Python's
    collector does not see; and ZeRO-3 (0.19.8) keeps modules in a list and a cache of its own.
    """
    engine.destroy()
    for tensor in (*engine.module.parameters(), *engine.module.buffers()):
        for held in (tensor, getattr(tensor, "ds_tensor", None)):
            if held is not None:
                held.data = held.data.new_empty(0)
    # hpZ's, which DeepSpeed makes once and then refuses to make for another run.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def make_inference_engine(model: torch.nn.Module, ds_config: Mapping[str, Any]) -> Any:
    """Make an engine that gathers ZeRO-3's shards of a model and trains nothing. Collective."""
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
    """Have ZeRO-3 gather these along with the module's own parameters. Not collective.

    Needed where the module's forward uses parameters of other modules.
    """
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            deepspeed.zero.register_external_parameter(module, parameter)


def release(engine: Any) -> None:
    """Free every gathered parameter. Collective.

    After a backward pass that ended above the model's first layer, ZeRO-3 still waits for that
    layer's input gradient and counts its parameters as in use, so that they cannot be filled.
    """
    engine.empty_partition_cache()


@contextmanager
def gathered(params: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Gather ZeRO-3 shards for reading; do nothing to other parameters. Collective."""
    with deepspeed.zero.GatheredParameters(list(params), modifier_rank=None):
        yield


def fill(param: torch.nn.Parameter, value: torch.Tensor | None, at: Any = ...) -> None:
    """Set a parameter, sharded or not, from rank 0's ``value``; other ranks may pass None.

    Collective if a process group is initialized.

    Args:
        at: index of the part to set. [default: the whole parameter]
    """
    if hasattr(param, "ds_id"):
        with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
            if rank() == 0:
                param.data[at].copy_(_required(value))
        return
    if rank_and_size(None)[0] == 0:
        param.data[at].copy_(_required(value))
    broadcast(param.data, 0, None)


def _required(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None, "rank 0 must give the value"
    return value


def fill_trainable(param: Any, value: torch.Tensor) -> None:
    """Set a trainable parameter and its fp32 master in the optimizer. Collective.

    Without the master, the first optimizer step would restore the old value.

    Args:
        value: whole and equal on every rank.
    """
    fill(param, value)
    value = value.to(accelerator.device(), torch.float32)
    if hasattr(param, "ds_id"):
        safe_set_local_fp32_param(param, local_part(param, value))
    else:
        safe_set_full_fp32_param(param, value)


def fill_trainable_from(param: Any, value: torch.Tensor | None) -> None:
    """``fill_trainable`` from rank 0's ``value``; other ranks may pass None. Collective."""
    whole = torch.empty(whole_shape(param), device=accelerator.device())
    if rank() == 0:
        whole.copy_(_required(value))
    fill_trainable(param, broadcast(whole, 0, None))


def whole_shape(param: Any) -> torch.Size:
    """Return the whole shape of a parameter that may be sharded: ZeRO-3 keeps it in ds_shape."""
    return torch.Size(getattr(param, "ds_shape", param.shape))


def local_part(param: Any, value: torch.Tensor) -> torch.Tensor:
    """Return this rank's flat part of a whole value, cut as ZeRO-3 shards the parameter.

    DeepSpeed's own functions for whole values (0.19.8) raise where the number of elements is not a
    multiple of the world size and the last rank's part is padded.
    """
    length = param.ds_tensor.ds_numel
    padded = F.pad(value.flatten(), (0, length * world_size() - value.numel()))
    return padded[length * rank() : length * (rank() + 1)]


def full_fp32(param: torch.nn.Parameter) -> torch.Tensor:
    """Return the whole fp32 master of a trainable parameter, on every rank. Collective."""
    value = safe_get_full_fp32_param(param)
    assert value is not None, "not a parameter that this engine trains"
    return value.detach().float()

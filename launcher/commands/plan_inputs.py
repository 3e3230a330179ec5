"""The options of `lorasb plan` as a model's shape, a cluster and a workload. Torch-free."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.hosts.hostfile import equal_slots, read_hostfile
from launcher.jobs.ranks import worker_command
from lorasb_ds.config.adapter_options import default_expert_r, wide_enough
from lorasb_ds.config.paths import read_json
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.checkpoint_files import model_path
from lorasb_ds.planner.config_shape import shape_from_config
from lorasb_ds.planner.families import FAMILIES
from lorasb_ds.planner.known_models import BUILT_IN
from lorasb_ds.planner.model_shape import ModelShape, shape_from_json
from lorasb_ds.planner.strategies import Cluster, cpu_cluster
from lorasb_ds.planner.workload import Workload
from lorasb_ds.system.host_memory import available_bytes
from lorasb_ds.system.units import GIB


def find_shape(model: str, trust_remote_code: bool = False) -> ModelShape:
    """Return the shape of a built-in name, of a folder with a config.json, or of a cached hub name.

    Model types that are not known here are made by transformers, in a process with torch.

    Raises:
        ConfigError: if the model is none of these, or transformers cannot make it.
    """
    if model in BUILT_IN:
        return shape_from_config(model, BUILT_IN[model])
    folder = _folder(model)
    config = read_json(str(folder / "config.json"), "--model")
    if config.get("model_type") in FAMILIES:
        return shape_from_config(model, config)
    arguments = [str(folder), *(["--trust-remote-code"] if trust_remote_code else [])]
    done = subprocess.run(worker_command("shape", arguments), capture_output=True, text=True)
    if done.returncode != 0:
        *_, crash = ["", *done.stderr.splitlines()]
        raise ConfigError(f"--model {model} cannot be planned: {crash}")
    *_, line = done.stdout.splitlines()
    if line.startswith('{"error"'):
        raise ConfigError(json.loads(line)["error"])
    return replace(shape_from_json(line), name=model)


def _folder(model: str) -> Path:
    """Return the folder of a model's config.json; hub names are looked up in the cache.

    Raises:
        ConfigError: if there is none.
    """
    path = Path(model_path(model))
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise ConfigError(
            f"--model {model} is no folder with a config.json, no hub name in the cache (`lorasb "
            f"plan` downloads nothing), and none of the built-in shapes: {', '.join(BUILT_IN)}."
        )
    return Path(cached).parent


def find_cluster(
    nodes: int,
    gpus_per_node: int,
    gpu_memory_gib: float,
    host_memory_gib: float | None,
    hostfile: str | None,
    num_procs: int | None,
) -> Cluster:
    """Return the cluster of the options; a hostfile sets the numbers of hosts and of GPUs in each.

    Raises:
        ConfigError: if the hostfile's hosts have different numbers of slots.
    """
    if num_procs is not None:
        memory = host_memory_gib * GIB if host_memory_gib else available_bytes()
        return cpu_cluster(num_procs, int(memory))
    if hostfile is not None:
        hosts = read_hostfile(hostfile)
        nodes, gpus_per_node = len(hosts), equal_slots(hosts, hostfile)
    host = None if host_memory_gib is None else int(host_memory_gib * GIB)
    return Cluster(nodes, gpus_per_node, int(gpu_memory_gib * GIB), host)


def find_workload(shape: ModelShape, options: Mapping[str, Any]) -> Workload:
    """Return the largest workload of the options: rows as long as allowed, labels everywhere.

    Raises:
        ConfigError: if r exceeds the shortest side of all layers, or of experts.
    """
    r, budget = options["r"], options["init_memory_gib"]
    expert_r = options["expert_r"]
    if shape.experts and expert_r is None:
        expert_r = default_expert_r(r, shape.experts_per_token)
    targets = wide_enough(shape.layers, r)
    if not targets:
        widest = max(min(sides) for sides in shape.layers.values())
        raise ConfigError(f"--r {r} exceeds {widest}, the most that a layer allows. Lower --r.")
    smallest = min((min(sides[1:]) for sides in shape.experts.values()), default=0)
    if expert_r and expert_r > smallest:
        raise ConfigError(
            f"--expert-r {expert_r} exceeds {smallest}, the shortest side of an expert. Lower it; "
            "0 leaves experts frozen."
            if shape.experts
            else f"--expert-r {expert_r}: {shape.name} has no experts that could get an adapter. "
            "Leave it out."
        )
    return Workload(
        targets=targets,
        r=r,
        max_length=options["max_length"],
        num_labels=options["max_length"] - 1,
        micro_batch_size=options["micro_batch_size"],
        gradient_checkpointing=options["gradient_checkpointing"],
        init_samples=options["init_samples"],
        init_micro_batch_size=options["init_micro_batch_size"],
        sequence_parallel=options["sequence_parallel"],
        init_memory_bytes=None if budget is None else int(budget * GIB),
        expert_targets=shape.experts if expert_r else {},
        expert_r=expert_r or 0,
    )

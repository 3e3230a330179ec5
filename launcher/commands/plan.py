"""`lorasb plan`: its options as cluster, shape and workload; its plans as text. Torch-free."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launcher.hosts.hostfile import read_hostfile
from launcher.jobs.ranks import worker_command
from launcher.text import columns
from lorasb_ds.config.adapter_options import default_expert_r
from lorasb_ds.config.paths import read_json
from lorasb_ds.errors import ConfigError, option_name
from lorasb_ds.models.checkpoint_files import model_path
from lorasb_ds.planner.config_shape import shape_from_config
from lorasb_ds.planner.families import FAMILIES
from lorasb_ds.planner.known_models import BUILT_IN
from lorasb_ds.planner.model_shape import ModelShape, shape_from_json
from lorasb_ds.planner.strategies import (
    Cluster,
    StrategyPlan,
    command,
    cpu_cluster,
    plan,
    recommended,
)
from lorasb_ds.planner.workload import Workload
from lorasb_ds.system.host_memory import available_bytes
from lorasb_ds.system.units import GIB

TABLE_MODELS = (
    *("llama-7b", "llama-13b", "qwen2.5-32b", "llama-3-70b", "llama-3-405b"),
    *("gpt-oss-20b", "qwen3-30b-a3b", "glm-4.5-air", "qwen3-235b-a22b", "deepseek-v3"),
)
TABLE_GPUS = (1, 2, 4, 8, 16, 32, 64, 128)


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
        slots = set(hosts.values())
        if len(slots) > 1:
            raise ConfigError(
                f"--hostfile {hostfile}: hosts have {', '.join(map(str, sorted(slots)))} slots. "
                "The plan is for equal hosts: give each the smallest of these numbers."
            )
        nodes, gpus_per_node = len(hosts), slots.pop()
    host = None if host_memory_gib is None else int(host_memory_gib * GIB)
    return Cluster(nodes, gpus_per_node, int(gpu_memory_gib * GIB), host)


def find_workload(shape: ModelShape, options: Mapping[str, Any]) -> Workload:
    """Return the largest workload of the options: rows as long as allowed, labels everywhere.

    Raises:
        ConfigError: if r exceeds the shortest side of a layer, or of experts.
    """
    r, budget = options["r"], options["init_memory_gib"]
    expert_r = options["expert_r"]
    if shape.experts and expert_r is None:
        expert_r = default_expert_r(r, shape.experts_per_token)
    # As select_targets takes them: gates with one output have no adapter.
    targets = {name: sides for name, sides in shape.layers.items() if min(sides) > 1}
    smallest = min(min(sides) for sides in targets.values())
    if r > smallest:
        raise ConfigError(f"--r {r} exceeds {smallest}, the shortest side of a layer. Lower --r.")
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
        init_memory_bytes=None if budget is None else int(budget * GIB),
        expert_targets=shape.experts if expert_r else {},
        expert_r=expert_r or 0,
    )


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the printed command needs beside the strategy's."""
    names = ("r", "expert_r", "max_length", "micro_batch_size", "init_samples", "init_memory_gib")
    given = {name: options[name] for name in names if options[name] is not None}
    return {option_name(name): f"{value:g}" for name, value in given.items()}


def render(
    shape: ModelShape, cluster: Cluster, plans: Sequence[StrategyPlan], command_line: str | None
) -> str:
    """Return a table of strategies, the parts of the recommended one, and its command."""
    ranks = f"{cluster.world_size} {'process(es)' if cluster.cpu else 'GPU(s)'}"
    lines = [
        f"{shape.name}: {shape.num_parameters / 1e9:.2f} billion parameters on {ranks} with "
        f"{cluster.memory_bytes / GIB:.1f} GiB each"
        + (f", {cluster.nodes} hosts" if cluster.nodes > 1 else ""),
        *describe_experts(shape),
        "",
        *columns(
            ("", "needs", "load", "init", "train", "headroom", "host", "sent", "fetched", "with"),
            [
                (
                    p.strategy.name,
                    _gib(p.needed_bytes),
                    *map(_gib, p.memory.phases(cluster.cpu).values()),
                    _gib(p.headroom_bytes) if p.fits else "no",
                    _gib(p.host_needed_bytes),
                    f"{p.step.bytes / GIB:.1f}",
                    f"{p.step.host_bytes / GIB:.1f}",
                    " ".join(p.added),
                )
                for p in plans
            ],
        ),
        "",
        "GiB of a rank; host: of the first host. In a step a rank receives what is sent by other "
        "ranks and fetched from its host.",
        "",
    ]
    best = recommended(plans)
    if best is None:
        return "\n".join(
            [
                *lines,
                "Nothing fits. More or larger GPUs, a smaller --micro-batch-size, "
                "--max-length or --r need less.",
            ]
        )
    lines += [f"Recommended: {best.strategy.name}", ""]
    lines += columns(("GiB of a rank", ""), [(k, _gib(v)) for k, v in parts(best).items()])
    lines += [
        "",
        f"The init: {len(best.memory.init.groups)} group(s) of layers, {best.init.bytes / GIB:.1f} "
        f"GiB received.",
    ]
    if command_line is not None:
        lines += ["", command_line]
    return "\n".join(lines)


def describe_experts(shape: ModelShape) -> list[str]:
    """Return a line on the experts of an MoE, and one on those that cannot be quantized."""
    lines = []
    share = shape.num_in_experts / shape.num_parameters
    if shape.experts:
        num_experts = max(block.num_experts for block in shape.blocks)
        lines.append(
            f"{share:.0%} of them in experts, of which a token goes to {shape.experts_per_token} "
            f"of {num_experts} in a block"
        )
    if shape.num_unreached:
        lines.append(
            f"{shape.num_unreached / shape.num_parameters:.0%} of them in experts that stay as "
            "they are under --load-in-4bit and get no adapter: transformers does not compute them "
            "by its registry of experts' functions"
        )
    return lines


def parts(plan: StrategyPlan) -> dict[str, int]:
    """Return the bytes of a rank by what they hold."""
    memory = plan.memory
    return {
        "base": memory.base,
        "quantization state": memory.quantization,
        "A, B, R": memory.adapters,
        "optimizer": memory.optimizer,
        "gathered": memory.gathered,
        "dequantized layer": memory.dequantized,
        "activations": memory.activations,
        "logits": memory.logits,
        "init: gradients": memory.init.shard_bytes,
        "init: hidden states": memory.init.boundary_bytes,
        "init: work on a layer": memory.init.workspace_bytes,
        "init: activations": memory.init_activations,
        "load: in flight": memory.load_in_flight,
    }


def as_json(
    shape: ModelShape, cluster: Cluster, plans: Sequence[StrategyPlan], command_line: str | None
) -> str:
    """Return the plans, the recommended strategy's name and its command as JSON."""
    best = recommended(plans)
    described = {
        "model": shape.name,
        "parameters": shape.num_parameters,
        "parameters_in_experts": shape.num_in_experts,
        "parameters_not_quantizable": shape.num_unreached,
        "cluster": asdict(cluster),
        "strategies": [
            {
                "name": p.strategy.name,
                "fits": p.fits,
                "options": list(p.options),
                "needed_bytes": p.needed_bytes,
                "headroom_bytes": p.headroom_bytes,
                "host_needed_bytes": p.host_needed_bytes,
                "peak_bytes": p.memory.phases(cluster.cpu),
                "bytes": parts(p),
                "init_groups": len(p.memory.init.groups),
                "step": asdict(p.step),
                "init": asdict(p.init),
            }
            for p in plans
        ],
        "recommended": best and best.strategy.name,
        "command": command_line,
    }
    return json.dumps(described, indent=1)


def command_line(
    plans: Sequence[StrategyPlan],
    cluster: Cluster,
    model: str,
    hostfile: str | None,
    options: Mapping[str, Any],
) -> str | None:
    """Return the recommended strategy's command; None if nothing fits."""
    best = recommended(plans)
    if best is None:
        return None
    words = command(best, cluster, model, hostfile, given_options(options))
    return shlex.join([*words, *(["--trust-remote-code"] if options["trust_remote_code"] else [])])


def table(options: Mapping[str, Any]) -> str:
    """Return the recommended strategies of known models on 1 to 128 GPUs in Markdown, 8 a host."""
    lines = ["| | " + " | ".join(map(str, TABLE_GPUS)) + " |", "|---|" + "---|" * len(TABLE_GPUS)]
    for model in TABLE_MODELS:
        shape, cells = find_shape(model), []
        work = find_workload(shape, options)
        for gpus in TABLE_GPUS:
            nodes = -(-gpus // 8)
            cluster = Cluster(nodes, gpus // nodes, int(options["gpu_memory_gib"] * GIB))
            best = recommended(plan(shape, cluster, work))
            cells.append(_cell(best) if best else "-")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(best: StrategyPlan) -> str:
    marks = {"--gradient-checkpointing": "c", "--init-memory-gib": "b"}
    added = "".join(marks.get(word, "") for word in best.added)
    return f"{best.strategy.name}{f' ({added})' if added else ''}, {best.needed_bytes / GIB:.0f}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"

"""`lorasb plan`: its plans as text, JSON and a table. Torch-free."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from launcher.commands.plan_inputs import find_shape, find_workload
from launcher.text import columns
from lorasb_ds.config.adapter_options import NARROW, without_adapter
from lorasb_ds.errors import option_name
from lorasb_ds.planner.known_models import HUB_NAMES
from lorasb_ds.planner.model_shape import ModelShape
from lorasb_ds.planner.strategies import (
    Cluster,
    StrategyPlan,
    command,
    plan,
    recommended,
)
from lorasb_ds.planner.workload import Workload
from lorasb_ds.system.units import GIB

TABLE_MODELS = (
    *("llama-7b", "llama-13b", "qwen2.5-32b", "llama-3-70b", "llama-3-405b"),
    *("gpt-oss-20b", "qwen3-30b-a3b", "glm-4.5-air", "qwen3-235b-a22b", "deepseek-v3"),
)
TABLE_GPUS = (1, 2, 4, 8, 16, 32, 64, 128)


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the printed command needs beside the strategy's."""
    names = ["r", "expert_r", "max_length", "micro_batch_size", "init_samples", "init_memory_gib"]
    names += ["init_micro_batch_size"]
    given = {name: options[name] for name in names if options[name] is not None}
    if options["sequence_parallel"] > 1:
        given["sequence_parallel"] = options["sequence_parallel"]
    return {option_name(name): f"{value:.15g}" for name, value in given.items()}


def render(
    shape: ModelShape,
    cluster: Cluster,
    work: Workload,
    plans: Sequence[StrategyPlan],
    command_line: str | None,
) -> str:
    """Return a table of strategies, the parts of the recommended one, and its command."""
    ranks = f"{cluster.world_size} {'process(es)' if cluster.cpu else 'GPU(s)'}"
    lines = [
        f"{shape.name}: {shape.num_parameters / 1e9:.2f} billion parameters on {ranks} with "
        f"{cluster.memory_bytes / GIB:.1f} GiB each"
        + (f", {cluster.nodes} hosts" if cluster.nodes > 1 else ""),
        *describe_experts(shape),
        *describe_narrow(shape, work),
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


def describe_narrow(shape: ModelShape, work: Workload) -> list[str]:
    """Return a line on the layers that are too narrow for an adapter, if there are any."""
    sizes = {name: out * in_ for name, (out, in_) in shape.layers.items()}
    narrow = {name: size for name, size in sizes.items() if name not in work.targets}
    if not narrow:
        return []
    return [without_adapter(narrow, sum(narrow.values()) / sum(sizes.values()), NARROW)]


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
    named = HUB_NAMES.get(model, model)  # a shape is no model that could be loaded
    words = command(best, cluster, named, hostfile, given_options(options))
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

"""Traffic of ZeRO-3 in a step, and how often a quantized weight is dequantized."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench_common import measure, print_table, run_as_rank
from bench_run import started

NO_PREFETCH = {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0}


def zero3(settings: dict[str, Any], out: str) -> None:
    """One rank: seconds of steps, and collectives and bytes of one, by DeepSpeed's own counter.

    Settings: ``config`` of the run, ``zero`` to change in its ds_config, ``steps``.
    """
    import torch.distributed as dist
    from deepspeed.comm.comm import comms_logger

    from lorasb_ds.distributed import zero
    from lorasb_ds.training.loop import train_step

    run, engine, adapters = started(settings["config"], settings["zero"])
    batches = run.step_batches(run.order.packs(0))
    seconds = []
    for _ in range(settings["steps"] + 2):  # the first two let DeepSpeed find the order of modules
        dist.barrier()
        start = time.perf_counter()
        train_step(engine, batches)
        seconds.append(time.perf_counter() - start)
    comms_logger.enabled = comms_logger.prof_all = True
    train_step(engine, batches)
    comms_logger.enabled = False
    dist.barrier()
    start = time.perf_counter()
    for adapter in adapters.values():
        with zero.gathered([adapter.lora_A, adapter.lora_B]):
            pass
    factors_s = time.perf_counter() - start
    collectives = {
        op: [(size, found[0]) for size, found in sizes.items()]
        for op, sizes in comms_logger.comms_dict.items()
    }
    if zero.rank() == 0:
        found = {"seconds": seconds[2:], "collectives": collectives}
        # In the forward and in the backward pass, if they did not travel with the base.
        found["factors_s"] = 2 * factors_s
        Path(out).write_text(json.dumps(found))
    zero.close_process_group()


def quantized(settings: dict[str, Any], out: str) -> None:
    """Dequantizations of a weight in a step, and their share of its time."""
    from lorasb_ds.distributed import zero
    from lorasb_ds.models.quantization import PackedLinear
    from lorasb_ds.training.loop import train_step

    run, engine, _ = started(settings["config"])
    spent: list[float] = []
    packed = [m for m in engine.module.modules() if isinstance(m, PackedLinear)]

    def timed(dequantize: Callable[[], Any]) -> Callable[[], Any]:
        def run_timed() -> Any:
            start = time.perf_counter()
            result = dequantize()
            spent.append(time.perf_counter() - start)
            return result

        return run_timed

    for layer in packed:
        layer.dequantize = timed(layer.dequantize)  # type: ignore[method-assign]
    batches = run.step_batches(run.order.packs(0))
    train_step(engine, batches)
    spent.clear()
    start = time.perf_counter()
    for _ in range(settings["steps"]):
        train_step(engine, batches)
    seconds = time.perf_counter() - start
    found = {
        "seconds": seconds / settings["steps"],
        "times": len(spent) / settings["steps"] / max(1, len(packed)),
        "share": sum(spent) / seconds,
    }
    Path(out).write_text(json.dumps(found))
    zero.close_process_group()


def bench_zero3(quick: bool, config: Mapping[str, Any]) -> dict[str, Any]:
    """Collectives of a step on two ranks."""
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "zero3.json": ({}, {}),
        "no prefetch": (NO_PREFETCH, {}),
        "A and B kept whole": ({"stage3_param_persistence_threshold": 1_000_000}, {}),
        "zero3.json, checkpointing": ({}, {"gradient_checkpointing": True}),
        "no prefetch, checkpointing": (NO_PREFETCH, {"gradient_checkpointing": True}),
    }
    if quick:
        cases = {name: cases[name] for name in ("zero3.json", "no prefetch, checkpointing")}
    found, rows = {}, {}
    for name, (changes, options) in cases.items():
        settings = {"config": {**config, **options}, "zero": changes, "steps": 1 if quick else 5}
        result = found[name] = measure(zero3, settings, 2)
        seconds = statistics.median(result["seconds"])
        gathers = result["collectives"]["all_gather_into_tensor"]
        reductions = result["collectives"]["reduce_scatter_tensor"]
        rows[name] = (
            f"{sum(count for _, count in gathers)}",
            f"{sum(size * count for size, count in gathers) / 1e6:.1f} MB",
            f"{sum(count for _, count in reductions)}",
            f"{sum(size * count for size, count in reductions) / 1e6:.2f} MB",
            f"{seconds:.2f} s",
            f"{result['factors_s'] / seconds:.2%}",
        )
    columns = ("gathers", "received", "reductions", "of R's gradients", "step")
    print_table("ZeRO-3, 2 ranks", (*columns, "A and B by themselves"), rows)
    return found


def bench_quantized(quick: bool, config: Mapping[str, Any]) -> dict[str, Any]:
    """Dequantizations of a step."""
    cases: dict[str, dict[str, Any]] = {
        f"{bits} bits{', checkpointing' if checkpointing else ''}": {
            f"load_in_{bits}bit": True,
            "gradient_checkpointing": checkpointing,
        }
        for bits in ((4,) if quick else (4, 8))
        for checkpointing in (False, True)
    }
    steps, found = (1, {}) if quick else (3, {})
    if not quick:
        found["bf16"] = measure(quantized, {"config": {**config}, "steps": steps})
    for name, options in cases.items():
        found[name] = measure(quantized, {"config": {**config, **options}, "steps": steps})
    print_table(
        "base",
        ("step", "dequantizations of a weight", "share of the step"),
        {
            name: (f"{m['seconds']:.2f} s", f"{m['times']:.2f}", f"{m['share']:.1%}")
            for name, m in found.items()
        },
    )
    return found


if __name__ == "__main__":
    run_as_rank(zero3, quantized)

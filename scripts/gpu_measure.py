"""What scripts/gpu_check.py measures on each GPU: a pass, a step and the init, with host waits."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_common import interleaved_medians, run_as_rank
from bench_layers import BASE, OURS, PEFT, make_pass
from bench_run import started

NUM_PASSES, NUM_STEPS = 10, 5
WARNING = ".*synchronizing CUDA operation"  # of torch's sync debug mode


def gpu(settings: dict[str, Any], out: str) -> None:
    """One rank. The first writes its numbers; times are medians, in seconds.

    Settings: ``config`` of the run, ``stack`` of decoder blocks for the pass.
    """
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm.comm import comms_logger

    from lorasb_ds.distributed import accelerator, zero
    from lorasb_ds.training.init_phase import initialize_by
    from lorasb_ds.training.loop import train_step

    # Before an engine: ZeRO-3 replaces torch's linear function for the rest of the process.
    if accelerator.name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    stack = {"model": "stack", "dtype": "bfloat16", "stack": settings["stack"]}
    passes = {way: synchronized(make_pass(way, stack)) for way in (BASE, OURS, PEFT)}
    pass_s = interleaved_medians(passes, NUM_PASSES)
    del passes
    run, engine, adapters = started(settings["config"])
    sample, probe = run.sample(run.gradient_rows), run.sample(run.probe_rows)
    with host_waits() as of_init:
        report = initialize_by(run, engine, adapters, sample, probe, keep=lambda factors: None)
    engine.train()
    batches = run.step_batches(run.order.packs(0))
    for _ in range(2):  # DeepSpeed finds the order of modules
        train_step(engine, batches)
    with host_waits() as of_step:
        train_step(engine, batches)
    comms_logger.enabled = comms_logger.prof_all = True
    train_step(engine, batches)
    comms_logger.enabled = False
    sent = sum(
        size * found[0]
        for sizes in comms_logger.comms_dict.values()
        for size, found in sizes.items()
    )
    dist.barrier()
    step = {"step": synchronized(lambda: train_step(engine, batches))}
    result = {
        "step_s": interleaved_medians(step, NUM_STEPS)["step"],
        "step_host_waits": sum(of_step.values()),
        "step_waits_at": of_step,
        "step_bytes": sent,
        "init": {
            "gradients_s": report.gradients_s,
            "communication_s": report.communication_s,
            "svd_s": report.svd_s,
            "eta_s": report.step.seconds,
            "peak_bytes": report.peak_memory_bytes,
            "predicted_bytes": report.predicted_memory_bytes,
            "host_waits_a_layer": sum(of_init.values()) / len(adapters),
        },
        "pass_s": pass_s,
        "device": accelerator.name(),
    }
    if zero.rank() == 0:
        Path(out).write_text(json.dumps(result))
    dist.barrier()
    zero.close_process_group()


def synchronized(run: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that runs it, and waits for the device."""
    from deepspeed.accelerator import get_accelerator

    def to_the_end() -> None:
        run()
        get_accelerator().synchronize()

    return to_the_end


@contextmanager
def host_waits() -> Iterator[dict[str, int]]:
    """Give a table of lines and how often they made the host wait; filled at the end, by CUDA."""
    found: dict[str, int] = {}
    if not torch.cuda.is_available():
        yield found
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message=WARNING)
            yield found
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "synchronizing" in str(warning.message):
            line = f"{Path(warning.filename).name}:{warning.lineno}"
            found[line] = found.get(line, 0) + 1


if __name__ == "__main__":
    run_as_rank(gpu)

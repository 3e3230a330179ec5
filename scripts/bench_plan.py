"""Memory that `lorasb plan` predicts for a run, compared with what is measured."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from bench_common import ROOT, machine, measure, row, write_json
from bench_model import write_llama

MIB = 1 << 20
# hidden, intermediate, blocks, heads, heads of keys
SIZES = {
    "50M": (512, 1376, 8, 8, 4),
    "200M": (1024, 2816, 12, 16, 8),
    "530M": (1536, 4096, 16, 12, 4),
}
HELD: dict[str, tuple[str, dict[str, Any]]] = {
    "replicated bf16": ("zero2.json", {}),
    "ZeRO-3 bf16": ("zero3.json", {}),
    "ZeRO-3 bf16, nothing kept": ("really", {}),
    "ZeRO-3 4-bit, nothing kept": ("really", {"load_in_4bit": True}),
}
WORK = {
    "max_length": 128,
    "micro_batch_size": 2,
    "r": 32,
    "init_lr": 1e-4,
    "max_steps": 3,
    "force": True,
}
TENSORS, PEAKS = ("base", "adapters", "optimizer"), ("load", "init", "train")
TENSOR_TARGET, PEAK_TARGET = 0.05, 0.15


def run(config: dict[str, Any], out: str) -> None:
    """Measure a run as `lorasb train` makes it; each number is that of the rank with most."""
    import torch.distributed as dist

    from launcher.workers.quiet import quiet_libraries
    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.distributed import accelerator, zero
    from lorasb_ds.training.init_phase import initialize_by
    from lorasb_ds.training.loop import train_step
    from lorasb_ds.training.prepare import prepare
    from lorasb_ds.training.trainer import start_engine

    quiet_libraries()
    prepared = prepare(load_run_config(config), int(os.environ["WORLD_SIZE"]))
    zero.init_process_group()
    dist.all_reduce(torch.zeros(1))
    gc.collect()
    there = set(_storages(_all_tensors()))
    accelerator.reset_peak_memory()
    idle = accelerator.memory_bytes()
    engine, adapters = start_engine(prepared)
    peaks = {"load": accelerator.peak_memory_bytes() - idle}
    sample, probe = (prepared.sample(r) for r in (prepared.gradient_rows, prepared.probe_rows))
    report = initialize_by(prepared, engine, adapters, sample, probe, lambda factors: None)
    peaks["init"] = report.peak_memory_bytes - idle
    del sample, probe
    accelerator.reset_peak_memory()
    engine.train()
    for step in range(prepared.num_steps):
        train_step(engine, prepared.step_batches(prepared.order.packs(step)))
    peaks["train"] = accelerator.peak_memory_bytes() - idle
    tensors = _tensor_bytes(engine, there)
    found: list[Any] = [None] * zero.world_size()
    dist.all_gather_object(found, (tensors, peaks))
    memory = prepared.memory.footprint
    predicted = prepared.memory.phases | {
        "adapters": memory.adapters,
        "optimizer": memory.optimizer,
    }
    predicted["base"] = memory.base + memory.quantization
    parts = {k: v for k, v in vars(memory).items() if k != "init"} | {
        f"init {k}": v for k, v in vars(memory.init).items() if k.endswith("_bytes")
    }
    result = {
        "tensors": {key: max(t[key] for t, _ in found) for key in TENSORS},
        "peaks": {key: max(p[key] for _, p in found) for key in PEAKS},
        "predicted": predicted,
        "parts": parts,
    }
    if zero.rank() == 0:
        Path(out).write_text(json.dumps(result))
    dist.barrier()
    zero.close_process_group()


def _all_tensors() -> Iterator[torch.Tensor]:
    """Return all tensors of this process that Python knows."""
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            yield thing


def _storages(tensors: Iterator[torch.Tensor]) -> dict[int, int]:
    """Return address -> bytes of the storages of tensors, each once."""
    result = {}
    for tensor in tensors:
        if tensor.device.type != "meta" and tensor.numel():
            storage = tensor.untyped_storage()
            result[storage.data_ptr()] = storage.nbytes()
    return result


def _tensor_bytes(engine: Any, there: set[int]) -> dict[str, int]:
    """Return the bytes of all tensors that are new since the load, by what they are for.

    Tensors that are not parameters count as the optimizer's.
    """
    gc.collect()
    left = {a: n for a, n in _storages(_all_tensors()).items() if a not in there}
    found = {"base": 0, "adapters": 0}
    for name, parameter in engine.module.named_parameters():
        shard = getattr(parameter, "ds_tensor", None)
        # A parameter that ZeRO-3 has gathered for the moment is not kept.
        kept = [parameter.data] if shard is None or parameter.ds_persist else []
        kind = "adapters" if "lora_" in name else "base"
        addresses = _storages(iter(kept if shard is None else [*kept, shard]))
        found[kind] += sum(left.pop(address, 0) for address in addresses)
        for address in _storages(iter([parameter.data])):
            left.pop(address, None)
    return found | {"optimizer": sum(left.values())}


def really_sharded(folder: Path) -> str:
    """Write zero3.json with nothing kept whole, as with a model larger than memory."""
    content = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    content["zero_optimization"] |= {
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
    }
    path = folder / "really-sharded.json"
    path.write_text(json.dumps(content))
    return str(path)


def inputs(folder: Path, rows: int = 24) -> dict[str, Any]:
    """Return the options of a run on rows that all have the maximum length."""
    text = json.dumps({"question": "Count.", "answer": " ".join(map(str, range(1000)))})
    data = folder / "rows.jsonl"
    data.write_text(f"{text}\n" * rows)
    return WORK | {"data": str(data), "init_samples": 9}


def model_folder(folder: Path, size: tuple[int, ...]) -> str:
    """Write a random Llama with tied embeddings."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = dict(zip((*keys, "num_key_value_heads"), size, strict=True))
    write_llama(folder, shape | {"tie_word_embeddings": True})
    return str(folder)


def ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """Return predicted / measured, for tensors and peaks."""
    measured = result["tensors"] | result["peaks"]
    return {key: result["predicted"][key] / measured[key] for key in (*TENSORS, *PEAKS)}


def table(found: Mapping[tuple[str, str, int], Mapping[str, Any]]) -> str:
    """Return a table of predicted / measured MiB and their ratio."""
    columns = ("ranks", *TENSORS, *(f"peak: {phase}" for phase in PEAKS))
    lines = [row("", columns), "|---|" + "---:|" * len(columns)]
    for (size, held, ranks), result in found.items():
        cells = [str(ranks)]
        for key, ratio in ratios(result).items():
            got = (result["tensors"] | result["peaks"])[key]
            cells.append(f"{result['predicted'][key] / MIB:.4g} / {got / MIB:.4g} = {ratio:.2f}")
        lines.append(row(f"{size}, {held}", cells))
    return "\n".join(lines)


@click.command()
@click.option("--quick", is_flag=True, help="The smallest size on two ranks: whether it runs.")
@click.option("--cases", default="", help="Only those whose name holds this regular expression.")
@click.option("--out", type=Path, default=ROOT / "docs/benchmarks/plan.json", show_default=True)
def plan(quick: bool, cases: str, out: Path) -> None:
    """Tensors and peak memory of runs on random models: predicted / measured, MiB a rank."""
    # glibc keeps freed pieces below 32 MiB, which cannot be predicted and does not occur on GPUs.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    sizes, worlds = (["50M"], [2]) if quick else (list(SIZES), [1, 2, 4])
    found: dict[tuple[str, str, int], Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common, really = inputs(folder), really_sharded(folder)
        for size in sizes:
            model = model_folder(folder / size, SIZES[size])
            for held, (file, options) in HELD.items():
                for ranks in worlds:
                    key = (size, held, ranks)
                    if not re.search(cases, f"{size}, {held}, {ranks}"):
                        continue
                    ds_config = really if file == "really" else str(ROOT / "ds_configs" / file)
                    case = common | options | {"model": model, "ds_config": ds_config}
                    found[key] = measure(run, case, ranks)
                    print(table({key: found[key]}).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(found))
    every = [ratios(result) for result in found.values()]
    for what, keys, target in (("tensors", TENSORS, TENSOR_TARGET), ("peaks", PEAKS, PEAK_TARGET)):
        off = [abs(ratio[key] - 1) for ratio in every for key in keys]
        within = sum(error <= target for error in off)
        print(f"\n{what}: {within} of {len(off)} within {target:.0%}, the worst {max(off):.1%} off")
    if not quick:
        records = [{"case": list(key), **result} for key, result in found.items()]
        write_json(
            out,
            {"machine": machine(), "work": WORK, "sizes": SIZES, "records": records},
        )


if __name__ == "__main__":
    _, settings, out = sys.argv[1:]
    run(json.loads(settings), out)

"""A run at the width of Llama-70B: what loading, the init and a training step take at 80 layers."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from bench_common import ROOT, machine, measure, row, run_as_rank, write_json
from bench_memory import held_bytes, watched
from bench_model import read_once, write_llama

from lorasb_ds.planner.config_shape import shape_from_config
from lorasb_ds.planner.known_models import BUILT_IN
from lorasb_ds.planner.strategies import Cluster, plan
from lorasb_ds.planner.workload import Workload

GB = 1e9
RANKS, LAYERS, VOCABULARY = 2, 80, 128256  # the last two are Llama-70B's
SHAPE = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
QUICK = SHAPE | {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 4}
QUICK |= {"num_key_value_heads": 2}
# Of nine rows one is held back, for eta.
RUN = {
    "data": "reasoning-gym:word_sequence_reversal?min_words=20&max_words=30&size=9&seed=3",
    "init_samples": 9,
    "init_memory_gib": 2,
    "max_length": 128,
    "micro_batch_size": 2,
    "max_steps": 2,
    "r": 64,
    "load_in_4bit": True,
    "gradient_checkpointing": True,
    "ds_config": str(ROOT / "ds_configs/zero3.json"),
}
GPUS = ((2, 24), (8, 80))  # number and memory in GiB
PARTS = ("load", "init", "gradients", "communication", "SVD", "eta", "step")


def wide(config: dict[str, Any], out: str) -> None:
    """One rank of a run; the first writes what was found, of the rank with most."""
    from launcher.workers.quiet import quiet_libraries

    quiet_libraries()
    import torch.distributed as dist

    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.distributed import zero
    from lorasb_ds.training.init_phase import initialize_by
    from lorasb_ds.training.loop import train_step
    from lorasb_ds.training.prepare import prepare
    from lorasb_ds.training.trainer import start_engine

    run = prepare(load_run_config(config), int(os.environ["WORLD_SIZE"]))
    zero.init_process_group()
    dist.barrier()
    (engine, adapters), load = watched(lambda: start_engine(run))
    sample, probe = run.sample(run.gradient_rows), run.sample(run.probe_rows)
    basis_bytes = 0

    def keep(factors: dict[str, Any]) -> None:  # a run writes them to its basis
        nonlocal basis_bytes
        basis_bytes += sum(factor.nbytes for factor in factors.values())

    report, init = watched(lambda: initialize_by(run, engine, adapters, sample, probe, keep))
    engine.train()
    losses, steps = [], []
    for number in range(run.num_steps):
        batches = run.step_batches(run.order.packs(number))
        done, found = watched(lambda b=batches: train_step(engine, b))  # type: ignore[misc]
        losses.append(done.loss)
        steps.append(found)
    step = min(steps, key=lambda found: found["seconds"])
    blocks = [w for name, w in engine.module.named_parameters() if ".layers." in name]
    hf_config = run.base.hf_config
    tokens = run.config.micro_batch_size * run.config.max_length
    result = {f"{name}_s": part["seconds"] for name, part in (("load", load), ("init", init))}
    result |= {
        "gradients_s": report.gradients_s,
        "communication_s": report.communication_s,
        "SVD_s": report.svd_s,
        "eta_s": report.step.seconds,
        "step_s": step["seconds"],
        "held_bytes": held_bytes(engine.module.parameters()),
        "block_bytes": held_bytes(blocks) / hf_config.num_hidden_layers,
        "basis_bytes": basis_bytes / hf_config.num_hidden_layers,
        # In bf16, the input of a block; R's fp32 master, moments and gradient.
        "activation_bytes": 2 * tokens * hf_config.hidden_size,
        "optimizer_bytes": 16 * run.config.r**2 * len(adapters) / hf_config.num_hidden_layers,
        "groups": report.num_groups,
    }
    # On CPUs the process of rank 0.
    phases = run.memory.footprint.phases(one_memory=True)
    result |= {
        f"{part}_predicted_bytes": phases[phase]
        for part, phase in (("load", "load"), ("init", "init"), ("step", "train"))
    }
    for name, part in (("load", load), ("init", init), ("step", step)):
        before = part["anon_before_bytes"] - load["anon_before_bytes"]
        result[f"{name}_peak_bytes"] = before + part["anon_peak_bytes"]
    of_all: list[Any] = [None] * zero.world_size()
    dist.all_gather_object(of_all, result)
    largest = {key: max(rank[key] for rank in of_all) for key in result}
    if zero.rank() == 0:
        work = asdict(run.memory.workload) | {"targets": None}
        Path(out).write_text(json.dumps(largest | {"losses": losses, "workload": work}))
    zero.close_process_group()


def planned(workload: Mapping[str, Any], ranks: int, memory_gib: int) -> dict[str, Any]:
    """Return what `lorasb plan` predicts for Llama-3-70B with this run's rows on ``ranks`` GPUs."""
    shape = shape_from_config("llama-3-70b", BUILT_IN["llama-3-70b"])
    work = Workload(**{**workload, "targets": shape.layers})
    cluster = Cluster(1, ranks, memory_gib << 30)
    found = next(o for o in plan(shape, cluster, work) if o.strategy.name == "4-bit, ZeRO-3")
    peaks = {"load": found.memory.load_peak, "init": found.memory.init_peak}
    return peaks | {"step": found.memory.train_peak, "fits": found.fits, "added": found.added}


def seconds_of_all(one: float, two: float, vocabulary: int) -> float:
    """Extrapolate a part's seconds to 80 layers, from those of 1 and 2 layers.

    A layer's seconds count 80 times; the rest is attributed to head and embeddings, and grows with
    the vocabulary.
    """
    layer = two - one
    return LAYERS * layer + (one - layer) * VOCABULARY / vocabulary


def peak_of_all(
    two: dict[str, float], part: str, hidden_size: int, vocabulary: int, ranks: int
) -> float:
    """Extrapolate a rank's peak to 80 layers, from that of 2 layers on 2 ranks.

    A layer adds its share of weights and adapters, in the init the basis (rank 0, host memory), in
    training R's optimizer and an activation. The real vocabulary adds its share of embeddings and
    head, and one of them gathered. On other numbers of ranks, shares are what differs.
    """
    tables = 2 * (VOCABULARY - vocabulary) * hidden_size  # bytes of one, in bf16
    more = LAYERS - 2
    share = two["held_bytes"] + more * two["block_bytes"] + 2 * tables / RANKS
    layer = {
        "load": 0.0,
        "init": two["basis_bytes"],
        "step": two["optimizer_bytes"] + two["activation_bytes"],
    }
    working = two[f"{part}_peak_bytes"] - two["held_bytes"] + more * layer[part] + tables
    return working + share * RANKS / ranks


@click.command("wide")
@click.option("--model-dir", type=Path, help="Where the checkpoints (9 GB) are kept, or made.")
@click.option("--out", type=Path, default=ROOT / "docs/benchmarks/wide.json", show_default=True)
@click.option("--quick", is_flag=True, help="Narrow layers: whether it runs.")
def main(model_dir: Path | None, out: Path, quick: bool) -> None:
    """One and two layers of Llama-70B's shape, 4-bit in ZeRO-3 shards, on two ranks."""
    shape = QUICK if quick else SHAPE
    config = RUN | ({"r": 8, "init_memory_gib": 0.0005} if quick else {})
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for layers in (1, 2):
            folder = (model_dir or Path(scratch)) / f"{layers}-layers"
            write_llama(folder, shape | {"num_hidden_layers": layers})
            read_once(folder)
            found[layers] = measure(wide, config | {"model": str(folder)}, RANKS)
            print(f"{layers} layers: {found[layers]}", file=sys.stderr, flush=True)
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    one, two = found[1], found[2]
    print(row("seconds", ["1 layer", "2 layers", f"{LAYERS} layers"]))
    print("|---|---:|---:|---:|")
    seconds = {}
    for part in PARTS:
        times = one[f"{part}_s"], two[f"{part}_s"]
        seconds[part] = seconds_of_all(*times, vocabulary)
        print(row(part, [f"{number:.1f}" for number in (*times, seconds[part])]))
    peaks: dict[str, dict[int, float]] = {}
    worlds = (2, 8)
    print()
    columns = ["1 layer", "2 layers", *(f"{LAYERS} layers, {ranks} ranks" for ranks in worlds)]
    print(row("peak of a rank, GB", columns))
    print("|---|" + "---:|" * len(columns))
    for part in ("load", "init", "step"):
        of = (two, part, shape["hidden_size"], vocabulary)
        peaks[part] = {ranks: peak_of_all(*of, ranks) for ranks in worlds}
        measured = [result[f"{part}_peak_bytes"] for result in (one, two)]
        print(row(part, [f"{number / GB:.2f}" for number in (*measured, *peaks[part].values())]))
    print(
        "\n" + row("4-bit ZeRO-3 as planned, GB", ["2 layers", *(f"{n} x {g} GB" for n, g in GPUS)])
    )
    print("|---|" + "---:|" * (1 + len(GPUS)))
    plans = [planned(two["workload"], *gpus) for gpus in GPUS]
    for part in ("load", "init", "step"):
        numbers = [two[f"{part}_predicted_bytes"], *(found[part] for found in plans)]
        print(row(part, [f"{number / GB:.2f}" for number in numbers]))
    verdicts = ["yes" if found["fits"] else "no" for found in plans]
    print(
        row(
            "fits",
            ["", *(f"{v} {' '.join(f['added'])}" for v, f in zip(verdicts, plans, strict=True))],
        )
    )
    print(f"\nlosses of the training steps: {', '.join(f'{loss:.3f}' for loss in two['losses'])}")
    write_json(
        out,
        {
            "machine": machine(),
            "config": config,
            "shape": shape,
            "vocabulary": vocabulary,
            "measured": found,
            "seconds of 80 layers": seconds,
            "peak bytes of 80 layers by ranks": peaks,
            "planned": {f"{n} x {g} GiB": p for (n, g), p in zip(GPUS, plans, strict=True)},
        },
    )


if __name__ == "__main__":
    run_as_rank(wide)

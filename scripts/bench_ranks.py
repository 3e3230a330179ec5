"""The init on several ranks: SVDs of many layers, exchange of gradients, and the whole of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from bench_common import ROOT, machine, measure, medians, print_table, run_as_rank, write_json
from bench_init import INIT, TASK, ours

SIDE, R, NUM_LAYERS = 2048, 96, 16
SHAPES, TOKENS = ((2048, 2048), (8192, 2048)), 256  # tokens of all ranks
# The demo model, the base whole on every process. In fp32: CPUs without bf16 multiply it slowly.
WHOLE = INIT | {"data": f"{TASK}?min_words=14&max_words=20&size=18&seed=3", "init_samples": 18}
WHOLE |= {"dtype": "fp32", "max_length": 128, "micro_batch_size": 1}
WHOLE |= {"ds_config": str(ROOT / "ds_configs/zero2.json")}


def svds(settings: dict[str, Any], out: str) -> None:
    """Seconds for the SVDs of all layers: on one rank, or on several in both ways."""
    from lorasb_ds.distributed.collectives import ALONE, row_range
    from lorasb_ds.init.sharded_svd import truncated_svd, truncated_svds
    from lorasb_ds.init.whole_svd import truncated_svds_by_rank

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    side, r = settings["side"], settings["r"]
    generator = torch.Generator().manual_seed(0)
    rows = row_range(side, rank, ranks)
    shards = []
    for _ in range(settings["num_layers"]):
        signal = torch.randn(side, 2 * r, generator=generator)
        signal = signal @ torch.randn(2 * r, side, generator=generator) / (2 * r) ** 0.5
        signal += torch.randn(side, side, generator=generator)
        shards.append(signal[rows.start : rows.stop].sign().to(torch.int8))
    found = []
    dist.barrier()
    start = time.perf_counter()
    for first in range(0, len(shards), ranks):
        turn = shards[first : first + ranks]
        if ranks == 1:
            found.append(truncated_svd(turn[0], r, group=ALONE))
        elif settings["whole"]:
            found += truncated_svds_by_rank(turn, [side] * len(turn), r)
        else:
            found += truncated_svds(turn, r)
    dist.barrier()
    result = {"seconds": time.perf_counter() - start}
    result["captured_energy"] = sum(svd.captured_energy for svd in found) / len(found)
    if rank == 0:
        Path(out).write_text(json.dumps(result))
    dist.barrier()


def exchange(settings: dict[str, Any], out: str) -> None:
    """Seconds for one layer's gradient of all ranks' tokens, by each way to exchange it."""
    from torch import nn

    from lorasb_ds.adapters.lora_sb import LoraSBLinear
    from lorasb_ds.distributed import zero
    from lorasb_ds.init import gradient_shards

    torch.set_num_threads(1)
    zero.init_process_group()
    ranks = dist.get_world_size()
    out_features, in_features = settings["shape"]
    gradient_shards.sends_activations = lambda *_: settings["way"] == "rows"
    with torch.device("meta"):
        base = nn.Linear(in_features, out_features, bias=False)
    adapter = LoraSBLinear(base, 1, torch.float32)
    shards = gradient_shards.GradientShards({"layer": adapter}, zero.new_group())
    x, grad_y = (torch.randn(settings["tokens"] // ranks, n) for n in (in_features, out_features))
    seconds = []
    for _ in range(settings["repeats"]):
        shards.calls.add("layer", x)
        shards.after_forward(has_labels=True)
        dist.barrier()
        start = time.perf_counter()
        shards.add("layer", x, grad_y)
        shards.exchange.wait()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        shards.after_backward()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps({"seconds": sorted(seconds)[len(seconds) // 2]}))
    dist.barrier()


@click.command("ranks")
@click.option("--repeats", default=3, show_default=True)
@click.option("--out", type=Path, default=ROOT / "docs/benchmarks/ranks.json", show_default=True)
@click.option("--quick", is_flag=True, help="Small layers, once: whether it runs.")
def main(repeats: int, out: Path, quick: bool) -> None:
    """SVDs and exchanges of gradients on ranks of one core each; the whole init on this machine."""
    sizes = {"side": SIDE, "r": R, "num_layers": NUM_LAYERS}
    sizes = {"side": 96, "r": 8, "num_layers": 2} if quick else sizes
    shapes, repeats = (((96, 64),), 1) if quick else (SHAPES, repeats)
    cases: dict[str, tuple[Any, dict[str, Any], int]] = {
        "SVDs, 1 rank": (svds, sizes, 1),
        "SVDs, 2 ranks, each on one": (svds, sizes | {"whole": True}, 2),
        "SVDs, 2 ranks, each on both": (svds, sizes | {"whole": False}, 2),
    }
    for shape in shapes:
        given = {"shape": shape, "tokens": TOKENS, "repeats": 3 if quick else 15}
        name = f"gradient of {shape[0]} x {shape[1]}"
        cases[f"{name}, 1 rank"] = (exchange, given | {"way": "sums"}, 1)
        cases[f"{name}, 2 ranks, x and δ"] = (exchange, given | {"way": "rows"}, 2)
        cases[f"{name}, 2 ranks, sums"] = (exchange, given | {"way": "sums"}, 2)
    if not quick:
        for rows in (1, 4):
            for n in (1, 2, 4):
                name = f"init, {n} rank{'s' * (n > 1)}, {rows} row{'s' * (rows > 1)} at once"
                cases[name] = (ours, WHOLE | {"init_micro_batch_size": rows}, n)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(repeats):  # in turn: a busy machine slows all alike
        for name, case in cases.items():
            found[name].append(measure(*case))
    rows, alone = {}, 0.0
    for name, results in found.items():
        median = medians(results)
        seconds = median.get("seconds") or median["total_s"]
        alone = seconds if "1 rank" in name else alone
        rows[name] = [f"{seconds:.4g}", f"{seconds / alone:.2f}"]
    print_table("", ["seconds", "of 1 rank"], rows)
    settings = {"svds": sizes, "tokens": TOKENS, "init": WHOLE}
    write_json(out, {"machine": machine(), "repeats": repeats, "config": settings, "runs": found})


if __name__ == "__main__":
    run_as_rank(svds, exchange)

"""The whole init phase against a plain statement of the paper's procedure, and how it scales."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch
from bench_common import ROOT, machine, measure, medians, row, run_as_rank, write_json
from bench_model import write_llama

from lorasb_ds.config.paths import demo_model_dir

MIB = 1 << 20
TASK = "reasoning-gym:word_sequence_reversal"
# 54 rows, of which 48 go into the gradient and 6 are held back; nearly all have 256 tokens or more.
INIT = {"data": f"{TASK}?min_words=40&max_words=60&size=54&seed=3", "init_samples": 54}
INIT |= {"max_length": 256, "r": 96, "init_lr": 1e-4}
SCALE = {"data": f"{TASK}?min_words=20&max_words=30&size=18&seed=3", "init_samples": 18}
WIDTH = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
WIDTH += ("tie_word_embeddings",)
SCALE |= {"max_length": 128, "micro_batch_size": 2, "r": 16, "init_lr": 1e-4}


def paper(config: dict[str, Any], out: str) -> None:
    """The initialization of arXiv 2411.19557 on one device, stated plainly.

    Every weight requires grad; the gradients of all micro-batches are averaged on the CPU, in the
    model's dtype; each target's is decomposed by torch.svd_lowrank(q=r, niter=10).
    """
    from transformers import AutoModelForCausalLM

    from lorasb_ds.distributed import accelerator, zero
    from lorasb_ds.models.checkpoint_files import model_path
    from lorasb_ds.models.loading import DTYPES

    run = _prepare(config, 1)
    zero.init_process_group()
    batches = run.batches(run.data.init, run.gradient_rows)
    dtype = DTYPES[run.config.dtype]
    model = AutoModelForCausalLM.from_pretrained(model_path(run.config.model), dtype=dtype)
    model.train()
    _warm_up(model, batches[0])
    before = _start_measuring()
    start = time.perf_counter()
    gradients: dict[str, torch.Tensor] = {}
    for batch in batches:
        loss = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            share = parameter.grad.cpu() / len(batches)
            gradients[name] = gradients[name] + share if name in gradients else share
            parameter.grad = None
    after_gradients = time.perf_counter()
    factors = {}
    for name in run.adapter.targets:
        step = gradients[f"{name}.weight"].float().sign()
        U, S, V = torch.svd_lowrank(step, q=run.config.r, niter=10)
        R = torch.diag(-run.config.init_lr * S)
        factors[name] = [factor.to(dtype) for factor in (U, R, V.T)]
    end = time.perf_counter()
    result = {
        "gradients_s": after_gradients - start,
        "svd_s": end - after_gradients,
        "total_s": end - start,
        "peak_bytes": accelerator.peak_memory_bytes() - before,
    }
    Path(out).write_text(json.dumps(result))
    zero.close_process_group()


def ours(config: dict[str, Any], out: str) -> None:
    """Time `initialize` as a run does it; memory is that of the rank with most."""
    import torch.distributed as dist

    from lorasb_ds.distributed import zero
    from lorasb_ds.init.basis_file import BasisWriter, basis_sizes
    from lorasb_ds.init.gradient_shards import GradientShards
    from lorasb_ds.training.init_phase import initialize_by
    from lorasb_ds.training.trainer import start_engine

    run = _prepare(config, int(os.environ["WORLD_SIZE"]))
    zero.init_process_group()
    engine, adapters = start_engine(run)
    sample, probe = run.sample(run.gradient_rows), run.sample(run.probe_rows)
    _warm_up(engine.module, sample.batches[0])
    zero.release(engine)
    shards = GradientShards(adapters)
    shard_bytes = sum(shard.nbytes for shard in shards.shards.values())
    del shards
    dist.barrier()
    before = _start_measuring()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        basis = None
        if zero.rank() == 0:
            basis = BasisWriter(Path(folder), basis_sizes(adapters), run.made_from)
            stack.enter_context(basis)
        keep = basis.add if basis else lambda factors: None
        report = initialize_by(run, engine, adapters, sample, probe, keep)
        if basis:
            basis.finish(report)
    peak = torch.tensor(report.peak_memory_bytes - before, dtype=torch.float64)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    result = {
        "gradients_s": report.gradients_s + report.communication_s,
        "communication_s": report.communication_s,
        "svd_s": report.svd_s,
        "eta_s": report.step.seconds,
        "total_s": report.total_s,
        "peak_bytes": peak.item(),
        "predicted_bytes": report.predicted_memory_bytes,
        "shard_bytes": shard_bytes,
        "groups": report.num_groups,
    }
    if zero.rank() == 0:
        Path(out).write_text(json.dumps(result))
    dist.barrier()
    zero.close_process_group()


def _prepare(config: dict[str, Any], world_size: int) -> Any:
    from launcher.workers.quiet import quiet_libraries
    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.training.prepare import prepare

    quiet_libraries()
    return prepare(load_run_config(config), world_size)


def _warm_up(model: Any, batch: Any) -> None:
    """Touch every weight: a mapped file counts as memory from then on."""
    with torch.no_grad():
        model(input_ids=batch.input_ids[:1, :8], use_cache=False)


def _start_measuring() -> int:
    from lorasb_ds.distributed import accelerator

    accelerator.reset_peak_memory()
    return accelerator.memory_bytes()


@click.command()
@click.option("--repeats", default=3, show_default=True)
@click.option("--micro-batch-size", default=1, show_default=True, help="Rows; of all cases.")
@click.option("--budget-gib", default=0.2, show_default=True, help="Of the case with a budget.")
@click.option("--quick", is_flag=True, help="A few rows, once: whether it runs.")
def init(repeats: int, micro_batch_size: int, budget_gib: float, quick: bool) -> None:
    """The whole phase on SmolLM2-135M: 48 rows of up to 256 tokens, r = 96, bf16."""
    config = INIT | {"micro_batch_size": micro_batch_size}
    if quick:
        repeats, config = 1, config | {"init_samples": 5, "max_length": 64, "r": 16}
    # The whole base on each of two processes as on the one: what differs is the init's own.
    two = config | {"ds_config": str(ROOT / "ds_configs/zero2.json")}
    cases: dict[str, tuple[Callable[..., None], dict[str, Any], int]] = {
        "paper's procedure, 1 process": (paper, config, 1),
        "ours, 1 process": (ours, config, 1),
        "ours, 1 process, eta by measurement": (ours, config | {"init_lr": "auto"}, 1),
        f"ours, 1 process, {budget_gib} GiB": (ours, config | {"init_memory_gib": budget_gib}, 1),
        "ours, 2 processes": (ours, two, 2),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(repeats):  # in turn: a busy machine slows all alike
        for name, (case, settings, world_size) in cases.items():
            found[name].append(measure(case, settings, world_size))
            print(f"{name}: {found[name][-1]['total_s']:.1f} s", file=sys.stderr, flush=True)
    median = {name: medians(results) for name, results in found.items()}
    base, *_ = median.values()
    one = median["ours, 1 process"]
    columns = ("time", "of the paper's", "gradients", "SVD", "peak above base", "of the paper's")
    columns += ("of 1 process", "gradient shards", "groups")
    lines = [row("", columns), "|---|" + "---:|" * len(columns)]
    for name, m in median.items():
        shards = f"{m['shard_bytes'] / MIB:.0f} MiB" if "shard_bytes" in m else "all, bf16"
        lines.append(
            row(
                name,
                [
                    f"{m['total_s']:.1f} s",
                    f"{m['total_s'] / base['total_s']:.2f}",
                    f"{m['gradients_s']:.1f} s",
                    f"{m['svd_s']:.1f} s",
                    f"{m['peak_bytes'] / MIB:.0f} MiB",
                    f"{m['peak_bytes'] / base['peak_bytes']:.2f}",
                    f"{m['peak_bytes'] / one['peak_bytes']:.2f}",
                    shards,
                    f"{m.get('groups', 1):.0f}",
                ],
            )
        )
    print("\n".join(lines))
    share = median["ours, 2 processes"]["shard_bytes"] / one["shard_bytes"]
    print(f"\nshards of 2 processes: {share:.3f} of 1 process's")
    if not quick:
        write_json(
            ROOT / f"docs/benchmarks/init-micro-batch-{micro_batch_size}.json",
            {"machine": machine(), "repeats": repeats, "config": config, "runs": found},
        )


@click.command()
@click.option("--repeats", default=3, show_default=True)
@click.option("--quick", is_flag=True, help="Two sizes, once: whether it runs.")
def scale(repeats: int, quick: bool) -> None:
    """Time and memory as layers double at a fixed budget, and as ranks do."""
    sizes, worlds = ((2, 4), (1, 2)) if quick else ((2, 4, 8, 16), (1, 2, 4))
    repeats = 1 if quick else repeats
    with tempfile.TemporaryDirectory() as folder:
        models = {size: _model(Path(folder) / str(size), size) for size in sizes}
        # What two of the model's layers take, and what is stored between groups.
        budget = SCALE | {"init_memory_gib": 0.06}
        cases = {("layers", size): (budget | {"model": models[size]}, 1) for size in sizes}
        cases |= {("ranks", n): (SCALE | {"model": models[max(sizes) // 2]}, n) for n in worlds}
        found: dict[Any, list[dict[str, float]]] = {key: [] for key in cases}
        for _ in range(repeats):
            for key, (config, world_size) in cases.items():
                found[key].append(measure(ours, config, world_size))
                print(*key, f"{found[key][-1]['total_s']:.1f} s", file=sys.stderr, flush=True)
    median = {key: medians(results) for key, results in found.items()}
    columns = ("groups", "time", "of the line above", "gradients", "SVD", "peak above base")
    for kind, title in (("layers", "layers, 0.06 GiB"), ("ranks", "ranks, no budget")):
        print(row(title, columns))
        print("|---:|" + "---:|" * len(columns))
        before = None
        for (this_kind, number), m in median.items():
            if this_kind != kind:
                continue
            cells = [
                f"{m['groups']:.0f}",
                f"{m['total_s']:.2f} s",
                f"{m['total_s'] / before:.2f}" if before else "",
                f"{m['gradients_s']:.2f} s",
                f"{m['svd_s']:.2f} s",
                f"{m['peak_bytes'] / MIB:.0f} MiB",
            ]
            print(row(str(number), cells))
            before = m["total_s"]
        print()
    if not quick:
        runs = {f"{kind} {number}": results for (kind, number), results in found.items()}
        write_json(
            ROOT / "docs/benchmarks/scale.json",
            {
                "machine": machine(),
                "repeats": repeats,
                "config": SCALE,
                "config of layers": {"init_memory_gib": 0.06},
                "runs": runs,
            },
        )


def _model(folder: Path, num_layers: int) -> str:
    """A random Llama of the demo model's width."""
    demo = json.loads((demo_model_dir() / "config.json").read_text())
    write_llama(folder, {key: demo[key] for key in WIDTH} | {"num_hidden_layers": num_layers})
    return str(folder)


if __name__ == "__main__":
    run_as_rank(paper, ours)

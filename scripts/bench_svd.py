"""`scripts/bench.py svd`: the truncated SVD against torch.svd_lowrank and the exact SVD."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from bench_common import interleaved_medians, machine, write_json

from lorasb_ds.init import lanczos
from lorasb_ds.init.sharded_svd import truncated_svd

ROOT = Path(__file__).resolve().parent.parent
WANTED_ENERGY = 0.9999  # of the optimum, in no more time than svd_lowrank's
NITER = 10
LAYERS = (0, 3, 9, 14, 22, 29)
SYNTHETIC = ((2048, 2048), (4096, 4096), (4096, 11008))
QUICK = ((128, 96), (200, 300))


class Case(NamedTuple):
    kind: str  # "demo" or "synthetic"
    name: str
    out_features: int
    in_features: int
    M: torch.Tensor  # int8, the longer side first
    eigenvalues: torch.Tensor  # of MᵀM, fp64, descending


@click.command()
@click.option("--quick", is_flag=True, help="Two small synthetic shapes: a smoke test.")
@click.option("--r", "ranks", type=int, multiple=True, default=(16, 96), show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--exact-svd-up-to", type=int, default=2048, show_default=True, metavar="SIDE")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=ROOT / "docs" / "benchmarks" / "svd.json",
    help="Where the numbers go.  [default: docs/benchmarks/svd.json]",
)
def svd(quick: bool, ranks: tuple[int, ...], threads: int, exact_svd_up_to: int, out: Path) -> None:
    """Time and captured energy of the truncated SVD, on sign matrices.

    Sign gradients of the demo model, and signs of a decaying spectrum plus noise. Ratios of times
    are to torch.svd_lowrank(q=r, niter=10) on the matrix in fp32, in the same run; the loss is what
    is missing of the best rank-r energy.
    """
    torch.set_num_threads(threads)
    records: list[dict[str, Any]] = []
    print(HEADER, flush=True)
    for cases in [synthetic(QUICK)] if quick else [demo_model(), synthetic(SYNTHETIC)]:
        group: list[dict[str, Any]] = []
        for case in cases:
            if group and shape_of(group[0]) != (case.out_features, case.in_features):
                print_group(group, ranks)
                group = []
            exact_ms = exact_svd_ms(case, exact_svd_up_to) if not group else None
            for r in ranks:
                group.append(measure(case, r, exact_ms))
            records += group[-len(ranks) :]
        print_group(group, ranks)
    missed = [record for record in records if not record["met"]]
    print(f"\n{len(records) - len(missed)} of {len(records)} meet both targets.")
    for record in missed:
        points = [record["auto"], *record["frontier"]]  # gram's, krylov's
        print(f"missed: {record['name']}, r = {record['r']}; ratio and loss, then the frontier:")
        print("   ", "; ".join(f"{point['ratio']:.2f} {point['loss']:.0e}" for point in points))
    write_json(out, {"machine": machine(), "niter": NITER, "records": records})


def measure(case: Case, r: int, exact_ms: float | None) -> dict[str, Any]:
    M, whole = case.M, case.M.float()
    n = M.shape[1]
    repeats = 24 if n < 1000 else 6
    ways = {
        "svd_lowrank": lambda: torch.svd_lowrank(whole, q=r, niter=NITER),
        "auto": lambda: truncated_svd(M, r),
        "krylov": lambda: truncated_svd(M, r, method="krylov"),
    }
    if n < 1000:  # the Gram matrix's eigenvectors take seconds beyond
        ways["gram"] = lambda: truncated_svd(M, r, method="gram")
    seconds = interleaved_medians(ways, repeats)
    record: dict[str, Any] = {
        "kind": case.kind,
        "name": case.name,
        "out_features": case.out_features,
        "in_features": case.in_features,
        "r": r,
        "repeats": repeats,
        "best_energy": (case.eigenvalues[:r].sum() / case.eigenvalues.sum()).item(),
        "exact_svd_ms": exact_ms,
    }
    for name, run in ways.items():
        record[name] = {
            "ms": seconds[name] * 1e3,
            "ratio": seconds[name] / seconds["svd_lowrank"],
            "loss": loss(case, run(), name == "svd_lowrank"),
        }
    auto = record["auto"]
    record["met"] = auto["loss"] <= 1 - WANTED_ENERGY and auto["ratio"] <= 1
    if not record["met"]:
        record["frontier"] = frontier(case, r, ways)
    return record


def loss(case: Case, found: Any, transposed: bool = False) -> float:
    """Return the fraction of the best energy that ``‖Uᵀ M V‖²`` lacks, for the bases as given."""
    U, V = found[0].double(), found[2].double()
    V = V if transposed else V.T
    kept = (U.T @ case.M.double() @ V).square().sum()
    r = U.shape[1]
    return 1 - (kept / case.eigenvalues[:r].sum()).item()


def frontier(case: Case, r: int, ways: dict[str, Callable[[], Any]]) -> list[dict[str, Any]]:
    """Time to svd_lowrank's, and loss, with other places to stop."""
    points = []
    usual = lanczos.ENERGY_TOLERANCE
    for method in sorted(ways.keys() & {"gram", "krylov"}):
        for tolerance in (8e-6, 8e-5, 8e-4, 8e-3):
            lanczos.ENERGY_TOLERANCE = tolerance
            both = {name: ways[name] for name in (method, "svd_lowrank")}
            seconds = interleaved_medians(both, repeats=12)
            points.append(
                {
                    "method": method,
                    "tolerance": tolerance,
                    "ratio": seconds[method] / seconds["svd_lowrank"],
                    "loss": loss(case, ways[method]()),
                }
            )
    lanczos.ENERGY_TOLERANCE = usual
    return points


def exact_svd_ms(case: Case, up_to: int) -> float | None:
    if case.M.shape[1] > up_to:
        return None
    whole = case.M.float()
    repeats = 3 if case.M.shape[1] < 1000 else 1
    ways = {"svd": lambda: torch.linalg.svd(whole, full_matrices=False)}
    return interleaved_medians(ways, repeats)["svd"] * 1e3


def as_case(kind: str, name: str, signs: torch.Tensor) -> Case:
    M = signs if signs.shape[0] >= signs.shape[1] else signs.T
    M = M.to(torch.int8).contiguous()
    # Sums of signs: exact in fp32 and cast without loss.
    gram = (M.float().T @ M.float()).double()
    return Case(kind, name, *signs.shape, M, torch.linalg.eigvalsh(gram).flip(0).clamp_min(0))


def synthetic(shapes: tuple[tuple[int, int], ...]) -> Iterator[Case]:
    """Signs of 256 directions whose strength falls like 1/sqrt(i), and as much noise."""
    for out_features, in_features in shapes:
        generator = torch.Generator().manual_seed(0)
        scale = torch.arange(1, 257).rsqrt()
        left = torch.randn(out_features, 256, generator=generator) * scale
        signal = left @ torch.randn(256, in_features, generator=generator)
        noise = torch.randn(out_features, in_features, generator=generator)
        signs = (signal / signal.square().mean().sqrt() + noise).sign()
        yield as_case("synthetic", f"{out_features} x {in_features}", signs)


def demo_model() -> Iterator[Case]:
    """Sign gradients of some layers of the demo model on 16 short rows, shape after shape."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM

    from lorasb_ds.config.paths import demo_model_dir
    from lorasb_ds.models.base import Base

    folder = demo_model_dir()
    if not (folder / "config.json").is_file():
        raise click.ClickException(f"{folder} is missing: run scripts/setup.sh, or give --quick")
    tokenizer = Base(str(folder)).tokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for i in range(16):
        total = 17 + 5 * i
        text = (
            f"Question: A box holds {total} pens and {i + 2} of them are blue. "
            f"How many are not blue?\nAnswer: {total} - {i + 2} = {total - i - 2}."
        )
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        (model(input_ids=ids, labels=ids).loss / 16).backward()
    weights = {
        name: weight.grad.sign()
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and "_proj" in name and any(f".{i}." in name for i in LAYERS)
    }
    del model
    for shape in sorted({tuple(signs.shape) for signs in weights.values()}):
        for name, signs in weights.items():
            if tuple(signs.shape) == shape:
                yield as_case("demo", name.removesuffix(".weight"), signs)


HEADER = f"""\
Ratios: time to that of svd_lowrank(q=r, niter={NITER}), median (largest) over layers.
Losses: largest over layers.
                               |   svd_lowrank    |       lorasb_ds        | forced ratio  | exact
matrix              layers   r |      ms     loss |        ratio      loss | krylov   gram | ms"""


def shape_of(record: dict[str, Any]) -> tuple[int, int]:
    return record["out_features"], record["in_features"]


def print_group(group: list[dict[str, Any]], ranks: tuple[int, ...]) -> None:
    """The records of one shape, a line for each r."""
    for r in ranks:
        rows = [record for record in group if record["r"] == r]

        def column(way: str, key: str, rows: list[dict[str, Any]] = rows) -> list[float]:
            return [record[way][key] for record in rows if way in record]

        lowrank_ms, ratios = column("svd_lowrank", "ms"), column("auto", "ratio")
        lowrank_loss, loss = max(column("svd_lowrank", "loss")), max(column("auto", "loss"))
        krylov, gram = column("krylov", "ratio"), column("gram", "ratio")
        gram_text = f"{statistics.median(gram):.2f}" if gram else ""
        exact = rows[0]["exact_svd_ms"]
        print(
            f"{rows[0]['kind']:9} {rows[0]['out_features']:>5}x{rows[0]['in_features']:<5}"
            f"{len(rows):6} {r:3} | "
            f"{statistics.median(lowrank_ms):7.1f} {lowrank_loss:8.1e} | "
            f"{statistics.median(ratios):5.2f} ({max(ratios):.2f}) {loss:9.1e} | "
            f"{statistics.median(krylov):6.2f} {gram_text:>6} | "
            + (f"{exact:.0f}" if exact else ""),
            flush=True,
        )

"""Merging an adapter into its base: memory and time of ``lorasb merge``, against PEFT's own way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from bench_common import ROOT, machine, medians, print_table, row, run_as_rank, write_json
from bench_load import QUICK, SHAPE
from bench_memory import status_of
from bench_model import read_once, write_llama
from safetensors import safe_open
from safetensors.torch import save_file

MB = 1e6
R = 64
INTERVAL_S = 0.01
# Of PEFT's, at most.
WANTED = {"peak_bytes": 0.15, "whole_seconds": 0.7}


class Case(NamedTuple):
    way: str
    bits: int = 16
    num_procs: int = 1

    def __str__(self) -> str:
        kind = "bf16" if self.bits == 16 else f"{self.bits}-bit"
        processes = f", {self.num_procs} processes" if self.num_procs > 1 else ""
        return f"{self.way}, {kind}{processes}"


OURS, PEFT = Case("lorasb"), Case("PEFT")
CASES = [OURS, PEFT, Case("lorasb", bits=4), Case("lorasb", num_procs=2)]


def merged(settings: dict[str, Any], out: str) -> None:
    """A process of its own: merge in one way; seconds and memory of its work and of its imports."""
    from launcher.workers.quiet import quiet_libraries

    quiet_libraries()
    if settings["way"] == OURS.way:
        from lorasb_ds.export.adapter_reader import read_adapter
        from lorasb_ds.export.merge import merge_adapter
    else:
        import transformers.models.llama.modeling_llama
        from peft import PeftModel
    imports, start = status_of(os.getpid())["VmHWM"], time.perf_counter()
    model, adapter, folder = settings["model"], settings["adapter"], Path(settings["folder"])
    if settings["way"] == OURS.way:
        merge_adapter(
            read_adapter(adapter),
            model,
            folder,
            load_in_4bit=settings["bits"] == 4,
            num_procs=settings["num_procs"],
            say=lambda _: None,
        )
    else:
        kind = transformers.AutoModelForCausalLM
        base = kind.from_pretrained(model, dtype=torch.bfloat16)
        PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    seconds = time.perf_counter() - start
    own = {"own_peak_bytes": status_of(os.getpid())["VmHWM"], "imports_bytes": imports}
    Path(out).write_text(json.dumps(own | {"seconds": seconds}))


def measured(case: Case, model: Path, adapter: Path, folder: Path) -> dict[str, float]:
    """A case in a fresh process, watched with all that it starts.

    Returns:
        whole_seconds, from the process's start to its end; seconds, of the work in it;
        peak_bytes: of all memory: as the kernel keeps it, or of several processes their sum,
        sampled (in which files that they both map count twice); above_imports_bytes: what of it
        came after the first process's imports; anon_peak_bytes: of anonymous memory, sampled.
    """
    shutil.rmtree(folder, ignore_errors=True)
    read_once(model)  # reads are from the page cache, in every case
    os.sync()  # no case writes what an earlier one has left to be written
    settings = case._asdict() | {"model": str(model), "adapter": str(adapter)}
    settings["folder"] = str(folder)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    environment["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    peaks = {"VmRSS": 0, "RssAnon": 0}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        command = [sys.executable, __file__, merged.__name__, json.dumps(settings), str(out)]
        start = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                family = [status_of(pid) for pid in _family(process.pid)]
                for key, peak in peaks.items():
                    peaks[key] = max(peak, sum(status.get(key, 0) for status in family))
                time.sleep(INTERVAL_S)
        seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(f"{case} failed")
        found = json.loads(out.read_text())
    peak = peaks["VmRSS"] if case.num_procs > 1 else found["own_peak_bytes"]
    return {
        "whole_seconds": seconds,
        "seconds": found["seconds"],
        "peak_bytes": peak,
        "above_imports_bytes": peak - found["imports_bytes"],
        "anon_peak_bytes": peaks["RssAnon"],
        "imports_bytes": found["imports_bytes"],
    }


def _family(pid: int) -> list[int]:
    """Return a process and its descendants that still exist."""
    found = [pid]
    for parent in found:  # which grows
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in file.read_text().split()]
            except OSError:
                continue
    return found


def write_adapter(folder: Path, model: Path) -> None:
    """Random fp32 factors for all linear layers but the head, as PEFT would store them."""
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM

    from lorasb_ds.adapters.peft_writer import peft_tensors

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    generator = torch.Generator().manual_seed(0)
    factors: dict[str, torch.Tensor] = {}
    for name, layer in base.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer is not base.get_output_embeddings():
            A = torch.randn(R, layer.in_features, generator=generator)
            B = torch.randn(layer.out_features, R, generator=generator)
            factors |= peft_tensors(name, A / layer.in_features**0.5, B * 1e-3)
    targets = sorted({key.split(".")[-3] for key in factors})
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=R,
        lora_alpha=2 * R,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(model),
    ).save_pretrained(folder)


def differences(ours: Path, theirs: Path) -> dict[str, float]:
    """Compare two bf16 folders: the fraction of numbers that differ, and the most steps apart."""
    where = {name: file for file in theirs.glob("*.safetensors") for name in _names(file)}
    total = different = largest = 0
    for file in sorted(ours.glob("*.safetensors")):
        for name in _names(file):
            a, b = (_ordered(path, name) for path in (file, where[name]))
            total += a.numel()
            different += int((a != b).sum())
            largest = max(largest, int((a - b).abs().max()))
    return {"different_share": different / total, "largest_ulps": largest}


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _ordered(file: Path, name: str) -> torch.Tensor:
    """Return the bits of a bf16 tensor as integers, in the order of the numbers."""
    with safe_open(file, "pt") as opened:
        bits = opened.get_tensor(name).view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@click.command("merge")
@click.option("--repeats", default=3, show_default=True)
@click.option("--model-dir", type=Path, help="Where the checkpoint (3 GB) is kept, or made.")
@click.option("--out", type=Path, default=ROOT / "docs/benchmarks/merge.json", show_default=True)
@click.option("--quick", is_flag=True, help="A tiny model, once: whether it runs.")
def main(repeats: int, model_dir: Path | None, out: Path, quick: bool) -> None:
    """A model of 1.5e9 parameters with factors of r = 64 in all linear layers."""
    shape, repeats = (QUICK, 1) if quick else (SHAPE, repeats)
    runs: dict[Case, list[dict[str, float]]] = {case: [] for case in CASES}
    # Beside the model: where it has room.
    with tempfile.TemporaryDirectory(dir=model_dir.parent if model_dir else None) as scratch:
        model, adapter = model_dir or Path(scratch) / "base", Path(scratch) / "adapter"
        write_llama(model, shape)
        write_adapter(adapter, model)
        folders = {case: Path(scratch) / f"out{i}" for i, case in enumerate(CASES)}
        load = os.getloadavg()[0]
        for _ in range(repeats):  # in turn: a busy machine slows all alike
            for case in CASES:
                runs[case].append(measured(case, model, adapter, folders[case]))
                seconds = runs[case][-1]["whole_seconds"]
                print(f"{case}: {seconds:.1f} s", file=sys.stderr, flush=True)
        compared = differences(folders[OURS], folders[PEFT])
    found = {case: medians(of_case) for case, of_case in runs.items()}
    _print(found, compared)
    ratios = {key: found[OURS][key] / found[PEFT][key] for key in WANTED}
    write_json(
        out,
        {
            "machine": machine(),
            "load_before": load,
            "repeats": repeats,
            "shape": shape,
            "r": R,
            "runs": {str(case): of_case for case, of_case in runs.items()},
            "compared": compared,
            "targets": [
                {"what": key, "wanted": limit, "reached": ratios[key], "met": ratios[key] <= limit}
                for key, limit in WANTED.items()
            ],
        },
    )


def _print(found: Mapping[Case, Mapping[str, float]], compared: Mapping[str, float]) -> None:
    def cells(numbers: Mapping[str, float], key: str, unit: float, form: str) -> list[str]:
        ratio = numbers[key] / found[PEFT][key]
        return [f"{numbers[key] / unit:{form}}", f"{ratio:.2f}x"]

    columns = {"peak_bytes": "peak, MB", "above_imports_bytes": "above the imports"}
    columns |= {"anon_peak_bytes": "anonymous peak"}
    times = {"whole_seconds": "whole, s", "seconds": "without imports"}
    heads = [head for column in (columns | times).values() for head in (column, "of PEFT's")]
    rows = {}
    for case, numbers in found.items():
        rows[str(case)] = [c for key in columns for c in cells(numbers, key, MB, ".0f")]
        rows[str(case)] += [c for key in times for c in cells(numbers, key, 1, ".1f")]
    print_table("merge", heads, rows)
    print(
        f"\nOf all numbers {compared['different_share']:.2e} differ from PEFT's, by at most "
        f"{compared['largest_ulps']:.0f} bf16 steps."
    )
    print("\n" + row("wanted", ["at most, of PEFT's", "reached", ""]))
    print("|---|---:|---:|---|")
    for key, limit in WANTED.items():
        reached = found[OURS][key] / found[PEFT][key]
        verdict = "met" if reached <= limit else "**missed**"
        print(row((columns | times)[key], [f"{limit:.2f}x", f"{reached:.3f}x", verdict]))


if __name__ == "__main__":
    run_as_rank(merged)

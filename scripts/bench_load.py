"""Loading a base: memory, bytes read and time of each rank, against transformers' own ways."""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from bench_common import ROOT, machine, measure, row, run_as_rank, write_json
from bench_memory import held, held_bytes, watched
from bench_model import read_once, write_llama

MB = 1e6
# 23 of Llama-3.2-1B's decoder blocks: 1.50e9 parameters with the demo's vocabulary.
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 23,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
QUICK = SHAPE | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
QUICK |= {"num_attention_heads": 4, "num_key_value_heads": 2}
OURS, ORDINARY, SHARDED = "load_base", "from_pretrained", "HfDeepSpeedConfig"


class Case(NamedTuple):
    way: str
    bits: int
    stage: int  # of ZeRO
    ranks: int

    def __str__(self) -> str:
        kind = "bf16" if self.bits == 16 else f"{self.bits}-bit"
        form = "ZeRO-3" if self.stage == 3 else "whole"
        return f"{self.way}, {kind} {form}, {self.ranks} rank{'s' if self.ranks > 1 else ''}"


CASES = [
    *(Case(OURS, 16, stage, ranks) for stage, ranks in ((2, 1), (3, 1), (3, 2), (3, 4))),
    *(Case(OURS, 4, stage, ranks) for stage, ranks in ((2, 1), (2, 2), (3, 2), (3, 4))),
    Case(OURS, 8, 2, 1),
    *(Case(ORDINARY, bits, 2, ranks) for bits in (16, 4) for ranks in (1, 2, 4)),
    Case(ORDINARY, 8, 2, 1),
    *(Case(SHARDED, 16, 3, ranks) for ranks in (1, 2, 4)),
]
QUICK_CASES = [Case(OURS, 16, 2, 1), Case(OURS, 16, 3, 2), Case(OURS, 4, 2, 1)]
QUICK_CASES += [Case(ORDINARY, 16, 2, 1)]


def load(settings: dict[str, Any], out: str) -> None:
    """One rank: load the model in one way; the first writes what each of them found."""
    from launcher.workers.quiet import quiet_libraries

    quiet_libraries()
    # What a way would import only while it loads is no memory of its weights.
    import bitsandbytes  # noqa: F401
    import torch.distributed as dist
    import transformers.integrations.deepspeed
    import transformers.models.llama.modeling_llama  # noqa: F401

    from lorasb_ds.distributed import zero
    from lorasb_ds.models import loading  # noqa: F401

    zero.init_process_group()
    dist.barrier()
    model, found = watched(lambda: _loaded(**settings))
    found["held_bytes"] = held_bytes(model.parameters())
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, found)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(of_all))
    zero.close_process_group()


def _loaded(model: str, way: str, bits: int, stage: int) -> Any:
    """Return the model with every page of its weights in memory: mapped pages are not loaded."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import HfDeepSpeedConfig

    from lorasb_ds.config.ds_config import resolve_ds_config
    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.models.base import Base
    from lorasb_ds.models.loading import load_base

    given: dict[str, Any] = {
        "model": model,
        "ds_config": str(ROOT / f"ds_configs/zero{stage}.json"),
    }
    if way == OURS and bits < 16:
        given[f"load_in_{bits}bit"] = True
    ds_config, config = resolve_ds_config(load_run_config(given), dist.get_world_size())
    if way == OURS:
        loaded = load_base(Base(config.model), config, ds_config)
    else:
        alive = HfDeepSpeedConfig(ds_config) if way == SHARDED else None
        options: dict[str, Any] = {"dtype": torch.bfloat16}
        if bits < 16:
            options["device_map"] = {"": "cpu"}
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=bits == 4,
                load_in_8bit=bits == 8,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        loaded = AutoModelForCausalLM.from_pretrained(model, **options)
        del alive
    for weight in loaded.parameters():
        held(weight).flatten().view(torch.uint8)[::4096].sum()
    return loaded


def summary(runs: list[list[dict[str, float]]]) -> dict[str, float]:
    """Return medians over runs, of the rank with most; bytes read are summed over ranks."""
    result = {}
    for name in runs[0][0]:
        over_ranks = sum if name == "read_bytes" else max
        result[name] = statistics.median(over_ranks(rank[name] for rank in run) for run in runs)
    return result


def targets(found: Mapping[Case, Mapping[str, float]], block: int) -> list[dict[str, Any]]:
    """Compare each case of load_base with its target.

    A shard's target is its share of the whole model's parameters, even if a rank holds more.

    Args:
        block: bytes of a decoder block in bf16.
    """
    records = []
    for case, reached in found.items():
        if case.way != OURS:
            continue
        wanted = {"mapped_peak_bytes": 50 * MB}
        if case.stage == 3 and (whole := found.get(Case(OURS, case.bits, 2, 1))):
            whole_bytes = whole["held_bytes"]
            wanted["anon_peak_bytes"] = whole_bytes / case.ranks + 2 * block + 150 * MB
            if case.ranks > 1:
                wanted["anon_after_bytes"] = {2: 0.55, 4: 0.3}[case.ranks] * whole_bytes
        if ordinary := found.get(Case(ORDINARY, case.bits, 2, case.ranks)):
            wanted["seconds"] = ordinary["seconds"]
        for name, limit in wanted.items():
            record = {"case": str(case), "what": name, "wanted": limit, "reached": reached[name]}
            records.append(record | {"met": reached[name] <= limit})
    return records


@click.command("load")
@click.option("--repeats", default=3, show_default=True)
@click.option("--model-dir", type=Path, help="Where the checkpoint (3 GB) is kept, or made.")
@click.option("--cases", default="", help="Only those whose name holds this regular expression.")
@click.option("--out", type=Path, default=ROOT / "docs/benchmarks/load.json", show_default=True)
@click.option("--quick", is_flag=True, help="A tiny model, few cases, once: whether it runs.")
def main(repeats: int, model_dir: Path | None, cases: str, out: Path, quick: bool) -> None:
    """A model of 1.5e9 parameters: plain, in ZeRO-3 shards, quantized, and both."""
    shape, repeats = (QUICK, 1) if quick else (SHAPE, repeats)
    chosen = [case for case in (QUICK_CASES if quick else CASES) if re.search(cases, str(case))]
    runs: dict[Case, list[list[dict[str, float]]]] = {case: [] for case in chosen}
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_dir or Path(scratch)
        write_llama(folder, shape)
        block = min(folder.glob("*.safetensors")).stat().st_size
        for _ in range(repeats):  # in turn: a busy machine slows all alike
            for case in chosen:
                read_once(folder)  # reads are from the page cache, in every case
                settings = {"model": str(folder), "way": case.way}
                settings |= {"bits": case.bits, "stage": case.stage}
                runs[case].append(measure(load, settings, case.ranks))
                seconds = runs[case][-1][0]["seconds"]
                print(f"{case}: {seconds:.1f} s", file=sys.stderr, flush=True)
    found = {case: summary(results) for case, results in runs.items()}
    columns = {
        "held_bytes": "parameters held",
        "anon_peak_bytes": "anonymous peak",
        "anon_after_bytes": "stays",
        "mapped_peak_bytes": "mapped files' peak",
        "peak_bytes": "peak of all",
        "read_bytes": "read, all ranks",
    }
    print(row("MB, of the rank with most", [*columns.values(), "time"]))
    print("|---|" + "---:|" * (len(columns) + 1))
    for case, numbers in found.items():
        cells = [f"{numbers[name] / MB:.0f}" for name in columns]
        print(row(str(case), [*cells, f"{numbers['seconds']:.1f} s"]))
    records = targets(found, block)
    print(f"\ntwo decoder blocks: {2 * block / MB:.0f} MB\n")
    print(row("wanted", ["what", "at most", "reached", ""]))
    print("|---|---|---:|---:|---|")
    for record in records:
        scale = 1 if record["what"] == "seconds" else MB
        numbers = (f"{record[key] / scale:.1f}" for key in ("wanted", "reached"))
        verdict = "met" if record["met"] else "**missed**"
        print(row(record["case"], [columns.get(record["what"], "time, s"), *numbers, verdict]))
    print(f"\n{sum(record['met'] for record in records)} of {len(records)} met")
    write_json(
        out,
        {
            "machine": machine(),
            "repeats": repeats,
            "shape": shape,
            "block_bytes": block,
            "runs": {str(case): results for case, results in runs.items()},
            "targets": records,
        },
    )


if __name__ == "__main__":
    run_as_rank(load)

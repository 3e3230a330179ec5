"""The training step: what adapters add to the frozen base, whole steps against TRL's trainer, what
ZeRO-3 sends, and how often a quantized weight is dequantized."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
from bench_common import ROOT, machine, write_json
from bench_layers import LENGTH, bench_layers
from bench_model import write_llama
from bench_run import DATA, R
from bench_traffic import bench_quantized, bench_zero3
from bench_trainers import bench_trainers

# Four decoder blocks of Llama 2's proportions without embeddings and head: r (in + out) is 0.049 of
# in x out at r = 64.
STACK = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
QUICK = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
QUICK |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@click.command("step")
@click.option("--repeats", default=5, show_default=True, help="Of passes.")
@click.option("--only", type=click.Choice(["layers", "trainers", "zero3", "quantized"]))
@click.option("--out", type=Path, default=ROOT / "docs/benchmarks/step.json", show_default=True)
@click.option("--quick", is_flag=True, help="Tiny models, few cases, once: whether it runs.")
def main(repeats: int, only: str | None, out: Path, quick: bool) -> None:
    """Adapters against the frozen base and PEFT, whole steps against TRL, ZeRO-3's traffic."""
    from lorasb_ds.config.paths import demo_model_dir

    found: dict[str, Any] = {"machine": machine(), "quick": quick}
    with tempfile.TemporaryDirectory() as folder:
        stack = QUICK if quick else STACK
        write_llama(Path(folder), stack | {"tie_word_embeddings": True})
        config = {"model": folder, "data": DATA.format(8), "r": 8 if quick else R}
        config |= {"micro_batch_size": 2, "max_length": LENGTH, "init_samples": 8}
        if only in (None, "layers"):
            found["layers"] = bench_layers(stack, 1 if quick else repeats, quick)
        if only in (None, "trainers"):
            model = folder if quick else str(demo_model_dir())
            found["trainers"] = bench_trainers(1, quick, model)
        if only in (None, "zero3"):
            zero_config = {"ds_config": str(ROOT / "ds_configs/zero3.json")}
            found["zero3"] = bench_zero3(quick, config | zero_config)
        if only in (None, "quantized"):
            found["quantized"] = bench_quantized(quick, config)
    write_json(out, found)

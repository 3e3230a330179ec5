"""The training step: what adapters add to the frozen base, whole steps against TRL's trainer, what
ZeRO-3 sends, and how often a quantized weight is dequantized."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from bench_common import ROOT, interleaved_medians, machine, measure, row, run_as_rank, write_json
from bench_memory import watched
from bench_model import write_llama

MIB = 1 << 20
R, LENGTH = 64, 512
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
BASE, OURS, FORMULA = "frozen base", "LoRA-SB", "LoRA-SB, plain formula"
PEFT, PEFT_BF16 = "PEFT LoRA", "PEFT LoRA, bf16 factors"
WAYS = (BASE, OURS, FORMULA, PEFT, PEFT_BF16)
DATA = "reasoning-gym:gsm_symbolic?size={}&seed=5"
TRL, TRL_BF16 = "SFTTrainer, as documented", "SFTTrainer, base in bf16"
TRL_PLAIN = "SFTTrainer, base in bf16, no checkpointing"
LORASB, LORASB_CHECKPOINTED = "lorasb", "lorasb, checkpointing"
NO_PREFETCH = {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0}
TRAINERS = (LORASB, LORASB_CHECKPOINTED, TRL, TRL_BF16, TRL_PLAIN)


# The layer: adapters against the frozen base.


def _model(name: str, dtype: str, stack: Mapping[str, int]) -> Any:
    """The demo model with its head, or the stack: decoder blocks alone."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel

    from lorasb_ds.config import demo_model_dir

    kind = getattr(torch, dtype)
    if name == "demo":
        return AutoModelForCausalLM.from_pretrained(demo_model_dir(), dtype=kind)
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(vocab_size=8, **stack)).to(kind)


def _with_adapters(model: Any, way: str) -> Any:
    from peft import LoraConfig, get_peft_model

    from lorasb_ds.adapter import inject, linear_layers

    model.requires_grad_(False)
    if way in (PEFT, PEFT_BF16):
        config = LoraConfig(r=R, lora_alpha=R, target_modules="all-linear")
        return get_peft_model(model, config, autocast_adapter_dtype=way == PEFT)
    if way in (OURS, FORMULA):
        for adapter in inject(model, linear_layers(model), R, model.dtype).values():
            for factor in (adapter.lora_A, adapter.lora_B, adapter.lora_R):
                torch.nn.init.normal_(factor, std=0.01)
            if way == FORMULA:
                adapter._has_plain_base = False  # falls back to it
    return model


def _pass(model: Any, has_head: bool) -> Callable[[], None]:
    """Forward, and backward to the inputs and the adapters; with a head all logits are made."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, LENGTH, model.config.hidden_size)
    inputs = torch.randn(shape, generator=generator).to(model.dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(model.dtype)
    labels = torch.randint(model.config.vocab_size, (1, LENGTH), generator=generator)
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        if has_head:
            model(inputs_embeds=inputs, labels=labels, use_cache=False).loss.backward()
        else:
            output = model(inputs_embeds=inputs, use_cache=False)
            output.last_hidden_state.backward(grad)
        inputs.grad = None
        for p in trained:
            p.grad = None

    return run


def layers(settings: dict[str, Any], out: str) -> None:
    """Seconds of a pass with each kind of adapter, in turn."""
    torch.set_num_threads(settings["threads"])
    name, dtype, stack = settings["model"], settings["dtype"], settings["stack"]
    passes = {
        way: _pass(_with_adapters(_model(name, dtype, stack), way), name == "demo")
        for way in _ways(dtype)
    }
    seconds = interleaved_medians(passes, settings["repeats"])
    shapes = _target_shapes(_model(name, dtype, stack))
    arithmetic = sum(R * (o + i) for o, i in shapes) / sum(o * i for o, i in shapes)
    Path(out).write_text(json.dumps({"seconds": seconds, "arithmetic": arithmetic}))


def peak(settings: dict[str, Any], out: str) -> None:
    """Peak memory of three passes above the loaded model, in a process of their own."""
    import torch.distributed as dist

    torch.set_num_threads(settings["threads"])
    dist.init_process_group("gloo")
    model = _model(settings["model"], settings["dtype"], settings["stack"])
    run = _pass(_with_adapters(model, settings["way"]), settings["model"] == "demo")
    _, found = watched(lambda: [run() for _ in range(3)])
    Path(out).write_text(json.dumps(found))


def _ways(dtype: str) -> tuple[str, ...]:
    return WAYS if dtype == "bfloat16" else (BASE, OURS, PEFT)


def _target_shapes(model: Any) -> list[tuple[int, int]]:
    from lorasb_ds.adapter import linear_layers

    return list(linear_layers(model).values())


# Whole steps of training, against TRL.


def trainer(settings: dict[str, Any], out: str) -> None:
    """Seconds and label-bearing rows' real tokens of optimizer steps, and their peak memory."""
    from launcher.quiet import quiet_libraries

    quiet_libraries()
    ours = settings["way"] in (LORASB, LORASB_CHECKPOINTED)
    found = _ours(settings) if ours else _trl(settings)
    Path(out).write_text(json.dumps(found))


def _run_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    steps, rows = settings["steps"], settings["rows"]
    return {
        "model": settings["model"],
        "data": DATA.format((steps + 1) * rows),
        "r": R,
        "micro_batch_size": rows,
        "max_length": 1024,
        "gradient_checkpointing": settings["way"] == LORASB_CHECKPOINTED,
        "init_samples": 8,
        "ds_config": str(ROOT / "ds_configs/zero2.json"),
    }


def _ours(settings: Mapping[str, Any]) -> dict[str, Any]:
    from lorasb_ds import zero
    from lorasb_ds.loop import train_step
    from lorasb_ds.prepare import prepare
    from lorasb_ds.request import load_run_config
    from lorasb_ds.trainer import start_engine

    run = prepare(load_run_config(_run_config(settings)), 1)
    zero.init_process_group()
    engine, adapters = start_engine(run)
    _fill(adapters)
    engine.train()
    seconds, tokens, places = [], [], []

    def steps() -> None:
        for number in range(run.num_steps):
            batches = run.step_batches(run.order.units(number))
            start = time.perf_counter()
            done = train_step(engine, batches)
            seconds.append(time.perf_counter() - start)
            assert done is not None
            tokens.append(done.num_tokens)
            places.append(done.num_places)

    _, memory = watched(steps)
    zero.close_process_group()
    return {**memory, "seconds": seconds, "tokens": tokens, "places": places}


def _fill(adapters: Mapping[str, Any]) -> None:
    """Orthonormal A and B, and a small R: what they hold does not change what a step takes."""
    from lorasb_ds import zero

    for adapter in adapters.values():
        for factor in (adapter.lora_A, adapter.lora_B):
            shape = getattr(factor, "ds_shape", factor.shape)
            zero.fill(factor, torch.nn.init.orthogonal_(torch.empty(*shape)))
        zero.fill_trainable(adapter.lora_R, 1e-3 * torch.eye(adapter.r))


def _trl(settings: Mapping[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from lorasb_ds.examples import IGNORE_INDEX
    from lorasb_ds.prepare import prepare
    from lorasb_ds.request import load_run_config

    # The same rows, tokenized by the same template.
    run = prepare(load_run_config(_run_config(settings)), 1)
    rows = {
        "input_ids": [list(e.input_ids) for e in run.train.examples],
        "completion_mask": [[int(t != IGNORE_INDEX) for t in e.labels] for e in run.train.examples],
    }
    seconds, tokens, places = [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    class Counted(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            tokens.append(int(inputs["attention_mask"].sum()))
            places.append(inputs["attention_mask"].numel())
            return super().training_step(model, inputs, *args, **kwargs)

    options: dict[str, Any] = {}
    if settings["way"] != TRL:
        options["model_init_kwargs"] = {"dtype": "bfloat16"}
    if settings["way"] == TRL_PLAIN:
        options["gradient_checkpointing"] = False
    with tempfile.TemporaryDirectory() as folder:
        sft = Counted(
            settings["model"],
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=settings["rows"],
                num_train_epochs=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                **options,
            ),
            train_dataset=Dataset.from_dict(rows),
            peft_config=LoraConfig(r=R, lora_alpha=R, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        _, memory = watched(sft.train)
    return {**memory, "seconds": seconds, "tokens": tokens, "places": places}


# What ZeRO-3 sends in a step, and what the adapters' own gathers take.


def zero3(settings: dict[str, Any], out: str) -> None:
    """One rank: seconds of steps, and collectives and bytes of one, by DeepSpeed's own counter.

    Settings: ``config`` of the run, ``zero`` to change in its ds_config, ``steps``.
    """
    from launcher.quiet import quiet_libraries

    quiet_libraries()
    import torch.distributed as dist
    from deepspeed.comm.comm import comms_logger

    from lorasb_ds import zero
    from lorasb_ds.loop import train_step
    from lorasb_ds.prepare import prepare
    from lorasb_ds.request import load_run_config
    from lorasb_ds.trainer import start_engine

    run = prepare(load_run_config(settings["config"]), int(os.environ["WORLD_SIZE"]))
    run.ds_config["zero_optimization"] |= settings["zero"]
    zero.init_process_group()
    engine, adapters = start_engine(run)
    _fill(adapters)
    engine.train()
    batches = run.step_batches(run.order.units(0))
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


# How often a weight is dequantized.


def quantized(settings: dict[str, Any], out: str) -> None:
    """Dequantizations of a weight in a step, and their share of its time."""
    from launcher.quiet import quiet_libraries

    quiet_libraries()
    from lorasb_ds import zero
    from lorasb_ds.loop import train_step
    from lorasb_ds.prepare import prepare
    from lorasb_ds.quantization import PackedLinear
    from lorasb_ds.request import load_run_config
    from lorasb_ds.trainer import start_engine

    run = prepare(load_run_config(settings["config"]), 1)
    zero.init_process_group()
    engine, adapters = start_engine(run)
    _fill(adapters)
    engine.train()
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
    batches = run.step_batches(run.order.units(0))
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


# The tables.


def _print_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    print("\n" + row(title, columns))
    print("|---|" + "---:|" * len(columns))
    for name, cells in rows.items():
        print(row(name, cells))


def bench_layers(repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Adapters against the frozen base: time of a pass, and its peak memory."""
    stack = QUICK if quick else STACK
    kinds = ("bfloat16",) if quick else ("bfloat16", "float32")
    results = []
    for model in ("stack",) if quick else ("stack", "demo"):
        for dtype in kinds:
            settings: dict[str, Any] = {"model": model, "dtype": dtype, "stack": stack}
            peaks = {
                way: measure(peak, settings | {"way": way, "threads": 2})["anon_peak_bytes"]
                for way in ((BASE, OURS) if quick else _ways(dtype))
            }
            for threads in (1,) if quick else (1, 2):
                given = settings | {"threads": threads, "repeats": repeats}
                found = measure(layers, given) | {"model": model, "dtype": dtype}
                found |= {"threads": threads, "peaks": peaks}
                results.append(found)
                _print_layers(found)
    return results


def _print_layers(found: Mapping[str, Any]) -> None:
    seconds, peaks = found["seconds"], found["peaks"]
    _print_table(
        f"{found['model']}, {found['dtype']}, {found['threads']} thread(s); arithmetic "
        f"{1 + found['arithmetic']:.3f}",
        ("time", "of the base's", "LoRA-SB's of it", "peak above the model"),
        {
            way: (
                f"{1e3 * seconds[way]:.0f} ms",
                f"{seconds[way] / seconds[BASE]:.3f}",
                f"{seconds[OURS] / seconds[way]:.2f}",
                f"{peaks[way] / MIB:.0f} MiB" if way in peaks else "",
            )
            for way in seconds
        },
    )


def bench_trainers(repeats: int, quick: bool, model: str) -> dict[str, Any]:
    """Whole steps against TRL's."""
    settings: dict[str, Any] = {
        "model": model,
        "steps": 1 if quick else 4,
        "rows": 2 if quick else 8,
    }
    ways = (LORASB, TRL_BF16) if quick else TRAINERS
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            found[way].append(measure(trainer, settings | {"way": way}))
            print(
                f"{way}: {_tokens_per_s(found[way][-1]):.0f} tokens/s", file=sys.stderr, flush=True
            )
    medians = {
        way: {
            "tokens_per_s": statistics.median(map(_tokens_per_s, runs)),
            "peak_bytes": statistics.median(run["anon_peak_bytes"] for run in runs),
            "padding": 1 - sum(runs[0]["tokens"]) / sum(runs[0]["places"]),
        }
        for way, runs in found.items()
    }
    ours = medians[LORASB]
    _print_table(
        "whole steps on the demo model",
        ("real tokens/s", "lorasb's of it", "peak above the model", "lorasb's of it", "padding"),
        {
            way: (
                f"{m['tokens_per_s']:.0f}",
                f"{ours['tokens_per_s'] / m['tokens_per_s']:.2f}",
                f"{m['peak_bytes'] / MIB:.0f} MiB",
                f"{ours['peak_bytes'] / m['peak_bytes']:.2f}",
                f"{m['padding']:.1%}",
            )
            for way, m in medians.items()
        },
    )
    return {"runs": found, "medians": medians}


def _tokens_per_s(run: Mapping[str, Any]) -> float:
    """Without the first step."""
    return sum(run["tokens"][1:]) / sum(run["seconds"][1:])


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
    _print_table("ZeRO-3, 2 ranks", (*columns, "A and B by themselves"), rows)
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
    _print_table(
        "base",
        ("step", "dequantizations of a weight", "share of the step"),
        {
            name: (f"{m['seconds']:.2f} s", f"{m['times']:.2f}", f"{m['share']:.1%}")
            for name, m in found.items()
        },
    )
    return found


@click.command("step")
@click.option("--repeats", default=5, show_default=True, help="Of passes.")
@click.option("--only", type=click.Choice(["layers", "trainers", "zero3", "quantized"]))
@click.option("--out", type=Path, default=ROOT / "docs/benchmarks/step.json", show_default=True)
@click.option("--quick", is_flag=True, help="Tiny models, few cases, once: whether it runs.")
def main(repeats: int, only: str | None, out: Path, quick: bool) -> None:
    """Adapters against the frozen base and PEFT, whole steps against TRL, ZeRO-3's traffic."""
    from lorasb_ds.config import demo_model_dir

    found: dict[str, Any] = {"machine": machine(), "quick": quick}
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), (QUICK if quick else STACK) | {"tie_word_embeddings": True})
        config = {"model": folder, "data": DATA.format(8), "r": 8 if quick else R}
        config |= {"micro_batch_size": 2, "max_length": LENGTH, "init_samples": 8}
        if only in (None, "layers"):
            found["layers"] = bench_layers(1 if quick else repeats, quick)
        if only in (None, "trainers"):
            model = folder if quick else str(demo_model_dir())
            found["trainers"] = bench_trainers(1, quick, model)
        if only in (None, "zero3"):
            zero_config = {"ds_config": str(ROOT / "ds_configs/zero3.json")}
            found["zero3"] = bench_zero3(quick, config | zero_config)
        if only in (None, "quantized"):
            found["quantized"] = bench_quantized(quick, config)
    write_json(out, found)


if __name__ == "__main__":
    run_as_rank(layers, peak, trainer, zero3, quantized)

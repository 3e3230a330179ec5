"""Adapters against the frozen base: time of a pass, and its peak memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_common import interleaved_medians, measure, print_table, run_as_rank
from bench_memory import watched
from bench_run import R

MIB = 1 << 20
LENGTH = 512
BASE, OURS, FORMULA = "frozen base", "LoRA-SB", "LoRA-SB, plain formula"
PEFT, PEFT_BF16 = "PEFT LoRA", "PEFT LoRA, bf16 factors"
WAYS = (BASE, OURS, FORMULA, PEFT, PEFT_BF16)


def _model(name: str, dtype: str, stack: Mapping[str, int]) -> Any:
    """The demo model with its head, or the stack: decoder blocks alone."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel

    from lorasb_ds.config.paths import demo_model_dir

    kind = getattr(torch, dtype)
    if name == "demo":
        return AutoModelForCausalLM.from_pretrained(demo_model_dir(), dtype=kind)
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(vocab_size=8, **stack)).to(kind)


def _with_adapters(model: Any, way: str) -> Any:
    from peft import LoraConfig, get_peft_model

    from lorasb_ds.adapters.inject import inject
    from lorasb_ds.models.linear_layers import linear_layers

    model.requires_grad_(False)
    if way in (PEFT, PEFT_BF16):
        config = LoraConfig(r=R, lora_alpha=R, target_modules="all-linear")
        return get_peft_model(model, config, autocast_adapter_dtype=way == PEFT)
    if way in (OURS, FORMULA):
        for adapter in inject(model, linear_layers(model), R, model.dtype).values():
            for factor in (adapter.lora_A, adapter.lora_B, adapter.lora_R):
                torch.nn.init.normal_(factor, std=0.01)
            if way == FORMULA:
                adapter.has_plain_base = False  # falls back to it
    return model


def _pass(model: Any, has_head: bool) -> Callable[[], None]:
    """Forward, and backward to the inputs and the adapters; with a head all logits are made."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, LENGTH, model.config.hidden_size)
    inputs = torch.randn(shape, generator=generator).to(model.device, model.dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(model.device, model.dtype)
    labels = torch.randint(model.config.vocab_size, (1, LENGTH), generator=generator)
    labels = labels.to(model.device)
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


def make_pass(way: str, settings: Mapping[str, Any]) -> Callable[[], None]:
    """Return a pass on this process's device, with a kind of adapter."""
    from lorasb_ds.distributed import accelerator

    name = settings["model"]
    model = _model(name, settings["dtype"], settings["stack"]).to(accelerator.device())
    return _pass(_with_adapters(model, way), name == "demo")


def layers(settings: dict[str, Any], out: str) -> None:
    """Seconds of a pass with each kind of adapter, in turn."""
    torch.set_num_threads(settings["threads"])
    name, dtype, stack = settings["model"], settings["dtype"], settings["stack"]
    passes = {way: make_pass(way, settings) for way in _ways(dtype)}
    seconds = interleaved_medians(passes, settings["repeats"])
    shapes = _target_shapes(_model(name, dtype, stack))
    arithmetic = sum(R * (o + i) for o, i in shapes) / sum(o * i for o, i in shapes)
    Path(out).write_text(json.dumps({"seconds": seconds, "arithmetic": arithmetic}))


def peak(settings: dict[str, Any], out: str) -> None:
    """Peak memory of three passes above the loaded model, in a process of their own."""
    import torch.distributed as dist

    torch.set_num_threads(settings["threads"])
    dist.init_process_group("gloo")
    run = make_pass(settings["way"], settings)
    _, found = watched(lambda: [run() for _ in range(3)])
    Path(out).write_text(json.dumps(found))


def _ways(dtype: str) -> tuple[str, ...]:
    return WAYS if dtype == "bfloat16" else (BASE, OURS, PEFT)


def _target_shapes(model: Any) -> list[tuple[int, int]]:
    from lorasb_ds.models.linear_layers import linear_layers

    return list(linear_layers(model).values())


def bench_layers(stack: Mapping[str, int], repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Adapters against the frozen base: time of a pass, and its peak memory."""
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
    print_table(
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


if __name__ == "__main__":
    run_as_rank(layers, peak)

"""Whole steps of training, against TRL's trainer."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_common import ROOT, measure, print_table, run_as_rank
from bench_memory import watched
from bench_run import DATA, R, started

MIB = 1 << 20
TRL, TRL_BF16 = "SFTTrainer, as documented", "SFTTrainer, base in bf16"
TRL_PLAIN = "SFTTrainer, base in bf16, no checkpointing"
LORASB, LORASB_CHECKPOINTED = "lorasb", "lorasb, checkpointing"
TRAINERS = (LORASB, LORASB_CHECKPOINTED, TRL, TRL_BF16, TRL_PLAIN)


def trainer(settings: dict[str, Any], out: str) -> None:
    """Seconds and label-bearing rows' real tokens of optimizer steps, and their peak memory."""
    from launcher.workers.quiet import quiet_libraries

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
    from lorasb_ds.distributed import zero
    from lorasb_ds.training.loop import train_step

    run, engine, _ = started(_run_config(settings))
    seconds, tokens, places = [], [], []

    def steps() -> None:
        for number in range(run.num_steps):
            batches = run.step_batches(run.order.packs(number))
            start = time.perf_counter()
            done = train_step(engine, batches)
            seconds.append(time.perf_counter() - start)
            assert done is not None
            tokens.append(done.num_tokens)
            places.append(done.num_positions)

    _, memory = watched(steps)
    zero.close_process_group()
    return {**memory, "seconds": seconds, "tokens": tokens, "places": places}


def _trl(settings: Mapping[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.data.tokenization import IGNORE_INDEX
    from lorasb_ds.training.prepare import prepare

    # The same rows, tokenized by the same template.
    run = prepare(load_run_config(_run_config(settings)), 1)
    examples = run.data.train.examples
    rows = {
        "input_ids": [list(e.input_ids) for e in examples],
        "completion_mask": [[int(t != IGNORE_INDEX) for t in e.labels] for e in examples],
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
    print_table(
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


if __name__ == "__main__":
    run_as_rank(trainer)

"""A run from its configuration to its adapter: load, inject, initialize, train, save."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from lorasb_ds import zero
from lorasb_ds.adapter import LoraSBLinear, inject
from lorasb_ds.config import DS_CONFIG_COPY, ConfigError, RunConfig
from lorasb_ds.data import (
    Batch,
    TokenizedRows,
    collate,
    epoch_order,
    micro_batches,
    sample_indices,
)
from lorasb_ds.ds_config import global_batch_size
from lorasb_ds.evaluate import held_out_loss
from lorasb_ds.export import BASIS_FORMAT, collect_lora, save_peft_adapter
from lorasb_ds.files import save_tensors, write_json
from lorasb_ds.gradients import branches_off
from lorasb_ds.initialize import InitReport, initialize
from lorasb_ds.loading import DTYPES, load_base, model_path
from lorasb_ds.loss import token_loss_sum
from lorasb_ds.metrics import RunLog, provenance
from lorasb_ds.prepare import Prepared, check_ranks_agree
from lorasb_ds.report import draw_loss_curve, write_report

# All that a run writes into its folder, and --overwrite removes.
OUTPUTS = (
    "run.json",
    DS_CONFIG_COPY,
    "metrics.jsonl",
    "tensorboard",
    "basis.safetensors",
    "init.json",
    "adapter",
    "loss.png",
    "report.md",
)


def run_training(run: Prepared) -> Path:
    """The whole run, inside a process group. Collective.

    Returns:
        The output folder, which holds ``OUTPUTS``.
    """
    config, is_main = run.config, zero.rank() == 0
    check_ranks_agree(run)
    folder = _make_output_dir(config)
    description = {
        "config": {**config.model_dump(), "output_dir": str(folder)},
        "ds_config": run.ds_config,
        "world_size": zero.world_size(),
        "accelerator": zero.accelerator_name(),
        "rows": {"train": dict(run.train.counts)}
        | ({"held_out": dict(run.held_out.counts)} if run.held_out else {}),
        **provenance(),
    }
    log = None
    if is_main:
        # A replay reads this copy: the file it came from may change.
        write_json(folder / DS_CONFIG_COPY, run.ds_config_file)
        write_json(folder / "run.json", description)
        log = RunLog(folder)
        _say(f"run folder {folder}")
        _say(f"training rows: {run.train.describe()}")

    engine, adapters = start_engine(run)
    num_steps = count_steps(config, len(run.train.examples), zero.world_size())
    _say(
        f"{len(adapters)} layers with an adapter, {len(adapters) * config.r**2:,} trainable "
        f"parameters, {zero.world_size()} process(es) on {zero.accelerator_name()}"
    )

    def evaluate(step: int, stage: Literal["base", "init", "trained"]) -> None:
        if run.held_out is None:
            return
        batches = batches_of(run, run.held_out, range(len(run.held_out.examples)))
        loss = held_out_loss(engine.module, batches, zero.device())
        _say(f"step {step}: held-out loss {loss:.4f} ({stage})")
        if log:
            log.write({"step": step, "stage": stage, "eval_loss": loss})

    with branches_off(adapters):
        evaluate(0, "base")
    report = _initialize(run, engine, adapters, folder)
    evaluate(0, "init")
    train(run, engine, num_steps, log)
    evaluate(num_steps, "trained")

    tensors = collect_lora(adapters)
    if is_main:
        assert log is not None
        save_peft_adapter(
            folder / "adapter",
            tensors,
            r=config.r,
            targets=run.targets,
            layers=run.layers,
            base_model=model_path(config.model),
        )
        draw_loss_curve(folder / "loss.png", log.rows)
        write_report(
            folder / "report.md",
            init=report,
            rows=log.rows,
            targets=run.targets,
            r=config.r,
            run=description,
            world_size=zero.world_size(),
            device=zero.accelerator_name(),
        )
        log.close()
    dist.barrier()
    _say(f"adapter saved: {folder / 'adapter'}   report: {folder / 'report.md'}")
    return folder


def start_engine(run: Prepared) -> tuple[Any, dict[str, LoraSBLinear]]:
    """The base with placeholders for adapters, inside the run's one engine. Collective."""
    config = run.config
    model = load_base(config, run.hf_config, run.ds_config)
    adapters = inject(model, run.targets, config.r, DTYPES[config.dtype])
    R = [adapter.lora_R for adapter in adapters.values()]
    optimizer = torch.optim.AdamW(R, lr=config.lr, weight_decay=0.0)
    num_steps = count_steps(config, len(run.train.examples), zero.world_size())
    scheduler = make_scheduler(optimizer, config, num_steps)
    return zero.make_engine(model, R, optimizer, scheduler, run.ds_config), adapters


def train(run: Prepared, engine: Any, num_steps: int, log: RunLog | None) -> None:
    """The loop. Collective."""
    engine.train()
    start = time.perf_counter()
    for step, batches in enumerate(step_batches(run, num_steps), 1):
        lr = engine.get_lr()[0]  # of this step: the scheduler moves on at its end
        loss, num_tokens = train_step(engine, batches)
        grad_norm = float(engine.get_global_grad_norm())
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(
                f"step {step} has loss {loss} and gradient norm {grad_norm}. Lower --lr or "
                "--init-lr, or look at the data."
            )
        now = time.perf_counter()
        if log:
            row = {
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": num_tokens,
                "tokens_per_s": num_tokens / (now - start),
                "step_time_s": now - start,
            }
            log.write(row)
            log.progress(row, num_steps)
        start = now


def train_step(engine: Any, batches: list[Batch]) -> tuple[float, int]:
    """One optimizer step on this rank's micro-batches. Collective.

    The step's loss is the mean over its label tokens, wherever they lie: a micro-batch's loss is
    ``ΣCE · world · accumulation / T``, T tokens in all, since DeepSpeed divides by both.

    Returns:
        The step's mean loss and its number of tokens (all that were not padding), of all ranks.
    """
    device = zero.device()
    counts = torch.tensor(
        [
            [b.num_label_tokens for b in batches],
            [int(b.attention_mask.sum()) if b.num_label_tokens else 0 for b in batches],
        ],
        dtype=torch.float64,
        device=device,
    ).sum(1)
    dist.all_reduce(counts)
    num_label_tokens, num_tokens = counts.tolist()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        loss = token_loss_sum(engine, batch.to(device))
        engine.backward(loss * (zero.world_size() * len(batches) / num_label_tokens))
        engine.step()
        loss_sum += loss.detach().double()
    dist.all_reduce(loss_sum)
    return loss_sum.item() / num_label_tokens, int(num_tokens)


def step_batches(run: Prepared, num_steps: int) -> Iterator[list[Batch]]:
    """This rank's micro-batches of every step: epochs follow each other, each in its own order.

    A global batch holds the same rows whatever the number of ranks. The last one of an epoch may
    be short: some micro-batches are then weightless, and no row is lost or seen twice.
    """
    config, examples = run.config, run.train.examples
    rows_per_step = global_batch_size(config, zero.world_size())
    accumulation = config.gradient_accumulation_steps
    steps_done, epoch = 0, 0
    while steps_done < num_steps:
        order = epoch_order(len(examples), config.seed, epoch)
        for first in range(0, len(order), rows_per_step):
            if steps_done == num_steps:
                return
            batches = batches_of(run, run.train, order[first : first + rows_per_step])
            filler = collate(examples[:1], run.tokenizer.pad_token_id, weightless=True)
            yield batches + [filler] * (accumulation - len(batches))
            steps_done += 1
        epoch += 1


def count_steps(config: RunConfig, num_rows: int, world_size: int) -> int:
    if config.max_steps is not None:
        return config.max_steps
    per_epoch = math.ceil(num_rows / global_batch_size(config, world_size))
    return max(1, round(config.epochs * per_epoch))


def make_scheduler(optimizer: torch.optim.Optimizer, config: RunConfig, num_steps: int) -> Any:
    """transformers' schedule, counted from 1: at 0 its warmup gives 0, and a step would be lost."""
    from transformers import get_scheduler

    warmup = math.ceil(config.warmup_ratio * num_steps)
    name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
    schedule = get_scheduler(name, optimizer, warmup, num_steps + 1)
    shape = schedule.lr_lambdas[0]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: shape(done + 1))


def _initialize(run: Prepared, engine: Any, adapters: Any, folder: Path) -> InitReport:
    """The init phase on the run's sample; the basis is on disk when it returns. Collective."""
    config, examples = run.config, run.train.examples
    sample = sample_indices(len(examples), config.init_samples, config.seed)
    report, basis = initialize(
        engine,
        adapters,
        [batch.to(zero.device()) for batch in batches_of(run, run.train, sample)],
        num_samples=len(sample),
        num_label_tokens=sum(examples[i].num_label_tokens for i in sample),
        init_lr=config.init_lr,
        seed=config.seed,
    )
    if zero.rank() == 0:
        about = {"format": "pt", "basis_format": BASIS_FORMAT, "r": str(config.r)}
        save_tensors(folder / "basis.safetensors", basis, about)
        write_json(folder / "init.json", asdict(report))
    _say(
        f"init: {report.num_samples} rows, {report.total_s:.1f} s (gradients "
        f"{report.gradients_s:.1f}, SVD {report.svd_s:.1f}); sample loss {report.loss_before:.4f} "
        f"-> {report.loss_after:.4f}"
    )
    if report.not_descending:
        _say(f"warning: no descent in {', '.join(report.not_descending)}: R starts at 0 there")
    return report


def batches_of(run: Prepared, rows: TokenizedRows, indices: Iterable[int]) -> list[Batch]:
    """This rank's micro-batches of some rows; as many on every rank."""
    return list(
        micro_batches(
            rows.examples,
            list(indices),
            run.config.micro_batch_size,
            run.tokenizer.pad_token_id,
            zero.rank(),
            zero.world_size(),
        )
    )


def _make_output_dir(config: RunConfig) -> Path:
    """Rank 0 makes the folder, without what an overwritten run left; all hear of it. Collective."""
    name: list[str] = [""]
    if zero.rank() == 0:
        default = Path("runs") / f"{Path(config.model).name}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = Path(config.output_dir or default)
        try:
            folder.mkdir(parents=True, exist_ok=config.output_dir is not None)
            for old in OUTPUTS:
                if (folder / old).is_dir():
                    shutil.rmtree(folder / old)
                else:
                    (folder / old).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"--output-dir {folder} cannot be written: {error}.") from error
        name = [str(folder)]
    dist.broadcast_object_list(name, src=0)
    return Path(name[0])


def _say(text: str) -> None:
    if zero.rank() == 0:
        print(f"lorasb: {text}", flush=True)

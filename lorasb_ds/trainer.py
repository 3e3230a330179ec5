"""A run from its configuration to its adapter: load, inject, initialize, train, save."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from lorasb_ds import zero
from lorasb_ds.adapter import LoraSBLinear, inject
from lorasb_ds.base_files import model_path
from lorasb_ds.basis import save_basis, take_up
from lorasb_ds.batches import Batch, Sample, collate
from lorasb_ds.config import DS_CONFIG_COPY, RunConfig
from lorasb_ds.curves import draw_loss_curve
from lorasb_ds.ds_config import global_batch_size
from lorasb_ds.evaluate import held_out_loss
from lorasb_ds.export import collect_lora, save_peft_adapter
from lorasb_ds.files import write_json
from lorasb_ds.gradients import branches_off
from lorasb_ds.init_report import InitReport
from lorasb_ds.initialize import Basis, initialize
from lorasb_ds.loading import DTYPES, load_base
from lorasb_ds.loss import token_loss_sum
from lorasb_ds.metrics import RunLog, provenance
from lorasb_ds.order import epoch_order
from lorasb_ds.output import make_output_dir
from lorasb_ds.plan import GIB
from lorasb_ds.prepare import Prepared, check_ranks_agree
from lorasb_ds.report import draw_init, write_report

Adapters = dict[str, LoraSBLinear]


def run_training(run: Prepared, init_only: bool = False) -> Path:
    """The whole run, inside a process group. Collective.

    Args:
        init_only: stop when the init is done and reported.
    Returns:
        The output folder, which holds ``output.OUTPUTS``.
    """
    config, is_main = run.config, zero.rank() == 0
    check_ranks_agree(run)
    zero.reset_peak_memory()
    idle_bytes = 0 if zero.accelerator_name() != "cpu" else zero.memory_bytes()
    folder = make_output_dir(config)
    description: dict[str, Any] = {
        "config": {**config.model_dump(), "output_dir": str(folder)},
        "ds_config": run.ds_config,
        "world_size": zero.world_size(),
        "accelerator": zero.accelerator_name(),
        "rows": {"train": dict(run.train.counts)}
        | ({"held_out": dict(run.held_out.counts)} if run.held_out else {}),
        "memory": {"predicted": run.forecast.describe()},
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
        for note in run.notes:
            _say(note)
        _say(str(run.forecast))
        if run.forecast.problem:
            _say(f"warning: {run.forecast.problem}")

    engine, adapters = start_engine(run)
    num_steps = count_steps(config, len(run.train.examples), zero.world_size())
    _say(
        f"{len(adapters)} layers with an adapter, {len(adapters) * config.r**2:,} trainable "
        f"parameters, {zero.world_size()} process(es) on {zero.accelerator_name()}"
    )
    if run.experts:
        _say(
            f"{len(run.experts)} layers of MoE experts ({sum(run.experts.values()):,} parameters) "
            "stay frozen without an adapter"
        )

    def evaluate(step: int, stage: Literal["base", "init", "trained"]) -> None:
        if run.held_out is None:
            return
        batches = run.batches(run.held_out, range(len(run.held_out.examples)))
        loss = held_out_loss(engine.module, batches, zero.device())
        _say(f"step {step}: held-out loss {loss:.4f} ({stage})")
        if log:
            log.write({"step": step, "stage": stage, "eval_loss": loss})

    peaks = {"load": zero.peak_memory_bytes() - idle_bytes}
    with branches_off(adapters):
        evaluate(0, "base")
    report = init_phase(run, engine, adapters, folder)
    evaluate(0, "init")
    tensors = {}
    if config.init_from is None:
        peaks["init"] = zero.peak_memory_bytes() - idle_bytes
    if not init_only:
        zero.reset_peak_memory()
        train(run, engine, num_steps, log)
        evaluate(num_steps, "trained")
        tensors = collect_lora(adapters)
        peaks["train"] = zero.peak_memory_bytes() - idle_bytes
    if is_main:
        assert log is not None
        description["memory"]["measured"] = peaks
        write_json(folder / "run.json", description)
        if tensors:
            save_peft_adapter(
                folder / "adapter",
                tensors,
                r=config.r,
                targets=run.targets,
                layers=dict(run.shape.layers),
                base_model=model_path(config.model),
            )
            draw_loss_curve(folder / "loss.png", log.rows)
        draw_init(folder / "init.png", report)
        write_report(folder / "report.md", description, log.rows, report, run.targets, run.experts)
        log.close()
    dist.barrier()
    saved = "basis" if init_only else "adapter"
    where = folder / ("basis.safetensors" if init_only else "adapter")
    _say(f"{saved} saved: {where}   report: {folder / 'report.md'}")
    return folder


def start_engine(run: Prepared) -> tuple[Any, Adapters]:
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
            batches = run.batches(run.train, order[first : first + rows_per_step])
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


def initialize_by(
    run: Prepared, engine: Any, adapters: Adapters, sample: Sample, probe: Sample
) -> tuple[InitReport, Basis]:
    """``initialize`` with a run's options. Collective."""
    return initialize(
        engine,
        adapters,
        sample,
        probe,
        run.footprint.init,
        init_lr=_init_lr(run, engine) or "auto",
        update=run.config.init_update,
        offload=run.config.init_offload,
        seed=run.config.seed,
    )


def _init_lr(run: Prepared, engine: Any) -> Any:
    """A number, "auto", or None where nothing was asked for."""
    if run.config.init_lr == "schedule":
        return float(engine.get_lr()[0])
    return run.config.init_lr


def init_phase(run: Prepared, engine: Any, adapters: Adapters, folder: Path) -> InitReport:
    """A, B and R by the init, or from an earlier one; on disk when it returns. Collective."""
    config, plan = run.config, run.footprint.init
    probe = run.sample(run.probe_rows)
    if config.init_from is not None and run.stored_init is not None:
        report, basis = take_up(
            engine, adapters, config.init_from, run.stored_init, probe, _init_lr(run, engine)
        )
        _say(f"init taken from {config.init_from}")
    else:
        groups = f", in {len(plan.groups)} groups of layers" if len(plan.groups) > 1 else ""
        _say(
            f"init: gradients and SVD will take {plan.predicted_bytes / GIB:.2f} GiB a process"
            f"{groups}"
        )
        if plan.exceeds_budget:
            _say(
                f"warning: --init-memory-gib {config.init_memory_gib:g} is not enough: at least "
                f"{plan.shard_bytes / GIB:.3f} for gradients (more processes: less), "
                f"{plan.boundary_bytes / GIB:.3f} for hidden states (fewer --init-samples: less), "
                f"{plan.workspace_bytes / GIB:.3f} for work on one layer (a smaller --r: less)."
            )
        sample = run.sample(run.gradient_rows)
        report, basis = initialize_by(run, engine, adapters, sample, probe)
    if zero.rank() == 0:
        save_basis(folder, basis, report, run.made_from)
    step = report.step
    _say(
        f"init: {report.num_samples} rows, {report.total_s:.1f} s (gradients "
        f"{report.gradients_s:.1f}, communication {report.communication_s:.1f}, SVD "
        f"{report.svd_s:.1f}); eta {step.init_lr:.3g}, loss of {step.num_samples} other rows "
        f"{step.loss_before:.4f} -> {step.loss_after:.4f}"
    )
    if report.not_descending:
        _say(f"warning: no descent in {', '.join(report.not_descending)}: R starts at 0 there")
    if report.partly_reached:
        _say(f"warning: not called by every micro-batch: {', '.join(report.partly_reached)}")
    return report


def _say(text: str) -> None:
    if zero.rank() == 0:
        print(f"lorasb: {text}", flush=True)

"""What each rank of a distributed test does."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from lorasb_ds.init.sharded_svd import SVDMethod


def svd(matrices: str, out: str, r: dict[str, int], methods: list[SVDMethod]) -> None:
    """Truncated SVD of every matrix of a file, in every way; each rank writes what it has."""
    from lorasb_ds.distributed.collectives import row_range
    from lorasb_ds.init.sharded_svd import truncated_svd, truncated_svds
    from lorasb_ds.init.whole_svd import truncated_svds_by_rank

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results: dict[str, torch.Tensor] = {}
    shards, heights = [], []
    for name, M in load_file(matrices).items():
        rows = row_range(len(M), rank, world_size)
        local = M[rows.start : rows.stop].clone()
        shards.append(local)
        heights.append(len(M))
        for method in methods:
            before = local.clone()
            U_local, S, Vh, energy = truncated_svd(local, r[name], method=method)
            assert torch.equal(local, before), "the input was modified"
            key = f"{method}.{name}"
            results |= {f"{key}.U": U_local, f"{key}.S": S, f"{key}.Vh": Vh}
            results[f"{key}.energy"] = torch.tensor(energy, dtype=torch.float64)
        found = truncated_svds_by_rank([local], [len(M)], r[name])[0]
        results |= {f"whole.{name}.U": found.U_local, f"whole.{name}.S": found.S}
        results[f"whole.{name}.Vh"] = found.Vh
        results[f"whole.{name}.energy"] = torch.tensor(found.captured_energy, dtype=torch.float64)
    signs = [
        (shard, n) for shard, n in zip(shards, heights, strict=True) if shard.dtype == torch.int8
    ]
    for first in range(0, len(signs), world_size):  # each on a rank of its own: the same bits
        some, of_some = zip(*signs[first : first + world_size], strict=True)
        for i, found in enumerate(truncated_svds_by_rank(some, of_some, 1)):
            alone = truncated_svds_by_rank([some[i]], [of_some[i]], 1)[0]
            assert all(torch.equal(a, b) for a, b in zip(found[:3], alone[:3], strict=True))
            assert found.captured_energy == alone.captured_energy
    for method in methods:  # each owner solves its own: the same bits as rank 0 alone
        for shard, found in zip(shards, truncated_svds(shards, 1, method=method), strict=True):
            alone = truncated_svd(shard, 1, method=method)
            assert all(torch.equal(a, b) for a, b in zip(found[:3], alone[:3], strict=True))
            assert found.captured_energy == alone.captured_energy
    save_file({k: v.contiguous() for k, v in results.items()}, f"{out}/{rank}.safetensors")


def updates(gradient: str, out: str) -> None:
    """The SVD of every update of a gradient whose rows are sharded; each rank writes its part."""
    from lorasb_ds.distributed.collectives import row_range
    from lorasb_ds.init.decomposition import decompose
    from lorasb_ds.init.update_rules import UPDATE_RULES

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    G = load_file(gradient)["G"]
    rows = row_range(len(G), rank, dist.get_world_size())
    found = {}
    for name in UPDATE_RULES:
        svd, slopes = decompose({"layer": G[rows.start : rows.stop].clone()}, 4, name)["layer"]
        found |= {f"{name}.U": svd.U_local, f"{name}.S": svd.S, f"{name}.Vh": svd.Vh}
        found[f"{name}.slopes"] = slopes
    save_file({k: v.contiguous() for k, v in found.items()}, f"{out}/{rank}.safetensors")


def _start(config: dict[str, Any], zero_optimization: dict[str, Any]) -> Any:
    """A run up to its engine, with other ZeRO settings than its ds_config's."""
    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.distributed import zero
    from lorasb_ds.training.prepare import prepare
    from lorasb_ds.training.trainer import start_engine

    run = prepare(load_run_config(config), int(os.environ["WORLD_SIZE"]))
    zero.init_process_group()
    run.ds_config["zero_optimization"] |= zero_optimization
    return run, *start_engine(run)


def methods(runs: list[dict[str, Any]], zero_optimization: dict[str, Any]) -> None:
    """Whole runs, one after the other, in one process group."""
    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.distributed import zero
    from lorasb_ds.system.signals import StopRequest
    from lorasb_ds.training.prepare import prepare
    from lorasb_ds.training.trainer import run_training

    zero.init_process_group()
    for config in runs:
        run = prepare(load_run_config(config), zero.world_size())
        run.ds_config["zero_optimization"] |= zero_optimization
        assert run_training(run, StopRequest()) == "finished"


def _assert_sharded(run: Any, adapters: dict[str, Any]) -> None:
    from lorasb_ds.distributed import zero

    if run.ds_config["zero_optimization"]["stage"] == 3 and zero.world_size() > 1:
        for adapter in adapters.values():
            for parameter in (adapter.base_layer.weight, adapter.lora_A, adapter.lora_B):
                assert parameter.numel() == 0, "not sharded"


def traffic(settings: dict[str, Any], out: str) -> None:
    """Collectives of a training step, by DeepSpeed's own counter."""
    from tests.runs import benchmark

    with benchmark("bench_traffic") as bench:
        bench.zero3(settings, out)


def gradients(config: dict[str, Any], out: str, zero_optimization: dict[str, Any]) -> None:
    """The average gradient of all training rows, gathered whole on rank 0."""
    from lorasb_ds.distributed import zero
    from lorasb_ds.distributed.collectives import gather_rows
    from lorasb_ds.init.gradient_shards import gradient_shape, is_transposed
    from lorasb_ds.init.gradients import average_gradients

    run, engine, adapters = _start(config, zero_optimization)
    sample = run.sample(range(len(run.data.train.examples)))
    shards = average_gradients(engine.module, adapters, sample.batches, sample.num_label_tokens)
    zero.release(engine)
    _assert_sharded(run, adapters)
    assert [n for n, p in engine.module.named_parameters() if p.grad is not None] == []
    whole = {}
    for name, adapter in adapters.items():
        shard, shape = shards.shards[name], gradient_shape(adapter)
        G = gather_rows(shard.flatten(1), shape[0], None)
        if G is not None:
            transposed = is_transposed(adapter.out_features, adapter.in_features)
            G = G.view(shape)
            whole[name] = (G.mT if transposed else G).contiguous()
        if name in shards.tokens:
            assert shards.tokens[name].sum() > 0
    if zero.rank() == 0:
        save_file(whole | {"loss": torch.tensor(shards.loss)}, out)


def export(config: dict[str, Any], basis: str, out: str, zero_optimization: dict[str, Any]) -> None:
    """Fill given factors, take one optimizer step, and write logits and the PEFT folder."""
    from lorasb_ds.adapters.peft_writer import collect_lora, peft_target_modules, save_peft_adapter
    from lorasb_ds.distributed import zero
    from lorasb_ds.training.loop import train_step

    run, engine, adapters = _start(config, zero_optimization)
    given = load_file(basis)
    is_main = zero.rank() == 0
    for name, adapter in adapters.items():
        zero.fill(adapter.lora_A, given[f"{name}.lora_A"] if is_main else None)
        zero.fill(adapter.lora_B, given[f"{name}.lora_B"] if is_main else None)
        zero.fill_trainable(adapter.lora_R, given[f"{name}.lora_R"])
    _assert_sharded(run, adapters)
    result = {}
    for name, adapter in adapters.items():
        result[f"filled.{name}"] = zero.full_fp32(adapter.lora_R).clone()
    engine.train()
    train_step(engine, run.batches(run.data.train, range(4)))
    input_ids = torch.tensor([run.data.train.examples[0].input_ids])
    with torch.no_grad():
        logits = engine.module.eval()(input_ids=input_ids, use_cache=False).logits
    result["logits"] = logits.float()
    for name, adapter in adapters.items():
        R = zero.full_fp32(adapter.lora_R)
        result[f"stepped.{name}"] = R.clone()
        with zero.gathered([adapter.lora_R]):
            # The working copy is the master's: neither fill nor step left one behind.
            assert torch.equal(adapter.lora_R.data, R.to(adapter.lora_R.dtype)), name
    tensors = collect_lora(adapters)
    if is_main:
        save_file(result, f"{out}/result.safetensors")
        save_peft_adapter(
            Path(out) / "adapter",
            tensors,
            r=run.config.r,
            target_modules=peft_target_modules(run.adapter.targets, dict(run.base.shape.layers)),
            base_model=run.config.model,
        )


def initialize(config: dict[str, Any], out: str, zero_optimization: dict[str, Any]) -> None:
    """The init on all training rows; what then lies in the layers, and what was reported."""
    from lorasb_ds.distributed import zero
    from lorasb_ds.init.basis_file import BasisWriter, basis_sizes
    from lorasb_ds.training.init_phase import initialize_by

    run, engine, adapters = _start(config, zero_optimization)
    sample = run.sample(range(len(run.data.train.examples)))
    # Losses are measured on the same rows.
    basis = None
    if zero.rank() == 0:
        basis = BasisWriter(Path(out), basis_sizes(adapters), run.made_from)

    def keep(factors: dict[str, torch.Tensor]) -> None:
        if basis is None:
            assert factors == {}
        else:
            basis.add(factors)

    report = initialize_by(run, engine, adapters, sample, sample, keep)
    _assert_sharded(run, adapters)
    live = {}
    for name, adapter in adapters.items():
        live[f"{name}.R"] = zero.full_fp32(adapter.lora_R).clone()
        with zero.gathered([adapter.lora_A, adapter.lora_B]):
            live[f"{name}.A"] = adapter.lora_A.data.clone()
            live[f"{name}.B"] = adapter.lora_B.data.clone()
    if basis is not None:
        save_file(live, f"{out}/live.safetensors")
        basis.finish(report)


def alignment(
    config: dict[str, Any], out: str, zero_optimization: dict[str, Any], measured: bool
) -> None:
    """Three steps from random factors, and before and after each what `--track-alignment` finds."""
    from dataclasses import asdict

    from lorasb_ds.adapters.inject import trainable_parameters
    from lorasb_ds.distributed import zero
    from lorasb_ds.training.alignment import measure_alignment, trained_factors
    from lorasb_ds.training.loop import train_step

    run, engine, adapters = _start(config, zero_optimization)
    generator = torch.Generator().manual_seed(6)
    start: dict[str, torch.Tensor] = {}
    for name, adapter in adapters.items():
        for key in (*adapter.trained, *adapter.frozen):
            value = 0.05 * torch.randn(adapter.factor_shape(key), generator=generator)
            fill = zero.fill_trainable if key in adapter.trained else zero.fill
            fill(adapter.factor(key), value)
            start[f"{name}.{key}"] = value
    sample = run.sample(range(len(run.data.train.examples)))
    names = list(adapters)
    engine.train()
    found = []

    def measure(before: Any) -> None:
        if measured:
            groups = [dict.fromkeys(names[:5]), dict.fromkeys(names[5:])]
            rows = measure_alignment(engine, adapters, sample, groups, before)
            found.append({name: asdict(row) for name, row in rows.items()})
            _assert_sharded(run, adapters)
            trained = trainable_parameters(engine.module).values()
            assert all(p.requires_grad and p.grad is None for p in trained)
            with zero.gathered(trained):
                assert all(torch.equal(p.data, zero.full_fp32(p).to(p.dtype)) for p in trained)

    torch.manual_seed(zero.rank())
    measure(None)
    masters = []
    for step in range(run.num_steps):
        before = trained_factors(adapters)
        assert train_step(engine, run.step_batches(run.order.packs(step))).applied
        measure(before)
        masters.append(trained_factors(adapters))
    of_ranks: list[Any] = [None] * zero.world_size()
    dist.all_gather_object(of_ranks, found)
    assert all(json.dumps(rows) == json.dumps(found) for rows in of_ranks), "the same to the bit"
    if zero.rank() == 0:
        for step, values in enumerate(masters, 1):
            start |= {f"{step}.{n}.{k}": v for n, of in values.items() for k, v in of.items()}
        save_file(start, f"{out}.safetensors")
        Path(f"{out}.json").write_text(json.dumps(found))


def _fill(adapters: dict[str, Any], scale: float = 0.3) -> None:
    """Factors that are the same for any number of ranks."""
    from lorasb_ds.distributed import zero

    generator = torch.Generator().manual_seed(5)
    for adapter in adapters.values():
        r = adapter.r
        A = scale * torch.randn(r, adapter.in_features, generator=generator)
        B = scale * torch.randn(adapter.out_features, r, generator=generator)
        zero.fill(adapter.lora_A, A if zero.rank() == 0 else None)
        zero.fill(adapter.lora_B, B if zero.rank() == 0 else None)
        zero.fill_trainable(adapter.lora_R, scale * torch.randn(r, r, generator=generator))


def steps(config: dict[str, Any], out: str, fp16: bool = False) -> None:
    """All steps of a run from given factors: what each of them reports, and R at the end."""
    from lorasb_ds.distributed import zero
    from lorasb_ds.training.loop import train_step

    if fp16:
        # DeepSpeed asks for hardware; torch computes in fp16 on any CPU, slowly.
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    run, engine, adapters = _start(config, {})
    _fill(adapters)
    engine.train()
    found = []
    for step in range(run.num_steps):
        result = train_step(engine, run.step_batches(run.order.packs(step)))
        norms = [result.grad_norm, result.r_norm, float(result.applied)]
        found.append([result.loss, *norms, result.num_tokens, result.num_positions])
    masters = {name: zero.full_fp32(adapter.lora_R) for name, adapter in adapters.items()}
    norm = torch.stack([R.double().square().sum() for R in masters.values()]).sum().sqrt()
    torch.testing.assert_close(torch.tensor(found[-1][2]), norm.float(), rtol=1e-6, atol=0)
    # A request to stop on one rank reaches all of them.
    batches = run.step_batches(run.order.packs(0))
    assert train_step(engine, batches, lambda: zero.rank() == zero.world_size() - 1).stop
    assert not train_step(engine, batches).stop
    if zero.rank() == 0:
        save_file(masters | {"steps": torch.tensor(found, dtype=torch.float64)}, out)


def stretch(config: dict[str, Any], out: str, first: int, last: int, state: str | None) -> None:
    """Some steps of a run, from given factors or from a stored state; losses and the state then."""
    from lorasb_ds.adapters.inject import trainable_parameters
    from lorasb_ds.distributed import zero
    from lorasb_ds.training.engine_state import collect_state, restore_state
    from lorasb_ds.training.loop import train_step

    run, engine, adapters = _start(config, {})
    generator = torch.Generator().manual_seed(5)
    trained = trainable_parameters(engine.module)
    for name, adapter in adapters.items():
        shapes = {
            "lora_A": (adapter.r, adapter.in_features),
            "lora_B": (adapter.out_features, adapter.r),
            "lora_R": (adapter.r, adapter.r),
        }
        for key in sorted({*adapter.frozen, *adapter.trained}):
            value = 0.3 * torch.randn(shapes[key], generator=generator)
            if f"{name}.{key}" in trained:
                zero.fill_trainable(adapter.factor(key), value)
            else:
                zero.fill(adapter.factor(key), value if zero.rank() == 0 else None)
    if state is not None:
        stored = load_file(state)
        scalars = {k[7:]: stored.pop(k).item() for k in [*stored] if k.startswith("scalar.")}
        restore_state(engine, trained, stored, scalars, run.config)
    engine.train()
    losses = []
    for step in range(first, last):
        result = train_step(engine, run.step_batches(run.order.packs(step)))
        assert result is not None
        assert result.applied
        losses.append(result.loss)
    tensors, scalars = collect_state(engine, trained)
    if zero.rank() == 0:
        numbers = {f"scalar.{key}": torch.tensor(value) for key, value in scalars.items()}
        save_file(tensors | numbers | {"losses": torch.tensor(losses)}, out)


def not_finite_step(config: dict[str, Any], zero_optimization: dict[str, Any], what: str) -> None:
    """One rank's loss or gradient is not finite: no rank steps, and the next step is clean."""
    import copy

    from lorasb_ds.adapters.inject import trainable_parameters
    from lorasb_ds.distributed import zero
    from lorasb_ds.training.engine_state import collect_state
    from lorasb_ds.training.loop import train_step

    run, engine, adapters = _start(config, zero_optimization)
    _fill(adapters)
    engine.train()
    all_batches = [run.step_batches(run.order.packs(step)) for step in range(3)]
    assert train_step(engine, all_batches[0]).applied
    before, scalars = copy.deepcopy(collect_state(engine, trainable_parameters(engine.module)))
    lr = engine.get_lr()

    def spoil(_module: Any, _inputs: Any, output: Any) -> Any:
        # inf: the loss is infinite, and its gradient is not. nan: both are not.
        return output + torch.inf if what == "loss" else output * torch.nan

    def spoil_gradient(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, torch.inf)

    remove: Any = None
    if zero.rank() == zero.world_size() - 1:
        if what == "gradient":
            first = next(iter(adapters.values()))
            hook = first.register_full_backward_hook(
                lambda _m, given, _o: tuple(g if g is None else g * torch.inf for g in given)
            )
            remove = [hook, first.lora_R.register_hook(spoil_gradient)]
        else:
            remove = [engine.module.register_forward_hook(spoil)]
    result = train_step(engine, all_batches[1])
    assert not result.applied
    assert torch.isfinite(torch.tensor(result.loss)) == (what == "gradient")
    assert not torch.isfinite(torch.tensor(result.grad_norm))
    for hook in remove or []:
        hook.remove()
    after, scalars_after = collect_state(engine, trainable_parameters(engine.module))
    assert (scalars, lr) == (scalars_after, engine.get_lr())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert train_step(engine, all_batches[2]).applied
    moved, _ = collect_state(engine, trainable_parameters(engine.module))
    assert all(torch.isfinite(value).all() for value in moved.values())
    if zero.rank() == 0:
        assert any(not torch.equal(after[name], moved[name]) for name in after)


def four_bit(config: dict[str, Any], out: str, zero_optimization: dict[str, Any]) -> None:
    """Held-out loss, init, some steps and export on a 4-bit base of which each rank has a share."""
    from lorasb_ds.adapters.peft_writer import collect_lora
    from lorasb_ds.distributed import accelerator, zero
    from lorasb_ds.models.loss import held_out_loss
    from lorasb_ds.models.quantization import PackedLinear4bit
    from lorasb_ds.training.init_phase import initialize_by
    from lorasb_ds.training.loop import train_step

    run, engine, adapters = _start(config, zero_optimization)
    bases = [adapter.base_layer for adapter in adapters.values()]
    assert all(isinstance(base, PackedLinear4bit) for base in bases)
    weights = [base.weight for base in bases]
    shares = [weight.ds_tensor.numel() for weight in weights]
    assert shares == [-(-weight.ds_numel // zero.world_size()) for weight in weights]

    def assert_released() -> None:
        if zero.world_size() > 1:
            zero.release(engine)
            assert all(parameter.numel() == 0 for parameter in engine.module.parameters())

    assert_released()
    sample = run.sample(range(len(run.data.train.examples)))
    losses = [held_out_loss(engine.module, sample.batches, accelerator.device()) for _ in range(2)]
    assert losses[0] == losses[1], "the weights were not those of the first time"
    assert_released()
    initialize_by(run, engine, adapters, sample, sample, keep=lambda factors: None)
    engine.train()
    for step in range(run.num_steps):
        result = train_step(engine, run.step_batches(run.order.packs(step)))
        assert result is not None
        losses.append(result.loss)
    assert_released()
    tensors = collect_lora(adapters)
    if zero.rank() == 0:
        save_file(tensors | {"losses": torch.tensor(losses)}, out)


def load(config: dict[str, Any], out: str, zero_optimization: dict[str, Any]) -> None:
    """The base as it is loaded; rank 0 writes its whole parameters and what all ranks read."""
    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.distributed import zero
    from lorasb_ds.models.base import Base
    from lorasb_ds.models.loading import load_base

    zero.init_process_group()
    run = load_run_config(config)
    ds_config = {"train_batch_size": zero.world_size(), "zero_optimization": zero_optimization}
    base = Base(run.model)
    # What Python reads to import them is no part of what is measured.
    import bitsandbytes  # noqa: F401

    base.empty_model(torch.bfloat16)
    before = _bytes_read()
    model = load_base(base, run, ds_config)
    read = torch.tensor(_bytes_read() - before)
    dist.all_reduce(read)
    result = {"bytes_read": read}
    sharded = zero_optimization["stage"] == 3
    for name, parameter in model.named_parameters():
        assert (parameter.numel() == 0) == sharded, name
        if sharded:
            assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // zero.world_size())
        with zero.gathered([parameter]):
            value = parameter.data.clone()
        result[name] = value.view(torch.uint8) if "_proj." in name else value
    result |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    if zero.rank() == 0:
        save_file(result, out)


def _bytes_read() -> int:
    """That this process asked files for, from the page cache or not."""
    fields = Path("/proc/self/io").read_text().split()
    return int(fields[fields.index("rchar:") + 1])


def load_broken(config: dict[str, Any], message: str) -> None:
    """A base that one rank cannot read ends all of them, with the same words."""
    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.distributed import zero
    from lorasb_ds.errors import ConfigError
    from lorasb_ds.models.base import Base
    from lorasb_ds.models.loading import load_base

    zero.init_process_group()
    run = load_run_config(config)
    ds_config = {"train_batch_size": zero.world_size(), "zero_optimization": {"stage": 3}}
    with pytest.raises(ConfigError, match=message):
        load_base(Base(run.model), run, ds_config)


def watched(folder: str) -> None:
    """What the benchmarks' sampler tells of memory that comes, goes, stays, and is mapped."""
    import mmap
    import time

    from lorasb_ds.distributed import zero

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
    from bench_memory import watched

    zero.init_process_group()
    path, mb = Path(folder) / "bytes", 1_000_000
    path.write_bytes(bytes(40 * mb))

    def work() -> torch.Tensor:
        passing = torch.ones(60 * mb, dtype=torch.uint8)
        time.sleep(0.2)  # many times the sampler's interval
        del passing
        kept = torch.ones(20 * mb, dtype=torch.uint8)
        path.read_bytes()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert sum(mapped[:: mmap.PAGESIZE]) == 0
            time.sleep(0.2)
        return kept

    work()  # what is once for all: pages of libraries, allocators
    kept, found = watched(work)
    assert kept.sum() == 20 * mb
    # Pages and allocators: a few MB.
    assert found["anon_peak_bytes"] == pytest.approx(60 * mb, abs=4 * mb)
    assert found["mapped_peak_bytes"] == pytest.approx(40 * mb, abs=4 * mb)
    assert found["anon_after_bytes"] == pytest.approx(20 * mb, abs=4 * mb)
    assert found["peak_bytes"] == pytest.approx(60 * mb, abs=4 * mb)
    assert found["read_bytes"] == pytest.approx(40 * mb, abs=mb)
    assert found["seconds"] > 0


def disagree(config: dict[str, Any]) -> None:
    """Ranks that hold different rows refuse to train, all of them."""
    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.distributed import zero
    from lorasb_ds.errors import ConfigError
    from lorasb_ds.training.prepare import prepare
    from lorasb_ds.training.ranks_agree import check_ranks_agree

    run = prepare(load_run_config(config), 2)
    zero.init_process_group()
    check_ranks_agree(run)
    backwards = run.data.train.select(range(len(run.data.train.examples))[::-1])
    for field, what in (("train", "training rows"), ("init", "rows for the init")):
        data = run.data._replace(**{field: backwards})
        other = replace(run, data=data) if zero.rank() == 1 else run
        with pytest.raises(ConfigError, match=rf"Rank 1 and rank 0 do not agree on the {what}\."):
            check_ranks_agree(other)


def uneven(out: str) -> None:
    """Gradients where each rank calls other layers, and some more often than others."""
    from types import SimpleNamespace

    from torch import nn

    from lorasb_ds.adapters.inject import inject
    from lorasb_ds.data.batch import Batch
    from lorasb_ds.distributed import zero
    from lorasb_ds.distributed.collectives import gather_rows
    from lorasb_ds.init.gradients import average_gradients
    from lorasb_ds.models.linear_layers import linear_layers

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 6)
            self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)])
            self.last = nn.Linear(6, 9)
            self.head = nn.Linear(9, 20)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **_: Any) -> Any:
            x = self.embed(input_ids)
            for expert in input_ids[0, :2].tolist():  # the first two tokens are a route
                x = x + torch.tanh(self.experts[expert](x))
            return SimpleNamespace(logits=self.head(self.last(x)[:, logits_to_keep]))

    def batch_of(route: list[int]) -> Batch:
        ids = torch.tensor([[*route, 5, 7, 11]])
        labels = torch.where(ids < 4, -100, ids)
        return Batch(ids, torch.ones_like(ids), labels, 3)

    zero.init_process_group()
    torch.manual_seed(0)
    model = Routed()
    # On 2 ranks the first two pairs are of other order and of other number, on 3 all are.
    routes = [[0, 1], [0, 0], [1, 1], [1, 0], [0, 1], [0, 0]]
    share = len(routes) // zero.world_size()
    first = zero.rank() * share
    batches = [batch_of(route) for route in routes[first : first + share]]
    adapters = inject(model, linear_layers(model), 2, torch.float32)
    found = average_gradients(model, adapters, batches, 18)
    result = {"loss": torch.tensor(found.loss)}
    for name, G in found.shards.items():
        whole = gather_rows(G, max(adapters[name].out_features, adapters[name].in_features), None)
        if whole is not None:
            result[name] = whole
            result[f"{name}.reached"] = torch.tensor(found.batches_reached[name])
    if zero.rank() == 0:
        save_file(result, out)


def not_finite(config: dict[str, Any]) -> None:
    """A gradient that is not finite on one rank is an error on every rank."""
    from lorasb_ds.distributed import zero
    from lorasb_ds.init.decomposition import decompose, decompose_matrices

    zero.init_process_group()
    G = torch.ones(3, 2)
    if zero.rank() == 1:
        G[0, 0] = torch.nan
    for heights in (None, [6]):
        with pytest.raises(FloatingPointError, match="layer is not finite"):
            decompose({"layer": G}, 1, "sign", heights=heights)
        with pytest.raises(ValueError, match="not finite"):
            decompose_matrices([G], 1, None, 0, heights)


def evaluation(given: dict[str, Any], adapter: str, out: str, zero_optimization: Any) -> None:
    """Rank 0 writes what `lorasb eval` would."""
    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.distributed import zero
    from lorasb_ds.evaluation.evaluator import evaluate, write_results
    from lorasb_ds.evaluation.model import prepare_model, start_model
    from lorasb_ds.evaluation.rows import load_eval_rows

    config = load_run_config(given)
    run = prepare_model(config, adapter, int(os.environ["WORLD_SIZE"]))
    run.ds_config["zero_optimization"] |= zero_optimization
    rows = load_eval_rows(config.data[0], run.config, run.base.tokenizer, max_new_tokens=12)
    zero.init_process_group()
    result = evaluate(run, rows, start_model(run))
    if zero.rank() == 0:
        write_results(Path(out), run, [(rows, result)])


def tokenize_at_once(model: str, data: str, out: str) -> None:
    """All ranks want the same rows, and making them takes a while."""
    from lorasb_ds.config.run_config import RunConfig
    from lorasb_ds.data import cache
    from lorasb_ds.models.base import Base

    dist.init_process_group("gloo")
    made, make = [], cache._make

    def slowly(folder: Path, **more: Any) -> None:
        made.append(folder)
        time.sleep(1)
        make(folder, **more)

    cache._make = slowly
    tokenizer = Base(model).tokenizer
    dist.barrier()
    rows, notes = cache.tokenize_sources((data,), tokenizer, RunConfig())
    found = {"made": len(made), "rows": [rows.digest, len(rows.examples), notes]}
    Path(out, f"{dist.get_rank()}.json").write_text(json.dumps(found))


def memory_of_tokenizing(model: str, small: str, large: str, out: str) -> None:
    """How many rows were tokenized, and the MiB that it took on top of what a small file takes."""
    from lorasb_ds.config.run_config import RunConfig
    from lorasb_ds.data.cache import tokenize_sources
    from lorasb_ds.models.base import Base

    def anonymous_mib() -> float:
        """Without what is mapped from files, which the system takes back when it wants to."""
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) / 1024

    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous_mib())

    tokenizer = Base(model).tokenizer
    config = RunConfig(dataset_num_proc=1)
    tokenize_sources((small,), tokenizer, config)  # what the libraries take once
    start = anonymous_mib()
    watcher = threading.Thread(target=watch)
    watcher.start()
    rows, _ = tokenize_sources((large,), tokenizer, config)
    num_tokens = sum(len(example.input_ids) for example in rows.examples)
    assert num_tokens == rows.lengths.sum()
    done.set()
    watcher.join()
    Path(out).write_text(json.dumps([len(rows.examples), peak - start]))


def rank_1_fails(sleep_s: float) -> None:
    """The others sleep."""
    if os.environ["RANK"] == "1":
        raise ValueError("on purpose")
    time.sleep(sleep_s)


def linear_adapter(out_features: int, in_features: int) -> Any:
    from torch import nn

    from lorasb_ds.adapters.lora_sb import LoraSBLinear

    return LoraSBLinear(nn.Linear(in_features, out_features), 2, torch.float32)


def experts_adapter(num_experts: int, out_features: int, in_features: int) -> Any:
    from lorasb_ds.adapters.experts import LoraSBExperts
    from lorasb_ds.models.experts import ExpertsLinear

    base = ExpertsLinear(num_experts, out_features, in_features, torch.float32)
    return LoraSBExperts(base, 2, torch.float32)


class Call:
    """One call of a layer on each rank, with random inputs and gradients that all ranks know."""

    def __init__(self, adapter: Any, rows: list[int], seed: int) -> None:
        from lorasb_ds.models.experts import Routing

        generator = torch.Generator().manual_seed(seed)
        self.num_experts = adapter.num_matrices
        self.experts = [
            torch.randint(self.num_experts, (n,), generator=generator).sort().values for n in rows
        ]
        self.routings = [Routing.of(of, self.num_experts) for of in self.experts]
        self.x, self.grad_y = (
            [torch.randn(n, width, generator=generator) for n in rows]
            for width in (adapter.in_features, adapter.out_features)
        )
        self.is_transposed = adapter.in_features > adapter.out_features

    def gradient(self) -> torch.Tensor:
        """Return the sum over ranks, (experts, long side, short side), in fp64."""
        sums = []
        for expert in range(self.num_experts):
            of_ranks = zip(self.x, self.grad_y, self.experts, strict=True)
            G = sum(g[e == expert].double().T @ x[e == expert].double() for x, g, e in of_ranks)
            sums.append(G.T if self.is_transposed else G)
        return torch.stack(sums)


def exchanged(sends_rows: bool, tokens: int, limit: int) -> None:
    """Dense layers and experts of uneven numbers of rows, some called twice, two batches."""
    from lorasb_ds.adapters.experts import LoraSBExperts
    from lorasb_ds.distributed import zero
    from lorasb_ds.distributed.collectives import row_range
    from lorasb_ds.init import gradient_shards
    from lorasb_ds.planner import init_bytes

    zero.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for module in (gradient_shards, init_bytes):
        module.EXCHANGE_BYTES = limit
    used = _collectives()
    adapters = {
        "wide": linear_adapter(16, 40),
        "long": linear_adapter(37, 16),
        "short": linear_adapter(1, 16),
        "experts": experts_adapter(5, 12, 6),
        "some": experts_adapter(7, 6, 12),
        "twice": linear_adapter(24, 24),
        "experts-twice": experts_adapter(3, 8, 8),
    }
    order = [*adapters, "twice", "experts-twice"]
    layers = dict.fromkeys(adapters) | {"some": range(2, 6)}
    for offload in (False, True):
        shards = gradient_shards.GradientShards(adapters, zero.new_group(), offload, layers)
        expected: dict[str, torch.Tensor] = {}
        for batch in range(2):
            rows = [tokens + batch + 2 * r for r in range(world_size)]
            calls = [Call(adapters[n], rows, 10 * i + batch) for i, n in enumerate(order)]
            for name, call in zip(order, calls, strict=True):
                expected[name] = expected.get(name, 0) + call.gradient()
                routing = call.routings[rank]
                is_moe = isinstance(adapters[name], LoraSBExperts)
                shards.calls.add(name, call.x[rank], routing if is_moe else None)
            shards.after_forward(has_labels=True)
            for name, call in reversed(list(zip(order, calls, strict=True))):
                mine = call.x[rank], call.grad_y[rank]
                if isinstance(adapters[name], LoraSBExperts):
                    shards.add_experts(name, *mine, call.routings[rank])
                else:
                    shards.add(name, *mine)
            shards.after_backward()
        for name, truth in expected.items():
            experts = layers[name]
            truth = truth[experts.start : experts.stop] if experts is not None else truth
            truth = truth if isinstance(adapters[name], LoraSBExperts) else truth[0]
            owned = row_range(len(truth), rank, world_size)
            mine, found = truth[owned.start : owned.stop], shards.take(name)
            assert found.shape == mine.shape
            error = torch.linalg.vector_norm(found - mine)
            assert error <= 1e-6 * torch.linalg.vector_norm(mine), (name, error)
    sent = set(used) - {"all_gather_into_tensor"}  # of x and δ; and of the numbers of rows
    sums = {"reduce_scatter_tensor", "reduce"}  # small layers', and experts' of a second call
    assert sent == sums | ({"all_to_all_single"} if sends_rows else set()), used


def _collectives() -> dict[str, int]:
    """Count the bytes that a ring brings this rank, by collective, from now on."""
    received: dict[str, int] = {}
    share = (dist.get_world_size() - 1) / dist.get_world_size()

    def counted(name: str, call: Any, *args: Any, **more: Any) -> Any:
        whole = args[1] if name == "reduce_scatter_tensor" else args[0]
        received[name] = received.get(name, 0) + round(whole.nbytes * share)
        return call(*args, **more)

    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "reduce"):
        setattr(dist, name, partial(counted, name, getattr(dist, name)))
    return received


def exchanged_bytes() -> None:
    """A dense layer of few and of many tokens, and experts that get the same number of rows."""
    from lorasb_ds.distributed import zero
    from lorasb_ds.init.gradient_shards import GradientShards
    from lorasb_ds.models.experts import Routing
    from lorasb_ds.planner.traffic import exchanged_bytes as planned

    zero.init_process_group()
    world_size = dist.get_world_size()
    share = (world_size - 1) / world_size
    received = _collectives()
    for tokens in (8, 400):
        shards = GradientShards({"layer": linear_adapter(96, 64)}, zero.new_group())
        x, grad_y = torch.randn(2, tokens // 2, 64), torch.randn(2, tokens // 2, 96)
        shards.calls.add("layer", x)
        shards.after_forward(True)
        shards.add("layer", x, grad_y)
        shards.after_backward()
        expected = planned(1, 96, 64, world_size * tokens, 4) * share
        assert sum(received.values()) == expected, (tokens, received, expected)
        assert list(received) == [
            "all_gather_into_tensor" if tokens == 8 else "reduce_scatter_tensor"
        ]
        received.clear()
    for rows in (16, 800):
        shards = GradientShards({"experts": experts_adapter(8, 24, 16)}, zero.new_group())
        routing = Routing.of(torch.arange(8).repeat_interleave(rows // 8), 8)
        x, grad_y = torch.randn(rows, 16), torch.randn(rows, 24)
        shards.calls.add("experts", x, routing)
        shards.after_forward(True)
        received.clear()  # the numbers of rows
        shards.add_experts("experts", x, grad_y, routing)
        shards.after_backward()
        expected = planned(8, 24, 16, rows, 4) * share
        assert sum(received.values()) == expected, (rows, received, expected)
        assert list(received) == ["all_to_all_single" if rows == 16 else "reduce"]
        received.clear()
    dist.barrier()


def trial_in_pieces(bases: dict[str, bool]) -> None:
    """Some models are refused that would compute something else in pieces; others are not."""
    from contextlib import nullcontext

    from transformers import AutoModelForCausalLM

    from lorasb_ds.distributed import zero
    from lorasb_ds.distributed.sequence_parallel import share_rows, unshare_rows
    from lorasb_ds.errors import ConfigError
    from lorasb_ds.models.sequence_parallel import check_pieces

    zero.init_process_group()
    for folder, is_refused in bases.items():
        for dtype in (torch.float32, torch.bfloat16)[: 1 if is_refused else 2]:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            few = torch.arange(100, 110)[None]
            with torch.no_grad():
                before = model(few).logits
            refused = pytest.raises(ConfigError, match="something else in pieces of rows than in")
            share_rows(model.config._attn_implementation, 2)
            with refused if is_refused else nullcontext():
                check_pieces(model, few, 2)
            unshare_rows()
            with torch.no_grad():
                assert torch.equal(model(few).logits, before), "each rank by itself, as before"

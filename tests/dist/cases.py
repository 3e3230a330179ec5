"""What each rank of a distributed test does: `python -m tests.dist.cases CASE JSON`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from lorasb_ds.linalg import Method


def svd(matrices: str, out: str, r: dict[str, int], methods: list[Method]) -> None:
    """Truncated SVD of every matrix of a file, in every way; each rank writes what it has."""
    from lorasb_ds.linalg import row_range, truncated_svd, truncated_svds

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results: dict[str, torch.Tensor] = {}
    shards = []
    for name, M in load_file(matrices).items():
        rows = row_range(len(M), rank, world_size)
        local = M[rows.start : rows.stop].clone()
        shards.append(local)
        for method in methods:
            before = local.clone()
            U_local, S, Vh, energy = truncated_svd(local, r[name], method=method)
            assert torch.equal(local, before), "the input was modified"
            key = f"{method}.{name}"
            results |= {f"{key}.U": U_local, f"{key}.S": S, f"{key}.Vh": Vh}
            results[f"{key}.energy"] = torch.tensor(energy, dtype=torch.float64)
    for method in methods:  # each owner solves its own: the same bits as rank 0 alone
        for shard, found in zip(shards, truncated_svds(shards, 1, method=method), strict=True):
            alone = truncated_svd(shard, 1, method=method)
            assert all(torch.equal(a, b) for a, b in zip(found[:3], alone[:3], strict=True))
            assert found.captured_energy == alone.captured_energy
    save_file({k: v.contiguous() for k, v in results.items()}, f"{out}/{rank}.safetensors")


def _start(config: dict[str, Any], zero_optimization: dict[str, Any]) -> Any:
    """A run up to its engine, with other ZeRO settings than its ds_config's."""
    from lorasb_ds import zero
    from lorasb_ds.config import load_run_config
    from lorasb_ds.prepare import prepare
    from lorasb_ds.trainer import start_engine

    run = prepare(load_run_config(config), int(os.environ["WORLD_SIZE"]))
    zero.init_process_group()
    run.ds_config["zero_optimization"] |= zero_optimization
    return run, *start_engine(run)


def _assert_sharded(run: Any, adapters: dict[str, Any]) -> None:
    from lorasb_ds import zero

    if run.ds_config["zero_optimization"]["stage"] == 3 and zero.world_size() > 1:
        for adapter in adapters.values():
            for parameter in (adapter.base_layer.weight, adapter.lora_A, adapter.lora_B):
                assert parameter.numel() == 0, "not sharded"


def gradients(config: dict[str, Any], out: str, zero_optimization: dict[str, Any]) -> None:
    """The average gradient of all training rows, gathered whole on rank 0."""
    from lorasb_ds import zero
    from lorasb_ds.gradients import average_gradients, is_transposed
    from lorasb_ds.initialize import gather_rows
    from lorasb_ds.trainer import batches_of

    run, engine, adapters = _start(config, zero_optimization)
    examples = run.train.examples
    batches = batches_of(run, run.train, range(len(examples)))
    shards, loss = average_gradients(
        engine.module, adapters, batches, sum(e.num_label_tokens for e in examples)
    )
    zero.release(engine)
    _assert_sharded(run, adapters)
    assert all(p.grad is None for p in engine.module.parameters())
    whole = {}
    for name, adapter in adapters.items():
        long_side = max(adapter.out_features, adapter.in_features)
        G = gather_rows(shards.shards[name], long_side, None)
        if G is not None:
            transposed = is_transposed(adapter.out_features, adapter.in_features)
            whole[name] = (G.T if transposed else G).contiguous()
    if zero.rank() == 0:
        save_file(whole | {"loss": torch.tensor(loss)}, out)


def export(config: dict[str, Any], basis: str, out: str, zero_optimization: dict[str, Any]) -> None:
    """Fill given factors, take one optimizer step, and write logits and the PEFT folder."""
    from lorasb_ds import zero
    from lorasb_ds.export import collect_lora, save_peft_adapter
    from lorasb_ds.trainer import batches_of, train_step

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
    train_step(engine, batches_of(run, run.train, range(4)))
    input_ids = torch.tensor([run.train.examples[0].input_ids])
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
            targets=run.targets,
            layers=run.layers,
            base_model=run.config.model,
        )


def initialize(config: dict[str, Any], out: str, zero_optimization: dict[str, Any]) -> None:
    """The init on all training rows; what then lies in the layers, and what was reported."""
    from dataclasses import asdict

    from lorasb_ds import initialize as phase
    from lorasb_ds import zero
    from lorasb_ds.trainer import batches_of

    run, engine, adapters = _start(config, zero_optimization)
    examples = run.train.examples
    report, basis = phase.initialize(
        engine,
        adapters,
        batches_of(run, run.train, range(len(examples))),
        num_samples=len(examples),
        num_label_tokens=sum(e.num_label_tokens for e in examples),
        init_lr=run.config.init_lr,
        seed=0,
    )
    _assert_sharded(run, adapters)
    live = {}
    for name, adapter in adapters.items():
        live[f"{name}.R"] = zero.full_fp32(adapter.lora_R).clone()
        with zero.gathered([adapter.lora_A, adapter.lora_B]):
            live[f"{name}.A"] = adapter.lora_A.data.clone()
            live[f"{name}.B"] = adapter.lora_B.data.clone()
    if zero.rank() == 0:
        save_file(live, f"{out}/live.safetensors")
        save_file(basis, f"{out}/basis.safetensors")
        (Path(out) / "init.json").write_text(json.dumps(asdict(report)))
    else:
        assert basis == {}


def disagree(config: dict[str, Any]) -> None:
    """Ranks that hold different rows refuse to train, all of them."""
    from lorasb_ds import zero
    from lorasb_ds.config import ConfigError, load_run_config
    from lorasb_ds.prepare import check_ranks_agree, prepare

    run = prepare(load_run_config(config), 2)
    zero.init_process_group()
    check_ranks_agree(run)
    if zero.rank() == 1:
        run.train.examples.reverse()
    with pytest.raises(ConfigError, match=r"Rank 1 and rank 0 do not agree on the training rows\."):
        check_ranks_agree(run)


def not_finite(config: dict[str, Any]) -> None:
    """A gradient that is not finite on one rank is an error on every rank."""
    from lorasb_ds import zero
    from lorasb_ds.initialize import decompose

    zero.init_process_group()
    G = torch.ones(3, 2)
    if zero.rank() == 1:
        G[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="layer is not finite"):
        decompose("layer", G, 1, 1e-4)


if __name__ == "__main__":
    globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    if dist.is_initialized():
        dist.destroy_process_group()

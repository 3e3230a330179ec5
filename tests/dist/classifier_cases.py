"""What each rank of a test of classifiers does."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file

from tests.dist.cases import _start


def gradients(
    config: dict[str, Any], out: str, zero_optimization: dict[str, Any], by_segments: bool = False
) -> None:
    """The average gradient of all training rows, and the head that it depends on."""
    from lorasb_ds.distributed import zero
    from lorasb_ds.distributed.collectives import gather_rows
    from lorasb_ds.init.gradient_shards import gradient_shape, is_transposed
    from lorasb_ds.init.initialize import gradients_by_group

    run, engine, adapters = _start(config, zero_optimization)
    head = _head(run, engine)
    sample = run.sample(range(len(run.data.train.examples)))
    plan = run.memory.footprint.init
    assert (len(plan.groups) > 1) == by_segments
    found = {}
    for shards in gradients_by_group(engine.module, adapters, plan, sample, None, False):
        assert shards.from_segment == by_segments
        zero.release(engine)
        for name in list(shards.shards):
            adapter, shape = adapters[name], gradient_shape(adapters[name])
            G = gather_rows(shards.take(name).flatten(1), shape[0], None)
            if G is not None:
                transposed = is_transposed(adapter.out_features, adapter.in_features)
                G = G.view(shape)
                found[name] = (G.mT if transposed else G).contiguous()
        loss = shards.loss
    assert [n for n, p in engine.module.named_parameters() if p.grad is not None] == []
    assert all(p.requires_grad for n, p in engine.module.named_parameters() if n in head)
    if zero.rank() == 0:
        save_file(found | head | {"loss": torch.tensor(loss)}, out)


def step(config: dict[str, Any], out: str) -> None:
    """The head before and after one optimizer step with empty adapters, and the step's loss."""
    from lorasb_ds.distributed import zero
    from lorasb_ds.training.loop import train_step

    run, engine, _ = _start(config, {})
    before = {f"before.{name}": value.clone() for name, value in _head(run, engine).items()}
    engine.eval()  # dropout is none of this test's
    result = train_step(engine, run.step_batches(run.order.packs(0)))
    after = {f"after.{name}": value for name, value in _head(run, engine).items()}
    if zero.rank() == 0:
        save_file(before | after | {"loss": torch.tensor(result.loss)}, out)


def _head(run: Any, engine: Any) -> dict[str, torch.Tensor]:
    from lorasb_ds.distributed import zero

    return {name: zero.full_fp32(engine.module.get_parameter(name)) for name in run.base.head}

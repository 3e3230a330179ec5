"""How ranks exchange gradients: every way gives the same sums, and sends what the plan says."""

from __future__ import annotations

import pytest
import torch

from tests.runs import run_ranks

# Way -> (tokens of a call, EXCHANGE_BYTES).
WAYS = {"rows": (3, 1 << 27), "sums": (200, 1 << 27), "sums in pieces": (3, 64)}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_sums_of_all_ranks(way: str, world_size: int) -> None:
    tokens, limit = WAYS[way]
    run_ranks("exchanged", world_size, sends_rows=way == "rows", tokens=tokens, limit=limit)


@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_are_those_of_the_plan(world_size: int) -> None:
    run_ranks("exchanged_bytes", world_size)


def test_a_process_alone_exchanges_nothing(one_process: None) -> None:
    from lorasb_ds.init.gradient_shards import GradientShards
    from tests.dist.cases import linear_adapter

    shards = GradientShards({"layer": linear_adapter(12, 8)})
    x, grad_y = torch.randn(5, 8), torch.randn(5, 12)
    shards.calls.add("layer", x)
    shards.after_forward(True)
    shards.add("layer", x, grad_y)
    shards.after_backward()
    torch.testing.assert_close(shards.shards["layer"], grad_y.T @ x)

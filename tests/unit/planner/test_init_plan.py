"""Groups of layers within a memory budget."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lorasb_ds.distributed.collectives import row_range
from lorasb_ds.planner.init_plan import InitWork, plan_init
from lorasb_ds.planner.layer_groups import block_of, blocks_prefix

SIDES = st.integers(1, 300)
COMMON: dict[str, Any] = {"r": 1, "world_size": 1, "update": "sign", "tokens_per_micro_batch": 1}


@given(
    shapes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=12),
    world_size=st.integers(1, 9),
    budget=st.one_of(st.none(), st.integers(1, 10**6)),
)
def test_every_layer_once_within_the_budget(
    shapes: list[tuple[int, int]], world_size: int, budget: int | None
) -> None:
    targets = {f"layer{i}": shape for i, shape in enumerate(shapes)}
    work = InitWork(
        targets,
        r=1,
        world_size=world_size,
        update="sign",
        tokens_per_micro_batch=7,
        boundary_bytes=1000,
    )
    plan = plan_init(work, budget)
    assert [name for group in plan.groups for name in group] == list(targets)
    held = []
    for group in plan.groups:
        # What GradientShards allocates on the rank with most rows.
        rows = [
            max(len(row_range(max(targets[n]), k, world_size)) for k in range(world_size))
            for n in group
        ]
        held.append(sum(4 * k * min(targets[n]) for k, n in zip(rows, group, strict=True)))
    assert plan.shard_bytes == max(held)
    assert plan.predicted_bytes > plan.shard_bytes
    if budget is None:
        assert len(plan.groups) == 1
        assert not plan.exceeds_budget
    else:
        assert plan.exceeds_budget == (plan.predicted_bytes > budget)
        if plan.exceeds_budget:  # nothing smaller can be taken: one layer, and the workspace
            alone = max(4 * -(-max(s) // world_size) * min(s) for s in shapes)
            assert plan.predicted_bytes == alone + plan.workspace_bytes


def test_no_pass_too_many() -> None:
    targets = {f"layer{i}": (100, 10) for i in range(10)}
    options = COMMON | {"boundary_bytes": 0}
    work = InitWork(targets, **options)
    workspace = plan_init(work, None).workspace_bytes
    for layers_a_pass in (1, 3, 5, 10):
        budget = workspace + layers_a_pass * 4 * 100 * 10
        plan = plan_init(work, budget)
        assert len(plan.groups) == -(-10 // layers_a_pass)
        assert not plan.exceeds_budget


def test_groups_are_cut_between_blocks_where_they_fit() -> None:
    targets = {f"model.layers.{i}.{kind}": (100, 10) for i in range(6) for kind in "qkv"}
    options = COMMON | {"boundary_bytes": 50}
    work = InitWork(targets, **options)
    workspace = plan_init(work, None).workspace_bytes
    layer = 4 * 100 * 10
    # Room for 7 layers, and for what is stored between 3 groups: two blocks of 3 a group.
    plan = plan_init(work, workspace + 7 * layer + 4 * 50)
    assert plan.prefix == "model.layers."
    assert [len(group) for group in plan.groups] == [6, 6, 6]
    assert (plan.boundary_bytes, plan.exceeds_budget) == (4 * 50, False)
    # Room for 2 layers: every block in two parts.
    plan = plan_init(work, workspace + 2 * layer + 7 * 50)
    assert [len(group) for group in plan.groups] == [2, 1] * 6
    for group in plan.groups:
        assert len({name.split(".")[2] for name in group}) == 1


def test_blocks_prefix() -> None:
    assert blocks_prefix(["model.layers.0.mlp.up", "model.layers.11.mlp.up"]) == "model.layers."
    assert blocks_prefix(["h.0.experts.3.up", "h.1.experts.0.up"]) == "h."
    assert blocks_prefix(["model.layers.0.mlp.up", "model.project_in"]) is None
    assert blocks_prefix(["encoder.0.up", "decoder.0.up"]) is None
    assert block_of("model.layers.11.mlp.up", "model.layers.") == 11

"""Bytes that autograd keeps, in training and in the init. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lorasb_ds.planner.model_shape import Block, ModelShape
from lorasb_ds.planner.placement import Placement
from lorasb_ds.planner.workload import Workload

# For each token and expert, int64: the expert, its token and the way back; the router's choice.
INDEX_BYTES = 32


@dataclass(frozen=True)
class Activations:
    """Bytes for one micro-batch on one rank.

    Attributes:
        in_training: kept for the backward pass.
        in_init: kept for the backward pass of the init's longest segment.
        block_backward: of one block: what is recomputed of it, and its gradients.
        in_host_memory: the inputs of all blocks, if they are offloaded.
    """

    in_training: int
    in_init: int
    block_backward: int
    in_host_memory: int = 0


def activations(
    shape: ModelShape, placement: Placement, work: Workload, blocks_at_once: int
) -> Activations:
    """Count what autograd keeps.

    Args:
        blocks_at_once: the blocks of the init's longest segment.
    """
    d = placement.dtype_bytes
    # A layer with an adapter keeps A x; where A is trained, the input. For other layers zero.Init
    # replaces torch's linear function by its own (zero3_linear_wrap), whose autograd keeps the
    # input; torch's keeps a view of the weight, which keeps the gathered weight alive.
    inputs = not work.trains_r or (placement.sharded and len(work.targets) < len(shape.layers))
    router = placement.sharded and bool(shape.experts)
    kinds = Counter(shape.blocks)

    def sizes(inputs: bool, branches: bool) -> Mapping[Block, int]:
        return {
            block: block_activation_bytes(
                shape, block, work, d, inputs=inputs, branches=branches, router=router
            )
            for block in kinds
        }

    in_training, in_init = sizes(inputs, True), sizes(True, False)
    gradients = max(_gradient_bytes(shape, block, work, d) for block in kinds)
    boundaries = work.tokens * shape.hidden_size * d
    if work.gradient_checkpointing:
        of_blocks = shape.num_blocks * boundaries
        # On the device: those of the block that is run, and of the one on its way.
        kept = min(2, shape.num_blocks) if work.activation_offload else shape.num_blocks
        kept_in_init = min(kept, blocks_at_once)
        return Activations(
            in_training=kept * boundaries,
            in_init=kept_in_init * boundaries + max(in_init.values()),
            block_backward=gradients + max(in_training.values()),
            in_host_memory=of_blocks if work.activation_offload else 0,
        )
    largest = sorted((in_init[block] for block in shape.blocks), reverse=True)
    return Activations(
        in_training=sum(count * in_training[block] for block, count in kinds.items()),
        in_init=sum(largest[:blocks_at_once]),
        block_backward=gradients,
    )


def block_activation_bytes(
    shape: ModelShape,
    block: Block,
    work: Workload,
    dtype_bytes: int,
    *,
    inputs: bool,
    branches: bool = True,
    router: bool = False,
) -> int:
    """Return what autograd keeps of one decoder block for one micro-batch's backward pass.

    The base is frozen: its linear layers keep nothing. Kept are fp32 inputs of the norms; what
    ``Attention`` says, and the mask in the compute dtype, which pieces of rows do not have; both
    factors of an MLP's product and the input of its activation function; and the input of every R.
    For each expert of a token the same as of an MLP, and the output, which the router's weight
    multiplies.

    Args:
        inputs: keep the inputs of the linear layers, too, as the init needs them.
        branches: include the adapters.
        router: keep the router's input.
    """
    attention, hidden = block.attention, shape.hidden_size
    of_pairs = attention.scores or (1 if work.sequence_parallel == 1 else 0)
    numbers = attention.kept + work.max_length * of_pairs + 3 * block.mlp
    if block.shared_gate:
        numbers += hidden
    if branches:
        numbers += sum(map(work.rank_of, work.targets)) // shape.num_blocks
    if inputs:
        numbers += hidden * (2 if block.mlp else 1) + attention.inputs + block.mlp
    fp32 = block.normed + attention.fp32
    indices = 0
    if block.num_experts:
        # In the init, or where A is trained.
        expert_inputs = inputs and not (branches and work.trains_r)
        numbers += _routed_numbers(shape, work, inputs=expert_inputs, branches=branches)
        fp32 += 2 * block.num_experts
        indices = INDEX_BYTES * shape.experts_per_token
        if router:
            numbers += hidden * (4 // dtype_bytes if shape.fp32_routing else 1)
    return work.tokens * (numbers * dtype_bytes + 4 * fp32 + indices)


def _routed_numbers(shape: ModelShape, work: Workload, *, inputs: bool, branches: bool) -> int:
    """Count the numbers that a token keeps in the experts of a block."""
    blocks = sum(block.num_experts > 0 for block in shape.blocks)
    numbers = shape.expert_kept * shape.expert_width + shape.hidden_size
    if branches:
        numbers += work.expert_r * len(work.expert_targets) // blocks
    if inputs:
        numbers += sum(in_ for _, _, in_ in work.expert_targets.values()) // blocks
    return shape.experts_per_token * numbers


def _gradient_bytes(shape: ModelShape, block: Block, work: Workload, dtype_bytes: int) -> int:
    """Return the most that a block's backward pass holds beside what was kept for it.

    These are some gradients as wide as the hidden states; and of the scores, of an MLP's three
    products, or of the experts, which are not there at the same time. For each expert of a token
    they are three of the output (where they are fp32 one more, cast), or of its three products;
    with adapters perhaps those of both products and inputs.
    """
    hidden, scores = shape.hidden_size, block.attention.more_scores * work.max_length
    product_bytes = 4 if shape.fp32_routing else dtype_bytes
    of_output = hidden * (4 * product_bytes - dtype_bytes)
    routed = max(of_output, 3 * shape.expert_width * dtype_bytes)
    if work.expert_targets:
        routed = max(routed, 2 * (shape.expert_width + hidden) * dtype_bytes)
    widest = max(
        3 * block.mlp * dtype_bytes,
        scores * dtype_bytes,
        shape.experts_per_token * routed if block.num_experts else 0,
    )
    return work.tokens * (6 * hidden * dtype_bytes + widest)

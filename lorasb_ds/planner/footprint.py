"""Bytes that a rank holds while it loads, initializes and trains. Torch-free.

docs/planning.md has the formulas and their sources; `scripts/bench.py plan` compares them with
measured bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorasb_ds.planner.activations import activations
from lorasb_ds.planner.base_bytes import BaseBytes, base_bytes, held_bytes
from lorasb_ds.planner.gathers import gathered_bytes
from lorasb_ds.planner.init_bytes import largest_svd_bytes
from lorasb_ds.planner.init_plan import InitPlan, InitWork, plan_init
from lorasb_ds.planner.layer_groups import blocks_prefix
from lorasb_ds.planner.model_shape import ModelShape
from lorasb_ds.planner.placement import Placement
from lorasb_ds.planner.workload import Workload

# AdamW's fp32 master and two moments; and the fp32 sum of gradients, which ZeRO-3 always keeps.
OPTIMIZER_BYTES, GRADIENT_BYTES = 12, 4
# For each trained element on every rank where the optimizer works on whole matrices: a state, and
# value and gradient during the step. Muon's, at most; the master itself is sharded.
MATRIX_BYTES, MASTER_BYTES = 12, 4
# What a process holds beside tensors once it computes: kernels compiled on first use, buffers of
# gloo. Measured.
CPU_RUNTIME_BYTES = 100 << 20
# The loss computes so many logits at a time (loss.py), but at least so many rows, since fewer would
# make the matrix product inefficient.
LOGITS_AT_ONCE, MIN_LOGIT_ROWS = 1 << 23, 128
# For each: in the compute dtype, in fp32, its softmax, and the gradient in the compute dtype.
LOGIT_BYTES = 12
# During the load: DeepSpeed's engine and modules that are imported then. Measured.
CPU_LOAD_BYTES = 40 << 20


@dataclass(frozen=True)
class Footprint:
    """Bytes on the rank with most; ``host_`` ones are in host memory, the others on its device."""

    base: int  # its shards of weights and what it keeps whole
    quantization: int  # its shards of scales
    adapters: int  # A, B, R: its shards and what it keeps whole
    optimizer: int  # master and moments of R; ZeRO-3: and gradients, and the bucket to reduce them
    load_in_flight: int
    gathered: int  # by ZeRO-3 at a time
    dequantized: int  # one layer, and its factors where those of earlier bases are stacked on them
    activations: int  # in training, kept for the backward pass
    logits: int
    block_backward: int  # one block's activations where they are recomputed, and its gradients
    init: InitPlan
    init_activations: int  # with the layers' inputs that the init needs
    init_logits: int
    init_block_backward: int
    host_base: int  # offloaded shards
    host_init: int  # offloaded gradients and hidden states
    host_activations: int  # offloaded inputs of blocks
    host_basis: int  # R as the init leaves it, and PEFT's tensors; A and B are in their file
    host_rank0: int  # A and B of the adapter in fp32, while it is saved
    needs_gradient: bool  # training computes the init's gradient now and then

    @property
    def resident(self) -> int:
        """Return what stays on the device all the time."""
        return self.base + self.quantization + self.adapters + self.optimizer

    @property
    def load_peak(self) -> int:
        """Return the device's peak during the load.

        It ends with a forward pass of a few tokens (``loss.check_loss_head``).
        """
        reading = self.base + self.quantization + self.load_in_flight
        return max(reading, self.resident + self.gathered + self.dequantized)

    @property
    def init_peak(self) -> int:
        """Return the device's peak during the init."""
        kept = self.init.boundary_bytes + self.init.shard_bytes - self.host_init
        backward = (
            self.gathered
            + self.dequantized
            + self.init_activations
            + max(self.init_logits, self.init_block_backward + self.init.backward_bytes)
        )
        return self.resident + kept + max(backward, self.init.svd_bytes)

    @property
    def train_peak(self) -> int:
        """Return the device's peak during training."""
        step = (
            self.resident
            + self.gathered
            + self.dequantized
            + self.activations
            + max(self.logits, self.block_backward)
        )
        return max(step, self.init_peak) if self.needs_gradient else step

    @property
    def host(self) -> int:
        """Return what every rank holds in host memory."""
        return self.host_base + self.host_init + self.host_activations

    def phases(self, one_memory: bool) -> dict[str, int]:
        """Return the peaks of "load", "init" and "train".

        Args:
            one_memory: device and host are the same, as on CPUs: the peaks are those of rank 0's
                process. Otherwise they are those of the tensors on a rank's device.
        """
        if not one_memory:
            return {"load": self.load_peak, "init": self.init_peak, "train": self.train_peak}
        trained = max(self.train_peak, self.resident + self.host_rank0)
        return {
            "load": self.load_peak + self.host_base + CPU_LOAD_BYTES,
            "init": self.init_peak + self.host + self.host_basis + CPU_RUNTIME_BYTES,
            "train": trained + self.host_base + self.host_activations + CPU_RUNTIME_BYTES,
        }


def footprint(
    shape: ModelShape,
    placement: Placement,
    work: Workload,
    init: InitPlan,
    base: BaseBytes | None = None,
) -> Footprint:
    """Predict what a run holds.

    Args:
        init: of ``init_plan`` for the same shape and workload.
        base: of ``base_bytes`` for the same shape and placement, if that is known.
    """
    d, base = placement.dtype_bytes, base or base_bytes(shape, placement)
    adapter_kept, adapter_shards = held_bytes(list(_adapter_bytes(work, d)), placement)
    on_device = placement.offload == "none"
    hosted = base.shards + adapter_shards
    if placement.offload == "nvme":
        hosted = min(hosted, placement.nvme_buffer_elements * d)
    num_optimized = -(-work.num_trainable // placement.world_size)
    kept_gradients = GRADIENT_BYTES * num_optimized + placement.reduce_bucket_size * 4
    basis_size = work.num_in_pairs * work.pairs
    # The init holds the activations of the blocks of one group.
    blocks_at_once = max(init.blocks_of_groups(shape.num_blocks))
    kept = activations(shape, placement, work, blocks_at_once)
    kept_in_init = activations(shape, placement, work.in_init, blocks_at_once)
    return Footprint(
        base=base.kept + (base.shards - base.scale_shards if on_device else 0),
        quantization=base.scale_shards if on_device else 0,
        adapters=adapter_kept + (adapter_shards if on_device else 0),
        optimizer=_optimizer_bytes(work, num_optimized)
        + (kept_gradients if placement.sharded else 0),
        load_in_flight=base.in_flight,
        gathered=gathered_bytes(shape, placement, work),
        dequantized=base.dequantized + _stacked_bytes(work, d),
        activations=kept.in_training,
        logits=_logit_bytes(shape, work, d),
        block_backward=kept.block_backward,
        init=init,
        init_activations=kept_in_init.in_init,
        init_logits=_logit_bytes(shape, work.in_init, d),
        init_block_backward=kept_in_init.block_backward,
        host_base=0 if on_device else hosted,
        host_init=init.shard_bytes + init.boundary_bytes if work.init_offload else 0,
        host_activations=max(kept.in_host_memory, kept_in_init.in_host_memory),
        host_basis=_late_bytes(work),
        host_rank0=basis_size * 4,
        needs_gradient=work.tracks_gradient or work.max_kept > 0,
    )


def _stacked_bytes(work: Workload, dtype_bytes: int) -> int:
    """Count the copy of a layer's factors that is made of those in all of its bases."""
    if not work.max_kept:
        return 0
    sizes = [0]
    for name, (out, in_) in work.targets.items():
        k = work.pairs * work.rank_of(name)
        sizes.append(k * (out + in_ + k))
    for num_experts, out, in_ in work.expert_targets.values():
        k = work.pairs * work.expert_r
        sizes.append(num_experts * k * (out + in_ + k))
    return max(sizes) * dtype_bytes


def _late_bytes(work: Workload) -> int:
    """Count what is written into the basis's file only at the end of the init."""
    if work.trains_r or work.trained_sizes is not None:
        return 4 * (work.num_trainable - work.head_size)
    return 0


def _logit_bytes(shape: ModelShape, work: Workload, dtype_bytes: int) -> int:
    """Count the logits at a time, and the hidden states at the labels with their gradient."""
    labels = work.micro_batch_size * min(work.num_labels, work.piece_length)
    logits = logit_rows(labels, shape.vocab_size) * shape.vocab_size * LOGIT_BYTES
    return logits + 2 * labels * shape.hidden_size * dtype_bytes


def logit_rows(num_labels: int, vocab_size: int) -> int:
    """Return how many rows of logits the loss computes at a time.

    The chunks are of equal size, as far as ``num_labels`` allows.
    """
    limit = max(MIN_LOGIT_ROWS, LOGITS_AT_ONCE // vocab_size)
    times = -(-num_labels // limit)
    return -(-num_labels // max(1, times)) or 1


def init_plan(shape: ModelShape, work: Workload, world_size: int, dtype_bytes: int) -> InitPlan:
    """Plan the init's groups of layers for a workload.

    An init without a gradient has one group, and works on at most one layer on each rank.
    """
    if work.decomposes != "gradient" and not work.tracks_gradient:
        svd = 0
        if work.decomposes == "weight":
            svd = largest_svd_bytes(
                work.targets,
                work.expert_targets,
                work.svd_r,
                work.expert_r * work.directions,
                world_size,
                work.svd_update,
                work.init_memory_bytes,
            )
        return InitPlan(
            groups=(dict.fromkeys(work.adapted),),
            prefix=blocks_prefix(work.adapted),
            shard_bytes=0,
            backward_bytes=0,
            svd_bytes=svd,
            boundary_bytes=0,
            budget_bytes=work.init_memory_bytes,
        )
    rounds, rows = work.init_rounds(world_size), work.in_init.micro_batch_size
    rows_per_rank = min(work.init_samples, rounds * rows)
    of_init = InitWork(
        targets=work.targets,
        r=work.svd_r,
        world_size=world_size,
        update=work.svd_update,  # also where the gradient is only tracked: W0's takes most
        tokens_per_micro_batch=work.in_init.tokens,
        boundary_bytes=rows_per_rank * work.piece_length * shape.hidden_size * dtype_bytes,
        dtype_bytes=dtype_bytes,
        offload=work.init_offload,
        experts=work.expert_targets,
        experts_per_token=shape.experts_per_token,
        expert_r=work.expert_r * work.directions,
    )
    return plan_init(of_init, work.init_memory_bytes)


def _optimizer_bytes(work: Workload, num_optimized: int) -> int:
    """Count masters and states of a rank that optimizes ``num_optimized`` elements."""
    if work.whole_matrices:
        return MASTER_BYTES * num_optimized + MATRIX_BYTES * work.num_trainable
    return OPTIMIZER_BYTES * num_optimized


def _adapter_bytes(work: Workload, dtype_bytes: int) -> Iterator[int]:
    """Yield the bytes of every factor: A, B and R, or A and B; those of kept updates, too."""
    if work.trained_sizes is not None:
        yield from (size * dtype_bytes for size in work.trained_sizes)
        yield work.num_kept * dtype_bytes
        return
    for name, (out_features, in_features) in work.targets.items():
        r, sides = work.rank_of(name), [in_features, out_features]
        sides = [*sides, r] if work.trains_r else sides
        for side in sides * work.pairs:
            yield r * side * dtype_bytes
    for num_experts, out_features, in_features in work.expert_targets.values():
        sides = [in_features, out_features]
        sides = [*sides, work.expert_r] if work.trains_r else sides
        for side in sides * work.pairs:
            yield num_experts * work.expert_r * side * dtype_bytes

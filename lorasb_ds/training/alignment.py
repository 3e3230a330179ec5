"""How much of the full gradient an adapter can follow, and how its steps agree with full training.

    W = W0 + B R A, R trained:           P(G) = Q_B Q_Bᵀ G Q_A Q_Aᵀ
    W = W0 + s B A, A and B trained:     P(G) = G - (I - Q_B Q_Bᵀ) G (I - Q_A Q_Aᵀ)

P is the orthogonal projection onto the changes of W that small changes of the trained factors can
make; Q_B and Q_A are orthonormal bases of B's columns and A's rows. Everything is measured where
the last step began: there G is dL/dW, with the adapter, on rows that the init's gradient has not
seen. The first step of full fine-tuning is then compared with the step that was taken. G comes from
the init's own hooks, in row shards; no rank ever holds a whole one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.adapters.low_rank import LoraPair
from lorasb_ds.config.methods import TRAIN_R
from lorasb_ds.data.batch import Sample
from lorasb_ds.data.sampler import init_sample
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.distributed.collectives import Group, all_reduce, rank_and_size, row_range
from lorasb_ds.init.gradient_shards import is_transposed
from lorasb_ds.init.gradients import average_gradients
from lorasb_ds.planner.layer_groups import LayerGroup
from lorasb_ds.runs.plots import describe_alignment
from lorasb_ds.runs.run_log import RunLog
from lorasb_ds.training.engine_state import rng_states, set_rng_states
from lorasb_ds.training.phases import phase
from lorasb_ds.training.prepare import Prepared
from lorasb_ds.training.training_run import TrainingRun

Values = dict[str, torch.Tensor]  # factor -> its whole value


@dataclass(frozen=True)
class LayerAlignment:
    """The alignment of one layer at one step. A cosine is nan if one side of it is zero.

    Attributes:
        gradient_cosine: ``‖P(G)‖ / ‖G‖``, the cosine between G and its projection.
        sign_cosine: the same for sign(G): the best cosine that any change of the trained factors
            can have with AdamW's first step in full fine-tuning.
        update_cosine: the cosine between that step, ``-sign(G)``, and the step that was taken.
        gradient_norm: ``‖G‖``, with G of the mean loss over label tokens.
    """

    gradient_cosine: float
    sign_cosine: float
    update_cosine: float
    gradient_norm: float


def measure_alignment(
    engine: Any,
    adapters: Mapping[str, AdapterLinear],
    probe: Sample,
    groups: Sequence[LayerGroup],
    before: Mapping[str, Values] | None,
    *,
    offload: bool = False,
) -> dict[str, LayerAlignment]:
    """Measure the alignment of every layer. Collective.

    Training is not disturbed: generators, train mode and the engine's gradients are restored.

    Args:
        engine: between two steps; its parameters may be sharded by ZeRO-3.
        probe: the rows; every rank has as many batches.
        groups: layers whose gradients are held at the same time; each group takes a forward and a
            backward pass.
        before: ``trained_factors`` before the last step; None: the last step was the init's, from
            the base.
        offload: keep gradient shards in host memory.
    Returns:
        Layer -> its alignment, in the adapters' order; the same on every rank.
    Communication: that of the gradients; each layer's factors are gathered, and the trained ones
        filled twice; one all-reduce for each layer, of ``measure_layer``.
    """
    group = zero.new_group()  # the engine's own traffic goes through another
    found = {}
    with _same_random_numbers(), _where_the_step_began(adapters, before):
        for layers in groups:
            gradients = average_gradients(
                engine.module,
                adapters,
                probe.batches,
                probe.num_label_tokens,
                group,
                layers=layers,
                offload=offload,
                with_adapters=before is not None,
            )
            zero.release(engine)
            for name in layers:
                adapter, G = adapters[name], gradients.take(name)
                span, step = _span_and_step(adapter, None if before is None else before[name])
                if is_transposed(adapter.out_features, adapter.in_features):
                    span, step = (LoraPair(pair.B.T, pair.A.T) for pair in (span, step))
                found[name] = measure_layer(G, span, step, adapter.trained == TRAIN_R, group)
    dist.destroy_process_group(group)
    return {name: found[name] for name in adapters if name in found}


@contextmanager
def _where_the_step_began(
    adapters: Mapping[str, AdapterLinear], before: Mapping[str, Values] | None
) -> Iterator[None]:
    """Let the model compute with these factors inside; fp32 masters stay. Collective."""
    if before is None:  # the base: average_gradients switches the branches off
        yield
        return
    trained = [(a.factor(key), before[n][key]) for n, a in adapters.items() for key in a.trained]
    for factor, value in trained:
        zero.fill(factor, value.to(accelerator.device()))
    yield
    for factor, _ in trained:
        zero.fill(factor, zero.full_fp32(factor))


def _span_and_step(adapter: AdapterLinear, before: Values | None) -> tuple[LoraPair, LoraPair]:
    """Return A and B where the last step began, and what it has added to W. Collective."""
    now = {key: zero.full_fp32(adapter.factor(key)) for key in adapter.trained}
    frozen = {key: adapter.factor(key) for key in adapter.frozen}
    with zero.gathered(frozen.values()):
        now |= {key: value.detach().float().clone() for key, value in frozen.items()}
    if before is None:  # the init's step is compared with what its own A and B can follow
        span, earlier = now, now | _of_base(adapter, now)
    else:
        earlier = now | {key: value.to(accelerator.device()) for key, value in before.items()}
        span = earlier
    step = difference(adapter.plain_lora(now), adapter.plain_lora(earlier))
    return LoraPair(span["lora_A"], span["lora_B"]), step


def measure_layer(
    G: torch.Tensor, span: LoraPair, step: LoraPair, trains_r: bool, group: Group = None
) -> LayerAlignment:
    """Measure the alignment of one layer, of whose gradient every rank has some rows. Collective.

    Args:
        G: (rows here, short), fp32: the shard of ``row_range(long, rank, world_size)``, of the
            gradient or its transpose.
        span: A (r, short) and B (long, r), whole: the factors, or their transposes. They may have
            any rank, zero included.
        step: (k, short) and (long, k), whole, likewise: the last update.
        trains_r: whether only R, between A and B, is trained.
    Communication: one all-reduce of 2 r x r and 6 fp32 numbers; of 2 r x short more, where A and B
        are trained.
    """
    rank, world_size = rank_and_size(group)
    rows = row_range(len(span.B), rank, world_size)
    here = slice(rows.start, rows.stop)
    bases = orthonormal_basis(span.B)[here], orthonormal_basis(span.A.T)
    signs, made = G.sign(), step.B[here] @ step.A
    of_gradient, of_signs = (_parts(M, *bases, trains_r) for M in (G, signs))
    of_step = [made.square().sum(), -(made * signs).sum()]
    sums = _summed([*of_gradient, *of_signs, *of_step], group)
    *projections, made_squared, agreement = sums
    of_gradient, of_signs = projections[: len(of_gradient)], projections[len(of_gradient) :]
    sizes = made_squared.item() * of_signs[0].item()
    return LayerAlignment(
        gradient_cosine=_cosine(*of_gradient),
        sign_cosine=_cosine(*of_signs),
        update_cosine=_ratio(agreement.item(), math.sqrt(sizes)),
        gradient_norm=of_gradient[0].sqrt().item(),
    )


def _parts(
    M: torch.Tensor, left: torch.Tensor, right: torch.Tensor, trains_r: bool
) -> list[torch.Tensor]:
    """Return the summands of some rows of M for ``‖M‖²`` and ``Q_Bᵀ M Q_A``.

    Where A and B are trained, those for ``Q_Bᵀ M`` and ``‖M Q_A‖²`` follow.
    """
    along = M @ right
    parts = [M.square().sum(), left.T @ along]
    return parts if trains_r else [*parts, left.T @ M, along.square().sum()]


def _cosine(
    squared: torch.Tensor,
    core: torch.Tensor,
    of_left: torch.Tensor | None = None,
    of_right: torch.Tensor | None = None,
) -> float:
    """Return ``‖P(M)‖ / ‖M‖`` from the sums of ``_parts``."""
    held = core.square().sum()
    if of_left is not None and of_right is not None:  # both sides, minus what they share
        held = of_left.square().sum() + of_right - held
    return math.sqrt(max(_ratio(held.item(), squared.item()), 0.0))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def orthonormal_basis(M: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis (m, k), fp32, of the columns of M (m, n).

    k is the rank of M, 0 for zeros: directions whose singular value is within rounding of 0,
    relative to the largest one, do not count.
    """
    Q, core = torch.linalg.qr(M.float())
    U, S, _ = torch.linalg.svd(core)
    rounding = len(core) * torch.finfo(torch.float32).eps * S.max()
    return Q @ U[:, rounding < S]


def difference(now: LoraPair, before: LoraPair) -> LoraPair:
    """Return ``B A - B' A' = (B - B') A + B' (A - A')``, without cancellation: steps are small."""
    if torch.equal(now.A, before.A):
        return LoraPair(now.A, now.B - before.B)
    return LoraPair(
        torch.cat([now.A, now.A - before.A]), torch.cat([now.B - before.B, before.B], dim=1)
    )


def trained_factors(adapters: Mapping[str, AdapterLinear]) -> dict[str, Values]:
    """Copy the fp32 masters of all trained factors, whole, to every rank's host. Collective."""
    return {
        name: {
            key: zero.full_fp32(adapter.factor(key)).to("cpu", copy=True) for key in adapter.trained
        }
        for name, adapter in adapters.items()
    }


def _of_base(adapter: AdapterLinear, values: Values) -> Values:
    """Return the trained factors with which W is W0: an offset's, or zeros."""
    offsets = {key: key.replace("lora_", "offset_") for key in adapter.trained}
    return {
        key: values[offset] if offset in values else torch.zeros_like(values[key])
        for key, offset in offsets.items()
    }


def _summed(parts: Sequence[torch.Tensor], group: Group) -> list[torch.Tensor]:
    """Sum tensors over the ranks, in one all-reduce. Collective."""
    flat = all_reduce(torch.cat([part.flatten() for part in parts]), group)
    sizes = [part.numel() for part in parts]
    return [whole.view_as(part) for whole, part in zip(flat.split(sizes), parts, strict=True)]


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Restore the random generators at the end: OPT's layer drop draws even at a rate of 0."""
    states = rng_states(accelerator.device())
    try:
        yield
    finally:
        set_rng_states(states, accelerator.device())


def track_alignment(training: TrainingRun, before: Mapping[str, Values] | None) -> None:
    """Measure how well the last step has followed the full gradient, and log it. Collective.

    Args:
        before: ``trained_factors`` before that step; None after the init.
    """
    run, step = training.run, training.state.step
    # Of linear layers: experts are left out.
    planned = run.memory.footprint.init.groups
    groups = [{name: None for name in group if name in run.adapter.targets} for group in planned]
    with phase(run, "init", "alignment"):
        found = measure_alignment(
            training.engine,
            training.adapters,
            probe_of(run),
            [group for group in groups if group],
            before,
            offload=run.config.init_offload,
        )
    rows = [{"step": step, "layer": name} | asdict(layer) for name, layer in found.items()]

    def log_rows(log: RunLog) -> None:
        log.write_alignment(rows)
        log.say(describe_alignment(log.alignment))

    training.to_log(log_rows)


def probe_of(run: Prepared) -> Sample:
    """Return training rows that the init's gradient is not of, the same at every step.

    They are those on which the init measures its losses; if the init has rows of its own
    (--init-data), as many training rows.
    """
    if run.config.init_data is None:
        return run.sample(run.probe_rows)
    _, rows = init_sample(len(run.data.train.examples), run.config.init_samples, run.config.seed)
    return run.sample(rows, run.data.train)

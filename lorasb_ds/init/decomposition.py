"""From gradients to the SVD of their updates, and the report of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from lorasb_ds.distributed.collectives import Group
from lorasb_ds.init.init_report import LayerInit
from lorasb_ds.init.products import full_precision
from lorasb_ds.init.sharded_svd import TruncatedSVD, truncated_svds
from lorasb_ds.init.update_rules import UPDATE_RULES, update_svd
from lorasb_ds.init.whole_svd import truncated_svds_by_rank


@full_precision()
def decompose(
    gradients: Mapping[str, torch.Tensor],
    r: int,
    update: str,
    group: Group = None,
    seed: int = 0,
    scales: Mapping[str, float] | None = None,
    heights: Sequence[int] | None = None,
) -> dict[str, tuple[TruncatedSVD, torch.Tensor]]:
    """Compute the SVD of some layers' updates, and the slope of each direction. Collective.

    Args:
        gradients: layer -> (rows here, short side), this rank's shard of its gradient or of the
            transpose. Give as many layers as there are ranks, to use all ranks.
        update: a key of ``UPDATE_RULES``.
        scales: layer -> its ``step_scale``; 1 by default.
        heights: as for ``decompose_matrices``.
    Returns:
        layer -> its SVD, and the slopes ``S_i u_iᵀ G v_i``, (r,), which are the same for the
        transpose.
    Raises:
        FloatingPointError: on every rank, if a gradient is not finite.
    """
    # Looked at together: the host would wait for the device at each layer.
    finite = torch.stack([torch.isfinite(G).all() for G in gradients.values()]).float()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=group)
    if bad := [name for name, ok in zip(gradients, finite.tolist(), strict=True) if not ok]:
        raise FloatingPointError(
            f"the gradient of {', '.join(bad)} is not finite. The base or the data hold values "
            "that overflow in its dtype. Look at the base's loss, or try --dtype fp32."
        )
    updates = [UPDATE_RULES[update].matrix(G, group) for G in gradients.values()]
    results = {}
    svds = decompose_matrices(updates, r, group, seed, heights)
    for (name, G), svd in zip(gradients.items(), svds, strict=True):
        svd = update_svd(svd, update, (scales or {}).get(name, 1.0))
        along = ((svd.U_local.T @ G) * svd.Vh).sum(1)  # (r,): u_iᵀ G v_i, of the rows here
        dist.all_reduce(along, group=group)
        results[name] = svd, svd.S * along
    return results


def decompose_matrices(
    shards: Sequence[torch.Tensor],
    r: int,
    group: Group,
    seed: int,
    heights: Sequence[int] | None,
) -> list[TruncatedSVD]:
    """Compute the SVDs of row-sharded matrices. Collective.

    Args:
        heights: the rows of each whole matrix, to decompose each on one rank; None: all ranks
            decompose each.
    """
    if heights is None:
        return truncated_svds(shards, r, group=group, seed=seed)
    return truncated_svds_by_rank(shards, heights, r, group=group, seed=seed)


@full_precision()
def describe_layer(
    svd: TruncatedSVD,
    slopes: torch.Tensor,
    stored_dtype: torch.dtype,
    batches_reached: int,
    group: Group,
) -> LayerInit:
    """Return the report of one layer. Collective.

    Args:
        slopes: (r,), ``S_i u_iᵀ G v_i``.
        stored_dtype: the dtype in which A and B are stored.
    """

    def error(dtype: torch.dtype) -> torch.Tensor:
        U, Vh = (factor.to(dtype).float() for factor in (svd.U_local, svd.Vh))
        gram = U.T @ U
        dist.all_reduce(gram, group=group)
        identity = torch.eye(len(gram), device=gram.device)
        return torch.stack([(M - identity).abs().max() for M in (gram, Vh @ Vh.T)]).max()

    errors = torch.stack([error(torch.float32), error(stored_dtype)])
    # One wait for the device, for all numbers; fp64 holds each of them exactly.
    found = torch.cat([part.double() for part in (errors, svd.S, slopes)]).tolist()
    r = len(svd.S)
    return LayerInit(
        captured_energy=svd.captured_energy,
        spectrum=tuple(found[2 : 2 + r]),
        orthonormality_error=found[0],
        stored_orthonormality_error=found[1],
        slopes=tuple(found[2 + r :]),
        batches_reached=batches_reached,
    )

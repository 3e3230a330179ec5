"""Rows that neighbouring ranks compute together, by DeepSpeed's Ulysses: ``--sequence-parallel``.

Every rank of a group holds its piece of each row (``Batch.piece``). Attention alone needs whole
rows: an all-to-all brings each rank all positions of some of the heads, and a second one brings its
own positions back (arXiv 2309.14509; of transformers' models, arXiv 2506.13996). To the rest of a
step these ranks are like any others: losses and gradients are sums over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_whole_rows = False
_replaced: dict[str, Callable[..., Any]] = {}  # of transformers' registry, by name


def share_rows(implementation: str, size: int) -> None:
    """Let every ``size`` neighbouring ranks compute the attention of rows together. Collective.

    Until ``unshare_rows`` the inputs of models are pieces of rows, but for those inside
    ``whole_rows``.

    Args:
        implementation: the name of the model's attention in transformers.
    """
    unshare_rows()
    group, _ = dist.new_subgroups(size)
    _replaced[implementation] = core = ALL_ATTENTION_FUNCTIONS[implementation]
    ALL_ATTENTION_FUNCTIONS[implementation] = _shared(core, group)


def unshare_rows() -> None:
    """Undo ``share_rows``, for what a process does after a run. Not collective."""
    ALL_ATTENTION_FUNCTIONS.update(_replaced)
    _replaced.clear()


@contextmanager
def whole_rows() -> Iterator[None]:
    """Let each rank compute whole rows by itself inside the ``with`` block, such as to generate."""
    global _whole_rows
    before, _whole_rows = _whole_rows, True
    try:
        yield
    finally:
        _whole_rows = before


def _shared(core: Callable[..., Any], group: dist.ProcessGroup) -> Callable[..., Any]:
    """Return DeepSpeed's attention around another one, for transformers' registry.

    DeepSpeed's own ``register_with_transformers`` (0.19.8) makes it for one number of rows, drops
    the masks of whole rows, too, leaves each layer the number of queries for a key that its heads
    on this rank have, and returns the heads joined, for which GPT-2 and others do not ask.
    """

    @cache
    def ulysses(rows: int, heads: int, kv_heads: int, head_size: int) -> UlyssesSPAttentionHF:
        return UlyssesSPAttentionHF(
            core,
            batch_size=rows,
            attn_head_count=heads,
            attn_head_size=head_size,
            kv_head_count=kv_heads,
            num_hidden_layers=0,  # of its debug mode
            process_group=group,
            seq_length_is_variable=True,
        )

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if _whole_rows:
            return core(module, query, key, value, attention_mask, *args, **kwargs)
        rows, heads, length, head_size = query.shape
        first = dist.get_rank(group) * length
        positions = torch.arange(first, first + length, device=query.device)
        # Not all models pass them on. DeepSpeed gathers them for kernels that find packed rows.
        kwargs["position_ids"] = positions.expand(rows, -1).contiguous()
        queries_of_key = getattr(module, "num_key_value_groups", None)
        try:
            # A mask would be this piece's. Rows are padded at their ends, which no token sees.
            share = ulysses(rows, heads, key.shape[1], head_size)
            # Values must be as wide as keys; DeepSeek's are narrower.
            width = value.shape[-1]
            value = F.pad(value, (0, head_size - width))
            output, weights = share(module, query, key, value, None, *args, **kwargs)
            return output.unflatten(-1, (heads, head_size))[..., :width], weights
        finally:
            if queries_of_key is not None:
                module.num_key_value_groups = queries_of_key

    return attention

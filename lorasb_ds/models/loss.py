"""The loss, computed at label positions only, with a few rows of logits at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lorasb_ds.data.batch import Batch
from lorasb_ds.data.tokenization import IGNORE_INDEX
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.classification import row_loss_sum
from lorasb_ds.planner.footprint import logit_rows

# The same head may differ by so many roundings of the largest logit, in products of other shapes.
ROUNDINGS = 4
# Of the largest logit: so much must not depend on later tokens. Scans differ by their rounding.
SEEN = 1e-5
# fp16 would lose the gradient of tokens that are almost certain, below its smallest number; the
# engine applies its loss scale only later.
FP16_SCALE = 256.0
# Liger's kernel is used if it is installed, on these devices.
LIGER, TRITON_DEVICES = find_spec("liger_kernel") is not None, ("cuda", "xpu")

# Names of c of ``c tanh(logit / c)`` in configurations.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class LossHead(nn.Module):
    """Σ cross-entropy of ``cap(scale · (W h + b))`` and its gradient at h, a few rows at a time.

    The head is frozen, so the backward pass needs only the gradient at h. It is computed while the
    logits are there: nothing of the vocabulary's size is kept, and ZeRO-3 gathers the head once.
    It is a module of its own because DeepSpeed gathers by modules.

    Args:
        linear: the model's output embedding, with W (vocabulary, hidden) and perhaps b.
        scale: factor of the logits, in Cohere's and Granite's models.
        softcap: c of ``c tanh(logit / c)``, in Gemma 2 (arXiv 2408.00118, section 2).
    """

    def __init__(self, linear: Any, scale: float = 1.0, softcap: float | None = None) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.softcap = scale, softcap

    @torch.no_grad()
    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor, with_grad: bool, each: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the loss, and its gradient if asked for.

        Args:
            hidden: (n, hidden), at the positions that predict a label; n may be 0.
            labels: (n,).
            each: return every position's loss, not the sum.
        Returns:
            The loss, or (n,) losses, fp32; and its gradient at ``hidden`` in the head's dtype, in
            fp16 times ``FP16_SCALE``; None without ``with_grad``.
        """
        hidden = hidden.to(self.weight.dtype)  # Mamba's is fp32
        # Liger's does not take zero rows.
        if self.sums_by_liger(hidden.device) and len(hidden) > 0 and not each:
            return self.by_liger(hidden, labels, with_grad)
        grad = torch.empty_like(hidden) if with_grad else None
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        rows = logit_rows(len(hidden), len(self.weight))
        for start in range(0, len(hidden), rows):
            wanted = labels[start : start + rows]
            logits = self.logits(hidden[start : start + rows])
            log_p = F.log_softmax(logits, -1, dtype=torch.float32)
            losses[start : start + rows] = F.nll_loss(log_p, wanted, reduction="none")
            if grad is not None:
                grad_logits = log_p.exp_()  # minus one-hot: the gradient at the capped logits
                grad_logits[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
                if self.softcap is not None:
                    grad_logits *= 1 - (logits / self.softcap).square()
                if self.scale != 1:
                    grad_logits *= self.scale
                grad_logits = (grad_logits * _scale(hidden.dtype)).to(hidden.dtype)
                torch.mm(grad_logits, self.weight, out=grad[start : start + rows])
        return losses if each else losses.sum(), grad

    def sums_by_liger(self, device: torch.device) -> bool:
        """Return whether Liger's kernel computes sums there; with a soft cap it is untested."""
        return LIGER and device.type in TRITON_DEVICES and self.softcap is None

    def by_liger(
        self, hidden: torch.Tensor, labels: torch.Tensor, with_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Do the same by Liger's fused kernel (arXiv 2410.10989), which reads logits less often."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        cross_entropy = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        bias = None if self.bias is None else self.bias * self.scale
        with torch.set_grad_enabled(with_grad):
            hidden = hidden.detach().requires_grad_(with_grad)
            loss = cross_entropy(self.weight, self.scale * hidden, labels, bias)
            grad = None
            if with_grad:
                (grad,) = torch.autograd.grad(loss * _scale(hidden.dtype), hidden)
        return loss.detach().float(), grad

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (n, hidden) to logits (n, vocabulary), in fp32 if they are scaled or capped."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1:
            logits = logits.float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits.float() / self.softcap)
        return logits


class _GivenGradient(torch.autograd.Function):
    """A loss with its gradient at ``hidden`` as ``LossHead`` returns them."""

    @staticmethod
    def forward(ctx, hidden, loss, grad):
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        (grad,) = ctx.saved_tensors
        # In fp32: the engine's loss scale alone may exceed fp16's range.
        scaled = grad.float() * (grad_loss.float() / _scale(grad.dtype))
        return scaled.to(ctx.dtype), None, None


def _scale(dtype: torch.dtype) -> float:
    return FP16_SCALE if dtype == torch.float16 else 1.0


def token_loss_sum(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return Σ cross-entropy over a batch's label tokens, in fp32; 0 for a batch without weight.

    Of rows that are classified: Σ ``row_losses``.
    Prompts and padding never reach the head: their logits would be a step's largest tensor.
    Collective under ZeRO-3.

    Args:
        model: a causal model or a classifier, or the engine around it.
    """
    if batch.targets is not None:
        return row_loss_sum(model, batch)
    if getattr(getattr(model, "module", model), "loss_head", None) is not None:
        labels = batch.next_labels.flatten()[batch.label_positions]
        predicts = (batch.label_positions, labels)
        return model(**batch.inputs, predicts=predicts, use_cache=False)
    return label_losses(model, batch).sum()


def label_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the cross-entropy at label positions, by the model's own head.

    Collective under ZeRO-3.

    Returns:
        (rows, positions), fp32: one column for every position at which some row predicts a label;
        0 where a row predicts none.
    """
    next_labels = batch.next_labels
    positions = (next_labels != IGNORE_INDEX).any(0).nonzero().flatten()
    if len(positions) == 0:
        positions = positions.new_zeros(1)  # no weight: the head still takes part in gathers
    logits = model(**batch.inputs, logits_to_keep=positions, use_cache=False).logits
    if logits.shape[1] != len(positions):  # some models make all of them, whatever they are told
        logits = logits[:, positions]
    return F.cross_entropy(
        logits.float().flatten(0, 1),
        next_labels[:, positions].flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    ).view(len(next_labels), -1)


def add_loss_head(model: Any) -> None:
    """Let a transformers model compute its loss by ``LossHead``; call before the engine is made.

    Called with ``predicts``, the positions that predict a label in the flattened batch and those
    labels, (n,) each, the model then returns the loss instead of logits; with ``each``, every
    position's. They are not a mask: the host would wait for the device to count it, in the backward
    pass, too.
    The model itself is called because DeepSpeed's hooks are on it.
    """
    linear = model.get_output_embeddings()
    if model.base_model is model or getattr(type(linear), "forward", None) is not nn.Linear.forward:
        return  # also where the checkpoint holds a quantized head
    config = model.config.get_text_config()
    scale = getattr(model, "logit_scale", None)  # Cohere
    if scale is None:
        scale = 1 / (getattr(config, "logits_scaling", None) or 1)  # Granite
    softcap = next(filter(None, (getattr(config, name, None) for name in SOFTCAPS)), None)
    model.loss_head = LossHead(linear, scale, softcap)
    model.forward = MethodType(_forward_with_loss(type(model).forward), model)


@torch.no_grad()
def check_loss_head(model: Any, input_ids: torch.Tensor) -> bool:
    """Remove the loss head if the model computes other logits than it; refuse encoders. Collective.

    Another row has another last token, which those before must not see; what differs between equal
    rows is the kernels' own noise. The labels are, in turn, the tokens that the model finds most
    and least likely: their loss depends on the sum of all exponentials and on both ends of the
    logits. Every position's is compared (in a sum, errors may cancel), and the sum where another
    kernel computes it.

    Args:
        input_ids: (1, length), a few tokens.
    Returns:
        Whether the loss head stays.
    Raises:
        ConfigError: on every rank, if tokens see those after them.
    """
    input_ids = input_ids.repeat(3, 1)
    input_ids[2, -1] = (input_ids[2, -1] + 1) % model.config.get_text_config().vocab_size
    logits = model(input_ids=input_ids, use_cache=False).logits.float()
    noise, changed = (torch.dist(logits[0, :-1], logits[i, :-1], torch.inf) for i in (1, 2))
    limit = max(SEEN, torch.finfo(model.dtype).eps) * logits.abs().max() + 4 * noise
    if _on_all_ranks(changed > limit):
        raise ConfigError(
            f"A {type(model).__name__} is no causal language model: its tokens see those after "
            "them, which it would have to predict. (Another last token of a row changes what comes "
            "before it.)"
        )
    if getattr(model, "loss_head", None) is None:
        return False
    labels = logits.argmax(-1)
    labels[:, ::2] = logits[:, ::2].argmin(-1)
    labels, logits = labels.flatten(), logits.flatten(0, 1)
    expected = F.cross_entropy(logits, labels, reduction="none")
    predicts = {"predicts": (torch.arange(len(labels), device=labels.device), labels)}
    each = model(input_ids=input_ids, use_cache=False, each=True, **predicts)
    roundings = ROUNDINGS * torch.finfo(model.dtype).eps
    largest = roundings * (logits.abs().amax(-1) + expected) + 4 * noise
    same = ((each - expected).abs() <= largest).all()
    if model.loss_head.sums_by_liger(logits.device):
        total = model(input_ids=input_ids, use_cache=False, **predicts)
        same &= (total - expected.sum()).abs() <= largest.sum()
    if not _on_all_ranks(same):
        model.loss_head = None
        return False
    return True


def _on_all_ranks(holds: torch.Tensor) -> bool:
    """Return whether something holds on every rank: those that decided differently would wait."""
    number = holds.float()
    if dist.is_initialized():
        dist.all_reduce(number, op=dist.ReduceOp.MIN)
    return bool(number)


def _forward_with_loss(forward: Any) -> Any:
    @functools.wraps(forward)  # generate() inspects its signature
    def with_loss(
        model: Any,
        *args: Any,
        predicts: tuple[torch.Tensor, torch.Tensor] | None = None,
        each: bool = False,
        **kwargs: Any,
    ) -> Any:
        if predicts is None:  # for generation and logits
            return forward(model, *args, **kwargs)
        positions, labels = predicts
        hidden = model.base_model(*args, **kwargs)[0].flatten(0, 1).index_select(0, positions)
        loss, grad = model.loss_head(hidden.detach(), labels, hidden.requires_grad, each)
        return loss if grad is None else _GivenGradient.apply(hidden, loss, grad)

    return with_loss


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode inside, and restore its mode at the end."""
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> float:
    """Return the mean loss over label tokens, or over rows that are classified, in eval mode.

    Collective if a process group exists.

    Args:
        batches: this rank's; every rank has as many.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # Σ loss, label tokens
    with eval_mode(model):
        for batch in batches:
            totals[0] += token_loss_sum(model, batch.to(device)).double()
            totals[1] += batch.num_label_tokens
    if dist.is_initialized():
        dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()


@torch.no_grad()
def log_likelihoods(model: nn.Module, batch: Batch) -> list[float]:
    """Return each row's Σ log p of its label tokens, in fp32. Collective under ZeRO-3."""
    return (-label_losses(model, batch).sum(1)).tolist()

"""The loss made a few rows at a time, against the plain one of all logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from lorasb_ds.data.batch import Batch
from lorasb_ds.data.tokenization import IGNORE_INDEX
from lorasb_ds.errors import ConfigError
from lorasb_ds.models import loss as loss_module
from lorasb_ds.models.loss import (
    LossHead,
    _GivenGradient,
    add_loss_head,
    check_loss_head,
    token_loss_sum,
)
from lorasb_ds.planner.footprint import logit_rows
from tests.text_families import tiny_config

VOCABULARY = 300
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": hf.LlamaConfig(**SIZES),
    "llama tied": hf.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2 capped": hf.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.3),
    "cohere scaled": hf.CohereConfig(**SIZES, logit_scale=0.3),
    "granite scaled": hf.GraniteConfig(**SIZES, logits_scaling=6.0),
    "phi with a bias": hf.PhiConfig(**SIZES),
    "mixtral": hf.MixtralConfig(**SIZES, num_local_experts=2),
}


def make(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for p in model.parameters():  # logits of some size, biases and all
        p.data = torch.randn_like(p) * (0.3 if p.ndim > 1 else 1.0)
    return model.requires_grad_(False)


def use_loss_head(model: Any) -> None:
    add_loss_head(model)
    assert check_loss_head(model, torch.arange(1, 9)[None])


def ragged(length: int = 24) -> Batch:
    """Two rows whose labels begin and end elsewhere."""
    ids = torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :9] = labels[1, :15] = labels[1, 22:] = IGNORE_INDEX
    mask = torch.ones_like(ids)
    mask[1, 22:] = 0
    return Batch(ids, mask, labels, int((labels[:, 1:] != IGNORE_INDEX).sum()))


def loss_and_gradient(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and its gradient at the embedded tokens."""
    embedded: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    watch = model.get_input_embeddings().register_forward_hook(keep)
    try:
        loss = token_loss_sum(model, batch)
        loss.backward()
    finally:
        watch.remove()
    assert embedded[0].grad is not None
    return loss.detach(), embedded[0].grad


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_plain_loss(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(CONFIGS[name]), ragged()
    expected, expected_grad = loss_and_gradient(model, batch)
    monkeypatch.setattr(loss_module, "logit_rows", lambda _labels, _vocabulary: rows)
    use_loss_head(model)
    found, grad = loss_and_gradient(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    error = torch.linalg.norm(grad - expected_grad) / torch.linalg.norm(expected_grad)
    assert error <= 1e-5
    # As transformers has it by itself: the mean over labels.
    with torch.no_grad():
        inputs = {**batch.inputs, "labels": batch.labels}
        mean = model(**inputs).loss
    torch.testing.assert_close(found / batch.num_label_tokens, mean, rtol=1e-5, atol=0)


def test_the_gradient_is_that_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(4, 7, dtype=torch.float64).requires_grad_(False)
    for p in linear.parameters():
        p.normal_(generator=generator)
    hidden = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, 3, 3, 1])
    head = LossHead(linear, scale=0.5, softcap=1.5)
    loss, grad = head(hidden, labels, True)
    plain = F.cross_entropy(head.logits(hidden), labels, reduction="sum")
    (expected,) = torch.autograd.grad(plain, hidden)
    # The softmax is in fp32, whatever comes in.
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-6, atol=0)


@pytest.mark.skipif(
    not (loss_module.LIGER and torch.cuda.is_available()),
    reason="Liger's kernel runs on GPUs with Triton, where liger-kernel is installed",
)
@pytest.mark.parametrize(("scale", "bias"), [(1.0, False), (0.5, True)])
def test_ligers_kernel_gives_the_same(scale: float, bias: bool) -> None:
    linear = torch.nn.Linear(64, 5000, bias=bias, device="cuda").requires_grad_(False)
    hidden = torch.randn(300, 64, device="cuda")
    labels = torch.randint(5000, (300,), device="cuda")
    head = LossHead(linear, scale)
    loss, grad = head.by_liger(hidden, labels, True)
    plain = hidden.requires_grad_()
    expected = F.cross_entropy(head.logits(plain), labels, reduction="sum")
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    (expected_grad,) = torch.autograd.grad(expected, plain)
    error = torch.linalg.norm(grad - expected_grad) / torch.linalg.norm(expected_grad)
    assert error <= 1e-4


def test_a_batch_without_labels_has_a_gradient_of_zero() -> None:
    model, batch = make(CONFIGS["llama"]), ragged()
    batch.labels.fill_(IGNORE_INDEX)
    use_loss_head(model)
    loss, grad = loss_and_gradient(model, batch)
    assert loss == 0
    assert not grad.any()


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.numel = max(self.numel, output.numel())
        return output


def test_logits_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(CONFIGS["gemma2 capped"]), ragged(48)
    batch.labels.copy_(batch.input_ids)
    all_logits = 2 * 47 * VOCABULARY
    with Largest() as plain:
        loss_and_gradient(model, batch)
    assert plain.numel >= all_logits
    monkeypatch.setattr(loss_module, "logit_rows", lambda _labels, _vocabulary: 4)
    use_loss_head(model)
    with Largest() as chunked:
        loss_and_gradient(model, batch)
    # The embedding's views and attention's scores are the largest then.
    assert chunked.numel <= max(VOCABULARY * 32, 2 * 4 * 48 * 48) < all_logits


def test_hidden_states_of_another_dtype_and_fp16() -> None:
    """Mamba's are fp32; and what is certain keeps its gradient in fp16."""
    linear = torch.nn.Linear(4, 7, bias=False).requires_grad_(False)
    linear.weight.data = torch.eye(7, 4)
    hidden = torch.zeros(1, 4)
    hidden[0, 0] = 18.0  # the label's probability is 1 - 9e-8: below fp16's smallest numbers
    label = torch.tensor([0])
    _, expected = LossHead(linear)(hidden, label, True)
    assert 1e-9 < expected.abs().max() < 1e-7
    _, bf16 = LossHead(linear.bfloat16())(hidden, label, True)
    assert bf16.dtype == torch.bfloat16
    torch.testing.assert_close(bf16.float(), expected, rtol=2e-2, atol=1e-9)
    head = LossHead(linear.half())
    state = hidden.half().requires_grad_()
    loss, grad = head(state.detach(), label, True)
    assert grad.any()
    (_GivenGradient.apply(state, loss, grad) * 2.0**16).backward()  # as an engine scales it
    torch.testing.assert_close(state.grad.float() / 2**16, expected, rtol=5e-2, atol=1e-9)


def test_rows_are_shared_out_evenly() -> None:
    assert logit_rows(100, 49152) == 100
    assert logit_rows(512, 49152) == 128  # 4 times, where 170 fit
    assert logit_rows(512, 256_000) == 128  # no fewer, however large the vocabulary
    assert logit_rows(0, 49152) == 1


def test_a_head_that_does_more_keeps_its_own_way() -> None:
    class Odd(hf.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    model, batch = Odd(CONFIGS["llama"]).requires_grad_(False), ragged()
    add_loss_head(model)
    assert not check_loss_head(model, batch.input_ids[:1])
    expected = F.cross_entropy(
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        .logits[:, :-1]
        .flatten(0, 1),
        batch.labels[:, 1:].flatten(),
        reduction="sum",
    )
    torch.testing.assert_close(token_loss_sum(model, batch), expected)


def test_errors_that_cancel_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(CONFIGS["llama"])
    add_loss_head(model)
    forward = LossHead.forward

    def off(self: LossHead, *args: Any) -> Any:
        losses, grad = forward(self, *args)
        errors = torch.tensor([0.5, -0.5]).repeat(losses.numel() // 2)
        return losses + (errors if losses.ndim else errors.sum()), grad

    assert check_loss_head(model, torch.arange(1, 9)[None])
    monkeypatch.setattr(LossHead, "forward", off)
    assert not check_loss_head(model, torch.arange(1, 9)[None])


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in ("xlm", "xlnet", "cpmant", "prophetnet")),
        *((family, torch.bfloat16) for family in ("xlm", "cpmant")),
    ],
)
def test_models_that_see_later_tokens(family: str, dtype: torch.dtype) -> None:
    """transformers has them among its causal models, and no configuration says otherwise."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3)
    with pytest.raises(ConfigError, match="its tokens see those after"):
        check_loss_head(model, torch.arange(3, 19)[None])


@pytest.mark.parametrize("family", ["mamba2", "falcon_h1", "qwen3_next", "recurrent_gemma", "rwkv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scans_see_no_later_tokens(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype).eval()
    check_loss_head(model, torch.arange(3, 19)[None])


def test_the_model_is_what_it_was_for_everything_else() -> None:
    model, batch = make(CONFIGS["llama"]), ragged()
    prompt = batch.input_ids[:, :5]
    expected = model.generate(prompt, max_new_tokens=3, do_sample=False)
    use_loss_head(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=3, do_sample=False), expected)
    other = copy.deepcopy(model)
    other.model.norm.weight.data *= 2  # the copy's loss is of the copy
    assert token_loss_sum(other, batch) != token_loss_sum(model, batch)

"""The init of experts: against a dense SVD of each, and what is stated of those without a token."""

from __future__ import annotations

import pytest
import torch

from lorasb_ds.adapters.experts import LoraSBExperts
from lorasb_ds.config.methods import METHODS
from lorasb_ds.init.experts import (
    ExpertDirections,
    ExpertSVDs,
    decompose_weights,
    fill_experts,
)
from lorasb_ds.init.factors import InitSettings
from lorasb_ds.init.init_report import ExpertsInit
from lorasb_ds.models.experts import ExpertsLinear, Routing

EXPERTS, OUT, IN, R = 5, 24, 40, 3
SETTINGS = InitSettings(METHODS["lora-sb"], "sign")


def adapter(out: int = OUT, in_: int = IN) -> LoraSBExperts:
    layer = ExpertsLinear(EXPERTS, out, in_, torch.float32)
    W = torch.randn(EXPERTS, out, in_, generator=torch.manual_seed(1))
    layer.weight = torch.nn.Parameter(W, requires_grad=False)
    return LoraSBExperts(layer, R, torch.float32)


def decompose(
    experts: LoraSBExperts, G: torch.Tensor, tokens: torch.Tensor, parts: list[range]
) -> tuple[ExpertDirections, ExpertsInit]:
    svds = ExpertSVDs("x", experts, SETTINGS, None)
    for part in parts:
        assert not svds.is_complete
        svds.add(part, G[part.start : part.stop].clone(), tokens[part.start : part.stop])
    assert svds.is_complete
    found, report = svds.result()
    assert found is not None
    return found, report


ALL = [range(EXPERTS)]
IN_PARTS = [range(3, 5), range(1), range(1, 3)]  # as groups of the init may end


@pytest.mark.parametrize("sides", [(OUT, IN), (IN, OUT)])
@pytest.mark.parametrize("parts", [ALL, IN_PARTS], ids=["at once", "in parts"])
def test_each_expert_has_the_paper_s_factors(
    one_process: None, sides: tuple[int, int], parts: list[range]
) -> None:
    """B = U, A = Vh and R = -eta S of sign(G); all of them as one update of the layer."""
    experts = adapter(*sides)
    G = torch.randn(EXPERTS, *sides, generator=torch.manual_seed(2))
    stored = G.mT if sides[1] > sides[0] else G  # rows along the longer side
    tokens = torch.full((EXPERTS,), 7)
    found, report = decompose(experts, stored, tokens, parts)
    assert report.unreached == []
    for expert in range(EXPERTS):
        sign = G[expert].sign().double()
        U, S, Vh = torch.linalg.svd(sign)
        torch.testing.assert_close(found.S[expert].double(), S[:R], rtol=1e-4, atol=0)
        best = U[:, :R] @ torch.diag(S[:R]) @ Vh[:R]
        ours = (found.U[expert] * found.S[expert]) @ found.Vh[expert]
        torch.testing.assert_close(ours.double(), best, rtol=0, atol=2e-2 * float(S[0]))
        slope = (found.U[expert].T @ G[expert] @ found.Vh[expert].T).diag() * found.S[expert]
        torch.testing.assert_close(report.slopes[expert], slope, rtol=1e-3, atol=1e-3)
        assert report.captured_energy[expert] == pytest.approx(
            float(S[:R].square().sum() / S.square().sum()), rel=1e-3
        )
    basis = fill_experts("x", experts, found, SETTINGS)
    experts.lora_R.data.copy_(report.R(1e-2))
    assert torch.equal(basis["x.lora_A"], experts.lora_A)
    assert not basis["x.lora_R"].any()
    x = torch.randn(2 * EXPERTS, sides[1])
    routing = Routing.of(torch.arange(EXPERTS).repeat_interleave(2), EXPERTS)
    updates = -1e-2 * found.U @ torch.diag_embed(found.S) @ found.Vh
    W = (experts.base_layer.weight + updates)[routing.experts]
    torch.testing.assert_close(experts(x, routing), torch.einsum("soi,si->so", W, x))


@pytest.mark.parametrize("parts", [ALL, IN_PARTS], ids=["at once", "in parts"])
def test_an_expert_without_a_token(one_process: None, parts: list[range]) -> None:
    """It has the basis of the others' mean gradient, and R = 0."""
    experts = adapter()
    G = torch.randn(EXPERTS, IN, OUT, generator=torch.manual_seed(3))
    G[2] = 0
    tokens = torch.tensor([4, 1, 0, 2, 9])
    found, report = decompose(experts, G, tokens, parts)
    assert report.unreached == [2]
    assert not report.R(1.0)[2].any()
    assert all(report.R(1.0)[expert].any() for expert in (0, 1, 3, 4))
    mean = (G.sum(0) / 4).sign()  # transposed, as it is stored
    expected = torch.linalg.svd(mean.double()).Vh[:R].T @ torch.linalg.svd(mean.double()).Vh[:R]
    span = found.U[2] @ found.U[2].T
    torch.testing.assert_close(span.double(), expected, rtol=0, atol=1e-3)
    assert report.squared_norm == pytest.approx(4 * OUT * IN, rel=1e-3)  # entries of ±1


@pytest.mark.parametrize("parts", [ALL, [range(1, 4)]], ids=["at once", "in parts"])
def test_a_gradient_that_is_not_finite_names_its_experts(
    one_process: None, parts: list[range]
) -> None:
    G = torch.ones(EXPERTS, IN, OUT)
    G[1, 0, 0], G[3, 1, 1] = torch.inf, torch.nan
    with pytest.raises(FloatingPointError, match=r"gradient of x of expert 1, 3 is not finite"):
        decompose(adapter(), G, torch.ones(EXPERTS), parts)


@pytest.mark.parametrize("sides", [(OUT, IN), (IN, OUT)])
def test_of_weights(one_process: None, sides: tuple[int, int]) -> None:
    """LoRA-XS: B = U S and A = Vh of each expert's W."""
    experts = adapter(*sides)
    settings = InitSettings(METHODS["lora-xs"], "sign")
    found, _ = decompose_weights(experts, settings, None)
    fill_experts("x", experts, found, settings)
    for expert, W in enumerate(experts.base_layer.weight):
        U, S, Vh = torch.linalg.svd(W)
        best = U[:, :R] @ torch.diag(S[:R]) @ Vh[:R]
        ours = experts.lora_B[expert] @ experts.lora_A[expert]
        torch.testing.assert_close(ours, best, rtol=0, atol=1e-3 * float(S[0]))


def test_gradients_of_the_layer(one_process: None) -> None:
    """R's and the input's, by autograd of the plain formula."""
    experts = adapter()
    for factor in (experts.lora_A, experts.lora_B, experts.lora_R):
        factor.data.normal_()
    routing = Routing.of(torch.tensor([0, 0, 3, 3, 3, 4]), EXPERTS)
    x = torch.randn(6, IN, requires_grad=True)
    weight = torch.randn(6, OUT)
    (experts(x, routing) * weight).sum().backward()
    found = x.grad, experts.lora_R.grad

    inputs, R = (t.detach().clone().requires_grad_() for t in (x, experts.lora_R))
    W = experts.base_layer.weight + experts.lora_B.detach() @ R @ experts.lora_A.detach()
    (torch.einsum("soi,si->so", W[routing.experts], inputs) * weight).sum().backward()
    torch.testing.assert_close(found[0], inputs.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found[1], R.grad, rtol=1e-4, atol=1e-3)

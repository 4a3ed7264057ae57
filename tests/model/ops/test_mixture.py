"""The mixture of experts against its plain twin: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from antdist.model.ops import use_plain_ops
from antdist.model.ops.mixture import mix_experts, mix_experts_plain

WIDTH, EXPERTS, DIM = 5, 3, 4


def case(items: int, whitening: bool, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Features, routing, weights, and shifts or biases; every third item lacks the modality."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(items, WIDTH, generator=random, dtype=dtype)
    routing = torch.rand(items, EXPERTS, generator=random, dtype=dtype)
    features[::3], routing[::3] = 0.0, 0.0
    weight = torch.randn(WIDTH, EXPERTS, DIM, generator=random, dtype=dtype)
    added = torch.randn(EXPERTS, WIDTH if whitening else DIM, generator=random, dtype=dtype)
    return [features, *(x.requires_grad_() for x in (routing, weight, added))]


def gradients(mixed: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    grad = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return torch.autograd.grad(mixed, inputs[1:], grad.to(mixed.dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("items", [0, 1, 8])
@pytest.mark.parametrize("whitening", [True, False])
def test_equals_the_plain_twin(whitening: bool, items: int, dtype: torch.dtype, tolerance: float) -> None:
    """To 1e-5 in float32; of float64 the gradient at the routing is rounded to float32, so to 1e-6."""
    inputs = case(items, whitening, dtype)
    ours, plain = mix_experts(*inputs, whitening), mix_experts_plain(*inputs, whitening)
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    with use_plain_ops():
        assert torch.equal(mix_experts(*inputs, whitening), plain)
    for found, expected in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("whitening", [True, False])
def test_frozen_experts_pass_a_gradient_to_the_routing(whitening: bool) -> None:
    features, routing, weight, added = case(8, whitening, torch.float32)
    frozen = weight.detach(), added.detach()
    ours, plain = (mix(features, routing, *frozen, whitening) for mix in (mix_experts, mix_experts_plain))
    found, expected = (torch.autograd.grad(mixed.square().sum(), routing)[0] for mixed in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whitening", [True, False])
def test_autocast_mixes_in_bfloat16_with_float32_gradients(whitening: bool) -> None:
    inputs = case(8, whitening, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = mix_experts(*inputs, whitening)
    exact = mix_experts_plain(*inputs, whitening)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), exact, rtol=0.05, atol=0.05)
    for found, expected in zip(gradients(ours, inputs), gradients(exact, inputs), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)

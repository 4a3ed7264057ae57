"""The chunked softmax loss against its plain twin, in value, gradient and memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from antdist.model.ops import use_plain_ops
from antdist.model.ops.softmax_loss import softmax_loss, softmax_loss_plain


def case(
    p: int, c: int, d: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Users, candidates and targets; biases (a third of the candidates is never a negative) and weights."""
    random = torch.Generator().manual_seed(seed)
    users, candidates = (torch.randn(n, d, generator=random, dtype=dtype).requires_grad_() for n in (p, c))
    targets = torch.randint(c, (p,), generator=random)
    bias, target_bias = torch.randn(2, c, generator=random, dtype=dtype)
    bias[torch.rand(c, generator=random) < 0.3] = -math.inf
    weights = torch.rand(p, generator=random, dtype=dtype)
    return [users, candidates, targets], {"bias_C": bias, "target_bias_C": target_bias, "weights_P": weights}


@settings(max_examples=60, deadline=None)
@given(
    p=st.integers(0, 12),
    c=st.integers(1, 30),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    biased=st.booleans(),
    weighted=st.booleans(),
)
def test_equals_the_plain_twin(p: int, c: int, chunk: int, seed: int, biased: bool, weighted: bool) -> None:
    """To 1e-5 in float32; no prediction and a single candidate included."""
    inputs, extras = case(p, c, 5, seed)
    used: dict[str, Any] = {n: x for n, x in extras.items() if (weighted if n == "weights_P" else biased)}
    ours = softmax_loss(*inputs, temperature=0.07, chunk=chunk, **used)
    plain = softmax_loss_plain(*inputs, temperature=0.07, **used)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    with use_plain_ops():
        assert torch.equal(softmax_loss(*inputs, temperature=0.07, chunk=chunk, **used), plain)
    found, expected = (torch.autograd.grad(3.0 * loss, inputs[:2]) for loss in (ours, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.abs().max()) if b.numel() else 0.0))


@pytest.mark.parametrize("chunk", [3, 100])
def test_gradcheck(chunk: int) -> None:
    (users, candidates, targets), extras = case(4, 7, 3, 0, torch.float64)

    def loss(u: Tensor, c: Tensor) -> Tensor:
        return softmax_loss(u, c, targets, temperature=0.5, chunk=chunk, **extras)

    assert torch.autograd.gradcheck(loss, (users, candidates))


def test_extreme_logits_stay_finite_and_exact() -> None:
    """A temperature of 0.001 spreads logits over 2000: exp, then log, would give inf or 0."""
    (users, candidates, targets), _ = case(6, 9, 4, 1)
    for chunk in (2, 100):
        ours = softmax_loss(users, candidates, targets, temperature=1e-3, chunk=chunk)
        exact = softmax_loss_plain(users.double(), candidates.double(), targets, temperature=1e-3)
        assert float(exact.detach()) > 500
        assert float(ours.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(ours, [users, candidates]))


def test_barred_negative_gets_a_gradient_as_target_only() -> None:
    (users, candidates, _), _ = case(2, 4, 3, 2)
    bias = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    loss = softmax_loss(users, candidates, torch.tensor([0, 1]), temperature=1.0, bias_C=bias, chunk=2)
    gradient = torch.autograd.grad(loss, candidates)[0]
    assert gradient[3].abs().max() == 0.0
    assert gradient[1].abs().max() > 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_scored_in_float32(dtype: torch.dtype) -> None:
    (users, candidates, targets), _ = case(20, 30, 8, 3)
    low_users, low_candidates = users.detach().to(dtype), candidates.detach().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = softmax_loss(low_users, low_candidates, targets, temperature=0.07, chunk=7)
    exact = softmax_loss_plain(low_users.double(), low_candidates.double(), targets, temperature=0.07)
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(float(exact), rel=1e-5)


def test_memory_is_a_chunk_not_all_logits() -> None:
    """512 x 40,000 logits would be 82 MB; both passes may hold a few blocks of 512 x 1000 (2 MB)."""
    (users, candidates, targets), _ = case(512, 40_000, 8, 5)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        softmax_loss(users, candidates, targets, temperature=0.07, chunk=1000).backward()
    assert largest <= 512 * 1000

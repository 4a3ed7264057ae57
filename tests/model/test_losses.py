"""The chunked softmax against ten lines of torch, in value, gradient and memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from antdist.model.losses import alignment_loss, next_item_loss, unit


def plain(
    users: Tensor,
    candidates: Tensor,
    targets: Tensor,
    temperature: float,
    bias: Tensor | None,
    target_bias: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    cosines = F.normalize(users, dim=1) @ F.normalize(candidates, dim=1).T / temperature
    own = F.one_hot(targets, len(candidates)).bool()
    zeros = torch.zeros(len(candidates), dtype=users.dtype)
    added = torch.where(own, zeros if target_bias is None else target_bias, zeros if bias is None else bias)
    terms = F.cross_entropy(cosines + added, targets, reduction="none")
    return terms.sum() if weights is None else (terms * weights).sum()


def case(p: int, c: int, d: int, seed: int, biased: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    users, candidates = (torch.randn(n, d, generator=random, dtype=dtype).requires_grad_() for n in (p, c))
    targets = torch.randint(c, (p,), generator=random)
    bias, target_bias = torch.randn(2, c, generator=random, dtype=dtype)
    bias[torch.rand(c, generator=random) < 0.3] = -math.inf
    weights = torch.rand(p, generator=random, dtype=dtype)
    return users, candidates, targets, bias, target_bias, weights


@settings(max_examples=60, deadline=None)
@given(
    p=st.integers(0, 12),
    c=st.integers(1, 30),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    biased=st.booleans(),
    weighted=st.booleans(),
)
def test_equals_the_plain_loss(p: int, c: int, chunk: int, seed: int, biased: bool, weighted: bool) -> None:
    users, candidates, targets, *extras = case(p, c, 5, seed, biased, torch.float32)
    bias, target_bias, weights = extras[0] if biased else None, extras[1] if biased else None, extras[2]
    factor = weights if weighted else None
    ours = next_item_loss(
        users, candidates, targets, temperature=0.07, bias=bias, target_bias=target_bias, weights=factor, chunk=chunk
    )
    theirs = plain(users, candidates, targets, 0.07, bias, target_bias, factor)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(3.0 * ours, [users, candidates])
    expected = torch.autograd.grad(3.0 * theirs, [users, candidates])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.abs().max()) if b.numel() else 0.0))


@pytest.mark.parametrize("chunk", [3, 100])
def test_gradcheck(chunk: int) -> None:
    users, candidates, targets, bias, target_bias, weights = case(4, 7, 3, 0, True, torch.float64)

    def loss(u: Tensor, c: Tensor) -> Tensor:
        return next_item_loss(
            u, c, targets, temperature=0.5, bias=bias, target_bias=target_bias, weights=weights, chunk=chunk
        )

    assert torch.autograd.gradcheck(loss, (users, candidates))


def test_extreme_logits_stay_finite_and_exact() -> None:
    """A temperature of 0.001 spreads logits over 2000: exp, then log, would give inf or 0."""
    users, candidates, targets, *_ = case(6, 9, 4, 1, False, torch.float32)
    for chunk in (2, 100):
        ours = next_item_loss(users, candidates, targets, temperature=1e-3, chunk=chunk)
        exact = plain(users.double(), candidates.double(), targets, 1e-3, None, None, None)
        assert float(exact.detach()) > 500
        assert float(ours.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(ours, [users, candidates]))


def test_zero_vectors_have_cosine_zero_and_gradient_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    normed = unit(x)
    assert normed.tolist() == [[0.0, 0.0], [pytest.approx(0.6), pytest.approx(0.8)]]
    normed.sum().backward()
    assert x.grad is not None and x.grad[0].tolist() == [0.0, 0.0] and bool(x.grad.isfinite().all())


def test_a_candidate_barred_as_negative_gets_no_gradient_but_as_target() -> None:
    users, candidates, *_ = case(2, 4, 3, 2, False, torch.float32)
    bias = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    loss = next_item_loss(users, candidates, torch.tensor([0, 1]), temperature=1.0, bias=bias, chunk=2)
    gradient = torch.autograd.grad(loss, candidates)[0]
    assert gradient[3].abs().max() == 0.0
    assert gradient[1].abs().max() > 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_scored_in_float32(dtype: torch.dtype) -> None:
    users, candidates, targets, *_ = case(20, 30, 8, 3, False, torch.float32)
    low_users, low_candidates = users.detach().to(dtype), candidates.detach().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = next_item_loss(low_users, low_candidates, targets, temperature=0.07, chunk=7)
    exact = plain(low_users.double(), low_candidates.double(), targets, 0.07, None, None, None)
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(float(exact), rel=1e-5)


def test_alignment_counts_repeats_and_leaves_out_what_has_no_count() -> None:
    """Against the list of next items with repetition: each image against all texts, repeats not masked."""
    random = torch.Generator().manual_seed(4)
    images, texts = torch.randn(2, 5, 6, generator=random)
    counts, has_image = torch.tensor([3.0, 1.0, 0.0, 2.0, 1.0]), torch.tensor([True, True, True, True, False])
    listed = [item for item, count in enumerate(counts.tolist()) for _ in range(int(count))]
    logits = F.normalize(images[listed], dim=1) @ F.normalize(texts[listed], dim=1).T / 0.07
    terms = F.cross_entropy(logits, torch.arange(len(listed)), reduction="none")
    expected = terms[has_image[listed]].sum()
    ours = alignment_loss(images, texts, torch.arange(5), counts, counts * has_image, temperature=0.07, chunk=2)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_memory_is_a_chunk_not_all_logits() -> None:
    """512 x 40,000 logits would be 82 MB; forward and backward may hold a few blocks of 512 x 1000 (2 MB) each."""
    users, candidates, targets, *_ = case(512, 40_000, 8, 5, False, torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        next_item_loss(users, candidates, targets, temperature=0.07, chunk=1000).backward()
    assert largest <= 512 * 1000

"""Scores are cosines, exact under any setting around; both ways to scale to length 1 agree."""

from __future__ import annotations

import pytest
import torch

from antdist.errors import UserError
from antdist.model.ops.scores import exact_scores, scores, unit, unit_gradient, unit_or_fail


def test_scores_are_cosines() -> None:
    random = torch.Generator().manual_seed(0)
    users, items = torch.randn(5, 8, generator=random), torch.randn(9, 8, generator=random)
    expected = torch.cosine_similarity(users.unsqueeze(1), items.unsqueeze(0), dim=2)
    for scale in (unit, lambda x: unit_or_fail(x, "vectors")):
        torch.testing.assert_close(scores(scale(users), scale(items)), expected)
        torch.testing.assert_close(scores(scale(users)[3], scale(items)), expected[3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = exact_scores(unit(users), unit(items))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_zero_vectors_have_cosine_zero_and_gradient_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    for scaled in (unit(x), unit_or_fail(x, "vectors")):
        assert scaled.tolist() == [[0.0, 0.0], [pytest.approx(0.6), pytest.approx(0.8)]]
    unit(x).sum().backward()
    assert x.grad is not None and x.grad[0].tolist() == [0.0, 0.0] and bool(x.grad.isfinite().all())


def test_unit_gradient_is_that_of_autograd() -> None:
    """To 1e-12 in float64, a zero row included."""
    random = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, 6, 4, generator=random, dtype=torch.float64)
    x[2] = 0.0
    expected = torch.autograd.grad(unit(x.requires_grad_()), x, grad)[0]
    torch.testing.assert_close(unit_gradient(grad, x.detach()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_or_inf_is_a_user_error(value: float) -> None:
    with pytest.raises(UserError, match="item embeddings contain NaN or Inf"):
        unit_or_fail(torch.tensor([[1.0, value]]), "item embeddings")

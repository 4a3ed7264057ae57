"""Dropout: the right share, scaled, independent of its neighbours, reproducible."""

from __future__ import annotations

import pytest
import torch

from antdist.model.ops.dropout import dropout


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_share_scale_and_gradient(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 401, requires_grad=True)
    y = dropout(x, p, True)
    kept = y.detach() != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.004)
    torch.testing.assert_close(y.detach()[kept], torch.full_like(y.detach()[kept], 1 / (1 - p)), rtol=1e-3, atol=0.0)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    for column in range(4):  # the four 16-bit parts of one random word
        assert float(kept.flatten()[column::4].float().mean()) == pytest.approx(1 - p, abs=0.007)
    both = kept.flatten()[:-1] & kept.flatten()[1:]
    assert float(both.float().mean()) == pytest.approx((1 - p) ** 2, abs=0.006)


def test_off_in_evaluation_and_a_function_of_the_seed() -> None:
    x = torch.randn(7, 3)
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0, True) is x
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.5, True))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert dropout(x.bfloat16(), 0.5, True).dtype == torch.bfloat16
    assert dropout(torch.empty(0, 4), 0.5, True).shape == (0, 4)

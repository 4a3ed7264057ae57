"""Dropout: share, scale, independence and reproducibility; distributed as its plain twin."""

from __future__ import annotations

import pytest
import torch

from antdist.model.ops import use_plain_ops
from antdist.model.ops.dropout import draw_mask, draw_mask_plain, dropout


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


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_is_distributed_as_the_plain_twins(p: float) -> None:
    """The same two values to 1e-4, in shares that differ by less than five standard deviations."""
    shape, like = (300, 401), torch.empty(0)
    torch.manual_seed(0)
    ours, plain = draw_mask(shape, p, like), draw_mask_plain(shape, p, like)
    torch.testing.assert_close(ours.unique(), plain.unique(), rtol=1e-4, atol=0.0)
    deviation = (p * (1 - p) / ours.numel()) ** 0.5
    assert abs(float((ours == 0).float().mean() - (plain == 0).float().mean())) < 5 * 2**0.5 * deviation


def test_plain_ops_select_torchs_dropout() -> None:
    x = torch.randn(40, 30)
    torch.manual_seed(1)
    expected = torch.nn.functional.dropout(x, 0.3)
    torch.manual_seed(1)
    with use_plain_ops():
        assert torch.equal(dropout(x, 0.3, True), expected)
    torch.manual_seed(1)
    assert not torch.equal(dropout(x, 0.3, True), expected)

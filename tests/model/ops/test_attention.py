"""Attention in bands: what a token sees, and values and gradients against the plain twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from antdist.model.ops import use_plain_ops
from antdist.model.ops.attention import attend, attend_in_bands, attend_plain, make_bands
from antdist.model.ops.dropout import draw_mask
from antdist.model.sequence.sasrec import token_positions

LAYOUTS = {"one token": [1], "several windows": [5, 15, 1, 13, 8], "none": [], "an empty share": [0]}


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), max_size=30), room=st.integers(0, 20))
def test_a_token_sees_its_window_up_to_itself(lengths: list[int], room: int) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens = sum(lengths)
    positions = token_positions(offsets, tokens)
    assert positions.tolist() == [p for length in lengths for p in range(length)]
    bands = make_bands(offsets, tokens, max(lengths, default=0) + room)
    for token in range(tokens):
        block, row = divmod(token, bands.width)
        first_key = (block - 1) * bands.width
        seen = [first_key + key for key in torch.nonzero(bands.mask_B1QK[block, 0, row]).flatten().tolist()]
        assert seen == list(range(token - int(positions[token]), token + 1))


def case(lengths: list[int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values of two heads of width 8, and the mask."""
    mask = make_bands(torch.tensor([0, *lengths]).cumsum(0), sum(lengths), max(lengths, default=0)).mask_B1QK
    blocks, _, queries, keys = mask.shape
    random = torch.Generator().manual_seed(0)
    qkv = (torch.randn(blocks, 2, n, 8, generator=random, dtype=dtype) for n in (queries, keys, keys))
    return [x.requires_grad_() for x in qkv], mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("dropped", [0.0, 0.5])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_the_plain_twin(lengths: list[int], dropped: float, dtype: torch.dtype, tolerance: float) -> None:
    """With one dropout mask; to 1e-5 in float32, 1e-6 in float64 (the softmax is float32 in both)."""
    qkv, mask = case(lengths, dtype)
    shape = (*qkv[0].shape[:3], qkv[1].shape[2])
    torch.manual_seed(3)
    factors = draw_mask(shape, dropped, qkv[2]) if dropped else None
    torch.manual_seed(3)
    ours, plain = attend(*qkv, mask, dropped), attend_plain(*qkv, mask, factors)
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(7), dtype=dtype)
    found, expected = (torch.autograd.grad(y, qkv, grad) for y in (ours, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_equals_torchs_attention() -> None:
    qkv, mask = case([5, 15, 13, 8], torch.float32)
    expected = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask)
    torch.testing.assert_close(attend(*qkv, mask, 0.0), expected)
    with use_plain_ops():
        torch.testing.assert_close(attend(*qkv, mask, 0.0), expected)


@pytest.mark.parametrize("plain", [False, True])
def test_dropout_keeps_the_mean(plain: bool) -> None:
    (q, k, v), mask = case([5, 15, 13, 8], torch.float32)
    ones, zeros = torch.ones_like(v), torch.zeros_like(k)
    if plain:
        with use_plain_ops():
            shares = torch.stack([attend(q, zeros, ones, mask, 0.5) for _ in range(200)])
    else:
        shares = torch.stack([attend(q, zeros, ones, mask, 0.5) for _ in range(200)])
    torch.testing.assert_close(shares.mean(), torch.tensor(1.0), atol=0.02, rtol=0)
    assert shares.std() > 0.1


@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_bands_equal_one_window_at_a_time(lengths: list[int]) -> None:
    """Values and gradients, in float64 to 1e-6, against causal attention within each window."""
    tokens, dim = sum(lengths), 16
    bands = make_bands(torch.tensor([0, *lengths]).cumsum(0), tokens, max(lengths, default=0))
    qkv = torch.randn(tokens, 3 * dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = attend_in_bands(bands.pad(qkv.requires_grad_()), bands, 2, 0.0)[:tokens]
    alone = []
    for window in qkv.split(lengths) if lengths else ():
        q, k, v = window.view(len(window), 3, 2, dim // 2).permute(1, 2, 0, 3)
        later = torch.ones(len(window), len(window), dtype=torch.bool).triu(1)
        weights = (q @ k.transpose(1, 2) / (dim // 2) ** 0.5).masked_fill(later, -torch.inf).softmax(-1)
        alone.append((weights @ v).transpose(0, 1).flatten(1))
    expected = torch.cat(alone) if alone else qkv[:, :dim]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    found, by_window = (torch.autograd.grad(y.square().sum(), qkv)[0] for y in (ours, expected))
    torch.testing.assert_close(found, by_window, rtol=1e-5, atol=1e-6)

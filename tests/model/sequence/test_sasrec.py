"""Attention in bands: the same states however windows are laid out, nothing seen of others or of what comes later."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antdist.config.schema import ModelConfig
from antdist.model.sequence.sasrec import Norm, SequenceEncoder, attention, bands, token_positions


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), max_size=30), room=st.integers(0, 20))
def test_a_token_sees_its_window_up_to_itself(lengths: list[int], room: int) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens = sum(lengths)
    positions = token_positions(offsets, tokens)
    assert positions.tolist() == [p for length in lengths for p in range(length)]
    made = bands(offsets, tokens, max(lengths, default=0) + room)
    for token in range(tokens):
        block, row = divmod(token, made.width)
        first_key = (block - 1) * made.width
        seen = [first_key + key for key in torch.nonzero(made.mask[block, 0, row]).flatten().tolist()]
        assert seen == list(range(token - int(positions[token]), token + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_windows_agree_with_one_at_a_time(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder = SequenceEncoder(ModelConfig(dim=8, inner=8)).eval().to(dtype)
    lengths = [1, 50, 3, 3, 17, 5, 30, 2]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(sum(lengths), 8).to(dtype)
    together = encoder(x, offsets, 50)
    alone = torch.cat([encoder(part, torch.tensor([0, len(part)]), len(part)) for part in x.split(lengths)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)
    assert together.dtype == dtype


def test_norm_takes_its_statistics_in_float32() -> None:
    """Values whose squares overflow or whose differences vanish in half precision, and inputs wider than the weights."""
    x = 1000.0 + torch.randn(5, 8)
    expected = torch.nn.functional.layer_norm(x, (8,), eps=1e-8)
    norm = Norm(8).half()
    torch.testing.assert_close(norm(x).float(), expected, rtol=2e-3, atol=2e-3)
    assert norm(x).dtype == torch.float16


def test_attention_is_the_one_of_torch() -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 8, generator=random) for n in (16, 32, 32))
    mask = bands(torch.tensor([0, 5, 20, 33, 41]), 41, 15).mask
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attention(q, k, v, mask, 0.0), expected)
    shares = torch.stack([attention(q, torch.zeros_like(k), torch.ones_like(v), mask, 0.5) for _ in range(200)])
    torch.testing.assert_close(shares.mean(), torch.tensor(1.0), atol=0.02, rtol=0)  # dropout keeps the mean
    assert shares.std() > 0.1

"""Packing for attention: every token found again, little padding, and the same states however windows are laid out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antdist.config.schema import ModelConfig
from antdist.model.encoder import Norm, SequenceEncoder, pack, token_positions


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), max_size=30), by_length=st.booleans())
def test_every_token_has_its_slot(lengths: list[int], by_length: bool) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens = sum(lengths)
    assert token_positions(offsets, tokens).tolist() == [p for length in lengths for p in range(length)]
    packing = pack(offsets, tokens, max(lengths, default=0), by_length=by_length)
    flat = torch.cat([slots.flatten() for slots in packing.slots])
    assert torch.equal(flat[packing.back], torch.arange(tokens))
    assert sum(len(slots) for slots in packing.slots) == len(lengths)
    if by_length and tokens:
        wide = [slots for slots in packing.slots if slots.shape[1] > 4]
        real = sum(length for length in lengths if length > 4)
        assert sum(slots.numel() for slots in wide) <= 1.5 * real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_agree_with_one_window_at_a_time(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder = SequenceEncoder(ModelConfig(dim=8, inner=8)).eval().to(dtype)
    lengths = [1, 50, 3, 3, 17, 5, 30, 2]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(sum(lengths), 8).to(dtype)
    together = encoder(x, offsets, 50)
    alone = torch.cat([encoder(part, torch.tensor([0, len(part)]), len(part)) for part in x.split(lengths)])
    monkeypatch.setattr("antdist.model.encoder.pack", lambda o, t, n, by_length: pack(o, t, n, by_length=False))
    padded = encoder(x, offsets, 50)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(padded, alone, rtol=tolerance, atol=tolerance)
    assert together.dtype == dtype


def test_norm_takes_its_statistics_in_float32() -> None:
    """Values whose squares overflow or whose differences vanish in half precision, and inputs wider than the weights."""
    x = 1000.0 + torch.randn(5, 8)
    expected = torch.nn.functional.layer_norm(x, (8,), eps=1e-8)
    norm = Norm(8).half()
    torch.testing.assert_close(norm(x).float(), expected, rtol=2e-3, atol=2e-3)
    assert norm(x).dtype == torch.float16

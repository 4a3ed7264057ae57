"""SASRec: the same states however windows are packed, and norms in float32."""

from __future__ import annotations

import pytest
import torch

from antdist.config.schema import ModelConfig
from antdist.model.sequence.sasrec import Norm, SASRec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_windows_agree_with_one_at_a_time(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder = SASRec(ModelConfig(dim=8, inner=8)).eval().to(dtype)
    lengths = [1, 50, 3, 3, 17, 5, 30, 2]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(sum(lengths), 8).to(dtype)
    together = encoder(x, offsets, 50)
    alone = torch.cat([encoder(part, torch.tensor([0, len(part)]), len(part)) for part in x.split(lengths)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)
    assert together.dtype == dtype


def test_norm_takes_its_statistics_in_float32() -> None:
    """Their squares overflow and their differences vanish in half precision; inputs are wider than weights."""
    x = 1000.0 + torch.randn(5, 8)
    expected = torch.nn.functional.layer_norm(x, (8,), eps=1e-8)
    norm = Norm(8).half()
    torch.testing.assert_close(norm(x).float(), expected, rtol=2e-3, atol=2e-3)
    assert norm(x).dtype == torch.float16

"""Dropout that costs little on a CPU, where torch draws a mask five to ten times slower than its random bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 1 << 16


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout`; on a CPU with 16 random bits an element, so `p` is rounded to a multiple of 1/65536."""
    if not training or p == 0.0:
        return x
    if not x.is_cpu:
        return F.dropout(x, p)
    return x * keep_mask(x, p)


def keep_mask(x: Tensor, p: float) -> Tensor:
    """What dropout on a CPU multiplies `x` with: zeros, and elsewhere what keeps the mean."""
    dropped = round(p * LEVELS)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - LEVELS // 2
    return keep.to(x.dtype).mul_(LEVELS / (LEVELS - dropped))

"""Dropout that is cheap on a CPU.

There torch takes five to ten times as long to draw a mask as to draw the random bits that a mask needs.

One 64-bit random integer is read as four signed 16-bit integers, each uniform over LEVELS values. An element is dropped
if its integer is among the lowest `dropped` of them, so with probability p = dropped / LEVELS; the others are multiplied
by 1 / (1 - p), which keeps the mean. The backward pass multiplies by the same mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from antdist.model.ops import plain_ops

LEVELS = 1 << 16


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Drop elements with probability `p` in training; on a CPU `p` is rounded to a multiple of 1/65536."""
    if not training or p == 0.0:
        return x
    if plain_ops() or not x.is_cpu:
        return F.dropout(x, p)
    return x * draw_mask(x.shape, p, x)


def draw_mask(shape: Sequence[int], p: float, like: Tensor) -> Tensor:
    """Draw factors with dtype and device of `like`: 0 with probability `p`, else 1 / (1 - p)."""
    if plain_ops() or not like.is_cpu:
        return draw_mask_plain(shape, p, like)
    dropped, elements = round(p * LEVELS), math.prod(shape)
    words = torch.empty((elements + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[:elements].view(*shape) >= dropped - LEVELS // 2
    return kept.to(like.dtype).mul_(LEVELS / (LEVELS - dropped))


def draw_mask_plain(shape: Sequence[int], p: float, like: Tensor) -> Tensor:
    """Plain twin of `draw_mask`: the same distribution, other random numbers."""
    return F.dropout(like.new_ones(*shape), p)

"""Scores of items for users: cosines (docs/spec/ant.md, section 6).

Training, evaluation, serving and export all score with `scores`, on vectors that were scaled to length 1 before. Training
scales with `unit`, whose derivative is `unit_gradient`; evaluation and serving scale with `unit_or_fail`. The two round
differently (x * rsqrt(x.x) against x / sqrt(x.x)), and recorded losses and scores depend on either, so both stay.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from antdist.errors import UserError
from antdist.model.ops.products import exact_products

TINY = 1e-24  # squared length below which a vector counts as zero


def scores(users_UD: Tensor, items_ND: Tensor) -> Tensor:
    """Score items for users, all of length 1: (U, N); for a single user (D,): (N,)."""
    return items_ND @ users_UD if users_UD.dim() == 1 else users_UD @ items_ND.T


def exact_scores(users_UD: Tensor, items_ND: Tensor) -> Tensor:
    """`scores` in float32, even under autocast or where training allows TF32."""
    device = users_UD.device
    with torch.autocast(device.type, enabled=False), exact_products(device):
        return scores(users_UD, items_ND)


def unit(x: Tensor) -> Tensor:
    """Scale rows to length 1, in float32 at least; a zero row stays zero and passes a zero gradient."""
    x = _widen(x)
    return x * _inverse_length(x)


def unit_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient at `x`, given the one at `unit(x)`.

    With y = x / |x| the derivative removes the part along y and scales the rest: (g - (g . y) y) / |x|.
    """
    x = _widen(x)
    inverse = _inverse_length(x)
    along = (grad * x).sum(-1, keepdim=True) * inverse.square()
    return (grad - along * x) * inverse


def unit_or_fail(vectors: Tensor, what: str) -> Tensor:
    """Scale rows to length 1 in float32; a zero row stays zero.

    Raises:
        UserError: NaN or Inf in them; `what` names them.
    """
    if not bool(torch.isfinite(vectors).all()):
        raise UserError(
            f"the model's {what} contain NaN or Inf",
            remedy="the training diverged: use an earlier checkpoint, or train with a lower learning rate or clipping",
        )
    return F.normalize(vectors.float(), dim=-1)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_length(x: Tensor) -> Tensor:
    square = x.square().sum(-1, keepdim=True)
    return torch.where(square > TINY, square.clamp_min(TINY).rsqrt(), 0.0)

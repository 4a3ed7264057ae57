"""The losses: one stable float32 logsumexp over candidates, in chunks (spec, section 5; architecture, law 4)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from antdist.batch import ROWS

TINY = 1e-24  # squared length below which a vector counts as zero


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1, in float32 at least; a zero row stays zero and passes a zero gradient."""
    x = _widened(x)
    return x * _inverse_length(x)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_length(x: Tensor) -> Tensor:
    square = x.square().sum(-1, keepdim=True)
    return torch.where(square > TINY, square.clamp_min(TINY).rsqrt(), 0.0)


def next_item_loss(
    users: Tensor,
    candidates: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    bias: Tensor | None = None,
    target_bias: Tensor | None = None,
    weights: Tensor | None = None,
    chunk: int = 8192,
) -> Tensor:
    """Sum over predictions of -log softmax(cos(user, candidate) / temperature + bias) at the target.

    Beyond inputs and their gradients it holds one (P, chunk) block of logits and one (chunk, d) block of normalised
    candidates at a time.

    Args:
        users: (P, d), of any length and floating dtype; normalised here.
        candidates: (C, d), likewise.
        targets: (P,) int64, rows of `candidates`.
        temperature: divides the cosine.
        bias: (C,) added to a candidate's logit except where it is the target; -inf: never a negative. None: zeros.
        target_bias: (C,) finite, added to a candidate's logit where it is the target. None: zeros.
        weights: (P,) factor of each prediction's term. None: ones.
        chunk: candidates a block.

    Returns:
        A float32 scalar (float64 for float64 inputs).
    """
    with torch.autocast(users.device.type, enabled=False):
        users = unit(users) / temperature
        if fill := -len(users) % ROWS:
            users, targets = F.pad(users, (0, 0, 0, fill)), F.pad(targets, (0, fill))
            weights = F.pad(users.new_ones(len(users) - fill) if weights is None else weights, (0, fill))
        if bias is not None and (fill := -len(candidates) % ROWS):
            candidates, bias = F.pad(candidates, (0, 0, 0, fill)), F.pad(bias, (0, fill), value=-math.inf)
            target_bias = target_bias if target_bias is None else F.pad(target_bias, (0, fill))
        loss: Tensor = _SoftmaxLoss.apply(users, candidates, targets, bias, target_bias, weights, chunk)
    return loss


def alignment_loss(
    images: Tensor, texts: Tensor, targets: Tensor, counts: Tensor, weights: Tensor, *, temperature: float, chunk: int
) -> Tensor:
    """Sum over images of weight * -log softmax_j(cos(image, text_j) / temperature) at the image's own text.

    Text j stands `counts[j]` times in the softmax, its own included, as if the batch's next items were listed with
    repetition and repeats not masked; count 0 takes a text out.

    Args:
        images: (R, d) transformed image embeddings.
        texts: (C, d) transformed text embeddings.
        targets: (R,) int64, rows of `texts`.
        counts: (C,) float32.
        weights: (R,) float32; 0 takes an image out (its text may have count 0 then).
        temperature: divides the cosine.
        chunk: texts a block.
    """
    bias = counts.log()
    own_bias = bias.clamp_min(0.0)
    loss = next_item_loss(
        images,
        texts,
        targets,
        temperature=temperature,
        bias=bias,
        target_bias=own_bias,
        weights=weights,
        chunk=chunk,
    )
    # one of the own text's copies is right, not all of them
    return loss + (weights * own_bias[targets]).sum()


class _SoftmaxLoss(torch.autograd.Function):
    """Online logsumexp over chunks of candidates.

    The target's logit starts the sum; in the chunks it stands as -inf. Candidates are normalised chunk by chunk, users
    come normalised. The backward pass makes each chunk's logits again; where one chunk holds all candidates its
    probabilities give the gradients at once, in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        candidates: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        target_bias: Tensor | None,
        weights: Tensor | None,
        chunk: int,
    ) -> Tensor:
        logit = (users * unit(candidates[targets])).sum(1)  # of the target
        if target_bias is not None:
            logit = logit + target_bias[targets]
        peak, mass = logit, torch.ones_like(logit)
        block = users.new_empty(0)
        for start in range(0, len(candidates), chunk):
            del block  # before the next one is made
            part = unit(candidates[start : start + chunk])
            block = _others(users, part, targets - start, _cut(bias, start, chunk))
            higher = torch.maximum(peak, block.amax(1))
            mass = mass * (peak - higher).exp() + block.sub_(higher.unsqueeze(1)).exp_().sum(1)
            peak = higher
        terms = peak - logit + mass.log()
        scale = torch.ones_like(terms) if weights is None else weights.to(terms.dtype)
        ctx.chunk = chunk
        ctx.gradients = None
        if len(candidates) <= chunk and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            block.mul_((scale / mass).unsqueeze(1))
            _set_target(block, targets, scale * torch.expm1(-terms))
            ctx.gradients = block @ part, _through_unit(block.T @ users, candidates)
        else:
            ctx.save_for_backward(users, candidates, targets, bias, scale, terms, terms + logit)
        return (scale * terms).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        none = (None,) * 5
        if ctx.gradients is not None:
            return ctx.gradients[0] * grad, ctx.gradients[1] * grad, *none
        users, candidates, targets, bias, scale, terms, logsumexp = ctx.saved_tensors
        scale = scale * grad
        users_grad, candidates_grad = torch.zeros_like(users), torch.empty_like(candidates)
        with torch.autocast(users.device.type, enabled=False):
            for start in range(0, len(candidates), ctx.chunk):
                rows = slice(start, start + ctx.chunk)
                part = unit(candidates[rows])
                block = _others(users, part, targets - start, _cut(bias, start, ctx.chunk))
                block.sub_(logsumexp.unsqueeze(1)).exp_().mul_(scale.unsqueeze(1))
                _set_target(block, targets - start, scale * torch.expm1(-terms))
                users_grad.addmm_(block, part)
                candidates_grad[rows] = _through_unit(block.T @ users, candidates[rows])
                del block  # before the next one is made
        return users_grad, candidates_grad, *none


def _through_unit(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient at `x` of that at `unit(x)`."""
    x = _widened(x)
    inverse = _inverse_length(x)
    along = (grad * x).sum(-1, keepdim=True) * inverse.square()
    return (grad - along * x) * inverse


def _others(users: Tensor, candidates: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Logits (P, n) of a chunk of candidates with bias; the target's, where it is in the chunk, is -inf."""
    logits = users @ candidates.T
    if bias is not None:
        logits += bias  # addmm would write the bias to all rows first
    _set_target(logits, targets, torch.full_like(logits[:, 0], float("-inf")))
    return logits


def _set_target(block: Tensor, targets: Tensor, values: Tensor) -> None:
    """Write `values` (P,) into each row's target column, where the chunk holds it."""
    columns = targets.clamp(0, block.shape[1] - 1).unsqueeze(1)
    inside = (targets >= 0) & (targets < block.shape[1])
    block.scatter_(1, columns, torch.where(inside.unsqueeze(1), values.unsqueeze(1), block.gather(1, columns)))


def _cut(bias: Tensor | None, start: int, chunk: int) -> Tensor | None:
    return None if bias is None else bias[start : start + chunk]

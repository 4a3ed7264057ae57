"""The softmax loss over many candidates, in chunks, and its gradient (docs/spec/ant.md, section 5).

Shapes: P predictions, C candidates, D width; N candidates of one chunk.

Forward. With u_p the unit vector of prediction p divided by the temperature, c_j the unit vector of candidate j, t = t_p the
target and w_p a weight,

    z_pj = u_p . c_j + bias_j   for j != t,      z_pt = u_p . c_t + target_bias_t,
    term_p = log sum_j exp(z_pj) - z_pt,         loss = sum_p w_p term_p.

The sum over j is taken chunk by chunk with a running maximum m and mass s (online logsumexp). It starts at the target, m =
z_pt and s = 1, and the target's column in its chunk is -inf; a chunk with logits z changes m to m' = max(m, max z) and s to
s exp(m - m') + sum exp(z - m'). No exp overflows, s >= 1 holds wherever the target leads, and term_p = m - z_pt + log s.

Backward. With q_pj = exp(z_pj) / sum_k exp(z_pk), the gradient at z_pj is G_pj = w_p q_pj for j != t, and at z_pt it is
w_p (q_pt - 1) = w_p expm1(-term_p), which is exact even where q_pt is nearly 1. Then

    du = G c,    dc = G^T u through the scaling to unit length (`unit_gradient`).

The backward pass computes each chunk's logits again from the saved logsumexp, so that no more than one (P, N) block exists
at a time. Where one chunk holds all candidates the block is there already, and the forward pass makes both gradients of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from antdist.batch import ROWS
from antdist.model.ops import plain_ops
from antdist.model.ops.scores import scores, unit, unit_gradient


def softmax_loss(
    users_PD: Tensor,
    candidates_CD: Tensor,
    targets_P: Tensor,
    *,
    temperature: float,
    bias_C: Tensor | None = None,
    target_bias_C: Tensor | None = None,
    weights_P: Tensor | None = None,
    chunk: int = 8192,
) -> Tensor:
    """Sum over predictions of -log softmax(cos(user, candidate) / temperature + bias) at the target.

    Beyond inputs and their gradients it holds one (P, chunk) block of logits and one (chunk, D) block of unit vectors.

    Args:
        users_PD: of any length and floating dtype.
        candidates_CD: likewise.
        targets_P: int64, rows of `candidates_CD`.
        temperature: divides the cosine.
        bias_C: added to a candidate's logit except where it is the target; -inf: never a negative. None: zeros.
        target_bias_C: finite, added to a candidate's logit where it is the target. None: zeros.
        weights_P: factor of each prediction's term. None: ones.
        chunk: candidates of a block.

    Returns:
        A float32 scalar (float64 for float64 inputs).
    """
    with torch.autocast(users_PD.device.type, enabled=False):
        if plain_ops():
            return softmax_loss_plain(
                users_PD,
                candidates_CD,
                targets_P,
                temperature=temperature,
                bias_C=bias_C,
                target_bias_C=target_bias_C,
                weights_P=weights_P,
            )
        users_PD = unit(users_PD) / temperature
        # filled up to multiples of ROWS by predictions of weight 0 and candidates of probability 0 (see antdist.batch)
        if fill := -len(users_PD) % ROWS:
            weights_P = users_PD.new_ones(len(users_PD)) if weights_P is None else weights_P
            users_PD, weights_P = F.pad(users_PD, (0, 0, 0, fill)), F.pad(weights_P, (0, fill))
            targets_P = F.pad(targets_P, (0, fill))
        if bias_C is not None and (fill := -len(candidates_CD) % ROWS):
            candidates_CD, bias_C = F.pad(candidates_CD, (0, 0, 0, fill)), F.pad(bias_C, (0, fill), value=-math.inf)
            target_bias_C = target_bias_C if target_bias_C is None else F.pad(target_bias_C, (0, fill))
        loss: Tensor = _SoftmaxLoss.apply(users_PD, candidates_CD, targets_P, bias_C, target_bias_C, weights_P, chunk)
    return loss


def softmax_loss_plain(
    users_PD: Tensor,
    candidates_CD: Tensor,
    targets_P: Tensor,
    *,
    temperature: float,
    bias_C: Tensor | None = None,
    target_bias_C: Tensor | None = None,
    weights_P: Tensor | None = None,
) -> Tensor:
    """Plain twin of `softmax_loss`: all (P, C) logits at once."""
    logits_PC = scores(unit(users_PD), unit(candidates_CD)) / temperature
    zeros_C = logits_PC.new_zeros(len(candidates_CD))
    is_target_PC = F.one_hot(targets_P, len(candidates_CD)).bool()
    added_PC = torch.where(
        is_target_PC,
        zeros_C if target_bias_C is None else target_bias_C,
        zeros_C if bias_C is None else bias_C,
    )
    terms_P = F.cross_entropy(logits_PC + added_PC, targets_P, reduction="none")
    return (terms_P if weights_P is None else terms_P * weights_P).sum()


class _SoftmaxLoss(torch.autograd.Function):
    """`softmax_loss` of unit users divided by the temperature; candidates are scaled chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        users_PD: Tensor,
        candidates_CD: Tensor,
        targets_P: Tensor,
        bias_C: Tensor | None,
        target_bias_C: Tensor | None,
        weights_P: Tensor | None,
        chunk: int,
    ) -> Tensor:
        target_logit_P = (users_PD * unit(candidates_CD[targets_P])).sum(1)
        if target_bias_C is not None:
            target_logit_P = target_logit_P + target_bias_C[targets_P]
        peak_P, mass_P = target_logit_P, torch.ones_like(target_logit_P)
        block_PN = users_PD.new_empty(0)
        for start in range(0, len(candidates_CD), chunk):
            del block_PN  # before the next one is made
            part_ND = unit(candidates_CD[start : start + chunk])
            block_PN = _negatives(users_PD, part_ND, targets_P - start, _cut(bias_C, start, chunk))
            higher_P = torch.maximum(peak_P, block_PN.amax(1))
            mass_P = mass_P * (peak_P - higher_P).exp() + block_PN.sub_(higher_P.unsqueeze(1)).exp_().sum(1)
            peak_P = higher_P
        terms_P = peak_P - target_logit_P + mass_P.log()
        scale_P = torch.ones_like(terms_P) if weights_P is None else weights_P.to(terms_P.dtype)
        ctx.chunk = chunk
        ctx.gradients = None
        if len(candidates_CD) <= chunk and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            block_PN.mul_((scale_P / mass_P).unsqueeze(1))
            _set_target(block_PN, targets_P, scale_P * torch.expm1(-terms_P))
            ctx.gradients = block_PN @ part_ND, unit_gradient(block_PN.T @ users_PD, candidates_CD)
        else:
            logsumexp_P = terms_P + target_logit_P
            ctx.save_for_backward(users_PD, candidates_CD, targets_P, bias_C, scale_P, terms_P, logsumexp_P)
        return (scale_P * terms_P).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        others = (None,) * 5
        if ctx.gradients is not None:
            return ctx.gradients[0] * grad, ctx.gradients[1] * grad, *others
        users_PD, candidates_CD, targets_P, bias_C, scale_P, terms_P, logsumexp_P = ctx.saved_tensors
        scale_P = scale_P * grad
        by_users_PD, by_candidates_CD = torch.zeros_like(users_PD), torch.empty_like(candidates_CD)
        with torch.autocast(users_PD.device.type, enabled=False):
            for start in range(0, len(candidates_CD), ctx.chunk):
                rows = slice(start, start + ctx.chunk)
                part_ND = unit(candidates_CD[rows])
                block_PN = _negatives(users_PD, part_ND, targets_P - start, _cut(bias_C, start, ctx.chunk))
                block_PN.sub_(logsumexp_P.unsqueeze(1)).exp_().mul_(scale_P.unsqueeze(1))
                _set_target(block_PN, targets_P - start, scale_P * torch.expm1(-terms_P))
                by_users_PD.addmm_(block_PN, part_ND)
                by_candidates_CD[rows] = unit_gradient(block_PN.T @ users_PD, candidates_CD[rows])
                del block_PN  # before the next one is made
        return by_users_PD, by_candidates_CD, *others


def _negatives(users_PD: Tensor, part_ND: Tensor, targets_P: Tensor, bias_N: Tensor | None) -> Tensor:
    """Return the logits (P, N) of a chunk of candidates; the target's, where the chunk holds it, is -inf."""
    logits_PN = scores(users_PD, part_ND)
    if bias_N is not None:
        logits_PN += bias_N  # addmm would write the bias to all rows first
    _set_target(logits_PN, targets_P, torch.full_like(logits_PN[:, 0], -math.inf))
    return logits_PN


def _set_target(block_PN: Tensor, targets_P: Tensor, values_P: Tensor) -> None:
    """Write each row's value into its target's column, where the chunk holds it."""
    columns_P1 = targets_P.clamp(0, block_PN.shape[1] - 1).unsqueeze(1)
    inside_P = (targets_P >= 0) & (targets_P < block_PN.shape[1])
    kept_P1 = block_PN.gather(1, columns_P1)
    block_PN.scatter_(1, columns_P1, torch.where(inside_P.unsqueeze(1), values_P.unsqueeze(1), kept_P1))


def _cut(bias_C: Tensor | None, start: int, chunk: int) -> Tensor | None:
    return None if bias_C is None else bias_C[start : start + chunk]

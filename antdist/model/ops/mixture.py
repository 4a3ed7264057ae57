"""The mixture of experts of one modality and its gradient (docs/spec/ant.md, section 3).

Shapes: N items, M width of the modality's frozen features, K experts, D width of the model.

Forward. Expert k whitens, (x_n - s_k) W_k, or projects, x_n W_k + b_k. Both are x_n W_k + o_k, with an offset o_k of
- s_k W_k or b_k that no item changes, so one product X [W_1 ... W_K] serves all experts:

    y_n = sum_k r_nk (x_n W_k + o_k)

Backward, with g_n the gradient at y_n:

    r_nk:  g_n . (x_n W_k) + g_n . o_k
    W_k:   sum_n x_n^T (r_nk g_n)     one product again, X^T [r_n1 g_n ... r_nK g_n]
    o_k:   h_k = sum_n r_nk g_n
    b_k = o_k, or by the chain rule through o_k = - s_k W_k:   s_k: - W_k h_k,   W_k: - s_k^T h_k in addition

The features x are frozen and get no gradient. torch's own backward pass copies the weights and the N x K x D outputs
several times; this one overwrites the outputs that it kept, so it can run only once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from antdist.model.ops import plain_ops


def mix_experts(features_NM: Tensor, routing_NK: Tensor, weight_MKD: Tensor, added: Tensor, whitening: bool) -> Tensor:
    """Sum the experts' outputs (N, D), weighted by the routing.

    Args:
        features_NM: frozen features, after dropout.
        routing_NK: weight of each expert for each item.
        weight_MKD: W_k is `weight_MKD[:, k]`.
        added: the shifts (K, M) if `whitening`, else the biases (K, D).
        whitening: whether the experts whiten or project.
    """
    assert not features_NM.requires_grad, "features are frozen"
    if plain_ops():
        return mix_experts_plain(features_NM, routing_NK, weight_MKD, added, whitening)
    mixed_ND: Tensor = _Mixture.apply(features_NM, routing_NK, weight_MKD, added, whitening)
    return mixed_ND


def mix_experts_plain(
    features_NM: Tensor, routing_NK: Tensor, weight_MKD: Tensor, added: Tensor, whitening: bool
) -> Tensor:
    """Plain twin of `mix_experts`: one expert after the other."""
    outputs = [
        (features_NM - added[k]) @ weight_MKD[:, k] if whitening else features_NM @ weight_MKD[:, k] + added[k]
        for k in range(len(added))
    ]
    outputs_NKD = torch.stack(outputs, dim=1)
    return (routing_NK.to(outputs_NKD.dtype).unsqueeze(2) * outputs_NKD).sum(1)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features_NM: Tensor, routing_NK: Tensor, weight_MKD: Tensor, added: Tensor, whitening: bool
    ) -> Tensor:
        outputs_NKD = (features_NM @ weight_MKD.flatten(1)).unflatten(1, weight_MKD.shape[1:])
        dtype = outputs_NKD.dtype  # under autocast another than the inputs'
        features_NM, routing_NK = features_NM.to(dtype), routing_NK.to(dtype)
        offsets_KD = -torch.bmm(added.unsqueeze(1), weight_MKD.transpose(0, 1)).squeeze(1) if whitening else added
        offsets_KD = offsets_KD.to(dtype)
        ctx.whitening = whitening
        ctx.save_for_backward(features_NM, routing_NK, outputs_NKD, weight_MKD, added, offsets_KD)
        return torch.addmm(torch.bmm(routing_NK.unsqueeze(1), outputs_NKD).squeeze(1), routing_NK, offsets_KD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        features_NM, routing_NK, outputs_NKD, weight_MKD, added, offsets_KD = ctx.saved_tensors
        by_routing_NK = torch.addmm(torch.bmm(outputs_NKD, grad_ND.unsqueeze(2)).squeeze(2), grad_ND, offsets_KD.T)
        if not (ctx.needs_input_grad[2] or ctx.needs_input_grad[3]):
            return None, by_routing_NK.float(), None, None, None
        spread_NKD = torch.mul(routing_NK.unsqueeze(2), grad_ND.unsqueeze(1), out=outputs_NKD)
        by_weight_MKD = (features_NM.T @ spread_NKD.flatten(1)).view(weight_MKD.shape).to(weight_MKD.dtype)
        by_offsets_KD = (routing_NK.T @ grad_ND).to(weight_MKD.dtype)
        if not ctx.whitening:
            return None, by_routing_NK.float(), by_weight_MKD, by_offsets_KD, None
        by_weight_MKD.addcmul_(added.T.unsqueeze(2), by_offsets_KD.unsqueeze(0), value=-1)
        by_shift_KM = -torch.bmm(weight_MKD.transpose(0, 1), by_offsets_KD.unsqueeze(2)).squeeze(2)
        return None, by_routing_NK.float(), by_weight_MKD, by_shift_KM, None

"""Causal attention of packed windows and its gradient (docs/spec/ant.md, section 4).

Shapes: T tokens of all windows, end to end; B blocks of Q tokens, K = 2 Q keys of a block, H heads, E width of a head,
D = H E width of the model.

*Bands.* Windows are packed, not padded. The tokens are cut into blocks of Q, which no window exceeds, so a token's window
lies in its own block and the one before: each block of queries meets the keys of these two. Where windows start changes
the mask alone, so no shape depends on data that lies on the device. Only the last block is filled up.

*Attention.* Forward, with c = 1 / sqrt(E) and a dropout mask M (1 / (1 - p) or 0, drawn by `draw_mask`):

    S = c q k^T, -inf where a query may not see a key;   A = softmax(S);   y = (A * M) v

Backward, with g the gradient at y (the third line is the softmax's Jacobian; where S is -inf A is 0, and so is dS):

    dv = (A * M)^T g
    dA = (g v^T) * M
    dS = A * (dA - rowsum(dA * A))
    dq = c dS k,   dk = c dS^T q

torch's own backward pass on a CPU transposes the keys twice and draws its mask slowly. Softmax is in float32 always.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from antdist.model.ops import plain_ops
from antdist.model.ops.dropout import draw_mask


@dataclass(frozen=True)
class Bands:
    """Which keys each block of packed tokens sees."""

    mask_B1QK: Tensor  # bool: a query sees the keys of its own window up to itself

    @property
    def width(self) -> int:
        """Tokens of a block, Q."""
        return self.mask_B1QK.shape[2]

    def pad(self, x_TD: Tensor) -> Tensor:
        """Fill up the last block with zeros: (T, D) to (B Q, D)."""
        return F.pad(x_TD, (0, 0, 0, len(self.mask_B1QK) * self.width - len(x_TD)))


def make_bands(offsets: Tensor, tokens: int, longest: int) -> Bands:
    """Cut packed windows into bands.

    Args:
        offsets: (W + 1,) int64, where each window starts; the last is `tokens`.
        tokens: of all windows, T; 0 on a rank without a window.
        longest: at least the tokens of the longest window.
    """
    width = -(-max(longest, 1) // 8) * 8  # fused kernels need a mask's rows to be a multiple of 8
    blocks = max(1, -(-tokens // width))
    window = torch.full((blocks * width,), -1, device=offsets.device)
    numbers = torch.arange(len(offsets) - 1, device=offsets.device)
    window[:tokens] = numbers.repeat_interleave(offsets.diff(), output_size=tokens)
    window_BQ = window.view(blocks, width)
    window_BK = torch.cat([F.pad(window_BQ[:-1], (0, 0, 1, 0), value=-2), window_BQ], dim=1)
    key_K = torch.arange(2 * width, device=offsets.device)
    earlier_QK = key_K <= key_K[:width].unsqueeze(1) + width
    return Bands(((window_BQ.unsqueeze(2) == window_BK.unsqueeze(1)) & earlier_QK).unsqueeze(1))


def attend_in_bands(qkv: Tensor, bands: Bands, heads: int, dropped: float) -> Tensor:
    """Attend from each token to its window's tokens up to itself.

    Args:
        qkv: (B Q, 3 D), queries, keys and values side by side.
        bands: of these tokens.
        heads: H.
        dropped: probability of dropout on the attention weights.

    Returns:
        (B Q, D), the heads side by side.
    """
    blocks = qkv.view(-1, bands.width, 3, heads, qkv.shape[1] // (3 * heads))
    q_BHQE, *own = blocks.permute(2, 0, 3, 1, 4).unbind()
    k_BHKE, v_BHKE = (torch.cat([F.pad(x[:-1], (0, 0, 0, 0, 0, 0, 1, 0)), x], dim=2) for x in own)
    return attend(q_BHQE, k_BHKE, v_BHKE, bands.mask_B1QK, dropped).transpose(1, 2).reshape(len(qkv), -1)


def attend(q_BHQE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, mask_B1QK: Tensor, dropped: float) -> Tensor:
    """Compute dropout(softmax(q k^T / sqrt(E))) v: (B, H, Q, E). On a GPU torch's fused kernel does it."""
    if not q_BHQE.is_cpu and not plain_ops():
        return F.scaled_dot_product_attention(q_BHQE, k_BHKE, v_BHKE, attn_mask=mask_B1QK, dropout_p=dropped)
    shape = (*q_BHQE.shape[:3], k_BHKE.shape[2])
    dropout_BHQK = draw_mask(shape, dropped, v_BHKE) if dropped else None
    if plain_ops():
        return attend_plain(q_BHQE, k_BHKE, v_BHKE, mask_B1QK, dropout_BHQK)
    y_BHQE: Tensor = _Attention.apply(q_BHQE, k_BHKE, v_BHKE, mask_B1QK, dropout_BHQK)
    return y_BHQE


def attend_plain(
    q_BHQE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, mask_B1QK: Tensor, dropout_BHQK: Tensor | None
) -> Tensor:
    """Plain twin of `attend`, given the mask that dropout multiplies with."""
    scores_BHQK = (q_BHQE @ k_BHKE.transpose(2, 3)).float() / q_BHQE.shape[-1] ** 0.5
    weights_BHQK = scores_BHQK.masked_fill(~mask_B1QK, -torch.inf).softmax(-1).to(v_BHKE.dtype)
    return (weights_BHQK if dropout_BHQK is None else weights_BHQK * dropout_BHQK) @ v_BHKE


class _Attention(torch.autograd.Function):
    """`attend` on a CPU. B and H are one dimension G in here, as `torch.bmm` takes it."""

    @staticmethod
    def forward(
        ctx: Any, q_BHQE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, mask_B1QK: Tensor, dropout_BHQK: Tensor | None
    ) -> Tensor:
        shape, ctx.scale = q_BHQE.shape, q_BHQE.shape[-1] ** -0.5
        q_GQE, k_GKE, v_GKE = (x.flatten(0, 1) for x in (q_BHQE, k_BHKE, v_BHKE))
        scores_GQK = torch.bmm(q_GQE, k_GKE.transpose(1, 2)).float().mul_(ctx.scale)
        scores_GQK.view(*shape[:3], -1).masked_fill_(~mask_B1QK, -torch.inf)
        weights_GQK = scores_GQK.softmax(-1).to(v_GKE.dtype)
        dropout_GQK = None if dropout_BHQK is None else dropout_BHQK.flatten(0, 1)
        ctx.save_for_backward(q_GQE, k_GKE, v_GKE, weights_GQK, dropout_GQK)
        return torch.bmm(weights_GQK if dropout_GQK is None else weights_GQK * dropout_GQK, v_GKE).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHQE: Tensor) -> tuple[Tensor | None, ...]:
        q_GQE, k_GKE, v_GKE, weights_GQK, dropout_GQK = ctx.saved_tensors
        grad_GQE = grad_BHQE.flatten(0, 1)
        by_weights_GQK = torch.bmm(grad_GQE, v_GKE.transpose(1, 2))
        used_GQK = weights_GQK if dropout_GQK is None else weights_GQK * dropout_GQK
        by_v_GKE = torch.bmm(used_GQK.transpose(1, 2), grad_GQE)
        if dropout_GQK is not None:
            by_weights_GQK.mul_(dropout_GQK)
        by_scores_GQK = torch._softmax_backward_data(by_weights_GQK.float(), weights_GQK.float(), -1, torch.float32)
        by_scores_GQK = by_scores_GQK.mul_(ctx.scale).to(weights_GQK.dtype)
        by_q_GQE, by_k_GKE = torch.bmm(by_scores_GQK, k_GKE), torch.bmm(by_scores_GQK.transpose(1, 2), q_GQE)
        return *(x.unflatten(0, grad_BHQE.shape[:2]) for x in (by_q_GQE, by_k_GKE, by_v_GKE)), None, None

"""The sequence encoder: a user's items to states that tell the next one (SASRec; spec, section 4), on packed tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from antdist.config.schema import ModelConfig
from antdist.model.ops.dropout import dropout, keep_mask


def token_positions(offsets: Tensor, tokens: int) -> Tensor:
    """Position of each of the packed tokens in its window (T,), from 0."""
    starts = offsets[:-1].repeat_interleave(offsets.diff(), output_size=tokens)
    return torch.arange(tokens, device=offsets.device) - starts


@dataclass(frozen=True)
class Bands:
    """How attention sees packed tokens: in blocks of `width`, each block of queries with the keys of its own and of the
    block before. No window is longer than a block, so that covers it; `mask` (blocks, 1, width, 2 width) lets a query
    see the keys of its own window up to itself. Only the last block is filled up; where windows begin plays no part,
    so nothing has to be read from the device.
    """

    width: int
    mask: Tensor

    @property
    def rows(self) -> int:
        """Tokens with those that fill up the last block."""
        return len(self.mask) * self.width


def bands(offsets: Tensor, tokens: int, longest: int) -> Bands:
    """The bands of packed windows that begin at `offsets` (W + 1,), none longer than `longest`."""
    width = -(-max(longest, 1) // 8) * 8  # what fused kernels ask of a mask's rows
    blocks = max(1, -(-tokens // width))  # a rank may have no token
    window = torch.full((blocks * width,), -1, device=offsets.device)
    numbers = torch.arange(len(offsets) - 1, device=offsets.device)
    window[:tokens] = numbers.repeat_interleave(offsets.diff(), output_size=tokens)
    queries = window.view(blocks, width)
    keys = torch.cat([F.pad(queries[:-1], (0, 0, 1, 0), value=-2), queries], dim=1)
    place = torch.arange(2 * width, device=offsets.device)
    earlier = place <= place[:width].unsqueeze(1) + width
    return Bands(width, ((queries.unsqueeze(2) == keys.unsqueeze(1)) & earlier).unsqueeze(1))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropped: float) -> Tensor:
    """softmax(q k / sqrt(d_h)) v with dropout on the softmax: (B, H, n, d_h), keys and values (B, H, m, d_h), mask
    (B, 1, n, m). Written out on a CPU, where torch's draws its mask slowly."""
    if not q.is_cpu:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped)
    attended: Tensor = _Attention.apply(q, k, v, mask, dropped)
    return attended


class _Attention(torch.autograd.Function):
    """Attention whose gradients come out in the layout of their inputs: torch's own backward transposes the keys' twice."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropped: float) -> Tensor:
        shape, ctx.scale = q.shape, q.shape[-1] ** -0.5
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2)).float().mul_(ctx.scale)
        scores.view(*shape[:3], -1).masked_fill_(~mask, float("-inf"))
        weights = scores.softmax(-1).to(v.dtype)
        kept = keep_mask(weights, dropped) if dropped else None
        ctx.save_for_backward(q, k, v, weights, kept)
        return torch.bmm(weights if kept is None else weights * kept, v).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, kept = ctx.saved_tensors
        heads = grad.shape[:2]
        grad = grad.flatten(0, 1)
        by_weights = torch.bmm(grad, v.transpose(1, 2))
        v_grad = torch.bmm((weights if kept is None else weights * kept).transpose(1, 2), grad)
        if kept is not None:
            by_weights.mul_(kept)
        by_scores = torch._softmax_backward_data(by_weights.float(), weights.float(), -1, torch.float32)
        by_scores = by_scores.mul_(ctx.scale).to(weights.dtype)
        q_grad, k_grad = torch.bmm(by_scores, k), torch.bmm(by_scores.transpose(1, 2), q)
        return *(part.unflatten(0, heads) for part in (q_grad, k_grad, v_grad)), None, None


class Norm(nn.LayerNorm):
    """Layer normalisation with float32 statistics whatever the dtype of activations and weights."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-8)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(
            self.weight.dtype
        )


class Layer(nn.Module):
    """One post-LN transformer layer with a causal mask: h = LN(x + attention(x)), LN(h + W2 gelu(W1 h))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.output = nn.Linear(config.dim, config.dim)
        self.attention_norm = Norm(config.dim)
        self.expand = nn.Linear(config.dim, config.inner)
        self.contract = nn.Linear(config.inner, config.dim)
        self.forward_norm = Norm(config.dim)

    def forward(self, x: Tensor, bands: Bands) -> Tensor:
        attended = self.output(self.attend(self.qkv(x), bands))
        h = self.attention_norm(x + dropout(attended, self.dropout, self.training))
        inner = self.contract(F.gelu(self.expand(h)))
        out: Tensor = self.forward_norm(h + dropout(inner, self.dropout, self.training))
        return out

    def attend(self, qkv: Tensor, bands: Bands) -> Tensor:
        """Causal attention of each token to its window's earlier ones: (rows, 3d) to (rows, d)."""
        blocks = qkv.view(-1, bands.width, 3, self.heads, qkv.shape[1] // (3 * self.heads))
        q, *kv = blocks.permute(2, 0, 3, 1, 4).unbind()  # (blocks, heads, width, d_h) each
        k, v = (torch.cat([F.pad(part[:-1], (0, 0, 0, 0, 0, 0, 1, 0)), part], dim=2) for part in kv)
        dropped = self.dropout if self.training else 0.0
        return attention(q, k, v, bands.mask, dropped).transpose(1, 2).reshape(len(qkv), -1)


class SequenceEncoder(nn.Module):
    """SASRec's transformer with its input normalisation and dropout; all linear maps run on packed tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.checkpointing = config.activation_checkpointing
        self.input_norm = Norm(config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor, offsets: Tensor, longest: int) -> Tensor:
        """States of packed tokens.

        Args:
            x: (T, d) item embeddings plus position embeddings.
            offsets: (W + 1,) where each window starts.
            longest: tokens in the longest window.

        Returns:
            (T, d); a token's state has seen its window up to and including itself.
        """
        tokens, seen = len(x), bands(offsets, len(x), longest)
        x = dropout(self.input_norm(x), self.dropout, self.training)
        x = F.pad(x, (0, 0, 0, seen.rows - tokens))
        for layer in self.layers:
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, seen, use_reentrant=False)
            else:
                x = layer(x, seen)
        return x[:tokens]

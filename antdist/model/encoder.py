"""The sequence encoder: a user's items to states that tell the next one (SASRec; spec, section 4), on packed tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from antdist.config.schema import ModelConfig
from antdist.model.dropout import dropout

# Windows are padded to the longest of their bucket, on the CPU only: at most by half, by about a fifth on average.
BUCKETS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def token_positions(offsets: Tensor, tokens: int) -> Tensor:
    """Position of each of the packed tokens in its window (T,), from 0."""
    starts = offsets[:-1].repeat_interleave(offsets.diff(), output_size=tokens)
    return torch.arange(tokens, device=offsets.device) - starts


@dataclass(frozen=True)
class Packing:
    """How packed tokens are laid out for attention, the one place that pads.

    `slots[b]` (w, l) holds the tokens of the w windows of bucket b, each filled up to l with any token: it comes after
    the real ones, so no real query sees it under the causal mask. `back` (T,) finds each token in the buckets' rows,
    laid one after the other.
    """

    slots: list[Tensor]
    back: Tensor


def pack(offsets: Tensor, tokens: int, longest: int, *, by_length: bool) -> Packing:
    """Sort windows into buckets of similar length, if `by_length`.

    That reads the lengths, which are at hand on a CPU. On an accelerator it would stall the step, so there all windows
    make one bucket of `longest`, which the host knows: attention is a small part of the work there.
    """
    starts, lengths = offsets[:-1], offsets.diff()
    everyone = torch.arange(len(lengths), device=offsets.device)
    if by_length and len(lengths):
        bucket = torch.bucketize(lengths, torch.tensor(BUCKETS, device=offsets.device))
        groups = [everyone[bucket == b] for b in bucket.unique()]
        widths = [max(1, int(lengths[group].max())) for group in groups]
    else:
        groups, widths = [everyone], [max(1, longest)]
    slots, first, begin = [], torch.zeros_like(starts), 0
    for group, width in zip(groups, widths, strict=True):
        slot = starts[group].unsqueeze(1) + torch.arange(width, device=offsets.device)
        slots.append(slot.clamp_(max=max(tokens - 1, 0)))
        first[group] = begin + width * torch.arange(len(group), device=offsets.device)
        begin += slot.numel()
    back = first.repeat_interleave(lengths, output_size=tokens) + token_positions(offsets, tokens)
    return Packing(slots, back)


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

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        attended = self.output(self.attend(self.qkv(x), packing))
        h = self.attention_norm(x + dropout(attended, self.dropout, self.training))
        inner = self.contract(F.gelu(self.expand(h)))
        out: Tensor = self.forward_norm(h + dropout(inner, self.dropout, self.training))
        return out

    def attend(self, qkv: Tensor, packing: Packing) -> Tensor:
        """Causal attention of each token to its window's earlier ones: (T, 3d) to (T, d)."""
        dropped = self.dropout if self.training else 0.0
        dim = qkv.shape[1] // 3
        padded = qkv.index_select(0, torch.cat([slots.flatten() for slots in packing.slots]))
        outputs = []
        for rows, slots in zip(padded.split([s.numel() for s in packing.slots]), packing.slots, strict=True):
            q, k, v = rows.view(*slots.shape, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=True)
            outputs.append(attended.transpose(1, 2).reshape(-1, dim))
        return torch.cat(outputs).index_select(0, packing.back)


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
        x = dropout(self.input_norm(x), self.dropout, self.training)
        packing = pack(offsets, len(x), longest, by_length=x.is_cpu)
        for layer in self.layers:
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, packing, use_reentrant=False)
            else:
                x = layer(x, packing)
        return x

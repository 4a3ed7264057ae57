"""The user intent model: SASRec on packed tokens (docs/spec/ant.md, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from antdist.config.schema import ModelConfig
from antdist.model.ops.attention import Bands, attend_in_bands, make_bands
from antdist.model.ops.dropout import dropout


def token_positions(offsets: Tensor, tokens: int) -> Tensor:
    """Return each packed token's position in its window (T,), from 0."""
    starts = offsets[:-1].repeat_interleave(offsets.diff(), output_size=tokens)
    return torch.arange(tokens, device=offsets.device) - starts


class Norm(nn.LayerNorm):
    """Layer normalisation with float32 statistics for any dtype of activations and weights."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-8)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(
            self.weight.dtype
        )


class Layer(nn.Module):
    """A post-LN transformer layer: h = LN(x + attention(x)), then LN(h + W2 gelu(W1 h)), with dropout."""

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
        seen = attend_in_bands(self.qkv(x), bands, self.heads, self.dropout if self.training else 0.0)
        h = self.attention_norm(x + dropout(self.output(seen), self.dropout, self.training))
        inner = self.contract(F.gelu(self.expand(h)))
        out: Tensor = self.forward_norm(h + dropout(inner, self.dropout, self.training))
        return out


class SASRec(nn.Module):
    """The transformer PHI and its input normalisation: `(x, offsets, longest) -> states`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.checkpointing = config.activation_checkpointing
        self.input_norm = Norm(config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor, offsets: Tensor, longest: int) -> Tensor:
        """Encode packed tokens.

        Args:
            x: (T, d) item embeddings plus position embeddings.
            offsets: (W + 1,) where each window starts.
            longest: tokens of the longest window.

        Returns:
            (T, d) states; a token's state depends on its window up to and including itself.
        """
        tokens, bands = len(x), make_bands(offsets, len(x), longest)
        x = bands.pad(dropout(self.input_norm(x), self.dropout, self.training))
        for layer in self.layers:
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, bands, use_reentrant=False)
            else:
                x = layer(x, bands)
        return x[:tokens]

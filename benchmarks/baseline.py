"""The usual way to train this model, written fairly, as the baseline of `benchmarks.throughput`.

Batched and multi-threaded torch; histories padded to full length; one example a prefix; features looked up and items
embedded for each position; the experts of a modality one after the other; one matrix of logits; Adam. Sizes, losses,
dropout and routing noise are those of the specification.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEMPERATURE = 0.07


class ExpertLayer(nn.Module):
    """One expert: dropout, a learned shift, a linear map."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)
        self.shift = nn.Parameter(torch.zeros(features))
        self.linear = nn.Linear(features, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(self.dropout(x) - self.shift))


class MixtureOfExperts(nn.Module):
    """Gaussian routing over experts that run in a loop."""

    def __init__(self, features: int, dim: int, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(ExpertLayer(features, dim) for _ in range(experts))
        self.gate = nn.Parameter(torch.zeros(features, experts))
        self.noise = nn.Parameter(torch.zeros(features, experts))

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.gate
        if self.training:
            logits = logits + torch.randn_like(logits) * (F.softplus(x @ self.noise) + 0.01)
        routing = logits.softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return (routing.unsqueeze(-1) * outputs).sum(-2)


class EncoderLayer(nn.Module):
    """A post-LN transformer layer over padded histories."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.expand, self.contract = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-8) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / (dim / self.heads) ** 0.5 + mask
        seen = self.dropout(scores.softmax(-1)) @ v
        h = self.norms[0](x + self.dropout(self.out(seen.transpose(1, 2).reshape(batch, length, dim))))
        return cast(Tensor, self.norms[1](h + self.dropout(self.contract(F.gelu(self.expand(h))))))


class Baseline(nn.Module):
    """The complete recommender, on features of all items as tensors (items, width)."""

    def __init__(self, features: dict[str, Tensor], dim: int = 256, experts: int = 8, length: int = 50) -> None:
        super().__init__()
        self.features = features
        self.towers = nn.ModuleDict({m: MixtureOfExperts(f.shape[1], dim, experts) for m, f in features.items()})
        self.positions = nn.Embedding(length, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-8)
        self.layers = nn.ModuleList(EncoderLayer(dim, 2, 0.5) for _ in range(2))
        self.dropout = nn.Dropout(0.5)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def items(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Embed item ids of any shape, position by position. Returns the embedding, and its parts by modality."""
        parts = {m: tower(self.features[m][ids]) for m, tower in self.towers.items()}
        return sum(parts.values(), torch.zeros(())) + 0.1 * parts["text"] * parts["image"], parts

    def users(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """Encode (B, L) padded item ids to (B, d), the state after each history's last item."""
        embedded, _ = self.items(histories)
        place = torch.arange(histories.shape[1], device=histories.device)
        x = self.dropout(self.norm(embedded + self.positions(place)))
        visible = (place[None, :] <= place[:, None]) & (place < lengths[:, None, None])
        mask = torch.where(visible, 0.0, -10000.0).unsqueeze(1)
        for layer in self.layers:
            x = layer(x, mask)
        return x[torch.arange(len(x), device=x.device), lengths - 1]

    def pretraining_loss(self, histories: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss with in-batch negatives, equal items masked, plus the text-image alignment."""
        users, (items, parts) = self.users(histories, lengths), self.items(targets)
        logits = F.normalize(users, dim=-1) @ F.normalize(items, dim=-1).T / TEMPERATURE
        same = (targets[:, None] == targets[None, :]) & ~torch.eye(
            len(targets), dtype=torch.bool, device=targets.device
        )
        right = torch.arange(len(targets), device=targets.device)
        aligned = F.normalize(parts["image"], dim=-1) @ F.normalize(parts["text"], dim=-1).T / TEMPERATURE
        return F.cross_entropy(logits.masked_fill(same, -1e9), right) + 1e-3 * F.cross_entropy(aligned, right)

    def adaptation_loss(self, histories: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss over all items of the catalogue, embedded in each step."""
        users, (items, _) = (
            self.users(histories, lengths),
            self.items(torch.arange(len(self.features["text"]), device=targets.device)),
        )
        return F.cross_entropy(F.normalize(users, dim=-1) @ F.normalize(items, dim=-1).T / TEMPERATURE, targets)

"""The item tower: frozen features of items to their embeddings (docs/spec/ant.md, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from antdist.batch import MODALITIES, ItemInputs
from antdist.config.schema import ModelConfig
from antdist.model.ops.dropout import dropout
from antdist.model.ops.mixture import mix_experts


class ItemEmbeddings(NamedTuple):
    """Embeddings of n items, in rows.

    `text` and `image` are the transformed embeddings (before fusion) that the alignment loss reads; None if the tower has
    no such modality. `text_present` and `image_present` tell which items have the frozen feature at all.
    """

    item: Tensor  # (n, d)
    text: Tensor | None  # (n, d)
    image: Tensor | None  # (n, d)
    text_present: Tensor  # (n,) bool
    image_present: Tensor  # (n,) bool

    def first(self, rows: int) -> ItemEmbeddings:
        """Return those of the first `rows` items."""
        return ItemEmbeddings(
            self.item[:rows],
            None if self.text is None else self.text[:rows],
            None if self.image is None else self.image[:rows],
            self.text_present[:rows],
            self.image_present[:rows],
        )


class Experts(nn.Module):
    """A mixture of K experts over one modality under Gaussian routing: (n, d_m) features to (n, d).

    Text and image whiten: expert k computes (dropout(x) - shift_k) W_k. Price projects: dropout(x) W_k + bias_k. W_k is
    `weight[:, k]`. The dropout mask is drawn once an item and shared by the experts (the reference draws one for each).
    """

    def __init__(self, features: int, dim: int, experts: int, drop: float, *, whitening: bool) -> None:
        super().__init__()
        self.dropout = drop
        self.weight = nn.Parameter(torch.zeros(features, experts, dim))
        if whitening:
            self.shift = nn.Parameter(torch.zeros(experts, features))
        else:
            self.bias = nn.Parameter(torch.zeros(experts, dim))
        self.whitening = whitening
        self.gate = nn.Parameter(torch.zeros(features, experts))
        self.noise = nn.Parameter(torch.zeros(features, experts))

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Transform features.

        Args:
            x: (n, d_m), frozen.
            present: (n,) bool, where it is False the result is zero; None: everywhere present.
        """
        x = x.to(self.weight.dtype)
        routing = self.route(x)
        if present is not None:
            routing = routing * present.unsqueeze(1)
        added = self.shift if self.whitening else self.bias
        return mix_experts(dropout(x, self.dropout, self.training), routing, self.weight, added, self.whitening)

    def route(self, x: Tensor) -> Tensor:
        """Compute the experts' weights (n, K) in float32; reads x without dropout.

        They are softmax(mu + eps * sigma) in training, softmax(mu) in evaluation.
        """
        if not self.training:
            return (x @ self.gate).float().softmax(-1)
        mean, spread = (x @ torch.cat([self.gate, self.noise], dim=1)).float().chunk(2, dim=-1)
        sigma = F.softplus(spread) + 0.01
        return (mean + torch.randn_like(mean) * sigma).softmax(-1)


class Projection(nn.Linear):
    """The ablation without experts: one linear layer with bias, no dropout."""

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        embedding = super().forward(x.to(self.weight.dtype))
        return embedding if present is None else embedding * present.unsqueeze(1)


class ItemTower(nn.Module):
    """Transform each modality and fuse them: e = text + image + price + beta * (text * image).

    Each distinct item is embedded once a step, so dropout and routing noise are drawn once an item and step (the reference
    draws them for each occurrence: another regularisation).

    A modality that `config.modalities` or `dims` lacks has no parameters and contributes zeros. With `config.missing`
    "mask" a missing feature gives a zero transformed embedding, hence no synergy; with "reference" the zero feature
    passes through the experts like any other.

    Args:
        config: the recommender's configuration.
        dims: width of each modality's frozen features.
    """

    def __init__(self, config: ModelConfig, dims: dict[str, int]) -> None:
        super().__init__()
        self.beta = config.beta if config.fusion else 0.0
        self.mask_missing = config.missing == "mask"
        self.modalities = [m for m in MODALITIES if m in config.modalities and m in dims]
        assert self.modalities, f"none of the modalities {config.modalities} has features: {sorted(dims)}"
        for modality in self.modalities:
            transform: nn.Module
            if config.mixture:
                transform = Experts(
                    dims[modality], config.dim, config.experts, config.item_dropout, whitening=modality != "price"
                )
            else:
                transform = Projection(dims[modality], config.dim)
            self.add_module(modality, transform)

    def forward(self, inputs: ItemInputs) -> ItemEmbeddings:
        transformed = {m: self._transform(m, inputs) for m in self.modalities}
        text, image = transformed.get("text"), transformed.get("image")
        item, *more = transformed.values()
        if more:
            item = torch.stack([item, *more]).sum(0)
        if self.beta and text is not None and image is not None:
            item = torch.addcmul(item, text, image, value=self.beta)
        return ItemEmbeddings(item, text, image, self._present("text", inputs), self._present("image", inputs))

    def _transform(self, modality: str, inputs: ItemInputs) -> Tensor:
        present = inputs.present[modality] if self.mask_missing else None
        embedding: Tensor = self.get_submodule(modality)(inputs.values[modality], present)
        return embedding

    def _present(self, modality: str, inputs: ItemInputs) -> Tensor:
        if modality in self.modalities:
            return inputs.present[modality]
        return torch.zeros_like(inputs.index, dtype=torch.bool)

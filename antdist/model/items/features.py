"""The item tower: frozen features of an item to its embedding (spec, section 3)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from antdist.batch import MODALITIES, ItemInputs
from antdist.config.schema import ModelConfig
from antdist.model.ops.dropout import dropout


class ItemEmbeddings(NamedTuple):
    """Embeddings of n items, in rows.

    `text` and `image` are the transformed embeddings (before fusion) which the alignment loss reads; None if the tower
    has no such modality. A row of `text_present` says whether that item has the frozen feature at all.
    """

    item: Tensor  # (n, d)
    text: Tensor | None  # (n, d)
    image: Tensor | None  # (n, d)
    text_present: Tensor  # (n,) bool
    image_present: Tensor  # (n,) bool


class Experts(nn.Module):
    """A mixture of K experts over one modality, under Gaussian routing: (n, d_m) features to (n, d).

    Text and image whiten: expert k gives (dropout(x) - shift_k) W_k. Price projects: dropout(x) W_k + bias_k. All K
    experts are one matrix product, W_k being `weight[:, k]`; shifts are folded into one offset an expert, - shift_k W_k,
    added after routing.

    The dropout mask is drawn once an item and shared by the experts (the reference draws one for each expert).
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
        """Args: x (n, d_m), frozen; present (n,) bool: where it is False the result is zero. None: all are there."""
        x = x.to(self.weight.dtype)
        routing = self.route(x)
        if present is not None:
            routing = routing * present.unsqueeze(1)
        added = self.shift if self.whitening else self.bias
        mixed: Tensor = _Mixture.apply(
            dropout(x, self.dropout, self.training), routing, self.weight, added, self.whitening
        )
        return mixed

    def route(self, x: Tensor) -> Tensor:
        """Weights of the experts (n, K), float32. Reads x without dropout; noise is drawn in training only."""
        if not self.training:
            return (x @ self.gate).float().softmax(-1)
        mean, spread = (x @ torch.cat([self.gate, self.noise], dim=1)).float().chunk(2, dim=-1)
        sigma = F.softplus(spread) + 0.01
        return (mean + torch.randn_like(mean) * sigma).softmax(-1)


class _Mixture(torch.autograd.Function):
    """sum_k routing[:, k] * (x W_k + offset_k), offset_k being bias_k or - shift_k W_k: x (n, d_m), routing (n, K), weight
    (d_m, K, d), added (K, d_m) shifts or (K, d) biases; gives (n, d).

    With a backward pass of its own, since torch's copies weights and outputs several times. It writes over the outputs it
    kept, so it runs once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Tensor, weight: Tensor, added: Tensor, whitening: bool) -> Tensor:
        features, experts, dim = weight.shape
        assert not x.requires_grad, "features are frozen"
        outputs = (x @ weight.view(features, experts * dim)).unflatten(1, (experts, dim))
        mix, x = routing.to(outputs.dtype), x.to(outputs.dtype)  # as autocast has it
        offsets = -torch.bmm(added.unsqueeze(1), weight.transpose(0, 1)).squeeze(1) if whitening else added
        offsets = offsets.to(outputs.dtype)
        ctx.whitening = whitening
        ctx.save_for_backward(x, mix, outputs, weight, added, offsets)
        return torch.addmm(torch.bmm(mix.unsqueeze(1), outputs).squeeze(1), mix, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mix, outputs, weight, added, offsets = ctx.saved_tensors
        routing_grad = torch.addmm(torch.bmm(outputs, grad.unsqueeze(2)).squeeze(2), grad, offsets.T)
        if not (ctx.needs_input_grad[2] or ctx.needs_input_grad[3]):
            return None, routing_grad.float(), None, None, None
        spread = torch.mul(mix.unsqueeze(2), grad.unsqueeze(1), out=outputs)
        weight_grad = (x.T @ spread.flatten(1)).view(weight.shape).to(weight.dtype)
        added_grad = (mix.T @ grad).to(weight.dtype)  # of the offsets
        if ctx.whitening:
            weight_grad.addcmul_(added.T.unsqueeze(2), added_grad.unsqueeze(0), value=-1)
            added_grad = -torch.bmm(weight.transpose(0, 1), added_grad.unsqueeze(2)).squeeze(2)
        return None, routing_grad.float(), weight_grad, added_grad, None


class Projection(nn.Linear):
    """The ablation without experts: one linear layer with bias, no dropout."""

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        embedding = super().forward(x.to(self.weight.dtype))
        return embedding if present is None else embedding * present.unsqueeze(1)


class ItemTower(nn.Module):
    """Transforms each modality and fuses them: e = text + image + price + beta * (text * image).

    Each row is computed once a step however often its item occurs, so dropout and routing noise are drawn once an item
    and step (the reference draws them for each occurrence: another regularisation).

    A modality that `config.modalities` leaves out, or that `dims` lacks, has no parameters and contributes zeros.
    With `config.missing` "mask" a missing feature gives a zero transformed embedding, hence no synergy; with
    "reference" the zero feature passes through the experts like any other.

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

    def forward(self, features: ItemInputs) -> ItemEmbeddings:
        transformed = {m: self._transform(m, features) for m in self.modalities}
        item = (
            torch.stack(list(transformed.values())).sum(0) if len(transformed) > 1 else transformed[self.modalities[0]]
        )
        text, image = transformed.get("text"), transformed.get("image")
        if self.beta and text is not None and image is not None:
            item = torch.addcmul(item, text, image, value=self.beta)
        return ItemEmbeddings(item, text, image, self._present("text", features), self._present("image", features))

    def _transform(self, modality: str, features: ItemInputs) -> Tensor:
        present = features.present[modality] if self.mask_missing else None
        embedding: Tensor = self.get_submodule(modality)(features.values[modality], present)
        return embedding

    def _present(self, modality: str, features: ItemInputs) -> Tensor:
        if modality in self.modalities:
            return features.present[modality]
        return torch.zeros_like(features.index, dtype=torch.bool)

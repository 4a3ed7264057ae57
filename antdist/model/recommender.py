"""The recommender: item tower, positions, sequence encoder and losses in one module (spec, sections 3 to 6)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from antdist.batch import Batch, ItemInputs
from antdist.config.schema import LossConfig, ModelConfig
from antdist.model.items.features import Experts, ItemEmbeddings, ItemTower, Projection
from antdist.model.losses import alignment_loss, next_item_loss
from antdist.model.sequence.sasrec import Norm, SequenceEncoder, token_positions
from antdist.profiling import part

Gather = Callable[[Tensor], Tensor]
PRETRAINING_LOSS = LossConfig()


class Losses(NamedTuple):
    """This rank's contributions, float32 scalars: their sum over ranks is the loss of the global batch."""

    total: Tensor
    recommendation: Tensor
    alignment: Tensor


class Recommender(nn.Module):
    """ANT: items by their modalities, users by their items, scores by cosine.

    Args:
        config: widths and switches.
        dims: width of each modality's frozen features.
        catalogue_size: items with a learned embedding of their own, for `config.item_embeddings` (ANT_t).
    """

    def __init__(self, config: ModelConfig, dims: dict[str, int], catalogue_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.dims = {m: dims[m] for m in config.modalities if m in dims}
        self.catalogue_size = catalogue_size
        self.tower = ItemTower(config, dims)
        self.positions = nn.Embedding(config.max_length, config.dim)
        self.encoder = SequenceEncoder(config)
        self.item_embeddings: nn.Embedding | None = None
        if config.item_embeddings:
            assert catalogue_size is not None, "item_embeddings needs the size of the catalogue"
            self.item_embeddings = nn.Embedding(catalogue_size, config.dim)

    def embed_items(self, features: ItemInputs) -> ItemEmbeddings:
        """Embeddings of n items; ANT_t adds each item's learned one."""
        embeddings: ItemEmbeddings = self.tower(features)
        if self.item_embeddings is None:
            return embeddings
        learned = self.item_embeddings(features.index)
        return ItemEmbeddings(
            embeddings.item + learned.to(embeddings.item.dtype),
            embeddings.text,
            embeddings.image,
            embeddings.text_present,
            embeddings.image_present,
        )

    def encode_users(self, item_rows: Tensor, tokens: Tensor, offsets: Tensor, longest: int) -> Tensor:
        """States of packed tokens (T, d): the user's preference after each.

        Args:
            item_rows: (N, d) item embeddings.
            tokens: (T,) int64, rows of `item_rows`.
            offsets: (W + 1,) int64, where each window starts; at most `config.max_length` tokens each.
            longest: tokens in the longest window.
        """
        assert longest <= self.config.max_length, f"a window of {longest} tokens, max_length {self.config.max_length}"
        positions = self.positions(token_positions(offsets, len(tokens)))
        states: Tensor = self.encoder(item_rows.index_select(0, tokens) + positions, offsets, longest)
        return states

    def forward(
        self, features: ItemInputs, batch: Batch, gather: Gather | None = None, loss: LossConfig = PRETRAINING_LOSS
    ) -> Losses:
        """This rank's contribution to the losses of a global batch.

        Args:
            features: of this rank's rows of `batch.item_ids`, `batch.share`; more may follow and play no part.
            batch: this rank's.
            gather: all-gather of rows over ranks, with gradient; None: this rank embeds them all.
            loss: `alignment` weighs the text-image alignment (0: not computed), `chunk` bounds memory.
        """
        with part("embed items"):
            embeddings = _first(batch.share[1] - batch.share[0], self.embed_items(features))
        items, aligned = embeddings.item, None
        if loss.alignment > 0 and embeddings.text is not None and embeddings.image is not None:
            items, aligned = _gather_aligned(embeddings, embeddings.text, embeddings.image, gather)
        elif gather is not None:
            items = gather(items)
        with part("encode users"):
            states = self.encode_users(items, batch.tokens, batch.offsets, batch.longest)
        with part("softmax loss"):
            recommendation = self._recommendation(states, items, batch, loss.chunk)
        if aligned is None:
            return Losses(recommendation, recommendation.detach(), torch.zeros_like(recommendation))
        with part("alignment loss"):
            alignment = self._alignment(aligned, batch, loss.chunk)
        total = recommendation + loss.alignment * alignment
        return Losses(total, recommendation.detach(), alignment.detach())

    def _recommendation(self, states: Tensor, items: Tensor, batch: Batch, chunk: int) -> Tensor:
        """This rank's part of the next-item softmax loss (spec, section 5)."""
        # increasing and distinct: as many as there are items are all of them, without a copy
        everything = len(batch.candidates) == len(items)
        return (
            next_item_loss(
                states.index_select(0, batch.predict_at),
                items if everything else items.index_select(0, batch.candidates),
                batch.targets,
                temperature=self.config.temperature,
                bias=batch.bias,
                target_bias=batch.target_bias,
                chunk=chunk,
            )
            / batch.predictions
        )

    def _alignment(self, aligned: _Aligned, batch: Batch, chunk: int) -> Tensor:
        """This rank's part of the text-image alignment over the batch's next items (spec, section 5).

        Candidates are weighted by how often they are a next item. Those without an image contribute no term; their
        texts stay as negatives. With `missing` "mask" an item without text has a zero transformed text, which would be
        everybody's neutral negative: there it is left out both as image and as text; with "reference" it stays.

        Each rank takes the images that it embeds, so these stay where they are.
        """
        texts, text_present, image_present = (
            part.index_select(0, batch.candidates)
            for part in (aligned.text, aligned.text_present, aligned.image_present)
        )
        counts = batch.counts.float()
        if self.config.missing == "mask":
            counts = counts * text_present
        weights = counts * image_present
        start, stop = batch.own
        loss = alignment_loss(
            aligned.image.index_select(0, batch.candidates[start:stop] - batch.share[0]),
            texts,
            torch.arange(start, stop, device=texts.device),
            counts,
            weights[start:stop],
            temperature=self.config.temperature,
            chunk=chunk,
        )
        return loss / weights.sum().clamp_min(1.0)


class _Aligned(NamedTuple):
    """What the alignment loss needs: the images of this rank's items, of all items of the batch the rest."""

    image: Tensor  # (n, d)
    text: Tensor  # (N, d)
    text_present: Tensor  # (N,) floating 0 or 1
    image_present: Tensor  # (N,) floating 0 or 1


def _first(rows: int, embeddings: ItemEmbeddings) -> ItemEmbeddings:
    item, text, image, text_present, image_present = embeddings
    return ItemEmbeddings(
        item[:rows],
        None if text is None else text[:rows],
        None if image is None else image[:rows],
        text_present[:rows],
        image_present[:rows],
    )


def _gather_aligned(
    embeddings: ItemEmbeddings, text: Tensor, image: Tensor, gather: Gather | None
) -> tuple[Tensor, _Aligned]:
    """Items and what is aligned from all ranks, in one call: columns [item | text | presence]."""
    dtype, dim = embeddings.item.dtype, embeddings.item.shape[1]
    present = torch.stack([embeddings.text_present, embeddings.image_present], dim=1).to(dtype)
    if gather is None:
        return embeddings.item, _Aligned(image, text, present[:, 0], present[:, 1])
    item, text, present = gather(torch.cat([embeddings.item, text, present], dim=1)).split([dim, dim, 2], dim=1)
    return item, _Aligned(image, text, present[:, 0], present[:, 1])


def build_recommender(
    config: ModelConfig, dims: dict[str, int], catalogue_size: int | None = None, seed: int = 0
) -> Recommender:
    """A fresh recommender in float32 on the CPU. Its weights are a function of `seed` and each parameter's name alone:
    switches that add or remove a parameter leave the others as they were, and the global random state is not touched.

    Args:
        config: widths and switches.
        dims: width of each modality's frozen features; those that `config.modalities` lacks are ignored.
        catalogue_size: items with an embedding of their own; needed with `config.item_embeddings`.
        seed: of the initial weights.
    """
    model = blank_recommender(config, dims, catalogue_size).to_empty(device="cpu")
    _initialise(model, [name for name, _ in model.named_parameters()], seed)
    return model


def blank_recommender(config: ModelConfig, dims: dict[str, int], catalogue_size: int | None = None) -> Recommender:
    """A recommender whose parameters have shapes but no memory yet (torch's meta device): for those who have the weights."""
    with torch.device("meta"):
        return Recommender(config, dims, catalogue_size)


def parameter_groups(model: Recommender) -> dict[str, list[str]]:
    """Names of parameters by group, the rows of spec section 6; each parameter is in exactly one.

    `theta` is the item tower without `price_bias`, which the reference treats apart; `phi` is the transformer without
    its `input_norm`, likewise; `positions` and `item_embeddings` (ANT_t) are tables. A group may be empty.
    """
    groups: dict[str, list[str]] = {
        name: [] for name in ("theta", "price_bias", "positions", "phi", "input_norm", "item_embeddings")
    }
    for name, _ in model.named_parameters():
        groups[_group_of(name)].append(name)
    return groups


def centre(model: Recommender, means: dict[str, Tensor]) -> None:
    """Start the item tower at centred features (`initial_shift` "mean"): each modality's transform gives zero for its mean.

    Whitening shifts b_k become the mean; where there is a bias instead (price, no experts) it takes up the mean's image.

    Args:
        means: (d_m,) of each modality's present features.
    """
    with torch.no_grad():
        for modality in model.tower.modalities:
            transform, mean = model.tower.get_submodule(modality), means[modality].float()
            if isinstance(transform, Projection):
                transform.bias.copy_(-(transform.weight @ mean))
            elif isinstance(transform, Experts) and transform.whitening:
                transform.shift.copy_(mean.expand_as(transform.shift))
            elif isinstance(transform, Experts):
                transform.bias.copy_(-torch.einsum("m,mkd->kd", mean, transform.weight))


def redraw_experts(model: Recommender, seed: int) -> None:
    """Draw the weights W_k of all modalities afresh, in place, Xavier-normal as the reference's re-learning does. Shifts,
    biases and routing stay."""
    for name, parameter in model.named_parameters():
        if name.startswith("tower.") and name.endswith(".weight"):
            _draw(parameter, _expert_deviation(parameter, "xavier"), seed, name)


def _group_of(name: str) -> str:
    if name == "tower.price.bias":
        return "price_bias"
    if name.startswith("tower."):
        return "theta"
    if name.startswith("encoder.input_norm."):
        return "input_norm"
    if name.startswith("encoder."):
        return "phi"
    return name.split(".")[0]


def _initialise(model: Recommender, names: list[str], seed: int) -> None:
    """Linear and embedding weights N(0, 0.02); experts as configured; normalisation at identity; all else zero."""
    how: Literal["normal", "xavier"] = "xavier" if model.config.initialisation == "xavier" else "normal"
    for name in names:
        owner, _, kind = name.rpartition(".")
        module, parameter = model.get_submodule(owner), model.get_parameter(name)
        if kind != "weight":
            nn.init.zeros_(parameter)
        elif isinstance(module, Norm):
            nn.init.ones_(parameter)
        elif isinstance(module, Experts | Projection):
            _draw(parameter, _expert_deviation(parameter, how), seed, name)
        else:
            _draw(parameter, 0.02, seed, name)


def _expert_deviation(parameter: Tensor, how: Literal["normal", "xavier"]) -> float:
    if how == "normal":
        return 0.02
    return float((2.0 / (parameter.shape[0] + parameter.shape[-1])) ** 0.5)


def _draw(parameter: nn.Parameter, deviation: float, seed: int, name: str) -> None:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    with torch.no_grad():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)

"""The recommender: item tower, positions, sequence encoder and losses in one module.

Sections are those of docs/spec/ant.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from antdist.batch import Batch, ItemInputs
from antdist.config.schema import LossConfig, ModelConfig
from antdist.model.initialisation import initialise
from antdist.model.items.features import ItemEmbeddings, ItemTower
from antdist.model.losses import alignment_loss, recommendation_loss
from antdist.model.sequence.sasrec import SASRec, token_positions
from antdist.profiling import trace_part

Gather = Callable[[Tensor], Tensor]
PRETRAINING_LOSS = LossConfig()


class Losses(NamedTuple):
    """This rank's part of the losses, float32 scalars: the sum over ranks is the loss of the global batch."""

    total: Tensor
    recommendation: Tensor
    alignment: Tensor


class Recommender(nn.Module):
    """ANT: items by their modalities, users by their items, scores by cosine.

    Args:
        config: widths and switches.
        dims: width of each modality's frozen features.
        catalogue_size: items with a learned embedding each, for `config.item_embeddings` (ANT_t).
    """

    def __init__(self, config: ModelConfig, dims: dict[str, int], catalogue_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.dims = {m: dims[m] for m in config.modalities if m in dims}
        self.catalogue_size = catalogue_size
        self.tower = ItemTower(config, dims)
        self.positions = nn.Embedding(config.max_length, config.dim)
        self.encoder = SASRec(config)
        self.item_embeddings: nn.Embedding | None = None
        if config.item_embeddings:
            assert catalogue_size is not None, "item_embeddings needs the size of the catalogue"
            self.item_embeddings = nn.Embedding(catalogue_size, config.dim)

    def embed_items(self, inputs: ItemInputs) -> ItemEmbeddings:
        """Embed n items (section 3); ANT_t adds each item's learned embedding (section 6)."""
        embeddings: ItemEmbeddings = self.tower(inputs)
        if self.item_embeddings is None:
            return embeddings
        learned = self.item_embeddings(inputs.index)
        return embeddings._replace(item=embeddings.item + learned.to(embeddings.item.dtype))

    def encode_users(self, item_rows: Tensor, tokens: Tensor, offsets: Tensor, longest: int) -> Tensor:
        """Encode packed windows (section 4): states (T, d), the user's preference after each token.

        Args:
            item_rows: (N, d) item embeddings.
            tokens: (T,) int64, rows of `item_rows`.
            offsets: (W + 1,) int64, where each window starts; at most `config.max_length` tokens each.
            longest: tokens of the longest window.
        """
        assert longest <= self.config.max_length, f"a window of {longest} tokens, max_length {self.config.max_length}"
        positions = self.positions(token_positions(offsets, len(tokens)))
        states: Tensor = self.encoder(item_rows.index_select(0, tokens) + positions, offsets, longest)
        return states

    def forward(
        self, inputs: ItemInputs, batch: Batch, gather: Gather | None = None, loss: LossConfig = PRETRAINING_LOSS
    ) -> Losses:
        """Compute this rank's part of the loss: recommendation + weight * alignment (section 5).

        Args:
            inputs: of this rank's rows of `batch.item_ids`, `batch.share`; more may follow and play no part.
            batch: this rank's.
            gather: all-gather of rows over ranks, with gradient; None: this rank embeds them all.
            loss: `alignment` weighs the text-image alignment (0: not computed), `chunk` bounds memory.
        """
        with trace_part("embed items"):
            own = self.embed_items(inputs).first(batch.share[1] - batch.share[0])
        aligned = loss.alignment > 0 and own.text is not None and own.image is not None
        gathered = _gather_items(own, gather, aligned)
        with trace_part("encode users"):
            states = self.encode_users(gathered.item, batch.tokens, batch.offsets, batch.longest)
        temperature, chunk = self.config.temperature, loss.chunk
        with trace_part("softmax loss"):
            recommendation = recommendation_loss(states, gathered.item, batch, temperature=temperature, chunk=chunk)
        if own.image is None or gathered.text is None:
            return Losses(recommendation, recommendation.detach(), torch.zeros_like(recommendation))
        with trace_part("alignment loss"):
            alignment = alignment_loss(
                own.image,
                gathered.text,
                gathered.text_present,
                gathered.image_present,
                batch,
                temperature=temperature,
                mask_missing=self.config.missing == "mask",
                chunk=chunk,
            )
        return Losses(recommendation + loss.alignment * alignment, recommendation.detach(), alignment.detach())


def _gather_items(own: ItemEmbeddings, gather: Gather | None, aligned: bool) -> ItemEmbeddings:
    """Gather the item embeddings of all ranks and, if `aligned`, texts and presence, in one call.

    Presence becomes floating. Images are not gathered: each rank aligns its own.
    """
    if not aligned or own.text is None:
        return own._replace(item=own.item if gather is None else gather(own.item), text=None, image=None)
    dtype, dim = own.item.dtype, own.item.shape[1]
    item, text = own.item, own.text
    present = torch.stack([own.text_present, own.image_present], dim=1).to(dtype)
    if gather is not None:
        item, text, present = gather(torch.cat([item, text, present], dim=1)).split([dim, dim, 2], dim=1)
    return ItemEmbeddings(item, text, None, present[:, 0], present[:, 1])


def build_recommender(
    config: ModelConfig, dims: dict[str, int], catalogue_size: int | None = None, seed: int = 0
) -> Recommender:
    """Build a fresh recommender in float32 on the CPU, with the weights that `initialise` gives it.

    Args:
        config: widths and switches.
        dims: width of each modality's frozen features; those that `config.modalities` lacks are ignored.
        catalogue_size: items with a learned embedding each; needed with `config.item_embeddings`.
        seed: of the initial weights.
    """
    model = blank_recommender(config, dims, catalogue_size).to_empty(device="cpu")
    initialise(model, "xavier" if config.initialisation == "xavier" else "normal", seed)
    return model


def blank_recommender(config: ModelConfig, dims: dict[str, int], catalogue_size: int | None = None) -> Recommender:
    """Build a recommender on torch's meta device, without memory, for weights to be loaded into."""
    with torch.device("meta"):
        return Recommender(config, dims, catalogue_size)


def parameter_groups(model: Recommender) -> dict[str, list[str]]:
    """Name the parameters of each group (section 6); each parameter is in exactly one.

    `theta` is the item tower without `price_bias`, which the reference treats apart; `phi` is the transformer without
    its `input_norm`, likewise; `positions` and `item_embeddings` (ANT_t) are tables. A group may be empty.
    """
    groups: dict[str, list[str]] = {
        name: [] for name in ("theta", "price_bias", "positions", "phi", "input_norm", "item_embeddings")
    }
    for name, _ in model.named_parameters():
        groups[_group_of(name)].append(name)
    return groups


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

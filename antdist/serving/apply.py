"""Apply a model to one domain: `antdist evaluate` and `antdist recommend`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from antdist.data.domain import Domain, open_domain
from antdist.errors import UserError, redact
from antdist.evaluation.metrics import summary
from antdist.evaluation.ranking import embed_catalogue, rank_targets, test_queries, validation_queries
from antdist.features.catalogue import Catalogue
from antdist.io.logs import get_logger
from antdist.model.io import ModelCard, load_model
from antdist.model.recommender import Recommender
from antdist.report import Report
from antdist.serving.ids import unknown_id
from antdist.serving.top_n import recommend
from antdist.tracking.overview import registry_uri
from antdist.tracking.resolve import is_registered, resolve

if TYPE_CHECKING:
    from torch import Tensor

logger = get_logger(__name__)

PRINTED_HISTORY = 5


@dataclass(frozen=True)
class OpenModel:
    """A model, a domain, and the domain's items embedded by the model."""

    model: Recommender
    domain: Domain
    item_embeddings: Tensor  # (N, d)


@dataclass(frozen=True)
class FoundModel:
    """A loaded model, its card, and its source: `uri` is `models:/NAME/VERSION` if it is registered."""

    model: Recommender
    card: ModelCard
    folder: Path
    uri: str


@dataclass(frozen=True, repr=False)
class Evaluation(Report):
    """Metrics on the users of a split, with the number of users and of targets in their history."""

    model: str
    domain: str
    split: Literal["validation", "test"]
    metrics: dict[str, float]

    def lines(self) -> list[str]:
        return [
            f"{name:12} {value:.4f}" if "@" in name else f"{name:12} {int(value):,}"
            for name, value in self.metrics.items()
        ]

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "domain": redact(self.domain), "split": self.split, **self.metrics}


class ShownItem(NamedTuple):
    """An item for people."""

    item_id: str
    title: str
    score: float | None = None


@dataclass(frozen=True, repr=False)
class RecommendedItems(Report):
    """The history of a user, oldest first, and the items to show next, best first, with their scores."""

    table_key = "items"

    history: list[ShownItem]
    items: list[ShownItem]

    def lines(self) -> list[str]:
        past = [f"          {item.item_id}  {item.title}" for item in self.history[-PRINTED_HISTORY:]]
        best = [f"{rank:3}  {item.score:.3f}  {item.item_id}  {item.title}" for rank, item in enumerate(self.items, 1)]
        return ["history (latest last):", *past, "recommended:", *best]

    def to_json(self) -> dict[str, Any]:
        return {"items": [item._asdict() for item in self.items]}


class ItemName(NamedTuple):
    """An item's id in the source, and its text if it has any."""

    item_id: str
    text: str | None


def find_model(model: str, storage: Path, tracking_uri: str | None = None) -> FoundModel:
    """Resolve MODEL and load it.

    Raises:
        UserError: no such model, or no registry to resolve it in.
    """
    folder, uri = Path(model), model
    if not folder.is_dir():  # a folder needs no registry
        resolved = resolve(model, registry_uri(storage.resolve(), tracking_uri) if is_registered(model) else "")
        folder, uri = resolved.folder, resolved.uri
    recommender, card = load_model(folder)
    unknown = [modality for modality in card.dims if modality not in card.features]
    if unknown:
        logger.warning(
            f"note: {model} does not record which encoders made its {', '.join(unknown)} features: check them yourself"
        )
    return FoundModel(recommender, card, folder, uri)


def open_model(model: str, domain: str | Path, storage: Path, tracking_uri: str | None = None) -> OpenModel:
    """Load MODEL, open the domain (a folder, or a URI) and embed its catalogue.

    Raises:
        UserError: no such model or domain; as `embed_domain`.
    """
    opened = open_domain(domain)
    found = find_model(model, storage, tracking_uri)
    return OpenModel(found.model, opened, embed_domain(found.model, found.card, opened))


def embed_domain(model: Recommender, card: ModelCard, domain: Domain) -> Tensor:
    """Embed a domain's items, (N, d), from features of the encoders that the model was trained with.

    Raises:
        UserError: features missing or of other encoders, ANT_t on another catalogue.
    """
    return embed_catalogue(model, open_catalogue(card, domain))


def open_catalogue(card: ModelCard, domain: Domain) -> Catalogue:
    """Return the features of a domain's items, checked against what the model reads.

    Raises:
        UserError: as `embed_domain`.
    """
    trained_on = card.made.get("fingerprint")
    if card.config.item_embeddings and trained_on not in (None, domain.fingerprint):
        raise UserError(
            f"the model has an embedding for each item of {card.target} at fingerprint {trained_on[:12]}, none for "
            f"{domain.name} ({domain.fingerprint[:12]})",
            where=domain.folder,
            remedy="use the domain that it was adapted to, or a model without model.item_embeddings",
        )
    identities = {modality: source.identity for modality, source in card.features.items()}
    dims = {str(modality): width for modality, width in card.dims.items()}
    return Catalogue([domain], list(dims), dims=dims, identities=identities)


def evaluate_model(opened: OpenModel, split: Literal["validation", "test"]) -> dict[str, float]:
    """Rank a split's users in the full catalogue (docs/spec/ant.md, section 7) and summarise the metrics."""
    make_queries = test_queries if split == "test" else validation_queries
    queries = make_queries(opened.domain.sequences(), opened.model.config.max_length)
    return summary(rank_targets(opened.model, opened.item_embeddings, queries))


def recommend_items(opened: OpenModel, *, user: str | None, history: Sequence[str] | None, n: int) -> RecommendedItems:
    """Rank the catalogue for a user of the domain, or for a history of item ids.

    Raises:
        UserError: an unknown user or item; the message names the nearest known ids.
    """
    domain = opened.domain
    past = load_history(domain, user) if user is not None else parse_history(domain, history or ())
    best = recommend(opened.model, opened.item_embeddings, past, n)
    names = load_names(domain, past + [index for index, _ in best])
    shown = [ShownItem(name.item_id, " ".join((name.text or "(no text)").split())[:90]) for name in names]
    scored = [item._replace(score=score) for item, (_, score) in zip(shown[len(past) :], best, strict=True)]
    return RecommendedItems(shown[: len(past)], scored)


def load_history(domain: Domain, user_id: str) -> list[int]:
    """Load all interactions of a user, oldest first. Raises UserError for an unknown user."""
    ids = domain.user_ids()
    if user_id not in ids:
        raise unknown_id(domain.name, "user", user_id, ids, "--user")
    return domain.histories(np.array([ids.index(user_id)])).items.tolist()


def parse_history(domain: Domain, item_ids: Sequence[str]) -> list[int]:
    """Return the indices of items, oldest first. Raises UserError for an unknown item."""
    ids = domain.item_ids()
    index = {item_id: i for i, item_id in enumerate(ids)}
    for item_id in item_ids:
        if item_id not in index:
            raise unknown_id(domain.name, "item", item_id, ids, "--history")
    return [index[item_id] for item_id in item_ids]


def load_names(domain: Domain, indices: Sequence[int]) -> list[ItemName]:
    """Load the names of the items at `indices`, in that order, from the item shards that hold them only."""
    wanted, found = set(indices), dict[int, ItemName]()
    for shard in domain.manifest.item_shards:
        here = wanted & set(range(shard.first, shard.first + shard.items))
        if here:
            records = (record for record in domain.items(shard) if record.index in here)
            found |= {record.index: ItemName(record.item_id, record.text) for record in records}
    return [found[index] for index in indices]

"""A model put to use on one domain: `antdist evaluate` and `antdist recommend`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from antdist.errors import UserError, redact
from antdist.io.logs import get_logger
from antdist.report import Report

if TYPE_CHECKING:
    from torch import Tensor

    from antdist.data.domain import Domain
    from antdist.features.catalogue import Catalogue
    from antdist.model.io import ModelCard
    from antdist.model.recommender import Recommender

logger = get_logger(__name__)


@dataclass(frozen=True)
class OpenModel:
    """A model, the domain it is used on, and that domain's items embedded by it."""

    model: Recommender
    domain: Domain
    item_embeddings: Tensor  # (N, d)


@dataclass(frozen=True)
class FoundModel:
    """A loaded model, its card, and where it came from: `uri` is `models:/NAME/VERSION` where it is registered."""

    model: Recommender
    card: ModelCard
    folder: Path
    uri: str


@dataclass(frozen=True, repr=False)
class Evaluation(Report):
    """The metrics of a model on the users of a split, the number of users, and of targets that stood in their history."""

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


class Shown(NamedTuple):
    """An item for people."""

    item_id: str
    title: str
    score: float | None = None


def find_model(model: str, storage: Path, tracking_uri: str | None = None) -> FoundModel:
    """Find MODEL and load it.

    Raises:
        UserError: no such model, or no registry to look it up in.
    """
    from antdist.model.io import load_model
    from antdist.tracking.overview import registry_uri
    from antdist.tracking.registry import is_registered, resolve

    folder, uri = Path(model), model
    if not folder.is_dir():  # a folder needs no registry
        resolved = resolve(model, registry_uri(storage.resolve(), tracking_uri) if is_registered(model) else "")
        folder, uri = resolved.folder, resolved.uri
    recommender, card = load_model(folder)
    unknown = [modality for modality in card.dims if modality not in card.features]
    if unknown:
        logger.warning(f"note: {model} does not say which encoders made its {', '.join(unknown)} features: see to it")
    return FoundModel(recommender, card, folder, uri)


def open_model(model: str, domain: str | Path, storage: Path, tracking_uri: str | None = None) -> OpenModel:
    """Find MODEL and the domain (a folder, or a URI), check that its features are of the encoders that the model was trained
    with, embed the catalogue.

    Raises:
        UserError: no such model or domain, features missing or of other encoders, ANT_t on another catalogue.
    """
    from antdist.data.domain import open_domain

    opened = open_domain(domain)
    found = find_model(model, storage, tracking_uri)
    return OpenModel(found.model, opened, embed_domain(found.model, found.card, opened))


def embed_domain(model: Recommender, card: ModelCard, domain: Domain) -> Tensor:
    """Embeddings (N, d) of a domain's items, from features of the encoders that the model was trained with.

    Raises:
        UserError: features missing or of other encoders, ANT_t on another catalogue.
    """
    from antdist.evaluation.ranking import embed_catalogue

    return embed_catalogue(model, catalogue_for(card, domain))


def catalogue_for(card: ModelCard, domain: Domain) -> Catalogue:
    """The features of a domain's items, if they are what the model reads.

    Raises:
        UserError: as `embed_domain`.
    """
    from antdist.features.catalogue import Catalogue

    made_for = card.made.get("fingerprint")
    if card.config.item_embeddings and made_for not in (None, domain.fingerprint):
        raise UserError(
            f"the model has an embedding for each item of {card.target} as it was (fingerprint {made_for[:12]}), none for "
            f"{domain.name} ({domain.fingerprint[:12]})",
            where=domain.folder,
            remedy="use the domain that it was adapted to, or a model without model.item_embeddings",
        )
    identities = {modality: source.identity for modality, source in card.features.items()}
    dims = {str(modality): width for modality, width in card.dims.items()}
    return Catalogue([domain], list(dims), dims=dims, identities=identities)


def evaluate_model(opened: OpenModel, split: Literal["validation", "test"]) -> dict[str, float]:
    """Full ranking of a split's users (spec, section 7): metrics, number of users, and of targets seen before."""
    from antdist.evaluation import ranking
    from antdist.evaluation.metrics import summary

    ask = ranking.test_queries if split == "test" else ranking.validation_queries
    queries = ask(opened.domain.sequences(), opened.model.config.max_length)
    return summary(ranking.rank_targets(opened.model, opened.item_embeddings, queries))


def recommend_items(
    opened: OpenModel, *, user: str | None, history: str | None, n: int
) -> tuple[list[Shown], list[Shown]]:
    """The history and the top n for a user of the domain, or for item ids with commas.

    Raises:
        UserError: an unknown user or item, with the nearest known ones.
    """
    from antdist.serving.recommend import describe, history_from, history_of, recommend

    domain = opened.domain
    if user is not None:
        past = history_of(domain, user)
    else:
        past = history_from(domain, [item.strip() for item in (history or "").split(",") if item.strip()])
    best = recommend(opened.model, opened.item_embeddings, past, n)
    names = describe(domain, past + [index for index, _ in best])
    titles = [Shown(name.item_id, " ".join((name.text or "(no text)").split())[:90]) for name in names]
    scored = [shown._replace(score=score) for shown, (_, score) in zip(titles[len(past) :], best, strict=True)]
    return titles[: len(past)], scored

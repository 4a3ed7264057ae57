"""A model in memory with its items: recommend, embed, save; without Ray or the training stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from antdist.errors import UserError
from antdist.report import Report
from antdist.serving.ids import unknown_id

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from antdist.model.io import ModelCard
    from antdist.model.recommender import Recommender

SHOWN_HISTORIES = 5


@dataclass(frozen=True, repr=False)
class Recommendations(Report):
    """The items to show next, best first: `items[i]` and `scores[i]` (cosines) for the i-th history."""

    items: list[list[str]]
    scores: list[list[float]]

    def lines(self) -> list[str]:
        shown = [
            f"{row}: " + ", ".join(f"{item} {score:.3f}" for item, score in zip(items, scores, strict=True))
            for row, (items, scores) in enumerate(zip(self.items, self.scores, strict=True))
        ]
        more = len(shown) - SHOWN_HISTORIES
        return shown[:SHOWN_HISTORIES] + ([f"... and {more} more"] if more > 0 else [])

    def to_json(self) -> dict[str, Any]:
        return {"items": self.items, "scores": self.scores}

    def records(self) -> list[dict[str, Any]]:
        """Return a row an item: the history's number, the rank from 1, the item's id and its score."""
        return [
            {"history": row, "rank": rank, "item_id": item, "score": score}
            for row, (items, scores) in enumerate(zip(self.items, self.scores, strict=True))
            for rank, (item, score) in enumerate(zip(items, scores, strict=True), 1)
        ]


@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A model and the catalogue that it ranks.

    Attributes:
        item_ids: of the catalogue, in the order of the rows of `item_embeddings`.
        item_embeddings: (N, d) float32, as the model gives them, not normalised.
        fingerprint: of the prepared domain that the catalogue was embedded from.
    """

    model: Recommender
    card: ModelCard
    uri: str
    item_ids: Sequence[str]
    item_embeddings: Tensor
    fingerprint: str | None

    def recommend(
        self, histories: Sequence[Sequence[str]], n: int = 10, *, exclude_history: bool = True
    ) -> Recommendations:
        """Rank the catalogue for each history of item ids, oldest first.

        Every item is ranked, including items that no training saw. A row has fewer than `n` items if the catalogue has no more.

        Args:
            n: items for each history, at least 1.
            exclude_history: exclude the items of the history.

        Raises:
            UserError: an unknown item, an empty history, an `n` below 1.
        """
        from antdist.serving.top_n import recommend_many

        if n < 1:
            raise UserError(f"n is {n}", where="recommend", remedy="ask for at least one item")
        indexed = self._index_histories(histories)
        best = recommend_many(
            self.model, self.item_embeddings, indexed, [n] * len(indexed), exclude_history=exclude_history
        )
        return Recommendations(
            [[self.item_ids[index] for index, _ in row] for row in best], [[score for _, score in row] for row in best]
        )

    def embed_items(self, item_ids: Sequence[str] | None = None) -> NDArray[np.float32]:
        """Return the embeddings (len(item_ids), d) of these items; by default of the whole catalogue.

        Raises:
            UserError: an unknown item.
        """
        embeddings: NDArray[np.float32] = self.item_embeddings.float().cpu().numpy()
        return embeddings if item_ids is None else embeddings[[self._index(item) for item in item_ids]]

    def embed_users(self, histories: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        """Return the preference (len(histories), d) of users with these histories of item ids, oldest first.

        An item's score for a user is the cosine between the two embeddings. The model reads the last
        `card.config.max_length` items of a history.

        Raises:
            UserError: an unknown item, an empty history.
        """
        from antdist.serving.top_n import encode_users

        vectors: NDArray[np.float32] = encode_users(
            self.model, self.item_embeddings, self._index_histories(histories)
        ).numpy()
        return vectors

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write weights, card and catalogue to a folder that `from_pretrained`, `load` and MLflow load.

        Raises:
            UserError: the folder exists and is not empty.
        """
        from antdist.model.io import save_model
        from antdist.serving.pyfunc import write_servable

        place = Path(folder)
        if place.is_dir() and any(place.iterdir()):
            raise UserError("the folder is not empty", where=place, remedy="name a new folder, or empty this one")
        save_model(place, self.model, self.card)
        write_servable(place, self.item_embeddings, self.item_ids, self.fingerprint)
        return place

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LoadedModel:
        """Load the folder of a registered model, or one that `save_pretrained` wrote.

        Raises:
            UserError: not such a folder; a file that is missing or damaged; a model without a catalogue.
        """
        from antdist.model.io import load_model
        from antdist.serving.pyfunc import load_catalogue

        item_ids, embeddings, fingerprint = load_catalogue(Path(folder))  # checks all files
        return cls(*load_model(folder), str(folder), item_ids, embeddings, fingerprint)

    def __repr__(self) -> str:
        target = f" for {self.card.target}" if self.card.target else ""
        dims = ", ".join(f"{modality} {width}" for modality, width in self.card.dims.items())
        return f"LoadedModel({self.uri}: {self.card.kind}{target}, {dims}, d {self.card.config.dim}, {len(self.item_ids):,} items)"

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {item_id: position for position, item_id in enumerate(self.item_ids)}

    def _index(self, item_id: str) -> int:
        found = self._positions.get(item_id)
        if found is not None:
            return found
        raise unknown_id("the catalogue", "item", item_id, self.item_ids, self.uri)

    def _index_histories(self, histories: Sequence[Sequence[str]]) -> list[list[int]]:
        for row, history in enumerate(histories):
            if isinstance(history, str):
                raise UserError(
                    f"history {row} is one text, {history!r}", where="histories", remedy="give lists of item ids"
                )
            if not len(history):
                raise UserError(f"history {row} is empty", where="histories", remedy="name at least one item")
        return [[self._index(item) for item in history] for history in histories]

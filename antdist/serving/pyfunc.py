"""A re-learned model as MLflow loads and serves it: histories in, items and scores out, without the training stack.

Beside the weights and the card lie, without a pickle among them,
  MLmodel                says to MLflow that this module loads the folder, and what goes in and out; with digests of the rest
  catalogue.safetensors  `embeddings` (N, d) of the target's items, made by the model
  catalogue.json         their ids in the source
A pre-trained model has no target, so no catalogue: its MLmodel leads to a UserError that says so.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from antdist.errors import UserError
from antdist.io.files import file_sha256
from antdist.model.io import CARD, WEIGHTS, load_model, read_card

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from antdist.data.domain import Domain
    from antdist.model.recommender import Recommender

MLMODEL, EMBEDDINGS, ITEM_IDS = "MLmodel", "catalogue.safetensors", "catalogue.json"
TOP = 10
_STRINGS, _NUMBERS = ({"type": "array", "items": {"type": kind}} for kind in ("string", "double"))
SIGNATURE = {
    "inputs": [{**_STRINGS, "name": "history", "required": True}, {"type": "long", "name": "n", "required": False}],
    "outputs": [{**_STRINGS, "name": "items", "required": True}, {**_NUMBERS, "name": "scores", "required": True}],
}


def make_servable(folder: Path, domain: Domain | None) -> None:
    """Add to a model's folder what MLflow needs to load it: with `domain`, its target, the catalogue, embedded by the model.
    A folder that has all that for these weights and this data stays as it is, so that its digest does.

    Raises:
        UserError: as `load_model`; features of the domain that are missing or of other encoders.
    """
    made_for = None if domain is None else domain.fingerprint
    if _is_made(folder, made_for):
        return
    if domain is None:
        (folder / MLMODEL).unlink(missing_ok=True)
        _write_mlmodel(folder, [WEIGHTS, CARD], None)
        return
    from antdist.serving.use import embed_domain

    model, card = load_model(folder)
    write_servable(folder, embed_domain(model, card, domain), domain.item_ids(), domain.fingerprint)


def write_servable(folder: Path, embeddings: Tensor, item_ids: Sequence[str], fingerprint: str | None) -> None:
    """Add a catalogue to a model's folder, and what MLflow needs to load it. The MLmodel comes last.

    Args:
        embeddings: (N, d), as the model gives them.
        fingerprint: of the prepared domain that they were made from.
    """
    from safetensors.torch import save_file

    (folder / MLMODEL).unlink(missing_ok=True)
    save_file({"embeddings": embeddings.float().contiguous()}, folder / EMBEDDINGS, metadata={"format": "pt"})
    (folder / ITEM_IDS).write_text(json.dumps(list(item_ids), ensure_ascii=False), encoding="utf-8")
    _write_mlmodel(folder, [WEIGHTS, CARD, EMBEDDINGS, ITEM_IDS], fingerprint)


def _write_mlmodel(folder: Path, names: Sequence[str], fingerprint: str | None) -> None:
    described = {
        "flavors": {
            "python_function": {"loader_module": __name__, "python_version": platform.python_version()},
        },
        "signature": {key: json.dumps(columns) for key, columns in SIGNATURE.items()},
        "metadata": {"fingerprint": fingerprint, "sha256": {name: file_sha256(folder / name) for name in names}},
    }
    partial = folder / f"{MLMODEL}.tmp"
    partial.write_text(yaml.safe_dump(described, sort_keys=False, width=120), encoding="utf-8")
    partial.replace(folder / MLMODEL)


def _is_made(folder: Path, made_for: str | None) -> bool:
    if not (folder / MLMODEL).is_file():
        return False
    known = _metadata(folder)
    return known["fingerprint"] == made_for and not _differing(folder, known["sha256"])


def _metadata(folder: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = yaml.safe_load((folder / MLMODEL).read_text(encoding="utf-8"))["metadata"]
    return metadata


def _differing(folder: Path, digests: Mapping[str, str]) -> list[str]:
    files = {name: folder / name for name in digests}
    return [n for n, path in files.items() if not path.is_file() or file_sha256(path) != digests[n]]


# -- what MLflow calls -----------------------------------------------------------------------------------------------


def _load_pyfunc(path: str) -> Servable:
    """Load the model folder that MLflow has fetched. Raises UserError as `load_catalogue`."""
    item_ids, embeddings, _ = load_catalogue(Path(path))  # it checks all files
    return Servable(load_model(path)[0], item_ids, embeddings)


def load_catalogue(folder: Path) -> tuple[list[str], Tensor, str | None]:
    """Load the ids and embeddings (N, d) of a registered model's items, and the fingerprint of the data that they are from.

    Raises:
        UserError: a pre-trained model; a file that is missing or not the one that was registered.
    """
    from safetensors.torch import load_file

    if not (folder / EMBEDDINGS).is_file() and read_card(folder).target is None:
        raise UserError(
            "a pre-trained model has no catalogue, so it cannot be served",
            where=folder,
            remedy="re-learn it for a target (`antdist relearn ... from=MODEL`) and load that model, "
            "or rank a prepared domain with it (`antdist recommend MODEL DATA/NAME`)",
        )
    metadata = _metadata(folder)
    if differing := _differing(folder, metadata["sha256"]):
        raise UserError(
            f"{differing[0]} is not the file that was registered",
            where=folder,
            remedy="download the model again; where that does not help, restore its artifacts, or train again",
        )
    item_ids = json.loads((folder / ITEM_IDS).read_text(encoding="utf-8"))
    return item_ids, load_file(folder / EMBEDDINGS)["embeddings"], metadata["fingerprint"]


@dataclass(frozen=True)
class Servable:
    """A model with its target's catalogue."""

    model: Recommender
    item_ids: Sequence[str]
    item_embeddings: Tensor  # (N, d)

    @cached_property
    def index(self) -> dict[str, int]:
        return {item_id: i for i, item_id in enumerate(self.item_ids)}

    def predict(self, asked: pd.DataFrame) -> pd.DataFrame:
        """The items to show next for each history, best first; those of the history are left out.

        Args:
            asked: `history`, lists of item ids, oldest first; if wanted `n`, how many items for each (default: 10). MLflow
                checks both columns against the signature before it calls this.

        Returns:
            `items`, lists of ids, and `scores`, lists of cosines, in the rows of `asked`; fewer than n where the catalogue
            has no more.

        Raises:
            MlflowException: an unknown item, an empty history, an n below one; served, an answer with status 400.
        """
        import pandas as pd

        from antdist.serving.recommend import recommend_many

        wanted = asked["n"].tolist() if "n" in asked else [TOP] * len(asked)
        histories = [self._history(row, history) for row, history in enumerate(asked["history"])]
        for row, number in enumerate(wanted):
            if number < 1:
                _refuse(row, f"n is {number}, should be at least 1")
        best = recommend_many(self.model, self.item_embeddings, histories, wanted)
        return pd.DataFrame(
            {
                "items": [[self.item_ids[index] for index, _ in items] for items in best],
                "scores": [[score for _, score in items] for items in best],
            },
            index=asked.index,
        )

    def _history(self, row: int, history: Sequence[str]) -> list[int]:
        if len(history) == 0:
            _refuse(row, "the history is empty")
        unknown = [item for item in history if item not in self.index]
        if unknown:
            _refuse(row, f"the catalogue has no item {unknown[0]!r}; ids look like {', '.join(self.item_ids[:3])}")
        return [self.index[item] for item in history]


def _refuse(row: int, what: str) -> NoReturn:
    from mlflow.exceptions import MlflowException

    raise MlflowException.invalid_parameter_value(f"row {row}: {what}")

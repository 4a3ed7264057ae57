"""An adapted model in MLflow: histories in, items and scores out, without the training stack.

Besides the weights and the card, a servable folder holds (and no pickle)
  MLmodel                names this module as the loader, the signature, and digests of the other files
  catalogue.safetensors  `embeddings` (N, d) of the target's items, computed by the model
  catalogue.json         the items' ids in the source
A pre-trained model has no target and so no catalogue: loading it raises a UserError. Registered models name this module
and `_load_pyfunc`; both must stay where they are.
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
from antdist.io.files import file_sha256, write_atomically
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
    """Add to a model's folder the files that MLflow needs to load it.

    A folder that already has them for these weights and this data is not touched, so its digest does not change.

    Args:
        domain: the target, whose catalogue the model embeds; None for a pre-trained model.

    Raises:
        UserError: as `load_model`; features of the domain that are missing or of other encoders.
    """
    fingerprint = None if domain is None else domain.fingerprint
    if _is_servable(folder, fingerprint):
        return
    if domain is None:
        (folder / MLMODEL).unlink(missing_ok=True)
        _write_mlmodel(folder, [WEIGHTS, CARD], None)
        return
    from antdist.serving.apply import embed_domain

    model, card = load_model(folder)
    write_servable(folder, embed_domain(model, card, domain), domain.item_ids(), domain.fingerprint)


def write_servable(folder: Path, embeddings: Tensor, item_ids: Sequence[str], fingerprint: str | None) -> None:
    """Add a catalogue and the files of MLflow to a model's folder; MLmodel is written last.

    Args:
        embeddings: (N, d), as the model computes them.
        fingerprint: of the prepared domain that they were computed from.
    """
    from safetensors.torch import save_file

    (folder / MLMODEL).unlink(missing_ok=True)
    save_file({"embeddings": embeddings.float().contiguous()}, folder / EMBEDDINGS, metadata={"format": "pt"})
    (folder / ITEM_IDS).write_text(json.dumps(list(item_ids), ensure_ascii=False), encoding="utf-8")
    _write_mlmodel(folder, [WEIGHTS, CARD, EMBEDDINGS, ITEM_IDS], fingerprint)


def _write_mlmodel(folder: Path, names: Sequence[str], fingerprint: str | None) -> None:
    mlmodel = {
        "flavors": {
            "python_function": {"loader_module": __name__, "python_version": platform.python_version()},
        },
        "signature": {key: json.dumps(columns) for key, columns in SIGNATURE.items()},
        "metadata": {"fingerprint": fingerprint, "sha256": {name: file_sha256(folder / name) for name in names}},
    }
    with write_atomically(folder / MLMODEL, sync="none") as partial:
        partial.write_text(yaml.safe_dump(mlmodel, sort_keys=False, width=120), encoding="utf-8")


def _is_servable(folder: Path, fingerprint: str | None) -> bool:
    if not (folder / MLMODEL).is_file():
        return False
    known = _read_metadata(folder)
    return known["fingerprint"] == fingerprint and not _changed_files(folder, known["sha256"])


def _read_metadata(folder: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = yaml.safe_load((folder / MLMODEL).read_text(encoding="utf-8"))["metadata"]
    return metadata


def _changed_files(folder: Path, digests: Mapping[str, str]) -> list[str]:
    files = {name: folder / name for name in digests}
    return [n for n, path in files.items() if not path.is_file() or file_sha256(path) != digests[n]]


def load_catalogue(folder: Path) -> tuple[list[str], Tensor, str | None]:
    """Load the item ids, their embeddings (N, d) and the fingerprint of their data from a model's folder.

    Raises:
        UserError: a pre-trained model; a file that is missing or differs from the registered one.
    """
    from safetensors.torch import load_file

    if not (folder / EMBEDDINGS).is_file() and read_card(folder).target is None:
        raise UserError(
            "a pre-trained model has no catalogue, so it cannot be served",
            where=folder,
            remedy="re-learn it for a target (`antdist relearn ... from=MODEL`) and load that model, "
            "or rank a prepared domain with it (`antdist recommend MODEL DATA/NAME`)",
        )
    metadata = _read_metadata(folder)
    if changed := _changed_files(folder, metadata["sha256"]):
        raise UserError(
            f"{changed[0]} is not the file that was registered",
            where=folder,
            remedy="download the model again; if that does not help, restore its artifacts, or train again",
        )
    item_ids = json.loads((folder / ITEM_IDS).read_text(encoding="utf-8"))
    return item_ids, load_file(folder / EMBEDDINGS)["embeddings"], metadata["fingerprint"]


# -- called by MLflow ------------------------------------------------------------------------------------------------


def _load_pyfunc(path: str) -> Servable:
    """Load the model in the folder that MLflow has fetched. Raises UserError as `load_catalogue`."""
    item_ids, embeddings, _ = load_catalogue(Path(path))  # checks all files
    return Servable(load_model(path)[0], item_ids, embeddings)


@dataclass(frozen=True)
class Servable:
    """A model with its target's catalogue, for MLflow to call."""

    model: Recommender
    item_ids: Sequence[str]
    item_embeddings: Tensor  # (N, d)

    @cached_property
    def index(self) -> dict[str, int]:
        return {item_id: i for i, item_id in enumerate(self.item_ids)}

    def predict(self, requests: pd.DataFrame) -> pd.DataFrame:
        """Recommend the next items for each history, best first, without those of the history.

        Args:
            requests: column `history`, lists of item ids, oldest first; optional column `n`, the number of items for
                each (default: 10). MLflow checks both columns against the signature before it calls this.

        Returns:
            Columns `items`, lists of ids, and `scores`, lists of cosines, with the index of `requests`; fewer than n if
            the catalogue has no more.

        Raises:
            MlflowException: an unknown item, an empty history, an n below one; a server answers with status 400.
        """
        import pandas as pd

        from antdist.serving.top_n import recommend_many

        counts = requests["n"].tolist() if "n" in requests else [TOP] * len(requests)
        histories = [self._parse_history(row, history) for row, history in enumerate(requests["history"])]
        for row, n in enumerate(counts):
            if n < 1:
                _raise_invalid(row, f"n is {n}, must be at least 1")
        best = recommend_many(self.model, self.item_embeddings, histories, counts)
        return pd.DataFrame(
            {
                "items": [[self.item_ids[index] for index, _ in items] for items in best],
                "scores": [[score for _, score in items] for items in best],
            },
            index=requests.index,
        )

    def _parse_history(self, row: int, history: Sequence[str]) -> list[int]:
        if len(history) == 0:
            _raise_invalid(row, "the history is empty")
        unknown = [item for item in history if item not in self.index]
        if unknown:
            _raise_invalid(
                row, f"the catalogue has no item {unknown[0]!r}; ids look like {', '.join(self.item_ids[:3])}"
            )
        return [self.index[item] for item in history]


def _raise_invalid(row: int, what: str) -> NoReturn:
    from mlflow.exceptions import MlflowException

    raise MlflowException.invalid_parameter_value(f"row {row}: {what}")

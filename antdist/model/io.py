"""A model on disk: `weights.safetensors` (float32) and `model.json`, the card.

It loads with torch and safetensors alone, without the training stack.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from antdist.config.schema import ModelConfig, Strategy
from antdist.errors import UserError
from antdist.io.files import write_atomically

if TYPE_CHECKING:
    from antdist.model.recommender import Recommender

WEIGHTS, CARD = "weights.safetensors", "model.json"


class FeatureSource(BaseModel):
    """The frozen encoder whose features the model reads; features of another identity do not fit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: str
    encoder: dict[str, Any] = Field(default_factory=dict)


class ModelCard(BaseModel):
    """Describes a model: enough to build it, to refuse features that do not fit, and to trace its lineage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[2] = 2  # 1 had the experts' weights in another order
    kind: Literal["pretrained", "adapted", "imported"]
    config: ModelConfig
    dims: dict[str, int]
    catalogue_size: int | None = None
    features: dict[str, FeatureSource] = Field(default_factory=dict)
    domains: list[str] = Field(default_factory=list)  # of pre-training, in the order of their item offsets
    target: str | None = None
    strategy: Strategy | None = None
    seed: int | None = None
    made: dict[str, Any] = Field(default_factory=dict)  # lineage: fingerprints, versions, epoch, metrics ...


def save_model(folder: str | Path, model: Recommender, card: ModelCard) -> None:
    """Write the model; the card comes last, so a folder with a card is complete."""
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    weights = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in model.named_parameters()}
    with write_atomically(folder / WEIGHTS, sync="folder") as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    with write_atomically(folder / CARD, sync="folder") as partial:
        partial.write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_model(folder: str | Path) -> tuple[Recommender, ModelCard]:
    """Load the model (float32, on the CPU, in evaluation mode) and its card.

    Raises:
        UserError: no model in the folder, a file is missing or damaged, or the weights do not fit the card.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from antdist.model.recommender import blank_recommender

    folder = Path(folder)
    card = read_card(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(
            "the model's weights are missing", where=path, remedy="copy or download the complete folder again"
        )
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"the model's weights cannot be read ({error})", where=path, remedy="copy or download the folder again"
        ) from error
    model = blank_recommender(card.config, card.dims, card.catalogue_size)
    expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = [
        f"{name} is {found.get(name, 'absent')}, should be {expected.get(name, 'absent')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"the weights do not fit {CARD}: {wrong[0]}{more}",
            where=path,
            remedy=f"{WEIGHTS} and {CARD} must come from the same model",
        )
    model.load_state_dict(weights, assign=True)
    return model.eval(), card


def read_card(folder: str | Path) -> ModelCard:
    """Read the card, without torch.

    Raises:
        UserError: no card, or not one that this version reads.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        raise UserError(f"not a model: it has no {CARD}", where=folder, remedy="give the folder of a model")
    try:
        return ModelCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(
            f"not a model card that this version reads: {key}: {first['msg']}",
            where=path,
            remedy="check that the file is complete and was written by this version of antdist",
        ) from error

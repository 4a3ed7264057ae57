"""What a run starts from (`from`, `continue`, `resume`): resolved and copied to the run's folder.

The copy lets all nodes read it, and lets a later start go on while the registry is unreachable.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from antdist.config.schema import PretrainConfig, RelearnConfig
from antdist.errors import UserError
from antdist.io.files import write_folder_atomically
from antdist.model.io import ModelCard, load_model
from antdist.model.recommender import Recommender
from antdist.runs.folder import RunFolder
from antdist.runs.records import Source
from antdist.runs.trials import strategies_of
from antdist.tracking.registry import folder_digest
from antdist.tracking.resolve import ResolvedModel, is_registered, resolve, resolve_training_state
from antdist.tracking.store import StoreUnavailable, check_reachable
from antdist.training.adaptation import needs_parent, treatments
from antdist.training.checkpoints.local import Checkpoint, load_latest, steps_in


def resolve_source(
    model: str,
    store: str,
    folder: RunFolder,
    find: Callable[[str, str], ResolvedModel],
    *,
    offline_ok: bool,
    note: Callable[[str], None],
) -> ResolvedModel:
    """Resolve MODEL with `find(model, store)` or, `offline_ok` and the store unreachable, in `folder`.

    Args:
        note: takes a sentence that says so.

    Raises:
        UserError: what `find` raises; the store is unreachable and the folder has no copy, or a damaged one.
    """
    if not (offline_ok and is_registered(model)):
        return find(model, store)
    try:
        check_reachable(store)  # takes some seconds where the registry's client takes many
        return find(model, store)
    except StoreUnavailable as error:
        found, resolved = _recall(model, folder, error)
    note(f"{model} is what it was on {resolved}: {found.uri}, in {found.folder}; the tracking store is unreachable")
    return found


def fetch_source(model: str, found: ResolvedModel, folder: RunFolder) -> Path:
    """Copy a model or training state to the run's folder and record what MODEL was; return the copy."""
    digest = folder_digest(found.folder)
    place = folder.source(digest)
    if found.folder == place:  # recalled
        return place
    if place.is_dir() and folder_digest(place) != digest:
        shutil.rmtree(place)
    if not place.is_dir():
        with write_folder_atomically(place, folder.partial_source) as partial:
            shutil.copytree(found.folder, partial, dirs_exist_ok=True)
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    folder.write_source(model, Source(uri=found.uri, run_id=found.run_id, digest=digest, resolved=now))
    return place


def _recall(model: str, folder: RunFolder, error: StoreUnavailable) -> tuple[ResolvedModel, str]:
    """Find the copy of what MODEL was when this run resolved it, and when that was. Raises UserError."""
    source = folder.read_sources().get(model)
    if source is None:
        raise UserError(
            f"this run never resolved it, and the tracking store is unreachable ({error.what})",
            where=model,
            remedy="start the run once while the store is reachable, or name the model's folder instead",
        ) from None
    place = folder.source(source.digest)
    if not place.is_dir() or folder_digest(place) != source.digest:
        raise UserError(
            f"the copy of {model} differs from what was fetched on {source.resolved} (another digest)",
            where=place,
            remedy="start the run again once the tracking store is reachable: fetching it again",
        ) from None
    return ResolvedModel(place, source.uri, source.run_id), source.resolved


@dataclass(frozen=True)
class Parent:
    """The pre-trained model that is adapted."""

    model: Recommender
    card: ModelCard
    uri: str


def check_parent_named(config: RelearnConfig) -> None:
    """Raise UserError if a strategy starts from a parent and none is named."""
    needing = [strategy for strategy in strategies_of(config) if needs_parent(strategy)]
    if config.parent is None and needing:
        raise UserError(
            f"strategy {needing[0]} starts from a pre-trained model",
            where="from",
            remedy="give one, e.g. from=models:/NAME/latest",
        )


def resolve_parent(
    config: RelearnConfig, store: str, folder: RunFolder, note: Callable[[str], None]
) -> ResolvedModel | None:
    """Resolve the model that `from` names; None without one. Raises UserError, also if one is needed."""
    check_parent_named(config)
    if config.parent is None:
        return None
    return resolve_source(config.parent, store, folder, resolve, offline_ok=config.tracking.offline_ok, note=note)


def load_parent(found: ResolvedModel | None) -> Parent | None:
    """Load the pre-trained model into memory."""
    if found is None:
        return None
    model, card = load_model(found.folder)
    return Parent(model, card, found.uri)


def parent_notes(config: RelearnConfig, parent: Parent) -> list[str]:
    """What a user should know about adapting this parent to this target."""
    notes = []
    if config.target in parent.card.domains:
        notes.append(f"the target {config.target} is one of the parent's auxiliary domains: its gain is not transfer")
    if any(treatments(strategy)["theta"].inherited for strategy in strategies_of(config)):
        unknown = [modality for modality in parent.card.dims if modality not in parent.card.features]
        if unknown:
            notes.append(
                f"{parent.uri} does not name the encoders of its {', '.join(unknown)} features: "
                "check that the target's are the same"
            )
    return notes


def resolve_state(
    config: PretrainConfig, store: str, folder: RunFolder, note: Callable[[str], None]
) -> ResolvedModel | None:
    """Resolve the training state that `resume` or `continue` names; None if the run has checkpoints.

    Raises:
        UserError: as `resolve_source`; the state has no complete checkpoint.
    """
    model = config.resume or config.parent
    if model is None:
        return None
    if steps_in(folder.checkpoints):
        note(f"{config.name} has checkpoints of its own in {folder}, so {model} is not read")
        return None
    state = resolve_source(
        model, store, folder, resolve_training_state, offline_ok=config.tracking.offline_ok, note=note
    )
    last_checkpoint(state.folder)
    return state


def last_checkpoint(state: Path) -> Checkpoint:
    """Load the checkpoint in a training state's folder. Raises UserError if there is no complete one."""
    found = load_latest(RunFolder(state).checkpoints)
    if found is None:
        raise UserError("its training state has no complete checkpoint", where=state, remedy="name another version")
    return found

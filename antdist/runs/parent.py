"""What a run starts from, its `from` or `resume`: looked up in the registry, copied to the run's folder, remembered there.

STORAGE/NAME/
  from-*/      the files, by their digest, for all nodes to read
  from.json    which MODEL they were when it was looked up: enough to go on from while the registry is away
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from antdist.config.schema import PretrainConfig, RelearnConfig
from antdist.errors import UserError
from antdist.io.files import read_json, write_json
from antdist.runs.folder import pretrain_folder
from antdist.runs.trials import adaptation_folder, strategies_of
from antdist.tracking.registry import ResolvedModel, folder_digest, is_registered, resolve, resolve_training_state
from antdist.tracking.store import StoreAway, check_reachable

if TYPE_CHECKING:
    from antdist.model.io import ModelCard
    from antdist.model.recommender import Recommender
    from antdist.training.checkpoints.local import Checkpoint


REMEMBERED = "from.json"


def look_up(
    model: str,
    uri: str,
    folder: Path,
    find: Callable[[str, str], ResolvedModel],
    *,
    offline_ok: bool,
    tell: Callable[[str], None],
) -> ResolvedModel:
    """MODEL as `find(model, uri)` knows it; where the store is away and `offline_ok`, as this run's `folder` remembers it,
    which `tell` is told.

    Raises:
        UserError: whatever `find` raises; a store that is away, and nothing or something damaged in the folder.
    """
    if not (offline_ok and is_registered(model)):
        return find(model, uri)
    try:
        check_reachable(uri)  # it waits for some seconds, the registry's client for many
        return find(model, uri)
    except StoreAway as away:
        found, when = _recall(model, folder, away)
    tell(f"{model} is what it was on {when}: {found.uri}, in {found.folder}; the tracking store is away")
    return found


def bring(model: str, found: ResolvedModel, folder: Path) -> Path:
    """A copy of a model's or a state's files in the run's folder, which all nodes see; workers ask no registry, which may be
    away when they are started again. What MODEL was is remembered beside it."""
    digest = folder_digest(found.folder)
    place = folder / f"from-{digest[:12]}"
    if found.folder == place:  # recalled
        return place
    if place.is_dir() and folder_digest(place) != digest:
        shutil.rmtree(place)
    if not place.is_dir():
        partial = folder / "from.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(found.folder, partial)
        partial.rename(place)
    when = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    known = read_json(folder / REMEMBERED) or {}
    known[model] = {"uri": found.uri, "run_id": found.run_id, "digest": digest, "looked_up": when}
    write_json(folder / REMEMBERED, known)
    return place


def _recall(model: str, folder: Path, away: StoreAway) -> tuple[ResolvedModel, str]:
    """What MODEL was when this run looked it up, checked, and when that was."""
    known = (read_json(folder / REMEMBERED) or {}).get(model)
    if known is None:
        raise UserError(
            f"it was never looked up by this run, and the tracking store is away ({away.what})",
            where=model,
            remedy="start the run once while the store is there, or name the model's folder instead",
        ) from None
    place = folder / f"from-{known['digest'][:12]}"
    if not place.is_dir() or folder_digest(place) != known["digest"]:
        raise UserError(
            f"the copy of {model} is not what was brought here on {known['looked_up']} (the digest differs)",
            where=place,
            remedy="start the run again once the tracking store is back: it is brought anew",
        ) from None
    return ResolvedModel(place, known["uri"], known["run_id"]), known["looked_up"]


@dataclass(frozen=True)
class Parent:
    """The pre-trained model that is adapted."""

    model: Recommender
    card: ModelCard
    uri: str


def find_parent(config: RelearnConfig, uri: str, tell: Callable[[str], None]) -> ResolvedModel | None:
    """Where the model lies that `from` names, or None.

    Raises:
        UserError: as `look_up`; a strategy needs one and none is named.
    """
    from antdist.training.adaptation import needs_parent

    if config.parent is None:
        if needing := [strategy for strategy in strategies_of(config) if needs_parent(strategy)]:
            raise UserError(
                f"strategy {needing[0]} starts from a pre-trained model",
                where="from",
                remedy="give one, e.g. from=models:/NAME/latest",
            )
        return None
    return look_up(
        config.parent, uri, adaptation_folder(config), resolve, offline_ok=config.tracking.offline_ok, tell=tell
    )


def open_parent(found: ResolvedModel | None) -> Parent | None:
    """The pre-trained model in memory."""
    from antdist.model.io import load_model

    if found is None:
        return None
    model, card = load_model(found.folder)
    return Parent(model, card, found.uri)


def parent_notes(config: RelearnConfig, parent: Parent) -> list[str]:
    """What a user should know of this parent for this target, though it may be adapted."""
    from antdist.training.adaptation import treatments

    notes = []
    if config.target in parent.card.domains:
        notes.append(f"the target {config.target} is one of the parent's auxiliary domains: its gain is no transfer")
    if any(treatments(strategy)["theta"].inherited for strategy in strategies_of(config)):
        unknown = [modality for modality in parent.card.dims if modality not in parent.card.features]
        if unknown:
            notes.append(f"{parent.uri} does not say which encoders made its {', '.join(unknown)} features: see to it")
    return notes


def find_state(config: PretrainConfig, uri: str, tell: Callable[[str], None]) -> ResolvedModel | None:
    """The training state that `resume` or `continue` names; None without one, and where the run has checkpoints of its own, as
    after a restart.

    Raises:
        UserError: as `look_up`; a state without a whole checkpoint.
    """
    from antdist.training.checkpoints.local import steps_in

    folder, model = pretrain_folder(config), config.resume or config.parent
    if model is None:
        return None
    if steps_in(folder / "checkpoints"):
        tell(f"{config.name} has checkpoints of its own in {folder}, so {model} is not read")
        return None
    state = look_up(model, uri, folder, resolve_training_state, offline_ok=config.tracking.offline_ok, tell=tell)
    last_checkpoint(state.folder)
    return state


def last_checkpoint(state: Path) -> Checkpoint:
    """The checkpoint in a training state's folder. Raises UserError if there is no whole one."""
    from antdist.training.checkpoints.local import load_latest

    found = load_latest(state / "checkpoints")
    if found is None:
        raise UserError("its training state holds no whole checkpoint", where=state, remedy="name another version")
    return found

"""What a run starts from, its `from` or `resume`: looked up in the registry, copied to the run's folder, remembered there.

STORAGE/NAME/
  from-*/      the files, by their digest, for all nodes to read
  from.json    which MODEL they were when it was looked up: enough to go on from while the registry is away
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from antdist.errors import UserError
from antdist.files import read_json, write_json
from antdist.tracking.registry import ResolvedModel, folder_digest, is_registered
from antdist.tracking.store import StoreAway, check_reachable

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

"""Checkpoints: a folder that counts once its marker is there (law 6).

    step-00000120/
      weights.safetensors    float32, by parameter name
      moments.safetensors    Adam's, as `exp_avg/NAME`
      progress.json          step, epoch, stream position, metrics so far, updates, loss scale; `best`: which weights
                             were the best so far, their size and sha256
      COMPLETE.json          written last: size and sha256 of each of the others
    ../best/
      epoch-00003.safetensors   the best weights so far, by parameter name: checkpoints share them

Nothing in it knows ranks, ZeRO stages or engines, and nothing in it is a pickle.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from antdist import faults
from antdist.errors import UserError
from antdist.io.files import file_sha256, flush_to_disk
from antdist.io.logs import get_logger
from antdist.training.engines.plain import MOMENTS, EngineState

logger = get_logger(__name__)

FILES = ("weights.safetensors", "moments.safetensors", "progress.json")
MARKER = "COMPLETE.json"
PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    folder: Path
    state: EngineState
    progress: dict[str, Any]


def save_checkpoint(
    parent: Path,
    step: int,
    state: EngineState,
    progress: dict[str, Any],
    keep: int,
    keep_every: int | None = None,
    held: Collection[int] = (),
) -> Path:
    """Write `parent/step-N` whole or not at all, then drop all but the newest `keep`, those that `keep_every` keeps for
    good, and the steps `held`. Called by the leader alone."""
    assert keep >= 2, "one checkpoint is none while it is replaced"
    parent.mkdir(parents=True, exist_ok=True)
    final, folder = parent / f"{PREFIX}{step:08d}", parent / f".writing-{PREFIX}{step:08d}"
    for left in parent.glob(f".writing-{PREFIX}*"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir()
    faults.at("save", rank=0, step=step, file="weights.safetensors")
    write_tensors(folder / "weights.safetensors", state.weights)
    flat = {f"{moment}/{name}": value for moment, kept in state.moments.items() for name, value in kept.items()}
    faults.at("save", rank=0, step=step, file="moments.safetensors")
    write_tensors(folder / "moments.safetensors", flat)
    document = {**progress, "engine": {"updates": state.updates, "scale": state.scale}}
    faults.at("save", rank=0, step=step, file="progress.json")
    (folder / "progress.json").write_text(json.dumps(document, indent=1, allow_nan=False))
    flush_to_disk(folder / "progress.json")
    files = {path.name: describe(path) for path in sorted(folder.iterdir())}
    faults.at("save", rank=0, step=step, file=MARKER)
    (folder / MARKER).write_text(json.dumps(files, indent=1))
    flush_to_disk(folder / MARKER)
    flush_to_disk(folder)
    faults.at("save", rank=0, step=step, file="rename")
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    flush_to_disk(parent)
    faults.at("save", rank=0, step=step, file="prune")
    steps = steps_in(parent)
    for old in set(steps[:-keep]) - kept_for_good(steps, keep_every) - {*held}:
        shutil.rmtree(parent / f"{PREFIX}{old:08d}", ignore_errors=True)
    return final


def kept_for_good(steps: Sequence[int], every: int | None) -> set[int]:
    """Of increasing `steps` the first at or after each multiple of `every`, from the first multiple on."""
    first = {step // every: step for step in reversed(steps) if step >= every} if every else {}
    return set(first.values())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, whole or not at all, down to the disk. Raises OSError, with the file's name, where that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
    except SafetensorError as error:  # what the system said is in its text alone
        raise OSError(errno.EIO, str(error).removeprefix("Error while serializing: "), str(path)) from error
    flush_to_disk(partial)
    partial.rename(path)


def steps_in(parent: Path) -> list[int]:
    """Steps of the checkpoints below `parent` that have a marker, oldest first."""
    if not parent.is_dir():
        return []
    names = [path.parent.name for path in parent.glob(f"{PREFIX}*/{MARKER}")]
    return sorted(int(name.removeprefix(PREFIX)) for name in names if name.removeprefix(PREFIX).isdigit())


def progress_of_all(parent: Path) -> list[dict[str, Any]]:
    """What the `progress.json` of each checkpoint below `parent` says, oldest first; a damaged one, which cannot be loaded
    either, is left out."""
    found = []
    for step in steps_in(parent):
        folder = parent / f"{PREFIX}{step:08d}"
        with contextlib.suppress(OSError, ValueError, UserError):
            _check_file(folder / "progress.json", json.loads((folder / MARKER).read_text()).get("progress.json"))
            found.append(json.loads((folder / "progress.json").read_text()))
    return found


def known_best(parent: Path, epoch: int, before: int | None = None) -> dict[str, Any] | None:
    """The best weights of `epoch` as the newest checkpoint that names them describes them (of those before step `before`):
    what damages the file later must not pass for it. None if there is none."""
    for kept in reversed(progress_of_all(parent)):
        best = kept.get("best")
        if best and best["epoch"] == epoch and (before is None or kept["progress"]["step"] < before):
            return dict(best)
    return None


def load_best(folder: Path, epoch: int) -> dict[str, Tensor]:
    """A run's best weights, those of `epoch`, by parameter name. Raises UserError if they are not as they were saved."""
    from safetensors.torch import load_file

    known = known_best(folder / "checkpoints", epoch)
    path = best_weights(folder, epoch)
    _check_file(path, known["file"] if known else None)
    return load_file(path)


def drop_newer(parent: Path, folder: Path) -> None:
    """Remove the checkpoints below `parent` that were passed over for `folder`: kept as the newest, they would push out the
    whole ones. Nothing is done if `folder` lies elsewhere."""
    if folder.parent == parent:
        for step in steps_in(parent):
            if step > int(folder.name.removeprefix(PREFIX)):
                shutil.rmtree(parent / f"{PREFIX}{step:08d}")


def newest_whole(parent: Path) -> int | None:
    """The step of the checkpoint that `load_latest` would load, None if there is none."""
    for step in reversed(steps_in(parent)):
        with contextlib.suppress(UserError):
            check_checkpoint(parent / f"{PREFIX}{step:08d}")
            return step
    return None


def load_latest(parent: Path) -> Checkpoint | None:
    """The newest whole checkpoint below `parent`, None if it holds none. One that is damaged is named, and the one before it
    is tried. Raises UserError if all are damaged: beginning anew, as if there had been nothing, is for the user to decide."""
    steps = steps_in(parent)
    for step in reversed(steps):
        folder = parent / f"{PREFIX}{step:08d}"
        try:
            return load_checkpoint(folder)
        except UserError as damage:
            logger.warning(f"checkpoint passed over: {damage}")
            last = damage
    if not steps:
        return None
    raise UserError(
        f"all checkpoints are damaged, the oldest too: {last.where}: {last.what}",
        where=parent,
        remedy="bring a whole one back from a copy; to begin anew, remove the folder",
    )


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint. Raises UserError, naming the file, if it is not there or not whole, or its best weights are not."""
    from safetensors.torch import load_file

    check_checkpoint(folder)
    document = json.loads((folder / "progress.json").read_text())
    engine = document.pop("engine")
    moments: dict[str, dict[str, Any]] = {moment: {} for moment in MOMENTS}
    for key, value in load_file(folder / "moments.safetensors").items():
        moment, name = key.split("/", 1)
        moments[moment][name] = value
    weights = load_file(folder / "weights.safetensors")
    return Checkpoint(folder, EngineState(weights, moments, engine["updates"], engine["scale"]), document)


def check_checkpoint(folder: Path) -> None:
    """Compare every file with the marker, and the best weights with what the checkpoint says of them. Raises UserError at
    the first that differs."""
    marker = folder / MARKER
    if not marker.is_file():
        raise UserError(f"not a checkpoint: there is no {MARKER}", where=folder, remedy="name a folder that has one")
    try:
        files: dict[str, dict[str, Any]] = json.loads(marker.read_text())
    except ValueError as error:
        raise UserError(
            f"the marker cannot be read ({error})", where=marker, remedy="use an older checkpoint"
        ) from error
    for name in FILES:
        _check_file(folder / name, files.get(name))
    if best := json.loads((folder / "progress.json").read_text()).get("best"):
        _check_file(best_weights(folder.parent.parent, best["epoch"]), best["file"])


def _check_file(path: Path, described: dict[str, Any] | None) -> None:
    if not path.is_file() or describe(path) != described:
        raise UserError("missing, cut short or altered", where=path, remedy="use an older checkpoint")


def best_weights(folder: Path, epoch: int) -> Path:
    """Where a run's weights after `epoch` (counted from 1), the best on validation so far, are kept."""
    return folder / "best" / f"epoch-{epoch:05d}.safetensors"


def describe(path: Path) -> dict[str, Any]:
    """A file's size and digest."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}

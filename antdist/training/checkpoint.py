"""Checkpoints: a folder that counts once its marker is there (law 6).

    step-00000120/
      weights.safetensors    float32, by parameter name
      moments.safetensors    Adam's, as `exp_avg/NAME`
      progress.json          step, epoch, stream position, metrics so far, updates, loss scale
      COMPLETE.json          written last: size and sha256 of each of the others

Nothing in it knows ranks, ZeRO stages or engines, and nothing in it is a pickle.
"""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from antdist import faults
from antdist.errors import UserError
from antdist.files import file_sha256, flush_to_disk
from antdist.progress import say
from antdist.training.engine import MOMENTS, EngineState

MARKER = "COMPLETE.json"
PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    folder: Path
    state: EngineState
    progress: dict[str, Any]


def save_checkpoint(parent: Path, step: int, state: EngineState, progress: dict[str, Any], keep: int) -> Path:
    """Write `parent/step-N` whole or not at all, then drop all but the newest `keep`. Called by the leader alone."""
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
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    faults.at("save", rank=0, step=step, file=MARKER)
    (folder / MARKER).write_text(json.dumps(files, indent=1))
    flush_to_disk(folder / MARKER)
    flush_to_disk(folder)
    faults.at("save", rank=0, step=step, file="rename")
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    flush_to_disk(parent)
    faults.at("save", rank=0, step=step, file="prune")
    for old in steps_in(parent)[:-keep]:
        shutil.rmtree(parent / f"{PREFIX}{old:08d}", ignore_errors=True)
    return final


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
    """What the `progress.json` of each checkpoint below `parent` says, oldest first."""
    return [json.loads((parent / f"{PREFIX}{step:08d}" / "progress.json").read_text()) for step in steps_in(parent)]


def load_latest(parent: Path) -> Checkpoint | None:
    """The newest whole checkpoint below `parent`, or None. One that is damaged is named, and the one before it is tried."""
    for step in reversed(steps_in(parent)):
        folder = parent / f"{PREFIX}{step:08d}"
        try:
            return load_checkpoint(folder)
        except UserError as damage:
            say(f"checkpoint passed over: {damage}")
    return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint. Raises UserError, naming the file, if it is not there or not whole."""
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
    """Compare every file with the marker. Raises UserError at the first that differs."""
    marker = folder / MARKER
    if not marker.is_file():
        raise UserError(f"not a checkpoint: there is no {MARKER}", where=folder, remedy="name a folder that has one")
    try:
        files: dict[str, dict[str, Any]] = json.loads(marker.read_text())
    except ValueError as error:
        raise UserError(
            f"the marker cannot be read ({error})", where=marker, remedy="use an older checkpoint"
        ) from error
    for name in ("weights.safetensors", "moments.safetensors", "progress.json"):
        path = folder / name
        if not path.is_file() or _describe(path) != files.get(name):
            raise UserError("missing, cut short or altered", where=path, remedy="use an older checkpoint")


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}

"""Checkpoints on disk: a folder is one once its marker exists, which is written last (law 6).

    step-00000120/
      weights.safetensors    float32, by parameter name
      moments.safetensors    Adam's, as `exp_avg/NAME`
      progress.json          step, epoch, stream position, metrics so far, updates, loss scale; `best`: the epoch of the
                             best weights so far, and their file's size and sha256
      COMPLETE.json          the marker: size and sha256 of each of the others
    ../best/
      epoch-00003.safetensors   the best weights so far, by parameter name, shared by the checkpoints

Checkpoints depend neither on ranks nor on ZeRO stages or engines, and none of their files is a pickle.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from antdist import faults
from antdist.errors import UserError
from antdist.io.files import file_sha256, flush_to_disk, write_atomically
from antdist.io.logs import get_logger
from antdist.training.checkpoints import BEST, CHECKPOINTS
from antdist.training.engines.base import EngineState, empty_moments

logger = get_logger(__name__)

FILES = ("weights.safetensors", "moments.safetensors", "progress.json")
MARKER = "COMPLETE.json"
PREFIX = "step-"


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of a step's checkpoint."""
    return f"{PREFIX}{step:08d}"


def parse_steps(names: Iterable[str]) -> list[int]:
    """Return the steps in the names of checkpoint folders, in increasing order; ignore other names."""
    return sorted(int(name.removeprefix(PREFIX)) for name in names if re.fullmatch(rf"{PREFIX}\d+", name))


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint in memory; `document` is its `progress.json`, without `engine`."""

    folder: Path
    state: EngineState
    document: dict[str, Any]


def save_checkpoint(
    parent: Path,
    step: int,
    state: EngineState,
    document: dict[str, Any],
    keep: int,
    keep_every: int | None = None,
    in_use: Collection[int] = (),
) -> Path:
    """Write `parent/step-N` atomically, then apply the retention. Called by the leader alone.

    Every file is flushed before the marker, and the marker before the folder gets its final name: after a crash or
    power cut at any point, a folder with that name holds a complete checkpoint.

    Args:
        keep: the number of newest checkpoints to keep.
        keep_every: keep the first checkpoint at or after each multiple of this many steps, too.
        in_use: steps that must not be removed yet.
    """
    assert keep >= 2, "with a single checkpoint there is none while it is replaced"
    parent.mkdir(parents=True, exist_ok=True)
    final, folder = parent / checkpoint_name(step), parent / f".writing-{checkpoint_name(step)}"
    for leftover in parent.glob(".writing-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir()
    faults.inject("save", rank=0, step=step, file="weights.safetensors")
    write_tensors(folder / "weights.safetensors", state.weights)
    flat = {f"{moment}/{name}": value for moment, values in state.moments.items() for name, value in values.items()}
    faults.inject("save", rank=0, step=step, file="moments.safetensors")
    write_tensors(folder / "moments.safetensors", flat)
    document = {**document, "engine": {"updates": state.updates, "scale": state.scale}}
    faults.inject("save", rank=0, step=step, file="progress.json")
    (folder / "progress.json").write_text(json.dumps(document, indent=1, allow_nan=False))
    flush_to_disk(folder / "progress.json")
    files = {path.name: describe(path) for path in sorted(folder.iterdir())}
    faults.inject("save", rank=0, step=step, file=MARKER)
    (folder / MARKER).write_text(json.dumps(files, indent=1))
    flush_to_disk(folder / MARKER)
    flush_to_disk(folder)
    faults.inject("save", rank=0, step=step, file="rename")
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    flush_to_disk(parent)
    faults.inject("save", rank=0, step=step, file="prune")
    steps = steps_in(parent)
    for old in set(steps[:-keep]) - permanent_steps(steps, keep_every) - {*in_use}:
        shutil.rmtree(parent / checkpoint_name(old), ignore_errors=True)
    return final


def permanent_steps(steps: Sequence[int], every: int | None) -> set[int]:
    """Return the first of increasing `steps` at or after each multiple of `every`."""
    first = {step // every: step for step in reversed(steps) if step >= every} if every else {}
    return set(first.values())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically and flush it to disk. Raises OSError, with the file's name."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with write_atomically(path) as partial:
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
        except SafetensorError as error:  # the system's error is only in its text
            raise OSError(errno.EIO, str(error).removeprefix("Error while serializing: "), str(path)) from error


def steps_in(parent: Path) -> list[int]:
    """List the steps of the checkpoints below `parent` that have a marker, oldest first."""
    if not parent.is_dir():
        return []
    return parse_steps(path.parent.name for path in parent.glob(f"{PREFIX}*/{MARKER}"))


def read_documents(parent: Path) -> list[dict[str, Any]]:
    """Read the `progress.json` of each checkpoint below `parent`, oldest first, without damaged ones."""
    documents = []
    for step in steps_in(parent):
        folder = parent / checkpoint_name(step)
        with contextlib.suppress(OSError, ValueError, UserError):
            _check_file(folder / "progress.json", json.loads((folder / MARKER).read_text()).get("progress.json"))
            documents.append(json.loads((folder / "progress.json").read_text()))
    return documents


def recorded_best(parent: Path, epoch: int, before: int | None = None) -> dict[str, Any] | None:
    """Return how the newest checkpoint (before step `before`) describes the best weights of `epoch`.

    Size and digest are taken once, when the file is written: computed again later, they would hide damage to it.
    """
    for document in reversed(read_documents(parent)):
        best = document.get("best")
        if best and best["epoch"] == epoch and (before is None or document["progress"]["step"] < before):
            return dict(best)
    return None


def load_best(folder: Path, epoch: int) -> dict[str, Tensor]:
    """Load a run's best weights, those of `epoch`, by name. Raises UserError if they are damaged."""
    from safetensors.torch import load_file

    recorded = recorded_best(folder / CHECKPOINTS, epoch)
    path = best_weights(folder, epoch)
    _check_file(path, recorded["file"] if recorded else None)
    return load_file(path)


def remove_newer(parent: Path, folder: Path) -> None:
    """Remove checkpoints newer than `folder`; does nothing if `folder` is not below `parent`.

    They are damaged, and the retention would count them among the newest in place of complete ones.
    """
    if folder.parent == parent:
        (loaded,) = parse_steps([folder.name])
        for step in steps_in(parent):
            if step > loaded:
                shutil.rmtree(parent / checkpoint_name(step))


def newest_complete(parent: Path) -> int | None:
    """Return the step of the checkpoint that `load_latest` would load, None if there is none."""
    for step in reversed(steps_in(parent)):
        with contextlib.suppress(UserError):
            check_checkpoint(parent / checkpoint_name(step))
            return step
    return None


def load_latest(parent: Path) -> Checkpoint | None:
    """Load the newest complete checkpoint below `parent`, None if it has none; report damaged ones.

    Raises:
        UserError: all are damaged. Whether to start over then is for the user to decide.
    """
    steps = steps_in(parent)
    for step in reversed(steps):
        folder = parent / checkpoint_name(step)
        try:
            return load_checkpoint(folder)
        except UserError as damage:
            logger.warning(f"skipped a damaged checkpoint: {damage}")
            last = damage
    if not steps:
        return None
    raise UserError(
        f"all checkpoints are damaged, the oldest too: {last.where}: {last.what}",
        where=parent,
        remedy="restore a complete one from a copy, or remove the folder to start over",
    )


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load one checkpoint. Raises UserError, naming a file of it that is missing or damaged."""
    from safetensors.torch import load_file

    check_checkpoint(folder)
    document = json.loads((folder / "progress.json").read_text())
    engine = document.pop("engine")
    moments = empty_moments()
    for key, value in load_file(folder / "moments.safetensors").items():
        moment, name = key.split("/", 1)
        moments[moment][name] = value
    weights = load_file(folder / "weights.safetensors")
    return Checkpoint(folder, EngineState(weights, moments, engine["updates"], engine["scale"]), document)


def check_checkpoint(folder: Path) -> None:
    """Check every file against the marker, and the best weights against `progress.json`. Raises UserError."""
    marker = folder / MARKER
    if not marker.is_file():
        raise UserError(f"not a checkpoint: no {MARKER}", where=folder, remedy="give a folder that has one")
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
        raise UserError("missing, truncated or modified", where=path, remedy="use an older checkpoint")


def best_weights(folder: Path, epoch: int) -> Path:
    """Return the path of a run's weights after `epoch` (from 1), the best on validation so far."""
    return folder / BEST / f"epoch-{epoch:05d}.safetensors"


def describe(path: Path) -> dict[str, Any]:
    """Return a file's size and digest."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}

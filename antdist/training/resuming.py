"""What a run resumes from: its newest complete checkpoint, or another run's state."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from antdist.data.stream.stream import Stream
from antdist.errors import UserError
from antdist.io.files import write_atomically
from antdist.training.checkpoints import CHECKPOINTS
from antdist.training.checkpoints.local import Checkpoint, best_weights, load_latest, remove_newer
from antdist.training.checkpoints.remote import Remote
from antdist.training.engines.base import full_shape
from antdist.training.progress import Progress


def find_checkpoint(
    folder: Path, remote: Remote | None, start: Checkpoint | None, model: nn.Module
) -> Checkpoint | None:
    """Find the newest complete checkpoint of `folder` or `remote`, else `start`; None for a new run.

    Its best weights are then in `folder`, and damaged newer checkpoints are removed. Called by the leader alone.

    Raises:
        UserError: none is complete though there are some; it belongs to another model; it cannot be copied.
    """
    checkpoints = folder / CHECKPOINTS
    if remote is not None:
        remote.fetch_newest(folder)
    found = load_latest(checkpoints) or start
    if found is not None:
        remove_newer(checkpoints, found.folder)
        _check_same_model(model, found)
        _copy_best_weights(folder, found)
    return found


def restart_from(checkpoint: Checkpoint, stream: Stream) -> Checkpoint:
    """Return the checkpoint's weights and moments at the very start of a new run over `stream`."""
    return replace(checkpoint, document={"progress": asdict(Progress()), "stream": asdict(stream.state(0, 0))})


def _check_same_model(model: nn.Module, found: Checkpoint) -> None:
    """Refuse a state of another model before anything is loaded. Raises UserError."""
    here = {name: full_shape(parameter) for name, parameter in model.named_parameters()}
    there = {name: weight.shape for name, weight in found.state.weights.items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    differing += sorted(trainable ^ found.state.moments["exp_avg"].keys())
    if differing:
        raise UserError(
            f"the training state belongs to another model: {differing[0]} differs",
            where=found.folder,
            remedy="resume with the model: section of the first start, or start a new run",
        )


def _copy_best_weights(folder: Path, found: Checkpoint) -> None:
    """Copy the best weights so far, beside the checkpoints, if `found` is in another folder."""
    epoch = found.document["progress"]["best_epoch"]
    if epoch is None:
        return
    here, there = best_weights(folder, epoch), best_weights(found.folder.parent.parent, epoch)
    if here == there:
        return
    if not there.is_file():
        raise UserError(f"the best weights (epoch {epoch}) are missing", where=there)
    try:
        here.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(here) as partial:
            shutil.copyfile(there, partial)
    except OSError as error:
        raise UserError(
            f"the best weights (epoch {epoch}) cannot be copied here ({error.strerror or error})",
            where=error.filename or here,
            remedy="free space or repair the storage, then run the same command again",
        ) from error

"""Where a trial comes from: the target's data and the parent; a trial with another origin is refused."""

from __future__ import annotations

from antdist.errors import UserError
from antdist.evaluation.results import load_ranks
from antdist.runs.records import RunRecord
from antdist.runs.trials import Trial
from antdist.tracking.registry import Lineage
from antdist.training.adaptation import needs_parent


def lineage_of(trial: Trial, fingerprint: str, parent: str | None) -> Lineage:
    """The lineage of a trial's model.

    Args:
        fingerprint: of the target's manifest.
        parent: URI of the pre-trained model, if there is one.
    """
    inherited = parent if needs_parent(trial.strategy) else None
    return Lineage({trial.target: fingerprint}, target=trial.target, strategy=trial.strategy, parent=inherited)


def refuse_other_origin(trial: Trial, record: RunRecord | None, lineage: Lineage) -> None:
    """Raise UserError if the trial began with another parent or ended on other data.

    Args:
        record: the trial's `run.json`, if it has begun.
    """
    if record is not None and record.parent != lineage.parent:
        raise UserError(
            f"this trial started from {record.parent}, not from {lineage.parent}",
            where=trial.folder,
            remedy="choose another name=..., name that parent, or remove the folder",
        )
    file = trial.folder.ranks_file("validation")
    if not file.is_file():
        return
    key = load_ranks(file).key
    if lineage.fingerprints != {key.target: key.manifest}:
        raise UserError(
            f"this trial ended on other data of {key.target} (fingerprint {key.manifest[:12]})",
            where=trial.folder,
            remedy="choose another name=..., or remove the folder to train it on the present data",
        )

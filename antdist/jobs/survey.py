"""What a fan-out finds where its data and runs lie: targets, parent, trials that are trained. All is checked that is cheap to
check, before a job takes the cluster's time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from antdist.config.schema import RelearnConfig
from antdist.errors import UserError
from antdist.io.files import read_json
from antdist.runs.checks import CheckReport, check_strategies
from antdist.runs.folder import refuse_another
from antdist.runs.inputs import open_domains, prepared
from antdist.runs.parent import find_parent, open_parent, parent_notes
from antdist.runs.trials import (
    Trial,
    adaptation_folder,
    is_trained,
    shared,
    store_of,
    strategies_of,
    trial_folder,
    trials_of,
)
from antdist.runs.verdict import VERDICT
from antdist.runs.workers.trial import lineage_of, refuse_other_origin
from antdist.tracking.store import check_reachable


@dataclass(frozen=True)
class Found:
    """A target: the trials that are not trained yet, and what it ended with, if it did with these trials."""

    todo: list[Trial]
    verdict: dict[str, Any] | None


@dataclass(frozen=True)
class Survey:
    """`parent`: as a version, since an alias may move while jobs wait."""

    parent: str | None
    targets: dict[str, Found]
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Jobs that are to run: of trials, and one for the verdict of each target that has none."""
        return sum(len(found.todo) + (found.verdict is None) for found in self.targets.values())

    def lines(self) -> list[str]:
        told = [f"note: {note}" for note in self.notes]
        for target, found in self.targets.items():
            todo = [f"{strategy}-seed{seed}" for strategy, seed in found.todo]
            todo += [] if found.verdict else ["verdict"]
            told.append(f"{target}: " + (f"to do: {', '.join(todo)}" if todo else "done"))
        return [*told, f"{self.left} jobs"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(told: dict[str, Any]) -> Survey:
        targets = {
            target: Found([(strategy, seed) for strategy, seed in found["todo"]], found["verdict"])
            for target, found in told["targets"].items()
        }
        return Survey(told["parent"], targets, told["notes"])


def survey(config: RelearnConfig, targets: list[str] | None) -> Survey:
    """Look at these targets, or at all domains below `data.root` that the parent did not learn from.

    Raises:
        UserError: no such domain, or one without the features that a strategy needs; no such parent; a run of this name with
            another configuration, or trials that started from another parent or ended on other data.
    """
    notes: list[str] = []
    if not config.tracking.offline_ok:
        check_reachable(store_of(config))
    start = find_parent(config, store_of(config), notes.append)
    parent = open_parent(start)
    if targets is None:
        known = parent.card.domains if parent else []
        there = prepared(config.data)
        targets = [name for name in there if name not in known]
        if left_out := [name for name in there if name in known]:
            notes.append(f"left out, as {parent.uri if parent else ''} learned from them: {', '.join(left_out)}")
        if not targets:
            raise UserError("no domain that could be a target", where=f"data.root {config.data.root}")
    uri = None if start is None else start.uri
    found = {}
    for name, domain in zip(targets, open_domains(config.data, targets, "--targets"), strict=True):
        mine = config.model_copy(update={"target": name})
        check_strategies(mine, parent, CheckReport())
        if parent is not None:
            notes += [note for note in parent_notes(mine, parent) if note not in notes]
        folder = adaptation_folder(mine)
        refuse_another(folder, shared(mine), quiet=True)
        for strategy, seed in trials_of(mine):
            trial = trial_folder(folder, strategy, seed)
            refuse_other_origin(
                trial, read_json(trial / "run.json"), lineage_of(mine, domain.fingerprint, strategy, uri)
            )
        todo = [trial for trial in trials_of(mine) if not is_trained(folder, trial)]
        found[name] = Found(todo, None if todo else _verdict(mine, folder))
    return Survey(uri, found, notes)


def _verdict(config: RelearnConfig, folder: Path) -> dict[str, Any] | None:
    """What the run ended with, if with just these trials."""
    told, file = read_json(folder / VERDICT), folder / VERDICT
    if told is None or (sorted(told["seeds"]), [row["strategy"] for row in told["test"]]) != (
        sorted(config.seeds),
        strategies_of(config),
    ):
        return None
    outcomes = [trial_folder(folder, *trial) / "outcome.json" for trial in trials_of(config)]
    return told if all(outcome.stat().st_mtime <= file.stat().st_mtime for outcome in outcomes) else None

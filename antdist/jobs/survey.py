"""The survey before a fan-out, made where its data and runs are: targets, parent, trained trials.

It makes every cheap check, before a job uses the cluster's time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from antdist.config.schema import RelearnConfig
from antdist.errors import UserError
from antdist.report import Report
from antdist.runs.checks import check_strategies
from antdist.runs.comparison import refuse_other_config
from antdist.runs.context import CheckReport
from antdist.runs.folder import RunFolder, run_folder, storage
from antdist.runs.inputs import Target, list_domains, open_domains
from antdist.runs.lineage import lineage_of, refuse_other_origin
from antdist.runs.parent import load_parent, parent_notes, resolve_parent
from antdist.runs.trials import Trial, common_config, strategies_of, trials_of
from antdist.runs.verdict import read_judgement
from antdist.tracking.store import check_reachable, tracking_uri


@dataclass(frozen=True)
class TargetSurvey:
    """A target: the trials that are not trained yet, and the verdict on these trials, if there is one."""

    todo: list[Trial]
    verdict: dict[str, Any] | None


@dataclass(frozen=True, repr=False)
class Survey(Report):
    """All targets. `parent` is a version, since an alias may move while jobs are pending."""

    parent: str | None
    targets: dict[str, TargetSurvey]
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Count the jobs to run: the trials, and the verdict of each target without one."""
        return sum(len(found.todo) + (found.verdict is None) for found in self.targets.values())

    def lines(self) -> list[str]:
        lines = [f"note: {note}" for note in self.notes]
        for target, found in self.targets.items():
            todo = list(map(str, found.todo))
            todo += [] if found.verdict else ["verdict"]
            lines.append(f"{target}: " + (f"to do: {', '.join(todo)}" if todo else "done"))
        return [*lines, f"{self.left} job{'s' if self.left != 1 else ''}"]

    def to_json(self) -> dict[str, Any]:
        targets = {
            target: {"todo": [[trial.strategy, trial.seed] for trial in found.todo], "verdict": found.verdict}
            for target, found in self.targets.items()
        }
        return {"parent": self.parent, "targets": targets, "notes": self.notes}

    def records(self) -> list[dict[str, Any]]:
        return [
            {"target": target, "trials left": len(found.todo), "judged": found.verdict is not None}
            for target, found in self.targets.items()
        ]

    @staticmethod
    def from_json(document: dict[str, Any], config: RelearnConfig) -> Survey:
        """Read what `to_json` wrote, for a fan-out of `config`."""

        def read(target: str, found: dict[str, Any]) -> TargetSurvey:
            folder = run_folder(config.model_copy(update={"target": target}))
            todo = [Trial(target, strategy, seed, folder.trial(strategy, seed)) for strategy, seed in found["todo"]]
            return TargetSurvey(todo, found["verdict"])

        return Survey(
            document["parent"],
            {target: read(target, found) for target, found in document["targets"].items()},
            document["notes"],
        )


def survey(config: RelearnConfig, targets: list[str] | None) -> Survey:
    """Survey these targets, or all domains below `data.root` that the parent did not learn from.

    Raises:
        UserError: no such domain, or one without the features that a strategy needs; no such parent; a run of this name with
            another configuration, or trials that started from another parent or ended on other data.
    """
    notes: list[str] = []
    store = tracking_uri(config.tracking, storage(config.ray))
    if not config.tracking.offline_ok:
        check_reachable(store)
    start = resolve_parent(config, store, run_folder(config), notes.append)
    parent = load_parent(start)
    if targets is None:
        known = parent.card.domains if parent else []
        domains = list_domains(config.data)
        targets = [name for name in domains if name not in known]
        if left_out := [name for name in domains if name in known]:
            notes.append(f"left out, as {parent.uri if parent else ''} learned from them: {', '.join(left_out)}")
        if not targets:
            raise UserError("no domain that could be a target", where=f"data.root {config.data.root}")
    uri = None if start is None else start.uri
    found = {}
    for name, domain in zip(targets, open_domains(config.data, targets, "--targets"), strict=True):
        mine = config.model_copy(update={"target": name})
        check_strategies(Target(mine, domain, parent), CheckReport())
        if parent is not None:
            notes += [note for note in parent_notes(mine, parent) if note not in notes]
        folder, trials = run_folder(mine), trials_of(mine)
        refuse_other_config(folder, common_config(mine), quiet=True)
        for trial in trials:
            refuse_other_origin(trial, trial.folder.read_record(), lineage_of(trial, domain.fingerprint, uri))
        todo = [trial for trial in trials if not trial.is_trained]
        found[name] = TargetSurvey(todo, None if todo else _verdict(mine, folder))
    return Survey(uri, found, notes)


def _verdict(config: RelearnConfig, folder: RunFolder) -> dict[str, Any] | None:
    """Return the run's judgement if it is of exactly these trials and newer than their results."""
    file = folder.judgement_file
    judgement, wanted = read_judgement(file), (sorted(config.seeds), strategies_of(config))
    if judgement is None or (sorted(judgement.seeds), [row.strategy for row in judgement.rows]) != wanted:
        return None
    judged = file.stat().st_mtime
    is_newest = all(trial.folder.result_file.stat().st_mtime <= judged for trial in trials_of(config))
    return judgement.to_json() if is_newest else None

"""`antdist relearn`: one target, one strategy or all, several seeds; the verdict and the choice on validation, the test once.

A *trial* is one (strategy, seed): a folder and an MLflow run of its own. All trials of a call share one group of workers.
Or each is trained by a command of its own, beside the others, and a last one concludes (`antdist fanout`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from antdist.config.schema import RelearnConfig, Strategy
from antdist.distributed.ray_session import ray_session, run_workers, stoppable
from antdist.errors import Preempted, UserError
from antdist.io.files import read_json, write_json
from antdist.io.logs import get_logger
from antdist.runs.checks import check_relearn, check_settings
from antdist.runs.folder import STOP, claimed, deliver_left, ending_runs, following, for_workers, settling
from antdist.runs.inputs import open_domains
from antdist.runs.parent import bring
from antdist.runs.trials import adaptation_folder, is_trained, shared, store_of, strategies_of, trial_folder, trials_of
from antdist.runs.verdict import VERDICT, Judged, _judge, _pooled, choose
from antdist.runs.workers.trial import _open_trial, lineage_of, relearn_worker
from antdist.serving.pyfunc import make_servable
from antdist.tracking.registry import ResolvedModel, register
from antdist.tracking.run import stored_run
from antdist.tracking.store import redact

if TYPE_CHECKING:
    from antdist.data.domain import Domain

logger = get_logger(__name__)


@dataclass(frozen=True)
class Relearned(Judged):
    """What a call ended with."""

    chosen: Strategy
    model: str  # models:/NAME/VERSION of the chosen strategy's best seed
    champion: str  # what became of that alias, in words
    holder: str | None  # models:/NAME/VERSION that has it
    tracking_uri: str

    def lines(self) -> list[str]:
        return [
            *super().lines(),
            f"chosen on validation: {self.chosen}; registered {self.model} ({self.champion})",
            f"files in {self.folder}; MLflow: {redact(self.tracking_uri)}",
        ]

    def to_json(self) -> dict[str, Any]:
        told = {"chosen": self.chosen, "model": self.model, "champion": self.champion, "holder": self.holder}
        return {**super().to_json(), **told}


@dataclass(frozen=True)
class Trained:
    """A trial that is trained, and not judged yet. `figures`: the metrics on validation and test users."""

    trial: str
    figures: dict[str, Any]

    def lines(self) -> list[str]:
        return [f"{self.trial} is trained: validation Recall@10 {self.figures['validation']['Recall@10']:.4f}"]

    def to_json(self) -> dict[str, Any]:
        return {"trial": self.trial, **self.figures}


def relearn(config: RelearnConfig) -> Relearned:
    """Adapt to `target` (spec, section 6), judge the transfer (section 7), register the model chosen on validation.

    Trials that are finished under the same name are not run again.

    Raises:
        Preempted: SIGTERM came; the state is saved.
        UserError: whatever `check_relearn` finds; a run of this name with another configuration, or at work; a loss that
            diverged; trials that `training.stop_after` ended early.
    """
    checked = check_relearn(config)
    checked.log_notes()
    folder = adaptation_folder(config)
    with claimed(folder, shared(config), parts=[trial_folder(folder, *trial) for trial in trials_of(config)]):
        _train(config, folder, checked.start)
        parent = None if checked.start is None else checked.start.uri
        return _conclude(config, folder, store_of(config), _domain(config), parent)


def train_trial(config: RelearnConfig) -> Trained:
    """Train the one trial of `config` and judge nothing, beside commands that train others of the target.

    Raises:
        Preempted: SIGTERM came; the state is saved.
        UserError: more than one trial; whatever `relearn` raises.
    """
    if len(trials_of(config)) != 1:
        raise UserError(
            f"one trial is one strategy and one seed, not {len(trials_of(config))}",
            where="strategy, seeds",
            remedy="name one of each, or leave --only out",
        )
    checked = check_relearn(config)
    checked.log_notes()
    folder = adaptation_folder(config)
    mine = trial_folder(folder, *trials_of(config)[0])
    with claimed(folder, shared(config), parts=[mine], whole=False):
        _train(config, mine, checked.start)
        return Trained(mine.name, read_json(mine / "outcome.json") or {})


def conclude(config: RelearnConfig) -> Judged:
    """Judge the trials that are trained, and train none. Only where all of them are is a model registered (`Relearned`):
    a champion chosen among some would stand in the way of a better one.

    Raises:
        UserError: no strategy has its trials of all seeds; another command is at work on this run.
    """
    check_settings(config)
    domain, folder = _domain(config), adaptation_folder(config)
    trials = trials_of(config)
    with claimed(folder, shared(config), parts=[trial_folder(folder, *trial) for trial in trials]):
        missing = [trial for trial in trials if not is_trained(folder, trial)]
        if not missing:
            parents = [(read_json(trial_folder(folder, *trial) / "run.json") or {})["parent"] for trial in trials]
            parent = next(filter(None, parents), None)
            return _conclude(config, folder, store_of(config), domain, parent)
        whole = [s for s in strategies_of(config) if s not in {strategy for strategy, _ in missing}]
        if not whole:
            raise UserError("no strategy is trained with all seeds", where=folder, remedy="train the trials first")
        runs = _pooled(config, folder, whole)
        note = f"not registered, as these are not trained: {', '.join(f'{s}-seed{seed}' for s, seed in missing)}"
        return _judge(config, folder, runs, [note])


def _domain(config: RelearnConfig) -> Domain:
    return open_domains(config.data, [config.target or ""], "target")[0]


def _train(config: RelearnConfig, desk: Path, parent: ResolvedModel | None) -> None:
    """Train the trials of `config` that are not trained. At `desk`, the run's folder or a trial's, command and workers tell
    each other how it goes."""
    folder, uri, trials = adaptation_folder(config), store_of(config), trials_of(config)
    parent_uri = None if parent is None else parent.uri
    fingerprint = _domain(config).fingerprint
    for strategy, seed in trials:
        _open_trial(config, strategy, seed, folder, uri, lineage_of(config, fingerprint, strategy, parent_uri))
    outcomes = [trial_folder(folder, *trial) / "outcome.json" for trial in trials]
    preempted = desk / "preempted.json"
    if all(outcome.is_file() for outcome in outcomes):
        logger.info("all trials are finished: nothing is trained")
    else:
        with settling(folder):
            place = bring(config.parent, parent, folder) if config.parent and parent else None
        settings = {
            "config": for_workers(config),
            "uri": uri,
            "folder": str(folder),
            "desk": str(desk),
            "parent": {"folder": str(place), "uri": parent_uri} if place else None,
        }
        preempted.unlink(missing_ok=True)
        trial_folders = [outcome.parent for outcome in outcomes]
        name = "-".join(desk.relative_to(folder.parents[1]).parts)
        with ending_runs(uri, trial_folders), ray_session(config.ray), following(desk), stoppable(desk / STOP):
            run_workers(relearn_worker, settings, config.ray, name, config.training.hang)
        if told := read_json(preempted):
            raise Preempted(told["preempted"])
    deliver_left(uri, [outcome.parent for outcome in outcomes if outcome.is_file()])
    _refuse_unfinished(outcomes)


def _refuse_unfinished(outcomes: list[Path]) -> None:
    """Raises UserError if trials diverged (they are tried again by the next start) or were ended early."""
    errors = {outcome: error for outcome in outcomes if (error := (read_json(outcome) or {}).get("error"))}
    for outcome in errors:
        outcome.unlink()
    for error in errors.values():
        raise UserError(
            error["what"],
            where=error["where"],
            remedy="lower training.learning_rate, set training.clip, or run in fp32; and choose another name",
        )
    stopped = [outcome.parent.name for outcome in outcomes if not outcome.is_file()]
    if stopped:
        raise UserError(
            f"ended early: {', '.join(stopped)}",
            where="training.stop_after",
            remedy="the same command goes on; without the key to the end",
        )


# -- the worker ------------------------------------------------------------------------------------------------------


# -- the conclusion --------------------------------------------------------------------------------------------------


def _conclude(config: RelearnConfig, folder: Path, uri: str, domain: Domain, parent_uri: str | None) -> Relearned:
    from antdist.evaluation.significance import metric_of

    strategies = strategies_of(config)
    runs = _pooled(config, folder, strategies)
    judged = _judge(config, folder, runs, [])
    verdicts = judged.verdicts
    validation = {s: float(metric_of(runs[s, "validation"], "Recall@10").mean()) for s in strategies}
    chosen, promote = choose(validation, {strategy: verdict.transfer for strategy, verdict in verdicts.items()})
    per_seed = metric_of(runs[chosen, "validation"], "Recall@10").mean(1)
    seed = runs[chosen, "validation"].key.seeds[int(np.argmax(per_seed))]  # pooled runs are in the order of their seeds
    mine = trial_folder(folder, chosen, seed)
    transfer = verdicts[chosen].transfer if chosen in verdicts else "ground truth"
    notes = [
        f"{s} reached {validation[s]:.4f} on validation, {chosen} {validation[chosen]:.4f}; its transfer is {verdicts[s].transfer}"
        for s in strategies
        if validation[s] > validation[chosen]
    ]
    if not promote:
        notes.append(f"not promoted: on validation the transfer of {chosen} is {transfer}")
    seen = int(runs[chosen, "test"].ranks[0].seen.sum())
    notes.append(f"{seen} of {len(runs[chosen, 'test'].ranks[0].users)} test targets stood in the history: misses")
    make_servable(mine / "model", domain)
    version = register(
        uri,
        stored_run(uri, (read_json(mine / "run.json") or {})["run_id"], mine),
        mine / "model",
        config.tracking.registered_model or f"{config.name}-{config.target}",
        lineage_of(config, domain.fingerprint, chosen, parent_uri),
        validation=float(per_seed.max()),
        promote=promote,
        tags={"transfer": transfer, "seed": str(seed), "seeds": " ".join(map(str, config.seeds))},
    )
    doubted = next((s for s in verdicts if s == version.holder_strategy and verdicts[s].transfer != "positive"), None)
    if doubted is not None and promote:  # it won with other seeds, and by more than this model reaches
        notes.append(
            f"{version.holder}, a {doubted} model, stays champion by its validation, but with these seeds the transfer of "
            f"{doubted} is {verdicts[doubted].transfer}: `antdist promote {version.uri} champion --force` moves it"
        )
    done = Relearned(
        judged.target, judged.seeds, judged.rows, verdicts, folder, notes,
        chosen=chosen, model=version.uri, champion=version.champion, holder=version.holder, tracking_uri=uri,
    )  # fmt: skip
    write_json(folder / VERDICT, done.to_json())
    return done

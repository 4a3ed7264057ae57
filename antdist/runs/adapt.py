"""`antdist relearn`: train one target's trials, judge and choose on validation, test once.

All trials of a call share one group of workers. Or each is trained by a command of its own, beside the others, and a last
command judges them (`antdist fanout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from antdist.config.schema import RelearnConfig
from antdist.distributed.ray_session import ray_session, run_workers, stop_file_on_sigterm
from antdist.errors import Preempted, UserError
from antdist.evaluation.significance import metric_of
from antdist.io.logs import get_logger
from antdist.report import Report
from antdist.runs.checks import check_relearn, resolve_trained
from antdist.runs.comparison import record_config
from antdist.runs.context import AdaptContext, with_absolute_paths
from antdist.runs.folder import RunFolder
from antdist.runs.follow import follow
from antdist.runs.lineage import lineage_of, refuse_other_origin
from antdist.runs.locks import lock_files, lock_run
from antdist.runs.mlflow_runs import deliver_pending, end_failed_runs, restore_record
from antdist.runs.parent import fetch_source
from antdist.runs.records import Preemption, RunRecord, TrialResult
from antdist.runs.trials import Trial, common_config, strategies_of, trials_of
from antdist.runs.verdict import AdaptedModel, Judgement, choose_strategy, judge_strategies, pool_trials
from antdist.runs.workers.trial import AdaptSettings, adapt_worker
from antdist.serving.pyfunc import make_servable
from antdist.tracking.registry import Lineage, register
from antdist.tracking.resolve import ResolvedModel
from antdist.tracking.run import check_run_exists, resolve_run_id, start_run

logger = get_logger(__name__)


@dataclass(frozen=True, repr=False)
class TrainedTrial(Report):
    """A trial that is trained, and not judged yet."""

    trial: str
    result: TrialResult

    def lines(self) -> list[str]:
        return [f"{self.trial} is trained: validation Recall@10 {self.result.validation['Recall@10']:.4f}"]

    def to_json(self) -> dict[str, Any]:
        return {"trial": self.trial, **self.result.to_json()}


def relearn(config: RelearnConfig) -> AdaptedModel:
    """Adapt to `target` (spec, section 6), judge the transfer and register the best model (section 7).

    Trials that are finished under the same name are not run again.

    Raises:
        Preempted: SIGTERM came; the state is saved.
        UserError: what `check_relearn` finds; another command works on this run, or it has another configuration; the loss
            diverged; `training.stop_after` ended trials early.
    """
    context = check_relearn(config)
    context.report.log_notes()
    with lock_run(context.folder, _folders(context)):
        record_config(context.folder, common_config(config))
        _train(context, context.folder)
        return _register_chosen(context, context.parent)


def train_trial(config: RelearnConfig) -> TrainedTrial:
    """Train the one trial of `config` and judge nothing, beside commands that train others of the target.

    Raises:
        Preempted: SIGTERM came; the state is saved.
        UserError: more than one trial; what `relearn` raises.
    """
    trials = trials_of(config)
    if len(trials) != 1:
        raise UserError(
            f"one trial is one strategy and one seed, not {len(trials)}",
            where="strategy, seeds",
            remedy="name one of each, or leave --only out",
        )
    context = check_relearn(config)
    context.report.log_notes()
    (trial,) = trials
    with lock_run(context.folder, [trial.folder], shared=True):
        record_config(context.folder, common_config(config))
        _train(context, trial.folder)
        return TrainedTrial(str(trial), trial.folder.read_result(TrialResult) or TrialResult())


def judge_trials(config: RelearnConfig) -> Judgement:
    """Judge the trials that are trained, and train none.

    A model is registered (`AdaptedModel`) once all of them are: a champion chosen among some would stand in the way of a
    better one.

    Raises:
        UserError: no strategy has its trials of all seeds; another command works on this run.
    """
    context = resolve_trained(config)
    with lock_run(context.folder, _folders(context)):
        record_config(context.folder, common_config(config))
        missing = [trial for trial in context.trials if not trial.is_trained]
        if not missing:
            return _register_chosen(context, _recorded_parent(context))
        complete = [s for s in strategies_of(config) if s not in {trial.strategy for trial in missing}]
        if not complete:
            raise UserError(
                "no strategy is trained with all seeds", where=context.folder, remedy="train the trials first"
            )
        note = f"not registered, as these are not trained: {', '.join(map(str, missing))}"
        return judge_strategies(context, pool_trials(context, complete), [note])


def _folders(context: AdaptContext) -> list[RunFolder]:
    return [trial.folder for trial in context.trials]


def _recorded_parent(context: AdaptContext) -> str | None:
    """The URI of the parent that the trials started from."""
    records = [folder.read_record() for folder in _folders(context)]
    return next((record.parent for record in records if record is not None and record.parent), None)


# -- training --------------------------------------------------------------------------------------------------------


def _train(context: AdaptContext, control: RunFolder) -> None:
    """Train the trials that are not trained.

    Args:
        control: the folder, of the run or of its one trial, through which driver and workers communicate.

    Raises:
        Preempted: SIGTERM came; the state is saved.
        UserError: trials diverged or were ended early.
    """
    trials, folders = context.trials, _folders(context)
    for trial in trials:
        _begin_trial(context, trial, lineage_of(trial, context.domain.fingerprint, context.parent))
    if all(folder.result_file.is_file() for folder in folders):
        logger.info("all trials are finished: nothing is trained")
    else:
        _run_workers(context, control, folders)
    deliver_pending(context.store, [folder for folder in folders if folder.result_file.is_file()])
    refuse_unfinished(trials)


def _begin_trial(context: AdaptContext, trial: Trial, lineage: Lineage) -> None:
    """Make a trial's folder and MLflow run, or take them up. Raises UserError if it began otherwise."""
    config, folder = context.config, trial.folder
    folder.path.mkdir(parents=True, exist_ok=True)
    record = restore_record(folder, context.store)
    refuse_other_origin(trial, record, lineage)
    if record is not None and record.run_id is not None:
        folder.write_record(record)  # the copy may be new
        if not folder.result_file.is_file():
            check_run_exists(context.store, record.run_id)
        return
    shown = {**config.model_dump(mode="json", by_alias=True), "strategy": trial.strategy, "seeds": [trial.seed]}
    tracked = start_run(
        context.store,
        config.tracking.experiment,
        f"{config.name}-{trial.target}-{trial}",
        folder.path,
        config=shown,
        tags={**lineage.tags(), "seed": str(trial.seed)},
        offline_ok=config.tracking.offline_ok,
    )
    tracked.finish(status=None)
    folder.write_record(RunRecord(run_id=tracked.run_id, parent=lineage.parent))


def _run_workers(context: AdaptContext, control: RunFolder, folders: Sequence[RunFolder]) -> None:
    config, start = context.config, context.start
    parent = None
    if config.parent is not None and start is not None:
        with lock_files(context.folder):
            parent = ResolvedModel(fetch_source(config.parent, start, context.folder), start.uri)
    settings = AdaptSettings(with_absolute_paths(config), context.store, control, parent, context.domain.fingerprint)
    name = "-".join(control.path.relative_to(context.folder.path.parents[1]).parts)
    control.preemption_file.unlink(missing_ok=True)
    with (
        end_failed_runs(context.store, folders),
        ray_session(config.ray),
        follow(control),
        stop_file_on_sigterm(control.stop_file),
    ):
        run_workers(adapt_worker, settings, config.ray, name, config.training.hang)
    if (preemption := Preemption.read(control.preemption_file)) is not None:
        raise Preempted(preemption.preempted)


def refuse_unfinished(trials: Sequence[Trial]) -> None:
    """Raise UserError if trials diverged (the next start trains them again) or were ended early."""
    errors = []
    for trial in trials:
        result = trial.folder.read_result(TrialResult)
        if result is not None and result.error is not None:
            errors.append(result.error)
            trial.folder.result_file.unlink()
    if errors:
        raise UserError(
            errors[0].what,
            where=errors[0].where,
            remedy="lower training.learning_rate, set training.clip, or run in fp32; and choose another name",
        )
    if stopped := [str(trial) for trial in trials if not trial.folder.result_file.is_file()]:
        raise UserError(
            f"stopped early: {', '.join(stopped)}",
            where="training.stop_after",
            remedy="run the same command to continue; without the key it runs to the end",
        )


# -- the verdict -----------------------------------------------------------------------------------------------------


def _register_chosen(context: AdaptContext, parent: str | None) -> AdaptedModel:
    """Judge all trials, register the model of the chosen strategy's best seed, and write `verdict.json`."""
    config, store, strategies = context.config, context.store, strategies_of(context.config)
    runs = pool_trials(context, strategies)
    judgement = judge_strategies(context, runs)
    verdicts, notes = judgement.verdicts, []
    validation = {s: float(metric_of(runs[s, "validation"], "Recall@10").mean()) for s in strategies}
    chosen, promote = choose_strategy(validation, {s: verdict.transfer for s, verdict in verdicts.items()})
    per_seed = metric_of(runs[chosen, "validation"], "Recall@10").mean(1)
    seed = runs[chosen, "validation"].key.seeds[int(np.argmax(per_seed))]  # pooled runs are in the order of their seeds
    trial = next(trial for trial in context.trials if (trial.strategy, trial.seed) == (chosen, seed))
    transfer = verdicts[chosen].transfer if chosen in verdicts else "ground truth"
    notes += [
        f"{s} reached {validation[s]:.4f} on validation, {chosen} {validation[chosen]:.4f}; "
        f"its transfer is {verdicts[s].transfer}"
        for s in strategies
        if validation[s] > validation[chosen]
    ]
    if not promote:
        notes.append(f"not promoted: on validation the transfer of {chosen} is {transfer}")
    test = runs[chosen, "test"].ranks[0]
    notes.append(f"{int(test.seen.sum())} of {len(test.users)} test targets are in the history and count as misses")
    record = trial.folder.read_record()
    assert record is not None and record.run_id is not None
    make_servable(trial.folder.model, context.domain)
    version = register(
        store,
        resolve_run_id(store, record.run_id, trial.folder.path),
        trial.folder.model,
        config.tracking.registered_model or f"{config.name}-{config.target}",
        lineage_of(trial, context.domain.fingerprint, parent),
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
    adapted = AdaptedModel(
        **{**dict(judgement), "notes": notes},
        chosen=chosen,
        model=version.uri,
        champion=version.champion,
        holder=version.holder,
        tracking_uri=store,
    )
    adapted.write(context.folder.judgement_file)
    return adapted

"""`antdist pretrain`: the driver checks, starts the workers and registers the model that they trained."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antdist.config.schema import PretrainConfig, Resume
from antdist.distributed.ray_session import ray_session, run_workers, stop_file_on_sigterm
from antdist.errors import Preempted, UserError
from antdist.io.logs import get_logger
from antdist.model.io import CARD
from antdist.report import Report
from antdist.runs.checks import check_pretrain
from antdist.runs.comparison import record_config
from antdist.runs.context import PretrainContext, with_absolute_paths
from antdist.runs.continuing import with_origin
from antdist.runs.folder import RunFolder
from antdist.runs.follow import follow
from antdist.runs.locks import lock_run
from antdist.runs.mlflow_runs import end_failed_runs, restore_record
from antdist.runs.parent import fetch_source
from antdist.runs.records import PretrainResult, RunRecord
from antdist.runs.workers.pretrain import PretrainSettings, pretrain_worker
from antdist.serving.pyfunc import make_servable
from antdist.tracking.registry import Lineage, register
from antdist.tracking.run import resolve_run_id, start_run
from antdist.tracking.store import redact
from antdist.training.checkpoints.local import checkpoint_name, steps_in

logger = get_logger(__name__)


@dataclass(frozen=True, repr=False)
class PretrainedModel(Report):
    """What a pre-training session ended with. `finished` is None if `training.stop_after` ended it early."""

    table_key = "history"

    folder: Path
    model: str  # models:/NAME/VERSION
    champion: str  # whether it became champion, and why
    run_id: str
    tracking_uri: str
    finished: str | None
    step: int  # of the last checkpoint
    history: list[dict[str, int | float]]

    def lines(self) -> list[str]:
        validated = [entry for entry in self.history if "validation/Recall@10" in entry]
        best = max(validated, key=lambda entry: entry["validation/Recall@10"], default=None)
        chosen = f", epoch {best['epoch']:.0f}, validation Recall@10 {best['validation/Recall@10']:.4f}" if best else ""
        return [
            f"registered {self.model}{chosen} ({self.champion})",
            f"run {self.run_id} in {redact(self.tracking_uri)}; files in {self.folder}",
            f"ended: {self.finished}"
            if self.finished
            else f"stopped after step {self.step}; run the same command to continue",
        ]

    def to_json(self) -> dict[str, Any]:
        content = {name: value for name, value in vars(self).items() if name != "step"}  # `history` and the run have it
        return {**content, "folder": str(self.folder), "tracking_uri": redact(self.tracking_uri)}


def pretrain(config: PretrainConfig) -> PretrainedModel:
    """Pre-train on the auxiliary domains (spec, section 5) and register the best epoch's model.

    Started again under the same name, it resumes from the last checkpoint; with `resume=MODEL` from the registered training
    state, in the same MLflow run; with `continue=MODEL` it begins a new run with weights and optimizer state of another
    (`antdist.runs.continuing`).

    Raises:
        Preempted: SIGTERM came; the state is saved.
        UserError: what `check_pretrain` finds; another command works on this run, or it has another configuration; the loss
            diverged.
    """
    context = check_pretrain(config)
    context.report.log_notes()
    folder = context.folder
    last = folder.read_result(PretrainResult)
    diverged = last is not None and last.error is not None
    allowed: tuple[Resume, ...] = ("longer_ok", "gentler_ok") if diverged else ("longer_ok",)
    with lock_run(folder):
        record_config(folder, config, allowed)
        record = _begin_run(context)
        result = _train(context, record)
        return _register(context, record, result)


def _begin_run(context: PretrainContext) -> RunRecord:
    """Start the MLflow run or take it up, and write `run.json`."""
    config, folder, start = context.config, context.folder, context.start
    earlier = restore_record(folder, context.store)
    if (earlier.data if earlier else None) != context.recorded:
        raise UserError(
            "another command began this run after this one had opened the data",
            where=folder,
            remedy="run the command again",
        )
    record = earlier or RunRecord(run_id=start.run_id if start and config.resume else None)
    record = record.model_copy(update={"data": context.fingerprints})
    if start is not None:
        record = with_origin(record, config, start, context.domains)
    tracked = start_run(
        context.store,
        config.tracking.experiment,
        config.name,
        folder.path,
        config=config.model_dump(mode="json", by_alias=True),
        tags={**_lineage(context, record).tags(), **(record.tags or {})},
        run_id=record.run_id,
        offline_ok=config.tracking.offline_ok,
    )
    record = RunRecord(run_id=tracked.run_id, data=record.data, parent=record.parent, tags=record.tags)
    folder.write_record(record)
    tracked.finish(status=None)
    return record


def _train(context: PretrainContext, record: RunRecord) -> PretrainResult:
    """Run the workers. Raises Preempted, or the UserError that ended them."""
    config, folder = context.config, context.folder
    model = config.resume or config.parent
    settings = PretrainSettings(
        config=with_absolute_paths(config),
        store=context.store,
        data=context.fingerprints,
        state=fetch_source(model, context.start, folder) if model and context.start else None,
        parent=record.parent,
    )
    folder.result_file.unlink(missing_ok=True)
    with (
        end_failed_runs(context.store, [folder]),
        ray_session(config.ray),
        follow(folder),
        stop_file_on_sigterm(folder.stop_file),
    ):
        run_workers(pretrain_worker, settings, config.ray, config.name, config.training.hang)
    result = folder.read_result(PretrainResult)
    assert result is not None, f"workers exited without writing {folder.result_file}"
    return result


def _register(context: PretrainContext, record: RunRecord, result: PretrainResult) -> PretrainedModel:
    """End the MLflow run and register the model. Raises Preempted or UserError if the result is one."""
    config, folder, store = context.config, context.folder, context.store
    tracked = start_run(store, config.tracking.experiment, config.name, folder.path, run_id=record.run_id)
    if result.preempted:
        tracked.finish("KILLED")
        raise Preempted(result.preempted)
    if result.error is not None:
        tracked.finish("FAILED")
        raise result.error.to_error()
    run_id = resolve_run_id(store, tracked.run_id, folder.path)
    make_servable(folder.model, None)
    version = register(
        store,
        run_id,
        folder.model,
        config.tracking.registered_model or config.name,
        _lineage(context, record),
        validation=result.best,
        training_state=collect_training_state(folder),
        tags=record.tags,
    )
    tracked.finish("FINISHED")
    return PretrainedModel(
        folder=folder.path,
        model=version.uri,
        champion=version.champion,
        run_id=run_id,
        tracking_uri=store,
        finished=result.finished,
        step=steps_in(folder.checkpoints)[-1],
        history=result.history,
    )


def _lineage(context: PretrainContext, record: RunRecord) -> Lineage:
    return Lineage(context.fingerprints, parent=record.parent)


def collect_training_state(folder: RunFolder) -> Path:
    """Copy newest checkpoint, best weights and the model's card to a folder, to be registered with it."""
    state = RunFolder(folder.training_state)
    shutil.rmtree(state.path, ignore_errors=True)
    newest = checkpoint_name(steps_in(folder.checkpoints)[-1])
    shutil.copytree(folder.checkpoints / newest, state.checkpoints / newest)
    if folder.best.is_dir():
        shutil.copytree(folder.best, state.best)
    shutil.copyfile(folder.model / CARD, state.path / CARD)
    return state.path

"""`antdist pretrain`: the driver checks, starts the workers, registers what they made; the worker trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antdist.config.schema import PretrainConfig, Resume
from antdist.distributed.ray_session import ray_session, run_workers, stoppable
from antdist.errors import Preempted, UserError
from antdist.io.files import read_json
from antdist.io.logs import get_logger
from antdist.runs.checks import check_pretrain
from antdist.runs.continuing import origin_of
from antdist.runs.folder import (
    STOP,
    claimed,
    collect_training_state,
    data_begun_with,
    ending_runs,
    following,
    for_workers,
    note_tracked,
    pretrain_folder,
    take_up_tracked,
)
from antdist.runs.inputs import open_domains
from antdist.runs.parent import bring
from antdist.runs.workers.pretrain import pretrain_worker
from antdist.serving.pyfunc import make_servable
from antdist.tracking.registry import Lineage, ResolvedModel, register
from antdist.tracking.run import start_run, stored_run
from antdist.tracking.store import redact, tracking_uri

logger = get_logger(__name__)


@dataclass(frozen=True)
class Pretrained:
    """What a pre-training session ended with. `finished` is None if `training.stop_after` ended it early."""

    folder: Path
    model: str  # models:/NAME/VERSION
    champion: str  # what became of that alias, in words
    run_id: str
    tracking_uri: str
    finished: str | None
    history: list[dict[str, float]]

    def lines(self) -> list[str]:
        validated = [entry for entry in self.history if "validation/Recall@10" in entry]
        best = max(validated, key=lambda entry: entry["validation/Recall@10"], default=None)
        chosen = f", epoch {best['epoch']:.0f}, validation Recall@10 {best['validation/Recall@10']:.4f}" if best else ""
        return [
            f"registered {self.model}{chosen} ({self.champion})",
            f"run {self.run_id} in {redact(self.tracking_uri)}; files in {self.folder}",
            "ended: " + (self.finished or "stopped by training.stop_after; the same command goes on"),
        ]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "folder": str(self.folder), "tracking_uri": redact(self.tracking_uri)}


def pretrain(config: PretrainConfig) -> Pretrained:
    """Pre-train on the auxiliary domains (spec, section 5), register the best epoch's model with its training state.

    Started again under the same name, it goes on from the last checkpoint; with `resume=MODEL` it goes on from what the
    registry holds, in the MLflow run that it came from; with `continue=MODEL` it begins with weights and optimizer state of another
    run, as a run of its own (`antdist.runs.continuing`).

    Raises:
        Preempted: SIGTERM came; the state is saved.
        UserError: whatever `check_pretrain` finds; a run of this name with another configuration, or at work; a loss that
            diverged.
    """
    checked = check_pretrain(config)
    checked.log_notes()
    folder = pretrain_folder(config)
    diverged = "error" in (read_json(folder / "outcome.json") or {})
    allowed: tuple[Resume, ...] = ("longer_ok", "gentler_ok") if diverged else ("longer_ok",)
    with claimed(folder, config, allowed):
        return _pretrain(config, folder, tracking_uri(config.tracking, folder.parent), checked.start)


def _pretrain(config: PretrainConfig, folder: Path, uri: str, start: ResolvedModel | None) -> Pretrained:
    domains = open_domains(config.data, config.data.domains, "data.domains", data_begun_with(folder, config))
    known = take_up_tracked(folder, config, uri)
    origin = origin_of(config, start, domains) if start else {key: (known or {}).get(key) for key in ("parent", "tags")}
    lineage = Lineage({domain.name: domain.fingerprint for domain in domains}, parent=origin["parent"])
    resumed = start.run_id if start and config.resume else None
    tracked = start_run(
        uri,
        config.tracking.experiment,
        config.name,
        folder,
        config=config.model_dump(mode="json", by_alias=True),
        tags={**lineage.tags(), **(origin["tags"] or {})},
        run_id=known["run_id"] if known else resumed,
        offline_ok=config.tracking.offline_ok,
    )
    data = {domain.name: domain.fingerprint for domain in domains}
    note_tracked(folder, config, {"run_id": tracked.run_id, "data": data, **origin})
    tracked.finish(status=None)
    model = config.resume or config.parent
    state = bring(model, start, folder) if model and start else None
    settings = {
        "config": for_workers(config),
        "uri": uri,
        "run_id": tracked.run_id,
        "folder": str(folder),
        "state": None if state is None else str(state),
        "parent": origin["parent"],
        "data": data,
    }
    (folder / "outcome.json").unlink(missing_ok=True)
    with ending_runs(uri, [folder]), ray_session(config.ray), following(folder), stoppable(folder / STOP):
        run_workers(pretrain_worker, settings, config.ray, config.name, config.training.hang)
    outcome = read_json(folder / "outcome.json")
    assert outcome is not None, "the workers ended without a word"
    tracked = start_run(uri, config.tracking.experiment, config.name, folder, run_id=tracked.run_id)
    if outcome.get("preempted"):
        tracked.finish("KILLED")
        raise Preempted(outcome["preempted"])
    if outcome.get("error"):
        tracked.finish("FAILED")
        raise UserError(**outcome["error"])
    run_id = stored_run(uri, tracked.run_id, folder)
    make_servable(folder / "model", None)
    version = register(
        uri,
        run_id,
        folder / "model",
        config.tracking.registered_model or config.name,
        lineage,
        validation=outcome["best"],
        training_state=collect_training_state(folder),
        tags=origin["tags"],
    )
    undelivered = tracked.finish("FINISHED")
    if undelivered:
        logger.warning(f"{undelivered.records} tracking records wait in {undelivered.outbox}")
    return Pretrained(folder, version.uri, version.champion, run_id, uri, outcome["finished"], outcome["history"])

"""`antdist pretrain`: the driver checks, starts the workers, registers what they made; the worker trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antdist.config.load import check_config
from antdist.config.schema import PretrainConfig
from antdist.errors import Preempted, UserError
from antdist.files import read_json, write_json
from antdist.orchestration.cards import model_card
from antdist.orchestration.checks import check_pretrain
from antdist.orchestration.continuing import last_checkpoint, origin_of
from antdist.orchestration.inputs import Inputs, open_domains, open_inputs, rank_together
from antdist.orchestration.origins import bring, look_up
from antdist.orchestration.runs import (
    GENTLER,
    LONGER,
    STOP,
    claimed,
    collect_training_state,
    data_begun_with,
    ending_runs,
    following,
    for_workers,
    note_tracked,
    remote_of,
    take_up_tracked,
)
from antdist.orchestration.session import enter_worker, ray_session, run_workers, stoppable
from antdist.orchestration.worker import alone, best_model, check_features, learn, save_best
from antdist.progress import say
from antdist.serving.pyfunc import make_servable
from antdist.tracking.registry import Lineage, ResolvedModel, register, resolve_training_state
from antdist.tracking.run import TrackedRun, start_run, stored_run
from antdist.tracking.store import redact, tracking_uri

if TYPE_CHECKING:
    from antdist.data.domain import Domain
    from antdist.evaluation.ranking import Queries
    from antdist.model.recommender import Recommender
    from antdist.training.loop import Metrics
    from antdist.training.world import World


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
    run, as a run of its own (`antdist.orchestration.continuing`).

    Raises:
        Preempted: SIGTERM came; the state is saved.
        UserError: whatever `check_pretrain` finds; a run of this name with another configuration, or at work; a loss that
            diverged.
    """
    checked = check_pretrain(config)
    checked.say_notes()
    folder = run_folder(config)
    diverged = "error" in (read_json(folder / "outcome.json") or {})
    with claimed(folder, config, LONGER | GENTLER if diverged else LONGER):
        return _pretrain(config, folder, tracking_uri(config.tracking, folder.parent), checked.start)


def run_folder(config: PretrainConfig) -> Path:
    return Path(config.ray.storage).resolve() / config.name


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
        say(f"{undelivered.records} tracking records wait in {undelivered.outbox}")
    return Pretrained(folder, version.uri, version.champion, run_id, uri, outcome["finished"], outcome["history"])


def pretrain_worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker of a pre-training run."""
    config = check_config(PretrainConfig, settings["config"])
    enter_worker(config.ray.cpus_per_worker)

    from antdist.training.loop import Diverged
    from antdist.training.world import current_world

    world, folder = current_world(), Path(settings["folder"])
    with alone(world, folder):
        tracked = None
        if world.leader:
            tracked = TrackedRun(settings["uri"], settings["run_id"], folder, resumed=True)
        try:
            outcome = _train(config, world, folder, tracked, settings["data"], settings["state"], settings["parent"])
        except Preempted as preempted:
            outcome = {"preempted": str(preempted)}
        except Diverged as error:  # on all ranks alike: a restart by Ray would only repeat it
            outcome = {"error": {"what": error.what, "where": error.where, "remedy": error.remedy}}
        finally:
            if tracked is not None:
                tracked.finish(status=None)
        if world.leader:
            write_json(folder / "outcome.json", outcome)


def _train(
    config: PretrainConfig,
    world: World,
    folder: Path,
    tracked: TrackedRun | None,
    data: dict[str, str] | None = None,
    state: str | None = None,
    parent: str | None = None,
) -> dict[str, Any]:
    from antdist.model.recommender import build_recommender, centre
    from antdist.training.loop import beginning_with

    inputs = pretrain_inputs(config, data)
    check_features(inputs.catalogue)
    model = build_recommender(config.model, inputs.catalogue.dims, seed=config.seed)
    if config.model.initial_shift == "mean":
        centre(model, inputs.catalogue.means())
    evaluate = _evaluator(config, inputs, world)
    start = last_checkpoint(Path(state)) if state is not None and world.leader else None
    if start is not None and config.parent is not None:
        start = beginning_with(start, inputs.stream)
    progress = learn(
        model,
        inputs,
        loss=config.loss,
        training=config.training,
        world=world,
        folder=folder,
        seed=config.seed,
        name=config.name,
        evaluate=evaluate,
        tracked=tracked,
        start=start,
        remote=remote_of(folder, config.ray) if world.leader else None,
        profile=config.profile,
    )
    best = best_model(model, folder, progress, world)
    card = model_card(
        "pretrained",
        config.model,
        inputs,
        seed=config.seed,
        domains=[domain.name for domain in inputs.domains],
        made={
            "name": config.name,
            "fingerprints": {domain.name: domain.fingerprint for domain in inputs.domains},
            **({"parent": parent} if parent else {}),
            "epoch": progress.best_epoch,
            "validation Recall@10": progress.best,
        },
    )
    save_best(best, folder / "model", card, world)
    return {"finished": progress.finished, "best": progress.best, "history": progress.history}


def pretrain_inputs(config: PretrainConfig, begun_with: dict[str, str] | None = None) -> Inputs:
    """Domains, features and stream of a pre-training run, with the data that it has `begun_with` (`open_domains`). Raises
    UserError where any does not fit."""
    from antdist.features.table import Catalogue

    domains = open_domains(config.data, config.data.domains, "data.domains", begun_with)
    catalogue = Catalogue(domains, config.model.modalities, config.data.feature_dtype)
    return open_inputs(
        domains,
        catalogue,
        config.stream,
        max_length=config.model.max_length,
        seed=config.seed,
        workers=config.ray.workers,
        accumulation=config.training.accumulation,
    )


def find_state(config: PretrainConfig, uri: str, tell: Callable[[str], None]) -> ResolvedModel | None:
    """The training state that `resume` or `continue` names; None without one, and where the run has checkpoints of its own, as
    after a restart.

    Raises:
        UserError: as `look_up`; a state without a whole checkpoint.
    """
    from antdist.training.checkpoint import steps_in

    folder, model = run_folder(config), config.resume or config.parent
    if model is None:
        return None
    if steps_in(folder / "checkpoints"):
        tell(f"{config.name} has checkpoints of its own in {folder}, so {model} is not read")
        return None
    state = look_up(model, uri, folder, resolve_training_state, offline_ok=config.tracking.offline_ok, tell=tell)
    last_checkpoint(state.folder)
    return state


def _evaluator(config: PretrainConfig, inputs: Inputs, world: World) -> Any:
    """Full ranking of each domain's validation users; the mean over domains chooses. A rank holds the histories of its own
    share of them alone."""
    from antdist.evaluation.metrics import METRICS, summary

    mine = [_own_queries(config, domain, world) for domain in inputs.domains]

    def evaluate(model: Recommender) -> Metrics:
        found = {
            domain.name: summary(rank_together(model, inputs.catalogue, index, mine[index], world))
            for index, domain in enumerate(inputs.domains)
        }
        means = {m: sum(metrics[m] for metrics in found.values()) / len(found) for m in METRICS}
        return means | {f"{name}/Recall@10": metrics["Recall@10"] for name, metrics in found.items()}

    return evaluate


def _own_queries(config: PretrainConfig, domain: Domain, world: World) -> Queries:
    """A rank's share of a domain's validation: a run of the users that are asked, so that it reads few shards."""
    from antdist.data.deal import share
    from antdist.evaluation.ranking import drawn_users, validation_queries

    asked = drawn_users(domain.manifest.users, config.training.validation_users, config.seed)
    users = asked[slice(*share(len(asked), world.rank, world.size))]
    return replace(validation_queries(domain.histories(users), config.model.max_length), users=users)

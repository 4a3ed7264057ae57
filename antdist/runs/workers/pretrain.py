"""What a worker of `antdist pretrain` does: train, validate, write the best model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antdist.config.load import check_config
from antdist.config.schema import PretrainConfig
from antdist.distributed.ray_session import enter_worker
from antdist.errors import Preempted
from antdist.io.files import write_json
from antdist.runs.cards import model_card
from antdist.runs.folder import remote_of
from antdist.runs.inputs import Inputs, pretrain_inputs, rank_together
from antdist.runs.parent import last_checkpoint
from antdist.runs.workers.common import alone, best_model, check_features, learn, save_best
from antdist.tracking.run import TrackedRun

if TYPE_CHECKING:
    from antdist.data.domain import Domain
    from antdist.distributed.world import World
    from antdist.evaluation.ranking import Queries
    from antdist.model.recommender import Recommender
    from antdist.training.trainer import Metrics


def pretrain_worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker of a pre-training run."""
    config = check_config(PretrainConfig, settings["config"])
    enter_worker(config.ray.cpus_per_worker)

    from antdist.distributed.world import current_world
    from antdist.training.trainer import Diverged

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
    from antdist.model.initialisation import centre_tower
    from antdist.model.recommender import build_recommender
    from antdist.training.trainer import beginning_with

    inputs = pretrain_inputs(config, data)
    check_features(inputs.catalogue)
    model = build_recommender(config.model, inputs.catalogue.dims, seed=config.seed)
    if config.model.initial_shift == "mean":
        centre_tower(model.tower, inputs.catalogue.means())
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
    from antdist.data.stream.shard_batch import partition_rows
    from antdist.evaluation.ranking import drawn_users, validation_queries

    asked = drawn_users(domain.manifest.users, config.training.validation_users, config.seed)
    users = asked[slice(*partition_rows(len(asked), world.rank, world.size))]
    return replace(validation_queries(domain.histories(users), config.model.max_length), users=users)

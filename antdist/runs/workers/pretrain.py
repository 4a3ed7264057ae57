"""What a worker of `antdist pretrain` does: train, validate, write the best model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from antdist.config.schema import PretrainConfig
from antdist.data.domain import Domain
from antdist.data.stream.shard_batch import partition_rows
from antdist.distributed.ray_session import set_up_worker
from antdist.distributed.world import World, current_world
from antdist.errors import Preempted
from antdist.evaluation.metrics import METRICS, summary
from antdist.evaluation.ranking import Queries, draw_users, validation_queries
from antdist.model.initialisation import centre_tower
from antdist.model.recommender import Recommender, build_recommender
from antdist.runs.cards import model_card
from antdist.runs.folder import RunFolder, run_folder
from antdist.runs.inputs import Inputs, open_pretrain_inputs, rank_together
from antdist.runs.parent import last_checkpoint
from antdist.runs.records import PretrainResult
from antdist.runs.workers.common import best_model, check_features, lead_if_leader, learn, save_best, track_result
from antdist.tracking.run import TrackedRun
from antdist.training.progress import Metrics
from antdist.training.resuming import restart_from


@dataclass(frozen=True)
class PretrainSettings:
    """What the driver passes to the workers of a pre-training.

    Args:
        config: with absolute paths.
        store: the tracking store's URI.
        data: the fingerprint of each domain that the run began with.
        state: the folder of the training state to begin with, for a run without checkpoints.
        parent: the URI of the model that the run continues.
    """

    config: PretrainConfig = field(repr=False)  # it and `store` may hold a password
    store: str = field(repr=False)
    data: Mapping[str, str] = field(default_factory=dict)
    state: Path | None = None
    parent: str | None = None


def pretrain_worker(settings: PretrainSettings) -> None:
    """Run one Ray Train worker of a pre-training."""
    set_up_worker(settings.config.ray.cpus_per_worker)
    world, folder = current_world(), run_folder(settings.config)

    def work(tracked: TrackedRun | None) -> PretrainResult:
        return train_model(settings, world, folder, tracked)

    with lead_if_leader(world, folder):
        try:
            track_result(folder, settings.store, world, work, PretrainResult, ends_run=False)
        except Preempted as preempted:
            if world.leader:
                PretrainResult(preempted=str(preempted)).write(folder.result_file)


def train_model(
    settings: PretrainSettings, world: World, folder: RunFolder, tracked: TrackedRun | None
) -> PretrainResult:
    """Train and write the best model to `folder`."""
    config = settings.config
    inputs, _ = open_pretrain_inputs(config, settings.data)
    check_features(inputs.catalogue)
    model = build_recommender(config.model, inputs.catalogue.dims, seed=config.seed)
    if config.model.initial_shift == "mean":
        centre_tower(model.tower, inputs.catalogue.means())
    start = last_checkpoint(settings.state) if settings.state is not None and world.leader else None
    if start is not None and config.parent is not None:
        start = restart_from(start, inputs.stream)
    progress = learn(
        model,
        inputs,
        config,
        world=world,
        folder=folder,
        seed=config.seed,
        name=config.name,
        evaluate=make_evaluator(config, inputs, world),
        tracked=tracked,
        start=start,
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
            **({"parent": settings.parent} if settings.parent else {}),
            "epoch": progress.best_epoch,
            "validation Recall@10": progress.best,
        },
    )
    save_best(best, folder, card, world)
    return PretrainResult(finished=progress.finished, best=progress.best, history=progress.history)


def make_evaluator(config: PretrainConfig, inputs: Inputs, world: World) -> Callable[[Recommender], Metrics]:
    """Make the full ranking of the validation users, whose mean over domains selects the best epoch.

    A rank holds only the histories of its own share of the users.
    """
    mine = [rank_queries(config, domain, world) for domain in inputs.domains]

    def evaluate(model: Recommender) -> Metrics:
        found = {
            domain.name: summary(rank_together(model, inputs.catalogue, index, mine[index], world))
            for index, domain in enumerate(inputs.domains)
        }
        means = {m: sum(metrics[m] for metrics in found.values()) / len(found) for m in METRICS}
        return means | {f"{name}/Recall@10": metrics["Recall@10"] for name, metrics in found.items()}

    return evaluate


def rank_queries(config: PretrainConfig, domain: Domain, world: World) -> Queries:
    """A rank's share of a domain's validation queries: consecutive users, so that it reads few shards."""
    drawn = draw_users(domain.manifest.users, config.training.validation_users, config.seed)
    users = drawn[slice(*partition_rows(len(drawn), world.rank, world.size))]
    return replace(validation_queries(domain.histories(users), config.model.max_length), users=users)

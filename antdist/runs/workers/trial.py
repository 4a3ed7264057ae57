"""What a worker of `antdist relearn` does: train the unfinished trials one after the other."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

from antdist.config.schema import RelearnConfig
from antdist.data.domain import Sequences, rewind_domain
from antdist.distributed.ray_session import set_up_worker
from antdist.distributed.world import World, agree, current_world
from antdist.errors import Preempted, UserError
from antdist.evaluation.metrics import summary
from antdist.evaluation.ranking import test_queries, validation_queries
from antdist.evaluation.results import Run, RunKey, budget_digest, save_ranks
from antdist.model.recommender import Recommender
from antdist.runs.cards import model_card
from antdist.runs.folder import RunFolder
from antdist.runs.inputs import Inputs, Target, open_target, rank_together
from antdist.runs.locks import lock_leader
from antdist.runs.parent import load_parent
from antdist.runs.records import Preemption, TrialResult
from antdist.runs.trials import SPLITS, Trial, trials_of
from antdist.runs.workers.common import best_model, check_features, lead_if_leader, learn, save_best, track_result
from antdist.tracking.resolve import ResolvedModel
from antdist.tracking.run import TrackedRun
from antdist.training.adaptation import adapt
from antdist.training.progress import Metrics


@dataclass(frozen=True)
class AdaptSettings:
    """What the driver passes to the workers of an adaptation.

    Args:
        config: with absolute paths.
        store: the tracking store's URI.
        control: the folder that the driver follows: the run's, or that of the one trial it trains.
        parent: the pre-trained model, as copied to the run's folder.
        fingerprint: of the target as the driver opened it, for which the result will be registered.
    """

    config: RelearnConfig = field(repr=False)
    store: str = field(repr=False)
    control: RunFolder
    parent: ResolvedModel | None
    fingerprint: str


def adapt_worker(settings: AdaptSettings) -> None:
    """Run one Ray Train worker: all trials of the call that are not finished, one after the other."""
    set_up_worker(settings.config.ray.cpus_per_worker)
    world = current_world()
    with lead_if_leader(world, settings.control):
        target: Target | None = None
        for trial in trials_of(settings.config):
            if agree(world, trial.folder.result_file.is_file()):
                continue
            target = target or open_inputs(settings)
            try:
                run_trial(settings, target, trial, world)
            except Preempted as preempted:
                if world.leader:
                    Preemption(preempted=str(preempted)).write(settings.control.preemption_file)
                return


def open_inputs(settings: AdaptSettings) -> Target:
    """Open the target as the driver did, and load the parent, once a worker. Raises UserError if the target was replaced."""
    domain = rewind_domain(open_target(settings.config), settings.fingerprint)
    if domain.fingerprint != settings.fingerprint:
        raise UserError(
            f"the domain was prepared anew since the command started (fingerprint {domain.fingerprint[:12]}, "
            f"was {settings.fingerprint[:12]})",
            where=domain.folder,
            remedy="run the command again under another name=...",
        )
    return Target(settings.config, domain, load_parent(settings.parent))


def run_trial(settings: AdaptSettings, target: Target, trial: Trial, world: World) -> None:
    """Train a trial and write its result."""

    def work(tracked: TrackedRun | None) -> TrialResult | None:
        return train_trial(settings, target, trial, world, tracked)

    # by the folders themselves, as a path may lead through other links on this node than on the driver's
    locks_trial = world.leader and not trial.folder.path.samefile(settings.control.path)
    with lock_leader(trial.folder) if locks_trial else contextlib.nullcontext():
        track_result(trial.folder, settings.store, world, work, TrialResult, ends_run=True)


def train_trial(
    settings: AdaptSettings, target: Target, trial: Trial, world: World, tracked: TrackedRun | None
) -> TrialResult | None:
    """Train a trial, rank all users with its best epoch, write its model; None if it was stopped early."""
    config, parent = settings.config, target.parent
    inputs = target.inputs(trial.strategy, trial.seed)
    check_features(inputs.catalogue)
    model = adapt(
        trial.strategy,
        config.model,
        inputs.catalogue.dims,
        parent=parent.model if parent else None,
        variants=config.variants,
        catalogue_size=inputs.catalogue.size if config.model.item_embeddings else None,
        means=inputs.catalogue.means() if config.model.initial_shift == "mean" else None,
        seed=trial.seed,
    )
    sequences, limit = target.domain.sequences(), config.training.validation_users
    queries = validation_queries(sequences, config.model.max_length, limit=limit, seed=0)
    mine = queries.shard(world.rank, world.size)

    def evaluate(candidate: Recommender) -> Metrics:
        found = summary(rank_together(candidate, inputs.catalogue, 0, mine, world))
        return {name: value for name, value in found.items() if "@" in name}

    progress = learn(
        model,
        inputs,
        config,
        world=world,
        folder=trial.folder,
        seed=trial.seed,
        name=f"{trial.target} {trial.strategy} seed {trial.seed}",
        evaluate=evaluate,
        tracked=tracked,
        control=settings.control,
    )
    if progress.finished is None:
        return None
    best = best_model(model, trial.folder, progress, world)
    metrics = _rank_all(best, inputs, sequences, target, trial, world)
    if tracked is not None:
        tracked.log({f"best/{s}/{name}": value for s in SPLITS for name, value in metrics[s].items()}, progress.step)
    result = TrialResult(epoch=progress.best_epoch, epochs=progress.epoch, finished=progress.finished, **metrics)
    origin = {"parent": parent.uri if parent else None, "fingerprint": target.domain.fingerprint}
    card = model_card(
        "adapted",
        config.model,
        inputs,
        seed=trial.seed,
        domains=parent.card.domains if parent else [],
        made={**result.to_json(), **origin},
        target=trial.target,
        strategy=trial.strategy,
    )
    save_best(best, trial.folder, card, world)
    return result


def _rank_all(
    model: Recommender, inputs: Inputs, sequences: Sequences, target: Target, trial: Trial, world: World
) -> dict[str, Any]:
    """Rank all users' validation and test targets; write the ranks, return both metrics. Collective."""
    metrics: dict[str, Any] = {}
    for split, queries_of in zip(SPLITS, (validation_queries, test_queries), strict=True):
        mine = queries_of(sequences, target.config.model.max_length).shard(world.rank, world.size)
        ranks = rank_together(model, inputs.catalogue, 0, mine, world)
        metrics[split] = summary(ranks)
        if world.leader:
            save_ranks(trial.folder.ranks_file(split), Run(_run_key(target, inputs, trial, split), [ranks]))
    return metrics


def _run_key(target: Target, inputs: Inputs, trial: Trial, split: Any) -> RunKey:
    """What a trial's result may be compared with: same target, encoders and budget.

    Features that the target lacks do not count, as they are zero for every strategy.
    """
    identities = inputs.catalogue.identities
    return RunKey(
        target=target.domain.name,
        manifest=target.domain.fingerprint,
        features={m: identities[m] for m in target.modalities if m in identities},
        seeds=(trial.seed,),
        epochs=target.config.training.epochs,
        budget=budget_digest(target.config),
        split=split,
    )

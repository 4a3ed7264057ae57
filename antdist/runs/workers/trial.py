"""What a worker of `antdist relearn` does: train the trials that are not finished, one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antdist.config.load import check_config
from antdist.config.schema import RelearnConfig, Strategy
from antdist.distributed.ray_session import enter_worker
from antdist.errors import Preempted, UserError
from antdist.io.files import read_json, write_json
from antdist.runs.cards import model_card
from antdist.runs.folder import led, note_tracked, remote_of, take_up_tracked
from antdist.runs.inputs import Inputs, available, rank_together, relearn_inputs
from antdist.runs.parent import Parent, open_parent
from antdist.runs.trials import SPLITS, trial_folder, trials_of
from antdist.runs.workers.common import alone, best_model, check_features, learn, save_best
from antdist.tracking.registry import Lineage, ResolvedModel
from antdist.tracking.run import TrackedRun, check_known, start_run

if TYPE_CHECKING:
    from antdist.distributed.world import World
    from antdist.evaluation.results import RunKey
    from antdist.model.recommender import Recommender
    from antdist.training.trainer import Metrics


def lineage_of(config: RelearnConfig, fingerprint: str, strategy: Strategy, parent: str | None) -> Lineage:
    from antdist.training.adaptation import needs_parent

    assert config.target is not None
    inherited = parent if needs_parent(strategy) else None
    return Lineage({config.target: fingerprint}, target=config.target, strategy=strategy, parent=inherited)


def _open_trial(config: RelearnConfig, strategy: Strategy, seed: int, folder: Path, uri: str, lineage: Lineage) -> None:
    """A trial's folder and MLflow run, kept over restarts."""
    mine = trial_folder(folder, strategy, seed)
    mine.mkdir(parents=True, exist_ok=True)
    known = take_up_tracked(mine, config, uri)
    refuse_other_origin(mine, known, lineage)
    if known is not None and known["run_id"] is not None:
        note_tracked(mine, config, known)  # to a copy that is new
        if not (mine / "outcome.json").is_file():
            check_known(uri, known["run_id"])
        return
    shown = {**config.model_dump(mode="json", by_alias=True), "strategy": strategy, "seeds": [seed]}
    name = f"{config.name}-{config.target}-{strategy}-seed{seed}"
    tags = {**lineage.tags(), "seed": str(seed)}
    tracked = start_run(
        uri, config.tracking.experiment, name, mine, config=shown, tags=tags, offline_ok=config.tracking.offline_ok
    )
    tracked.finish(status=None)
    note_tracked(mine, config, {"run_id": tracked.run_id, "parent": lineage.parent})


def refuse_other_origin(trial: Path, known: Mapping[str, Any] | None, lineage: Lineage) -> None:
    """Raises UserError if a trial, of which `run.json` tells what is `known`, began with another parent, or if the target was
    prepared anew since it ended: its result is not one on these data."""
    from antdist.evaluation.results import load_ranks

    if known is not None and known["parent"] != lineage.parent:
        raise UserError(
            f"this trial started from {known['parent']}, not from {lineage.parent}",
            where=trial,
            remedy="choose another name=..., name that parent, or remove the folder",
        )
    if not (trial / "validation.npz").is_file():
        return
    key = load_ranks(trial / "validation.npz").key
    if lineage.fingerprints != {key.target: key.manifest}:
        raise UserError(
            f"this trial ended on other data of {key.target} (fingerprint {key.manifest[:12]})",
            where=trial,
            remedy="choose another name=..., or remove the folder to train it on those that are there",
        )


def relearn_worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker: all trials of the call that are not finished, one after the other."""
    config = check_config(RelearnConfig, settings["config"])
    enter_worker(config.ray.cpus_per_worker)

    from antdist.distributed.world import agree, current_world

    world, folder, desk = current_world(), Path(settings["folder"]), Path(settings["desk"])
    told = settings["parent"]
    parent = open_parent(None if told is None else ResolvedModel(Path(told["folder"]), told["uri"]))
    with alone(world, desk):
        for strategy, seed in trials_of(config):
            mine = trial_folder(folder, strategy, seed)
            if agree(world, (mine / "outcome.json").is_file()):
                continue
            try:
                with led(mine) if world.leader and mine != desk else contextlib.nullcontext():
                    _run_trial(config, strategy, seed, mine, desk, parent, world, settings["uri"])
            except Preempted as preempted:
                if world.leader:
                    write_json(desk / "preempted.json", {"preempted": str(preempted)})
                return


def _run_trial(
    config: RelearnConfig,
    strategy: Strategy,
    seed: int,
    folder: Path,
    desk: Path,
    parent: Parent | None,
    world: World,
    uri: str,
) -> None:
    from antdist.training.trainer import Diverged

    tracked = None
    if world.leader:
        run_id = (read_json(folder / "run.json") or {})["run_id"]
        tracked = TrackedRun(uri, run_id, folder, resumed=True)
    outcome, status = None, "FAILED"
    try:
        outcome = _train_trial(config, strategy, seed, folder, desk, parent, world, tracked)
        status = "FINISHED" if outcome is not None else "KILLED"
    except Preempted:
        status = "KILLED"
        raise
    except Diverged as error:  # on all ranks alike: a restart by Ray would only repeat it
        outcome = {"error": {"what": error.what, "where": error.where, "remedy": error.remedy}}
    finally:
        if tracked is not None:
            tracked.finish(status)
    if world.leader and outcome is not None:
        write_json(folder / "outcome.json", outcome)


def _train_trial(
    config: RelearnConfig,
    strategy: Strategy,
    seed: int,
    folder: Path,
    desk: Path,
    parent: Parent | None,
    world: World,
    tracked: Any,
) -> dict[str, Any] | None:
    from antdist.evaluation import ranking
    from antdist.evaluation.metrics import summary
    from antdist.evaluation.results import Run, save_ranks
    from antdist.training.adaptation import adapt

    # the order of examples, the noise and the fresh weights are all of the trial's seed
    inputs = relearn_inputs(config.model_copy(update={"seeds": [seed]}), strategy, parent)
    check_features(inputs.catalogue)
    model = adapt(
        strategy,
        config.model,
        inputs.catalogue.dims,
        parent=parent.model if parent else None,
        variants=config.variants,
        catalogue_size=inputs.catalogue.size if config.model.item_embeddings else None,
        means=inputs.catalogue.means() if config.model.initial_shift == "mean" else None,
        seed=seed,
    )
    sequences, longest = inputs.domains[0].sequences(), config.model.max_length
    watched = ranking.validation_queries(sequences, longest, limit=config.training.validation_users, seed=0)
    my_watched = watched.shard(world.rank, world.size)

    def evaluate(candidate: Recommender) -> Metrics:
        found = summary(rank_together(candidate, inputs.catalogue, 0, my_watched, world))
        return {name: value for name, value in found.items() if "@" in name}

    progress = learn(
        model,
        inputs,
        loss=config.loss,
        training=config.training,
        world=world,
        folder=folder,
        seed=seed,
        name=f"{config.target} {strategy} seed {seed}",
        evaluate=evaluate,
        tracked=tracked,
        log_folder=desk,
        remote=remote_of(folder, config.ray) if world.leader else None,
        profile=config.profile,
    )
    if progress.finished is None:
        return None
    best = best_model(model, folder, progress, world)
    queries = {
        "validation": ranking.validation_queries(sequences, longest),
        "test": ranking.test_queries(sequences, longest),
    }
    outcome: dict[str, Any] = {"epoch": progress.best_epoch, "epochs": progress.epoch, "finished": progress.finished}
    for split in SPLITS:
        ranks = rank_together(best, inputs.catalogue, 0, queries[split].shard(world.rank, world.size), world)
        outcome[split] = summary(ranks)
        if world.leader:
            save_ranks(folder / f"{split}.npz", Run(_key(config, inputs, seed, split), [ranks]))
    if tracked is not None:
        tracked.log({f"best/{s}/{name}": value for s in SPLITS for name, value in outcome[s].items()}, progress.step)
    origin = {"parent": parent.uri if parent else None, "fingerprint": inputs.domains[0].fingerprint}
    card = model_card(
        "adapted",
        config.model,
        inputs,
        seed=seed,
        domains=parent.card.domains if parent else [],
        made={**outcome, **origin},
        target=config.target,
        strategy=strategy,
    )
    save_best(best, folder / "model", card, world)
    return outcome


def _key(config: RelearnConfig, inputs: Inputs, seed: int, split: Any) -> RunKey:
    """What a trial's result may be compared with: same target, encoders, budget; features that the target lacks do not
    count, as they are zero for every strategy."""
    from antdist.evaluation.results import RunKey, budget_digest

    domain = inputs.domains[0]
    present = available(config, domain)
    return RunKey(
        target=domain.name,
        manifest=domain.fingerprint,
        features={m: inputs.catalogue.identities[m] for m in present if m in inputs.catalogue.identities},
        seeds=(seed,),
        epochs=config.training.epochs,
        budget=budget_digest(config),
        split=split,
    )

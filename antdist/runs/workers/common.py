"""What a training worker does, pre-training and re-learning alike: engine, job, curves to MLflow, the best weights as a model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antdist.config.schema import LossConfig, TrainingConfig
from antdist.distributed.ray_session import node_is_going
from antdist.errors import UserError
from antdist.runs.folder import STOP, leading, show_live
from antdist.runs.inputs import Inputs

if TYPE_CHECKING:
    from antdist.distributed.world import World
    from antdist.features.table import Catalogue
    from antdist.model.io import ModelCard
    from antdist.model.recommender import Recommender
    from antdist.tracking.run import TrackedRun
    from antdist.training.checkpoints.local import Checkpoint
    from antdist.training.checkpoints.remote import Remote
    from antdist.training.engines.plain import Engine
    from antdist.training.trainer import Asked, Metrics, Progress


def make_engine(model: Recommender, config: TrainingConfig, world: World) -> Engine:
    """The engine that the configuration names."""
    if config.engine == "plain":
        from antdist.training.engines.plain import PlainEngine

        return PlainEngine(model, config, world)
    from antdist.training.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, config, world)


def learn(
    model: Recommender,
    inputs: Inputs,
    *,
    loss: LossConfig,
    training: TrainingConfig,
    world: World,
    folder: Path,
    seed: int,
    name: str,
    evaluate: Callable[[Recommender], Metrics],
    tracked: TrackedRun | None,
    start: Checkpoint | None = None,
    remote: Remote | None = None,
    log_folder: Path | None = None,
    profile: bool = False,
) -> Progress:
    """Train `model` in `folder`; `evaluate` gives the validation metrics of a whole model, on all ranks together. The
    driver follows `log_folder` (default: `folder`)."""
    from antdist.training.feed import Feed
    from antdist.training.trainer import Job, train

    engine = make_engine(model, training, world)

    def validate() -> Metrics:
        whole: Any = engine.whole_model()
        whole.eval()
        return evaluate(whole)

    def report(metrics: Metrics, step: int) -> None:
        if tracked is not None:
            tracked.log(metrics, step)

    asked_by, saved = (log_folder or folder) / STOP, False

    def asked() -> Asked:
        nonlocal saved
        if world.leader and asked_by.exists():
            return "stop"
        if saved or not node_is_going():
            return None
        saved = True
        return "save"

    job = Job(
        engine=engine,
        feed=Feed(inputs.stream, inputs.catalogue, loss, inputs.popularity, training.accumulation, seed, world),
        config=training,
        world=world,
        folder=folder,
        seed=seed,
        validate=validate,
        report=report,
        live=lambda live: show_live(log_folder or folder, live),
        asked=asked,
        name=name,
        start=start,
        remote=remote,
        profile=profile,
    )
    progress = train(job)
    if tracked is not None and profile and (folder / "profile").is_dir():
        tracked.log_artifacts(folder / "profile", "profile")
    return progress


def check_features(catalogue: Catalogue) -> None:
    """That the feature tables on this node are those that were made: each of the node's workers reads a share of them. The
    driver has read those on its own node, some time before. Shards are checked whenever they are read.

    Raises:
        UserError: on the worker that met the damage; the others end with it.
    """
    catalogue.verify_share(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def best_model(model: Recommender, folder: Path, progress: Progress, world: World) -> Recommender:
    """A model of the same build with the weights of the best validation (before the first one: the last weights), on
    every rank. Collective. Raises UserError on all ranks if the weights are not as they were saved."""
    from antdist.distributed.world import agree
    from antdist.model.recommender import Recommender
    from antdist.training.checkpoints.local import load_best, load_latest

    weights: dict[str, Any] = {}
    failure: UserError | None = None
    try:
        if world.leader and progress.best_epoch is not None:
            weights = load_best(folder, progress.best_epoch)
        elif world.leader and (last := load_latest(folder / "checkpoints")) is not None:
            weights = last.state.weights
    except UserError as error:
        failure = error
    weights, failure = agree(world, (weights, failure))
    if failure is not None:
        raise failure
    dims = {str(modality): width for modality, width in model.dims.items()}
    best = Recommender(model.config, dims, model.catalogue_size)
    best.load_state_dict(weights)
    return best.to(world.device).eval()


def save_best(model: Recommender, folder: Path, card: ModelCard, world: World) -> None:
    """The leader writes the model's folder; the others wait."""
    from antdist.distributed.world import barrier
    from antdist.model.io import save_model

    if world.leader:
        save_model(folder, model, card)
    barrier(world)


def alone(world: World, folder: Path) -> contextlib.AbstractContextManager[None]:
    """Around a worker's work: its leader is alone at work in the run's folder, and the driver shows what it says."""
    return leading(folder) if world.leader else contextlib.nullcontext()

"""What workers of pre-training and adaptation share: training, the best model, result and MLflow run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from antdist.config.schema import PretrainConfig, RelearnConfig, TrainingConfig
from antdist.distributed.ray_session import is_node_leaving
from antdist.distributed.world import World, agree, barrier
from antdist.errors import Preempted, UserError
from antdist.features.catalogue import Catalogue
from antdist.model.io import ModelCard, save_model
from antdist.model.recommender import Recommender
from antdist.runs.folder import Result, RunFolder
from antdist.runs.follow import lead
from antdist.runs.inputs import Inputs
from antdist.runs.records import ErrorRecord
from antdist.tracking.run import TrackedRun
from antdist.training.checkpoints.local import Checkpoint, load_best, load_latest
from antdist.training.divergence import Diverged
from antdist.training.engines.base import Engine
from antdist.training.engines.plain import PlainEngine
from antdist.training.feed import Feed
from antdist.training.progress import Metrics, Progress
from antdist.training.signals import Signal
from antdist.training.trainer import Trainer


def make_engine(model: Recommender, config: TrainingConfig, world: World) -> Engine:
    """Make the engine that the configuration names."""
    if config.engine == "plain":
        return PlainEngine(model, config, world)
    from antdist.training.engines.deepspeed import DeepSpeedEngine  # heavy

    return DeepSpeedEngine(model, config, world)


def learn(
    model: Recommender,
    inputs: Inputs,
    config: PretrainConfig | RelearnConfig,
    *,
    world: World,
    folder: RunFolder,
    seed: int,
    name: str,
    evaluate: Callable[[Recommender], Metrics],
    tracked: TrackedRun | None,
    start: Checkpoint | None = None,
    control: RunFolder | None = None,
) -> Progress:
    """Train `model` in `folder`.

    Args:
        evaluate: returns the validation metrics of a full model; collective.
        control: the folder that the driver follows, and where it asks the workers to stop; default: `folder`.
    """
    training, control = config.training, control or folder
    engine = make_engine(model, training, world)

    def validate() -> Metrics:
        full: Any = engine.full_model()
        full.eval()
        return evaluate(full)

    def report(metrics: Metrics, step: int) -> None:
        if tracked is not None:
            tracked.log(metrics, step)

    trainer = Trainer(
        engine=engine,
        feed=Feed(inputs.stream, inputs.catalogue, config.loss, inputs.popularity, training.accumulation, seed, world),
        config=training,
        world=world,
        folder=folder.path,
        seed=seed,
        evaluate=validate,
        log_metrics=report,
        show_status=control.write_status,
        poll_signal=_make_poll(world, control),
        name=name,
        start=start,
        remote=folder.open_copy() if world.leader else None,
        profile=config.profile,
    )
    progress = trainer.train()
    if tracked is not None and config.profile and folder.profile.is_dir():
        tracked.log_artifacts(folder.profile, folder.profile.name)
    return progress


def _make_poll(world: World, control: RunFolder) -> Callable[[], Signal | None]:
    """Make the function that reports whether the driver asks to stop, or, once, that a node is about to be lost."""
    saved = False

    def poll() -> Signal | None:
        nonlocal saved
        if world.leader and control.stop_file.exists():
            return "stop"
        if saved or not is_node_leaving():
            return None
        saved = True
        return "save"

    return poll


def check_features(catalogue: Catalogue) -> None:
    """Check that the feature tables on this node are those that were made.

    Each of the node's workers reads a share of them. The driver has read those on its own node, some time before. Shards are
    checked whenever they are read.

    Raises:
        UserError: on the worker that finds the damage; the others end with it.
    """
    catalogue.verify_share(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def best_model(model: Recommender, folder: RunFolder, progress: Progress, world: World) -> Recommender:
    """Build the model with the best validation's weights, or else the last, on every rank. Collective.

    Raises:
        UserError: on all ranks, if the weights are not as they were saved.
    """
    weights: dict[str, Any] = {}
    failure: UserError | None = None
    try:
        if world.leader and progress.best_epoch is not None:
            weights = load_best(folder.path, progress.best_epoch)
        elif world.leader and (last := load_latest(folder.checkpoints)) is not None:
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


def save_best(model: Recommender, folder: RunFolder, card: ModelCard, world: World) -> None:
    """On the leader, write the model; the others wait."""
    if world.leader:
        save_model(folder.model, model, card)
    barrier(world)


def lead_if_leader(world: World, folder: RunFolder) -> contextlib.AbstractContextManager[None]:
    """On the leader, lock the folder and log to it (`lead`); nothing on other ranks."""
    return lead(folder) if world.leader else contextlib.nullcontext()


def track_result(
    folder: RunFolder,
    store: str,
    world: World,
    work: Callable[[TrackedRun | None], Result | None],
    kind: type[Result],
    *,
    ends_run: bool,
) -> None:
    """Run `work` with the folder's MLflow run, and write its result, or how it diverged, on the leader.

    Args:
        work: trains; returns None if it was stopped early.
        ends_run: end the MLflow run, too; else the driver does.

    Raises:
        Preempted: the workers were asked to stop.
    """
    tracked, result, status = None, None, "FAILED"
    if world.leader:
        record = folder.read_record()
        assert record is not None and record.run_id is not None, "the driver writes run.json before the workers start"
        tracked = TrackedRun(store, record.run_id, folder.path, resumed=True)
    try:
        result = work(tracked)
        status = "KILLED" if result is None else "FINISHED"
    except Preempted:
        status = "KILLED"
        raise
    except Diverged as error:  # on all ranks alike: a restart by Ray would only repeat it
        result = kind(error=ErrorRecord.of(error))
    finally:
        if tracked is not None:
            tracked.finish(status if ends_run else None)
    if world.leader and result is not None:
        result.write(folder.result_file)

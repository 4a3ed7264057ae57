"""Trainers in one plain process, for benchmarks that time steps or train to the best epoch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from antdist.batch import Batch
from antdist.config.schema import LossConfig, ModelConfig, StreamConfig, TrainingConfig
from antdist.data.domain import Domain
from antdist.data.stream.stream import Stream
from antdist.distributed.world import World
from antdist.model.ops.products import exact_products
from antdist.model.recommender import Recommender, build_recommender
from antdist.training.checkpoints.local import best_weights
from antdist.training.engines.base import Engine
from antdist.training.engines.plain import PlainEngine
from antdist.training.feed import Feed, StepInput
from antdist.training.memory import keep_freed_memory
from antdist.training.trainer import Trainer

Steps = Iterator[StepInput]
EngineOf = Callable[[nn.Module, TrainingConfig, World], Engine]


def make_trainer(
    domain: Domain,
    catalogue: Any,
    *,
    model: ModelConfig,
    loss: LossConfig,
    stream: StreamConfig,
    training: TrainingConfig,
    world: World | None = None,
    engine_of: EngineOf = PlainEngine,
) -> tuple[Trainer, Steps]:
    """Make a trainer on one domain, and an endless iterator over its steps.

    Args:
        catalogue: the items' features (`antdist.training.feed.FeatureSource`, and `dims`).
        engine_of: makes the engine.
    """
    world = world or World()
    if world.device.type == "cpu":
        keep_freed_memory()  # as `train` does; the other side of a comparison in this process profits as much
    order = Stream([domain], stream, max_length=model.max_length, seed=0)
    feed = Feed(order, catalogue, loss, domain.popularity(), training.accumulation, 0, world)
    engine = engine_of(build_recommender(model, catalogue.dims), training, world)
    engine.model.train()
    trainer = Trainer(engine, feed, training, world, Path(), 0, evaluate=dict, log_metrics=lambda metrics, step: None)
    return trainer, itertools.chain.from_iterable(feed.epoch(epoch, 0) for epoch in itertools.count())


def run_steps(trainer: Trainer, inputs: Steps, steps: int) -> tuple[int, list[Batch]]:
    """Run steps with the matrix products of `train`. Returns predictions and this rank's batches."""
    predictions, batches = 0, list[Batch]()
    with exact_products(trainer.world.device):
        for step_input in itertools.islice(inputs, steps):
            trainer.step(step_input)
            predictions += step_input.batch.predictions
            batches += [micro.batch for micro in step_input.micro_batches]
    return predictions, batches


def measure_rate(trainer: Trainer, inputs: Steps, steps: int) -> float:
    """Return predictions a second over some steps, waiting for data included."""
    start = time.perf_counter()
    predictions, _ = run_steps(trainer, inputs, steps)
    return predictions / (time.perf_counter() - start)


def train_to_best(
    model: Recommender,
    domain: Domain,
    catalogue: Any,
    *,
    loss: LossConfig,
    stream: StreamConfig,
    training: TrainingConfig,
    seed: int,
    folder: Path,
    evaluate: Callable[[], dict[str, float]],
) -> None:
    """Train a model on one domain and load the weights of its best epoch, by `evaluate`."""
    world = World()
    order = Stream([domain], stream, max_length=model.config.max_length, seed=seed)
    feed = Feed(order, catalogue, loss, domain.popularity(), training.accumulation, seed, world)
    trainer = Trainer(
        PlainEngine(model, training, world),
        feed,
        training,
        world,
        folder,
        seed,
        evaluate=evaluate,
        log_metrics=lambda metrics, step: None,
        name=folder.name,
    )
    progress = trainer.train()
    assert progress.best_epoch is not None
    model.load_state_dict(load_file(best_weights(folder, progress.best_epoch)))

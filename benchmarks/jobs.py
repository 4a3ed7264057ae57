"""Training jobs in one plain process, for benchmarks that time steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from antdist.config.schema import LossConfig, ModelConfig, StreamConfig, TrainingConfig
from antdist.data.domain import Domain
from antdist.data.stream.stream import Stream
from antdist.distributed.world import World
from antdist.model.ops.products import exact_products
from antdist.model.recommender import build_recommender
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
    """A trainer on one domain, and its steps without end.

    Args:
        catalogue: the items' features (`antdist.training.feed.FeatureSource`, and `dims`).
        engine_of: makes the engine; the plain one by default.
    """
    world = world or World()
    if world.device.type == "cpu":
        keep_freed_memory()  # as `train` does; what runs beside it in the process gains as much
    order = Stream([domain], stream, max_length=model.max_length, seed=0)
    feed = Feed(order, catalogue, loss, domain.popularity(), training.accumulation, 0, world)
    engine = engine_of(build_recommender(model, catalogue.dims), training, world)
    engine.model.train()
    trainer = Trainer(engine, feed, training, world, Path(), 0, evaluate=dict, log_metrics=lambda metrics, step: None)
    return trainer, itertools.chain.from_iterable(feed.epoch(epoch, 0) for epoch in itertools.count())


def rate(trainer: Trainer, inputs: Steps, steps: int) -> float:
    """Predictions a second over some steps as `train` runs them: in its matrix products, waiting for data included."""
    start, predictions = time.perf_counter(), 0
    with exact_products(trainer.world.device):
        for step_input in itertools.islice(inputs, steps):
            trainer.step(step_input)
            predictions += step_input.batch.predictions
    return predictions / (time.perf_counter() - start)

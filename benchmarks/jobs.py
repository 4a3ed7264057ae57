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
from antdist.training.engines.plain import Engine, PlainEngine
from antdist.training.feed import Feed, StepInput
from antdist.training.memory import keep_memory
from antdist.training.trainer import Job, train_step

Steps = Iterator[StepInput]
EngineOf = Callable[[nn.Module, TrainingConfig, World], Engine]


def make_job(
    domain: Domain,
    catalogue: Any,
    *,
    model: ModelConfig,
    loss: LossConfig,
    stream: StreamConfig,
    training: TrainingConfig,
    world: World | None = None,
    engine_of: EngineOf = PlainEngine,
) -> tuple[Job, Steps]:
    """A job on one domain, and its steps without end.

    Args:
        catalogue: the items' features (`antdist.training.feed.Features`, and `dims`).
        engine_of: makes the engine; the plain one by default.
    """
    world = world or World()
    if world.device.type == "cpu":
        keep_memory()  # as `train` does; what runs beside it in the process gains as much
    order = Stream([domain], stream, max_length=model.max_length, seed=0)
    feed = Feed(order, catalogue, loss, domain.popularity(), training.accumulation, 0, world)
    engine = engine_of(build_recommender(model, catalogue.dims), training, world)
    engine.model.train()
    job = Job(engine, feed, training, world, Path(), 0, validate=dict, report=lambda metrics, step: None)
    return job, itertools.chain.from_iterable(feed.epoch(epoch, 0) for epoch in itertools.count())


def rate(job: Job, inputs: Steps, steps: int) -> float:
    """Predictions a second over some steps as `train` runs them: in its matrix products, waiting for data included."""
    start, predictions = time.perf_counter(), 0
    with exact_products(job.world.device):
        for step_input in itertools.islice(inputs, steps):
            train_step(job, step_input)
            predictions += step_input.whole.predictions
    return predictions / (time.perf_counter() - start)

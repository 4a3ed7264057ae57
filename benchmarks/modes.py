"""Predictions a second of `prefix` against `sequence` training, steps of the two taking turns in one process.

    python -m benchmarks.modes DATA/NAME [--steps 8] [--rounds 5] [--threads 2]

Paper's sizes, text alone, full-catalogue loss, plain engine, batch of 2,048 predictions.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from antdist.config.schema import LossConfig, ModelConfig, StreamConfig, TrainingConfig
from antdist.data.domain import open_domain
from antdist.data.stream import Stream
from antdist.features.table import Catalogue
from antdist.training.adaptation import adapt
from antdist.training.engine import PlainEngine
from antdist.training.feed import Feed, StepInput
from antdist.training.loop import Job, train_step
from antdist.training.world import World


def training(folder: Path, mode: str) -> tuple[Job, Iterator[StepInput]]:
    """A job on the domain, and its steps without end."""
    domain, model, world = open_domain(folder), ModelConfig(modalities=["text"]), World()
    catalogue = Catalogue([domain], model.modalities)
    stream = Stream([domain], StreamConfig.model_validate({"mode": mode}), max_length=model.max_length, seed=0)
    feed = Feed(stream, catalogue, LossConfig(negatives="catalogue"), domain.popularity(), 1, 0, world)
    config = TrainingConfig(engine="plain")
    engine = PlainEngine(adapt("scratch", model, catalogue.dims, parent=None), config, world)
    engine.model.train()
    job = Job(engine, feed, config, world, Path(), 0, validate=dict, report=lambda metrics, step: None)
    return job, itertools.chain.from_iterable(feed.epoch(epoch, 0) for epoch in itertools.count())


def rate(job: Job, inputs: Iterator[StepInput], steps: int) -> float:
    """Predictions a second over some steps."""
    start, predictions = time.perf_counter(), 0
    for step_input in itertools.islice(inputs, steps):
        train_step(job, step_input)
        predictions += step_input.whole.predictions
    return predictions / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    jobs = {mode: training(args.domain, mode) for mode in ("sequence", "prefix")}
    for job, inputs in jobs.values():
        rate(job, inputs, 2)
    rates: dict[str, list[float]] = {mode: [] for mode in jobs}
    for _ in range(args.rounds):
        for mode, (job, inputs) in jobs.items():
            rates[mode].append(rate(job, inputs, args.steps))
    for mode, found in rates.items():
        print(f"{mode:9} {statistics.median(found):8,.0f} predictions/s (from {min(found):,.0f} to {max(found):,.0f})")
    ratios = [s / p for s, p in zip(rates["sequence"], rates["prefix"], strict=True)]
    print(f"sequence over prefix: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()

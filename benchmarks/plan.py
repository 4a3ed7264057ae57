"""Seconds and peak memory of a step at three sizes, predicted by `antdist plan` and measured.

The sizes are outside the calibration, which is taken in the same run from steps of other sizes; then each size is predicted, and measured in a fresh
process, through stream, feed and plain engine. Memory is what is resident at the peak of the steps beyond what was resident
before the model was built; no checkpoint is saved. The fastest step counts on both sides, and processor seconds are reported
as well, because the machine may be busy.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antdist.config.schema import LossConfig, ModelConfig, PretrainConfig, StreamConfig, TrainingConfig
from antdist.data.domain import Domain, open_domain
from antdist.model.ops.products import exact_products
from antdist.planning.calibration import Calibration, calibrate, fit_line
from antdist.planning.costs import MACHINES, Plan, Workload, count_popularity, make_plan, useful_operations
from antdist.training.memory import peak_bytes, reset_peak, resident_bytes
from antdist.training.trainer import Trainer
from benchmarks.processes import run_in_fresh_process
from benchmarks.report import Line, Options, Report
from benchmarks.trainers import Steps, make_trainer
from benchmarks.worlds import AUXILIARY, PAPER_DIMS, TARGET, RandomFeatures, Shape, write_world

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """A run to be planned and measured."""

    name: str
    shape: Shape
    config: PretrainConfig
    steps: int


def make_size(name: str, shape: Shape, steps: int, batch: int, model: ModelConfig, loss: LossConfig) -> Size:
    stream, training = StreamConfig(batch_size=batch), TrainingConfig(engine="plain")
    return Size(name, shape, PretrainConfig(model=model, loss=loss, stream=stream, training=training), steps)


SIZES = [
    make_size("batch 1,024", AUXILIARY, 12, 1024, ModelConfig(), LossConfig()),
    make_size("batch 6,144, d 384, 4 layers", AUXILIARY, 5, 6144, ModelConfig(dim=384, layers=4), LossConfig()),
    make_size(
        "adaptation, 4,385 items", TARGET, 8, 2048, ModelConfig(), LossConfig(negatives="catalogue", alignment=0.0)
    ),
]
SHORT = [make_size("batch 64", Shape(200, 150, 7.0), 2, 64, ModelConfig(dim=32, inner=32), LossConfig())]


def run(options: Options) -> Report:
    sizes = SHORT if options.short else SIZES
    short: tuple[Any, ...] = ((32, 64), 200, ((256, 256, 256),), ModelConfig(dim=32, inner=32))
    calibration = run_in_fresh_process(run_calibration, options.threads, *(short if options.short else ()))
    lines: list[Line] = []
    for entry in sizes:
        with tempfile.TemporaryDirectory() as folder:
            domain = write_world(Path(folder), entry.shape)
            planned = predict(entry, domain, calibration)
            found = [
                run_in_fresh_process(measure, domain.folder, entry, options.threads) for _ in range(options.repeats)
            ]
        seconds, processor, memory = ([float(column) for column in columns] for columns in zip(*found, strict=True))
        memory_planned = (planned.memory.total - planned.memory.device["pending checkpoint"]) / 1e6
        slope, least = fit_line(*((step.operations, step.processor) for step in calibration.steps))
        busy = least + slope * useful_operations(planned.step.rank, entry.config.model, PAPER_DIMS)
        lines += [
            Line(f"{entry.name}: step, predicted", [planned.step_seconds], "s"),
            Line("  measured", seconds, "s"),
            Line("  predicted over measured", [planned.step_seconds / min(seconds)], "x"),
            Line("  processor seconds, predicted", [busy], "s"),
            Line("  measured", processor, "s"),
            Line("  predicted over measured", [busy / min(processor)], "x"),
            Line("  memory, predicted", [memory_planned], "MB"),
            Line("  measured", memory, "MB"),
            Line("  predicted over measured", [memory_planned / max(memory)], "x"),
        ]
    return Report(
        "plan",
        f"a training step of the plain engine in float32, features {PAPER_DIMS}: antdist plan's prediction, from a calibration "
        "of the same run at other sizes, against the fastest of some steps and their peak memory",
        lines,
        ["calibration: " + "; ".join(" ".join(line.split()) for line in calibration.lines())],
    )


def run_calibration(threads: int, *arguments: Any) -> Calibration:
    """Calibrate in a process that has not trained: memory that it kept would hide what a step takes."""
    torch.set_num_threads(threads)
    return calibrate(*arguments)


def predict(entry: Size, domain: Domain, calibration: Calibration) -> Plan:
    """Predict from the configuration and the domain's statistics."""
    lengths = np.diff(domain.sequences().offsets).astype(np.float64)
    m = domain.manifest
    data = Workload(
        entry.name,
        m.users,
        m.items,
        m.interactions,
        lengths,
        count_popularity(domain.popularity()),
        float(sum(shard.bytes for shard in m.sequence_shards)),
        4.0 * sum(PAPER_DIMS.values()),
        PAPER_DIMS,
    )
    return make_plan(entry.config, data, 1, calibration.apply_to(MACHINES["cpu"]))


def measure(folder: Path, entry: Size, threads: int) -> tuple[float, float, float]:
    """Run the steps in this process.

    Returns:
        Seconds of the fastest step, the least processor seconds of a step, and megabytes at the peak.
    """
    torch.set_num_threads(threads)
    domain = open_domain(folder)
    features = RandomFeatures(domain.manifest.items, PAPER_DIMS)
    with exact_products(CPU):
        torch.randn(64, 64) @ torch.randn(64, 64)
    before = resident_bytes()
    reset_peak()
    config = entry.config
    trainer, inputs = make_trainer(
        domain, features, model=config.model, loss=config.loss, stream=config.stream, training=config.training
    )
    with exact_products(CPU):
        seconds, processor = zip(*itertools.islice(_time_steps(trainer, inputs), 1, entry.steps + 1), strict=True)
    return min(seconds), min(processor), (peak_bytes() - before) / 1e6


def _time_steps(trainer: Trainer, inputs: Steps) -> Iterator[tuple[float, float]]:
    """Run steps. Yields seconds, waiting for data included, and processor seconds of all threads."""
    start, busy = time.perf_counter(), time.process_time()
    for step_input in inputs:
        trainer.step(step_input)
        yield time.perf_counter() - start, time.process_time() - busy
        start, busy = time.perf_counter(), time.process_time()

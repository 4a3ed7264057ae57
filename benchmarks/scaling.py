"""Weak scaling: predictions a second of two workers over one, a thread each, the same number of predictions a worker.

Plain engine over gloo, worlds and feature sizes of the paper, all three modalities. With two workers the global batch is
twice as large; each distinct item of it is embedded by one of them and gathered. Runs of one and of two workers take turns.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from antdist.config.schema import LossConfig, ModelConfig, StreamConfig, TrainingConfig
from antdist.data.domain import open_domain
from antdist.training.world import barrier, current_world
from benchmarks.jobs import make_job, rate
from benchmarks.processes import on_ranks
from benchmarks.report import Line, Options, Report, ratio
from benchmarks.worlds import AUXILIARY, PAPER_DIMS, TARGET, RandomFeatures, Shape, write_world

JOBS = {
    "pre-training": LossConfig(negatives="in_batch"),
    "adaptation": LossConfig(negatives="catalogue", alignment=0.0),
}


def predictions_a_second(rank: int, folder: Path, loss: LossConfig, batch: int, steps: int) -> float:
    """Of all ranks together, by this rank's clock, after two steps that warm up."""
    domain, world = open_domain(folder), current_world()
    job, inputs = make_job(
        domain,
        RandomFeatures(domain.manifest.items, PAPER_DIMS),
        model=ModelConfig(),
        loss=loss,
        stream=StreamConfig(batch_size=batch * world.size),
        training=TrainingConfig(engine="plain"),
        world=world,
    )
    rate(job, inputs, 2)
    barrier(world)
    return rate(job, inputs, steps)


def run(options: Options) -> Report:
    batch, steps = (64, 1) if options.short else (2048, 8)
    shapes = {"pre-training": AUXILIARY, "adaptation": TARGET}
    if options.short:
        shapes = {"adaptation": Shape(500, 300, 7.0)}
    found: dict[tuple[str, int], list[float]] = {(name, size): [] for name in shapes for size in (1, 2)}
    with tempfile.TemporaryDirectory() as folder:
        domains = {name: write_world(Path(folder) / name, shape).folder for name, shape in shapes.items()}
        for _ in range(options.repeats):
            for (name, size), rates in found.items():
                ranks = on_ranks(size, predictions_a_second, domains[name], JOBS[name], batch, steps)
                rates.append(min(ranks))
    lines = []
    for name in shapes:
        one, two = found[name, 1], found[name, 2]
        lines += [
            Line(f"{name}, 1 worker", one, "predictions/s"),
            Line(f"{name}, 2 workers", two, "predictions/s"),
            ratio(f"{name}, 2 workers over 1", two, one),
        ]
    return Report(
        "scaling",
        f"whole training steps of the plain engine over gloo, {batch:,} predictions a worker, one thread each, paper's sizes "
        f"(d = 256, 8 experts, features {PAPER_DIMS}), sequence mode, {steps} steps: pre-training with in-batch negatives "
        "(auxiliary world), adaptation with the whole catalogue as candidates; items: "
        + ", ".join(f"{name} {shape.items:,}" for name, shape in shapes.items()),
        lines,
        [
            "two workers need two free cores: on a busy machine the ratio says more of the machine",
            "in pre-training each prediction of the larger batch has more candidates: the softmax's work grows with it",
            "in adaptation two workers embed half of the catalogue each: a worker's work shrinks",
        ],
    )

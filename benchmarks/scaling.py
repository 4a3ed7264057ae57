"""Weak scaling: two workers over one, one thread each, the same number of predictions a worker.

Measured in predictions a second and, since the work of a prediction changes with the size of the global batch, in useful
operations a second. Plain engine over gloo, worlds and feature sizes of the paper, all three modalities. With two workers the
global batch is twice as large; each distinct item of it is embedded by one of them and gathered. Runs of one and of two
workers alternate.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from antdist.config.schema import LossConfig, ModelConfig, StreamConfig, TrainingConfig
from antdist.data.domain import open_domain
from antdist.distributed.world import barrier, current_world
from benchmarks.flops import useful_flops
from benchmarks.processes import run_on_ranks
from benchmarks.report import Line, Options, Report, ratio
from benchmarks.trainers import make_trainer, run_steps
from benchmarks.worlds import AUXILIARY, PAPER_DIMS, TARGET, RandomFeatures, Shape, write_world

JOBS = {
    "pre-training": LossConfig(negatives="in_batch"),
    "adaptation": LossConfig(negatives="catalogue", alignment=0.0),
}


def measure_rates(rank: int, folder: Path, loss: LossConfig, batch: int, steps: int) -> tuple[float, float]:
    """Measure by this rank's clock, after two warm-up steps.

    Returns:
        Predictions a second of all ranks together, and the useful operations a second of this rank's matrix products
        (`benchmarks.flops.useful_flops`).
    """
    domain, world = open_domain(folder), current_world()
    trainer, inputs = make_trainer(
        domain,
        RandomFeatures(domain.manifest.items, PAPER_DIMS),
        model=ModelConfig(),
        loss=loss,
        stream=StreamConfig(batch_size=batch * world.size),
        training=TrainingConfig(engine="plain"),
        world=world,
    )
    run_steps(trainer, inputs, 2)
    barrier(world)
    start = time.perf_counter()
    predictions, batches = run_steps(trainer, inputs, steps)
    seconds = time.perf_counter() - start
    operations = sum(useful_flops(b, ModelConfig(), PAPER_DIMS, aligned=loss.alignment > 0) for b in batches)
    return predictions / seconds, operations / seconds


def run(options: Options) -> Report:
    batch, steps = (64, 1) if options.short else (2048, 8)
    shapes = {"pre-training": AUXILIARY, "adaptation": TARGET}
    if options.short:
        shapes = {"adaptation": Shape(500, 300, 7.0)}
    found: dict[tuple[str, int], list[tuple[float, float]]] = {(name, size): [] for name in shapes for size in (1, 2)}
    with tempfile.TemporaryDirectory() as folder:
        domains = {name: write_world(Path(folder) / name, shape).folder for name, shape in shapes.items()}
        for _ in range(options.repeats):
            for (name, size), measured in found.items():
                ranks = run_on_ranks(size, measure_rates, domains[name], JOBS[name], batch, steps)
                measured.append((min(speed for speed, _ in ranks), sum(operations for _, operations in ranks)))
    lines = []
    for name in shapes:
        (one, one_operations), (two, two_operations) = (
            [list(column) for column in zip(*found[name, size], strict=True)] for size in (1, 2)
        )
        lines += [
            Line(f"{name}, 1 worker", one, "predictions/s"),
            Line(f"{name}, 2 workers", two, "predictions/s"),
            ratio(f"{name}, 2 workers over 1", two, one),
            ratio(f"{name}, 2 workers over 1, useful operations a second", two_operations, one_operations),
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

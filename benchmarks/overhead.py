"""The share of a run that logging, progress, checkpoints and waiting for data take.

The same steps from the same start alternate: `antdist.training.trainer.Trainer.train` with MLflow on SQLite, the live
status for the driver, `log_every` and `checkpoint_every` at their defaults (a checkpoint an epoch), against the bare steps.
Validation costs nothing here and always finds a better model, so its weights are kept each time. Alternating runs differ by
the machine's noise, so the time between the steps of the full run, other than waiting for data, is reported too.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from antdist.config.schema import LossConfig, ModelConfig, StreamConfig, TrainingConfig
from antdist.data.domain import Domain
from antdist.model.ops.products import exact_products
from antdist.runs.folder import RunFolder
from antdist.tracking.run import start_run
from antdist.training.engines.plain import PlainEngine
from antdist.training.trainer import Trainer
from benchmarks.report import Line, Options, Report, ratio
from benchmarks.trainers import make_trainer
from benchmarks.worlds import PAPER_DIMS, TARGET, RandomFeatures, Shape, write_world

LOSS = LossConfig(negatives="catalogue", alignment=0.0)


class TimedEngine(PlainEngine):
    """An engine that sums the time of its steps, from the first forward pass to the end of the update."""

    started: float | None = None
    stepping = 0.0

    def forward(self, *args: object) -> object:
        if self.started is None:
            self.started = time.perf_counter()
        return super().forward(*args)

    def update(self, learning_rate: float) -> Tensor:
        broken = super().update(learning_rate)
        assert self.started is not None
        self.stepping += time.perf_counter() - self.started
        self.started = None
        return broken


@dataclass
class FullRun:
    """The seconds of a full run and of its steps, and the recorded shares of waiting for data."""

    total: float
    stepping: float
    waits: list[float] = field(default_factory=list)

    @property
    def wait(self) -> float:
        return sum(self.waits) / len(self.waits)


def new_trainer(domain: Domain, dims: dict[str, int], training: TrainingConfig, batch: int) -> Trainer:
    trainer, _ = make_trainer(
        domain,
        RandomFeatures(domain.manifest.items, dims),
        model=ModelConfig(),
        loss=LOSS,
        stream=StreamConfig(batch_size=batch),
        training=training,
        engine_of=TimedEngine,
    )
    return trainer


def full_run(trainer: Trainer, folder: Path) -> FullRun:
    """Train with everything around it; the MLflow run starts before the clock and is delivered within it."""
    tracked = start_run(f"sqlite:///{folder / 'mlflow.db'}", "overhead", "full", folder, config={})
    better: Iterator[int] = iter(range(1, 1 << 30))
    waits: list[float] = []

    def report(metrics: dict[str, float], step: int) -> None:
        tracked.log(metrics, step)
        waits.extend(value for name, value in metrics.items() if name == "train/data_wait")

    assert isinstance(trainer.engine, TimedEngine)
    recorded = replace(
        trainer,
        folder=folder,
        evaluate=lambda: dict.fromkeys(("Recall@10", "NDCG@10"), next(better) / 1e6),
        log_metrics=report,
        show_status=RunFolder(folder).write_status,
    )
    start = time.perf_counter()
    recorded.train()
    tracked.finish()
    return FullRun(time.perf_counter() - start, trainer.engine.stepping, waits)


def bare_run(trainer: Trainer) -> float:
    """Run only the steps, with the matrix products of `train`. Returns seconds."""
    start = time.perf_counter()
    with exact_products(trainer.world.device):
        for epoch in range(trainer.config.epochs):
            for step_input in trainer.feed.epoch(epoch, 0):
                trainer.step(step_input)
    return time.perf_counter() - start


def max_difference(one: Trainer, other: Trainer) -> float:
    """Return the largest difference between two trainers' weights: 0 if they took the same steps."""
    pairs = zip(one.engine.model.parameters(), other.engine.model.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def run(options: Options) -> Report:
    shape, dims, batch, epochs = TARGET, PAPER_DIMS, 2048, 12
    if options.short:
        shape, dims, batch, epochs = Shape(500, 300, 7.0), dict.fromkeys(PAPER_DIMS, 16), 256, 2
    training = TrainingConfig(engine="plain", epochs=epochs)
    fulls: list[FullRun] = []
    bares: list[float] = []
    differences: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        domain = write_world(Path(folder), shape)
        for repeat in range(options.repeats):
            place = Path(folder) / f"run-{repeat}"
            place.mkdir()
            full, bare = (new_trainer(domain, dims, training, batch) for _ in range(2))
            fulls.append(full_run(full, place))
            bares.append(bare_run(bare))
            differences.append(max_difference(full, bare))
        steps = full.feed.stream.steps_per_epoch
    waited = [full.wait for full in fulls]
    between = [1 - full.stepping / full.total - wait for full, wait in zip(fulls, waited, strict=True)]
    return Report(
        "overhead",
        f"{epochs} epochs of {steps} steps, batch {batch:,}, features {dims}, {shape.items:,} items as candidates, plain "
        f"engine, one thread that reads ahead: the run with MLflow on SQLite, live figures, a point every "
        f"{training.log_every} steps, a checkpoint and best weights each epoch, against the bare steps",
        [
            Line("full run", [full.total for full in fulls], "s"),
            Line("bare steps", bares, "s"),
            Line("lost, by turns", [100 * (1 - b / f.total) for b, f in zip(bares, fulls, strict=True)], "%"),
            Line("lost, time between the steps", [100 * share for share in between], "%"),
            Line("waiting for data", [100 * share for share in waited], "%"),
            ratio("full over bare", [full.total for full in fulls], bares),
        ],
        [
            f"weights after the two sides differ by at most {max(differences):.1e}: they took the same steps",
            f"checkpoints go to {os.fspath(Path(tempfile.gettempdir()))}",
        ],
    )

"""What a run loses to logging, progress and checkpoints, and to waiting for data.

The same steps from the same start, taking turns: `antdist.training.trainer.Trainer.train` with MLflow on SQLite, the live figures for
the driver, `log_every` and `checkpoint_every` at their defaults (a checkpoint an epoch), against the bare
steps. Validation costs nothing here and always finds a better model, so that its weights are kept each time. Turns differ
by the machine's noise, so the time between the steps of the full run, other than waiting for data, is told too.
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
from benchmarks.jobs import make_trainer
from benchmarks.report import Line, Options, Report, ratio
from benchmarks.worlds import PAPER_DIMS, TARGET, RandomFeatures, Shape, write_world

LOSS = LossConfig(negatives="catalogue", alignment=0.0)


class Watched(PlainEngine):
    """An engine that knows how long its steps took: from the first forward pass to the end of the update."""

    begun: float | None = None
    stepping = 0.0

    def forward(self, *args: object) -> object:
        if self.begun is None:
            self.begun = time.perf_counter()
        return super().forward(*args)

    def update(self, learning_rate: float) -> Tensor:
        broken = super().update(learning_rate)
        assert self.begun is not None
        self.stepping += time.perf_counter() - self.begun
        self.begun = None
        return broken


@dataclass
class Full:
    """What one full run took, in seconds, and the shares of time that it says it waited for data."""

    whole: float
    stepping: float
    waits: list[float] = field(default_factory=list)

    @property
    def wait(self) -> float:
        return sum(self.waits) / len(self.waits)


def new_job(domain: Domain, dims: dict[str, int], training: TrainingConfig, batch: int) -> Trainer:
    trainer, _ = make_trainer(
        domain,
        RandomFeatures(domain.manifest.items, dims),
        model=ModelConfig(),
        loss=LOSS,
        stream=StreamConfig(batch_size=batch),
        training=training,
        engine_of=Watched,
    )
    return trainer


def full_run(trainer: Trainer, folder: Path) -> Full:
    """With everything around it; the run in MLflow is begun before the clock, and delivered within it."""
    tracked = start_run(f"sqlite:///{folder / 'mlflow.db'}", "overhead", "full", folder, config={})
    better: Iterator[int] = iter(range(1, 1 << 30))
    waits: list[float] = []

    def report(metrics: dict[str, float], step: int) -> None:
        tracked.log(metrics, step)
        waits.extend(value for name, value in metrics.items() if name == "train/data_wait")

    assert isinstance(trainer.engine, Watched)
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
    return Full(time.perf_counter() - start, trainer.engine.stepping, waits)


def bare_run(trainer: Trainer) -> float:
    """Seconds of the same steps, in the matrix products that `train` uses, and nothing else."""
    start = time.perf_counter()
    with exact_products(trainer.world.device):
        for epoch in range(trainer.config.epochs):
            for step_input in trainer.feed.epoch(epoch, 0):
                trainer.step(step_input)
    return time.perf_counter() - start


def apart(one: Trainer, other: Trainer) -> float:
    """The largest difference between the weights of two jobs: 0 if they took the same steps."""
    pairs = zip(one.engine.model.parameters(), other.engine.model.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def run(options: Options) -> Report:
    shape, dims, batch, epochs = TARGET, PAPER_DIMS, 2048, 12
    if options.short:
        shape, dims, batch, epochs = Shape(500, 300, 7.0), dict.fromkeys(PAPER_DIMS, 16), 256, 2
    training = TrainingConfig(engine="plain", epochs=epochs)
    fulls: list[Full] = []
    bares: list[float] = []
    differences: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        domain = write_world(Path(folder), shape)
        for repeat in range(options.repeats):
            place = Path(folder) / f"run-{repeat}"
            place.mkdir()
            full, bare = (new_job(domain, dims, training, batch) for _ in range(2))
            fulls.append(full_run(full, place))
            bares.append(bare_run(bare))
            differences.append(apart(full, bare))
        steps = full.feed.stream.steps_per_epoch
    waited = [full.wait for full in fulls]
    between = [1 - full.stepping / full.whole - wait for full, wait in zip(fulls, waited, strict=True)]
    return Report(
        "overhead",
        f"{epochs} epochs of {steps} steps, batch {batch:,}, features {dims}, {shape.items:,} items as candidates, plain "
        f"engine, one thread that reads ahead: the run with MLflow on SQLite, live figures, a point every "
        f"{training.log_every} steps, a checkpoint and best weights each epoch, against the bare steps",
        [
            Line("full run", [full.whole for full in fulls], "s"),
            Line("bare steps", bares, "s"),
            Line("lost, by turns", [100 * (1 - b / f.whole) for b, f in zip(bares, fulls, strict=True)], "%"),
            Line("lost, time between the steps", [100 * share for share in between], "%"),
            Line("waiting for data", [100 * share for share in waited], "%"),
            ratio("full over bare", [full.whole for full in fulls], bares),
        ],
        [
            f"weights after the two sides differ by at most {max(differences):.1e}: they took the same steps",
            f"checkpoints go to {os.fspath(Path(tempfile.gettempdir()))}",
        ],
    )

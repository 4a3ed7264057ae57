"""Predictions a second of `sequence` against `prefix` training, in alternating steps of one process.

The paper's sizes, full-catalogue loss, plain engine, batches of 2,048 predictions. `--data DATA/NAME` takes a prepared
domain with text features; otherwise a world of the size of Amazon Scientific with random 384-dimensional features is
generated.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from antdist.config.schema import LossConfig, ModelConfig, StreamConfig, TrainingConfig
from antdist.data.domain import open_domain
from antdist.features.catalogue import Catalogue
from antdist.training.trainer import Trainer
from benchmarks.report import Line, Options, Report, alternate, ratio
from benchmarks.trainers import Steps, make_trainer, measure_rate
from benchmarks.worlds import TARGET, RandomFeatures, Shape, write_world


def run(options: Options) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        return _measure(options, Path(folder))


def _measure(options: Options, folder: Path) -> Report:
    model = ModelConfig(modalities=["text"])
    if options.data is not None:
        domain = open_domain(options.data)
        catalogue: Catalogue | RandomFeatures = Catalogue([domain], model.modalities)
    else:
        domain = write_world(folder, Shape(500, 300, 7.0) if options.short else TARGET)
        catalogue = RandomFeatures(domain.manifest.items, {"text": 384})
    batch, steps = (128, 1) if options.short else (2048, 8)

    def make(mode: str) -> tuple[Trainer, Steps]:
        return make_trainer(
            domain,
            catalogue,
            model=model,
            loss=LossConfig(negatives="catalogue", alignment=0.0),
            stream=StreamConfig.model_validate({"mode": mode, "batch_size": batch}),
            training=TrainingConfig(engine="plain"),
        )

    sequence, prefix = make("sequence"), make("prefix")
    rates = alternate(
        {"sequence": lambda: measure_rate(*sequence, steps), "prefix": lambda: measure_rate(*prefix, steps)},
        options.repeats,
    )
    manifest = domain.manifest
    length = manifest.interactions / manifest.users - 2
    return Report(
        "modes",
        f"whole training steps (data, forward, backward, update) at batch {batch}, text of {catalogue.dims['text']} "
        f"dimensions, d = 256, all {manifest.items:,} items as candidates: {steps} steps in sequence mode, then {steps} in "
        f"prefix mode; histories of {length:.1f} items on average",
        [
            *(Line(mode, found, "predictions/s") for mode, found in rates.items()),
            ratio("sequence over prefix", rates["sequence"], rates["prefix"]),
        ],
        [],
    )

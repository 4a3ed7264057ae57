"""Predictions a second in training: antdist's plain engine against `benchmarks.baseline`.

Steps of the two alternate. Three modalities at the paper's sizes, random features, generated histories (`benchmarks.worlds`), or those of `--data`.
In each repeat the baseline runs one step of 256 prefixes; antdist runs some steps of the default batch in `sequence` mode,
while it reads its data from shards. The peak of a matrix product, the best over several sizes, is taken in every repeat.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from antdist.config.schema import LossConfig, ModelConfig, StreamConfig, TrainingConfig
from antdist.data.domain import open_domain
from antdist.model.ops.products import exact_products
from antdist.planning.calibration import GEMM_SIZES, Sizes, measure_gemm_peak
from benchmarks.baseline import Baseline
from benchmarks.flops import padded_flops, useful_flops
from benchmarks.report import Line, Options, Report, alternate, ratio
from benchmarks.trainers import make_trainer, run_steps
from benchmarks.worlds import (
    AUXILIARY,
    LARGE_TARGET,
    PAPER_DIMS,
    TARGET,
    RandomFeatures,
    Shape,
    padded_prefixes,
    write_world,
)

CPU = torch.device("cpu")
EXAMPLES = 256  # a batch of the usual way
MODEL = ModelConfig()


@dataclass(frozen=True)
class Case:
    """One comparison. `steps` of antdist take about as long as one step of the baseline, or less."""

    name: str
    shape: Shape
    loss: LossConfig
    steps: int


CASES = [
    Case("pre-training, in-batch negatives", AUXILIARY, LossConfig(), 12),
    Case("adaptation, 4,385 items", TARGET, LossConfig(negatives="catalogue", alignment=0.0), 12),
    Case("adaptation, 26,000 items", LARGE_TARGET, LossConfig(negatives="catalogue", alignment=0.0), 4),
]
SHORT = [
    Case("pre-training, in-batch negatives", Shape(200, 150, 7.0), LossConfig(), 2),
    Case("adaptation, 150 items", Shape(200, 150, 7.0), LossConfig(negatives="catalogue", alignment=0.0), 2),
]


def run(options: Options) -> Report:
    lines: list[Line] = []
    for case in SHORT if options.short else CASES:
        lines += _compare(case, options)
    return Report(
        "throughput",
        f"training steps in float32, text {PAPER_DIMS['text']}, image {PAPER_DIMS['image']}, price {PAPER_DIMS['price']}, 8 experts, "
        f"d 256, 2 layers, length 50: antdist (plain engine, batch {StreamConfig().batch_size}, sequence mode, data read from "
        f"shards meanwhile) against the usual way (benchmarks/baseline.py, batch {EXAMPLES}, one example a prefix)",
        lines,
        [
            "Useful operations: distinct items, real tokens and pairs, forward and backward, nothing computed twice.",
            "Peak: the best float32 matrix product of the same repeat over several sizes, by the faster of MKL and oneDNN.",
        ],
    )


def _compare(case: Case, options: Options) -> list[Line]:
    with tempfile.TemporaryDirectory() as folder:
        domain = open_domain(options.data) if options.data else write_world(Path(folder), case.shape)
        features = RandomFeatures(domain.manifest.items, PAPER_DIMS)
        examples = padded_prefixes(domain, MODEL.max_length, 8 if options.short else EXAMPLES)
        stream = StreamConfig(batch_size=128 if options.short else StreamConfig().batch_size)
        trainer, inputs = make_trainer(
            domain, features, model=MODEL, loss=case.loss, stream=stream, training=TrainingConfig(engine="plain")
        )
        in_batch = case.loss.negatives == "in_batch"
        usual = _usual_step(features, examples, in_batch)
        speeds: list[float] = []

        def run_antdist() -> float:
            start = time.perf_counter()
            predictions, batches = run_steps(trainer, inputs, case.steps)
            seconds = time.perf_counter() - start
            operations = sum(useful_flops(batch, MODEL, PAPER_DIMS, aligned=in_batch) for batch in batches)
            speeds.append(operations / seconds)
            return predictions / seconds

        sizes: Sizes = ((256, 256, 256),) if options.short else GEMM_SIZES
        found = alternate({"peak": lambda: _peak(sizes), "usual": usual, "fast": run_antdist}, options.repeats)
    speeds = speeds[-options.repeats :]
    count = len(examples[2])
    usual_items = count if in_batch else domain.manifest.items
    usual_flops = padded_flops(count, MODEL.max_length, usual_items, usual_items, MODEL, PAPER_DIMS, aligned=in_batch)
    return [
        Line(f"{case.name}: antdist", found["fast"], "predictions/s"),
        Line("  the usual way", found["usual"], "predictions/s"),
        ratio("  antdist over the usual way", found["fast"], found["usual"]),
        Line("  peak of the matrix product", [peak / 1e9 for peak in found["peak"]], "GFLOP/s"),
        Line(
            "  useful operations of antdist over it",
            [100 * s / p for s, p in zip(speeds, found["peak"], strict=True)],
            "%",
        ),
        Line(
            "  operations of the usual way over it",
            [100 * rate / count * usual_flops / p for rate, p in zip(found["usual"], found["peak"], strict=True)],
            "%",
        ),
    ]


def _usual_step(
    features: RandomFeatures, examples: tuple[Tensor, Tensor, Tensor], in_batch: bool
) -> Callable[[], float]:
    """Make a work of one step of the baseline that returns its predictions a second."""
    model = Baseline(features.values)
    optimizer = torch.optim.Adam(model.parameters())
    loss_of = model.pretraining_loss if in_batch else model.adaptation_loss

    def step() -> float:
        start = time.perf_counter()
        loss_of(*examples).backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(examples[2]) / (time.perf_counter() - start)

    return step


def _peak(sizes: Sizes) -> float:
    """Measure the better of torch's default product and `exact_products`."""
    with exact_products(CPU):
        best = measure_gemm_peak(CPU, torch.float32, sizes)
    return max(best, measure_gemm_peak(CPU, torch.float32, sizes))

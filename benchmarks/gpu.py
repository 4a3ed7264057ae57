"""Training on one GPU: predictions a second, share of the peak, memory; plain and DeepSpeed.

    python -m benchmarks gpu --json gpu.json

Three modalities at the paper's sizes, random features, workload_of_size histories. The usual way is
`benchmarks.baseline`; DeepSpeed is measured if it is installed. The short form runs on a CPU too, to show that it works.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from antdist.config.schema import LossConfig, ModelConfig, StreamConfig, TrainingConfig
from antdist.data.domain import Domain
from antdist.distributed.world import World
from antdist.errors import UserError
from antdist.planning.calibration import GEMM_SIZES, Sizes, measure_gemm_peak, synchronise
from antdist.training.engines.plain import PlainEngine
from benchmarks.baseline import Baseline
from benchmarks.flops import useful_flops
from benchmarks.report import Line, Options, Report, alternate, ratio
from benchmarks.trainers import EngineOf, make_trainer, run_steps
from benchmarks.worlds import AUXILIARY, PAPER_DIMS, TARGET, RandomFeatures, Shape, padded_prefixes, write_world

MODEL = ModelConfig()
GEMM_SIZES_GPU: Sizes = (*GEMM_SIZES, (8192, 8192, 8192))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """One way of training."""

    name: str
    precision: str
    batch_size: int
    engine_of: EngineOf = PlainEngine


def run(options: Options) -> Report:
    if not torch.cuda.is_available() and not options.short:
        raise UserError("torch finds no GPU", where="gpu", remedy="run it on a machine with one; --short runs anywhere")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes: Sizes = ((256, 256, 256),) if options.short else GEMM_SIZES_GPU
    peaks = {name: measure_gemm_peak(device, dtype, sizes) for name, dtype in DTYPES.items()}
    lines = [Line(f"peak of the matrix product, {name}", [peak / 1e12], "TFLOP/s") for name, peak in peaks.items()]
    with _process_group(device):
        for adapting in (False, True):
            lines += _cases(adapting, device, peaks, options)
    return Report(
        "gpu",
        "training steps on one GPU, three modalities at the paper's sizes: the usual way (batch 256, padded, one example a "
        "prefix) against antdist (sequence mode), data read from shards meanwhile",
        lines,
        [] if importlib.util.find_spec("deepspeed") else ["DeepSpeed is not installed: not measured."],
    )


def _variants(short: bool) -> list[Variant]:
    small, large = (64, 128) if short else (2048, 16384)
    found = [
        Variant("plain, fp32", "fp32", small),
        Variant("plain, bf16", "bf16", small),
        Variant("plain, bf16, large batch", "bf16", large),
    ]
    if importlib.util.find_spec("deepspeed"):
        from antdist.training.engines.deepspeed import DeepSpeedEngine

        found.append(Variant("DeepSpeed, ZeRO 1, bf16", "bf16", small, DeepSpeedEngine))
    return found


def _cases(adapting: bool, device: torch.device, peaks: dict[str, float], options: Options) -> list[Line]:
    shape = Shape(200, 150, 7.0) if options.short else (TARGET if adapting else AUXILIARY)
    what = f"adaptation, {shape.items:,} items" if adapting else "pre-training"
    with tempfile.TemporaryDirectory() as folder:
        domain, features = write_world(Path(folder), shape), RandomFeatures(shape.items, PAPER_DIMS)
        works: dict[str, Callable[[], float | None]] = {
            "the usual way, bf16": _usual(domain, features, device, adapting, options.short)
        }
        shares: dict[str, list[float]] = {}
        memory: dict[str, list[float]] = {}
        for variant in _variants(options.short):
            shares[variant.name], memory[variant.name] = [], []
            works[variant.name] = _training(
                variant,
                domain,
                features,
                device,
                adapting,
                2 if options.short else 20,
                peaks[variant.precision],
                shares[variant.name],
                memory[variant.name],
            )
        found = alternate(works, options.repeats)
    lines = [Line(f"{what}: the usual way, bf16", found["the usual way, bf16"], "predictions/s")]
    for name in shares:
        lines += [
            Line(f"{what}: {name}", found[name], "predictions/s"),
            ratio("  over the usual way", found[name], found["the usual way, bf16"]),
            Line("  useful operations over the peak of its precision", shares[name][-options.repeats :], "%"),
        ]
        if device.type == "cuda":
            lines.append(Line("  peak memory", memory[name][-options.repeats :], "GB"))
    return lines


def _training(
    variant: Variant,
    domain: Domain,
    features: RandomFeatures,
    device: torch.device,
    adapting: bool,
    steps: int,
    peak: float,
    shares: list[float],
    memory: list[float],
) -> Callable[[], float]:
    """Make a work of some steps: returns predictions a second, appends share of peak and memory."""
    loss = LossConfig(negatives="catalogue", alignment=0.0) if adapting else LossConfig()
    trainer, inputs = make_trainer(
        domain,
        features,
        model=MODEL,
        loss=loss,
        stream=StreamConfig(batch_size=variant.batch_size),
        training=TrainingConfig.model_validate({"precision": variant.precision}),
        world=World(device=device),
        engine_of=variant.engine_of,
    )

    def measure() -> float:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronise(device)
        start = time.perf_counter()
        predictions, batches = run_steps(trainer, inputs, steps)
        synchronise(device)
        seconds = time.perf_counter() - start
        operations = sum(useful_flops(batch, MODEL, PAPER_DIMS, aligned=not adapting) for batch in batches)
        shares.append(100 * operations / seconds / peak)
        memory.append(torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0)
        return predictions / seconds

    return measure


def _usual(
    domain: Domain, features: RandomFeatures, device: torch.device, adapting: bool, short: bool
) -> Callable[[], float]:
    """Make a work of one step of the baseline, all on the device, that returns predictions a second."""
    examples = [part.to(device) for part in padded_prefixes(domain, MODEL.max_length, 8 if short else 256)]
    model = Baseline({m: v.to(device) for m, v in features.values.items()}).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    loss_of = model.adaptation_loss if adapting else model.pretraining_loss

    def step() -> float:
        synchronise(device)
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(*examples)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronise(device)
        return len(examples[2]) / (time.perf_counter() - start)

    return step


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """Create a process group of this one process, which DeepSpeed requires."""
    os.environ.setdefault("LOCAL_RANK", "0")
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()

"""Measure a machine: its peak matrix product, memory bandwidth, and training steps of two sizes.

The two steps give the share of the peak that their products reach and the fixed time of a step, from which `costs.py` predicts
the time of any step. A calibration is a JSON file that names its machine.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from antdist.config.schema import Component, LossConfig, ModelConfig, TrainingConfig
from antdist.errors import UserError
from antdist.planning.costs import (
    FLOAT,
    Machine,
    Step,
    Work,
    activations,
    count_parameters,
    estimate_lengths,
    is_aligned,
    moved_bytes,
    update_bytes,
    useful_operations,
)
from antdist.training.memory import keep_freed_memory, peak_bytes, reset_peak, resident_bytes

if TYPE_CHECKING:
    import torch

    from antdist.batch import Batch, ItemInputs

Rate = Annotated[float, Field(gt=0)]
Sizes = tuple[tuple[int, int, int], ...]
GEMM_SIZES: Sizes = ((4096, 4096, 4096), (2048, 2048, 2048), (4385, 1024, 2048), (8192, 1024, 1024))
DIMS = {"text": 768, "image": 1024, "price": 64}  # the authors' features
WARMING, TURNS = 6, 10  # steps of each size: for memory, for time
COPIED = 1 << 26  # bytes of the tensor that measures the memory's bandwidth
PAPERS = ModelConfig()
CONTAINER = Path("/sys/fs/cgroup/memory.max")
REMEASURE = "measure it again with `antdist plan --calibrate --json FILE`"


class MeasuredStep(Component):
    """The fastest of several steps of one size, and its work."""

    predictions: Annotated[int, Field(gt=0)]
    seconds: Rate
    processor: Rate  # CPU seconds of all threads: other processes affect them less
    operations: Rate
    moved: Rate
    activations: Rate  # bytes by the plan's formula
    memory: Rate  # peak bytes so far, above those before the first model


class Calibration(Component):
    """Measured fields of a `Machine`. Efficiency, fixed time, overhead and slack are fitted to `steps`."""

    device: Literal["cpu", "gpu"]
    name: str
    threads: Annotated[int, Field(gt=0)]
    precision: Literal["fp32", "bf16"]
    memory: Rate
    peak: Rate
    bandwidth: Rate
    efficiency: Annotated[float, Field(gt=0, le=1)]
    fixed: Annotated[float, Field(ge=0)]
    overhead: Annotated[float, Field(ge=0)]
    slack: Rate
    steps: list[MeasuredStep]

    def apply_to(self, machine: Machine) -> Machine:
        """Return the machine with measured figures in place of assumed ones."""
        return replace(
            machine,
            name=f"{machine.name}, calibrated on {self.name}",
            memory=self.memory,
            peak={**machine.peak, self.precision: self.peak},
            bandwidth=self.bandwidth,
            efficiency=self.efficiency,
            fixed=self.fixed,
            overhead=self.overhead,
            slack=self.slack,
        )

    def lines(self) -> list[str]:
        return [
            f"{self.name}, {self.threads} threads, {self.precision}",
            f"peak of the matrix product  {self.peak / 1e9:,.0f} GFLOP/s",
            f"bandwidth of the memory     {self.bandwidth / 1e9:,.1f} GB/s",
            *(f"a step of {s.predictions:,} predictions  {s.seconds:.3f} s" for s in self.steps),
            f"share of the peak in a step  {100 * self.efficiency:.0f} %",
            f"fixed time of a step        {1000 * self.fixed:.0f} ms",
            f"a process before it trains  {self.overhead / 1e6:.0f} MB, then {self.slack:.2f} bytes per byte of activations",
        ]

    def to_json(self) -> dict[str, Any]:
        return self.model_dump()


def read_calibration(file: Path) -> Calibration:
    """Read a calibration. Raises UserError if the file is missing, not JSON, or something else."""
    try:
        return Calibration.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError("no such file", where=file, remedy=REMEASURE) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=file) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"is not a calibration: {key or 'it'}: {first['msg'].lower()}", where=file, remedy=REMEASURE
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON ({error})", where=file, remedy=REMEASURE) from None


def fit_line(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """Return slope and intercept of the line through two points (x, y), both at least 0 in spite of noise."""
    (x, y), (wide, high) = small, large
    slope = max((high - y) / (wide - x), 0.0)
    height = high - slope * wide
    return (slope, height) if slope and height >= 0 else (high / wide, 0.0)


def calibrate(
    sizes: tuple[int, int] = (512, 2048),
    items: int = 28_800,
    gemm_sizes: Sizes = GEMM_SIZES,
    model: ModelConfig = PAPERS,
) -> Calibration:
    """Measure this machine, or its GPU if it has one, with torch's current threads.

    It takes half a minute on a few cores.

    Raises:
        UserError: not on Linux, from which the memory of a process is read.
    """
    import torch

    from antdist.model.ops.products import exact_products

    if not sys.platform.startswith("linux"):
        raise UserError("the memory of a process can be measured only on Linux", where="--calibrate")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    with exact_products(device):
        before = _begin_memory(device)
        found = _measure_steps(device, sizes, items, model, before)
        bandwidth = _bandwidth(device)
        peak = measure_gemm_peak(device, torch.bfloat16 if on_gpu else torch.float32, gemm_sizes)
    parameters = count_parameters(model, DIMS, 0)
    update = update_bytes(parameters)
    points = [(s.operations, max(s.seconds - (s.moved + update) / bandwidth, 0.05 * s.seconds)) for s in found]
    seconds_an_operation, fixed = fit_line(*points)
    slack, kept = fit_line(*((s.activations, s.memory) for s in found))
    # other processes may have lowered the measured peak
    peak = max(peak, 1 / seconds_an_operation)
    return Calibration(
        device="gpu" if on_gpu else "cpu",
        name=torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        precision="bf16" if on_gpu else "fp32",
        memory=float(torch.cuda.get_device_properties(0).total_memory if on_gpu else _host_memory()),
        peak=peak,
        bandwidth=bandwidth,
        efficiency=min(1.0, 1 / seconds_an_operation / peak),
        fixed=fixed,
        overhead=max(kept - 4 * FLOAT * parameters, 0.0),
        slack=slack,
        steps=found,
    )


def measure_gemm_peak(device: torch.device, dtype: torch.dtype, sizes: Sizes = GEMM_SIZES) -> float:
    """Return the operations per second of the fastest plain matrix product.

    It is the best of five attempts at each size.
    """
    import torch

    best = 0.0
    for rows, inner, columns in sizes:
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(inner, columns, device=device).to(dtype)
        fastest = min(measure_seconds(device, lambda a=a, b=b: a @ b) for _ in range(5))
        best = max(best, 2.0 * rows * inner * columns / fastest)
    return best


def measure_seconds(device: torch.device, work: Any) -> float:
    """Return the seconds that a call takes until its end on the device."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a pass over memory reads and writes."""
    import torch

    a = torch.ones(COPIED // 4, device=device)
    b = torch.empty_like(a)
    return 2 * COPIED / min(measure_seconds(device, lambda: torch.mul(a, 1.5, out=b)) for _ in range(8))


def _host_memory() -> int:
    """Return the bytes of the machine's memory, or of the container's limit."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = CONTAINER.read_text(encoding="ascii").strip() if CONTAINER.is_file() else "max"
    return whole if allowed == "max" else min(whole, int(allowed))


def count_step(batch: Batch, loss: LossConfig, model: ModelConfig, dims: dict[str, int]) -> Step:
    """Count the work of a rank's batch."""
    lengths = batch.offsets.diff().double()
    aligned = batch.own[1] - batch.own[0] if is_aligned(loss, model, dims) else 0
    work = Work(
        items=batch.share[1] - batch.share[0],
        tokens=len(batch.tokens),
        pairs=float((lengths * (lengths + 1) / 2).sum()),
        predictions=len(batch.targets),
        candidates=len(batch.candidates),
        aligned=aligned,
    )
    return Step(work, len(batch.item_ids), len(batch.offsets) - 1, 8 * max(1, -(-batch.longest // 8)))


def _begin_memory(device: torch.device) -> int:
    """Reset the peak, and return the bytes in use."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    keep_freed_memory()  # as in training
    reset_peak()
    return resident_bytes()


def _measure_steps(
    device: torch.device, sizes: tuple[int, int], items: int, model: ModelConfig, before: int
) -> list[MeasuredStep]:
    """Measure training steps of the plain engine; return the fastest of each size for its work.

    Steps of the smaller size and then of the larger one give their memory; then the sizes alternate for their time, so that
    other processes on the machine affect both.
    """
    import torch

    from antdist.distributed.world import World
    from antdist.model.recommender import build_recommender
    from antdist.training.engines.plain import PlainEngine

    loss = LossConfig()
    training = TrainingConfig(engine="plain", precision="bf16" if device.type == "cuda" else "fp32")
    engine: Any = PlainEngine(build_recommender(model, DIMS), training, World(device=device))
    engine.model.train()

    def measure(predictions: int, seed: int) -> MeasuredStep:
        batch, features = _inputs(predictions, items, model.max_length, seed)
        done = count_step(batch, loss, model, DIMS)
        batch, features = batch.to(device), features.to(device)

        def step() -> None:
            engine.backward(engine.forward(features, batch, None, loss).total, last=True)
            engine.update(1e-3)

        begun = time.process_time()
        seconds = measure_seconds(device, step)
        processor = time.process_time() - begun
        taken = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_bytes()
        return MeasuredStep(
            predictions=len(batch.targets),
            seconds=seconds,
            processor=processor,
            operations=useful_operations(done.rank, model, DIMS),
            moved=moved_bytes(done, model, DIMS),
            activations=sum(activations(done, model, loss, DIMS, 1, training.precision).values()),
            memory=float(taken - before),
        )

    growing = [[measure(size, seed) for seed in range(WARMING)] for size in sizes]
    turns = [[measure(size, WARMING + turn) for size in sizes] for turn in range(TURNS)]
    found = []
    for number, grown in enumerate(growing):
        fastest = min((turn[number] for turn in turns), key=lambda done: done.seconds / done.operations)
        most = max(done.activations for done in grown)
        found.append(fastest.model_copy(update={"activations": most, "memory": grown[-1].memory}))
    return found


def _inputs(predictions: int, items: int, max_length: int, seed: int) -> tuple[Batch, ItemInputs]:
    """Make a batch of about `predictions` predictions, and random features of its items."""
    import torch

    from antdist import ragged
    from antdist.batch import ROWS, GlobalBatch, ItemInputs
    from antdist.data.stream.shard_batch import shard_batch
    from antdist.data.stream.windows import user_windows

    random = np.random.default_rng(seed)
    likely = estimate_lengths(14.4).astype(np.int64) - 2
    lengths = random.choice(likely, max(1, round(predictions / float(likely.mean() - 1))))
    chance = 1.0 / (np.arange(items) + 10.0) ** 0.8
    names = random.choice(items, int(lengths.sum()), p=chance / chance.sum())
    users = np.arange(len(lengths))
    cut = user_windows(names, ragged.offsets(lengths)[:-1], lengths, users, max_length)
    whole = GlobalBatch(0, 0, cut.items, cut.offsets, cut.predict_at, cut.targets, cut.users)
    batch = shard_batch(whole, rank=0, world_size=1, candidates="in_batch", catalogue_size=items)
    rows = -(-len(batch.item_ids) // ROWS) * ROWS
    values = {m: torch.randn(rows, width) / width**0.5 for m, width in DIMS.items()}
    present = {m: torch.ones(rows, dtype=torch.bool) for m in DIMS}
    return batch, ItemInputs(values, present, torch.zeros(rows, dtype=torch.int64))

"""Floating-point operations by formula: what a step needs, and what the machine's matrix product gives."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from antdist.batch import Batch
from antdist.config.schema import ModelConfig

Sizes = tuple[tuple[int, int, int], ...]
GEMM_SIZES: Sizes = ((4096, 4096, 4096), (2048, 2048, 2048), (4385, 1024, 2048), (8192, 1024, 1024))


def useful_flops(batch: Batch, model: ModelConfig, dims: dict[str, int], *, aligned: bool) -> float:
    """Operations of a rank's matrix products in a training step, forward and backward, without recomputation.

    Counts each distinct item that the rank embeds once through the experts and gates (their input needs no gradient: twice the forward pass),
    each real token through the linear maps, each pair of tokens that may see each other, each prediction against each
    candidate, and, with `aligned`, each candidate's image against each candidate's text (all three times the forward).
    """
    d, items = model.dim, batch.share[1] - batch.share[0]
    tower = sum(items * width * (model.experts * d + 2 * model.experts) * 2 for width in dims.values())
    lengths = batch.offsets.diff().double()
    linear = len(batch.tokens) * model.layers * (4 * d * d + 2 * d * model.inner) * 2
    attention = float((lengths * (lengths + 1) / 2).sum()) * model.layers * d * 4
    logits = len(batch.targets) * len(batch.candidates) * d * 2
    alignment = (batch.own[1] - batch.own[0]) * len(batch.candidates) * d * 2 if aligned else 0
    return 2 * tower + 3 * (linear + attention + logits + alignment)


def padded_flops(
    examples: int,
    length: int,
    candidates: int,
    targets: int,
    model: ModelConfig,
    dims: dict[str, int],
    *,
    aligned: bool,
) -> float:
    """The same for the usual way: every place of the padded histories and every target or candidate is an item."""
    d, tokens = model.dim, examples * length
    tower = sum((tokens + targets) * width * (model.experts * d + 2 * model.experts) * 2 for width in dims.values())
    linear = tokens * model.layers * (4 * d * d + 2 * d * model.inner) * 2
    attention = tokens * length * model.layers * d * 4
    pairs = examples * candidates + (targets**2 if aligned else 0)
    return 2 * tower + 3 * (linear + attention + pairs * d * 2)


def gemm_peak(device: torch.device, dtype: torch.dtype = torch.float32, sizes: Sizes = GEMM_SIZES) -> float:
    """The most operations a second that a plain matrix product reaches here: the best of four tries at each size."""
    best = 0.0
    for rows, inner, columns in sizes:
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(inner, columns, device=device).to(dtype)
        best = max(best, 2.0 * rows * inner * columns / min(_seconds(a, b) for _ in range(5)))
    return best


def _seconds(a: Tensor, b: Tensor) -> float:
    synchronise(a.device)
    start = time.perf_counter()
    a @ b
    synchronise(a.device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for what the device still has to do; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

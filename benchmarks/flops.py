"""Floating-point operations by formula, of a step of antdist and of the usual way."""

from __future__ import annotations

from antdist.batch import Batch
from antdist.config.schema import LossConfig, ModelConfig
from antdist.planning.calibration import count_step
from antdist.planning.costs import useful_operations


def useful_flops(batch: Batch, model: ModelConfig, dims: dict[str, int], *, aligned: bool) -> float:
    """Count a rank's useful operations in a step (`antdist.planning.costs.useful_operations`)."""
    loss = LossConfig(alignment=1.0 if aligned else 0.0)
    return useful_operations(count_step(batch, loss, model, dims).rank, model, dims)


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
    """Count those of the usual way, which embeds every padded position and every target or candidate."""
    d, tokens = model.dim, examples * length
    tower = sum((tokens + targets) * width * (model.experts * d + 2 * model.experts) * 2 for width in dims.values())
    linear = tokens * model.layers * (4 * d * d + 2 * d * model.inner) * 2
    attention = tokens * length * model.layers * d * 4
    pairs = examples * candidates + (targets**2 if aligned else 0)
    return 2 * tower + 3 * (linear + attention + pairs * d * 2)

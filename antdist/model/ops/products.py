"""Matrix products in true float32, as fast as the device has them. Neutral ground: training and evaluation use it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 in float32, whatever the code around has set (autocast apart); then as it was.

    On a GPU that rules TF32 out. On a CPU oneDNN multiplies, where it does so exactly, instead of MKL: equal or, on
    processors that MKL does not know, twice as fast.
    """
    import torch

    backends: Any = torch.backends
    products = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16" if device.type == "cpu" and _onednn_is_exact() else "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before


@functools.cache
def _onednn_is_exact() -> bool:
    """Whether oneDNN multiplies float32 exactly under the one setting that lets torch call it for float32, "bf16".

    That allows oneDNN to round to bfloat16, which it does where the processor has tiles for it (AMX). So look: rounding
    would show as an error a thousand times as large.
    """
    import torch

    onednn: Any = torch.backends.mkldnn
    if not onednn.is_available():
        return False
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 512, generator=random), torch.randn(512, 256, generator=random)
    before, onednn.matmul.fp32_precision = onednn.matmul.fp32_precision, "bf16"
    try:
        error = (a @ b - a.double() @ b.double()).abs().max()
    finally:
        onednn.matmul.fp32_precision = before
    return float(error) < 1e-3

"""Float32 matrix products that are exact to float32, and as fast as the device does them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices exactly inside the block (autocast apart), under any setting.

    On a GPU this rules TF32 out. On a CPU it has oneDNN multiply instead of MKL where oneDNN is exact: as fast, or twice
    as fast on processors that MKL does not know.

    torch hands a float32 product on a CPU to oneDNN only if `mkldnn.matmul.fp32_precision` allows less than float32, as
    "bf16" does; with "ieee" it calls MKL. "bf16" allows oneDNN to round the inputs to bfloat16, but it does so only on
    processors with matrix tiles for bfloat16 (AMX); on all others its float32 kernel runs. `_onednn_is_exact` finds out
    once, by multiplying; where oneDNN rounds, "ieee" and MKL stay.
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
    """Return whether oneDNN multiplies float32 exactly under "bf16" on this processor.

    A sum of 512 products of N(0, 1) numbers is about 23. Over these 65,536 sums the largest error is 4e-5 in float32, and
    0.26 with inputs rounded to bfloat16 (8 bits): 1e-3 is far from both.
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

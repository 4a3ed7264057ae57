"""Float32 products are exact under any setting around, which is restored afterwards."""

from __future__ import annotations

import pytest
import torch

from antdist.model.ops import products
from antdist.model.ops.products import exact_products

CPU = torch.device("cpu")


def error() -> float:
    random = torch.Generator().manual_seed(1)
    a, b = torch.randn(300, 400, generator=random), torch.randn(400, 200, generator=random)
    return float((a @ b - a.double() @ b.double()).abs().max())


@pytest.mark.parametrize("around", ["ieee", "bf16", "none"])
@pytest.mark.parametrize("exact", [None, False])
def test_products_are_exact_and_the_setting_is_restored(
    around: str, exact: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exact is False:  # as on a processor whose oneDNN rounds
        monkeypatch.setattr(products, "_onednn_is_exact", lambda: False)
    torch.backends.mkldnn.matmul.fp32_precision = around
    try:
        with exact_products(CPU):
            assert error() < 1e-3
            inside = torch.backends.mkldnn.matmul.fp32_precision
        assert torch.backends.mkldnn.matmul.fp32_precision == around
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    if exact is False:
        assert inside == "ieee"


def test_the_probe_detects_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """If products were rounded to bfloat16, the probe would return False."""
    products._onednn_is_exact.cache_clear()
    plain = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: plain(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else plain(a, b),
    )
    assert not products._onednn_is_exact()
    monkeypatch.undo()
    products._onednn_is_exact.cache_clear()

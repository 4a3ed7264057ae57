"""Features of an appended domain: only new items are encoded, and old rows do not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antdist.data.domain import Domain, open_domain
from antdist.data.ingest.append import append_to_domain
from antdist.data.ingest.prepare import prepare_domain
from antdist.data.verify import verify_domain
from antdist.errors import UserError
from antdist.features import encoding
from antdist.features.catalogue import Catalogue
from antdist.features.encoders.price import PriceEncoder, rescale
from antdist.features.featurize import featurize_domains
from antdist.features.table import open_table

FIRST = [10.0, None, 30.0, 20.0, 40.0]
LATER = [5.0, 25.0, 400.0, None]


def source(folder: Path, prices: list[float | None], first: int, time: int) -> Path:
    folder.mkdir(exist_ok=True)
    items = [{"item_id": f"i{first + n}", "text": f"thing {first + n}", "price": p} for n, p in enumerate(prices)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    lines = [f"u{u},{item['item_id']},{time + n}" for u in range(3) for n, item in enumerate(items)]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    return folder


def append_later(tmp_path: Path, *, first: list[float | None], scale: str, featurized: bool) -> Domain:
    prepare_domain(source(tmp_path / "base", first, 0, 0), domain="d", out=tmp_path, items_per_shard=2)
    if featurized:
        featurize_domains([open_domain(tmp_path / "d")], text="hashed", text_dim=8, price=scale, workers=0)
    append_to_domain(source(tmp_path / "more", LATER, len(first), 100), domain="d", out=tmp_path, items_per_shard=3)
    return open_domain(tmp_path / "d")


def file_times(domain: Domain) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (domain.folder / "features").glob("*.npy")}


def encoded(scale: Any, prices: list[float]) -> Any:
    encoder = PriceEncoder(scale)
    return encoder.encode(encoder.scaled(np.array(prices)))


@pytest.mark.parametrize("scale", ["raw", "minmax", "log", "quantile"])
def test_only_new_items_are_encoded_and_old_rows_stay(tmp_path: Path, scale: str, monkeypatch: Any) -> None:
    domain = append_later(tmp_path, first=FIRST, scale=scale, featurized=True)
    before = file_times(domain)
    with pytest.raises(UserError, match=r"text features of domain d lack 4 appended items.*only those"):
        open_table(domain, "text")
    seen: list[str] = []
    real = encoding._check_finite
    monkeypatch.setattr(
        encoding,
        "_check_finite",
        lambda e, items, *r: (seen.extend(i.item_id for i in items), real(e, items, *r)),
    )
    report = featurize_domains([domain], text="hashed", text_dim=8, price=scale, workers=0)
    assert seen == ["i5", "i6", "i7", "i8"]
    assert [(table.parts, table.encoded_parts) for table in report.tables] == [(5, 2), (5, 2)]
    after = file_times(domain)
    assert all(after[name] == stamp for name, stamp in before.items()) and len(after) == len(before) + 8
    assert verify_domain(domain.folder).ok
    assert Catalogue([domain], ["text", "price"]).size == 9

    rows, present = open_table(domain, "price").rows(np.arange(9))
    known = np.array([np.nan if price is None else price for price in [*FIRST, *LATER]])
    scaled = rescale(known[present], scale, np.array([10.0, 30.0, 20.0, 40.0]))  # type: ignore[arg-type]
    upper = 1.0 if scale == "raw" else 1000.0
    np.testing.assert_allclose(rows[present][:, 1], np.cos(scaled * upper), atol=1e-5)
    if scale != "raw":
        np.testing.assert_array_equal(rows[7], rows[4])  # beyond the dearest that the scale was fitted on
        np.testing.assert_array_equal(rows[5], rows[0])


@pytest.mark.parametrize("featurized", [True, False])
def test_price_scale_is_that_of_the_first_prices(tmp_path: Path, featurized: bool) -> None:
    domain = append_later(tmp_path, first=FIRST, scale="quantile", featurized=featurized)
    featurize_domains([domain], price="quantile", workers=0)
    rows, _ = open_table(domain, "price").rows(np.arange(5))
    values, _ = encoded("quantile", [np.nan if p is None else p for p in FIRST])
    np.testing.assert_array_equal(rows, values)


def test_first_prices_of_an_append_define_the_scale(tmp_path: Path) -> None:
    domain = append_later(tmp_path, first=[None] * 4, scale="minmax", featurized=True)
    featurize_domains([domain], price="minmax", workers=0)
    rows, present = open_table(domain, "price").rows(np.arange(8))
    assert present.tolist() == [False] * 4 + [True, True, True, False]
    values, _ = encoded("minmax", [5.0, 25.0, 400.0])
    np.testing.assert_array_equal(rows[4:7], values)


def test_tables_remain_valid_without_new_items(tmp_path: Path) -> None:
    prepare_domain(source(tmp_path / "base", FIRST, 0, 0), domain="d", out=tmp_path)
    featurize_domains([open_domain(tmp_path / "d")], text="hashed", text_dim=8, workers=0)
    (tmp_path / "more.csv").write_text("user_id,item_id,timestamp\nu0,i3,50\n")
    append_to_domain(interactions=tmp_path / "more.csv", domain="d", out=tmp_path)
    domain = open_domain(tmp_path / "d")
    assert open_table(domain, "text").meta.fingerprint == domain.manifest.ancestors[0]
    assert verify_domain(domain.folder).ok

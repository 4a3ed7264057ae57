"""The price sinusoid and its scales (spec, section 2)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from antdist.errors import UserError
from antdist.features.encoders.price import PriceEncoder, rescale, sinusoid

PRICES = np.array([3.0, 0.5, 20.0, 3.0, 1000.0, 0.0, 7.25])


def test_sinusoid_is_the_specs() -> None:
    rows = sinusoid(np.array([0.0, 12.5]), 50_000.0)
    assert rows.shape == (2, 64) and rows.dtype == np.float32
    for j in range(32):
        w = 50_000 ** (-2 * j / 64)
        assert rows[1, 2 * j] == pytest.approx(math.sin(w * 12.5), abs=1e-6)
        assert rows[1, 2 * j + 1] == pytest.approx(math.cos(w * 12.5), abs=1e-6)
    assert rows[0].tolist() == [0.0, 1.0] * 32


def test_scales_against_independent_formulas() -> None:
    np.testing.assert_array_equal(rescale(PRICES, "raw"), PRICES)
    np.testing.assert_allclose(rescale(PRICES, "minmax"), PRICES / 1000)
    np.testing.assert_allclose(rescale(PRICES, "quantile"), (rankdata(PRICES) - 1) / 6)
    floored = np.log10(np.where(PRICES == 0, 0.5, PRICES))
    expected = (floored - math.log10(0.5)) / (3 - math.log10(0.5))
    np.testing.assert_allclose(rescale(PRICES, "log"), expected)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.sampled_from(["minmax", "log", "quantile"]))
def test_normalised_scales_keep_order_and_bounds(prices: list[float], scale: Any) -> None:
    given_prices = np.array(prices)
    scaled = rescale(given_prices, scale)
    assert (scaled >= 0).all() and (scaled <= 1).all()
    order = np.argsort(given_prices)
    assert (np.diff(scaled[order]) >= -1e-12).all()


@pytest.mark.parametrize("scale", ["minmax", "log", "quantile"])
def test_the_unit_does_not_matter(scale: Any) -> None:
    pounds = np.array([1.0, 2.5, 9.0, 40.0])
    np.testing.assert_allclose(rescale(pounds * 1.37, scale), rescale(pounds, scale))


def test_missing_prices_stay_missing() -> None:
    prices = np.array([np.nan, 5.0, np.nan, 1.0])
    values, present = PriceEncoder().encode(PriceEncoder().scaled(prices))
    assert present.tolist() == [False, True, False, True]
    assert not values[[0, 2]].any()
    np.testing.assert_array_equal(values[[3, 1]], sinusoid(np.array([0.0, 1000.0])))


def test_default_range_lets_the_encoding_vary() -> None:
    """Prices in [0, 1] straight would leave most of the 64 dimensions all but constant."""
    prices = np.linspace(1, 100, 200)
    narrow, wide = PriceEncoder("quantile", 1.0), PriceEncoder("quantile")
    assert (narrow.encode(narrow.scaled(prices))[0].std(0) > 0.1).sum() < 16
    assert (wide.encode(wide.scaled(prices))[0].std(0) > 0.1).sum() > 40


def test_identity_holds_scale_range_and_coefficient() -> None:
    encoders = [
        PriceEncoder(),
        PriceEncoder("log"),
        PriceEncoder("quantile", 50.0),
        PriceEncoder("quantile", 1000.0, 1e4),
        PriceEncoder("raw"),
    ]
    descriptions = [tuple(sorted(encoder.description().items())) for encoder in encoders]
    assert len(set(descriptions)) == len(encoders)
    assert PriceEncoder().description() == PriceEncoder("quantile", 1000.0, 50_000.0).description()


def test_bad_options_are_refused() -> None:
    with pytest.raises(UserError, match=r"unknown price scale 'dollars'.*raw, minmax, log, quantile"):
        PriceEncoder("dollars")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="raw prices have no range"):
        PriceEncoder("raw", 10.0)
    with pytest.raises(UserError, match="must be above 0"):
        PriceEncoder("minmax", -1.0)

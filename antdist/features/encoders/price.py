"""Encode prices as sinusoids (docs/spec/ant.md, section 2).

The frequencies run from 1 down to 1/c radians a unit, so the unit of the price matters. Units differ between shops
(pounds, scaled prices between 0 and 1), hence the scales, which map each domain's prices to [0, 1] times an upper bound
`range`. Within [0, 1] the encoding would hardly vary: only the highest of the 32 frequencies would turn by a radian, and
all cosines would be near 1. With the default bound of 1000, as for dollars, 21 of the 32 frequencies turn by a radian or
more over the range; the highest separate prices that differ by a thousandth of the range, the lowest are nearly linear in
the price.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from antdist.errors import UserError

Scale = Literal["raw", "minmax", "log", "quantile"]
DIM = 64
FREQUENCY = 50_000.0
NORMALISED_RANGE = 1000.0


@dataclass(frozen=True)
class PriceEncoder:
    """The sinusoid with its scale, which is fitted on a domain's prices.

    Args:
        scale: `raw` leaves prices unchanged; `minmax` maps them linearly from the domain's lowest and highest price to
            [0, 1]; `log` does so with their logarithms (a price of 0 counts as the lowest positive one); `quantile` maps
            them to their rank in the domain, in [0, 1], equal prices to equal ranks.
        range: factor of all scales but `raw`; None: 1000.
        frequency: c, the inverse of the lowest frequency.
    """

    scale: Scale = "quantile"
    range: float | None = None
    frequency: float = FREQUENCY

    def __post_init__(self) -> None:
        if self.scale not in get_args(Scale):
            raise UserError(
                f"unknown price scale {self.scale!r}",
                where="--price",
                remedy=f"use one of {', '.join(get_args(Scale))}",
            )
        if self.scale == "raw" and self.range is not None:
            remedy = "leave it out, or use another --price scale"
            raise UserError("raw prices have no range", where="--price-range", remedy=remedy)
        if (self.range is not None and not self.range > 0) or not self.frequency > 1:
            what = f"the range ({self.range}) must be above 0 and the frequency coefficient ({self.frequency}) above 1"
            raise UserError(what, where="--price-range", remedy="leave both out for the defaults")

    @property
    def upper(self) -> float:
        """Return what the domain's highest price is mapped to; 1 for `raw`."""
        if self.scale == "raw":
            return 1.0
        return NORMALISED_RANGE if self.range is None else self.range

    def description(self) -> dict[str, str | int | float | None]:
        return {"name": f"sinusoid ({self.scale})", "scale": self.scale, "range": self.upper, "c": self.frequency}

    def scaled(self, prices: NDArray[np.float64], fitted_on: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """Scale all prices of one domain (n,), NaN where missing; fitted on `fitted_on`, None: on all."""
        fitted_on = prices if fitted_on is None else fitted_on
        present = np.isfinite(prices)
        scaled = np.full(len(prices), np.nan)
        if present.any():
            scale = rescale(prices[present], self.scale, fitted_on[np.isfinite(fitted_on)])
            scaled[present] = self.upper * scale
        return scaled

    def encode(self, scaled: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Encode scaled prices (n,) as features (n, 64) and presence (n,)."""
        present = np.isfinite(scaled)
        values = np.zeros((len(scaled), DIM), dtype=np.float32)
        values[present] = sinusoid(scaled[present], self.frequency)
        return values, present


def rescale(
    prices: NDArray[np.float64], scale: Scale, fitted_on: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Scale prices to [0, 1], or leave them `raw`.

    Args:
        prices: (n,), none missing.
        fitted_on: (m,) prices that define the scale, m >= 1; None: `prices`. Prices beyond them count as the nearest; if
            all of them are equal, the result is 0.5.
    """
    if scale == "raw":
        return prices
    fitted_on = prices if fitted_on is None else fitted_on
    if scale == "quantile":
        ordered = np.sort(fitted_on)
        middle = (np.searchsorted(ordered, prices, "left") + np.searchsorted(ordered, prices, "right") - 1) / 2
        return (middle / (len(ordered) - 1)).clip(0, 1) if len(ordered) > 1 else np.full(len(prices), 0.5)
    if scale == "log":
        paid = fitted_on[fitted_on > 0]
        if not len(paid):
            return np.full(len(prices), 0.5)
        prices, fitted_on = (np.log(np.maximum(some, paid.min())) for some in (prices, fitted_on))
    low, high = fitted_on.min(), fitted_on.max()
    return ((prices - low) / (high - low)).clip(0, 1) if high > low else np.full(len(prices), 0.5)


def sinusoid(prices: NDArray[np.float64], frequency: float = FREQUENCY) -> NDArray[np.float32]:
    """Encode prices (n,) as (n, 64).

    Column 2j is sin(w_j price), column 2j + 1 is cos(w_j price), with w_j = frequency^(-2j/64).
    """
    rates = frequency ** (-np.arange(0, DIM, 2) / DIM)
    angles = prices[:, None] * rates[None, :]
    values = np.empty((len(prices), DIM), dtype=np.float32)
    values[:, 0::2], values[:, 1::2] = np.sin(angles), np.cos(angles)
    return values

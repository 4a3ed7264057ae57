"""Verdicts: is an adapted model better than one from scratch (docs/spec/ant.md, section 7)?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from antdist.evaluation.metrics import FloatArray, per_user
from antdist.evaluation.results import Run, RunKey

LEVEL = 0.1  # significant at 90 %

Transfer = Literal["positive", "negative", "none", "unknown"]


@dataclass(frozen=True)
class Comparison:
    """A paired two-sided t-test over users of a metric averaged over seeds."""

    difference: float  # mean of a minus mean of b
    relative: float | None  # difference as a share of b's mean; None where that is 0
    p_value: float
    significant: bool
    users: int
    seeds: int


@dataclass(frozen=True)
class Verdict:
    """The direction of the transfer; if it is unknown, why."""

    transfer: Transfer
    comparison: Comparison | None
    differs: list[str]  # what prevented a comparison


def compare(metric_a: FloatArray, metric_b: FloatArray) -> Comparison:
    """Compare per-user metrics (S, U) of the same users and numbers of seeds.

    p is 1 for a single user or where no user differs, and 0 where all users gain the same.
    """
    from scipy.stats import ttest_rel

    assert metric_a.shape == metric_b.shape and metric_a.ndim == 2 and metric_a.size
    assert np.isfinite(metric_a).all() and np.isfinite(metric_b).all()
    a, b = metric_a.mean(0), metric_b.mean(0)
    gains = a - b
    if len(gains) < 2 or not gains.any():
        p_value = 1.0
    elif np.ptp(gains) == 0:  # every user gains the same: t is infinite
        p_value = 0.0
    else:
        p_value = float(ttest_rel(a, b).pvalue)
    difference, base = float(gains.mean()), float(b.mean())
    relative = difference / base if base else None
    return Comparison(difference, relative, p_value, p_value < LEVEL, len(gains), len(metric_a))


def decide_transfer(comparison: Comparison | None) -> Transfer:
    """Decide the direction: "none" if the difference may be chance, "unknown" without a comparison."""
    if comparison is None:
        return "unknown"
    if not comparison.significant:
        return "none"
    return "positive" if comparison.difference > 0 else "negative"


def list_differences(a: RunKey, b: RunKey) -> list[str]:
    """List what differs between two runs as "key: one against other"; empty if they can be compared."""
    pairs = [(name, getattr(a, name), getattr(b, name)) for name in RunKey.model_fields if name != "features"]
    modalities = sorted(a.features.keys() | b.features.keys())
    pairs += [(f"features.{m}", a.features.get(m, "none"), b.features.get(m, "none")) for m in modalities]
    return [f"{name}: {_show(one)} against {_show(other)}" for name, one, other in pairs if one != other]


def _show(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def judge(adapted: Run, scratch: Run | None, metric: str = "Recall@10") -> Verdict:
    """Judge an adapted run against `scratch` with the same data, features and budget.

    The transfer is "unknown" without a `scratch`, or with one that differs in anything but the strategy.
    """
    if scratch is None:
        return Verdict("unknown", None, ["no matching scratch"])
    differs = list_differences(adapted.key, scratch.key)
    if not differs and not np.array_equal(adapted.ranks[0].users, scratch.ranks[0].users):
        differs = [f"users: {len(adapted.ranks[0].users)} against {len(scratch.ranks[0].users)}, other users"]
    if differs:
        return Verdict("unknown", None, differs)
    comparison = compare(metric_of(adapted, metric), metric_of(scratch, metric))
    return Verdict(decide_transfer(comparison), comparison, [])


def metric_of(run: Run, metric: str) -> FloatArray:
    """Compute a metric for each seed and user (S, U)."""
    return np.stack([per_user(ranks, metric) for ranks in run.ranks])

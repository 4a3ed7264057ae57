"""The table of strategies: what each reached, and whether transfer helped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from antdist.evaluation.metrics import METRICS
from antdist.evaluation.results import Run
from antdist.evaluation.significance import Verdict, metric_of


@dataclass(frozen=True)
class Row:
    """One strategy in the table; no verdict for what is itself compared with (`scratch`, popularity)."""

    strategy: str
    means: dict[str, float]  # of METRICS, over users and seeds
    deviations: dict[str, float] | None  # over seeds (n - 1); None for a single seed
    verdict: Verdict | None


def results_row(strategy: str, run: Run, verdict: Verdict | None = None) -> Row:
    """Mean and deviation over seeds of each metric's mean over users."""
    seeds = {metric: metric_of(run, metric).mean(1) for metric in METRICS}
    deviations = {m: float(np.std(v, ddof=1)) for m, v in seeds.items()} if len(run.ranks) > 1 else None
    return Row(strategy, {m: float(v.mean()) for m, v in seeds.items()}, deviations, verdict)


def results_table(rows: Sequence[Row], metric: str = "Recall@10") -> str:
    """Aligned columns: strategy, metrics (± deviation over seeds), difference of `metric` to scratch, p-value, verdict.

    Below it, why a verdict is unknown.
    """
    head = ["strategy", *METRICS, f"{metric} to scratch", "p-value", "transfer"]
    cells = [head, *([row.strategy, *_metrics(row), *_transfer(row.verdict)] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    reasons = [(row.strategy, "; ".join(row.verdict.differs)) for row in rows if row.verdict and row.verdict.differs]
    return "\n".join([*lines, *(f"{strategy}: transfer unknown: {reason}" for strategy, reason in reasons)])


def _metrics(row: Row) -> list[str]:
    deviations = row.deviations
    return [f"{row.means[m]:.4f}" + (f" ± {deviations[m]:.4f}" if deviations else "") for m in METRICS]


def _transfer(verdict: Verdict | None) -> list[str]:
    if verdict is None:
        return ["", "", ""]
    if verdict.comparison is None:
        return ["", "", verdict.transfer]
    c = verdict.comparison
    relative = "" if c.relative is None else f" ({c.relative:+.1%})"
    return [f"{c.difference:+.4f}{relative}", "< 0.001" if c.p_value < 0.001 else f"{c.p_value:.3f}", verdict.transfer]

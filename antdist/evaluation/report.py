"""Tables of strategies: their metrics, and whether transfer helped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from antdist.evaluation.metrics import METRICS
from antdist.evaluation.results import Run
from antdist.evaluation.significance import Comparison, Verdict, metric_of
from antdist.io.progress import align_columns

SHORT = ("Recall@10", "NDCG@10")


@dataclass(frozen=True)
class Row:
    """One strategy of a table; `scratch`, which the others are compared with, has no verdict."""

    strategy: str
    means: dict[str, float]  # of METRICS over users and seeds
    deviations: dict[str, float] | None  # over seeds (n - 1); None for a single seed
    verdict: Verdict | None


def results_row(strategy: str, run: Run, verdict: Verdict | None = None) -> Row:
    """Average each metric over users; then compute mean and deviation over seeds."""
    seeds = {metric: metric_of(run, metric).mean(1) for metric in METRICS}
    deviations = {m: float(np.std(v, ddof=1)) for m, v in seeds.items()} if len(run.ranks) > 1 else None
    return Row(strategy, {m: float(v.mean()) for m, v in seeds.items()}, deviations, verdict)


def read_row(document: Mapping[str, Any]) -> Row:
    """Build a row from its `asdict`."""
    verdict = document["verdict"]
    if verdict is not None:
        comparison = verdict["comparison"] and Comparison(**verdict["comparison"])
        verdict = Verdict(verdict["transfer"], comparison, verdict["differs"])
    return Row(document["strategy"], document["means"], document["deviations"], verdict)


def results_table(rows: Sequence[Row], metric: str = "Recall@10") -> str:
    """Format a target's strategies: metrics, difference to scratch, p-value, verdict.

    Metrics are means ± deviation over seeds; `metric` is the one whose difference to scratch is shown. Lines below the table say why a verdict is unknown.
    """
    head = ["strategy", *METRICS, f"{metric} to scratch", "p-value", "transfer"]
    cells = [[row.strategy, *_metrics(row), *_transfer(row.verdict)] for row in rows]
    return "\n".join([*_aligned([head, *cells]), *(reason for row in rows for reason in _unknown(row))])


def transfer_table(targets: Mapping[str, Sequence[Row]], champions: Mapping[str, tuple[str, str]]) -> str:
    """Format several targets' strategies: fewer metrics than `results_table`, and the champion.

    Args:
        targets: the rows of each target's strategies.
        champions: for a target, the strategy in whose row the champion stands, and the text for it.
    """
    head = ["target", "strategy", *SHORT, "Recall@10 to scratch", "p-value", "transfer", "champion"]
    cells = []
    for target, rows in targets.items():
        chosen, champion = champions.get(target, ("", ""))
        for row in rows:
            last = champion if row.strategy == chosen else ""
            cells.append([target, row.strategy, *_metrics(row, SHORT), *_transfer(row.verdict), last])
    reasons = [f"{target}: {reason}" for target, rows in targets.items() for row in rows for reason in _unknown(row)]
    return "\n".join([*_aligned([head, *cells]), *reasons])


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns of a table and underline its head."""
    rule = ["-" * max(map(len, column)) for column in zip(*cells, strict=True)]
    return align_columns([cells[0], rule, *cells[1:]])


def _unknown(row: Row) -> list[str]:
    differs = row.verdict.differs if row.verdict else []
    return [f"{row.strategy}: transfer unknown: {'; '.join(differs)}"] if differs else []


def _metrics(row: Row, metrics: Sequence[str] = METRICS) -> list[str]:
    deviations = row.deviations
    return [f"{row.means[m]:.4f}" + (f" ± {deviations[m]:.4f}" if deviations else "") for m in metrics]


def _transfer(verdict: Verdict | None) -> list[str]:
    if verdict is None:
        return ["", "", ""]
    if verdict.comparison is None:
        return ["", "", verdict.transfer]
    c = verdict.comparison
    relative = "" if c.relative is None else f" ({c.relative:+.1%})"
    return [f"{c.difference:+.4f}{relative}", "< 0.001" if c.p_value < 0.001 else f"{c.p_value:.3f}", verdict.transfer]

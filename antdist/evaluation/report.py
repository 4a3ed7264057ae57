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

    def record(self) -> dict[str, Any]:
        """Return the row flat, for a data frame: metrics, deviations (`Recall@10 std`), and the comparison to scratch."""
        comparison = self.verdict.comparison if self.verdict is not None else None
        return {
            "strategy": self.strategy,
            **self.means,
            **{f"{metric} std": value for metric, value in (self.deviations or {}).items()},
            "transfer": None if self.verdict is None else self.verdict.transfer,
            "difference": None if comparison is None else comparison.difference,
            "p_value": None if comparison is None else comparison.p_value,
        }


def results_row(strategy: str, run: Run, verdict: Verdict | None = None) -> Row:
    """Average each metric over users; then compute mean and deviation over seeds."""
    seeds = {metric: metric_of(run, metric).mean(1) for metric in METRICS}
    deviations = {m: float(np.std(v, ddof=1)) for m, v in seeds.items()} if len(run.ranks) > 1 else None
    return Row(strategy, {m: float(v.mean()) for m, v in seeds.items()}, deviations, verdict)


def read_row(document: Mapping[str, Any]) -> Row:
    """Build a row from its `asdict`."""
    verdict = document["verdict"] and read_verdict(document["verdict"])
    return Row(document["strategy"], document["means"], document["deviations"], verdict)


def read_verdict(document: Mapping[str, Any]) -> Verdict:
    """Build a verdict from its `asdict`."""
    comparison = document["comparison"] and Comparison(**document["comparison"])
    return Verdict(document["transfer"], comparison, document["differs"])


def results_table(
    rows: Sequence[Row], validation: Mapping[str, Verdict] | None = None, metric: str = "Recall@10"
) -> str:
    """Format a target's strategies: metrics, difference to scratch, p-value, and the transfer on test and validation users.

    Metrics are means ± deviation over seeds; `metric` is the one whose difference to scratch is shown. Lines below the table
    say why a verdict is unknown.

    Args:
        validation: the verdicts on validation users, which decide on the choice, by strategy.
    """
    head = ["strategy", *METRICS, f"{metric} to scratch", "p-value", "transfer", "transfer"]
    groups = ["", "test", *[""] * (len(head) - 3), "validation"]
    cells = [[r.strategy, *_metrics(r), *_transfer(r.verdict), _on_validation(r, validation or {})] for r in rows]
    return "\n".join([*_aligned([groups, head, *cells]), *(reason for row in rows for reason in _unknown(row))])


def transfer_table(
    targets: Mapping[str, Sequence[Row]],
    champions: Mapping[str, tuple[str, str]],
    validation: Mapping[str, Mapping[str, Verdict]],
) -> str:
    """Format several targets' strategies: fewer metrics than `results_table`, and the champion.

    Args:
        targets: the rows of each target's strategies.
        champions: for a target, the strategy in whose row the champion stands, and the text for it.
        validation: for a target, the verdicts on validation users by strategy.
    """
    head = ["target", "strategy", *SHORT, "Recall@10 to scratch", "p-value", "transfer", "transfer", "champion"]
    groups = ["", "", "test", "", "", "", "", "validation", ""]
    cells = []
    for target, rows in targets.items():
        chosen, champion = champions.get(target, ("", ""))
        for row in rows:
            decided = [_on_validation(row, validation.get(target, {})), champion if row.strategy == chosen else ""]
            cells.append([target, row.strategy, *_metrics(row, SHORT), *_transfer(row.verdict), *decided])
    reasons = [f"{target}: {reason}" for target, rows in targets.items() for row in rows for reason in _unknown(row)]
    return "\n".join([*_aligned([groups, head, *cells]), *reasons])


def _on_validation(row: Row, validation: Mapping[str, Verdict]) -> str:
    verdict = validation.get(row.strategy)
    return "" if verdict is None else verdict.transfer


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns of a table and underline its head, the first two lines."""
    rule = ["-" * max(map(len, column)) for column in zip(*cells, strict=True)]
    return align_columns([*cells[:2], rule, *cells[2:]])


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

"""The table of strategies prints the given numbers in aligned columns."""

from __future__ import annotations

import numpy as np

from antdist.evaluation.ranking import Ranks
from antdist.evaluation.report import results_row, results_table
from antdist.evaluation.results import Run, RunKey
from antdist.evaluation.significance import Comparison, Verdict


def make_run(*ranks: list[int]) -> Run:
    key = RunKey(
        target="x", manifest="m", features={}, seeds=tuple(range(len(ranks))), epochs=1, budget="b", split="test"
    )
    return Run(key, [Ranks(np.arange(len(r)), np.array(r), np.zeros(len(r), bool)) for r in ranks])


def test_row_is_mean_and_deviation_over_seeds() -> None:
    row = results_row("scratch", make_run([1, 99], [1, 1]))
    assert row.means["Recall@10"] == 0.75
    assert row.deviations is not None and np.isclose(row.deviations["Recall@10"], np.sqrt(0.125))
    assert results_row("scratch", make_run([1, 99])).deviations is None


def test_table() -> None:
    run = make_run([1, 99], [1, 1])
    better = Verdict("positive", Comparison(0.25, 0.5, 0.0001, True, 2, 2), [])
    worse = Verdict("none", Comparison(-0.05, None, 0.25, False, 2, 2), [])
    unknown = Verdict("unknown", None, ["epochs: 1 against 2", "seeds: 0 against 1"])
    text = results_table(
        [
            results_row("scratch", run),
            results_row("finetune", run, worse),
            results_row("relearn", run, better),
            results_row("finetune_all", make_run([1, 99]), unknown),
        ],
        {"finetune": better},
    )
    groups, head, rule, scratch, finetune, relearn, last, reason = text.splitlines()
    column = head.index("Recall@10 to scratch")
    assert scratch[head.index("Recall@10") :].startswith("0.7500 ± 0.3536")
    assert scratch[column:] == ""
    assert relearn[column:].startswith("+0.2500 (+50.0%)") and relearn[head.index("transfer") :].strip() == "positive"
    assert relearn[head.index("p-value") :].startswith("< 0.001")
    assert finetune[column:].startswith("-0.0500 ") and finetune[head.index("p-value") :].startswith("0.250")
    assert last[head.index("Recall@10") :].startswith("0.5000 ") and last.endswith("unknown")
    assert reason == "finetune_all: transfer unknown: epochs: 1 against 2; seeds: 0 against 1"
    assert set(rule) == {"-", " "}
    column = head.rindex("transfer")
    assert groups[column:] == "validation" and groups.index("test") == head.index("Recall@10")
    assert finetune[column:] == "positive" and relearn[column:] == ""

"""Judge the trials of a target: results over all seeds, the transfer of each strategy, the choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from antdist.config.schema import Strategy
from antdist.evaluation.report import Row, results_row, results_table
from antdist.evaluation.results import Run, load_ranks, pool
from antdist.evaluation.significance import Transfer, Verdict, judge
from antdist.io.files import read_json
from antdist.io.logs import get_logger
from antdist.report import Report
from antdist.runs.context import AdaptContext
from antdist.runs.records import Record
from antdist.runs.trials import SPLITS, strategies_of
from antdist.tracking.store import redact

logger = get_logger(__name__)
Runs = Mapping[tuple[Strategy, str], Run]  # by strategy and split, over all seeds


class Judgement(Record, Report):
    """What the trials of a target show; `verdict.json`.

    `rows` are the table of test results. `verdicts` are those on validation, which decide on the choice.
    """

    __repr__ = __str__ = Report.__repr__  # before pydantic's

    target: str
    seeds: list[int]
    rows: list[Row] = Field(alias="test")
    verdicts: dict[Strategy, Verdict] = Field(alias="validation verdicts")
    notes: list[str]
    folder: Path

    def lines(self) -> list[str]:
        return [
            f"{self.target}, best epoch of each trial by validation Recall@10:",
            results_table(self.rows, {str(strategy): v for strategy, v in self.verdicts.items()}),
            *self.notes,
        ]

    def records(self) -> list[dict[str, Any]]:
        return [row.record() for row in self.rows]


class AdaptedModel(Judgement):
    """The judged trials, and the registered model of the chosen strategy's best seed."""

    chosen: Strategy
    model: str  # models:/NAME/VERSION
    champion: str  # whether it became champion, and why
    holder: str | None  # models:/NAME/VERSION of the champion
    tracking_uri: str = Field("", exclude=True)

    def lines(self) -> list[str]:
        return [
            *super().lines(),
            f"chosen on validation: {self.chosen}; registered {self.model} ({self.champion})",
            f"files in {self.folder}; MLflow: {redact(self.tracking_uri)}",
        ]


def read_judgement(path: Path) -> Judgement | None:
    """Read `verdict.json`; None if there is none. Raises UserError if it is damaged."""
    content = read_json(path)
    return None if content is None else (AdaptedModel if "chosen" in content else Judgement).parse(content, path)


def pool_trials(context: AdaptContext, strategies: Sequence[Strategy]) -> Runs:
    """Load the results of trained strategies. Raises UserError if trials of one cannot be pooled."""
    return {(s, split): _pool(_ranks_files(context, s, split)) for s in strategies for split in SPLITS}


def _ranks_files(context: AdaptContext, strategy: Strategy, split: str) -> list[Path]:
    return [context.folder.trial(strategy, seed).ranks_file(split) for seed in context.config.seeds]


def _pool(files: Iterable[Path]) -> Run:
    return pool([load_ranks(file) for file in files])


def judge_strategies(context: AdaptContext, runs: Runs, notes: Sequence[str] = ()) -> Judgement:
    """Compare each strategy in `runs` with `scratch`."""
    scratch = {split: runs.get(("scratch", split)) or _find_scratch(context, split) for split in SPLITS}
    if scratch["test"] is None:
        logger.warning(
            f"no scratch trials with the same seeds in {context.folder}: the transfer is unknown "
            "(strategy=scratch makes them)"
        )
    strategies = [s for s in strategies_of(context.config) if (s, "test") in runs]
    verdicts: dict[str, dict[Strategy, Verdict]] = {
        split: {s: judge(runs[s, split], scratch[split]) for s in strategies if s != "scratch"} for split in SPLITS
    }
    return Judgement(
        target=str(context.config.target),
        seeds=context.config.seeds,
        rows=[results_row(s, runs[s, "test"], verdicts["test"].get(s)) for s in strategies],
        verdicts=verdicts["validation"],
        notes=list(notes),
        folder=context.folder.path,
    )


def choose_strategy(
    validation: Mapping[Strategy, float], transfers: Mapping[Strategy, Transfer]
) -> tuple[Strategy, bool]:
    """Choose the strategy whose model is registered; return whether it may become champion.

    Transfer must be shown to help: the best on validation is chosen among `scratch` and strategies with positive transfer.
    Without any of these it is the best of all, and not promoted. The first wins a tie.

    Args:
        validation: Recall@10 on validation of each strategy that ran.
        transfers: the verdicts on all of them but `scratch`.
    """
    sound = [s for s in validation if s == "scratch" or transfers[s] == "positive"]
    return max(sound or validation, key=lambda s: validation[s]), bool(sound)


def _find_scratch(context: AdaptContext, split: str) -> Run | None:
    """The `scratch` trials of an earlier call in this folder, if there is one for each of the seeds."""
    files = _ranks_files(context, "scratch", split)
    return _pool(files) if all(file.is_file() for file in files) else None

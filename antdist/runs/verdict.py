"""Judge the trials of a target: pooled results, the transfer of each strategy, the choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antdist.config.schema import RelearnConfig, Strategy
from antdist.io.logs import get_logger
from antdist.runs.trials import SPLITS, strategies_of, trial_folder

if TYPE_CHECKING:
    from antdist.evaluation.report import Row
    from antdist.evaluation.results import Run
    from antdist.evaluation.significance import Transfer, Verdict

logger = get_logger(__name__)

VERDICT = "verdict.json"  # in the run's folder: what it ended with


@dataclass(frozen=True)
class Judged:
    """What the trials show. `rows` are the test table's; `verdicts` those on validation, which decide on promotion."""

    target: str
    seeds: list[int]
    rows: list[Row]
    verdicts: Mapping[Strategy, Verdict]
    folder: Path
    notes: list[str]

    def lines(self) -> list[str]:
        from antdist.evaluation.report import results_table

        return [
            f"test users of {self.target}, best epoch of each trial by validation Recall@10:",
            results_table(self.rows),
            *self.notes,
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "seeds": self.seeds,
            "test": [asdict(row) for row in self.rows],
            "validation verdicts": {strategy: asdict(verdict) for strategy, verdict in self.verdicts.items()},
            "notes": self.notes,
            "folder": str(self.folder),
        }


def _pooled(config: RelearnConfig, folder: Path, strategies: list[Strategy]) -> dict[tuple[str, str], Run]:
    """What trials reached, by strategy and split, with all seeds."""
    from antdist.evaluation.results import load_ranks, pool

    return {
        (strategy, split): pool([load_ranks(trial_folder(folder, strategy, s) / f"{split}.npz") for s in config.seeds])
        for strategy in strategies
        for split in SPLITS
    }


def _judge(config: RelearnConfig, folder: Path, runs: Mapping[tuple[str, str], Run], notes: list[str]) -> Judged:
    from antdist.evaluation.report import results_row
    from antdist.evaluation.significance import judge

    scratch = {split: runs.get(("scratch", split)) or _known_scratch(folder, config, split) for split in SPLITS}
    if scratch["test"] is None:
        logger.warning(
            f"no scratch trials with the same seeds in {folder}: the transfer is unknown (strategy=scratch makes them)"
        )
    strategies = [s for s in strategies_of(config) if (s, "test") in runs]
    verdicts: dict[Strategy, Verdict] = {
        s: judge(runs[s, "validation"], scratch["validation"]) for s in strategies if s != "scratch"
    }
    rows = [
        results_row(s, runs[s, "test"], None if s == "scratch" else judge(runs[s, "test"], scratch["test"]))
        for s in strategies
    ]
    return Judged(str(config.target), config.seeds, rows, verdicts, folder, notes)


def choose(validation: Mapping[Strategy, float], transfers: Mapping[Strategy, Transfer]) -> tuple[Strategy, bool]:
    """The strategy whose model is registered, and whether it may become champion.

    Transfer must show that it helps: the best on validation is taken from `scratch` and those whose transfer is positive.
    Where neither is at hand it is the best of all, and not promoted. The first wins a tie.

    Args:
        validation: Recall@10 on validation of each strategy that ran.
        transfers: the verdicts on all of them but `scratch`.
    """
    sound = [s for s in validation if s == "scratch" or transfers[s] == "positive"]
    return max(sound or validation, key=lambda s: validation[s]), bool(sound)


def _known_scratch(folder: Path, config: RelearnConfig, split: str) -> Run | None:
    """The `scratch` trials that this run's folder holds from an earlier call, if for all of the same seeds."""
    from antdist.evaluation.results import load_ranks, pool

    files = [trial_folder(folder, "scratch", seed) / f"{split}.npz" for seed in config.seeds]
    return pool([load_ranks(file) for file in files]) if all(file.is_file() for file in files) else None

"""The trials of an adaptation: one strategy with one seed each, in a folder and MLflow run of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from antdist.config.schema import RelearnConfig, Strategy
from antdist.runs.folder import RunFolder, run_folder
from antdist.runs.records import TrialResult

AUTO: tuple[Strategy, ...] = ("scratch", "finetune", "relearn")
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Trial:
    """One strategy with one seed on a target."""

    target: str
    strategy: Strategy
    seed: int
    folder: RunFolder

    def __str__(self) -> str:
        return f"{self.strategy}-seed{self.seed}"

    @property
    def is_trained(self) -> bool:
        result = self.folder.read_result(TrialResult)
        return result is not None and result.error is None


def common_config(config: RelearnConfig) -> RelearnConfig:
    """What all trials of a run share: without strategies, seeds and parent, in which they may differ."""
    return config.model_copy(update={"strategy": "auto", "seeds": [0], "parent": None})


def strategies_of(config: RelearnConfig) -> list[Strategy]:
    """The strategies that a call runs, in the order in which they win ties."""
    if config.strategy == "auto":
        return list(AUTO)
    if isinstance(config.strategy, list):
        return [strategy for strategy in get_args(Strategy) if strategy in config.strategy]
    return [config.strategy]


def trials_of(config: RelearnConfig) -> list[Trial]:
    """The trials that a call runs: for each strategy all seeds."""
    folder = run_folder(config)
    return [
        Trial(str(config.target), strategy, seed, folder.trial(strategy, seed))
        for strategy in strategies_of(config)
        for seed in config.seeds
    ]

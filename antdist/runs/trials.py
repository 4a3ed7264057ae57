"""The trials of an adaptation: their strategies, seeds and folders."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from antdist.config.schema import RelearnConfig, Strategy
from antdist.io.files import read_json
from antdist.tracking.store import tracking_uri

AUTO: tuple[Strategy, ...] = ("scratch", "finetune", "relearn")
SPLITS = ("validation", "test")
Trial = tuple[Strategy, int]  # strategy, seed


def adaptation_folder(config: RelearnConfig) -> Path:
    return Path(config.ray.storage).resolve() / config.name / str(config.target)


def store_of(config: RelearnConfig) -> str:
    return tracking_uri(config.tracking, Path(config.ray.storage).resolve())


def shared(config: RelearnConfig) -> RelearnConfig:
    """What all trials of a run have in common: strategies, seeds and parents are their own."""
    return config.model_copy(update={"strategy": "auto", "seeds": [0], "parent": None})


def is_trained(folder: Path, trial: Trial) -> bool:
    outcome = read_json(trial_folder(folder, *trial) / "outcome.json")
    return outcome is not None and "error" not in outcome


def strategies_of(config: RelearnConfig) -> list[Strategy]:
    """The strategies that a call runs, in the order in which they win ties."""
    if config.strategy == "auto":
        return list(AUTO)
    if isinstance(config.strategy, list):
        return [strategy for strategy in get_args(Strategy) if strategy in config.strategy]
    return [config.strategy]


def trials_of(config: RelearnConfig) -> list[Trial]:
    return [(strategy, seed) for strategy in strategies_of(config) for seed in config.seeds]


def trial_folder(folder: Path, strategy: Strategy, seed: int) -> Path:
    return folder / f"{strategy}-seed{seed}"

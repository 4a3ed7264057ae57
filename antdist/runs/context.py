"""A run as the checks resolved it, once: what follows takes it, or the part of it that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from antdist.config.schema import PretrainConfig, RelearnConfig
from antdist.data.domain import Domain
from antdist.io.logs import get_logger
from antdist.report import Report
from antdist.runs.folder import RunFolder, absolute
from antdist.runs.trials import Trial, trials_of
from antdist.tracking.resolve import ResolvedModel

logger = get_logger(__name__)
Config = TypeVar("Config", PretrainConfig, RelearnConfig)


@dataclass(repr=False)
class CheckReport(Report):
    """What was checked, a line each; notes on what is allowed but worth knowing; figures to judge by."""

    checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        checked = [f"ok    {line}" for line in self.checked] + [f"note  {line}" for line in self.notes]
        return checked + [f"      {k}: {v}" for k, v in self.figures.items()]

    def to_json(self) -> dict[str, Any]:
        return {"checked": self.checked, "notes": self.notes, **self.figures}

    def log_notes(self) -> None:
        for note in self.notes:
            logger.warning(f"note: {note}")


@dataclass(frozen=True)
class RunContext(Generic[Config]):
    """A run, resolved.

    Args:
        config: as given, for records and comparison; workers get `with_absolute_paths(config)`.
        store: the tracking store's URI.
        start: what `from`, `resume` or `continue` names.
    """

    config: Config = field(repr=False)  # it and `store` may hold a password
    store: str = field(repr=False)
    folder: RunFolder
    start: ResolvedModel | None
    report: CheckReport


@dataclass(frozen=True)
class PretrainContext(RunContext[PretrainConfig]):
    """A pre-training, resolved. `recorded`: fingerprints in `run.json`, by which domains were opened.

    Not its catalogue, which would keep feature tables mapped and in the node's cache while the workers train.
    """

    domains: list[Domain]
    recorded: dict[str, str] | None

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each domain's manifest."""
        return {domain.name: domain.fingerprint for domain in self.domains}


@dataclass(frozen=True)
class AdaptContext(RunContext[RelearnConfig]):
    """An adaptation, resolved."""

    domain: Domain  # the target

    @property
    def trials(self) -> list[Trial]:
        return trials_of(self.config)

    @property
    def parent(self) -> str | None:
        """The URI of the pre-trained model."""
        return None if self.start is None else self.start.uri


def with_absolute_paths(config: Config) -> Config:
    """The configuration with absolute paths: Ray starts workers in another working folder."""

    def resolve(key: str, path: str) -> str:
        if key in ("resume", "continue", "from"):  # a MODEL, which may be a folder
            return str(Path(path).resolve()) if Path(path).is_dir() else path
        if key == "data.cache":
            path = str(Path(path).expanduser())
        return str(Path(path).resolve()) if key == "ray.storage" else absolute(path)

    return map_paths(config, resolve)


def map_paths(config: Config, change: Callable[[str, str], str]) -> Config:
    """The configuration with `change(key, path)` in place of each path, URI or MODEL that is set."""

    def changed(section: BaseModel, keys: Mapping[str, str]) -> dict[str, str]:
        given = {name: getattr(section, name, None) for name in keys}
        return {name: change(keys[name], path) for name, path in given.items() if path}

    data = changed(config.data, {"root": "data.root", "cache": "data.cache"})
    ray = changed(config.ray, {"storage": "ray.storage", "remote_storage": "ray.remote_storage"})
    parent = "from" if isinstance(config, RelearnConfig) else "continue"
    changes: dict[str, Any] = changed(config, {"resume": "resume", "parent": parent})
    changes |= {"data": config.data.model_copy(update=data), "ray": config.ray.model_copy(update=ray)}
    return config.model_copy(update=changes)

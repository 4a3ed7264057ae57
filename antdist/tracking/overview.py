"""The registry at a glance: every version with its aliases, its validation, its verdict, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antdist.config.schema import TrackingConfig
from antdist.errors import UserError
from antdist.report import Report
from antdist.tracking.registry import validation_of
from antdist.tracking.store import check_reachable, connect, redact, sqlite_file, told_clearly, tracking_uri

if TYPE_CHECKING:
    from rich.table import Table

PAGE = 1000
FINGERPRINT = "fingerprint."
COLUMNS = ("model", "aliases", "Recall@10", "strategy", "transfer", "registered", "lineage")
ARROW = " <- "


@dataclass(frozen=True)
class Version:
    """A registered version. `digest` is None if it was not antdist that registered it."""

    name: str
    version: int
    aliases: Sequence[str]
    validation: float | None  # Recall@10 on validation users
    target: str | None
    strategy: str | None
    transfer: str | None
    parent: str | None  # models:/NAME/VERSION, or as the model was named
    fingerprints: Mapping[str, str]  # domain to manifest fingerprint
    registered: datetime
    run_id: str | None
    source: str
    digest: str | None
    training_state: str | None  # its path below the run's artifacts

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def figure(self) -> str:
        return "" if self.validation is None else f"{self.validation:.4f}"


@dataclass(frozen=True, repr=False)
class Overview(Report):
    """Versions by name, the newest of each first; `lineage` of each, by uri, from its own data back to the first."""

    table_key = "models"

    tracking_uri: str
    versions: Sequence[Version]
    lineage: Mapping[str, Sequence[str]]

    def lines(self) -> list[str]:
        if not self.versions:
            return ["no models"]
        rows = [COLUMNS, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def table(self) -> Table:
        """The same for a terminal: aliases, strategy and transfer, and the steps of lineage one below the other."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for column in ("model", "aliases", "Recall@10", "transfer", "registered", "lineage"):
            table.add_column(column, no_wrap=column not in ("model", "lineage"), overflow="fold")
        for model, aliases, figure, strategy, transfer, registered, steps in self._rows():
            verdict = "\n".join(filter(None, (strategy, transfer)))
            cells = (
                model,
                aliases.replace(", ", "\n"),
                figure,
                verdict,
                registered,
                steps.replace(ARROW, f"\n{ARROW[1:]}"),
            )
            table.add_row(*map(Text, cells))  # names may hold what rich takes for markup
        return table

    def to_json(self) -> dict[str, Any]:
        told = [
            {
                **asdict(version),
                "uri": version.uri,
                "source": redact(version.source),
                "lineage": self.lineage[version.uri],
            }
            for version in self.versions
        ]
        return {"tracking_uri": redact(self.tracking_uri), "models": told}

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                f"{version.name}/{version.version}",
                ", ".join(version.aliases),
                version.figure,
                version.strategy or "",
                version.transfer or "",
                f"{version.registered:%Y-%m-%d}",
                ARROW.join(self.lineage[version.uri]),
            )
            for version in self.versions
        ]


def registry_uri(storage: Path, given: str | None) -> str:
    """The store that `given`, MLFLOW_TRACKING_URI or the runs' folder names, for those who only read or tidy it.

    Raises:
        UserError: there is none, or it does not answer.
    """
    uri = tracking_uri(TrackingConfig(uri=given), storage)
    file = sqlite_file(uri)
    if file is not None and not file.is_file():
        raise UserError(
            "no registry here",
            where=file,
            remedy="name the folder of the runs with --storage, or the store with --tracking-uri",
        )
    check_reachable(uri)
    return uri


def overview(uri: str, pattern: str = "*") -> Overview:
    """All versions of the models whose name fits `pattern` (`*`, `?`, `[...]`).

    Raises:
        UserError: the store is away, or has models but none of that name.
    """
    known = registered(uri)
    chosen = [version for version in known if fnmatchcase(version.name, pattern)]
    if known and not chosen:
        names = ", ".join(sorted({version.name for version in known})[:10])
        raise UserError(f"no model is named {pattern!r}; known names: {names}", where="--name", remedy="correct it")
    by_uri = {version.uri: version for version in known}
    return Overview(uri, chosen, {version.uri: lineage(version, by_uri) for version in chosen})


def registered(uri: str) -> list[Version]:
    """All versions of all models, by name, the newest of each first. Raises UserError if the store is away."""
    with told_clearly(uri):
        client = connect(uri)
        aliases: dict[tuple[str, int], list[str]] = {}
        for model in _pages(client.search_registered_models):
            # the versions that a search gives may lack theirs
            for alias, number in client.get_registered_model(model.name).aliases.items():
                aliases.setdefault((model.name, int(number)), []).append(alias)
        found = [_version(version, aliases) for version in _pages(client.search_model_versions)]
    return sorted(found, key=lambda version: (version.name, -version.version))


def lineage(version: Version, known: Mapping[str, Version]) -> list[str]:
    """From the data of a version to its parent, the parent's data, and so on: `food 3f2a1b9c`, `models:/pretrain/3`, ..."""
    steps, passed, at = [_data(version)], {version.uri}, version
    while at.parent is not None:
        parent = known.get(at.parent)
        if parent is None:
            return [*steps, f"{at.parent} (not in the registry)" if at.parent.startswith("models:") else at.parent]
        if parent.uri in passed:  # tags can be edited
            return [*steps, f"{parent.uri} (in a circle)"]
        steps += [parent.uri, _data(parent)]
        passed.add(parent.uri)
        at = parent
    return steps


def _data(version: Version) -> str:
    prints = ", ".join(f"{domain} {value[:8]}" for domain, value in sorted(version.fingerprints.items()))
    return prints or "(unknown data)"


def _version(found: Any, aliases: Mapping[tuple[str, int], Sequence[str]]) -> Version:
    tags, number = found.tags, int(found.version)
    return Version(
        name=found.name,
        version=number,
        aliases=sorted(aliases.get((found.name, number), [])),
        validation=validation_of(found),
        target=tags.get("target"),
        strategy=tags.get("strategy"),
        transfer=tags.get("transfer"),
        parent=tags.get("parent"),
        fingerprints={k.removeprefix(FINGERPRINT): v for k, v in tags.items() if k.startswith(FINGERPRINT)},
        registered=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
        run_id=found.run_id,
        source=found.source,
        digest=tags.get("digest"),
        training_state=tags.get("training_state"),
    )


def _pages(search: Any) -> list[Any]:
    """All that a search of MLflow's gives, page by page."""
    page = search(max_results=PAGE)
    found = list(page)
    while page.token:
        page = search(max_results=PAGE, page_token=page.token)
        found += page
    return found

"""An overview of the registry: every version with its aliases, validation metric, verdict and lineage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antdist.config.schema import TrackingConfig
from antdist.errors import UserError
from antdist.io.progress import align_columns
from antdist.report import Report
from antdist.tracking.registry import validation_metric
from antdist.tracking.store import check_reachable, connect, redact, sqlite_file, tracking_uri, translate_errors

if TYPE_CHECKING:
    from rich.table import Table

PAGE = 1000
FINGERPRINT = "fingerprint."
COLUMNS = ("model", "aliases", "Recall@10", "strategy", "transfer", "registered", "lineage")
ARROW = " <- "


@dataclass(frozen=True)
class Version:
    """A registered version. `digest` is None unless antdist registered it."""

    name: str
    version: int
    aliases: Sequence[str]
    validation: float | None  # Recall@10 on validation users
    target: str | None
    strategy: str | None
    transfer: str | None
    parent: str | None  # models:/NAME/VERSION, or as the user named it
    fingerprints: Mapping[str, str]  # domain to manifest fingerprint
    registered: datetime
    run_id: str | None
    source: str
    digest: str | None
    training_state: str | None  # path below the run's artifacts

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def figure(self) -> str:
        return "" if self.validation is None else f"{self.validation:.4f}"


@dataclass(frozen=True, repr=False)
class Overview(Report):
    """Versions by name, the newest first, and by URI the lineage of each back to its first ancestor."""

    table_key = "models"

    tracking_uri: str
    versions: Sequence[Version]
    lineage: Mapping[str, Sequence[str]]

    def lines(self) -> list[str]:
        if not self.versions:
            return ["no models"]
        return align_columns([COLUMNS, *self._rows()])

    def table(self) -> Table:
        """Return a table for a terminal, with aliases, verdict and lineage broken into lines."""
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
            table.add_row(*map(Text, cells))  # Text: names may contain rich markup
        return table

    def to_json(self) -> dict[str, Any]:
        models = [
            {
                **asdict(version),
                "uri": version.uri,
                "source": redact(version.source),
                "lineage": self.lineage[version.uri],
            }
            for version in self.versions
        ]
        return {"tracking_uri": redact(self.tracking_uri), "models": models}

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
    """Return the URI of an existing store: `given`, MLFLOW_TRACKING_URI, or the one in the runs' folder.

    For commands that read or tidy the registry and must not create one.

    Raises:
        UserError: there is no store, or it does not answer.
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


def load_overview(uri: str, pattern: str = "*") -> Overview:
    """Load all versions of the models whose name matches `pattern` (`*`, `?`, `[...]`).

    Raises:
        UserError: the store is unavailable, or has models but none of that name.
    """
    known = load_versions(uri)
    chosen = [version for version in known if fnmatchcase(version.name, pattern)]
    if known and not chosen:
        names = ", ".join(sorted({version.name for version in known})[:10])
        raise UserError(f"no model is named {pattern!r}; known names: {names}", where="--name", remedy="correct it")
    by_uri = {version.uri: version for version in known}
    return Overview(uri, chosen, {version.uri: trace_lineage(version, by_uri) for version in chosen})


def load_versions(uri: str) -> list[Version]:
    """Load all versions of all models, by name, the newest of each first.

    Raises:
        UserError: the store is unavailable.
    """
    with translate_errors(uri):
        client = connect(uri)
        aliases: dict[tuple[str, int], list[str]] = {}
        for model in _search_all(client.search_registered_models):
            # versions from a search may lack their aliases
            for alias, number in client.get_registered_model(model.name).aliases.items():
                aliases.setdefault((model.name, int(number)), []).append(alias)
        found = [_to_version(version, aliases) for version in _search_all(client.search_model_versions)]
    return sorted(found, key=lambda version: (version.name, -version.version))


def trace_lineage(version: Version, known: Mapping[str, Version]) -> list[str]:
    """List a version's data, parent, parent's data and so on: `food 3f2a1b9c`, `models:/pre/3`, ..."""
    steps, visited = [_describe_data(version)], {version.uri}
    while version.parent is not None:
        parent = known.get(version.parent)
        if parent is None:
            unknown = " (not in the registry)" if version.parent.startswith("models:") else ""
            return [*steps, f"{version.parent}{unknown}"]
        if parent.uri in visited:  # tags can be edited
            return [*steps, f"{parent.uri} (circular lineage)"]
        steps += [parent.uri, _describe_data(parent)]
        visited.add(parent.uri)
        version = parent
    return steps


def _describe_data(version: Version) -> str:
    prints = ", ".join(f"{domain} {value[:8]}" for domain, value in sorted(version.fingerprints.items()))
    return prints or "(unknown data)"


def _to_version(found: Any, aliases: Mapping[tuple[str, int], Sequence[str]]) -> Version:
    tags, number = found.tags, int(found.version)
    return Version(
        name=found.name,
        version=number,
        aliases=sorted(aliases.get((found.name, number), [])),
        validation=validation_metric(found),
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


def _search_all(search: Any) -> list[Any]:
    """Return the results of all pages of an MLflow search."""
    page = search(max_results=PAGE)
    found = list(page)
    while page.token:
        page = search(max_results=PAGE, page_token=page.token)
        found += page
    return found

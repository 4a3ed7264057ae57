"""`antdist models --prune`: old versions and their files removed, by a stated policy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from antdist.errors import UserError
from antdist.report import Report
from antdist.tracking.overview import Version, registered
from antdist.tracking.registry import MODEL
from antdist.tracking.store import StoreAway, connect, in_a_line, moving_files, told_clearly


@dataclass(frozen=True, repr=False)
class Pruning(Report):
    """What went (or with `dry_run` would go), and what stayed."""

    removed: Sequence[Version]
    kept: Sequence[Version]
    dry_run: bool

    def lines(self) -> list[str]:
        verb = "would remove" if self.dry_run else "removed"
        figures = (f", validation Recall@10 {v.figure}" if v.figure else "" for v in self.removed)
        told = [
            f"{verb} {version.uri} (registered {version.registered:%Y-%m-%d %H:%M}{figure})"
            for version, figure in zip(self.removed, figures, strict=True)
        ]
        return [*told, f"{verb} {len(self.removed)} versions, {len(self.kept)} stay"]

    def to_json(self) -> dict[str, Any]:
        return {
            "dry_run": self.dry_run,
            "removed": [version.uri for version in self.removed],
            "kept": [version.uri for version in self.kept],
        }

    def records(self) -> list[dict[str, Any]]:
        kinds = (("removed", self.removed), ("kept", self.kept))
        return [{"model": version.uri, "decision": kind} for kind, versions in kinds for version in versions]


def prune(uri: str, *, pattern: str = "*", keep: int = 5, dry_run: bool = False) -> Pruning:
    """Remove what `superfluous` names, each with its model and training state in the artifact store. Its run stays.

    The files go first: cut off, or refused, the version is still listed, and goes with the next call.

    Raises:
        UserError: the store is away, or refuses to remove files.
    """
    stay = registered(uri)
    removed = []
    for version in superfluous(stay, keep, pattern):
        others = [other for other in stay if other.uri != version.uri]
        if dry_run or _remove(uri, version, others):
            removed.append(version)
            stay = others
    return Pruning(removed, stay, dry_run)


def superfluous(versions: Sequence[Version], keep: int, pattern: str = "*") -> list[Version]:
    """The versions that may go: of names that fit `pattern`, all but the newest `keep` of each name, those with an alias,
    those that one which stays has as its parent or is a copy of, and those that antdist did not register."""
    by_uri = {version.uri: version for version in versions}
    ages: dict[str, list[int]] = defaultdict(list)
    for version in versions:
        ages[version.name].append(version.version)
    oldest_kept = {name: sorted(numbers)[-keep:][0] for name, numbers in ages.items()}
    stays = {
        version.uri
        for version in versions
        if version.aliases
        or not _places(version)
        or version.version >= oldest_kept[version.name]
        or not fnmatchcase(version.name, pattern)
    }
    waiting = list(stays)
    while waiting:
        last = by_uri[waiting.pop()]
        for needed in (last.parent, last.source):  # a copy within the registry has another version for its source
            if needed in by_uri and needed not in stays:
                stays.add(needed)
                waiting.append(needed)
    return [version for version in versions if version.uri not in stays]


def _remove(uri: str, version: Version, others: Sequence[Version]) -> bool:
    """Whether the version went; it stays if it has got an alias meanwhile. Files that `others` share stay."""
    shared = {place for other in others if other.run_id == version.run_id for place in _places(other)}
    with told_clearly(uri):
        client = connect(uri)
        if version.version in {int(number) for number in client.get_registered_model(version.name).aliases.values()}:
            return False
        artifacts = version.source.removesuffix(f"/{_model_place(version)}")  # its run may be gone
        for place in _places(version) - shared:
            _remove_files(uri, artifacts, place, version)
        client.delete_model_version(version.name, str(version.version))
    return True


def _places(version: Version) -> set[str]:
    """Where `register` put its files, below its run's artifacts; none if it was not `register` that put them there."""
    if version.digest is None or not version.source.endswith(f"/{_model_place(version)}"):
        return set()
    return {_model_place(version)} | ({version.training_state} if version.training_state else set())


def _model_place(version: Version) -> str:
    return f"{MODEL}/{(version.digest or '')[:12]}"


def _remove_files(uri: str, artifacts: str, place: str, version: Version) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        with moving_files(uri):
            get_artifact_repository(artifacts, tracking_uri=uri).delete_artifacts(place)
    except (MlflowException, StoreAway, OSError, NotImplementedError) as error:
        raise UserError(
            f"its files cannot be removed ({in_a_line(error)})",
            where=version.uri,
            remedy="check that the artifact store lets you remove files; the version stays until then",
        ) from None

"""`antdist models --prune`: remove old versions and their files by a stated policy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from antdist.errors import UserError
from antdist.io.storage import first_line
from antdist.report import Report
from antdist.tracking.overview import Version, load_versions
from antdist.tracking.registry import MODEL
from antdist.tracking.store import StoreUnavailable, connect, transfer_artifacts, translate_errors


@dataclass(frozen=True, repr=False)
class Pruning(Report):
    """The versions that were removed (with `dry_run`: would be), and those that stay."""

    removed: Sequence[Version]
    kept: Sequence[Version]
    dry_run: bool

    def lines(self) -> list[str]:
        verb = "would remove" if self.dry_run else "removed"
        figures = (f", validation Recall@10 {v.figure}" if v.figure else "" for v in self.removed)
        removed = [
            f"{verb} {version.uri} (registered {version.registered:%Y-%m-%d %H:%M}{figure})"
            for version, figure in zip(self.removed, figures, strict=True)
        ]
        noun = "version" if len(self.removed) == 1 else "versions"
        return [*removed, f"{verb} {len(self.removed)} {noun}, {len(self.kept)} stay"]

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
    """Remove the versions of `select_prunable`, each with its model and training state. Their runs stay.

    The files go first: if their removal is interrupted or refused, the version is still listed, and goes with the next
    call.

    Raises:
        UserError: the store is unavailable, or refuses to remove files.
    """
    stay = load_versions(uri)
    removed = []
    for version in select_prunable(stay, keep, pattern):
        others = [other for other in stay if other.uri != version.uri]
        if dry_run or _remove(uri, version, others):
            removed.append(version)
            stay = others
    return Pruning(removed, stay, dry_run)


def select_prunable(versions: Sequence[Version], keep: int, pattern: str = "*") -> list[Version]:
    """Select the versions to remove among the models whose name matches `pattern`.

    These stay: the newest `keep` of each name, versions with an alias, versions that antdist did not register, and every
    ancestor and original of a version that stays.
    """
    by_uri = {version.uri: version for version in versions}
    ages: dict[str, list[int]] = defaultdict(list)
    for version in versions:
        ages[version.name].append(version.version)
    oldest_kept = {name: sorted(numbers)[-keep:][0] for name, numbers in ages.items()}
    stays = {
        version.uri
        for version in versions
        if version.aliases
        or not _artifact_paths(version)
        or version.version >= oldest_kept[version.name]
        or not fnmatchcase(version.name, pattern)
    }
    pending = list(stays)
    while pending:
        version = by_uri[pending.pop()]
        for needed in (version.parent, version.source):  # the source of a copy within the registry is another version
            if needed in by_uri and needed not in stays:
                stays.add(needed)
                pending.append(needed)
    return [version for version in versions if version.uri not in stays]


def _remove(uri: str, version: Version, others: Sequence[Version]) -> bool:
    """Remove a version, but not files that `others` share. Returns False if it has an alias by now."""
    shared = {path for other in others if other.run_id == version.run_id for path in _artifact_paths(other)}
    with translate_errors(uri):
        client = connect(uri)
        if version.version in {int(number) for number in client.get_registered_model(version.name).aliases.values()}:
            return False
        root = version.source.removesuffix(f"/{_model_path(version)}")  # not from the run, which may be gone
        for path in _artifact_paths(version) - shared:
            _remove_files(uri, root, path, version)
        client.delete_model_version(version.name, str(version.version))
    return True


def _artifact_paths(version: Version) -> set[str]:
    """Return the paths below the run's artifacts that `register` wrote; none if something else wrote them."""
    if version.digest is None or not version.source.endswith(f"/{_model_path(version)}"):
        return set()
    return {_model_path(version)} | ({version.training_state} if version.training_state else set())


def _model_path(version: Version) -> str:
    return f"{MODEL}/{(version.digest or '')[:12]}"


def _remove_files(uri: str, root: str, path: str, version: Version) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        with transfer_artifacts(uri):
            get_artifact_repository(root, tracking_uri=uri).delete_artifacts(path)
    except (MlflowException, StoreUnavailable, OSError, NotImplementedError) as error:
        raise UserError(
            f"its files cannot be removed ({first_line(error)})",
            where=version.uri,
            remedy="check that the artifact store allows you to remove files; the version stays until then",
        ) from None

"""Register models: versions with digest and lineage, and the aliases `newest` and `champion`."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antdist.errors import UserError
from antdist.io.files import file_sha256
from antdist.tracking.store import connect, redact, retry_unavailable, transfer_artifacts
from antdist.tracking.tags import clean_key

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL, TRAINING_STATE = "model", "training_state"  # artifact paths; the second also a tag
VALIDATION = "validation_recall_at_10"
NAME = r"[^/@:'\"]+"
# MLflow writes this file into every folder that it has loaded a model from, even in a local artifact store.
MLFLOW_NOTE = "registered_model_meta"


@dataclass(frozen=True)
class Lineage:
    """The sources of a model: data (domain name to manifest fingerprint), strategy and parent."""

    fingerprints: Mapping[str, str]
    target: str | None = None  # the domain it was adapted to; None for pre-training
    strategy: str | None = None
    parent: str | None = None  # `ResolvedModel.uri`

    @property
    def task(self) -> str:
        """Name the scope in which validation metrics compare: the same target or auxiliary data."""
        if self.target is not None:
            return f"target:{self.fingerprints[self.target]}"
        return f"pretrain:{hashlib.sha256(' '.join(sorted(self.fingerprints.values())).encode()).hexdigest()}"

    def tags(self) -> dict[str, str]:
        """Return the tags of the run and of the model version."""
        fields = {"task": self.task, "target": self.target, "strategy": self.strategy, "parent": self.parent}
        prints = {f"fingerprint.{clean_key(domain)}": value for domain, value in self.fingerprints.items()}
        return {**{key: value for key, value in fields.items() if value is not None}, **prints}


@dataclass(frozen=True)
class ModelVersionInfo:
    """A registered version, and which version holds `champion` after registering."""

    name: str
    version: int
    source: str
    digest: str
    champion: str  # why the alias moved or stayed, in words
    holder: str | None  # the URI of the champion
    holder_strategy: str | None

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def register(
    uri: str,
    run_id: str,
    folder: Path,
    name: str,
    lineage: Lineage,
    *,
    validation: float | None = None,
    promote: bool = True,
    training_state: Path | None = None,
    tags: Mapping[str, str] | None = None,
    aliases: Iterable[str] = (),
) -> ModelVersionInfo:
    """Upload a model's folder to its run and make it a version of `name`, once for each run and content.

    The alias `newest` moves to the highest version. `champion` moves to this version if its `validation` beats the
    holder's for the same task, or if nothing holds it yet; a holder for another task keeps it. Retries for about two
    minutes while the store is unavailable.

    Args:
        validation: Recall@10 on validation users.
        promote: False leaves `champion` where it is.
        aliases: moved to this version in any case.

    Raises:
        UserError: a folder that is missing, empty or holds links; a name that MLflow refuses; an unavailable store.
    """
    check_model_name(name)
    digest = folder_digest(folder)
    wanted = {key: redact(value) for key, value in {**lineage.tags(), **(tags or {}), "digest": digest}.items()}
    if validation is not None:
        wanted[VALIDATION] = repr(float(validation))
    if training_state is not None:
        state_digest = folder_digest(training_state)
        wanted.update(training_state=f"{TRAINING_STATE}/{state_digest[:12]}", training_state_digest=state_digest)
    aliases = list(aliases)
    return retry_unavailable(
        lambda: _register(uri, run_id, folder, name, wanted, promote, training_state, aliases), uri
    )


def _register(
    uri: str,
    run_id: str,
    folder: Path,
    name: str,
    tags: Mapping[str, str],
    promote: bool,
    training_state: Path | None,
    aliases: Iterable[str],
) -> ModelVersionInfo:
    """Continue where an earlier attempt ended: each step first checks what is already done."""
    client, digest = connect(uri), tags["digest"]
    version = next(
        (v for v in list_versions(client, name) if v.run_id == run_id and v.tags.get("digest") == digest), None
    )
    # A run may register several times (after each session): each content has its own path.
    path, known = f"{MODEL}/{digest[:12]}", {} if version is None else version.tags
    with transfer_artifacts(uri):
        if version is None:
            client.log_artifacts(run_id, str(folder), path)
        if training_state is not None and known.get(TRAINING_STATE) != tags[TRAINING_STATE]:
            # also of a longer run whose best model is already registered
            client.log_artifacts(run_id, str(training_state), tags[TRAINING_STATE])
    if version is None:
        source = f"{client.get_run(run_id).info.artifact_uri}/{path}"
        _ensure_model(client, name)
        version = client.create_model_version(name, source, run_id, tags=dict(tags))
    for key in [key for key in tags if version.tags.get(key) != tags[key]]:  # what became known later
        client.set_model_version_tag(name, version.version, key, tags[key])
    number = int(version.version)
    newest = find_alias_holder(client, name, "newest")
    if newest is None or int(newest.version) < number:
        client.set_registered_model_alias(name, "newest", str(number))
    for alias in aliases:
        client.set_registered_model_alias(name, alias, str(number))
    holder = find_alias_holder(client, name, "champion")
    moves, champion = compare_with_holder("champion", holder, version)
    if not promote:
        moves, champion = False, "kept from being champion by its caller"
    if moves:
        client.set_registered_model_alias(name, "champion", str(number))
        holder = version
    return ModelVersionInfo(
        name=name,
        version=number,
        source=version.source,
        digest=digest,
        champion=champion,
        holder=None if holder is None else f"models:/{name}/{holder.version}",
        holder_strategy=None if holder is None else holder.tags.get("strategy"),
    )


def check_model_name(name: str) -> None:
    """Raise UserError for a name that MLflow refuses."""
    if not re.fullmatch(NAME, name):
        raise UserError(
            f"{name!r} cannot name a registered model",
            where="tracking.registered_model",
            remedy="leave out / : @ and quotes",
        )


def compare_with_holder(alias: str, holder: Any, candidate: Any) -> tuple[bool, str]:
    """Decide whether an alias moves from `holder` (a version or None) to `candidate`, and say why.

    It moves if nothing holds it, or if the candidate's validation metric beats the holder's for the same task.
    """
    metric = validation_metric(candidate)
    if holder is not None and int(holder.version) == int(candidate.version):
        return False, f"{alias} already" + ("" if metric is None else f", with validation Recall@10 {metric:.4f}")
    if metric is None:
        return False, f"has no validation metric, so it cannot be {alias}"
    if holder is None:
        return True, f"{alias}: the first, with validation Recall@10 {metric:.4f}"
    incomparable = f"not comparable with the {alias}, version {holder.version}, which"
    if holder.tags.get("task") != candidate.tags.get("task"):
        return False, f"{incomparable} learned another task: it stays"
    best = validation_metric(holder)
    if best is None:
        return False, f"{incomparable} was not validated: it stays"
    against = f"validation Recall@10 {metric:.4f} against {best:.4f} of version {holder.version}"
    return (True, f"{alias}: {against}") if metric > best else (False, f"not {alias}: {against}")


def validation_metric(version: Any) -> float | None:
    """Return the validation Recall@10 of a version; None without one, or if it is NaN or Inf."""
    metric = version.tags.get(VALIDATION)
    return None if metric is None or not math.isfinite(float(metric)) else float(metric)


def find_alias_holder(client: MlflowClient, name: str, alias: str) -> Any:
    """Return the version that holds an alias, or None."""
    number = client.get_registered_model(name).aliases.get(alias)
    return None if number is None else client.get_model_version(name, str(number))


def list_versions(client: MlflowClient, name: str) -> list[Any]:
    """Return all versions of a model, oldest first; none if there is no such model."""
    found = client.search_model_versions(f"name = '{name}'", max_results=10_000)
    return sorted(found, key=lambda version: int(version.version))


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 over names and contents of a folder's files, by sorted relative name.

    Raises:
        UserError: no such folder, no file in it, or a link in it, which could lead out of the folder.
    """
    if not folder.is_dir():
        raise UserError("no such folder", where=folder, remedy="give the folder that holds the model's files")
    files = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise UserError("links are not registered or loaded", where=path, remedy="put the file itself there")
        if path.is_file() and path.name != MLFLOW_NOTE:
            files[path.relative_to(folder).as_posix()] = path
    if not files:
        raise UserError("the folder is empty", where=folder, remedy="give the folder that holds the model's files")
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(json.dumps([name, file_sha256(files[name])]).encode())
    return digest.hexdigest()

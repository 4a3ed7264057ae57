"""The registry of models: versions with digest and lineage, the aliases `newest` and `champion`, and MODEL looked up."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from antdist.errors import UserError
from antdist.io.files import file_sha256
from antdist.tracking.run import clean_key
from antdist.tracking.store import (
    StoreAway,
    connect,
    in_a_line,
    moving_files,
    patiently,
    redact,
    refused,
    told_clearly,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL, TRAINING_STATE = "model", "training_state"
NAME = r"[^/@:'\"]+"
VALIDATION = "validation_recall_at_10"
FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME/latest, runs:/ID/PATH or a folder"
# MLflow leaves this note in a folder that it has loaded a model from, even in a local artifact store.
MLFLOW_NOTE = "registered_model_meta"
FETCH_TRIALS = 3  # it was there a moment ago


@dataclass(frozen=True)
class Lineage:
    """Where a model comes from: what it learned from (domain name to manifest fingerprint), how, and from which version."""

    fingerprints: Mapping[str, str]
    target: str | None = None  # the domain it was adapted to; None for pre-training
    strategy: str | None = None
    parent: str | None = None  # `ResolvedModel.uri`

    @property
    def task(self) -> str:
        """What validation metrics may be compared within: the same target data, or the same auxiliary data."""
        if self.target is not None:
            return f"target:{self.fingerprints[self.target]}"
        return f"pretrain:{hashlib.sha256(' '.join(sorted(self.fingerprints.values())).encode()).hexdigest()}"

    def tags(self) -> dict[str, str]:
        """For the run and the model version."""
        told = {"task": self.task, "target": self.target, "strategy": self.strategy, "parent": self.parent}
        prints = {f"fingerprint.{clean_key(domain)}": value for domain, value in self.fingerprints.items()}
        return {**{key: value for key, value in told.items() if value is not None}, **prints}


@dataclass(frozen=True)
class ModelVersionInfo:
    """A registered version; `champion` says in words what became of that alias, `holder` which version has it, and
    `holder_strategy` by which strategy that one was made, if by one."""

    name: str
    version: int
    source: str
    digest: str
    champion: str
    holder: str | None
    holder_strategy: str | None

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class ResolvedModel:
    """A model in a local folder. `uri` is `models:/NAME/VERSION` where it is registered, else as it was named."""

    folder: Path
    uri: str
    run_id: str | None = None
    version: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


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
    """Upload a model's folder to its run and make it a version of `name`; again for the same run and content: nothing new.
    While the store is away it is tried again for about two minutes.

    The alias `newest` goes to the highest version. `champion` goes to this version if its `validation` (Recall@10 on
    validation users) beats the holder's for the same task, or if nothing holds it yet; a holder for another task keeps it.
    Without `promote` it stays where it is.

    Raises:
        UserError: a folder that is missing, empty or holds links; a name that MLflow refuses; a store that is away.
    """
    check_model_name(name)
    digest = folder_digest(folder)
    told = {key: redact(value) for key, value in {**lineage.tags(), **(tags or {}), "digest": digest}.items()}
    if validation is not None:
        told[VALIDATION] = repr(float(validation))
    state_digest = None if training_state is None else folder_digest(training_state)
    if state_digest is not None:
        told.update(training_state=f"{TRAINING_STATE}/{state_digest[:12]}", training_state_digest=state_digest)
    aliases = list(aliases)
    return patiently(lambda: _register(uri, run_id, folder, name, told, promote, training_state, aliases), uri)


def _register(
    uri: str,
    run_id: str,
    folder: Path,
    name: str,
    told: Mapping[str, str],
    promote: bool,
    training_state: Path | None,
    aliases: Iterable[str],
) -> ModelVersionInfo:
    """Goes on wherever an earlier trial ended: each step looks first for what is done."""
    client, digest = connect(uri), told["digest"]
    version = next((v for v in _versions(client, name) if v.run_id == run_id and v.tags.get("digest") == digest), None)
    # A run may register several times (after each session): each content has its own place.
    path, known = f"{MODEL}/{digest[:12]}", {} if version is None else version.tags
    with moving_files(uri):
        if version is None:
            client.log_artifacts(run_id, str(folder), path)
        if training_state is not None and known.get("training_state") != told["training_state"]:
            # also of a longer run whose best model is the one that is registered
            client.log_artifacts(run_id, str(training_state), told["training_state"])
    if version is None:
        source = f"{client.get_run(run_id).info.artifact_uri}/{path}"
        _ensure_model(client, name)
        version = client.create_model_version(name, source, run_id, tags=dict(told))
    for key in [key for key in told if version.tags.get(key) != told[key]]:  # what is known of it since
        client.set_model_version_tag(name, version.version, key, told[key])
    number = int(version.version)
    newest = alias_holder(client, name, "newest")
    if newest is None or int(newest.version) < number:
        client.set_registered_model_alias(name, "newest", str(number))
    for alias in aliases:
        client.set_registered_model_alias(name, alias, str(number))
    holder = alias_holder(client, name, "champion")
    moves, champion = judge("champion", holder, version)
    if not promote:
        moves, champion = False, "kept from being champion by its caller"
    if moves:
        client.set_registered_model_alias(name, "champion", str(number))
        holder = version
    held = None if holder is None else f"models:/{name}/{holder.version}"
    strategy = None if holder is None else holder.tags.get("strategy")
    return ModelVersionInfo(name, number, version.source, digest, champion, held, strategy)


def check_model_name(name: str) -> None:
    """Raises UserError for a name that MLflow refuses."""
    if not re.fullmatch(NAME, name):
        raise UserError(
            f"{name!r} cannot name a registered model",
            where="tracking.registered_model",
            remedy="leave out / : @ and quotes",
        )


def judge(alias: str, holder: Any, candidate: Any) -> tuple[bool, str]:
    """Whether an alias moves from `holder` (a model version or None) to `candidate`, and why, in words: it does if nothing
    holds it, or if the validation metric beats the holder's for the same task."""
    metric = validation_of(candidate)
    if holder is not None and int(holder.version) == int(candidate.version):
        return False, f"{alias} already" + ("" if metric is None else f", with validation Recall@10 {metric:.4f}")
    if metric is None:
        return False, f"has no validation metric, so it cannot be {alias}"
    if holder is None:
        return True, f"{alias}: the first, with validation Recall@10 {metric:.4f}"
    if holder.tags.get("task") != candidate.tags.get("task"):
        return (
            False,
            f"not comparable with the {alias}, version {holder.version}, which learned another task: it stays",
        )
    best = validation_of(holder)
    if best is None:
        return False, f"not comparable with the {alias}, version {holder.version}, which was not validated: it stays"
    against = f"validation Recall@10 {metric:.4f} against {best:.4f} of version {holder.version}"
    return (True, f"{alias}: {against}") if metric > best else (False, f"not {alias}: {against}")


def validation_of(version: Any) -> float | None:
    """Recall@10 on validation that a version was registered with; None without one, or where it is no number: nothing
    would ever beat it."""
    told = version.tags.get(VALIDATION)
    return None if told is None or not math.isfinite(float(told)) else float(told)


def resolve(model: str, uri: str, cache: Path | None = None) -> ResolvedModel:
    """Look MODEL up and bring it to a local folder, checked against the digest that was registered.

    Args:
        cache: where downloads are kept, a folder a digest; by default `antdist/models` below the user's cache folder.
            Artifacts on a local disk are used where they lie.

    Raises:
        UserError: a malformed reference, an unknown name, version, alias or run, nothing there, or another content.
    """
    found = _find(model, uri)
    if isinstance(found, Path):
        return ResolvedModel(found, str(found))
    if found.version is None:
        folder = _fetch(uri, found.source, None, model, cache)
        return ResolvedModel(folder, found.uri, found.run_id)
    folder = _fetch(uri, found.source, _registered_digest(found, "digest"), found.uri, cache)
    return ResolvedModel(folder, found.uri, found.run_id, found.version, found.tags)


def resolve_training_state(model: str, uri: str, cache: Path | None = None) -> ResolvedModel:
    """MODEL with the folder of its training state (of a folder: its subfolder `training_state`), checked like the model.

    Raises:
        UserError: as `resolve`, or a model without training state.
    """
    found = _find(model, uri)
    remedy = "resume a version that a training run registered, or start a new run from this model"
    if isinstance(found, Path):
        if (found / TRAINING_STATE).is_dir():
            return ResolvedModel(found / TRAINING_STATE, str(found))
        raise UserError(f"no folder {TRAINING_STATE} here, so no run can go on from it", where=found, remedy=remedy)
    path = found.tags.get(TRAINING_STATE)
    if path is None:
        raise UserError(
            "this model has no training state (it was imported, or registered without), so no run can go on from it",
            where=found.uri,
            remedy=remedy,
        )
    with told_clearly(uri):
        source = f"{connect(uri).get_run(found.run_id).info.artifact_uri}/{path}"
    folder = _fetch(uri, source, _registered_digest(found, "training_state_digest"), found.uri, cache)
    return ResolvedModel(folder, found.uri, found.run_id, found.version, found.tags)


def read_run_config(model: str, uri: str) -> str:
    """Return the configuration, as YAML, of the run that made a registered model, or of `runs:/ID`.

    Raises:
        UserError: no such model or run; a run that antdist did not start.
    """
    from mlflow.exceptions import MlflowException

    run = re.fullmatch(r"runs:/(\w+)(/.*)?", model)
    with told_clearly(uri), moving_files(uri), tempfile.TemporaryDirectory() as folder:
        client = connect(uri)
        run_id = run[1] if run else find_version(client, model).run_id
        try:
            return Path(client.download_artifacts(run_id, "config.yaml", folder)).read_text(encoding="utf-8")
        except (MlflowException, OSError):
            raise UserError(
                f"no config.yaml of run {run_id} in {redact(uri)}",
                where=model,
                remedy="name a model or run of antdist, or the store with --tracking-uri",
            ) from None


def is_registered(model: str) -> bool:
    """Whether MODEL names something in the tracking store, not a folder."""
    return model.startswith(("models:", "runs:"))


def alias_holder(client: MlflowClient, name: str, alias: str) -> Any:
    """The version that holds an alias, or None."""
    number = client.get_registered_model(name).aliases.get(alias)
    return None if number is None else client.get_model_version(name, str(number))


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and contents of a folder's files, by sorted relative name.

    Raises:
        UserError: no such folder, no file in it, or a link in it (it could lead out of the folder).
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
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(json.dumps([name, file_sha256(files[name])]).encode())
    return whole.hexdigest()


@dataclass(frozen=True)
class _Found:
    """A place in the store: a registered version, or artifacts of a run (then version is None)."""

    uri: str
    source: str
    run_id: str | None
    version: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


def _find(model: str, uri: str) -> _Found | Path:
    """Which folder, version or artifacts a reference means."""
    if model.startswith("models:"):
        with told_clearly(uri):
            return _as_found(find_version(connect(uri), model))
    if model.startswith("runs:"):
        parts = re.fullmatch(r"runs:/(?P<run>\w+)/(?P<path>[^/].*?)/?", model)
        if parts is None or ".." in parts["path"].split("/"):
            raise UserError("not a reference to a run's artifacts", where=model, remedy=f"write it as {FORMS}")
        with told_clearly(uri), moving_files(uri):
            return _find_artifacts(connect(uri), model, parts["run"], parts["path"])
    folder = Path(model)
    if re.match(r"\w+:", model) or not folder.is_dir():
        raise UserError("no such folder, and no reference to a model", where=model, remedy=f"give MODEL as {FORMS}")
    return folder.resolve()


def find_version(client: MlflowClient, model: str) -> Any:
    """The version, as MLflow gives it, that `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/NAME/latest` means.

    Raises:
        UserError: another form, or an unknown name, version or alias, with those that are known.
    """
    parts = re.fullmatch(rf"models:/(?P<name>{NAME})(?:@(?P<alias>[^/@:]+)|/(?P<version>[0-9]+|latest))", model)
    if parts is None:
        raise UserError("not a reference to a registered model", where=model, remedy=f"write it as {FORMS}")
    name, alias, number = parts["name"], parts["alias"], parts["version"]
    versions = _versions(client, name)
    if not versions:
        names = sorted(registered.name for registered in client.search_registered_models(max_results=1000))
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.5) or names[:10]
        known = f"known names: {', '.join(near)}" if near else "the registry is empty"
        raise UserError(f"no registered model {name!r}; {known}", where=model, remedy="correct the name")
    if alias is not None:
        aliases = client.get_registered_model(name).aliases
        if alias not in aliases:
            known = ", ".join(f"{key} (version {value})" for key, value in sorted(aliases.items())) or "none"
            raise UserError(f"{name!r} has no alias {alias!r}; it has: {known}", where=model, remedy="use one of these")
        number = str(aliases[alias])
    elif number == "latest":
        number = str(versions[-1].version)
    found = next((v for v in versions if int(v.version) == int(number or 0)), None)
    if found is None:
        known = ", ".join(str(v.version) for v in versions[-20:])
        raise UserError(f"{name!r} has no version {number}; it has: {known}", where=model, remedy="use one of these")
    return found


def _find_artifacts(client: MlflowClient, model: str, run_id: str, path: str) -> _Found:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(
            f"no run {run_id!r} in the tracking store", where=model, remedy="check the id, and tracking.uri"
        ) from None
    inside = client.list_artifacts(run_id, path)
    if not inside:
        known = ", ".join(item.path for item in client.list_artifacts(run_id)) or "none"
        raise UserError(
            f"this run has no artifacts at {path!r}; it has: {known}",
            where=model,
            remedy="use one of these, or register a model with this run first",
        )
    if all(item.is_dir for item in inside):  # `register` gives each content a folder of its own
        if len(inside) > 1:
            known = ", ".join(item.path for item in inside)
            raise UserError(f"this run has several models: {known}", where=model, remedy="name one of these")
        path = inside[0].path
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        if version.source.endswith(f"/{path}"):
            return _as_found(version)
    return _Found(f"runs:/{run_id}/{path}", f"{run.info.artifact_uri}/{path}", run_id)


def _as_found(version: Any) -> _Found:
    number = int(version.version)
    return _Found(f"models:/{version.name}/{number}", version.source, version.run_id, number, dict(version.tags))


def _registered_digest(found: _Found, tag: str) -> str:
    if tag not in found.tags:
        raise UserError(
            "this version was registered without a digest, so not by antdist: its files cannot be checked",
            where=found.uri,
            remedy="register it again with antdist, or download it and name its folder",
        )
    return found.tags[tag]


def _fetch(uri: str, source: str, digest: str | None, name: str, cache: Path | None) -> Path:
    """The artifacts at `source` in a local folder with this digest."""
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antdist" / "models"
    if digest is not None and _holds(cache / digest, digest):
        return cache / digest
    if source.startswith(("file:", "/")):
        return _checked(Path(url2pathname(urlsplit(source).path)), digest, name)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as temporary:
        arrived = patiently(lambda: _download(uri, source, Path(temporary), name), uri, FETCH_TRIALS)
        _checked(arrived, digest, name)
        kept = cache / (digest or folder_digest(arrived))
        if kept.is_dir() and not _holds(kept, kept.name):
            shutil.rmtree(kept)  # an older download, damaged since
        with contextlib.suppress(OSError):  # another process was faster, with the same content
            arrived.rename(kept)
    return kept


def _holds(folder: Path, digest: str) -> bool:
    """Whether a folder is there and whole; who tidies caches may have left it empty."""
    try:
        return folder_digest(folder) == digest
    except UserError:
        return False


def _download(uri: str, source: str, folder: Path, name: str) -> Path:
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    try:
        with moving_files(uri):
            return Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder), tracking_uri=uri))
    except (MlflowException, OSError) as error:
        raise (UserError if refused(error) else StoreAway)(
            f"the files cannot be fetched ({in_a_line(error)})",
            where=name,
            remedy="check that the tracking server and its artifact store are up, then run the command again",
        ) from None


def _checked(folder: Path, digest: str | None, name: str) -> Path:
    if not folder.is_dir():
        raise UserError(
            "its files are gone from the artifact store", where=name, remedy=f"restore {folder}, or train again"
        )
    if digest is not None and folder_digest(folder) != digest:
        raise UserError(
            "its files are not those that were registered (the digest differs)",
            where=name,
            remedy="do not use them; restore the artifacts from a copy, or choose another version",
        )
    return folder


def _versions(client: MlflowClient, name: str) -> list[Any]:
    """All versions of a model, oldest first; none if there is no such model."""
    found = client.search_model_versions(f"name = '{name}'", max_results=10_000)
    return sorted(found, key=lambda version: int(version.version))


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise

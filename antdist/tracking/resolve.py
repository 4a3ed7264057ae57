"""Resolve MODEL, a folder or a reference, to a local folder with the registered content."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from antdist.errors import UserError, redact
from antdist.io.storage import first_line
from antdist.tracking.registry import NAME, TRAINING_STATE, folder_digest, list_versions
from antdist.tracking.store import (
    StoreUnavailable,
    connect,
    is_refusal,
    retry_unavailable,
    transfer_artifacts,
    translate_errors,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME/latest, runs:/ID/PATH or a folder"
DOWNLOAD_ATTEMPTS = 3  # few: the store answered a moment ago


@dataclass(frozen=True)
class ResolvedModel:
    """A model in a local folder. `uri` is `models:/NAME/VERSION`, or as the user named it."""

    folder: Path
    uri: str
    run_id: str | None = None
    version: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Artifacts:
    """A place in the store: a registered version, or artifacts of a run (then version is None)."""

    uri: str
    source: str
    run_id: str | None
    version: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


def resolve(model: str, uri: str, cache: Path | None = None) -> ResolvedModel:
    """Resolve MODEL to a local folder whose digest is the registered one.

    Args:
        cache: the folder for downloads, one subfolder a digest; by default `antdist/models` below the user's cache
            folder. Artifacts on a local disk are used in place.

    Raises:
        UserError: a malformed reference; an unknown name, version, alias or run; missing or different files.
    """
    place = _locate(model, uri)
    if isinstance(place, Path):
        return ResolvedModel(place, str(place))
    if place.version is None:
        folder = _fetch(uri, place.source, None, model, cache)
        return ResolvedModel(folder, place.uri, place.run_id)
    folder = _fetch(uri, place.source, _registered_digest(place, "digest"), place.uri, cache)
    return ResolvedModel(folder, place.uri, place.run_id, place.version, place.tags)


def resolve_training_state(model: str, uri: str, cache: Path | None = None) -> ResolvedModel:
    """Resolve the training state of MODEL (in a folder: `training_state`), checked like the model.

    Raises:
        UserError: as `resolve`, or a model without training state.
    """
    place = _locate(model, uri)
    remedy = "resume a version that a training run registered, or start a new run from this model"
    if isinstance(place, Path):
        if (place / TRAINING_STATE).is_dir():
            return ResolvedModel(place / TRAINING_STATE, str(place))
        raise UserError(f"no folder {TRAINING_STATE} here, so no run can resume from it", where=place, remedy=remedy)
    path = place.tags.get(TRAINING_STATE)
    if path is None:
        raise UserError(
            "this model has no training state (it was imported, or registered without), so no run can resume from it",
            where=place.uri,
            remedy=remedy,
        )
    with translate_errors(uri):
        source = f"{connect(uri).get_run(place.run_id).info.artifact_uri}/{path}"
    folder = _fetch(uri, source, _registered_digest(place, "training_state_digest"), place.uri, cache)
    return ResolvedModel(folder, place.uri, place.run_id, place.version, place.tags)


def read_run_config(model: str, uri: str) -> str:
    """Return the configuration, as YAML, of the run that registered a model, or of `runs:/ID`.

    Raises:
        UserError: no such model or run; a run that antdist did not start.
    """
    from mlflow.exceptions import MlflowException

    run = re.fullmatch(r"runs:/(\w+)(/.*)?", model)
    with translate_errors(uri), transfer_artifacts(uri), tempfile.TemporaryDirectory() as folder:
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
    """Return whether MODEL names something in the tracking store, not a folder."""
    return model.startswith(("models:", "runs:"))


def find_version(client: MlflowClient, model: str) -> Any:
    """Find the version of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/NAME/latest`.

    Raises:
        UserError: another form, or an unknown name, version or alias; the message lists the known ones.
    """
    parts = re.fullmatch(rf"models:/(?P<name>{NAME})(?:@(?P<alias>[^/@:]+)|/(?P<version>[0-9]+|latest))", model)
    if parts is None:
        raise UserError("not a reference to a registered model", where=model, remedy=f"write it as {FORMS}")
    name, alias, number = parts["name"], parts["alias"], parts["version"]
    versions, searched = list_versions(client, name), f" (searched {redact(client.tracking_uri)})"
    if not versions:
        names = sorted(registered.name for registered in client.search_registered_models(max_results=1000))
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.5) or names[:10]
        known = f"known names: {', '.join(near)}" if near else "the registry is empty"
        raise UserError(f"no registered model {name!r}; {known}{searched}", where=model, remedy="correct the name")
    if alias is not None:
        aliases = client.get_registered_model(name).aliases
        if alias not in aliases:
            known = ", ".join(f"{key} (version {value})" for key, value in sorted(aliases.items())) or "none"
            raise UserError(
                f"{name!r} has no alias {alias!r}; it has: {known}{searched}", where=model, remedy="use one of these"
            )
        number = str(aliases[alias])
    elif number == "latest":
        number = str(versions[-1].version)
    version = next((v for v in versions if int(v.version) == int(number or 0)), None)
    if version is None:
        known = ", ".join(str(v.version) for v in versions[-20:])
        raise UserError(
            f"{name!r} has no version {number}; it has: {known}{searched}", where=model, remedy="use one of these"
        )
    return version


def _locate(model: str, uri: str) -> _Artifacts | Path:
    """Find the folder, version or artifacts that a reference names."""
    if model.startswith("models:"):
        with translate_errors(uri):
            return _version_artifacts(find_version(connect(uri), model))
    if model.startswith("runs:"):
        parts = re.fullmatch(r"runs:/(?P<run>\w+)/(?P<path>[^/].*?)/?", model)
        if parts is None or ".." in parts["path"].split("/"):
            raise UserError("not a reference to a run's artifacts", where=model, remedy=f"write it as {FORMS}")
        with translate_errors(uri), transfer_artifacts(uri):
            return _locate_in_run(connect(uri), model, parts["run"], parts["path"])
    folder = Path(model)
    if re.match(r"\w+:", model) or not folder.is_dir():
        raise UserError(
            "neither an existing folder nor a reference to a model", where=model, remedy=f"give MODEL as {FORMS}"
        )
    return folder.resolve()


def _locate_in_run(client: MlflowClient, model: str, run_id: str, path: str) -> _Artifacts:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(
            f"no run {run_id!r} in the tracking store {redact(client.tracking_uri)}",
            where=model,
            remedy="check the id, and tracking.uri",
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
            return _version_artifacts(version)
    return _Artifacts(f"runs:/{run_id}/{path}", f"{run.info.artifact_uri}/{path}", run_id)


def _version_artifacts(version: Any) -> _Artifacts:
    number = int(version.version)
    return _Artifacts(f"models:/{version.name}/{number}", version.source, version.run_id, number, dict(version.tags))


def _registered_digest(place: _Artifacts, tag: str) -> str:
    if tag not in place.tags:
        raise UserError(
            "this version has no digest, so antdist did not register it and cannot check its files",
            where=place.uri,
            remedy="register it again with antdist, or download it and give its folder",
        )
    return place.tags[tag]


def _fetch(uri: str, source: str, digest: str | None, name: str, cache: Path | None) -> Path:
    """Return a local folder that holds the artifacts at `source`, with this digest.

    A download is renamed to its digest only when it is complete and checked, so processes that fetch the same model at
    the same time each find a good folder or make one.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antdist" / "models"
    if digest is not None and _has_digest(cache / digest, digest):
        return cache / digest
    if source.startswith(("file:", "/")):
        return _check_digest(Path(url2pathname(urlsplit(source).path)), digest, name)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as temporary:
        arrived = retry_unavailable(lambda: _download(uri, source, Path(temporary), name), uri, DOWNLOAD_ATTEMPTS)
        _check_digest(arrived, digest, name)
        kept = cache / (digest or folder_digest(arrived))
        if kept.is_dir() and not _has_digest(kept, kept.name):
            shutil.rmtree(kept)  # an older download, damaged since
        with contextlib.suppress(OSError):  # another process was faster, with the same content
            arrived.rename(kept)
    return kept


def _has_digest(folder: Path, digest: str) -> bool:
    """Return whether a folder exists and is complete; a cache cleaner may have left it empty."""
    try:
        return folder_digest(folder) == digest
    except UserError:
        return False


def _download(uri: str, source: str, folder: Path, name: str) -> Path:
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    try:
        with transfer_artifacts(uri):
            return Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder), tracking_uri=uri))
    except (MlflowException, OSError) as error:
        raise (UserError if is_refusal(error) else StoreUnavailable)(
            f"the files cannot be fetched ({first_line(error)})",
            where=name,
            remedy="check that the tracking server and its artifact store are up, then run the command again",
        ) from None


def _check_digest(folder: Path, digest: str | None, name: str) -> Path:
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

"""The tracking store, a server or SQLite below the runs' folder: its address, client and errors."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import shlex
import sqlite3
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from antdist.config.schema import TrackingConfig
from antdist.errors import UserError, redact
from antdist.io.locks import try_lock
from antdist.io.logs import get_logger
from antdist.io.retry import retry
from antdist.io.storage import first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACTS = "mlartifacts"
SCHEMES = ("http", "https", "sqlite", "databricks")
# Answers that a retry does not change.
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}
WAITS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 30.0)  # seconds between attempts of what cannot wait in an outbox
REQUEST_SECONDS = 30
FILE_SECONDS = 1200  # a server that proxies a file does not answer until its own store has it
CHUNK_BYTES = 4 * 2**20  # of a download; each of MLflow's threads (two a core, at most 20) holds a few
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
logger = get_logger(__name__)
_timeout_lock = threading.Lock()
_transfers, _usual_timeout = 0, ""
T = TypeVar("T")


class StoreUnavailable(UserError):
    """The tracking store refuses connections or fails requests at the moment; a retry may succeed."""


def tracking_uri(config: TrackingConfig, storage: Path) -> str:
    """Return the store's URI: `tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite in `storage`.

    Paths of SQLite files are made absolute, because workers run in other folders.

    Raises:
        UserError: antdist does not write to this kind of store.
    """
    key = "tracking.uri" if config.uri else "MLFLOW_TRACKING_URI"
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{storage.resolve() / 'mlflow.db'}"
    if uri.partition(":")[0] not in SCHEMES:
        raise UserError(
            f"{redact(uri)!r} is not a tracking store that antdist can write to",
            where=key,
            remedy="give an http(s) address of a server or sqlite:///FILE; for other databases or a folder, "
            "start `mlflow server --backend-store-uri ...` and give its address",
        )
    if not uri.startswith("sqlite:"):
        return uri.rstrip("/")
    path, _, query = uri.removeprefix("sqlite:///").partition("?")
    if not uri.startswith("sqlite:///") or path in ("", ":memory:"):
        raise UserError(
            f"{uri!r} names no file, and a store in memory is visible to one process only",
            where=key,
            remedy="give sqlite:///FILE",
        )
    return f"sqlite:///{Path(path).absolute()}" + (f"?{query}" if query else "")


def sqlite_file(uri: str) -> Path | None:
    """Return the database file of a SQLite store, None for other stores."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:") else None


def artifact_location(uri: str) -> str | None:
    """Return the URI of a new experiment's artifacts, beside the SQLite file; None: the server decides."""
    file = sqlite_file(uri)
    return None if file is None else (file.parent / ARTIFACTS).as_uri()


def check_reachable(uri: str, timeout: float = 5.0) -> None:
    """Check within about `timeout` seconds that the store accepts records.

    Raises:
        StoreUnavailable: no answer, an answer that is not MLflow's, or a SQLite file that is not writable.
    """
    file = sqlite_file(uri)
    if file is not None:
        _check_sqlite(file, timeout)
    elif uri.startswith("http"):
        _check_server(uri, timeout)


def _check_sqlite(file: Path, timeout: float) -> None:
    existing = next(folder for folder in file.absolute().parents if os.access(folder, os.F_OK))
    writable = os.access(existing, os.W_OK | os.X_OK)
    if existing != file.absolute().parent and not (writable and existing.is_dir()):  # nothing is created by a check
        raise StoreUnavailable(
            f"the folder of the tracking store cannot be created ({existing} is not "
            f"{'writable' if existing.is_dir() else 'a folder'})",
            where=file.parent,
            remedy="choose another folder with ray.storage, or another tracking.uri",
        )
    if not writable:
        raise StoreUnavailable(
            "the folder of the tracking store is not writable",
            where=file.parent,
            remedy="change its permissions, or choose another ray.storage or tracking.uri",
        )
    if not file.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", timeout=timeout, uri=True)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("SELECT count(*) FROM sqlite_master")
            database.rollback()
    except sqlite3.Error as error:
        raise StoreUnavailable(
            f"the tracking store is not writable ({error})",
            where=file,
            remedy="check that it is a SQLite file that you may write and that no process holds it, or give another tracking.uri",
        ) from None


def _check_server(uri: str, timeout: float) -> None:
    where = redact(uri)
    # The client reads user and password from the URI; /health needs neither.
    address = re.sub(r"(://)[^/]*@", r"\1", uri)
    try:
        request = urllib.request.Request(f"{address}/health")  # noqa: S310  the scheme is http or https
        urllib.request.urlopen(request, timeout=timeout, context=_tls(uri)).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # a proxy asks for credentials; the first record shows whether it accepts ours
            return
        problem = "does not answer as MLflow does" if error.code < 500 else "reports an internal error"
        raise StoreUnavailable(
            f"the tracking server {problem} (status {error.code} for /health)",
            where=where,
            remedy="check the address in tracking.uri or MLFLOW_TRACKING_URI, and the server's log",
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise StoreUnavailable(
            f"the tracking server does not answer within {timeout:g} s ({reason})",
            where=where,
            remedy="start it, or correct tracking.uri or MLFLOW_TRACKING_URI",
        ) from None


def _tls(uri: str) -> ssl.SSLContext | None:
    """Return a context that trusts what MLflow's client trusts."""
    if not uri.startswith("https"):
        return None
    context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def ui_command(uri: str) -> str:
    """Return the command that opens MLflow's UI on this store; a UI server binds to loopback."""
    file = sqlite_file(uri)
    if file is None:
        return shlex.join([sys.executable, "-m", "webbrowser", redact(uri)])
    program = Path(sys.executable).with_name("mlflow")
    arguments = ["ui", "--backend-store-uri", uri, "--default-artifact-root", str(artifact_location(uri))]
    return shlex.join([str(program) if program.exists() else "mlflow", *arguments, "--host", "127.0.0.1"])


@functools.cache
def connect(uri: str) -> MlflowClient:
    """Return the process's client of the store and its registry. The first call takes seconds."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's own retries would repeat what the server may already have done, and create a version twice. What is worth
    # a retry waits in the outbox, or is retried by a caller that first checks what is done.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault(TIMEOUT, str(REQUEST_SECONDS))
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_MULTIPART_DOWNLOAD_CHUNK_SIZE", str(CHUNK_BYTES))
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with translate_errors(uri), _lock_sqlite(sqlite_file(uri)):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        if uri.startswith("sqlite:"):  # creates the tables of the registry, too
            client.search_registered_models(max_results=1)
    return client


@contextlib.contextmanager
def _lock_sqlite(file: Path | None) -> Iterator[None]:
    """Hold a lock while tables are created: two processes that do so at once break each other's schema."""
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        try_lock(lock, seconds=math.inf)
        yield


def is_refusal(error: Exception) -> bool:
    """Return whether MLflow itself refused for good: a gateway reports a failed "API request"."""
    return getattr(error, "error_code", None) in REFUSALS and not str(error).startswith("API request")


@contextlib.contextmanager
def transfer_artifacts(uri: str) -> Iterator[None]:
    """Allow long requests, and raise the errors of an artifact store as StoreUnavailable.

    Wrap whatever sends, fetches, lists or removes artifacts. Each package behind an artifact store raises errors of its
    own; MLflow's errors and Python's pass unchanged.
    """
    from mlflow.exceptions import MlflowException

    _count_transfer(1)
    try:
        yield
    except Exception as error:
        if isinstance(error, (MlflowException, OSError, UserError)) or type(error).__module__ == "builtins":
            raise
        raise StoreUnavailable(
            f"the artifact store refused or failed: {first_line(error)}",
            where=redact(uri),
            remedy="check that it is up, and that this machine has its address and keys, then run the command again",
        ) from None
    finally:
        _count_transfer(-1)


def _count_transfer(change: int) -> None:
    """Switch between the short and the long request timeout.

    MLflow's client has one timeout, read from the environment at each request; it is long while any transfer runs.
    """
    global _transfers, _usual_timeout
    with _timeout_lock:
        if not _transfers:
            _usual_timeout = os.environ.get(TIMEOUT, str(REQUEST_SECONDS))
        _transfers += change
        os.environ[TIMEOUT] = str(max(FILE_SECONDS, int(_usual_timeout))) if _transfers else _usual_timeout


def retry_unavailable(work: Callable[[], T], uri: str, trials: int | None = None) -> T:
    """Call `work`, and again for about two minutes, or `trials` times, while the store is unavailable.

    Args:
        work: repeatable without harm.

    Raises:
        UserError: as `translate_errors`.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    def is_retryable(error: BaseException) -> bool:
        return isinstance(error, MlflowException | RequestException | StoreUnavailable) and not is_refusal(error)

    def report(error: BaseException, wait: float) -> None:
        logger.warning("the tracking store failed, retrying in %g s: %s", wait, error)

    with translate_errors(uri):
        return retry(work, WAITS[:trials], is_retryable, report)


@contextlib.contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """Raise MLflow's errors as UserError without credentials; StoreUnavailable if a retry may help.

    The chain is cut, because its messages may hold credentials.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:  # MLflow does not wrap the errors of artifacts
        raise (UserError if is_refusal(error) else StoreUnavailable)(
            f"the tracking store refused or failed: {first_line(error)}",
            where=redact(uri),
            remedy="check that it is up and accepts this request, then run the command again",
        ) from None

"""Where the tracking store is: a server, or SQLite and plain files below the runs' folder."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import re
import shlex
import sqlite3
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from antdist.config.schema import TrackingConfig
from antdist.errors import UserError, redact
from antdist.io.logs import get_logger

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACTS = "mlartifacts"
SCHEMES = ("http", "https", "sqlite", "databricks")
# Answers that trying again will not change.
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}
WAITS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 30.0)  # seconds between trials of what cannot wait in an outbox
REQUEST_SECONDS = 30
FILE_SECONDS = 1200  # a server that passes a file on answers nothing until its own store has it
CHUNK_BYTES = 4 * 2**20  # of a download; each of MLflow's threads, two a core and 20 at most, holds a few
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
logger = get_logger(__name__)
_files = threading.Lock()
_files_moving, _timeout_else = 0, ""
T = TypeVar("T")


class StoreAway(UserError):
    """The tracking store takes no requests at the moment, or fails at them."""


def tracking_uri(config: TrackingConfig, storage: Path) -> str:
    """The store's URI: `tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite in `storage`.

    Paths of SQLite files come back absolute, for workers run in other folders.

    Raises:
        UserError: a kind of store that antdist does not write to.
    """
    key = "tracking.uri" if config.uri else "MLFLOW_TRACKING_URI"
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{storage.resolve() / 'mlflow.db'}"
    if uri.partition(":")[0] not in SCHEMES:
        raise UserError(
            f"{redact(uri)!r} is no tracking store that antdist writes to",
            where=key,
            remedy="give an http(s) address of a server or sqlite:///FILE; for other databases or a folder, "
            "start `mlflow server --backend-store-uri ...` and give its address",
        )
    if not uri.startswith("sqlite:"):
        return uri.rstrip("/")
    path, _, query = uri.removeprefix("sqlite:///").partition("?")
    if not uri.startswith("sqlite:///") or path in ("", ":memory:"):
        raise UserError(
            f"{uri!r} names no file, and a store in memory is seen by one process only",
            where=key,
            remedy="give sqlite:///FILE",
        )
    return f"sqlite:///{Path(path).absolute()}" + (f"?{query}" if query else "")


def sqlite_file(uri: str) -> Path | None:
    """The database file of a SQLite store, None for other stores."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:") else None


def artifact_location(uri: str) -> str | None:
    """Where a new experiment's artifacts go, as a URI: beside the SQLite file; None leaves it to the server."""
    file = sqlite_file(uri)
    return None if file is None else (file.parent / ARTIFACTS).as_uri()


def check_reachable(uri: str, timeout: float = 5.0) -> None:
    """Return if the store takes records now; look no longer than about `timeout` seconds.

    Raises:
        StoreAway: no answer, an answer that is not MLflow's, or a SQLite file that cannot be written.
    """
    file = sqlite_file(uri)
    if file is not None:
        _check_sqlite(file, timeout)
    elif uri.startswith("http"):
        _check_server(uri, timeout)


def _check_sqlite(file: Path, timeout: float) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreAway(
            f"the folder of the tracking store cannot be made ({error.strerror})",
            where=file.parent,
            remedy="choose another folder with ray.storage, or another tracking.uri",
        ) from None
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise StoreAway(
            "the folder of the tracking store cannot be written",
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
        raise StoreAway(
            f"the tracking store cannot be written ({error})",
            where=file,
            remedy="check that it is a SQLite file that you may write and that no process holds it, or give another tracking.uri",
        ) from None


def _check_server(uri: str, timeout: float) -> None:
    where = redact(uri)
    # The client reads user and password from the URI; this question needs neither.
    address = re.sub(r"(://)[^/]*@", r"\1", uri)
    try:
        request = urllib.request.Request(f"{address}/health")  # noqa: S310  the scheme is http or https
        urllib.request.urlopen(request, timeout=timeout, context=_tls(uri)).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # a guard stands before the server; whether it lets us in, the first record tells
            return
        problem = "answers, but not as MLflow does" if error.code < 500 else "is in trouble"
        raise StoreAway(
            f"the tracking server {problem} (status {error.code} for /health)",
            where=where,
            remedy="check the address in tracking.uri or MLFLOW_TRACKING_URI, and the server's log",
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise StoreAway(
            f"the tracking server does not answer within {timeout:g} s ({reason})",
            where=where,
            remedy="start it, or correct tracking.uri or MLFLOW_TRACKING_URI",
        ) from None


def _tls(uri: str) -> ssl.SSLContext | None:
    """The same trust as MLflow's client has."""
    if not uri.startswith("https"):
        return None
    context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def open_pages_command(uri: str) -> str:
    """The one line that opens MLflow's pages of this store, for a user to copy; a page server binds to loopback."""
    file = sqlite_file(uri)
    if file is None:
        return shlex.join([sys.executable, "-m", "webbrowser", redact(uri)])
    program = Path(sys.executable).with_name("mlflow")
    arguments = ["ui", "--backend-store-uri", uri, "--default-artifact-root", str(artifact_location(uri))]
    return shlex.join([str(program) if program.exists() else "mlflow", *arguments, "--host", "127.0.0.1"])


@functools.cache
def connect(uri: str) -> MlflowClient:
    """A client of the store and its registry, one a process. Making it takes seconds (import, tables)."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's own retries send again what the server may have done already: twice a version. What is worth retrying waits
    # in the outbox, or is tried again by `patiently`, which looks first.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault(TIMEOUT, str(REQUEST_SECONDS))
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_MULTIPART_DOWNLOAD_CHUNK_SIZE", str(CHUNK_BYTES))
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with told_clearly(uri), _alone_with(sqlite_file(uri)):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        if uri.startswith("sqlite:"):  # make the tables of the registry, too
            client.search_registered_models(max_results=1)
    return client


@contextlib.contextmanager
def _alone_with(file: Path | None) -> Iterator[None]:
    """Two processes that make the tables of a SQLite store at once break each other's work: one after the other."""
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def refused(error: Exception) -> bool:
    """Whether MLflow itself said no for good. Gateways and restarting servers speak of an "API request" that failed."""
    return getattr(error, "error_code", None) in REFUSALS and not str(error).startswith("API request")


def in_a_line(error: Exception) -> str:
    """What an error says, its first line, without credentials; of one that says nothing its kind."""
    return next(iter(redact(str(error)).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def moving_files(uri: str) -> Iterator[None]:
    """Around what sends, fetches, lists or removes artifacts: requests may take as long as files do, and what the packages
    of artifact stores raise, each its own errors, is a StoreAway. MLflow's errors and Python's stay what they are."""
    from mlflow.exceptions import MlflowException

    _let_requests_last(1)
    try:
        yield
    except Exception as error:
        if isinstance(error, (MlflowException, OSError, UserError)) or type(error).__module__ == "builtins":
            raise
        raise StoreAway(
            f"the artifact store refused or failed: {in_a_line(error)}",
            where=redact(uri),
            remedy="check that it is up, and that this machine has its address and keys, then run the command again",
        ) from None
    finally:
        _let_requests_last(-1)


def _let_requests_last(more: int) -> None:
    """MLflow's client knows but one time limit, and only by the environment: the long one while files move."""
    global _files_moving, _timeout_else
    with _files:
        if not _files_moving:
            _timeout_else = os.environ.get(TIMEOUT, str(REQUEST_SECONDS))
        _files_moving += more
        os.environ[TIMEOUT] = str(max(FILE_SECONDS, int(_timeout_else))) if _files_moving else _timeout_else


def patiently(work: Callable[[], T], uri: str, trials: int | None = None) -> T:
    """`work()`, tried again for about two minutes, or `trials` times, while the store is away. It must do no harm when it is
    done twice.

    Raises:
        UserError: as `told_clearly`.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    with told_clearly(uri):
        for wait in WAITS[:trials]:
            try:
                return work()
            except (MlflowException, RequestException, StoreAway) as error:
                if refused(error):
                    raise
                logger.warning("the tracking store failed, trying again in %g s: %s", wait, error)
                time.sleep(wait)
        return work()


@contextlib.contextmanager
def told_clearly(uri: str) -> Iterator[None]:
    """Turn MLflow's errors into a UserError without credentials, StoreAway where trying again may change the answer; the
    chain is cut, since its messages may hold them."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:  # artifacts go without MLflow's wrapping
        raise (UserError if refused(error) else StoreAway)(
            f"the tracking store refused or failed: {in_a_line(error)}",
            where=redact(uri),
            remedy="check that it is up and takes this request, then run the command again",
        ) from None

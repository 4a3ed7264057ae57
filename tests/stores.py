"""Stores as users have them, on loopback, one process each: S3, PostgreSQL, MLflow's server.

The fixtures are in `tests/conftest.py`: `s3` (a new bucket), `database` (a new database; skips by name where no PostgreSQL is).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ranks import free_port

WAIT_SECONDS = 90.0
DEBIAN = Path("/usr/lib/postgresql")
SERVANTS = ("postgres", "nobody")  # PostgreSQL refuses to be root


@dataclass(frozen=True)
class Bucket:
    """A private bucket. `environment` is all that a process needs to reach it with any client."""

    name: str
    environment: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    def files(self) -> Any:
        """Return a new fsspec file system, with no cached listings."""
        import s3fs

        environment = self.environment
        return s3fs.S3FileSystem(
            key=environment["AWS_ACCESS_KEY_ID"],
            secret=environment["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def contents(self, below: str = "") -> dict[str, bytes]:
        """Return the contents by key."""
        files, root = self.files(), f"{self.name}/{below}".rstrip("/")
        return {str(path).removeprefix(f"{self.name}/"): bytes(files.cat_file(path)) for path in files.find(root)}


@contextlib.contextmanager
def s3_server() -> Iterator[Callable[[], Bucket]]:
    """Start an S3 server; each call creates a bucket. Objects above 16 MB are kept on disk."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ACCESS_KEY_ID": "antdist-tests",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(8),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,  # boto3, s3fs
        "MLFLOW_S3_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]

    def bucket() -> Bucket:
        made = Bucket(f"antdist-{secrets.token_hex(4)}", environment)
        made.files().mkdir(made.name)
        return made

    with _serving(command, lambda: _answers(f"{endpoint}/moto-api/")):
        yield bucket


def postgres_programs() -> Path | None:
    """Find the programs of the newest installed PostgreSQL server; None without one."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(DEBIAN.glob("*/bin"), key=lambda folder: -float(folder.parent.name))
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


@dataclass(frozen=True)
class Database:
    """A private database by its SQLAlchemy URI; the password is in the environment, not in the URI."""

    uri: str
    environment: Mapping[str, str]


@contextlib.contextmanager
def postgres_server(programs: Path) -> Iterator[Callable[[], Database]]:
    """Start PostgreSQL on loopback with a password; each call creates a database.

    PostgreSQL refuses to run as root, so root starts it under another user.
    """
    servant = _servant()
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a user without rights below pytest's folders
    port, password = free_port(), secrets.token_hex(16)
    environment = {"PGPASSWORD": password}
    (folder / "password").write_text(password)
    if servant is not None:
        for path in (folder, folder / "password"):
            shutil.chown(path, servant)
    options: dict[str, Any] = {"cwd": folder, "user": servant, "env": {"PATH": os.defpath, "LC_ALL": "C"}}
    try:
        subprocess.run(
            [programs / "initdb", "--username=antdist", "--auth=scram-sha-256", f"--pwfile={folder}/password",
             "--encoding=UTF8", "--no-sync", f"--pgdata={folder}/data"],
            check=True, capture_output=True, **options,
        )  # fmt: skip
        command = [
            str(programs / "postgres"), "-D", f"{folder}/data", "-p", str(port), "-h", "127.0.0.1", "-k", str(folder),
            "-c", "fsync=off",
        ]  # fmt: skip

        def database() -> Database:
            name = f"db_{secrets.token_hex(4)}"
            with contextlib.closing(_connect(port, password)) as connection:
                connection.autocommit = True
                connection.cursor().execute(f"CREATE DATABASE {name}")
            return Database(f"postgresql+psycopg2://antdist@127.0.0.1:{port}/{name}", environment)

        # SIGQUIT: at once, its children first
        with _serving(command, lambda: _takes_connections(port, password), signal.SIGQUIT, **options):
            yield database
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class TrackingServer:
    """`mlflow server` with a database and a bucket, which can be killed and restarted.

    Args:
        proxied: artifacts go through the server; else clients reach the bucket themselves.
    """

    folder: Path
    database: Database
    bucket: Bucket
    proxied: bool = True
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        where = "--artifacts-destination" if self.proxied else "--default-artifact-root"
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", self.database.uri, where, f"{self.bucket.uri}/mlflow",
            "--serve-artifacts" if self.proxied else "--no-serve-artifacts",
        ]  # fmt: skip
        environment = {**os.environ, **self.database.environment, **self.bucket.environment}
        environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = start_quietly(command, self.folder / "log", cwd=self.folder, env=environment)
        await_answer(self.process, self.folder / "log", lambda: _answers(f"{self.uri}/health"))

    def kill(self) -> None:
        if self.process is not None:
            kill_group(self.process)
        self.process = None

    def __enter__(self) -> TrackingServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


# -- processes ---------------------------------------------------------------------------------------------------------


def start_quietly(command: list[str], log: Path, **options: Any) -> subprocess.Popen[bytes]:
    """Start a process in its own group, with its output in a file."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, **options
        )


def await_answer(process: subprocess.Popen[bytes], log: Path, answers: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not answers():
        if process.poll() is not None or time.monotonic() > deadline:
            kill_group(process)
            raise AssertionError(f"{process.args!r} does not answer:\n{log.read_text(errors='replace')}")
        time.sleep(0.1)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _serving(
    command: list[str], answers: Callable[[], bool], end: int = signal.SIGKILL, **options: Any
) -> Iterator[None]:
    """Run a process within the block, from its first answer on, and end it by the signal `end`."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = start_quietly(command, log, **options)
        try:
            await_answer(process, log, answers)
            yield
        finally:
            process.send_signal(end)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            kill_group(process)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


def _servant() -> str | None:
    """Return the user that runs the server if we are root."""
    if os.getuid() != 0:
        return None
    for name in SERVANTS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise AssertionError(f"root, and none of the users {SERVANTS} is there to run PostgreSQL")


def _connect(port: int, password: str) -> Any:
    import psycopg2

    return psycopg2.connect(host="127.0.0.1", port=port, user="antdist", password=password, dbname="postgres")


def _takes_connections(port: int, password: str) -> bool:
    import psycopg2

    try:
        _connect(port, password).close()
    except psycopg2.OperationalError:
        return False
    return True

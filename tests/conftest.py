"""What all tests share: the folder of real data, and quiet, deterministic processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from antdist.io.logs import PACKAGE, setup_logging
from tests.stores import Bucket, Database, postgres_programs, postgres_server, s3_server

# no deadlines: the cores are shared
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """Log as the command line does, and let `caplog` see it."""
    before = PACKAGE.level, PACKAGE.handlers[:], PACKAGE.propagate
    setup_logging()
    PACKAGE.propagate = True
    yield
    PACKAGE.level, PACKAGE.handlers[:], PACKAGE.propagate = before


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data beside the project; skips the test if it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real data absent: no folder ../shared/data beside the project")
    return SHARED_DATA


@pytest.fixture(scope="session")
def _new_bucket() -> Iterator[Callable[[], Bucket]]:
    with s3_server() as bucket:
        yield bucket


@pytest.fixture
def s3(_new_bucket: Callable[[], Bucket], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Create a bucket of an S3 server, reachable through the environment."""
    from s3fs import S3FileSystem

    bucket = _new_bucket()
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # fsspec caches clients with the environment that they were created in
    yield bucket
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def _new_database() -> Iterator[Callable[[], Database]]:
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL absent: no initdb on PATH or in /usr/lib/postgresql/*/bin")
    with postgres_server(programs) as database:
        yield database


@pytest.fixture
def database(_new_database: Callable[[], Database]) -> Database:
    """Create an empty database of a PostgreSQL server."""
    return _new_database()

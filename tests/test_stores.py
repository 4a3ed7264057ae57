"""The stores that tests start are what they say, on loopback alone, and gone afterwards."""

from __future__ import annotations

import contextlib
from pathlib import Path

import fsspec
import psutil
import pytest

from tests import stores
from tests.stores import Bucket, Database, postgres_programs, postgres_server, s3_server


def listening(port: int) -> set[str]:
    """The addresses at which something listens at this port."""
    return {
        found.laddr.ip
        for found in psutil.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN and found.laddr.port == port
    }


def test_s3_bucket_is_reached_by_environment_only(s3: Bucket) -> None:
    files, root = fsspec.url_to_fs(f"{s3.uri}/folder")
    files.pipe_file(f"{root}/file", b"content")
    assert s3.contents() == {"folder/file": b"content"} == s3.contents("folder")
    import boto3

    assert [found["Key"] for found in boto3.client("s3").list_objects_v2(Bucket=s3.name)["Contents"]] == ["folder/file"]
    assert listening(int(s3.environment["AWS_ENDPOINT_URL"].rpartition(":")[2])) == {"127.0.0.1"}


def test_database_requires_its_password(database: Database) -> None:
    import psycopg2

    password, uri = database.environment["PGPASSWORD"], database.uri.replace("+psycopg2", "")
    with contextlib.closing(psycopg2.connect(uri, password=password)) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT current_database(), count(*) FROM pg_tables WHERE schemaname = 'public'")
        assert cursor.fetchone() == (database.uri.rpartition("/")[2], 0)
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        psycopg2.connect(uri, password="guessed")
    assert listening(int(database.uri.rpartition("/")[0].rpartition(":")[2])) == {"127.0.0.1"}


def children() -> set[int]:
    """Processes that this one started, and theirs, that run."""
    running = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                running.add(child.pid)
    return running


def test_servers_stop_with_their_context() -> None:
    before = children()
    with s3_server() as bucket:
        endpoint = bucket().environment["AWS_ENDPOINT_URL"]
        assert stores._answers(f"{endpoint}/moto-api/")
    assert not stores._answers(f"{endpoint}/moto-api/")
    programs = postgres_programs()
    if programs is not None:
        with postgres_server(programs) as database:
            port = int(database().uri.rpartition("/")[0].rpartition(":")[2])
        assert not listening(port)
    assert children() <= before


def test_a_server_that_fails_to_start_shows_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = stores.start_quietly(["sh", "-c", "echo no such option; exit 3"], log)
    with pytest.raises(AssertionError, match="no such option"):
        stores.await_answer(process, log, lambda: False)

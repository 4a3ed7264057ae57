"""The node's cache returns what the manifest describes, and stays within its bound under any faults."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antdist.data import cache as module
from antdist.data.cache import Cache, CorruptDownload, default_folder, open_cache
from antdist.data.entries import File
from antdist.errors import UserError
from antdist.io.storage import Unreachable

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(module, "FULL_SECONDS", 0.2)


class Source:
    """Files that are fetched in pieces, counted; `faults` are raised, or given instead of the content, one a fetch."""

    def __init__(self, *contents: bytes) -> None:
        self.files = [
            File(name=f"f{i}", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for i, data in enumerate(contents)
        ]
        self.contents = dict(zip((file.sha256 for file in self.files), contents, strict=True))
        self.fetched: list[str] = []
        self.faults: list[Exception | bytes] = []

    def read(self, cache: Cache, file: File) -> bytes:
        def pieces() -> Generator[bytes, None, None]:
            self.fetched.append(file.name)
            data = self.contents[file.sha256]
            fault = self.faults.pop(0) if self.faults else data
            data = data if isinstance(fault, Exception) else fault
            for first in range(0, len(data), 7):
                yield data[first : first + 7]
                if isinstance(fault, Exception):
                    raise fault

        with cache.open(file, pieces, f"s3://bucket/{file.name}") as stream:
            return stream.read()


def stored_sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "lock"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(st.binary(max_size=60), min_size=1, max_size=8, unique=True),
    spare=st.integers(0, 90),
    requests=st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["read", "hold", "release", "damage", "lose"])), max_size=30),
)  # fmt: skip
def test_random_requests_return_the_content_within_the_bound(
    contents: list[bytes], spare: int, requests: list[tuple[int, str]]
) -> None:
    """Random requests, some files kept open meanwhile, some damaged or lost on the disk."""
    source = Source(*contents)
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder) / "cache", max(map(len, contents)) + spare)
        held: dict[str, Any] = {}

        def watched(file: File) -> Generator[bytes, None, None]:
            source.fetched.append(file.name)
            yield source.contents[file.sha256][:5]
            assert sum(stored_sizes(cache.folder).values()) <= cache.bound  # on its way
            yield source.contents[file.sha256][5:]

        for number, kind in requests:
            file = source.files[number % len(source.files)]
            path = cache.folder / file.sha256
            if kind == "release":
                for stream in held.values():
                    stream.close()
                held.clear()
            elif kind == "damage" and path.is_file() and file.bytes and file.sha256 not in held:
                data = bytearray(path.read_bytes())
                data[0] ^= 1
                path.write_bytes(data)
            elif kind == "lose":
                path.unlink(missing_ok=True)
            elif sum(len(source.contents[digest]) for digest in {*held, file.sha256}) <= cache.bound:
                stream = cache.open(file, lambda file=file: watched(file), "there")  # type: ignore[misc]
                assert stream.read() == source.contents[file.sha256]
                if kind == "hold" and file.sha256 not in held:
                    held[file.sha256] = stream
                else:
                    stream.close()
            if cache.folder.is_dir():
                assert sum(stored_sizes(cache.folder).values()) <= cache.bound
                assert not [name for name in stored_sizes(cache.folder) if name.endswith(".partial")]
            for digest, stream in held.items():
                stream.seek(0)
                assert stream.read() == source.contents[digest]


def test_least_recently_used_files_are_evicted_first(tmp_path: Path) -> None:
    source, cache = Source(b"a" * 10, b"b" * 10, b"c" * 10, b"d" * 10), Cache(tmp_path, 30)
    for number in (0, 1, 2, 0):
        source.read(cache, source.files[number])
    assert source.fetched == ["f0", "f1", "f2"]
    with cache.open(source.files[1], lambda: pytest.fail("it is here"), "there"):
        source.read(cache, source.files[3])
        assert {name for name in stored_sizes(tmp_path) if name != "lock"} == {
            source.files[n].sha256 for n in (0, 1, 3)
        }
        source.read(cache, source.files[2])
    assert set(stored_sizes(tmp_path)) == {source.files[n].sha256 for n in (1, 2, 3)}


def test_files_in_use_and_too_large_files_are_refused(tmp_path: Path) -> None:
    source, cache = Source(b"a" * 10, b"b" * 10, b"c" * 21), Cache(tmp_path, 19)
    with cache.open(source.files[0], lambda: (piece for piece in [b"a" * 10]), "there") as held:
        with pytest.raises(
            UserError, match=r"does not fit beside the files in use of 1\.9e-08 GB\. Raise data\.cache_gb"
        ):
            source.read(cache, source.files[1])
        assert held.read() == b"a" * 10
    with pytest.raises(UserError, match=r"a file of 2\.1e-08 GB is larger than the cache"):
        source.read(cache, source.files[2])
    assert set(stored_sizes(tmp_path)) == {source.files[0].sha256}, "what is there went for what cannot be there"
    assert source.read(cache, source.files[1]) == b"b" * 10


def test_folder_is_scanned_only_for_evictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache, looks = Source(*(bytes([n]) * 10 for n in range(12))), Cache(tmp_path, 100), list[int]()
    real = Cache._files
    monkeypatch.setattr(Cache, "_files", lambda self: looks.append(1) or real(self))
    for file in source.files[:10]:
        source.read(cache, file)
    assert len(looks) == 1, "a new folder"
    for file in source.files[10:]:
        source.read(cache, file)
    assert len(looks) == 3 and sum(stored_sizes(tmp_path).values()) == 100
    for file in source.files[2:8]:  # others remove some: the count says too much, and a look puts it right
        (tmp_path / file.sha256).unlink()
    for file in source.files[2:8]:
        source.read(cache, file)
    assert len(looks) == 4 and sum(stored_sizes(tmp_path).values()) == 100 and len(source.fetched) == 18


def test_fetch_continues_when_room_becomes_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FULL_SECONDS", 60.0)
    source, cache = Source(b"a" * 10, b"b" * 10), Cache(tmp_path, 19)
    held = cache.open(source.files[0], lambda: (piece for piece in [b"a" * 10]), "there")
    threading.Timer(0.1, held.close).start()
    assert source.read(cache, source.files[1]) == b"b" * 10


def test_truncated_wrong_and_long_files_are_fetched_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, cache = Source(b"hello world"), Cache(tmp_path, 100)
    for fault, message in ((b"hello wor", "it ends after 9 of 11 bytes"), (b"hello wOrld", "its SHA-256 differs"),
                        (b"hello world!", "it has more than 11 bytes")):  # fmt: skip
        shutil.rmtree(tmp_path)
        source.faults = [fault]
        assert source.read(cache, source.files[0]) == b"hello world"
        assert f"s3://bucket/f0: the fetched file does not match the manifest: {message}" in capsys.readouterr().err
    shutil.rmtree(tmp_path)
    source.faults, source.fetched = [b"hello wOrld"] * 3, []
    with pytest.raises(CorruptDownload, match=r"s3://bucket/f0: .* its SHA-256 differs\. Check the remote domain"):
        source.read(cache, source.files[0])
    assert len(source.fetched) == 3 and stored_sizes(tmp_path) == {}


def test_storage_failures_are_retried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, cache = Source(b"hello world"), Cache(tmp_path, 100)
    away = Unreachable("s3://key:secret@bucket/f0", "503 Slow Down")
    source.faults = [away, away]
    assert source.read(cache, source.files[0]) == b"hello world" and len(source.fetched) == 3
    output = capsys.readouterr().err
    assert output.count("503 Slow Down") == 2 and "secret" not in output
    shutil.rmtree(tmp_path)
    source.faults = [away] * 3
    with pytest.raises(Unreachable, match="503 Slow Down"):
        source.read(cache, source.files[0])
    assert stored_sizes(tmp_path) == {}


def test_flipped_bit_on_disk_makes_the_file_be_fetched_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, cache = Source(b"hello world"), Cache(tmp_path, 100)
    source.read(cache, source.files[0])
    for damage in (b"hello wOrld", b"hello", b""):
        (tmp_path / source.files[0].sha256).write_bytes(damage)
        assert source.read(cache, source.files[0]) == b"hello world"
        assert "is damaged (f0), fetching it again" in capsys.readouterr().err
    assert len(source.fetched) == 4


def test_disk_that_loses_writes_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = Source(b"hello world"), Cache(tmp_path, 100)

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("antdist.data.cache.hashlib.file_digest", broken)
        with pytest.raises(
            UserError, match=rf"data\.cache {tmp_path}: the cache's disk does not keep what is written .*Check its disk"
        ):
            source.read(cache, source.files[0])
    assert 1 < len(source.fetched) < 20
    assert source.read(cache, source.files[0]) == b"hello world"


def test_cache_folder_may_be_removed_at_any_time(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    source, cache = Source(b"hello world", b"other"), Cache(folder, 100)
    source.read(cache, source.files[0])
    with cache.open(source.files[0], lambda: pytest.fail("it is here"), "there") as held:
        shutil.rmtree(folder)
        assert source.read(cache, source.files[1]) == b"other"
        assert held.read() == b"hello world"
    removals: list[int] = []

    def pieces() -> Generator[bytes, None, None]:
        yield b"hello"
        if not removals:
            shutil.rmtree(folder)
        removals.append(1)
        yield b" world"

    with cache.open(source.files[0], pieces, "there") as stream:
        assert stream.read() == b"hello world" and len(removals) == 2


KILLED = """
import sys, time
from pathlib import Path
from antdist.data.cache import Cache
from antdist.data.manifest import File
def pieces():
    yield b"hello"
    print("half", flush=True)
    time.sleep(600)
Cache(Path(sys.argv[1]), 20).open(File(name="f0", bytes=11, sha256=sys.argv[2]), pieces, "there")
"""


@pytest.mark.parametrize("next_one", ["the same", "another"])
def test_partial_file_of_a_killed_process_is_reused_or_removed(tmp_path: Path, next_one: str) -> None:
    source, cache = Source(b"hello world", b"another file"), Cache(tmp_path, 20)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), source.files[0].sha256], cwd=PROJECT, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"half\n"
    file = source.files[next_one == "another"]
    if next_one == "another":  # while it lives, its file is on its way
        with pytest.raises(UserError, match="does not fit beside the files in use"):
            source.read(cache, file)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert stored_sizes(tmp_path) == {f"{source.files[0].sha256}.partial": 11}
    assert source.read(cache, file) == source.contents[file.sha256]
    assert set(stored_sizes(tmp_path)) == {file.sha256}


RACING = """
import sys, time
from pathlib import Path
from antdist.data.cache import Cache
from antdist.data.manifest import File
def pieces():
    with open(sys.argv[3], "a") as log:
        log.write("fetched\\n")
    for _ in range(5):
        time.sleep(0.02)
        yield b"0123456789"
while not Path(sys.argv[4]).exists():
    time.sleep(0.001)
cache = Cache(Path(sys.argv[1]), 1000)
file = File(name="f0", bytes=50, sha256=sys.argv[2])
held = cache.open(file, pieces, "there")
assert held.read() == b"0123456789" * 5
time.sleep(0.2)  # as a map of features does, it stays open
"""


def test_racing_processes_fetch_a_file_once(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"0123456789" * 5).hexdigest()
    arguments = [str(tmp_path / "cache"), digest, str(tmp_path / "log"), str(tmp_path / "go")]
    racers = [subprocess.Popen([sys.executable, "-c", RACING, *arguments], cwd=PROJECT) for _ in range(4)]
    time.sleep(1.0)
    (tmp_path / "go").touch()
    assert [racer.wait(60) for racer in racers] == [0] * 4
    assert (tmp_path / "log").read_text() == "fetched\n" and set(stored_sizes(tmp_path / "cache")) == {digest}


def test_file_is_renamed_under_the_folder_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a folder may miss a file that is renamed meanwhile, under both its names: the bound would not hold."""
    source, cache, renamed = Source(b"hello world"), Cache(tmp_path, 100), list[str]()
    rename = Path.rename

    def locked(path: Path, to: Path) -> Path:
        with (tmp_path / "lock").open("ab") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        renamed.append(path.suffix)
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", locked)
    source.read(cache, source.files[0])
    assert renamed == [".partial"]


def test_full_disk_is_reported_after_evictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = Source(b"a" * 10, b"b" * 10), Cache(tmp_path, 1000)
    source.read(cache, source.files[0])
    monkeypatch.setattr(module, "_free_bytes", lambda folder: 3)
    assert source.read(cache, source.files[1]) == b"b" * 10
    assert set(stored_sizes(tmp_path)) == {source.files[1].sha256} and cache.usable_bytes() == 13

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        UserError, match=rf"data\.cache {tmp_path}: the disk has no room for 1e-08 GB more\. Free space, or"
    ):
        source.read(cache, source.files[0])
    assert not [name for name in stored_sizes(tmp_path) if name.endswith(".partial")]


def test_files_with_other_names_are_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_bytes(b"x" * 100)
    source, cache = Source(b"a" * 10, b"b" * 10), Cache(tmp_path, 15)
    for file in source.files:
        source.read(cache, file)
    assert set(stored_sizes(tmp_path)) == {"thesis.txt", source.files[1].sha256}


def test_the_default_folder_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = default_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="belongs to another user"):
        default_folder()
    with pytest.raises(UserError, match=r"the cache must be a folder on each node's own disk"):
        open_cache("s3://bucket/cache")

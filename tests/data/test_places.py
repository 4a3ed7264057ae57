"""A remote domain, read through the cache, equals the local one, and its faults are named."""

from __future__ import annotations

import dataclasses
import shutil
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from antdist.config.schema import StreamConfig
from antdist.data import cache as cached
from antdist.data.cache import Cache
from antdist.data.domain import Domain, open_domain
from antdist.data.stream.stream import Stream
from antdist.data.verify import verify_domain
from antdist.errors import UserError
from antdist.faults import corrupt
from tests.data.ingest.test_append import FIRST, ITEMS, LATER, append_rows, histories, pending_histories, prepare_rows
from tests.domains import numbered_domain
from tests.recorded import AWAY, LOG, count_opened
from tests.stores import Bucket
from tests.worlds import make_domain


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "WAITS", (0.01, 0.01))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LOG, str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.fixture
def local(tmp_path: Path) -> Domain:
    """Twelve sequence shards of some 10 kB."""
    return numbered_domain(tmp_path / "data" / "d", [3 + n % 17 for n in range(96)])


def open_remote(domain: Domain, tmp_path: Path, bound: int) -> Domain:
    return open_domain(f"recorded://{domain.folder}", Cache(tmp_path / "cache", bound))


def stream_of(domain: Domain, **config: Any) -> Stream:
    given = {"batch_size": 40, "streams": 2, "window_shards": 1, "window_blocks": 1, **config}
    return Stream([domain], StreamConfig(**given), max_length=8, seed=1)


def equal(left: Any, right: Any) -> bool:
    pairs = zip(dataclasses.astuple(left), dataclasses.astuple(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("mode", ["sequence", "prefix"])
def test_remote_batches_equal_local_ones_with_a_small_cache(
    local: Domain, tmp_path: Path, log: Path, mode: str
) -> None:
    shards = [shard.bytes for shard in local.manifest.sequence_shards]
    near = stream_of(local, mode=mode)
    remote = stream_of(open_remote(local, tmp_path, bound=6 * max(shards)), mode=mode)
    assert near.working_set_bytes() == 0 and remote.working_set_bytes() == sum(sorted(shards)[-6:])
    assert sum(shards) > 1.9 * 6 * max(shards) and near.order == remote.order
    passes = 3
    for epoch in range(passes):
        for a, b in zip(near.batches(epoch), remote.batches(epoch), strict=True):
            assert equal(a, b)
    fetched = count_opened(log)
    assert set(fetched) >= {shard.name for shard in local.manifest.sequence_shards}
    assert max(fetched[shard.name] for shard in local.manifest.sequence_shards) <= passes


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_lagging_rank_causes_no_second_fetch(local: Domain, tmp_path: Path, log: Path, lag: int) -> None:
    """The steps of a window are far more than ranks of a run may be apart; here they are three to six."""
    shards = [shard.bytes for shard in local.manifest.sequence_shards]
    bound = 6 * max(shards)
    first, second = (stream_of(open_remote(local, tmp_path, bound)) for _ in range(2))
    assert first.working_set_bytes() <= bound < sum(shards) and first.steps_per_epoch >= 12 / 2 * 3
    epochs = range(3)
    ahead = (batch for epoch in epochs for batch in first.batches(epoch))
    for _ in range(lag):
        next(ahead)
    for batch in (batch for epoch in epochs for batch in second.batches(epoch)):
        assert batch.predictions
        next(ahead, None)
    fetched = count_opened(log)
    assert max(fetched[shard.name] for shard in local.manifest.sequence_shards) <= len(epochs)


def test_files_that_fit_the_cache_are_fetched_once(local: Domain, tmp_path: Path, log: Path) -> None:
    for _ in range(2):
        domain = open_remote(local, tmp_path, bound=10**8)
        stream = stream_of(domain)
        assert sum(batch.predictions for batch in stream.batches(0)) == stream.predictions_per_epoch
        here, there = local.sequences(), domain.sequences()
        assert equal(here, there)
        assert np.array_equal(domain.popularity(), local.popularity())
        assert domain.user_ids() == local.user_ids() and domain.item_ids() == local.item_ids()
        assert list(domain.items()) == list(local.items())
    fetched = count_opened(log)
    assert fetched.pop("manifest.json") == 2
    assert fetched == {file.name: 1 for file in local.manifest.files}


def test_equal_shards_are_fetched_once_for_all_domains(local: Domain, tmp_path: Path, log: Path) -> None:
    shutil.copytree(local.folder, tmp_path / "data" / "copy")
    for name in ("d", "copy"):
        open_domain(f"recorded://{tmp_path}/data/{name}", Cache(tmp_path / "cache", 10**8)).sequences()
    assert max(count_opened(log)[shard.name] for shard in local.manifest.sequence_shards) == 1


def test_read_ahead_thread_fetches_the_shards_of_a_window(
    local: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    domain = open_remote(local, tmp_path, bound=10**8)
    fetchers: list[str] = []
    real = Cache._fetch

    def record_fetch(self: Cache, *arguments: Any) -> None:
        fetchers.append(threading.current_thread().name)
        real(self, *arguments)

    monkeypatch.setattr(Cache, "_fetch", record_fetch)
    list(stream_of(domain, window_shards=3).batches(0))
    assert len(fetchers) == 12 and {name.partition("_")[0] for name in fetchers} == {"fetch"}
    assert max(int(name.partition("_")[2]) for name in fetchers) > 0  # several at once


def test_damaged_and_missing_shards_are_named_with_their_uri(local: Domain, tmp_path: Path) -> None:
    domain = open_remote(local, tmp_path, bound=10**8)
    corrupt(local.folder / "sequences-00003.tar", "flip")  # type: ignore[operator]
    with pytest.raises(
        UserError, match=rf"^recorded://{local.folder}/sequences-00003.tar: the fetched file does not match .*SHA-256"
    ):
        domain.sequences()
    domain.verify_sequences()  # sizes alone
    corrupt(local.folder / "sequences-00003.tar", "cut")  # type: ignore[operator]
    with pytest.raises(UserError, match=r"sequences-00003.tar: the file has \d+ bytes, \d+ by the manifest"):
        domain.verify_sequences()
    corrupt(local.folder / "sequences-00003.tar", "gone")  # type: ignore[operator]
    for read in (domain.sequences, domain.verify_sequences):
        with pytest.raises(UserError, match=rf"recorded://{local.folder}/sequences-00003.tar: the file is missing"):
            read()


def test_verify_reports_equal_problems_for_remote_domains(tmp_path: Path) -> None:
    local = make_domain(tmp_path, "d", blocks_per_shard=1)
    uri, cache = f"recorded://{local.folder}", Cache(tmp_path / "cache", 10**8)
    report = verify_domain(uri, cache)
    assert report.ok and report.folder == uri
    assert dataclasses.replace(report, folder="") == dataclasses.replace(verify_domain(local.folder), folder="")
    corrupt(local.folder / "sequences-00001.tar", "flip")  # type: ignore[operator]
    corrupt(local.folder / "features" / "text-00000.npy", "cut")  # type: ignore[operator]
    (local.folder / "items-00009.tar").write_bytes(b"")  # type: ignore[union-attr]
    shutil.rmtree(tmp_path / "cache")
    problems = "\n".join(verify_domain(uri, cache).problems)
    for name in ("sequences-00001.tar: the fetched file does not match", "features/text-00000.npy: the file has", "items-00009.tar: the manifest does not list"):  # fmt: skip
        assert name in problems


def test_appended_domain_reads_equally_from_a_uri(tmp_path: Path) -> None:
    prepare_rows(tmp_path, FIRST)
    append_rows(tmp_path, LATER, [*ITEMS, "g"])
    local = open_domain(tmp_path / "d")
    domain = open_remote(local, tmp_path, bound=10**8)
    assert len(local.superseded) and local.manifest.earlier
    assert histories(domain) == histories(local) and pending_histories(domain) == pending_histories(local)
    assert domain.verify_sequences() == local.verify_sequences()
    assert verify_domain(f"recorded://{tmp_path}/d", Cache(tmp_path / "cache", 10**8)).ok
    for a, b in zip(stream_of(local).batches(0), stream_of(domain).batches(0), strict=True):
        assert equal(a, b)
    corrupt(next(tmp_path.glob("d/append-00001/sequences-*.tar")), "cut")
    with pytest.raises(UserError, match=r"recorded://.*/d/append-00001/sequences-00000\.tar: the file has"):
        domain.verify_sequences()


def test_unreachable_storage_is_retried(
    local: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    away, cache = tmp_path / "away", Cache(tmp_path / "cache", 10**8)
    monkeypatch.setenv(AWAY, str(away))
    away.touch()
    with pytest.raises(UserError, match=r"d/manifest.json: does not answer, or refuses \(connection refused\)"):
        open_domain(f"recorded://{local.folder}", cache)
    monkeypatch.setattr("time.sleep", lambda _: away.unlink())
    assert open_domain(f"recorded://{local.folder}", cache).fingerprint == local.fingerprint
    assert "connection refused) Trying again" in capsys.readouterr().err.replace(").", ")")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("recorded:///nowhere/d", r"recorded:///nowhere/d: not a prepared domain: manifest\.json is missing"),
        ("nosuch://key:secret@x/d", r"nosuch://\*\*\*@x/d/manifest.json: it cannot be used \(Protocol not known"),
        ("simplecache::file:///x", "it names several storages"),
    ],
)
def test_uri_without_a_domain_is_refused(tmp_path: Path, uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_domain(uri, Cache(tmp_path, 1))


def test_domains_in_memory_storage_and_in_s3(local: Domain, tmp_path: Path, s3: Bucket) -> None:
    """fsspec's own, and a server that speaks S3."""
    for uri in (f"memory://{uuid.uuid4().hex}", f"{s3.uri}/data"):
        files, root = fsspec.url_to_fs(uri)
        files.put(str(local.folder), f"{root}/d", recursive=True)
        domain = open_domain(f"{uri}/d", Cache(tmp_path / uri[:2], 10**8))
        domain.verify_sequences()
        assert equal(domain.sequences(), local.sequences())
        assert verify_domain(f"{uri}/d", domain.folder.cache).ok  # type: ignore[union-attr]
        files.pipe_file(f"{root}/d/sequences-00000.tar", b"other")
        shutil.rmtree(tmp_path / uri[:2])
        with pytest.raises(
            UserError, match=rf"{uri}/d/sequences-00000.tar: the fetched file does not match .* after 5 of"
        ):
            domain.sequences()

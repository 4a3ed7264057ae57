"""Remote feature tables equal local ones, are fetched as needed, and stay within the cache's limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from antdist.data import cache as cached
from antdist.data.cache import Cache
from antdist.data.domain import Domain, open_domain
from antdist.errors import UserError
from antdist.faults import corrupt
from antdist.features.catalogue import Catalogue
from antdist.features.table import FeatureMeta, open_table, write_meta, write_part
from tests.recorded import LOG, count_opened
from tests.worlds import make_domain

DIM = 32


def give_parts(domain: Domain, modality: str, dim: int, *, items_a_part: int) -> None:
    """A feature table of random rows, every seventh missing, in many parts."""
    random = np.random.default_rng([dim, len(domain.name)])
    items, folder = domain.manifest.items, domain.folder / "features"
    values, present = random.standard_normal((items, dim)).astype(np.float32), np.arange(items) % 7 != 0
    values[~present] = 0
    folder.mkdir(exist_ok=True)  # type: ignore[union-attr]
    parts = [
        write_part(
            folder,  # type: ignore[arg-type]
            modality,
            number,
            first=first,
            values=values[first : first + items_a_part],
            present=present[first : first + items_a_part],
        )
        for number, first in enumerate(range(0, items, items_a_part))
    ]
    made = {"modality": modality, "encoder": {"name": "random"}, "dim": dim, "dtype": "float32", "items": items}
    known = {"fingerprint": domain.fingerprint, "present": int(present.sum()), "parts": [p.model_dump() for p in parts]}
    write_meta(folder, FeatureMeta.model_validate({**made, **known}))  # type: ignore[arg-type]


@pytest.fixture
def local(tmp_path: Path) -> Domain:
    """Sixty items in fifteen parts of 640 bytes."""
    domain = make_domain(tmp_path / "data", "d", items=60, dims={})
    give_parts(domain, "text", DIM, items_a_part=4)
    return domain


def open_remote(local: Domain, tmp_path: Path, bound: int) -> Domain:
    return open_domain(f"recorded://{local.folder}", Cache(tmp_path / "cache", bound))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LOG, str(tmp_path / "log"))
    monkeypatch.setattr(cached, "WAITS", (0.01,))
    monkeypatch.setattr(cached, "FULL_SECONDS", 1.0)
    return tmp_path / "log"


def stored_sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "lock")


def test_table_that_fits_is_fetched_once_and_stays_mapped(local: Domain, tmp_path: Path, log: Path) -> None:
    near, ids = Catalogue([local], ["text"]), np.random.default_rng(0).permutation(60)
    for _ in range(2):
        catalogue = Catalogue([open_remote(local, tmp_path, 10**6)], ["text"])
        catalogue.verify_share(0, 2)
        first = {name for name in count_opened(log) if name.startswith("text-")}
        for _ in range(2):
            a, b = near.features(ids), catalogue.features(ids)
            assert (a.values["text"] == b.values["text"]).all() and (a.present["text"] == b.present["text"]).all()
        assert catalogue.means()["text"].equal(near.means()["text"])
        kept = catalogue._mapped
        assert len(kept._maps) == 15 and kept.limit >= kept._bytes == 60 * DIM * 4
    assert 8 <= len(first) < 23  # every second part, and the presence files, some of which are equal
    fetched = {name: count for name, count in count_opened(log).items() if name.startswith("text-")}
    assert set(fetched.values()) == {1} and {f"text-{n:05d}.npy" for n in range(15)} <= set(fetched)


def test_only_requested_parts_are_fetched(local: Domain, tmp_path: Path, log: Path) -> None:
    catalogue = Catalogue([open_remote(local, tmp_path, 10**6)], ["text"])
    catalogue.features(np.array([9, 8, 41]))
    assert {n for n in count_opened(log) if n.startswith("text-") and "present" not in n} == {
        "text-00002.npy",
        "text-00010.npy",
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_table_larger_than_the_cache_is_fetched_as_needed(
    local: Domain, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    near, bound = Catalogue([local], ["text"]), 14 * 640
    processes = [Catalogue([open_remote(local, tmp_path, bound)], ["text"]) for _ in range(ranks)]
    table = processes[0].remote_tables()[0]
    assert table.bytes > bound
    random = np.random.default_rng(0)
    for _ in range(12):
        ids = random.integers(0, 60, 9)
        for catalogue in processes:
            assert catalogue.features(ids).values["text"].equal(near.features(ids).values["text"])
            assert catalogue._mapped._bytes <= catalogue._mapped.limit <= bound // 2 // ranks
            assert stored_sizes(tmp_path / "cache") <= bound
    catalogue.verify_share(0, 1)  # would but push out what is there
    assert max(count_opened(log).values()) > 1


def test_damaged_part_is_named(local: Domain, tmp_path: Path, log: Path) -> None:
    part = local.folder / "features" / "text-00003.npy"
    corrupt(part, "flip")  # type: ignore[arg-type]
    catalogue = Catalogue([open_remote(local, tmp_path, 10**6)], ["text"])
    catalogue.verify()  # sizes alone
    with pytest.raises(UserError, match=rf"recorded://{part}: the fetched file does not match the manifest"):
        catalogue.features(np.arange(60))
    corrupt(part, "gone")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"recorded://{part}: the file is missing"):
        catalogue.verify()


def test_meta_file_with_invalid_digests_is_refused(local: Domain, tmp_path: Path, log: Path) -> None:
    """A file of the cache is named by its digest: nothing may lead out of it."""
    meta = local.folder / "features" / "text.json"
    text = meta.read_text(encoding="utf-8")
    digest = FeatureMeta.model_validate_json(text).parts[0].sha256
    meta.write_text(text.replace(digest, "../../../etc/passwd"))  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"text\.json: is not the meta file of a feature table"):
        open_table(open_remote(local, tmp_path, 10**6), "text")

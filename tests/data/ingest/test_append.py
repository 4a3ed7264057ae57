"""Appends: histories equal preparing at once, users are unique, old shards unchanged, a kill at any point is harmless."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antdist import faults
from antdist.config.schema import StreamConfig
from antdist.data.domain import Domain, open_domain
from antdist.data.ingest.append import AppendReport, append_to_domain
from antdist.data.ingest.prepare import prepare_domain
from antdist.data.manifest import read_manifest, write_manifest
from antdist.data.stream.stream import Stream
from antdist.data.verify import verify_domain
from antdist.errors import UserError
from antdist.serving.scorer import iterate_histories as users_to_score
from tests.domains import numbered_domain

Row = tuple[str, str, int]  # user, item, time
Histories = dict[str, list[tuple[str, int]]]
ITEMS = list("abcdef")


def source(folder: Path, rows: list[Row], items: list[str] | None = None, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["user_id,item_id,timestamp", *(f"{user},{item},{time}" for user, item, time in rows)]
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    (folder / "items.jsonl").unlink(missing_ok=True)
    if items is not None:
        (folder / "items.jsonl").write_text("".join(json.dumps({"item_id": item, **fields}) + "\n" for item in items))
    return folder


def prepare_rows(tmp_path: Path, rows: list[Row], items: list[str] = ITEMS, **options: Any) -> Domain:
    prepare_domain(source(tmp_path / "base", rows, items), domain="d", out=tmp_path, **{"block_users": 2, **options})
    return open_domain(tmp_path / "d")


def append_rows(tmp_path: Path, rows: list[Row], items: list[str] | None = None, **options: Any) -> AppendReport:
    folder = source(tmp_path / "more", rows, items)
    return append_to_domain(folder, domain="d", out=tmp_path, **{"block_users": 2, **options})


def histories(domain: Domain) -> Histories:
    ids, items, sequences = domain.user_ids(), domain.item_ids(), domain.sequences()
    assert len(ids) == len(set(ids)) == domain.manifest.users == len(sequences.offsets) - 1
    assert len(sequences.items) == domain.manifest.interactions
    bounds = zip(ids, sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    for user, (a, b) in enumerate(pairwise(sequences.offsets)):
        alone = domain.histories(np.array([user]))
        assert alone.items.tolist() == sequences.items[a:b].tolist()
        assert alone.times.tolist() == sequences.times[a:b].tolist()
    named = [items[item] for item in sequences.items]
    return {user: list(zip(named[a:b], sequences.times[a:b].tolist(), strict=True)) for user, a, b in bounds}


def pending_histories(domain: Domain) -> Histories:
    items = domain.item_ids()
    return {
        user: [(items[i], t) for i, t in zip(block.items[a:b].tolist(), block.times[a:b].tolist(), strict=True)]
        for ids, block in domain.pending_histories()
        for user, a, b in zip(ids, block.offsets[:-1], block.offsets[1:], strict=True)
    }


def content(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of writing of every file."""
    return {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


FIRST: list[Row] = [(user, item, 10 + n) for n, item in enumerate("abcd") for user in ("u", "v", "w", "x", "y")]
FIRST += [("p", "a", 5), ("p", "b", 6), ("q", "c", 7)]
LATER: list[Row] = [
    ("v", "e", 20),
    ("y", "g", 21),
    ("p", "g", 22),
    ("r", "a", 23),
    ("z", "a", 24),
    ("z", "b", 25),
    ("z", "c", 26),
]


# ---------------------------------------------------------------------------------------------------------------- law

rows_of_a_world = st.lists(
    st.tuples(st.sampled_from("uvwxyz"), st.sampled_from(ITEMS), st.integers(0, 6)), min_size=8, max_size=60
)


@settings(max_examples=60, deadline=None)
@given(
    rows=rows_of_a_world,
    cuts=st.lists(st.integers(3, 63), max_size=3),
    longest=st.none() | st.integers(3, 5),
    late_items=st.integers(0, 3),
)
def test_appended_domain_equals_one_prepared_at_once(
    rows: list[Row], cuts: list[int], longest: int | None, late_items: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("law")
    rows = [("t", item, 3) for item in "abc"] + rows  # so that there is a first domain
    bounds = sorted({min(cut, len(rows)) for cut in [0, *cuts, len(rows)]})
    parts = [rows[a:b] for a, b in pairwise(bounds)]
    known: set[Row] = set()  # a row that an earlier part has is a duplicate
    for n, part in enumerate(parts):
        parts[n] = [row for row in part if row not in known]
        known |= set(part)
    at_once = [row for part in parts for row in part]
    early = sorted({item for _, item, _ in parts[0]} | set(ITEMS[late_items:]))
    prepare_domain(source(tmp_path / "all", at_once, ITEMS), domain="d", out=tmp_path / "once", max_sequence=longest)
    complete = open_domain(tmp_path / "once" / "d")
    prepare_rows(tmp_path, parts[0], early, max_sequence=longest)
    for part in parts[1:]:
        if part:
            append_rows(tmp_path, part, ITEMS)
    appended = open_domain(tmp_path / "d")
    assert histories(appended) == histories(complete)
    if longest is None:
        assert pending_histories(appended) == pending_histories(complete)
    counted = dict(zip(appended.item_ids(), appended.popularity().tolist(), strict=True))
    once = dict(zip(complete.item_ids(), complete.popularity().tolist(), strict=True))
    assert {item: count for item, count in counted.items() if count} == {i: n for i, n in once.items() if n}
    report = verify_domain(appended.folder)
    assert report.ok, report.problems
    if appended.manifest.interactions > 3 * appended.manifest.users:
        assert ledger(appended) == expected_targets(appended)


def ledger(domain: Domain) -> Counter[tuple[int, int]]:
    """(user, target) of all predictions of an epoch."""
    config = StreamConfig(batch_size=7, streams=2, window_shards=1, window_blocks=2)
    seen: Counter[tuple[int, int]] = Counter()
    for batch in Stream([domain], config, max_length=4, seed=3).batches(0):
        users = np.repeat(batch.users, np.diff(batch.offsets))
        seen.update(zip(users[batch.predict_at].tolist(), batch.targets.tolist(), strict=True))
    return seen


def expected_targets(domain: Domain) -> Counter[tuple[int, int]]:
    sequences = domain.sequences()
    bounds = zip(sequences.offsets[:-1].tolist(), sequences.offsets[1:].tolist(), strict=True)
    return Counter((u, item) for u, (a, b) in enumerate(bounds) for item in sequences.items[a + 1 : b - 2].tolist())


def test_without_appends_fingerprint_and_order_are_pinned(tmp_path: Path) -> None:
    domain = numbered_domain(tmp_path / "d", [5, 4, 9, 3, 7, 8] * 5)
    assert domain.fingerprint == "52561a82a58f133239475c7f3a8dbdd094348a485cd34f8dc44b80d1fd79a9cb"
    digest = hashlib.sha256()
    for batch in Stream([domain], StreamConfig(batch_size=20), max_length=4, seed=1).batches(0):
        digest.update(batch.items.tobytes() + batch.users.tobytes())
    assert digest.hexdigest() == "514d2250f313dadc53842cea972ac397108cf09607cfdb6e45eb43d0c23af224"


# -------------------------------------------------------------------------------------------------------- one append


def test_append_adds_users_items_and_days_and_keeps_old_files(tmp_path: Path) -> None:
    old = prepare_rows(tmp_path, FIRST, items_per_shard=4)
    before = content(old.folder)
    report = append_rows(tmp_path, LATER, ["g"])
    appended = open_domain(tmp_path / "d")
    assert (report.new_users, report.updated_users, report.new_items, report.pending_users) == (2, 2, 1, 2)
    assert appended.item_ids() == [*ITEMS, "g"]  # old indices stay
    found = histories(appended)
    assert [item for item, _ in found["v"]] == list("abcde") and [item for item, _ in found["y"]] == list("abcdg")
    assert [item for item, _ in found["p"]] == list("abg")  # who waited since the preparation
    assert found["u"] == histories(old)["u"]
    assert pending_histories(appended) == {"q": [("c", 7)], "r": [("a", 23)]}

    after = content(old.folder)
    kept = f"append-00001/manifest-{old.fingerprint[:16]}.json"
    assert after.pop(kept)[0] == before.pop("manifest.json")[0]
    assert all(after[name] == stamp for name, stamp in before.items())  # bytes and times of writing
    assert read_manifest(old.folder, kept) == old.manifest
    assert histories(Domain(old.folder, old.manifest)) == histories(old)  # whoever opened it before goes on
    assert appended.manifest.ancestors == [old.fingerprint] == [report.previous_fingerprint]
    assert report.fingerprint == appended.fingerprint
    assert any("do not compare" in line for line in report.lines())
    assert verify_domain(appended.folder).ok


def test_appending_the_same_again_changes_nothing(tmp_path: Path) -> None:
    prepare_rows(tmp_path, FIRST)
    append_rows(tmp_path, LATER, ["g"])
    before = content(tmp_path / "d")
    report = append_rows(tmp_path, LATER, ["g"])
    assert content(tmp_path / "d") == before
    assert report.notes["interactions dropped: in the domain already"] == len(LATER)
    assert report.lines()[-1].startswith("nothing new")


def test_truncated_interactions_do_not_return(tmp_path: Path) -> None:
    prepare_rows(tmp_path, FIRST, max_sequence=3)
    before = content(tmp_path / "d")
    append_rows(tmp_path, [row for row in FIRST if row[2] == 10])
    assert content(tmp_path / "d") == before


def test_late_interactions_are_sorted_and_counted(tmp_path: Path) -> None:
    prepare_rows(tmp_path, FIRST)
    report = append_rows(tmp_path, [("u", "f", 11), ("u", "f", 99)])
    assert histories(open_domain(tmp_path / "d"))["u"] == [
        ("a", 10),
        ("b", 11),
        ("f", 11),
        ("c", 12),
        ("d", 13),
        ("f", 99),
    ]
    assert report.notes == {"interactions earlier than the domain's last": 1}


def test_existing_items_are_unchanged_and_counted(tmp_path: Path) -> None:
    prepare_domain(source(tmp_path / "base", FIRST, ITEMS, text="old", price=2.5), domain="d", out=tmp_path)
    append_to_domain(source(tmp_path / "more", LATER, ["g"], text="old"), domain="d", out=tmp_path)
    report = append_to_domain(source(tmp_path / "more", LATER[:1], ["a", "h"], text="new"), domain="d", out=tmp_path)
    assert report.notes["items given with another text or price: kept as they were"] == 1
    assert report.examples["items given with another text or price: kept as they were"] == ["item a"]
    items = {item.item_id: item.text for item in open_domain(tmp_path / "d").items()}
    assert items == {**dict.fromkeys(ITEMS, "old"), "g": "old", "h": "new"}


def test_after_a_k_core_only_touched_items_are_added(tmp_path: Path) -> None:
    prepare_rows(tmp_path, FIRST, k_core=4)
    report = append_rows(tmp_path, LATER, [*ITEMS, "g"])
    appended = open_domain(tmp_path / "d")
    assert appended.item_ids() == ["a", "b", "c", "d", "e", "g"]
    assert any("4-core" in line for line in report.lines())
    assert set(histories(appended)) == {"u", "v", "w", "x", "y", "z"}  # p was dropped, and begins anew
    assert pending_histories(appended) == {"p": [("g", 22)], "r": [("a", 23)]}


def test_orders_of_two_epochs_see_each_user_once(tmp_path: Path) -> None:
    """With minimal blocks, shards and streams, after several appends that supersede entire blocks and shards."""
    rows = [(f"u{n}", ITEMS[(n + k) % 6], 10 * k) for n in range(12) for k in range(5)]
    prepare_rows(tmp_path, rows, blocks_per_shard=1)
    for step in range(3):
        late = [(f"u{n}", ITEMS[n % 6], 100 + step) for n in range(step, 12, 2)] + [(f"w{step}", i, 7) for i in "abcde"]
        append_rows(tmp_path, late, blocks_per_shard=1)
    appended = open_domain(tmp_path / "d")
    assert any(shard.users == 0 for shard in appended.manifest.sequence_shards)
    assert ledger(appended) == expected_targets(appended)
    assert sum(ledger(appended).values()) == appended.manifest.interactions - 3 * appended.manifest.users
    stream = Stream(
        [appended], StreamConfig(batch_size=7, streams=2, window_shards=1, window_blocks=2), max_length=4, seed=3
    )
    for whole, tail in zip(list(stream.batches(1))[5:], stream.batches(1, 5), strict=True):  # started within an epoch
        assert whole.index == tail.index and whole.items.tolist() == tail.items.tolist()
    scored = [
        pair for shard in range(len(appended.manifest.sequence_shards)) for pair in users_to_score(appended, shard)
    ]
    assert [user for ids, _ in scored for user in ids] == appended.user_ids()
    np.testing.assert_array_equal(np.concatenate([block.items for _, block in scored]), appended.sequences().items)
    assert verify_domain(appended.folder).ok


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("file", ["items", "sequences", "pending", "superseded", "rename", "manifest"])
def test_failed_append_leaves_the_domain_unchanged(tmp_path: Path, file: str, monkeypatch: Any) -> None:
    old = prepare_rows(tmp_path, FIRST)
    before = histories(old)
    monkeypatch.setenv(faults.VARIABLE, json.dumps([{"fault": "full", "at": "append", "file": file}]))
    with pytest.raises(OSError, match="No space"):
        append_rows(tmp_path, LATER, ["g"])
    monkeypatch.delenv(faults.VARIABLE)
    found = open_domain(tmp_path / "d")
    assert found.fingerprint == old.fingerprint and histories(found) == before
    assert verify_domain(found.folder).ok
    append_rows(tmp_path, LATER, ["g"])
    assert verify_domain(found.folder).ok
    assert histories(open_domain(tmp_path / "d"))["z"] == [("a", 24), ("b", 25), ("c", 26)]


def test_append_killed_before_the_manifest_can_be_repeated(tmp_path: Path) -> None:
    """Through the entry point that Ray jobs have."""
    old = prepare_rows(tmp_path, FIRST)
    entry, folder = (
        Path(__file__).resolve().parents[3] / "launch" / "prepare.py",
        source(tmp_path / "more", LATER, ["g"]),
    )
    command = [sys.executable, str(entry), str(folder), "--domain", "d", "--out", str(tmp_path), "--append"]
    fault = json.dumps([{"fault": "kill", "at": "append", "file": "manifest"}])
    killed = subprocess.run(command, env={**os.environ, faults.VARIABLE: fault}, capture_output=True, check=False)
    assert killed.returncode == -9
    assert open_domain(tmp_path / "d").fingerprint == old.fingerprint and verify_domain(tmp_path / "d").ok
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "2 new users, 2 users with more interactions, 1 new item" in again.stdout
    assert verify_domain(tmp_path / "d").ok


def test_a_damaged_old_shard_is_refused(tmp_path: Path) -> None:
    old = prepare_rows(tmp_path, FIRST)
    faults.corrupt(old.folder / "sequences-00000.tar", "flip")
    with pytest.raises(UserError, match=r"sequences-00000\.tar: the file is damaged"):
        append_rows(tmp_path, LATER, ["g"])
    assert open_domain(old.folder).fingerprint == old.fingerprint


@pytest.mark.parametrize("name", ["superseded.npy", "popularity.npy", "pending.tar", "sequences-00000.tar"])
def test_verify_finds_damage_in_appended_files(tmp_path: Path, name: str) -> None:
    prepare_rows(tmp_path, FIRST)
    append_rows(tmp_path, LATER, ["g"])
    faults.corrupt(tmp_path / "d" / "append-00001" / name, "flip")
    assert any(name in problem for problem in verify_domain(tmp_path / "d").problems)


def test_superseded_users_must_match_the_manifest(tmp_path: Path) -> None:
    prepare_rows(tmp_path, FIRST)
    append_rows(tmp_path, LATER, ["g"])
    domain = open_domain(tmp_path / "d")
    file = domain.manifest.superseded
    assert file is not None and domain.superseded.tolist() == [1, 4]
    path = tmp_path / "d" / file.name
    path.write_bytes(path.read_bytes()[:-16] + np.array([2, 4]).tobytes())  # w instead of v: another block
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = domain.manifest.model_copy(update={"superseded": file.model_copy(update={"sha256": digest})})
    write_manifest(tmp_path / "d", manifest)
    with pytest.raises(UserError, match=r"superseded\.npy \(block-000000\): 0 superseded users, 1 by the manifest"):
        open_domain(tmp_path / "d").sequences()


# ------------------------------------------------------------------------------------------------------------ refusals


def test_append_refuses_missing_domain_format_and_item(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no prepared domain to append to.*Prepare it first, without --append"):
        append_rows(tmp_path, LATER)
    prepare_rows(tmp_path, FIRST)
    with pytest.raises(UserError, match=r"prepared from format tabular, not amazon.*--format tabular"):
        append_rows(tmp_path, LATER, format="amazon")
    with pytest.raises(
        UserError, match=r"item 'g' is not in the domain or the items file .*1 interactions.*--drop-unknown"
    ):
        append_rows(tmp_path, LATER[1:2])
    assert append_rows(tmp_path, LATER, drop_unknown=True).notes["interactions dropped: item unknown"] == 2


def test_concurrent_append_is_refused(tmp_path: Path) -> None:
    import fcntl

    prepare_rows(tmp_path, FIRST)
    descriptor = os.open(tmp_path / "d", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another append is running"):
            append_rows(tmp_path, LATER, ["g"])
    finally:
        os.close(descriptor)

"""A domain reads as it was written, and is written atomically."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antdist import ragged
from antdist.data.domain import Domain, Sequences, open_domain, read_blocks
from antdist.data.shards import ItemRecord
from antdist.data.writing import write_domain
from antdist.errors import UserError
from tests.domains import numbered_domain

IMAGES = [b"\xff\xd8\xff one", b"\x89PNG two", b"\xff\xd8\xff three"]
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@st.composite
def domains(draw: st.DrawFn) -> tuple[list[ItemRecord], Sequences, list[str]]:
    ids = draw(st.lists(texts, min_size=1, max_size=9, unique=True))
    items = [
        ItemRecord(
            index,
            item_id,
            draw(st.none() | texts),
            draw(st.none() | st.floats(0, 1e9)),
            IMAGES[: draw(st.integers(0, 3))],
        )
        for index, item_id in enumerate(ids)
    ]
    lengths = draw(st.lists(st.integers(3, 8), min_size=1, max_size=9))
    total = sum(lengths)
    codes = draw(st.lists(st.integers(0, len(ids) - 1), min_size=total, max_size=total))
    times = draw(st.lists(st.integers(-(2**62), 2**62), min_size=total, max_size=total))
    offsets = ragged.offsets(lengths)
    users = draw(st.lists(texts, min_size=len(lengths), max_size=len(lengths), unique=True))
    return items, Sequences(offsets, np.array(codes), np.array(times)), users


@settings(max_examples=40, deadline=None)
@given(domain=domains(), block_users=st.integers(1, 4), items_per_shard=st.integers(1, 4), blocks=st.integers(1, 3))
def test_what_is_read_is_what_was_written(
    domain: tuple[list[ItemRecord], Sequences, list[str]], block_users: int, items_per_shard: int, blocks: int
) -> None:
    items, sequences, users = domain
    with tempfile.TemporaryDirectory() as folder:
        cut = {"block_users": block_users, "items_per_shard": items_per_shard, "blocks_per_shard": blocks}
        for name in ("one", "two"):
            write_domain(Path(folder) / name, "d", items, sequences, users, {}, **cut)
        one, two = (open_domain(Path(folder) / name) for name in ("one", "two"))
        assert list(one.items()) == items and one.item_ids() == [item.item_id for item in items]
        assert one.user_ids() == users
        for read, wrote in zip(vars(one.sequences()).values(), vars(sequences).values(), strict=True):
            assert read.dtype == np.int64 and np.array_equal(read, wrote)
        for some in (range(len(users)), range(0, len(users), 2), range(1, len(users), 3), []):
            histories = one.histories(np.array(some, dtype=np.int64))
            for u, (begin, end) in zip(some, itertools.pairwise(histories.offsets), strict=True):
                whole = slice(sequences.offsets[u], sequences.offsets[u + 1])
                assert histories.items[begin:end].tolist() == sequences.items[whole].tolist()
                assert histories.times[begin:end].tolist() == sequences.times[whole].tolist()
            assert len(histories.items) == len(histories.times) == histories.offsets[-1]
        assert [item for shard in one.manifest.item_shards for item in one.items(shard)] == items
        assert one.popularity().tolist() == naive_popularity(sequences, len(items))
        for file in one.manifest.files:
            assert (one.folder / file.name).read_bytes() == (two.folder / file.name).read_bytes()
        assert one.fingerprint == two.fingerprint
        assert (one.folder / "manifest.json").read_bytes() == (two.folder / "manifest.json").read_bytes()
        assert all(block.users <= block_users for shard in one.manifest.sequence_shards for block in shard.blocks)


def test_histories_are_read_from_the_shards_that_hold_them(tmp_path: Path) -> None:
    domain = numbered_domain(tmp_path / "d", [3, 4, 5, 6, 3, 4], block_users=1, blocks_per_shard=2)
    first, _, third = domain.manifest.sequence_shards
    for unread in (first, third):
        (domain.folder / unread.name).unlink()
    histories = domain.histories(np.array([2, 3]))
    assert histories.offsets.tolist() == [0, 5, 11] and histories.items.tolist() == list(range(7, 18))


def naive_popularity(sequences: Sequences, items: int) -> list[int]:
    counts = [0] * items
    for start, end in zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True):
        for item in sequences.items[start : end - 2]:
            counts[item] += 1
    return counts


def tiny(folder: Path, **options: object) -> Domain:
    items = (ItemRecord(n, f"i{n}", f"text {n}", None, []) for n in range(5))
    sequences = Sequences(np.array([0, 3, 7, 12]), np.arange(12) % 5, np.arange(12))
    write_domain(folder, "tiny", items, sequences, ["a", "b", "c"], {}, **options)  # type: ignore[arg-type]
    return open_domain(folder)


def test_existing_domain_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    tiny(tmp_path / "d")
    (tmp_path / "d" / "features").mkdir()
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        tiny(tmp_path / "d")
    tiny(tmp_path / "d", overwrite=True)
    assert not (tmp_path / "d" / "features").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_folder_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a prepared domain, so it is not overwritten"):
        tiny(tmp_path / "d", overwrite=True)
    assert (tmp_path / "d" / "thesis.txt").read_text() == "years of work"


def test_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def items() -> Iterator[ItemRecord]:
        yield ItemRecord(0, "i0", None, None, [])
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_domain(
            tmp_path / "d", "d", items(), Sequences(np.array([0, 3]), np.zeros(3, int), np.arange(3)), ["u"], {}
        )
    assert list(tmp_path.iterdir()) == []


def test_name_that_is_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'\.\./d' is not a valid domain name"):
        write_domain(
            tmp_path / "d", "../d", [], Sequences(np.zeros(1, int), np.zeros(0, int), np.zeros(0, int)), [], {}
        )


def test_shard_of_another_size_is_refused_first(tmp_path: Path) -> None:
    domain = tiny(tmp_path / "d")
    shard = domain.manifest.sequence_shards[0]
    path = tmp_path / "d" / shard.name
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(
        UserError, match=rf"{shard.name}: the file has {shard.bytes - 512} bytes, {shard.bytes} by the man"
    ):
        next(read_blocks(domain.folder, shard, 5))
    path.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}: the file is missing.*antdist verify"):
        domain.sequences()


def test_block_with_other_counts_than_the_manifests_is_refused(tmp_path: Path) -> None:
    domain = tiny(tmp_path / "d")
    shard = domain.manifest.sequence_shards[0]
    block = shard.blocks[0].model_copy(update={"interactions": 13})
    with pytest.raises(UserError, match=r"block-000000\): column items has 12 entries, 13 by the manifest"):
        next(read_blocks(domain.folder, shard.model_copy(update={"blocks": [block]}), 5))

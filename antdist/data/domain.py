"""A prepared domain: a folder of shards with its manifest. Written whole or not at all, opened cheaply, read in order."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antdist.data.manifest import (
    MANIFEST_NAME,
    PLAIN_NAME,
    Block,
    File,
    ItemShard,
    Manifest,
    SequenceShard,
    read_manifest,
    write_manifest,
)
from antdist.data.shards import (
    HELD_OUT,
    SHORTEST,
    TORN,
    ItemRecord,
    ShardWriter,
    UserBlock,
    block_faults,
    block_members,
    decode_block,
    decode_item,
    decode_users,
    item_members,
    npy_array,
    npy_bytes,
    read_samples,
)
from antdist.data.windows import ranges, starts_of
from antdist.errors import UserError
from antdist.files import file_sha256

BLOCK_USERS = 1024
ITEMS_PER_SHARD = 4096
ITEM_SHARD_BYTES = 256 << 20
SEQUENCE_SHARD_BYTES = 64 << 20
POPULARITY_NAME = "popularity.npy"

__all__ = [
    "SHORTEST",
    "Domain",
    "ItemRecord",
    "Sequences",
    "UserBlock",
    "open_domain",
    "read_blocks",
    "write_domain",
]


@dataclass(frozen=True)
class Sequences:
    """All users of a domain, each in time order: `offsets` (U + 1,), `items` (T,), `times` (T,), all int64.

    The split is by position: a user's last interaction tests, the second last validates, the rest train.
    """

    offsets: NDArray[np.int64]
    items: NDArray[np.int64]
    times: NDArray[np.int64]


@dataclass(frozen=True)
class Domain:
    """An open domain; reads its shards through webdataset.

    A shard is read only if its size and digest are the manifest's: a damaged one is named, whatever the damage would
    have been taken for. (The digest of 64 MB takes about 0.04 s.)
    """

    folder: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.domain

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def sequences(self) -> Sequences:
        """All users, in memory (20 bytes an interaction)."""
        shards, count = self.manifest.sequence_shards, self.manifest.items
        blocks = [block for shard in shards for block in read_blocks(self.folder, shard, count)]
        lengths = [np.diff(block.offsets) for block in blocks]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([*lengths, np.zeros(0, np.int64)]))])
        items = np.concatenate([np.zeros(0, np.int64), *(block.items for block in blocks)], dtype=np.int64)
        times = np.concatenate([np.zeros(0, np.int64), *(block.times for block in blocks)], dtype=np.int64)
        return Sequences(offsets.astype(np.int64), items, times)

    def histories(self, users: NDArray[np.int64]) -> Sequences:
        """Those of some users, given by increasing index, in memory; reads the shards that hold them, one after the other."""
        lengths, items, times = ([np.zeros(0, np.int64)] for _ in range(3))
        for shard in self.manifest.sequence_shards:
            first = shard.first_user
            if _among(users, first, shard.users).size == 0:
                continue
            for block in read_blocks(self.folder, shard, self.manifest.items):
                wanted = _among(users, first, len(block.offsets) - 1) - first
                begin, length = block.offsets[wanted], np.diff(block.offsets)[wanted]
                places = ranges(begin, length)
                lengths.append(length)
                items.append(block.items[places].astype(np.int64))
                times.append(block.times[places])
                first += len(block.offsets) - 1
        return Sequences(starts_of(np.concatenate(lengths)), np.concatenate(items), np.concatenate(times))

    def verify_sequences(self) -> int:
        """Check size and digest of every file that training reads; returns how many bytes they are.

        Raises:
            UserError: naming the first that is missing or damaged.
        """
        files = [*self.manifest.sequence_shards, self.manifest.popularity]
        for file in files:
            _sound(self.folder, file)
        return sum(file.bytes for file in files)

    def user_ids(self) -> list[str]:
        """The users' ids in the source, by user index."""
        ids: list[str] = []
        for shard in self.manifest.sequence_shards:
            keys = [block.key for block in shard.blocks]
            path = _sound(self.folder, shard)
            for sample, block in zip(read_samples(path, keys, _is_json), shard.blocks, strict=True):
                ids += decode_users(sample, path, block.users)
        return ids

    def items(self, shard: ItemShard | None = None) -> Iterator[ItemRecord]:
        """All items in order of their index, or those of one shard.

        Raises:
            UserError: a shard is missing, torn or not the manifest's.
        """
        for part in self.manifest.item_shards if shard is None else [shard]:
            path = _sound(self.folder, part)
            for sample in read_samples(path, _item_keys(part)):
                yield decode_item(sample, path)

    def item_ids(self) -> list[str]:
        """The items' ids in the source, by item index."""
        ids = []
        for shard in self.manifest.item_shards:
            path = _sound(self.folder, shard)
            for sample in read_samples(path, _item_keys(shard), _is_json):
                ids.append(decode_item(sample, path, images=False).item_id)
        return ids

    def popularity(self) -> NDArray[np.int64]:
        """How often each item occurs in the training parts, (items,)."""
        path = _sound(self.folder, self.manifest.popularity)
        counts = npy_array(path.read_bytes(), "<i8", str(path))
        if len(counts) != self.manifest.items:
            raise UserError(f"{len(counts)} entries for {self.manifest.items} items", where=path, remedy=TORN)
        return counts


def open_domain(folder: str | Path) -> Domain:
    """Open a prepared domain; reads its manifest alone.

    Raises:
        UserError: the folder is no prepared domain, or its manifest is malformed.
    """
    return Domain(Path(folder), read_manifest(Path(folder)))


def read_blocks(folder: Path, shard: SequenceShard, items: int) -> Iterator[UserBlock]:
    """The blocks of one sequence shard in file order, their arrays views on the bytes read.

    Args:
        items: how many the domain has; a block that names another is refused.

    Raises:
        UserError: the shard is missing, torn or not the manifest's, or a block holds what no domain could; it names the
            shard, and the block.
    """
    path = _sound(folder, shard)
    keys = [block.key for block in shard.blocks]
    for sample, stated in zip(read_samples(path, keys, _is_array), shard.blocks, strict=True):
        block = decode_block(sample, path, stated.users, stated.interactions)
        for fault in block_faults(block, items):
            raise UserError(fault, where=f"{path} ({stated.key})", remedy=TORN)
        yield block


def _among(users: NDArray[np.int64], first: int, count: int) -> NDArray[np.int64]:
    """Those of increasing `users` that are `first` or one of the `count` - 1 after it."""
    return users[slice(*np.searchsorted(users, [first, first + count]))]


def _is_json(name: str) -> bool:
    return name.endswith(".json")


def _is_array(name: str) -> bool:
    return name.endswith(".npy")


def _item_keys(shard: ItemShard) -> list[str]:
    return [f"{index:09d}" for index in range(shard.first, shard.first + shard.items)]


def _sound(folder: Path, file: File) -> Path:
    """The file's path, if its size and digest are the manifest's."""
    path = folder / file.name
    try:
        size = path.stat().st_size
        if size != file.bytes:
            raise UserError(f"the file has {size} bytes, {file.bytes} by the manifest", where=path, remedy=TORN)
        digest = file_sha256(path)
    except FileNotFoundError:
        raise UserError("the file is missing", where=path, remedy=TORN) from None
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror})", where=path, remedy=TORN) from None
    if digest != file.sha256:
        raise UserError("the file is damaged: its SHA-256 is not the manifest's", where=path, remedy=TORN)
    return path


# ---------------------------------------------------------------------------------------------------------- writing


def write_domain(
    folder: str | Path,
    name: str,
    items: Iterable[ItemRecord],
    sequences: Sequences,
    user_ids: list[str],
    made: dict[str, Any],
    *,
    block_users: int = BLOCK_USERS,
    items_per_shard: int = ITEMS_PER_SHARD,
    blocks_per_shard: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a prepared domain whole or not at all: into a sibling folder, renamed at the end.

    Args:
        folder: the domain's folder, usually `DATA/NAME`.
        name: the domain's name.
        items: all items in order of their index 0, 1, ...; read once.
        sequences: every user with at least three interactions, in time order.
        user_ids: the users' ids in the source.
        made: how it was made, for the manifest; JSON, without dates or paths, so that equal data has equal bytes.
        block_users: users a block.
        items_per_shard: at most; a shard also ends at about 256 MB.
        blocks_per_shard: None: as many as make about 64 MB.
        overwrite: replace a domain that is there already, its feature tables included.

    Raises:
        UserError: the folder exists and `overwrite` is off, or the name is not a plain one.
    """
    folder = Path(folder)
    check_name(name)
    check_free(folder, overwrite)
    assert min(block_users, items_per_shard, blocks_per_shard or 1) > 0
    lengths = np.diff(sequences.offsets)
    assert len(user_ids) == len(lengths) and sequences.offsets[0] == 0 and (lengths >= SHORTEST).all()

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        item_shards = _write_items(partial, items, items_per_shard)
        count = sum(shard.items for shard in item_shards)
        assert not len(sequences.items) or 0 <= sequences.items.min() <= sequences.items.max() < count
        manifest = Manifest(
            domain=name,
            users=len(lengths),
            items=count,
            interactions=len(sequences.items),
            item_shards=item_shards,
            sequence_shards=_write_sequences(partial, sequences, user_ids, block_users, blocks_per_shard),
            popularity=_write_popularity(partial, sequences, count),
            made=made,
        )
        write_manifest(partial, manifest)
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def check_name(name: str) -> None:
    """Refuse a domain name that is not a plain file name."""
    if not re.fullmatch(PLAIN_NAME, name):
        raise UserError(f"{name!r} is no name for a domain", remedy="use letters, digits, dots, dashes and underscores")


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse to write over something, unless it is a prepared domain and `overwrite` is on."""
    if not folder.exists():
        return
    if not overwrite:
        raise UserError("exists already", where=folder, remedy="choose another name, or replace it with --overwrite")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST_NAME).exists()):
        raise UserError(
            "is not a prepared domain, so it is not overwritten", where=folder, remedy="choose another name"
        )


def _put_in_place(partial: Path, folder: Path) -> None:
    old = partial.with_name(partial.name + "-old")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_items(folder: Path, items: Iterable[ItemRecord], items_per_shard: int) -> list[ItemShard]:
    shards: list[ItemShard] = []
    source, index = iter(items), 0
    pending = next(source, None)
    while pending is not None:
        first = index
        name = f"items-{len(shards):05d}.tar"
        with ShardWriter(folder / name) as writer:
            while pending is not None and index - first < items_per_shard and writer.bytes < ITEM_SHARD_BYTES:
                assert pending.index == index, "items come in order of their index"
                for member, data in item_members(pending):
                    writer.add(member, data)
                pending, index = next(source, None), index + 1
        shards.append(ItemShard(name=name, bytes=writer.bytes, sha256=writer.sha256, first=first, items=index - first))
    return shards


def _write_sequences(
    folder: Path, sequences: Sequences, user_ids: list[str], block_users: int, blocks_per_shard: int | None
) -> list[SequenceShard]:
    shards: list[SequenceShard] = []
    user, users, blocks_written = 0, len(user_ids), 0
    while user < users:
        first = user
        name = f"sequences-{len(shards):05d}.tar"
        blocks: list[Block] = []
        with ShardWriter(folder / name) as writer:
            while user < users and len(blocks) != blocks_per_shard and writer.bytes < SEQUENCE_SHARD_BYTES:
                last = min(user + block_users, users)
                key, block = f"block-{blocks_written:06d}", _cut(sequences, user, last)
                for member, data in block_members(key, block, user_ids[user:last]):
                    writer.add(member, data)
                blocks.append(Block(key=key, users=last - user, interactions=len(block.items)))
                user, blocks_written = last, blocks_written + 1
        shards.append(
            SequenceShard(
                name=name,
                bytes=writer.bytes,
                sha256=writer.sha256,
                first_user=first,
                users=user - first,
                interactions=sum(block.interactions for block in blocks),
                blocks=blocks,
            )
        )
    return shards


def _cut(sequences: Sequences, first: int, last: int) -> UserBlock:
    start, end = sequences.offsets[first], sequences.offsets[last]
    offsets = sequences.offsets[first : last + 1] - start
    return UserBlock(offsets, sequences.items[start:end].astype(np.int32), sequences.times[start:end])


def training_popularity(sequences: Sequences, items: int) -> NDArray[np.int64]:
    """How often each item occurs in the training parts, (items,)."""
    train = np.ones(len(sequences.items), bool)
    for held_out in range(1, HELD_OUT + 1):
        train[sequences.offsets[1:] - held_out] = False
    return np.bincount(sequences.items[train], minlength=items).astype(np.int64)


def _write_popularity(folder: Path, sequences: Sequences, items: int) -> File:
    data = npy_bytes(training_popularity(sequences, items).astype("<i8"))
    (folder / POPULARITY_NAME).write_bytes(data)
    return File(name=POPULARITY_NAME, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

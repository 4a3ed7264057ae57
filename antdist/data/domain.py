"""A prepared domain: a folder of shards with its manifest. Written whole or not at all, opened cheaply, read in order."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antdist import ragged
from antdist.data.cache import Cache
from antdist.data.entries import PLAIN_NAME, File
from antdist.data.manifest import (
    MANIFEST_NAME,
    Block,
    ItemShard,
    Manifest,
    SequenceShard,
    archived_manifest_name,
    check_shard,
    read_manifest,
    write_manifest,
)
from antdist.data.places import Place, RemotePath, open_checked, prefetch, resolve_place
from antdist.data.shards import (
    HELD_OUT,
    MIN_INTERACTIONS,
    VERIFY_REMEDY,
    ItemMetadata,
    ItemRecord,
    Sample,
    ShardWriter,
    UserBlock,
    decode_block,
    decode_item,
    decode_npy,
    decode_users,
    encode_block,
    encode_item,
    encode_npy,
    find_block_faults,
    read_item_metadata,
    read_samples,
    without,
)
from antdist.errors import UserError
from antdist.io.files import write_json

BLOCK_USERS = 1024
ITEMS_PER_SHARD = 4096
ITEM_SHARD_BYTES = 256 << 20
SEQUENCE_SHARD_BYTES = 64 << 20
POPULARITY_NAME = "popularity.npy"
# users with fewer than three interactions, for a later append: their shard, and its description where no append was yet
PENDING_NAME, PENDING_DESCRIPTION_NAME = "pending.tar", "pending.json"

__all__ = [
    "MIN_INTERACTIONS",
    "Domain",
    "ItemRecord",
    "Sequences",
    "UserBlock",
    "open_domain",
    "read_blocks",
    "rewind_domain",
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
    have been taken for. (The digest of 64 MB takes about 0.04 s.) Those of a remote domain come through the node's cache.
    """

    folder: Place
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.domain

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def address(self) -> str:
        """By which any process opens it: an absolute path, or a URI."""
        return self.folder.uri if isinstance(self.folder, RemotePath) else str(self.folder.resolve())

    def writable_folder(self) -> Path:
        """The folder to write to. Raises UserError: it lies under a URI, where nothing is written."""
        if isinstance(self.folder, RemotePath):
            raise UserError(
                "what is made of a domain is written to its folder, and this is a URI",
                where=self.folder,
                remedy="work on a copy in a folder, and copy what is new there",
            )
        return self.folder

    def sequences(self) -> Sequences:
        """All users, in memory (20 bytes an interaction)."""
        shards = prefetch(self.folder, self.manifest.sequence_shards)
        blocks = [block for number, _ in enumerate(shards) for block in self.blocks(number)]
        lengths = [np.diff(block.offsets) for block in blocks]
        offsets = ragged.offsets(np.concatenate([np.zeros(0, np.int64), *lengths]))
        items = np.concatenate([np.zeros(0, np.int64), *(block.items for block in blocks)], dtype=np.int64)
        times = np.concatenate([np.zeros(0, np.int64), *(block.times for block in blocks)], dtype=np.int64)
        return Sequences(offsets, items, times)

    def histories(self, users: NDArray[np.int64]) -> Sequences:
        """Those of some users, given by increasing index, in memory; reads the shards that hold them, one after the other."""
        lengths, items, times = ([np.zeros(0, np.int64)] for _ in range(3))
        stored = self.manifest.sequence_shards
        numbers = [n for n, shard in enumerate(stored) if _among(users, shard.first_user, shard.users).size]
        for number, shard in zip(numbers, prefetch(self.folder, [stored[n] for n in numbers]), strict=True):
            first = shard.first_user
            for block in self.blocks(number):
                wanted = _among(users, first, len(block.offsets) - 1) - first
                begin, length = block.offsets[wanted], np.diff(block.offsets)[wanted]
                places = ragged.ranges(begin, length)
                lengths.append(length)
                items.append(block.items[places].astype(np.int64))
                times.append(block.times[places])
                first += len(block.offsets) - 1
        return Sequences(ragged.offsets(np.concatenate(lengths)), np.concatenate(items), np.concatenate(times))

    @cached_property
    def superseded(self) -> NDArray[np.int64]:
        """Places of users that a later shard holds anew, counted over all that the shards hold; ascending.

        Raises:
            UserError: the file that says so is missing, damaged or not what the manifest says.
        """
        file, shards = self.manifest.superseded, self.manifest.sequence_shards
        if file is None:
            return np.zeros(0, np.int64)
        path = self.folder / file.name
        with open_checked(self.folder, file) as stream:
            places = decode_npy(stream.read(), "<i8", str(path))
        due = sum(shard.stored_users - shard.users for shard in shards)
        if len(places) != due or (places[1:] <= places[:-1]).any():
            raise UserError(f"{len(places)} users, not {due} in rising order", where=path, remedy=VERIFY_REMEDY)
        return places

    @cached_property
    def _first_places(self) -> list[int]:
        return ragged.offsets([shard.stored_users for shard in self.manifest.sequence_shards]).tolist()

    def superseded_in(self, shard: int) -> Iterator[NDArray[np.int64]]:
        """For each block of a sequence shard the places in it of its superseded users. Raises UserError if they are not as
        many as the manifest says."""
        place = self._first_places[shard]
        for block in self.manifest.sequence_shards[shard].blocks:
            first, last = np.searchsorted(self.superseded, [place, place + block.stored_users])
            if last - first != block.stored_users - block.users:
                file = self.manifest.superseded
                raise UserError(
                    f"{last - first} superseded users, {block.stored_users - block.users} by the manifest",
                    where=f"{self.folder / file.name if file else self.folder} ({block.key})",
                    remedy=VERIFY_REMEDY,
                )
            yield self.superseded[first:last] - place
            place += block.stored_users

    def blocks(self, shard: int) -> Iterator[UserBlock]:
        """The blocks of a sequence shard in file order, without superseded users.

        Raises:
            UserError: as `read_blocks`; the superseded users are not those that the manifest counts.
        """
        stored = self.manifest.sequence_shards[shard]
        read = read_blocks(self.folder, stored, self.manifest.items)
        for gone, stated, block in zip(self.superseded_in(shard), stored.blocks, read, strict=True):
            yield self._live(block, gone, stored, stated)

    def stored(self, shard: int) -> Iterator[tuple[NDArray[np.int64], list[str], UserBlock]]:
        """As `blocks`, with the users' places among all that the shards hold, and their ids."""
        stored, place = self.manifest.sequence_shards[shard], self._first_places[shard]
        read = read_users(self.folder, stored, self.manifest.items)
        for gone, stated, (ids, block) in zip(self.superseded_in(shard), stored.blocks, read, strict=True):
            there = np.delete(np.arange(stated.stored_users), gone)
            yield place + there, [ids[n] for n in there.tolist()], self._live(block, gone, stored, stated)
            place += stated.stored_users

    def _live(self, block: UserBlock, gone: NDArray[np.int64], shard: SequenceShard, stated: Block) -> UserBlock:
        live = without(block, gone)
        if len(live.items) != stated.interactions:
            raise UserError(
                f"{len(live.items)} interactions of users that are not superseded, {stated.interactions} by the manifest",
                where=f"{self.folder / shard.name} ({stated.key})",
                remedy=VERIFY_REMEDY,
            )
        return live

    @cached_property
    def pending(self) -> SequenceShard | None:
        """The shard of users with too few interactions so far, whom a later append may complete. None: nobody waits, or the
        domain was prepared without keeping them.

        Raises:
            UserError: what describes it is malformed, or of another domain.
        """
        if self.manifest.earlier:
            return self.manifest.pending
        return read_pending(self.folder, self.fingerprint)

    def pending_histories(self) -> Iterator[tuple[list[str], UserBlock]]:
        """Ids and columns of the blocks of `pending`. Raises UserError as `read_blocks`."""
        if self.pending is not None:
            yield from read_users(self.folder, self.pending, self.manifest.items, shortest=1)

    def verify_sequences(self) -> int:
        """Check size and digest of every file that training reads; of remote ones the size, as their digests are checked
        when they are fetched. Returns how many bytes they are.

        Raises:
            UserError: naming the first that is missing or damaged.
        """
        files: list[File] = [*self.manifest.sequence_shards, self.manifest.popularity]
        if self.manifest.superseded is not None:
            files.append(self.manifest.superseded)
        if isinstance(self.folder, RemotePath):
            self.folder.check_sizes(files)
        else:
            for file in files:
                open_checked(self.folder, file).close()
        return sum(file.bytes for file in files)

    def user_ids(self) -> list[str]:
        """The users' ids in the source, by user index."""
        ids: list[str] = []
        for number, shard in enumerate(prefetch(self.folder, self.manifest.sequence_shards)):
            keys = [block.key for block in shard.blocks]
            samples, superseded = _samples(self.folder, shard, keys, _is_json), self.superseded_in(number)
            for sample, block, gone in zip(samples, shard.blocks, superseded, strict=True):
                stored = decode_users(sample, self.folder / shard.name, block.stored_users)
                ids += np.delete(np.array(stored, object), gone).tolist() if len(gone) else stored
        return ids

    def items(self, shard: ItemShard | None = None) -> Iterator[ItemRecord]:
        """All items in order of their index, or those of one shard.

        Raises:
            UserError: a shard is missing, torn or not the manifest's.
        """
        for part in prefetch(self.folder, self.manifest.item_shards if shard is None else [shard]):
            for sample in _samples(self.folder, part, _item_keys(part)):
                yield decode_item(sample, self.folder / part.name)

    def item_ids(self) -> list[str]:
        """The items' ids in the source, by item index."""
        return [facts.item_id for facts in self.item_metadata()]

    def item_metadata(self) -> Iterator[ItemMetadata]:
        """All items in order of their index, pictures unread. Raises UserError as `items`."""
        for shard in prefetch(self.folder, self.manifest.item_shards):
            with open_checked(self.folder, shard) as stream:
                yield from read_item_metadata(stream, self.folder / shard.name, _item_keys(shard))

    def popularity(self) -> NDArray[np.int64]:
        """How often each item occurs in the training parts, (items,)."""
        path = self.folder / self.manifest.popularity.name
        with open_checked(self.folder, self.manifest.popularity) as stream:
            counts = decode_npy(stream.read(), "<i8", str(path))
        if len(counts) != self.manifest.items:
            raise UserError(f"{len(counts)} entries for {self.manifest.items} items", where=path, remedy=VERIFY_REMEDY)
        return counts


def open_domain(folder: str | Path, cache: Cache | None = None) -> Domain:
    """Open a prepared domain by its folder or URI; reads its manifest alone.

    Args:
        cache: for the files of a remote one; None: the node's default.

    Raises:
        UserError: the folder is no prepared domain, or its manifest is malformed.
    """
    place = resolve_place(folder, cache)
    return Domain(place, read_manifest(place))


def rewind_domain(domain: Domain, fingerprint: str) -> Domain:
    """The domain as it was with the manifest of this fingerprint, if appends have replaced that; else as it is.

    Raises:
        UserError: the manifest that was kept is missing, malformed or another.
    """
    ancestors = domain.manifest.ancestors
    if fingerprint not in ancestors:
        return domain
    name = f"append-{ancestors.index(fingerprint) + 1:05d}/{archived_manifest_name(fingerprint)}"
    manifest = read_manifest(domain.folder, name)
    if manifest.fingerprint != fingerprint:
        raise UserError("is not the manifest that was kept", where=domain.folder / name, remedy=VERIFY_REMEDY)
    return replace(domain, manifest=manifest)


def read_blocks(folder: Place, shard: SequenceShard, items: int) -> Iterator[UserBlock]:
    """The blocks of one sequence shard as its file has them, in order, their arrays views on the bytes read.

    Args:
        items: how many the domain has; a block that names another is refused.

    Raises:
        UserError: the shard is missing, torn or not the manifest's, or a block holds what no domain could; it names the
            shard, and the block.
    """
    path = folder / shard.name
    keys = [block.key for block in shard.blocks]
    for sample, stated in zip(_samples(folder, shard, keys, _is_array), shard.blocks, strict=True):
        yield _sound_block(sample, path, stated, items)


def read_users(
    folder: Place, shard: SequenceShard, items: int, shortest: int = MIN_INTERACTIONS
) -> Iterator[tuple[list[str], UserBlock]]:
    """As `read_blocks`, with the users' ids; users have `shortest` interactions at least."""
    path = folder / shard.name
    for sample, stated in zip(_samples(folder, shard, [b.key for b in shard.blocks]), shard.blocks, strict=True):
        yield decode_users(sample, path, stated.stored_users), _sound_block(sample, path, stated, items, shortest)


def _sound_block(sample: Sample, path: Place, stated: Block, items: int, shortest: int = MIN_INTERACTIONS) -> UserBlock:
    block = decode_block(sample, path, stated.stored_users, stated.stored_interactions)
    for fault in find_block_faults(block, items, shortest):
        raise UserError(fault, where=f"{path} ({stated.key})", remedy=VERIFY_REMEDY)
    return block


def _among(users: NDArray[np.int64], first: int, count: int) -> NDArray[np.int64]:
    """Those of increasing `users` that are `first` or one of the `count` - 1 after it."""
    return users[slice(*np.searchsorted(users, [first, first + count]))]


def _is_json(name: str) -> bool:
    return name.endswith(".json")


def _is_array(name: str) -> bool:
    return name.endswith(".npy")


def _item_keys(shard: ItemShard) -> list[str]:
    return [f"{index:09d}" for index in range(shard.first, shard.first + shard.items)]


def _samples(
    folder: Place, shard: File, keys: list[str], select: Callable[[str], bool] | None = None
) -> Iterator[Sample]:
    """The samples of a shard, once its size and digest have been found right."""
    with open_checked(folder, shard) as stream:
        yield from read_samples(stream, folder / shard.name, keys, select)


# ---------------------------------------------------------------------------------------------------------- writing


def write_domain(
    folder: str | Path,
    name: str,
    items: Iterable[ItemRecord],
    sequences: Sequences,
    user_ids: list[str],
    made: dict[str, Any],
    *,
    waiting: tuple[Sequences, list[str]] | None = None,
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
        waiting: users with fewer than three interactions, and their ids, kept beside the domain for a later append.
        block_users: users a block.
        items_per_shard: at most; a shard also ends at about 256 MB.
        blocks_per_shard: None: as many as make about 64 MB.
        overwrite: replace a domain that is there already, its feature tables included.

    Raises:
        UserError: the folder exists and `overwrite` is off, or the name is not a plain one.
    """
    folder = Path(folder)
    check_name(name)
    check_target_folder(folder, overwrite)
    assert min(block_users, items_per_shard, blocks_per_shard or 1) > 0
    lengths = np.diff(sequences.offsets)
    assert len(user_ids) == len(lengths) and sequences.offsets[0] == 0 and (lengths >= MIN_INTERACTIONS).all()

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        item_shards = write_items(partial, items, items_per_shard)
        count = sum(shard.items for shard in item_shards)
        assert not len(sequences.items) or 0 <= sequences.items.min() <= sequences.items.max() < count
        manifest = Manifest(
            domain=name,
            users=len(lengths),
            items=count,
            interactions=len(sequences.items),
            item_shards=item_shards,
            sequence_shards=write_sequences(partial, sequences, user_ids, block_users, blocks_per_shard),
            popularity=write_array(partial / POPULARITY_NAME, training_popularity(sequences, count)),
            made=made,
        )
        if waiting is not None and waiting[1]:
            pending = write_pending(partial, split_into_blocks(*waiting, block_users))
            document = {"fingerprint": manifest.fingerprint, "shard": pending.model_dump(mode="json")}
            write_json(partial / PENDING_DESCRIPTION_NAME, document)
        write_manifest(partial, manifest)
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def check_name(name: str) -> None:
    """Refuse a domain name that is not a plain file name."""
    if not re.fullmatch(PLAIN_NAME, name):
        raise UserError(f"{name!r} is no name for a domain", remedy="use letters, digits, dots, dashes and underscores")


def check_target_folder(folder: Path, overwrite: bool) -> None:
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


def write_items(
    folder: Path, items: Iterable[ItemRecord], items_per_shard: int, *, first: int = 0, prefix: str = ""
) -> list[ItemShard]:
    """Write item shards into a folder, which lies at `prefix` in the domain's; the items' indices begin at `first`."""
    shards: list[ItemShard] = []
    source, index = iter(items), first
    pending = next(source, None)
    while pending is not None:
        start = index
        name = f"items-{len(shards):05d}.tar"
        with ShardWriter(folder / name) as writer:
            while pending is not None and index - start < items_per_shard and writer.bytes < ITEM_SHARD_BYTES:
                assert pending.index == index, "items come in order of their index"
                for member, data in encode_item(pending):
                    writer.add(member, data)
                pending, index = next(source, None), index + 1
        file = {"name": prefix + name, "bytes": writer.bytes, "sha256": writer.sha256}
        shards.append(ItemShard.model_validate({**file, "first": start, "items": index - start}))
    return shards


def write_sequences(
    folder: Path,
    sequences: Sequences,
    user_ids: list[str],
    block_users: int,
    blocks_per_shard: int | None,
    *,
    first_user: int = 0,
    prefix: str = "",
) -> list[SequenceShard]:
    """Write sequence shards into a folder, which lies at `prefix` in the domain's; the users' numbers begin at `first_user`."""
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
                for member, data in encode_block(key, block, user_ids[user:last]):
                    writer.add(member, data)
                blocks.append(Block(key=key, users=last - user, interactions=len(block.items)))
                user, blocks_written = last, blocks_written + 1
        shards.append(
            SequenceShard(
                name=prefix + name,
                bytes=writer.bytes,
                sha256=writer.sha256,
                first_user=first_user + first,
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


def split_into_blocks(
    sequences: Sequences, user_ids: list[str], block_users: int
) -> Iterator[tuple[list[str], UserBlock]]:
    """Users, so many together: their ids and columns."""
    for first in range(0, len(user_ids), block_users):
        last = min(first + block_users, len(user_ids))
        yield user_ids[first:last], _cut(sequences, first, last)


def write_pending(folder: Path, histories: Iterable[tuple[list[str], UserBlock]], prefix: str = "") -> SequenceShard:
    """Write the users who wait into `pending.tar`: blocks as those of a sequence shard, of shorter histories."""
    written: list[Block] = []
    with ShardWriter(folder / PENDING_NAME) as writer:
        for ids, block in histories:
            key = f"block-{len(written):06d}"
            for member, data in encode_block(key, block, ids):
                writer.add(member, data)
            written.append(Block(key=key, users=len(ids), interactions=len(block.items)))
    return SequenceShard(
        name=prefix + PENDING_NAME,
        bytes=writer.bytes,
        sha256=writer.sha256,
        first_user=0,
        users=sum(block.users for block in written),
        interactions=sum(block.interactions for block in written),
        blocks=written,
    )


def read_pending(folder: Place, fingerprint: str) -> SequenceShard | None:
    """What `pending.json` says of a freshly prepared domain of this fingerprint; None if nobody waits."""
    path = folder / PENDING_DESCRIPTION_NAME
    if not path.is_file():
        return None
    remedy = "remove it, and those who wait are forgotten, or prepare the domain again"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        pending = SequenceShard.model_validate(document["shard"])
        check_shard(pending)
        belongs = document["fingerprint"] == fingerprint
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"is not the description of users who wait ({told})", where=path, remedy=remedy) from None
    if not belongs or pending.stored_users != pending.users:
        raise UserError("describes the users who wait of another domain", where=path, remedy=remedy)
    return pending


def write_array(path: Path, array: NDArray[np.int64], prefix: str = "") -> File:
    """Write an `.npy` file of int64, and describe it."""
    data = encode_npy(array.astype("<i8"))
    path.write_bytes(data)
    return File(name=prefix + path.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

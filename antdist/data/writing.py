"""Write prepared domains: item shards, sequence shards, popularity and the manifest, atomically."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antdist.data.domain import PENDING_DESCRIPTION_NAME, PENDING_NAME, Sequences
from antdist.data.entries import PLAIN_NAME, File
from antdist.data.manifest import MANIFEST_NAME, Block, ItemShard, Manifest, SequenceShard, write_manifest
from antdist.data.shards import (
    HELD_OUT,
    MIN_INTERACTIONS,
    ItemRecord,
    ShardWriter,
    UserBlock,
    encode_block,
    encode_item,
    encode_npy,
)
from antdist.errors import UserError
from antdist.io.files import write_folder_atomically, write_json

BLOCK_USERS = 1024
ITEMS_PER_SHARD = 4096
ITEM_SHARD_BYTES = 256 << 20
SEQUENCE_SHARD_BYTES = 64 << 20
POPULARITY_NAME = "popularity.npy"
Histories = tuple[Sequences, list[str]]  # of users, and the users' ids


def write_domain(
    folder: str | Path,
    name: str,
    items: Iterable[ItemRecord],
    sequences: Sequences,
    user_ids: list[str],
    made: dict[str, Any],
    *,
    pending: Histories | None = None,
    block_users: int = BLOCK_USERS,
    items_per_shard: int = ITEMS_PER_SHARD,
    blocks_per_shard: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a prepared domain atomically: into a sibling folder, which is renamed at the end.

    Args:
        folder, name: of the domain; the folder is usually `DATA/NAME`.
        items: all items in order of their index 0, 1, ...; read once.
        sequences: every user with at least three interactions, in time order.
        user_ids: the users' ids in the source, (U,).
        made: how the domain was made, for the manifest; JSON, without dates or paths, so that equal data has equal bytes.
        pending: users with fewer than three interactions, stored beside the domain for a later append.
        block_users, items_per_shard, blocks_per_shard: at most; shards also end at 256 MB of items, 64 MB of sequences.
        overwrite: replace an existing domain, its feature tables included.

    Raises:
        UserError: the folder exists and `overwrite` is off, or the name is not a plain file name.
    """
    folder = Path(folder)
    check_name(name)
    check_target_folder(folder, overwrite)
    assert min(block_users, items_per_shard, blocks_per_shard or 1) > 0
    assert len(user_ids) == len(sequences.lengths) and (sequences.lengths >= MIN_INTERACTIONS).all()
    assert sequences.offsets[0] == 0
    temporary = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    old = temporary.with_name(f"{temporary.name}-old")
    with write_folder_atomically(folder, temporary) as partial:
        item_shards = write_items(partial, items, items_per_shard)
        count = sum(shard.items for shard in item_shards)
        assert not len(sequences.items) or 0 <= sequences.items.min() <= sequences.items.max() < count
        manifest = Manifest(
            domain=name,
            users=len(user_ids),
            items=count,
            interactions=len(sequences.items),
            item_shards=item_shards,
            sequence_shards=write_sequences(partial, sequences, user_ids, block_users, blocks_per_shard),
            popularity=write_array(partial / POPULARITY_NAME, training_popularity(sequences, count)),
            made=made,
        )
        if pending is not None and pending[1]:
            shard = write_pending(partial, split_into_blocks(*pending, block_users))
            _describe_pending(partial, manifest.fingerprint, shard)
        write_manifest(partial, manifest)
        if folder.exists():
            folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)
    return manifest


def check_name(name: str) -> None:
    """Refuse a domain name that is not a plain file name."""
    if not re.fullmatch(PLAIN_NAME, name):
        what, remedy = f"{name!r} is not a valid domain name", "use letters, digits, dots, dashes and underscores"
        raise UserError(what, remedy=remedy)


def check_target_folder(folder: Path, overwrite: bool) -> None:
    """Refuse an existing folder, unless it is empty or a prepared domain and `overwrite` is on."""
    if not folder.exists():
        return
    if not overwrite:
        raise UserError("exists already", where=folder, remedy="choose another name, or replace it with --overwrite")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST_NAME).exists()):
        raise UserError(
            "is not a prepared domain, so it is not overwritten", where=folder, remedy="choose another name"
        )


def write_items(
    folder: Path, items: Iterable[ItemRecord], items_per_shard: int, *, first: int = 0, prefix: str = ""
) -> list[ItemShard]:
    """Write item shards.

    Args:
        folder: to write to; the domain's folder, or the one below it at `prefix`.
        first: index of the first item.
    """
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
    """Write sequence shards.

    Args:
        folder: to write to; the domain's folder, or the one below it at `prefix`.
        first_user: index of the first user.
    """
    shards: list[SequenceShard] = []
    user, users, blocks_written = 0, len(user_ids), 0
    while user < users:
        first = user
        name = f"sequences-{len(shards):05d}.tar"
        blocks: list[Block] = []
        with ShardWriter(folder / name) as writer:
            while user < users and len(blocks) != blocks_per_shard and writer.bytes < SEQUENCE_SHARD_BYTES:
                last = min(user + block_users, users)
                key, block = f"block-{blocks_written:06d}", _slice_block(sequences, user, last)
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


def _slice_block(sequences: Sequences, first: int, last: int) -> UserBlock:
    start, end = sequences.offsets[first], sequences.offsets[last]
    offsets = sequences.offsets[first : last + 1] - start
    return UserBlock(offsets, sequences.items[start:end].astype(np.int32), sequences.times[start:end])


def training_popularity(sequences: Sequences, items: int) -> NDArray[np.int64]:
    """Count how often each item occurs in the training parts, (items,)."""
    train = np.ones(len(sequences.items), bool)
    for held_out in range(1, HELD_OUT + 1):
        train[sequences.offsets[1:] - held_out] = False
    return np.bincount(sequences.items[train], minlength=items).astype(np.int64)


def split_into_blocks(
    sequences: Sequences, user_ids: list[str], block_users: int
) -> Iterator[tuple[list[str], UserBlock]]:
    """Split users into blocks of `block_users`: their ids and columns."""
    for first in range(0, len(user_ids), block_users):
        last = min(first + block_users, len(user_ids))
        yield user_ids[first:last], _slice_block(sequences, first, last)


def write_pending(folder: Path, histories: Iterable[tuple[list[str], UserBlock]], prefix: str = "") -> SequenceShard:
    """Write the pending users into `pending.tar`, in blocks like those of a sequence shard."""
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


def _describe_pending(folder: Path, fingerprint: str, shard: SequenceShard) -> None:
    """Write `pending.json`; the manifest does not list the pending users of a domain without appends."""
    document = {"fingerprint": fingerprint, "shard": shard.model_dump(mode="json")}
    write_json(folder / PENDING_DESCRIPTION_NAME, document)


def write_array(path: Path, array: NDArray[np.int64], prefix: str = "") -> File:
    """Write an `.npy` file of int64, and return its manifest entry."""
    data = encode_npy(array.astype("<i8"))
    path.write_bytes(data)
    return File(name=prefix + path.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

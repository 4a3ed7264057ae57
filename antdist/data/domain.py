"""Open and read a prepared domain: a folder or URI of shards with its manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from antdist import ragged
from antdist.batch import IntArray
from antdist.data.cache import Cache
from antdist.data.entries import File
from antdist.data.manifest import (
    Block,
    ItemShard,
    Manifest,
    SequenceShard,
    archived_manifest_name,
    check_shard,
    read_manifest,
)
from antdist.data.places import Place, RemotePath, open_checked, prefetch, resolve_place
from antdist.data.shards import (
    MIN_INTERACTIONS,
    VERIFY_REMEDY,
    ItemMetadata,
    ItemRecord,
    Sample,
    UserBlock,
    decode_block,
    decode_item,
    decode_npy,
    decode_users,
    drop_users,
    find_block_faults,
    read_item_metadata,
    read_samples,
)
from antdist.errors import UserError

# The shard of users with too few interactions, and its description while nothing has been appended.
PENDING_NAME, PENDING_DESCRIPTION_NAME = "pending.tar", "pending.json"


@dataclass(frozen=True)
class Sequences:
    """Users' interactions in time order: `offsets` (U + 1,), `items` (T,), `times` (T,), all int64.

    The split is by position: a user's last interaction tests, the second last validates, the rest train.
    """

    offsets: IntArray
    items: IntArray
    times: IntArray

    @property
    def lengths(self) -> IntArray:
        """Return the number of interactions of each user, (U,)."""
        return np.diff(self.offsets)

    def take(self, rows: IntArray) -> Sequences:
        """Return the users at these positions, in this order."""
        lengths = self.lengths[rows]
        at = ragged.ranges(self.offsets[:-1][rows], lengths)
        return Sequences(ragged.offsets(lengths), self.items[at], self.times[at])

    @staticmethod
    def concatenate(parts: Sequence[Sequences]) -> Sequences:
        """Return the users of all parts, one part after the other."""
        empty = np.zeros(0, np.int64)
        return Sequences(
            ragged.offsets(np.concatenate([empty, *(part.lengths for part in parts)])),
            np.concatenate([empty, *(part.items for part in parts)], dtype=np.int64),
            np.concatenate([empty, *(part.times for part in parts)], dtype=np.int64),
        )


@dataclass(frozen=True)
class Domain:
    """An open domain, which reads its shards through webdataset.

    A shard is read only if its size and digest match the manifest, so damage is reported as damage of that file, whatever
    it would have been decoded as. (The digest of 64 MB takes about 0.04 s.) Shards of a remote domain come through the
    node's cache.
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
        """Return an absolute path or a URI, by which any process can open the domain."""
        return self.folder.uri if isinstance(self.folder, RemotePath) else str(self.folder.resolve())

    def writable_folder(self) -> Path:
        """Return the folder to write to. Raises UserError if the domain is remote."""
        if isinstance(self.folder, RemotePath):
            raise UserError(
                "a remote domain is read-only, and this command writes into the domain's folder",
                where=self.folder,
                remedy="work on a local copy, and upload the new files",
            )
        return self.folder

    def sequences(self) -> Sequences:
        """Read all users into memory (20 bytes an interaction)."""
        shards = prefetch(self.folder, self.manifest.sequence_shards)
        blocks = [block for number, _ in enumerate(shards) for block in self.blocks(number)]
        return Sequences.concatenate([Sequences(block.offsets, block.items, block.times) for block in blocks])  # type: ignore[arg-type]

    def histories(self, users: IntArray) -> Sequences:
        """Read some users into memory, one shard after the other, touching only the shards that hold them.

        Args:
            users: increasing user indices, (U,).
        """
        parts = []
        stored = self.manifest.sequence_shards
        numbers = [n for n, shard in enumerate(stored) if _select_range(users, shard.first_user, shard.users).size]
        for number, shard in zip(numbers, prefetch(self.folder, [stored[n] for n in numbers]), strict=True):
            first = shard.first_user
            for block in self.blocks(number):
                rows = _select_range(users, first, len(block.offsets) - 1) - first
                parts.append(Sequences(block.offsets, block.items, block.times).take(rows))  # type: ignore[arg-type]
                first += len(block.offsets) - 1
        return Sequences.concatenate(parts)

    @cached_property
    def superseded(self) -> IntArray:
        """Positions of superseded users among all stored users; ascending.

        Raises:
            UserError: the file is missing, damaged, or does not match the manifest.
        """
        file, shards = self.manifest.superseded, self.manifest.sequence_shards
        if file is None:
            return np.zeros(0, np.int64)
        path = self.folder / file.name
        with open_checked(self.folder, file) as stream:
            positions = decode_npy(stream.read(), "<i8", str(path))
        expected = sum(shard.stored_users - shard.users for shard in shards)
        if len(positions) != expected or (positions[1:] <= positions[:-1]).any():
            what = f"{len(positions)} superseded users, expected {expected} in rising order"
            raise UserError(what, where=path, remedy=VERIFY_REMEDY)
        return positions

    @cached_property
    def _first_positions(self) -> list[int]:
        stored = [shard.stored_users for shard in self.manifest.sequence_shards]
        return ragged.offsets(stored).tolist()

    def superseded_in(self, shard: int) -> Iterator[IntArray]:
        """Give the positions of superseded users within each block of a sequence shard.

        Raises:
            UserError: their number differs from the manifest's.
        """
        start = self._first_positions[shard]
        for block in self.manifest.sequence_shards[shard].blocks:
            first, last = np.searchsorted(self.superseded, [start, start + block.stored_users])
            if last - first != block.stored_users - block.users:
                file = self.manifest.superseded
                raise UserError(
                    f"{last - first} superseded users, {block.stored_users - block.users} by the manifest",
                    where=f"{self.folder / file.name if file else self.folder} ({block.key})",
                    remedy=VERIFY_REMEDY,
                )
            yield self.superseded[first:last] - start
            start += block.stored_users

    def blocks(self, shard: int) -> Iterator[UserBlock]:
        """Read the blocks of a sequence shard in file order, without superseded users.

        Raises:
            UserError: as `read_blocks`; or the superseded users do not match the manifest.
        """
        stored = self.manifest.sequence_shards[shard]
        read = read_blocks(self.folder, stored, self.manifest.items)
        for superseded, stated, block in zip(self.superseded_in(shard), stored.blocks, read, strict=True):
            yield self._drop_superseded(block, superseded, stored, stated)

    def blocks_with_ids(self, shard: int) -> Iterator[tuple[IntArray, list[str], UserBlock]]:
        """Do as `blocks`; each block comes with its users' positions among all stored users, and their ids."""
        stored, start = self.manifest.sequence_shards[shard], self._first_positions[shard]
        read = read_users(self.folder, stored, self.manifest.items)
        for superseded, stated, (ids, block) in zip(self.superseded_in(shard), stored.blocks, read, strict=True):
            rows = np.delete(np.arange(stated.stored_users), superseded)
            live = self._drop_superseded(block, superseded, stored, stated)
            yield start + rows, [ids[row] for row in rows.tolist()], live
            start += stated.stored_users

    def _drop_superseded(
        self, block: UserBlock, superseded: IntArray, shard: SequenceShard, stated: Block
    ) -> UserBlock:
        live = drop_users(block, superseded)
        if len(live.items) != stated.interactions:
            raise UserError(
                f"{len(live.items)} interactions of users that are not superseded, {stated.interactions} by the manifest",
                where=f"{self.folder / shard.name} ({stated.key})",
                remedy=VERIFY_REMEDY,
            )
        return live

    @cached_property
    def pending(self) -> SequenceShard | None:
        """The shard of users with too few interactions, whom an append may complete; None if there are none.

        Raises:
            UserError: its description is malformed, or belongs to another domain.
        """
        if self.manifest.earlier:
            return self.manifest.pending
        return read_pending(self.folder, self.fingerprint)

    def pending_histories(self) -> Iterator[tuple[list[str], UserBlock]]:
        """Read ids and columns of the blocks of `pending`. Raises UserError as `read_blocks`."""
        if self.pending is not None:
            yield from read_users(self.folder, self.pending, self.manifest.items, shortest=1)

    def verify_sequences(self) -> int:
        """Check size and digest of every file that training reads, and return their size in bytes.

        Of a remote domain the sizes alone are checked: digests are checked when files are fetched.

        Raises:
            UserError: a file is missing or damaged.
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
        """Read the users' ids in the source, by user index."""
        ids: list[str] = []
        for number, shard in enumerate(prefetch(self.folder, self.manifest.sequence_shards)):
            samples = _read_samples(self.folder, shard, shard.keys, lambda name: name.endswith(".json"))
            for sample, block, superseded in zip(samples, shard.blocks, self.superseded_in(number), strict=True):
                stored = decode_users(sample, self.folder / shard.name, block.stored_users)
                ids += np.delete(np.array(stored, object), superseded).tolist() if len(superseded) else stored
        return ids

    def items(self, shard: ItemShard | None = None) -> Iterator[ItemRecord]:
        """Read all items in index order, or those of one shard.

        Raises:
            UserError: a shard is missing, damaged, or does not match the manifest.
        """
        for part in prefetch(self.folder, self.manifest.item_shards if shard is None else [shard]):
            for sample in _read_samples(self.folder, part, part.keys):
                yield decode_item(sample, self.folder / part.name)

    def item_ids(self) -> list[str]:
        """Read the items' ids in the source, by item index."""
        return [metadata.item_id for metadata in self.item_metadata()]

    def item_metadata(self) -> Iterator[ItemMetadata]:
        """Read all items in index order, without images. Raises UserError as `items`."""
        for shard in prefetch(self.folder, self.manifest.item_shards):
            with open_checked(self.folder, shard) as stream:
                yield from read_item_metadata(stream, self.folder / shard.name, shard.keys)

    def popularity(self) -> IntArray:
        """Read how often each item occurs in the training parts, (items,)."""
        path = self.folder / self.manifest.popularity.name
        with open_checked(self.folder, self.manifest.popularity) as stream:
            counts = decode_npy(stream.read(), "<i8", str(path))
        if len(counts) != self.manifest.items:
            raise UserError(f"{len(counts)} entries for {self.manifest.items} items", where=path, remedy=VERIFY_REMEDY)
        return counts


def open_domain(folder: str | Path, cache: Cache | None = None) -> Domain:
    """Open a prepared domain by its folder or URI; reads the manifest alone.

    Args:
        cache: for the files of a remote domain; None: the node's default.

    Raises:
        UserError: the folder is not a prepared domain, or its manifest is malformed.
    """
    place = resolve_place(folder, cache)
    return Domain(place, read_manifest(place))


def rewind_domain(domain: Domain, fingerprint: str) -> Domain:
    """Return the domain as of the manifest of this fingerprint, if appends replaced it; else the domain.

    Raises:
        UserError: the archived manifest is missing, malformed, or has another fingerprint.
    """
    ancestors = domain.manifest.ancestors
    if fingerprint not in ancestors:
        return domain
    name = f"append-{ancestors.index(fingerprint) + 1:05d}/{archived_manifest_name(fingerprint)}"
    manifest = read_manifest(domain.folder, name)
    if manifest.fingerprint != fingerprint:
        what = f"the archived manifest has fingerprint {manifest.fingerprint[:12]}, expected {fingerprint[:12]}"
        raise UserError(what, where=domain.folder / name, remedy=VERIFY_REMEDY)
    return replace(domain, manifest=manifest)


def read_blocks(folder: Place, shard: SequenceShard, items: int) -> Iterator[UserBlock]:
    """Read the blocks of one sequence shard as stored, in order; their arrays are views of the bytes read.

    Args:
        items: how many the domain has; a block that names another is refused.

    Raises:
        UserError: the shard is missing, damaged, or does not match the manifest, or a block's content is invalid.
    """
    path = folder / shard.name
    samples = _read_samples(folder, shard, shard.keys, lambda name: name.endswith(".npy"))
    for sample, stated in zip(samples, shard.blocks, strict=True):
        yield _decode_valid_block(sample, path, stated, items)


def read_users(
    folder: Place, shard: SequenceShard, items: int, shortest: int = MIN_INTERACTIONS
) -> Iterator[tuple[list[str], UserBlock]]:
    """Do as `read_blocks`, with the users' ids; each user must have at least `shortest` interactions."""
    path = folder / shard.name
    samples = _read_samples(folder, shard, shard.keys)
    for sample, stated in zip(samples, shard.blocks, strict=True):
        ids = decode_users(sample, path, stated.stored_users)
        yield ids, _decode_valid_block(sample, path, stated, items, shortest)


def read_pending(folder: Place, fingerprint: str) -> SequenceShard | None:
    """Read the description of the pending users of a domain without appends; None if there are none.

    Raises:
        UserError: `pending.json` is malformed, or of a domain with another fingerprint.
    """
    path = folder / PENDING_DESCRIPTION_NAME
    if not path.is_file():
        return None
    remedy = "delete it, which drops the pending users, or prepare the domain again"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        pending = SequenceShard.model_validate(document["shard"])
        check_shard(pending)
        belongs = document["fingerprint"] == fingerprint
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"is not a description of pending users ({reason})", where=path, remedy=remedy) from None
    if not belongs or pending.stored_users != pending.users:
        raise UserError("describes the pending users of another domain", where=path, remedy=remedy)
    return pending


def _decode_valid_block(
    sample: Sample, path: Place, stated: Block, items: int, shortest: int = MIN_INTERACTIONS
) -> UserBlock:
    block = decode_block(sample, path, stated.stored_users, stated.stored_interactions)
    for fault in find_block_faults(block, items, shortest):
        raise UserError(fault, where=f"{path} ({stated.key})", remedy=VERIFY_REMEDY)
    return block


def _select_range(users: IntArray, first: int, count: int) -> NDArray[np.int64]:
    """Select the users from `first` to `first + count - 1` of increasing `users`."""
    return users[slice(*np.searchsorted(users, [first, first + count]))]


def _read_samples(
    folder: Place, shard: File, keys: list[str], select: Callable[[str], bool] | None = None
) -> Iterator[Sample]:
    """Read the samples of a shard, after checking its size and digest."""
    with open_checked(folder, shard) as stream:
        yield from read_samples(stream, folder / shard.name, keys, select)

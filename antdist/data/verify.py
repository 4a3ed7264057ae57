"""Verify a prepared domain: every size, digest, count and reference; report all problems."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from antdist.batch import IntArray
from antdist.data.cache import Cache
from antdist.data.domain import PENDING_DESCRIPTION_NAME, PENDING_NAME, Domain, Sequences, open_domain
from antdist.data.entries import File
from antdist.data.images import BrokenImageError, normalize_image
from antdist.data.manifest import MANIFEST_NAME, Block, ItemShard, SequenceShard, archived_manifest_name, read_manifest
from antdist.data.places import Place, RemotePath, list_file_names, open_unchecked
from antdist.data.quarantine import QUARANTINE_NAME
from antdist.data.shards import (
    MIN_INTERACTIONS,
    Sample,
    UserBlock,
    decode_block,
    decode_item,
    decode_users,
    drop_users,
    find_block_faults,
    read_samples,
)
from antdist.data.writing import training_popularity
from antdist.errors import UserError
from antdist.io.files import file_sha256
from antdist.io.progress import track
from antdist.report import Report, count


@dataclass(frozen=True, repr=False)
class VerifyReport(Report):
    """What was checked, and every problem, with its file and key."""

    folder: str
    domain: str
    fingerprint: str
    files: int
    bytes: int
    items: int
    images: int
    users: int
    interactions: int
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems

    def lines(self) -> list[str]:
        """Format the report for the terminal."""
        checked = (
            f"checked {count(self.files, 'file')}, {self.bytes:,} bytes: {count(self.users, 'user')}, "
            f"{count(self.items, 'item')}, {count(self.interactions, 'interaction')}, {count(self.images, 'image')}"
        )
        problems = count(len(self.problems), "problem")
        verdict = "all is well" if self.ok else f"{problems}; prepare or featurize the domain again"
        return [checked, *self.problems, f"{self.domain} ({self.fingerprint[:16]}): {verdict}"]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


@dataclass
class _Findings:
    """Counts and problems found so far."""

    problems: list[str]
    items: int = 0
    images: int = 0
    users: int = 0
    interactions: int = 0
    ids: set[str] = field(default_factory=set)
    user_hashes: list[IntArray] = field(default_factory=list)


def verify_domain(place: str | Path, cache: Cache | None = None) -> VerifyReport:
    """Verify a prepared domain, by its folder or URI, with its feature tables.

    Args:
        cache: for the files of a remote domain; None: the node's default.

    Raises:
        UserError: the manifest is missing or malformed; everything else is a problem in the report.
    """
    domain = open_domain(place, cache)
    manifest, found = domain.manifest, _Findings([])
    files: list[tuple[Place, File]] = [
        (domain.folder, file) for file in [*manifest.files, *_pending_file(domain, found)]
    ]
    features = list(_feature_parts(domain, found.problems))
    for folder, file in track(files + features, "checking digests", len(files) + len(features)):
        found.problems += _file_problems(folder, file)
    found.problems += _find_unknown_files(domain)
    for item_shard in track(manifest.item_shards, "checking items", len(manifest.item_shards)):
        _check_items(domain, item_shard, found)
    popularity = np.zeros(manifest.items, np.int64)
    for number in track(range(len(manifest.sequence_shards)), "checking sequences", len(manifest.sequence_shards)):
        popularity += _check_sequences(domain, number, found)
    _check_popularity(domain, popularity, found)
    _check_pending(domain, found)
    _check_duplicate_users(domain, found)
    return VerifyReport(
        folder=str(domain.folder),
        domain=domain.name,
        fingerprint=domain.fingerprint,
        files=1 + len(files) + len(features),
        bytes=sum(file.bytes for _, file in files + features),
        items=found.items,
        images=found.images,
        users=found.users,
        interactions=found.interactions,
        problems=found.problems,
    )


# -------------------------------------------------------------------------------------------------------------- files


def _file_problems(folder: Place, file: File) -> Iterator[str]:
    if isinstance(folder, RemotePath):
        try:
            folder.check_sizes([file])
            folder.open(file).close()
        except UserError as error:
            yield str(error)
        return
    path = folder / file.name
    if not path.is_file():
        yield f"{path}: the file is missing"
        return
    actual = path.stat().st_size
    if actual != file.bytes:
        yield f"{path}: the file has {actual} bytes, {file.bytes} by the manifest"
    elif file_sha256(path) != file.sha256:
        yield f"{path}: the file is damaged: its SHA-256 differs from the manifest's"


def _pending_file(domain: Domain, found: _Findings) -> list[File]:
    """Return the file of pending users that the manifest does not list, as of a domain without appends."""
    try:
        return [domain.pending] if domain.pending is not None and not domain.manifest.earlier else []
    except UserError as error:
        found.problems.append(str(error))
        return []


def _find_unknown_files(domain: Domain) -> Iterator[str]:
    """Find files that no manifest lists; an unfinished append's folder is harmless."""
    known = {MANIFEST_NAME, QUARANTINE_NAME, PENDING_NAME, PENDING_DESCRIPTION_NAME}
    known |= {file.name for file in domain.manifest.files}
    folders = [""]
    for number, fingerprint in enumerate(domain.manifest.ancestors, 1):
        folders.append(f"append-{number:05d}/")
        kept = f"{folders[-1]}{archived_manifest_name(fingerprint)}"
        known |= {kept, f"{folders[-1]}{QUARANTINE_NAME}"}
        try:
            earlier = read_manifest(domain.folder, kept)
            known |= {file.name for file in earlier.files}
            if earlier.fingerprint != fingerprint:
                yield f"{domain.folder / kept}: is not the manifest before append {number} (its fingerprint differs)"
        except UserError as error:
            yield str(error)
    for folder in folders:
        for name in list_file_names(domain.folder / folder if folder else domain.folder):
            if f"{folder}{name}" not in known:
                yield f"{domain.folder / f'{folder}{name}'}: the manifest does not list this file"


def _feature_parts(domain: Domain, problems: list[str]) -> Iterator[tuple[Place, File]]:
    """Find the files of feature tables, whose meta files are read as plain JSON.

    `antdist.features` imports this room, so its classes cannot be used here.
    """
    folder = domain.folder / "features"
    for name in list_file_names(folder):
        if not name.endswith(".json") or not name.removesuffix(".json").isalpha():
            continue  # the record of a part, `text-00000.json`; the meta file lists the part
        path = folder / name
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            if meta["fingerprint"] not in (domain.fingerprint, *domain.manifest.ancestors):
                problems.append(f"{path}: key fingerprint: made for another manifest; featurize the domain again")
            covered = sum(part["items"] for part in meta["parts"])
            if meta["parts"] and covered != domain.manifest.items:
                problems.append(
                    f"{path}: key parts: {covered} items of the domain's {domain.manifest.items}; featurize it again"
                )
            files = []
            for part in meta["parts"]:
                for prefix, suffix in (("", ""), ("present_", ".present")):
                    fields = {"bytes": part[f"{prefix}bytes"], "sha256": part[f"{prefix}sha256"]}
                    files.append(File.model_validate({"name": f"{part['name']}{suffix}.npy", **fields}))
            yield from ((folder, file) for file in files)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OSError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            problems.append(f"{path}: is not the meta file of a feature table ({reason})")


# ------------------------------------------------------------------------------------------------------------ content


def _check_items(domain: Domain, shard: ItemShard, found: _Findings) -> None:
    path = domain.folder / shard.name
    try:
        with open_unchecked(domain.folder, shard) as stream:
            for sample in read_samples(stream, path, shard.keys):
                _check_item(sample, path, found)
    except UserError as error:
        found.problems.append(str(error))


def _check_item(sample: Sample, path: Place, found: _Findings) -> None:
    place = f"{path} ({sample['__key__']})"
    try:
        item = decode_item(sample, path)
    except UserError as error:
        found.problems.append(str(error))
        return
    if item.item_id in found.ids:
        found.problems.append(f"{place}: item_id {item.item_id} occurs twice")
    found.ids.add(item.item_id)
    if item.price is not None and not (math.isfinite(item.price) and item.price >= 0):
        found.problems.append(f"{place}: price {item.price} is negative, NaN or Inf")
    for number, image in enumerate(item.images):
        try:
            normalize_image(image)
        except BrokenImageError as fault:
            found.problems.append(f"{place}: image {number} cannot be decoded: {fault}")
    found.items += 1
    found.images += len(item.images)


def _check_sequences(domain: Domain, number: int, found: _Findings) -> IntArray:
    """Check a shard's blocks; return the counts of items in the training parts of its users, (items,)."""
    shard, popularity = domain.manifest.sequence_shards[number], np.zeros(domain.manifest.items, np.int64)
    path = domain.folder / shard.name
    try:
        superseded = list(domain.superseded_in(number))
        for sample, block, dropped in zip(_read_blocks(domain, shard), shard.blocks, superseded, strict=True):
            live = _check_block(sample, path, block, dropped, domain.manifest.items, found)
            if live is not None:
                sequences = Sequences(live.offsets, live.items.astype(np.int64), live.times)
                popularity += training_popularity(sequences, domain.manifest.items)
    except UserError as error:
        found.problems.append(str(error))
    return popularity


def _check_block(
    sample: Sample, path: Place, block: Block, superseded: IntArray, items: int, found: _Findings
) -> UserBlock | None:
    """Check a block; return it without superseded users, or None if its columns are faulty."""
    try:
        columns = decode_block(sample, path, block.stored_users, block.stored_interactions)
        faults = list(find_block_faults(columns, items)) or list(_find_disorder(columns))
        ids = decode_users(sample, path, block.stored_users)
    except UserError as error:
        found.problems.append(str(error))
        return None
    found.problems += [f"{path} ({block.key}): {fault}" for fault in faults]
    if faults:
        return None
    live = drop_users(columns, superseded)
    if len(live.items) != block.interactions:
        what = f"{len(live.items)} interactions of users that are not superseded, {block.interactions} by the manifest"
        found.problems.append(f"{path} ({block.key}): {what}")
    found.users += block.users
    found.interactions += len(live.items)
    found.user_hashes.append(_hash_ids(np.delete(np.array(ids, object), superseded).tolist()))
    return live


def _check_pending(domain: Domain, found: _Findings) -> None:
    try:
        for ids, block in domain.pending_histories():
            found.user_hashes.append(_hash_ids(ids))
            if (np.diff(block.offsets) >= MIN_INTERACTIONS).any() or any(_find_disorder(block)):
                what = "pending users have three or more interactions, or interactions out of order"
                found.problems.append(f"{domain.folder / domain.pending.name if domain.pending else ''}: {what}")
    except UserError as error:
        if str(error) not in found.problems:
            found.problems.append(str(error))


def _hash_ids(ids: list[str]) -> IntArray:
    return np.array([hash(user) for user in ids], np.int64)


def _check_duplicate_users(domain: Domain, found: _Findings) -> None:
    """Check by hash, in eight bytes a user, that each user occurs once; equal hashes are resolved by ids."""
    hashes, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *found.user_hashes]), return_counts=True)
    doubtful, seen = set(hashes[counts > 1].tolist()), set[str]()
    if not doubtful:
        return
    try:
        users = [*domain.user_ids(), *(user for ids, _ in domain.pending_histories() for user in ids)]
    except UserError:
        return  # a damaged shard, reported already
    for user in users:
        if hash(user) in doubtful and user in seen:
            found.problems.append(f"{domain.folder}: user {user} occurs twice in the domain")
        elif hash(user) in doubtful:
            seen.add(user)


def _read_blocks(domain: Domain, shard: SequenceShard) -> Iterator[Sample]:
    with open_unchecked(domain.folder, shard) as stream:
        yield from read_samples(stream, domain.folder / shard.name, shard.keys)


def _find_disorder(block: UserBlock) -> Iterator[str]:
    rising = block.times[1:] >= block.times[:-1]
    rising[block.offsets[1:-1] - 1] = True  # from one user to the next
    if not rising.all():
        yield "column times: a user's interactions are not in time order"


def _check_popularity(domain: Domain, counted: IntArray, found: _Findings) -> None:
    if found.interactions != domain.manifest.interactions:
        return  # faulty sequences, reported already, make the counts meaningless
    try:
        stated = domain.popularity()
    except UserError as error:
        found.problems.append(str(error))
        return
    wrong = int((stated != counted).sum())
    if wrong:
        path = domain.folder / domain.manifest.popularity.name
        found.problems.append(f"{path}: the stated counts of {wrong} items differ from the training parts")

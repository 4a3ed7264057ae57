"""The manifest of a prepared domain: all of its files, with size and digest (docs/formats.md)."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError, model_validator

from antdist.data.entries import PLAIN_NAME, Count, Digest, File, FrozenRecord
from antdist.errors import UserError
from antdist.io.files import write_atomically

if TYPE_CHECKING:
    from antdist.data.places import Place


SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
# fewest bytes of each in a shard: a tar header and a block of JSON; an offset; an index and a time
SMALLEST_ITEM, SMALLEST_USER, SMALLEST_INTERACTION = 1024, 8, 12

DomainName = Annotated[str, Field(pattern=PLAIN_NAME, max_length=200)]


def _is_empty(value: Any) -> bool:
    """Exclude empty fields, which keeps the manifests of domains without appends byte for byte the same."""
    return not value


class SupersededCounts(FrozenRecord):
    """Users of a block whose history a later append has stored anew, in a shard of its own."""

    users: Count
    interactions: Count


class Block(FrozenRecord):
    """One sample of a sequence shard: consecutive users in columns.

    `users` and `interactions` exclude superseded users, who are still stored in the file.
    """

    key: Annotated[str, Field(pattern=r"^block-[0-9]{6,}$")]
    users: Count
    interactions: Count
    superseded: SupersededCounts | None = Field(None, exclude_if=_is_empty)

    @property
    def stored_users(self) -> int:
        """Return the number of users in the file, superseded ones included."""
        return self.users + (self.superseded.users if self.superseded else 0)

    @property
    def stored_interactions(self) -> int:
        """Return the number of interactions in the file, those of superseded users included."""
        return self.interactions + (self.superseded.interactions if self.superseded else 0)


class ItemShard(File):
    """A tar file with items `first` to `first + items - 1`."""

    first: Count
    items: Count

    @property
    def keys(self) -> list[str]:
        """Return the keys of its samples, in order."""
        return [f"{index:09d}" for index in range(self.first, self.first + self.items)]


class SequenceShard(File):
    """A tar file of blocks: users `first_user` to `first_user + users - 1`, not counting superseded ones."""

    first_user: Count
    users: Count
    interactions: Count
    blocks: list[Block]

    @property
    def keys(self) -> list[str]:
        """Return the keys of its samples, in order."""
        return [block.key for block in self.blocks]

    @property
    def stored_users(self) -> int:
        """Return the number of users in the file, superseded ones included."""
        return sum(block.stored_users for block in self.blocks)

    @property
    def stored_interactions(self) -> int:
        """Return the number of interactions in the file, those of superseded users included."""
        return sum(block.stored_interactions for block in self.blocks)


class Generation(FrozenRecord):
    """The domain before an append, and what the append dropped or warned about, by kind and count."""

    fingerprint: Digest
    users: Count
    items: Count
    interactions: Count
    notes: dict[str, Count]


class Manifest(FrozenRecord):
    """Counts and files of a prepared domain; its digest is the domain's fingerprint.

    An appended domain also has `superseded`, the positions of superseded users among all stored users (ascending int64);
    `pending`, the shard of users with too few interactions so far; and `earlier`, the domain before each append, oldest
    first.
    """

    schema_version: int = SCHEMA_VERSION
    domain: DomainName
    users: Count
    items: Count
    interactions: Count
    item_shards: list[ItemShard]
    sequence_shards: list[SequenceShard]
    popularity: File
    made: dict[str, Any] = Field(description="how it was made: format, filters, what was dropped")
    superseded: File | None = Field(None, exclude_if=_is_empty)
    pending: SequenceShard | None = Field(None, exclude_if=_is_empty)
    earlier: list[Generation] = Field(default_factory=list, exclude_if=_is_empty)

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the canonical JSON (sorted keys, no spaces)."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def blocks(self) -> int:
        return sum(len(shard.blocks) for shard in self.sequence_shards)

    @property
    def files(self) -> list[File]:
        """Return every file that the manifest describes."""
        others = [file for file in (self.superseded, self.pending) if file is not None]
        return [*self.item_shards, *self.sequence_shards, self.popularity, *others]

    @property
    def ancestors(self) -> list[str]:
        """Return the fingerprints that the domain had before each append, oldest first."""
        return [generation.fingerprint for generation in self.earlier]

    @model_validator(mode="after")
    def _check_totals(self) -> Manifest:
        names = [file.name for file in self.files]
        if len(set(names)) != len(names):
            raise ValueError("a file name occurs twice")
        _check_contiguous("item_shards", [(shard.first, shard.items) for shard in self.item_shards], self.items)
        users = [(shard.first_user, shard.users) for shard in self.sequence_shards]
        _check_contiguous("sequence_shards", users, self.users)
        for items in self.item_shards:
            _check_size(items, items.items * SMALLEST_ITEM)
        for shard in self.sequence_shards:
            check_shard(shard)
        _check_equal("interactions", self.interactions, sum(shard.interactions for shard in self.sequence_shards))
        self._check_appends()
        return self

    def _check_appends(self) -> None:
        superseded = sum(shard.stored_users - shard.users for shard in self.sequence_shards)
        if self.superseded is not None:
            _check_size(self.superseded, superseded * SMALLEST_USER)
        elif superseded:
            raise ValueError(f"{superseded} users are superseded, but no file lists them")
        if self.pending is not None:
            check_shard(self.pending)
            _check_equal(f"superseded users of {self.pending.name}", 0, self.pending.stored_users - self.pending.users)
        if any(later < before for before, later in pairwise([*(was.items for was in self.earlier), self.items])):
            raise ValueError("earlier: the number of items decreases from one generation to the next")


def check_shard(shard: SequenceShard) -> None:
    """Check a shard's totals against its blocks and its file size. Raises ValueError."""
    _check_size(shard, shard.stored_users * SMALLEST_USER + shard.stored_interactions * SMALLEST_INTERACTION)
    _check_equal(f"users of {shard.name}", shard.users, sum(block.users for block in shard.blocks))
    _check_equal(f"interactions of {shard.name}", shard.interactions, sum(block.interactions for block in shard.blocks))


def _check_contiguous(what: str, ranges: list[tuple[int, int]], total: int) -> None:
    at = 0
    for first, count in ranges:
        if first != at:
            raise ValueError(f"{what}: a shard starts at {first}, expected {at}")
        at += count
    _check_equal(f"total of {what}", total, at)


def _check_size(shard: File, least: int) -> None:
    """Refuse counts that a file of this size cannot hold, before arrays of that length are allocated."""
    if least > shard.bytes:
        raise ValueError(f"{shard.name} would need at least {least} bytes, it has {shard.bytes}")


def _check_equal(what: str, stated: int, counted: int) -> None:
    if stated != counted:
        raise ValueError(f"{what}: {stated} stated, the parts add up to {counted}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into the folder, atomically; equal manifests give equal bytes."""
    text = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=True)
    with write_atomically(folder / MANIFEST_NAME, sync="folder") as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def archived_manifest_name(fingerprint: str) -> str:
    """Return the name under which an append keeps the manifest that it replaced, in the append's folder."""
    return f"manifest-{fingerprint[:16]}.json"


def read_manifest(folder: Place, name: str = MANIFEST_NAME) -> Manifest:
    """Read and validate `manifest.json`, or an earlier manifest that an append has kept.

    Raises:
        UserError: the file is missing, unreadable, malformed or of another schema version, names a path outside the
            folder, or its counts do not add up.
    """
    path = folder / name
    remedy = "prepare the domain again with `antdist prepare --overwrite`"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        what = "not a prepared domain: manifest.json is missing"
        raise UserError(what, where=folder, remedy="prepare the domain with `antdist prepare`") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON: {error}", where=path, remedy=remedy) from None
    if not isinstance(raw, dict):
        raise UserError("is not a JSON object", where=path, remedy=remedy)
    if raw.get("schema_version") != SCHEMA_VERSION:
        what = f"schema_version is {raw.get('schema_version')!r}, this version of antdist reads {SCHEMA_VERSION}"
        raise UserError(what, where=path, remedy=remedy)
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise UserError(_summarize(error), where=path, remedy=remedy) from None


def _summarize(error: ValidationError) -> str:
    first, *others = error.errors(include_url=False, include_input=False)
    key = ".".join(map(str, first["loc"]))
    more = f" (and {len(others)} more)" if others else ""
    return f"{f'key {key}: ' if key else ''}{first['msg'].removeprefix('Value error, ')}{more}"

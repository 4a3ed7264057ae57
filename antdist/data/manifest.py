"""The manifest of a prepared domain: what its folder must hold, to the byte (architecture, *Formats*)."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError, model_validator

from antdist.data.entries import PLAIN_NAME, Count, Digest, File, FrozenRecord
from antdist.errors import UserError
from antdist.io.files import flush_to_disk

if TYPE_CHECKING:
    from antdist.data.places import Place


SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
# bytes that each takes in a shard: a tar header and a block of JSON; an offset; an index and a time
SMALLEST_ITEM, SMALLEST_USER, SMALLEST_INTERACTION = 1024, 8, 12

DomainName = Annotated[str, Field(pattern=PLAIN_NAME, max_length=200)]


def _absent(value: Any) -> bool:
    """Such a field is left out: domains that nothing was appended to have manifests without it."""
    return not value


class Superseded(FrozenRecord):
    """Users of a block that stand, with a longer history, in a shard of a later append."""

    users: Count
    interactions: Count


class Block(FrozenRecord):
    """One sample of a sequence shard: consecutive users in columns. `users` and `interactions` count those that stand
    nowhere else."""

    key: Annotated[str, Field(pattern=r"^block-[0-9]{6,}$")]
    users: Count
    interactions: Count
    superseded: Superseded | None = Field(None, exclude_if=_absent)

    @property
    def stored_users(self) -> int:
        """Those that the file holds."""
        return self.users + (self.superseded.users if self.superseded else 0)

    @property
    def stored_interactions(self) -> int:
        """Those that the file holds."""
        return self.interactions + (self.superseded.interactions if self.superseded else 0)


class ItemShard(File):
    """A tar of items `first` to `first + items - 1`."""

    first: Count
    items: Count


class SequenceShard(File):
    """A tar of blocks: users `first_user` to `first_user + users - 1`, superseded ones not counted."""

    first_user: Count
    users: Count
    interactions: Count
    blocks: list[Block]

    @property
    def stored_users(self) -> int:
        """Those that the file holds."""
        return sum(block.stored_users for block in self.blocks)

    @property
    def stored_interactions(self) -> int:
        """Those that the file holds."""
        return sum(block.stored_interactions for block in self.blocks)


class Generation(FrozenRecord):
    """What a domain was before an append, and what that append left out or had to tell (kind and count)."""

    fingerprint: Digest
    users: Count
    items: Count
    interactions: Count
    notes: dict[str, Count]


class Manifest(FrozenRecord):
    """A prepared domain in figures; its digest is the domain's fingerprint.

    Of an appended domain besides: `superseded`, the places of users that a later shard holds anew, counted over all that the
    shards hold, as ascending int64; `pending`, users with too few interactions so far; `earlier`, what the domain was before
    each append, oldest first.
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
    superseded: File | None = Field(None, exclude_if=_absent)
    pending: SequenceShard | None = Field(None, exclude_if=_absent)
    earlier: list[Generation] = Field(default_factory=list, exclude_if=_absent)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON (sorted keys, no spaces): equal only where the data is, and how it was made."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def blocks(self) -> int:
        return sum(len(shard.blocks) for shard in self.sequence_shards)

    @property
    def files(self) -> list[File]:
        """All files that the manifest vouches for."""
        others = [file for file in (self.superseded, self.pending) if file is not None]
        return [*self.item_shards, *self.sequence_shards, self.popularity, *others]

    @property
    def ancestors(self) -> list[str]:
        """Fingerprints of what the domain grew from, oldest first."""
        return [generation.fingerprint for generation in self.earlier]

    @model_validator(mode="after")
    def _adds_up(self) -> Manifest:
        names = [file.name for file in self.files]
        if len(set(names)) != len(names):
            raise ValueError("a file name occurs twice")
        _contiguous("item_shards", [(shard.first, shard.items) for shard in self.item_shards], self.items)
        _contiguous("sequence_shards", [(shard.first_user, shard.users) for shard in self.sequence_shards], self.users)
        for items in self.item_shards:
            _fits(items, items.items * SMALLEST_ITEM)
        for shard in self.sequence_shards:
            check_shard(shard)
        _equal("interactions", self.interactions, sum(shard.interactions for shard in self.sequence_shards))
        self._grown_adds_up()
        return self

    def _grown_adds_up(self) -> None:
        superseded = sum(shard.stored_users - shard.users for shard in self.sequence_shards)
        if self.superseded is not None:
            _fits(self.superseded, superseded * SMALLEST_USER)
        elif superseded:
            raise ValueError(f"{superseded} users are superseded, but no file says which")
        if self.pending is not None:
            check_shard(self.pending)
            _equal(f"superseded users of {self.pending.name}", 0, self.pending.stored_users - self.pending.users)
        if any(later < before for before, later in pairwise([*(was.items for was in self.earlier), self.items])):
            raise ValueError("earlier: a domain never loses items")


def check_shard(shard: SequenceShard) -> None:
    """Raises ValueError if a shard's counts do not add up, or cannot be in a file of its size."""
    _fits(shard, shard.stored_users * SMALLEST_USER + shard.stored_interactions * SMALLEST_INTERACTION)
    _equal(f"users of {shard.name}", shard.users, sum(block.users for block in shard.blocks))
    _equal(f"interactions of {shard.name}", shard.interactions, sum(block.interactions for block in shard.blocks))


def _contiguous(what: str, ranges: list[tuple[int, int]], total: int) -> None:
    at = 0
    for first, count in ranges:
        if first != at:
            raise ValueError(f"{what}: a shard starts at {first}, {at} was due")
        at += count
    _equal(f"total of {what}", total, at)


def _fits(shard: File, least: int) -> None:
    """Counts that no file of this size could hold are refused before anything is made as large as they say."""
    if least > shard.bytes:
        raise ValueError(f"{shard.name} would have {least} bytes at least, it has {shard.bytes}")


def _equal(what: str, stated: int, counted: int) -> None:
    if stated != counted:
        raise ValueError(f"{what}: {stated} stated, the parts add up to {counted}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into the folder, whole or not at all; the same manifest gives the same bytes."""
    text = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=True)
    partial = folder / f".{MANIFEST_NAME}.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    flush_to_disk(partial)
    partial.replace(folder / MANIFEST_NAME)
    flush_to_disk(folder)


def archived_manifest_name(fingerprint: str) -> str:
    """What the manifest of that fingerprint is called in the folder of the append that replaced it."""
    return f"manifest-{fingerprint[:16]}.json"


def read_manifest(folder: Place, name: str = MANIFEST_NAME) -> Manifest:
    """Read and check `manifest.json`, or an earlier one that an append has kept.

    Raises:
        UserError: it is missing or out of reach, malformed, of another schema version, names a path outside the folder, or
            its counts do not add up.
    """
    path = folder / name
    remedy = "prepare the domain again with `antdist prepare --overwrite`"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        what = "no prepared domain here: manifest.json is missing"
        raise UserError(what, where=folder, remedy="prepare it with `antdist prepare`") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON: {error}", where=path, remedy=remedy) from None
    if not isinstance(raw, dict):
        raise UserError("is not a JSON object", where=path, remedy=remedy)
    if raw.get("schema_version") != SCHEMA_VERSION:
        what = f"schema_version is {raw.get('schema_version')!r}, this antdist reads {SCHEMA_VERSION}"
        raise UserError(what, where=path, remedy=remedy)
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise UserError(_told(error), where=path, remedy=remedy) from None


def _told(error: ValidationError) -> str:
    first, *others = error.errors(include_url=False, include_input=False)
    key = ".".join(map(str, first["loc"]))
    more = f" (and {len(others)} more)" if others else ""
    return f"{f'key {key}: ' if key else ''}{first['msg'].removeprefix('Value error, ')}{more}"

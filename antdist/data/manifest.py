"""The manifest of a prepared domain: what its folder must hold, to the byte (architecture, *Formats*)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from antdist.errors import UserError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
# bytes that each takes in a shard: a tar header and a block of JSON; an offset; an index and a time
SMALLEST_ITEM, SMALLEST_USER, SMALLEST_INTERACTION = 1024, 8, 12

Count = Annotated[int, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0, le=1 << 40)]  # of one file
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# One plain file name: nothing that could lead out of the domain's folder.
PLAIN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
FileName = Annotated[str, Field(pattern=PLAIN_NAME, max_length=200)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Block(_Record):
    """One sample of a sequence shard: consecutive users in columns."""

    key: Annotated[str, Field(pattern=r"^block-[0-9]{6,}$")]
    users: Count
    interactions: Count


class File(_Record):
    """A file of the folder, its size in bytes and its SHA-256."""

    name: FileName
    bytes: Bytes
    sha256: Digest


class ItemShard(File):
    """A tar of items `first` to `first + items - 1`."""

    first: Count
    items: Count


class SequenceShard(File):
    """A tar of blocks: users `first_user` to `first_user + users - 1`."""

    first_user: Count
    users: Count
    interactions: Count
    blocks: list[Block]


class Manifest(_Record):
    """A prepared domain in figures; its digest is the domain's fingerprint."""

    schema_version: int = SCHEMA_VERSION
    domain: FileName
    users: Count
    items: Count
    interactions: Count
    item_shards: list[ItemShard]
    sequence_shards: list[SequenceShard]
    popularity: File
    made: dict[str, Any] = Field(description="how it was made: format, filters, what was dropped")

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
        return [*self.item_shards, *self.sequence_shards, self.popularity]

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
            _fits(shard, shard.users * SMALLEST_USER + shard.interactions * SMALLEST_INTERACTION)
            _equal(f"users of {shard.name}", shard.users, sum(block.users for block in shard.blocks))
            _equal(f"interactions of {shard.name}", shard.interactions, sum(b.interactions for b in shard.blocks))
        _equal("interactions", self.interactions, sum(shard.interactions for shard in self.sequence_shards))
        return self


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
    """Write `manifest.json` into the folder; the same manifest gives the same bytes."""
    text = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=True)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        UserError: it is missing, malformed, of another schema version, names a path outside the folder, or its counts
            do not add up.
    """
    path = Path(folder) / MANIFEST_NAME
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

"""Building blocks of manifests: file entries, digests, counts, and names that stay in the folder."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0, le=1 << 40)]  # of one file
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PLAIN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
# A plain name, or one in the subfolder of an append.
FileName = Annotated[str, Field(pattern=r"^(append-[0-9]{5}/)?" + PLAIN_NAME[1:], max_length=200)]


class FrozenRecord(BaseModel):
    """Base of all manifest records: immutable, strictly typed, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class File(FrozenRecord):
    """A file of the domain's folder, with its size in bytes and its SHA-256."""

    name: FileName
    bytes: Bytes
    sha256: Digest

"""The types that manifests are made of: file entries, digests, counts, and names that stay in the folder."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0, le=1 << 40)]  # of one file
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# One plain file name: nothing that could lead out of the domain's folder.
PLAIN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
# What an append adds lies in a folder of its own; else the name is plain.
FileName = Annotated[str, Field(pattern=r"^(append-[0-9]{5}/)?" + PLAIN_NAME[1:], max_length=200)]


class FrozenRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class File(FrozenRecord):
    """A file of the folder, its size in bytes and its SHA-256."""

    name: FileName
    bytes: Bytes
    sha256: Digest

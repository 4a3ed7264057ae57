"""Shards: write tar files deterministically, and read them safely through webdataset.

An item sample has a 9-digit key, a JSON member and image members; a sequence sample is a *block* of many users in
columns (docs/formats.md). This module does not depend on manifests; digests are computed while writing.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from antdist import ragged
from antdist.batch import IntArray
from antdist.errors import UserError

HELD_OUT = 2  # a user's last interactions, which are not trained on: one for validation, one for test
MIN_INTERACTIONS = HELD_OUT + 1  # of a user
VERIFY_REMEDY = "find the damage with `antdist verify`, or prepare the domain again"
Sample = dict[str, Any]


@dataclass(frozen=True)
class ItemRecord:
    """One item of a domain; `images` are the bytes of JPEG or PNG files, at most a handful."""

    index: int
    item_id: str
    text: str | None
    price: float | None
    images: list[bytes]


@dataclass(frozen=True)
class UserBlock:
    """Consecutive users in columns: `offsets` (U + 1,) int64, `items` (T,) int32, `times` (T,) int64."""

    offsets: NDArray[np.int64]
    items: NDArray[np.int32]
    times: NDArray[np.int64]


# ---------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes one tar file, with equal bytes for equal members on any machine. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._file = path.open("wb")

    def add(self, name: str, data: bytes) -> None:
        """Append one member."""
        self._write(_header(name.encode("ascii"), len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE))

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self.bytes += len(data)
        self._file.write(data)

    @property
    def sha256(self) -> str:
        """Return the digest of the file; complete once the writer is closed."""
        return self._digest.hexdigest()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.bytes + end) % tarfile.RECORDSIZE))
        self._file.close()


# The header of an empty plain file: mode 0644; time, owner and group 0, their names empty.
_PLAIN = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_PLAIN_SUM = int(_PLAIN[148:154], 8)


def _header(name: bytes, size: int) -> bytes:
    """Build a member's header with the bytes that `tarfile` writes, in a tenth of its time."""
    assert 0 < len(name) <= 100
    octal = b"%011o" % size
    total = _PLAIN_SUM + sum(name) + sum(octal) - 11 * ord("0")
    return name.ljust(100, b"\0") + _PLAIN[100:124] + octal + _PLAIN[135:148] + b"%06o" % total + _PLAIN[154:]


def encode_npy(array: NDArray[Any]) -> bytes:
    """Encode an array as the bytes of an `.npy` file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def encode_item(item: ItemRecord) -> list[tuple[str, bytes]]:
    """Encode an item as tar members (name, content), the JSON first."""
    key = f"{item.index:09d}"
    fields = {"item_id": item.item_id, "text": item.text, "price": item.price, "images": len(item.images)}
    members = [(f"{key}.json", _to_json(fields).encode())]
    return members + [(f"{key}.{n}.{image_extension(data)}", data) for n, data in enumerate(item.images)]


def image_extension(data: bytes) -> str:
    """Return `jpg` or `png`, by content."""
    if data.startswith(b"\xff\xd8"):
        return "jpg"
    assert data.startswith(b"\x89PNG"), "images in shards are JPEG or PNG"
    return "png"


def encode_block(key: str, block: UserBlock, user_ids: list[str]) -> list[tuple[str, bytes]]:
    """Encode a block of users as tar members (name, content)."""
    assert len(user_ids) == len(block.offsets) - 1 and block.offsets[0] == 0
    return [
        (f"{key}.offsets.npy", encode_npy(block.offsets.astype("<i8"))),
        (f"{key}.items.npy", encode_npy(block.items.astype("<i4"))),
        (f"{key}.times.npy", encode_npy(block.times.astype("<i8"))),
        (f"{key}.users.json", json.dumps(user_ids, ensure_ascii=False).encode()),
    ]


# ---------------------------------------------------------------------------------------------------------- reading


def member_names(stream: BinaryIO, where: object) -> list[str]:
    """Return the names of a tar's members in order, from the headers alone; leaves the stream anywhere.

    Raises:
        UserError: the file is truncated or not a tar, or has a member that is not a plain file with a plain relative
            name (absolute path, `..`, link, device): such a shard was not written by antdist.
    """
    names = []
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    what = f"holds {member.name!r}, which is a link, folder or device"
                    raise UserError(what, where=where, remedy="do not use this shard; prepare the domain again")
                check_member_name(member.name, where)
                names.append(member.name)
    except (tarfile.TarError, OSError) as error:
        what = f"the shard is truncated or not a tar file ({error})"
        raise UserError(what, where=where, remedy=VERIFY_REMEDY) from None
    return names


def check_member_name(name: str, where: object) -> None:
    """Refuse a member name that would be extracted outside the folder."""
    if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
        what = f"holds a member named {name!r}, which leaves the folder"
        raise UserError(what, where=where, remedy="do not use this shard; prepare the domain again")


def read_samples(
    stream: BinaryIO, where: object, keys: list[str], select: Callable[[str], bool] | None = None
) -> Iterator[Sample]:
    """Read samples `{"__key__": ..., extension: bytes, ...}` of a shard through webdataset, in file order.

    Members are checked first (`member_names`), so that a truncated shard, or one with other samples than `keys`, is
    refused before its first sample is used.

    Args:
        stream: the tar file; must be seekable.
        where: the shard's place, for messages.
        keys: the samples that it must hold, in order.
        select: which members to read, by name; None: all.

    Raises:
        UserError: the shard is damaged or holds other samples than `keys`.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    names = member_names(stream, where)
    found = [key for key, _ in groupby(name.partition(".")[0] for name in names)]
    if found != keys:
        raise UserError(_difference(found, keys), where=where, remedy=VERIFY_REMEDY)
    if len(set(names)) < len(names):
        raise UserError("the shard holds a member twice", where=where, remedy=VERIFY_REMEDY)
    try:
        stream.seek(0)
        source = [{"url": str(where), "stream": stream}]
        samples = iter(group_by_keys(tar_file_expander(source, select_files=select)))
        for key in keys:
            sample = next(samples, None)
            if sample is None or sample["__key__"] != key:
                raise UserError(f"the shard holds no sample {key}", where=where, remedy=VERIFY_REMEDY)
            yield sample
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"the shard cannot be read ({error})", where=where, remedy=VERIFY_REMEDY) from None


def _difference(found: list[str], keys: list[str]) -> str:
    for have, want in zip(found, keys, strict=False):
        if have != want:
            return f"the shard holds sample {have} where the manifest has {want}"
    return f"the shard holds {len(found)} samples, the manifest {len(keys)}"


def decode_npy(data: bytes, dtype: str, where: str) -> NDArray[Any]:
    """View the bytes of an `.npy` file as a one-dimensional, read-only array, without copying.

    Raises:
        UserError: the bytes are not a complete `.npy` file of this dtype.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"npy version {version}")
        try:
            shape, _, found = np.lib.format.read_array_header_1_0(stream)
        except Exception as error:  # numpy's header parser raises arbitrary exceptions
            raise ValueError(type(error).__name__) from None
        if found != np.dtype(dtype) or len(shape) != 1 or stream.tell() + shape[0] * found.itemsize != len(data):
            raise ValueError(f"{found} of shape {shape} in {len(data)} bytes, expected one dimension of {dtype}")
        return np.frombuffer(data, found, shape[0], stream.tell())
    except ValueError as error:
        raise UserError(f"a column cannot be read ({error})", where=where, remedy=VERIFY_REMEDY) from None


def decode_block(sample: Sample, where: object, users: int, interactions: int) -> UserBlock:
    """Decode the columns of a block.

    Args:
        sample: the block's members.
        where: the shard's place, for messages.
        users, interactions: of the block, by the manifest.

    Raises:
        UserError: a column is missing or its length differs from the manifest's.
    """
    place = f"{where} ({sample['__key__']})"
    columns = {}
    for name, dtype, length in (
        ("offsets", "<i8", users + 1),
        ("items", "<i4", interactions),
        ("times", "<i8", interactions),
    ):
        data = sample.get(f"{name}.npy")
        if data is None:
            raise UserError(f"the block has no column {name}", where=place, remedy=VERIFY_REMEDY)
        columns[name] = decode_npy(data, dtype, place)
        if len(columns[name]) != length:
            what = f"column {name} has {len(columns[name])} entries, {length} by the manifest"
            raise UserError(what, where=place, remedy=VERIFY_REMEDY)
    return UserBlock(**columns)


def drop_users(block: UserBlock, dropped: IntArray) -> UserBlock:
    """Return the block without the users at these positions."""
    if not len(dropped):
        return block
    lengths = np.diff(block.offsets)
    is_kept = np.ones(len(lengths), bool)
    is_kept[dropped] = False
    kept = np.repeat(is_kept, lengths)
    return UserBlock(ragged.offsets(lengths[is_kept]), block.items[kept], block.times[kept])


def find_block_faults(block: UserBlock, items: int, shortest: int = MIN_INTERACTIONS) -> Iterator[str]:
    """Describe what is wrong with a block's columns.

    Args:
        items: how many items the domain has.
        shortest: fewest interactions of a user.
    """
    lengths = np.diff(block.offsets)
    if not len(block.offsets) or block.offsets[0] != 0 or (lengths < 0).any() or block.offsets[-1] != len(block.items):
        yield "column offsets does not rise from 0 to the number of interactions"
        return
    if (lengths < shortest).any():
        yield f"{int((lengths < shortest).sum())} users have fewer than {shortest} interactions"
    if ((block.items < 0) | (block.items >= items)).any():
        yield f"column items names items outside 0 to {items - 1}"


def decode_users(sample: Sample, where: object, users: int) -> list[str]:
    """Decode the ids of a block's users.

    Raises:
        UserError: the ids are missing, malformed, or their number differs from the manifest's.
    """
    try:
        ids = json.loads(sample.get("users.json", b""))
        if isinstance(ids, list) and len(ids) == users and all(isinstance(user, str) for user in ids):
            return ids
    except (ValueError, RecursionError):
        pass
    what = f"the user ids of the block are missing, malformed or not {users}"
    raise UserError(what, where=f"{where} ({sample['__key__']})", remedy=VERIFY_REMEDY)


def decode_item(sample: Sample, where: object, *, images: bool = True) -> ItemRecord:
    """Decode an item from its members.

    Args:
        images: False: leave out the images, which then need not be in the sample.

    Raises:
        UserError: the JSON is malformed or an image is missing.
    """
    metadata = decode_item_metadata(sample, where)
    try:
        found = _decode_images(sample, metadata.images) if images else []
    except (KeyError, ValueError) as error:
        raise _inconsistent_item(sample, where, error) from None
    return ItemRecord(int(sample["__key__"]), metadata.item_id, metadata.text, metadata.price, found)


@dataclass(frozen=True)
class ItemMetadata:
    """The content of an item's JSON; `images` is the number of its images."""

    item_id: str
    text: str | None
    price: float | None
    images: int


def decode_item_metadata(sample: Sample, where: object) -> ItemMetadata:
    """Decode an item's JSON. Raises UserError if it is malformed."""
    try:
        fields = json.loads(sample["json"])
        found = ItemMetadata(**{name: fields[name] for name in ("item_id", "text", "price", "images")})
        valid = isinstance(found.item_id, str) and isinstance(found.text, str | None) and type(found.images) is int
        if not valid or not (found.price is None or type(found.price) in (int, float)):
            raise TypeError("a field has a wrong type")
        if found.price is not None:
            float(found.price)  # an integer may exceed the range of a float
        return found
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _inconsistent_item(sample, where, error) from None


def read_item_metadata(stream: BinaryIO, where: object, keys: list[str]) -> Iterator[ItemMetadata]:
    """Read the JSON of a shard's items without images, many times as fast as `read_samples`.

    Raises:
        UserError: as `read_samples` and `decode_item_metadata`.
    """
    due = iter(keys)
    try:
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            for name, data in _json_members(tar):
                key = next(due, None)
                if name != f"{key}.json":
                    what = f"the shard holds {name!r} where the manifest has {key or 'no more items'}"
                    raise UserError(what, where=where, remedy=VERIFY_REMEDY)
                yield decode_item_metadata({"__key__": key, "json": data}, where)
    except (OSError, ValueError) as error:
        raise UserError(f"the shard cannot be read ({error})", where=where, remedy=VERIFY_REMEDY) from None
    if (missing := next(due, None)) is not None:
        raise UserError(f"the shard holds no sample {missing}", where=where, remedy=VERIFY_REMEDY)


def _json_members(tar: bytes | mmap.mmap) -> Iterator[tuple[str, bytes]]:
    """Find JSON members (name, content) of a tar written by `ShardWriter`. Raises ValueError for others."""
    at = 0
    while any(header := tar[at : at + tarfile.BLOCKSIZE]):
        name, size, at = header[:100].rstrip(b"\0"), int(header[124:135], 8), at + tarfile.BLOCKSIZE
        if len(header) < tarfile.BLOCKSIZE or header[156:157] != b"0" or header[345:346] != b"\0" or size < 0:
            raise ValueError("a member is truncated, not a plain file, or has a long name")
        if sum(header[:148]) + 8 * ord(" ") + sum(header[156:]) != int(header[148:154], 8):
            raise ValueError("a member's header is damaged")
        if name.endswith(b".json"):
            yield name.decode("ascii"), tar[at : at + size]
        at += size + -size % tarfile.BLOCKSIZE
    if at > len(tar):
        raise ValueError("a member is truncated")


def _inconsistent_item(sample: Sample, where: object, error: Exception) -> UserError:
    what = f"the item's members are inconsistent ({error!r})"
    return UserError(what, where=f"{where} ({sample['__key__']})", remedy=VERIFY_REMEDY)


def _decode_images(sample: Sample, count: int) -> list[bytes]:
    found = [name for name in sample if re.fullmatch(r"\d+\.(jpg|png)", name)]
    if len(found) != count:
        raise ValueError(f"{len(found)} images, {count} stated")
    return [sample[f"{n}.jpg"] if f"{n}.jpg" in sample else sample[f"{n}.png"] for n in range(count)]

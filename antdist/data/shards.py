"""Shards: tar files with the same bytes for the same content, and their safe reading through webdataset.

An item sample has a 9-digit key, a JSON member and image members; a sequence sample is a *block* of many users in
columns (architecture, *Formats*). Nothing here knows of manifests; digests are taken while writing.
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

HELD_OUT = 2  # interactions at a user's end that are not for training: one validates, one tests
MIN_INTERACTIONS = HELD_OUT + 1  # interactions a user needs
VERIFY_REMEDY = "find out what is wrong with `antdist verify`, or prepare the domain again"
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
    """Writes one tar file; equal members give equal bytes on any machine. A context manager."""

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
        """Digest of the whole file, once closed."""
        return self._digest.hexdigest()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.bytes + end) % tarfile.RECORDSIZE))
        self._file.close()


# of an empty plain file: mode 0644; time, owner and group 0, their names empty
_PLAIN = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_PLAIN_SUM = int(_PLAIN[148:154], 8)


def _header(name: bytes, size: int) -> bytes:
    """A member's header as `tarfile` writes it, which takes ten times as long."""
    assert 0 < len(name) <= 100
    octal = b"%011o" % size
    total = _PLAIN_SUM + sum(name) + sum(octal) - 11 * ord("0")
    return name.ljust(100, b"\0") + _PLAIN[100:124] + octal + _PLAIN[135:148] + b"%06o" % total + _PLAIN[154:]


def encode_npy(array: NDArray[Any]) -> bytes:
    """An array as the bytes of an `.npy` file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def encode_item(item: ItemRecord) -> list[tuple[str, bytes]]:
    """The tar members of an item, JSON first."""
    key = f"{item.index:09d}"
    fields = {"item_id": item.item_id, "text": item.text, "price": item.price, "images": len(item.images)}
    members = [(f"{key}.json", _to_json(fields).encode())]
    return members + [(f"{key}.{n}.{image_extension(data)}", data) for n, data in enumerate(item.images)]


def image_extension(data: bytes) -> str:
    """`jpg` or `png`, by content."""
    if data.startswith(b"\xff\xd8"):
        return "jpg"
    assert data.startswith(b"\x89PNG"), "images in shards are JPEG or PNG"
    return "png"


def encode_block(key: str, block: UserBlock, user_ids: list[str]) -> list[tuple[str, bytes]]:
    """The tar members of a block of users."""
    assert len(user_ids) == len(block.offsets) - 1 and block.offsets[0] == 0
    return [
        (f"{key}.offsets.npy", encode_npy(block.offsets.astype("<i8"))),
        (f"{key}.items.npy", encode_npy(block.items.astype("<i4"))),
        (f"{key}.times.npy", encode_npy(block.times.astype("<i8"))),
        (f"{key}.users.json", json.dumps(user_ids, ensure_ascii=False).encode()),
    ]


# ---------------------------------------------------------------------------------------------------------- reading


def member_names(stream: BinaryIO, where: object) -> list[str]:
    """Names of a tar's members in order, from the headers alone; `stream` is left anywhere.

    Raises:
        UserError: the file is cut short or no tar, or holds a member that is not a plain file with a plain
            relative name (absolute, `..`, link, device): such a shard was not written by antdist.
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
        raise UserError(f"the shard is cut short or no tar file ({error})", where=where, remedy=VERIFY_REMEDY) from None
    return names


def check_member_name(name: str, where: object) -> None:
    """Refuse a member name that could lead out of a folder."""
    if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
        what = f"holds a member named {name!r}, which leaves the folder"
        raise UserError(what, where=where, remedy="do not use this shard; prepare the domain again")


def read_samples(
    stream: BinaryIO, where: object, keys: list[str], select: Callable[[str], bool] | None = None
) -> Iterator[Sample]:
    """The samples of one open shard through webdataset, in file order: `{"__key__": ..., extension: bytes, ...}`.

    Members are checked first (`member_names`), so a shard that is torn, or does not hold exactly the samples `keys`,
    is told before its first sample is used.

    Args:
        stream: the tar file, which may be read twice.
        where: it lies, for people.
        keys: the samples that it must hold, in order.
        select: which members to read, by name; None: all.

    Raises:
        UserError: see above; the message names the shard.
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
                raise UserError(f"the shard gives no sample {key}", where=where, remedy=VERIFY_REMEDY)
            yield sample
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"the shard cannot be read ({error})", where=where, remedy=VERIFY_REMEDY) from None


def _difference(found: list[str], keys: list[str]) -> str:
    for have, want in zip(found, keys, strict=False):
        if have != want:
            return f"the shard holds sample {have} where the manifest has {want}"
    return f"the shard holds {len(found)} samples, the manifest {len(keys)}"


def decode_npy(data: bytes, dtype: str, where: str) -> NDArray[Any]:
    """A one-dimensional array on the bytes of an `.npy` file, without a copy (read-only).

    Raises:
        UserError: the bytes are no `.npy` of this dtype, or too few.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"npy version {version}")
        try:
            shape, _, found = np.lib.format.read_array_header_1_0(stream)
        except Exception as error:  # numpy's parser of headers raises what it likes
            raise ValueError(type(error).__name__) from None
        if found != np.dtype(dtype) or len(shape) != 1 or stream.tell() + shape[0] * found.itemsize != len(data):
            raise ValueError(f"{found} of shape {shape} in {len(data)} bytes, one dimension of {dtype} was due")
        return np.frombuffer(data, found, shape[0], stream.tell())
    except ValueError as error:
        raise UserError(f"a column cannot be read ({error})", where=where, remedy=VERIFY_REMEDY) from None


def decode_block(sample: Sample, where: object, users: int, interactions: int) -> UserBlock:
    """The columns of a block; sizes are checked against the manifest's.

    Raises:
        UserError: a column is missing or has another size than the manifest says.
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


def without(block: UserBlock, gone: IntArray) -> UserBlock:
    """The block without the users at these places in it."""
    if not len(gone):
        return block
    lengths = np.diff(block.offsets)
    stays = np.ones(len(lengths), bool)
    stays[gone] = False
    kept = np.repeat(stays, lengths)
    offsets = ragged.offsets(lengths[stays])
    return UserBlock(offsets, block.items[kept], block.times[kept])


def find_block_faults(block: UserBlock, items: int, shortest: int = MIN_INTERACTIONS) -> Iterator[str]:
    """What is wrong with a block's columns, in words: a domain of `items` items can hold no such users, who have `shortest`
    interactions at least."""
    lengths = np.diff(block.offsets)
    if not len(block.offsets) or block.offsets[0] != 0 or (lengths < 0).any() or block.offsets[-1] != len(block.items):
        yield "column offsets does not rise from 0 to the number of interactions"
        return
    if (lengths < shortest).any():
        yield f"{int((lengths < shortest).sum())} users have fewer than {shortest} interactions"
    if ((block.items < 0) | (block.items >= items)).any():
        yield f"column items names items outside 0 to {items - 1}"


def decode_users(sample: Sample, where: object, users: int) -> list[str]:
    """The ids of a block's users.

    Raises:
        UserError: they are missing, malformed or not as many as the manifest says.
    """
    try:
        ids = json.loads(sample.get("users.json", b""))
        if isinstance(ids, list) and len(ids) == users and all(isinstance(user, str) for user in ids):
            return ids
    except (ValueError, RecursionError):
        pass
    what = f"the ids of the block's users are missing, malformed or not {users}"
    raise UserError(what, where=f"{where} ({sample['__key__']})", remedy=VERIFY_REMEDY)


def decode_item(sample: Sample, where: object, *, images: bool = True) -> ItemRecord:
    """An item from its members; `images` False: without its images, which then need not be in the sample.

    Raises:
        UserError: its JSON is malformed or an image is missing.
    """
    facts = decode_item_metadata(sample, where)
    try:
        found = _images(sample, facts.images) if images else []
    except (KeyError, ValueError) as error:
        raise _unfit(sample, where, error) from None
    return ItemRecord(int(sample["__key__"]), facts.item_id, facts.text, facts.price, found)


@dataclass(frozen=True)
class ItemMetadata:
    """What an item's JSON says; `images` is how many there are."""

    item_id: str
    text: str | None
    price: float | None
    images: int


def decode_item_metadata(sample: Sample, where: object) -> ItemMetadata:
    """An item's JSON. Raises UserError: it is malformed."""
    try:
        fields = json.loads(sample["json"])
        facts = ItemMetadata(**{name: fields[name] for name in ("item_id", "text", "price", "images")})
        right = isinstance(facts.item_id, str) and isinstance(facts.text, str | None) and type(facts.images) is int
        if not right or not (facts.price is None or type(facts.price) in (int, float)):
            raise TypeError("a field has a wrong type")
        if facts.price is not None:
            float(facts.price)  # a whole number may be larger than any float
        return facts
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _unfit(sample, where, error) from None


def read_item_metadata(stream: BinaryIO, where: object, keys: list[str]) -> Iterator[ItemMetadata]:
    """What the JSON of an open shard's items says, in order, their pictures passed over: by the headers alone, many times as
    fast as through `read_samples`.

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
    """Name and content of the JSON members of a tar as `ShardWriter` writes it. Raises ValueError of any other."""
    at = 0
    while any(header := tar[at : at + tarfile.BLOCKSIZE]):
        name, size, at = header[:100].rstrip(b"\0"), int(header[124:135], 8), at + tarfile.BLOCKSIZE
        if len(header) < tarfile.BLOCKSIZE or header[156:157] != b"0" or header[345:346] != b"\0" or size < 0:
            raise ValueError("a member is cut short, no plain file, or of a long name")
        if sum(header[:148]) + 8 * ord(" ") + sum(header[156:]) != int(header[148:154], 8):
            raise ValueError("a member's header is damaged")
        if name.endswith(b".json"):
            yield name.decode("ascii"), tar[at : at + size]
        at += size + -size % tarfile.BLOCKSIZE
    if at > len(tar):
        raise ValueError("a member is cut short")


def _unfit(sample: Sample, where: object, error: Exception) -> UserError:
    what = f"the item's members do not fit together ({error!r})"
    return UserError(what, where=f"{where} ({sample['__key__']})", remedy=VERIFY_REMEDY)


def _images(sample: Sample, count: int) -> list[bytes]:
    found = [name for name in sample if re.fullmatch(r"\d+\.(jpg|png)", name)]
    if len(found) != count:
        raise ValueError(f"{len(found)} images, {count} stated")
    return [sample[f"{n}.jpg"] if f"{n}.jpg" in sample else sample[f"{n}.png"] for n in range(count)]

"""Shards: deterministic bytes, readable by plain webdataset, and safe to read."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from antdist.data.shards import ItemRecord, Sample, ShardWriter, decode_npy, encode_item, encode_npy, read_samples
from antdist.errors import UserError

JPEG, PNG = b"\xff\xd8\xff jpeg", b"\x89PNG png"


def write_items(path: Path) -> ShardWriter:
    with ShardWriter(path) as writer:
        for index in range(3):
            images = [JPEG, PNG][: index % 3]
            for name, data in encode_item(ItemRecord(index, f"i{index}", "grün", 1.5, images)):
                writer.add(name, data)
    return writer


def forged(path: Path, name: str, kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info, io.BytesIO())
    return path


def test_equal_content_gives_equal_bytes_and_the_stated_digest(tmp_path: Path) -> None:
    import hashlib

    first, second = write_items(tmp_path / "a.tar"), write_items(tmp_path / "b.tar")
    data = (tmp_path / "a.tar").read_bytes()
    assert data == (tmp_path / "b.tar").read_bytes()
    assert first.sha256 == second.sha256 == hashlib.sha256(data).hexdigest()
    assert first.bytes == len(data)
    with tarfile.open(tmp_path / "a.tar") as tar:
        owners = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar}
    assert owners == {(0, 0, 0, "", "", 0o644)}


@pytest.mark.parametrize("sizes", [[], [0, 1, 511, 512, 513], [8191] * 3, [1 << 20, 7]])
def test_shard_equals_what_tarfile_writes(tmp_path: Path, sizes: list[int]) -> None:
    members = [
        (f"{'k' * min(100 - 5, 9 * n)}{n:04d}.", bytes(range(256)) * (size // 256) + b"x" * (size % 256))
        for n, size in enumerate(sizes)
    ]
    with ShardWriter(tmp_path / "ours.tar") as writer:
        for name, data in members:
            writer.add(name, data)
    with tarfile.TarFile(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def samples(path: Path, keys: list[str], select: Callable[[str], bool] | None = None) -> Iterator[Sample]:
    with path.open("rb") as stream:
        yield from read_samples(stream, path, keys, select)


def test_plain_webdataset_opens_a_shard(tmp_path: Path) -> None:
    import webdataset

    write_items(tmp_path / "a.tar")
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000000000", "000000001", "000000002"]
    assert samples[2]["0.jpg"] == JPEG and samples[2]["1.png"] == PNG


def test_selected_members_alone_are_read(tmp_path: Path) -> None:
    write_items(tmp_path / "a.tar")
    keys = ["000000000", "000000001", "000000002"]
    found = list(samples(tmp_path / "a.tar", keys, lambda name: name.endswith(".json")))
    assert [set(sample) - {"__key__", "__url__", "__local_path__"} for sample in found] == [{"json"}] * 3


@pytest.mark.parametrize("name", ["/etc/passwd", "../000000000.json", "a/../../b.json"])
def test_member_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    path = forged(tmp_path / "a.tar", name)
    with pytest.raises(UserError, match=r"a\.tar: holds a member named .* which leaves the folder.*Do not use"):
        list(samples(path, []))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_link_or_device_is_refused(tmp_path: Path, kind: bytes) -> None:
    path = forged(tmp_path / "a.tar", "000000000.json", kind)
    with pytest.raises(UserError, match=r"a\.tar: holds '000000000\.json', which is a link, folder or device"):
        list(samples(path, ["000000000"]))


@pytest.mark.parametrize("left", [0, 100, 512, 700, 1536, 2000])
def test_truncated_tar_is_refused_before_the_first_sample(tmp_path: Path, left: int) -> None:
    write_items(tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:left])
    with pytest.raises(UserError) as caught:
        next(samples(tmp_path / "a.tar", ["000000000", "000000001", "000000002"]))
    assert str(caught.value).startswith(str(tmp_path / "a.tar")) and "antdist verify" in str(caught.value)


def test_samples_other_than_the_manifests_are_refused(tmp_path: Path) -> None:
    write_items(tmp_path / "a.tar")
    with pytest.raises(UserError, match="holds sample 000000000 where the manifest has 000000007"):
        next(samples(tmp_path / "a.tar", ["000000007"]))
    with pytest.raises(UserError, match="holds 3 samples, the manifest 2"):
        next(samples(tmp_path / "a.tar", ["000000000", "000000001"]))


def test_column_is_read_without_a_copy() -> None:
    data = encode_npy(np.arange(5, dtype=np.int32))
    array = decode_npy(data, "<i4", "here")
    assert array.tolist() == [0, 1, 2, 3, 4]
    assert not array.flags.owndata and np.array_equal(np.load(io.BytesIO(data)), array)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        encode_npy(np.arange(5)),
        encode_npy(np.zeros((2, 2), np.int32)),
        encode_npy(np.arange(5, dtype=np.int32))[:-1],
    ],
)
def test_column_of_another_type_is_refused(data: bytes) -> None:
    with pytest.raises(UserError, match="here: a column cannot be read"):
        decode_npy(data, "<i4", "here")

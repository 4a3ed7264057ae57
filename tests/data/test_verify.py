"""Verification finds every problem and names its place."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from antdist.data.domain import Domain, Sequences, open_domain
from antdist.data.manifest import Manifest, write_manifest
from antdist.data.shards import ItemRecord, ShardWriter, UserBlock, encode_block, encode_item, encode_npy
from antdist.data.verify import verify_domain
from antdist.data.writing import write_domain
from antdist.errors import UserError


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "green").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def domain(tmp_path: Path) -> Domain:
    items = [ItemRecord(n, f"i{n}", f"text {n}", float(n), [jpeg()]) for n in range(5)]
    sequences = Sequences(np.array([0, 3, 7, 12]), np.arange(12) % 5, np.arange(12))
    write_domain(tmp_path / "d", "d", items, sequences, ["a", "b", "c"], {}, items_per_shard=3, block_users=2)
    return open_domain(tmp_path / "d")


def reseal(domain: Domain) -> None:
    """Make sizes and digests in the manifest right again, so that only the content is wrong."""
    content = domain.manifest.model_dump()
    for file in [*content["item_shards"], *content["sequence_shards"], content["popularity"]]:
        data = (domain.folder / file["name"]).read_bytes()
        file.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_manifest(domain.folder, Manifest.model_validate(content))


def rewrite_blocks(domain: Domain, **columns: Any) -> None:
    """Write the sequences anew with other columns in the first block, and reseal."""
    first = {"offsets": [0, 3, 7], "items": np.arange(7) % 5, "times": np.arange(7), "users": ["a", "b"], **columns}
    rest = UserBlock(np.array([0, 5]), np.array([2, 3, 4, 0, 1], np.int32), np.arange(5))
    block = UserBlock(*(np.array(first[name]) for name in ("offsets", "items", "times")))  # type: ignore[arg-type]
    with ShardWriter(domain.folder / "sequences-00000.tar") as writer:
        for name, data in encode_block("block-000000", block, ["a", "b"]) + encode_block("block-000001", rest, ["c"]):
            writer.add(name, json.dumps(first["users"]).encode() if name == "block-000000.users.json" else data)
    reseal(domain)


def rewrite_items(domain: Domain, items: list[ItemRecord]) -> None:
    with ShardWriter(domain.folder / "items-00001.tar") as writer:
        for item in items:
            for name, data in encode_item(item):
                writer.add(name, data)
    reseal(domain)


def problems(domain: Domain) -> str:
    report = verify_domain(domain.folder)
    assert report.ok is (not report.problems) and report.to_json()["ok"] is report.ok
    assert all(problem in report.lines() for problem in report.problems)
    return "\n".join(report.problems)


def test_written_domain_has_no_problems(domain: Domain) -> None:
    report = verify_domain(domain.folder)
    assert report.ok and (report.items, report.images, report.users, report.interactions) == (5, 5, 3, 12)
    assert report.files == 5 and report.lines()[-1].endswith("all is well")
    rewrite_blocks(domain)  # the helper itself changes nothing
    assert problems(domain) == ""


def test_one_flipped_bit_in_any_file_is_found(domain: Domain) -> None:
    for file in domain.manifest.files:
        path = domain.folder / file.name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert f"{path}: the file is damaged: its SHA-256 differs from the manifest's" in problems(domain)
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert problems(domain) == ""


def test_all_problems_are_listed(domain: Domain) -> None:
    (domain.folder / "items-00000.tar").unlink()
    path = domain.folder / "sequences-00000.tar"
    path.write_bytes(path.read_bytes()[:3000])
    (domain.folder / "popularity.npy").write_bytes(b"x")
    (domain.folder / "items-00007.tar").touch()
    found = problems(domain)
    assert f"{domain.folder / 'items-00000.tar'}: the file is missing" in found
    assert f"{path}: the file has 3000 bytes, {domain.manifest.sequence_shards[0].bytes} by the manifest" in found
    assert f"{path}: the shard" in found
    assert "popularity.npy: the file has 1 bytes, 168 by the manifest" in found
    assert "items-00007.tar: the manifest does not list this file" in found


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"items": [0, 1, 2, 3, 5, 0, 1]}, "column items names items outside 0 to 4"),
        ({"items": [0, 1, 2, 3, -1, 0, 1]}, "column items names items outside 0 to 4"),
        ({"offsets": [0, 2, 7]}, "1 users have fewer than 3 interactions"),
        ({"offsets": [0, 8, 7]}, "column offsets does not rise"),
        ({"offsets": [0, 3, 6]}, "column offsets does not rise"),
        ({"times": [0, 2, 1, 3, 4, 5, 6]}, "column times: a user's interactions are not in time order"),
        ({"users": ["a"]}, "the user ids of the block are missing, malformed or not 2"),
        ({"users": "ab"}, "the user ids of the block are missing, malformed or not 2"),
        ({"items": [0, 1, 2, 3]}, "column items has 4 entries, 7 by the manifest"),
    ],
)
def test_faulty_block_is_named_with_its_key(domain: Domain, columns: dict[str, Any], message: str) -> None:
    rewrite_blocks(domain, **columns)
    found = problems(domain)
    assert f"{domain.folder / 'sequences-00000.tar'} (block-000000): {message}" in found


def test_times_may_fall_from_one_user_to_the_next(domain: Domain) -> None:
    rewrite_blocks(domain, times=[7, 8, 9, 1, 2, 3, 4])
    assert problems(domain) == ""


def test_popularity_is_counted_again(domain: Domain) -> None:
    counts = domain.popularity().copy()
    counts[1] += 1
    (domain.folder / "popularity.npy").write_bytes(encode_npy(counts))
    reseal(domain)
    assert "popularity.npy: the stated counts of 1 items differ from the training parts" in problems(domain)


def test_faulty_items_are_named_with_their_key(domain: Domain) -> None:
    rewrite_items(domain, [ItemRecord(3, "i0", None, -1.0, []), ItemRecord(4, "i4", None, None, [b"\xff\xd8\xff no"])])
    found = problems(domain)
    place = domain.folder / "items-00001.tar"
    assert f"{place} (000000003): item_id i0 occurs twice" in found
    assert f"{place} (000000003): price -1.0 is negative, NaN or Inf" in found
    assert f"{place} (000000004): image 0 cannot be decoded: broken" in found


def test_item_of_another_key_is_found(domain: Domain) -> None:
    rewrite_items(domain, [ItemRecord(3, "i3", None, None, []), ItemRecord(5, "i5", None, None, [])])
    assert "items-00001.tar: the shard holds sample 000000005 where the manifest has 000000004" in problems(domain)


def feature_table(domain: Domain, **changes: Any) -> Path:
    folder = domain.folder / "features"
    folder.mkdir(exist_ok=True)
    part: dict[str, Any] = {"name": "text-00000", "first": 0, "items": 5}
    for prefix, suffix in (("", ""), ("present_", ".present")):
        data = encode_npy(np.ones(5))
        (folder / f"text-00000{suffix}.npy").write_bytes(data)
        part |= {f"{prefix}bytes": len(data), f"{prefix}sha256": hashlib.sha256(data).hexdigest()}
    meta = {"fingerprint": domain.fingerprint, "parts": [{**part, **changes}]}
    (folder / "text.json").write_text(json.dumps(meta))
    return folder


def test_feature_tables_are_checked(domain: Domain) -> None:
    folder = feature_table(domain)
    assert problems(domain) == "" and verify_domain(domain.folder).files == 7
    (folder / "text-00000.npy").write_bytes(b"x")
    (folder / "text-00000.present.npy").unlink()
    assert "text-00000.npy: the file has 1 bytes, 168 by the manifest" in problems(domain)
    assert "text-00000.present.npy: the file is missing" in problems(domain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": 4}, "text.json: key parts: 4 items of the domain's 5"),
        ({"name": "../../etc/passwd"}, "text.json: is not the meta file of a feature table"),
        ({"bytes": None}, "text.json: is not the meta file of a feature table"),
    ],
)
def test_faulty_table_description(domain: Domain, changes: dict[str, Any], message: str) -> None:
    feature_table(domain, **changes)
    assert message in problems(domain)


def test_features_of_another_manifest(domain: Domain) -> None:
    folder = feature_table(domain)
    meta = json.loads((folder / "text.json").read_text())
    (folder / "text.json").write_text(json.dumps({**meta, "fingerprint": "0" * 64}))
    assert "text.json: key fingerprint: made for another manifest" in problems(domain)


def test_no_domain_is_an_error_not_a_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        verify_domain(tmp_path)

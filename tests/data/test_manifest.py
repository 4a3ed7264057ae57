"""The manifest is read as written, and malformed ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from antdist.data.entries import File
from antdist.data.manifest import Block, ItemShard, Manifest, SequenceShard, read_manifest, write_manifest
from antdist.errors import UserError

DIGEST = "0" * 64


def small_manifest(**changes: Any) -> Manifest:
    block = Block(key="block-000000", users=2, interactions=7)
    sequence = SequenceShard(
        name="sequences-00000.tar", bytes=10240, sha256=DIGEST, first_user=0, users=2, interactions=7, blocks=[block]
    )
    fields = {
        "domain": "tiny",
        "users": 2,
        "items": 3,
        "interactions": 7,
        "item_shards": [ItemShard(name="items-00000.tar", bytes=10240, sha256=DIGEST, first=0, items=3)],
        "sequence_shards": [sequence],
        "popularity": File(name="popularity.npy", bytes=10, sha256=DIGEST),
        "made": {"format": "tabular"},
    }
    return Manifest(**{**fields, **changes})


def rewritten(folder: Path, change: Any) -> Path:
    write_manifest(folder, small_manifest())
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def test_round_trip_keeps_the_fingerprint(tmp_path: Path) -> None:
    write_manifest(tmp_path, small_manifest())
    assert read_manifest(tmp_path) == small_manifest()
    assert read_manifest(tmp_path).fingerprint == small_manifest().fingerprint


def test_fingerprint_is_the_digest_of_canonical_json() -> None:
    import hashlib

    text = json.dumps(small_manifest().model_dump(), sort_keys=True, separators=(",", ":"))
    assert small_manifest().fingerprint == hashlib.sha256(text.encode()).hexdigest()
    assert small_manifest(made={"format": "amazon"}).fingerprint != small_manifest().fingerprint


def test_no_manifest_is_no_prepared_domain(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json is missing.*antdist prepare") as caught:
        read_manifest(tmp_path / "nowhere")
    assert caught.value.where == str(tmp_path / "nowhere")


def test_invalid_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 1,')
    with pytest.raises(UserError, match=r"manifest\.json: is not JSON.*Prepare the domain again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=2), "schema_version is 2, this version of antdist reads 1"),
        (lambda m: m.pop("users"), "key users: Field required"),
        (lambda m: m.update(users="2"), "key users: Input should be a valid integer"),
        (lambda m: m.update(users=3), "total of sequence_shards: 3 stated, the parts add up to 2"),
        (lambda m: m.update(interactions=8), "interactions: 8 stated, the parts add up to 7"),
        (lambda m: m.update(items=4), "total of item_shards: 4 stated, the parts add up to 3"),
        (lambda m: m["item_shards"][0].update(first=1), "item_shards: a shard starts at 1, expected 0"),
        (lambda m: m["sequence_shards"][0]["blocks"][0].update(users=1), "users of sequences-00000.tar: 2 stated"),
        (lambda m: m.update(extra=1), "key extra: Extra inputs are not permitted"),
        (lambda m: m["popularity"].update(name="../popularity.npy"), "key popularity.name: String should match"),
        (lambda m: m["popularity"].update(name="/etc/passwd"), "key popularity.name: String should match"),
        (lambda m: m["popularity"].update(name="p" * 201), "key popularity.name: String should have at most 200"),
        (lambda m: m["popularity"].update(name="items-00000.tar"), "a file name occurs twice"),
        (
            lambda m: m["item_shards"][0].update(bytes=3071),
            "items-00000.tar would need at least 3072 bytes, it has 3071",
        ),
        (lambda m: m["sequence_shards"][0].update(bytes=99), "sequences-00000.tar would need at least 100 bytes"),
        (lambda m: m["item_shards"][0].update(bytes=1 << 50), "key item_shards.0.bytes: Input should be less than"),
        (lambda m: m["item_shards"][0].update(sha256="x"), "key item_shards.0.sha256: String should match"),
    ],
)
def test_malformed_manifest_is_refused_naming_the_key(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_manifest(rewritten(tmp_path, change))
    assert message in str(caught.value)
    assert caught.value.where == str(tmp_path / "manifest.json")

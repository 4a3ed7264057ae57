"""Feature tables and the catalogue return what was stored, and refuse mixed encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antdist import ragged
from antdist.data.domain import Domain
from antdist.data.shards import ItemRecord
from antdist.errors import UserError
from antdist.features import gather
from antdist.features.catalogue import Catalogue
from antdist.features.table import FeatureMeta, open_table, write_meta, write_part
from tests.worlds import make_domains

ENCODER: dict[str, Any] = {"name": "bert", "kind": "transformers", "digest": "a" * 64, "pooling": "cls"}


def store(domain: Domain, modality: str = "text", dim: int = 3, dtype: Any = "float32", **encoder: Any) -> np.ndarray:
    """Write a table of distinct numbers, of which every third item is missing; returns the rows."""
    items = domain.manifest.items
    values = (np.arange(items * dim).reshape(items, dim) / 7 + len(domain.name)).astype(dtype)
    present = np.arange(items) % 3 != 2
    values[~present] = 0
    folder = domain.folder / "features"
    folder.mkdir(exist_ok=True)
    parts = [
        write_part(
            folder,
            modality,
            number,
            first=shard.first,
            values=values[shard.first : shard.first + shard.items],
            present=present[shard.first : shard.first + shard.items],
        )
        for number, shard in enumerate(domain.manifest.item_shards)
    ]
    meta = FeatureMeta(
        modality=modality,
        encoder=ENCODER | encoder,
        dim=dim,
        dtype=dtype,
        items=items,
        fingerprint=domain.fingerprint,
        present=int(present.sum()),
        parts=parts,
    )
    write_meta(folder, meta)
    return values


def items(count: int, **fields: Any) -> list[ItemRecord]:
    return [ItemRecord(n, f"i{n}", fields.get("text", "a text"), fields.get("price"), []) for n in range(count)]


def edit_meta(domain: Domain, **changes: Any) -> None:
    path = domain.folder / "features" / "text.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_rows_are_read_in_any_order_and_across_parts(make_domain: Any) -> None:
    domain = make_domain("books", items(11), items_per_shard=4)
    values = store(domain)
    found = open_table(domain, "text")
    assert len(found.meta.parts) == 3
    for wanted in ([0, 3, 4, 10], [10, 0, 5, 5, 2], [], [7]):
        rows, present = found.rows(np.array(wanted, dtype=np.int64))
        np.testing.assert_array_equal(rows, values[wanted])
        np.testing.assert_array_equal(present, [n % 3 != 2 for n in wanted])


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5), data=st.data())
def test_groups_partition_the_ids(sizes: list[int], data: st.DataObject) -> None:
    bounds = ragged.offsets(sizes)
    total = int(bounds[-1])
    drawn = data.draw(st.lists(st.integers(0, max(total - 1, 0)), max_size=20)) if total else []
    if data.draw(st.booleans()):
        drawn.sort()
    ids = np.array(drawn, dtype=np.int64)
    seen = np.zeros(len(ids), dtype=int)
    for k, chosen in gather.group_by_range(ids, bounds):
        assert ((ids[chosen] >= bounds[k]) & (ids[chosen] < bounds[k + 1])).all()
        seen[chosen] += 1
    assert (seen == 1).all()


def test_catalogue_looks_up_by_global_id(make_domain: Any) -> None:
    domains = [make_domain("books", items(7)), make_domain("movies", items(5)), make_domain("arts", items(2))]
    stored = np.concatenate([store(domain) for domain in domains])
    catalogue = Catalogue(domains, ["text"])
    assert catalogue.size == 14
    assert catalogue.offsets.tolist() == [0, 7, 12, 14]
    assert catalogue.dims == {"text": 3}
    for wanted in ([0, 6, 7, 11, 12, 13], [13, 0, 12, 7, 7]):
        features = catalogue.features(np.array(wanted))
        assert features.values["text"].dtype == torch.float32
        np.testing.assert_array_equal(features.values["text"].numpy(), stored[wanted])
        assert features.index.tolist() == wanted
        local = [n - catalogue.offsets[np.searchsorted(catalogue.offsets, n, "right") - 1] for n in wanted]
        assert features.present["text"].tolist() == [bool(n % 3 != 2) for n in local]


def test_stored_type_is_not_identity_and_float16_rounds(make_domain: Any) -> None:
    domains = [make_domain("books", items(4)), make_domain("movies", items(4))]
    values = store(domains[0], dtype="float32"), store(domains[1], dtype="float16")
    exact, rounded = Catalogue(domains, ["text"]), Catalogue(domains, ["text"], dtype="float16")
    got = exact.features(np.arange(8)).values["text"]
    np.testing.assert_array_equal(got[:4].numpy(), values[0])
    np.testing.assert_array_equal(got[4:].numpy(), values[1].astype(np.float32))
    again = rounded.features(np.arange(4)).values["text"].numpy()
    np.testing.assert_array_equal(again, values[0].astype(np.float16).astype(np.float32))
    assert not np.array_equal(again, values[0])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_float16_is_widened_and_rounded_in_chunks(make_domain: Any, dtype: Any, monkeypatch: Any) -> None:
    domains = [make_domain("books", items(11), items_per_shard=4), make_domain("movies", items(9))]
    values = np.concatenate([store(domains[0], dtype="float16"), store(domains[1], dtype="float32")])
    if dtype == "float16":
        values = values.astype(np.float16).astype(np.float32)
    monkeypatch.setattr(gather, "TORCH_SERIAL", 7)  # two rows
    catalogue = Catalogue(domains, ["text"], dtype=dtype)
    for wanted in (range(20), [19, 3, 3, 12, 0], []):
        ids = np.array(wanted, dtype=np.int64)
        np.testing.assert_array_equal(catalogue.features(ids).values["text"].numpy(), values[ids].astype(np.float32))


def test_an_item_that_is_not_in_the_table_is_refused(make_domain: Any) -> None:
    domain = make_domain("books", items(4))
    store(domain)
    for wanted in (4, -1):
        with pytest.raises(AssertionError, match="out of range"):
            open_table(domain, "text").rows(np.array([wanted]))


def test_modality_missing_in_the_source_is_zeros(make_domain: Any) -> None:
    domains = [make_domain("books", items(4)), make_domain("retail", items(4, price=2.0))]
    for domain in domains:
        store(domain)
    prices = store(domains[1], "price", dim=2)
    features = Catalogue(domains, ["text", "price"]).features(np.arange(8))
    assert not features.present["price"][:4].any() and not features.values["price"][:4].any()
    np.testing.assert_array_equal(features.values["price"][4:].numpy(), prices)


def test_modality_without_features_needs_a_model_that_has_it(make_domain: Any) -> None:
    domain = make_domain("books", items(4))
    store(domain)
    with pytest.raises(UserError, match=r"no item of books has image features.*[Ll]eave image out of model.modalities"):
        Catalogue([domain], ["text", "image"])
    catalogue = Catalogue([domain], ["text", "image"], dims={"text": 3, "image": 6}, identities={"image": "image x"})
    features = catalogue.features(np.arange(4))
    assert features.values["image"].shape == (4, 6) and not features.present["image"].any()
    assert catalogue.identities["image"] == "image x"


def test_mixed_encoders_are_refused_and_named(make_domain: Any) -> None:
    domains = [make_domain("books", items(4)), make_domain("movies", items(4)), make_domain("arts", items(4))]
    store(domains[0])
    store(domains[1], name="other", digest="b" * 64)
    store(domains[2])
    with pytest.raises(UserError) as error:
        Catalogue(domains, ["text"])
    message = str(error.value)
    assert "different encoders cannot be mixed" in message
    assert "books has bert (text digest=aaaaaaaaaaaaaaaa" in message
    assert "movies has other (text digest=bbbbbbbbbbbbbbbb" in message
    assert "antdist featurize" in message


@pytest.mark.parametrize("change", [{"pooling": "mean"}, {"dim": 4}, {"max_length": 9}])
def test_another_pooling_dimension_or_length_is_another_encoder(make_domain: Any, change: dict[str, Any]) -> None:
    domains = [make_domain("books", items(4)), make_domain("movies", items(4))]
    store(domains[0])
    store(domains[1], **change)
    with pytest.raises(UserError, match="cannot be mixed.*{}={}".format(*next(iter(change.items())))):
        Catalogue(domains, ["text"])


def test_the_same_encoder_under_another_name_may_be_mixed(make_domain: Any) -> None:
    domains = [make_domain("books", items(4)), make_domain("movies", items(4))]
    store(domains[0])
    store(domains[1], name="/some/folder")
    assert Catalogue(domains, ["text"]).size == 8


def test_features_of_another_encoder_than_the_models_are_refused(make_domain: Any) -> None:
    domain = make_domain("books", items(4))
    store(domain)
    own = open_table(domain, "text").meta.identity
    Catalogue([domain], ["text"], identities={"text": own})
    with pytest.raises(UserError, match=r"books has bert .*the model was trained on \(text dim=768 digest=0123\)"):
        Catalogue([domain], ["text"], identities={"text": "text dim=768 digest=0123"})


def test_missing_table_names_the_command(make_domain: Any) -> None:
    domains = [make_domain("books", items(4)), make_domain("movies", items(4))]
    store(domains[0])
    with pytest.raises(
        UserError, match=r"domain movies has no text features.*[Rr]un `antdist featurize \S*movies --text"
    ):
        Catalogue(domains, ["text"])


def test_table_of_another_manifest_is_refused(make_domain: Any) -> None:
    domain = make_domain("books", items(4))
    store(domain)
    edit_meta(domain, fingerprint="0" * 64)
    with pytest.raises(UserError, match=r"made for another manifest \(fingerprint 000000000000.*antdist featurize"):
        open_table(domain, "text")


def test_table_of_another_dimension_is_refused(make_domain: Any) -> None:
    domain = make_domain("books", items(4))
    store(domain)
    edit_meta(domain, dim=5)
    with pytest.raises(UserError, match=r"shape \(4, 3\) and type float32, expected \(4, 5\)"):
        open_table(domain, "text")


def test_missing_part_and_cut_part_are_refused(make_domain: Any) -> None:
    domain = make_domain("books", items(8))
    store(domain)
    part = domain.folder / "features" / "text-00001.npy"
    content = part.read_bytes()
    part.write_bytes(content[:-4])
    with pytest.raises(
        UserError, match=rf"text-00001.npy: .* has {len(content) - 4} bytes, expected {len(content)}.*antdist"
    ):
        open_table(domain, "text")
    part.unlink()
    with pytest.raises(UserError, match=r"text-00001.npy: this part of the feature table is missing.*antdist"):
        open_table(domain, "text")


def test_verify_finds_a_flipped_bit(make_domain: Any) -> None:
    domain = make_domain("books", items(8))
    store(domain)
    open_table(domain, "text").verify()
    part = domain.folder / "features" / "text-00001.npy"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(UserError, match=r"text-00001.npy: .*damaged"):
        open_table(domain, "text").verify()


@pytest.mark.parametrize(
    "change",
    [
        {"parts": [{"name": "../../secret"}]},
        {"dtype": "object"},
        {"surprise": 1},
        {"parts": None},
    ],
)
def test_malformed_meta_is_refused(make_domain: Any, change: dict[str, Any]) -> None:
    domain = make_domain("books", items(4))
    store(domain)
    edit_meta(domain, **change)
    with pytest.raises(UserError, match=r"text.json: is not the meta file of a feature table"):
        open_table(domain, "text")


def test_parts_that_leave_a_gap_are_refused(make_domain: Any) -> None:
    domain = make_domain("books", items(8))
    store(domain)
    path = domain.folder / "features" / "text.json"
    meta = json.loads(path.read_text())
    edit_meta(domain, parts=meta["parts"][1:])
    with pytest.raises(UserError, match="do not add up to the domain's 8 items"):
        open_table(domain, "text")


def test_pickled_arrays_are_not_loaded(make_domain: Any) -> None:
    domain = make_domain("books", items(4))
    store(domain)
    part = domain.folder / "features" / "text-00000.npy"
    with Path(part).open("wb") as file:
        np.save(file, np.array([{"a": 1}] * 4, dtype=object), allow_pickle=True)
    meta = json.loads((domain.folder / "features" / "text.json").read_text())
    meta["parts"][0]["bytes"] = part.stat().st_size
    edit_meta(domain, parts=meta["parts"])
    with pytest.raises(UserError, match="not an array"):
        open_table(domain, "text")


def test_means_are_over_the_items_that_have_the_modality(tmp_path: Path) -> None:
    catalogue = Catalogue(make_domains(tmp_path, ["aa", "bbb"]), ["text", "price"])
    every = catalogue.features(np.arange(catalogue.size))
    for modality, mean in catalogue.means(chunk=7).items():
        expected = every.values[modality][every.present[modality]].mean(0)
        np.testing.assert_allclose(mean.numpy(), expected.numpy(), atol=1e-6)

"""Featurizing domains: tables hold the encoders' output, runs continue where they stopped, faults are reported."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antdist.data.domain import Domain, open_domain
from antdist.data.shards import ItemRecord
from antdist.data.verify import verify_domain
from antdist.distributed.local_ray import count_cores_per_worker
from antdist.errors import UserError
from antdist.features import featurize as featurize_module
from antdist.features.catalogue import Catalogue
from antdist.features.encoders.base import Encoded
from antdist.features.encoders.image import HistogramImage
from antdist.features.encoders.price import PriceEncoder, sinusoid
from antdist.features.encoders.text import _LoadedText, find_text_encoder, open_projection
from antdist.features.featurize import featurize_domains
from antdist.features.table import open_table
from tests.items import some_items


def files(domain: Domain) -> dict[str, bytes]:
    """Every file of the feature folder; of the notes only what they say of the part."""
    return {path.name: path.read_bytes() for path in sorted((domain.folder / "features").iterdir())}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items each call of the text encoder got, in order; the probe at loading excluded."""
    counted: list[int] = []
    real = _LoadedText.__call__

    def count(self: _LoadedText, items: Any) -> Encoded:
        counted.append(len(items))
        return real(self, items)

    monkeypatch.setattr(_LoadedText, "__call__", count)
    return counted


def test_tables_hold_the_encoders_output(make_domain: Any, tiny_bert: Path) -> None:
    items = some_items(10)
    domain = make_domain("books", items)
    report = featurize_domains([domain], text=str(tiny_bert), image="histogram", price="log", pooling="mean", workers=0)

    text = find_text_encoder(str(tiny_bert), pooling="mean", device="cpu").load()(items)
    image = HistogramImage().load()(items)
    prices = np.array([np.nan if item.price is None else item.price for item in items])
    price, priced = PriceEncoder("log").encode(PriceEncoder("log").scaled(prices))
    everything = np.arange(10)
    for modality, values, present in (
        ("text", text.values, text.present),
        ("image", image.values, image.present),
        ("price", price, priced),
    ):
        table = open_table(domain, modality)
        rows, there = table.rows(everything)
        np.testing.assert_allclose(rows, values, atol=2e-6)
        np.testing.assert_array_equal(there, present)
        assert table.meta.present == present.sum() < 10
        assert [(part.first, part.items) for part in table.meta.parts] == [(0, 4), (4, 4), (8, 2)]
        table.verify()
    meta = open_table(domain, "text").meta
    assert meta.encoder["pooling"] == "mean" and len(str(meta.encoder["digest"])) == 64
    assert open_table(domain, "price").meta.encoder["range"] == 1000.0
    assert [table.encoded_items for table in report.tables] == [text.present.sum(), image.present.sum(), priced.sum()]
    assert report.lines()[0].startswith(f"books text: {tiny_bert}, 8 of 10 items, dimension 16")
    assert json.loads(json.dumps(report.to_json()))["tables"][1]["present"] == int(image.present.sum())


def test_finished_table_is_not_encoded_again(make_domain: Any, tiny_bert: Path, calls: list[int]) -> None:
    domain = make_domain("books", some_items(10))
    featurize_domains([domain], text=str(tiny_bert), price="quantile", workers=0)
    assert calls == [4, 4, 2]
    before = files(domain)
    report = featurize_domains([domain], text=str(tiny_bert), price="quantile", workers=0)
    assert calls == [4, 4, 2] and files(domain) == before
    assert report.tables[0].encoded_parts == 0 and "3 of 3 parts were finished before" in report.lines()[0]


def test_stopped_run_continues_where_it_stopped(
    make_domain: Any, tiny_bert: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = make_domain("books", some_items(10))
    counted = _LoadedText.__call__

    def stop(self: _LoadedText, items: Any) -> Encoded:
        if items[0].index == 4:
            raise KeyboardInterrupt
        return counted(self, items)

    monkeypatch.setattr(_LoadedText, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        featurize_domains([domain], text=str(tiny_bert), workers=0)
    assert calls == [4] and not (domain.folder / "features" / "text.json").exists()
    with pytest.raises(UserError, match="has no text features"):
        open_table(domain, "text")
    monkeypatch.setattr(_LoadedText, "__call__", counted)
    report = featurize_domains([domain], text=str(tiny_bert), workers=0)
    assert calls == [4, 4, 2] and report.tables[0].encoded_parts == 2
    stopped = files(domain)
    for path in (domain.folder / "features").iterdir():
        path.unlink()
    featurize_domains([domain], text=str(tiny_bert), workers=0)
    assert files(domain) == stopped


KILLED = """
import os, signal, sys
from antdist.data.domain import open_domain
from antdist.features.encoders import text
from antdist.features.featurize import featurize_domains
real = text._LoadedText.__call__
def kill(self, items):
    if items[0].index == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, items)
text._LoadedText.__call__ = kill
featurize_domains([open_domain(sys.argv[1])], text=sys.argv[2], workers=0)
"""


def test_killed_run_continues_where_it_stopped(make_domain: Any, tiny_bert: Path, calls: list[int]) -> None:
    domain = make_domain("books", some_items(10))
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(domain.folder), str(tiny_bert)],
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    (domain.folder / "features" / ".text-00002.npy.1.tmp").write_bytes(b"half")
    featurize_domains([domain], text=str(tiny_bert), workers=0)
    assert calls == [2]
    open_table(domain, "text").verify()
    assert not list((domain.folder / "features").glob(".*"))


def test_only_a_damaged_part_is_encoded_again(make_domain: Any, tiny_bert: Path, calls: list[int]) -> None:
    domain = make_domain("books", some_items(10))
    featurize_domains([domain], text=str(tiny_bert), workers=0)
    before = files(domain)
    part = domain.folder / "features" / "text-00001.npy"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    calls.clear()
    featurize_domains([domain], text=str(tiny_bert), workers=0)
    assert calls == [4] and files(domain) == before


@pytest.mark.parametrize("change", [{"pooling": "mean"}, {"max_length": 5}, {"dtype": "float16"}])
def test_other_options_make_the_table_anew(
    make_domain: Any, tiny_bert: Path, calls: list[int], change: dict[str, Any]
) -> None:
    domain = make_domain("books", some_items(10))
    featurize_domains([domain], text=str(tiny_bert), workers=0)
    calls.clear()
    featurize_domains([domain], text=str(tiny_bert), workers=0, **change)
    assert calls == [4, 4, 2]
    meta = open_table(domain, "text").meta
    assert (
        meta.model_dump()[next(iter(change))] == "float16"
        if "dtype" in change
        else meta.encoder.items() >= change.items()
    )


def test_float16_rounds(make_domain: Any, tiny_bert: Path) -> None:
    domain = make_domain("books", some_items(6))
    featurize_domains([domain], text=str(tiny_bert), price="log", workers=0)
    exact = [open_table(domain, m).rows(np.arange(6))[0] for m in ("text", "price")]
    featurize_domains([domain], text=str(tiny_bert), price="log", workers=0, dtype="float16")
    for modality, values in zip(("text", "price"), exact, strict=True):
        rows, _ = open_table(domain, modality).rows(np.arange(6))
        assert rows.dtype == np.float16
        np.testing.assert_allclose(rows, values.astype(np.float16), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "float32", "the text features of item item5 are NaN or Inf"),
        (np.inf, "float16", "the text features of item item5 are NaN or Inf"),
        (1e6, "float16", "the text features of item item5 are too large for float16.*--dtype float32"),
    ],
)
def test_nan_and_inf_features_name_the_item(
    make_domain: Any, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, value: float, dtype: Any, message: str
) -> None:
    domain = make_domain("books", some_items(10))
    real = _LoadedText.__call__

    def spoil(self: _LoadedText, items: Any) -> Encoded:
        encoded = real(self, items)
        encoded.values[[item.index == 5 for item in items], 3] = value
        return encoded

    monkeypatch.setattr(_LoadedText, "__call__", spoil)
    with pytest.raises(UserError, match=message):
        featurize_domains([domain], text=str(tiny_bert), workers=0, dtype=dtype)


def test_domain_without_the_modality_gets_an_empty_table(make_domain: Any) -> None:
    bare = make_domain("bare", [ItemRecord(n, f"i{n}", "red lamp", None, []) for n in range(5)])
    full = make_domain("full", some_items(5))
    report = featurize_domains([bare, full], image="histogram", price="quantile", workers=0)
    assert open_table(bare, "image").meta.parts == [] and open_table(bare, "price").meta.parts == []
    assert "bare image: no item has it" in report.lines()
    features = Catalogue([bare, full], ["image", "price"]).features(np.arange(10))
    assert not features.present["image"][:5].any() and features.present["image"][5:].any()
    before = files(bare)
    featurize_domains([bare], image="histogram", price="quantile", workers=0)
    assert files(bare) == before


def test_broken_images_are_counted(make_domain: Any) -> None:
    broken = b"\xff\xd8 not really"
    items = [ItemRecord(n, f"i{n}", None, None, [broken] if n == 1 else some_items(1)[0].images) for n in range(3)]
    domain = make_domain("books", items)
    message = r"items-00000\.tar: 1 of 3 images cannot be decoded, at most 0 may be; item i1: image 0 is broken: not a JPEG.*--max-bad"
    with pytest.raises(UserError, match=message):
        featurize_domains([domain], image="histogram", workers=0)
    with pytest.raises(UserError, match="has no image features"):
        open_table(domain, "image")
    report = featurize_domains([domain], image="histogram", max_bad=0.5, workers=0)
    assert report.tables[0].encoded_parts == 0  # what was encoded before the cap stopped it is not encoded again
    assert report.tables[0].broken == 1 and "1 broken image skipped" in report.lines()[0]
    assert open_table(domain, "image").present.tolist() == [True, False, True]
    record = json.loads((domain.folder / "features" / "quarantine.jsonl").read_text())
    assert record["key"] == "i1" and record["file"].endswith("items-00000.tar")
    assert verify_domain(domain.folder).problems == [
        f"{record['file']} (000000001): image 0 cannot be decoded: broken (UnidentifiedImageError)"
    ]


def test_hashed_text_is_one_encoder_only_if_fitted_together(make_domain: Any, tmp_path: Path) -> None:
    a, b = make_domain("a", some_items(30, 1)), make_domain("b", some_items(30, 2))
    featurize_domains([a, b], text="hashed", text_dim=6, workers=0)
    assert Catalogue([a, b], ["text"]).dims == {"text": 6}
    default = open_projection(tmp_path / "hashed-text.safetensors")
    assert open_table(a, "text").meta.encoder["digest"] == default.digest
    rows = open_table(b, "text").rows(np.arange(30))[0]
    np.testing.assert_allclose(rows, default.load()(some_items(30, 2)).values, atol=1e-6)

    featurize_domains([b], text="hashed", text_dim=6, projection=tmp_path / "of-b-alone", workers=0)
    with pytest.raises(UserError, match=r"cannot be mixed: a has hashed .*; b has hashed"):
        Catalogue([a, b], ["text"])
    c = make_domain("c", some_items(30, 3))
    featurize_domains([b, c], text="hashed", workers=0)  # the first fit is found where it lies
    assert Catalogue([a, b, c], ["text"]).size == 90


def test_projection_is_fitted_on_a_spread_sample(make_domain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = make_domain("a", some_items(30, 1)), make_domain("b", some_items(30, 2))
    given: list[list[str]] = []
    real = featurize_module.fit_projection
    monkeypatch.setattr(featurize_module, "FIT_TEXTS", 20)
    monkeypatch.setattr(
        featurize_module, "fit_projection", lambda texts, *rest: given.append(texts) or real(texts, *rest)
    )
    featurize_domains([a, b], text="hashed", text_dim=4, workers=0)
    sampled = [item.text for seed in (1, 2) for item in some_items(30, seed)[::3]]
    assert given == [[text for text in sampled if text is not None]]


def test_no_requested_modality_is_refused(make_domain: Any) -> None:
    with pytest.raises(UserError, match=r"no features requested.*--text, --image or --price"):
        featurize_domains([make_domain("books", some_items(3))], workers=0)


def test_a_reprepared_domain_is_encoded_anew(make_domain: Any, tiny_bert: Path, calls: list[int]) -> None:
    domain = make_domain("books", some_items(10))
    featurize_domains([domain], text=str(tiny_bert), workers=0)
    kept = files(domain)
    shutil.rmtree(domain.folder)
    again = make_domain("books", some_items(7, seed=5))
    (again.folder / "features").mkdir()
    for name, data in kept.items():
        (again.folder / "features" / name).write_bytes(data)
    with pytest.raises(UserError, match="made for another manifest"):
        open_table(again, "text")
    calls.clear()
    featurize_domains([again], text=str(tiny_bert), workers=0)
    assert calls == [4, 3]
    assert not list((again.folder / "features").glob("text-00002*"))
    open_table(again, "text").verify()


@pytest.mark.parametrize(
    ("nodes", "workers", "cores"),
    [
        ([{"CPU": 8.0}], 2, 4),
        ([{"CPU": 0.0, "GPU": 1.0}, {"CPU": 8.0}, {"CPU": 8.0}], 2, 8),
        ([{"CPU": 4.0}] * 16, 2, 4),  # no node has the 32 that would be a half of all
        ([{"CPU": 2.0}], 8, 1),
        ([{"memory": 1.0}], 2, 1),
        ([], 2, 1),
    ],
)
def test_worker_requests_no_more_cores_than_a_node_has(nodes: Any, workers: int, cores: int) -> None:
    assert count_cores_per_worker(nodes, workers) == cores


def test_prices_are_encoded_a_shard_at_a_time(make_domain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is 8 bytes an item as a price is 768 while it is encoded."""
    taken = []

    def counting(prices: Any, frequency: float) -> Any:
        taken.append(len(prices))
        return sinusoid(prices, frequency)

    monkeypatch.setattr("antdist.features.encoders.price.sinusoid", counting)
    items = [ItemRecord(n, f"i{n}", None, 1.5**n, []) for n in range(11)]
    domain = make_domain("d", items, items_per_shard=4)
    featurize_domains([domain], price="log", workers=0)
    assert taken == [4, 4, 3]
    values, present = open_table(domain, "price").rows(np.arange(11))
    assert present.all() and np.array_equal(values, sinusoid(np.linspace(0, 1000, 11)))


@pytest.mark.ray
def test_ray_workers_make_the_same_tables(
    make_domain: Any, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    domains = [make_domain("a", some_items(10, 1)), make_domain("b", some_items(6, 2))]
    options: dict[str, Any] = {"text": str(tiny_bert), "image": "histogram", "price": "log", "device": "cpu"}
    featurize_domains(domains, workers=0, **options)
    here = [files(domain) for domain in domains]
    for domain in domains:
        for path in (domain.folder / "features").iterdir():
            path.unlink()
    monkeypatch.chdir(tmp_path)
    report = featurize_domains([open_domain("a"), open_domain("b")], workers=2, threads=1, **options)
    assert [files(domain) for domain in domains] == here
    assert not ray.is_initialized()
    assert [table.encoded_parts for table in report.tables] == [3, 3, 2, 2, 3, 2]

    damaged = next((tmp_path / "a").glob("items-*.tar"))
    (tmp_path / "a" / "features" / "text-00000.npy").unlink()
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    with pytest.raises(UserError, match=rf"{damaged.name}: the file has"):
        featurize_domains([open_domain("a")], workers=1, threads=1, **options)
    assert not ray.is_initialized()

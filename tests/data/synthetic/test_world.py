"""The generated world is reproducible, has the requested sizes and modalities, and its signal is in the order."""

from __future__ import annotations

import csv
import gzip
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from antdist.data.domain import open_domain
from antdist.data.ingest.prepare import prepare_domain
from antdist.data.synthetic.grammar import RULES, SyntheticDomain, make_domain, shuffle_orders
from antdist.data.synthetic.world import STAGES, draw_prices, generate_world, write_texts
from antdist.errors import UserError

SMALL: dict[str, Any] = {"users": 60, "items": 50, "target_users": 40, "target_items": 30, "pixels": 32}
FloatArray = NDArray[np.float64]


@pytest.fixture(scope="module")
def domain() -> SyntheticDomain:
    """Target-like, with enough users for steady figures."""
    return make_domain("workshop", users=2500, items=400, mean_length=14, seed=3)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def interactions(folder: Path) -> list[dict[str, str]]:
    with gzip.open(folder / "interactions.csv.gz", "rt") as file:
        return list(csv.DictReader(file))


def items(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "items.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


# ------------------------------------------------------------------------------------------------------- files


def test_bytes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        generate_world(tmp_path / name, **SMALL, seed=7)
    generate_world(tmp_path / "c", **SMALL, seed=8)
    first, again, other = (files(tmp_path / name) for name in "abc")
    assert first == again
    assert any(name.endswith(".jpg") for name in first)
    for name in ("toys/items.jsonl.gz", "toys/interactions.csv.gz", "workshop/images/workshop-000003.jpg"):
        assert first[name] != other[name]


def test_a_domain_does_not_depend_on_what_else_is_generated(tmp_path: Path) -> None:
    generate_world(tmp_path / "all", **SMALL)
    generate_world(tmp_path / "two", **SMALL, domains=["toys", "workshop"])
    assert files(tmp_path / "two" / "toys") == files(tmp_path / "all" / "toys")


def test_sizes_names_and_missing_modalities_are_as_requested(tmp_path: Path) -> None:
    sizes: dict[str, Any] = SMALL | {"items": 400}
    report = generate_world(tmp_path, **sizes, domains=["lamps", "toys", "shoes"], missing=0.1, mean_length=9.0)
    assert [d.name for d in report.domains] == ["lamps", "toys", "shoes"]
    assert {path.name for path in tmp_path.iterdir()} == {"lamps", "toys", "shoes"}
    assert report.target == "shoes"
    for made in report.domains:
        found, log = items(tmp_path / made.name), interactions(tmp_path / made.name)
        users, size = (40, 30) if made.name == "shoes" else (60, 400)
        assert (made.users, made.items, made.interactions) == (users, size, len(log))
        assert (len({row["user_id"] for row in log}), len(found)) == (users, size)
        assert {row["item_id"] for row in log} <= {item["item_id"] for item in found}
        lacking = {field: sum(item[field] is None for item in found) for field in ("text", "image", "price")}
        assert lacking == {"text": size - made.texts, "image": size - made.pictures, "price": size - made.prices}
        assert all(sum(item[field] is None for field in lacking) <= 1 for item in found)
        if size == 400:
            assert all(20 <= count <= 65 for count in lacking.values()), lacking  # 40 +- 4 standard deviations
    assert 7 < report.domains[0].interactions / 60 < 11
    picture = Image.open(next((tmp_path / "toys" / "images").iterdir()))
    assert (picture.size, picture.format, picture.mode) == ((32, 32), "JPEG", "RGB")


def test_without_images_everything_else_is_unchanged(tmp_path: Path) -> None:
    generate_world(tmp_path / "with", **SMALL, missing=0.0)
    report = generate_world(tmp_path / "without", **SMALL, missing=0.0, with_images=False)
    assert [d.pictures for d in report.domains] == [0] * 4
    assert not list((tmp_path / "without").rglob("*.jpg"))
    with_images, without = (items(tmp_path / name / "toys") for name in ("with", "without"))
    assert [item | {"image": None} for item in with_images] == without
    assert interactions(tmp_path / "with" / "toys") == interactions(tmp_path / "without" / "toys")


def test_ten_domains_have_names_and_the_target_is_the_last(tmp_path: Path) -> None:
    report = generate_world(tmp_path, **SMALL, domains=10, with_images=False)
    assert len({d.name for d in report.domains}) == 10
    assert report.domains[-1].name == report.target == "workshop"


def test_prepare_reads_what_was_generated(tmp_path: Path) -> None:
    generated = generate_world(tmp_path / "source", **SMALL).domains[-1]
    made = make_domain("workshop", users=40, items=30, mean_length=14, seed=0)
    report = prepare_domain(
        tmp_path / "source" / "workshop", format="tabular", domain="workshop", out=tmp_path / "data"
    )
    assert (report.users, report.items, report.interactions) == (40, 30, generated.interactions)
    assert (report.with_text, report.with_price, report.with_image) == (
        generated.texts,
        generated.prices,
        generated.pictures,
    )
    prepared = open_domain(tmp_path / "data" / "workshop")
    names, sequences = prepared.item_ids(), prepared.sequences()
    for row, user in enumerate(prepared.user_ids()):
        number = int(user[1:])
        expected = made.items[made.offsets[number] : made.offsets[number + 1]]
        read = sequences.items[sequences.offsets[row] : sequences.offsets[row + 1]]
        assert [names[item] for item in read] == [f"workshop-{item:06d}" for item in expected]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"domains": ["a", "../b"]}, r"domains: '\.\./b' is not a valid folder name"),
        ({"domains": ["a", "a"]}, r"domains: two domains have the same name"),
        ({"domains": 0}, r"domains: 0 is out of range\. Give at least 1"),
        ({"items": 10}, r"items: 10 is out of range\. Give at least 20"),
        ({"users": 0}, r"users: 0 is out of range"),
        ({"mean_length": 3.0}, r"mean_length: 3\.0 is out of range\. Give between 5 and 40"),
        ({"missing": 0.5}, r"missing: 0\.5 is out of range"),
        ({"pixels": 4}, r"pixels: 4 is out of range"),
        ({"seed": -1}, r"seed: -1 is out of range"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate_world(tmp_path, **(SMALL | wrong))
    assert not list(tmp_path.iterdir())


def test_a_domain_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    generate_world(tmp_path, **SMALL, with_images=False)
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"garden: exists already\. Choose another folder"):
        generate_world(tmp_path, **SMALL, seed=1)
    assert files(tmp_path) == before


# -------------------------------------------------------------------------------------------------- modalities


def test_texts_name_the_stage_always_and_the_category_mostly(domain: SyntheticDomain) -> None:
    texts = write_texts(domain, seed=3)
    named = [next(s for s, words in enumerate(STAGES) if set(words) & set(text.split())) for text in texts]
    np.testing.assert_array_equal(named, domain.attributes["stage"])
    for attribute, least, most in (
        ("category", 0.8, 0.95),
        ("style", 0.5, 0.85),
        ("colour", 0, 0.35),
        ("tier", 0, 0.45),
    ):
        assert least < _words_accuracy(texts, domain.attributes[attribute]) < most, attribute


def _words_accuracy(texts: list[str], truth: NDArray[np.int64]) -> float:
    """Naive Bayes on words: learned on even items, judged on odd ones."""
    vocabulary = sorted({word for text in texts for word in text.split()})
    has = np.array([[word in text.split() for word in vocabulary] for text in texts])
    learn, judge = slice(0, None, 2), slice(1, None, 2)
    rates = np.array([(has[learn][truth[learn] == v].sum(0) + 0.1) for v in range(truth.max() + 1)])
    rates /= np.bincount(truth[learn])[:, None] + 0.2
    scores = has[judge] @ np.log(rates).T + ~has[judge] @ np.log(1 - rates).T
    return float((scores.argmax(1) == truth[judge]).mean())


def test_prices_reveal_only_the_tier(domain: SyntheticDomain) -> None:
    prices = np.log(draw_prices(domain, seed=3))[:, None]
    assert _centroid_accuracy(prices, domain.attributes["tier"]) > 0.95
    for attribute, chance in (("stage", 1 / 5), ("colour", 1 / 5), ("category", 1 / 6), ("style", 1 / 4)):
        assert _centroid_accuracy(prices, domain.attributes[attribute]) < chance + 0.12, attribute


def test_images_show_colour_shape_and_texture(tmp_path: Path) -> None:
    generate_world(tmp_path, domains=["workshop"], target_users=5, target_items=300, missing=0.0, seed=3)
    made = make_domain("workshop", users=5, items=300, mean_length=14, seed=3)
    pictures = [
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64)
        for name, data in files(tmp_path).items()
        if name.endswith(".jpg")
    ]
    mean_colour = np.array([p.mean((0, 1)) - p.mean() for p in pictures])
    assert _centroid_accuracy(mean_colour, made.attributes["colour"]) > 0.9
    outline = np.array([(p.std(2) > 25)[::4, ::4].ravel() for p in pictures], np.float64)
    assert _centroid_accuracy(outline, made.attributes["category"]) > 0.6
    grey = np.array([p.mean(2) for p in pictures])
    steps = np.array([[abs(np.diff(g, axis=0)).mean(), abs(np.diff(g, axis=1)).mean()] for g in grey])
    assert _centroid_accuracy(steps, made.attributes["style"]) > 0.45
    for features in (mean_colour, outline, steps):
        for attribute, chance in (("stage", 1 / 5), ("tier", 1 / 3)):
            assert _centroid_accuracy(features, made.attributes[attribute]) < chance + 0.12


def _centroid_accuracy(features: FloatArray, truth: NDArray[np.int64]) -> float:
    """Nearest class mean: learned on even items, judged on odd ones."""
    learn, judge = slice(0, None, 2), slice(1, None, 2)
    means = np.array([features[learn][truth[learn] == value].mean(0) for value in range(truth.max() + 1)])
    distance = ((features[judge, None] - means) ** 2).sum(2)
    return float((distance.argmin(1) == truth[judge]).mean())


# ------------------------------------------------------------------------------------------------------- order


def test_rules_apply_with_their_probability(domain: SyntheticDomain) -> None:
    position = np.arange(len(domain.items)) - np.repeat(domain.offsets[:-1], np.diff(domain.offsets))
    for rule in RULES:
        values, successor = domain.attributes[rule.attribute], domain.successors[rule.attribute]
        seen, value = {0}, 0
        while (value := int(successor[value])) != 0:
            seen.add(value)
        assert len(seen) == rule.values, "one cycle through all values"
        at = np.flatnonzero((position >= rule.lag) & ~domain.fresh)
        held = values[domain.items[at]] == successor[values[domain.items[at - rule.lag]]]
        by_chance = rule.probability + (1 - rule.probability) / rule.values
        assert abs(held.mean() - by_chance) < 0.08, (rule.attribute, held.mean(), by_chance)
        afresh = np.flatnonzero((position >= rule.lag) & domain.fresh)
        held = values[domain.items[afresh]] == successor[values[domain.items[afresh - rule.lag]]]
        assert held.mean() < 1.3 / rule.values + 0.03


def test_domains_share_all_rules_but_those_of_categories() -> None:
    made = [make_domain(n, users=2, items=40, mean_length=8, seed=0) for n in ("garden", "kitchen", "toys", "workshop")]
    for rule in RULES:
        tables = {tuple(d.successors[rule.attribute]) for d in made}
        assert (len(tables) > 1) == (rule.attribute == "category")


def test_users_rarely_buy_twice_and_popularity_is_skewed(domain: SyntheticDomain) -> None:
    users = np.repeat(np.arange(len(domain.offsets) - 1), np.diff(domain.offsets))
    assert len(set(zip(users, domain.items, strict=True))) > 0.999 * len(domain.items)
    counts = np.sort(np.bincount(domain.items, minlength=400))
    assert counts[-40:].sum() > 2 * 0.1 * counts.sum()
    assert counts[0] >= 5


def test_shuffling_keeps_each_users_items(domain: SyntheticDomain) -> None:
    shuffled = shuffle_orders(domain.offsets, domain.items, seed=1)
    assert not np.array_equal(shuffled, domain.items)
    np.testing.assert_array_equal(shuffled, shuffle_orders(domain.offsets, domain.items, seed=1))
    for first, last in zip(domain.offsets[:50], domain.offsets[1:51], strict=True):
        assert sorted(shuffled[first:last]) == sorted(domain.items[first:last])


def test_only_the_order_of_items_carries_signal(domain: SyntheticDomain) -> None:
    """The rules, learned by counting transitions, beat popularity by far; of shuffled orders nothing can be learned."""
    popularity, by_rules = _recalls(domain)
    assert by_rules > 3.5 * popularity, (by_rules, popularity)
    shuffled = replace(domain, items=shuffle_orders(domain.offsets, domain.items, seed=1))
    popularity, by_rules = _recalls(shuffled)
    assert by_rules < 1.15 * popularity, (by_rules, popularity)


def _recalls(domain: SyntheticDomain, k: int = 10) -> tuple[float, float]:
    """Recall@k of the users' last items by popularity, and by transitions of each attribute over one and two steps."""
    starts, ends = domain.offsets[:-1], domain.offsets[1:]
    training = np.ones(len(domain.items), bool)
    training[ends - 1] = training[ends - 2] = False
    position = np.arange(len(domain.items)) - np.repeat(starts, np.diff(domain.offsets))
    counts = np.bincount(domain.items[training], minlength=len(domain.weights)) + 1.0
    by_popularity = np.tile(np.log(counts), (len(starts), 1))
    by_rules = by_popularity.copy()
    for attribute in domain.attributes.values():
        share = np.bincount(attribute, weights=counts) / counts.sum()
        for lag in (1, 2):
            at = np.flatnonzero(training & (position >= lag))
            steps = np.ones((len(share), len(share)))
            np.add.at(steps, (attribute[domain.items[at - lag]], attribute[domain.items[at]]), 1)
            likelihood = np.log(steps / steps.sum(1, keepdims=True) / share)
            by_rules += likelihood[attribute[domain.items[ends - 1 - lag]]][:, attribute]
    users = np.repeat(np.arange(len(starts)), np.diff(domain.offsets) - 1)
    history = np.delete(domain.items, ends - 1)
    recalls = []
    for scores in (by_popularity, by_rules):
        scores[users, history] = -np.inf
        target = scores[np.arange(len(starts)), domain.items[ends - 1]]
        ranks = (scores >= target[:, None]).sum(1)
        recalls.append(float(((ranks <= k) & np.isfinite(target)).mean()))
    return recalls[0], recalls[1]

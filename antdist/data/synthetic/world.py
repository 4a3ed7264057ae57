"""Write generated domains as source files of the format `tabular`, a folder a domain.

`OUT/DOMAIN/` holds `interactions.csv.gz` (user_id, item_id, timestamp), `items.jsonl.gz` (item_id, text, price, image:
a path below the folder) and `images/*.jpg`. No modality is sufficient: the stage of an item is in its text alone, the
colour in its image alone, the tier in its price alone; category and style are in the image and, mostly, in the text.
A few items lack one modality. Equal arguments give equal bytes.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antdist.data.synthetic.drawing import draw_item
from antdist.data.synthetic.grammar import LONGEST, MIN_INTERACTIONS, SyntheticDomain, generator, make_domain
from antdist.errors import UserError
from antdist.io.files import write_folder_atomically
from antdist.io.progress import track
from antdist.report import Report, count

TARGET = "workshop"
AUXILIARIES = ("garden", "kitchen", "toys", "office", "music", "pets", "sports")
FEWEST_ITEMS = 4 * MIN_INTERACTIONS

# Words that every domain uses, by value of the attribute; the first of each pair is the more frequent.
STAGES = (
    ("starter", "beginner"),
    ("basic", "simple"),
    ("standard", "everyday"),
    ("advanced", "skilled"),
    ("expert", "masterclass"),
)
STYLES = (("modern", "minimal"), ("rustic", "country"), ("retro", "vintage"), ("ornate", "baroque"))
CATEGORIES = {
    "garden": (
        ("trowel", "spade"),
        ("planter", "pot"),
        ("seeds", "bulbs"),
        ("hose", "sprinkler"),
        ("trellis", "arch"),
        ("lantern", "torch"),
    ),
    "kitchen": (
        ("knife", "cleaver"),
        ("pan", "skillet"),
        ("bowl", "dish"),
        ("whisk", "ladle"),
        ("kettle", "teapot"),
        ("apron", "towel"),
    ),
    "toys": (
        ("blocks", "bricks"),
        ("puzzle", "jigsaw"),
        ("train", "locomotive"),
        ("doll", "figure"),
        ("kite", "glider"),
        ("drum", "xylophone"),
    ),
    "workshop": (
        ("hammer", "mallet"),
        ("saw", "fretsaw"),
        ("drill", "driver"),
        ("plane", "chisel"),
        ("clamp", "vice"),
        ("gauge", "level"),
    ),
}
PRICES = {"garden": 12.0, "kitchen": 9.0, "toys": 800.0, "workshop": 25.0}  # of the lowest tier, own currency
TIER_FACTOR, PRICE_NOISE = 2.5, 0.15
EXTRAS = ("with carry bag", "gift box", "set of two", "new edition", "long lasting", "easy to clean", "handmade", "")
SYLLABLES = ("bar", "den", "fol", "gim", "hal", "kes", "lor", "mun", "nep", "ost", "pir", "rud", "sel", "tov", "wik")
CATEGORY_NAMED, STYLE_NAMED = 0.85, 0.6  # how often the text names what the image shows

FIRST_DAY, DAY = 1_672_531_200, 86_400  # 1 January 2023, in seconds


@dataclass(frozen=True)
class GeneratedDomain:
    """Counts of one generated domain."""

    name: str
    users: int
    items: int
    interactions: int
    texts: int  # items that have the modality
    pictures: int
    prices: int


@dataclass(frozen=True, repr=False)
class WorldReport(Report):
    """The generated domains; the last is the target."""

    table_key = "domains"

    folder: Path
    target: str
    domains: list[GeneratedDomain]

    def lines(self) -> list[str]:
        return [
            f"{d.name}{' (target)' if d.name == self.target else ''}: {count(d.users, 'user')}, {count(d.items, 'item')}, "
            f"{count(d.interactions, 'interaction')}; {count(d.texts, 'text')}, {count(d.pictures, 'picture')}, {count(d.prices, 'price')}"
            for d in self.domains
        ]

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "target": self.target, "domains": [asdict(d) for d in self.domains]}


def generate_world(
    out: str | Path,
    *,
    domains: int | Sequence[str] = 4,
    users: int = 3000,
    items: int = 600,
    target_users: int = 800,
    target_items: int = 400,
    mean_length: float = 14.0,
    missing: float = 0.04,
    with_images: bool = True,
    pixels: int = 64,
    seed: int = 0,
) -> WorldReport:
    """Generate auxiliary domains and, last, a target domain, below the folder `out`.

    Args:
        domains: their number or names; the last is the target.
        users, items: of each auxiliary domain.
        target_users, target_items: of the target.
        mean_length: approximate mean interactions of a user (lengths are clipped at both ends).
        missing: share of items without text; as many others have no image, as many others no price.
        with_images: draw images; False: no item has one.
        pixels: side of an image.

    Raises:
        UserError: a value is out of range, a name is not a valid folder name, or a domain's folder exists.
    """
    _check_range("domains", domains if isinstance(domains, int) else len(domains), 1)
    _check_range("users", min(users, target_users), 1)
    _check_range("items", min(items, target_items), FEWEST_ITEMS)
    _check_range("mean_length", mean_length, MIN_INTERACTIONS, LONGEST)
    _check_range("missing", missing, 0, 1 / 3)
    _check_range("pixels", pixels, 16, 1024)
    _check_range("seed", seed, 0)
    out, names = Path(out), _choose_names(domains)
    _check_names(out, names)
    written = []
    for name in names:
        size = (target_users, target_items) if name == names[-1] else (users, items)
        domain = make_domain(name, users=size[0], items=size[1], mean_length=mean_length, seed=seed)
        with write_folder_atomically(out / name, out / f".{name}.partial") as partial:
            written.append(_write_domain(partial, domain, missing, pixels if with_images else None, seed))
    return WorldReport(out, names[-1], written)


def _choose_names(domains: int | Sequence[str]) -> list[str]:
    if not isinstance(domains, int):
        return list(domains)
    more = [f"domain{number}" for number in range(len(AUXILIARIES) + 1, domains)]
    return [*AUXILIARIES[: domains - 1], *more, TARGET]


def _check_names(out: Path, names: list[str]) -> None:
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(
                f"{name!r} is not a valid folder name", where="domains", remedy="use letters, digits, '.', '_', '-'"
            )
        if (out / name).exists():
            raise UserError("exists already", where=out / name, remedy="choose another folder, or delete this one")
    if len(set(names)) != len(names):
        raise UserError("two domains have the same name", where="domains", remedy="give each domain its own name")


def _check_range(key: str, value: float, least: float, most: float | None = None) -> None:
    if value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"between {least} and {most:.3g}"
        raise UserError(f"{value} is out of range", where=key, remedy=f"give {limits}")


def _write_domain(
    folder: Path, domain: SyntheticDomain, missing: float, pixels: int | None, seed: int
) -> GeneratedDomain:
    size = len(domain.weights)
    dice = generator(seed, domain.name, "missing").random(size)
    has_text, has_price = dice >= missing, (dice < 2 * missing) | (dice >= 3 * missing)
    has_picture = ((dice < missing) | (dice >= 2 * missing)) & (pixels is not None)
    texts, prices = write_texts(domain, seed), draw_prices(domain, seed)
    if pixels is not None:
        _write_images(folder / "images", domain, has_picture, pixels, seed)
    records = [
        {
            "item_id": _item_id(domain, index),
            "text": texts[index] if has_text[index] else None,
            "price": prices[index] if has_price[index] else None,
            "image": f"images/{_item_id(domain, index)}.jpg" if has_picture[index] else None,
        }
        for index in range(size)
    ]
    _write_gzip(folder / "items.jsonl.gz", "".join(json.dumps(record) + "\n" for record in records))
    _write_gzip(folder / "interactions.csv.gz", _write_interactions(domain, seed))
    return GeneratedDomain(
        domain.name,
        users=len(domain.offsets) - 1,
        items=size,
        interactions=len(domain.items),
        texts=int(has_text.sum()),
        pictures=int(has_picture.sum()),
        prices=int(has_price.sum()),
    )


def write_texts(domain: SyntheticDomain, seed: int) -> list[str]:
    """Write the items' texts: brand and stage always, category mostly, style often, and noise."""
    rng = generator(seed, domain.name, "words")
    size, categories = len(domain.weights), _category_words(domain.name)
    brands = [f"{''.join(rng.choice(SYLLABLES, 2))}".title() for _ in range(12)]
    second = (rng.random((3, size)) < 0.35).astype(int)  # which of the two words: stage, category, style
    named_category, named_style = rng.random(size) < CATEGORY_NAMED, rng.random(size) < STYLE_NAMED
    brand, extra = rng.integers(len(brands), size=size), rng.integers(len(EXTRAS), size=size)
    texts = []
    for index, (stage, category, style) in enumerate(zip(*(domain.attributes[a] for a in _IN_WORDS), strict=True)):
        words = [
            brands[brand[index]],
            STAGES[stage][second[0, index]],
            STYLES[style][second[2, index]] if named_style[index] else "",
            categories[category][second[1, index]] if named_category[index] else "piece",
            EXTRAS[extra[index]],
        ]
        texts.append(" ".join(word for word in words if word))
    return texts


_IN_WORDS = ("stage", "category", "style")


def draw_prices(domain: SyntheticDomain, seed: int) -> list[float]:
    """Draw prices in the domain's own currency: that of the tier, with noise."""
    rng = generator(seed, domain.name, "prices")
    lowest = PRICES.get(domain.name, float(np.exp(rng.uniform(np.log(2), np.log(200)))))
    spread = np.exp(rng.normal(0, PRICE_NOISE, len(domain.weights)))
    return np.round(lowest * TIER_FACTOR ** domain.attributes["tier"] * spread, 2).tolist()


def _category_words(domain: str) -> Sequence[Sequence[str]]:
    """Return two words for each category, invented for domains that are not listed in `CATEGORIES`."""
    if domain in CATEGORIES:
        return CATEGORIES[domain]
    rng = generator(0, domain, "categories")
    names = ["".join(rng.choice(SYLLABLES, 3)) for _ in range(2 * len(CATEGORIES[TARGET]))]
    return list(zip(names[::2], names[1::2], strict=True))


def _write_images(folder: Path, domain: SyntheticDomain, drawn: NDArray[np.bool_], pixels: int, seed: int) -> None:
    folder.mkdir()
    rng = generator(seed, domain.name, "pictures")
    looks = zip(*(domain.attributes[a].tolist() for a in ("category", "colour", "style")), strict=True)
    for index, (category, colour, style) in enumerate(track(looks, f"drawing {domain.name}", len(drawn))):
        picture = draw_item(rng, shape=category, colour=colour, texture=style, pixels=pixels)
        if drawn[index]:
            (folder / f"{_item_id(domain, index)}.jpg").write_bytes(picture)


def _write_interactions(domain: SyntheticDomain, seed: int) -> str:
    """Write all interactions as CSV in time order; a user's gaps are hours or days, after a break months."""
    rng = generator(seed, domain.name, "times")
    lengths = np.diff(domain.offsets)
    users = np.repeat(np.arange(len(lengths)), lengths)
    gaps = np.exp(rng.normal(np.log(np.where(domain.fresh, 60 * DAY, DAY // 2)), 0.7)).astype(np.int64) + 1
    gaps[domain.offsets[:-1]] = rng.integers(0, 365 * DAY, len(lengths))
    elapsed = np.cumsum(gaps)
    times = FIRST_DAY + elapsed - np.repeat(elapsed[domain.offsets[:-1]] - gaps[domain.offsets[:-1]], lengths)
    rows = [
        f"u{users[row]:06d},{_item_id(domain, domain.items[row])},{times[row]}\n"
        for row in np.argsort(times, kind="stable")
    ]
    return "user_id,item_id,timestamp\n" + "".join(rows)


def _item_id(domain: SyntheticDomain, index: int) -> str:
    return f"{domain.name}-{index:06d}"


def _write_gzip(path: Path, text: str) -> None:
    """Write a gzip file without name and time, so that equal texts give equal bytes."""
    path.write_bytes(gzip.compress(text.encode(), compresslevel=6, mtime=0))

"""The common form that every reader gives: interactions in columns, items in rows, and a tally of what went missing."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXAMPLES = 5  # cases named a kind of loss
MOST_IMAGES = 4  # images kept an item (spec, section 2)


@dataclass
class Tally:
    """What was dropped or treated as missing: a count and the first few cases of each kind. Nothing goes silently."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, count: int = 1, example: str | None = None) -> None:
        """Count cases of a kind; kinds are told in the order in which they first occur."""
        if not count:
            return
        self.counts[kind] = self.counts.get(kind, 0) + count
        cases = self.examples.setdefault(kind, [])
        if example is not None and len(cases) < EXAMPLES:
            cases.append(example)


def format_tally(counts: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> list[str]:
    """A tally for the terminal: each kind with its count, its examples below."""
    return [
        line for kind, count in counts.items() for line in (f"{kind}: {count:,}", *(f"  {e}" for e in examples[kind]))
    ]


@dataclass(frozen=True)
class Interactions:
    """Interactions in input order, ids as codes in order of first appearance.

    Shapes: T interactions, U distinct users, I distinct items. `user_ids` and `item_ids` are Arrow arrays of text.
    """

    users: NDArray[np.int32]  # (T,) code of each interaction's user
    items: NDArray[np.int32]  # (T,) code of each interaction's item
    times: NDArray[Any]  # (T,) int64 or float64
    user_ids: Any  # (U,)
    item_ids: Any  # (I,)
    find_item: Callable[[str], str]  # where an item first occurs, as `file:line`: slow, for messages
    file: Path  # for messages, too


@dataclass(frozen=True)
class Item:
    """One item of the source; images are files that may turn out to be missing or broken."""

    item_id: str
    text: str | None
    price: float | None
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Source:
    """All that a reader gives; items in the order of their file, no id twice."""

    interactions: Interactions
    items: list[Item]
    tally: Tally


_RANGE = re.compile(r"\d\s*(-|–|—|\bto\b)\s*\D{0,4}\d")
_CURRENCY = re.compile(r"^(?:[A-Z]{2,3}\s?)?[$€£¥₹]?\s*|\s*(?:[$€£¥₹]|[A-Z]{3})$")
_GROUPED = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d*)?")


def parse_price(value: Any) -> tuple[float | None, str | None]:
    """A price as a number, or None and why not (None: there simply is none).

    "$1,299.00" is 1299.0. A range such as "$5 - $10" names no price (its middle would be invented), so it is missing.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None, None
    if isinstance(value, str):
        text = value.strip()
        bare = _CURRENCY.sub("", text)
        bare = bare.replace(",", "") if _GROUPED.fullmatch(bare) else bare
        try:
            number = float(bare)
        except ValueError:
            return None, "a range" if len(text) < 60 and _RANGE.search(text) else "not a number"
    elif isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # a whole number larger than any float
            return None, "not finite"
    else:
        return None, "not a number"
    if not math.isfinite(number):
        return None, "not finite"
    return (None, "negative") if number < 0 else (number, None)


def read_price(value: Any, item_id: str, tally: Tally) -> float | None:
    """`parse_price`, with what is no price counted."""
    price, fault = parse_price(value)
    if fault:
        tally.add(
            f"prices treated as missing: {fault}", example=f"{' '.join(str(value).split())[:40]!r} of item {item_id}"
        )
    return price


def clean_text(text: str) -> str:
    """HTML entities unescaped, tags removed, white space single (spec, section 1)."""
    bare = html.unescape(html.unescape(text)) if "&" in text else text
    if "<" in bare:
        bare = re.sub(r"</?[A-Za-z][^<>]*>", " ", bare)
    return " ".join(valid_text(bare).split())


def valid_text(text: str) -> str:
    """Without lone surrogates, which no file could hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def compose_text(title: str | None, categories: Iterable[str], brand: str | None) -> str | None:
    """Title, categories (each once) and brand, cleaned and concatenated; None where nothing is left."""
    names = dict.fromkeys(clean_text(category) for category in categories)
    parts = [clean_text(title or ""), " ".join(name for name in names if name), clean_text(brand or "")]
    return ". ".join(part for part in parts if part) or None

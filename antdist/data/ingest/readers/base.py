"""What every reader returns: interactions in columns, items in rows, and a tally of what was left out.

The kinds of a tally become notes of the manifest, and so part of a domain's fingerprint: never reword one.
"""

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

EXAMPLES = 5  # of each kind of a tally
MOST_IMAGES = 4  # of an item (docs/spec/ant.md, section 2)


@dataclass
class Tally:
    """Counts what was dropped or treated as missing, by kind, with the first few cases of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, count: int = 1, example: str | None = None) -> None:
        """Count cases of a kind; kinds are listed in the order of their first occurrence."""
        if not count:
            return
        self.counts[kind] = self.counts.get(kind, 0) + count
        cases = self.examples.setdefault(kind, [])
        if example is not None and len(cases) < EXAMPLES:
            cases.append(example)


def format_tally(counts: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> list[str]:
    """Format a tally for the terminal: each kind with its count, followed by its examples."""
    return [
        line for kind, count in counts.items() for line in (f"{kind}: {count:,}", *(f"  {e}" for e in examples[kind]))
    ]


@dataclass(frozen=True)
class Interactions:
    """Interactions in input order; ids are coded in order of first appearance.

    Shapes: T interactions, U distinct users, I distinct items. `user_ids` and `item_ids` are Arrow arrays of strings.
    """

    users: NDArray[np.int32]  # (T,) code of each interaction's user
    items: NDArray[np.int32]  # (T,) code of each interaction's item
    times: NDArray[Any]  # (T,) int64 or float64
    user_ids: Any  # (U,)
    item_ids: Any  # (I,)
    find_item: Callable[[str], str]  # where an item first occurs, as `file:line`; slow, for messages
    file: Path  # for messages


@dataclass(frozen=True)
class Item:
    """One item of the source; its image files are not yet opened, and may be missing or broken."""

    item_id: str
    text: str | None
    price: float | None
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class SourceData:
    """The result of a reader; items are in the order of their file, with distinct ids."""

    interactions: Interactions
    items: list[Item]
    tally: Tally


_RANGE = re.compile(r"\d\s*(-|–|—|\bto\b)\s*\D{0,4}\d")
_CURRENCY = re.compile(r"^(?:[A-Z]{2,3}\s?)?[$€£¥₹]?\s*|\s*(?:[$€£¥₹]|[A-Z]{3})$")
_GROUPED = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d*)?")


def parse_price(value: Any) -> tuple[float | None, str | None]:
    """Parse a price: the number and None; or None and the fault, which is None too if there is no price.

    "$1,299.00" is 1299.0. A range such as "$5 - $10" counts as missing: any number chosen from it would be invented.
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
        except OverflowError:  # an integer that exceeds the range of a float
            return None, "not finite"
    else:
        return None, "not a number"
    if not math.isfinite(number):
        return None, "not finite"
    return (None, "negative") if number < 0 else (number, None)


def read_price(value: Any, item_id: str, tally: Tally) -> float | None:
    """Do as `parse_price`, and count faults in the tally."""
    price, fault = parse_price(value)
    if fault:
        tally.add(
            f"prices treated as missing: {fault}", example=f"{' '.join(str(value).split())[:40]!r} of item {item_id}"
        )
    return price


def clean_text(text: str) -> str:
    """Unescape HTML entities, remove tags and collapse white space (docs/spec/ant.md, section 1)."""
    bare = html.unescape(html.unescape(text)) if "&" in text else text
    if "<" in bare:
        bare = re.sub(r"</?[A-Za-z][^<>]*>", " ", bare)
    return " ".join(valid_text(bare).split())


def valid_text(text: str) -> str:
    """Replace lone surrogates, which cannot be encoded as UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def compose_text(title: str | None, categories: Iterable[str], brand: str | None) -> str | None:
    """Clean and concatenate title, distinct categories and brand; None if nothing is left."""
    names = dict.fromkeys(clean_text(category) for category in categories)
    parts = [clean_text(title or ""), " ".join(name for name in names if name), clean_text(brand or "")]
    return ". ".join(part for part in parts if part) or None

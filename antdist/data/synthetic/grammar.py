"""A generated world of domains: catalogues with known attributes, and users who walk through them by a grammar.

Every item has five attributes. Four mean the same in every domain, and so do the rules that move them; the fifth, the
category, has names and transitions of its own in each domain. What a user buys next follows from the *order* of what
they bought last, by `RULES`: each rule steps one attribute on from its value one or two items ago, and holds at a step
with its own probability, independently of the others; the item is then drawn by popularity among those that satisfy
the rules that hold. Now and then a user comes back after a break and starts afresh.

The world is honest: nobody has a lasting taste. Each rule is a single cycle through all values, so that each user
passes through everything, every user's walk has the same long-run distribution, and *which* items somebody owns says
next to nothing about the next one; their order says a lot. A rule that copied a value (a favourite colour) would be
learned from the bare set of items. With orders shuffled a recommender can hope for little more than popularity.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from antdist import ragged

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Rule:
    """The next item's `attribute` is the successor of its value `lag` items ago, with `probability` at each step."""

    attribute: str
    values: int
    lag: int
    probability: float


RULES = (
    Rule("category", values=6, lag=1, probability=0.5),  # in words, and as the shape in the picture
    Rule("stage", values=5, lag=1, probability=0.55),  # in words only: from starter kits to masterpieces
    Rule("colour", values=5, lag=1, probability=0.55),  # in the picture only
    Rule("style", values=4, lag=2, probability=0.45),  # in words, and as the texture in the picture
    Rule("tier", values=3, lag=1, probability=0.4),  # in the price only
)
BREAK = 0.08  # probability that a step starts afresh, none of the rules holding
MIN_INTERACTIONS, LONGEST = 5, 40  # items of a user
SKEW = 0.6  # exponent of the popularity over ranks
TRIES = 50  # draws of an item that is new to the user and satisfies the rules


@dataclass(frozen=True)
class SyntheticDomain:
    """One domain, I items and U users, before words, pictures and prices are given to it."""

    name: str
    attributes: dict[str, IntArray]  # (I,) value of each attribute
    successors: dict[str, IntArray]  # (values,) the value that follows each value
    weights: NDArray[np.float64]  # (I,) popularity, by which an item is drawn among those that the rules allow
    offsets: IntArray  # (U + 1,) where each user starts in `items`
    items: IntArray  # (T,) item indices, each user's in order
    fresh: NDArray[np.bool_]  # (T,) whether the user came back after a break (or for the first time)


def generator(seed: int, domain: str, purpose: str) -> np.random.Generator:
    """Randomness of one purpose in one domain, whatever else is generated."""
    return np.random.default_rng([seed, zlib.crc32(domain.encode()), zlib.crc32(purpose.encode())])


def make_domain(name: str, *, users: int, items: int, mean_length: float, seed: int) -> SyntheticDomain:
    """The catalogue and the walks of one domain: a function of its arguments alone."""
    rng = generator(seed, name, "catalogue")
    attributes = {rule.attribute: _spread_evenly(rng, items, rule.values) for rule in RULES}
    successors = {rule.attribute: (np.arange(rule.values) + 1) % rule.values for rule in RULES}
    successors["category"] = _random_cycle(rng, len(successors["category"]))
    weights = rng.permutation((np.arange(items, dtype=np.float64) + 0.02 * items) ** -SKEW)

    rng = generator(seed, name, "walks")
    lengths = MIN_INTERACTIONS + rng.geometric(1 / (mean_length - MIN_INTERACTIONS + 1), users) - 1
    lengths = np.minimum(lengths, min(LONGEST, items // 2))
    paths, fresh = _walk(rng, attributes, successors, weights, lengths)
    real = np.arange(paths.shape[1]) < lengths[:, None]
    offsets = ragged.offsets(lengths)
    return SyntheticDomain(name, attributes, successors, weights, offsets, paths[real], fresh[real])


def shuffle_orders(offsets: IntArray, items: IntArray, seed: int) -> IntArray:
    """Each user's items in random order: what a recommender learns from it, it did not learn from the order."""
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return items[np.lexsort((np.random.default_rng(seed).random(len(items)), users))]


def _spread_evenly(rng: np.random.Generator, items: int, values: int) -> IntArray:
    """Each value equally often, in random order."""
    return rng.permutation(np.arange(items) % values)


def _random_cycle(rng: np.random.Generator, values: int) -> IntArray:
    """A permutation that passes through all values before it returns to the first."""
    order = rng.permutation(values)
    successor = np.empty(values, np.int64)
    successor[order] = np.roll(order, -1)
    return successor


def _walk(
    rng: np.random.Generator,
    attributes: dict[str, IntArray],
    successors: dict[str, IntArray],
    weights: NDArray[np.float64],
    lengths: IntArray,
) -> tuple[IntArray, NDArray[np.bool_]]:
    """All users' walks at once, step by step: (U, longest) items, -1 beyond a user's end, and whether afresh."""
    shelves = _Shelves(attributes, weights)
    users, longest = len(lengths), int(lengths.max())
    paths = np.full((users, longest), -1, np.int64)
    fresh = rng.random((users, longest)) < BREAK
    fresh[:, 0] = True
    for step in range(longest):
        pending = np.flatnonzero(lengths > step)
        for attempt in range(TRIES + 1):
            strict = attempt < TRIES  # else popularity alone, and a repeated item is let through
            wanted = [
                successors[rule.attribute][attributes[rule.attribute][paths[pending, max(step - rule.lag, 0)]]]
                for rule in RULES
            ]
            holds = [
                (rng.random(len(pending)) < rule.probability * strict) & ~fresh[pending, step] & (step >= rule.lag)
                for rule in RULES
            ]
            drawn = shelves.draw(rng, holds, wanted)
            repeated = (paths[pending, :step] == drawn[:, None]).any(axis=1)
            done = (drawn >= 0) & ~(repeated & strict)
            paths[pending[done], step] = drawn[done]
            pending = pending[~done]
            if not len(pending):
                break
    return paths, fresh


class _Shelves:
    """The items of each combination of attribute values, for each choice of the attributes that matter."""

    def __init__(self, attributes: dict[str, IntArray], weights: NDArray[np.float64]) -> None:
        self.attributes = [attributes[rule.attribute] for rule in RULES]
        self.weights = weights
        self.sorted: dict[int, tuple[IntArray, NDArray[np.float64], IntArray]] = {}

    def draw(self, rng: np.random.Generator, holds: list[NDArray[np.bool_]], wanted: list[IntArray]) -> IntArray:
        """One item a row that has the wanted value wherever `holds`, by popularity; -1 where there is none."""
        mask = sum(held.astype(np.int64) << bit for bit, held in enumerate(holds))
        assert isinstance(mask, np.ndarray)
        dice, drawn = rng.random(len(mask)), np.empty(len(mask), np.int64)
        for each in np.unique(mask):
            rows = np.flatnonzero(mask == each)
            order, cumulative, bounds = self._sorted(int(each))
            key = _combination_key(int(each), [values[rows] for values in wanted])
            start, end = bounds[key], bounds[key + 1]
            height = cumulative[start] + dice[rows] * (cumulative[end] - cumulative[start])
            place = np.clip(np.searchsorted(cumulative, height, side="right") - 1, start, np.maximum(end - 1, start))
            drawn[rows] = np.where(start < end, order[np.minimum(place, len(order) - 1)], -1)
        return drawn

    def _sorted(self, mask: int) -> tuple[IntArray, NDArray[np.float64], IntArray]:
        """Items sorted by the masked attributes, their cumulative weight, and where each combination starts."""
        if mask not in self.sorted:
            key = _combination_key(mask, self.attributes)
            order = np.argsort(key, kind="stable")
            cumulative = np.concatenate([[0.0], np.cumsum(self.weights[order])])
            combinations = int(np.prod([rule.values for rule in RULES]))
            self.sorted[mask] = (order, cumulative, np.searchsorted(key[order], np.arange(combinations + 1)))
        return self.sorted[mask]


def _combination_key(mask: int, values: list[IntArray]) -> IntArray:
    """One number for the values of the masked attributes; the others count as 0."""
    key = np.zeros_like(values[0])
    for bit, (rule, value) in enumerate(zip(RULES, values, strict=True)):
        key = key * rule.values + (value if mask >> bit & 1 else 0)
    return key

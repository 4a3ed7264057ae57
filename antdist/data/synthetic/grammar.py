"""Generate domains: catalogues with known attributes, and users who walk through them by a grammar.

Every item has five attributes. Four of them, and their rules, mean the same in every domain; the fifth, the category, has
its own names and transitions in each domain. What a user buys next follows from the *order* of the last purchases, by
`RULES`: each rule advances one attribute from its value one or two items ago, and applies at a step with its own
probability, independently of the others; the item is then drawn by popularity among those that satisfy the rules that
apply. Now and then a user returns after a break and starts afresh.

No user has a lasting taste. Each rule is a single cycle through all values, so every user's walk has the same long-run
distribution, and *which* items a user has bought says next to nothing about the next one, while their order says a lot. A
rule that copied a value (a favourite colour) could be learned from the unordered set of items. With shuffled orders a
recommender can achieve little more than popularity.
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
    """With `probability`, the item's `attribute` is the successor of its value `lag` items ago."""

    attribute: str
    values: int
    lag: int
    probability: float


RULES = (
    Rule("category", values=6, lag=1, probability=0.5),  # in the text, and as the shape in the image
    Rule("stage", values=5, lag=1, probability=0.55),  # in the text only: from starter kits to masterpieces
    Rule("colour", values=5, lag=1, probability=0.55),  # in the image only
    Rule("style", values=4, lag=2, probability=0.45),  # in the text, and as the texture in the image
    Rule("tier", values=3, lag=1, probability=0.4),  # in the price only
)
BREAK = 0.08  # probability that a step starts afresh, without any rule
MIN_INTERACTIONS, LONGEST = 5, 40  # items of a user
SKEW = 0.6  # exponent of the popularity over ranks
TRIES = 50  # draws of an item that is new to the user and satisfies the rules


@dataclass(frozen=True)
class SyntheticDomain:
    """One domain of I items and U users, before its texts, images and prices are generated."""

    name: str
    attributes: dict[str, IntArray]  # (I,) value of each attribute
    successors: dict[str, IntArray]  # (values,) the value that follows each value
    weights: NDArray[np.float64]  # (I,) popularity, by which an item is drawn among those that the rules allow
    offsets: IntArray  # (U + 1,) where each user starts in `items`
    items: IntArray  # (T,) item indices, each user's in order
    fresh: NDArray[np.bool_]  # (T,) whether the user came back after a break (or for the first time)


def generator(seed: int, domain: str, purpose: str) -> np.random.Generator:
    """Return a random generator for one purpose in one domain, independent of all others."""
    return np.random.default_rng([seed, zlib.crc32(domain.encode()), zlib.crc32(purpose.encode())])


def make_domain(name: str, *, users: int, items: int, mean_length: float, seed: int) -> SyntheticDomain:
    """Generate the catalogue and the walks of one domain, as a function of the arguments alone."""
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
    """Shuffle each user's items, to measure what a recommender learns without their order."""
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return items[np.lexsort((np.random.default_rng(seed).random(len(items)), users))]


def _spread_evenly(rng: np.random.Generator, items: int, values: int) -> IntArray:
    """Draw each value equally often, in random order."""
    return rng.permutation(np.arange(items) % values)


def _random_cycle(rng: np.random.Generator, values: int) -> IntArray:
    """Draw a permutation that is a single cycle through all values."""
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
    """Walk all users at once, step by step.

    Returns:
        Items (U, longest), -1 beyond a user's end, and whether each step starts afresh, (U, longest).
    """
    shelves = _Shelves(attributes, weights)
    users, longest = len(lengths), int(lengths.max())
    paths = np.full((users, longest), -1, np.int64)
    fresh = rng.random((users, longest)) < BREAK
    fresh[:, 0] = True
    for step in range(longest):
        pending = np.flatnonzero(lengths > step)
        for attempt in range(TRIES + 1):
            strict = attempt < TRIES  # else by popularity alone, and repeated items are allowed
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
    """Draws items by popularity among those with given values of some of the attributes."""

    def __init__(self, attributes: dict[str, IntArray], weights: NDArray[np.float64]) -> None:
        self.attributes = [attributes[rule.attribute] for rule in RULES]
        self.weights = weights
        self.sorted: dict[int, tuple[IntArray, NDArray[np.float64], IntArray]] = {}

    def draw(self, rng: np.random.Generator, holds: list[NDArray[np.bool_]], wanted: list[IntArray]) -> IntArray:
        """Draw one item a row that has the wanted value wherever `holds`; -1 if there is none."""
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
        """Return items sorted by the masked attributes, cumulative weights, and starts of combinations."""
        if mask not in self.sorted:
            key = _combination_key(mask, self.attributes)
            order = np.argsort(key, kind="stable")
            cumulative = np.concatenate([[0.0], np.cumsum(self.weights[order])])
            combinations = int(np.prod([rule.values for rule in RULES]))
            self.sorted[mask] = (order, cumulative, np.searchsorted(key[order], np.arange(combinations + 1)))
        return self.sorted[mask]


def _combination_key(mask: int, values: list[IntArray]) -> IntArray:
    """Combine the values of the masked attributes into one number; the others count as 0."""
    key = np.zeros_like(values[0])
    for bit, (rule, value) in enumerate(zip(RULES, values, strict=True)):
        key = key * rule.values + (value if mask >> bit & 1 else 0)
    return key

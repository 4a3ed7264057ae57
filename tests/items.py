"""Items of every kind for tests: with and without text, pictures, price."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from antdist.data.shards import ItemRecord

WORDS = ["red", "blue", "green", "lamp", "chair", "table", "steel", "wood", "large", "small", "garden", "desk"]


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    """Draw a noisy picture of one base colour, as bytes."""
    rng = np.random.default_rng(seed)
    pixels = (rng.integers(0, 200, 3) + rng.integers(0, 55, (size[1], size[0], 3))).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


def some_items(count: int, seed: int = 0) -> list[ItemRecord]:
    """Make items; every 5th has no text, every 3rd no picture, every 4th no price."""
    rng = np.random.default_rng(seed)
    items = []
    for n in range(count):
        text = None if n % 5 == 4 else " ".join(rng.choice(WORDS, rng.integers(2, 9)))
        price = None if n % 4 == 3 else float(np.round(rng.lognormal(2, 1), 2))
        images = [] if n % 3 == 2 else [picture(seed * 1000 + 10 * n + k) for k in range(1 + n % 2)]
        items.append(ItemRecord(n, f"item{n}", text, price, images))
    return items

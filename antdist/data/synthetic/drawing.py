"""Draw the image of a generated item: a shape of one colour and texture on a pale ground, as JPEG."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COLOURS = np.array([[200, 40, 45], [40, 150, 60], [45, 80, 200], [225, 180, 30], [140, 50, 160]])  # RGB
SHAPES = ("disc", "square", "diamond", "cross", "ring", "triangle")
TEXTURES = ("plain", "bars", "stripes", "checks")
QUALITY = 85

Plane = NDArray[np.float64]


def draw_item(rng: np.random.Generator, *, shape: int, colour: int, texture: int, pixels: int) -> bytes:
    """Draw a JPEG of `pixels` x `pixels`; size, place, tilt, shade and ground are random."""
    x, y = np.meshgrid(np.linspace(-1, 1, pixels), np.linspace(-1, 1, pixels))
    size, tilt = rng.uniform(0.55, 0.8), rng.uniform(-0.15, 0.15)
    dx, dy = rng.uniform(-0.15, 0.15, 2)
    x, y = x - dx, y - dy
    x, y = (np.cos(tilt) * x - np.sin(tilt) * y) / size, (np.sin(tilt) * x + np.cos(tilt) * y) / size

    ink = COLOURS[colour] * rng.uniform(0.85, 1.1) + rng.normal(0, 12, 3)
    ground = rng.uniform(205, 250) + rng.normal(0, 6, 3)
    shade = np.where(_texture_mask(texture, x, y), 1.0, 0.55)
    picture = np.where(_shape_mask(shape, x, y)[..., None], ink * shade[..., None], ground)
    picture += rng.normal(0, 4, (pixels, pixels, 1))

    buffer = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _shape_mask(shape: int, x: Plane, y: Plane) -> NDArray[np.bool_]:
    """Return the mask of the shape, on coordinates in which it extends from -1 to 1."""
    radius, far, near = np.hypot(x, y), np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    match SHAPES[shape]:
        case "disc":
            return radius < 1
        case "square":
            return far < 0.85
        case "diamond":
            return abs(x) + abs(y) < 1.1
        case "cross":
            return (near < 0.3) & (far < 1)
        case "ring":
            return (radius > 0.55) & (radius < 1)
        case _:
            return (y < 0.8) & (y > 2 * abs(x) - 1)


def _texture_mask(texture: int, x: Plane, y: Plane) -> NDArray[np.bool_]:
    """Return the mask of the light parts of the shape."""
    across, along = np.sin(9 * x) > 0, np.sin(9 * y) > 0
    match TEXTURES[texture]:
        case "plain":
            return np.ones_like(across)
        case "bars":
            return across
        case "stripes":
            return along
        case _:
            return across ^ along

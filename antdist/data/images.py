"""Check image files and shrink large ones before they enter shards; what cannot be decoded is refused."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

LARGEST_FILE = 64 << 20  # bytes; larger files are not read at all
MOST_PIXELS = 64_000_000  # read from the header, before anything is decoded
KEPT_BYTES = 4 << 20  # a larger file is shrunk
KEPT_SIDE = 512  # pixels; so is an image with a longer side
QUALITY = 90
MISSING = "missing"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class BrokenImageError(Exception):
    """An image is missing, cannot be decoded or is too large; the message says which in a few words."""


def load_image(path: Path) -> bytes:
    """Read an image file as JPEG or PNG bytes: its own, or a smaller JPEG (longest side 512 pixels).

    Grey and CMYK images keep their mode. Equal files give equal bytes.

    Raises:
        BrokenImageError: the file is missing, empty, too large, or cannot be decoded.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise BrokenImageError("too large")
        data = path.read_bytes()
    except OSError:
        raise BrokenImageError(MISSING) from None
    return normalize_image(data)


def normalize_image(data: bytes) -> bytes:
    """Do as `load_image` for the bytes of an image file."""
    from PIL import Image, ImageOps

    if not data:
        raise BrokenImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that are refused below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        with image:
            if image.width * image.height > MOST_PIXELS:
                raise BrokenImageError("too many pixels")
            kept = image.format in ("JPEG", "PNG") and len(data) <= KEPT_BYTES and max(image.size) <= KEPT_SIDE
            image.load()
            return data if kept else _shrink(ImageOps.exif_transpose(image))
    except BrokenImageError:
        raise
    except Image.DecompressionBombError:
        raise BrokenImageError("too many pixels") from None
    except Exception as error:  # decoders raise arbitrary exceptions on damaged files
        raise BrokenImageError(f"broken ({type(error).__name__})") from None


def _shrink(image: Image.Image) -> bytes:
    """Encode the image as a JPEG whose longest side is at most `KEPT_SIDE`."""
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    image.thumbnail((KEPT_SIDE, KEPT_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()

"""Images are checked and shrunk before they enter shards."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from antdist.data.images import KEPT_SIDE, BrokenImageError, load_image, normalize_image
from tests.pictures import png_of_stated_size


def encoded(mode: str = "RGB", size: tuple[int, int] = (40, 30), kind: str = "JPEG") -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG")])
def test_small_images_are_kept_byte_for_byte(mode: str, kind: str) -> None:
    data = encoded(mode, kind=kind)
    assert normalize_image(data) == data


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG")])
def test_large_images_become_jpegs_of_512_reproducibly(mode: str, kind: str) -> None:
    data = encoded(mode, (1200, 600), kind)
    small = normalize_image(data)
    image = Image.open(io.BytesIO(small))
    assert image.format == "JPEG" and image.size == (KEPT_SIDE, KEPT_SIDE // 2)
    assert image.mode == ("RGB" if mode == "RGBA" else mode)
    assert normalize_image(data) == small and normalize_image(small) == small


def test_other_formats_become_jpeg() -> None:
    assert normalize_image(encoded(kind="WEBP")).startswith(b"\xff\xd8")


@pytest.mark.parametrize("size", [(30_000, 3_000), (60_000, 60_000)])
def test_image_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(BrokenImageError, match="too many pixels"):
        normalize_image(png_of_stated_size(*size))


@pytest.mark.parametrize("data", [b"\xff\xd8\xff no image", encoded()[:300], encoded(kind="PNG")[:300], b"<svg/>"])
def test_broken_image_is_refused(data: bytes) -> None:
    with pytest.raises(BrokenImageError, match="broken"):
        normalize_image(data)


def test_empty_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "zero.jpg").touch()
    with pytest.raises(BrokenImageError, match="empty file"):
        load_image(tmp_path / "zero.jpg")
    with pytest.raises(BrokenImageError, match="missing"):
        load_image(tmp_path / "none.jpg")
    with pytest.raises(BrokenImageError, match="missing"):
        load_image(tmp_path)

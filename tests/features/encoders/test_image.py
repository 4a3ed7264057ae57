"""Image encoders: every kind of picture becomes RGB, the broken ones are counted, pooled output is the model's."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from antdist.data.shards import ItemRecord
from antdist.errors import UserError
from antdist.features.encoders.image import (
    HISTOGRAM_DIM,
    BrokenImageError,
    HistogramImage,
    find_image_encoder,
    histogram,
    read_picture,
)
from tests.items import picture


def item(n: int, *images: bytes) -> ItemRecord:
    return ItemRecord(n, f"i{n}", None, None, list(images))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "form", "colour", "expected"),
    [
        ("L", "PNG", 90, (90, 90, 90)),
        ("L", "JPEG", 90, (90, 90, 90)),
        ("1", "PNG", 1, (255, 255, 255)),
        ("I;16", "PNG", 90 * 256, (90, 90, 90)),
        ("RGBA", "PNG", (200, 0, 0, 0), (255, 255, 255)),
        ("RGBA", "PNG", (200, 0, 0, 255), (200, 0, 0)),
        ("LA", "PNG", (40, 255), (40, 40, 40)),
        ("CMYK", "JPEG", (0, 255, 255, 0), (254, 0, 0)),
        ("RGB", "JPEG", (10, 20, 30), (10, 20, 30)),
    ],
)
def test_every_mode_becomes_rgb(mode: str, form: str, colour: object, expected: tuple[int, int, int]) -> None:
    read = read_picture(encoded(Image.new(mode, (16, 16), colour), form))  # type: ignore[arg-type]
    assert read.mode == "RGB"
    assert np.abs(np.asarray(read)[8, 8].astype(int) - expected).max() <= 3


def test_palette_with_transparency_is_laid_on_white() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert np.asarray(read_picture(encoded(palette)))[0, 0].tolist() == [10, 200, 30]
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=1)
    assert np.asarray(read_picture(file.getvalue()))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("data", [b"", b"no picture", picture(1)[:60], picture(1, form="JPEG")[:300]])
def test_broken_images_are_refused(data: bytes) -> None:
    with pytest.raises(BrokenImageError):
        read_picture(data)


def test_image_bomb_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("1", (9000, 9000)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(BrokenImageError, match="9000 x 9000"):
        read_picture(data)


def by_hand(folder: Path, data: bytes) -> np.ndarray:
    """Pillow's resize, the processor's numbers, the model: written out."""
    from transformers import SwinModel

    small = Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    pixels = (np.asarray(small, dtype=np.float32) / 255 - 0.5) / 0.5
    with torch.no_grad():
        model = SwinModel.from_pretrained(folder).eval()
        return model(torch.from_numpy(pixels.transpose(2, 0, 1)[None])).pooler_output[0].numpy()


def test_transformers_model_gives_the_mean_pooled_output(tiny_swin: Path) -> None:
    a, b, c, d, e = (picture(n, mode="L" if n == 2 else "RGB") for n in range(5))
    items = [item(0, a), item(1), item(2, a, b"broken", c), item(3, b"broken"), item(4, a, b, c, d, e)]
    for batch_size in (2, 64):
        found = find_image_encoder(str(tiny_swin), batch_size=batch_size, device="cpu").load()(items)
        assert found.present.tolist() == [True, False, True, False, True]
        assert found.broken == 2
        assert found.values.shape == (5, 16)
        assert not found.values[[1, 3]].any()
        rows = {name: by_hand(tiny_swin, data) for name, data in zip("abcd", (a, b, c, d), strict=True)}
        np.testing.assert_allclose(found.values[0], rows["a"], atol=1e-5)
        np.testing.assert_allclose(found.values[2], (rows["a"] + rows["c"]) / 2, atol=1e-5)
        np.testing.assert_allclose(found.values[4], sum(rows.values()) / 4, atol=1e-5)
    assert not np.allclose(rows["a"], rows["b"], atol=1e-3)


def test_max_images_and_pixel_cap(tiny_swin: Path) -> None:
    items = [item(0, picture(0), picture(1))]
    one = find_image_encoder(str(tiny_swin), max_images=1, device="cpu").load()(items)
    np.testing.assert_allclose(one.values[0], by_hand(tiny_swin, items[0].images[0]), atol=1e-5)
    capped = find_image_encoder(str(tiny_swin), max_pixels=1000, device="cpu").load()(items)
    assert capped.broken == 2 and not capped.present[0]


def test_vision_model_without_pooler_averages_hidden_states(tmp_path: Path) -> None:
    from transformers import ViTImageProcessorPil, ViTMAEConfig, ViTMAEModel

    torch.manual_seed(0)
    config = ViTMAEConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=32,
        patch_size=16,
        mask_ratio=0.0,
    )
    ViTMAEModel(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    data = picture(0)
    found = find_image_encoder(str(tmp_path), device="cpu").load()([item(0, data)])
    small = Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(((np.asarray(small, dtype=np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None])
    with torch.no_grad():
        model = ViTMAEModel.from_pretrained(tmp_path).eval()
        expected = model(pixels).last_hidden_state.mean(1)[0]
    np.testing.assert_allclose(found.values[0], expected.numpy(), atol=1e-5)


def test_clip_gives_its_vision_half(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**small, "vocab_size": 20},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    data = picture(0)
    found = find_image_encoder(str(tmp_path), device="cpu").load()([item(0, data)])
    pixels = CLIPImageProcessorPil.from_pretrained(tmp_path)(read_picture(data), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.vision_model(pixels).pooler_output[0]
    np.testing.assert_allclose(found.values[0], expected.numpy(), atol=1e-5)


def test_model_without_image_processor_is_refused(tiny_swin: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_swin / name, tmp_path / name)
    with pytest.raises(UserError, match=r"has no image processor \(preprocessor_config.json\)"):
        find_image_encoder(str(tmp_path))


# --------------------------------------------------------------------------------------------------- histograms


def test_histogram_of_a_flat_image_is_one_colour() -> None:
    row = histogram(Image.new("RGB", (50, 20), (200, 10, 100)))
    assert row.shape == (HISTOGRAM_DIM,) == (136,)
    expected = np.zeros(136)
    expected[3 * 16 + 0 * 4 + 1] = 8  # levels 3, 0, 1 of 4; the square root of all of 64 bins' mass
    np.testing.assert_allclose(row, expected)


def test_histogram_shows_edge_orientation_and_position() -> None:
    pixels = np.zeros((96, 96, 3), dtype=np.uint8)
    pixels[:32, 16:] = 255  # one upright edge, in the upper left cell
    pixels[:32, 32:] = 255
    pixels[32:] = 255  # and one level edge on the left
    row = histogram(Image.fromarray(pixels))[64:].reshape(3, 3, 8)
    assert row[0, 0, 0] > 0  # across: angle 0
    assert row[0, 0, 4] > 0  # down: angle pi / 2
    assert not row[0, 1:].any() and not row[1:, 1:].any() and not row[2].any()
    assert not row[0, 0, [1, 3, 5, 6, 7]].any()
    assert np.square(row).mean() == pytest.approx(1)


def test_histogram_separates_and_averages_images() -> None:
    a, b = picture(0), picture(1)
    found = HistogramImage().load()([item(0, a), item(1, b), item(2, a, b), item(3), item(4, b"broken")])
    np.testing.assert_allclose(found.values[2], (found.values[0] + found.values[1]) / 2, atol=1e-6)
    assert np.linalg.norm(found.values[0] - found.values[1]) > 1
    assert found.present.tolist() == [True, True, True, False, False] and found.broken == 1
    assert np.square(found.values[0]).mean() == pytest.approx(1, rel=1e-5)

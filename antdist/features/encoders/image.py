"""Image encoders: transformers vision models, and histograms (docs/spec/ant.md, section 2)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from antdist.data.images import BrokenImageError
from antdist.errors import UserError
from antdist.features.encoders.base import Encoded, LoadedEncoder, find_pretrained, load_frozen, model_folder_digest

if TYPE_CHECKING:
    from PIL.Image import Image

    from antdist.data.shards import ItemRecord

MAX_PIXELS = 50_000_000


def read_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode a JPEG or PNG as RGB, converting other modes and laying transparency on white.

    Raises:
        BrokenImageError: not an image, truncated, or larger than `max_pixels` (checked before decoding).
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` is checked below
            picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        if picture.width * picture.height > max_pixels:
            raise BrokenImageError(f"{picture.width} x {picture.height} pixels")
        picture.load()
        return _rgb(picture)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        unidentified = isinstance(error, UnidentifiedImageError)  # its message contains a memory address
        raise BrokenImageError("not a JPEG or PNG" if unidentified else str(error)) from None


def _rgb(picture: Image) -> Image:
    from PIL import Image

    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        picture = Image.new("RGBA", layered.size, "white")
        picture.alpha_composite(layered)
    return picture.convert("RGB")


def _encode_items(
    items: Sequence[ItemRecord],
    encode: Callable[[list[Image]], NDArray[np.float32]],
    dim: int,
    *,
    max_images: int,
    max_pixels: int,
    batch_size: int,
) -> Encoded:
    """Average the features of each item's first `max_images` images; images are decoded a batch at a time.

    Args:
        encode: maps RGB images to features (n, dim).
    """
    sums = np.zeros((len(items), dim), dtype=np.float64)
    counts = np.zeros(len(items), dtype=np.int64)
    seen = 0
    faults: list[tuple[str, str]] = []
    pictures: list[Image] = []
    owners: list[int] = []

    def flush() -> None:
        if pictures:
            np.add.at(sums, owners, encode(pictures))
            np.add.at(counts, owners, 1)
        pictures.clear()
        owners.clear()

    for row, item in enumerate(items):
        for number, data in enumerate(item.images[:max_images]):
            seen += 1
            try:
                pictures.append(read_picture(data, max_pixels))
                owners.append(row)
            except BrokenImageError as error:
                faults.append((item.item_id, f"image {number} is broken: {error}"))
            if len(pictures) == batch_size:
                flush()
    flush()
    values = sums / np.maximum(counts, 1)[:, None]
    return Encoded(values.astype(np.float32), counts > 0, seen, tuple(faults))


# ------------------------------------------------------------------------------------------------- transformers


@dataclass(frozen=True)
class TransformersImage:
    """A transformers vision model, made by `find_image_encoder`."""

    name: str
    folder: Path
    digest: str
    max_images: int
    max_pixels: int
    batch_size: int
    device: str

    def description(self) -> dict[str, str | int | float | None]:
        return {"name": self.name, "kind": "transformers", "digest": self.digest, "max_images": self.max_images}

    def load(self) -> LoadedEncoder:
        return _LoadedImage(self)


def find_image_encoder(
    name: str, *, max_images: int = 4, max_pixels: int = MAX_PIXELS, batch_size: int = 64, device: str = "auto"
) -> TransformersImage:
    """Find a vision model by folder or model hub's name, with its image processor.

    Args:
        name: a folder, or a name such as `microsoft/swin-base-patch4-window7-224` (the paper's kind).
        max_images: how many images of an item are averaged.
        max_pixels: a larger image counts as broken.
        batch_size: images a forward pass.
        device: `auto`, `cpu`, `cuda` or `cuda:0` ...

    Raises:
        UserError: the encoder does not exist or has no image processor.
    """
    folder = find_pretrained(name, "--image")
    if not (folder / "preprocessor_config.json").is_file() and not (folder / "processor_config.json").is_file():
        raise UserError(
            "the model has no image processor (preprocessor_config.json)",
            where=f"--image {name}",
            remedy="save its image processor into the same folder, or give a vision model",
        )
    return TransformersImage(name, folder, model_folder_digest(folder), max_images, max_pixels, batch_size, device)


class _LoadedImage:
    def __init__(self, encoder: TransformersImage) -> None:
        from PIL import Image
        from transformers import AutoImageProcessor

        self.encoder = encoder
        model, self.device, self.dtype = load_frozen(encoder.folder, "--image", encoder.device)
        self.model = getattr(model, "vision_model", model)  # CLIP and similar models have a vision and a text half
        # Pillow's backend: the other needs torchvision, which is not a dependency.
        try:
            self.processor = AutoImageProcessor.from_pretrained(
                str(encoder.folder), backend="pil", local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            what, where = f"its image processor cannot be loaded ({reason})", f"--image {encoder.name}"
            raise UserError(what, where=where, remedy="save the processor again with save_pretrained(FOLDER)") from None
        self.dim = int(self.encode([Image.new("RGB", (32, 32))]).shape[1])

    def __call__(self, items: Sequence[ItemRecord]) -> Encoded:
        return _encode_items(
            items,
            self.encode,
            self.dim,
            max_images=self.encoder.max_images,
            max_pixels=self.encoder.max_pixels,
            batch_size=self.encoder.batch_size,
        )

    def encode(self, pictures: list[Image]) -> NDArray[np.float32]:
        """Return the pooled output (n, dim), or the mean of the last hidden state if the model has none."""
        import torch

        inputs = self.processor(images=pictures, return_tensors="pt")
        with torch.inference_mode():
            output = self.model(inputs["pixel_values"].to(self.device, self.dtype))
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                hidden = output.last_hidden_state  # (n, tokens, dim), or (n, dim, height, width) of a convolution
                pooled = hidden.mean(1) if hidden.dim() == 3 else hidden.mean((2, 3))
        return cast("NDArray[np.float32]", pooled.flatten(1).float().cpu().numpy())


# --------------------------------------------------------------------------------------------------- histograms

SIDE = 96  # images are scaled to SIDE x SIDE pixels
COLOURS = 4  # levels of each of red, green and blue: 64 bins
CELLS, ORIENTATIONS = 3, 8  # 3 x 3 cells of 8 gradient orientations: 72 bins
HISTOGRAM_DIM = COLOURS**3 + CELLS * CELLS * ORIENTATIONS


@dataclass(frozen=True)
class HistogramImage:
    """Histograms of colours and edge orientations; nothing is fitted, so domains are comparable."""

    max_images: int = 4
    max_pixels: int = MAX_PIXELS

    def description(self) -> dict[str, str | int | float | None]:
        return {"name": "histogram", "kind": "colour and gradient histograms", "max_images": self.max_images}

    def load(self) -> LoadedEncoder:
        return _LoadedHistogram(self)


class _LoadedHistogram:
    dim = HISTOGRAM_DIM

    def __init__(self, encoder: HistogramImage) -> None:
        self.encoder = encoder

    def __call__(self, items: Sequence[ItemRecord]) -> Encoded:
        return _encode_items(
            items,
            lambda pictures: np.stack([histogram(picture) for picture in pictures]),
            self.dim,
            max_images=self.encoder.max_images,
            max_pixels=self.encoder.max_pixels,
            batch_size=64,
        )


def histogram(picture: Image) -> NDArray[np.float32]:
    """Compute the histogram (136,) of an RGB image: roots of the shares of 64 colours and 72 gradients.

    Either part is scaled to a mean square of 1 (gradients of a flat image are 0).
    """
    from PIL import Image

    pixels = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.int64)
    levels = pixels * COLOURS // 256
    colour = levels @ np.array([COLOURS * COLOURS, COLOURS, 1])
    colours = np.bincount(colour.ravel(), minlength=COLOURS**3)

    grey = pixels @ np.array([0.299, 0.587, 0.114])
    down, across = np.gradient(grey)
    strength = np.hypot(across, down)
    strength[strength < 1e-6] = 0
    angle = np.arctan2(down, across) % np.pi  # an edge and its negative have the same orientation
    orientation = np.minimum((angle / np.pi * ORIENTATIONS).astype(np.int64), ORIENTATIONS - 1)
    cell = np.arange(SIDE) * CELLS // SIDE
    where = (cell[:, None] * CELLS + cell[None, :]) * ORIENTATIONS + orientation
    gradients = np.bincount(where.ravel(), weights=strength.ravel(), minlength=CELLS * CELLS * ORIENTATIONS)
    return np.concatenate([_normalize_counts(colours), _normalize_counts(gradients)]).astype(np.float32)


def _normalize_counts(counts: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
    total = counts.sum()
    return np.sqrt(counts / total * len(counts)) if total > 0 else np.zeros(len(counts))

"""Small domains with items of every kind, and tiny random transformers models."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from antdist.data.domain import Domain, ItemRecord, Sequences, open_domain, write_domain

WORDS = ["red", "blue", "green", "lamp", "chair", "table", "steel", "wood", "large", "small", "garden", "desk"]


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    """A noisy picture of one ground colour, as bytes."""
    rng = np.random.default_rng(seed)
    pixels = (rng.integers(0, 200, 3) + rng.integers(0, 55, (size[1], size[0], 3))).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


def some_items(count: int, seed: int = 0) -> list[ItemRecord]:
    """Items of which every 5th has no text, every 3rd no picture, every 4th no price; the others have one or two."""
    rng = np.random.default_rng(seed)
    items = []
    for n in range(count):
        text = None if n % 5 == 4 else " ".join(rng.choice(WORDS, rng.integers(2, 9)))
        price = None if n % 4 == 3 else float(np.round(rng.lognormal(2, 1), 2))
        images = [] if n % 3 == 2 else [picture(seed * 1000 + 10 * n + k) for k in range(1 + n % 2)]
        items.append(ItemRecord(n, f"item{n}", text, price, images))
    return items


MakeDomain = Callable[..., Domain]


@pytest.fixture
def make_domain(tmp_path: Path) -> MakeDomain:
    """`make_domain(name, items, items_per_shard=4)`: a prepared domain of these items below `tmp_path`."""

    def make(name: str, items: list[ItemRecord], items_per_shard: int = 4) -> Domain:
        sequences = Sequences(np.array([0, 3]), np.array([0, 1, 0]) % len(items), np.arange(3))
        write_domain(tmp_path / name, name, items, sequences, ["u0"], {}, items_per_shard=items_per_shard)
        return open_domain(tmp_path / name)

    return make


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 16 dimensions with a word-piece tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {token: n for n, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_swin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Swin of 16 dimensions for pictures of 32 x 32, with its image processor."""
    import torch
    from transformers import SwinConfig, SwinModel, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("swin")
    torch.manual_seed(0)
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    SwinModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder

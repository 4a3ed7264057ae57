"""Small prepared domains and tiny random transformers models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from antdist.data.domain import Domain, Sequences, open_domain
from antdist.data.shards import ItemRecord
from antdist.data.writing import write_domain
from tests.items import WORDS

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
        max_position_embeddings=256,
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

"""Small prepared domains with features, for tests of what comes after preparation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from antdist import ragged
from antdist.data.domain import Domain, Sequences, open_domain
from antdist.data.shards import ItemRecord
from antdist.data.writing import write_domain
from antdist.features.table import FeatureMeta, features_folder, write_meta, write_part


def make_domain(
    parent: Path,
    name: str,
    *,
    users: int = 40,
    items: int = 30,
    seed: int = 0,
    longest: int = 14,
    block_users: int = 8,
    blocks_per_shard: int | None = None,
    items_per_shard: int = 4096,
    dims: dict[str, int] | None = None,
    missing: float = 0.2,
) -> Domain:
    """Write a domain of random walks over items, with random features of `dims`."""
    random = np.random.default_rng([seed, len(name)])
    lengths = random.integers(3, longest + 1, users)
    starts = random.integers(0, items, users)
    sequences = [(s + np.cumsum(random.integers(1, 4, n))) % items for s, n in zip(starts, lengths, strict=True)]
    offsets = ragged.offsets(lengths)
    flat = np.concatenate(sequences).astype(np.int64)
    records = [ItemRecord(i, f"{name}-{i}", f"thing {i} of {name}", float(i), []) for i in range(items)]
    folder = parent / name
    write_domain(
        folder,
        name,
        records,
        Sequences(offsets, flat, np.arange(len(flat), dtype=np.int64)),
        [f"user-{u}" for u in range(users)],
        {"format": "test"},
        block_users=block_users,
        blocks_per_shard=blocks_per_shard,
        items_per_shard=items_per_shard,
    )
    domain = open_domain(folder)
    for modality, dim in (dims if dims is not None else {"text": 12, "image": 10, "price": 6}).items():
        give_features(domain, modality, dim, seed=seed, missing=missing)
    return domain


def give_features(
    domain: Domain, modality: str, dim: int, *, seed: int = 0, missing: float = 0.0, encoder: str = "random"
) -> None:
    """Write a feature table of random unit rows, some of them missing."""
    random = np.random.default_rng([seed, len(modality), dim])
    items = domain.manifest.items
    values = random.standard_normal((items, dim)).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    present = random.random(items) >= missing
    values[~present] = 0
    folder = features_folder(domain)
    folder.mkdir(exist_ok=True)
    part = write_part(folder, modality, 0, first=0, values=values, present=present)
    write_meta(
        folder,
        FeatureMeta.model_validate(
            {
                "modality": modality,
                "encoder": {"name": encoder, "digest": encoder},
                "dim": dim,
                "dtype": "float32",
                "items": items,
                "fingerprint": domain.fingerprint,
                "present": int(present.sum()),
                "parts": [part.model_dump()],
            }
        ),
    )


def make_domains(parent: Path, names: Sequence[str], **options: int) -> list[Domain]:
    return [make_domain(parent, name, seed=seed, **options) for seed, name in enumerate(names)]  # type: ignore[arg-type]

"""What the source says of each item, pictures unread."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from antdist.data.shards import read_samples

if TYPE_CHECKING:
    from antdist.data.domain import Domain


@dataclass(frozen=True)
class ItemFacts:
    """An item without the bytes of its pictures."""

    text: str | None
    price: float | None
    images: int

    def has(self, modality: str) -> bool:
        if modality == "text":
            return has_text(self.text)
        return self.price is not None if modality == "price" else self.images > 0


def has_text(text: str | None) -> bool:
    return text is not None and bool(text.strip())


def item_facts(domain: Domain) -> Iterator[ItemFacts]:
    """All items of the domain in order of their index."""
    for shard in domain.manifest.item_shards:
        keys = [f"{index:09d}" for index in range(shard.first, shard.first + shard.items)]
        for sample in read_samples(domain.folder / shard.name, keys, lambda name: name.endswith(".json")):
            fields = json.loads(sample["json"])
            yield ItemFacts(fields["text"], fields["price"], fields["images"])


def source_has(domain: Domain, modality: str) -> bool:
    """Whether any item has the modality; reads up to the first that has."""
    return any(facts.has(modality) for facts in item_facts(domain))

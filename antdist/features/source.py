"""What the source says of each item, pictures unread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from antdist.data.places import open_unchecked
from antdist.data.shards import ItemMetadata, read_item_metadata

if TYPE_CHECKING:
    from antdist.data.domain import Domain


def has_modality(facts: ItemMetadata, modality: str) -> bool:
    """Whether the item has the modality in the source."""
    if modality == "text":
        return has_text(facts.text)
    return facts.price is not None if modality == "price" else facts.images > 0


def has_text(text: str | None) -> bool:
    return text is not None and bool(text.strip())


def item_metadata(domain: Domain) -> Iterator[ItemMetadata]:
    """All items of the domain in order of their index."""
    for shard in domain.manifest.item_shards:
        keys = [f"{index:09d}" for index in range(shard.first, shard.first + shard.items)]
        with open_unchecked(domain.folder, shard) as stream:
            yield from read_item_metadata(stream, domain.folder / shard.name, keys)


def source_has_modality(domain: Domain, modality: str) -> bool:
    """Whether any item has the modality; reads up to the first that has."""
    return any(has_modality(facts, modality) for facts in item_metadata(domain))

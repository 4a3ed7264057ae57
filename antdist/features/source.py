"""Which modalities the items of a domain have in the source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from antdist.data.places import open_unchecked
from antdist.data.shards import ItemMetadata, read_item_metadata

if TYPE_CHECKING:
    from antdist.data.domain import Domain


def has_modality(item: ItemMetadata, modality: str) -> bool:
    """Return whether the item has the modality in the source."""
    if modality == "text":
        return has_text(item.text)
    return item.price is not None if modality == "price" else item.images > 0


def has_text(text: str | None) -> bool:
    """Return whether the text is present and not blank."""
    return text is not None and bool(text.strip())


def item_metadata(domain: Domain) -> Iterator[ItemMetadata]:
    """Read the items in index order without images, and without checking digests of local shards."""
    for shard in domain.manifest.item_shards:
        with open_unchecked(domain.folder, shard) as stream:
            yield from read_item_metadata(stream, domain.folder / shard.name, shard.keys)


def source_has_modality(domain: Domain, modality: str) -> bool:
    """Return whether any item has the modality; reads up to the first that has."""
    return any(has_modality(item, modality) for item in item_metadata(domain))

"""Make the feature tables of domains: plan and encode the missing parts, write the meta files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from antdist.data.quarantine import MAX_BAD, QUARANTINE_NAME, BadRecord, max_bad_records, write_quarantine
from antdist.errors import UserError
from antdist.features.encoders.base import Encoder
from antdist.features.encoders.image import MAX_PIXELS, HistogramImage, find_image_encoder
from antdist.features.encoders.price import DIM, FREQUENCY, PriceEncoder, Scale
from antdist.features.encoders.text import (
    FIT_TEXTS,
    HashedText,
    Pooling,
    find_text_encoder,
    fit_projection,
    open_projection,
)
from antdist.features.encoding import encode_shards
from antdist.features.source import item_metadata
from antdist.features.table import Dtype, FeatureMeta, is_part_intact, write_meta, write_part
from antdist.features.tasks import (
    PartRecord,
    Records,
    TableRequest,
    find_empty_table,
    find_table,
    plan_tasks,
    request_table,
)
from antdist.io.logs import get_logger
from antdist.report import Report

if TYPE_CHECKING:
    from antdist.data.domain import Domain

logger = get_logger(__name__)

PROJECTION_NAME = "hashed-text.safetensors"


@dataclass(frozen=True)
class TableReport:
    """One table, and what this run did for it.

    `encoded_items` counts items that have the modality; `seconds` is the sum over workers.
    """

    domain: str
    modality: str
    encoder: str
    identity: str
    dim: int
    items: int
    present: int
    broken: int
    parts: int
    encoded_parts: int
    encoded_items: int
    seconds: float

    @property
    def rate(self) -> float | None:
        """Return encoded items a second and worker; None if nothing was encoded."""
        return self.encoded_items / self.seconds if self.encoded_items and self.seconds > 0 else None

    def line(self) -> str:
        """Format the report for the terminal."""
        line = f"{self.domain} {self.modality}: "
        if self.present:
            line += f"{self.encoder}, {self.present:,} of {self.items:,} items, dimension {self.dim}"
        else:
            line += "no item has it"
        if self.broken:
            line += f", {self.broken:,} broken image{'s' * (self.broken > 1)} skipped (features/{QUARANTINE_NAME})"
        if self.encoded_parts < self.parts:
            line += f", {self.parts - self.encoded_parts} of {self.parts} parts were finished before"
        if self.rate is not None:
            line += f", {self.rate:,.0f} items/s a worker"
        return line


@dataclass(frozen=True, repr=False)
class FeaturizeReport(Report):
    """The tables of all domains, and the time that making them took."""

    table_key = "tables"

    tables: list[TableReport]
    seconds: float
    workers: int

    def lines(self) -> list[str]:
        """Format the report for the terminal."""
        workers = f"{self.workers or 'no'} worker{'' if self.workers == 1 else 's'}"
        return [*(table.line() for table in self.tables), f"{self.seconds:.1f} s, {workers}"]

    def to_json(self) -> dict[str, Any]:
        tables = [asdict(table) | {"rate": table.rate} for table in self.tables]
        return {"tables": tables, "seconds": self.seconds, "workers": self.workers}


def featurize_domains(
    domains: Sequence[Domain],
    *,
    text: str | None = None,
    image: str | None = None,
    price: str | None = None,
    pooling: Pooling | None = None,
    max_length: int = 256,
    text_dim: int = 128,
    projection: Path | None = None,
    max_images: int = 4,
    max_pixels: int = MAX_PIXELS,
    max_bad: float = MAX_BAD,
    price_range: float | None = None,
    price_frequency: float = FREQUENCY,
    batch_size: int = 64,
    dtype: Dtype = "float32",
    device: str = "auto",
    workers: int = 2,
    threads: int | None = None,
) -> FeaturizeReport:
    """Make feature tables of domains that will be used together (docs/spec/ant.md, section 2).

    Args:
        text, pooling, max_length: see `find_text_encoder`; or `hashed`, with `text_dim` and `projection`, see
            `find_projection`. None: no text features.
        image, max_images, max_pixels: see `find_image_encoder`; or `histogram`. None: no image features.
        price, price_range, price_frequency: scale, range and frequency of `PriceEncoder`. None: no price features.
        max_bad: share of a domain's images that may be broken; they are listed in `features/quarantine.jsonl`.
        batch_size: texts or images a forward pass.
        dtype: in which the tables are stored.
        device, workers, threads: see `encode_shards`.

    Raises:
        UserError: no modality is requested, an encoder cannot be found, a shard is damaged, a feature is NaN or Inf, or
            more images are broken than allowed.
    """
    if text is None and image is None and price is None:
        raise UserError("no features requested", where="featurize", remedy="give --text, --image or --price")
    folders = [domain.writable_folder() for domain in domains]
    start = time.monotonic()
    prices = PriceEncoder(cast("Scale", price), price_range, price_frequency) if price is not None else None
    encoders: dict[str, Encoder] = {}
    options: dict[str, Any] = {"batch_size": batch_size, "device": device}
    if text == "hashed":
        encoders["text"] = find_projection(domains, projection or folders[0].parent / PROJECTION_NAME, text_dim)
    elif text is not None:
        encoders["text"] = find_text_encoder(text, pooling=pooling, max_length=max_length, **options)
    if image == "histogram":
        encoders["image"] = HistogramImage(max_images, max_pixels)
    elif image is not None:
        encoders["image"] = find_image_encoder(image, max_images=max_images, max_pixels=max_pixels, **options)
    tables = _encode_tables(domains, encoders, dtype, max_bad, workers, threads, device)
    if prices is not None:
        tables += [_make_price_table(domain, prices, dtype) for domain in domains]
    return FeaturizeReport(tables, time.monotonic() - start, workers)


def find_projection(domains: Sequence[Domain], path: Path, dim: int) -> HashedText:
    """Open the projection in `path`, or fit one jointly on an evenly spread sample of the domains' texts.

    Args:
        dim: of the features, if the projection is fitted now.
    """
    names = [domain.name for domain in domains]
    if path.is_file():
        logger.info(f"hashed text: using the projection in {path}")
        return open_projection(path)
    stride = -(-sum(domain.manifest.items for domain in domains) // FIT_TEXTS)
    texts = [item.text for domain in domains for item in islice(item_metadata(domain), 0, None, max(stride, 1))]
    logger.info(f"hashed text: fitting one projection on {', '.join(names)}, stored in {path}")
    return fit_projection([text for text in texts if text is not None], dim, path, names)


def _encode_tables(
    domains: Sequence[Domain],
    encoders: dict[str, Encoder],
    dtype: Dtype,
    max_bad: float,
    workers: int,
    threads: int | None,
    device: str,
) -> list[TableReport]:
    """Make the tables of all encoders and domains."""
    requests = {
        domain.writable_folder(): [
            request_table(domain, modality, encoder.description(), dtype) for modality, encoder in encoders.items()
        ]
        for domain in domains
    }
    tasks, finished = plan_tasks(domains, requests)
    fresh = encode_shards(tasks, encoders, workers, threads, device)
    return [
        _finish_table(domain, request, finished, fresh, max_bad)
        for domain in domains
        for request in requests[domain.writable_folder()]
    ]


def _finish_table(
    domain: Domain, request: TableRequest, finished: Records, fresh: Records, max_bad: float
) -> TableReport:
    """Write the table's meta file, and delete files that no longer belong to it.

    Raises:
        UserError: too many images are broken; the parts are kept for a run with a higher `max_bad`.
    """
    empty = find_empty_table(request)
    if empty is not None:
        return _report_table(domain, empty, [])
    keys = [(request.domain, request.modality, shard) for shard in range(len(domain.manifest.item_shards))]
    records = [fresh[key] if key in fresh else finished[key] for key in keys]
    present = sum(record.part.present for record in records)
    if request.modality == "image":
        _quarantine_images(domain, request, records, max_bad)
    meta = FeatureMeta(
        modality=cast("Any", request.modality),
        encoder=request.encoder,
        dim=records[0].dim,
        dtype=request.dtype,
        items=domain.manifest.items,
        fingerprint=domain.fingerprint,
        present=present,
        broken=sum(len(record.faults) for record in records),
        parts=[record.part for record in records] if present else [],
    )
    write_meta(request.folder, meta)
    _delete_stale_files(request.folder, meta)
    return _report_table(domain, meta, [fresh[key] for key in keys if key in fresh])


def _quarantine_images(domain: Domain, request: TableRequest, records: list[PartRecord], max_bad: float) -> None:
    """List the images that could not be decoded, unless they are too many."""
    shards = domain.manifest.item_shards
    bad = [
        BadRecord(str(domain.folder / shards[record.shard].name), None, item, reason)
        for record in records
        for item, reason in record.faults
    ]
    seen = sum(record.images for record in records)
    if len(bad) > (most := max_bad_records(seen, max_bad)):
        raise UserError(
            f"{len(bad):,} of {seen:,} images cannot be decoded, at most {most:,} may be; item {bad[0].key}: "
            f"{bad[0].reason}",
            where=bad[0].file,
            remedy="fix the images and prepare the domain again, or allow more with --max-bad",
        )
    (request.folder / QUARANTINE_NAME).unlink(missing_ok=True)
    if bad:
        write_quarantine(request.folder, bad)


def _delete_stale_files(folder: Path, meta: FeatureMeta) -> None:
    """Delete the parts of an older table and the temporary files of an interrupted run."""
    kept = {f"{part.name}{end}" for part in meta.parts for end in (".npy", ".present.npy", ".json")}
    for path in [*folder.glob(f"{meta.modality}-*"), *folder.glob(f".{meta.modality}-*.tmp")]:
        if path.name not in kept:
            path.unlink()


def _report_table(domain: Domain, meta: FeatureMeta, fresh: Sequence[PartRecord]) -> TableReport:
    return TableReport(
        domain=domain.name,
        modality=meta.modality,
        encoder=meta.encoder_name,
        identity=meta.identity,
        dim=meta.dim,
        items=meta.items,
        present=meta.present,
        broken=meta.broken,
        parts=len(meta.parts),
        encoded_parts=len(fresh),
        encoded_items=sum(record.part.present for record in fresh),
        seconds=sum(record.seconds for record in fresh),
    )


def _make_price_table(domain: Domain, encoder: PriceEncoder, dtype: Dtype) -> TableReport:
    """Make the price table in this process: its scale needs all prices, which are read in seconds.

    The scale is fitted on the items that the domain first had prices for. Appended items are placed on the same scale, so
    that the features of old items, which models have been trained on, do not change.
    """
    start = time.monotonic()
    folder = domain.writable_folder() / "features"
    folder.mkdir(exist_ok=True)
    request = request_table(domain, "price", encoder.description(), dtype)
    meta = find_table(request)
    if meta is not None and all(is_part_intact(folder, part) for part in meta.parts):
        return _report_table(domain, meta, [])
    before = find_table(request, domain.manifest.ancestors)
    known = {part.first: part for part in before.parts if is_part_intact(folder, part)} if before else {}
    (folder / "price.json").unlink(missing_ok=True)
    source = (np.nan if item.price is None else item.price for item in item_metadata(domain))
    prices = np.fromiter(source, np.float64, domain.manifest.items)
    scaled = encoder.scaled(prices, prices[: _count_first_priced(domain, prices)])
    parts, fresh = [], []
    for number, shard in enumerate(domain.manifest.item_shards if np.isfinite(scaled).any() else []):
        part = known.get(shard.first)
        if part is None or part.items != shard.items:
            values, present = encoder.encode(scaled[shard.first : shard.first + shard.items])
            rounded = values.astype(dtype)
            part = write_part(folder, "price", number, first=shard.first, values=rounded, present=present)
            fresh.append((number, part))
        parts.append(part)
    meta = FeatureMeta(
        modality="price",
        encoder=request.encoder,
        dim=DIM,
        dtype=dtype,
        items=domain.manifest.items,
        fingerprint=domain.fingerprint,
        present=sum(part.present for part in parts),
        parts=parts,
    )
    write_meta(folder, meta)
    _delete_stale_files(folder, meta)
    seconds = time.monotonic() - start
    records = [PartRecord(request, number, part, meta.dim, 0, [], seconds / len(fresh)) for number, part in fresh]
    return _report_table(domain, meta, records)


def _count_first_priced(domain: Domain, prices: NDArray[np.float64]) -> int:
    """Return how many items the domain had when it first had a price."""
    sizes = [*(generation.items for generation in domain.manifest.earlier), domain.manifest.items]
    return next((size for size in sizes if np.isfinite(prices[:size]).any()), domain.manifest.items)

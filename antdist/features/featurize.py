"""Run frozen encoders over a domain's item shards: one shard is one unit of work and one part of the feature table.

With workers, Ray Data hands the units to actors that load each encoder once; every part lies finished on disk, with a
small file that says what made it, before the next begins, so a run that is killed goes on where it stopped. Of a domain that
`prepare --append` has grown only the shards of new items are encoded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from antdist.data.quarantine import MAX_BAD, QUARANTINE_NAME, BadRecord, max_bad_records, write_quarantine
from antdist.distributed.local_ray import ray_data_session
from antdist.errors import UserError
from antdist.features.encoders.base import Encoded, Encoder, LoadedEncoder
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
from antdist.features.source import item_metadata
from antdist.features.table import (
    Dtype,
    FeatureMeta,
    TablePart,
    is_part_intact,
    write_meta,
    write_part,
)
from antdist.io.files import write_json
from antdist.io.logs import get_logger
from antdist.io.progress import track
from antdist.report import Report

if TYPE_CHECKING:
    from antdist.data.domain import Domain
    from antdist.data.shards import ItemRecord

logger = get_logger(__name__)

CHUNK = 512  # items whose pictures are in memory together
PROJECTION_NAME = "hashed-text.safetensors"
Description = dict[str, str | int | float | None]


@dataclass(frozen=True)
class TableReport:
    """One table: how it stands, and what this run did for it. `encoded_items` counts those that have the modality;
    `seconds` are the workers', added up."""

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
        """Encoded items a second of one worker; None if nothing was encoded."""
        return self.encoded_items / self.seconds if self.encoded_items and self.seconds > 0 else None


@dataclass(frozen=True, repr=False)
class FeaturizeReport(Report):
    """What `featurize` did."""

    table_key = "tables"

    tables: list[TableReport]
    seconds: float
    workers: int

    def lines(self) -> list[str]:
        said = []
        for table in self.tables:
            line = f"{table.domain} {table.modality}: {table.encoder}, {table.present:,} of {table.items:,} items, dimension {table.dim}"
            if table.present == 0:
                line = f"{table.domain} {table.modality}: no item has it"
            if table.broken:
                line += f", {table.broken:,} broken pictures skipped (features/quarantine.jsonl)"
            if table.encoded_parts < table.parts:
                line += f", {table.parts - table.encoded_parts} of {table.parts} parts were finished before"
            if table.rate is not None:
                line += f", {table.rate:,.0f} items/s a worker"
            said.append(line)
        return [*said, f"{self.seconds:.1f} s, {self.workers or 'no'} worker{'' if self.workers == 1 else 's'}"]

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
    """Make the feature tables of prepared domains (spec, section 2).

    Args:
        domains: those that will be used together.
        text: `minilm`, `hashed`, or a transformers encoder's folder or name; None: no text features.
        image: `histogram`, or a transformers vision model's folder or name; None: no image features.
        price: the scale, `raw`, `minmax`, `log` or `quantile`; None: no price features.
        pooling, max_length: of a transformers text encoder (`antdist.features.encoders.text.find_text_encoder`).
        text_dim: of `hashed`.
        projection: of `hashed`: a file fitted before, or where to put the one fitted now, jointly on all `domains`.
            None: `hashed-text.safetensors` beside the first domain's folder.
        max_images, max_pixels: pictures averaged an item; a picture of more pixels counts as broken.
        max_bad: how many of a domain's pictures may be broken, as a share; they are listed in `features/quarantine.jsonl`.
        price_range, price_frequency: see `antdist.features.encoders.price`.
        batch_size: texts or pictures a forward pass.
        dtype: that the tables are stored in.
        device: `auto`, `cpu` or `cuda`.
        workers: Ray actors, each with its own copy of the encoders; 0: in this process, without Ray.
        threads: CPU threads a worker; None: its share of the cores.

    Raises:
        UserError: no modality asked for, an encoder that cannot be found, a damaged shard, a feature that is not finite,
            more broken pictures than the cap.
    """
    if text is None and image is None and price is None:
        raise UserError("no features asked for", where="featurize", remedy="give --text, --image or --price")
    for domain in domains:
        domain.writable_folder()
    start = time.monotonic()
    prices = PriceEncoder(cast("Scale", price), price_range, price_frequency) if price is not None else None
    encoders: dict[str, Encoder] = {}
    if text == "hashed":
        path = projection or domains[0].writable_folder().parent / PROJECTION_NAME
        encoders["text"] = _hashed(domains, path, text_dim)
    elif text is not None:
        encoders["text"] = find_text_encoder(
            text, pooling=pooling, max_length=max_length, batch_size=batch_size, device=device
        )
    if image == "histogram":
        encoders["image"] = HistogramImage(max_images, max_pixels)
    elif image is not None:
        encoders["image"] = find_image_encoder(
            image, max_images=max_images, max_pixels=max_pixels, batch_size=batch_size, device=device
        )

    orders = {
        domain.writable_folder(): [
            _order(domain, modality, encoder.description(), dtype) for modality, encoder in encoders.items()
        ]
        for domain in domains
    }
    units, finished = _plan_work(domains, orders)
    fresh = _encode_all(units, encoders, workers, threads, device)
    tables = [
        _finish_table(domain, order, finished, fresh, max_bad)
        for domain in domains
        for order in orders[domain.writable_folder()]
    ]
    if prices is not None:
        tables += [_price_table(domain, prices, dtype) for domain in domains]
    return FeaturizeReport(tables, time.monotonic() - start, workers)


def _hashed(domains: Sequence[Domain], path: Path, dim: int) -> HashedText:
    """The projection in `path`, or one fitted jointly on the domains' texts (a spread sample of them)."""
    names = [domain.name for domain in domains]
    if path.is_file():
        logger.info(f"hashed text: using the projection in {path}")
        return open_projection(path)
    stride = -(-sum(domain.manifest.items for domain in domains) // FIT_TEXTS)
    texts = [facts.text for domain in domains for facts in islice(item_metadata(domain), 0, None, max(stride, 1))]
    logger.info(f"hashed text: fitting one projection on {', '.join(names)}, kept in {path}")
    return fit_projection([text for text in texts if text is not None], dim, path, names)


# ------------------------------------------------------------------------------------------- what is to be done


@dataclass(frozen=True)
class TableRequest:
    """A table to be made: whose, of what, by which encoder, in which type. The domain's folder is absolute."""

    domain: str
    fingerprint: str
    modality: str
    encoder: Description
    dtype: Dtype

    @property
    def folder(self) -> Path:
        return Path(self.domain) / "features"

    def made_by(self) -> dict[str, Any]:
        """What a part must have been made by to answer this order; where it lies and what the encoder is called may differ."""
        encoder = {key: value for key, value in self.encoder.items() if key != "name"}
        return {"fingerprint": self.fingerprint, "modality": self.modality, "encoder": encoder, "dtype": self.dtype}


def _order(domain: Domain, modality: str, encoder: Description, dtype: Dtype) -> TableRequest:
    return TableRequest(domain.address, domain.fingerprint, modality, encoder, dtype)


@dataclass(frozen=True)
class ShardTask:
    """One item shard, and the tables that still lack the part of it."""

    domain: str
    shard: int
    orders: list[TableRequest]


@dataclass(frozen=True)
class PartRecord:
    """What stands beside a finished part: the order that it answers, the part, and how it went."""

    order: TableRequest
    shard: int
    part: TablePart
    dim: int
    pictures: int
    faults: list[list[str]]  # item id and reason of each picture that could not be read
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "order": asdict(self.order), "part": self.part.model_dump()}

    @staticmethod
    def from_json(content: dict[str, Any]) -> PartRecord:
        return PartRecord(
            **{**content, "order": TableRequest(**content["order"]), "part": TablePart(**content["part"])}
        )


Notes = dict[tuple[str, str, int], PartRecord]  # by domain folder, modality, shard


def _plan_work(domains: Sequence[Domain], orders: Mapping[Path, list[TableRequest]]) -> tuple[list[ShardTask], Notes]:
    """The shards to encode, and the parts that need not be."""
    units: list[ShardTask] = []
    finished: Notes = {}
    for domain in domains:
        (domain.writable_folder() / "features").mkdir(exist_ok=True)
        mine = [order for order in orders[domain.writable_folder()] if _empty_table(order) is None]
        for shard in range(len(domain.manifest.item_shards)):
            found = {order.modality: _finished_part(domain, order, shard) for order in mine}
            finished |= {(n.order.domain, n.order.modality, shard): n for n in found.values() if n is not None}
            missing = [order for order in mine if found[order.modality] is None]
            if missing:
                units.append(ShardTask(domain.address, shard, missing))
            for order in missing:
                (order.folder / f"{order.modality}.json").unlink(missing_ok=True)  # no longer true of its parts
    return units, finished


def _empty_table(order: TableRequest) -> FeatureMeta | None:
    """The finished table, if it is this order's and says that no item has the modality."""
    meta = _meta_of(order)
    return meta if meta is not None and not meta.parts else None


def _meta_of(order: TableRequest, ancestors: Sequence[str] = ()) -> FeatureMeta | None:
    """The finished table, if it is this order's, or was for one of the `ancestors` of the domain's manifest."""
    path = order.folder / f"{order.modality}.json"
    try:
        meta = FeatureMeta.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    fingerprint = order.fingerprint if meta.fingerprint in ancestors else meta.fingerprint
    made_by = TableRequest(order.domain, fingerprint, meta.modality, meta.encoder, meta.dtype).made_by()
    return meta if made_by == order.made_by() else None


def _note_path(order: TableRequest, shard: int) -> Path:
    return order.folder / f"{order.modality}-{shard:05d}.json"


def _finished_part(domain: Domain, order: TableRequest, shard: int) -> PartRecord | None:
    """The note of a part that answers this order and whose files are whole, by size and digest. What was made before an append
    counts: that leaves the old item shards as they are."""
    items = domain.manifest.item_shards[shard]
    try:
        content = json.loads(_note_path(order, shard).read_text(encoding="utf-8"))
        made_by, part = content["made_by"], TablePart(**content["part"])
        if made_by["fingerprint"] in domain.manifest.ancestors:
            made_by = {**made_by, "fingerprint": order.fingerprint}
        if made_by != order.made_by() or (part.first, part.items) != (items.first, items.items):
            return None
        note = PartRecord(order, shard, part, content["dim"], content["pictures"], content["faults"], 0.0)
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None
    return note if is_part_intact(order.folder, part) else None


# ------------------------------------------------------------------------------------------------------ encoding


def _encode_all(
    units: list[ShardTask], encoders: dict[str, Encoder], workers: int, threads: int | None, device: str
) -> Notes:
    if not units:
        return {}
    results = (
        _encode_locally(units, encoders, threads)
        if workers == 0
        else _encode_with_ray(units, encoders, workers, threads, device)
    )
    fresh: Notes = {}
    for notes in track(results, "item shards encoded", len(units)):
        fresh |= {(note.order.domain, note.order.modality, note.shard): note for note in notes}
    return fresh


def _encode_locally(
    units: list[ShardTask], encoders: dict[str, Encoder], threads: int | None
) -> Iterator[list[PartRecord]]:
    worker = EncodingWorker(encoders, threads)
    for unit in units:
        yield worker.encode(unit)


class EncodingWorker:
    """Encodes units; loads each encoder at its first use and keeps it."""

    def __init__(self, encoders: dict[str, Encoder], threads: int | None = None) -> None:
        self.encoders = encoders
        self.loaded: dict[str, LoadedEncoder] = {}
        if threads is not None:
            import torch

            torch.set_num_threads(threads)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's interface: a row in, a row out; a user's mistake comes back as a row."""
        unit = ShardTask(
            row["domain"], int(row["shard"]), [TableRequest(**order) for order in json.loads(row["orders"])]
        )
        try:
            return {"notes": json.dumps([note.to_json() for note in self.encode(unit)]), "error": ""}
        except UserError as error:
            return {"notes": "[]", "error": json.dumps([error.what, error.where, error.remedy])}

    def encode(self, unit: ShardTask) -> list[PartRecord]:
        """Read the shard once, encode it for each order, write the parts."""
        from antdist.data.domain import open_domain

        domain = open_domain(unit.domain)
        shard = domain.manifest.item_shards[unit.shard]
        for order in unit.orders:
            if order.modality not in self.loaded:
                self.loaded[order.modality] = self.encoders[order.modality].load()
        chunks: dict[str, list[Encoded]] = {order.modality: [] for order in unit.orders}
        seconds = dict.fromkeys(chunks, 0.0)
        records = domain.items(shard)
        while items := list(islice(records, CHUNK)):
            for order in unit.orders:
                start = time.monotonic()
                encoded = self.loaded[order.modality](items)
                _check_finite(encoded, items, domain.name, order)
                chunks[order.modality].append(encoded)
                seconds[order.modality] += time.monotonic() - start
        return [self._write(unit, order, shard.first, chunks[order.modality], seconds) for order in unit.orders]

    def _write(
        self, unit: ShardTask, order: TableRequest, first: int, chunks: list[Encoded], seconds: dict[str, float]
    ) -> PartRecord:
        present = np.concatenate([chunk.present for chunk in chunks])
        values = np.concatenate([chunk.values for chunk in chunks]).astype(order.dtype)
        values[~present] = 0  # what is missing stays missing
        part = write_part(order.folder, order.modality, unit.shard, first=first, values=values, present=present)
        pictures = sum(chunk.pictures for chunk in chunks)
        faults = [list(fault) for chunk in chunks for fault in chunk.faults]
        note = PartRecord(order, unit.shard, part, values.shape[1], pictures, faults, seconds[order.modality])
        kept = {"dim": note.dim, "pictures": pictures, "faults": faults}
        said = {"made_by": order.made_by(), "part": part.model_dump(), **kept}
        write_json(_note_path(order, unit.shard), said)
        return note


def _check_finite(encoded: Encoded, items: Sequence[ItemRecord], domain: str, order: TableRequest) -> None:
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = encoded.values.astype(order.dtype)
    bad = np.flatnonzero(~np.isfinite(stored).all(1) & encoded.present)
    if not len(bad):
        return
    too_large = np.isfinite(encoded.values[bad[0]]).all()
    raise UserError(
        f"the {order.modality} features of item {items[bad[0]].item_id} are "
        + (f"too large for {order.dtype}" if too_large else "not finite"),
        where=f"domain {domain}, encoder {order.encoder['name']}",
        remedy="use --dtype float32"
        if too_large
        else "use another encoder, or --device cpu, which computes in float32",
    )


def _encode_with_ray(
    units: list[ShardTask], encoders: dict[str, Encoder], workers: int, threads: int | None, device: str
) -> Iterator[list[PartRecord]]:
    """Through Ray Data: on the Ray that runs, or on a local one that is started here and stopped at the end."""
    workers = min(workers, len(units))
    rows = [
        {"domain": unit.domain, "shard": unit.shard, "orders": json.dumps([asdict(order) for order in unit.orders])}
        for unit in units
    ]
    with ray_data_session(workers, threads) as share:
        import ray

        gpus = ray.cluster_resources().get("GPU", 0) if device != "cpu" else 0
        encoded = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            EncodingWorker,
            fn_constructor_args=(encoders, share),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=share,
            num_gpus=min(1.0, gpus / workers) if gpus else None,
        )
        for row in encoded.iter_rows():
            if row["error"]:
                what, where, remedy = json.loads(row["error"])
                raise UserError(what, where=where, remedy=remedy)
            yield [PartRecord.from_json(note) for note in json.loads(row["notes"])]


# ----------------------------------------------------------------------------------------------------- finishing


def _finish_table(domain: Domain, order: TableRequest, finished: Notes, fresh: Notes, max_bad: float) -> TableReport:
    """Gather the parts into the table's meta file, written last; forget what no longer belongs to it.

    Raises:
        UserError: more pictures than the cap could not be read; the parts stay, for a run with another cap.
    """
    empty = _empty_table(order)
    if empty is not None:
        return _table_report(domain, empty, [])
    keys = [(order.domain, order.modality, shard) for shard in range(len(domain.manifest.item_shards))]
    notes = [fresh[key] if key in fresh else finished[key] for key in keys]
    present = sum(note.part.present for note in notes)
    if order.modality == "image":
        _quarantine_images(domain, order, notes, max_bad)
    meta = FeatureMeta(
        modality=cast("Any", order.modality),
        encoder=order.encoder,
        dim=notes[0].dim,
        dtype=order.dtype,
        items=domain.manifest.items,
        fingerprint=domain.fingerprint,
        present=present,
        broken=sum(len(note.faults) for note in notes),
        parts=[note.part for note in notes] if present else [],
    )
    write_meta(order.folder, meta)
    _delete_stale_files(order.folder, meta)
    return _table_report(domain, meta, [fresh[key] for key in keys if key in fresh])


def _quarantine_images(domain: Domain, order: TableRequest, notes: list[PartRecord], max_bad: float) -> None:
    """Write down which pictures could not be read, unless they are too many."""
    shards = domain.manifest.item_shards
    bad = [
        BadRecord(str(domain.folder / shards[note.shard].name), None, item, reason)
        for note in notes
        for item, reason in note.faults
    ]
    seen = sum(note.pictures for note in notes)
    if len(bad) > (most := max_bad_records(seen, max_bad)):
        raise UserError(
            f"{len(bad):,} of {seen:,} pictures cannot be read, {most:,} may be; item {bad[0].key}: {bad[0].reason}",
            where=bad[0].file,
            remedy="mend the pictures and prepare the domain again, or allow more with --max-bad",
        )
    (order.folder / QUARANTINE_NAME).unlink(missing_ok=True)
    if bad:
        write_quarantine(order.folder, bad)


def _delete_stale_files(folder: Path, meta: FeatureMeta) -> None:
    """Delete parts of an older table and what an interrupted run left half written."""
    kept = {f"{part.name}{end}" for part in meta.parts for end in (".npy", ".present.npy", ".json")}
    for path in [*folder.glob(f"{meta.modality}-*"), *folder.glob(f".{meta.modality}-*.tmp")]:
        if path.name not in kept:
            path.unlink()


def _table_report(domain: Domain, meta: FeatureMeta, fresh: Sequence[PartRecord]) -> TableReport:
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
        encoded_items=sum(note.part.present for note in fresh),
        seconds=sum(note.seconds for note in fresh),
    )


def _price_table(domain: Domain, encoder: PriceEncoder, dtype: Dtype) -> TableReport:
    """The scale of prices needs all of a domain's (its bounds, its ranks), and all of it next to no time: done here.

    It is fitted on the items that the domain was first prepared with (the first that have prices): appended items are placed on
    it, so that the features of the old ones, which models have learned, do not move."""
    start = time.monotonic()
    folder = domain.writable_folder() / "features"
    folder.mkdir(exist_ok=True)
    order = _order(domain, "price", encoder.description(), dtype)
    meta = _meta_of(order)
    if meta is not None and all(is_part_intact(folder, part) for part in meta.parts):
        return _table_report(domain, meta, [])
    before = _meta_of(order, domain.manifest.ancestors)
    known = {part.first: part for part in before.parts if is_part_intact(folder, part)} if before else {}
    (folder / "price.json").unlink(missing_ok=True)
    source = (np.nan if facts.price is None else facts.price for facts in item_metadata(domain))
    prices = np.fromiter(source, np.float64, domain.manifest.items)
    scaled = encoder.scaled(prices, prices[: _first_priced(domain, prices)])
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
        encoder=order.encoder,
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
    notes = [PartRecord(order, number, part, meta.dim, 0, [], seconds / len(fresh)) for number, part in fresh]
    return _table_report(domain, meta, notes)


def _first_priced(domain: Domain, prices: NDArray[np.float64]) -> int:
    """How many items the domain had when it first had a price."""
    sizes = [*(was.items for was in domain.manifest.earlier), domain.manifest.items]
    return next((size for size in sizes if np.isfinite(prices[:size]).any()), domain.manifest.items)

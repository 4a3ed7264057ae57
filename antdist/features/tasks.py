"""Which parts of which feature tables are still to be made, and the record beside each finished part.

One item shard is one task and one part of every requested table. A part's record says what made it, so that a killed run
continues where it stopped and an append encodes only the shards of new items.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from antdist.features.table import Dtype, FeatureMeta, TablePart, is_part_intact

if TYPE_CHECKING:
    from antdist.data.domain import Domain

Description = dict[str, str | int | float | None]


@dataclass(frozen=True)
class TableRequest:
    """A table to make: of which domain (absolute folder) and modality, by which encoder, in which type."""

    domain: str
    fingerprint: str
    modality: str
    encoder: Description
    dtype: Dtype

    @property
    def folder(self) -> Path:
        return Path(self.domain) / "features"

    def made_by(self) -> dict[str, Any]:
        """Return what must be equal for a finished part to be reused; not its folder or encoder name."""
        encoder = {key: value for key, value in self.encoder.items() if key != "name"}
        return {"fingerprint": self.fingerprint, "modality": self.modality, "encoder": encoder, "dtype": self.dtype}

    def record_path(self, shard: int) -> Path:
        """Return the path of the record beside a finished part."""
        return self.folder / f"{self.modality}-{shard:05d}.json"


def request_table(domain: Domain, modality: str, encoder: Description, dtype: Dtype) -> TableRequest:
    """Request the table of a domain and modality."""
    return TableRequest(domain.address, domain.fingerprint, modality, encoder, dtype)


@dataclass(frozen=True)
class ShardTask:
    """One item shard, and the requested tables that still lack its part."""

    domain: str
    shard: int
    requests: list[TableRequest]


@dataclass(frozen=True)
class PartRecord:
    """A finished part: the request that it fulfils, and how the encoding went."""

    request: TableRequest
    shard: int
    part: TablePart
    dim: int
    images: int  # that were read
    faults: list[list[str]]  # item id and reason of each image that could not be decoded
    seconds: float

    @property
    def key(self) -> PartKey:
        return self.request.domain, self.request.modality, self.shard

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "request": asdict(self.request), "part": self.part.model_dump()}

    @staticmethod
    def from_json(content: dict[str, Any]) -> PartRecord:
        request, part = TableRequest(**content["request"]), TablePart(**content["part"])
        return PartRecord(**{**content, "request": request, "part": part})

    def document(self) -> dict[str, Any]:
        """Return the content of the file beside the part."""
        counts = {"dim": self.dim, "pictures": self.images, "faults": self.faults}
        return {"made_by": self.request.made_by(), "part": self.part.model_dump(), **counts}


PartKey = tuple[str, str, int]  # domain folder, modality, shard
Records = dict[PartKey, PartRecord]


def plan_tasks(
    domains: Sequence[Domain], requests: Mapping[Path, list[TableRequest]]
) -> tuple[list[ShardTask], Records]:
    """Return the shards to encode, and the records of finished parts.

    The meta file of a table that lacks a part is deleted.
    """
    tasks: list[ShardTask] = []
    finished: Records = {}
    for domain in domains:
        (domain.writable_folder() / "features").mkdir(exist_ok=True)
        mine = [request for request in requests[domain.writable_folder()] if find_empty_table(request) is None]
        for shard in range(len(domain.manifest.item_shards)):
            found = {request.modality: _find_finished_part(domain, request, shard) for request in mine}
            finished |= {record.key: record for record in found.values() if record is not None}
            missing = [request for request in mine if found[request.modality] is None]
            if missing:
                tasks.append(ShardTask(domain.address, shard, missing))
            for request in missing:
                (request.folder / f"{request.modality}.json").unlink(missing_ok=True)
    return tasks, finished


def find_empty_table(request: TableRequest) -> FeatureMeta | None:
    """Return the finished table, if it fulfils the request and no item has the modality."""
    meta = find_table(request)
    return meta if meta is not None and not meta.parts else None


def find_table(request: TableRequest, ancestors: Sequence[str] = ()) -> FeatureMeta | None:
    """Return the finished table, if it fulfils the request, or did for one of the domain's `ancestors`."""
    path = request.folder / f"{request.modality}.json"
    try:
        meta = FeatureMeta.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    fingerprint = request.fingerprint if meta.fingerprint in ancestors else meta.fingerprint
    made_by = TableRequest(request.domain, fingerprint, meta.modality, meta.encoder, meta.dtype).made_by()
    return meta if made_by == request.made_by() else None


def _find_finished_part(domain: Domain, request: TableRequest, shard: int) -> PartRecord | None:
    """Return the record of an intact part that fulfils the request.

    A part made before an append counts, since appends leave old item shards unchanged.
    """
    items = domain.manifest.item_shards[shard]
    try:
        content = json.loads(request.record_path(shard).read_text(encoding="utf-8"))
        made_by, part = content["made_by"], TablePart(**content["part"])
        if made_by["fingerprint"] in domain.manifest.ancestors:
            made_by = {**made_by, "fingerprint": request.fingerprint}
        if made_by != request.made_by() or (part.first, part.items) != (items.first, items.items):
            return None
        record = PartRecord(request, shard, part, content["dim"], content["pictures"], content["faults"], 0.0)
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None
    return record if is_part_intact(request.folder, part) else None
